"""Every training objective as a pure function of tensors.

Three quantities, in the order in which a training step forms them:

- *error* `(B,)`: squared velocity error of one video, averaged over its latent elements ([`velocity_error`]);
- *reward* `(B,)` or `(B, m)`: implicit reward of a video under policy and reference ([`implicit_reward`]);
- *loss* `(B,)`: one value per pair or group. Reducing it over the batch is the trainer's business.

Errors are averaged, not summed, over the elements of a video: otherwise `beta` would depend on resolution and length.
They are formed in float32 at least, because an error gap of 1e-6 matters (`beta` multiplies it) and is 0 in bfloat16.
"""

import logging
import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .alignment import repa_loss as repa_loss
from .alignment import trd_loss as trd_loss


logger = logging.getLogger(__name__)

AlphaMode = Literal["sigmoid", "tanh"]
GammaMode = Literal["paper", "official"]
SFTWeightMode = Literal["dgr", "fixed"]
SFTWeight = float | tuple[Literal["dgr"], float]
Gap = Literal["raw", "log_ratio"]
DPOLossType = Literal["sigmoid", "hinge", "ipo", "mapo"]

GAP_EPSILON = 1e-6  # added to both errors of a ratio: an error of 0 has a finite logarithm
MAPO_STEPS = 1000  # T of MaPO: its margin of one timestep stands for all of them


def velocity_error(prediction: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    r"""
    Squared velocity error of each video, averaged over its latent elements.

    $$\ell_i = \frac{1}{CFHW} \lVert \hat v_i - v_i \rVert^2$$

    Args:
        prediction (`torch.Tensor` of shape `(B, C, F, H, W)`):
            Velocity predicted by the transformer, any floating dtype.
        target (`torch.Tensor` of shape `(B, C, F, H, W)`):
            Velocity to regress, from `noise_process.velocity`.
        weights (`torch.Tensor` that expands to this shape, *optional*):
            Weights of the elements: the mean is over them, divided by the sum of their magnitudes. Negative ones turn
            a preference around: a segment in which the rejected video is the better one.

    Returns:
        `torch.Tensor` of shape `(B,)`: Mean squared error of each video; float32, or float64 for float64 inputs.

    Raises:
        ValueError: If the shapes differ or there is no dimension besides the batch.
    """
    if prediction.shape != target.shape or prediction.ndim < 2:
        raise ValueError(
            "`prediction` and `target` must have the same shape (B, C, F, H, W), got "
            f"{tuple(prediction.shape)} and {tuple(target.shape)}."
        )
    # Cast before subtracting: the difference of two bfloat16 tensors is already rounded.
    dtype = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    squares = (prediction.to(dtype) - target.to(dtype)).square()
    if weights is None:
        return squares.flatten(1).mean(dim=1)
    weights = weights.to(dtype).expand_as(squares)
    return (weights * squares).flatten(1).sum(dim=1) / weights.abs().flatten(1).sum(dim=1)


def implicit_reward(policy_error: Tensor, reference_error: Tensor, beta: float) -> Tensor:
    r"""
    Implicit reward of a video: how much better than the reference the policy denoises it.

    $$r_i = -\frac{\beta}{2} \left( \ell^{\mathrm{policy}}_i - \ell^{\mathrm{reference}}_i \right)$$

    The factor 1/2 is the one of Diffusion-DPO and Flow-DPO, so published values of `beta` carry over.

    Args:
        policy_error (`torch.Tensor` of any shape, usually `(B,)`):
            [`velocity_error`] of the trained model.
        reference_error (`torch.Tensor` of the same shape):
            [`velocity_error`] of the frozen model on the same noisy latents. Carries no gradient in training.
        beta (`float`):
            Strength of the pull towards the reference, positive. Multiplies errors *averaged* over a video, hence its
            size (500 to 5000) next to the 0.1 of language models.

    Returns:
        `torch.Tensor` of the shape of the inputs: Rewards; 0 when policy and reference agree.

    Raises:
        ValueError: If the shapes differ, or the errors are in half precision, where a small gap rounds to 0.
    """
    return -(beta / 2) * error_gap(policy_error, reference_error)


def error_gap(policy_error: Tensor, reference_error: Tensor, kind: Gap = "raw") -> Tensor:
    r"""
    Gap of a video: how much worse than the reference the policy denoises it.

    `"raw"` is the difference of the two errors, of which [`implicit_reward`] is made. `"log_ratio"` is

    $$\log \frac{\ell^{\mathrm{policy}} + 10^{-6}}{\ell^{\mathrm{reference}} + 10^{-6}}$$

    Errors differ by an order of magnitude over timesteps, their ratios do not, so that one `beta` (about 10) fits all
    noise levels.

    Args:
        policy_error (`torch.Tensor` of any shape):
            [`velocity_error`] of the trained model.
        reference_error (`torch.Tensor` of the same shape):
            That of the frozen model, on the same noisy latents.
        kind (`str`, defaults to `"raw"`):
            `"raw"` or `"log_ratio"`.

    Returns:
        `torch.Tensor` of the shape of the inputs: Gaps; exactly 0 when policy and reference agree.

    Raises:
        ValueError: As [`implicit_reward`], or if the kind is unknown.
    """
    _check_errors(policy_error, reference_error)
    _check_mode("gap", kind, get_args(Gap))
    if kind == "raw":
        return policy_error - reference_error
    return torch.log((policy_error + GAP_EPSILON) / (reference_error + GAP_EPSILON))


def gap_slope(policy_error: Tensor, kind: Gap) -> Tensor | float:
    """What [`error_gap`] multiplies the gradient of the policy's error by, detached; 1 for `"raw"`."""
    return 1.0 if kind == "raw" else 1 / (policy_error.detach() + GAP_EPSILON)


def hold_lose_gap(lose_gap: Tensor, weight: float = 1.0, clip: float | None = None) -> Tensor:
    """
    Gap of a rejected video as the loss sees it: at most `clip`, times `weight`.

    Beyond the clip its gradient is exactly 0: a rejected video cannot be made worse without end.

    Args:
        lose_gap (`torch.Tensor` of any shape):
            From [`error_gap`].
        weight (`float`, defaults to `1.0`):
            At 1 nothing changes, to the last bit.
        clip (`float`, *optional*):
            Without it nothing is clipped.
    """
    return weight * (lose_gap if clip is None else lose_gap.clamp(max=clip))


def dpo_loss(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    *,
    loss_type: DPOLossType = "sigmoid",
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""
    Negative log-likelihood, under Bradley-Terry, that the chosen video is preferred; or another loss of the margin.

    $$\mathcal{L}_i = -\log \sigma (r^w_i - r^l_i)$$

    Source: Diffusion-DPO (https://huggingface.co/papers/2311.12908); for rectified flow, Flow-DPO
    (https://huggingface.co/papers/2501.13918). The others have the names of TRL's DPO trainer: hinge of SLiC
    (https://huggingface.co/papers/2305.10425), IPO (https://huggingface.co/papers/2310.12036), label smoothing of
    conservative DPO (https://ericmitchell.ai/cdpo.pdf). With the margin \\( u = r^w_i - r^l_i \\):

    | `loss_type` | loss | no gradient |
    |---|---|---|
    | `"sigmoid"` | \\( -(1 - e) \log \sigma(u) - e \log \sigma(-u) \\), smoothing e | at \\( \sigma(u) = 1 - e \\) |
    | `"hinge"` | \\( \max(0, 1 - u) \\) | from \\( u = 1 \\) on |
    | `"ipo"` | \\( (u - 1/2)^2 \\), which is TRL's without its factor \\( 1 / \beta^2 \\) | at \\( u = 1/2 \\) |

    Args:
        chosen_rewards (`torch.Tensor` of shape `(B,)`):
            Implicit reward of the chosen video, from [`implicit_reward`].
        rejected_rewards (`torch.Tensor` of shape `(B,)`):
            Implicit reward of the rejected video.
        loss_type (`str`, defaults to `"sigmoid"`):
            See above.
        label_smoothing (`float`, defaults to `0.0`):
            Proportion e, in [0, 0.5), of pairs whose labels may be wrong; of `"sigmoid"` alone.

    Returns:
        `torch.Tensor` of shape `(B,)`: Loss of each pair; `log(2)` (1, 1/4) when policy and reference agree.

    Raises:
        ValueError: If the shapes are not the same `(B,)`, the type is unknown, or smoothing is out of range or given
            with another type than `"sigmoid"`.
    """
    _check_pair(chosen_rewards, rejected_rewards)
    check_dpo_loss(loss_type, label_smoothing)
    if loss_type == "mapo":
        raise ValueError("`loss_type='mapo'` is made of errors, without a reference: call `mapo_loss`.")
    margins = chosen_rewards - rejected_rewards
    if loss_type == "hinge":
        return torch.relu(1 - margins)
    if loss_type == "ipo":
        return (margins - 0.5).square()
    if label_smoothing == 0:
        return -F.logsigmoid(margins)
    return -(1 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)


def check_dpo_loss(loss_type: str, label_smoothing: float) -> None:
    """Raise a `ValueError` if these are no options of [`dpo_loss`]."""
    _check_mode("loss_type", loss_type, get_args(DPOLossType))
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"`label_smoothing` must be in [0, 0.5), got {label_smoothing}: with half of the labels wrong there is "
            "nothing to learn."
        )
    if label_smoothing and loss_type != "sigmoid":
        raise ValueError(
            f"`label_smoothing` belongs to `loss_type='sigmoid'`, got {label_smoothing} with {loss_type!r}. "
            "Leave it at 0."
        )


def mapo_loss(chosen_error: Tensor, rejected_error: Tensor, *, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    r"""
    Fine-tuning on the chosen video, with a margin between the two errors in the place of a reference.

    $$\mathcal{L}_i = \ell^w_i - \beta \log \sigma \left( T (\phi(\ell^w_i) - \phi(\ell^l_i)) \right), \qquad
    \phi(\ell) = \frac{\ell / 2}{e^{\ell / 2} - 1}, \qquad T = 1000$$

    Source: MaPO (https://huggingface.co/papers/2406.06424), with the T of its official code. For small errors the
    margin is that of [`dpo_loss`] with beta 500 and a reference whose two errors are equal.

    Args:
        chosen_error (`torch.Tensor` of shape `(B,)`):
            [`velocity_error`] of the policy on the chosen video.
        rejected_error (`torch.Tensor` of shape `(B,)`):
            That on the rejected video.
        beta (`float`):
            Weight of the margin beside the chosen error, positive; the paper's is 0.1.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: Loss of each pair; and what its margin is the difference
        of, T times the score of the chosen and of the rejected video; `(B,)` each.

    Raises:
        ValueError: If the shapes are not the same `(B,)`, or the errors are in half precision.
    """
    _check_errors(chosen_error, rejected_error)
    _check_pair(chosen_error, rejected_error)
    chosen, rejected = _mapo_score(chosen_error), _mapo_score(rejected_error)
    return chosen_error - beta * F.logsigmoid(chosen - rejected), chosen, rejected


def _mapo_score(error: Tensor) -> Tensor:
    half = error / 2
    # At 0 the quotient has the limit 1, of which 0 / 0 knows nothing; nor would its gradient.
    score = half.clamp_min(GAP_EPSILON) / torch.expm1(half.clamp_min(GAP_EPSILON))
    return MAPO_STEPS * score


def group_dpo_loss(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    r"""
    Negative log-likelihood, under Plackett-Luce, that the chosen video ranks first in its group.

    $$\mathcal{L}_i = \log \Big( 1 + \sum_{j=1}^{m} \exp (r^{l_j}_i - r^w_i) \Big)$$

    Source: PhyGDPO (https://huggingface.co/papers/2512.24551), Eqs. 5 and 7 at one timestep. With `m = 1` this is
    [`dpo_loss`].

    Args:
        chosen_rewards (`torch.Tensor` of shape `(B,)`):
            Implicit reward of the chosen video, from [`implicit_reward`].
        rejected_rewards (`torch.Tensor` of shape `(B, m)`):
            Implicit rewards of the `m` rejected videos. Their order does not matter.

    Returns:
        `torch.Tensor` of shape `(B,)`: Loss of each group, in nats; `log(1 + m)` when policy and reference agree.

    Raises:
        ValueError: If the shapes are not `(B,)` and `(B, m)` with `m >= 1`.
    """
    _check_group(chosen_rewards, rejected_rewards)
    # softplus of a log-sum-exp rather than log-softmax: keeps a loss of 1e-9 from rounding to 0.
    return -F.logsigmoid(-torch.logsumexp(rejected_rewards - chosen_rewards[:, None], dim=1))


def group_dpo_bound(chosen_rewards: Tensor, rejected_rewards: Tensor, alpha: Tensor, gamma: Tensor) -> Tensor:
    r"""
    Upper bound of [`group_dpo_loss`] that falls apart into pairs, summed over all rejected videos.

    $$\mathcal{L}_i = \sum_{j=1}^{m} \gamma_{ij} \log \left( 1 + \exp (-\alpha_{ij} (r^w_i - r^{l_j}_i)) \right)$$

    It is an upper bound where `0 < alpha <= 1` and `gamma >= 1 / alpha`. With `m = 1` and `alpha = gamma = 1` this is
    [`dpo_loss`].

    Source: PhyGDPO (https://huggingface.co/papers/2512.24551), Ineq. 8 applied to Eq. 7. The second line of its Eq. 9
    is printed with the opposite sign in the first version, which would push the chosen video down; Eq. 14 and this
    function have the right one.

    Args:
        chosen_rewards (`torch.Tensor` of shape `(B,)`):
            Implicit reward of the chosen video, from [`implicit_reward`].
        rejected_rewards (`torch.Tensor` of shape `(B, m)`):
            Implicit rewards of the `m` rejected videos.
        alpha (`torch.Tensor` of shape `(B, m)`):
            Slope of each pair, from [`physics_weights`]; ones for the unweighted bound.
        gamma (`torch.Tensor` of shape `(B, m)`):
            Weight of each pair, from [`physics_weights`]; ones for the unweighted bound.

    Returns:
        `torch.Tensor` of shape `(B,)`: Loss of each group; `sum_j(gamma) * log(2)` when policy and reference agree.

    Raises:
        ValueError: If the shapes are not as above.
    """
    _check_group(chosen_rewards, rejected_rewards)
    _check_weights(rejected_rewards, alpha, gamma)
    margins = chosen_rewards[:, None] - rejected_rewards  # (B, m)
    return -(gamma * F.logsigmoid(alpha * margins)).sum(dim=1)


def group_dpo_sampled_bound(
    chosen_rewards: Tensor, rejected_rewards: Tensor, alpha: Tensor, gamma: Tensor, *, num_rejected: int | Tensor
) -> Tensor:
    r"""
    One-sample estimate of [`group_dpo_bound`]: one rejected video stands for all `m` of its group.

    $$\mathcal{L}_i = m \, \gamma_{ij} \log \left( 1 + \exp (-\alpha_{ij} (r^w_i - r^{l_j}_i)) \right),
    \qquad j \sim \mathcal{U}\{1, \dots, m\}$$

    Its mean over `j` equals [`group_dpo_bound`], at the memory of a pair instead of a group.

    Source: PhyGDPO (https://huggingface.co/papers/2512.24551), Eq. 14, with the factor `m` of the later revision.

    Args:
        chosen_rewards (`torch.Tensor` of shape `(B,)`):
            Implicit reward of the chosen video, from [`implicit_reward`].
        rejected_rewards (`torch.Tensor` of shape `(B,)`):
            Implicit reward of the rejected video that was drawn.
        alpha (`torch.Tensor` of shape `(B,)`):
            Slope of the drawn pair.
        gamma (`torch.Tensor` of shape `(B,)`):
            Weight of the drawn pair.
        num_rejected (`int`, or integer `torch.Tensor` of shape `(B,)`):
            Size `m` of the set that the rejected video was drawn from, uniformly, of each group or of all. At least 1.

    Returns:
        `torch.Tensor` of shape `(B,)`: Loss of each group; `m * gamma * log(2)` when policy and reference agree.

    Raises:
        ValueError: If the shapes are not the same `(B,)`, or `num_rejected` is below 1.
    """
    _check_pair(chosen_rewards, rejected_rewards)
    _check_weights(rejected_rewards, alpha, gamma)
    if isinstance(num_rejected, int) and num_rejected < 1:
        raise ValueError(f"`num_rejected` must be at least 1, got {num_rejected}.")
    return -num_rejected * gamma * F.logsigmoid(alpha * (chosen_rewards - rejected_rewards))


def group_dgr(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    beta: float,
    alpha: Tensor | None = None,
    gamma: Tensor | None = None,
) -> Tensor:
    r"""
    What a group loss multiplies the gradient of the chosen video's error by: [`dgr`] of a group.

    For [`group_dpo_bound`] \\( \frac{\beta}{2} \sum_j \gamma_{ij} \alpha_{ij} \,
    \sigma(-\alpha_{ij} (r^w_i - r^{l_j}_i)) \\), for [`group_dpo_loss`] \\( \frac{\beta}{2} \\) times the probability
    that another video than the chosen one ranks first. With `m = 1` and `alpha = gamma = 1` both are [`dgr`].

    Args:
        chosen_rewards (`torch.Tensor` of shape `(B,)`):
            Implicit reward of the chosen video, from [`implicit_reward`].
        rejected_rewards (`torch.Tensor` of shape `(B, m)`):
            Implicit rewards of the rejected videos.
        beta (`float`):
            As in [`implicit_reward`], positive.
        alpha (`torch.Tensor` of shape `(B, m)`, *optional*), gamma (same shape, *optional*):
            Slopes and weights of the bound; without them the ratio is that of the exact loss. For
            [`group_dpo_sampled_bound`] pass the drawn video alone and its gamma times `num_rejected`.

    Returns:
        `torch.Tensor` of shape `(B,)`: Ratios, positive. Detached, as in [`dgr`].

    Raises:
        ValueError: If the shapes are not as above.
    """
    _check_group(chosen_rewards, rejected_rewards)
    margins = (chosen_rewards[:, None] - rejected_rewards).detach()  # (B, m)
    if alpha is None or gamma is None:
        return (beta / 2) * torch.sigmoid(torch.logsumexp(-margins, dim=1))
    _check_weights(rejected_rewards, alpha, gamma)
    return (beta / 2) * (gamma * alpha * torch.sigmoid(-alpha * margins)).sum(dim=1)


def sft_weights(sft_weight: SFTWeight, ratio: Tensor) -> Tensor:
    """
    The weight r of the chosen video's error beside a preference loss (Reg-DPO, Eq. 6).

    Args:
        sft_weight (`float` or `("dgr", c)`):
            r itself, or c of r = c * `ratio`.
        ratio (`torch.Tensor` of shape `(B,)`):
            [`dgr`] or [`group_dgr`] of each row.

    Returns:
        `torch.Tensor` of shape `(B,)`: r of each row.

    Raises:
        ValueError: If the weight is negative, not finite, or of another mode.
    """
    mode, coefficient = sft_weight if isinstance(sft_weight, tuple) else ("fixed", sft_weight)
    _check_mode("sft_weight", mode, get_args(SFTWeightMode))
    if not 0 <= coefficient < math.inf:
        raise ValueError(f"`sft_weight` must not be negative and must be finite, got {sft_weight}.")
    return coefficient * (ratio if mode == "dgr" else torch.ones_like(ratio))


def dgr(s: Tensor, beta: float, *, loss_type: DPOLossType = "sigmoid", label_smoothing: float = 0.0) -> Tensor:
    r"""
    DPO gradient ratio: what the DPO loss multiplies the gradient of each error by.

    $$\mathrm{DGR} = \frac{\beta}{2} \left( 1 - \sigma \left( -\frac{\beta}{2} s \right) \right),
    \qquad s = (\ell^w_\theta - \ell^w_{\mathrm{ref}}) - (\ell^l_\theta - \ell^l_{\mathrm{ref}})$$

    Source: Reg-DPO (https://huggingface.co/papers/2511.01450), Eq. 4, whose beta is half of the one here and in the
    Diffusion-DPO code: with its 500 the published curves start at 125.

    Args:
        s (`torch.Tensor` of any shape, usually `(B,)`):
            Win gap minus lose gap, from errors averaged over a video; negative once the preference is learned.
        beta (`float`):
            As in [`implicit_reward`], positive.
        loss_type (`str`, defaults to `"sigmoid"`):
            That of [`dpo_loss`], for its ratio; negative where the loss draws a margin back that is too wide.
        label_smoothing (`float`, defaults to `0.0`):
            That of [`dpo_loss`].

    Returns:
        `torch.Tensor` of the shape of `s`: Ratios in (0, beta / 2), beta / 4 at `s = 0`. Detached: the ratio is a
        coefficient of gradients (Eq. 5), so no gradient flows through it.
    """
    check_dpo_loss(loss_type, label_smoothing)
    if loss_type == "mapo":
        raise ValueError("`loss_type='mapo'` has no ratio: it weighs the two errors of a pair differently.")
    margins = (beta / 2) * s.detach()  # of the other sign
    if loss_type == "hinge":
        return (beta / 2) * (margins > -1).to(margins.dtype)
    if loss_type == "ipo":
        return (beta / 2) * (2 * margins + 1)
    return (beta / 2) * (torch.sigmoid(margins) - label_smoothing)


def reg_dpo_loss(
    chosen_error: Tensor,
    chosen_reference_error: Tensor,
    rejected_error: Tensor,
    rejected_reference_error: Tensor,
    *,
    beta: float,
    sft_weight: SFTWeight,
    gap: Gap = "raw",
    lose_gap_weight: float = 1.0,
    lose_gap_clip: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""
    DPO with the error of the chosen video as a regulariser.

    $$\mathcal{L}_i = -\log \sigma \left( -\frac{\beta}{2} s_i \right) + r_i \, \ell^w_{\theta, i}$$

    Its gradient is \\( (\mathrm{DGR} + r) \nabla \ell^w_\theta - \mathrm{DGR} \, \nabla \ell^l_\theta \\): DPO alone
    is satisfied as well by raising both errors, the regulariser is not.

    Source: Reg-DPO (https://huggingface.co/papers/2511.01450), Eqs. 5 and 6.

    Args:
        chosen_error (`torch.Tensor` of shape `(B,)`):
            [`velocity_error`] of the policy on the chosen video.
        chosen_reference_error (`torch.Tensor` of shape `(B,)`):
            That of the reference, on the same noisy latents.
        rejected_error (`torch.Tensor` of shape `(B,)`):
            [`velocity_error`] of the policy on the rejected video.
        rejected_reference_error (`torch.Tensor` of shape `(B,)`):
            That of the reference.
        beta (`float`):
            As in [`implicit_reward`], positive.
        sft_weight (`float` or `("dgr", c)`):
            The weight r: fixed, or c times the [`dgr`] of each pair, detached. 0 is [`dpo_loss`].
        gap (`str`, defaults to `"raw"`):
            What rewards are made of, see [`error_gap`].
        lose_gap_weight (`float`, defaults to `1.0`):
            Weight of the rejected video's gap, see [`hold_lose_gap`].
        lose_gap_clip (`float`, *optional*):
            Largest gap of the rejected video that the loss sees.

    Returns:
        `tuple[torch.Tensor, dict[str, torch.Tensor]]`: Loss of each pair, `(B,)`, which is `log(2) + r * chosen_error`
        when policy and reference agree; and per pair, detached, `(B,)`: `loss/dpo`, `loss/sft` (the chosen error,
        without its weight), `win_gap`, `lose_gap`, `s_theta`, `dgr`, `sft_weight` (r), `chosen_weight` (what the
        gradient of the chosen error is multiplied by: DGR + r, DGR over the error of a `"log_ratio"`) and
        TRL's `rewards/chosen`, `rewards/rejected`, `rewards/margins`, `rewards/accuracies`.

    Raises:
        ValueError: If the errors are not of one shape `(B,)` or in half precision, or the weight is negative, not
            finite, or of another mode.
    """
    win_gap = error_gap(chosen_error, chosen_reference_error, gap)
    lose_gap = error_gap(rejected_error, rejected_reference_error, gap)
    held = hold_lose_gap(lose_gap, lose_gap_weight, lose_gap_clip)
    chosen_rewards, rejected_rewards = -(beta / 2) * win_gap, -(beta / 2) * held
    dpo = dpo_loss(chosen_rewards, rejected_rewards)  # (B,); also checks the shapes
    ratio = dgr(win_gap - held, beta)
    pull = ratio * gap_slope(chosen_error, gap)  # on the chosen error
    weight = sft_weights(sft_weight, pull)
    metrics = {
        "loss/dpo": dpo,
        "loss/sft": chosen_error,
        "win_gap": win_gap,
        "lose_gap": lose_gap,
        "s_theta": win_gap - held,
        "dgr": ratio,
        "sft_weight": weight,
        "chosen_weight": pull + weight,
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/margins": chosen_rewards - rejected_rewards,
        "rewards/accuracies": (chosen_rewards > rejected_rewards).to(dpo.dtype),
    }
    return dpo + weight * chosen_error, {name: values.detach() for name, values in metrics.items()}


def physics_weights(
    sa: Tensor,
    pc: Tensor,
    *,
    alpha_min: float = 0.5,
    lam: float = 0.6,
    kappa_gamma: float = 2.0,
    b_gamma: float = 0.4,
    kappa_alpha: float = 5.0,
    b_alpha: float = 0.5,
    alpha_mode: AlphaMode = "sigmoid",
    gamma_mode: GammaMode = "paper",
) -> tuple[Tensor, Tensor]:
    r"""
    Physics-guided slope and weight of each rejected video, from the scores a judge gave it.

    $$v = 1 - \tfrac12 (sa + pc), \qquad
    \alpha = \alpha_{\min} + (1 - \alpha_{\min}) \, S(\kappa_\alpha (v - b_\alpha)), \qquad
    \gamma = \frac{1 + \lambda \, \sigma(\kappa_\gamma (v - b_\gamma))}{\alpha_{\min}}$$

    Source: PhyGDPO (https://huggingface.co/papers/2512.24551), Eq. 10. A chosen video is real and never judged. With
    the defaults, `alpha` runs over [0.538, 0.962] and `gamma` over [2.372, 2.922].

    Args:
        sa (`torch.Tensor` of any shape, usually `(B, m)`):
            Semantic adherence of the rejected videos, in [0, 1], higher is better.
        pc (`torch.Tensor` of the same shape):
            Physical commonsense of the rejected videos, in [0, 1], higher is better.
        alpha_min (`float`, *optional*, defaults to `0.5`):
            \\( \alpha_{\min} \\), in (0, 1].
        lam (`float`, *optional*, defaults to `0.6`):
            \\( \lambda \\): how much more a physics violation weighs.
        kappa_gamma (`float`, *optional*, defaults to `2.0`):
            \\( \kappa_\gamma \\).
        b_gamma (`float`, *optional*, defaults to `0.4`):
            \\( b_\gamma \\).
        kappa_alpha (`float`, *optional*, defaults to `5.0`):
            \\( \kappa_\alpha \\).
        b_alpha (`float`, *optional*, defaults to `0.5`):
            \\( b_\alpha \\).
        alpha_mode (`str`, *optional*, defaults to `"sigmoid"`):
            The function S. `"sigmoid"`, from the later revision and the official code, keeps the loss an upper bound
            for every score. `"tanh"`, as first printed, does not: with the other defaults `gamma >= 1 / alpha` fails
            for `v < 0.451`, and with `alpha_min < 0.4967` alpha turns *negative* and reverses the preference.
        gamma_mode (`str`, *optional*, defaults to `"paper"`):
            `"paper"` divides by `alpha_min`; `"official"` divides by the video's own `alpha`, as the official code.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: `alpha` and `gamma`, of the shape of the scores; float32, or float64 for
        float64 scores.

    Raises:
        ValueError: If the shapes differ, a score on the CPU is outside [0, 1], or a mode is unknown. Whether the
            hyperparameters are sound is checked once, by [`check_physics_weights`], when a config is made.
    """
    if sa.shape != pc.shape:
        raise ValueError(f"`sa` and `pc` must have the same shape, got {tuple(sa.shape)} and {tuple(pc.shape)}.")
    _check_mode("alpha_mode", alpha_mode, get_args(AlphaMode))
    _check_mode("gamma_mode", gamma_mode, get_args(GammaMode))
    for name, score in (("sa", sa), ("pc", pc)):
        # On a GPU the host would have to wait for the look; what trains there was checked when it was a dataset.
        if score.device.type == "cpu" and not bool(((score >= 0) & (score <= 1)).all()):
            raise ValueError(f"`{name}` must lie in [0, 1], got {score.tolist()}. Rescale the judge's scores.")
    dtype = torch.promote_types(torch.promote_types(sa.dtype, pc.dtype), torch.float32)
    violation = 1 - (sa.to(dtype) + pc.to(dtype)) / 2
    shape_function = torch.sigmoid if alpha_mode == "sigmoid" else torch.tanh
    alpha = alpha_min + (1 - alpha_min) * shape_function(kappa_alpha * (violation - b_alpha))
    gamma = 1 + lam * torch.sigmoid(kappa_gamma * (violation - b_gamma))
    return alpha, gamma / (alpha_min if gamma_mode == "paper" else alpha)


def check_physics_weights(
    *,
    alpha_min: float = 0.5,
    lam: float = 0.6,
    kappa_gamma: float = 2.0,
    b_gamma: float = 0.4,
    kappa_alpha: float = 5.0,
    b_alpha: float = 0.5,
    alpha_mode: AlphaMode = "sigmoid",
    gamma_mode: GammaMode = "paper",
) -> None:
    """
    Check the hyperparameters of [`physics_weights`] over the whole range of scores, before anything is trained.

    Takes the keyword arguments of [`physics_weights`]. Logs a warning where `gamma >= 1 / alpha` fails for some score:
    training works, but its loss is then no upper bound of the group loss.

    Raises:
        ValueError: If a mode is unknown, `alpha_min` is outside (0, 1], or for some score `alpha` leaves (0, 1] (the
            preference would be reversed or the bound lost) or `gamma` is not positive and finite.
    """
    if not 0 < alpha_min <= 1:
        raise ValueError(f"`alpha_min` must be in (0, 1], got {alpha_min}.")
    violation = torch.linspace(0, 1, 1001, dtype=torch.float64)
    alpha, gamma = physics_weights(
        1 - violation,
        1 - violation,
        alpha_min=alpha_min,
        lam=lam,
        kappa_gamma=kappa_gamma,
        b_gamma=b_gamma,
        kappa_alpha=kappa_alpha,
        b_alpha=b_alpha,
        alpha_mode=alpha_mode,
        gamma_mode=gamma_mode,
    )
    if not bool(((alpha > 0) & (alpha <= 1)).all()):
        raise ValueError(
            f"alpha must stay in (0, 1] for every score, got [{alpha.min():.4f}, {alpha.max():.4f}] with "
            f"`alpha_min={alpha_min}`, `kappa_alpha={kappa_alpha}`, `b_alpha={b_alpha}`, `alpha_mode={alpha_mode!r}`. "
            'Use `alpha_mode="sigmoid"`, or raise `alpha_min`.'
        )
    if not bool(((gamma > 0) & (gamma < math.inf)).all()):
        raise ValueError(
            f"gamma must be positive and finite for every score, got [{gamma.min():.4f}, {gamma.max():.4f}] with "
            f"`lam={lam}`, `kappa_gamma={kappa_gamma}`, `b_gamma={b_gamma}`. Raise `lam`."
        )
    unbounded = violation[gamma * alpha < 1 - 1e-9]
    if unbounded.numel():
        logger.warning(
            "gamma >= 1/alpha fails for violations v = 1 - (sa + pc)/2 in [%.3f, %.3f] with alpha_mode=%r, "
            "alpha_min=%s: for these videos the loss is no upper bound of the group loss.",
            unbounded.min(),
            unbounded.max(),
            alpha_mode,
            alpha_min,
        )


def _check_errors(policy_error: Tensor, reference_error: Tensor) -> None:
    if policy_error.shape != reference_error.shape:
        raise ValueError(
            "`policy_error` and `reference_error` must have the same shape, got "
            f"{tuple(policy_error.shape)} and {tuple(reference_error.shape)}."
        )
    for name, error in (("policy_error", policy_error), ("reference_error", reference_error)):
        if error.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"`{name}` must be float32 or float64, got {error.dtype}: a small error gap is exactly 0 in half "
                "precision. Form errors with `velocity_error`."
            )


def _check_pair(chosen_rewards: Tensor, rejected_rewards: Tensor) -> None:
    # Explicit, because (3,) against (3, 1) broadcasts to nine losses of plausible size, six of them wrong pairs.
    if chosen_rewards.ndim != 1 or rejected_rewards.shape != chosen_rewards.shape:
        raise ValueError(
            "`chosen_rewards` and `rejected_rewards` must have the same shape (B,), got "
            f"{tuple(chosen_rewards.shape)} and {tuple(rejected_rewards.shape)}."
        )


def _check_group(chosen_rewards: Tensor, rejected_rewards: Tensor) -> None:
    if (
        chosen_rewards.ndim != 1
        or rejected_rewards.ndim != 2
        or len(rejected_rewards) != len(chosen_rewards)
        or rejected_rewards.shape[1] == 0
    ):
        raise ValueError(
            "`chosen_rewards` must have shape (B,) and `rejected_rewards` shape (B, m) with m >= 1, got "
            f"{tuple(chosen_rewards.shape)} and {tuple(rejected_rewards.shape)}."
        )


def _check_weights(rejected_rewards: Tensor, alpha: Tensor, gamma: Tensor) -> None:
    if alpha.shape != rejected_rewards.shape or gamma.shape != rejected_rewards.shape:
        raise ValueError(
            f"`alpha` and `gamma` must have the shape of `rejected_rewards` {tuple(rejected_rewards.shape)}, got "
            f"{tuple(alpha.shape)} and {tuple(gamma.shape)}."
        )


def _check_mode(name: str, mode: str, modes: tuple[str, ...]) -> None:
    if mode not in modes:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, modes))}, got {mode!r}.")
