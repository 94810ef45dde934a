"""Trainers: one configuration and one trainer per method, on a base that holds plumbing only."""

from .callbacks import LogVideosCallback
from .collapse_monitor import Collapse, CollapseMonitor, find_collapse
from .dpo_config import VideoDPOConfig
from .dpo_trainer import VideoDPOTrainer
from .group_dpo_config import VideoGroupDPOConfig
from .group_dpo_trainer import VideoGroupDPOTrainer
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
    "find_collapse",
]
