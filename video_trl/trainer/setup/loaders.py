"""Data loaders: batches of one shape, with the weight of each batch in its optimizer step."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.data_loader import DataLoaderShard
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, Dataset

from ...data.buckets import BucketBatchSampler, MicroBatch
from ..base_config import VideoConfig
from ..step.timestep_draws import RowsOfStep
from .rows import IndexedDataset


logger = logging.getLogger(__name__)

BATCH_WEIGHT = "batch_weight"
"""Key of a batch under which its `BatchWeight` stands."""

# What the host itself decides by, such as which noise to draw. On a device it would have to wait to read it back.
_HOST_COLUMNS = ("index", "num_rejected", "teacher_grid", "teacher_frame_times")

Collator = Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]


@dataclass(frozen=True)
class BatchWeight:
    """
    What a batch weighs in its step.

    Attributes:
        counted (`bool`): Whether its rows count; see `MicroBatch`.
        divisor (`float`): What to divide the mean over its rows by.
        rows ([`RowsOfStep`]): Which rows of the step it has.
    """

    counted: bool
    divisor: float
    rows: RowsOfStep


class _MicroBatches(Dataset[Any]):
    """The rows as a loader fetches them: those of a `MicroBatch` together with it."""

    def __init__(self, rows: IndexedDataset) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows.shapes)

    def __getitems__(self, batch: MicroBatch) -> tuple[list[dict[str, Any]], MicroBatch]:
        return [self.rows[number] for number in batch.rows], batch


class _Collate:
    """
    A collator whose batches carry their `BatchWeight`, and lists of numbers where the host reads them. A class, so
    that it can be sent to a worker.
    """

    def __init__(self, collator: Collator, num_processes: int) -> None:
        self.collator, self.num_processes = collator, num_processes

    def __call__(self, fetched: tuple[list[dict[str, Any]], MicroBatch]) -> dict[str, Any]:
        rows, batch = fetched
        of_step = RowsOfStep(batch.first, batch.step_rows)
        weight = BatchWeight(batch.counted, batch.divisor(self.num_processes), of_step)
        return {**_collated(self.collator, rows), BATCH_WEIGHT: weight}


def _collated(collator: Collator, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    collated = collator(rows)
    return {**collated, **{name: collated[name].tolist() for name in _HOST_COLUMNS if name in collated}}


def one_batch(
    rows: IndexedDataset, indices: Sequence[int], collator: Collator, device: torch.device
) -> dict[str, Any]:
    """These rows as a batch on a device, as [`make_loader`]'s are, but without a weight: it belongs to no step."""
    batch: dict[str, Any] = send_to_device(_collated(collator, [rows[index] for index in indices]), device)
    return batch


def make_loader(rows: IndexedDataset, collator: Collator, args: VideoConfig, *, training: bool) -> DataLoader:
    """
    Loader of this process's part of the batches, which puts them on its device.

    Args:
        rows (`IndexedDataset`): The rows.
        collator (`Callable`): Rows to batch.
        args (`VideoConfig`): Source of batch sizes, seed and `dataloader_*` settings.
        training (`bool`): Whether the rows are shuffled, by `data_seed` and the epoch, and make up optimizer steps.
    """
    num_processes = args.data_parallel_size
    sampler = BucketBatchSampler(
        rows.shapes,
        batch_size=args.per_device_train_batch_size if training else args.per_device_eval_batch_size,
        accumulation=args.gradient_accumulation_steps if training else 1,
        rank=args.data_parallel_rank,
        num_processes=num_processes,
        seed=args.data_seed if training else None,
    )
    if training:
        _log_steps(sampler)
    # accelerate's own class, because Trainer and the accelerator ask a loader for its epoch and for its end. It is
    # not `prepare`d: that would divide the batches among the processes once more.
    return DataLoaderShard(
        _MicroBatches(rows),
        device=args.device,
        _non_blocking=args.dataloader_pin_memory,  # pinned, so that nobody has to wait for the copy
        batch_sampler=sampler,
        collate_fn=_Collate(collator, num_processes),
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        # Every evaluation makes a new loader.
        **(worker_options(args) | ({} if training else {"persistent_workers": False})),
    )


def worker_options(args: VideoConfig) -> dict[str, Any]:
    """
    Options of a `DataLoader` that say how its workers work: those that the installed transformers has. The oldest one
    has no `dataloader_multiprocessing_context`.
    """
    names = ("persistent_workers", "prefetch_factor", "multiprocessing_context")
    given = vars(args)
    return {name: given[f"dataloader_{name}"] for name in names if f"dataloader_{name}" in given}


def describe_order(rows: IndexedDataset, args: VideoConfig) -> dict[str, Any]:
    """What the order of the rows in training depends on, for the description of the run."""
    return {
        "rows": len(rows.shapes),
        "shapes": len(set(rows.shapes)),
        "rows_per_step": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.data_parallel_size,
        "data_seed": args.data_seed,
    }


def _log_steps(sampler: BucketBatchSampler) -> None:
    """Report how the rows make up steps; warn of shapes with fewer rows than a step has."""
    counts, size = Counter(sampler.shapes), sampler.rows_per_step
    full = sum(count // size for count in counts.values())
    smaller = sum(count % size > 0 for count in counts.values())
    logger.info(
        "Rows: %d%s. Steps of an epoch: %d of %d row%s%s. Every row counts once.",
        len(sampler.shapes),
        f", of {len(counts)} shapes" if len(counts) > 1 else "",
        full,
        size,
        "s" * (size != 1),
        f", and {smaller} smaller" if smaller else "",
    )
    scarce = {shape: count for shape, count in counts.items() if count < size}
    if len(counts) > 1 and scarce:
        logger.warning(
            "Some shapes have fewer rows than a step of %d (rows by shape): %s. Their steps are smaller, and each of "
            "their rows weighs more. Merge such buckets into larger ones, or lower the batch size.",
            size,
            scarce,
        )
