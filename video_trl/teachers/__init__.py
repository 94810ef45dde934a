"""
Teachers: frozen video encoders whose tokens a denoiser is aligned with (VideoREPA). `video_trl.load` finds one by its
name.
"""

from .base import ModelTeacher, TeacherTokens, VideoTeacher
from .dino import DINOTeacher
from .videomae import VideoMAETeacher
from .vjepa2 import VJEPA2Teacher


__all__ = [
    "DINOTeacher",
    "ModelTeacher",
    "TeacherTokens",
    "VJEPA2Teacher",
    "VideoMAETeacher",
    "VideoTeacher",
]
