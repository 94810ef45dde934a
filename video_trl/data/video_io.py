"""Read and write video files with PyAV. A damaged or incomplete file raises an error; no frame is invented."""

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import av
import numpy as np

from ..files import atomic_file, fingerprint, hash_bytes
from .video_file import (
    DEFAULT_LIMITS,
    Timeline,
    VideoDecodeError,
    VideoLimits,
    VideoSource,
    decode_frames,
    naming,
    open_bytes,
    open_stream,
    orientation,
    read_timeline,
    source_name,
    upright,
)


_BT601_LIMITED = {
    "colorspace": 6,
    "color_range": 1,
}  # AVCOL_SPC_SMPTE170M, AVCOL_RANGE_MPEG: swscale's default
# x264's macroblock tree has a routine for each instruction set, and they round differently. That for AVX-512 also lets
# in what happens to lie in memory: without this option equal frames give other bytes in every process.
_X264_PARAMS = "cpu-independent=1"
# Times that fit no grid are only as exact as Matroska's and FLV's clock.
_ROUNDING, _EXACT = 1e-3, 1e-6  # seconds


@dataclass(frozen=True)
class VideoInfo:
    """
    What a video is, without its pixels.

    Attributes:
        num_frames (`int`): Number of frames that are shown.
        fps (`float`): Average frames per second, `num_frames / duration`; `nan` for an array, which has no clock.
        height, width (`int`): Size in pixels as displayed, after the rotation that phones write into the file.
        duration (`float`): Length in seconds, from the first frame to the end of the last.
    """

    num_frames: int
    fps: float
    height: int
    width: int
    duration: float


def read_video(
    source: VideoSource,
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    height: int | None = None,
    width: int | None = None,
    limits: VideoLimits = DEFAULT_LIMITS,
) -> np.ndarray:
    """
    Decode a video into RGB frames. With all options left out: every frame, at its own size.

    Time is never stretched, since that would change the physics: `fps` picks, for every tick of the new clock, the
    last frame shown at that moment (frames are dropped or repeated by their timestamps), and `num_frames` then keeps
    the first frames of what is left. Containers round times. Those that fit a constant rate are made exact again; in a
    clip of variable rate a frame that comes up to 1 ms after a tick counts as shown.

    Args:
        source (`str`, `Path`, `dict` or `numpy.ndarray`):
            A file, a cell of a `datasets.Video(decode=False)` column (`{"path", "bytes"}`, bytes win), or uint8 frames
            of shape `(T, H, W, 3)`.
        num_frames (`int`, *optional*): Number of frames to return.
        fps (`float`, *optional*): Frames per second to return. An array has no clock: `fps` is ignored for it.
        height, width (`int`, *optional*): Size in pixels, given together: scaled to cover it, then centre-cropped.
        limits ([`VideoLimits`], *optional*): How large a file may be, and what is made of it.

    Returns:
        `numpy.ndarray` of shape `(T, H, W, 3)`, uint8. Where frames of a file differ in size, that of the first.

    Raises:
        VideoDecodeError: The file is missing, empty, damaged, truncated, has no video stream, has too few frames, or
            is beyond `limits`.
        ValueError: Only one of `height` and `width` is given, or an array has another shape or dtype.
    """
    _check_size(num_frames, fps, height, width)
    bounded = None in (num_frames, height, width)
    frames: list[Any] = []
    for image in islice(iterate_video(source, fps=fps, height=height, width=width, limits=limits), num_frames):
        frames.append(image)
        if bounded:
            _check_bytes(source, len(frames) * image.nbytes, limits)
    _check_length(source, len(frames), num_frames, fps)
    video = np.empty((len(frames), *frames[0].shape), dtype=np.uint8)
    for number in range(len(frames)):
        video[number], frames[number] = frames[number], None  # not `np.stack`: it holds all frames twice
    return video


def video_shape(
    source: VideoSource,
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    height: int | None = None,
    width: int | None = None,
    limits: VideoLimits = DEFAULT_LIMITS,
) -> tuple[int, int, int]:
    """
    (T, H, W) of what [`read_video`] returns for the same arguments, in the memory of a few frames.

    Every frame that it would return is decoded, which finds damage; none is converted or kept.

    It raises what [`read_video`] raises.
    """
    _check_size(num_frames, fps, height, width)
    count, size = 0, (0, 0)
    for picture in islice(_pictures(source, fps, None, limits), num_frames):
        if not count:
            size = _shown_size(picture) if height is None or width is None else (height, width)
        count += 1
        if None in (num_frames, height, width):
            _check_bytes(source, count * size[0] * size[1] * 3, limits)
    _check_length(source, count, num_frames, fps)
    return count, *size


def _check_bytes(source: VideoSource, size: int, limits: VideoLimits) -> None:
    if size > limits.max_bytes and not isinstance(source, (np.ndarray, list)):
        raise VideoDecodeError(
            f"{source_name(source)}: its frames take more than {limits.max_bytes} bytes (`max_bytes` of "
            "`VideoLimits`). Ask for `num_frames`, `height` and `width`, or raise the limit.",
            kind="too_large",
        )


def _check_length(source: VideoSource, count: int, num_frames: int | None, fps: float | None) -> None:
    if num_frames is not None and count < num_frames:
        clock = "" if fps is None else f" at {fps:g} fps"
        raise VideoDecodeError(
            f"{source_name(source)}: expected at least {num_frames} frames{clock}, got {count}. Use a longer video, "
            f"or ask for fewer frames (most models take 4k + 1: `num_frames={max(count - 1, 0) // 4 * 4 + 1}`).",
            kind="too_short",
        )


def _check_size(num_frames: int | None, fps: float | None, height: int | None, width: int | None) -> None:
    if num_frames is not None and num_frames < 1:
        raise ValueError(f"`num_frames` must be positive, got {num_frames}.")
    if (height is None) != (width is None):
        raise ValueError(f"`height` and `width` go together, got height={height}, width={width}. Pass both or none.")
    if fps is not None and not fps > 0:
        raise ValueError(f"`fps` must be positive, got {fps}.")


def read_frames_squashed(
    source: VideoSource, numbers: Sequence[int], height: int, width: int, limits: VideoLimits = DEFAULT_LIMITS
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
        limits ([`VideoLimits`], *optional*): How large a file may be.

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
        frames = (frame for _, _, frame in decode_video(source, limits))
    numbers_left, small, count = set(numbers), {}, 0
    for count, frame in enumerate(frames, start=1):
        if count - 1 in numbers_left:
            with naming(source):
                small[count - 1] = _squash(frame, height, width)
    if max(numbers) >= count:
        with naming(source):
            small[count - 1] = _squash(frame, height, width)
    return np.stack([small[min(number, count - 1)] for number in numbers]), count


def iterate_video(
    source: VideoSource,
    *,
    fps: float | None = None,
    height: int | None = None,
    width: int | None = None,
    source_fps: float | None = None,
    limits: VideoLimits = DEFAULT_LIMITS,
) -> Iterator[np.ndarray]:
    """
    The frames that `read_video` returns, one at a time; those that a slower clock skips are not converted.

    Args:
        source, fps, height, width, limits: As for [`read_video`].
        source_fps (`float`, *optional*): The clock of an array, which has none of its own: with it `fps` applies.

    Yields:
        `numpy.ndarray` of shape `(H, W, 3)`, uint8.

    Raises:
        VideoDecodeError: As for [`read_video`], where reading gets to; what was yielded before is good.
        ValueError: As for [`read_video`].
    """
    _check_size(None, fps, height, width)
    last, image, own_size = None, np.empty(0), (0, 0)
    for picture in _pictures(source, fps, source_fps, limits):
        if picture is not last:  # a faster clock shows a frame more than once
            own_size = own_size if last is not None else _shown_size(picture)
            last = picture
            with naming(source):
                image = picture if isinstance(picture, np.ndarray) else _rgb(picture, own_size)
                if height is not None and width is not None:
                    image = _cover(image, height, width)
        yield image


def _pictures(
    source: VideoSource, fps: float | None, source_fps: float | None, limits: VideoLimits
) -> Iterator[av.VideoFrame | np.ndarray]:
    """What is shown at every tick of the clock, not converted yet; the same object where it is shown again."""
    if isinstance(source, (np.ndarray, list)):
        array = _check_array(source)
        step = 1 / source_fps if source_fps else math.nan
        clocked = ((index * step, step, frame) for index, frame in enumerate(array))
        return _resample(clocked, fps, _EXACT) if fps and source_fps else iter(array)
    timeline = _timeline(source, limits)
    decoded = _decoded(source, timeline, limits)
    if not fps:
        return (frame for _, _, frame in decoded)
    return _resample(decoded, fps, _ROUNDING if timeline.grid is None else _EXACT)


def _timeline(source: VideoSource, limits: VideoLimits) -> Timeline:
    with open_stream(source, limits) as (container, stream):
        timeline = read_timeline(container, stream)
    if not timeline.has_leading:
        return timeline
    first: list[int] = []
    for _, _, frame in _decoded(source, timeline, limits):
        if frame.pts is None or (first and frame.pts != first[0]):
            break
        first.append(frame.pts)
    with open_stream(source, limits) as (container, stream):
        return read_timeline(container, stream, first)


def _decoded(
    source: VideoSource, timeline: Timeline, limits: VideoLimits
) -> Iterator[tuple[float, float, av.VideoFrame]]:
    with open_stream(source, limits) as (container, stream):
        yield from decode_frames(container, stream, timeline, source_name(source), limits)


def decode_video(
    source: VideoSource, limits: VideoLimits = DEFAULT_LIMITS
) -> Iterator[tuple[float, float, av.VideoFrame]]:
    """
    (time, duration, frame) of each frame of a file in display order; times in seconds, frames as the decoder left
    them (see [`upright`]). For readers that want no more than part of a frame.

    Raises:
        VideoDecodeError: As for [`read_video`], where reading gets to.
    """
    yield from _decoded(source, _timeline(source, limits), limits)


def probe_video(source: VideoSource, limits: VideoLimits = DEFAULT_LIMITS) -> VideoInfo:
    """
    Frame count, frame rate, length and size of a video from the time stamps of all its packets and its first frame.

    The file is read, and no frame but the first is decoded. Damage inside a frame goes unnoticed here; `read_video`
    finds it.

    Raises:
        VideoDecodeError: The file is missing, empty, truncated, has no video stream, its first frame is damaged, or
            larger than `limits` allow.
    """
    if isinstance(source, (np.ndarray, list)):
        video = _check_array(source)
        return VideoInfo(video.shape[0], math.nan, video.shape[1], video.shape[2], math.nan)
    timeline = _timeline(source, limits)
    _, _, first = next(_decoded(source, timeline, limits))
    height, width = _shown_size(first)
    return VideoInfo(timeline.num_frames, timeline.fps, height, width, timeline.end - timeline.start)


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
    with open_bytes(source) as file:
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


def _shown_size(picture: av.VideoFrame | np.ndarray) -> tuple[int, int]:
    """(height, width) as displayed."""
    if isinstance(picture, np.ndarray):
        return picture.shape[0], picture.shape[1]
    size = picture.height, picture.width
    return size[::-1] if orientation(picture)[0] else size


def _rgb(frame: av.VideoFrame, size: tuple[int, int]) -> np.ndarray:
    """uint8 (H, W, 3), upright; scaled to `size` where the frames of a file differ in it, as players do."""
    height, width = size[::-1] if orientation(frame)[0] else size
    return upright(frame.to_ndarray(format="rgb24", width=width, height=height), frame)


def _squash(frame: av.VideoFrame, height: int, width: int) -> np.ndarray:
    """uint8 (height, width, 3), upright."""
    if orientation(frame)[0]:
        height, width = width, height
    image = frame.reformat(width=width, height=height, format="rgb24", interpolation="BILINEAR").to_ndarray()
    return upright(image, frame)


_Picture = TypeVar("_Picture")


def _resample(decoded: Iterable[tuple[float, float, _Picture]], fps: float, rounding: float) -> Iterator[_Picture]:
    """The frame on screen at `start + k / fps`, for k = 0, 1, ... while the video lasts; `rounding` of times, in s."""
    start, end, tick, tolerance = 0.0, 0.0, 0, 0.0
    shown: _Picture | None = None
    for time, duration, frame in decoded:
        if shown is None:
            start = time
        tolerance = min(rounding, duration / 2, 0.25 / fps)
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
