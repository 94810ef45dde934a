"""
Context parallelism: the tokens of each video are divided among processes.

Between the blocks every process has a part of the tokens; in attention a part of the heads of all tokens (Ulysses), or
the queries of its tokens and one part of keys and values after the other (ring).

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
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from torch import Tensor, nn

from .joint import JointAttentionProcessor


# Both families: the tokens of the video are divided before the first block, and gathered after the last layer.
_PROJ_OUT = ContextParallelOutput(gather_dim=1, expected_dims=3)
_HIDDEN_STATES = ContextParallelInput(split_dim=1, expected_dims=3)


def share_tokens_of_wan(transformer: ModelMixin, config: ContextParallelConfig) -> None:
    """Share the tokens of videos; the prompt's are on every process. Ring attention is diffusers' own."""
    if config.ring_degree > 1:
        # The plan for the whole module is there for timesteps that differ by token.
        plan = {name: part for name, part in transformer._cp_plan.items() if name}
        _share_tokens(transformer, config, plan)
        return
    sharing = _Ulysses(config.mesh["ulysses"].get_group())
    transformer.rope.register_forward_hook(lambda module, inputs, tables: tuple(map(sharing.own_part, tables)))

    def own_timesteps(module: nn.Module, inputs: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if output[0].ndim == 2:  # one a video
            return output
        return (*map(sharing.own_part, output[:2]), *output[2:])  # one a token, `(B, N, ...)`

    transformer.condition_embedder.register_forward_hook(own_timesteps)
    _share_tokens(transformer, config, {"blocks.0": {"hidden_states": _HIDDEN_STATES}, "proj_out": _PROJ_OUT}, sharing)
    transformer.set_attn_processor(_UlyssesProcessor(sharing))


def share_tokens_of_cogvideox(transformer: ModelMixin, config: ContextParallelConfig) -> None:
    """Share the tokens of videos by a plan of our own, for lack of one in diffusers; the prompt's are everywhere."""
    assert config.ring_degree == 1, "the prompt's tokens would count once for every process"
    sharing = _Ulysses(config.mesh["ulysses"].get_group())
    plan = {"transformer_blocks.0": {"hidden_states": _HIDDEN_STATES}, "proj_out": _PROJ_OUT}
    _share_tokens(transformer, config, plan, sharing)
    transformer.set_attn_processor(_JointUlyssesProcessor(sharing))


class _Ulysses:
    """
    What the processes that share a video exchange around attention: between tokens and heads, and back.

    Tokens that do not divide are filled up with zeros. Attention does not see these, and nothing that comes of them
    is looked at, so they have no gradient.

    Args:
        group (`torch.distributed.ProcessGroup`): The processes that share a video.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.tokens = 0  # of a video, N; alike in all passes of a step

    def padded(self, x: Tensor) -> Tensor:
        """Tokens `(B, N, ...)`, filled up to a number that can be divided."""
        missing = -x.shape[1] % self.size
        return torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], dim=1) if missing else x

    def own_part(self, table: Tensor) -> Tensor:
        """Of a table `(1, N, ...)` with a row for each token, those of this process's."""
        return self.padded(table).chunk(self.size, dim=1)[self.rank]

    def to_heads(self, x: Tensor) -> Tensor:
        """Some tokens with all heads `(B, N / size, H, D)` to all tokens with some heads `(B, N, H / size, D)`."""
        return SeqAllToAllDim.apply(self.group, x.contiguous(), 2, 1)[:, : self.tokens]

    def to_tokens(self, x: Tensor) -> Tensor:
        """The way back."""
        return SeqAllToAllDim.apply(self.group, self.padded(x).contiguous(), 1, 2)


def _share_tokens(
    transformer: ModelMixin,
    config: ContextParallelConfig,
    plan: dict[str, ContextParallelModelPlan],
    sharing: _Ulysses | None = None,
) -> None:
    transformer.enable_parallelism(config=config, cp_plan=plan)
    degree = config.ring_degree * config.ulysses_degree

    def fill_up(block: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        assert sharing is not None
        hidden_states = inputs[0] if inputs else named["hidden_states"]
        sharing.tokens, filled = hidden_states.shape[1], sharing.padded(hidden_states)
        return ((filled, *inputs[1:]), named) if inputs else ((), {**named, "hidden_states": filled})

    def take_own_and_scale(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        # All engines average gradients over all processes; those of one video are to be added up.
        output = output if sharing is None else output[:, : sharing.tokens]
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * degree)
        return output

    if sharing is not None:
        first = next(iter(plan))
        transformer.get_submodule(first).register_forward_pre_hook(fill_up, with_kwargs=True)
    transformer.proj_out.register_forward_hook(take_own_and_scale)


class _UlyssesProcessor(WanAttnProcessor):
    """
    Wan's attention where a process has a part of the video's tokens: in self-attention it exchanges them for a part of
    the heads; the prompt, in cross-attention, it has whole.
    """

    def __init__(self, sharing: _Ulysses) -> None:
        super().__init__()
        self._sharing = sharing

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if encoder_hidden_states is not None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        assert attention_mask is None and rotary_emb is not None, "as in Wan's blocks"
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key = attn.norm_q(query), attn.norm_k(key)
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))
        query, key = (_rotated(x, *rotary_emb) for x in (query, key))
        query, key, value = (self._sharing.to_heads(x) for x in (query, key, value))
        attended = dispatch_attention_fn(query, key, value, backend=self._attention_backend)
        output = self._sharing.to_tokens(attended).flatten(2).type_as(query)
        for layer in attn.to_out:
            output = layer(output)
        return output


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads `(B, N, H, D)`, each pair of channels rotated by the angles in tables `(1, N, 1, D)`, as Wan does it."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    turned = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return turned.flatten(-2).type_as(x)


class _JointUlyssesProcessor(JointAttentionProcessor):
    """
    Joint attention where a process has all tokens of the prompt and a part of the video's, with all heads; for
    attention it has all tokens of both, with a part of the heads.
    """

    def __init__(self, sharing: _Ulysses) -> None:
        self._sharing = sharing

    def own_positions(self, table: Tensor) -> Tensor:
        return self._sharing.own_part(table[None])[0]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, length: int) -> Tensor:
        query, key, value = (self._all_tokens(x, length) for x in (query, key, value))  # (B, L + N, H / size, .)
        attended = super().attend(query, key, value, length)
        text = _AllHeads.apply(self._sharing.group, attended[:, :length].contiguous())
        return torch.cat([text, self._sharing.to_tokens(attended[:, length:])], dim=1)  # (B, L + N / size, H, .)

    def _all_tokens(self, x: Tensor, length: int) -> Tensor:
        text = x[:, :length].chunk(self._sharing.size, dim=2)[self._sharing.rank]
        return torch.cat([text, self._sharing.to_heads(x[:, length:])], dim=1)


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
