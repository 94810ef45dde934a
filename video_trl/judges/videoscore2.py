"""
VideoScore2 (https://huggingface.co/papers/2509.22799): Qwen2.5-VL-7B that reasons in words, then rates from 1 to 5.

Weights: `TIGER-Lab/VideoScore2`, Apache-2.0 by its card. The question is that of training, to the letter.
"""

import os
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import torch

from .base import Video
from .frames import at_rate, check_request, frame_rate, qwen_size, sample_frames
from .qwen_vl_model import Patches, QwenVL
from .weights import text_hash, weights_identity


REPOSITORY = "TIGER-Lab/VideoScore2"
FRAMES_A_SECOND = 2.0
QUESTION = """
    You are an expert for evaluating AI-generated videos from three dimensions:
    (1) visual quality – clarity, smoothness, artifacts;
    (2) text-to-video alignment – fidelity to the prompt;
    (3) physical/common-sense consistency – naturalness and physics plausibility.

    Video prompt: {caption}

    Please output in this format:
    visual quality: <v_score>; 
    text-to-video alignment: <t_score>, 
    physical/common-sense consistency: <p_score>
    """  # noqa: W291 - blanks at the ends of lines are part of it
DIMENSIONS = ("visual quality", "text-to-video alignment", "physical/common-sense consistency")
_RATINGS = ("1", "2", "3", "4", "5")


class VideoScore2Judge:
    """
    `sa` is its rating of the alignment with the caption and `pc` that of physical and common-sense consistency; a
    rating r is given as (r - 1) / 4. Its rating of visual quality stands in `raw`.

    The text is the likeliest one, without sampling (the authors sample at a temperature of 0.7). A text without the
    three ratings is gone on with: the likeliest rating behind the name of each dimension is taken.

    Args:
        weights: folder or repository id.
        score_from: `"rating"`, or `"expectation"` of the rating where the text gives it.
        max_tokens: longest text.
        fps: frames per second of clips given as arrays; files know their own.
        device: where to run; a GPU if there is one.
        dtype: of the weights.
        revision: of the repository.

    Raises:
        ValueError: a setting out of range, or weights that are missing or of another model.
    """

    name = "videoscore2"
    version = 1  # goes up when equal weights and settings would score differently

    def __init__(
        self,
        weights: str | os.PathLike[str] = REPOSITORY,
        *,
        score_from: Literal["rating", "expectation"] = "rating",
        max_tokens: int = 1024,
        fps: float = 16.0,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.bfloat16,
        revision: str | None = None,
    ) -> None:
        if score_from not in ("rating", "expectation") or max_tokens < 1 or not fps > 0:
            raise ValueError(
                f"Expected `score_from` 'rating' or 'expectation', `max_tokens` >= 1 and `fps` > 0, got "
                f"{score_from!r}, {max_tokens} and {fps}."
            )
        self.score_from, self.max_tokens, self.fps = score_from, max_tokens, fps
        self.vlm = QwenVL.load(weights, device=device, dtype=dtype, revision=revision)
        self._digits = [self.vlm.single_token(text) for text in _RATINGS]

    @cached_property
    def identity(self) -> str:
        """Name, version, weights, question and settings: equal identities give equal scores."""
        return (
            f"{self.name}:v{self.version}:weights={weights_identity(self.vlm.folder)}:question={text_hash(QUESTION)}:"
            f"{self.score_from},{str(self.vlm.dtype).removeprefix('torch.')},tokens={self.max_tokens},fps={self.fps:g}"
        )

    def score(self, videos: Sequence[Video], prompts: Sequence[str]) -> list[dict[str, Any]]:
        """
        Scores each video; see `VideoJudge.score`.

        Returns:
            For each video `sa` and `pc` in [0, 1], and `raw`: the `text`, and for each dimension the `rating` and the
            `expectation` of it.

        Raises:
            ValueError: a request that cannot be answered, or a caption with the model's control tokens.
        """
        check_request(videos, prompts)
        unsafe = [prompt for prompt in prompts if "<|" in prompt]
        if unsafe:
            raise ValueError(f"Captions may not contain '<|', which starts the model's control tokens: {unsafe[:3]}.")
        return [self._score_one(video, prompt) for video, prompt in zip(videos, prompts, strict=True)]

    def _score_one(self, video: Video, prompt: str) -> dict[str, Any]:
        fps = frame_rate(video, self.fps)
        frames, indices = sample_frames(
            video, 0, lambda count, _: at_rate(count, fps, FRAMES_A_SECOND), lambda h, w: qwen_size(h, w)
        )
        patches = self.vlm.patches(frames, indices / fps)
        question = QUESTION.format(caption=prompt)
        text = self.vlm.answer(patches, question, max_new_tokens=self.max_tokens)
        raw: dict[str, Any] = {"text": text}
        for dimension, begun, rating in self._statements(text, patches, question):
            raw[dimension] = {"rating": rating, "expectation": self._expectation(patches, question, begun)}
        sa, pc = (self._unit(raw[dimension]) for dimension in DIMENSIONS[1:])
        return {"sa": sa, "pc": pc, "raw": raw}

    def _statements(self, text: str, patches: Patches, question: str) -> list[tuple[str, str, int]]:
        """For each dimension the text up to its rating, and the rating."""
        found = [_last_rating(text, dimension) for dimension in DIMENSIONS]
        if all(found):
            return [
                (dimension, text[: match.start(1)], int(match[1]))
                for dimension, match in zip(DIMENSIONS, found, strict=True)
                if match is not None
            ]
        statements = []
        begun = f"{text}\n"
        for dimension in DIMENSIONS:
            begun += f"{dimension}: "
            rating = 1 + int(self._logprobs(patches, question, begun).argmax())
            statements.append((dimension, begun, rating))
            begun += f"{rating}\n"
        return statements

    def _expectation(self, patches: Patches, question: str, begun: str) -> float:
        probabilities = self._logprobs(patches, question, begun).softmax(dim=0)
        return float((probabilities.double().cpu() * torch.arange(1, 6)).sum())

    def _logprobs(self, patches: Patches, question: str, begun: str) -> torch.Tensor:
        return self.vlm.next_logprobs(self.vlm.inputs(patches, question, begun=begun), self._digits)

    def _unit(self, answer: dict[str, float]) -> float:
        return (answer[self.score_from] - 1) / 4


def _last_rating(text: str, dimension: str) -> re.Match[str] | None:
    """Where a text rates a dimension: behind its name, a description where there is one, and a colon."""
    pattern = rf"{re.escape(dimension)}[^:\n]*:[\s*<]*([1-5])(?!\.?\d)"
    return next(iter(reversed(list(re.finditer(pattern, text, re.IGNORECASE)))), None)
