"""Aspect-ratio buckets: choose a size for each video, and batches whose rows have one size."""

import itertools
import math
import re
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Sampler


#: Aspect ratios, width to height, of Reg-DPO (https://huggingface.co/papers/2511.01450): 9:16, 3:4, 1:1 and 16:9.
ASPECT_RATIOS: tuple[tuple[int, int], ...] = ((9, 16), (3, 4), (1, 1), (16, 9))


@dataclass(frozen=True)
class AspectBucket:
    """
    A size that videos of similar shape are brought to: scaled to cover it, then centre-cropped.

    Args:
        height (`int`): Height in pixels.
        width (`int`): Width in pixels.
    """

    height: int
    width: int

    @classmethod
    def parse(cls, text: str) -> "AspectBucket":
        """The bucket written `"<height>x<width>"`, such as `"480x832"`; a `ValueError` if it is written otherwise."""
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
        if match is None:
            raise ValueError(f"Expected a size '<height>x<width>' in pixels, such as '480x832', got {text!r}.")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"

    def crop_proportion(self, width: int, height: int) -> float:
        """Proportion, in [0, 1), of the picture of a video of that size which the crop to this bucket cuts off."""
        wider = (width * self.height) / (height * self.width)  # aspect ratio of the video over the bucket's
        return 1 - min(wider, 1 / wider)


def aspect_buckets(short_edge: int, *, multiple: int = 16) -> tuple[AspectBucket, ...]:
    """
    A bucket for each of `ASPECT_RATIOS`.

    Args:
        short_edge (`int`): Length in pixels of the shorter side.
        multiple (`int`, defaults to `16`): What sides must be divisible by: 8 for the VAE times 2 for the patches of
            Wan and CogVideoX. Sides are rounded to the nearest multiple.

    Returns:
        `tuple[AspectBucket, ...]`: With `short_edge=720` and the default, 1280x720, 960x720, 720x720 and 720x1280.
    """
    buckets = []
    for across, down in ASPECT_RATIOS:
        scale = short_edge / min(across, down)
        height, width = (multiple * max(round(side * scale / multiple), 1) for side in (down, across))
        buckets.append(AspectBucket(height, width))
    return tuple(buckets)


def nearest_bucket(
    width: int, height: int, buckets: Sequence[AspectBucket], max_crop: float = 1.0
) -> AspectBucket | None:
    """
    The bucket whose aspect ratio is nearest to a video's, on a log scale: the one that crops least.

    Args:
        width, height (`int`): Size of the video as it is shown, in pixels.
        buckets (`Sequence[AspectBucket]`): At least one. Of buckets of one aspect ratio, the one whose area is nearest
            to the video's is taken, on a log scale; of equal ones, the first.
        max_crop (`float`, defaults to `1.0`): Largest proportion of the picture, in [0, 1], that may be cut off.

    Returns:
        [`AspectBucket`] or `None`: `None` if even the nearest bucket would cut off more than `max_crop`: a 640x480
        video loses a quarter to 1:1, and would rather be left out.

    Raises:
        ValueError: If a side is not positive, `max_crop` is not in [0, 1], or there are no buckets.
    """
    if width < 1 or height < 1:
        raise ValueError(f"A video must have at least one pixel, got {width}x{height} (width x height).")
    if not buckets or not 0 <= max_crop <= 1:
        raise ValueError(f"Expected at least one bucket and `max_crop` in [0, 1], got {len(buckets)} and {max_crop}.")
    # The log distance of the ratios is -log(1 - crop_proportion). Rounded, so that ratios meant to be equal are equal.
    area = math.log(width * height)
    nearest = min(
        buckets,
        key=lambda bucket: (
            round(bucket.crop_proportion(width, height), 9),
            abs(area - math.log(bucket.width * bucket.height)),
        ),
    )
    return nearest if nearest.crop_proportion(width, height) <= max_crop else None


@dataclass(frozen=True)
class MicroBatch:
    """
    Rows that one process handles at once.

    Attributes:
        rows (`tuple[int, ...]`): Their numbers in the dataset; never empty.
        step_rows (`int`): Rows of the whole step, of all processes and accumulated micro-batches together.
        first (`int`): Place of the first of them among the rows of the step.
        counted (`bool`): Whether these rows count. They do not where a step has fewer rows than micro-batches: then a
            row stands in twice, because every process must take part in every step.
    """

    rows: tuple[int, ...]
    step_rows: int
    first: int
    counted: bool

    def divisor(self, num_processes: int) -> float:
        """
        What to divide the mean over these rows by, so that the sum over the micro-batches of a process, averaged over
        the processes, is the mean over all rows of the step. With micro-batches of one size, their number.
        """
        return self.step_rows / (len(self.rows) * num_processes) if self.counted else math.inf


class BucketBatchSampler(Sampler[MicroBatch]):
    """
    Batches of one shape, from rows of several: all rows of a step, on all processes, have the same shape.

    The rows, in an order drawn from (seed, epoch), gather by shape; as soon as those of a shape fill a step, they are
    one. What is left at the end makes one smaller step for each shape. Each step is cut into a micro-batch for every
    process and accumulation, as equal as possible. So

    - every row counts exactly once in an epoch: none is dropped, and one that stands in twice counts once;
    - the rows of a step depend only on their number `batch_size * accumulation * processes`: splitting them in another
      way, on other processes, leaves the steps as they are, and a run is resumed from the middle of an epoch by
      skipping the steps that were done;
    - no process waits for one with larger videos.

    The gradient of a step is the mean over its rows if each micro-batch has the weight of its rows, see `MicroBatch`.
    With rows of one shape the steps are those of an ordinary shuffling sampler. With several, the order of the steps
    is drawn too, or the rarest shapes would always come last.

    Args:
        shapes (`Sequence[Hashable]`): Of every row, what it must have in common with the others of its batch.
        batch_size (`int`): Rows in a micro-batch, except in a step that is not full.
        accumulation (`int`, defaults to `1`): Micro-batches of a process in a step.
        rank (`int`, defaults to `0`): Number of this process.
        num_processes (`int`, defaults to `1`): Number of processes.
        seed (`int`, *optional*): Seed of the order of the rows; none: they stay in theirs, as for evaluation.
    """

    def __init__(
        self,
        shapes: Sequence[Hashable],
        *,
        batch_size: int,
        accumulation: int = 1,
        rank: int = 0,
        num_processes: int = 1,
        seed: int | None = None,
    ) -> None:
        self.shapes = shapes
        self.rows_per_step = batch_size * accumulation * num_processes
        self.accumulation, self.rank, self.num_processes, self.seed = accumulation, rank, num_processes, seed
        self.epoch = 0
        seen: dict[Hashable, int] = {}
        numbers = (seen.setdefault(shape, len(seen)) for shape in shapes)
        self._codes = np.fromiter(numbers, np.int32, len(shapes))  # a number for each shape

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0 on, that the next iteration is."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Micro-batches of each process in an epoch."""
        return self.accumulation * int(np.sum(-(-np.bincount(self._codes) // self.rows_per_step)))

    def __iter__(self) -> Iterator[MicroBatch]:
        for rows in self.steps():
            parts = _split(rows, self.accumulation * self.num_processes)
            firsts = list(itertools.accumulate(map(len, parts), initial=0))
            for number in range(self.rank, len(parts), self.num_processes):
                part = parts[number]
                first = firsts[number] if part else 0
                yield MicroBatch(tuple(part or rows[:1]), len(rows), first, counted=bool(part))

    def steps(self) -> Iterator[list[int]]:
        """The rows of every step of the epoch, those of all processes together. Some 30 bytes a row are held."""
        generator = None if self.seed is None else torch.Generator().manual_seed(self.seed + self.epoch)
        number = len(self.shapes)
        order = torch.arange(number) if generator is None else torch.randperm(number, generator=generator)
        rows, starts, ends = self._cut(order.numpy())
        if generator is not None and self._codes.any():  # several shapes
            drawn = torch.randperm(len(starts), generator=generator).numpy()
            starts, ends = starts[drawn], ends[drawn]
        for start, end in zip(starts, ends, strict=True):
            yield rows[start:end].tolist()

    def _cut(self, order: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """
        The rows, those of a shape together and in their order, and where each step among them begins and ends. Steps
        come as they fill up, and after them those that do not, as the first rows of their shapes come.
        """
        codes, size = self._codes[order], self.rows_per_step
        places = np.argsort(codes, kind="stable")
        counts = np.bincount(codes)
        ends_of_shapes = np.cumsum(counts)
        firsts = ends_of_shapes - counts
        steps = -(-counts // size)
        shapes = np.repeat(np.arange(len(counts)), steps)
        starts = firsts[shapes] + size * (np.arange(len(shapes)) - np.repeat(np.cumsum(steps) - steps, steps))
        ends = np.minimum(starts + size, ends_of_shapes[shapes])
        full = ends - starts == size
        in_turn = np.argsort(np.where(full, places[ends - 1], len(order) + places[firsts[shapes]]))
        return order[places], starts[in_turn], ends[in_turn]


def _split(rows: list[int], num_parts: int) -> list[list[int]]:
    """Consecutive parts whose sizes differ by at most one; the first parts are empty if there are too few rows."""
    size, larger = divmod(len(rows), num_parts)
    if size == 0:
        return [[] for _ in range(num_parts - larger)] + [[row] for row in rows]
    starts = [number * size + min(number, larger) for number in range(num_parts + 1)]
    return [rows[start:end] for start, end in itertools.pairwise(starts)]
