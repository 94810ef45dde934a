"""
The index of an encoded dataset: Arrow tables that are mapped into memory, so that a million rows open at once.

`tensors.arrow` says of each tensor its name, shard and checksum; `rows.arrow` which of them a row has, by their number
in that table, beside its prompt, scores and weight, and which form: the shapes of its tensors.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...files import file_checksum, write_atomically


ROWS_NAME, TENSORS_NAME = "rows.arrow", "tensors.arrow"
_CHUNK = 1 << 16  # rows: what is read of a column at once
_OTHER = ("prompt", "rejected_scores", "weight", "form")  # columns of rows that name no tensors
_TENSOR_TYPES = {"key": pa.string(), "shard": pa.string(), "checksum": pa.string()}

Form = dict[str, Any]


class EncodedIndex:
    """
    What `write_index` has left in a folder.

    Args:
        directory (`Path`): The folder.

    Attributes:
        columns (`list[str]`): Columns of rows that hold tensors.
        present (`list[str]`): Columns that some row has.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._rows, self._tensors = _mapped(directory / ROWS_NAME), _mapped(directory / TENSORS_NAME)
        self.columns = [name for name in self._rows.column_names if name not in _OTHER]
        cells = zip(self._rows.column_names, self._rows.columns, strict=True)
        self.present = [name for name, column in cells if name != "form" and column.null_count < len(column)]

    def __len__(self) -> int:
        return int(self._rows.num_rows)

    def __reduce__(self) -> tuple[type["EncodedIndex"], tuple[Path]]:
        return EncodedIndex, (self._directory,)  # every worker maps the files itself

    def row(self, number: int) -> dict[str, Any]:
        """The row's prompt, scores and weight, where it has them, and under the other columns numbers of tensors."""
        row: dict[str, Any] = self._rows.slice(range(len(self))[number], 1).to_pylist()[0]
        if row.get("prompt") is not None:
            row["prompt"] = row["prompt"].decode("utf-8", "surrogatepass")
        return row

    def tensor(self, number: int) -> tuple[str, str, str]:
        """Name, shard and checksum of a tensor."""
        place = self._tensors.slice(number, 1).to_pylist()[0]
        return place["key"], place["shard"], place["checksum"]

    def number_of(self, key: str) -> int:
        """The number of a tensor, by its name: all names are looked at."""
        return int(pc.index(self._tensors["key"], key).as_py())

    def numbers(self, column: str) -> Iterator[int | None]:
        """The number of the tensor in a column of each row, or `None`."""
        if column not in self.columns:
            yield from repeat(None, len(self))
            return
        for chunk in self._rows[column].iterchunks():
            yield from chunk.to_pylist()

    def form_of(self) -> list[int]:
        """Which form each row has."""
        forms: list[int] = self._rows["form"].to_numpy().tolist()
        return forms

    def rejected_counts(self) -> list[int]:
        """Number of rejected videos of each row."""
        counts: list[int] = pc.list_value_length(self._rows["rejected"]).to_numpy().tolist()
        return counts

    def rejected_scores(self) -> Iterator[Any]:
        """The judge's scores of each row, or `None`."""
        if "rejected_scores" not in self._rows.column_names:
            yield from repeat(None, len(self))
            return
        for chunk in self._rows["rejected_scores"].iterchunks():
            yield from chunk.to_pylist()

    def scores_are_whole(self) -> bool:
        """Whether every rejected video has an `(sa, pc)` in [0, 1]; many rows are looked at together."""
        if not {"rejected", "rejected_scores"} <= {*self._rows.column_names}:
            return False
        return all(
            _are_whole(batch["rejected_scores"], pc.list_value_length(batch["rejected"]))
            for batch in self._rows.select(["rejected", "rejected_scores"]).to_batches()
        )

    def twins(self) -> list[int]:
        """Rows in which a rejected video is the chosen one."""
        if "rejected" not in self.columns:
            return []
        found: list[int] = []
        first = 0
        for batch in self._rows.select(["chosen", "rejected"]).to_batches():
            parents = pc.list_parent_indices(batch["rejected"]).to_numpy()
            same = pc.list_flatten(batch["rejected"]).to_numpy() == batch["chosen"].to_numpy()[parents]
            found += (first + np.unique(parents[same])).tolist()
            first += len(batch)
        return found


def _are_whole(scores: pa.Array, counts: pa.Array) -> bool:
    pairs = pc.list_flatten(scores)
    numbers = pc.list_flatten(pairs)
    if scores.null_count or pairs.null_count or numbers.null_count:
        return False
    values = numbers.to_numpy()
    return bool(
        pc.list_value_length(scores).equals(counts)
        and (pc.list_value_length(pairs).to_numpy() == 2).all()
        and ((values >= 0) & (values <= 1)).all()
    )


def write_index(
    directory: Path, rows: Sequence[Mapping[str, Any]], tensors: Mapping[str, tuple[str, str, list[int]]]
) -> tuple[list[Form], dict[str, str]]:
    """
    Write the tables.

    Args:
        directory (`Path`): The folder.
        rows (`Sequence[Mapping]`): Of each row its `"prompt"`, `"rejected_scores"` and `"weight"`, where it has them;
            under every other column the name of a tensor, or a list of names.
        tensors (`Mapping[str, tuple]`): Of each tensor by its name its shard, checksum and shape.

    Returns:
        `tuple[list[dict], dict[str, str]]`: The distinct forms, shapes under the columns of tensors; and the checksums
        of the files by their names.
    """
    number_of = {key: number for number, key in enumerate(tensors)}
    shape_of = [shape for _, _, shape in tensors.values()]
    forms: dict[str, int] = {}
    distinct: list[Form] = []
    columns: dict[str, list[Any]] = {name: [] for name in (rows[0] if rows else {})}
    form_of = []
    for row in rows:
        form: Form = {}
        for name, value in row.items():
            if name == "prompt":
                value = value.encode("utf-8", "surrogatepass")  # a string of Python may be no Unicode
            elif name not in _OTHER and value is not None:
                value = number_of[value] if isinstance(value, str) else [number_of[key] for key in value]
                form[name] = shape_of[value] if isinstance(value, int) else [shape_of[each] for each in value]
            columns[name].append(value)
        key = repr(form)
        if key not in forms:
            forms[key] = len(forms)
            distinct.append(form)
        form_of.append(forms[key])
    types = {name: pa.int64() for name in columns} | {
        "prompt": pa.binary(),
        "rejected": pa.list_(pa.int64()),
        "rejected_scores": pa.list_(pa.list_(pa.float64())),
        "weight": pa.float64(),
    }
    table = pa.table({name: pa.array(values, types[name]) for name, values in columns.items()} | {"form": form_of})
    places = zip(*((key, shard, checksum) for key, (shard, checksum, _) in tensors.items()), strict=True)
    named = zip(_TENSOR_TYPES.items(), places if tensors else ((), (), ()), strict=True)
    found = pa.table({name: pa.array(values, kind) for (name, kind), values in named})
    checksums = {}
    for name, content in ((ROWS_NAME, table), (TENSORS_NAME, found)):
        checksums[name] = file_checksum(write_atomically(directory / name, _serialised(content)))
    return distinct, checksums


def _serialised(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=_CHUNK)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _mapped(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all()
