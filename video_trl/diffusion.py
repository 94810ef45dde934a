"""How latents get noisy and which velocity a transformer regresses. Schedule arithmetic is float32, never lower."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor


TimestepSampling = Literal["uniform", "logit_normal", "shifted"]


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

    def sample_timesteps(
        self,
        u: Tensor,
        *,
        scheme: TimestepSampling = "uniform",
        shift: float = 1.0,
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
    ) -> Tensor:
        r"""
        Timesteps from uniform random numbers. A pure function: the same `u` gives the same timesteps.

        Args:
            u (`torch.Tensor` of shape `(B,)`):
                Uniform random numbers in [0, 1].
            scheme (`str`, *optional*, defaults to `"uniform"`):
                Law of the noise level \\( \sigma \\): `"uniform"` takes `u` itself; `"logit_normal"` takes
                `sigmoid(logit_mean + logit_std * z)` with `z` the normal quantile of `u` (Stable Diffusion 3);
                `"shifted"` takes `shift * u / (1 + (shift - 1) * u)`, the law of a sampler with that flow shift.
            shift (`float`, *optional*, defaults to `1.0`):
                Flow shift, positive, read by `"shifted"` only. Above 1 it favours high noise; 1 is uniform.
            logit_mean (`float`, *optional*, defaults to `0.0`):
                Mean of the logit, read by `"logit_normal"` only.
            logit_std (`float`, *optional*, defaults to `1.0`):
                Standard deviation of the logit, positive, read by `"logit_normal"` only.

        Returns:
            `torch.Tensor` of shape `(B,)`: Timesteps on [0, `num_train_timesteps`], float32.

        Raises:
            ValueError: If `scheme` is unknown, `u` is no vector or outside [0, 1], or `shift` or `logit_std` is not
                positive.
        """
        if u.ndim != 1 or not bool(((u >= 0) & (u <= 1)).all()):
            raise ValueError(f"`u` must have shape (B,) with values in [0, 1], got shape {tuple(u.shape)}: {u}.")
        if scheme not in get_args(TimestepSampling):
            schemes = ", ".join(map(repr, get_args(TimestepSampling)))
            raise ValueError(f"`scheme` must be one of {schemes}, got {scheme!r}.")
        if not shift > 0 or not logit_std > 0:
            raise ValueError(f"`shift` and `logit_std` must be positive, got {shift} and {logit_std}.")
        u = u.float()
        if scheme == "uniform":
            sigmas = u
        elif scheme == "logit_normal":
            sigmas = torch.sigmoid(logit_mean + logit_std * torch.special.ndtri(u))
        else:
            sigmas = shift * u / (1 + (shift - 1) * u)
        return sigmas * self.num_train_timesteps


def _check_shapes(latents: Tensor, noise: Tensor, timesteps: Tensor) -> None:
    if noise.shape != latents.shape or timesteps.shape != latents.shape[:1]:
        raise ValueError(
            "`latents` and `noise` must have the same shape (B, C, F, H, W) and `timesteps` shape (B,), got "
            f"{tuple(latents.shape)}, {tuple(noise.shape)} and {tuple(timesteps.shape)}."
        )
