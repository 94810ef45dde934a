"""Loss functions on tensors: preference losses and alignment losses. No model, no sampling."""

from .alignment import repa_loss, trd_loss
from .preference import (
    check_physics_weights,
    dgr,
    dpo_loss,
    error_gap,
    group_dgr,
    group_dpo_bound,
    group_dpo_loss,
    group_dpo_sampled_bound,
    hold_lose_gap,
    implicit_reward,
    mapo_loss,
    physics_weights,
    reg_dpo_loss,
    sft_weights,
    velocity_error,
)
from .safeguard import residual_products, safeguard_scales, safeguard_shares


__all__ = [
    "check_physics_weights",
    "dgr",
    "dpo_loss",
    "error_gap",
    "group_dgr",
    "group_dpo_bound",
    "group_dpo_loss",
    "group_dpo_sampled_bound",
    "hold_lose_gap",
    "implicit_reward",
    "mapo_loss",
    "physics_weights",
    "reg_dpo_loss",
    "repa_loss",
    "residual_products",
    "safeguard_scales",
    "safeguard_shares",
    "sft_weights",
    "trd_loss",
    "velocity_error",
]
