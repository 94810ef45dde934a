"""
Base classes, callbacks and parts of the trainers. The trainers themselves are imported from `video_trl`.

Whoever adds a method starts from `VideoTrainer` and `VideoConfig`, or from `PreferenceTrainer` and `PreferenceConfig`
where the loss compares videos.
"""

from .base_config import VideoConfig
from .base_trainer import VideoTrainer
from .callbacks import LogVideosCallback
from .collapse_monitor import Collapse, CollapseMonitor, find_collapse
from .preference_config import PreferenceConfig
from .preference_trainer import PreferenceTrainer


__all__ = [
    "Collapse",
    "CollapseMonitor",
    "LogVideosCallback",
    "PreferenceConfig",
    "PreferenceTrainer",
    "VideoConfig",
    "VideoTrainer",
    "find_collapse",
]
