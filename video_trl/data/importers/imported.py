"""What every import shares: a bad row costs itself and is listed, and the result is whole or absent."""

import csv
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from tqdm.auto import tqdm

from ...files import atomic_folder, is_whole, write_atomically
from ..video_io import VideoDecodeError, probe_video


logger = logging.getLogger(__name__)

SKIPPED_NAME = "skipped.txt"  # in a saved import: a line for each row that was left out
_SHOWN = 3


@dataclass
class Imported:
    """
    Rows of a published dataset.

    Attributes:
        rows (`list[dict]`): `prompt`, `chosen`, `rejected` (a path, or a list of them) and what else there is; paths
            are absolute, and every video can be opened.
        skipped (`list[str]`): Where a row stood that was left out, and why.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def skip(self, place: str, why: str) -> None:
        """Leave a row out."""
        self.skipped.append(f"{place}: {why}")


def with_readable_videos(rows: Iterable[tuple[str, dict[str, Any]]], imported: Imported, total: int) -> Imported:
    """
    Add the rows whose videos can all be opened, and list the others.

    Args:
        rows (iterable): Where a row stands, and the row.
        imported ([`Imported`]): What the rows are added to.
        total (`int`): Number of rows, for the progress bar.

    Raises:
        ValueError: If no row is left.
    """
    faults: dict[str, str | None] = {}
    for place, row in tqdm(rows, total=total, desc="Looking at videos", unit="row", disable=None):
        others = row["rejected"] if isinstance(row["rejected"], list) else [row["rejected"]]
        paths = [row["chosen"], *others]
        for path in paths:
            if path not in faults:
                faults[path] = _fault(path)
        bad = [faults[path] for path in paths if faults[path] is not None]
        if bad:
            imported.skip(place, str(bad[0]))
        elif row["chosen"] in others:
            imported.skip(place, f"{row['chosen']} is the chosen and a rejected video")
        else:
            imported.rows.append(row)
    require_rows(imported)
    return imported


def require_rows(imported: Imported) -> None:
    """
    Raises:
        ValueError: If no row is left; says why the first ones were left out.
    """
    if not imported.rows:
        reasons = "; ".join(imported.skipped[:_SHOWN]) or "it has none"
        raise ValueError(f"No row of the dataset can be used, of {len(imported.skipped)}: {reasons}.")


def save_import(imported: Imported, folder: str | os.PathLike[str]) -> Path:
    """
    Write the rows as a `datasets.Dataset`, which `--dataset_name FOLDER` takes, and `skipped.txt` beside it.

    Raises:
        FileExistsError: If there is a folder of that name which is not empty.
    """
    with atomic_folder(folder, replace=False) as partial:
        datasets.Dataset.from_list(imported.rows).save_to_disk(str(partial))
        write_atomically(partial / SKIPPED_NAME, "".join(f"{line}\n" for line in imported.skipped))
    return Path(folder)


def check_target(folder: str | os.PathLike[str]) -> None:
    """
    Raises:
        ValueError: If an import could not be saved there, before any work is done.
    """
    path = Path(folder)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ValueError(f"--output_dir: {path} exists already. Remove it, or name another folder.")


def folders_below(root: Path) -> Iterator[Path]:
    """The folder and all below it, in the order of their names; hidden ones are left out."""
    for place, names, _ in os.walk(root):
        names[:] = sorted(name for name in names if not name.startswith("."))
        yield Path(place)


def existing_folder(path: str | os.PathLike[str], what: str) -> Path:
    """
    The absolute path of a folder.

    Raises:
        ValueError: If there is none.
    """
    if not Path(path).is_dir():
        raise ValueError(f"Expected {what}, got {path}, which is no folder.")
    return Path(path).absolute()


def csv_records(
    path: Path, columns: Sequence[str], imported: Imported
) -> Iterator[tuple[str, dict[str | Any, str | Any]]]:
    """
    The records of a CSV table, each with its place. One that is none is listed and does not end the table.

    Raises:
        ValueError: If a column is missing.
    """
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in columns if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path}: expected the columns {list(columns)}, got {reader.fieldnames}.")
        while True:
            try:
                record = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                imported.skip(f"{path}, line {reader.line_num}", f"this is no CSV ({error})")
                continue
            if is_whole(record):
                yield f"{path}, line {reader.line_num}", record
            else:
                imported.skip(f"{path}, line {reader.line_num}", "it has another number of cells than the header")


def common_names(names: Sequence[str]) -> str:
    """Names for a message."""
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def _fault(path: str) -> str | None:
    """Why a video cannot be opened."""
    try:
        probe_video(path)
    except (VideoDecodeError, OSError) as error:
        return str(error)
    return None
