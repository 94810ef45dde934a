"""Judges score generated videos: one protocol, several implementations. `video_trl.load` loads one by name."""

import importlib
from typing import TYPE_CHECKING, Any

from .base import Video, VideoJudge


if TYPE_CHECKING:
    from .cache import CachedJudge
    from .chat import ChatClient
    from .mplug_owl import VideoConPhysicsJudge, VideoPhy2Judge
    from .pairwise import PairwiseJudge
    from .phyground import PhyGroundJudge
    from .precomputed import PrecomputedJudge
    from .qwen_vl import QwenVLJudge
    from .remote import RemoteJudge
    from .videoalign import VideoAlignJudge
    from .videoscore2 import VideoScore2Judge

_HOME = {
    "CachedJudge": "cache",
    "ChatClient": "chat",
    "PairwiseJudge": "pairwise",
    "PhyGroundJudge": "phyground",
    "PrecomputedJudge": "precomputed",
    "QwenVLJudge": "qwen_vl",
    "RemoteJudge": "remote",
    "VideoAlignJudge": "videoalign",
    "VideoConPhysicsJudge": "mplug_owl",
    "VideoPhy2Judge": "mplug_owl",
    "VideoScore2Judge": "videoscore2",
}


__all__ = [
    "CachedJudge",
    "ChatClient",
    "PairwiseJudge",
    "PhyGroundJudge",
    "PrecomputedJudge",
    "QwenVLJudge",
    "RemoteJudge",
    "Video",
    "VideoAlignJudge",
    "VideoConPhysicsJudge",
    "VideoJudge",
    "VideoPhy2Judge",
    "VideoScore2Judge",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
