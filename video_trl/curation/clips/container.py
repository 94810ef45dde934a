"""Stage 1: read size, frame rate and length of a clip from its container, and hash its bytes. Decodes one frame."""

from typing import Any

import pyarrow as pa

from ...data.video_file import DEFAULT_LIMITS, VideoDecodeError, VideoLimits
from ...data.video_io import probe_video, video_hash
from ..engine.manifest import Batch
from .sources import open_clip


#: Columns that probing adds. Sizes are those on screen, after the rotation that phones write into the file.
CONTAINER: dict[str, pa.DataType] = {
    "content": pa.string(),  # hash of the bytes
    "fps": pa.float64(),  # average
    "num_frames": pa.int64(),
    "seconds": pa.float64(),
    "height": pa.int64(),
    "width": pa.int64(),
    "short_edge": pa.int64(),
}
CONTAINER_VERSION = 3


def read_containers(batch: Batch, limits: VideoLimits = DEFAULT_LIMITS) -> Batch:
    """
    Stage "probe" as a batch function.

    Args:
        batch (`dict`): Columns `path`, `offset`, `length`.
        limits ([`VideoLimits`], *optional*): How large a file may be.

    Returns:
        `dict`: The columns `CONTAINER`; a file that is missing, empty, truncated, too large, without a video stream or
            otherwise unreadable is dropped, by the kind of its fault (`VideoDecodeError.kind`).
    """
    added: Batch = {name: [] for name in (*CONTAINER, "dropped_by", "detail")}
    for path, offset, length in zip(batch["path"], batch["offset"], batch["length"], strict=True):
        row: dict[str, Any] = dict.fromkeys(added)
        try:
            clip = open_clip(path, offset, length)
            row["content"] = video_hash(clip)
            info = probe_video(clip, limits)
            row |= {
                "fps": info.fps,
                "num_frames": info.num_frames,
                "seconds": info.duration,
                "height": info.height,
                "width": info.width,
                "short_edge": min(info.height, info.width),
            }
        except VideoDecodeError as error:
            row |= {"dropped_by": error.kind, "detail": str(error)}
        for name, values in added.items():
            values.append(row[name])
    return added
