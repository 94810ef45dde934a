"""Judge videos with Qwen2.5-VL or Qwen3-VL in this process, by the probabilities of "Yes" and "No" or of 1 to 5."""

import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import torch

from .base import Video
from .frames import check_request, evenly_spaced, frame_rate, quoted, sample_frames, size_within
from .qwen_vl_model import FAMILIES, QwenVL
from .weights import text_hash, weights_identity


YES_NO = ("Yes", "No")
RATINGS = ("1", "2", "3", "4", "5")
QUESTIONS = {
    "yes_no": {
        "sa": "Does this video show what this caption says, with all its objects and actions: {caption}? "
        "Answer with Yes or No only.",
        "pc": "Do all things in this video move, change and touch as the laws of physics demand? Think of gravity, "
        "inertia, collisions, solidity, fluids, and of things that appear, vanish or change shape. "
        "Answer with Yes or No only.",
    },
    "rating": {
        "sa": "How well does this video show what this caption says: {caption}? Answer with one digit only, from 1 "
        "(nothing of it) to 5 (all objects, attributes and actions).",
        "pc": "How well do the things in this video obey the laws of physics? Think of gravity, inertia, collisions, "
        "solidity, fluids, and of things that appear, vanish or change shape. Answer with one digit only, from 1 "
        "(severe violations) to 5 (none).",
    },
}


class QwenVLJudge:
    """
    Asks a Qwen2.5-VL or Qwen3-VL model about both scores and reads the log-probabilities of the possible answers.

    `answers="yes_no"` gives p(Yes) / (p(Yes) + p(No)). `answers="rating"` gives (e - 1) / 4 with e the expectation
    over 1 to 5. `pc` is asked without the caption. Zero-shot: check it against people's votes, or on simulated clips,
    before you build on it.

    Args:
        model: folder or repository id, weights as safetensors.
        answers: `"yes_no"` or `"rating"`.
        num_frames: frames shown, evenly spaced.
        max_pixels: of each frame; larger ones are made smaller.
        fps: frames per second of clips given as arrays; files know their own.
        device: where to run; a GPU if there is one.
        dtype: of the weights. The logits of the answers are computed in float32.
        revision: of the repository.

    Raises:
        ValueError: a setting out of range, weights that are missing or of another model, or a tokenizer that does not
            know the answers as single tokens.
    """

    name = "qwen-vl"
    version = 1  # goes up when equal weights and prompts would score differently

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        answers: Literal["yes_no", "rating"] = "yes_no",
        num_frames: int = 16,
        max_pixels: int = 448 * 448,
        fps: float = 16.0,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.bfloat16,
        revision: str | None = None,
    ) -> None:
        if answers not in QUESTIONS or num_frames < 2 or max_pixels < 64 * 64 or not fps > 0:
            raise ValueError(
                f"Expected `answers` 'yes_no' or 'rating', `num_frames` >= 2, `max_pixels` >= 4096 and `fps` > 0, got "
                f"{answers!r}, {num_frames}, {max_pixels} and {fps}."
            )
        self.answers, self.num_frames, self.max_pixels, self.fps = answers, num_frames, max_pixels, fps
        self._vlm = QwenVL.load(model, device=device, dtype=dtype, revision=revision)
        self.family, self.tokenizer, self.model = self._vlm.family, self._vlm.tokenizer, self._vlm.model
        self.device, self.dtype = self._vlm.device, self._vlm.dtype
        self._answer_ids = [self._vlm.single_token(text) for text in (YES_NO if answers == "yes_no" else RATINGS)]

    @cached_property
    def identity(self) -> str:
        """Name, version, weights, prompts and settings: equal identities give equal scores."""
        prompts = text_hash(*QUESTIONS[self.answers].values(), FAMILIES[self.family][2])
        return (
            f"{self.name}:v{self.version}:weights={weights_identity(self._vlm.folder)}:prompts={prompts}:{self.answers},"
            f"{str(self.dtype).removeprefix('torch.')},frames={self.num_frames},pixels={self.max_pixels},"
            f"fps={self.fps:g}"
        )

    def score(self, videos: Sequence[Video], prompts: Sequence[str]) -> list[dict[str, Any]]:
        """
        Scores each video; see `VideoJudge.score`.

        Returns:
            For each video `sa` and `pc` in [0, 1], and `raw`: for both the log-probability of each answer over the
            whole vocabulary, and their sum as `coverage`, in which a model that wants to say something else shows.

        Raises:
            ValueError: a request that cannot be answered, a caption with the model's control tokens.
        """
        check_request(videos, prompts)
        unsafe = [prompt for prompt in prompts if "<|" in prompt]
        if unsafe:
            raise ValueError(f"Captions may not contain '<|', which starts the model's control tokens: {unsafe[:3]}.")
        return [self._score_one(video, prompt) for video, prompt in zip(videos, prompts, strict=True)]

    def _score_one(self, video: Video, prompt: str) -> dict[str, Any]:
        frames, indices = sample_frames(
            video,
            self.num_frames,
            evenly_spaced,
            lambda h, w: size_within(h, w, self.max_pixels, self._vlm.multiple),
        )
        patches = self._vlm.patches(frames, indices / frame_rate(video, self.fps))
        scores: dict[str, float] = {}
        raw: dict[str, Any] = {}
        for question, text in QUESTIONS[self.answers].items():
            inputs = self._vlm.inputs(patches, text.format(caption=quoted(prompt)))
            logprobs = self._vlm.next_logprobs(inputs, self._answer_ids)
            probabilities = logprobs.softmax(dim=-1).tolist()
            answers = YES_NO if self.answers == "yes_no" else RATINGS
            if self.answers == "yes_no":
                scores[question] = probabilities[0]
            else:
                scores[question] = sum(probability * rating for rating, probability in enumerate(probabilities)) / 4
            raw[question] = {
                "logprobs": dict(zip(answers, logprobs.tolist(), strict=True)),
                "coverage": float(logprobs.exp().sum()),
            }
        return scores | {"raw": raw}
