"""Score a table of videos with a judge. The output can be used as a precomputed judge."""

import csv
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..files import atomic_file
from .base import VideoJudge
from .precomputed import SUFFIXES, read_table


_PLAIN = ("video", "video_hash", "prompt", "sa", "pc")


def score_table(
    table: str | os.PathLike[str],
    output: str | os.PathLike[str],
    judge: VideoJudge,
    *,
    folder: str | os.PathLike[str] | None = None,
    batch_size: int = 8,
) -> list[dict[str, Any]]:
    """
    Scores the videos of a table and writes them as `PrecomputedJudge` reads them: `video`, `video_hash`, `prompt`,
    `sa`, `pc`, `judge` (its identity) and `details` (what else it said, as JSON).

    Args:
        table: `.csv`, `.jsonl` or `.parquet` file with the columns `video` (a path) and `prompt`.
        output: file to write, with one of the same endings.
        judge: scores the videos. A server's may leave some without: their `sa` and `pc` are None.
        folder: where relative paths start; by default the folder of the table.
        batch_size: videos given to the judge together.

    Returns:
        The rows written, in the order of the table.

    Raises:
        ValueError: before anything is judged: another ending, a batch size below 1, missing columns, or a video that
            is missing or unreadable (named).
    """
    table, output = Path(table), Path(output)
    if output.suffix not in SUFFIXES:
        raise ValueError(f"Expected an output file that ends in {', '.join(SUFFIXES)}, got {output}.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be positive, got {batch_size}.")
    rows = read_table(table)
    if not {"video", "prompt"} <= set(rows[0]):
        raise ValueError(f"{table}: expected the columns video and prompt, got {', '.join(rows[0])}.")
    from ..data.video_io import video_hash  # the data package loads diffusers

    paths = [(table.parent if folder is None else Path(folder)) / row["video"] for row in rows]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise ValueError(f"{table}: {len(missing)} of {len(rows)} videos are not there: {', '.join(missing[:10])}.")
    hashes = [video_hash(path) for path in paths]  # and one that is damaged is named now
    scored: list[dict[str, Any]] = []
    for start in tqdm(range(0, len(rows), batch_size), desc="Scoring", unit="batch", disable=None):
        batch = slice(start, start + batch_size)
        scores = judge.score(paths[batch], [row["prompt"] for row in rows[batch]])
        for row, digest, score in zip(rows[batch], hashes[batch], scores, strict=True):
            plain = {"video": row["video"], "video_hash": digest, "prompt": row["prompt"], **score}
            details = {name: value for name, value in score.items() if name not in _PLAIN}
            scored.append(
                {name: plain[name] for name in _PLAIN} | {"judge": judge.identity, "details": json.dumps(details)}
            )
    _write_table(output, scored)
    return scored


def _write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with atomic_file(path) as partial:
        if path.suffix == ".parquet":
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), partial)
            return
        with open(partial, "w", encoding="utf-8", newline="") as file:
            if path.suffix == ".csv":
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
            else:
                file.writelines(json.dumps(row) + "\n" for row in rows)
