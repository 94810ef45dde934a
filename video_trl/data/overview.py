"""Look through a dataset before it is used: which trainers it feeds, its sizes and lengths, and what looks wrong."""

import base64
import io
import os
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import PIL.Image

from ..files import check_page, write_atomically
from .columns import MapDataset, as_videos, column_names, undecoded
from .video_io import VideoDecodeError, probe_video, read_video, source_name, video_hash


_SHOWN = 20  # rows named for each problem; the count says how many there are
_SHEET_HEIGHT, _SHEET_FRAMES = 96, 3


@dataclass
class Overview:
    """
    What a dataset holds.

    Attributes:
        rows (`int`): Number of rows.
        videos (`int`): Number of videos that can be read; a file named twice counts twice.
        sizes (`Counter`): `"1280x720"` (width x height, as displayed) -> number of videos.
        rates (`Counter`): Frames per second, rounded to 0.01 -> number of videos.
        frames, seconds (list): Frames, and length in seconds, of each of them.
        rejected (`Counter`): Number of rejected videos in a row -> number of rows.
        problems (`dict[str, list[str]]`): What looks wrong -> where, e.g. `"row 3: chosen and rejected are equal"`.
    """

    rows: int
    videos: int = 0
    sizes: Counter[str] = field(default_factory=Counter)
    rates: Counter[float] = field(default_factory=Counter)
    frames: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    rejected: Counter[int] = field(default_factory=Counter)
    problems: dict[str, list[str]] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """The same as text."""
        lines = [f"{self.rows} rows, {self.videos} videos that can be read"]
        if self.rejected:
            lines.append(f"rejected videos in a row: {_counts(self.rejected)}")
        if self.frames:
            lines.append(f"size: {_counts(self.sizes)}")
            lines.append(f"frames: {_range(self.frames)}; seconds: {_range(self.seconds)}")
            lines.append(f"frames per second: {_counts(self.rates)}")
        for problem, places in self.problems.items():
            more = f", and {len(places) - _SHOWN} more" if len(places) > _SHOWN else ""
            lines.append(f"{problem} ({len(places)}): {'; '.join(places[:_SHOWN])}{more}")
        return lines

    def _note(self, problem: str, place: str) -> None:
        self.problems.setdefault(problem, []).append(place)


def look_through(
    dataset: MapDataset, *, count_tokens: Callable[[str], int] | None = None, max_tokens: int | None = None
) -> Overview:
    """
    Read every row, open every video and hash it; decode none.

    Args:
        dataset (`datasets.Dataset` or list of dicts): Rows with videos and prompts.
        count_tokens (callable, *optional*): Number of tokens of a prompt, the end of sequence included.
        max_tokens (`int`, *optional*): More than these are cut off in training.

    Returns:
        [`Overview`]: Its `problems` are of the kinds: a video that cannot be read, one video under several rows, equal
        chosen and rejected videos, a prompt that is empty or repeated or longer than `max_tokens`.
    """
    dataset = undecoded(dataset)
    overview, names = Overview(len(dataset)), column_names(dataset)
    columns = [name for name in ("video", "chosen", "rejected") if name in names]
    first_rows: dict[tuple[str, str], int] = {}
    prompts: dict[str, int] = {}
    for index in range(len(dataset)):
        row = dataset[index]
        hashes = {column: list(_look_at_videos(overview, index, column, row.get(column))) for column in columns}
        if set(hashes.get("chosen", ())) & set(hashes.get("rejected", ())):
            overview._note("a rejected video equals the chosen one", f"row {index}")
        for column, found in hashes.items():
            for value in found:
                first = first_rows.setdefault((column, value), index)
                if first != index:
                    overview._note(f"the same {column} video again", f"row {index} as row {first}")
        if "rejected" in columns:
            overview.rejected[len(hashes["rejected"])] += 1
        if "prompt" in names:
            _look_at_prompt(overview, index, row.get("prompt"), prompts, count_tokens, max_tokens)
    return overview


def _look_at_videos(overview: Overview, index: int, column: str, cell: Any) -> Iterator[str]:
    """Hash of each video of a cell that can be read."""
    for number, video in enumerate([] if cell is None else as_videos(cell)):
        place = f"row {index}, {column}" + (f"[{number}]" if column == "rejected" else "")
        try:
            info, digest = probe_video(video), video_hash(video)
        except (OSError, ValueError) as error:
            overview._note("a video cannot be read", f"{place}: {error}")
            continue
        overview.videos += 1
        overview.sizes[f"{info.width}x{info.height}"] += 1
        overview.frames.append(info.num_frames)
        if not np.isnan(info.fps):  # arrays have no clock
            overview.rates[round(info.fps, 2)] += 1
            overview.seconds.append(round(info.duration, 2))
        yield digest


def _look_at_prompt(
    overview: Overview,
    index: int,
    prompt: Any,
    prompts: dict[str, int],
    count_tokens: Callable[[str], int] | None,
    max_tokens: int | None,
) -> None:
    if not isinstance(prompt, str) or not prompt.strip():
        overview._note("there is no prompt", f"row {index}")
        return
    first = prompts.setdefault(prompt, index)
    if first != index:
        overview._note("the same prompt again", f"row {index} as row {first}")
    if count_tokens is not None and max_tokens is not None and (tokens := count_tokens(prompt)) > max_tokens:
        overview._note(f"the prompt is cut after {max_tokens} tokens", f"row {index}: {tokens}")


def _counts(counter: Counter[Any]) -> str:
    return ", ".join(f"{value:g} ({count})" if isinstance(value, float) else f"{value} ({count})"
                     for value, count in counter.most_common(8)) + (", ..." if len(counter) > 8 else "")  # fmt: skip


def _range(values: list[Any]) -> str:
    if not values:
        return "unknown"
    return f"{min(values):g} to {max(values):g}, median {statistics.median(values):g}"


def write_contact_sheet(dataset: MapDataset, path: str | os.PathLike[str], *, rows: int = 100) -> None:
    """
    Write an HTML page with the first, middle and last frame of every video and its prompt; no other file is needed.

    Args:
        dataset (`datasets.Dataset` or list of dicts): Rows with videos and prompts.
        path (path): The page.
        rows (`int`, defaults to `100`): Only the first so many.

    Raises:
        ValueError: If `path` is a file that is no such page.
    """
    check_page(path)
    dataset = undecoded(dataset)
    columns = [name for name in ("video", "chosen", "rejected") if name in column_names(dataset)]
    shown = []
    for index in range(min(rows, len(dataset))):
        row = dataset[index]
        videos = [
            {"column": column, "name": Path(source_name(video)).name, **_frames(video)}
            for column in columns
            for video in ([] if row.get(column) is None else as_videos(row[column]))
        ]
        shown.append({"index": index, "prompt": row.get("prompt") or "", "videos": videos})
    template = resources.files("video_trl").joinpath("templates/contact_sheet.html").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True).from_string(template)
    write_atomically(Path(path), page.render(rows=shown, total=len(dataset)).encode())


def _frames(video: Any) -> dict[str, Any]:
    try:
        frames = read_video(video)
    except (VideoDecodeError, OSError) as error:
        return {"error": str(error)}
    width = max(1, round(_SHEET_HEIGHT * frames.shape[2] / frames.shape[1]))
    uris = []
    for number in sorted({0, len(frames) // 2, len(frames) - 1})[:_SHEET_FRAMES]:
        file = io.BytesIO()
        PIL.Image.fromarray(frames[number]).resize((width, _SHEET_HEIGHT)).save(file, "webp", quality=80)
        uris.append("data:image/webp;base64," + base64.b64encode(file.getvalue()).decode())
    return {"frames": uris}
