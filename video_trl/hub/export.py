"""
Convert LoRA files of Wan between diffusers and the layout of the original code, which ComfyUI and other tools read.

Layers are named as the original code names them. The weights are the same numbers; only names change, and the scale
`alpha / rank` moves from the file's metadata into tensors.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import WanLoraLoaderMixin
from peft import LoraConfig
from peft.utils.other import get_pattern_key

from .lora import PREFIX, expert_of, load_lora_state, read_tensors, write_lora, write_tensors


_CONFIG_KEY = "video_trl_adapter"  # the adapter's configuration, for the way back
_WAN_PREFIX = "diffusion_model."
_IN_BLOCK = {  # names of layers in `blocks.N`, there and in diffusers
    "self_attn.q": "attn1.to_q",
    "self_attn.k": "attn1.to_k",
    "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0",
    "cross_attn.q": "attn2.to_q",
    "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0",
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
_OUTSIDE = {  # of other layers
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "head.head": "proj_out",
}
_ENDS = {  # of the names of the two matrices, in files of all tools
    "lora_down.weight": "lora_A.weight",
    "lora_A.weight": "lora_A.weight",
    "lora_up.weight": "lora_B.weight",
    "lora_B.weight": "lora_B.weight",
}


def original_name(name: str) -> str | None:
    """Name of a layer in Wan's original code, from that in diffusers; `None` where it has none."""
    in_block, outside = ({ours: theirs for theirs, ours in names.items()} for names in (_IN_BLOCK, _OUTSIDE))
    return _renamed_layer(name, in_block, outside)


def diffusers_name(name: str) -> str | None:
    """Name of a layer in diffusers, from that in Wan's original code; `None` where it has none."""
    return _renamed_layer(name, _IN_BLOCK, _OUTSIDE)


def _renamed_layer(name: str, in_block: Mapping[str, str], outside: Mapping[str, str]) -> str | None:
    block = re.match(r"blocks\.\d+\.", name)
    if block is None:
        return outside.get(name)
    inner = in_block.get(name[block.end() :])
    return None if inner is None else block[0] + inner


def export_lora(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> Path:
    """
    Write an adapter of Wan in the layout of the model's original code, which is that of ComfyUI.

    Weights are not rounded, so [`import_lora`] gives them back bit for bit. The file is read back with diffusers' own
    converter before it is written. CogVideoX needs no export: ComfyUI takes `pytorch_lora_weights.safetensors`.

    Args:
        source (`str` or `Path`): Folder with `pytorch_lora_weights.safetensors`, or that file.
        target (`str` or `Path`): The file to write. Of an adapter of one of Wan 2.2's two experts, `"_high_noise"` or
            `"_low_noise"` is added to its name, unless it is there: each goes into a loader of its own.

    Returns:
        `Path`: The file.

    Raises:
        ValueError: No such adapter, one of another model, or one with parts that the layout has no place for.
    """
    weights, config = load_lora_state(source)
    if not any(key.startswith("blocks.") for key in weights):
        raise ValueError(
            f"{source}: expected an adapter of Wan, with layers in `blocks`, got layers {sorted(weights)[:2]}, .... "
            "For CogVideoX nothing is to be exported: ComfyUI takes `pytorch_lora_weights.safetensors` as it is."
        )
    if config.use_dora or config.lora_bias:
        raise ValueError(
            f"{source} is an adapter with {'DoRA' if config.use_dora else 'biases'}, which this layout has no place "
            "for. Train with `use_dora=False` and `lora_bias=False` to export it."
        )
    tensors: dict[str, torch.Tensor] = {}
    for name in sorted({key.rpartition(".lora_")[0] for key in weights}):
        theirs = original_name(name)
        if theirs is None:
            raise ValueError(f"{source}: the layout has no name for {name!r}. Train without that layer to export it.")
        down = weights[f"{name}.lora_A.weight"]
        tensors[f"{_WAN_PREFIX}{theirs}.lora_down.weight"] = down
        tensors[f"{_WAN_PREFIX}{theirs}.lora_up.weight"] = weights[f"{name}.lora_B.weight"]
        alpha = _alpha(config, name, len(down))
        if name.startswith("blocks."):
            tensors[f"{_WAN_PREFIX}{theirs}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
        elif alpha != len(down):
            raise ValueError(
                f"{source}: {name!r} has alpha {alpha:g} and rank {len(down)}, and the layout has no place for "
                "another alpha than the rank there. Train with `lora_alpha` = `lora_rank` to export it."
            )
    _check_with_diffusers(tensors, set(weights), source)
    settings = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    path, expert = Path(target), expert_of(source)
    if expert is not None and expert not in path.stem:  # ComfyUI's users tell the two by their names
        path = path.with_stem(f"{path.stem}_{expert}")
    if path.suffix != ".safetensors":
        raise ValueError(f"The file to write must end in .safetensors, got {path}.")
    return write_tensors(path, tensors, {"format": "pt", _CONFIG_KEY: json.dumps(settings)})


def import_lora(source: str | os.PathLike[str], directory: str | os.PathLike[str]) -> Path:
    """
    Bring a file in the layout of [`export_lora`] back to that of diffusers: `pytorch_lora_weights.safetensors`.

    Files of other tools are read too, with `lora_down`/`lora_up` or `lora_A`/`lora_B`, with or without `alpha`.

    Args:
        source (`str` or `Path`): The file.
        directory (`str` or `Path`): Folder to write into; made where needed.

    Returns:
        `Path`: The file.

    Raises:
        ValueError: No such file, or one with other names.
    """
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"No file {path}; expected a LoRA file in the layout of Wan's original code.")
    tensors, header = read_tensors(path)
    weights, alphas = _renamed(tensors, path)
    config = LoraConfig(**json.loads(header[_CONFIG_KEY])) if _CONFIG_KEY in header else _config_of(weights, alphas)
    return write_lora(directory, weights, config, config.base_model_name_or_path)


def _alpha(config: LoraConfig, name: str, rank: int) -> float:
    """What the output of a layer of this rank is multiplied by, times the rank."""
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), name), config.lora_alpha)
    return float(alpha) * math.sqrt(rank) if config.use_rslora else float(alpha)


def _check_with_diffusers(tensors: Mapping[str, torch.Tensor], names: set[str], source: Any) -> None:
    # Without numbers, but for the alphas, which it reads: it multiplies weights by them, in place.
    shapes = {name: tensor.to("meta") if tensor.ndim else tensor for name, tensor in tensors.items()}
    try:
        names_read = set(WanLoraLoaderMixin.lora_state_dict(shapes))
    except (ValueError, KeyError) as error:
        names_read = {f"nothing ({error})"}
    expected = {PREFIX + name for name in names}
    if names_read != expected:
        raise ValueError(
            f"{source}: diffusers would not read {sorted(expected - names_read)[:4]} from the layout, but "
            f"{sorted(names_read - expected)[:4]}. Train with other `target_modules`, such as all or none of the "
            "image projections."
        )


def _renamed(tensors: Mapping[str, torch.Tensor], path: Path) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Weights by PEFT's names, and the alpha of layers that have one."""
    weights: dict[str, torch.Tensor] = {}
    alphas: dict[str, float] = {}
    unknown = []
    for key, tensor in tensors.items():
        inner = key.removeprefix(_WAN_PREFIX)
        name, ending = _split(inner)
        ours = diffusers_name(name)
        if ours is None or not ending or inner == key:
            unknown.append(key)
        elif ending == "alpha":
            alphas[ours] = float(tensor)
        else:
            weights[f"{ours}.{ending}"] = tensor
    if unknown or not weights:
        raise ValueError(
            f"{path}: expected names in the layout of Wan's original code ({_WAN_PREFIX}...), got "
            f"{sorted(unknown)[:3]}."
        )
    return weights, alphas


def _split(name: str) -> tuple[str, str]:
    """Layer, and which of its tensors: `lora_A.weight`, `lora_B.weight`, `alpha`; the latter empty for any other."""
    if name.endswith(".alpha"):
        return name.removesuffix(".alpha"), "alpha"
    ending = next((ending for ending in _ENDS if name.endswith(f".{ending}")), "")
    return name.removesuffix(f".{ending}"), _ENDS.get(ending, "")


def _config_of(weights: Mapping[str, torch.Tensor], alphas: Mapping[str, float]) -> LoraConfig:
    """The configuration that a file of another tool implies: where no alpha is given, it is the rank."""
    ranks = {name.removesuffix(".lora_A.weight"): len(w) for name, w in weights.items() if ".lora_A." in name}
    alpha_of = {name: alphas.get(name, float(rank)) for name, rank in ranks.items()}
    (rank, _), (alpha, _) = Counter(ranks.values()).most_common(1)[0], Counter(alpha_of.values()).most_common(1)[0]
    return LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        target_modules=sorted(ranks),
        rank_pattern={name: value for name, value in ranks.items() if value != rank},
        alpha_pattern={name: value for name, value in alpha_of.items() if value != alpha},
    )
