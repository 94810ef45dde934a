"""Trainers: one configuration and one trainer per method, on a base that holds plumbing only."""

from .callbacks import LogVideosCallback
from .group_dpo_config import VideoGroupDPOConfig
from .group_dpo_trainer import VideoGroupDPOTrainer
from .sft_config import VideoSFTConfig
from .sft_trainer import VideoSFTTrainer


__all__ = ["LogVideosCallback", "VideoGroupDPOConfig", "VideoGroupDPOTrainer", "VideoSFTConfig", "VideoSFTTrainer"]
