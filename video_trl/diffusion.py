"""How latents get noisy and which velocity a transformer regresses. Schedule arithmetic is float32, never lower."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor


TimestepSampling = Literal["uniform", "logit_normal", "shifted"]
LossWeighting = Literal["none", "cosmap", "min_snr"]


class NoiseProcess(Protocol):
    """How latents get noisy and which velocity is regressed: [`FlowMatching`] or [`VPrediction`]."""

    @property
    def num_train_timesteps(self) -> int:
        """Scale of the timesteps that the transformer takes."""

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy latents `(B, C, F, H, W)` at timesteps `(B,)`; float32, or float64 for float64 latents."""

    def velocity(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Velocity `(B, C, F, H, W)` that the transformer regresses at timesteps `(B,)`, in the same dtype."""

    def separate(self, noisy_latents: Tensor, velocity: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Latents and noise, of which noisy latents and their velocity are made; the inverse of the two above."""

    def sample_timesteps(
        self,
        u: Tensor,
        *,
        scheme: TimestepSampling = "uniform",
        shift: float = 1.0,
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        timestep_range: Sequence[float] | None = None,
    ) -> Tensor:
        """Timesteps `(B,)`, as the transformer takes them, from uniform numbers `(B,)`; see [`noise_levels`]."""


@dataclass(frozen=True)
class FlowMatching:
    r"""
    Rectified flow, as Wan uses it: a straight line from the video to the noise.

    $$x_\sigma = (1 - \sigma) x + \sigma \epsilon, \qquad v = \epsilon - x, \qquad \sigma = t / T$$

    Args:
        num_train_timesteps (`int`, *optional*, defaults to `1000`):
            \\( T \\), the scale of the timesteps that the transformer takes. Timesteps are floats on [0, T].
    """

    num_train_timesteps: int = 1000

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """
        Noisy latents at the given timesteps.

        Args:
            latents (`torch.Tensor` of shape `(B, C, F, H, W)`):
                Normalised latents of clean videos, any floating dtype.
            noise (`torch.Tensor` of shape `(B, C, F, H, W)`):
                Standard normal noise.
            timesteps (`torch.Tensor` of shape `(B,)`):
                Timesteps on [0, `num_train_timesteps`]; 0 is the clean video.

        Returns:
            `torch.Tensor` of shape `(B, C, F, H, W)`: Noisy latents; float32, or float64 for float64 latents.

        Raises:
            ValueError: If the shapes are not as above.
        """
        _check_shapes(latents, noise, timesteps)
        dtype = torch.promote_types(latents.dtype, torch.float32)
        sigmas = timesteps.to(dtype) / self.num_train_timesteps
        sigmas = sigmas.view(-1, *(1,) * (latents.ndim - 1))  # (B, 1, 1, 1, 1)
        return (1 - sigmas) * latents.to(dtype) + sigmas * noise.to(dtype)

    def velocity(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """
        Velocity that the transformer regresses: `noise - latents`, at every timestep.

        Takes what [`FlowMatching.add_noise`] takes, so that processes whose velocity depends on the timestep fit too.

        Returns:
            `torch.Tensor` of shape `(B, C, F, H, W)`: Target; float32, or float64 for float64 latents.

        Raises:
            ValueError: If the shapes are not as in [`FlowMatching.add_noise`].
        """
        _check_shapes(latents, noise, timesteps)
        dtype = torch.promote_types(latents.dtype, torch.float32)
        return noise.to(dtype) - latents.to(dtype)

    def separate(self, noisy_latents: Tensor, velocity: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Latents and noise `(B, C, F, H, W)` of noisy latents and their velocity; takes and raises the same."""
        _check_shapes(noisy_latents, velocity, timesteps)
        dtype = torch.promote_types(noisy_latents.dtype, torch.float32)
        sigmas = (timesteps.to(dtype) / self.num_train_timesteps).view(-1, *(1,) * (noisy_latents.ndim - 1))
        noisy_latents, velocity = noisy_latents.to(dtype), velocity.to(dtype)
        return noisy_latents - sigmas * velocity, noisy_latents + (1 - sigmas) * velocity

    def sample_timesteps(
        self,
        u: Tensor,
        *,
        scheme: TimestepSampling = "uniform",
        shift: float = 1.0,
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        timestep_range: Sequence[float] | None = None,
    ) -> Tensor:
        """
        Timesteps from uniform random numbers. A pure function: the same `u` gives the same timesteps.

        Takes what [`noise_levels`] takes, whose result is multiplied by `num_train_timesteps`; the range is one of
        timesteps here.

        Returns:
            `torch.Tensor` of shape `(B,)`: Timesteps on [0, `num_train_timesteps`], float32.

        Raises:
            ValueError: As [`noise_levels`].
        """
        levels = _restricted_levels(self, u, timestep_range, scheme, shift, logit_mean, logit_std)
        return levels * self.num_train_timesteps


@dataclass(frozen=True)
class VPrediction:
    r"""
    Diffusion on a discrete schedule with velocity prediction, as CogVideoX uses it.

    $$x_t = \sqrt{\bar\alpha_t}\, x + \sqrt{1 - \bar\alpha_t}\, \epsilon, \qquad
    v = \sqrt{\bar\alpha_t}\, \epsilon - \sqrt{1 - \bar\alpha_t}\, x$$

    Plain mean squared error of \\( v \\) is CogVideoX's own loss, the error of the recovered video divided by
    \\( 1 - \bar\alpha_t \\): \\( \hat x = \sqrt{\bar\alpha_t}\, x_t - \sqrt{1 - \bar\alpha_t}\, \hat v \\) makes
    \\( \hat x - x = -\sqrt{1 - \bar\alpha_t}\, (\hat v - v) \\).

    The schedule \\( \bar\alpha_t \\): betas whose square roots are evenly spaced; then a division of the
    signal-to-noise ratio by `snr_shift_scale`; then, where asked for, a rescaling that leaves no signal at the last
    timestep. The two square roots are rounded once, to float32: in bfloat16 some timesteps would get no noise at all.

    Args:
        num_train_timesteps (`int`, *optional*, defaults to `1000`): Number of timesteps, counted from 0.
        beta_start (`float`, *optional*, defaults to `0.00085`): First beta.
        beta_end (`float`, *optional*, defaults to `0.012`): Last beta.
        snr_shift_scale (`float`, *optional*, defaults to `1.0`): Divisor of the signal-to-noise ratio; 3.0 in
            CogVideoX-2B and 1.0 in the 5B checkpoints.
        rescale_betas_zero_snr (`bool`, *optional*, defaults to `True`): Whether the last timestep is pure noise.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    snr_shift_scale: float = 1.0
    rescale_betas_zero_snr: bool = True

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "VPrediction":
        """
        The process behind a scheduler, from its configuration.

        Args:
            config (`Mapping[str, Any]`): `scheduler.config` of CogVideoX's DDIM or DPM scheduler.

        Raises:
            ValueError: If an entry is missing, or asks for another prediction or another kind of betas.
        """
        expected = {"prediction_type": "v_prediction", "beta_schedule": "scaled_linear", "trained_betas": None}
        actual = {name: config.get(name) for name in expected}
        if actual != expected:
            raise ValueError(
                f"Expected a scheduler with {expected}, got {actual}. Use the scheduler of the checkpoint."
            )
        names = tuple(cls.__dataclass_fields__)
        missing = [name for name in names if name not in config]
        if missing:
            raise ValueError(
                f"The scheduler's configuration lacks {missing}, on which CogVideoX checkpoints differ. Use the "
                "scheduler of the checkpoint (CogVideoXDDIMScheduler or CogVideoXDPMScheduler)."
            )
        return cls(**{name: config[name] for name in names})

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """
        Noisy latents at the given timesteps.

        Args:
            latents (`torch.Tensor` of shape `(B, C, F, H, W)`):
                Normalised latents of clean videos, any floating dtype.
            noise (`torch.Tensor` of shape `(B, C, F, H, W)`):
                Standard normal noise.
            timesteps (`torch.Tensor` of shape `(B,)`):
                Integers in [0, `num_train_timesteps`), as [`VPrediction.sample_timesteps`] gives them.

        Returns:
            `torch.Tensor` of shape `(B, C, F, H, W)`: Noisy latents; float32, or float64 for float64 latents.

        Raises:
            ValueError: If the shapes are not as above, or the timesteps no integers.
        """
        signal, noise_scale = self._scales(latents, noise, timesteps)
        return signal * latents.to(signal.dtype) + noise_scale * noise.to(signal.dtype)

    def velocity(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """
        Velocity that the transformer regresses. Takes and raises what [`VPrediction.add_noise`] does.

        Returns:
            `torch.Tensor` of shape `(B, C, F, H, W)`: Target; float32, or float64 for float64 latents.
        """
        signal, noise_scale = self._scales(latents, noise, timesteps)
        return signal * noise.to(signal.dtype) - noise_scale * latents.to(signal.dtype)

    def separate(self, noisy_latents: Tensor, velocity: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Latents and noise `(B, C, F, H, W)` of noisy latents and their velocity; takes and raises the same."""
        signal, noise_scale = self._scales(noisy_latents, velocity, timesteps)
        noisy_latents, velocity = noisy_latents.to(signal.dtype), velocity.to(signal.dtype)
        return signal * noisy_latents - noise_scale * velocity, noise_scale * noisy_latents + signal * velocity

    def sample_timesteps(
        self,
        u: Tensor,
        *,
        scheme: TimestepSampling = "uniform",
        shift: float = 1.0,
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        timestep_range: Sequence[float] | None = None,
    ) -> Tensor:
        """
        Timesteps from uniform random numbers. A pure function: the same `u` gives the same timesteps.

        Takes what [`noise_levels`] takes; its result, multiplied by `num_train_timesteps`, is rounded down. The
        schemes are distributions of the timestep here: the shift of the signal-to-noise ratio is in the schedule
        already. The range is one of timesteps.

        Returns:
            `torch.Tensor` of shape `(B,)`: Timesteps in [0, `num_train_timesteps`), int64.

        Raises:
            ValueError: As [`noise_levels`].
        """
        levels = _restricted_levels(self, u, timestep_range, scheme, shift, logit_mean, logit_std)
        return (levels * self.num_train_timesteps).long().clamp(max=self.num_train_timesteps - 1)

    def _scales(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of signal and noise, `(B, 1, 1, 1, 1)`, in the dtype to compute in."""
        _check_shapes(latents, noise, timesteps)
        if timesteps.is_floating_point() or timesteps.is_complex():
            raise ValueError(
                f"`timesteps` must be integers in [0, {self.num_train_timesteps}) for this schedule, got "
                f"{timesteps.dtype}. Let `sample_timesteps` make them from numbers in [0, 1]."
            )
        dtype = torch.promote_types(latents.dtype, torch.float32)
        shape = (-1, *(1,) * (latents.ndim - 1))
        signal, noise_scale = (scale[timesteps] for scale in _schedule_on(self, timesteps.device, dtype))
        return signal.view(shape), noise_scale.view(shape)


@lru_cache(maxsize=8)
def _schedule(process: VPrediction) -> tuple[Tensor, Tensor]:
    """Square roots of alpha-bar and of 1 - alpha-bar at every timestep, float64."""
    roots = torch.linspace(
        process.beta_start**0.5, process.beta_end**0.5, process.num_train_timesteps, dtype=torch.float64
    )
    alphas_bar = torch.cumprod(1 - roots**2, dim=0)
    alphas_bar = alphas_bar / (process.snr_shift_scale + (1 - process.snr_shift_scale) * alphas_bar)
    if process.rescale_betas_zero_snr:
        signal = alphas_bar.sqrt()
        first, last = signal[0].clone(), signal[-1].clone()
        alphas_bar = ((signal - last) * first / (first - last)) ** 2
    return alphas_bar.sqrt(), (1 - alphas_bar).sqrt()


@lru_cache(maxsize=16)
def _schedule_on(process: VPrediction, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The schedule where it is used: a copy in every step would make the host wait for the device."""
    signal, noise_scale = _schedule(process)
    return signal.to(device, dtype), noise_scale.to(device, dtype)


def noise_levels(
    u: Tensor,
    *,
    scheme: TimestepSampling = "uniform",
    shift: float = 1.0,
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    level_range: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    r"""
    Timesteps as proportions of their scale, from uniform random numbers.

    Args:
        u (`torch.Tensor` of shape `(B,)`):
            Uniform random numbers in [0, 1].
        scheme (`str`, *optional*, defaults to `"uniform"`):
            Distribution of the noise level \\( \sigma \\): `"uniform"` takes `u` itself; `"logit_normal"` takes
            `sigmoid(logit_mean + logit_std * z)` with `z` the normal quantile of `u` (Stable Diffusion 3);
            `"shifted"` takes `shift * u / (1 + (shift - 1) * u)`, the distribution of a sampler with that flow shift.
        shift (`float`, *optional*, defaults to `1.0`):
            Flow shift, positive, read by `"shifted"` only. Above 1 it favours high noise; 1 is uniform.
        logit_mean (`float`, *optional*, defaults to `0.0`):
            Mean of the logit, read by `"logit_normal"` only.
        logit_std (`float`, *optional*, defaults to `1.0`):
            Standard deviation of the logit, positive, read by `"logit_normal"` only.
        level_range (`tuple[float, float]`, *optional*, defaults to `(0.0, 1.0)`):
            Lowest and highest level. The distribution of the scheme is restricted to it: `u` is first brought to what
            lies between the values of its distribution function at both ends, so no draw is thrown away.

    Returns:
        `torch.Tensor` of shape `(B,)`: Levels in [0, 1], float32.

    Raises:
        ValueError: If `scheme` is unknown, `u` is no vector or outside [0, 1], `shift` or `logit_std` is not
            positive, or the range is empty, outside [0, 1], or one that the scheme never draws from.
    """
    if u.ndim != 1 or not bool(((u >= 0) & (u <= 1)).all()):
        raise ValueError(f"`u` must have shape (B,) with values in [0, 1], got shape {tuple(u.shape)}: {u}.")
    if scheme not in get_args(TimestepSampling):
        schemes = ", ".join(map(repr, get_args(TimestepSampling)))
        raise ValueError(f"`scheme` must be one of {schemes}, got {scheme!r}.")
    if not shift > 0 or not logit_std > 0:
        raise ValueError(f"`shift` and `logit_std` must be positive, got {shift} and {logit_std}.")
    low, high = level_range
    if not 0 <= low < high <= 1:
        raise ValueError(f"A range of noise levels must be (low, high) with 0 <= low < high <= 1, got {level_range}.")
    if (low, high) == (0, 1):
        u = u.float()
    elif scheme == "logit_normal":
        return _logit_normal_between(low, high, u.double(), logit_mean, logit_std)
    else:
        first, last = (end / (shift - (shift - 1) * end) if scheme == "shifted" else end for end in (low, high))
        u = first + (last - first) * u.double()
    if scheme == "logit_normal":
        return torch.sigmoid(logit_mean + logit_std * torch.special.ndtri(u))
    return u.float() if scheme == "uniform" else (shift * u / (1 + (shift - 1) * u)).float()


def _logit_normal_between(low: float, high: float, u: Tensor, mean: float, std: float) -> Tensor:
    """Levels `(B,)` of the logit-normal distribution in a range, from uniform numbers, float64."""
    ends = (torch.logit(torch.tensor([low, high], dtype=torch.float64)) - mean) / std
    # The probabilities of both tails are small, and only near 0 are there as many numbers as that takes.
    side = -1 if ends[0] > 0 else 1
    first, last = torch.special.ndtr(side * ends).tolist()
    if first == last:
        raise ValueError(
            f"The scheme 'logit_normal' draws no noise level in [{low}, {high}]: `logit_mean={mean}`, "
            f"`logit_std={std}`. Choose another range or scheme."
        )
    quantiles = side * torch.special.ndtri(first + (last - first) * u)  # which rounds
    return torch.sigmoid(mean + std * quantiles).clamp(low, high).float()


def _restricted_levels(
    process: NoiseProcess,
    u: Tensor,
    timestep_range: Sequence[float] | None,
    scheme: TimestepSampling,
    shift: float,
    logit_mean: float,
    logit_std: float,
) -> Tensor:
    """[`noise_levels`] within a range of timesteps of a process."""
    low, high = (0, process.num_train_timesteps) if timestep_range is None else timestep_range
    levels = (low / process.num_train_timesteps, high / process.num_train_timesteps)
    return noise_levels(u, scheme=scheme, shift=shift, logit_mean=logit_mean, logit_std=logit_std, level_range=levels)


def loss_weights(process: NoiseProcess, timesteps: Tensor, weighting: LossWeighting, *, gamma: float = 5.0) -> Tensor:
    r"""
    Weights of velocity errors by noise level, as published for each kind of process.

    $$w_{cosmap} = \frac{2}{\pi (1 - 2 \sigma + 2 \sigma^2)}, \qquad w_{min SNR} = \frac{\min(s, \gamma)}{s + 1}$$

    with the noise level \\( \sigma \\) of flow matching (Stable Diffusion 3, mean 1 over uniform levels), and the
    signal-to-noise ratio \\( s \\) of a schedule (Min-SNR, for models that predict v).

    Args:
        process ([`FlowMatching`] or [`VPrediction`]): How latents get noisy.
        timesteps (`torch.Tensor` of shape `(B,)`): Timesteps on the model's scale.
        weighting (`str`): `"none"`, `"cosmap"` or `"min_snr"`.
        gamma (`float`, *optional*, defaults to `5.0`): Of `"min_snr"`, positive.

    Returns:
        `torch.Tensor` of shape `(B,)`: Weights, float32; exactly 1 for `"none"`.

    Raises:
        ValueError: If the weighting is not for this kind of process.
    """
    check_loss_weighting(process, weighting)
    if weighting == "none":
        return torch.ones(timesteps.shape, device=timesteps.device)
    if isinstance(process, VPrediction):
        signal, noise_scale = (scale[timesteps] for scale in _schedule_on(process, timesteps.device, torch.float64))
        # s = (signal / noise)^2, and s + 1 = 1 / noise^2: no division by a noise of 0.
        return torch.minimum(signal**2, gamma * noise_scale**2).float()
    levels = timesteps.double() / process.num_train_timesteps
    return (2 / (math.pi * (1 - 2 * levels + 2 * levels**2))).float()


def check_loss_weighting(process: NoiseProcess, weighting: LossWeighting) -> None:
    """Raise a `ValueError` if a weighting is not for this kind of process."""
    suitable = "min_snr" if isinstance(process, VPrediction) else "cosmap"
    if weighting not in ("none", suitable):
        kind = "predicts v on a noise schedule" if suitable == "min_snr" else "is trained by flow matching"
        raise ValueError(
            f"`loss_weighting={weighting!r}` is not for this model, which {kind}. Use {suitable!r}, or 'none'."
        )


def bell_weights(levels: Tensor, *, shift: float = 1.0, level_range: tuple[float, float] = (0.0, 1.0)) -> Tensor:
    r"""
    Weights of noise levels that fall to 0 at both ends, with mean 1 over the levels that are drawn.

    $$w(\sigma) \propto e^{-2 (\sigma - 1/2)^2} - e^{-1/2}$$

    It is the training weight of DiffSynth-Studio, by which the official PhyGDPO code multiplies every error.

    Args:
        levels (`torch.Tensor` of shape `(B,)`):
            Noise levels in [0, 1], any floating dtype.
        shift (`float`, *optional*, defaults to `1.0`):
            Shift of the levels that are drawn, as in [`noise_levels`], positive; the mean is over 1000 of them.
        level_range (`tuple[float, float]`, *optional*, defaults to `(0.0, 1.0)`):
            Lowest and highest level that is drawn.

    Returns:
        `torch.Tensor` of shape `(B,)`: Weights, not negative; float32, or float64 for float64 levels.
    """
    levels = levels.to(torch.promote_types(levels.dtype, torch.float32))
    return (torch.exp(-2 * (levels - 0.5) ** 2) - math.exp(-0.5)) / _mean_of_bell(shift, level_range)


@lru_cache(maxsize=8)
def _mean_of_bell(shift: float, level_range: tuple[float, float]) -> float:
    u = torch.arange(1, 1001, dtype=torch.float64) / 1000
    levels = noise_levels(u, scheme="shifted", shift=shift, level_range=level_range).double()
    return float((torch.exp(-2 * (levels - 0.5) ** 2) - math.exp(-0.5)).mean())


def _check_shapes(latents: Tensor, noise: Tensor, timesteps: Tensor) -> None:
    if noise.shape != latents.shape or timesteps.shape != latents.shape[:1]:
        raise ValueError(
            "`latents` and `noise` must have the same shape (B, C, F, H, W) and `timesteps` shape (B,), got "
            f"{tuple(latents.shape)}, {tuple(noise.shape)} and {tuple(timesteps.shape)}."
        )
