"""Rows of a folder of video files: captions beside them, or chosen and rejected ones under equal names."""

import csv
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from ..files import is_whole


logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = frozenset(
    ".3gp .asf .avi .flv .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .mxf .ogv .ts .webm .wmv".split()
)
#: Where a caption stands in a record, the first that holds a text.
CAPTION_KEYS = ("prompt", "caption", "text")
CAPTION_SUFFIXES = (".txt", ".json")
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
_MAX_CAPTION_BYTES = 1 << 20  # a file that is larger is none, and may be larger than the memory


def files_below(root: Path) -> list[Path]:
    """
    Files of a folder and its subfolders in the order of their names; hidden ones are left out, and with a warning what
    lies behind links to folders.
    """
    paths = sorted(root.rglob("*"))
    for path in paths:
        if path.is_symlink() and path.is_dir():
            logger.warning("%s is a link to a folder, and is not searched. Name that folder, or move it here.", path)
    return [
        path
        for path in paths
        if not any(part.startswith(".") for part in path.relative_to(root).parts) and os.path.isfile(path)
    ]


def videos_in(files: Iterable[Path]) -> list[Path]:
    """Those of the files that are videos by their suffix."""
    return [path for path in files if path.suffix.lower() in VIDEO_SUFFIXES]


def captions_below(root: Path, files: Sequence[Path]) -> dict[str, str]:
    """
    Captions of the videos of a folder: `"sub/clip"` -> text of `sub/clip.txt` or `sub/clip.json` (WebDataset's
    layout), in capitals or not, and `file_name` -> text of its `metadata.jsonl` or `metadata.csv`. Beside the metadata
    only `files` are read, such as those of [`files_below`].

    A file that is a link out of `root` is not read: what is trained on can be published.
    """
    captions = _metadata_captions(root)
    for suffix in reversed(CAPTION_SUFFIXES):  # the text wins
        for path in files:
            if path.suffix.lower() == suffix and (caption := caption_at(path, root)):
                captions[stem_below(path, root)] = caption
    return captions


def stem_below(path: Path, root: Path) -> str:
    """`"sub/clip"` for `root/sub/clip.mp4`."""
    return path.relative_to(root).with_suffix("").as_posix()


def caption_for(path: Path, root: Path, captions: Mapping[str, str]) -> str | None:
    """Caption of a video out of [`captions_below`]; the metadata table wins over a file beside the video."""
    return captions.get(path.relative_to(root).as_posix()) or captions.get(stem_below(path, root))


def captioned_rows(root: Path, files: Sequence[Path]) -> list[dict[str, str]]:
    """
    `prompt` and `video` of each video of a folder, whose files are given, with the captions of [`captions_below`].

    Raises:
        ValueError: If a video has no caption; names the first one.
    """
    captions = captions_below(root, files)
    rows, without = [], []
    for path in videos_in(files):
        caption = caption_for(path, root, captions)
        rows.append({"prompt": caption or "", "video": str(path)})
        without += [] if caption else [path]
    _refuse_uncaptioned(root, without, len(rows))
    return rows


def pair_rows(root: Path) -> list[dict[str, Any]]:
    """
    `prompt`, `chosen` and `rejected` of the folders `chosen/` and `rejected/`: `rejected/clip.mp4`, or all videos in
    `rejected/clip/`, belong to `chosen/clip.mp4`. The caption lies beside either, or in `clip.txt` of `root`.

    Raises:
        ValueError: If a chosen video has no rejected one or no caption, a rejected one belongs to none, or two chosen
            ones have one name and other endings.
    """
    files = files_below(root)
    captions, videos = captions_below(root, files), videos_in(files)
    rejected: dict[str, list[Path]] = {}
    chosen: dict[str, Path] = {}
    for path in (path for path in videos if root / "chosen" in path.parents):
        if (first := chosen.setdefault(stem_below(path, root / "chosen"), path)) != path:
            raise ValueError(
                f"{root}: two chosen videos of one name: {first.name} and {path.name}. Rename or drop one."
            )
    for path in (path for path in videos if root / "rejected" in path.parents):
        key = stem_below(path, root / "rejected")
        rejected.setdefault(key if key in chosen else key.rpartition("/")[0], []).append(path)
    alone = [str(path) for key, path in chosen.items() if key not in rejected]
    alone += [str(paths[0]) for key, paths in rejected.items() if key not in chosen]
    if alone:
        raise ValueError(
            f"{root}: videos without a counterpart: {len(alone)}, the first is {alone[0]}. Expected "
            "rejected/NAME.mp4, or several videos in rejected/NAME/, for every chosen/NAME.mp4."
        )
    rows, without = [], []
    for key, path in chosen.items():
        places = [path, *rejected[key], root / path.relative_to(root / "chosen")]
        caption = next(filter(None, (caption_for(place, root, captions) for place in places)), None)
        others = [str(video) for video in rejected[key]]
        rows.append({"prompt": caption or "", "chosen": str(path), "rejected": others})
        without += [] if caption else [path]
    _refuse_uncaptioned(root, without, len(rows))
    return rows


def _refuse_uncaptioned(root: Path, without: list[Path], total: int) -> None:
    if without:
        raise ValueError(
            f"{root}: videos without a caption: {len(without)} of {total}, the first is {without[0]}. Write "
            f"{without[0].stem}.txt beside it, or a metadata.jsonl with 'file_name' and 'prompt' into {root}."
        )


def caption_at(path: Path, root: Path) -> str | None:
    """Caption in a `.txt` or `.json` file below `root`; None, with a warning, if it leads out or cannot be read."""
    if not _is_inside(path, root):
        return None
    try:
        with open(path, "rb") as file:
            return caption_in(file, str(path))
    except OSError as error:
        logger.warning("%s cannot be read and is not used (%s).", path, error.strerror)
        return None


def caption_in(file: IO[bytes], name: str) -> str | None:
    """Caption in an open `.txt` or `.json` file; None, with a warning, if it is no JSON or larger than 1 MiB."""
    data = file.read(_MAX_CAPTION_BYTES + 1)
    if len(data) > _MAX_CAPTION_BYTES:
        logger.warning("%s is larger than a caption, %d bytes, and is not used.", name, _MAX_CAPTION_BYTES)
        return None
    text = data.decode("utf-8-sig", "replace")
    if name.lower().endswith(".txt"):
        return text.strip() or None
    try:
        return _caption_of(json.loads(text))
    except (ValueError, RecursionError) as error:
        logger.warning("%s: a caption is no JSON and is not used (%s): %.60r", name, error, text)
        return None


def _is_inside(path: Path, root: Path) -> bool:
    inside = path.resolve().is_relative_to(root.resolve())
    if not inside:
        logger.warning("%s leads out of %s and is not read.", path, root)
    return inside


def _caption_of(record: Any) -> str | None:
    """The first of the usual keys that holds a text."""
    if not isinstance(record, Mapping):
        return None
    # Half a surrogate pair, for which JSON has an escape, stands in no table.
    texts = (str(record[key]).encode("utf-8", "replace").decode().strip() for key in CAPTION_KEYS if record.get(key))
    return next((text for text in texts if text), None)


def _metadata_captions(root: Path) -> dict[str, str]:
    """`file_name` -> caption of a folder's `metadata.jsonl` or `metadata.csv`, as `videofolder` datasets have it."""
    captions: dict[str, str | None] = {}
    for name in METADATA_NAMES:
        if (root / name).is_file() and _is_inside(root / name, root):
            with open(root / name, encoding="utf-8-sig", errors="replace", newline="") as file:
                try:
                    records = list(csv.DictReader(file) if name.endswith(".csv") else _json_lines(file, root / name))
                except csv.Error as error:
                    raise ValueError(f"{root / name}: expected a table of captions, got no CSV ({error}).") from error
            for number, record in enumerate(records if name.endswith(".csv") else (), start=1):
                if not is_whole(record):  # as where a comma without quotes cuts the caption
                    logger.warning("%s: row %d has another number of cells and is not used.", root / name, number)
                    record.clear()
            named = (record for record in records if isinstance(record, Mapping) and record.get("file_name"))
            captions |= {str(record["file_name"]): _caption_of(record) for record in named}
    return {name: caption for name, caption in captions.items() if caption}


def _json_lines(lines: Iterable[str], path: Path) -> Iterator[Any]:
    """The records of a file; a line that is none costs the captions in it, not the run."""
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                logger.warning("%s, line %d is no JSON and is not used (%s)", path, number, error)
