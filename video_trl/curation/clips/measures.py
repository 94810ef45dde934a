"""
Measure cuts, blends, motion, brightness and text of a clip in one decoding pass, on small grey pictures.

The numbers go into the manifest; rules are thresholds on them (`GTPairConfig.filter_rules`). So new thresholds need no
new pass, and the manifest shows why a clip was dropped.
"""

import logging
from collections.abc import Iterator
from typing import Any

import av
import numpy as np
import pyarrow as pa
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray
from scipy import ndimage

from ...data.video_file import VideoDecodeError, VideoLimits, VideoSource, naming, upright
from ...data.video_io import decode_video
from ..engine.manifest import Batch
from .camera_motion import register, warp
from .sources import open_clip
from .text_overlay import TEXT_SHORT_EDGE, LineDetector, TextDetector


logger = logging.getLogger(__name__)

Pictures = NDArray[np.float32]

#: Columns that a measurement adds. Grey levels run from 0 to 255.
MEASURES: dict[str, pa.DataType] = {
    "decoded_frames": pa.int64(),  # frames that came out of the decoder
    "decoded_seconds": pa.float64(),  # from the first frame to the end of the last, by their timestamps
    "longest_gap": pa.float64(),  # seconds between two frames: large in clips of variable rate that stall
    "brightness": pa.float64(),  # mean grey level
    "contrast": pa.float64(),  # median over time of the standard deviation over the picture
    "motion": pa.float64(),  # how much the busiest cells change: 4th largest standard deviation over time
    "camera_motion": pa.float64(),  # median speed of the picture as a whole, in short sides a second
    "object_motion": pa.float64(),  # grey levels that neither camera motion nor blending explains, see below
    "cuts": pa.int64(),  # changes of scene from one frame to the next
    "blended": pa.float64(),  # largest proportion of the picture that turns from one picture into another by blending
    "flashes": pa.int64(),  # moments at which the whole picture is brighter or darker than before and after
    "text": pa.float64(),  # proportion of the picture covered by text
}
MEASURES_VERSION = 3  # part of the store's name: raise it with every change of a number

SHORT_EDGE = 64  # cells: 4 pixels at 256, 11 at 720. Sensor noise averages out, a ball of 5 % of the height does not
_BLUR = 1.0  # cells; then pictures can be warped by fractions of a cell
_TICK = 0.1  # seconds between the pictures that motion and blending are measured on
_ONSET = 0.05  # seconds
_LAG = 4  # ticks between pictures that are compared: a body that rolls slowly must have left its place
_SLACK = 0.15  # cells by which the camera's motion may be wrong: what a strong edge leaves then is no body
_MAX_LARGE = 64  # pictures of a clip that are searched for text
_CELLS = 4  # a measure of "the busiest cells" takes the 4th largest: one flickering cell is no motion

#: Minutes, where the clips of a run last seconds: a longer one must not take the memory of all others.
MEASURE_LIMITS = VideoLimits(max_frames=3000)


def measure_batch(
    batch: Batch, text_detector: TextDetector | None = None, limits: VideoLimits = MEASURE_LIMITS
) -> Batch:
    """
    Stage "measure" as a batch function.

    Args:
        batch (`dict`): Columns `path`, `offset`, `length`.
        text_detector ([`TextDetector`], *optional*): Instead of the `LineDetector`.
        limits ([`VideoLimits`], *optional*): How large and long a file may be.

    Returns:
        `dict`: The columns `MEASURES`; a clip that cannot be decoded to its end is dropped, by the kind of its fault,
            and one whose pictures are beyond the arithmetic of a measure by "unmeasured".
    """
    added: Batch = {name: [] for name in (*MEASURES, "dropped_by", "detail")}
    for path, offset, length in zip(batch["path"], batch["offset"], batch["length"], strict=True):
        row: dict[str, Any] = dict.fromkeys(added)
        try:
            row |= measure_clip(open_clip(path, offset, length), text_detector, limits)
        except VideoDecodeError as error:
            row |= {"dropped_by": error.kind, "detail": str(error)}
        except (ArithmeticError, LookupError, ValueError) as error:
            # A fault of ours, and still no reason to stop a run of thousands: the row says what to report.
            logger.exception("%s could not be measured", path)
            row |= {"dropped_by": "unmeasured", "detail": f"{path}: {type(error).__name__}: {error}"}
        for name, values in added.items():
            values.append(row[name])
    return added


def measure_clip(
    source: VideoSource, text_detector: TextDetector | None = None, limits: VideoLimits = MEASURE_LIMITS
) -> dict[str, float]:
    """
    The numbers of one clip, by the names of `MEASURES`.

    Raises:
        VideoDecodeError: The clip cannot be decoded to its end, or is beyond `limits`.
    """
    times: list[float] = []
    small: list[NDArray[np.uint8]] = []
    large: list[NDArray[np.uint8]] = []
    apart = 1.0  # seconds: a picture a second is enough for text
    reader, end = _SmallPictures(), 0.0
    for time, duration, frame in decode_video(source, limits):
        times.append(time)
        end = time + duration
        with naming(source):
            small.append(reader.grey(frame))
            if time >= times[0] + apart * len(large):
                large.append(reader.colour(frame))
        if len(large) == _MAX_LARGE:
            large, apart = large[::2], 2 * apart
    text = float((text_detector or LineDetector())(np.stack(large)))
    return measure_pictures(np.stack(small).astype(np.float32), np.array(times), end) | {"text": text}


def measure_pictures(pictures: Pictures, clock: NDArray[np.float64], end: float) -> dict[str, float]:
    """
    All but the text.

    Args:
        pictures: `(n, H, W)` grey levels, n >= 1, sides of at least 16 cells.
        clock: `(n,)` seconds at which they appear, growing.
        end: second at which the last one goes.
    """
    smooth = ndimage.gaussian_filter(pictures, (0, _BLUR, _BLUR))
    cut_at = find_cuts(smooth, clock)
    slow = smooth[tick_numbers(clock)]
    camera, objects = motions(slow, clock[tick_numbers(clock)])
    return {
        "decoded_frames": len(clock),
        "decoded_seconds": end - clock[0],
        "longest_gap": float(np.diff(clock).max()) if len(clock) > 1 else 0.0,
        "brightness": float(pictures.mean()),
        "contrast": float(np.median(pictures.std(axis=(1, 2)))),
        "motion": _busiest((slow - slow.mean(axis=(1, 2), keepdims=True)).std(axis=0)),
        "camera_motion": camera,
        "object_motion": objects,
        "cuts": len(cut_at),
        "blended": blended_share(slow),
        "flashes": count_flashes(pictures.mean(axis=(1, 2)), clock, pictures),
    }


def tick_numbers(clock: NDArray[np.float64]) -> NDArray[np.int64]:
    """Numbers of the first pictures at or after each tenth of a second, none twice."""
    ticks = np.arange(clock[0], clock[-1] + 1e-6, _TICK)
    # The last tick may be past the last picture, by the rounding of a sum of tenths.
    return np.unique(np.searchsorted(clock, ticks).clip(max=len(clock) - 1))


class _SmallPictures:
    """Scales frames down; keeps FFmpeg's scalers, which are costly to set up, from frame to frame."""

    def __init__(self) -> None:
        self._grey, self._colour = VideoReformatter(), VideoReformatter()
        self._size: tuple[int, int] | None = None  # of the first frame; all pictures of a clip have one shape

    def grey(self, frame: av.VideoFrame) -> NDArray[np.uint8]:
        height, width = self._scaled(frame, SHORT_EDGE)
        small = self._grey.reformat(frame, width=width, height=height, format="gray", interpolation="AREA")
        return upright(small.to_ndarray(), frame)

    def colour(self, frame: av.VideoFrame) -> NDArray[np.uint8]:
        height, width = self._scaled(frame, TEXT_SHORT_EDGE)
        small = self._colour.reformat(frame, width=width, height=height, format="rgb24", interpolation="BICUBIC")
        return upright(small.to_ndarray(), frame)

    def _scaled(self, frame: av.VideoFrame, short_edge: int) -> tuple[int, int]:
        """(height, width); a strip is cut down to 8 to 1, so that it cannot ask for more memory than a picture."""
        self._size = self._size or (frame.height, frame.width)
        scale = short_edge / min(self._size)
        height, width = (min(round(side * scale), 8 * short_edge) for side in self._size)
        return height, width


def _busiest(cells: NDArray[Any]) -> float:
    """The 4th largest of `(H, W)`; of fewer cells, the smallest."""
    flat = cells.ravel()
    place = max(flat.size - _CELLS, 0)
    return float(np.partition(flat, place)[place])


def find_cuts(smooth: Pictures, clock: NDArray[np.float64]) -> list[int]:
    """
    Frames `(n,)` with which another scene begins.

    A cut is a step that is large, much larger than the steps around it (a fast pan has large steps all along), and
    that lasts: two tenths of a second later the picture has not come back, as it does after a flash.
    """
    if len(smooth) < 3:
        return []
    change = np.abs(np.diff(smooth, axis=0)).mean(axis=(1, 2))
    frame_time = max(float(np.median(np.diff(clock))), 1e-3)
    reach = max(round(0.2 / frame_time) + 1, 2)
    usual = ndimage.median_filter(change, size=2 * max(round(0.25 / frame_time), 3) + 1, mode="nearest")
    cuts: list[int] = []
    for step in np.flatnonzero((change > 6) & (change > 3 * usual + 3)).tolist():
        before, after = max(step - reach + 1, 0), min(step + reach, len(smooth) - 1)
        lasting = float(np.abs(smooth[after] - smooth[before]).mean())
        if lasting > 0.6 * change[step] and (not cuts or step + 1 - cuts[-1] > reach):
            cuts.append(step + 1)
    return cuts


def count_flashes(brightness: NDArray[Any], clock: NDArray[np.float64], pictures: Pictures | None = None) -> int:
    """
    Runs of frames whose mean grey level is far from that of the half second around them.

    With `pictures` only those count that begin in most of the picture at once: what passes close to the lens darkens
    the whole of it as well, and comes in from one side.
    """
    frame_time = max(float(np.median(np.diff(clock))), 1e-3) if len(clock) > 1 else 1.0
    usual = ndimage.median_filter(brightness, size=2 * max(round(0.25 / frame_time), 2) + 1, mode="nearest")
    far = brightness - usual  # 0 at both ends: beyond them, the first and last frame stand for all others
    starts = np.flatnonzero((np.abs(far) > 15) & (np.abs(np.roll(far, 1)) <= 15))
    if pictures is None:
        return len(starts)
    rise = max(round(_ONSET / frame_time), 1)  # frames within which a flash is there
    count = 0
    for start in starts.tolist():
        strongest = start + int(np.abs(far[start : start + rise]).argmax())  # a flash may be shorter than its limit
        before, peak = pictures[max(start - rise, 0)], pictures[strongest]
        sign = 1 if far[start] > 0 else -1
        # A white sky cannot become brighter, nor a black night darker.
        free = before < 235 if sign > 0 else before > 20
        count += not free.any() or float((sign * (peak - before) > 5)[free].mean()) > 0.75
    return count


def blended_share(slow: Pictures) -> float:
    """
    How much of the picture cross-fades at once, or fades to black or white: in [0, 1].

    In a window, the two pictures between its ends must be mixtures `a * last + (1 - a) * first` of them, with one `a`
    for the whole picture that grows from the one to the other. Counted are cells that change by more than 10 levels
    and that the mixture explains to a fifth. A body that moves changes few cells, and is at neither end in between; a
    pan changes many, but camera motion explains it. A cut jumps from a = 0 to a = 1. Fractions below 0.2 are 0.
    """
    best = 0.0
    for seconds in (0.6, 1.5):
        length = round(seconds / _TICK)
        for start in range(len(slow) - length):
            first, last = slow[start], slow[start + length]
            change = last - first
            active = np.abs(change) > 10
            if active.mean() <= max(best, 0.2):
                continue
            steps = [slow[start + length * part // 3] - first for part in (1, 2)]
            fractions = [float((step * change).sum() / (change * change).sum()) for step in steps]
            if not 0.08 < fractions[0] < fractions[0] + 0.1 < fractions[1] < 0.92:
                continue
            errors = [np.abs(step - fraction * change) for step, fraction in zip(steps, fractions, strict=True)]
            explained = active & (np.maximum(*errors) < 0.2 * np.abs(change))
            if explained.mean() <= max(best, 0.2):
                continue
            moved, inside = warp(last.astype(np.float64), register(first.astype(np.float64), last.astype(np.float64)))
            by_camera = inside & (np.abs(moved - first) < 0.4 * np.abs(change))
            best = max(best, float((explained & ~by_camera).mean()))
    return best


def motions(slow: Pictures, clock: NDArray[np.float64]) -> tuple[float, float]:
    """
    (camera motion, object motion): speed in short sides a second, unexplained change in grey levels.

    Each picture is compared with the one 0.4 s before, moved by the best affine camera motion, and with the best
    mixture of the ones before and after. What is left in the busiest cells by the better of the two explanations is
    what bodies do. A still, a still that is panned and zoomed over (Ken Burns), and stills that follow each other,
    cut or blended, leave next to nothing; a small ball before a fixed camera leaves its whole contrast. The 80th
    percentile over time is taken: a body may rest for most of the clip.
    """
    if len(slow) < 2:
        return 0.0, 0.0
    left: list[float] = []
    speeds: list[float] = []
    for before, now, after in _triples(slow):
        change = after - before
        fraction = float((change * (now - before)).sum() / max(float((change * change).sum()), 1e-6))
        blend = _busiest(np.abs(now - before - fraction * change))
        still = _busiest(np.abs(now - before))
        if still < 3:  # nothing moves: nothing to register
            left.append(min(still, blend))
            speeds.append(0.0)
            continue
        matrix = register(now.astype(np.float64), before.astype(np.float64))
        moved, inside = warp(before.astype(np.float64), matrix)
        slack = _SLACK * np.hypot(*np.gradient(now))
        left.append(min(blend, still, _busiest((np.abs(moved - now) - slack).clip(0) * inside)))
        middle = np.array([now.shape[0] / 2, now.shape[1] / 2, 1])
        speeds.append(float(np.linalg.norm(matrix @ middle - middle[:2])) / SHORT_EDGE)
    step = _lag(slow) * max(float(np.median(np.diff(clock))), 1e-3)
    return float(np.median(speeds)) / step, float(np.percentile(left, 80))


def _lag(slow: Pictures) -> int:
    """Pictures from one of a triple to the next: `_LAG`, or what fits into a short clip."""
    return min(_LAG, max((len(slow) - 1) // 2, 1))


def _triples(slow: Pictures) -> Iterator[tuple[Pictures, Pictures, Pictures]]:
    """Pictures `_LAG` apart; of a clip too short for that, its first, middle and last."""
    lag = _lag(slow)
    if len(slow) == 2:
        yield slow[0], slow[1], slow[1]
    for middle in range(lag, len(slow) - lag, 3):
        yield slow[middle - lag], slow[middle], slow[middle + lag]
