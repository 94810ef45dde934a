"""
Errors of the videos of a preference step: from one forward over all of them, or with the graph of one video alive at a
time.

A preference loss needs the errors of all videos of a pair or group at once, but its gradient is a sum over videos: the
gradient of each error times dL/d(error). So the errors are computed first, mostly without a graph, and the videos go
forward and backward one by one afterwards, weighed by that derivative. Loss and gradient are exact, and the graph of
one video is all that is kept: also the exact loss of a group needs no more memory than fine-tuning.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...losses.preference import velocity_error
from ...models import ModelFamily


@dataclass(frozen=True)
class Denoising:
    """
    Noisy videos, side by side, and what a perfect transformer would predict for them.

    Attributes:
        noisy_latents (`torch.Tensor` of shape `(N, C, F, H, W)`): Latents with noise.
        timesteps (`torch.Tensor` of shape `(N,)`): Timesteps on the model's scale, float32.
        conditions (`dict[str, torch.Tensor]`): What the transformer is conditioned on, each `(N, ...)`.
        target (`torch.Tensor` of shape `(N, C, F, H, W)`): The velocity to regress.
    """

    noisy_latents: Tensor
    timesteps: Tensor
    conditions: dict[str, Tensor]
    target: Tensor

    def errors(self, family: ModelFamily, transformer: nn.Module) -> Tensor:
        """Velocity errors `(N,)` of the transformer, from one forward."""
        prediction = family.predict(transformer, self.noisy_latents, self.timesteps, self.conditions)
        return velocity_error(prediction, self.target)

    def __getitem__(self, videos: slice) -> "Denoising":
        """Some of its videos."""
        conditions = {name: values[videos] for name, values in self.conditions.items()}
        return Denoising(self.noisy_latents[videos], self.timesteps[videos], conditions, self.target[videos])

    def one_by_one(self) -> Iterator["Denoising"]:
        """Its videos, each by itself."""
        for number in range(len(self.timesteps)):
            yield self[number : number + 1]


class SequentialErrors:
    """
    Errors of N videos with one graph alive at a time.

    `errors` are what the loss is made of; after its backward pass, which ends there, `backward` carries it on to the
    weights. The graph of the last video is kept from the first pass, so that N videos cost 2N - 1 forwards, not 2N.

    Args:
        denoising ([`Denoising`]): The videos.
        family ([`ModelFamily`]): Of the transformer's family.
        model (`torch.nn.Module`): The policy, as it is wrapped for training.
        no_sync (`Callable`): Makes a context in which processes do not average gradients yet.
        backward (`Callable`, *optional*): Adds the gradients of a scalar, and is told whether it is the last of the
            step; the scalar's own backward pass if not given.

    Attributes:
        errors (`torch.Tensor` of shape `(N,)`): A leaf of the graph, float32.
    """

    def __init__(
        self,
        denoising: Denoising,
        family: ModelFamily,
        model: nn.Module,
        no_sync: Callable[[], AbstractContextManager[None]] = nullcontext,
        backward: Callable[[Tensor, bool], None] = lambda value, final: value.backward(),
    ) -> None:
        self._family, self._model, self._no_sync, self._backward = family, model, no_sync, backward
        *self._others, last = denoising.one_by_one()
        with torch.no_grad():
            known = [video.errors(family, model) for video in self._others]
        with self._local(final=not self._others):
            self._last = last.errors(family, model)
        self.errors = torch.cat([*known, self._last.detach()]).requires_grad_()

    def backward(self) -> None:
        """Add the gradients of the weights, video by video, given the gradient of `errors`."""
        coefficients = self.errors.grad
        assert coefficients is not None, "the backward pass of the loss comes first"
        # The graph that is alive goes first, and makes room.
        with self._local(final=not self._others):
            self._backward((coefficients[-1:] * self._last).sum(), not self._others)
        del self._last
        for number, video in enumerate(self._others):
            final = number == len(self._others) - 1
            with self._local(final=final):
                errors = video.errors(self._family, self._model)
                self._backward((coefficients[number : number + 1] * errors).sum(), final)

    def _local(self, *, final: bool) -> AbstractContextManager[None]:
        """Processes average their gradients in the final backward pass alone, and there only if the trainer does."""
        return nullcontext() if final else self._no_sync()
