"""
V-JEPA (the first version) and OmniMAE as teachers, from the files that their authors published.

Both are the network of VideoMAE: tubelets, blocks with the norm first, full attention. Their queries, keys and values
all have a bias; that of the keys adds the same number to all scores of a query, which softmax takes away again, so it
is left out. V-JEPA: https://github.com/facebookresearch/jepa (CC BY-NC 4.0), OmniMAE:
https://github.com/facebookresearch/omnivore (CC BY-NC 4.0). Weights under these licences are for research only.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import VideoMAEConfig

from .videomae import HEADS, VideoMAETeacher, load_videomaev2, read_checkpoint, some_of, weights_in, whole_model


_VJEPA_CONTAINERS = ("target_encoder", "encoder")  # the moving average that is meant to be used, and what it follows
_VJEPA_PREFIX = re.compile(r"^(?:(?:module|backbone)\.)+")
_OMNIMAE_DROPPED = re.compile(r"^(?:trunk\.decoder\.|trunk\.norm\.|trunk\.mask_token$|head\.)")
_PARTS = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def load_teacher_file(path: str, *, dtype: torch.dtype, **options: Any) -> VideoMAETeacher:
    """
    A teacher from a file: V-JEPA (`vitl16.pth.tar`), OmniMAE (`vitb_pretrain.torch`) or VideoMAEv2, told apart by
    the names of the weights.

    Args:
        path (`str`): The file.
        dtype (`torch.dtype`): Of weights and arithmetic.
        options: `height`, `width`, `antialias`, `skip_first_frame`; of VideoMAEv2 also `num_attention_heads`.

    Raises:
        ValueError: The file holds more than tensors, is none of these, or lacks weights or has others.
    """
    content = read_checkpoint(Path(path))
    stem = Path(path).name.partition(".")[0]
    if isinstance(content, dict):
        container = next((name for name in _VJEPA_CONTAINERS if isinstance(content.get(name), dict)), None)
        if container is not None:
            weights = {_VJEPA_PREFIX.sub("", key): tensor for key, tensor in content[container].items()}
            model, table = _convert(weights, "patch_embed.proj.", path, "V-JEPA")
            return VideoMAETeacher(model.to(dtype), f"vjepa-{stem}", table=table, trilinear=True, **options)
        if "trunk.patch_embed.proj.1.weight" in content:
            weights = {
                key.removeprefix("trunk."): tensor
                for key, tensor in weights_in(content, path).items()
                if not _OMNIMAE_DROPPED.match(key)
            }
            model, table = _convert(weights, "patch_embed.proj.1.", path, "OmniMAE")
            return VideoMAETeacher(model.to(dtype), f"omnimae-{stem}", table=table, **options)
    return load_videomaev2(path, dtype=dtype, **options)


def _convert(weights: dict[str, Tensor], patches: str, path: str, kind: str) -> tuple[Any, Tensor]:
    """
    The network, and the positions of its pretraining `(N, D)`.

    Pretraining was at 224 pixels; how many frames it saw follows from the number of positions.
    """
    projection, table, mlp = (
        weights.get(name) for name in (f"{patches}weight", "pos_embed", "blocks.0.mlp.fc1.weight")
    )
    if projection is None or projection.ndim != 5 or table is None or mlp is None:
        raise ValueError(f"{path}: no encoder of {kind} for videos among the weights {some_of(set(weights))}.")
    width, _, tubelet, patch, _ = projection.shape
    side = 224 // patch
    frames, rest = divmod(table.shape[1], side * side)
    if rest or table.shape[2] != width or width not in HEADS:
        raise ValueError(
            f"{path}: expected positions (1, F * {side} * {side}, {width}) of a pretraining at 224 pixels and a width "
            f"of {sorted(HEADS)}, got {tuple(table.shape)}."
        )
    depth = 1 + max(int(match[1]) for key in weights if (match := re.match(r"blocks\.(\d+)\.", key)))
    config = VideoMAEConfig(
        image_size=224,
        patch_size=patch,
        num_frames=frames * tubelet,
        tubelet_size=tubelet,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=HEADS[width],
        intermediate_size=len(mlp),
        layer_norm_eps=1e-6,
        use_mean_pooling=True,
        qv_bias=True,
    )
    converted: dict[str, Tensor] = {}
    for key, tensor in weights.items():
        if key == "pos_embed" or key.startswith("norm."):  # tokens are taken before the final norm
            continue
        converted |= _renamed(key, tensor, patches)
    return whole_model(config, converted, path, kind), table[0].float()


def _renamed(key: str, tensor: Tensor, patches: str) -> dict[str, Tensor]:
    """A weight under the names of `VideoMAEModel`; a key without a counterpart keeps its own, and is refused later."""
    if key.startswith(patches):
        return {f"embeddings.patch_embeddings.projection.{key.removeprefix(patches)}": tensor}
    match = re.match(r"^blocks\.(\d+)\.(.+)\.(weight|bias)$", key)
    if match is None:
        return {key: tensor}
    layer, part, kind = f"encoder.layer.{match[1]}", match[2], match[3]
    if part == "attn.qkv":
        chunks = dict(zip(("query", "key", "value"), tensor.chunk(3, dim=0), strict=True))
        return {
            f"{layer}.attention.attention.{name}.{kind}": chunk
            for name, chunk in chunks.items()
            if (name, kind) != ("key", "bias")
        }
    return {f"{layer}.{_PARTS.get(part, part)}.{kind}": tensor}
