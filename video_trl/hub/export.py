"""
LoRA files for other tools, and back.

A tool that runs the original code of a model, as ComfyUI does, names layers as that code does. Weights are the same
numbers; only names change, and the scale `alpha / rank` moves from the file's metadata into tensors.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from diffusers.loaders import WanLoraLoaderMixin
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import safe_open

from .lora import PREFIX, load_lora_state, write_lora, write_whole


_CONFIG_KEY = "video_trl_adapter"  # the adapter's configuration, for the way back


@dataclass(frozen=True)
class Layout:
    """
    Names of layers in another tool's files.

    Attributes:
        prefix (`str`): Stands before every name.
        blocks (`tuple[str, str]`): Names of the list of blocks, there and in diffusers.
        in_block (`dict[str, str]`): Names within a block, there and in diffusers.
        outside (`dict[str, str]`): Names of other layers.
        down (`str`), up (`str`): Names of the two matrices, in place of `{}` or behind a dot at the end.
        has_alpha (`bool`): Whether a layer in a block has a tensor `alpha`.
    """

    prefix: str
    blocks: tuple[str, str]
    in_block: Mapping[str, str]
    outside: Mapping[str, str]
    down: str
    up: str
    has_alpha: bool

    def theirs(self, name: str) -> str | None:
        """Name of a layer in this layout, from that in diffusers; `None` where it has none."""
        inner = {ours: theirs for theirs, ours in self.in_block.items()}
        found = re.fullmatch(rf"{self.blocks[1]}\.(\d+)\.(.+)", name)
        if found is not None and found[2] in inner:
            return f"{self.blocks[0]}.{found[1]}.{inner[found[2]]}"
        return {ours: theirs for theirs, ours in self.outside.items()}.get(name)

    def ours(self, name: str) -> str | None:
        """Name of a layer in diffusers; `None` for one that it does not know."""
        found = re.fullmatch(rf"{re.escape(self.blocks[0])}\.(\d+)\.(.+)", name)
        if found is not None and found[2] in self.in_block:
            return f"{self.blocks[1]}.{found[1]}.{self.in_block[found[2]]}"
        return self.outside.get(name)

    def is_block(self, name: str) -> bool:
        """Whether a name of diffusers is that of a layer in a block."""
        return name.startswith(f"{self.blocks[1]}.")


WAN = Layout(
    prefix="diffusion_model.",
    blocks=("blocks", "blocks"),
    in_block={
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
    },
    outside={
        "time_embedding.0": "condition_embedder.time_embedder.linear_1",
        "time_embedding.2": "condition_embedder.time_embedder.linear_2",
        "time_projection.1": "condition_embedder.time_proj",
        "text_embedding.0": "condition_embedder.text_embedder.linear_1",
        "text_embedding.2": "condition_embedder.text_embedder.linear_2",
        "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
        "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
        "head.head": "proj_out",
    },
    down="lora_down.weight",
    up="lora_up.weight",
    has_alpha=True,
)
COGVIDEOX = Layout(
    prefix="model.diffusion_model.transformer.",
    blocks=("layers", "transformer_blocks"),
    in_block={
        "attention.query_key_value.{}.0": "attn1.to_q",
        "attention.query_key_value.{}.1": "attn1.to_k",
        "attention.query_key_value.{}.2": "attn1.to_v",
        "attention.dense.{}.0": "attn1.to_out.0",
    },
    outside={},
    down="matrix_A",
    up="matrix_B",
    has_alpha=False,
)
_ENDS = {  # of the names of the two matrices, in files of all tools
    "lora_down.weight": "lora_A.weight",
    "lora_A.weight": "lora_A.weight",
    "lora_up.weight": "lora_B.weight",
    "lora_B.weight": "lora_B.weight",
}


def export_lora(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> Path:
    """
    Write an adapter in the layout of the model's original code: for Wan that of ComfyUI, for CogVideoX that of SAT.

    Weights are not rounded, so [`import_lora`] gives them back bit for bit. A Wan file is read back with diffusers'
    own converter before it is written.

    Args:
        source (`str` or `Path`): Folder with `pytorch_lora_weights.safetensors`, or that file.
        target (`str` or `Path`): The file to write.

    Returns:
        `Path`: The file.

    Raises:
        ValueError: No such adapter, or one with layers or parts that the layout has no names for.
    """
    weights, config = load_lora_state(source)
    layout = _layout_of(weights)
    if config.use_dora or config.lora_bias:
        raise ValueError(
            f"{source} is an adapter with {'DoRA' if config.use_dora else 'biases'}, which this layout has no place "
            "for. Train with `use_dora=False` and `lora_bias=False` to export it."
        )
    tensors: dict[str, torch.Tensor] = {}
    for name in sorted({key.rpartition(".lora_")[0] for key in weights}):
        theirs = layout.theirs(name)
        if theirs is None:
            raise ValueError(f"{source}: the layout has no name for {name!r}. Train without that layer to export it.")
        down = weights[f"{name}.lora_A.weight"]
        tensors[layout.prefix + _matrix(theirs, layout.down)] = down
        tensors[layout.prefix + _matrix(theirs, layout.up)] = weights[f"{name}.lora_B.weight"]
        alpha = _alpha(config, name, len(down))
        if layout.has_alpha and layout.is_block(name):
            tensors[f"{layout.prefix}{theirs}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
        elif alpha != len(down):
            raise ValueError(
                f"{source}: {name!r} has alpha {alpha:g} and rank {len(down)}, and the layout has no place for "
                "another alpha than the rank there. Train with `lora_alpha` = `lora_rank` to export it."
            )
    if layout is WAN:
        _check_with_diffusers(tensors, set(weights), source)
    described = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    path = Path(target)
    if path.suffix != ".safetensors":
        raise ValueError(f"The file to write must end in .safetensors, got {path}.")
    write_whole(path, safetensors.torch.save(tensors, {"format": "pt", _CONFIG_KEY: json.dumps(described)}))
    return path


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
        raise ValueError(f"No file {path}; expected a LoRA file in the layout of Wan's or CogVideoX's original code.")
    with safe_open(path, framework="pt", device="cpu") as file:
        header = file.metadata() or {}
        found = {name: file.get_tensor(name) for name in file.keys()}
    layout = WAN if any(name.startswith(WAN.prefix) for name in found) else COGVIDEOX
    weights, alphas = _renamed(found, layout, path)
    config = LoraConfig(**json.loads(header[_CONFIG_KEY])) if _CONFIG_KEY in header else _config_of(weights, alphas)
    return write_lora(directory, weights, config, config.base_model_name_or_path)


def _layout_of(weights: Mapping[str, torch.Tensor]) -> Layout:
    for layout in (WAN, COGVIDEOX):
        if any(layout.is_block(name) for name in weights):
            return layout
    raise ValueError(f"Expected an adapter of Wan or CogVideoX, got layers such as {sorted(weights)[:2]}.")


def _matrix(name: str, matrix: str) -> str:
    return name.format(matrix) if "{}" in name else f"{name}.{matrix}"


def _alpha(config: LoraConfig, name: str, rank: int) -> float:
    """What the output of a layer of this rank is multiplied by, times the rank."""
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), name), config.lora_alpha)
    return float(alpha) * math.sqrt(rank) if config.use_rslora else float(alpha)


def _check_with_diffusers(tensors: Mapping[str, torch.Tensor], names: set[str], source: Any) -> None:
    try:
        read = set(WanLoraLoaderMixin.lora_state_dict(dict(tensors)))
    except (ValueError, KeyError) as error:
        read = {f"nothing ({error})"}
    expected = {PREFIX + name for name in names}
    if read != expected:
        raise ValueError(
            f"{source}: diffusers would not read {sorted(expected - read)[:4]} from the layout, but "
            f"{sorted(read - expected)[:4]}. Train with other `target_modules`, such as all or none of the "
            "image projections."
        )


def _renamed(
    found: Mapping[str, torch.Tensor], layout: Layout, path: Path
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Weights by PEFT's names, and the alpha of layers that have one."""
    weights: dict[str, torch.Tensor] = {}
    alphas: dict[str, float] = {}
    unknown = []
    for key, tensor in found.items():
        inner = key.removeprefix(layout.prefix)
        name, ending = _split(inner, layout)
        ours = layout.ours(name)
        if ours is None or not ending or inner == key:
            unknown.append(key)
        elif ending == "alpha":
            alphas[ours] = float(tensor)
        else:
            weights[f"{ours}.{ending}"] = tensor
    if unknown or not weights:
        raise ValueError(
            f"{path}: expected names in the layout of Wan's original code ({WAN.prefix}...) or CogVideoX's "
            f"({COGVIDEOX.prefix}...), got {sorted(unknown)[:3]}."
        )
    return weights, alphas


def _split(name: str, layout: Layout) -> tuple[str, str]:
    """Layer, and which of its tensors: `lora_A.weight`, `lora_B.weight`, `alpha`; the latter empty for any other."""
    if not layout.has_alpha:
        for matrix, ending in ((layout.down, "lora_A.weight"), (layout.up, "lora_B.weight")):
            if f".{matrix}." in name:
                return name.replace(f".{matrix}.", ".{}."), ending
        return name, ""
    if name.endswith(".alpha"):
        return name.removesuffix(".alpha"), "alpha"
    ending = next((ending for ending in _ENDS if name.endswith(f".{ending}")), "")
    return name.removesuffix(f".{ending}"), _ENDS.get(ending, "")


def _config_of(weights: Mapping[str, torch.Tensor], alphas: Mapping[str, float]) -> LoraConfig:
    """The configuration that a file of another tool implies: where no alpha is given, it is the rank."""
    ranks = {name.removesuffix(".lora_A.weight"): len(w) for name, w in weights.items() if ".lora_A." in name}
    given = {name: alphas.get(name, float(rank)) for name, rank in ranks.items()}
    (rank, _), (alpha, _) = Counter(ranks.values()).most_common(1)[0], Counter(given.values()).most_common(1)[0]
    return LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        target_modules=sorted(ranks),
        rank_pattern={name: value for name, value in ranks.items() if value != rank},
        alpha_pattern={name: value for name, value in given.items() if value != alpha},
    )
