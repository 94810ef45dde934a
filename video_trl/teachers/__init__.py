"""
Teachers: frozen video encoders; VideoREPA aligns a denoiser with their tokens. `video_trl.load` loads one by name.
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
