"""One clip in many files: containers, codecs, clocks, orientations. Each frame carries its number as a picture."""

import struct
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np


HEIGHT, WIDTH = 48, 64
_BITS = 8
# Suffix and codec -> options of the encoder; B-frames wherever there are any.
CONTAINERS: Mapping[str, tuple[str, str, dict[str, str]]] = {
    "mp4": ("mp4", "libx264", {"bf": "3"}),
    "mov": ("mov", "libx264", {"bf": "3"}),
    "fragmented": ("mp4", "libx264", {"bf": "3"}),
    "mkv": ("mkv", "libx264", {"bf": "3"}),
    "webm": ("webm", "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}),
    "avi": ("avi", "libx264", {"bf": "3"}),
    "avi_mpeg4": ("avi", "mpeg4", {"bf": "2"}),
    "flv": ("flv", "libx264", {"bf": "3"}),
    "ts": ("ts", "libx264", {"bf": "3"}),
    "mpg": ("mpg", "mpeg2video", {"bf": "2"}),
    "wmv": ("wmv", "wmv2", {}),
    "gif": ("gif", "gif", {}),
}


def numbered_frames(count: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """uint8 `(count, height, width, 3)`: eight columns, bright where the frame's number has a bit."""
    bits = (np.arange(count)[:, None] >> np.arange(_BITS)) & 1
    levels = np.where(bits, 220, 30).astype(np.uint8).repeat(width // _BITS, axis=1)
    return np.broadcast_to(levels[:, None, :, None], (count, height, levels.shape[1], 3)).copy()


def frame_numbers(video: np.ndarray) -> list[int]:
    """The numbers that frames `(T, H, W, 3)` carry."""
    column = video.shape[2] // _BITS
    middle = video[:, video.shape[1] // 4 : -video.shape[1] // 4, : column * _BITS]
    levels = middle.reshape(len(video), middle.shape[1], _BITS, column, 3)[:, :, :, column // 4 : -column // 4]
    return ((levels.mean(axis=(1, 3, 4)) > 125) << np.arange(_BITS)).sum(axis=1).tolist()


# Equal frames give equal bytes, as with `write_video`: tests compare files that were written one by one.
REPEATABLE = {"threads": "1", "x264-params": "cpu-independent=1"}


def write_media(
    path: Path,
    video: np.ndarray,
    rate: Fraction = Fraction(30),
    *,
    codec: str = "libx264",
    options: Mapping[str, str] | None = None,
    pix_fmt: str = "yuv420p",
    times: Sequence[Fraction] | None = None,
    turned: Mapping[str, Any] | None = None,
    container_options: Mapping[str, str] | None = None,
) -> Path:
    """
    A file of any container and codec.

    Args:
        times: seconds at which each frame is shown; those of the rate when not given.
        turned: arguments of `set_display_rotation`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=dict(container_options or {})) as container:
        options = (REPEATABLE if codec == "libx264" else {}) | dict(options or {})
        stream = container.add_stream(codec, rate=rate)
        stream.codec_context.max_b_frames = int(options.pop("bf", 0))
        stream.codec_context.options = options
        stream.height, stream.width, stream.pix_fmt = *video.shape[1:3], pix_fmt
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if turned is not None:
            stream.set_display_rotation(**turned)
        for number, frame in enumerate(video):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            if times is not None:
                picture.pts, picture.time_base = round(times[number] * 1000), Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


def write_container(folder: Path, name: str, video: np.ndarray, rate: Fraction, **options: Any) -> Path:
    """The clip in one of `CONTAINERS`."""
    suffix, codec, encoder = CONTAINERS[name]
    if name == "fragmented":
        options["container_options"] = {"movflags": "frag_keyframe+empty_moov"}
    options["pix_fmt"] = "rgb8" if codec == "gif" else options.get("pix_fmt", "yuv420p")
    return write_media(folder / f"{name}.{suffix}", video, rate, codec=codec, options=encoder, **options)


def cut_by_edit_list(path: Path, start: float, seconds: float) -> None:
    """What cutting without re-encoding does: all frames stay in the mp4, and its edit list shows some of them."""
    data = bytearray(path.read_bytes())
    entry = data.index(b"elst") + 12
    (movie_scale,) = struct.unpack(">I", data[data.index(b"mvhd") + 16 :][:4])
    (media_scale,) = struct.unpack(">I", data[data.index(b"mdhd") + 16 :][:4])
    _, offset = struct.unpack(">II", data[entry : entry + 8])
    data[entry : entry + 8] = struct.pack(">II", round(seconds * movie_scale), offset + round(start * media_scale))
    path.write_bytes(data)
