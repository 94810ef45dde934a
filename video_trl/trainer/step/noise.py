"""
Noise streams: which random numbers a sample sees is a function of (seed, step, sample index), and of nothing else.

Neither the batch split, nor the number of processes or loader workers, nor evaluation, nor a restart, nor whatever
else draws from a global generator changes them. That is what makes runs comparable and resumable exactly.
"""

import hashlib
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


EVALUATION_STEP = -1
"""Step under which evaluation draws: every evaluation of a sample sees the same noise, and training never does."""


@dataclass(frozen=True)
class NoiseDraw:
    """
    Random numbers of a batch.

    Attributes:
        u (`torch.Tensor` of shape `(B,)`): Uniform on (0, 1), float64; becomes the timestep.
        choice (`torch.Tensor` of shape `(B,)`): Uniform on {0, ..., num_choices - 1}, int64.
        noise (`torch.Tensor` of shape `(B, K, C, F, H, W)`): Standard normal, float32; K independent noises a sample.
    """

    u: Tensor
    choice: Tensor
    noise: Tensor


def sample_generator(seed: int, step: int, index: int) -> torch.Generator:
    """
    Generator of one sample at one step.

    Args:
        seed (`int`): Seed of the run.
        step (`int`): Optimizer steps done so far, or `EVALUATION_STEP`.
        index (`int`): Index of the sample in its dataset.

    Returns:
        `torch.Generator`: On the CPU, so that the numbers are the same on every device.
    """
    digest = hashlib.blake2b(struct.pack("<3q", seed, step, index), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little"))


def to_device(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors from the CPU on a device, without waiting until it has done what it is doing."""
    if device.type == "cpu":
        return tensors
    return tuple(tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors)


def draw_noise(
    seed: int,
    steps: Iterable[int],
    indices: Iterable[int],
    latents_shape: Sequence[int],
    *,
    num_noises: int,
    num_choices: int,
) -> NoiseDraw:
    """
    Draw what a training step needs, for each sample from its own generator, in the order u, choice, noise.

    Args:
        seed (`int`): Seed of the run.
        steps (`Iterable[int]`): For each sample, the optimizer steps done so far, or `EVALUATION_STEP`.
        indices (`Iterable[int]`): Indices of the B samples of the batch in their dataset.
        latents_shape (`Sequence[int]`): Shape `(C, F, H, W)` of the latents of one video.
        num_noises (`int`): Independent noises K per sample.
        num_choices (`int`): Number of options that `choice` selects from.

    Returns:
        [`NoiseDraw`]: The numbers, on the CPU. The first noise of a sample does not depend on `num_noises`.
    """
    us, choices, noises = [], [], []
    for step, index in zip(steps, indices, strict=True):
        generator = sample_generator(seed, step, index)
        us.append(torch.rand((), generator=generator, dtype=torch.float64))
        choices.append(torch.randint(num_choices, (), generator=generator))
        # One call per noise: a single call for all would hand out its numbers in another order.
        noises.append(torch.stack([torch.randn(*latents_shape, generator=generator) for _ in range(num_noises)]))
    return NoiseDraw(torch.stack(us), torch.stack(choices), torch.stack(noises))
