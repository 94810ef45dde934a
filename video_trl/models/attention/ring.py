"""
Correct the backward pass of ring attention in diffusers 0.41 and 0.42.

There every process has the queries of its part of the tokens, and sees the keys and values of one part after the
other. Diffusers' forward pass is right. Its backward pass

- sends the gradients of keys and values on to the next process where the next part to be seen belongs to the previous
  one, so that from three processes on they are those of other tokens;
- reads the saved tensors once for every part, which activation checkpointing, without reentrance, allows only once;
- holds the output besides, out of activation checkpointing's reach: as much memory as the blocks' inputs.

Older versions have other faults and are refused; newer ones are used as they are.
`tests/distributed/test_ring_attention.py` shows whether they are right: it finds these faults in a version that has
them, and fails if they are there and not remedied.
"""

from copy import copy
from typing import Any

import diffusers
import torch
import torch.distributed._functional_collectives as collectives
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import TemplatedRingAttention
from torch import Tensor


RING_BACKENDS = (
    "flash",
    "flash_hub",
    "flash_varlen_hub",
    "_flash_3_hub",
    "_flash_3_varlen_hub",
    "_native_cudnn",
    "_native_flash",
)
"""Diffusers' attention back ends that give the log-sum-exp by which parts are put together, and a backward pass."""

_REMEDIED = ("0.41", "0.42")  # the same class in both
_TOO_OLD = ("0.38", "0.39", "0.40")


def check_ring_backend(name: str | None) -> None:
    """
    Check that there is a right ring attention of an attention back end.

    Args:
        name (`str`, *optional*): The back end; none: torch's choice.

    Raises:
        ValueError: If it does not give what ring attention needs, or the gradients are wrong in this diffusers.
    """
    if _version() in _TOO_OLD:
        raise ValueError(
            f"`context_parallel_method='ring'` needs diffusers 0.41 or newer, this is {diffusers.__version__}: its "
            "ring attention has wrong gradients. Update it (Python 3.10 takes 0.41), or use "
            "`context_parallel_method='ulysses'`."
        )
    if name not in RING_BACKENDS:
        raise ValueError(
            "`context_parallel_method='ring'` puts parts of attention together by their log-sum-exp, which "
            f"`attention_backend={name!r}` does not give. Use one that does ({', '.join(map(repr, RING_BACKENDS))}), "
            "or `context_parallel_method='ulysses'`."
        )


def mend_ring_attention() -> None:
    """Let ring attention in this process have a right backward pass, if this version of diffusers has a wrong one."""
    if _version() in _REMEDIED:
        attention_dispatch.TemplatedRingAttention = RingAttention


def _version() -> str:
    return ".".join(diffusers.__version__.split(".")[:2])


class _State:
    """What a kernel keeps from forward to backward, in place of autograd's context."""

    saved_tensors: tuple[Tensor, ...] = ()

    def save_for_backward(self, *tensors: Tensor) -> None:
        self.saved_tensors = tensors


class RingAttention(TemplatedRingAttention):
    """Diffusers' ring attention of tensors `(B, N / size, H, D)`, with a backward pass of its own."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        """As diffusers'; all tensors that the backward pass needs are saved in autograd's way."""
        state: Any = _State()
        result = TemplatedRingAttention.forward(state, *inputs)
        ctx.save_for_backward(*state.saved_tensors, state.ring_out, state.ring_lse)
        del state.saved_tensors, state.ring_out, state.ring_lse
        ctx.state, ctx.num_inputs = state, len(inputs)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
        """Gradients `(B, N / size, H, D)` of queries, keys and values; none of the other inputs."""
        *tensors, out, lse = ctx.saved_tensors  # once: with activation checkpointing a second time is an error
        state = copy(ctx.state)
        state.saved_tensors = tuple(tensors)
        query, own_key, own_value, *_ = tensors
        config = state._parallel_config.context_parallel_config
        rank, size, group = config._ring_local_rank, config.ring_degree, config._ring_mesh.get_group()
        parts = torch.cat([own_key.flatten(), own_value.flatten()])
        parts = collectives.wait_tensor(collectives.all_gather_tensor(parts, 0, group)).chunk(size)

        dtype = torch.float32 if config.convert_to_fp32 else gradient.dtype
        grad_query = torch.zeros(state.q_shape, dtype=dtype, device=gradient.device)
        grad_part = torch.zeros(parts[0].shape, dtype=dtype, device=gradient.device)
        to_previous = [(process - 1) % size for process in range(size)]
        for step in range(size):
            key, value = (half.view_as(own_key) for half in parts[(rank + step) % size].chunk(2))
            of_query, of_key, of_value, *_ = state.backward_op(
                state, gradient, query=query, key=key, value=value, out=out, lse=lse
            )
            grad_query += of_query
            # The process before this one comes to the same part next, and the last one before is its owner.
            grad_part = collectives.wait_tensor(grad_part) + torch.cat([of_key.flatten(), of_value.flatten()])
            grad_part = collectives.permute_tensor(grad_part, to_previous, group)
        grad_key, grad_value = (half.view(state.kv_shape) for half in collectives.wait_tensor(grad_part).chunk(2))
        gradients = [grad.to(gradient.dtype) for grad in (grad_query, grad_key, grad_value)]
        return *gradients, *[None] * (ctx.num_inputs - len(gradients))
