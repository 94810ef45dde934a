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
from diffusers.models.attention_dispatch import SeqAllToAllDim
from torch import Tensor, nn

from .joint_attention import JointAttentionProcessor


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


class _JointUlyssesProcessor(JointAttentionProcessor):
    """
    Joint attention where a process has all tokens of the prompt and a part of the video's, with all heads; for
    attention it has all tokens of both, with a part of the heads.

    Args:
        group (`torch.distributed.ProcessGroup`): The processes that share a video.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)

    def own_positions(self, table: Tensor) -> Tensor:
        return table.chunk(self._size)[self._rank]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, length: int) -> Tensor:
        query, key, value = (self._all_tokens(x, length) for x in (query, key, value))  # (B, L + N, H / size, .)
        attended = super().attend(query, key, value, length)
        text = _AllHeads.apply(self._group, attended[:, :length].contiguous())
        video = SeqAllToAllDim.apply(self._group, attended[:, length:].contiguous(), 1, 2)
        return torch.cat([text, video], dim=1)  # (B, L + N / size, H, .)

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
