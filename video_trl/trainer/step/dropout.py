"""
Dropout on what enters a LoRA adapter, in the policy's passes of training steps and nowhere else.

A mask is a function of (seed, step, sample index, layer), as noise is of the first three. So a pass that is done
again, for a checkpointed block or for the gradient of one video at a time, has the same mask, a resumed run goes on
exactly, and neither the batch split nor the number of processes changes it. The videos that a loss compares are of one
sample, and have one mask: their errors are those of one network.
"""

import hashlib
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from diffusers import ModelMixin
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn


Stream = tuple[int, int, int]
"""Seed, step and sample index."""

_STREAMS: ContextVar[tuple[Stream, ...] | None] = ContextVar("streams of the videos in the forward", default=None)


@contextmanager
def dropout_of(streams: tuple[Stream, ...]) -> Iterator[None]:
    """Inside, adapters drop inputs of the N videos of a forward by the streams of these; outside, nothing."""
    token = _STREAMS.set(streams)
    try:
        yield
    finally:
        _STREAMS.reset(token)


def with_same_dropout(block: Callable[..., Any]) -> Callable[..., Any]:
    """`block`, which drops as it does now also when the backward pass calls it again, outside of `dropout_of`."""
    streams = _STREAMS.get()
    if streams is None:
        return block

    def again(*args: Any) -> Any:
        with dropout_of(streams):
            return block(*args)

    return again


class AdapterDropout(nn.Module):
    """
    Sets inputs of a layer's adapter to 0 and scales the others up, inside of `dropout_of`.

    Args:
        probability (`float`): Of an input to be 0, in (0, 1).
        layer (`int`): Number of the layer, which tells its masks from those of others.
    """

    def __init__(self, probability: float, layer: int) -> None:
        super().__init__()
        self.probability, self.layer = probability, layer

    def forward(self, inputs: Tensor) -> Tensor:
        """
        Inputs `(N * n, ...)`, n consecutive ones of each of the N videos; the same shape and dtype comes back.

        Raises:
            ValueError: If the layer's inputs are not those of one video after another.
        """
        streams = _STREAMS.get()
        if streams is None:
            return inputs
        each, rest = divmod(len(inputs), len(streams))
        if rest:
            raise ValueError(
                f"`lora_dropout` needs layers whose inputs are those of one video after another: expected a multiple "
                f"of {len(streams)} along the first dimension, got the shape {tuple(inputs.shape)}. Leave such layers "
                "out of `lora_target_modules`, or set `lora_dropout=0`."
            )
        kept = torch.empty_like(inputs)
        for stream, part in zip(streams, kept.split(each), strict=True):
            digest = hashlib.blake2b(struct.pack("<4q", *stream, self.layer), digest_size=8).digest()
            generator = torch.Generator(inputs.device).manual_seed(int.from_bytes(digest, "little"))
            part.bernoulli_(1 - self.probability, generator=generator)
        return inputs * kept.div_(1 - self.probability)


def has_dropout(transformer: nn.Module) -> bool:
    """Whether an adapter drops its inputs in training."""
    return any(isinstance(module, AdapterDropout) for module in transformer.modules())


def set_dropout(transformer: ModelMixin, adapter: str, probability: float) -> None:
    """Let an adapter drop its inputs with this probability; 0 takes away what an earlier trainer has set."""
    layers = [module for module in transformer.modules() if isinstance(module, LoraLayer)]
    for number, module in enumerate(layers):
        of_adapters = module.lora_dropout
        if adapter in of_adapters and (probability or isinstance(of_adapters[adapter], AdapterDropout)):
            of_adapters[adapter] = AdapterDropout(probability, number) if probability else nn.Identity()
