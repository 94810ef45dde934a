"""Score a table of videos with a judge. The output can be used as a precomputed judge."""

import contextlib
import csv
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..files import atomic_file, formula_free
from .base import VideoJudge, score_each
from .precomputed import SUFFIXES, read_table


_START = '\n{"video_hash": "'  # of a file of unfinished scores
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

    The table is written whole, at the end. Until then scores are kept in `NAME.unfinished.jsonl` beside it, as they
    come. Called again, the judge is asked for what is missing only: what neither that file nor an older table of the
    same judge has a score for.

    Args:
        table: `.csv`, `.jsonl` or `.parquet` file with the columns `video` (a path) and `prompt`.
        output: file to write, with one of the same endings.
        judge: scores the videos.
        folder: where relative paths start; by default the folder of the table.
        batch_size: videos given to the judge together.

    Returns:
        The rows written, in the order of the table. `sa` and `pc` of a video that cannot be judged are None, and its
        `details` say why.

    Raises:
        ValueError: before anything is judged: another ending, a batch size below 1, missing columns, a video that is
            missing (named), or a file of somebody else under one of the two names.
    """
    table, output = Path(table), Path(output)
    if output.suffix not in SUFFIXES:
        raise ValueError(f"Expected an output file that ends in {', '.join(SUFFIXES)}, got {output}.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be positive, got {batch_size}.")
    rows = read_table(table)
    for number, row in enumerate(rows, start=1):
        if not (isinstance(row.get("video"), str) and isinstance(row.get("prompt"), str)):
            raise ValueError(f"{table}, row {number}: expected texts in the columns video and prompt, got {row}.")
    from ..data.video_io import video_hash  # the data package loads diffusers

    paths = [(table.parent if folder is None else Path(folder)) / row["video"] for row in rows]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise ValueError(f"{table}: {len(missing)} of {len(rows)} videos are not there: {', '.join(missing[:10])}.")
    hashes = [video_hash(path) for path in paths]
    identity = judge.identity
    kept = output.with_name(f"{output.name}.unfinished.jsonl")
    known = _known_scores(output, kept, identity)
    keys = list(zip(hashes, [row["prompt"] for row in rows], strict=True))
    unscored = [number for number, key in enumerate(keys) if key not in known]
    for start in tqdm(range(0, len(unscored), batch_size), desc="Scoring", unit="batch", disable=None):
        batch = unscored[start : start + batch_size]
        scores = score_each(judge, [paths[number] for number in batch], [rows[number]["prompt"] for number in batch])
        for number, score in zip(batch, scores, strict=True):
            details = {name: value for name, value in score.items() if name not in _PLAIN}
            known[keys[number]] = {"sa": score["sa"], "pc": score["pc"], "details": json.dumps(details)}
        append_rows(kept, [{**_entry(keys[number], identity), **known[keys[number]]} for number in batch])
    scored = []
    for row, key in zip(rows, keys, strict=True):
        entry = {"video": row["video"], **_entry(key, identity), **known[key]}
        scored.append({name: entry[name] for name in (*_PLAIN, "judge", "details")})
    write_rows(output, scored)
    kept.unlink(missing_ok=True)
    return scored


def _entry(key: tuple[str, str], identity: str) -> dict[str, str]:
    return {"video_hash": key[0], "prompt": key[1], "judge": identity}


def _known_scores(output: Path, kept: Path, identity: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Scores that this judge gave before, by hash of the video and prompt."""
    rows: list[dict[str, Any]] = []
    if output.exists():
        rows = read_table(output)
        if not {*_PLAIN, "judge", "details"} <= set(rows[0]):
            raise ValueError(f"{output} is no table of scores, and is not overwritten. Pass another file, or move it.")
    if kept.exists():
        content = kept.read_text(encoding="utf-8", errors="replace")
        if not content.startswith(_START[: len(content)]):
            raise ValueError(f"{kept} is no file of unfinished scores, and is not changed. Move it away.")
        for line in content.split("\n"):
            with contextlib.suppress(ValueError):  # half a line of a process that was stopped
                rows.append(json.loads(line))
    return {
        (row["video_hash"], row["prompt"]): {"sa": float(row["sa"]), "pc": float(row["pc"]), "details": row["details"]}
        for row in rows
        if row["judge"] == identity and row["sa"] not in (None, "") and row["pc"] not in (None, "")
    }


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Adds JSON lines to a file and waits for the disk. Starts with a new line: the last one may be half a line."""
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join("\n" + json.dumps(row) for row in rows) + "\n")
        file.flush()
        os.fsync(file.fileno())


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes a table, whole or not at all, in the format that the ending says."""
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
                writer.writerows({name: formula_free(value) for name, value in row.items()} for row in rows)
            else:
                file.writelines(json.dumps(row) + "\n" for row in rows)
