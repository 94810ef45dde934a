"""
Trainers: one configuration and one trainer per method.

Whoever adds a method starts from `VideoTrainer` and `VideoConfig`, or from `PreferenceTrainer` and `PreferenceConfig`
where the loss compares videos.
"""

from .base_config import VideoConfig
from .base_trainer import VideoTrainer
from .callbacks import LogVideosCallback
from .collapse_monitor import Collapse, CollapseMonitor, find_collapse
from .dpo_config import VideoDPOConfig
from .dpo_trainer import VideoDPOTrainer
from .group_dpo_config import VideoGroupDPOConfig
from .group_dpo_trainer import VideoGroupDPOTrainer
from .preference_config import PreferenceConfig
from .preference_trainer import PreferenceTrainer
from .reg_dpo_config import VideoRegDPOConfig
from .reg_dpo_trainer import VideoRegDPOTrainer
from .repa_config import VideoREPAConfig
from .repa_trainer import VideoREPATrainer
from .sft_config import VideoSFTConfig
from .sft_trainer import VideoSFTTrainer


__all__ = [
    "Collapse",
    "CollapseMonitor",
    "LogVideosCallback",
    "PreferenceConfig",
    "PreferenceTrainer",
    "VideoConfig",
    "VideoDPOConfig",
    "VideoDPOTrainer",
    "VideoGroupDPOConfig",
    "VideoGroupDPOTrainer",
    "VideoREPAConfig",
    "VideoREPATrainer",
    "VideoRegDPOConfig",
    "VideoRegDPOTrainer",
    "VideoSFTConfig",
    "VideoSFTTrainer",
    "VideoTrainer",
    "find_collapse",
]
