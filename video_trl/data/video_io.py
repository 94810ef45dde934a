"""Read and write video files with PyAV. A damaged or incomplete file raises an error; no frame is invented."""

import io
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

from ..files import atomic_file, fingerprint, hash_bytes


VideoSource = str | os.PathLike[str] | Mapping[str, Any] | np.ndarray | list[Any]

# Playlists and `concat` scripts may name other files or URLs; a video from a stranger's dataset must not open them.
_OPEN_OPTIONS = {"protocol_whitelist": "none"}
_BT601_LIMITED = {
    "colorspace": 6,
    "color_range": 1,
}  # AVCOL_SPC_SMPTE170M, AVCOL_RANGE_MPEG: swscale's default
# x264's macroblock tree has a routine for each instruction set, and they round differently. That for AVX-512 also lets
# in what happens to lie in memory: without this option equal frames give other bytes in every process.
_X264_PARAMS = "cpu-independent=1"


class VideoDecodeError(ValueError):
    """
    A video cannot be read, or not wholly. The message names the file, what failed and the way out.

    Attributes:
        kind (`str`): One word for tables: "missing", "empty", "no_video_stream", "truncated", "damaged", "too_short",
            and "unreadable" for the rest.
    """

    def __init__(self, message: str, kind: str = "unreadable") -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class VideoInfo:
    """
    What a video declares about itself.

    Attributes:
        num_frames (`int`): Number of frames.
        fps (`float`): Average frames per second; `nan` for an array, which has no clock.
        height, width (`int`): Size in pixels as displayed, after the rotation that phones write into the file.
        duration (`float`): Length in seconds, `num_frames / fps`.
    """

    num_frames: int
    fps: float
    height: int
    width: int
    duration: float


def source_name(source: VideoSource | None) -> str:
    """How messages call a video: its path, or what is known when it has none."""
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    if isinstance(source, Mapping):
        return str(source.get("path") or "<video bytes without a path>")
    if source is None:
        return "<no video>"
    return "<video array>"


def read_video(
    source: VideoSource,
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    height: int | None = None,
    width: int | None = None,
) -> np.ndarray:
    """
    Decode a video into RGB frames. With all options left out: every frame, at its own size.

    Time is never stretched, since that would change the physics: `fps` picks, for every tick of the new clock, the
    last frame shown at that moment (frames are dropped or repeated by their timestamps), and `num_frames` then keeps
    the first frames of what is left.

    Args:
        source (`str`, `Path`, `dict` or `numpy.ndarray`):
            A file, a cell of a `datasets.Video(decode=False)` column (`{"path", "bytes"}`, bytes win), or uint8 frames
            of shape `(T, H, W, 3)`.
        num_frames (`int`, *optional*): Number of frames to return.
        fps (`float`, *optional*): Frames per second to return. An array has no clock: `fps` is ignored for it.
        height, width (`int`, *optional*): Size in pixels, given together: scaled to cover it, then centre-cropped.

    Returns:
        `numpy.ndarray` of shape `(T, H, W, 3)`, uint8.

    Raises:
        VideoDecodeError: The file is missing, empty, damaged, truncated, has no video stream, or has too few frames.
        ValueError: Only one of `height` and `width` is given, or an array has another shape or dtype.
    """
    if num_frames is not None and num_frames < 1:
        raise ValueError(f"`num_frames` must be positive, got {num_frames}.")
    name = source_name(source)
    frames = islice(iterate_video(source, fps=fps, height=height, width=width), num_frames)
    video = np.stack(list(frames))
    if num_frames is not None and len(video) < num_frames:
        clock = "" if fps is None else f" at {fps:g} fps"
        raise VideoDecodeError(
            f"{name}: expected at least {num_frames} frames{clock}, got {len(video)}. Use a longer video, or ask for "
            f"fewer frames (`num_frames={max(len(video), 1)}`).",
            kind="too_short",
        )
    return video


def read_frames_squashed(
    source: VideoSource, numbers: Sequence[int], height: int, width: int
) -> tuple[np.ndarray, int]:
    """
    Some frames of a video at one size, the aspect ratio not kept: how video judges were trained to see.

    Each frame is scaled (bilinear, antialiased) straight from the colours of the file, as video readers in C do it; a
    detour over RGB at full size differs by about 1 of 255. All frames are decoded, which finds damage; only the wanted
    ones are scaled, which takes longer, and held in memory.

    Args:
        source (`str`, `Path`, `dict` or `numpy.ndarray`): As for [`read_video`].
        numbers (sequence of `int`): Which frames, from 0, in any order and as often as wanted.
        height, width (`int`): Size in pixels.

    Returns:
        `numpy.ndarray` of shape `(len(numbers), height, width, 3)`, uint8, and the `int` number of frames that the
            video really has. The last frame stands for numbers beyond it.

    Raises:
        VideoDecodeError: As for [`read_video`].
        ValueError: An array has another shape or dtype.
    """
    if isinstance(source, (np.ndarray, list)):
        arrays = _check_array(source)
        frames = (av.VideoFrame.from_ndarray(np.ascontiguousarray(f), format="rgb24") for f in arrays)
    else:
        frames = (frame for _, _, frame in decode_video(source))
    numbers_left, small, count = set(numbers), {}, 0
    for count, frame in enumerate(frames, start=1):
        if count - 1 in numbers_left:
            small[count - 1] = _squash(frame, height, width)
    if max(numbers) >= count:
        small[count - 1] = _squash(frame, height, width)
    return np.stack([small[min(number, count - 1)] for number in numbers]), count


def iterate_video(
    source: VideoSource,
    *,
    fps: float | None = None,
    height: int | None = None,
    width: int | None = None,
    source_fps: float | None = None,
) -> Iterator[np.ndarray]:
    """
    The frames that `read_video` returns, one at a time; those that a slower clock skips are not converted.

    Args:
        source, fps, height, width: As for [`read_video`].
        source_fps (`float`, *optional*): The clock of an array, which has none of its own: with it `fps` applies.

    Yields:
        `numpy.ndarray` of shape `(H, W, 3)`, uint8.

    Raises:
        VideoDecodeError: As for [`read_video`], where reading gets to; what was yielded before is good.
        ValueError: As for [`read_video`].
    """
    if (height is None) != (width is None):
        raise ValueError(f"`height` and `width` go together, got height={height}, width={width}. Pass both or none.")
    if fps is not None and fps <= 0:
        raise ValueError(f"`fps` must be positive, got {fps}.")
    pictures: Iterator[av.VideoFrame | np.ndarray]
    if isinstance(source, (np.ndarray, list)):
        array = _check_array(source)
        step = 1 / source_fps if source_fps else math.nan
        clocked = ((index * step, step, frame) for index, frame in enumerate(array))
        pictures = _resample(clocked, fps) if fps and source_fps else iter(array)
    else:
        decoded = decode_video(source)
        pictures = _resample(decoded, fps) if fps else (frame for _, _, frame in decoded)
    last, image = None, np.empty(0)
    for picture in pictures:
        if picture is not last:  # a faster clock shows a frame more than once
            last, image = picture, picture if isinstance(picture, np.ndarray) else _rgb(picture)
            if height is not None and width is not None:
                image = _cover(image, height, width)
        yield image


def decode_video(source: VideoSource) -> Iterator[tuple[float, float, av.VideoFrame]]:
    """
    (time, duration, frame) of each frame of a file in display order; times in seconds, frames as the decoder left
    them (see [`upright`]). For readers that want no more than part of a frame.

    Raises:
        VideoDecodeError: As for [`read_video`], where reading gets to.
    """
    with _open(source) as (container, stream):
        yield from _decode(container, stream, source_name(source))


def upright(image: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
    """An image made from `frame`, `(H, W)` or `(H, W, C)`, turned as the file says that it is to be shown."""
    return np.rot90(image, k=frame.rotation // 90) if frame.rotation else image


def probe_video(source: VideoSource) -> VideoInfo:
    """
    Frame count, frame rate and size of a video from its header, without decoding more than the first frame.

    A format whose header has no frame count (Matroska, for one) is demuxed to count. Damage inside a frame goes
    unnoticed here; `read_video` finds it.

    Raises:
        VideoDecodeError: The file is missing, empty, truncated, has no video stream, or its first frame is damaged.
    """
    if isinstance(source, (np.ndarray, list)):
        video = _check_array(source)
        return VideoInfo(video.shape[0], math.nan, video.shape[1], video.shape[2], math.nan)
    name = source_name(source)
    with _open(source) as (container, stream):
        _, _, first = next(_decode(container, stream, name))
        height, width = (first.width, first.height) if first.rotation % 180 else (first.height, first.width)
        rate = float(stream.average_rate or stream.guessed_rate or 0) or math.nan
        num_frames = stream.frames
    if num_frames == 0:
        with _open(source) as (container, stream):
            num_frames = sum(packet.size > 0 for packet in container.demux(stream))
    return VideoInfo(num_frames, rate, height, width, num_frames / rate)


def write_video(
    path: str | os.PathLike[str], video: np.ndarray, fps: float, *, crf: int = 12, preset: str = "veryfast"
) -> Path:
    """
    Write frames as an mp4 that browsers play (H.264, yuv420p, index in front).

    yuv420p needs even sides: an odd side grows by one pixel, a copy of the last column or row. The file appears under
    its name only when it is whole.

    Equal frames and options give equal bytes with one build of FFmpeg and x264, as in one wheel of PyAV: on every
    x86-64 processor, with any number of cores and under load. Another version, or another architecture, may give other
    bytes, and so another [`video_hash`].

    Args:
        path (`str` or `Path`): File to write, ending in `.mp4`; its folder is made where needed.
        video (`numpy.ndarray` of shape `(T, H, W, 3)`): uint8 RGB frames.
        fps (`float`): Frames per second.
        crf (`int`, defaults to `12`): Constant rate factor of x264, 0 (best) to 51 (worst).
        preset (`str`, defaults to `"veryfast"`): Speed preset of x264.

    Returns:
        `Path`: The file.

    Raises:
        ValueError: Frames of another shape or dtype, or `fps` that is not positive.
        OSError: The file cannot be written. An older file of that name is left as it was.
    """
    video = _check_array(video)
    if not fps > 0:
        raise ValueError(f"`fps` must be positive, got {fps}.")
    height, width = video.shape[1:3]
    if height % 2 or width % 2:  # not else: a copy of 81 frames of 720p takes a quarter of a second
        video = np.pad(video, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    # The second pass of `faststart` opens the file again by its name.
    of_file = {"movflags": "+faststart"}
    with atomic_file(path) as partial, av.open(str(partial), "w", format="mp4", options=of_file) as container:
        rate = Fraction(fps).limit_denominator(100_000)
        options = {"crf": str(crf), "preset": preset, "x264-params": _X264_PARAMS}
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = video.shape[1], video.shape[2], "yuv420p"
        stream.codec_context.thread_count = 1  # x264 output depends on its number of threads
        stream.codec_context.colorspace = _BT601_LIMITED["colorspace"]
        stream.codec_context.color_range = _BT601_LIMITED["color_range"]
        for frame in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode(None))
    return Path(path)


def video_hash(source: VideoSource) -> str:
    """
    Hash of a video's content (the file's bytes, or an array's frames and shape): 32 hexadecimal digits.

    Raises:
        VideoDecodeError: The file cannot be opened.
    """
    if isinstance(source, (np.ndarray, list)):
        return fingerprint(np.ascontiguousarray(_check_array(source)).data)
    with _open_bytes(source) as file:
        return hash_bytes(file)


def _check_array(video: np.ndarray | list[Any]) -> np.ndarray:
    if isinstance(video, list):  # what a `datasets` array column gives in the default format
        video = np.asarray(video, dtype=np.uint8)
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3 or 0 in video.shape:
        raise ValueError(
            f"A video array must be uint8 of shape (frames, height, width, 3), got {video.dtype} {video.shape}. "
            "Convert it with `(255 * video).round().astype('uint8')` when it is in [0, 1], and put the channels last."
        )
    return video


@contextmanager
def _open_bytes(source: VideoSource) -> Iterator[io.BufferedIOBase]:
    """The bytes of a source as a binary file."""
    name = source_name(source)
    if isinstance(source, Mapping) and source.get("bytes") is not None:
        yield io.BytesIO(source["bytes"])
        return
    path = source.get("path") if isinstance(source, Mapping) else source
    if not isinstance(path, (str, os.PathLike)):
        raise VideoDecodeError(
            f"{name}: expected a path, a dict with 'path' or 'bytes', or a uint8 array, got {type(path).__name__}."
        )
    try:
        file = open(path, "rb")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise VideoDecodeError(
            f"{name}: cannot open the file ({error.strerror}). Check the path (relative paths start at {os.getcwd()}) "
            "and that the file is on this machine.",
            kind="missing",
        ) from error
    with file:
        yield file


@contextmanager
def _open(source: VideoSource) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its first video stream; raises when the header promises more than the file holds."""
    name = source_name(source)
    with _open_bytes(source) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if size == 0:
            words = f"{name}: the file is empty (0 bytes). Fetch or render it again, or drop its row."
            raise VideoDecodeError(words, kind="empty")
        try:
            container = av.open(file, "r", options=_OPEN_OPTIONS)
        except (av.error.FFmpegError, OSError) as error:
            raise VideoDecodeError(
                f"{name}: not a video file that FFmpeg can open, or its index is cut off ({_reason(error)}). Fetch or "
                "render it again, or drop its row."
            ) from error
        with container:
            if not container.streams.video:
                kinds = ", ".join(stream.type for stream in container.streams) or "no stream at all"
                words = f"{name}: expected a video stream, got {kinds}. Drop its row."
                raise VideoDecodeError(words, kind="no_video_stream")
            stream = container.streams.video[0]
            _check_whole(stream, size, name)
            yield container, stream


def _check_whole(stream: VideoStream, size: int, name: str) -> None:
    """Compare the index with the file size: an mp4 with its index in front opens, and partly plays, when cut off."""
    if not stream.frames:
        return
    present = sum(entry.pos + entry.size <= size for entry in stream.index_entries)
    if present < len(stream.index_entries):
        raise VideoDecodeError(
            f"{name}: truncated. The header declares {stream.frames} frames, the file ends after {present}. Fetch or "
            "render it again, or drop its row.",
            kind="truncated",
        )


def _decode(container: InputContainer, stream: VideoStream, name: str) -> Iterator[tuple[float, float, av.VideoFrame]]:
    """(time, duration, frame) of each frame, in display order; raises on damage instead of concealing it."""
    stream.codec_context.options = {"err_detect": "explode"}  # the default paints over damaged blocks and says nothing
    count, end = 0, -math.inf
    step = 1 / float(stream.average_rate or stream.guessed_rate or 25)
    try:
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise VideoDecodeError(_damaged(name, count, "a packet is marked as corrupt"), kind="damaged")
            for frame in packet.decode():
                if frame.is_corrupt:
                    raise VideoDecodeError(_damaged(name, count, "a frame is marked as corrupt"), kind="damaged")
                start = frame.time if frame.time is not None else count * step
                duration = float(frame.duration * frame.time_base) if frame.duration else step
                end = max(end, start + duration)
                yield start, duration, frame
                count += 1
    except (av.error.FFmpegError, OSError) as error:
        raise VideoDecodeError(_damaged(name, count, _reason(error)), kind="damaged") from error
    if count == 0:
        words = f"{name}: the video stream holds no frame; the file may be cut off. Drop its row."
        raise VideoDecodeError(words, kind="truncated")
    # An edit list (a clip cut without re-encoding) hides frames on purpose: only then may fewer frames come out.
    if stream.frames and len(stream.index_entries) == stream.frames and count < stream.frames:
        raise VideoDecodeError(_damaged(name, count, f"the header declares {stream.frames} frames"), kind="damaged")
    declared_end = _declared_end(container, stream)
    if declared_end is not None and end < declared_end - max(2 * step, 0.1):
        raise VideoDecodeError(
            f"{name}: truncated. The header declares {declared_end:.2f} s, the last frame ends at {end:.2f} s. Fetch "
            "or render it again, or drop its row.",
            kind="truncated",
        )


def _declared_end(container: InputContainer, stream: VideoStream) -> float | None:
    """
    Second before which the video of a container without a frame count cannot end; None where it does not say. Matroska
    counts from 0 and not from the first frame; where a format counts from there, the video ends later still.
    """
    if stream.frames or container.duration is None or container.streams.audio:
        return None
    return container.duration / av.time_base


def _damaged(name: str, count: int, what: str) -> str:
    return f"{name}: damaged after {count} good frames ({what}). Fetch or render it again, or drop its row."


def _reason(error: Exception) -> str:
    """FFmpeg's own words, without the name of the internal call."""
    return error.strerror if isinstance(error, OSError | av.error.FFmpegError) and error.strerror else str(error)


def _rgb(frame: av.VideoFrame) -> np.ndarray:
    """uint8 (H, W, 3), upright."""
    return upright(frame.to_ndarray(format="rgb24"), frame)


def _squash(frame: av.VideoFrame, height: int, width: int) -> np.ndarray:
    """uint8 (height, width, 3), upright."""
    if frame.rotation % 180:
        height, width = width, height
    image = frame.reformat(width=width, height=height, format="rgb24", interpolation="BILINEAR").to_ndarray()
    return upright(image, frame)


_Picture = TypeVar("_Picture")


def _resample(decoded: Iterable[tuple[float, float, _Picture]], fps: float) -> Iterator[_Picture]:
    """The frame on screen at `start + k / fps`, for k = 0, 1, ... while the video lasts."""
    start, end, tick = 0.0, 0.0, 0
    shown: _Picture | None = None
    tolerance = 1e-3 / fps  # timestamps are rounded to the container's clock
    for time, duration, frame in decoded:
        if shown is None:
            start = time
        while shown is not None and start + tick / fps < time - tolerance:
            yield shown
            tick += 1
        shown, end = frame, time + duration
    while shown is not None and start + tick / fps < end - tolerance:
        yield shown
        tick += 1


def _cover(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scale `(h, w, 3)` with its aspect kept until it covers `(height, width)`, then crop the centre."""
    if image.shape[:2] == (height, width):
        return image
    scale = max(height / image.shape[0], width / image.shape[1])
    scaled_height, scaled_width = (
        max(side, round(scale * old)) for side, old in zip((height, width), image.shape[:2], strict=True)
    )
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
    scaled = frame.reformat(width=scaled_width, height=scaled_height, interpolation="LANCZOS").to_ndarray()
    top, left = (scaled_height - height) // 2, (scaled_width - width) // 2
    return scaled[top : top + height, left : left + width]
