"""
The network behind VideoCon-Physics and VideoPhy-2-AutoEval: mPLUG-Owl for video, on the Llama of transformers.

A vision transformer with a small temporal adapter in each layer reads the frames, an abstractor with learned queries
sums them up in 64 tokens and an end token, and Llama reads these in the midst of the text. The architecture is that of
`mplug_owl_video` in https://github.com/Hritikbansal/videophy (MIT); module names follow its checkpoints, so that their
state dicts load by name. All layer norms compute in float32, whatever the dtype of the weights.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM


VIDEO_TOKEN = -2  # in `input_ids`: the place of one token of the video
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class MplugOwlSizes:
    """
    Sizes of the network; the defaults are those of the published 7B checkpoints, `language` LLaMA-7B's included.

    Attributes:
        image_size, patch_size (`int`): Side of a frame and of a patch, in pixels.
        vision_width, vision_layers, vision_heads, vision_ff (`int`): Vision transformer.
        abstractor_width, abstractor_layers, abstractor_heads, abstractor_ff (`int`): Abstractor; `abstractor_ff` is
            the width inside its gated feed-forward layers.
        num_queries (`int`): Learned queries for content, and as many for time.
        eps (`float`): Of the layer norms that do not use PyTorch's default.
        language (`dict`): Arguments of `transformers.LlamaConfig`.
    """

    image_size: int = 224
    patch_size: int = 14
    vision_width: int = 1024
    vision_layers: int = 24
    vision_heads: int = 16
    vision_ff: int = 4096
    abstractor_width: int = 1024
    abstractor_layers: int = 6
    abstractor_heads: int = 16
    abstractor_ff: int = 2816
    num_queries: int = 64
    eps: float = 1e-6
    language: dict[str, Any] = field(default_factory=dict)

    @property
    def num_video_tokens(self) -> int:
        """Tokens that a video takes in the text: the queries and an end token."""
        return self.num_queries + 1

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "MplugOwlSizes":
        """
        Read a checkpoint's `config.json`; what it leaves out has the default of the original code.

        Raises:
            ValueError: `model_type` is not `mplug-owl`, or its language model is no Llama.
        """
        vision, abstractor = config.get("vision_config", {}), config.get("visual_abstractor_config", {})
        text = dict(config.get("text_config", {}))
        kind = (config.get("model_type"), text.pop("model_type", "llama"))
        if kind != ("mplug-owl", "llama"):
            raise ValueError(
                f"Expected a config.json with model_type 'mplug-owl' on 'llama', got {kind[0]!r} on {kind[1]!r}: this "
                "folder holds another model."
            )
        ff = abstractor.get("intermediate_size", 2816)
        if ff != 2816:  # the original rounds two thirds of any other value up to a multiple of 256
            ff = -(-(2 * ff // 3) // 256) * 256
        known = {  # the rest of a config.json of 2023 (generation settings, dtype) has no meaning here
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "max_position_embeddings", "rms_norm_eps",
        }  # fmt: skip
        return cls(
            image_size=vision.get("image_size", 224),
            patch_size=vision.get("patch_size", 14),
            vision_width=vision.get("hidden_size", 1024),
            vision_layers=vision.get("num_hidden_layers", 24),
            vision_heads=vision.get("num_attention_heads", 16),
            vision_ff=vision.get("intermediate_size", 4096),
            abstractor_width=abstractor.get("hidden_size", 1024),
            abstractor_layers=abstractor.get("num_hidden_layers", 6),
            abstractor_heads=abstractor.get("num_attention_heads", 16),
            abstractor_ff=ff,
            num_queries=config.get("num_query_tokens", 64),
            language={"rms_norm_eps": 1e-6} | {name: value for name, value in text.items() if name in known},
        )


class LayerNorm32(nn.LayerNorm):
    """Layer norm in float32, given back in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps).to(
            x.dtype
        )


class _Layers(nn.Module):
    """Gives a stack of layers the name it has in the checkpoints."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


class _Embeddings(nn.Module):
    """Frames `(B, T, 3, H, W)` -> tokens `(B, T, 1 + N, D)`, the class token first."""

    def __init__(self, sizes: MplugOwlSizes) -> None:
        super().__init__()
        width, patch = sizes.vision_width, sizes.patch_size
        self.patch_embed = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embedding = nn.Parameter(torch.zeros(1, 1 + (sizes.image_size // patch) ** 2, width))
        self.pre_layernorm = LayerNorm32(width, eps=sizes.eps)

    def forward(self, frames: Tensor) -> Tensor:
        patches = self.patch_embed(frames.flatten(0, 1)).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        return self.pre_layernorm(tokens + self.position_embedding).unflatten(0, frames.shape[:2])


class _Temporal(nn.Module):
    """Mixes each patch with the same patch of the frames before and after; the class token comes out unchanged."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln = LayerNorm32(width)
        self.down_proj = nn.Linear(width, width // 2)
        self.conv = nn.Conv1d(width // 2, width // 2, kernel_size=3, padding=1, groups=width // 2)
        self.up_proj = nn.Linear(width // 2, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, tokens, _ = x.shape
        hidden = self.down_proj(self.ln(x[:, :, 1:])).permute(0, 2, 3, 1).flatten(0, 1)  # (B * N, D / 2, T)
        hidden = quick_gelu(self.conv(hidden)).unflatten(0, (batch, tokens - 1)).permute(0, 3, 1, 2)
        return torch.cat([x[:, :, :1], self.up_proj(hidden)], dim=2)


class _SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width)  # rows ordered by head, then query, key, value
        self.dense = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            self.query_key_value(x).unflatten(-1, (self.heads, 3, -1)).permute(3, 0, 2, 1, 4)
        )  # (B, heads, N, head)
        return self.dense(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class _VisionMLP(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(quick_gelu(self.fc1(x)))


class _VisionLayer(nn.Module):
    """`(B, T, N, D)` -> the same. In a video the class token is added to itself, so it doubles in every layer."""

    def __init__(self, sizes: MplugOwlSizes) -> None:
        super().__init__()
        self.temporal = _Temporal(sizes.vision_width)
        self.input_layernorm = LayerNorm32(sizes.vision_width, eps=sizes.eps)
        self.self_attn = _SelfAttention(sizes.vision_width, sizes.vision_heads)
        self.post_attention_layernorm = LayerNorm32(sizes.vision_width, eps=sizes.eps)
        self.mlp = _VisionMLP(sizes.vision_width, sizes.vision_ff)

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        if shape[1] > 1:
            x = x + self.temporal(x)
        x = x.flatten(0, 1)
        x = x + self.self_attn(self.input_layernorm(x))
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x.view(shape)


class _Vision(nn.Module):
    """Frames `(B, T, 3, H, W)` -> tokens `(B, T * (1 + N), D)`."""

    def __init__(self, sizes: MplugOwlSizes) -> None:
        super().__init__()
        self.embeddings = _Embeddings(sizes)
        self.encoder = _Layers(_VisionLayer(sizes) for _ in range(sizes.vision_layers))
        self.post_layernorm = LayerNorm32(sizes.vision_width, eps=sizes.eps)

    def forward(self, frames: Tensor) -> Tensor:
        x = self.embeddings(frames)
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x).flatten(1, 2)


class _GatedMLP(nn.Module):
    def __init__(self, width: int, inner: int, eps: float) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, inner)
        self.w2 = nn.Linear(inner, width)
        self.w3 = nn.Linear(width, inner)
        self.ffn_ln = LayerNorm32(inner, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.ffn_ln(F.silu(self.w1(x)) * self.w3(x)))


class _CrossAttention(nn.Module):
    """Queries attend to themselves and to the video; the residual branch starts from the NORMED queries."""

    def __init__(self, sizes: MplugOwlSizes) -> None:
        super().__init__()
        width = sizes.abstractor_width
        self.heads = sizes.abstractor_heads
        self.norm1 = LayerNorm32(width)
        self.normk = LayerNorm32(sizes.vision_width)
        self.attention = nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")})
        self.output = nn.ModuleDict(
            {
                "out_proj": nn.Linear(width, width),
                "norm2": LayerNorm32(width),
                "mlp": _GatedMLP(width, sizes.abstractor_ff, sizes.eps),
            }
        )

    def forward(self, queries: Tensor, video: Tensor) -> Tensor:
        queries = self.norm1(queries)
        context = torch.cat([queries, self.normk(video)], dim=1)
        query, key, value = (
            self.attention[name](x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for name, x in (("query", queries), ("key", context), ("value", context))
        )
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = queries + self.output["out_proj"](attended)
        return x + self.output["mlp"](self.output["norm2"](x))


class _AbstractorLayer(nn.Module):
    def __init__(self, sizes: MplugOwlSizes) -> None:
        super().__init__()
        self.crossattention = _CrossAttention(sizes)

    def forward(self, queries: Tensor, video: Tensor) -> Tensor:
        return self.crossattention(queries, video)


class _Abstractor(nn.Module):
    """Video tokens `(B, M, D)` -> `(B, num_queries + 1, language width)`."""

    def __init__(self, sizes: MplugOwlSizes, language_width: int) -> None:
        super().__init__()
        self.encoder = _Layers(_AbstractorLayer(sizes) for _ in range(sizes.abstractor_layers))
        self.visual_fc = nn.Linear(sizes.abstractor_width, language_width)
        self.temporal_visual_fc = nn.Linear(sizes.abstractor_width, language_width)
        self.vit_eos = nn.Parameter(torch.zeros(1, 1, language_width))

    def forward(self, queries: Tensor, temporal_queries: Tensor, video: Tensor) -> Tensor:
        x = torch.cat([queries, temporal_queries], dim=1)
        for layer in self.encoder.layers:
            x = layer(x, video)
        content, time = x.split([queries.shape[1], temporal_queries.shape[1]], dim=1)
        tokens = self.visual_fc(content) + self.temporal_visual_fc(time)
        return torch.cat([tokens, self.vit_eos.expand(len(tokens), -1, -1)], dim=1)


class MplugOwlVideo(nn.Module):
    """
    The whole network, for videos of two frames or more.

    Args:
        sizes (`MplugOwlSizes`): Sizes; the defaults make the 7B model, which wants a meta device or a lot of patience.
    """

    def __init__(self, sizes: MplugOwlSizes) -> None:
        super().__init__()
        self.sizes = sizes
        language = LlamaConfig(**sizes.language)
        self.vision_model = _Vision(sizes)
        self.abstractor = _Abstractor(sizes, language.hidden_size)
        self.query_tokens = nn.Parameter(torch.zeros(1, sizes.num_queries, sizes.abstractor_width))
        self.temporal_query_tokens = nn.Parameter(torch.zeros(1, sizes.num_queries, sizes.abstractor_width))
        self.language_model = LlamaForCausalLM(language)

    def encode_video(self, frames: Tensor) -> Tensor:
        """Normalised frames `(B, T, 3, H, W)`, T > 1 -> video tokens `(B, num_queries + 1, language width)`."""
        queries, times = (q.expand(len(frames), -1, -1) for q in (self.query_tokens, self.temporal_query_tokens))
        return self.abstractor(queries, times, self.vision_model(frames))

    def embed(self, input_ids: Tensor, video_tokens: Tensor) -> Tensor:
        """
        Args:
            input_ids: `(B, L)`, with `VIDEO_TOKEN` at `num_queries + 1` places of each row.
            video_tokens: `(B, num_queries + 1, D)`.

        Returns:
            `(B, L, D)` embeddings of the text with the video in its place.
        """
        embeddings = self.language_model.get_input_embeddings()(input_ids.clamp(min=0))
        return embeddings.masked_scatter((input_ids == VIDEO_TOKEN).unsqueeze(-1), video_tokens.to(embeddings.dtype))

    def logits(self, hidden: Tensor) -> Tensor:
        """Last hidden states `(..., D)` -> float32 logits `(..., V)`, also where the weights are bfloat16."""
        return F.linear(hidden.float(), self.language_model.lm_head.weight.float())
