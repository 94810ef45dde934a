"""
How far rejected videos must be held back for a step not to make the chosen video worse.

A preference loss gives each error e a coefficient a = dL/de, positive for the chosen video and negative for the
rejected ones, and a step of gradient descent goes along `-(a_w g_w + sum_j a_j g_j)`, g being the gradients of the
errors. To first order it changes the chosen error by minus the inner product of that sum with g_w: where rejected
videos resemble the chosen one, the product turns negative and the chosen video gets worse. Diffusion-SDPO
(https://huggingface.co/papers/2511.03317) scales the rejected video's gradient for a pair; here it is for a group,
with whatever else weighs the errors.
"""

import torch
from torch import Tensor


def safeguard_shares(coefficients: Tensor) -> Tensor:
    """
    Part of the chosen video's own improvement that each rejected video of a group may take away.

    Args:
        coefficients (`torch.Tensor` of shape `(B, 1 + k)`):
            Derivatives of the loss by the errors, the chosen video's first.

    Returns:
        `torch.Tensor` of shape `(B, k)`: Proportional to the rejected videos' coefficients, with sum 1; infinite where
        the loss itself is for a larger chosen error (it draws a margin back that is too wide).
    """
    weights = coefficients[:, 1:].abs()
    shares = weights / weights.sum(dim=1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    return shares.where(coefficients[:, :1] > 0, torch.inf)


def safeguard_scales(chosen: Tensor, rejected: Tensor, shares: Tensor, mu: float) -> Tensor:
    r"""
    What the gradient of each rejected video is multiplied by.

    $$\lambda_j = \min \left( 1, \frac{(1 - \mu) \, \rho_j \lVert G_w \rVert^2}{-\langle G_w, G_j \rangle} \right)
    \text{ where } \langle G_w, G_j \rangle < 0, \text{ else } 1, \qquad G = a g$$

    With shares \\( \rho_j \\) of sum 1 the step then improves the chosen video, to first order, at least mu times as
    much as its own gradient alone would. For a pair with \\( a_w = -a_l \\) this is Diffusion-SDPO's
    \\( (1 - \mu) \lVert g_w \rVert^2 / \langle g_w, g_l \rangle \\).

    Args:
        chosen (`torch.Tensor` of shape `(B, 1)`):
            Squared norm of the chosen video's weighted gradient.
        rejected (`torch.Tensor` of shape `(B, k)`):
            Inner product of that with each rejected video's weighted gradient.
        shares (`torch.Tensor` of shape `(B, k)`):
            From [`safeguard_shares`].
        mu (`float`):
            In [0, 1]. 0: the chosen video does not get worse; 1: nothing that acts against it is left.

    Returns:
        `torch.Tensor` of shape `(B, k)`: Scales in [0, 1].
    """
    budget, harm = (1 - mu) * shares * chosen, -rejected
    return torch.where(harm > budget, budget / harm, 1.0)


def residual_products(residuals: Tensor, group_size: int) -> Tensor:
    """
    Inner product of each video's residual with the one of its group's chosen video, a mean over elements.

    The residual is, up to a factor, the gradient of a video's error with respect to the transformer's output.

    Args:
        residuals (`torch.Tensor` of shape `(N, C, F, H, W)`):
            Prediction minus target of videos side by side, float32.
        group_size (`int`):
            Videos of a group, the chosen one first.

    Returns:
        `torch.Tensor` of shape `(N / group_size, group_size)`: The first column is the chosen videos' error.
    """
    groups = residuals.flatten(1).unflatten(0, (-1, group_size))  # (B, 1 + k, elements)
    return (groups[:, :1] * groups).mean(dim=2)
