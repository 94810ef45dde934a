"""Rows of a folder of video files: captions beside them, or chosen and rejected ones under equal names."""

import csv
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = frozenset(
    ".3gp .asf .avi .flv .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .mxf .ogv .ts .webm .wmv".split()
)
#: Where a caption stands in a record, the first that holds a text.
CAPTION_KEYS = ("prompt", "caption", "text")
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")


def videos_below(root: Path) -> list[Path]:
    """Video files of a folder and its subfolders by their suffix, in the order of their names; hidden ones are not."""
    return [
        path
        for path in sorted(root.rglob("*"))
        if path.suffix.lower() in VIDEO_SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
    ]


def captioned_rows(root: Path) -> list[dict[str, str]]:
    """
    `prompt` and `video` of each video of a folder, with the caption from `clip.txt` or `clip.json` beside `clip.mp4`
    or from the folder's `metadata.jsonl` or `metadata.csv`.

    Raises:
        ValueError: If a video has no caption; names the first one.
    """
    captions = metadata_captions(root)
    rows, without = [], []
    for path in videos_below(root):
        caption = captions.get(path.relative_to(root).as_posix()) or caption_beside(path, root)
        rows.append({"prompt": caption or "", "video": str(path)})
        without += [] if caption else [path]
    _refuse_uncaptioned(root, without, len(rows))
    return rows


def pair_rows(root: Path) -> list[dict[str, Any]]:
    """
    `prompt`, `chosen` and `rejected` of the folders `chosen/` and `rejected/`: `rejected/clip.mp4`, or all videos in
    `rejected/clip/`, belong to `chosen/clip.mp4`. The caption lies beside either, or in `clip.txt` of `root`.

    Raises:
        ValueError: If a chosen video has no rejected one or no caption, or a rejected one belongs to none.
    """
    captions = metadata_captions(root)
    rejected: dict[str, list[Path]] = {}
    chosen = {_key(path, root / "chosen"): path for path in videos_below(root / "chosen")}
    for path in videos_below(root / "rejected"):
        key = _key(path, root / "rejected")
        rejected.setdefault(key if key in chosen else key.rpartition("/")[0], []).append(path)
    alone = [str(path) for key, path in chosen.items() if key not in rejected]
    alone += [str(paths[0]) for key, paths in rejected.items() if key not in chosen]
    if alone:
        raise ValueError(
            f"{root}: {len(alone)} videos have no counterpart, the first is {alone[0]}. Expected rejected/NAME.mp4, "
            "or several videos in rejected/NAME/, for every chosen/NAME.mp4."
        )
    rows, without = [], []
    for key, path in chosen.items():
        names = [f"chosen/{path.relative_to(root / 'chosen').as_posix()}", path.name]
        places = [path, *rejected[key], root / path.relative_to(root / "chosen")]
        caption = next((captions[name] for name in names if name in captions), None)
        caption = caption or next(filter(None, (caption_beside(place, root) for place in places)), None)
        rows.append(
            {"prompt": caption or "", "chosen": str(path), "rejected": [str(video) for video in rejected[key]]}
        )
        without += [] if caption else [path]
    _refuse_uncaptioned(root, without, len(rows))
    return rows


def _key(path: Path, folder: Path) -> str:
    return path.relative_to(folder).with_suffix("").as_posix()


def _refuse_uncaptioned(root: Path, without: list[Path], total: int) -> None:
    if without:
        raise ValueError(
            f"{root}: {len(without)} of {total} videos have no caption, the first is {without[0]}. Write "
            f"{without[0].stem}.txt beside it, or a metadata.jsonl with 'file_name' and 'prompt' into {root}."
        )


def caption_beside(path: Path, root: Path) -> str | None:
    """
    Caption in `clip.txt` or `clip.json` (WebDataset's layout) beside `clip.mp4`, in any case of letters. A link that
    leads out of `root` is not followed: what is trained on can be published.
    """
    if not path.parent.is_dir():
        return None
    for suffix in (".txt", ".json"):
        for name in (path.stem + suffix, path.stem + suffix.upper()):
            sidecar = path.parent / name
            if not sidecar.is_file():
                continue
            if not sidecar.resolve().is_relative_to(root.resolve()):
                logger.warning("%s leads out of %s and is not read.", sidecar, root)
                continue
            return caption_in(sidecar.read_bytes(), suffix)
    return None


def caption_in(data: bytes, suffix: str) -> str | None:
    """Caption in the bytes of a `.txt` or `.json` file; None if there is none."""
    text = data.decode("utf-8-sig", "replace")
    if suffix == ".txt":
        return text.strip() or None
    try:
        return caption_of(json.loads(text))
    except json.JSONDecodeError as error:
        logger.warning("A caption is no JSON and is not used (%s): %.60r", error, text)
        return None


def caption_of(record: Any) -> str | None:
    """The first of `CAPTION_KEYS` that holds a text."""
    if not isinstance(record, Mapping):
        return None
    texts = (str(record[key]).strip() for key in CAPTION_KEYS if record.get(key))
    return next((text for text in texts if text), None)


def metadata_captions(root: Path) -> dict[str, str]:
    """`file_name` -> caption of a folder's `metadata.jsonl` or `metadata.csv`, as `videofolder` datasets have it."""
    return {
        record["file_name"]: caption
        for name in METADATA_NAMES
        for record in _records(root / name)
        if record.get("file_name") and (caption := caption_of(record))
    }


def _records(path: Path) -> Iterator[dict[str, Any]]:
    if not os.path.isfile(path):
        return
    with open(path, encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".csv":
            yield from csv.DictReader(file)
        else:
            yield from (json.loads(line) for line in file if line.strip())
