"""
What makes training on CPUs quick enough for the sandbox's weights: bfloat16 where the hardware multiplies it fast,
float32 where it does not, and Muon over all matrices of one shape at once.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """
    Momentum whose update of every matrix is orthogonalised (https://kellerjordan.github.io/posts/muon/).

    Matrices of one shape are orthogonalised together: `torch.optim.Muon` takes them one by one, which on a model this
    small is several times slower.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update; unlike torch's optimizers it re-evaluates no `closure`."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                moved = []
                for parameter in parameters:
                    assert parameter.grad is not None, "every matrix takes part in the loss"
                    average = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                    average.lerp_(parameter.grad, 1 - group["momentum"])
                    moved.append(parameter.grad.lerp(average, group["momentum"]))
                # 0.2 sqrt(width) gives the update the root mean square that AdamW's has.
                scale = -0.2 * group["lr"] * max(shape) ** 0.5
                for parameter, update in zip(parameters, orthogonalised(torch.stack(moved)), strict=True):
                    parameter.add_(update, alpha=scale)


def orthogonalised(matrices: Tensor) -> Tensor:
    """About U V^T of the singular value decomposition U S V^T of `(N, m, n)`, by five Newton-Schulz steps."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = (x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)).bfloat16()
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * (gram @ gram)) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class _Linear(nn.Linear):
    """A linear layer that multiplies in bfloat16; its weights stay as they are."""

    def forward(self, input: Tensor) -> Tensor:
        return _linear(input, self)


def _linear(x: Tensor, *layers: nn.Linear) -> Tensor:
    """Outputs of layers on one input, side by side."""
    weight, bias = torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])
    return F.linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16())


class _Attention:
    """
    Wan's attention with bfloat16 projections and float32 products: the backward pass of bfloat16 attention is ten
    times slower on CPUs.
    """

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if encoder_hidden_states is None:
            query, key, value = _linear(hidden_states, attn.to_q, attn.to_k, attn.to_v).chunk(3, dim=-1)
        else:
            query = _linear(hidden_states, attn.to_q)
            key, value = _linear(encoder_hidden_states, attn.to_k, attn.to_v).chunk(2, dim=-1)
        width = (query.shape[-1],)
        query = F.rms_norm(query, width, attn.norm_q.weight.bfloat16(), attn.norm_q.eps)
        key = F.rms_norm(key, width, attn.norm_k.weight.bfloat16(), attn.norm_k.eps)
        query, key, value = (x.float().unflatten(2, (attn.heads, -1)) for x in (query, key, value))
        if rotary_emb is not None:
            cos, sin = rotary_emb
            turn = torch.complex(cos[..., 0::2], sin[..., 1::2])
            query, key = _rotated(query, turn), _rotated(key, turn)
        out = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=attention_mask
        )
        return _linear(out.transpose(1, 2).flatten(2), attn.to_out[0])


def _rotated(x: Tensor, turn: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2)


@contextlib.contextmanager
def bfloat16_layers(transformer: WanTransformer3DModel) -> Iterator[None]:
    """Inside, the transformer's blocks compute in bfloat16 where that is quick, to about 3 digits; weights stay."""
    processors = dict(transformer.attn_processors)
    linear = [m for block in transformer.blocks for m in block.ffn.modules() if type(m) is nn.Linear]
    transformer.set_attn_processor(_Attention())
    for layer in linear:
        layer.__class__ = _Linear
    try:
        yield
    finally:
        transformer.set_attn_processor(processors)
        for layer in linear:
            layer.__class__ = nn.Linear


def to_tensor(videos: np.ndarray) -> Tensor:
    """uint8 `(B, T, H, W, 3)` -> float32 `(B, 3, T, H, W)` in [-1, 1]."""
    return torch.from_numpy(videos.astype(np.float32) / 127.5 - 1).permute(0, 4, 1, 2, 3).contiguous()


def warm_cosine(step: int, steps: int, warmup: int) -> float:
    """Factor of a learning rate: up over `warmup` steps, then down along a cosine to a fiftieth."""
    return min(1.0, (step + 1) / warmup) * (0.51 + 0.49 * math.cos(math.pi * step / steps))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value
