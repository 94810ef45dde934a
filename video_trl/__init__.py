"""
Preference optimisation for video diffusion models.

The names below are imported on first use, so that `import video_trl` stays light (it loads neither torch nor
transformers). Submodules are public by name: `video_trl.losses`, `video_trl.data`, `video_trl.sandbox`, ...
"""

from importlib import import_module
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from video_trl.trainer.dpo_config import VideoDPOConfig
    from video_trl.trainer.dpo_trainer import VideoDPOTrainer
    from video_trl.trainer.group_dpo_config import VideoGroupDPOConfig
    from video_trl.trainer.group_dpo_trainer import VideoGroupDPOTrainer
    from video_trl.trainer.reg_dpo_config import VideoRegDPOConfig
    from video_trl.trainer.reg_dpo_trainer import VideoRegDPOTrainer
    from video_trl.trainer.repa_config import VideoREPAConfig
    from video_trl.trainer.repa_trainer import VideoREPATrainer
    from video_trl.trainer.sft_config import VideoSFTConfig
    from video_trl.trainer.sft_trainer import VideoSFTTrainer

__version__ = "0.1.0.dev0"

__all__ = [
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
    "__version__",
]

_MODULES = {
    "VideoDPOConfig": "video_trl.trainer.dpo_config",
    "VideoDPOTrainer": "video_trl.trainer.dpo_trainer",
    "VideoGroupDPOConfig": "video_trl.trainer.group_dpo_config",
    "VideoGroupDPOTrainer": "video_trl.trainer.group_dpo_trainer",
    "VideoREPAConfig": "video_trl.trainer.repa_config",
    "VideoREPATrainer": "video_trl.trainer.repa_trainer",
    "VideoRegDPOConfig": "video_trl.trainer.reg_dpo_config",
    "VideoRegDPOTrainer": "video_trl.trainer.reg_dpo_trainer",
    "VideoSFTConfig": "video_trl.trainer.sft_config",
    "VideoSFTTrainer": "video_trl.trainer.sft_trainer",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}.")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value  # the next access is a plain lookup
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
