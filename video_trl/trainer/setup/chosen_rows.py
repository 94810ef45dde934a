"""Use the chosen videos of preference or group rows as video rows, for trainers that learn from one video a row."""

from collections.abc import Mapping
from typing import Any

import datasets

from ...data import column_names
from ...data.columns import MapDataset, fingerprint_of
from ...files import fingerprint


_CHOSEN = {"chosen": "video", "chosen_latents": "latents"}


class _ChosenRows:
    """Rows of a group or preference dataset that is not a `datasets.Dataset`, as video rows."""

    def __init__(self, rows: MapDataset) -> None:
        self.made_of = rows

    def __len__(self) -> int:
        return len(self.made_of)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        row = self.made_of[index]
        return {_CHOSEN.get(name, name): value for name, value in row.items() if not _is_rejected(name)}

    @property
    def column_names(self) -> list[str]:
        return [_CHOSEN.get(name, name) for name in column_names(self.made_of) if not _is_rejected(name)]

    @property
    def fingerprint(self) -> str | None:
        rows = fingerprint_of(self.made_of)
        return None if rows is None else fingerprint("chosen", rows)


def chosen_as_video(dataset: MapDataset) -> MapDataset:
    """The chosen videos of a group or preference dataset as video rows; any other dataset as it is."""
    if isinstance(dataset, datasets.IterableDataset):  # refused by the check of columns, which says why
        return dataset
    columns = set(column_names(dataset))
    if columns & {"video", "latents"} or not columns & set(_CHOSEN):
        return dataset
    if isinstance(dataset, datasets.Dataset):
        remaining = dataset.remove_columns([name for name in columns if _is_rejected(name)])
        return remaining.rename_columns({name: ours for name, ours in _CHOSEN.items() if name in columns})
    return _ChosenRows(dataset)


def _is_rejected(name: str) -> bool:
    return name.startswith("rejected")
