"""The folder that a curation run writes to: whose it is, and that one launch at a time works in it."""

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ...files import read_json, remove_leftovers, write_json
from .manifest import Shard


#: In a run's folder: what kind of run writes there.
OWNER_NAME = ".curation.json"


@contextmanager
def output_folder(root: Path, kind: str, outputs: Sequence[str], shard: Shard) -> Iterator[None]:
    """
    Holds the folder of a run. A run of the same kind goes on with what it finds there, whatever its settings are.

    Args:
        root (`Path`): The folder; made where needed.
        kind (`str`): Pipeline that writes there, such as `"gt-pair"`.
        outputs (`Sequence[str]`): What it replaces there at its end, or before.
        shard ([`Shard`]): Part of this process; each of a launch holds the folder.

    Raises:
        ValueError: One of `outputs` is there and is not of a run of this kind, or another launch works in the folder.
    """
    owner = root / OWNER_NAME
    found = read_json(owner).get("kind") if owner.is_file() else None
    there = [name for name in outputs if (root / name).exists()]
    # `stages` alone is what versions have left that did not write down whose the folder is.
    if found != kind and (found is not None or (there and not (root / "stages").is_dir())):
        whose = f"files of {found}" if found is not None else f"{there[0]!r}, which {kind} has not written"
        raise ValueError(f"{root} holds {whose}, and {kind} would replace it. Pass another `output_dir`.")
    root.mkdir(parents=True, exist_ok=True)
    # Not `files.lock`, which writes into the file: a run that is done changes nothing when it is started again.
    descriptor = os.open(root / f".curation-{shard.index}.lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"Another process works in {root}. Wait for it, or pass another folder.") from error
        if found is None and shard.index == 0:
            write_json(owner, {"kind": kind})
        yield
    finally:
        os.close(descriptor)


def sweep(root: Path, folders: Sequence[str]) -> None:
    """Removes what killed processes left half written in some folders of a run, which this process holds."""
    for name in folders:
        for folder, _, _ in os.walk(root / name):
            remove_leftovers(folder, locked=True)
