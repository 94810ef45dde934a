"""The sandbox's teacher: a small VideoMAE that has only ever seen lawful clips."""

from importlib.resources import files

import torch
from transformers import VideoMAEModel

from ...teachers.videomae import VideoMAETeacher


def load_sandbox_teacher(*, dtype: torch.dtype = torch.float32) -> VideoMAETeacher:
    """
    Loads the shipped weights (made by `python -m video_trl.sandbox.weights.train_teacher`).

    It takes the sandbox's clips of 13 frames of 64 x 64 pixels, leaves out frame 0 and gives a grid of `(6, 4, 4)`
    tokens of width 128: two token frames for each of the latent frames 1 to 3, at the transformer's 4 x 4 places.
    """
    model = VideoMAEModel.from_pretrained(files("video_trl.sandbox") / "assets" / "teacher", dtype=dtype)
    return VideoMAETeacher(model, "sandbox-videomae")
