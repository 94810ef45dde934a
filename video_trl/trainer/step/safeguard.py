"""Hold rejected videos back where a step would make the chosen one worse: by outputs, or by the weights' gradients."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ...losses.safeguard import residual_products, safeguard_scales, safeguard_shares


Record = Callable[[Mapping[str, Tensor]], None]
Gradients = list[Tensor | None]


class OutputSafeguard:
    """
    The test on outputs: as if errors with like residuals had like gradients of the weights. It costs no forward.

    Args:
        mu (`float`): Of [`~video_trl.losses.safeguard.safeguard_scales`].
        record (`Callable`): Takes the scales as metrics.
    """

    def __init__(self, mu: float, record: Record) -> None:
        self._mu, self._record = mu, record

    def watch(self, errors: Tensor, residuals: Tensor, group_size: int) -> None:
        """
        Scale the gradient that the loss will leave on the errors of rejected videos; values stay as they are.

        Args:
            errors (`torch.Tensor` of shape `(N,)`): Of the policy.
            residuals (`torch.Tensor` of shape `(N, C, F, H, W)`): What they are the means of squares of, no gradient.
            group_size (`int`): Videos of a group, the chosen one first.
        """
        if group_size < 2:
            raise ValueError(
                "`safeguard` holds back the rejected videos of a group, but the trainer does not say which videos "
                "belong together: pass `group_size` to `self.step.prepare`, or use `safeguard='none'`."
            )
        products = residual_products(residuals, group_size)  # (B, 1 + k)

        def hold(gradient: Tensor) -> Tensor:
            coefficients = gradient.view(-1, group_size)
            weighted = coefficients[:, :1] * coefficients * products
            scales = safeguard_scales(weighted[:, :1], weighted[:, 1:], safeguard_shares(coefficients), self._mu)
            _record_scales(self._record, scales, coefficients[:, 1:])
            return torch.cat([coefficients[:, :1], scales * coefficients[:, 1:]], dim=1).view(-1)

        errors.register_hook(hold)


class ParameterSafeguard:
    """
    The test on the gradients of the weights themselves, for which the videos' backward passes must be separate.

    It holds what earlier passes left, the chosen video's gradient and one rejected video's: two more than otherwise.

    Args:
        parameters (`Sequence[torch.nn.Parameter]`): The weights that are trained.
        mu (`float`): Of [`~video_trl.losses.safeguard.safeguard_scales`].
        record (`Callable`): Takes the scales as metrics.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], mu: float, record: Record) -> None:
        self._parameters, self._mu, self._record = parameters, mu, record

    def add_gradients(self, coefficients: Tensor, group_size: int, add_gradient: Callable[[int], None]) -> None:
        """
        Add the gradients of all videos to the weights, those of rejected ones scaled.

        Args:
            coefficients (`torch.Tensor` of shape `(N,)`): Derivatives of the loss by the errors.
            group_size (`int`): Videos of a group, the chosen one first.
            add_gradient (`Callable`): Adds the weighted gradient of the video with this number to the weights'.
        """
        total = self._take()
        groups = coefficients.view(-1, group_size)
        for group, shares in enumerate(safeguard_shares(groups)):
            start = group * group_size
            add_gradient(start)
            chosen = self._take()
            squared = _inner(chosen, chosen)
            _add(total, chosen)
            scales = []
            for place in range(1, group_size):
                add_gradient(start + place)
                rejected = self._take()
                scale = safeguard_scales(squared, _inner(chosen, rejected), shares[place - 1], self._mu)
                _add(total, rejected, scale)
                scales.append(scale)
            _record_scales(self._record, torch.stack(scales), groups[group, 1:])
        for parameter, gradient in zip(self._parameters, total, strict=True):
            parameter.grad = gradient

    def _take(self) -> Gradients:
        """The gradients that the weights have, which have none afterwards."""
        gradients: Gradients = []
        for parameter in self._parameters:
            gradients.append(parameter.grad)
            parameter.grad = None
        return gradients


def _inner(left: Gradients, right: Gradients) -> Tensor:
    pairs = zip(left, right, strict=True)
    return torch.stack([(a * b).sum() for a, b in pairs if a is not None and b is not None]).sum()


def _add(total: Gradients, gradients: Gradients, scale: Tensor | None = None) -> None:
    """Add to `total` in place, scaled in place: each list is as large as all weights that are trained."""
    for place, gradient in enumerate(gradients):
        if gradient is not None:
            part, before = gradient if scale is None else gradient.mul_(scale), total[place]
            total[place] = part.clone() if before is None else before.add_(part)


def _record_scales(record: Record, scales: Tensor, coefficients: Tensor) -> None:
    """
    Metrics of the scales of groups `(..., k)`. In the place of a video that the loss does not push (its score left it
    out, or its gap is clipped) stands the mean of its group: to leave it out, the host would wait for the device.
    """
    pushed = coefficients != 0
    held = torch.stack([1 - scales, (scales < 1).to(scales.dtype)])  # (2, ..., k)
    means = (held * pushed).sum(dim=-1, keepdim=True) / pushed.sum(dim=-1, keepdim=True).clamp_min(1)
    amount, is_held = held.where(pushed, means)
    record({"safeguard/scale": 1 - amount, "safeguard/held_back": is_held})
