"""Row types of datasets: the columns that each trainer needs, checked before any expensive work."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any, Protocol, runtime_checkable

import datasets
import numpy as np
import torch


#: Columns that a raw dataset of each row type must have.
ROW_TYPES: dict[str, tuple[str, ...]] = {
    "video": ("prompt", "video"),
    "preference": ("prompt", "chosen", "rejected"),
    "group": ("prompt", "chosen", "rejected"),
}
#: Columns that the same dataset has once its videos and prompts are encoded.
ENCODED_COLUMNS: dict[str, tuple[str, ...]] = {
    "video": ("latents", "prompt_embeds"),
    "preference": ("chosen_latents", "rejected_latents", "prompt_embeds"),
    "group": ("chosen_latents", "rejected_latents", "prompt_embeds"),
}
OPTIONAL_GROUP_FEATURES: dict[str, Any] = {
    "category": datasets.Value("string"),
    "seeds": datasets.List(datasets.Value("int64")),
    "generator": datasets.Value("string"),
    "provenance": datasets.Value("string"),
}


class MapDataset(Protocol):
    """What the trainers read: a `datasets.Dataset`, an `EncodedDataset`, or a list of dicts."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


@runtime_checkable
class IndexedRows(Protocol):
    """Rows with an index, which says without a tensor how many rejected videos they have, and the judge's scores."""

    def rejected_counts(self) -> list[int]: ...

    def rejected_scores(self) -> Iterator[Any]: ...

    def scores_are_whole(self) -> bool: ...

    def loss_weights(self) -> Iterator[Any]: ...


@runtime_checkable
class NamedColumns(Protocol):
    """Rows that say which columns they have; in some rows cells may be empty, the first one included."""

    @property
    def column_names(self) -> list[str]: ...


@runtime_checkable
class Fingerprinted(Protocol):
    """Rows that are named by a hash of all that they depend on; none where that is not known."""

    @property
    def fingerprint(self) -> str | None: ...


def fingerprint_of(dataset: MapDataset) -> str | None:
    """A name for the content of a dataset: equal ones have equal rows. `None` where it has none."""
    if isinstance(dataset, datasets.Dataset):
        return dataset._fingerprint
    return dataset.fingerprint if isinstance(dataset, Fingerprinted) else None


def column_names(dataset: MapDataset) -> list[str]:
    """Columns that a dataset shows: those that it names, the keys in a list, else those of its first row."""
    if isinstance(dataset, datasets.Dataset):
        shown = dataset.format
        return list(dataset.column_names if shown["output_all_columns"] else shown["columns"])
    _check_kind(dataset)
    if isinstance(dataset, NamedColumns):
        return list(dataset.column_names)
    if isinstance(dataset, list):
        return list(dict.fromkeys(name for row in dataset for name in row))
    return list(dataset[0]) if len(dataset) else []


def is_encoded(dataset: MapDataset, row_type: str) -> bool:
    """Whether the dataset carries latents and prompt embeddings instead of videos and prompts."""
    return set(ENCODED_COLUMNS[_known(row_type)]) <= set(column_names(dataset))


def group_features(*optional: str) -> datasets.Features:
    """
    Features of a raw group dataset: `prompt`, `chosen`, `rejected`, `rejected_scores`, plus the optional columns named
    (any of `"category"`, `"seeds"`, `"generator"`, `"provenance"`).

    Videos stay undecoded (`Video(decode=False)`), so that a row is read without a video decoder.
    """
    unknown = sorted(set(optional) - set(OPTIONAL_GROUP_FEATURES))
    if unknown:
        raise ValueError(f"Unknown optional columns {unknown}; expected some of {sorted(OPTIONAL_GROUP_FEATURES)}.")
    scores = {"sa": datasets.Value("float32"), "pc": datasets.Value("float32")}
    return datasets.Features(
        {
            "prompt": datasets.Value("string"),
            "chosen": datasets.Video(decode=False),
            "rejected": datasets.List(datasets.Video(decode=False)),
            "rejected_scores": datasets.List(scores),
            **{name: OPTIONAL_GROUP_FEATURES[name] for name in optional},
        }
    )


def undecoded(dataset: MapDataset) -> MapDataset:
    """
    The same rows with videos and images as `{"path", "bytes"}`: decoding is up to `read_video` and `read_image`, and
    formats are dropped, but for the choice of columns.

    Raises:
        ValueError: If the dataset has a transform, which would be dropped too.
    """
    if not isinstance(dataset, datasets.Dataset):
        return dataset
    _refuse_transform(dataset)
    plain = dataset.with_format(None).select_columns(column_names(dataset))
    for column, feature in plain.features.items():
        if isinstance(feature, datasets.Video) and feature.decode:
            plain = plain.cast_column(column, datasets.Video(decode=False))
        elif isinstance(feature, datasets.Image) and feature.decode:
            plain = plain.cast_column(column, datasets.Image(decode=False))
        elif isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Video):
            if feature.feature.decode:
                plain = plain.cast_column(column, datasets.List(datasets.Video(decode=False)))
    return plain


def as_videos(cell: Any) -> list[Any]:
    """The videos of a `rejected` cell as a list: m of them, or the single one of a preference row."""
    if isinstance(cell, np.ndarray):
        return list(cell) if cell.ndim == 5 else [cell]
    if not isinstance(cell, (list, tuple)):
        return [cell]
    if cell and isinstance(cell[0], (list, tuple)):  # frames as nested lists, from an array column
        frames = np.asarray(cell, dtype=np.uint8)
        return list(frames) if frames.ndim == 5 else [frames]
    return list(cell)


def as_scores(cell: Any) -> np.ndarray:
    """
    A `rejected_scores` cell as float32 of shape `(m, 2)`, columns `sa` and `pc`.

    Accepts a list of `{"sa", "pc"}`, one such dict (m = 1) or one of lists (as `datasets.Sequence` makes of it), or
    numbers of shape `(m, 2)`. A missing value becomes NaN.
    """
    if isinstance(cell, Mapping):
        values = [cell.get("sa"), cell.get("pc")]
        in_lists = all(isinstance(value, (list, tuple, np.ndarray)) for value in values)
        cell = [{"sa": sa, "pc": pc} for sa, pc in zip(*values, strict=True)] if in_lists else [cell]
    if isinstance(cell, (list, tuple)) and any(isinstance(score, Mapping) or score is None for score in cell):
        cell = [[(score or {}).get("sa"), (score or {}).get("pc")] for score in cell]
        cell = [[math.nan if value is None else value for value in pair] for pair in cell]
    scores = np.asarray(cell, dtype=np.float32)
    return scores.reshape(-1, 2) if scores.size == 0 or scores.ndim == 2 and scores.shape[1] == 2 else scores


def check_columns(
    dataset: MapDataset, row_type: str, *, physics_rewarding: bool = False, pair_weights: bool = False
) -> None:
    """
    Check that a dataset, raw or encoded, can feed a trainer. Reads no pixels.

    Args:
        dataset (`datasets.Dataset`, `EncodedDataset` or list of dicts): What to check.
        row_type (`str`): `"video"`, `"preference"` or `"group"`.
        physics_rewarding (`bool`, defaults to `False`): Whether `rejected_scores` must be there.

        pair_weights (`bool`, defaults to `False`): Whether `weight` must be there.

    Raises:
        ValueError: Not one dataset (a name, several splits, a stream), zero rows, a missing column or cell, an empty
            `rejected` list or a None in it, rows with different numbers of rejected videos, scores missing where they
            are used, outside [0, 1] or of another number than the rejected videos. Names the row, what was expected,
            what was found and the way out.
    """
    _known(row_type)
    _check_kind(dataset)
    if len(dataset) == 0:
        raise ValueError(f"Expected a {row_type} dataset with at least one row, got zero rows. Check path and split.")
    columns, encoded = column_names(dataset), is_encoded(dataset, row_type)
    missing = [] if encoded else [name for name in ROW_TYPES[row_type] if name not in columns]
    if missing:
        if "rejected" in missing and "video" in columns:
            raise ValueError(
                f"A {row_type} dataset needs rejected videos beside each chosen one, got the columns {columns}. Lay "
                "them out as chosen/ and rejected/ with equal names, or let `video-trl curate gt-pairs` make them "
                "(docs/data/dataset_formats.md)."
            )
        old = "chosen" if missing == ["video"] and "chosen" in columns else "old"  # of pairs, the better videos
        raise ValueError(
            f"A {row_type} dataset needs the columns {list(ROW_TYPES[row_type])} (or, encoded, "
            f"{list(ENCODED_COLUMNS[row_type])}), got {columns}; missing: {missing}. Rename yours with "
            f"`dataset.rename_column({old!r}, {missing[0]!r})`, on the command line with "
            f"`--column {missing[0]}={old}`."
        )
    if not encoded:
        _check_present(dataset, "prompt")
        _check_prompts(dataset)
        _check_present(dataset, "video" if row_type == "video" else "chosen")
    if row_type == "video":
        return
    counts = _rejected_counts(dataset, "rejected_latents" if encoded else "rejected")
    _check_counts(counts)
    if not encoded:
        _check_rejected(dataset)
    _check_scores(dataset, counts, columns, required=physics_rewarding)
    if "loss_weights" in columns:
        _check_loss_weights(dataset)
    if pair_weights:
        _check_weights(dataset, columns)


def _known(row_type: str) -> str:
    if row_type not in ROW_TYPES:
        raise ValueError(f"Unknown row type {row_type!r}; expected one of {sorted(ROW_TYPES)}.")
    return row_type


def _check_kind(dataset: Any) -> None:
    """One dataset with a length: no name of one, no dictionary of splits, no stream."""
    if isinstance(dataset, (str, os.PathLike)):
        name = os.fspath(dataset)
        raise ValueError(
            f"Expected a dataset, got the name {name!r}. Load it first: `datasets.load_dataset({name!r}, "
            'split="train")`, or `datasets.load_from_disk` for a folder written by `save_to_disk`.'
        )
    if isinstance(dataset, datasets.Dataset):
        _refuse_transform(dataset)
    if isinstance(dataset, dict):  # a `DatasetDict` is one
        splits = list(dataset)
        example = splits[0] if splits else "train"
        raise ValueError(
            f"Expected one dataset, got a {type(dataset).__name__} with the splits {splits}. Pass one of them, e.g. "
            f"`dataset[{example!r}]`, or name it when loading: `datasets.load_dataset(..., split={example!r})`."
        )
    if isinstance(dataset, datasets.IterableDataset):
        raise ValueError(
            "Expected a dataset with a length, got a streaming one. Load it without `streaming=True`: its videos are "
            "encoded once, before training, and a run can then be resumed exactly."
        )
    if not isinstance(dataset, Sized):
        raise ValueError(
            f"Expected a dataset with a length, got a {type(dataset).__name__}. Make a list of its rows, or a "
            "`datasets.Dataset` with `Dataset.from_generator`."
        )


def _refuse_transform(dataset: datasets.Dataset) -> None:
    if dataset.format["type"] == "custom":
        raise ValueError(
            "The dataset has a transform (`set_transform` or `with_transform`), which is a function of the rows that "
            "are shown, and not of those that are encoded and checked. Apply it for good: `dataset.map(function)`."
        )


def cells(dataset: MapDataset, column: str) -> Iterator[Any]:
    """One column of all rows; the scores of encoded data come from the index, without a tensor being read."""
    if isinstance(dataset, datasets.Dataset):
        yield from dataset.select_columns(column)[column]
    elif isinstance(dataset, IndexedRows) and column == "rejected_scores":
        yield from dataset.rejected_scores()
    elif isinstance(dataset, IndexedRows) and column == "loss_weights":
        yield from dataset.loss_weights()
    else:
        for row in range(len(dataset)):
            yield dataset[row].get(column)


def _arrow_cells(dataset: datasets.Dataset, column: str) -> Iterator[Any]:
    """A column as Arrow arrays: nothing is decoded, and video bytes stay on the disk."""
    for table in dataset.select_columns(column).with_format("arrow").iter(batch_size=1000):
        yield table[column].combine_chunks()


def _check_present(dataset: MapDataset, column: str) -> None:
    if isinstance(dataset, datasets.Dataset):
        nulls: Iterator[bool] = (
            null for chunk in _arrow_cells(dataset, column) for null in chunk.is_null().to_pylist()
        )
    else:
        nulls = (cell is None for cell in cells(dataset, column))
    for row, null in enumerate(nulls):
        if null:
            raise ValueError(
                f"Row {row}: expected a value in column '{column}', got none. Fill it in or drop the row with "
                f"`dataset.filter`."
            )


def _check_prompts(dataset: MapDataset) -> None:
    for row, prompt in enumerate(cells(dataset, "prompt")):
        if not isinstance(prompt, str):
            kind = type(prompt).__name__
            raise ValueError(f"Row {row}: expected a string in column 'prompt', got {kind}. Keep only the text.")


def _rejected_counts(dataset: MapDataset, column: str) -> list[int]:
    """Number of rejected videos of each row."""
    if isinstance(dataset, IndexedRows):
        return dataset.rejected_counts()
    feature = dataset.features[column] if isinstance(dataset, datasets.Dataset) else None
    if column == "rejected" and feature and not isinstance(feature, (datasets.List, datasets.LargeList)):
        return [1] * len(dataset)
    if isinstance(dataset, datasets.Dataset) and isinstance(feature, (datasets.List, datasets.LargeList)):
        chunks = _arrow_cells(dataset, column)
        return [length or 0 for chunk in chunks for length in chunk.value_lengths().to_pylist()]
    if column == "rejected":
        return [0 if cell is None else len(as_videos(cell)) for cell in cells(dataset, column)]
    return [0 if cell is None else len(cell) for cell in cells(dataset, column)]


def num_rejected(dataset: MapDataset) -> int:
    """Rejected videos of the first row of a group or preference dataset, raw or encoded; no pixels are read."""
    return _rejected_counts(dataset, "rejected_latents" if is_encoded(dataset, "group") else "rejected")[0]


def _check_rejected(dataset: MapDataset) -> None:
    for row, index in _missing_rejected(dataset):
        raise ValueError(
            f"Row {row}: expected a video in rejected[{index}], got none. Fill it in, or drop the row with "
            "`dataset.filter(lambda row: None not in row['rejected'])`."
        )


def _missing_rejected(dataset: MapDataset) -> Iterator[tuple[int, int]]:
    """Row and index of each rejected video that is None."""
    if not isinstance(dataset, datasets.Dataset):
        for row, cell in enumerate(cells(dataset, "rejected")):
            videos = cell if isinstance(cell, (list, tuple)) else [cell]
            yield from ((row, index) for index, video in enumerate(videos) if video is None)
        return
    is_list = isinstance(dataset.features["rejected"], (datasets.List, datasets.LargeList))
    first = 0
    for chunk in _arrow_cells(dataset, "rejected"):
        lengths = [length or 0 for length in chunk.value_lengths().to_pylist()] if is_list else [1] * len(chunk)
        nulls = iter((chunk.flatten() if is_list else chunk).is_null().to_pylist())
        for row, length in enumerate(lengths, start=first):
            yield from ((row, index) for index in range(length) if next(nulls))
        first += len(lengths)


def _check_counts(counts: Sequence[int]) -> None:
    for row, count in enumerate(counts):
        if count == 0:
            raise ValueError(
                f"Row {row}: expected at least one rejected video, got an empty list. Drop the row with "
                "`dataset.filter(lambda row: len(row['rejected']) > 0)`."
            )
        if count != counts[0]:
            raise ValueError(
                f"Row {row}: expected {counts[0]} rejected videos as in row 0, got {count}. Keep the same number in "
                f"every row, e.g. the first {min(count, counts[0])}."
            )


def _check_scores(dataset: MapDataset, counts: Sequence[int], columns: Sequence[str], *, required: bool) -> None:
    advice = (
        "Judge the rejected videos first, or set `physics_rewarding=False`."
        if required
        else "This run does not use them: `dataset.remove_columns('rejected_scores')`."
    )
    if "rejected_scores" not in columns:
        if required:
            raise ValueError(
                "`physics_rewarding` needs the column 'rejected_scores' (per rejected video 'sa' and 'pc' in [0, 1]), "
                f"got {list(columns)}. {advice}"
            )
        return
    if isinstance(dataset, IndexedRows) and dataset.scores_are_whole():  # a million rows at once
        return
    for row, cell in enumerate(cells(dataset, "rejected_scores")):
        if cell is None:
            if required:
                raise ValueError(f"Row {row}: expected scores of {counts[row]} rejected videos, got none. {advice}")
            continue
        try:
            scores = as_scores(cell)
        except (TypeError, ValueError) as error:
            raise ValueError(f"Row {row}: 'rejected_scores' must be numbers, got {cell!r}. {advice}") from error
        if scores.shape != (counts[row], 2):
            raise ValueError(
                f"Row {row}: expected (sa, pc) of each of the {counts[row]} rejected videos, got scores of shape "
                f"{scores.shape}. {advice}"
            )
        wrong = ~((scores >= 0) & (scores <= 1))  # NaN, a missing score, too
        if not required:
            wrong &= ~np.isnan(scores)
        if wrong.any():
            index, column = np.argwhere(wrong)[0]
            raise ValueError(
                f"Row {row}: '{('sa', 'pc')[column]}' of rejected[{index}] is {scores[index, column]:g}, expected a "
                f"number in [0, 1]. Rescale what the judge returned (1..5 -> (score - 1) / 4). {advice}"
            )


def _check_weights(dataset: MapDataset, columns: Sequence[str]) -> None:
    if "weight" not in columns:
        raise ValueError(
            f"`pair_weights` needs the column 'weight', a positive number a row, got {list(columns)}. "
            "`video-trl curate self-pairs` writes it; or leave the option off."
        )
    for row, cell in enumerate(cells(dataset, "weight")):
        if not isinstance(cell, (int, float)) or not 0 < cell < math.inf:
            raise ValueError(f"Row {row}: 'weight' must be a positive, finite number, got {cell!r}.")


def as_loss_weights(cell: Any) -> np.ndarray:
    """A `loss_weights` cell as float32 of shape `(F,)` or `(F, H, W)`."""
    return np.asarray(cell, dtype=np.float32)


def _check_loss_weights(dataset: MapDataset) -> None:
    for row, cell in enumerate(cells(dataset, "loss_weights")):
        if cell is None:
            continue
        try:
            weights = as_loss_weights(cell)
        except (TypeError, ValueError) as error:
            raise ValueError(f"Row {row}: 'loss_weights' must be numbers of one shape: {error}") from error
        if weights.ndim not in (1, 3) or not np.isfinite(weights).all() or not weights.any():
            raise ValueError(
                f"Row {row}: expected 'loss_weights' of shape (F,), one number a latent frame, or (F, H, W), one an "
                f"element of the latents' grid, finite and not all 0; got shape {weights.shape}. Drop the row, or "
                "leave its cell empty for weights of 1."
            )


def as_tensor(value: Any) -> torch.Tensor:
    """A cell with latents or embeddings as a tensor; numbers without a floating dtype become float32."""
    tensor = torch.as_tensor(value)
    return tensor if tensor.is_floating_point() and isinstance(value, (torch.Tensor, np.ndarray)) else tensor.float()
