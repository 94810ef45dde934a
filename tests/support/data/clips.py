"""Small clips that are told apart by their brightness."""

from pathlib import Path

import numpy as np

from video_trl.data.video_io import write_video


def clips_by_brightness(folder: Path) -> dict[int, bytes]:
    """Bytes of five videos of two frames by their brightness; written in `folder`."""
    for value in (40, 80, 120, 160, 200):
        write_video(folder / f"{value}.mp4", np.full((2, 16, 16, 3), value, np.uint8), fps=8)
    return {int(path.stem): path.read_bytes() for path in folder.iterdir()}
