"""Activation checkpointing: which activations of blocks are stored, computed again, or offloaded to the host."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ..step.dropout import with_same_dropout


POLICIES = ("full", "attention", "offload")
_ATTENTION = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)


def check_policy(policy: str) -> None:
    """Raise a `ValueError` if `policy` is not one that [`enable_recompute`] knows."""
    if policy not in POLICIES:
        raise ValueError(f"`checkpointing_policy` must be one of {', '.join(map(repr, POLICIES))}, got {policy!r}.")


def enable_recompute(
    transformer: ModelMixin, policy: str, host: Callable[[], AbstractContextManager[Any]] | None = None
) -> None:
    """
    Switch activation checkpointing on. Passes without gradients, such as the reference's, run without it.

    Args:
        transformer (`ModelMixin`): A diffusers transformer that supports gradient checkpointing.
        policy (`str`): What is computed again, non-reentrantly:

            - `"full"`: the blocks, of which only the inputs are kept.
            - `"offload"`: the same, with those inputs in the host's memory, pinned where there is an accelerator.
            - `"attention"`: the blocks, but for their self-attention, the costly part of long videos, whose output is
              kept. Holds for torch's own attention; that of other libraries is computed again.
        host (`Callable`, *optional*): Makes the context in which what is saved goes to the host, for `"offload"`;
            `torch.autograd.graph.save_on_cpu` if not given.

    Raises:
        ValueError: If the policy is none of these.
    """
    check_policy(policy)
    function: Callable[..., Any]
    if policy == "offload":
        host = host or partial(save_on_cpu, pin_memory=torch.accelerator.is_available())
        function = partial(_block_with_inputs_on_host, host)
    else:
        function = {"full": _block, "attention": _block_but_self_attention}[policy]
    transformer.enable_gradient_checkpointing(function)


def _block(block: nn.Module, *args: Any) -> Any:
    return checkpoint(with_same_dropout(block), *args, use_reentrant=False)


def _block_with_inputs_on_host(host: Callable[[], AbstractContextManager[Any]], block: nn.Module, *args: Any) -> Any:
    # Inside, checkpointing saves nothing but the block's inputs, and these go through the hooks around it.
    with host():
        return _block(block, *args)


def _block_but_self_attention(block: nn.Module, *args: Any) -> Any:
    contexts = partial(create_selective_checkpoint_contexts, _keep_self_attention)
    return checkpoint(with_same_dropout(block), *args, use_reentrant=False, context_fn=contexts)


def _keep_self_attention(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    is_attention = operation._overloadpacket.__name__ in _ATTENTION
    if is_attention and args[0].shape == args[1].shape:  # to a prompt it costs little, and its output is as large
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
