"""Load a dataset that is named on the command line: a table, a folder, tars or a Hub repository."""

import contextlib
import difflib
import glob
import json
import logging
import os
import tarfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import read_csv
from .folders import CAPTION_KEYS, VIDEO_SUFFIXES, captioned_rows, files_below, pair_rows, videos_in


if TYPE_CHECKING:
    import datasets


logger = logging.getLogger(__name__)

#: Columns whose cells are paths; relative ones start at the table.
MEDIA_COLUMNS = ("video", "chosen", "rejected", "image")
#: Suffix of a table -> builder of `datasets`.
_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_FILES = (*_BUILDERS, *VIDEO_SUFFIXES, ".tar")
#: Columns that a mapping may be meant for.
_OURS = (*MEDIA_COLUMNS, "prompt", "rejected_scores", "weight", "loss_weights", "category")
_FOLDER_BUILDERS = ("videofolder", "imagefolder", "audiofolder", "webdataset", "json", "csv", "parquet", "arrow")


def load_rows(name: str, split: str, columns: Mapping[str, str] | Sequence[str] | None = None) -> "datasets.Dataset":
    """
    The dataset that `--dataset_name`, `--dataset_split` and `--column` name.

    Args:
        name (`str`): One of

            - a table (`.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`) with paths of videos,
            - a folder of videos with captions (`clip.txt` or `clip.json` beside `clip.mp4`, or a `metadata` table),
            - a folder with `chosen/` and `rejected/` under equal names,
            - a `.tar` file in WebDataset layout, or a folder of such,
            - a folder written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`,
            - anything else that `datasets.load_dataset` knows: a repository on the Hub, a folder of tables;
              `"user/name:configuration"` of one that has several.
        split (`str`): Its split; a table, a folder of videos and tars are one.
        columns (`dict` or list of `"ours=theirs"`, *optional*): Their name of a column -> ours: `"chosen=winner"`.
            Without a column `prompt`, the only one of `caption` and `text` is taken for it.

    Returns:
        `datasets.Dataset`: Paths in `MEDIA_COLUMNS` are absolute: relative ones start at the table's folder.

    Raises:
        ValueError: If it cannot be loaded, has no such split or column, or names a file that is not there.
    """
    mapping = _mapping(columns or {})  # first: the cheapest to be wrong about
    texts = {*MEDIA_COLUMNS, *CAPTION_KEYS}
    dataset, base = _load(name, split, texts | {theirs for ours, theirs in mapping.items() if ours in texts})
    dataset = _renamed(dataset, mapping, name)
    return dataset if base is None else _with_whole_paths(dataset, base)


def _load(name: str, split: str, texts: Collection[str]) -> "tuple[datasets.Dataset, Path | None]":
    """The rows as they are stored, and the folder at which their paths start; None where `datasets` knows it."""
    import datasets

    path = Path(name)
    if path.is_file():
        return _load_file(path, texts), path.absolute().parent
    if (path / "state.json").is_file():
        return datasets.load_from_disk(name), path.absolute()
    if (path / "dataset_dict.json").is_file():
        splits = datasets.load_from_disk(name)
        if split not in splits:
            raise ValueError(f"--dataset_split: {name} has the splits {list(splits)}, got {split!r}.")
        return splits[split], path.absolute()
    if path.is_dir() and (rows := _folder_rows(path.absolute())) is not None:
        return rows, None
    if not path.exists() and name in _FOLDER_BUILDERS:
        raise ValueError(
            f"--dataset_name: {name!r} is a way of reading a folder, not a dataset. Give the folder: its layout is "
            "recognised."
        )
    if not path.exists() and path.suffix.lower() in _FILES:  # no repository ends so; asking for it takes long
        raise ValueError(f"--dataset_name: there is no file {name} (from {Path.cwd()}){_beside(path)}.")
    for table in files_below(path) if path.is_dir() else ():
        if table.suffix.lower() in _SEPARATORS:  # `datasets` shifts the cells of rows that have too many
            read_csv(table, _SEPARATORS[table.suffix.lower()])
    try:
        loaded, path = load_configuration(name, split)
    except (ConnectionError, FileNotFoundError) as error:  # DatasetNotFoundError is a FileNotFoundError
        if path.is_dir():
            raise ValueError(
                f"--dataset_name: the folder {name} holds no videos, tables or tars. Expected videos with captions "
                "(clip.mp4, clip.txt), chosen/ and rejected/ with equal names, a table (.jsonl, .csv, .parquet), or "
                ".tar files."
            ) from error
        raise ValueError(
            "--dataset_name: expected a table (.jsonl, .csv, .parquet), a folder, tars, or a dataset on the Hub, got "
            f"{name!r}, which cannot be loaded ({error}). Check the spelling, that it exists (relative paths start at "
            f"{Path.cwd()}{_beside(path)}), and for the Hub the connection, HF_HUB_OFFLINE, and `hf auth login` where "
            "the repository is private."
        ) from error
    return loaded, path.absolute() if path.is_dir() else None


def load_configuration(name: str, split: str) -> "tuple[datasets.Dataset, Path]":
    """
    A repository on the Hub or a folder that `datasets` reads, as `"name"` or `"name:configuration"`; and its path, if
    it is a folder.

    Raises:
        ValueError: If it has several configurations and none is named, no such one, or no such split.
        OSError: If there is none of that name (`FileNotFoundError`), or no connection to the Hub (`ConnectionError`).
    """
    import datasets

    place, _, configuration = (name, "", "") if Path(name).exists() else name.partition(":")
    try:
        return datasets.load_dataset(place, configuration or None, split=split), Path(place)
    except ValueError as error:
        if configuration or "config" not in str(error).lower():
            raise
        words = " ".join(str(error).partition("Example of usage")[0].split())
        raise ValueError(f"{name} has several configurations ({words}). Name one as {name}:CONFIGURATION.") from error


def _load_file(path: Path, texts: Collection[str]) -> "datasets.Dataset":
    import datasets

    suffix = path.suffix.lower()
    if suffix == ".tar":
        return _load_tars([path])
    if suffix not in _BUILDERS:
        raise ValueError(
            f"--dataset_name: {path} is a file that ends in {suffix or 'nothing'}; expected a table "
            f"({', '.join(_BUILDERS)}), a .tar in WebDataset layout, or a folder."
        )
    if suffix in _SEPARATORS:
        return _from_csv(path, texts)
    with open(path, "rb") as file:
        if not any(line.strip() for line in file):
            raise ValueError(f"--dataset_name: {path}: expected rows, got none (it is empty).")
    try:
        with _quiet():
            return datasets.load_dataset(_BUILDERS[suffix], data_files=_exactly(path), split="train")
    except datasets.exceptions.DatasetGenerationError as error:
        why = (_bad_line(path) if suffix == ".jsonl" else None) or error.__cause__
        raise ValueError(f"--dataset_name: {path} cannot be read as {suffix[1:]} ({why}).") from error
    except (StopIteration, ValueError) as error:  # of a table without rows
        why = str(error) or "it is empty"
        raise ValueError(f"--dataset_name: {path}: expected rows, got none ({why}).") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the lines that `datasets` logs of a file it cannot read: what is raised says it."""
    readers = logging.getLogger("datasets.packaged_modules")
    before = readers.level
    readers.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        readers.setLevel(before)


def _bad_line(path: Path) -> str | None:
    """What is wrong with the first line that is no JSON object, where it is one."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            try:
                is_object = not line.strip() or isinstance(json.loads(line), dict)
            except ValueError:
                is_object = False
            if not is_object:
                return f"line {number} is no JSON object: {line.strip()[:60]!r}"
    return None


def _beside(path: Path) -> str:
    """`"; did you mean 'x'?"`, or nothing where the folder of a path that is not there holds no name like it."""
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = _nearest(path.name, names)
    return f"; did you mean {str(path.parent / near)!r}?" if near else ""


def _nearest(name: str, names: Collection[str]) -> str | None:
    """The one of the names that a name was probably meant for."""
    return next(iter(difflib.get_close_matches(name, names, n=1)), None)


def _from_csv(path: Path, texts: Collection[str]) -> "datasets.Dataset":
    """
    Columns named in `texts` as they stand: the prompts "007", "NA" and "true" are words. Others as whole numbers or
    numbers where all cells are. Empty cells are None.
    """
    import datasets
    import pyarrow as pa

    suffix = path.suffix.lower()
    try:
        rows = read_csv(path, _SEPARATORS[suffix])
    except ValueError as error:
        raise ValueError(f"--dataset_name: {path} cannot be read as {suffix[1:]} ({error}).") from error
    if not rows:
        raise ValueError(f"--dataset_name: {path}: expected rows, got none.")

    def column(name: str) -> pa.Array:
        cells = pa.array([row[name] or None for row in rows], pa.string())
        for kind in () if name in texts else (pa.int64(), pa.float64()):
            with contextlib.suppress(pa.ArrowInvalid):
                return cells.cast(kind)
        return cells

    return datasets.Dataset(pa.table({name: column(name) for name in rows[0]}))


def _exactly(path: Path) -> str:
    """For `datasets`, which takes the name of a file for a pattern: `rows[1].csv` would read `rows1.csv`."""
    return glob.escape(str(path))


def _folder_rows(root: Path) -> "datasets.Dataset | None":
    """Rows of a folder of videos or tars; None if it holds tables, which `datasets` reads."""
    import datasets

    if (root / "chosen").is_dir() and (root / "rejected").is_dir():
        return datasets.Dataset.from_list(pair_rows(root))
    files = files_below(root)
    if any(path.suffix.lower() in _BUILDERS and _is_table(path) for path in files):
        return None
    if tars := [path for path in files if path.suffix.lower() == ".tar"]:
        return _load_tars(tars)
    return datasets.Dataset.from_list(captioned_rows(root, files)) if videos_in(files) else None


def _is_table(path: Path) -> bool:
    """Whether rows stand in it; `clip.json` beside `clip.mp4` is a caption."""
    beside = any(path.with_suffix(suffix).is_file() for suffix in VIDEO_SUFFIXES)
    return not (path.suffix.lower() == ".json" and beside)


def _load_tars(paths: Sequence[Path]) -> "datasets.Dataset":
    """`key.mp4` with `key.txt` or `key.json` in tars, as columns `video` and `prompt`."""
    import datasets

    try:
        with _quiet():
            loaded = datasets.load_dataset("webdataset", data_files=[_exactly(path) for path in paths], split="train")
    except (tarfile.TarError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise ValueError(
            f"--dataset_name: {paths[0]}{' or another tar' * (len(paths) > 1)} cannot be read as a tar in WebDataset "
            f"layout ({error.__cause__ or error}): it is cut, or its samples have other files than "
            "each other. Expected key.mp4 with key.txt or key.json."
        ) from error
    videos = [name for name in loaded.column_names if f".{name}" in VIDEO_SUFFIXES]
    if len(videos) != 1:
        raise ValueError(
            f"--dataset_name: expected one video of each sample in {paths[0]}, got the columns {loaded.column_names}."
        )
    loaded = loaded.rename_column(videos[0], "video")
    if not isinstance(loaded.features["video"], datasets.Video):  # plain bytes, before datasets 5
        loaded = loaded.cast_column("video", datasets.Video(decode=False))
    if "txt" in loaded.column_names:
        return loaded.rename_column("txt", "prompt")
    if "json" in loaded.column_names:
        fields = loaded.features["json"]
        key = next((key for key in CAPTION_KEYS if key in fields), None)
        if key is not None:
            return loaded.add_column("prompt", [row[key] for row in loaded["json"]])
    return loaded


def _mapping(columns: Mapping[str, str] | Sequence[str]) -> dict[str, str]:
    if isinstance(columns, Mapping):
        return dict(columns)
    for column in columns:
        if not all(column.partition("=")):
            raise ValueError(f"--column: expected OURS=THEIRS, such as chosen=winner, got {column!r}.")
        ours = column.partition("=")[0]
        if ours not in _OURS and (near := _nearest(ours, _OURS)):
            raise ValueError(f"--column {column}: no trainer reads a column {ours!r}; did you mean {near!r}?")
    return {ours: theirs for ours, _, theirs in (column.partition("=") for column in columns)}


@cache
def _tell_prompts(name: str, column: str) -> None:
    """Once: a command looks at its rows before it loads a model, and reads them again afterwards."""
    logger.info("%s: the column %r is read as 'prompt'.", name, column)


def _renamed(dataset: "datasets.Dataset", columns: Mapping[str, str], name: str) -> "datasets.Dataset":
    for ours, theirs in columns.items():
        if theirs not in dataset.column_names:
            near = _nearest(theirs, dataset.column_names)
            raise ValueError(
                f"--column {ours}={theirs}: {name} has no column {theirs!r}"
                f"{f'; did you mean {near!r}?' if near else '.'} It has {dataset.column_names}."
            )
        if ours in dataset.column_names and ours != theirs:
            dataset = dataset.remove_columns(ours)
        dataset = dataset.rename_column(theirs, ours)
    captions = [key for key in CAPTION_KEYS if key in dataset.column_names]
    if "prompt" not in captions and len(captions) == 1:
        _tell_prompts(name, captions[0])
        dataset = dataset.rename_column(captions[0], "prompt")
    return dataset


def _with_whole_paths(dataset: "datasets.Dataset", base: Path) -> "datasets.Dataset":
    for column in MEDIA_COLUMNS:
        if column not in dataset.column_names or not _holds_paths(dataset.features[column]):
            continue
        cells = [_whole(cell, base) for cell in dataset.with_format(None).select_columns(column)[column]]
        missing = [
            (row, path)
            for row, cell in enumerate(cells)
            for path in (cell if isinstance(cell, list) else [cell])
            if path is not None and not os.path.isfile(path)
        ]
        if missing:
            row, path = missing[0]
            others = f", nor do {len(missing) - 1} others" if len(missing) > 1 else ""
            raise ValueError(
                f"Row {row}: expected a file in column {column!r}, got {path}, which does not exist{others}. Relative "
                f"paths start at the table, here {base}."
            )
        feature = dataset.features[column]
        dataset = dataset.remove_columns(column).add_column(column, cells, feature=feature)
    return dataset


def _holds_paths(feature: Any) -> bool:
    """Whether cells are strings or lists of them; videos inside a table have their bytes with them."""
    import datasets

    inner = feature.feature if isinstance(feature, datasets.List | datasets.LargeList) else feature
    return isinstance(inner, datasets.Value) and inner.dtype in ("string", "large_string")


def _whole(cell: Any, base: Path) -> Any:
    """A path, or a list of them, with relative ones below `base`."""
    if isinstance(cell, list):
        return [_whole(path, base) for path in cell]
    return None if cell is None else os.path.join(base, cell)
