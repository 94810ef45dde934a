"""
OpenVid-1M and VidGen-1M: the archives that are published become tars that curation and training read in place.

The layouts (https://huggingface.co/datasets/nkp37/OpenVid-1M, https://huggingface.co/datasets/Fudan-FUXI/VIDGEN-1M),
of which any archives may be there, and the table:

    OpenVid-1M.csv               video, caption, and measures of the clip; OpenVidHD.csv is a part of it
    OpenVid_part0.zip            clips; large ones are cut: OpenVid_part73_partaa, OpenVid_part73_partab
    VidGen_1M_video_caption.json [{"vid": ..., "caption": ...}, ...]
    VidGen_video_0.zip           clips
"""

import io
import json
import logging
import os
import re
import sqlite3
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ...files import atomic_file, hash_bytes, lock, remove_leftovers, write_atomically
from ..folders import VIDEO_SUFFIXES, files_below
from .imported import Imported, common_names, csv_records, existing_folder


logger = logging.getLogger(__name__)

_MARKER, _LOCK = ".pool.json", ".pool.lock"
_LARGEST_CLIP = 2**30  # bytes; the clips are seconds long, and each is in memory once
_LONGEST_RECORD = 16 * 2**20  # characters of JSON in which a record must end
_UNREADABLE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError)

Captions = Iterator[tuple[str, dict[str, Any]]]  # name of a clip without its ending, and what is known of it


@dataclass(frozen=True)
class PoolLayout:
    """How a pool is published: names of its table and its archives, and who reads the table."""

    title: str
    tables: tuple[str, ...]
    archive: re.Pattern[str]
    read: Callable[[Path, Imported], Captions]


@dataclass(frozen=True)
class ImportedPool:
    """
    Attributes:
        folder (`Path`): A tar for each archive; a source of curation, and a dataset for `--dataset_name`.
        clips (`int`): Clips in the tars.
        skipped (`list[str]`): Clips, archives and lines of the table that were left out, and why.
        without_video (`int`): Captions whose clip is in none of the archives that are here.
    """

    folder: Path
    clips: int = 0
    skipped: list[str] = field(default_factory=list)
    without_video: int = 0


def import_pool(kind: str, folder: str | os.PathLike[str], output_dir: str | os.PathLike[str]) -> ImportedPool:
    """
    Writes a tar in WebDataset layout for each archive: `key.mp4`, and `key.json` with `prompt` and the other columns.

    Clips go through memory one by one. An archive whose tar is there already is not opened again, so that a stopped
    import goes on, and archives may come later or be deleted; of clips in several archives the first one counts.

    Args:
        kind (`str`): `"openvid"` or `"vidgen"`.
        folder (`str` or `Path`): Folder with the archives and the table, at any depth.
        output_dir (`str` or `Path`): Where the tars go, and `NAME.skipped.txt` for what an archive has and they lack.

    Returns:
        [`ImportedPool`].

    Raises:
        ValueError: If the table or every archive is missing, the table is of another kind or cut off, no clip is
            left, or `output_dir` holds something else.
        OSError: If the disk is full, or another import writes into `output_dir` (`TimeoutError`).
    """
    layout = POOLS[kind]
    root = existing_folder(folder, f"the folder of {layout.title}")
    files = files_below(root)
    archives = _archives(root, files, layout)
    tables = [path for path in files if path.name in layout.tables]
    if not tables:
        raise ValueError(f"{root}: expected {' or '.join(layout.tables)} of {layout.title}, found neither.")
    table = min(tables, key=lambda path: layout.tables.index(path.name))
    target = _own(Path(output_dir), kind)
    held = lock(target / _LOCK, seconds=0, waiting=f"Another import writes into {target}.")
    try:
        remove_leftovers(target)
        sources = [table, *(part for parts in archives.values() for part in parts), *sorted(target.glob("*.tar"))]
        index = target / f".index-{_version(sources)}.sqlite"
        for other in target.glob(".index-*.sqlite"):
            if other != index:
                other.unlink()
        if not index.is_file():
            _write_index(index, archives, table, layout)
        with closing(sqlite3.connect(index)) as database:
            pool = _write_tars(database, archives, target)
        index.unlink()
    finally:
        held.release()
    if not pool.clips:
        reasons = "; ".join(pool.skipped[:3]) or f"none of the clips has a caption in {table.name}"
        raise ValueError(f"{root}: no clip of {layout.title} can be used: {reasons}.")
    return pool


def _archives(root: Path, files: Sequence[Path], layout: PoolLayout) -> dict[str, list[Path]]:
    """Name of an archive -> its file, or the files that it was cut into, in order; archives by their numbers."""
    found: dict[tuple[int, str], list[Path]] = {}
    for path in files:
        match = layout.archive.fullmatch(path.name)
        if match is not None:
            found.setdefault((int(match["number"]), match["name"]), []).append(path)
    if not found:
        raise ValueError(
            f"{root}: expected archives of {layout.title} such as {layout.tables[0].split('.')[0]}'s zips, found "
            f"{common_names([path.name for path in files]) or 'nothing'}. Fetch at least one of them."
        )
    return {
        name: [path for path in sorted(paths) if path.suffix == ".zip"][:1] or sorted(paths)
        for (_, name), paths in sorted(found.items())
    }


def _own(target: Path, kind: str) -> Path:
    """
    Raises:
        ValueError: If the folder holds anything but an import of this kind.
    """
    if target.is_file() or (target.is_dir() and any(target.iterdir()) and not (target / _MARKER).is_file()):
        raise ValueError(f"--output_dir: {target} exists already. Remove it, or name another folder.")
    if (target / _MARKER).is_file() and json.loads((target / _MARKER).read_text())["pool"] != kind:
        raise ValueError(f"--output_dir: {target} is an import of another pool than {kind}. Name another folder.")
    target.mkdir(parents=True, exist_ok=True)
    write_atomically(target / _MARKER, json.dumps({"pool": kind}))
    return target


def _version(paths: Iterable[Path]) -> str:
    """Of files, by their names, sizes and times."""
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return hash_bytes(json.dumps(stats).encode())[:16]


def _write_index(path: Path, archives: dict[str, list[Path]], table: Path, layout: PoolLayout) -> None:
    """
    A database of the clips: in which archive each is, and what the table says of it. A million captions do not fit
    into the memory of every machine.
    """
    with atomic_file(path) as partial, closing(sqlite3.connect(partial, isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode = OFF")  # the file is whole or absent by itself
        database.execute("BEGIN")
        database.execute("CREATE TABLE clips (name TEXT PRIMARY KEY, archive TEXT, member TEXT, fields TEXT)")
        database.execute("CREATE TABLE skipped (line TEXT)")
        database.execute("CREATE TABLE captions (without_video INTEGER)")
        for tar in path.parent.glob("*.tar"):  # of archives that are no longer here
            if tar.stem not in archives:
                rows = [(name, tar.stem, "") for name in _names_in(tar)]
                database.executemany("INSERT OR IGNORE INTO clips (name, archive, member) VALUES (?, ?, ?)", rows)
        for name, parts in tqdm(archives.items(), desc="Listing archives", unit="archive", disable=None):
            try:
                with _opened(parts) as archive:
                    members = [info.filename for info in archive.infolist() if _is_clip(info)]
            except _UNREADABLE as error:
                database.execute("INSERT INTO skipped VALUES (?)", (f"{parts[0].name}: {error}",))
                continue
            rows = [(Path(member).stem, name, member) for member in members]
            database.executemany("INSERT OR IGNORE INTO clips (name, archive, member) VALUES (?, ?, ?)", rows)
        faults, unseen = Imported(), 0
        for name, fields in tqdm(layout.read(table, faults), desc=table.name, unit="caption", disable=None):
            update = (json.dumps(fields, ensure_ascii=False), name)
            unseen += not database.execute("UPDATE clips SET fields = ? WHERE name = ?", update).rowcount
        database.executemany("INSERT INTO skipped VALUES (?)", [(line,) for line in faults.skipped])
        database.execute("INSERT INTO captions VALUES (?)", (unseen,))
        database.execute("COMMIT")


def _write_tars(database: sqlite3.Connection, archives: dict[str, list[Path]], target: Path) -> ImportedPool:
    ((unseen,),) = database.execute("SELECT without_video FROM captions")
    skipped = [line for (line,) in database.execute("SELECT line FROM skipped")]
    for name, parts in tqdm(archives.items(), desc="Archives", unit="archive", disable=None):
        tar, notes = target / f"{name}.tar", target / f"{name}.skipped.txt"
        rows = database.execute(
            "SELECT name, member, fields FROM clips WHERE archive = ? ORDER BY member", (name,)
        ).fetchall()
        if rows and not tar.is_file():
            write_atomically(notes, "".join(f"{line}\n" for line in _write_tar(tar, parts, rows)))
    for notes in sorted(target.glob("*.skipped.txt")):
        skipped += notes.read_text(encoding="utf-8").splitlines()
    clips = sum(len(_names_in(tar)) for tar in target.glob("*.tar"))
    return ImportedPool(target, clips, skipped, unseen)


def _names_in(tar: Path) -> list[str]:
    """Names of the clips of a tar."""
    with tarfile.open(tar, "r:") as made:
        return [member.name.removesuffix(".json") for member in made if member.name.endswith(".json")]


def _write_tar(path: Path, parts: Sequence[Path], rows: Sequence[tuple[str, str, str | None]]) -> list[str]:
    """The clips of an archive that have a caption and can be read; returns the others, with the reason."""
    left_out = []
    written = 0
    with atomic_file(path) as partial:
        with _opened(parts) as archive, tarfile.open(partial, "w") as tar:
            for name, member, fields in rows:
                fault, content = _read_clip(archive, member) if fields is not None else ("it has no caption", b"")
                if fault:
                    left_out.append(f"{parts[0].name}, {member}: {fault}")
                    continue
                assert fields is not None
                written += 1
                for suffix, data in ((Path(member).suffix.lower(), content), (".json", fields.encode())):
                    entry = tarfile.TarInfo(f"{name}{suffix}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    if not written:
        path.unlink()
    return left_out


def _read_clip(archive: zipfile.ZipFile, member: str) -> tuple[str, bytes]:
    """What is wrong with a member, and its bytes."""
    size = archive.getinfo(member).file_size
    if not 0 < size <= _LARGEST_CLIP:
        return f"it has {size} bytes", b""
    try:
        return "", archive.read(member)
    except _UNREADABLE as error:
        return f"it is damaged ({error})", b""


def _is_clip(info: zipfile.ZipInfo) -> bool:
    path = Path(info.filename)
    return not info.is_dir() and path.suffix.lower() in VIDEO_SUFFIXES and not path.name.startswith(".")


def _opened(parts: Sequence[Path]) -> zipfile.ZipFile:
    return zipfile.ZipFile(parts[0] if len(parts) == 1 else io.BufferedReader(_Joined(parts)))


class _Joined(io.RawIOBase):
    """Files that one was cut into, as that one."""

    def __init__(self, parts: Sequence[Path]) -> None:
        self._files = [open(path, "rb") for path in parts]
        self._sizes = [path.stat().st_size for path in parts]
        self._place = 0

    def close(self) -> None:
        for file in self._files:
            file.close()
        super().close()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: sum(self._sizes)}[whence]
        self._place = max(start + offset, 0)
        return self._place

    def readinto(self, buffer: Any) -> int:
        place = self._place
        for file, size in zip(self._files, self._sizes, strict=True):
            if place < size:
                file.seek(place)
                count = file.readinto(memoryview(buffer)[: size - place])
                self._place += count
                return count
            place -= size
        return 0


def _read_openvid(path: Path, faults: Imported) -> Captions:
    for place, record in csv_records(path, ("video", "caption"), faults):
        name, caption = (str(record.pop(column) or "").strip() for column in ("video", "caption"))
        if not name or not caption or None in record:
            faults.skip(place, f"expected a name and a caption, got {name!r}")
            continue
        yield Path(name).stem, {"prompt": caption, **record}


def _read_vidgen(path: Path, faults: Imported) -> Captions:
    for number, record in enumerate(_json_objects(path)):
        name, caption = (str(record.pop(key, "") or "").strip() for key in ("vid", "caption"))
        if not name or not caption:
            faults.skip(f"{path.name}, entry {number}", f"expected a `vid` and a `caption`, got {name!r}")
            continue
        yield name, {"prompt": caption, **record}


def _json_objects(path: Path) -> Iterator[dict[str, Any]]:
    """
    The objects of a JSON list, one after the other.

    Raises:
        ValueError: If it is cut off or damaged.
    """
    decoder, text = json.JSONDecoder(), ""
    with open(path, encoding="utf-8", errors="replace") as file:
        while chunk := file.read(2**20):
            text, place = text + chunk, 0
            while (start := text.find("{", place)) >= 0:
                try:
                    found, place = decoder.raw_decode(text, start)
                except ValueError:  # it goes on in the next piece, or never ends
                    break
                yield found
            text = text[place:]
            if len(text) > _LONGEST_RECORD:
                break
    if "{" in text or "]" not in text:
        raise ValueError(f"{path}: the list is cut off or damaged near {text.strip()[:60]!r}. Fetch it again.")


POOLS = {
    "openvid": PoolLayout(
        "OpenVid-1M",
        ("OpenVid-1M.csv", "OpenVidHD.csv"),
        re.compile(r"(?P<name>OpenVid_part(?P<number>\d+))(?:\.zip|_part\w+)"),
        _read_openvid,
    ),
    "vidgen": PoolLayout(
        "VidGen-1M",
        ("VidGen_1M_video_caption.json",),
        re.compile(r"(?P<name>VidGen_video_(?P<number>\d+))\.zip"),
        _read_vidgen,
    ),
}
