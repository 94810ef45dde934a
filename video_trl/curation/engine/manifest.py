"""
The manifest of a curation run: one row for each input clip, with its measurements and the rule that dropped it.

A stage is a plain function `batch of columns -> new columns`, so `datasets.map(function, batched=True)` or a cluster
engine can run it as it stands. [`run_stage`] runs it here: split over processes, and resumable at any point, because
every batch is committed as one atomically named parquet file and what is committed is never computed again.
"""

import json
import logging
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from ...files import Absence, announce, atomic_file, hash_bytes, remove_leftovers
from .journal import death_of, forget, interrupted, noted


logger = logging.getLogger(__name__)

Batch = dict[str, list[Any]]

#: Columns of every manifest: the rule that dropped the row (null: kept), the value it saw, its limit, and words.
OUTCOME: dict[str, pa.DataType] = {
    "dropped_by": pa.string(),
    "value": pa.float64(),
    "limit": pa.float64(),
    "detail": pa.string(),
}
_POLL_SECONDS = 0.5
_DEATHS = 6  # processes that may be killed over a row that its trial survives


@dataclass(frozen=True)
class Rule:
    """
    A row is kept where `minimum <= row[column] <= maximum`. A missing value or NaN is outside.

    Args:
        name (`str`): What the manifest calls it.
        column (`str`): Column with the measured value.
        minimum, maximum (`float`, *optional*): Limits, both included.
    """

    name: str
    column: str
    minimum: float | None = None
    maximum: float | None = None

    def broken_limit(self, value: float | None) -> float | None:
        """The limit that the value breaks, None where it keeps both."""
        for limit, inside in (
            (self.minimum, value is not None and self.minimum is not None and value >= self.minimum),
            (self.maximum, value is not None and self.maximum is not None and value <= self.maximum),
        ):
            if limit is not None and not inside:
                return limit
        return None


@dataclass(frozen=True)
class Stage:
    """
    What [`run_stage`] needs to know about a function.

    Args:
        name (`str`): Folder of its results.
        function (`Callable[[Batch], Batch]`): Gets rows as columns, returns the columns it adds, of equal length. It
            drops a row by filling the columns of `OUTCOME`. What it raises stops the run: an exception is a fault of
            the machine or the configuration (a full disk, too little memory), not of a row.
        adds (`dict`): Columns it adds, with their Arrow types; those of `OUTCOME` need not be named.
        key (`str`): Column that decides the result. Rows with a key that is in the store are not computed again.
        settings (`dict`): Everything else that decides the result, as JSON values. Other settings, other store.
        batch_size (`int`, defaults to `16`): Rows computed and committed together.
        trial (`Callable[[Batch], object]`, *optional*): For a function that decodes files from anywhere, one of which
            may kill the process, by a crash of a decoder or for its memory: what is tried, in a process of its own,
            with each row over which a process was killed. A row that kills that one too is dropped by "crashed".
        again (`tuple[str, ...]`, *optional*): Reasons that may have passed, such as a server without an answer: rows
            that an earlier launch dropped for one of them are computed again. By several processes they are not.
    """

    name: str
    function: Callable[[Batch], Batch]
    adds: Mapping[str, pa.DataType]
    key: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 16
    trial: Callable[[Batch], object] | None = None
    again: tuple[str, ...] = ()

    @property
    def schema(self) -> pa.Schema:
        return pa.schema({self.key: pa.string(), **self.adds, **OUTCOME})

    @property
    def folder(self) -> str:
        return f"{self.name}-{digest(json.dumps(self.settings, sort_keys=True), 8)}"


@dataclass(frozen=True)
class Shard:
    """Which part of the rows this process computes: those at `index`, `index + count`, `index + 2 * count`, ..."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"Expected a process index in [0, {self.count}), got {self.index}.")

    @classmethod
    def from_environment(cls) -> "Shard":
        """What `accelerate launch` and `torchrun` write into `RANK` and `WORLD_SIZE`; without them, the only one."""
        return cls(int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1))


def digest(text: str, length: int = 16) -> str:
    """Hash of a text, `length` hexadecimal digits."""
    return hash_bytes(text.encode("utf-8", "surrogateescape"))[:length]


def new_manifest(columns: Mapping[str, Sequence[Any]], types: Mapping[str, pa.DataType]) -> pa.Table:
    """A manifest in which nothing has been dropped yet."""
    length = len(next(iter(columns.values())))
    empty: dict[str, Sequence[Any]] = {name: [None] * length for name in OUTCOME}
    schema = pa.schema({**types, **OUTCOME})
    return pa.Table.from_pydict({**{name: columns[name] for name in types}, **empty}, schema=schema)


def kept_rows(table: pa.Table) -> pa.Table:
    """The rows that no rule has dropped."""
    return table.filter(pc.is_null(table["dropped_by"]))


def apply_rules(batch: Batch, rules: Sequence[Rule]) -> Batch:
    """
    The columns of `OUTCOME` after some rules; a row that was dropped before keeps its verdict, others get that of the
    first rule they break. No pixel is read: other thresholds cost nothing.

    Args:
        batch (`dict`): Columns, among them those of `OUTCOME` and those that the rules read.
        rules (`list[Rule]`): In the order in which they decide.
    """
    outcome: Batch = {name: list(batch[name]) for name in OUTCOME}
    for row, dropped_by in enumerate(batch["dropped_by"]):
        if dropped_by is not None:
            continue
        for rule in rules:
            value = batch[rule.column][row]
            value = None if value is None or math.isnan(value) else value
            limit = rule.broken_limit(value)
            if limit is not None:
                outcome["dropped_by"][row], outcome["value"][row], outcome["limit"][row] = rule.name, value, limit
                break
    return outcome


def apply_rules_to_table(table: pa.Table, rules: Sequence[Rule]) -> pa.Table:
    """[`apply_rules`] on a whole manifest."""
    names = {*OUTCOME, *(rule.column for rule in rules)}
    return with_columns(table, apply_rules(table.select(sorted(names)).to_pydict(), rules), OUTCOME)


def drop_repeats(table: pa.Table, column: str, *, name: str, rank: Sequence[int] | None = None) -> pa.Table:
    """
    Drops every row whose value in `column` an earlier kept row has; `detail` says which one.

    Args:
        table (`pyarrow.Table`): The manifest, with a column `source_id`.
        column (`str`): What must not repeat.
        name (`str`): The rule's name.
        rank (`list[int]`, *optional*): Of rows with one value that with the smallest rank stays, the first of these.
    """
    batch = table.select([column, "source_id", *OUTCOME]).to_pydict()
    order = range(len(table)) if rank is None else sorted(range(len(table)), key=lambda row: (rank[row], row))
    first: dict[Any, int] = {}
    for row in order:
        if batch["dropped_by"][row] is None and first.setdefault(batch[column][row], row) != row:
            batch["dropped_by"][row] = name
            batch["detail"][row] = f"same as {batch['source_id'][first[batch[column][row]]]}"
    return with_columns(table, {key: batch[key] for key in OUTCOME}, OUTCOME)


def drop_where(
    table: pa.Table, where: Sequence[bool], name: str, details: Sequence[str | None] | None = None
) -> pa.Table:
    """Drops rows by a rule that has no number; rows that were dropped before keep their verdict."""
    outcome = table.select(list(OUTCOME)).to_pydict()
    for row, bad in enumerate(where):
        if bad and outcome["dropped_by"][row] is None:
            outcome["dropped_by"][row] = name
            outcome["detail"][row] = details[row] if details else None
    return with_columns(table, outcome, OUTCOME)


def with_columns(table: pa.Table, columns: Batch, types: Mapping[str, pa.DataType]) -> pa.Table:
    """The table with columns added or replaced."""
    for name, kind in types.items():
        values = pa.chunked_array([pa.array(columns[name], kind)])
        place = table.column_names.index(name) if name in table.column_names else None
        table = table.append_column(name, values) if place is None else table.set_column(place, name, values)
    return table


def run_stage(table: pa.Table, stage: Stage, folder: str | os.PathLike[str], shard: Shard | None = None) -> pa.Table:
    """
    Computes a stage for the rows that are still there, and adds its columns (null for dropped rows).

    Rows are split over processes by their position, so every process must come with the same table. Each one computes
    and commits its part, then waits for the others: no message is sent, so a process may take as long as it likes,
    while it lives. Where one does not, the waiting ones say so and give up; the next run computes what is missing.

    Args:
        table (`pyarrow.Table`): The manifest.
        stage ([`Stage`]): What to compute.
        folder (`str` or `Path`): Where stores are; on a disk that all processes see.
        shard ([`Shard`], *optional*): Part of this process; read from the environment.

    Returns:
        `pyarrow.Table`: All rows in their order.

    Raises:
        RuntimeError: Another process, whose rows are missing, does not run.
        Exception: Whatever the stage's function raises. Batches committed before stay.
    """
    shard = shard or Shard.from_environment()
    if shard.count > 1:
        announce(Path(folder).resolve(), shard.index)
    store = Path(folder) / stage.folder
    store.mkdir(parents=True, exist_ok=True)
    remove_leftovers(store)
    todo = kept_rows(table)
    keys = todo[stage.key].to_pylist()
    assert len(set(keys)) == len(keys), f"`{stage.key}` must be unique among the rows of stage {stage.name}"
    parts = Parts(store, stage)
    if shard.count == 1:  # of several, one could take what another one forgets
        parts.forget_dropped()
    done = set(parts.keys())
    mine = [row for row in range(shard.index, len(keys), shard.count) if keys[row] not in done]
    tried = _try_suspects(todo, stage, store, mine) if stage.trial else {}
    mine = [row for row in mine if row not in tried]
    batches = [[row] for row, deaths in tried.items() if deaths]
    batches += [mine[start : start + stage.batch_size] for start in range(0, len(mine), stage.batch_size)]
    count = sum(map(len, batches))
    with tqdm(total=count, desc=stage.name, unit="row", disable=shard.index > 0 or not count) as progress:
        for rows in batches:
            batch = todo.take(rows).to_pydict()
            note = noted(store, shard.index, batch[stage.key], deaths=tried.get(rows[0], 0))
            with note if stage.trial else nullcontext():
                commit_batch(store, stage, batch[stage.key], stage.function(batch))
            progress.update(len(rows))
    logger.info("%s: %d rows computed here, %d found in %s", stage.name, count, len(done & set(keys)), store)
    results = collect(parts, stage, keys, shard)
    forget(store)
    return join_results(table, stage, results)


def _try_suspects(rows: pa.Table, stage: Stage, store: Path, mine: Sequence[int]) -> dict[int, int]:
    """Rows over which processes were killed -> how many processes, or 0 for a row that is dropped for it."""
    assert stage.trial is not None
    keys, suspects = rows[stage.key].to_pylist(), interrupted(store)
    deaths: dict[int, int] = {}
    for row in [row for row in mine if keys[row] in suspects]:
        deaths[row] = suspects[keys[row]] + 1
        # A process may be killed from outside, again and again, and no row must be lost by it; but what kills every
        # process in spite of its trial must end somewhere.
        trial = partial(stage.trial, rows.take([row]).to_pydict())
        death = death_of(trial) if deaths[row] < _DEATHS else f"killed, as {_DEATHS - 1} were before it"
        if death is not None:
            deaths[row] = 0
            commit_crashed(store, stage, keys[row], death)
    return deaths


def commit_crashed(store: Path, stage: Stage, key: str, death: str) -> None:
    """A row that no process survives: dropped by "crashed"."""
    words = f"the process that read the file in stage {stage.name!r} was {death}"
    logger.warning("%s is dropped: %s.", key, words)
    row: Batch = {name: [None] for name in stage.adds}
    commit_batch(store, stage, [key], row | {"dropped_by": ["crashed"], "detail": [words]})


class Parts:
    """
    The batches that are in a store, by this process and others; each file is read once.

    Args:
        store (`Path`): Folder of the stage.
        stage ([`Stage`]): The stage.
    """

    def __init__(self, store: Path, stage: Stage) -> None:
        self.store, self._stage = store, stage
        self._tables: dict[str, pa.Table] = {}
        self._keys: set[str] = set()

    def keys(self) -> set[str]:
        """Keys that are in the store now."""
        for path in self.store.glob("part-*.parquet"):
            if path.name not in self._tables:  # one of the same name has the same keys, and so the same rows
                table = self._tables[path.name] = pq.read_table(path, schema=self._stage.schema)
                self._keys.update(table[self._stage.key].to_pylist())
        return self._keys

    def forget_dropped(self) -> None:
        """Takes out the rows that are to be computed again, see `Stage.again`; nobody else may work on the store."""
        if not self._stage.again:
            return
        self.keys()
        for name, table in list(self._tables.items()):
            kept = table.filter(pc.invert(pc.is_in(table["dropped_by"], pa.array(self._stage.again, pa.string()))))
            if len(kept) == len(table):
                continue
            if len(kept):
                write_table(kept, self.store / part_name(kept[self._stage.key].to_pylist()))
            (self.store / name).unlink()
            self._tables, self._keys = {}, set()  # to be read anew

    def table(self) -> pa.Table:
        """All rows that [`Parts.keys`] has found."""
        parts = [table for _, table in sorted(self._tables.items())]
        return pa.concat_tables(parts) if parts else self._stage.schema.empty_table()


def commit_batch(store: Path, stage: Stage, keys: list[str], added: Batch) -> None:
    """One batch as one file that is whole or not there; named by its keys, so that a repeat replaces it."""
    length = len(keys)
    columns = {name: added.get(name, [None] * length) for name in OUTCOME}
    columns |= {name: added[name] for name in stage.adds}
    table = pa.Table.from_pydict({stage.key: keys, **columns}, schema=stage.schema)
    write_table(table, store / part_name(keys))


def part_name(keys: Sequence[str]) -> str:
    """Of the file of a batch."""
    return f"part-{digest(chr(0).join(keys))}.parquet"


def write_table(table: pa.Table, path: Path) -> None:
    """A parquet file that appears under its name only when it is whole, also after a power cut."""
    with atomic_file(path) as partial:
        pq.write_table(table, partial)


def collect(parts: Parts, stage: Stage, keys: Sequence[str], shard: Shard) -> pa.Table:
    """The store once all keys are in it: at once for a single process, else when the others are done."""
    absence = Absence(parts.store.parent.resolve(), shard.index, shard.count)
    waited = False
    while missing := set(keys) - parts.keys():
        if not waited:
            logger.info("%s: waiting for %d rows of other processes", stage.name, len(missing))
        waited = True
        absence.check(row % shard.count for row, key in enumerate(keys) if key in missing)
        time.sleep(_POLL_SECONDS)
    return parts.table()


def join_results(table: pa.Table, stage: Stage, results: pa.Table) -> pa.Table:
    """The table with the results of its kept rows; a verdict of the stage becomes the row's."""
    is_kept = pc.is_null(table["dropped_by"])
    place = pc.index_in(table[stage.key], value_set=results[stage.key].combine_chunks())
    matching = results.take(pc.if_else(is_kept, place, pa.scalar(None, pa.int32())))
    for name in stage.adds:
        columns = matching[name].to_pylist()
        table = with_columns(table, {name: columns}, {name: stage.adds[name]})
    for name, kind in OUTCOME.items():
        table = with_columns(table, {name: pc.if_else(is_kept, matching[name], table[name]).to_pylist()}, {name: kind})
    return table


def count_outcomes(table: pa.Table) -> dict[str, int]:
    """Number of rows that each rule dropped, in the order of first appearance along the manifest."""
    return dict(Counter(name for name in table["dropped_by"].to_pylist() if name is not None))


def first_dropped(table: pa.Table) -> list[str]:
    """For each rule that dropped rows a line with the first of them: the value that it saw, and its limit."""
    lines: dict[str, str] = {}
    for row in table.select(["source_id", *OUTCOME]).to_pylist():
        name, value, limit, detail = (row[key] for key in OUTCOME)
        if name is not None and name not in lines:
            seen = None if value is None else f"{value:.4g}"
            bound = None if limit is None else f"the limit is {limit:.4g}"
            lines[name] = f"{name}: {', '.join(filter(None, (row['source_id'], seen, bound, detail)))}"
    return list(lines.values())


def summarize(table: pa.Table, noun: str = "clip") -> str:
    """One line that accounts for every row: how many came in, how many stay, how many each rule dropped."""
    dropped = count_outcomes(table)
    num_kept = len(table) - sum(dropped.values())
    parts = [
        f"{num_kept} kept",
        *(f"{count} {name}" for name, count in sorted(dropped.items(), key=lambda item: (-item[1], item[0]))),
    ]
    return f"{len(table)} {noun}{'' if len(table) == 1 else 's'} in = {' + '.join(parts)}"
