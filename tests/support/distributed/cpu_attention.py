"""Attention that gives its log-sum-exp on CPUs, where no back end of diffusers does. For tests alone."""

from typing import Any

import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor


def register_cpu_attention() -> None:
    """Let `"_native_flash"` compute on CPUs in this process, in any precision."""
    register = _AttentionBackendRegistry.register(AttentionBackendName._NATIVE_FLASH, supports_context_parallel=True)
    register(_attention)


def _attention(query: Tensor, key: Tensor, value: Tensor, _parallel_config: Any = None) -> Tensor:
    if _parallel_config is None:  # to the prompt
        return _forward(None, query, key, value, _save_ctx=False)
    return attention_dispatch._templated_context_parallel_attention(
        query, key, value, forward_op=_forward, backward_op=_backward, _parallel_config=_parallel_config
    )


def _forward(
    ctx: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _save_ctx: bool = True,
    _parallel_config: Any = None,
) -> Any:
    """Output `(B, N, H, D)` and log-sum-exp `(B, N, H)`, from the definition of attention."""
    assert attn_mask is None and not (dropout_p or is_causal or scale or enable_gqa)
    scores = torch.einsum("bqhd,bkhd->bqhk", query.float(), key.float()) * query.shape[-1] ** -0.5
    lse = scores.logsumexp(dim=-1)  # float32, as kernels give it
    out = torch.einsum("bqhk,bkhd->bqhd", (scores - lse[..., None]).exp(), value.float()).to(query.dtype)
    if _save_ctx:
        ctx.save_for_backward(query, key, value, out, lse)
    return (out, lse) if return_lse else out


def _backward(ctx: Any, gradient: Tensor, **parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, and of the given keys and values, in attention to more than these."""
    saved = dict(zip(("query", "key", "value", "out", "lse"), ctx.saved_tensors, strict=True)) | parts
    names = ("query", "key", "value", "out")
    dtype, scale = saved["query"].dtype, saved["query"].shape[-1] ** -0.5
    query, key, value, out, gradient = (x.float() for x in (*map(saved.__getitem__, names), gradient))
    shares = (torch.einsum("bqhd,bkhd->bqhk", query, key) * scale - saved["lse"][..., None]).exp()
    of_shares = torch.einsum("bqhd,bkhd->bqhk", gradient, value)
    of_scores = shares * (of_shares - (gradient * out).sum(dim=-1, keepdim=True)) * scale
    return (
        torch.einsum("bqhk,bkhd->bqhd", of_scores, key).to(dtype),
        torch.einsum("bqhk,bqhd->bkhd", of_scores, query).to(dtype),
        torch.einsum("bqhk,bqhd->bkhd", shares, gradient).to(dtype),
    )
