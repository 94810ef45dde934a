"""Keep the frozen weights of blocks in the host's memory, with those of two blocks on the device at a time."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn


_KEY = "_offloaded_weights"  # where a transformer keeps them, in its `__dict__`


class OffloadedWeights:
    """
    Frozen weights of blocks in the host's memory. Those of a block are copied to the device when it is about to run,
    and meanwhile those of the one that comes next: behind it in a forward pass, before it in a backward pass. They are
    the same numbers, so that nothing that is computed changes.

    The blocks must be checkpointed, non-reentrantly: a block then keeps no weight from its forward to its backward
    pass, in which it runs once more, and its graph holds what that has copied until its gradients are computed.
    Trained weights, and all outside of the blocks, stay where they are.

    Args:
        blocks (`Sequence[nn.Module]`): In the order in which they run.
        device (`torch.device`): Where they run. Their frozen weights leave it.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        self.device = device
        self._stream = None if device.type == "cpu" else torch.Stream(device)
        self._weights = [[weight for weight in block.parameters() if not weight.requires_grad] for block in blocks]
        self._host = [[self._on_host(weight.data) for weight in weights] for weights in self._weights]
        self._arrivals: dict[int, torch.Event | None] = {}  # of the blocks that are there, or on their way
        self._last = -1
        for number in range(len(blocks)):
            self._drop(number)
        self._handles = [block.register_forward_pre_hook(self._hook(number)) for number, block in enumerate(blocks)]

    def fetch(self, number: int) -> None:
        """Begin to copy the weights of a block to the device, unless they are there."""
        if number in self._arrivals:
            return
        with self._stream or nullcontext():
            for weight, kept in zip(self._weights[number], self._host[number], strict=True):
                weight.data = kept.to(self.device, non_blocking=True, copy=True)
        self._arrivals[number] = None if self._stream is None else self._stream.record_event()

    def restore(self) -> None:
        """Give all blocks their weights back, on the CPU, for good."""
        for handle in self._handles:
            handle.remove()
        for weights, kept in zip(self._weights, self._host, strict=True):
            for weight, tensor in zip(weights, kept, strict=True):
                weight.data = tensor

    def _hook(self, number: int) -> Any:
        return lambda module, args: self._enter(number)

    def _enter(self, number: int) -> None:
        following = self._following(number)
        for other in set(self._arrivals) - {number, following}:
            self._drop(other)
        self.fetch(number)
        self._wait_for(number)
        self.fetch(following)
        self._last = number

    def _following(self, number: int) -> int:
        """The block that runs next; if it turns out to be another, that one is copied when it runs."""
        end = len(self._weights) - 1
        if number == 0:
            return min(1, end)  # of this forward pass, or behind a backward pass of the next
        if number == end:
            return end - 1 if torch.is_grad_enabled() else 0
        return number - 1 if number == self._last - 1 else number + 1

    def _wait_for(self, number: int) -> None:
        arrival = self._arrivals[number]
        if arrival is None:
            return
        current = torch.accelerator.current_stream(self.device)
        current.wait_event(arrival)
        for weight in self._weights[number]:
            weight.data.record_stream(current)  # their memory is of the other stream, and must outlive this one's use
        self._arrivals[number] = None

    def _drop(self, number: int) -> None:
        self._arrivals.pop(number, None)
        for weight in self._weights[number]:
            weight.data = torch.empty(0, dtype=weight.dtype, device=self.device)

    def _on_host(self, weight: Tensor) -> Tensor:
        kept = weight.to("cpu")
        return kept if self._stream is None else kept.pin_memory()


def offload_weights(transformer: nn.Module, blocks: Sequence[nn.Module], device: torch.device) -> None:
    """Keep the frozen weights of the blocks of a transformer in the host's memory: see [`OffloadedWeights`]."""
    transformer.__dict__[_KEY] = OffloadedWeights(blocks, device)


def restore_weights(transformer: nn.Module) -> None:
    """Undo `offload_weights`, if it was called."""
    offloaded = transformer.__dict__.pop(_KEY, None)
    if offloaded is not None:
        offloaded.restore()
