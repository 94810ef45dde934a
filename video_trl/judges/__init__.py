"""Judges of generated videos: one small protocol, several implementations (exact for the sandbox, learned ones)."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


if TYPE_CHECKING:
    from .cache import CachedJudge
    from .chat import ChatClient
    from .loading import load_judge
    from .mplug_owl import VideoConPhysicsJudge, VideoPhy2Judge
    from .precomputed import PrecomputedJudge
    from .qwen_vl import QwenVLJudge
    from .remote import RemoteJudge

Video = str | Path | NDArray[np.uint8]

_HOME = {
    "CachedJudge": "cache",
    "ChatClient": "chat",
    "PrecomputedJudge": "precomputed",
    "QwenVLJudge": "qwen_vl",
    "RemoteJudge": "remote",
    "VideoConPhysicsJudge": "mplug_owl",
    "VideoPhy2Judge": "mplug_owl",
    "load_judge": "loading",
}


@runtime_checkable
class VideoJudge(Protocol):
    """
    Scores videos against the sentences they were made for.

    This is all that dataset building, evaluation and the trainers' callbacks know about a judge; a vision-language
    model fulfils it in the same way as the sandbox's exact judge.

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
            Judges add keys of their own that go into JSON: learned ones put what they saw into `raw`, the sandbox's
            gives a readable `explanation`. Only a `RemoteJudge` may leave a video without scores: `sa` and `pc` are
            then None and `error` says why.

        Raises:
            ValueError: a different number of videos and prompts, an empty prompt, a file that is no readable video
                (named), or an array that is no uint8 `(T, H, W, 3)` clip.
        """
        ...


__all__ = [
    "CachedJudge",
    "ChatClient",
    "PrecomputedJudge",
    "QwenVLJudge",
    "RemoteJudge",
    "Video",
    "VideoConPhysicsJudge",
    "VideoJudge",
    "VideoPhy2Judge",
    "load_judge",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
