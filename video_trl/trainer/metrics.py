"""Training metrics that wait on the device until they are logged."""

import torch
from accelerate import Accelerator
from torch import Tensor


class MetricStore:
    """
    Running means of per-sample values. Nothing leaves the device, and no process talks to another, before `pop`.
    """

    def __init__(self) -> None:
        self._totals: dict[str, Tensor] = {}  # name -> float64 or float32 (2,): sum, count

    def record(self, name: str, values: Tensor) -> None:
        """Add values of any shape and dtype to the mean called `name`."""
        values = values.detach()
        total = torch.stack([values.float().sum(), values.new_tensor(values.numel(), dtype=torch.float32)])
        self._totals[name] = self._totals[name] + total if name in self._totals else total

    def pop(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over all values recorded since the last call, on all processes; every process must call this."""
        if not self._totals:
            return {}
        names = sorted(self._totals)
        totals = torch.stack([self._totals[name] for name in names])  # (number of metrics, 2)
        self._totals.clear()
        sums, counts = accelerator.reduce(totals, reduction="sum").unbind(dim=1)
        return dict(zip(names, (sums / counts).tolist(), strict=True))
