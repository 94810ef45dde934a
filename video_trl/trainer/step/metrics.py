"""Collect metrics on the device, without synchronisation, until they are logged."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor


#: Names under which Trainer measures an evaluation itself.
OF_EVALUATIONS = frozenset(
    {"loss", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "epoch"}
)
# What it logs in training is beside them; of an evaluation's loss two kinds of values would be averaged.
_TRAINERS = OF_EVALUATIONS | {"grad_norm", "learning_rate", "step"}


class MetricStore:
    """
    Running means of per-sample values. Nothing leaves the device, and no process talks to another, before `pop`.

    Attributes:
        names (`set[str]`): Of all values that were ever recorded.
    """

    def __init__(self) -> None:
        self.names: set[str] = set()
        self._sums: dict[str, Tensor] = {}  # name -> float32 scalar, on the device of the values
        self._counts: dict[str, int] = {}  # known to the host: copying them to the device would make it wait

    def record(self, metrics: Mapping[str, Tensor], *, counted: bool = True) -> None:
        """
        Add values of any shape and dtype to the means of these names; without `counted`, the names only.

        Raises:
            ValueError: If a name is that of what Trainer logs.
        """
        if taken := sorted(_TRAINERS & metrics.keys()):
            raise ValueError(
                f"`record` was given {', '.join(map(repr, taken))}, which Trainer logs itself: one of the two would "
                f"be lost. Record it as 'loss/{taken[0]}' or under another name."
            )
        self.add(metrics, counted=counted)

    def add(self, metrics: Mapping[str, Tensor], *, counted: bool = True) -> None:
        """The same for any name, such as the loss of an evaluation."""
        self.names.update(metrics)
        for name, values in metrics.items():
            values = values if counted else values[:0]
            total = values.detach().float().sum()
            self._sums[name] = self._sums[name] + total if name in self._sums else total
            self._counts[name] = self._counts.get(name, 0) + values.numel()

    def pop(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over all values recorded since the last call, on all processes; every process must call this."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        sums = torch.stack([self._sums[name] for name in names])
        totals = torch.stack([sums, sums.new_tensor([self._counts[name] for name in names])])  # (2, metrics)
        self._sums.clear()
        self._counts.clear()
        sums, counts = accelerator.reduce(totals, reduction="sum").unbind()
        return dict(zip(names, (sums / counts).tolist(), strict=True))


class Metrics:
    """
    The metrics of a trainer, those of training and of evaluation apart.

    Attributes:
        counted (`bool`): Whether the rows at hand count, or stand in for rows that a step lacks.
    """

    def __init__(self) -> None:
        self.train, self.eval = MetricStore(), MetricStore()
        self.counted = True

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Context in which no row counts."""
        before, self.counted = self.counted, False
        try:
            yield
        finally:
            self.counted = before
