"""
List the clips of folders, WebDataset tars and `datasets`. Listing reads names and captions, no pixels.

Every source becomes rows of the same columns (`SOURCE`); [`open_clip`] gets a row's bytes back.
"""

import logging
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import pyarrow as pa

from ...data.folders import (
    CAPTION_SUFFIXES,
    METADATA_NAMES,
    VIDEO_SUFFIXES,
    caption_for,
    caption_in,
    captions_below,
    files_below,
)
from ...data.tables import load_configuration
from ...data.video_file import open_bytes
from ...data.video_io import decode_video, video_hash
from ...files import write_atomically
from ..engine.manifest import OUTCOME, Batch, digest, new_manifest, with_columns


logger = logging.getLogger(__name__)

#: What is known of a clip before it is opened. `offset` and `length` say where it lies inside a tar (null: the whole
#: file); `listing` changes when the file does.
SOURCE: dict[str, pa.DataType] = {
    "source_id": pa.string(),
    "path": pa.string(),
    "offset": pa.int64(),
    "length": pa.int64(),
    "prompt": pa.string(),
    "listing": pa.string(),
}
Row = dict[str, Any]
_TEXT = ("string", "large_string", "string_view", "null")  # what a column of captions holds; null: none yet


#: What clips are taken from; see [`list_clips`].
ClipSource: TypeAlias = str | os.PathLike[str] | datasets.Dataset | datasets.IterableDataset


def list_clips(
    sources: Sequence[ClipSource],
    *,
    spool: str | os.PathLike[str],
    split: str = "train",
    video_column: str = "video",
    prompt_column: str = "prompt",
) -> pa.Table:
    """
    The manifest before the first stage: one row for every clip of every source, in a fixed order.

    Args:
        sources (`list`):
            Each one a folder (searched through, tars in it included), a `.tar` file in WebDataset layout, a video
            file, a `datasets.Dataset` or `IterableDataset` (read to its end), a folder written by `save_to_disk`, or
            the id of a dataset on the Hub (`"user/name:configuration"` where it has several).
        spool (`str` or `Path`): Folder for videos whose bytes lie inside a dataset; named by content, written once.
        split (`str`, defaults to `"train"`): Split of datasets that are named.
        video_column, prompt_column (`str`): Columns of datasets. A video cell is a path or `{"path", "bytes"}`; rows
            without a prompt column have no caption yet.

    Returns:
        `pyarrow.Table`: Columns `SOURCE` and those of `OUTCOME`. A name that is no UTF-8, and a tar in a folder that
            cannot be read, are dropped here, by name.

    Raises:
        ValueError: A source is nothing of these, holds no clip, is given twice, or has captions that are no texts.
    """
    rows: list[Row] = []
    for number, source in enumerate(sources):
        name = _name(source, number)
        clips = list(_list_source(source, name, Path(spool), split, video_column, prompt_column))
        if not clips:
            raise ValueError(
                f"{name}: no video found. Expected files ending in {', '.join(sorted(VIDEO_SUFFIXES))}, or "
                "tars of them. Of a folder of parquet files, pass what `datasets.load_dataset` makes of it."
            )
        logger.info("%s: %d clips", name, len(clips))
        rows += clips
    twice = [name for name, count in Counter(row["source_id"] for row in rows).items() if count > 1]
    if twice:
        raise ValueError(f"{len(twice)} clips are listed twice, the first is {twice[0]}. Name each source once.")
    for row in rows:
        if not (_is_text(row["path"]) and _is_text(row["source_id"])):
            row["source_id"] = row["source_id"].encode("utf-8", "backslashreplace").decode()
            dropped = {"dropped_by": "file_name", "detail": "the file's name is not valid UTF-8; rename it"}
            row |= {"path": None, **dropped}
    table = new_manifest({name: [row[name] for row in rows] for name in SOURCE}, SOURCE)
    return with_columns(table, {name: [row.get(name) for row in rows] for name in OUTCOME}, OUTCOME)


def open_clip(path: str, offset: int | None, length: int | None) -> str | dict[str, Any]:
    """
    What `read_video` takes: the path, or for a clip inside a tar its bytes.

    Raises:
        VideoDecodeError: The tar is gone.
    """
    if offset is None or length is None:
        return path
    with open_bytes(path) as file:
        file.seek(offset)
        return {"path": f"{path}@{offset}", "bytes": file.read(length)}


def decode_clips(batch: Batch) -> None:
    """
    Decodes clips and keeps nothing of them.

    Raises:
        VideoDecodeError: One cannot be decoded to its end.
    """
    for path, offset, length in zip(batch["path"], batch["offset"], batch["length"], strict=True):
        for _ in decode_video(open_clip(path, offset, length)):
            pass


def _name(source: ClipSource, number: int) -> str:
    if isinstance(source, datasets.IterableDataset):
        return f"stream {number}"  # it has no fingerprint
    if isinstance(source, datasets.Dataset):
        return f"dataset {source._fingerprint}"
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    raise ValueError(
        f"Expected a path, the id of a dataset, a `Dataset` or an `IterableDataset` as a source, got "
        f"{type(source).__name__}. Of a `DatasetDict`, pass one of its splits."
    )


def _list_source(
    source: ClipSource, name: str, spool: Path, split: str, video_column: str, prompt_column: str
) -> Iterator[Row]:
    if isinstance(source, (datasets.Dataset, datasets.IterableDataset)):
        return _list_dataset(source, name, spool, video_column, prompt_column)
    path = Path(source)
    if (path / "state.json").is_file():
        return _list_dataset(datasets.load_from_disk(str(path)), str(path), spool, video_column, prompt_column)
    if (path / "dataset_dict.json").is_file():
        splits = datasets.load_from_disk(str(path))
        if split not in splits:
            raise ValueError(f"{path}: expected a split out of {list(splits)}, got {split!r}.")
        return _list_dataset(splits[split], f"{path}/{split}", spool, video_column, prompt_column)
    if path.is_dir():
        return _list_folder(path)
    if path.suffix.lower() == ".tar" and path.is_file():
        return _list_tar(path)
    if path.is_file():
        folder = path.parent
        beside = [other for other in folder.iterdir() if other.stem == path.stem]
        return iter([_file_row(path, str(path), caption_for(path, folder, captions_below(folder, beside)))])
    try:
        loaded, _ = load_configuration(str(source), split)
    except (ConnectionError, FileNotFoundError, ValueError) as error:
        raise ValueError(
            f"Expected a folder, a tar, a video file or a dataset, got {source}, which is none that can be loaded "
            f"({error}). Check the spelling; relative paths start at {Path.cwd()}."
        ) from error
    return _list_dataset(loaded, str(source), spool, video_column, prompt_column)


def _list_folder(root: Path) -> Iterator[Row]:
    """Videos and tars below a folder, in the order of their names; hidden ones and other files are left out."""
    files = files_below(root)
    captions = captions_below(root, files)
    ignored: Counter[str] = Counter()
    for path in files:
        name, suffix = path.relative_to(root).as_posix(), path.suffix.lower()
        if suffix in VIDEO_SUFFIXES:
            yield _file_row(path, f"{root}/{name}", caption_for(path, root, captions))
        elif suffix == ".tar":
            try:
                yield from list(_list_tar(path))
            except (ValueError, OSError) as error:  # one of many shards costs itself
                yield _file_row(path, f"{root}/{name}", None) | {"dropped_by": "unreadable", "detail": str(error)}
        elif suffix not in CAPTION_SUFFIXES and path.name not in METADATA_NAMES:
            ignored[path.suffix] += 1
    if ignored:
        kinds = ", ".join(f"{count} of {suffix or 'no suffix'}" for suffix, count in sorted(ignored.items()))
        logger.warning("%s: files that are no videos by their suffix are left out: %s", root, kinds)


def _file_row(path: Path, source_id: str, caption: str | None) -> Row:
    return {
        "source_id": source_id,
        "path": str(path.absolute()),
        "offset": None,
        "length": None,
        "prompt": caption,
        "listing": digest(f"{source_id}\0{path}\0{_version(path)}"),
    }


def _version(path: Path) -> tuple[int, int] | None:
    """What changes when a file does; None where there is none, as is found when it is opened."""
    try:
        status = path.stat()
    except (OSError, ValueError):  # a name with a null byte is a ValueError
        return None
    return status.st_size, status.st_mtime_ns


def _list_tar(path: Path) -> Iterator[Row]:
    """Members of a WebDataset tar: `key.mp4` with an optional `key.txt` or `key.json`. Nothing is unpacked."""
    status = path.stat()
    try:
        with tarfile.open(path, "r:") as tar:
            members = [member for member in tar if member.isfile()]
            if sparse := [member for member in members if member.issparse()]:
                words = "%s: %d files with holes are left out, the first is %s. Pack them without --sparse."
                logger.warning(words, path, len(sparse), sparse[0].name)
                members = [member for member in members if member not in sparse]
            captions: dict[str, str | None] = {}
            for member in members:
                stem, suffix = os.path.splitext(member.name)
                data = tar.extractfile(member) if suffix.lower() in CAPTION_SUFFIXES else None
                if data is not None:
                    captions[stem] = caption_in(data, f"{path}/{member.name}")
    except tarfile.TarError as error:
        raise ValueError(f"{path}: not an uncompressed tar, or cut off ({error}). Fetch it again.") from error
    for member in members:
        stem, suffix = os.path.splitext(member.name)
        if suffix.lower() in VIDEO_SUFFIXES:
            yield {
                "source_id": f"{path}/{member.name}",
                "path": str(path.absolute()),
                "offset": member.offset_data,
                "length": member.size,
                "prompt": captions.get(stem),
                "listing": digest(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0{member.offset_data}"),
            }


def _list_dataset(
    dataset: datasets.Dataset | datasets.IterableDataset,
    name: str,
    spool: Path,
    video_column: str,
    prompt_column: str,
) -> Iterator[Row]:
    if dataset.features is None:  # of a stream, known once its first row is
        dataset = dataset._resolve_features()
    if video_column not in dataset.features:
        raise ValueError(
            f"{name}: expected a column {video_column!r} with videos, got {list(dataset.features)}. Name yours as "
            "`video_column`."
        )
    caption = dataset.features.get(prompt_column)
    if caption is not None and not (isinstance(caption, datasets.Value) and caption.dtype in _TEXT):
        raise ValueError(
            f"{name}: expected a text in each row of the column {prompt_column!r}, got {caption}. Keep one caption of "
            "each clip, or name another column as `prompt_column`."
        )
    columns = [column for column in (video_column, prompt_column) if column in dataset.features]
    dataset = dataset.select_columns(columns)
    if isinstance(dataset.features[video_column], datasets.Video):
        dataset = dataset.cast_column(video_column, datasets.Video(decode=False))
    for index, row in enumerate(dataset.with_format(None)):
        cell = row[video_column]
        if isinstance(cell, Mapping) and cell.get("bytes") is not None:
            path = _spool(cell, spool)
        else:
            path = Path(str(cell["path"] if isinstance(cell, Mapping) else cell))
        yield _file_row(path, f"{name}[{index}]", str(row.get(prompt_column) or "").strip() or None)


def _spool(cell: Mapping[str, Any], folder: Path) -> Path:
    """The bytes of a dataset's cell as a file named by them."""
    path = folder / f"{video_hash(cell)}{Path(cell.get('path') or 'clip.mp4').suffix}"
    if not path.is_file():
        write_atomically(path, cell["bytes"])
    return path


def _is_text(path: str) -> bool:
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
