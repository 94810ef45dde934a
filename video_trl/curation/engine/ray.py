"""
Run the stages of a curation run on a Ray cluster, with the same functions and result files as on one machine.

The driver hands out batches. A worker commits what it has computed to the stage's store, on a disk that all nodes see,
and answers with a number of rows. When a worker or its node dies, its batch goes to another one; a batch that was
committed twice has one name. What the driver finds in the store when it starts is not computed again.
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from tqdm.auto import tqdm

from .manifest import (
    Batch,
    Parts,
    Shard,
    Stage,
    collect,
    commit_batch,
    commit_crashed,
    join_results,
    kept_rows,
    part_name,
)


MAX_TRIES = 4  # workers that a batch may cost
_TRIES_OF_FILES = 2  # the same where a file may be to blame: then its rows are tried one by one
_PATIENCE = 60.0  # seconds without an answer after which the log says so, and that files may take to arrive

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RayCluster:
    """
    Where stages run.

    Args:
        address (`str`, *optional*): "auto" or the head node's address; without one, Ray starts on this machine.
        max_workers (`int`, defaults to `2`): Most workers of a stage. There are fewer where the cluster has no room.
        cpus, gpus (`float`): What each worker takes. `gpus` is for the stages with a model; others take none.
    """

    address: str | None = None
    max_workers: int = 2
    cpus: float = 1.0
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if self.max_workers < 1 or self.cpus <= 0 or self.gpus < 0:
            raise ValueError(
                f"Expected `max_workers` >= 1, `cpus` > 0 and `gpus` >= 0, got {self.max_workers}, {self.cpus} and "
                f"{self.gpus}."
            )

    def connect(self) -> None:
        """
        Joins the cluster, or does nothing where this process has.

        Raises:
            ValueError: Ray is not installed, cannot be reached, or has no room for a single worker.
        """
        try:
            import ray
        except ImportError as error:
            raise ValueError("`engine='ray'` needs Ray: pip install 'video-trl[ray]'.") from error
        if not ray.is_initialized():
            try:
                ray.init(address=self.address or "local", include_dashboard=False, logging_level=logging.ERROR)
            except (ConnectionError, ValueError) as error:
                raise ValueError(
                    f"No Ray cluster at {self.address!r} ({error}). Start one with `ray start --head`, and give its "
                    "address; RAY_AUTH_MODE and the token must be the same on all nodes."
                ) from error
        self.check_room(ray.cluster_resources())

    def check_room(self, room: Mapping[str, float]) -> None:
        """
        Ray would wait forever for what will never be there.

        Args:
            room (`dict`): CPUs and GPUs of the cluster, by Ray's names; those that it has none of are left out.

        Raises:
            ValueError: There is no room for a single worker.
        """
        if room.get("CPU", 0) < self.cpus or room.get("GPU", 0) < self.gpus:
            raise ValueError(
                f"A worker takes {self.cpus:g} CPUs and {self.gpus:g} GPUs, the cluster has {room.get('CPU', 0):g} "
                f"and {room.get('GPU', 0):g}. Ask for less, or add nodes."
            )


class Worker:
    """A stage's function in an actor: computes a batch, commits it, returns the number of rows."""

    def __init__(self, stage: Stage, store: str) -> None:
        self.stage, self.store = stage, Path(store)

    def ready(self) -> int:
        """Answers when the actor runs; no rows."""
        return 0

    def compute(self, batch: Batch) -> int:
        keys = batch[self.stage.key]
        if not (self.store / part_name(keys)).is_file():  # else: died after the commit
            commit_batch(self.store, self.stage, keys, self.stage.function(batch))
        return len(keys)


def run_stage_on_ray(table: pa.Table, stage: Stage, folder: str | Path, cluster: RayCluster) -> pa.Table:
    """
    [`run_stage`] on a cluster; the result is the same.

    Args:
        table, stage, folder: As for [`run_stage`]; `folder` is on a disk that all nodes see.
        cluster ([`RayCluster`]): Where.

    Raises:
        RuntimeError: A batch killed `MAX_TRIES` workers (where the stage reads files, the row that does is found and
            dropped by "crashed" instead), `MAX_TRIES` times all workers died in a row, or what workers have written
            is not in `folder` here.
        Exception: Whatever the stage's function raises, on any node. Batches committed before stay.
    """
    store = (Path(folder) / stage.folder).absolute()
    store.mkdir(parents=True, exist_ok=True)
    todo = kept_rows(table)
    keys = todo[stage.key].to_pylist()
    assert len(set(keys)) == len(keys), f"`{stage.key}` must be unique among the rows of stage {stage.name}"
    parts = Parts(store, stage)
    parts.forget_dropped()
    done = set(parts.keys())
    missing = [row for row, key in enumerate(keys) if key not in done]
    if missing:
        cluster.connect()
        starts = range(0, len(missing), stage.batch_size)
        batches = [missing[start : start + stage.batch_size] for start in starts]
        with tqdm(total=len(missing), desc=f"{stage.name} on Ray", unit="row") as progress:
            _Pool(stage, store, cluster).run(todo, batches, progress)
        check_arrived(parts, set(keys))
    logger.info(
        "%s: %d rows computed on Ray, %d found in %s", stage.name, len(missing), len(keys) - len(missing), store
    )
    return join_results(table, stage, collect(parts, stage, keys, Shard()))


def check_arrived(parts: Parts, keys: set[str], patience: float = _PATIENCE) -> None:
    """
    What workers have committed must be seen here; a network disk may take its time.

    Raises:
        RuntimeError: After `patience` seconds it still isn't: the nodes don't share the disk.
    """
    deadline = time.monotonic() + patience
    while missing := keys - parts.keys():
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"{len(missing)} of {len(keys)} rows were computed, and {parts.store} does not have them. The output "
                "folder must be on a disk that all nodes of the cluster see under the same path."
            )
        time.sleep(min(1.0, patience / 10))


class _Pool:
    """
    Workers, each with one batch at a time. Only a worker that has said it is ready gets one, so that nothing waits for
    an actor that the cluster has no room for.
    """

    def __init__(self, stage: Stage, store: Path, cluster: RayCluster) -> None:
        import ray

        # Restarts are ours: Ray's own would wait, with the batch, for room that may never come back.
        options = {"num_cpus": cluster.cpus, "num_gpus": cluster.gpus, "max_restarts": 0, "max_task_retries": 0}
        self.ray, self.actor, self.stage, self.store = ray, ray.remote(**options)(Worker), stage, store
        self.arguments, self.size = (ray.put(stage), str(store)), cluster.max_workers
        self.max_tries = MAX_TRIES if stage.trial is None else _TRIES_OF_FILES
        self.failures = 0  # since the last answer
        self.busy: dict[Any, tuple[Any, int | None]] = {}  # answer to come -> worker, its batch (None: getting ready)

    def run(self, rows: pa.Table, batches: list[list[int]], progress: Any) -> None:
        waiting, tries = deque(range(len(batches))), Counter[int]()
        left = len(batches)
        for _ in range(min(self.size, left)):
            self._start()
        while left:
            answers, _ = self.ray.wait(list(self.busy), num_returns=1, timeout=_PATIENCE)
            if not answers:
                logger.info("No answer for %g s: %d workers, %d batches left.", _PATIENCE, len(self.busy), left)
                continue
            worker, batch = self.busy.pop(answers[0])
            try:
                progress.update(self.ray.get(answers[0]))
                left -= batch is not None
                self.failures = 0
            except self.ray.exceptions.RayActorError as error:
                self._replace(error)
                if batch is not None:
                    tries[batch] += 1
                    if tries[batch] < self.max_tries:
                        waiting.appendleft(batch)
                        continue
                    parts = self._instead_of(batches[batch], rows, error)
                    waiting.extend(range(len(batches), len(batches) + len(parts)))
                    batches = [*batches, *parts]
                    left += len(parts) - 1
                    progress.update(0 if parts else 1)
                continue
            except self.ray.exceptions.RayTaskError as error:
                raise error.cause from error
            if waiting:
                batch = waiting.popleft()
                self.busy[worker.compute.remote(rows.take(batches[batch]).to_pydict())] = (worker, batch)
            else:
                self.ray.kill(worker)

    def _instead_of(self, batch: list[int], rows: pa.Table, error: Exception) -> list[list[int]]:
        """What takes the place of a batch that kills its workers: its rows one by one. A single row is dropped."""
        if self.stage.trial is None:
            raise RuntimeError(
                f"{MAX_TRIES} workers died over one batch ({_line(error)}). Its first row: "
                f"{rows.take(batch[:1]).to_pylist()[0]}."
            ) from error
        if len(batch) > 1:
            return [[row] for row in batch]
        commit_crashed(self.store, self.stage, rows[self.stage.key][batch[0]].as_py(), f"lost ({_line(error)})")
        return []

    def _replace(self, error: Exception) -> None:
        """Another worker for one that died; not forever, where none can live."""
        self.failures += 1
        if self.failures > MAX_TRIES * self.size:
            raise RuntimeError(f"{self.failures} workers died in a row, the last: {_line(error)}") from error
        logger.warning("A worker died (%s); another one takes its place.", _line(error))
        self._start()

    def _start(self) -> None:
        worker = self.actor.remote(*self.arguments)
        self.busy[worker.ready.remote()] = (worker, None)


def _line(error: Exception) -> str:
    """Ray's errors go on for pages; their first line says it."""
    return str(error).splitlines()[0]
