"""
Processes that share the tokens of each video. Between the blocks every process has a part of the tokens; in attention
a part of the heads of all tokens (Ulysses), or the queries of its tokens and one part of keys and values after the
other (ring).

The loss is computed from the gathered output, alike on all processes. The gradients of a process are those of its
part, and sum up to the gradient over the processes.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from diffusers import ContextParallelConfig, ModelMixin
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelModelPlan, ContextParallelOutput
from diffusers.models.attention_dispatch import SeqAllToAllDim, dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn


def share_tokens_of_wan(transformer: ModelMixin, config: ContextParallelConfig) -> None:
    """Share the tokens of videos by diffusers' plan for Wan; the prompt's are on every process."""
    # The plan for the whole module is there for timesteps that differ by token.
    plan = {name: part for name, part in transformer._cp_plan.items() if name}
    _share_tokens(transformer, config, plan)


def share_tokens_of_cogvideox(transformer: ModelMixin, config: ContextParallelConfig) -> None:
    """Share the tokens of videos by a plan of our own, for lack of one in diffusers; the prompt's are everywhere."""
    plan: dict[str, ContextParallelModelPlan] = {
        "transformer_blocks.0": {"hidden_states": ContextParallelInput(split_dim=1, expected_dims=3)},
        "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }
    assert config.ring_degree == 1, "the prompt's tokens would count once for every process"
    _share_tokens(transformer, config, plan)
    transformer.set_attn_processor(_JointUlyssesProcessor(config._ulysses_mesh.get_group()))


def _share_tokens(
    transformer: ModelMixin, config: ContextParallelConfig, plan: dict[str, ContextParallelModelPlan]
) -> None:
    transformer.enable_parallelism(config=config, cp_plan=plan)
    degree = config.ring_degree * config.ulysses_degree

    def scale_gradient(module: nn.Module, inputs: Any, output: Tensor) -> None:
        # All engines average gradients over all processes; those of one video are to be added up.
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * degree)

    transformer.proj_out.register_forward_hook(scale_gradient)


class _JointUlyssesProcessor:
    """
    Attention of CogVideoX, over the tokens of the prompt and of the video together.

    A process has all tokens of the prompt and a part of the video's, with all heads; for attention it has all tokens
    of both, with a part of the heads.

    Args:
        group (`torch.distributed.ProcessGroup`): The processes that share a video.
    """

    _attention_backend = None  # diffusers writes the chosen one here

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Outputs for the video's tokens `(B, N / size, D)` and the prompt's `(B, L, D)`."""
        assert attention_mask is None, "CogVideoX has none"
        length = encoder_hidden_states.shape[1]
        tokens = torch.cat([encoder_hidden_states, hidden_states], dim=1)  # (B, L + N / size, D)
        query, key, value = (
            projection(tokens).unflatten(2, (attn.heads, -1)) for projection in (attn.to_q, attn.to_k, attn.to_v)
        )
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        if image_rotary_emb is not None:
            cos, sin = (table.chunk(self._size)[self._rank] for table in image_rotary_emb)
            query, key = (
                torch.cat([x[:, :length], apply_rotary_emb(x[:, length:], (cos, sin), sequence_dim=1)], dim=1)
                for x in (query, key)
            )
        query, key, value = (self._all_tokens(x, length) for x in (query, key, value))  # (B, L + N, H / size, .)
        attended = dispatch_attention_fn(query, key, value, backend=self._attention_backend)
        text = _AllHeads.apply(self._group, attended[:, :length].contiguous())
        video = SeqAllToAllDim.apply(self._group, attended[:, length:].contiguous(), 1, 2)
        tokens = torch.cat([text, video], dim=1).flatten(2)  # (B, L + N / size, D)
        for layer in attn.to_out:
            tokens = layer(tokens)
        return tokens[:, length:], tokens[:, :length]

    def _all_tokens(self, x: Tensor, length: int) -> Tensor:
        text = x[:, :length].chunk(self._size, dim=2)[self._rank]
        video = SeqAllToAllDim.apply(self._group, x[:, length:].contiguous(), 2, 1)
        return torch.cat([text, video], dim=1)


class _AllHeads(torch.autograd.Function):
    """Tokens `(B, L, H / size, D)`, each process with its heads, to `(B, L, H, D)` on all of them."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, x: Tensor) -> Tensor:
        ctx.group = group
        return collectives.wait_tensor(collectives.all_gather_tensor(x, 2, group))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        # Every process has gone on with all heads and knows its own part of their gradient.
        total = collectives.wait_tensor(collectives.all_reduce(gradient.contiguous(), "sum", ctx.group))
        return None, total.chunk(dist.get_world_size(ctx.group), dim=2)[dist.get_rank(ctx.group)]
