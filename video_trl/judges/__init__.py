"""Judges of generated videos: one small protocol, several implementations (exact for the sandbox, learned ones)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


Video = str | Path | NDArray[np.uint8]


@runtime_checkable
class VideoJudge(Protocol):
    """
    Scores videos against the sentences they were made for.

    This is all that dataset building, evaluation and the trainers' callbacks know about a judge; a vision-language
    model fulfils it in the same way as the sandbox's exact judge.

    Attributes:
        name: short identifier, written into datasets, reports and model cards.
    """

    name: str

    def score(self, videos: Sequence[Video], prompts: Sequence[str]) -> list[dict[str, Any]]:
        """
        Scores each video.

        Args:
            videos: paths to video files, or uint8 arrays `(T, H, W, 3)`.
            prompts: one sentence for each video.

        Returns:
            One dict for each video, in order, with at least `sa` and `pc`, floats in [0, 1]: semantic adherence (does
            the video show what the sentence says?) and physical commonsense (does it obey the laws of physics?).
            Judges add keys of their own, such as a human-readable `explanation`.

        Raises:
            ValueError: a different number of videos and prompts, or a video that is no uint8 `(T, H, W, 3)` clip.
        """
        ...


__all__ = ["Video", "VideoJudge"]
