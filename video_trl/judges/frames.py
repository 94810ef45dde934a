"""Check the inputs of a judge, sample frames and resize them."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .base import Video


Frames = NDArray[np.uint8]  # (T, H, W, 3)


def check_request(videos: Sequence[object], prompts: Sequence[object]) -> None:
    """
    Refuse a call that cannot be answered, before any model runs. All faulty entries are named, not only the first.

    Args:
        videos: paths, or uint8 arrays `(T, H, W, 3)`.
        prompts: one sentence for each video.

    Raises:
        ValueError: unequal numbers, an empty prompt, a file that is not there, an array of another shape or dtype.
    """
    if len(videos) != len(prompts):
        raise ValueError(f"Expected one prompt for each video, got {len(videos)} videos and {len(prompts)} prompts.")
    faults = []
    for index, (video, prompt) in enumerate(zip(videos, prompts, strict=True)):
        if not isinstance(prompt, str) or not prompt.strip():
            faults.append(f"prompt {index} is empty or no string ({prompt!r})")
        if isinstance(video, np.ndarray):
            if video.dtype != np.uint8 or video.ndim != 4 or video.shape[3] != 3 or min(video.shape) < 1:
                faults.append(f"video {index} is {video.dtype} {video.shape}, expected uint8 (T, H, W, 3)")
        elif not isinstance(video, str | os.PathLike):
            faults.append(f"video {index} is a {type(video).__name__}, expected a path or an array")
        elif not Path(video).is_file():
            faults.append(f"video {index} is not on this machine: {os.fspath(video)}")
    if faults:
        more = f" and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise ValueError(f"Nothing was judged: {'; '.join(faults[:10])}{more}. Correct or leave out these entries.")


def quoted(caption: str) -> str:
    """The caption in quotes that it cannot end: what it says stays a caption, and does not become a question."""
    return json.dumps(caption, ensure_ascii=False)


def video_name(video: Video) -> str:
    """How messages call a video."""
    return f"<array of {len(video)} frames>" if isinstance(video, np.ndarray) else os.fspath(video)


def frame_rate(video: Video, fallback: float) -> float:
    """Frames per second that a file declares; `fallback` for an array, which has no clock."""
    if isinstance(video, np.ndarray):
        return fallback
    from ..data.video_io import probe_video

    fps = probe_video(video).fps
    return fps if fps > 0 else fallback


def segment_starts(num_frames: int, wanted: int) -> NDArray[np.int64]:
    """`(wanted,)` frame numbers as VideoPhy's judges were trained with; repeats frames of short videos."""
    segment = (num_frames - 1) / wanted
    return int(segment / 2) + np.round(segment * np.arange(wanted)).astype(np.int64)


def evenly_spaced(num_frames: int, wanted: int) -> NDArray[np.int64]:
    """At most `wanted` frame numbers from the first to the last frame; all of them where there are fewer."""
    return np.round(np.linspace(0, num_frames - 1, min(wanted, num_frames))).astype(np.int64)


def at_rate(num_frames: int, fps: float, wanted: float, *, fewest: int = 4, most: int = 768) -> NDArray[np.int64]:
    """
    Evenly spaced frame numbers, about `wanted` of them a second and an even number, as Qwen's own reader takes them.

    Args:
        num_frames: of the video; all of them where there are fewer than `fewest`.
        fps: of the video.
        wanted: frames a second.
    """
    most = min(most, num_frames) // 2 * 2
    count = round(min(max(num_frames / fps * wanted, fewest), most) / 2) * 2
    return np.round(np.linspace(0, num_frames - 1, count or num_frames)).astype(np.int64)


def sample_frames(
    video: Video,
    num_frames: int,
    policy: Callable[[int, int], NDArray[np.int64]],
    size: Callable[[int, int], tuple[int, int]],
) -> tuple[Frames, NDArray[np.int64]]:
    """
    The frames that a judge looks at.

    Args:
        video: path, or uint8 `(T, H, W, 3)`.
        num_frames: how many to ask the policy for.
        policy: (frames there are, frames wanted) -> frame numbers: `segment_starts` or `evenly_spaced`.
        size: (height, width) of the video -> (height, width) wanted.

    Returns:
        uint8 `(n, height, width, 3)` and the `(n,)` frame numbers.

    Raises:
        VideoDecodeError: the file is missing, damaged or no video; the message names it.
    """
    from ..data.video_io import probe_video, read_frames_squashed  # the data package loads diffusers

    info = probe_video(video)
    height, width = size(info.height, info.width)
    indices = policy(info.num_frames, num_frames)
    frames, count = read_frames_squashed(video, indices.tolist(), height, width)
    if count != info.num_frames:  # the header was wrong
        indices = policy(count, num_frames)
        frames, _ = read_frames_squashed(video, indices.tolist(), height, width)
    return frames, indices


def qwen_size(
    height: int, width: int, *, multiple: int = 28, fewest: int = 128 * 28 * 28, most: int = 768 * 28 * 28
) -> tuple[int, int]:
    """Sides that are multiples of `multiple`, of `fewest` to `most` pixels in all, as Qwen's own reader has them."""
    new_height, new_width = (max(multiple, round(side / multiple) * multiple) for side in (height, width))
    if new_height * new_width > most:
        scale = (most / (height * width)) ** 0.5
        new_height, new_width = (max(multiple, int(side * scale / multiple) * multiple) for side in (height, width))
    elif new_height * new_width < fewest:
        scale = (fewest / (height * width)) ** 0.5
        new_height, new_width = (-int(-side * scale // multiple) * multiple for side in (height, width))
    return new_height, new_width


def size_within(height: int, width: int, max_pixels: int, multiple: int) -> tuple[int, int]:
    """Sides that are multiples of `multiple`, near the aspect ratio, of at most `max_pixels` in all; never larger."""
    scale = min(1.0, (max_pixels / (height * width)) ** 0.5)
    new_height, new_width = (max(1, round(side * scale / multiple)) for side in (height, width))
    while new_height * new_width * multiple**2 > max_pixels and max(new_height, new_width) > 1:
        if new_height >= new_width:
            new_height -= 1
        else:
            new_width -= 1
    return new_height * multiple, new_width * multiple
