"""
Open a video file, tell the time of each of its frames, and decode them, whatever the container. Everything that a
file can do wrong becomes a `VideoDecodeError` that names it; nothing that it declares decides how much memory is used.
"""

import gc
import io
import math
import os
import re
import stat
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream
from numpy.typing import NDArray


VideoSource = str | os.PathLike[str] | Mapping[str, Any] | np.ndarray | list[Any]

MAX_PIXELS = 33_177_600  # 8K, 7680 x 4320
_ATTACHED_PICTURE = 1024  # AV_DISPOSITION_ATTACHED_PIC: the cover of an album is no video
_JITTER = 1e-3  # seconds by which times may be off a constant rate where the container's clock is finer than that
_IDR = 5  # type of H.264's units that hold a slice of a picture which forgets all before it
_SEGMENT = bytes.fromhex("18538067")  # Matroska's element that holds all others but the header

# FFmpeg waits for its threads when a frame or a decoder of PyAV is collected. A forked process, such as a worker of a
# data loader, has none of them and would wait for ever: what it has inherited is never collected there.
os.register_at_fork(after_in_child=gc.freeze)


class VideoDecodeError(ValueError):
    """
    A video cannot be read, or not wholly. The message names the file, what failed and the way out.

    Attributes:
        kind (`str`): One word for tables: "missing", "empty", "no_video_stream", "truncated", "damaged", "too_short",
            "too_large" (see [`VideoLimits`]), and "unreadable" for the rest.
    """

    def __init__(self, message: str, kind: str = "unreadable") -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class VideoLimits:
    """
    How much of a machine a single file may use. A file beyond it raises a [`VideoDecodeError`] of kind "too_large".

    Args:
        max_pixels (`int`, defaults to 8K, `33177600`): Height times width of a frame.
        max_frames (`int`, defaults to `100000`): Frames that are decoded of one file.
        max_seconds (`float`, defaults to `3600`): From the first frame to the last one that is wanted.
        max_bytes (`int`, defaults to 2 GiB): Size of the array that `read_video` returns. It does not hold where
            `num_frames`, `height` and `width` are all given, since then the caller decides, not the file.

    Raises:
        ValueError: A limit that is not positive.
    """

    max_pixels: int = MAX_PIXELS
    max_frames: int = 100_000
    max_seconds: float = 3600.0
    max_bytes: int = 2**31

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"`{name}` must be positive, got {value}.")


DEFAULT_LIMITS = VideoLimits()


def source_name(source: VideoSource | None) -> str:
    """How messages call a video: its path, or what is known when it has none."""
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    if isinstance(source, Mapping):
        return str(source.get("path") or "<video bytes without a path>")
    if source is None:
        return "<no video>"
    return "<video array>"


@contextmanager
def naming(source: VideoSource) -> Iterator[None]:
    """
    Turns whatever the libraries raise for a file into a [`VideoDecodeError`] that names it.

    Damaged files make them raise far more than they document (`AttributeError` for a stream without a decoder,
    `UnicodeDecodeError` for a tag), and one file must not end a run of thousands.
    """
    try:
        yield
    except VideoDecodeError:
        raise
    except MemoryError as error:
        words = f"{source_name(source)}: reading it needs more memory than there is. Drop its row."
        raise VideoDecodeError(words, kind="too_large") from error
    except Exception as error:
        raise VideoDecodeError(_damaged(source_name(source), None, reason(error)), kind="damaged") from error


def reason(error: Exception) -> str:
    """FFmpeg's own words, without the name of the internal call."""
    if isinstance(error, OSError | av.error.FFmpegError):
        return error.strerror or str(error)
    return f"{type(error).__name__}: {error}"


def _damaged(name: str, count: int | None, what: str) -> str:
    place = "" if count is None else f" after {count} good frames"
    return f"{name}: damaged{place} ({what}). Fetch or render it again, or drop its row."


@contextmanager
def open_bytes(source: VideoSource) -> Iterator[io.BytesIO | io.BufferedReader]:
    """
    The bytes of a source as a binary file.

    Raises:
        VideoDecodeError: It is no regular file, which could be waited for without end, or cannot be opened or read.
    """
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
        # Without O_NONBLOCK a pipe is opened when someone writes to it.
        file = open(path, "rb", opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK))  # noqa: SIM115
    except (OSError, ValueError) as error:  # a name with a null byte is a ValueError
        raise VideoDecodeError(
            f"{name}: cannot open the file ({reason(error)}). Check the path (relative paths start at {os.getcwd()}) "
            "and that the file is on this machine.",
            kind="missing",
        ) from error
    with file, naming(source):
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            words = f"{name}: expected a file, got a pipe or a device. Copy its content into a file, or drop its row."
            raise VideoDecodeError(words)
        yield file


@contextmanager
def open_stream(source: VideoSource, limits: VideoLimits) -> Iterator[tuple[InputContainer, VideoStream]]:
    """
    The container and its best video stream. Neither may be used after the block: their memory is FFmpeg's.

    Raises:
        VideoDecodeError: Also when the header promises more than the file holds, or than `limits` allow.
    """
    name = source_name(source)
    with open_bytes(source) as file:
        size = file.seek(0, os.SEEK_END)
        if size == 0:
            words = f"{name}: the file is empty (0 bytes). Fetch or render it again, or drop its row."
            raise VideoDecodeError(words, kind="empty")
        # Playlists and `concat` scripts may name other files or URLs; a video from a stranger's dataset must not open
        # them. Opening decodes a little already: `max_pixels` holds for that too.
        options = {"protocol_whitelist": "none", "max_pixels": str(limits.max_pixels)}
        with naming(source):
            file.seek(0)
            _check_segment(file, size, name)
            file.seek(0)
            try:
                # Nobody here reads tags, and files of other decades have them in the code page of their machine.
                container = av.open(file, "r", options=options, metadata_errors="replace")
            except (av.error.FFmpegError, OSError) as error:
                raise VideoDecodeError(
                    f"{name}: not a video file that FFmpeg can open, or its index is cut off ({reason(error)}). Fetch "
                    "or render it again, or drop its row."
                ) from error
            with container:
                stream = _best_stream(container, name)
                pixels = stream.codec_context.width * stream.codec_context.height
                if pixels > limits.max_pixels:
                    raise too_large(name, f"at most {limits.max_pixels} pixels in a frame", f"{pixels}", "max_pixels")
                _check_index(stream, size, name)
                # Without "explode" decoders paint over damaged blocks and say nothing.
                stream.codec_context.options = {"err_detect": "explode", "max_pixels": str(limits.max_pixels)}
                yield container, stream


def too_large(name: str, expected: str, got: str, limit: str) -> VideoDecodeError:
    """The error of a file that is beyond a limit, named as in [`VideoLimits`]."""
    words = f"{name}: expected {expected}, got {got}. Raise `{limit}` of `VideoLimits` to read it, or drop its row."
    return VideoDecodeError(words, kind="too_large")


def _best_stream(container: InputContainer, name: str) -> VideoStream:
    """What players show: FFmpeg's choice, but no cover picture."""
    films = [stream for stream in container.streams.video if not int(stream.disposition) & _ATTACHED_PICTURE]
    if not films:
        kinds = ", ".join(stream.type for stream in container.streams) or "no stream at all"
        words = f"{name}: expected a video stream, got {kinds}: the file is cut, or no video. Drop its row."
        raise VideoDecodeError(words, kind="no_video_stream")
    decodable = [stream for stream in films if stream.codec_context is not None]
    if not decodable:
        words = f"{name}: FFmpeg has no decoder for its video. Convert it to H.264, or drop its row."
        raise VideoDecodeError(words)
    best = container.streams.best("video")
    return next((stream for stream in decodable if best is not None and stream.index == best.index), decodable[0])


def _check_index(stream: VideoStream, size: int, name: str) -> None:
    """Compare the index with the file size: an mp4 with its index in front opens, and partly plays, when cut off."""
    if not stream.frames:
        return
    shown = [entry.pos + entry.size for entry in stream.index_entries if not entry.is_discard]
    present = sum(end <= size for end in shown)
    if present < len(shown):
        raise VideoDecodeError(
            f"{name}: truncated. The header declares {len(shown)} frames, the file ends after {present}. Fetch or "
            "render it again, or drop its row.",
            kind="truncated",
        )


def _check_segment(file: io.BufferedIOBase, size: int, name: str) -> None:
    """Matroska and WebM have no index of frames; they say how many bytes long they are."""
    head = file.read(4096)
    if not head.startswith(bytes.fromhex("1a45dfa3")):
        return
    place = head.find(_SEGMENT) + len(_SEGMENT)
    if place < len(_SEGMENT) or place >= len(head) or not head[place]:
        return
    # The number of leading zero bits says how many bytes the length takes; all bits set means that it is not known.
    width = 9 - head[place].bit_length()
    length = int.from_bytes(head[place : place + width], "big") & ((1 << 7 * width) - 1)
    if length != (1 << 7 * width) - 1 and place + width + length > size:
        raise VideoDecodeError(
            f"{name}: truncated. The header declares {place + width + length} bytes, the file has {size}. Fetch or "
            "render it again, or drop its row.",
            kind="truncated",
        )


@dataclass(frozen=True)
class Timeline:
    """
    When the frames of a file are shown, from the time stamps of all its packets; no frame is decoded for it.

    Containers round times, Matroska and FLV to a millisecond. Where all times fit a constant rate, they are put back
    on its grid, so that a clip has the same clock in every container.

    Attributes:
        num_frames (`int`): Frames that are shown; those that an edit list hides, or that only help to decode others,
            do not count.
        start, end (`float`): Seconds at which the first frame appears and the last one goes.
        fps (`float`): Frames per second, on average.
        grid (`float`, *optional*): Frames per second of the grid that the times fit. There may be gaps in it.
        times (`array` of `float`): Seconds at which each frame appears, growing.
        by_order (`bool`): The container stores no times of frames (AVI), or not of all: the first one shown has the
            first, and so on.
        has_leading (`bool`): Some pictures are to be shown before the first one of the file, or with it. They may need
            others that were cut away, and are then not shown: only decoding tells.
    """

    num_frames: int
    start: float
    end: float
    fps: float
    grid: float | None
    times: NDArray[Any]
    by_order: bool
    has_leading: bool = False

    @property
    def step(self) -> float:
        """Seconds from frame to frame, on average."""
        return 1 / self.fps

    def time(self, stamp: float | None, number: int, previous: float) -> float:
        """
        Seconds at which a frame is shown.

        Args:
            stamp (`float`, *optional*): What the decoder says.
            number (`int`): How many frames were shown before it.
            previous (`float`): When the last of them was; time never goes back.
        """
        if self.by_order and number < len(self.times):
            return float(self.times[number])
        if stamp is None:
            return previous + self.step if number else self.start
        if self.grid is not None:
            stamp = self.start + round((stamp - self.start) * self.grid) / self.grid
        return stamp if stamp > previous else previous + self.step

    def duration(self, time: float) -> float:
        """Seconds from a frame that appears at `time` to the next one, or to the end."""
        following = int(np.searchsorted(self.times, time + 1e-6))
        end = float(self.times[following]) if following < len(self.times) else self.end
        return end - time if end > time else self.step


def read_timeline(container: InputContainer, stream: VideoStream, first: Sequence[int] = ()) -> Timeline:
    """
    Reads all packets of a container that was just opened, which is then at its end.

    Args:
        first (sequence of `int`): Stamps of the first frames that can be decoded, up to a later one; pictures that
            should come before the last of them are not shown.
    """
    by_order = container.format.name == "avi"
    shown: list[int | None] = []
    in_file: list[int | None] = []
    last, last_duration = -math.inf, 0
    for packet in _shown_packets(container, stream):
        shown.append(packet.pts)
        in_file.append(packet.dts)
        if packet.pts is not None and packet.pts >= last:
            last, last_duration = packet.pts, packet.duration or 0
    known = [stamp for stamp in shown if stamp is not None]
    hidden = sum(stamp <= first[-1] for stamp in known) - len(first) if first else 0
    has_leading = not first and sum(stamp <= known[0] for stamp in known) > 1
    count = len(shown) - hidden
    # AVI stores no times: FFmpeg counts packets, and at the ends it may be wrong in either kind of stamp.
    evenest = min((in_file, shown) if by_order else (shown,), key=_unevenness)
    stamps = sorted(stamp for stamp in evenest if stamp is not None)[hidden:]
    base = float(stream.time_base or 0)
    rates = [float(rate) for rate in (stream.guessed_rate, stream.average_rate) if rate]
    if not stamps or not base:  # a bare stream without a container
        return _even(count, rates[0] if rates else 25.0)
    times: NDArray[Any] = np.array(stamps, dtype=np.int64) * base
    start, span, steps = float(times[0]), float(times[-1] - times[0]), len(times) - 1
    if span > 0:
        rates.append(steps / span)
    fitting = [rate for error in (base, max(base, _JITTER)) for rate in rates if _fits(times - start, rate, error)]
    if len(times) < count and fitting:  # some frames have no time, as those before zero in Matroska
        return _even(count, fitting[0])
    constant = [rate for rate in fitting if round(span * rate) == steps]  # no gap in the grid
    grid = next(iter(constant or fitting), None)
    if grid is not None:
        times = start + np.rint((times - start) * grid) / grid
    if constant:
        fps = constant[0]
        end = start + len(times) / fps
    else:
        end = float(times[-1]) + (last_duration * base or span / max(steps, 1) or 1 / (rates[0] if rates else 25.0))
        fps = len(times) / (end - start)
    return Timeline(count, start, end, fps, grid, times, by_order, has_leading)


def _even(count: int, fps: float) -> Timeline:
    """Frames that follow each other at a rate, in the order in which they are decoded."""
    return Timeline(count, 0.0, count / fps, fps, None, np.arange(count) / fps, True)


def _unevenness(stamps: Sequence[int | None]) -> tuple[int, int]:
    """How many are missing, and how many different steps the others take."""
    known = sorted(stamp for stamp in stamps if stamp is not None)
    return len(stamps) - len(known), len({after - before for before, after in pairwise(known)})


def _fits(offsets: NDArray[Any], rate: float, error: float) -> bool:
    """Whether the times are those of a rate, each in a slot of its own, but for an error in seconds."""
    slots = np.rint(offsets * rate)
    return bool((np.diff(slots) > 0).all() and (np.abs(offsets - slots / rate) <= 1.001 * error).all())


def _shown_packets(container: InputContainer, stream: VideoStream) -> Iterator[Packet]:
    """Packets of which a frame is shown."""
    is_shown = {"vp8": _is_shown_vp8, "vp9": _is_shown_vp9}.get(stream.codec_context.name, lambda data: True)
    for packet in container.demux(stream):
        if packet.size and not packet.is_discard and is_shown(memoryview(packet)):
            yield packet


def _is_shown_vp8(data: memoryview) -> bool:
    """VP8 and VP9 have frames that only others refer to; a bit of their header says so."""
    return bool(data[0] & 0x10)


def _is_shown_vp9(data: memoryview) -> bool:
    """A hidden frame mostly shares a packet with one that is shown; that ends in an index with a mark at both ends."""
    mark = data[-1]
    length = 2 + ((mark >> 3 & 3) + 1) * ((mark & 7) + 1)
    if mark >> 5 == 0b110 and length <= len(data) and data[-length] == mark:
        return True
    # Bits: two of mark, two of profile (after 3 a zero), "show an old frame", kind of frame, "show this frame".
    has_zero = data[0] & 0x30 == 0x30
    return bool(data[0] & (0x05 if has_zero else 0x0A))


def decode_frames(
    container: InputContainer, stream: VideoStream, timeline: Timeline, name: str, limits: VideoLimits
) -> Iterator[tuple[float, float, av.VideoFrame]]:
    """
    (time, duration, frame) of each frame in display order, of a container that was just opened; times in seconds.

    Raises:
        VideoDecodeError: On damage, which decoders would conceal, and beyond `limits`.
    """
    count, time = 0, -math.inf
    try:
        for frame in _decoded(container, stream, name):
            time = timeline.time(frame.time, count, time)
            if count == limits.max_frames:
                raise too_large(name, f"at most {count} frames", "more", "max_frames")
            if time - timeline.start > limits.max_seconds:
                seconds = f"at most {limits.max_seconds:g} s"
                raise too_large(name, seconds, f"a frame at {time - timeline.start:.0f} s", "max_seconds")
            yield time, timeline.duration(time), frame
            count += 1
    except VideoDecodeError:
        raise
    except (av.error.FFmpegError, OSError) as error:
        if not count and not stream.codec_context.width:  # the size alone was refused, before it was known here
            what = f"none that could be decoded ({reason(error)})"
            raise too_large(name, f"frames of at most {limits.max_pixels} pixels", what, "max_pixels") from error
        raise VideoDecodeError(_damaged(name, count, reason(error)), kind="damaged") from error
    if not count:
        words = f"{name}: the video stream holds no frame; the file may be cut off. Drop its row."
        raise VideoDecodeError(words, kind="truncated")


def _decoded(container: InputContainer, stream: VideoStream, name: str) -> Iterator[av.VideoFrame]:
    count, is_cut = 0, False
    # In MPEG-TS the mark only says that the numbers of packets jump, as they do where segments were joined.
    marks_damage = container.format.name != "mpegts"
    for number, packet in enumerate(container.demux(stream)):
        if packet.is_corrupt and marks_damage:
            raise VideoDecodeError(_damaged(name, count, "a packet is marked as corrupt"), kind="damaged")
        is_cut = is_cut or packet.is_discard
        if number == 0 and _is_from_the_middle(stream, packet):
            # It tells the decoder to forget pictures that were cut away, which "explode" would take for damage. What
            # H.264's decoder paints over is marked all the same.
            stream.codec_context.options = {"max_pixels": stream.codec_context.options["max_pixels"]}
        try:
            frames = packet.decode()
        except av.error.FFmpegError:
            # Where an edit list hides the beginning, hidden frames, and those around the first one that is shown, may
            # miss references that were cut away. What is shown is then whole, or marked as corrupt.
            if packet.is_discard or (is_cut and not count):
                continue
            raise
        for frame in frames:
            if frame.is_corrupt:
                raise VideoDecodeError(_damaged(name, count, "a frame is marked as corrupt"), kind="damaged")
            count += 1
            yield frame


def _is_from_the_middle(stream: VideoStream, first: Packet) -> bool:
    """Whether an H.264 stream begins with a picture that others could still look behind: it is no IDR picture."""
    context = stream.codec_context
    if context.name != "h264" or not first.size:
        return False
    data, header = bytes(first), context.extradata or b""
    if header[:1] != b"\1" or len(header) < 5:  # units follow a start code, not their length
        return not any(unit[0] & 31 == _IDR for unit in re.findall(rb"\x00\x00\x01(.)", data, re.DOTALL))
    width, place = 1 + (header[4] & 3), 0
    while place + width < len(data):
        if data[place + width] & 31 == _IDR:
            return False
        place += width + int.from_bytes(data[place : place + width], "big")
    return True


def orientation(frame: av.VideoFrame) -> tuple[bool, int, int]:
    """
    How a frame is to be shown: (rows become columns, step along rows, step along columns), steps 1 or -1.

    Files say it by a matrix that takes (x, y) to (a x + c y, b x + d y); only quarter turns and mirrors of it count.
    """
    try:
        matrix = frame.side_data.get(av.sidedata.sidedata.Type.DISPLAYMATRIX)
    except ValueError:  # PyAV does not know all kinds of side data
        matrix = None
    if matrix is not None:
        a, b, _, c, d = struct.unpack("=5i", bytes(matrix)[:20])
    else:
        a, b, c, d = {90: (0, -1, 1, 0), 180: (-1, 0, 0, -1), 270: (0, 1, -1, 0)}.get(
            frame.rotation % 360, (1, 0, 0, 1)
        )
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return False, -1 if d < 0 else 1, -1 if a < 0 else 1
    return True, -1 if b < 0 else 1, -1 if c < 0 else 1


def upright(image: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
    """An image made from `frame`, `(H, W)` or `(H, W, C)`, turned and mirrored as the file says."""
    transposed, rows, columns = orientation(frame)
    return (image.swapaxes(0, 1) if transposed else image)[::rows, ::columns]
