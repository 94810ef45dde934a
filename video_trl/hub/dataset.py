"""Export datasets with their videos to parquet, write a dataset card, and upload both to the Hub."""

import glob
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
from huggingface_hub import CommitInfo, DatasetCardData, HfApi
from markupsafe import Markup

from ..data.columns import undecoded
from ..data.images import read_image
from ..data.tables import load_rows
from ..data.video_file import VideoDecodeError, open_bytes
from ..data.video_io import decode_video
from ..files import (
    LOCK_NAME,
    atomic_file,
    fingerprint,
    hash_bytes,
    read_json,
    remove_leftovers,
    resumable_folder,
    write_json,
)
from .card import CARD_NAME, code, render, settings_table, table
from .upload import bytes_below, check_repo_id, explained, without_conflict


_VIDEO = datasets.Video(
    decode=False
)  # rows are read without a decoder; the Hub's viewer plays the column all the same
_IMAGE = datasets.Image(decode=False)
_VIDEO_COLUMNS, _IMAGE_COLUMNS = ("video", "chosen", "rejected"), ("image", "reference_image")
_TRAINERS = {"group": "VideoGroupDPO", "preference": "VideoDPO", "video": "VideoSFT"}
_MEANING = {
    "prompt": "the sentence that the videos are about",
    "video": "the video",
    "chosen": "the better video",
    "rejected": "the worse video, or a list of them",
    "rejected_scores": "a judge's scores of each rejected video, in [0, 1]: semantic adherence, physical commonsense",
    "rejected_generation": "model, revision, seed and settings that each rejected video can be made again with",
    "seeds": "seed of each rejected video",
    "generator": "model that made the rejected videos",
    "category": "kind of motion or action",
    "provenance": "where the row comes from",
}
_SHOWN_ROWS = 3
_LIST = "export.json"
_MANIFEST = "manifest.parquet"  # in the folder of a curation, whose tables are several things
_TABLE = re.compile(r"data/(.+)-\d{5}-of-\d{5}\.parquet")
_ROWS_PER_FILE, _BYTES_PER_FILE = 256, 400_000_000


def export_dataset(
    dataset: datasets.Dataset,
    folder: str | os.PathLike[str],
    *,
    name: str,
    split: str = "train",
    license: str | None = None,
    description: str = "",
    details: Mapping[str, Any] | None = None,
    media_folders: Sequence[str | os.PathLike[str]] | None = None,
    card: str | None = None,
) -> Path:
    """
    Write a dataset as a folder that can go anywhere: `data/*.parquet` with the bytes of the videos in them, a card,
    and the videos of the first rows for it. An export that was killed goes on with the files that it has written.

    Args:
        dataset (`datasets.Dataset`): Rows with videos as features of that type, or as paths in the columns `video`,
            `chosen` and `rejected`; images (`image`, `reference_image`) likewise.
        folder (`str` or `Path`): Folder to write, whole or not at all; an older export there is replaced.
        name (`str`): Title of the card: the repository's id, where it is known.
        split (`str`, defaults to `"train"`): Name of the split.
        license (`str`, *optional*): Licence identifier.
        description (`str`, *optional*): How the dataset was made.
        details (`dict`, *optional*): Table of settings and counts of that.
        media_folders (list of `str` or `Path`, *optional*): Folders that the files must lie under, links followed. By
            default all files must lie under one folder, which is neither the home folder nor one above or beside it.
        card (`str`, *optional*): The whole `README.md`, in place of the one that is made.

    Returns:
        `Path`: The folder. `export.json` in it lists the files and their hashes; [`push_dataset`] sends nothing else.

    Raises:
        ValueError: There are no rows, no videos, a file is gone, is no readable video or image, or lies elsewhere; or
            the folder holds anything but an export.
    """
    folder = Path(folder)
    features = _features(dataset)
    media = {column for column, feature in features.items() if _media_type(feature) is not None}
    if len(dataset) == 0 or not any(isinstance(_media_type(features[column]), datasets.Video) for column in media):
        raise ValueError(f"Expected rows with videos, got {len(dataset)} rows with {sorted(dataset.column_names)}.")
    _check_places(dataset, media, media_folders)
    _check_replaceable(folder)
    remove_leftovers(folder.parent)
    with resumable_folder(folder, replace=True) as partial:
        assert partial is not None
        rows = _write_shards(undecoded(dataset), features, media, partial, split)
        if card is None:
            samples = [_show(row, number, media, partial) for number, row in enumerate(rows)]
            card = dataset_card(
                dataset, features, name=name, split=split, samples=samples, license=license, description=description,
                details=details,
            )  # fmt: skip
        (partial / CARD_NAME).write_text(card, encoding="utf-8")
        write_json(partial / _LIST, {"rows": len(dataset), "files": _hashes(partial)}, indent=1)
    return folder


def push_dataset(
    dataset: datasets.Dataset | str | os.PathLike[str],
    repo_id: str,
    *,
    folder: str | os.PathLike[str] | None = None,
    private: bool | None = None,
    token: str | None = None,
    **card: Any,
) -> CommitInfo:
    """
    Upload a dataset to the Hub as [`export_dataset`] writes it; the repository is made where needed.

    `load_dataset(repo_id, split="train")` gives it back on any machine, and every trainer takes it as it is.

    Args:
        dataset (`datasets.Dataset`, `str` or `Path`): The rows, a folder that `save_to_disk` wrote, one with tables
            (`.parquet`) such as the `pairs` of a curation, or one that [`export_dataset`] wrote.
        repo_id (`str`): Repository, `"user/name"`.
        folder (`str` or `Path`, *optional*): Where to write the files, and to leave them; a temporary one by default.
        private (`bool`, *optional*): Visibility of a new repository; the account's default.
        token (`str`, *optional*): Access token; the one logged in with.
        **card: `split`, `license`, `description`, `details`, `media_folders` and `card` of [`export_dataset`].

    Returns:
        `huggingface_hub.CommitInfo`: The commit, with its URL.

    Raises:
        ValueError: As [`export_dataset`], the id is none, the folder holds no dataset, or an export that is not whole
            or was changed, or one and something for its card, which it has; or the repository holds another split.
            Raised before anything is sent.
        HubUploadError: The Hub refused, or cannot be reached.
    """
    check_repo_id(repo_id)
    with tempfile.TemporaryDirectory(prefix="video-trl-export-") as temporary:
        if isinstance(dataset, datasets.Dataset):
            exported = export_dataset(dataset, folder or temporary, name=repo_id, **card)
        elif (Path(dataset) / _LIST).is_file() or (Path(dataset) / CARD_NAME).is_file():
            exported = Path(dataset)
            _check_export(exported)
            if idle := sorted(name for name, value in card.items() if value):
                raise ValueError(f"{exported} has its card: {idle} would change nothing. Export it again with them.")
        elif (Path(dataset) / "state.json").is_file():
            rows = datasets.load_from_disk(str(dataset))
            exported = export_dataset(rows, folder or temporary, name=repo_id, **card)
        elif any(Path(dataset).glob("*.parquet")) and not (Path(dataset) / _MANIFEST).is_file():
            rows = load_rows(str(dataset), "train")
            exported = export_dataset(rows, folder or temporary, name=repo_id, **card)
        else:
            raise ValueError(
                f"{dataset} holds no dataset: expected a folder that `Dataset.save_to_disk` or `export_dataset` "
                "wrote, or one with tables (.parquet)."
            )

        def send() -> CommitInfo:
            api = HfApi(token=token)
            repository = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True).repo_id
            _check_splits(_listed(exported), api.list_repo_files(repository, repo_type="dataset"), repository)
            return without_conflict(
                lambda: api.upload_folder(
                    repo_id=repository,
                    repo_type="dataset",
                    folder_path=exported,
                    commit_message="Upload a dataset with video_trl",
                    allow_patterns=[glob.escape(name) for name in _listed(exported)],
                    delete_patterns=["data/*.parquet", "samples/*"],
                )
            )

        place = f"The files are in {exported}. " if str(exported) != temporary else "The dataset is as it was. "
        way_out = f"{place}Call `push_dataset` again later; what was sent is not sent twice."
        return explained(send, way_out, bytes_below(exported))


def _check_splits(files: Iterable[str], there: Iterable[str], repository: str) -> None:
    """Raise a `ValueError` if a repository holds another split than an export: its tables would be deleted."""
    ours, theirs = ({match[1] for name in names if (match := _TABLE.fullmatch(name))} for names in (files, there))
    if others := sorted(theirs - ours):
        raise ValueError(
            f"{repository} holds the splits {others}, which this upload of {sorted(ours)} would delete. Name another "
            "repository, or delete their tables there first."
        )


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(
        path for path in folder.rglob("*") if path.is_file() and path.name != _LIST and not path.name.startswith(".")
    )
    return {path.relative_to(folder).as_posix(): fingerprint(path) for path in files}


def _check_replaceable(folder: Path) -> None:
    """
    Raises:
        ValueError: A file in the folder is none that [`export_dataset`] has written, or the card was edited.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, and an export is a folder. Pass a new folder.")
    listed = _listed(folder)
    card = folder / CARD_NAME
    if card.is_file() and listed.get(CARD_NAME, edited := fingerprint(card)) != edited:
        raise ValueError(f"{card} was edited, which would be lost. Pass its text as `card`, or a new folder.")
    own = {_LIST, LOCK_NAME, *listed}
    files = (path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir())
    for name in (path.relative_to(folder).as_posix() for path in files):
        if name not in own:
            raise ValueError(f"{folder} holds more than an export ({name}), which would be lost. Pass a new folder.")


def _listed(folder: Path) -> dict[str, str]:
    """Files and their hashes as the list of an export has them; nothing where there is no list."""
    return read_json(folder / _LIST)["files"] if (folder / _LIST).is_file() else {}


def _check_export(folder: Path) -> None:
    """
    Raises:
        ValueError: The folder is not what [`export_dataset`] wrote.
    """
    listed = _listed(folder)
    found = _hashes(folder)
    wrong = sorted(name for name in listed.keys() | found.keys() if listed.get(name) != found.get(name))
    if wrong or not listed:
        raise ValueError(
            f"{folder} is no whole export: {wrong[0] if wrong else _LIST} is missing, was changed, or does not belong "
            f"to it ({len(wrong)} files in all). Call `export_dataset` again."
        )


def _check_places(
    dataset: datasets.Dataset, media: set[str], folders: Sequence[str | os.PathLike[str]] | None
) -> None:
    """
    Raises:
        ValueError: A file that a row names lies outside the folders, or the files have no folder of their own.
    """
    paths: dict[Path, tuple[int, Path]] = {}  # by folder, one file of each
    cells = undecoded(dataset.select_columns(sorted(media)))
    for number in range(len(cells)):
        row = cells[number]
        for cell in (cell for value in row.values() for cell in (value if isinstance(value, list) else [value])):
            path, content = (cell, None) if not isinstance(cell, Mapping) else (cell["path"], cell["bytes"])
            if path and content is None:
                real = Path(path).resolve()
                paths.setdefault(real.parent, (number, real))
    if not paths:
        return
    if folders is None:
        shared = Path(os.path.commonpath(paths))
        if Path.home().is_relative_to(shared) or len(shared.parts) < 3:
            places = ", ".join(f"{path} (row {row})" for row, path in list(paths.values())[:5])
            raise ValueError(
                f"The files have no folder of their own: {places}. If all of them are to be published, name their "
                "folders in `media_folders`."
            )
        return
    allowed = [Path(folder).resolve() for folder in folders]
    for number, path in paths.values():
        if not any(path.is_relative_to(folder) for folder in allowed):
            raise ValueError(f"Row {number}: {path} lies outside {[str(folder) for folder in allowed]}.")


def dataset_card(
    dataset: datasets.Dataset,
    features: datasets.Features,
    *,
    name: str,
    split: str,
    samples: Sequence[Mapping[str, Any]],
    license: str | None,
    description: str,
    details: Mapping[str, Any] | None,
) -> str:
    """README of a dataset: front matter for the Hub's viewer, counts, columns, some rows, and how to train on it."""
    columns = dataset.column_names
    row_type = "video" if "chosen" not in columns else "preference"
    counts = {"rows": len(dataset)}
    if isinstance(features.get("rejected"), datasets.List):
        row_type = "group"
        sizes = Counter(len(row) for row in dataset.select_columns("rejected").with_format("arrow")["rejected"])
        counts |= {f"rows with {size} rejected videos": number for size, number in sorted(sizes.items())}
    if "generator" in columns:
        counts |= {f"made by {generator}": number for generator, number in Counter(dataset["generator"]).most_common()}
    front_matter = DatasetCardData(
        license=license,
        task_categories=["text-to-video", *(["image-to-video"] if set(_IMAGE_COLUMNS) & set(columns) else [])],
        tags=["video-trl", row_type, "video", *(["preference"] if row_type != "video" else [])],
        size_categories=_size(len(dataset)),
        pretty_name=Path(name).name,
        configs=[{"config_name": "default", "data_files": [{"split": split, "path": f"data/{split}-*"}]}],
    )
    kinds = [
        {"column": Markup(code(column)), "type": _kind(feature), "what": _MEANING.get(column, "")}
        for column, feature in features.items()
    ]
    return render(
        "dataset_card.md",
        front_matter=f"---\n{front_matter.to_yaml()}\n---",
        title=Path(name).name,
        name=name,
        split=split,
        trainer=_TRAINERS[row_type],
        description=description,
        counts=settings_table(counts),
        columns=table(kinds),
        samples=samples,
        details=settings_table(details),
        license=license,
    )


def _features(dataset: datasets.Dataset) -> datasets.Features:
    """The features of the export: undecoded videos and images where there were paths or decoders."""
    features = datasets.Features(dict(dataset.features))
    for column, feature in dataset.features.items():
        several = isinstance(feature, datasets.List | datasets.LargeList)
        inner = feature.feature if several else feature
        is_text = isinstance(inner, datasets.Value) and inner.dtype in ("string", "large_string")
        kind = None
        if isinstance(inner, datasets.Video) or (is_text and column in _VIDEO_COLUMNS):
            kind = _VIDEO
        elif isinstance(inner, datasets.Image) or (is_text and column in _IMAGE_COLUMNS):
            kind = _IMAGE
        if kind is not None:
            features[column] = datasets.List(kind) if several else kind
    return features


def _media_type(feature: Any) -> datasets.Video | datasets.Image | None:
    inner = feature.feature if isinstance(feature, datasets.List) else feature
    return inner if isinstance(inner, datasets.Video | datasets.Image) else None


def _write_shards(
    dataset: datasets.Dataset, features: datasets.Features, media: set[str], folder: Path, split: str
) -> list[dict[str, Any]]:
    """
    Write the rows with the bytes of their files, as many in a file as it should hold. What an export before this one
    has written of the same rows and files stays as it is. Returns the first rows, with their files, for the card.
    """
    data = folder / "data"
    data.mkdir(exist_ok=True)
    shown: list[dict[str, Any]] = []
    written: list[Path] = []
    for first, rows in _shards(dataset, media):
        path = data / f"{split}-{len(written):05d}.{_identity(rows, media, features)}.parquet"
        if not shown:
            shown = [_embed(row, number, media) for number, row in enumerate(rows[:_SHOWN_ROWS])]
        if not path.exists():
            embedded = [_embed(row, first + number, media) for number, row in enumerate(rows)]
            content = datasets.Dataset.from_list(embedded, features=features)
            with atomic_file(path) as partial:
                pq.write_table(content.with_format("arrow")[:], partial, row_group_size=16)
        written.append(path)
    for other in set(data.iterdir()) - set(written):
        other.unlink()
    for number, path in enumerate(written):
        path.rename(data / f"{split}-{number:05d}-of-{len(written):05d}.parquet")
    return shown


def _shards(dataset: datasets.Dataset, media: set[str]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Rows, as many at a time as one parquet file should hold with their files, and the number of the first."""
    rows: list[dict[str, Any]] = []
    first = size = 0
    for number, row in enumerate(dataset):
        rows.append(row)
        size += sum(_file_state(cell, number)[1] for cell in _cells(row, media))
        if len(rows) == _ROWS_PER_FILE or size > _BYTES_PER_FILE:
            yield first, rows
            first, rows, size = number + 1, [], 0
    if rows:
        yield first, rows


def _cells(row: Mapping[str, Any], media: set[str]) -> list[Any]:
    """The files of a row, as the dataset has them."""
    columns = [row[column] for column in sorted(media & row.keys())]
    cells = [cell for column in columns for cell in (column if isinstance(column, list) else [column])]
    return [cell for cell in cells if cell is not None]


def _identity(rows: Sequence[Mapping[str, Any]], media: set[str], features: datasets.Features) -> str:
    """Hash of rows: equal ones, with files that have not changed since, give equal parquet files."""
    plain = [{name: value for name, value in row.items() if name not in media} for row in rows]
    states = [_file_state(cell, number) for number, row in enumerate(rows) for cell in _cells(row, media)]
    return fingerprint(str(features), plain, states)


def _file_state(cell: Any, row: int) -> tuple[str, int, int]:
    """Name or hash, size, and time of change of a file."""
    path, content = (cell, None) if isinstance(cell, str) else (cell["path"], cell["bytes"])
    if content is not None:
        return hash_bytes(content), len(content), 0
    try:
        status = os.stat(path)
    except OSError as error:
        raise _unreadable(path, row, error) from error
    return os.path.abspath(path), status.st_size, status.st_mtime_ns


def _embed(row: Mapping[str, Any], number: int, media: set[str]) -> dict[str, Any]:
    """A row with the bytes of its files."""
    embedded = dict(row)
    for column in media & row.keys():
        several = isinstance(row[column], list)
        cells = [
            _embedded(cell, f"{number:06d}-{column}-{k}" if several else f"{number:06d}-{column}", number, column)
            for k, cell in enumerate(row[column] if several else [row[column]])
        ]
        embedded[column] = cells if several else cells[0]
    return embedded


def _embedded(cell: Any, name: str, row: int, column: str) -> dict[str, Any] | None:
    """A file as its bytes and a name that ends as the file does; none of the machine's folders."""
    if cell is None:
        return None
    path, content = (cell, None) if isinstance(cell, str) else (cell["path"], cell["bytes"])
    if content is None:
        try:
            with open_bytes(path) as file:
                content = file.read()
        except VideoDecodeError as error:
            raise _unreadable(path, row, error) from error
    try:
        if column in _IMAGE_COLUMNS:
            read_image({"bytes": content, "path": path})
        else:
            for _ in decode_video({"bytes": content, "path": path}):  # to its end, which may be damaged
                pass
    except ValueError as error:
        raise ValueError(
            f"Row {row}: {path or 'the content'} of the column {column!r} is no readable video or image, and is not "
            f"published ({error}). Drop the row."
        ) from error
    ending = Path(path).suffix if path else (".mp4" if content[4:8] == b"ftyp" else ".png")
    return {"bytes": content, "path": name + ending}


def _unreadable(path: str, row: int, error: Exception) -> ValueError:
    return ValueError(f"Row {row}: the file {path} cannot be read ({error}). Put it back, or drop the row.")


def _show(row: Mapping[str, Any], number: int, media: set[str], folder: Path) -> dict[str, Any]:
    """A row for the card: its prompt, and the paths of its videos, which are written."""
    paths = {}
    for column in sorted(media & row.keys()):
        for k, cell in enumerate(row[column] if isinstance(row[column], list) else [row[column]]):
            if cell is None or not cell["path"].endswith((".mp4", ".webm", ".mov", ".mkv")):
                continue
            label = f"{column} {k + 1}" if isinstance(row[column], list) else column
            path = folder / "samples" / f"row_{number}_{label.replace(' ', '_')}{Path(cell['path']).suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(cell["bytes"])
            paths[label] = str(path.relative_to(folder))
    return {"prompt": row.get("prompt", ""), "videos": paths}


def _kind(feature: Any) -> str:
    if isinstance(feature, datasets.List):
        return f"list of {_kind(feature.feature)}"
    if isinstance(feature, dict):
        return ", ".join(f"{name}: {_kind(inner)}" for name, inner in feature.items())
    return str(feature.dtype) if isinstance(feature, datasets.Value) else type(feature).__name__.lower()


def _size(rows: int) -> str:
    edges = [(1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M")]
    return next((text for edge, text in edges if rows < edge), "n>1M")
