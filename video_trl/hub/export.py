"""
Write LoRA files of Wan in the layout of the original code, which ComfyUI and other tools read.

Layers are named as the original code names them. The weights are the same numbers; only names change, and the scale
`alpha / rank` moves from the file's metadata into tensors.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import WanLoraLoaderMixin

from .lora import EXPERT_KEY, PREFIX, acting_alpha, check_replaceable, expert_of, write_tensors
from .published import CONFIG_KEY, Alpha, read_adapter
from .wan_names import original_name


_WAN_PREFIX = "diffusion_model."


def export_lora(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    alpha: Alpha | None = None,
    scale: float = 1.0,
) -> Path:
    """
    Write an adapter of Wan in the layout of the model's original code, which is that of ComfyUI.

    Weights are not rounded, so [`~video_trl.hub.import_lora`] gives them back bit for bit. The file is read back with
    diffusers' own converter before it is written. CogVideoX needs no export: ComfyUI takes
    `pytorch_lora_weights.safetensors`.

    Args:
        source (`str` or `Path`): Folder with `pytorch_lora_weights.safetensors`, or a file in any layout that
            [`~video_trl.hub.read_adapter`] knows.
        target (`str` or `Path`): The file to write. Of an adapter of one of Wan 2.2's two experts, `"_high_noise"` or
            `"_low_noise"` is added to its name, unless it is there: each goes into a loader of its own.
        alpha (`float` or `"rank"`, *optional*): What the adapter was trained with, for files that do not say it.
        scale (`float`, *optional*, defaults to `1.0`): Factor of what the adapter adds to each output; goes into the
            file's alphas.

    Returns:
        `Path`: The file.

    Raises:
        ValueError: No such adapter, one of another model, or one with parts that the layout has no place for; a file
            of others that would be replaced; or as in [`~video_trl.hub.read_adapter`].
    """
    weights, config = read_adapter(source, alpha=alpha, scale=scale)
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
        written = acting_alpha(config, name, len(down))
        if written <= 0:  # diffusers' converter would look for a power of two for ever
            raise ValueError(f"{source}: {name!r} has alpha {written:g}; this layout needs alpha and `scale` above 0.")
        if name.startswith("blocks."):
            tensors[f"{_WAN_PREFIX}{theirs}.alpha"] = torch.tensor(written, dtype=torch.float32)
        elif written != len(down):
            raise ValueError(
                f"{source}: {name!r} has alpha {written:g} and rank {len(down)}, and the layout has no place for "
                "another alpha than the rank there. Train with `lora_alpha` = `lora_rank`, and export at scale 1."
            )
    _check_with_diffusers(tensors, set(weights), source)
    settings = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    path, expert = Path(target), expert_of(source)
    if expert is not None and expert not in path.stem:  # ComfyUI's users tell the two by their names
        path = path.with_stem(f"{path.stem}_{expert}")
    if path.suffix != ".safetensors":
        raise ValueError(f"The file to write must end in .safetensors, got {path}.")
    header = {"format": "pt", CONFIG_KEY: json.dumps(settings)} | ({} if expert is None else {EXPERT_KEY: expert})
    check_replaceable(path)
    return write_tensors(path, tensors, header)


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
