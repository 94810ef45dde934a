"""A judge that reads its scores from a table of videos, prompts and scores."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files import fingerprint, read_csv, read_json_lines, with_formula
from .base import Video
from .frames import check_request, video_name


SUFFIXES = (".csv", ".jsonl", ".parquet")  # of a table
_COLUMNS = ("prompt", "sa", "pc")


class PrecomputedJudge:
    """
    Looks scores up instead of computing them: people's votes, another tool's output, or `score_table`.

    The table has the columns `prompt`, `sa`, `pc` (in [0, 1]), and `video` (a path, of which the file name counts) or
    `video_hash` (of the content, as `video_trl.data.video_hash` gives it; it wins where both are there, and alone can
    find a clip given as an array). Further columns come back in `raw`.

    Args:
        path: `.csv`, `.jsonl` or `.parquet` file.

    Raises:
        ValueError: the file cannot be read, lacks columns, has scores outside [0, 1], or contradicts itself.
    """

    name = "precomputed"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        rows = read_table(self.path)
        self._by_hash = bool(rows) and "video_hash" in rows[0]
        key = "video_hash" if self._by_hash else "video"
        self._rows: dict[tuple[str, str], dict[str, Any]] = {}
        for number, row in enumerate(rows, start=1):
            missing = [column for column in (key, *_COLUMNS) if row.get(column) in (None, "")]
            if missing:
                raise ValueError(
                    f"{self.path}, row {number}: expected values for {', '.join((key, *_COLUMNS))}, got none for "
                    f"{', '.join(missing)}. Leave out rows without scores."
                )
            scores = {column: self._score(row[column], column, number) for column in ("sa", "pc")}
            video = row[key] if self._by_hash else os.path.basename(str(row[key]))
            entry = scores | {"raw": {name: value for name, value in row.items() if name not in ("sa", "pc")}}
            known = self._rows.setdefault((video, row["prompt"]), entry)
            if (known["sa"], known["pc"]) != (scores["sa"], scores["pc"]):
                raise ValueError(
                    f"{self.path}, row {number}: other scores for {video!r} and the same prompt than in a row before. "
                    "Average them first, or use the column `video_hash` where files share a name."
                )

    def _score(self, value: Any, column: str, number: int) -> float:
        try:
            score = float(value)
        except (TypeError, ValueError):
            score = float("nan")
        if not 0 <= score <= 1:
            raise ValueError(
                f"{self.path}, row {number}: `{column}` must be a number in [0, 1], got {value!r}. Ratings from 1 to "
                "5 can be divided by 5, as VideoPhy-2 does."
            )
        return score

    @property
    def identity(self) -> str:
        """Hash of the file's content at the time of asking."""
        return f"{self.name}:table={fingerprint(self.path)}"

    def score(self, videos: Sequence[Video], prompts: Sequence[str]) -> list[dict[str, Any]]:
        """
        Looks each video up; see `VideoJudge.score`.

        Returns:
            For each video `sa`, `pc`, and `raw` with the other columns of its row.

        Raises:
            ValueError: a request that cannot be answered, or pairs that the table lacks; all of them are counted and
                the first ten named.
        """
        check_request(videos, prompts)
        keys = [(self._key(video), prompt) for video, prompt in zip(videos, prompts, strict=True)]
        missing = [
            f"{video_name(video)} with {prompt!r}"
            for video, (key, prompt) in zip(videos, keys, strict=True)
            if (key, prompt) not in self._rows
        ]
        if missing:
            more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
            raise ValueError(
                f"{self.path} has no row for {len(missing)} of {len(videos)} videos: {'; '.join(missing[:10])}{more}. "
                "The prompt must agree to the letter."
            )
        return [dict(self._rows[key]) for key in keys]

    def _key(self, video: Video) -> str:
        if self._by_hash:
            from ..data.video_io import video_hash

            return video_hash(video)
        if isinstance(video, np.ndarray):
            raise ValueError(
                f"{self.path} has no column `video_hash`, by which alone a clip given as an array can be found. Pass "
                "paths, or add the column."
            )
        return os.path.basename(video)


def read_table(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """
    Rows of a `.csv`, `.jsonl` or `.parquet` file, by column name. Values of a CSV are strings, and lose the apostrophe
    of [`formula_free`].

    Raises:
        ValueError: another suffix, or a file that is missing, empty, cut or damaged; the message names it.
    """
    path = Path(path)
    try:
        match path.suffix:
            case ".csv":
                rows: list[dict[str, Any]] = _csv_rows(path)
            case ".jsonl":
                rows = [row for _, row in read_json_lines(path)]
            case ".parquet":
                import pyarrow.parquet

                rows = pyarrow.parquet.read_table(path).to_pylist()
            case _:
                raise ValueError(f"expected a file that ends in .csv, .jsonl or .parquet, got {path.suffix!r}")
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise ValueError(f"{path}: cannot be read as a table ({error}).") from error
    if not rows or not all(isinstance(row, Mapping) for row in rows):
        raise ValueError(f"{path}: expected rows with named columns, got {'none' if not rows else 'other values'}.")
    return rows


def _csv_rows(path: Path) -> list[dict[str, Any]]:
    """
    Raises:
        ValueError: the file ends within a row; as in `read_csv`.
    """
    content = path.read_bytes()
    if content and not content.endswith((b"\n", b"\r")):
        raise ValueError("its last line has no end, as of a file that was cut; if it is whole, end it with a newline")
    return [{name: with_formula(value) for name, value in row.items()} for row in read_csv(path)]
