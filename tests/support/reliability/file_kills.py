"""
Work on files that is killed at each of its steps, which `tests/test_files.py` asks for by name.

`python -m tests.support.reliability.file_kills NAME DIRECTORY`: a process of its own, because each kill takes a fork,
and a process that has imported torch takes a hundred times as long to fork.
"""

import io
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path

from video_trl.files import (
    atomic_file,
    atomic_folder,
    remove_folder,
    remove_leftovers,
    resumable_folder,
    write_atomically,
)


OLD, NEW = b"old" * 1000, b"new" * 2000


def forked(work: Callable[[], None]) -> int:
    """Exit status of a process that does the work: 0, or the number of the signal that ended it."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    return abs(process.exitcode or 0)


def kill_at_each_step(write: Callable[[], None], check: Callable[[bool], None]) -> int:
    """
    Do a piece of work again and again, each time killed before another one of its calls of the system, and look each
    time at what is there; `check` is told whether the work came to its end. Returns the number of kills.
    """

    def write_until(step: int) -> None:
        calls = count()

        def profile(frame: object, event: str, function: object) -> None:
            if event != "c_call":
                return
            of_file = isinstance(getattr(function, "__self__", None), io.IOBase)
            if (of_file or getattr(function, "__module__", None) in ("posix", "fcntl", "io", "_io")) and (
                next(calls) == step
            ):
                os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(profile)
        write()
        sys.setprofile(None)

    for step in count():
        status = forked(lambda step=step: write_until(step))
        assert status in (0, signal.SIGKILL)
        check(status == 0)
        if status == 0:
            return step


def write_in_pieces(path: Path) -> None:
    with atomic_file(path) as partial, open(partial, "wb") as file:
        for piece in (NEW[:100], NEW[100:]):
            file.write(piece)
            file.flush()


def fill(folder: Path, content: str) -> None:
    (folder / "inner").mkdir()
    (folder / "a").write_text(content)
    (folder / "inner" / "b").write_text(content)


def contents(folder: Path) -> set[str]:
    return {path.read_text() for path in folder.rglob("*") if path.is_file()}


def fill_pieces(folder: Path) -> None:
    with resumable_folder(folder) as partial:
        if partial is not None:
            for number in range(3):
                if not (partial / str(number)).exists():
                    write_atomically(partial / str(number), NEW)


def replaced_file(tmp_path: Path, before: bytes | None) -> None:
    path = tmp_path / "folder" / "file.bin"
    path.parent.mkdir()

    def check(done: bool) -> None:
        content = path.read_bytes() if path.exists() else None
        assert content in (before, NEW) and (content == NEW or not done)
        remove_leftovers(path.parent)
        assert set(os.listdir(path.parent)) <= {path.name}  # what the killed process left is gone
        prepare()

    def prepare() -> None:
        path.unlink(missing_ok=True)
        if before is not None:
            path.write_bytes(before)

    prepare()
    assert kill_at_each_step(lambda: write_in_pieces(path), check) > 10


def file_written_in_place(tmp_path: Path) -> None:
    sizes = set()

    def write() -> None:
        with open(tmp_path / "file", "wb") as file:
            file.write(NEW[:100])
            file.flush()
            file.write(NEW[100:])

    def check(done: bool) -> None:
        sizes.add((tmp_path / "file").stat().st_size if (tmp_path / "file").exists() else None)

    kill_at_each_step(write, check)
    assert 100 in sizes


def replaced_folder(tmp_path: Path, before: str | None) -> None:
    """Between the two renames of a replacement neither has the name: `remove_leftovers` gives it to the old one."""
    path = tmp_path / "runs" / "checkpoint-5"

    def write() -> None:
        with atomic_folder(path) as partial:
            fill(partial, "new")

    states = []

    def check(done: bool) -> None:
        aside = any(tmp_path.glob("runs/.*.replaced")) and not path.exists()
        remove_leftovers(path.parent)
        found = contents(path) if path.exists() else None
        assert found in ({"new"}, None if before is None else {before})
        assert found == {"new"} or not done
        assert found is None or len(list(path.rglob("*"))) == 3
        assert not path.parent.exists() or set(os.listdir(path.parent)) <= {path.name}
        states.append((aside, found))
        prepare()

    def prepare() -> None:
        shutil.rmtree(path.parent, ignore_errors=True)
        if before is not None:
            path.mkdir(parents=True)
            fill(path, before)

    prepare()
    assert kill_at_each_step(write, check) > 20
    assert ((True, {"old"}) in states) == (before is not None)


def folder_in_pieces(tmp_path: Path) -> None:
    path, pieces = tmp_path / "cache" / "folder", set()

    def check(done: bool) -> None:
        assert path.exists() or not done
        pieces.update(len(list(each.glob("[0-9]"))) for each in path.parent.glob(".folder.unfinished"))
        fill_pieces(path)
        assert {each.name for each in path.iterdir()} - {".lock"} == {"0", "1", "2"}
        assert os.listdir(path.parent) == ["folder"]
        shutil.rmtree(path)

    assert kill_at_each_step(lambda: fill_pieces(path), check) > 20
    assert pieces == {0, 1, 2, 3}


def removed_folder(tmp_path: Path) -> None:
    """Half a checkpoint under its name would be taken for one."""

    def check(done: bool) -> None:
        assert not (tmp_path / "folder").exists() or len(list((tmp_path / "folder").rglob("*"))) == 3
        remove_leftovers(tmp_path)
        shutil.rmtree(tmp_path / "folder", ignore_errors=True)
        assert not os.listdir(tmp_path)
        prepare()

    def prepare() -> None:
        (tmp_path / "folder").mkdir()
        fill(tmp_path / "folder", "x")

    prepare()
    assert kill_at_each_step(lambda: remove_folder(tmp_path / "folder"), check) > 5


WORKS: dict[str, Callable[[Path], None]] = {
    "new file": lambda directory: replaced_file(directory, None),
    "old file": lambda directory: replaced_file(directory, OLD),
    "file written in place": file_written_in_place,
    "new folder": lambda directory: replaced_folder(directory, None),
    "old folder": lambda directory: replaced_folder(directory, "old"),
    "folder in pieces": folder_in_pieces,
    "removed folder": removed_folder,
}

if __name__ == "__main__":
    WORKS[sys.argv[1]](Path(sys.argv[2]))
