"""Stage 3: write every clip with one frame rate, one length and the size of its bucket, and save its first frame."""

import os
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from ...data.buckets import AspectBucket
from ...data.video_file import DEFAULT_LIMITS, VideoDecodeError, VideoLimits, VideoSource
from ...data.video_io import iterate_video, write_video
from ...files import atomic_file
from ..engine.manifest import Batch
from .sources import open_clip


#: Columns that normalisation adds: paths relative to the run's folder.
NORMALISED: dict[str, pa.DataType] = {"video": pa.string(), "reference_image": pa.string()}
NORMALISE_VERSION = 4


def normalise_batch(
    batch: Batch,
    *,
    root: str | os.PathLike[str],
    folder: str,
    fps: float,
    num_frames: int,
    limits: VideoLimits = DEFAULT_LIMITS,
) -> Batch:
    """
    Stage "normalise" as a batch function. Equal clips give equal bytes, in every run.

    Args:
        batch (`dict`): Columns `path`, `offset`, `length`, `content` (names the files) and `bucket` ("720x1280").
        root (`str` or `Path`): The run's folder.
        folder (`str`): Where in it the files go.
        fps (`float`): Frames per second; frames are dropped or repeated by their timestamps.
        num_frames (`int`): Frames of every clip; later ones are cut off.
        limits ([`VideoLimits`], *optional*): How large a file may be.

    Returns:
        `dict`: The columns `NORMALISED`; a clip that is too short is dropped by "too_short", with the number of frames
            it has at `fps`.
    """
    added: Batch = {name: [] for name in (*NORMALISED, "dropped_by", "value", "limit", "detail")}
    columns = ("path", "offset", "length", "content", "bucket")
    for path, offset, length, content, bucket in zip(*(batch[name] for name in columns), strict=True):
        row: dict[str, Any] = dict.fromkeys(added)
        size = AspectBucket.parse(bucket)
        video, image = Path(folder) / f"{content}.mp4", Path(folder) / f"{content}.png"
        try:
            clip = open_clip(path, offset, length)
            num_written = normalise_video(
                clip,
                Path(root) / video,
                height=size.height,
                width=size.width,
                fps=fps,
                num_frames=num_frames,
                limits=limits,
            )
        except VideoDecodeError as error:
            row |= {"dropped_by": error.kind, "detail": str(error)}
        else:
            if num_written < num_frames - 1:
                row |= {"dropped_by": "too_short", "value": float(num_written), "limit": float(num_frames)}
            else:
                save_first_frame(Path(root) / video, Path(root) / image)
                row |= {"video": video.as_posix(), "reference_image": image.as_posix()}
        for name, values in added.items():
            values.append(row[name])
    return added


def normalise_video(
    source: VideoSource,
    path: str | os.PathLike[str],
    *,
    height: int,
    width: int,
    fps: float,
    num_frames: int,
    source_fps: float | None = None,
    limits: VideoLimits = DEFAULT_LIMITS,
) -> int:
    """
    Writes a video of exactly `num_frames` frames, scaled to cover the size and centre-cropped.

    A clip of 5.0 s has 80 frames at 16 fps, and the 81st would be the moment at which it ends: there the last frame is
    shown once more. Anything shorter is not written.

    Args:
        source: What `read_video` takes.
        path (`str` or `Path`): File to write, `.mp4`.
        height, width, fps, num_frames: Of the file.
        source_fps (`float`, *optional*): Clock of frames in memory.
        limits ([`VideoLimits`], *optional*): How large the source may be.

    Returns:
        `int`: Frames that the source has at `fps`, at most `num_frames`. Below `num_frames - 1` there is no file.
    """
    clock = iterate_video(source, fps=fps, height=height, width=width, source_fps=source_fps, limits=limits)
    video = np.empty((num_frames, height, width, 3), dtype=np.uint8)
    count = 0
    for frame in islice(clock, num_frames):
        video[count] = frame
        count += 1
    if count == num_frames - 1:
        video[count] = video[count - 1]
    if count >= num_frames - 1:
        write_video(path, video, fps)
    return count


def save_first_frame(video: Path, image: Path) -> None:
    """The first frame of a file, exactly as it decodes, as a PNG that is whole or not there."""
    frame = next(iterate_video(video))
    with atomic_file(image) as partial:
        Image.fromarray(frame).save(partial, format="PNG", compress_level=3)  # the usual 6 takes three times as long
