"""Judge videos with VideoCon-Physics (VideoPhy) or VideoPhy-2-AutoEval, two checkpoints of one 7B network."""

import logging
import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from .answer_logprobs import answer_logprobs
from .base import Video
from .frames import check_request, sample_frames, segment_starts
from .mplug_owl_loading import SPLIT_AT_MEDIA, SPLIT_AT_TURNS, MplugOwlTokenizer, load_mplug_owl
from .mplug_owl_model import IMAGE_MEAN, IMAGE_STD
from .weights import resolve_weights, text_hash, weights_identity


logger = logging.getLogger(__name__)

NUM_FRAMES = 32
MAX_TOKENS = 257  # begin token and a window of 256; the original cuts longer prompts and then scores the wrong token
MAX_NEW_TOKENS = 255  # of a generated answer, as in the original

# The wording below is data: the checkpoints know these sentences, down to the blank after "AI:".
_HEAD = (
    "The following is a conversation between a curious human and {}AI assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions.\nHuman: <|video|>\nHuman: "
)
VIDEOCON_SA = _HEAD.format("") + 'Does this video entail the description: "{caption}"?\nAI: '
VIDEOCON_PC = _HEAD.format("") + "Does this video follow the physical laws?\nAI: "
VIDEOPHY2_SA = _HEAD.format("an ") + (
    'Does this video match the description: "{caption}"? Please rate the video on a scale from 1 to 5, where 5 '
    "indicates a perfect match and 1 indicates no relevance.\nAI: "
)
VIDEOPHY2_PC = _HEAD.format("an ") + (
    "Does this video adhere to the physical laws? Rate the video on a scale from 1 to 5, where 5 means full "
    "compliance and 1 means significant violations.\nAI: "
)
VIDEOPHY2_RULE = _HEAD.format("an ") + (
    'Does the video follow the physical rule: "{caption}"?\nChoose 0 if not, 1 if valid, or 2 if indeterminate. \nAI: '
)

_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five")


class _MplugOwlJudge:
    """
    What the two judges share: weights, frames, prompts.

    Args:
        weights: folder or repository id of the checkpoint.
        device: where to run; a GPU if there is one. In bfloat16 the weights take 14 GB.
        dtype: of weights and activations. Norms and logits are float32 in any case.
        batch_size: videos in one pass.
        revision: of the repository.

    Raises:
        ValueError: weights or tokenizer are missing, damaged or of another model.
    """

    name: str
    version: ClassVar[int] = 1  # goes up when equal weights and prompts would score differently
    separators: ClassVar[tuple[str, ...]]
    templates: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        weights: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.bfloat16,
        batch_size: int = 4,
        revision: str | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"Expected `batch_size` >= 1, got {batch_size}.")
        self._folder = resolve_weights(weights, revision)
        self.dtype, self.batch_size = dtype, batch_size
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = load_mplug_owl(self._folder, dtype, self.device)
        self.tokenizer = MplugOwlTokenizer(self._folder, self.model.sizes.num_video_tokens)

    @cached_property
    def identity(self) -> str:
        """Name, version, weights, prompts and settings: equal identities give equal scores."""
        settings = f"{str(self.dtype).removeprefix('torch.')}{self._settings()}"
        weights = weights_identity(self._folder)
        return f"{self.name}:v{self.version}:weights={weights}:prompts={text_hash(*self.templates)}:{settings}"

    def _settings(self) -> str:
        return ""

    @property
    def _max_tokens(self) -> int | None:
        """Tokens of a prompt, where the original cuts longer ones."""
        return MAX_TOKENS

    def _encode_prompts(self, template: str, captions: Sequence[str]) -> list[list[int]]:
        """Raises at captions that do not fit, all of them named, before any video is read."""
        faults, rows = [], []
        for index, caption in enumerate(captions):
            clash = [separator for separator in SPLIT_AT_TURNS if separator in caption]
            rows.append(self.tokenizer.encode_prompt(template.format(caption=caption), self.separators))
            if clash:
                faults.append(f"caption {index} contains {clash[0]!r}, which the prompt uses itself")
            elif self._max_tokens is not None and len(rows[-1]) > self._max_tokens:
                faults.append(f"caption {index} needs {len(rows[-1])} tokens ({caption[:40]!r}...)")
        if faults:
            raise ValueError(
                f"{self.name} was trained on prompts of at most {self._max_tokens} tokens, the video's "
                f"{self.tokenizer.num_video_tokens} included: {'; '.join(faults[:10])}. Pass the short captions "
                "(about 120 tokens are free), not the upsampled ones."
            )
        return rows

    def _questions(self, captions: Sequence[str]) -> list[list[list[int]]]:
        """What `sa` and `pc` ask of every video; `pc` is asked without the caption."""
        adherence, physics = self.templates[:2]
        return [self._encode_prompts(adherence, captions), self._encode_prompts(physics, [""]) * len(captions)]

    @torch.inference_mode()
    def _encode_videos(self, videos: Sequence[Video]) -> Tensor:
        """`(B, V, D)` video tokens."""
        side = self.model.sizes.image_size
        frames = np.stack([sample_frames(v, NUM_FRAMES, segment_starts, lambda h, w: (side, side))[0] for v in videos])
        pixels = torch.from_numpy(frames).to(self.device).float().div(255)
        pixels = (pixels - pixels.new_tensor(IMAGE_MEAN)) / pixels.new_tensor(IMAGE_STD)
        return self.model.encode_video(pixels.permute(0, 1, 4, 2, 3).to(self.dtype))

    def _logprobs(
        self, videos: Sequence[Video], questions: Sequence[Sequence[list[int]]], answers: Sequence[list[int]]
    ) -> Tensor:
        """For N videos, Q questions (each a prompt for every video) and K answers: `(N, Q, K)` float32, on the CPU."""
        parts = []
        for start in range(0, len(videos), self.batch_size):
            batch = slice(start, start + self.batch_size)
            tokens = self._encode_videos(videos[batch])
            prompts = [prompt for question in questions for prompt in question[batch]]
            logprobs = answer_logprobs(self.model, tokens.repeat(len(questions), 1, 1), prompts, answers)
            parts.append(logprobs.unflatten(0, (len(questions), -1)).transpose(0, 1).cpu())
        return torch.cat(parts) if parts else torch.empty(0, len(questions), len(answers))


class VideoConPhysicsJudge(_MplugOwlJudge):
    """
    VideoCon-Physics, the judge of VideoPhy: the probability of "Yes" against "No", for both questions.

    `pc` is asked without the caption. The benchmark counts a score of 0.5 and above as a yes.

    Args:
        weights: folder or repository id of the checkpoint (14.3 GB).
        options: `device`, `dtype`, `batch_size`, `revision`; see `_MplugOwlJudge`.
    """

    name = "videocon-physics"
    separators = SPLIT_AT_TURNS
    templates = (VIDEOCON_SA, VIDEOCON_PC)

    def __init__(self, weights: str | os.PathLike[str] = "videophysics/videocon_physics", **options: Any) -> None:
        super().__init__(weights, **options)

    def score(self, videos: Sequence[Video], prompts: Sequence[str]) -> list[dict[str, Any]]:
        """
        Scores each video; see `VideoJudge.score`.

        Returns:
            For each video `sa` and `pc` in (0, 1), and `raw`: for both the log-probabilities of `yes` and `no`.

        Raises:
            ValueError: a request that cannot be answered, or captions that do not fit the window.
        """
        check_request(videos, prompts)
        questions = self._questions(prompts)
        answers = [self.tokenizer.encode(word)[:1] for word in ("Yes", "No")]
        logprobs = self._logprobs(videos, questions, answers)
        yes = logprobs.softmax(dim=-1)[..., 0]
        return [
            dict(zip(("sa", "pc"), values, strict=True))
            | {"raw": {name: {"yes": row[0], "no": row[1]} for name, row in zip(("sa", "pc"), rows, strict=True)}}
            for values, rows in zip(yes.tolist(), logprobs.tolist(), strict=True)
        ]


class VideoPhy2Judge(_MplugOwlJudge):
    """
    VideoPhy-2-AutoEval: ratings from 1 to 5 for both questions, given as a fifth of the rating.

    The benchmark counts a rating of 4 and above, a score of 0.8 and above, as a yes.

    Args:
        weights: folder or repository id of the checkpoint (14.3 GB).
        mode: `"candidates"` compares the log-probabilities of the five answers and always gives a rating. `"generate"`
            decodes greedily and takes the first number found, 0 where there is none, as the original does.
        score_from: `"rating"` (the likeliest answer) or `"expectation"` over the five; candidates only.
        options: `device`, `dtype`, `batch_size`, `revision`; see `_MplugOwlJudge`.

    Raises:
        ValueError: an unknown mode, or an expectation of generated text.
    """

    name = "videophy2"
    separators = SPLIT_AT_MEDIA
    templates = (VIDEOPHY2_SA, VIDEOPHY2_PC, VIDEOPHY2_RULE)

    def __init__(
        self,
        weights: str | os.PathLike[str] = "videophysics/videophy_2_auto",
        *,
        mode: Literal["candidates", "generate"] = "candidates",
        score_from: Literal["rating", "expectation"] = "rating",
        **options: Any,
    ) -> None:
        if mode not in ("candidates", "generate") or score_from not in ("rating", "expectation"):
            raise ValueError(
                f"Expected `mode` 'candidates' or 'generate' and `score_from` 'rating' or 'expectation', got {mode!r} "
                f"and {score_from!r}."
            )
        if (mode, score_from) == ("generate", "expectation"):
            raise ValueError("A generated text has no expectation: use `mode='candidates'` with `score_from`.")
        self.mode, self.score_from = mode, score_from
        super().__init__(weights, **options)

    def _settings(self) -> str:
        return f",{self.mode},{self.score_from}"

    def score(self, videos: Sequence[Video], prompts: Sequence[str]) -> list[dict[str, Any]]:
        """
        Scores each video; see `VideoJudge.score`.

        Returns:
            For each video `sa` and `pc` in [0, 1], fifths of the ratings, and `raw`: for both a dict with `rating`
            and, in mode "candidates", `expectation` and `logprobs` of the answers 1 to 5, in mode "generate", `text`.

        Raises:
            ValueError: a request that cannot be answered, or captions that do not fit the window.
        """
        check_request(videos, prompts)
        questions = self._questions(prompts)
        results = []
        for answers in self._rate(videos, questions, range(1, 6)):
            raw = dict(zip(("sa", "pc"), answers, strict=True))
            results.append({name: raw[name][self.score_from] / 5 for name in raw} | {"raw": raw})
        return results

    @property
    def _max_tokens(self) -> int | None:
        return None if self.mode == "generate" else MAX_TOKENS  # the original's generation has no window

    def score_rules(self, videos: Sequence[Video], rules: Sequence[str]) -> list[dict[str, Any]]:
        """
        Asks whether each video follows a rule of physics.

        Args:
            videos: paths, or uint8 `(T, H, W, 3)`.
            rules: one sentence for each video, such as "The ball must fall downwards.".

        Returns:
            For each video a dict with `rating`: 0 (broken), 1 (followed) or 2 (cannot be told), and the details of
            `score`'s `raw`.

        Raises:
            ValueError: as for `score`.
        """
        check_request(videos, rules)
        answers = self._rate(videos, [self._encode_prompts(VIDEOPHY2_RULE, rules)], range(3))
        return [answer for (answer,) in answers]

    def _rate(
        self, videos: Sequence[Video], questions: Sequence[Sequence[list[int]]], scale: range
    ) -> list[list[dict[str, Any]]]:
        """For each video and question: the rating and where it comes from."""
        if self.mode == "generate":
            return [
                [self._generate(tokens, question[index]) for question in questions]
                for index, video in enumerate(videos)
                for tokens in [self._encode_videos([video])]
            ]
        # An answer is its text and the end token, as in training; "5" alone is two tokens, a blank and the digit.
        answers = [[*self.tokenizer.encode(str(rating)), self.tokenizer.end] for rating in scale]
        logprobs = self._logprobs(videos, questions, answers)
        expectation = (logprobs.softmax(dim=-1) * torch.tensor(scale)).sum(dim=-1)
        return [
            [
                {"rating": scale[int(np.argmax(row))], "expectation": expected, "logprobs": row}
                for expected, row in zip(means, rows, strict=True)
            ]
            for means, rows in zip(expectation.tolist(), logprobs.tolist(), strict=True)
        ]

    @torch.inference_mode()
    def _generate(self, tokens: Tensor, prompt: list[int]) -> dict[str, Any]:
        embeddings = self.model.embed(torch.tensor([prompt], device=self.device), tokens)
        ids = self.model.language_model.generate(
            inputs_embeds=embeddings,
            attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.long, device=self.device),
            do_sample=False,
            max_new_tokens=MAX_NEW_TOKENS,
            eos_token_id=self.tokenizer.end,
            pad_token_id=self.tokenizer.end,
        )
        text = self.tokenizer.decode(ids[0].tolist())
        return {"rating": parse_rating(text), "text": text}


def parse_rating(text: str) -> int:
    """
    The rating in a generated answer, by the rule of the original: the number words and then the digits are looked for
    in rising order, anywhere in the text, so that "10" is a 0 and "4 or 5" a 4. A text without any counts as 0.
    """
    lowered = text.lower()
    for names in (_NUMBER_WORDS, "012345"):
        for rating, name in enumerate(names):
            if name in lowered:
                return rating
    logger.warning("No rating from 0 to 5 in the answer %r; it counts as 0, as in the original.", text)
    return 0
