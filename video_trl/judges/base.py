"""The protocol of a judge: it scores videos for their prompts."""

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
    model fulfils it in the same way as the exact judge of simulated clips.

    Attributes:
        name: short identifier, written into datasets, reports and model cards.
        identity: everything that scores depend on besides the video and its sentence, in one string: weights, prompt
            templates, settings, version. Two judges of one identity give the same scores; `CachedJudge` relies on it.
    """

    @property
    def name(self) -> str: ...

    @property
    def identity(self) -> str: ...

    def score(self, videos: Sequence[Video], prompts: Sequence[str]) -> list[dict[str, Any]]:
        """
        Scores each video.

        Args:
            videos: paths to video files, or uint8 arrays `(T, H, W, 3)`.
            prompts: one sentence for each video.

        Returns:
            One dict for each video, in order, with at least `sa` and `pc`, floats in [0, 1]: semantic adherence (does
            the video show what the sentence says?) and physical commonsense (does it obey the laws of physics?).
            Judges add keys of their own that go into JSON: learned ones put what they saw into `raw`, the exact one
            gives a readable `explanation`. Only a `RemoteJudge` may leave a video without scores: `sa` and `pc` are
            then None and `error` says why.

        Raises:
            ValueError: a different number of videos and prompts, an empty prompt, a file that is no readable video
                (named), or an array that is no uint8 `(T, H, W, 3)` clip.
        """
        ...


def score_each(judge: VideoJudge, videos: Sequence[Video], prompts: Sequence[str]) -> list[dict[str, Any]]:
    """
    As `judge.score`, but what cannot be judged, such as a file that is no readable video or a prompt that the judge
    does not know, costs its own score only: `sa` and `pc` are None, and `error` says why.
    """
    try:
        return judge.score(videos, prompts)
    except ValueError as error:
        if len(videos) == 1:
            return [{"sa": None, "pc": None, "error": str(error)}]
    return [score_each(judge, [video], [prompt])[0] for video, prompt in zip(videos, prompts, strict=True)]
