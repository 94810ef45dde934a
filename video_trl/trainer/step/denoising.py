"""
Draw timesteps and noise, and make noisy latents with their target.

Which random numbers a sample sees is a function of (seed, step, sample index), and of nothing else: neither the batch
split, nor the number of processes or loader workers, nor evaluation, nor a restart, nor whatever else draws from a
global generator changes them. That is what makes runs comparable and resumable exactly.
"""

import hashlib
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...diffusion import LossWeighting, TimestepSampling, bell_weights, loss_weights
from ...models import ModelFamily
from .dropout import Stream
from .timestep_draws import RowsOfStep, TimestepDraw, draw_together


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
    num_choices: int | Sequence[int] | Tensor,
) -> NoiseDraw:
    """
    Draw what a training step needs, for each sample from its own generator, in the order u, choice, noise.

    Args:
        seed (`int`): Seed of the run.
        steps (`Iterable[int]`): For each sample, the optimizer steps done so far, or `EVALUATION_STEP`.
        indices (`Iterable[int]`): Indices of the B samples of the batch in their dataset.
        latents_shape (`Sequence[int]`): Shape `(C, F, H, W)` of the latents of one video.
        num_noises (`int`): Independent noises K per sample.
        num_choices (`int`, or one of each sample): Number of options that `choice` selects from.

    Returns:
        [`NoiseDraw`]: The numbers, on the CPU. The first noise of a sample does not depend on `num_noises`.
    """
    us, choices, noises = [], [], []
    numbers = list(indices)
    options = [num_choices] * len(numbers) if isinstance(num_choices, int) else map(int, num_choices)
    for step, index, number in zip(steps, numbers, options, strict=True):
        generator = sample_generator(seed, step, index)
        us.append(torch.rand((), generator=generator, dtype=torch.float64))
        choices.append(torch.randint(number, (), generator=generator))
        # One call per noise: a single call for all would hand out its numbers in another order.
        noises.append(torch.stack([torch.randn(*latents_shape, generator=generator) for _ in range(num_noises)]))
    return NoiseDraw(torch.stack(us), torch.stack(choices), torch.stack(noises))


@dataclass(frozen=True)
class Denoising:
    """
    Noisy videos, side by side, and what a perfect transformer would predict for them.

    Attributes:
        noisy_latents (`torch.Tensor` of shape `(N, C, F, H, W)`): Latents with noise.
        timesteps (`torch.Tensor` of shape `(N,)`): Timesteps on the model's scale, float32.
        conditions (`dict[str, torch.Tensor]`): What the transformer is conditioned on, each `(N, ...)`.
        target (`torch.Tensor` of shape `(N, C, F, H, W)`): The velocity to regress.
        group_size (`int`): How many of them a loss compares with each other, the chosen one first.
        weights (`torch.Tensor` of shape `(N, 1, F, H, W)`, *optional*): Weights of the elements in the errors; H and W
            may be 1.
        streams (`tuple`, *optional*): Of each video, by which an adapter drops its inputs; none: it does not.
    """

    noisy_latents: Tensor
    timesteps: Tensor
    conditions: dict[str, Tensor]
    target: Tensor
    group_size: int = 1
    weights: Tensor | None = None
    streams: tuple[Stream, ...] | None = None

    def __getitem__(self, videos: slice) -> "Denoising":
        """Some of its videos."""
        conditions = {name: values[videos] for name, values in self.conditions.items()}
        noisy_latents, timesteps, target = self.noisy_latents[videos], self.timesteps[videos], self.target[videos]
        weights = None if self.weights is None else self.weights[videos]
        streams = None if self.streams is None else self.streams[videos]
        return Denoising(noisy_latents, timesteps, conditions, target, self.group_size, weights, streams)

    def one_by_one(self) -> list["Denoising"]:
        """Its videos, each by itself."""
        return [self[number : number + 1] for number in range(len(self.timesteps))]


class DenoisingStep:
    """
    The part of a step before the transformer: what each `compute_loss` draws and prepares.

    Args:
        family ([`ModelFamily`]): Of the transformer.
        seed (`int`): Seed of the run.
        device (`torch.device`): Where the results are needed.
        now (`Callable`): The step under which samples draw: optimizer steps done so far, or `EVALUATION_STEP`.
        sampling (`str`): Distribution of the timesteps, as `timestep_sampling` of [`VideoTrainerConfig`].
        shift (`float`): Shift of the noise levels; 1 leaves them.
        logit_mean (`float`): Mean of the logit-normal distribution.
        logit_std (`float`): Its standard deviation.
        timestep_range (`(float, float)`, *optional*): Lowest and highest timestep, on the model's scale.
        timestep_draw (`str`): Whether the rows of a training step draw each for itself; see [`draw_together`].
        drops (`bool`): Whether an adapter drops its inputs in training.

    Attributes:
        rows ([`RowsOfStep`], *optional*): Which rows of the step the micro-batch at hand has; none: it is the whole.
        noise_steps (`Callable`): Sample indices to the step under which each draws: `now()` for all, unless it is
            replaced.
    """

    def __init__(
        self,
        family: ModelFamily,
        *,
        seed: int,
        device: torch.device,
        now: Callable[[], int],
        sampling: TimestepSampling = "uniform",
        shift: float = 1.0,
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        timestep_range: Sequence[float] | None = None,
        timestep_draw: TimestepDraw = "independent",
        drops: bool = False,
    ) -> None:
        self.drops = drops
        self._drawn: tuple[Stream, ...] | None = None  # of the samples of the last draw, in a step with dropout
        self.timestep_draw: TimestepDraw = timestep_draw
        self.rows: RowsOfStep | None = None
        self.family, self.seed, self.device, self.now = family, seed, device, now
        self.sampling, self.shift, self.logit_mean, self.logit_std = sampling, shift, logit_mean, logit_std
        self.timestep_range, self._condition_columns = timestep_range, family.condition_columns
        self.noise_steps: Callable[[Sequence[int]], list[int]] = lambda indices: [now()] * len(indices)

    def draw(
        self,
        indices: Iterable[int],
        latents_shape: Sequence[int],
        *,
        num_noises: int = 1,
        num_choices: int | Sequence[int] | Tensor = 1,
    ) -> NoiseDraw:
        """
        Random numbers of a batch, a function of (seed, step, sample index) only; but for `timestep_draw`, by which u
        depends on the place of a row in its step.

        Args:
            indices (`Iterable[int]`): Positions of the B samples in their dataset; a tensor must be on the CPU.
            latents_shape (`Sequence[int]`): Shape `(C, F, H, W)` of the latents of one video.
            num_noises (`int`, defaults to `1`): Independent noises per sample.
            num_choices (`int`, or one of each sample, defaults to `1`): Number of options of `choice`.

        Returns:
            [`NoiseDraw`]: Choice and noise on the trainer's device, u on the CPU, where timesteps are made of it.
        """
        numbers = [int(index) for index in indices]
        steps = self.noise_steps(numbers)
        drawn = draw_noise(self.seed, steps, numbers, latents_shape, num_noises=num_noises, num_choices=num_choices)
        u, now = drawn.u, self.now()
        is_training = now != EVALUATION_STEP
        self._drawn = tuple((self.seed, now, number) for number in numbers) if self.drops and is_training else None
        if is_training and self.timestep_draw != "independent":
            rows = self.rows or RowsOfStep(0, len(numbers))
            u = draw_together(self.timestep_draw, u, rows, now, partial(sample_generator, self.seed))
        return NoiseDraw(u, *to_device(self.device, drawn.choice, drawn.noise))

    def timesteps(self, u: Tensor) -> Tensor:
        """Timesteps `(B,)` on the model's scale and the trainer's device, from u `(B,)`, as configured."""
        timesteps = self.family.noise_process.sample_timesteps(
            u,
            scheme=self.sampling,
            shift=self.shift,
            logit_mean=self.logit_mean,
            logit_std=self.logit_std,
            timestep_range=self.timestep_range,
        )
        return to_device(self.device, timesteps)[0]

    def bell_weights(self, timesteps: Tensor) -> Tensor:
        """Weights `(N,)` of timesteps `(N,)` on the model's scale; see [`~video_trl.diffusion.bell_weights`]."""
        shift = self.shift if self.sampling == "shifted" else 1.0
        scale = self.family.noise_process.num_train_timesteps
        low, high = self.timestep_range or (0, scale)
        return bell_weights(timesteps / scale, shift=shift, level_range=(low / scale, high / scale))

    def loss_weights(self, timesteps: Tensor, weighting: LossWeighting, gamma: float) -> Tensor:
        """Weights `(N,)` of timesteps `(N,)` on the model's scale; see [`~video_trl.diffusion.loss_weights`]."""
        return loss_weights(self.family.noise_process, timesteps, weighting, gamma=gamma)

    def conditions(self, inputs: Mapping[str, Tensor], repeats: int = 1) -> dict[str, Tensor]:
        """What the transformer is conditioned on, each sample's `repeats` times in a row: `(B * repeats, ...)`."""
        return {name: inputs[name].repeat_interleave(repeats, dim=0) for name in self._condition_columns}

    def prepare(
        self,
        latents: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        conditions: dict[str, Tensor],
        *,
        group_size: int = 1,
        weights: Tensor | None = None,
    ) -> Denoising:
        """
        Videos `(N, C, F, H, W)` with noise of that shape added as timesteps `(N,)` say, and their velocity; groups of
        `group_size` side by side, the chosen video first; `weights` of groups `(N / group_size, 1, F, H, W)`. The
        groups are those of the samples of the last `draw`.
        """
        process = self.family.noise_process
        noisy_latents = process.add_noise(latents, noise, timesteps)
        target = process.velocity(latents, noise, timesteps)
        weights = None if weights is None else weights.repeat_interleave(group_size, dim=0)  # the same for all
        streams = None if self._drawn is None else tuple(each for each in self._drawn for _ in range(group_size))
        assert streams is None or len(streams) == len(latents), "videos of other samples than were drawn for"
        return Denoising(noisy_latents, timesteps, conditions, target, group_size, weights, streams)
