"""
Atomic writes of files and folders, locks, checksums, and fingerprints of content.

What is written here is whole or absent, after a kill, on a full disk and after a power cut: it is made under a
temporary name in the same folder, flushed to the disk, and renamed. What was damaged later shows in its checksum.
"""

import contextlib
import csv
import errno
import fcntl
import functools
import hashlib
import io
import itertools
import json
import logging
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash
from filelock import FileLock, Timeout


if TYPE_CHECKING:
    from torch import Tensor, nn

    Content = (
        str
        | bytes
        | memoryview
        | io.BufferedIOBase
        | Path
        | Tensor
        | nn.Module
        | Mapping[str, Any]
        | list[Any]
        | float
        | None
    )

logger = logging.getLogger(__name__)

#: Matches the temporary names, for those who list a folder while it is written to.
PARTIAL_PATTERN = "*.partial"
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<host>[0-9a-f]{8})[0-9a-f]{8}\.(?P<kind>partial|replaced)", re.DOTALL)
#: Lists the files of a folder with their sizes and checksums.
CHECKSUMS_NAME = "checksums.json"
#: In a folder that is filled piece by piece.
LOCK_NAME = ".lock"
_UNFINISHED = ".unfinished"
# Seconds that a process gives others of its launch to show up: before the log says so, and before it gives up.
_SECONDS_TO_WARN, _SECONDS_TO_WAIT = 5.0, 600.0
_PIECE = 16 << 20  # bytes of a file that are hashed at a time
_NAME_BYTES = 220  # of a target's name that a temporary name repeats: file systems allow 255 in all
_ATTEMPTS = 20
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")  # of names_like_this, like-this, likeThis and LIKE_THIS
_SECRET = {
    "token", "secret", "secrets", "password", "passwd", "passphrase", "pwd", "apikey", "authorization", "auth",
    "credential", "credentials", "bearer", "cookie", "signature", "sig", "sas", "jwt", "dsn", "webhook",
}  # fmt: skip
_SECRET_PAIRS = {
    "api key", "access key", "private key", "account key", "session key", "encryption key", "connection string",
}  # fmt: skip
_ALL_SECRET = {"headers", "header", "cookies", "env", "environ"}
_SECRET_TEXT = re.compile(
    r"(://[^/\s:@]*:)[^/\s@]+(?=@)|(://)[^/\s:@]{12,}(?=@)"
    r"|(\b(?:bearer|basic)\s+)[\w.~+/=-]{8,}"
    r"|((?:\bsig|[\w-]*(?:token|secret|password|api[_-]?key|(?:account|access)[_-]?key|signature|authorization|"
    r"credential)[\w-]*)[\"']?\s*[=:]\s*[\"']?(?:bearer\s+|basic\s+)?)[^\s\"'&,;}]{4,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|$)"
    r"|\beyJ[\w-]{6,}\.[\w-]{8,}(?:\.[\w-]*)?"
    r"|\b(?:hf_|sk-|gh[oprsu]_|github_pat_|glpat-|xox[abeoprs]-|AKIA|ASIA|AIza|gsk_|xai-|r8_|nvapi-|npm_|pypi-)[\w-]{12,}",
    re.IGNORECASE,
)
# What Markdown, HTML or a formula between dollars begins with; an underscore only at the edge of a word.
_MARKUP = re.compile(
    r"[<>&`*\\~$@\x00-\x1f\x7f]|\](?=[\[(:])|(?<![^\W_])_|_(?![^\W_])|(?<=\w):(?=//)|(?<=www)\.", re.IGNORECASE
)
_FORMULA = re.compile(r"\s*'*[\s']*[=+\-@\t\r\uff1d\uff0b\uff0d\uff20]")  # spreadsheets take the wide forms too
_PAGE = b'<meta name="generator" content="video_trl">'  # in all our templates
_IS_TAKEN = (errno.ENOTEMPTY, errno.EEXIST)


def write_atomically(path: str | os.PathLike[str], content: bytes | str, *, replace: bool = True) -> Path:
    """
    Write a file whole or not at all.

    Args:
        path (`str` or `Path`): File to write; its folder is made where needed.
        content (`bytes` or `str`): All of it; a text is written in UTF-8.
        replace (`bool`, defaults to `True`): Whether an older file is replaced; see [`atomic_file`].

    Returns:
        `Path`: The file.

    Raises:
        FileExistsError: There is a file already and `replace=False`.
        OSError: The file cannot be written. An older one is left as it was.
    """
    with atomic_file(path, replace=replace) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
    return Path(path)


def check_page(path: str | os.PathLike[str]) -> None:
    """Raise a `ValueError` if an HTML page that is to be written would replace a file that is none of our pages."""
    if os.path.exists(path):
        with open(path, "rb") as file:
            if _PAGE not in file.read(4096):
                raise ValueError(f"{path} is no page of video_trl and stays. Pass another file, or move it.")


def write_json(path: str | os.PathLike[str], content: Any, *, indent: int | None = None) -> Path:
    """
    Write a JSON file whole or not at all.

    Raises:
        ValueError: The content holds NaN or infinity, which JSON does not have.
        TypeError: The content holds something else that has no form in JSON.
        OSError: The file cannot be written. An older one is left as it was.
    """
    text = json.dumps(content, indent=indent, ensure_ascii=False, allow_nan=False)
    # Half a surrogate pair, as in a file's name that is not UTF-8, becomes the escape that JSON has for it.
    return write_atomically(path, text.encode("utf-8", "backslashreplace"))


def read_json(path: str | os.PathLike[str]) -> Any:
    """
    Content of a JSON file.

    Raises:
        ValueError: The file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}).") from error


def recorded(path: str | os.PathLike[str], values: Mapping[str, Any]) -> tuple[Any, Any]:
    """
    What a folder was made with: the contents of a JSON file, and `values` as JSON has them. Where there is no file,
    they are written first.

    Raises:
        ValueError: The file is not JSON.
    """
    wanted = json.loads(json.dumps(values))
    if not Path(path).is_file():
        write_atomically(path, json.dumps(wanted, indent=1))
    return read_json(path), wanted


def read_json_lines(path: str | os.PathLike[str]) -> list[tuple[int, Any]]:
    """
    Values of a file that has one JSON value a line, with the numbers of their lines, from 1. Empty lines count.

    Raises:
        ValueError: The file is missing, or a line is not JSON.
    """
    number, values = 0, []
    try:
        # Other ends of lines, such as U+2028, may stand in a text.
        for number, line in enumerate(Path(path).read_text(encoding="utf-8-sig").split("\n"), start=1):
            if line.strip():
                values.append((number, json.loads(line)))
    except (OSError, ValueError, RecursionError) as error:
        place = f", line {number}," if number else ""
        raise ValueError(f"{path}{place} cannot be read as JSON ({error}).") from error
    return values


def read_csv(path: str | os.PathLike[str], delimiter: str = ",") -> list[dict[str, str]]:
    """
    Rows of a CSV file in UTF-8 by the names in its first line. Cells are texts, as they stand.

    Raises:
        ValueError: The file is missing, is not UTF-8 or no CSV, its columns are separated by something else, two of
            them have one name, or a row has more or fewer cells than there are columns.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=delimiter, strict=True)
            names, rows = list(reader.fieldnames or ()), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as a CSV file in UTF-8 ({error}).") from error
    if len(names) == 1 and (other := next((mark for mark in ",;\t|" if mark in names[0]), None)):
        raise ValueError(
            f"{path}: expected columns separated by {delimiter!r}, got {other!r}. Save it with {delimiter!r}."
        )
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path}: expected columns with names of their own, got two called {twice[0]!r}. Keep one.")
    for number, row in enumerate(rows, start=1):
        if not is_whole(row):
            raise ValueError(
                f"{path}: row {number} has another number of cells than the header. A cell with a comma, a quote "
                'or a newline must stand in double quotes, and a quote inside it is written twice ("").'
            )
    return rows


def is_whole(row: Mapping[Any, Any]) -> bool:
    """Whether a row of `csv.DictReader` has as many cells as there are columns; else cells are shifted."""
    return None not in row and None not in row.values()


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str], *, replace: bool = True) -> Iterator[Path]:
    """
    A temporary name for a file, which gets its own name on leaving.

    It has the permissions of the file that it replaces, or those that any new file gets. A symbolic link stays one:
    the file that it leads to is replaced. Of several writers the last one to leave wins, with a whole file.

    Args:
        path (`str` or `Path`): File to write; its folder is made where needed.
        replace (`bool`, defaults to `True`): Whether an older file is replaced. If not, of several writers the first
            one to leave wins.

    Yields:
        `Path`: An empty file in the same folder, to be written, or opened again, by its name. It is removed when an
            exception comes through.

    Raises:
        FileExistsError: There is a file already and `replace=False`.
        OSError: The file cannot be written, or is protected (no one may write to it), a folder or a device.
    """
    target = Path(os.path.realpath(path))
    mode = _replaceable_mode(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial, lock = _new_partial(target, folder=False)
    try:
        if mode is not None:
            os.fchmod(lock, mode)
        yield partial
        _flush(partial)
        if replace:
            os.replace(partial, target)
        else:
            os.link(partial, target)  # unlike a rename, it refuses to replace
            partial.unlink()
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    finally:
        os.close(lock)
    _flush(target.parent)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str], *, replace: bool = True) -> Iterator[Path]:
    """
    A temporary name for a folder, which gets its own name on leaving.

    Args:
        path (`str` or `Path`): Folder to write.
        replace (`bool`, defaults to `True`): Whether an older folder is replaced, with all that is in it.

    Yields:
        `Path`: An empty folder beside it. It is removed when an exception comes through.

    Raises:
        FileExistsError: There is a folder already, not empty, and `replace=False`.
        OSError: The folder cannot be written. An older one is left as it was.
    """
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    partial, lock = _new_partial(target, folder=True)
    try:
        yield partial
        publish_folder(partial, target, replace=replace)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def publish_folder(partial: str | os.PathLike[str], final: str | os.PathLike[str], *, replace: bool = True) -> None:
    """
    Flush a completely written folder to the disk and give it its name.

    Args:
        partial (`str` or `Path`): The folder, in the same file system.
        final (`str` or `Path`): Its name. An empty folder of that name gives way.
        replace (`bool`, defaults to `True`): Whether a folder that is not empty does too. A kill between the two
            renames that this takes leaves the old one under another name, and [`remove_leftovers`] brings it back.

    Raises:
        FileExistsError: There is a folder already, not empty, and `replace=False`.
        OSError: A file cannot be flushed or the folder not renamed. An older one is left as it was.
    """
    target = Path(os.path.realpath(final))
    for folder, _, names in os.walk(partial):
        for name in names:
            if not os.path.islink(path := os.path.join(folder, name)):
                _flush(Path(path))
        _flush(Path(folder))
    for _ in range(_ATTEMPTS):
        try:
            os.rename(partial, target)
            break
        except OSError as error:
            if error.errno not in _IS_TAKEN:
                raise
            if not replace:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(final)) from error
        if _exchange(Path(partial), target):
            break
    else:
        raise OSError(f"{final}: other processes replace this folder all the time. End them, or pass another path.")
    _flush(target.parent)


@contextlib.contextmanager
def resumable_folder(path: str | os.PathLike[str], *, replace: bool = False) -> Iterator[Path | None]:
    """
    A folder that is filled piece by piece, by one process at a time, and gets its own name on leaving.

    A process that is killed, or fails, leaves its pieces to the next one, which finds them in the folder; the pieces
    are to be written whole or not at all. A failed process leaves nothing where it had nothing written.

    Args:
        path (`str` or `Path`): Folder to write.
        replace (`bool`, defaults to `False`): Whether an older folder is replaced, with all that is in it.

    Yields:
        `Path` or `None`: The folder under its temporary name, with what is there already; none when the whole folder
            is there under its own name and is not to be replaced, also if another process has finished it meanwhile.

    Raises:
        OSError: The folder cannot be written.
    """
    target = Path(os.path.realpath(path))
    unfinished = target.with_name(f".{target.name}{_UNFINISHED}")
    (target / LOCK_NAME).unlink(missing_ok=True)  # of a process that was killed when all but this was done
    while replace or not target.exists():
        unfinished.mkdir(parents=True, exist_ok=True)
        try:
            held = lock(unfinished / LOCK_NAME, waiting=f"Another process is writing {path}; waiting for it.")
        except FileNotFoundError:  # that process has finished the folder, or given up
            continue
        try:
            if not (unfinished / LOCK_NAME).exists():
                continue
            if target.exists() and not replace:  # while it waits, filelock may make a folder anew that was finished
                if os.listdir(unfinished) == [LOCK_NAME]:
                    shutil.rmtree(unfinished, ignore_errors=True)
                continue
            remove_leftovers(unfinished, locked=True)
            yield unfinished
            publish_folder(unfinished, target, replace=replace)
            (target / LOCK_NAME).unlink()  # those who wait see that it is gone, and look for the folder
            return
        except BaseException:
            if unfinished.is_dir() and os.listdir(unfinished) == [LOCK_NAME]:
                shutil.rmtree(unfinished, ignore_errors=True)
            elif unfinished.is_dir():
                logger.warning("%s stays: the same work will go on from there. Delete it to begin anew.", unfinished)
            raise
        finally:
            held.release()
    yield None


def unfinished_folders(folder: str | os.PathLike[str]) -> list[Path]:
    """Folders that someone is filling, or has left half filled; see [`resumable_folder`]."""
    return sorted(Path(folder).glob(f".*{_UNFINISHED}"))


def lock(path: str | os.PathLike[str], *, seconds: float = -1, waiting: str) -> FileLock:
    """
    Lock a file against all other processes, also on other machines where the file system has locks, such as NFS.

    Args:
        path (`str` or `Path`): File to lock; made where needed. It stays.
        seconds (`float`, defaults to `-1`): How long to wait for another process that has it; -1: for ever.
        waiting (`str`): What to log before waiting.

    Returns:
        `filelock.FileLock`: Held; `release()` it. The kernel does when the process ends.

    Raises:
        TimeoutError: Another process has it; says which one.
        OSError: The file cannot be opened.
    """
    held = FileLock(path, thread_local=False)
    try:
        held.acquire(timeout=0)
    except Timeout:
        logger.warning("%s", waiting)
        try:
            held.acquire(timeout=seconds, poll_interval=0.2)
        except Timeout as error:
            raise TimeoutError(f"{path} is locked by {Path(path).read_text() or 'a process'}") from error
    if type(held) is FileLock:  # else the file system has no locks, and what stands in the file is the lock
        Path(path).write_text(f"pid {os.getpid()} on {socket.gethostname()}")
    return held


@functools.cache
def announce(folder: Path, rank: int) -> FileLock:
    """Show the other processes of a launch that this one works in a folder, until it ends, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    held = FileLock(folder / f".process-{rank}.lock", thread_local=False)
    with contextlib.suppress(Timeout):  # then another process of that number lives, which is as good
        held.acquire(timeout=0)
    return held


class Absence:
    """
    Notices that processes of a launch which others wait for do not run, or no more.

    Args:
        folder (`Path`): Where they [`announce`] themselves.
        rank (`int`), num_ranks (`int`): Number of this process, and of all.
    """

    def __init__(self, folder: Path, rank: int, num_ranks: int) -> None:
        self._folder, self._rank, self._num_ranks = folder, rank, num_ranks
        self._since, self._warned = time.monotonic(), False

    def check(self, awaited: Iterable[int]) -> None:
        """
        To be called again and again while waiting for the processes of these numbers.

        Raises:
            RuntimeError: One of them has not been there for ten minutes. The log has said so after five seconds.
        """
        absent = [rank for rank in sorted(set(awaited)) if rank != self._rank and not self._is_there(rank)]
        seconds = time.monotonic() - self._since
        if not absent:
            self._since, self._warned = time.monotonic(), False
        elif seconds > (_SECONDS_TO_WAIT if self._warned else _SECONDS_TO_WARN):
            message = (
                f"This process, RANK={self._rank} of WORLD_SIZE={self._num_ranks}, waits for others that do "
                f"not run (RANK {', '.join(map(str, absent))}). If only one was started, unset RANK and WORLD_SIZE, "
                "which an earlier launch has left in the environment; if one has died, start all of them again."
            )
            if self._warned:
                raise RuntimeError(f"{message} What is done stays.")
            logger.warning("%s Giving up in %.0f minutes.", message, _SECONDS_TO_WAIT / 60)
            self._warned = True

    def _is_there(self, rank: int) -> bool:
        path = self._folder / f".process-{rank}.lock"
        if not path.exists():
            return False
        try:
            with FileLock(path, timeout=0, thread_local=False):
                return False
        except Timeout:
            return True


def remove_folder(path: Path) -> None:
    """Delete a folder. A kill in between leaves no half of it under its name."""
    shutil.rmtree(path.rename(partial_path(path)), ignore_errors=True)


def remove_leftovers(folder: str | os.PathLike[str], *, locked: bool = False) -> None:
    """
    Remove what killed processes left in a folder, and bring back a folder whose replacement they did not finish.

    What a process is still writing stays: it holds a lock on it, which the kernel drops when the process ends, however
    it ends. What another machine wrote stays too, with a warning, since not every file system shares locks.

    Args:
        folder (`str` or `Path`): Where files or folders are written; need not exist.
        locked (`bool`, defaults to `False`): Whether the caller has a [`lock`] that all who write there take: then
            what another machine wrote is a leftover as well.
    """
    for path in sorted(Path(folder).glob(".*")):
        name = _TEMPORARY.fullmatch(path.name)
        if name is None:
            continue
        if name["host"] != _host() and not locked:
            logger.warning("%s is from another machine, which still writes or was stopped; then delete it.", path)
            continue
        try:
            lock = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _clear(path)
            finally:
                os.close(lock)
        except (BlockingIOError, FileNotFoundError):  # still being written, or finished since the folder was listed
            continue
        except OSError as error:  # of another user, or in a file system without locks
            logger.warning("%s is from a run that still writes, or was stopped (%s); then delete it.", path, error)


def partial_path(path: str | os.PathLike[str], kind: str = "partial") -> Path:
    """A temporary name beside `path` that no one else has."""
    target, name = Path(path), os.path.basename(path)
    if kind == "partial":  # the other kind is read again, for the name to go back to
        name = os.fsencode(name)[:_NAME_BYTES].decode(errors="ignore")
    return target.with_name(f".{name}.{_host()}{secrets.token_hex(4)}.{kind}")


def write_checksums(folder: Path) -> None:
    """Write `checksums.json` into a folder: size and XXH3 of every other file in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS_NAME)
    listed = {str(path.relative_to(folder)): [path.stat().st_size, file_checksum(path)] for path in files}
    write_json(folder / CHECKSUMS_NAME, listed, indent=1)


def find_damage(folder: Path) -> str | None:
    """What is wrong with a folder that has `checksums.json`, in words; `None` if every file is as it was written."""
    try:
        listed = read_json(folder / CHECKSUMS_NAME)
    except ValueError as error:
        return f"{error} It was not written whole, or by an older version."
    for name, (size, checksum) in listed.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing."
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size} bytes, expected {size}: it was cut off or changed."
        if file_checksum(path) != checksum:
            return f"{path} has other content than when it was written: the checksum differs."
    return None


def file_checksum(path: Path) -> str:
    """XXH3 of a file: 32 hexadecimal digits. It finds damage at the speed of memory, and no forgery."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def tensor_checksum(*parts: "str | Tensor") -> str:
    """XXH3 of tensors on the CPU, by dtype, shape and bytes, and of texts: 32 hexadecimal digits."""
    import torch

    digest = xxhash.xxh3_128()
    for part in parts:
        if isinstance(part, str):
            digest.update(f"{part}\0".encode())
            continue
        digest.update(f"{part.dtype} {list(part.shape)}".encode())
        digest.update(part.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def without_secrets(value: Any, name: str = "") -> Any:
    """
    A configuration as it may be written to a file, a card or a tracker.

    Args:
        value: Anything; dicts, lists and tuples are gone through at every depth.
        name (`str`): What it is called.

    Returns:
        The same, with `"<NAME>"` in place of what is called a token, key, password and so on, of every HTTP header and
        cookie, and of passwords, keys and signatures inside texts, such as those of addresses.
    """
    words = {word.lower() for word in _WORDS.findall(name)}
    if value is None or isinstance(value, bool):
        return value
    pairs = {f"{a} {b}".lower() for a, b in itertools.pairwise(_WORDS.findall(name))}
    if words & _SECRET or pairs & _SECRET_PAIRS or name.lower() == "pass":
        return f"<{name.upper()}>"
    if isinstance(value, Mapping):
        inner = {key: f"{key} secret" if words & _ALL_SECRET else str(key) for key in value}
        return {key: without_secrets(item, inner[key]) for key, item in value.items()}
    if isinstance(value, list | tuple):
        if len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], str):  # as headers are also given
            return [value[0], without_secrets(value[1], f"{value[0]} secret" if words & _ALL_SECRET else value[0])]
        return [without_secrets(item, name) for item in value]
    if isinstance(value, str):
        return _SECRET_TEXT.sub(lambda found: next(filter(None, found.groups()), "") + "<SECRET>", value)
    return value


def unmarked(text: str) -> str:
    """A text as a line of Markdown that shows it as it is: no markup, no HTML, no link, no comment."""
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", " ".join(text.split())).replace("|", "\\|")


def formula_free(value: Any) -> Any:
    """
    The value as a cell of a CSV that no spreadsheet runs: a text that one would take for a formula gets an apostrophe
    in front. [`with_formula`] takes it away again.
    """
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else value


def with_formula(text: str) -> str:
    """What [`formula_free`] made the cell of."""
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text


def hash_bytes(content: bytes | io.BufferedIOBase) -> str:
    """BLAKE2b of bytes, or of those of a file just opened: 32 hexadecimal digits, as of `b2sum -l 128`."""
    file = io.BytesIO(content) if isinstance(content, bytes) else content
    digest = hashlib.blake2b(digest_size=16)
    while chunk := file.read(1 << 18):
        digest.update(chunk)
    return digest.hexdigest()


def fingerprint(*parts: "Content") -> str:
    """
    Hash that names content: equal parts in the same order give equal hashes, on every machine.

    Args:
        *parts: Each is hashed by itself, so that `("ab", "c")` differs from `("a", "bc")`. A text, number, list or
            dict counts by its value (the order of a dict's keys does not matter; what JSON does not have counts by its
            `str`), bytes and arrays (as `memoryview`) by their bytes and shape, an open binary file or a `Path` to a
            file by the bytes in it, a `Path` to a folder by the names and contents of its files, a tensor by dtype,
            shape and bytes, a module by its class and its tensors with their names.

    Returns:
        `str`: 32 hexadecimal digits.

    Raises:
        OSError: A file cannot be read.
    """
    whole = hashlib.blake2b(digest_size=16)
    for part in parts:
        whole.update(_digest(part))
    return whole.hexdigest()


def _digest(part: "Content") -> bytes:
    if part is None or isinstance(part, str | int | float | list | tuple | Mapping):
        text = json.dumps(part, sort_keys=True, default=str)
        return hashlib.blake2b(text.encode(), person=b"value").digest()
    if isinstance(part, Path):
        if part.is_dir():
            files = sorted(path for path in part.rglob("*") if path.is_file())
            pieces = [piece for path in files for piece in (str(path.relative_to(part)), path)]
            return hashlib.blake2b(fingerprint(*pieces).encode(), person=b"folder").digest()
        with open(part, "rb") as file:
            return _digest(file)
    if isinstance(part, bytes | io.BufferedIOBase):
        return hashlib.blake2b(hash_bytes(part).encode(), person=b"bytes").digest()
    if isinstance(part, memoryview):
        digest = hashlib.blake2b(json.dumps([part.format, part.shape]).encode(), person=b"array")
        digest.update(part)
        return digest.digest()
    return _digest_of_tensors(part)


def _digest_of_tensors(part: "Tensor | nn.Module") -> bytes:
    import torch  # not above: the workers of curation hash texts and files alone, and start faster without it

    if isinstance(part, torch.nn.Module):
        entries = [piece for name, tensor in sorted(part.state_dict().items()) for piece in (name, tensor)]
        return hashlib.blake2b(fingerprint(type(part).__name__, *entries).encode(), person=b"module").digest()
    flat = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    described = fingerprint(str(part.dtype), list(part.shape), flat.data)
    return hashlib.blake2b(described.encode(), person=b"tensor").digest()


def _replaceable_mode(target: Path) -> int | None:
    """Permissions of the file that is to be replaced, `None` where there is none."""
    try:
        status = os.stat(target)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode):
        raise OSError(f"{target} is a folder or a device, and no file can take its place. Pass another path.")
    mode = stat.S_IMODE(status.st_mode)
    if not mode & 0o222:  # a rename would not ask
        raise PermissionError(errno.EACCES, "is protected: no one may write to it", os.fspath(target))
    return mode


def _new_partial(target: Path, *, folder: bool) -> tuple[Path, int]:
    """A new file or folder of a temporary name, with the permissions of any new one, and its locked descriptor."""
    for _ in range(_ATTEMPTS):
        partial = partial_path(target)
        if folder:
            partial.mkdir()
        else:
            partial.touch(exist_ok=False)
        try:
            lock = os.open(partial, os.O_RDONLY)
        except FileNotFoundError:  # another process cleared it away before it was locked
            continue
        if _locked(lock) and partial.exists():
            return partial, lock
        os.close(lock)
    raise OSError(f"No temporary name could be had beside {target}: other processes clear them away. End them.")


def _exchange(partial: Path, target: Path) -> bool:
    """Put a folder in place of another one, by two renames. False where another process was faster: try again."""
    replaced = partial_path(target, "replaced")
    try:
        lock = os.open(target, os.O_RDONLY)
        try:
            _locked(lock)  # or `remove_leftovers` of another process would bring it back
            os.rename(target, replaced)
            try:
                os.rename(partial, target)
            finally:
                try:
                    _clear(replaced)
                except OSError as error:
                    # Another process had the lock and clears it away too; the exchange is done all the same.
                    if error.errno not in (*_IS_TAKEN, errno.ENOENT):
                        raise
        finally:
            os.close(lock)
    except OSError as error:
        if error.errno not in (*_IS_TAKEN, errno.ENOENT):
            raise
        return False
    return True


def _clear(path: Path) -> None:
    """Delete something of a temporary name; a folder that was to be replaced and is not takes its name back."""
    name = _TEMPORARY.fullmatch(path.name)
    assert name is not None, path
    if name["kind"] == "replaced":
        final = path.with_name(name["name"])
        if not final.exists():
            os.rename(path, final)
            logger.info("Brought %s back, which a stopped process was replacing.", final)
            return
        path = path.rename(partial_path(final))  # half deleted it must not come back
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink()
    logger.debug("Removed %s.", path)


def _locked(descriptor: int) -> bool:
    """Lock a file or folder until it is closed; False where another process has it. True where there are no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # then `remove_leftovers` cannot lock either, and leaves everything there
        return True
    return True


@functools.cache
def _host() -> str:
    return fingerprint(socket.gethostname())[:8]


def _flush(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk. A full disk may show only here."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot flush a folder
            raise
    finally:
        os.close(descriptor)
