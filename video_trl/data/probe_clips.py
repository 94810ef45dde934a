"""Labelled clips for linear probes: each clip ends before the event that its label names."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .video_io import VideoSource, read_video


@dataclass(frozen=True)
class ProbeClip:
    """
    A clip that ends before the answer to its question.

    Attributes:
        name (`str`): Identifies it in messages and results.
        video (`VideoSource`): File, or uint8 frames `(T, H, W, 3)`.
        label (`bool`): Whether the objects will touch.
        scenario (`str`): Group in which accuracy is reported.
        frames (`tuple[int, ...]`, *optional*): Frames of the file that are shown, in order; all by default.
    """

    name: str
    video: VideoSource
    label: bool
    scenario: str
    frames: tuple[int, ...] | None = None

    def read(self, height: int | None = None, width: int | None = None) -> npt.NDArray[np.uint8]:
        """The frames that are shown, uint8 `(T, H, W, 3)`."""
        if self.frames is None:
            return read_video(self.video, height=height, width=width)
        video = read_video(self.video, num_frames=max(self.frames) + 1, height=height, width=width)
        return video[list(self.frames)]
