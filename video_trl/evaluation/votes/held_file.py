"""A file of JSON lines that one process holds while people answer: votes, and marks."""

import contextlib
import errno
import fcntl
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from ...files import fingerprint, write_atomically


logger = logging.getLogger(__name__)

Record = dict[str, Any]


class HeldFile:
    """
    JSON lines, held by one process: they are appended, each one on the disk before it is acknowledged.

    A file that holds anything else is left as it is. While it is held, somebody may replace, delete, empty or edit the
    file. The next line notices: what is there now counts, and lines that it lacks are added to it. If it has become
    something else it stays as it is, all lines go into `NAME.recovered-...` beside it, and no more are taken until the
    name leads to a file of that kind or to nothing.

    Args:
        path (path): JSON lines; made where needed.
        check (`Callable[[bytes], list[dict]]`): The records of a content, without the header; a `ValueError` if it
            holds anything else.
        header (`dict`, *optional*): The first line of a new file.

    Attributes:
        records (`list[dict]`): What it holds, without the header.

    Raises:
        ValueError: If the file holds anything else, or another process holds it.
    """

    def __init__(
        self, path: str | os.PathLike[str], check: Callable[[bytes], list[Record]], header: Record | None = None
    ) -> None:
        self.path, self._check = Path(path), check
        self._header: list[Record] = [] if header is None else [header]
        self._file = _open(self.path)
        try:
            self.records = self._take(self._file)
        except BaseException:
            self._file.close()
            raise
        self._known = _stamp(os.fstat(self._file.fileno()))

    def add(self, records: Sequence[Record]) -> None:
        """
        Appends records; when this returns they are on the disk, all of them or none.

        Raises:
            ValueError: If the file was replaced by something else.
            OSError: If they cannot be written. The file is as it was.
        """
        self._follow()
        _append(self._file, records)
        self.records += records
        self._known = _stamp(os.fstat(self._file.fileno()))

    def close(self) -> None:
        """Lets the file go; lines that somebody removed meanwhile are put back."""
        if self._file.closed:
            return
        try:
            self._follow()
        except (OSError, ValueError) as error:
            logger.error("%s", error)
        self._file.close()

    def _follow(self) -> None:
        """Sees to it that the name still leads to a file with all lines."""
        with contextlib.suppress(FileNotFoundError):
            if _stamp(os.stat(self.path)) == self._known:
                return
        try:
            file = _open(self.path)
            if os.path.samestat(os.fstat(file.fileno()), os.fstat(self._file.fileno())):
                file.close()  # edited in place
                file = self._file
            try:
                there = self._take(file)
                known = set(map(_line, there))
                missing = [record for record in self.records if _line(record) not in known]
                _append(file, missing)
            except BaseException:
                if file is not self._file:
                    file.close()
                raise
        except (OSError, ValueError) as error:
            content = b"".join(map(_encoded, (*self._header, *self.records)))
            rescued = write_atomically(f"{self.path}.recovered-{fingerprint(content)[:8]}", content)
            raise ValueError(f"{error} The {len(self.records)} answers that were given are in {rescued}.") from error
        if file is not self._file:
            self._file.close()
            self._file = file
        if missing:
            logger.warning("%s was changed by others; added %d lines that it had lost.", self.path, len(missing))
        self.records = there + missing
        self._known = _stamp(os.fstat(file.fileno()))

    def _take(self, file: IO[bytes]) -> list[Record]:
        """Locks a file and reads it. It is changed only if it is ours: a header, or an end to its last line."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"Another process is writing {self.path}. Stop it, or pass another file.") from error
        file.seek(0)
        content = file.read()
        if not content:
            _append(file, self._header)
            _sync_folder(self.path.parent)
            return []
        records = self._check(content)
        _, torn = _lines(content)
        if torn:
            logger.warning("%s: dropped the last line, which a stopped process left incomplete.", self.path)
            file.truncate(len(content) - len(torn))
        elif not content.endswith(b"\n"):  # as some editors leave it
            file.write(b"\n")
        return records


def read_lines(content: bytes, path: Path, kind: str) -> list[tuple[int, Any]]:
    """
    The JSON values of a content with their line numbers, without what a stopped process left of its last line.

    Raises:
        ValueError: If a line is damaged; or there is no whole one, and the file is none of that `kind`.
    """
    records: list[tuple[int, Any]] = []
    for number, line in enumerate(_lines(content)[0], start=1):
        try:
            records += [(number, json.loads(line))] if line.strip() else []
        except (ValueError, RecursionError) as error:
            if not records:
                break
            raise ValueError(f"{path}: line {number} is damaged ({error}). Restore or remove it.") from error
    if not records:
        raise ValueError(f"{path} is no file of {kind}: it does not begin with a line of JSON.")
    return records


def _append(file: IO[bytes], records: Sequence[Mapping[str, Any]]) -> None:
    if not records:
        return
    content = b"".join(map(_encoded, records))
    size = os.fstat(file.fileno()).st_size
    try:
        if file.write(content) < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file.fileno())
    except OSError:
        file.truncate(size)  # half a line would swallow the next one
        raise


def _encoded(record: Mapping[str, Any]) -> bytes:
    return f"{json.dumps(record, allow_nan=False)}\n".encode()


def _open(path: Path) -> IO[bytes]:
    if path.exists() and not path.is_file():  # opening a pipe would wait for ever
        raise ValueError(f"{path} is a folder or a device. Pass a file for the answers.")
    path.parent.mkdir(parents=True, exist_ok=True)
    return open(path, "a+b", buffering=0)


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    """Which file it is, and what another writer changes."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _line(record: Record) -> str:
    return json.dumps(record, sort_keys=True)


def _lines(content: bytes) -> tuple[list[bytes], bytes]:
    """
    Lines of a file, and what a stopped process left of its last one. A last line that lacks only its newline counts.
    """
    *lines, last = content.split(b"\n")
    try:
        json.loads(last)
        return [*lines, last], b""
    except (ValueError, RecursionError):
        return lines, last


def _sync_folder(folder: Path) -> None:
    """A new file is safe only when its name is on the disk too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
