"""Judges score generated videos: one protocol, several implementations. `video_trl.load` loads one by name."""

import importlib
from typing import TYPE_CHECKING, Any

from .base import Video, VideoJudge


if TYPE_CHECKING:
    from .cache import CachedJudge
    from .chat import ChatClient
    from .mplug_owl import VideoConPhysicsJudge, VideoPhy2Judge
    from .precomputed import PrecomputedJudge
    from .qwen_vl import QwenVLJudge
    from .remote import RemoteJudge

_HOME = {
    "CachedJudge": "cache",
    "ChatClient": "chat",
    "PrecomputedJudge": "precomputed",
    "QwenVLJudge": "qwen_vl",
    "RemoteJudge": "remote",
    "VideoConPhysicsJudge": "mplug_owl",
    "VideoPhy2Judge": "mplug_owl",
}


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
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
