"""
Read adapters as they are published: by this package and diffusers, for ComfyUI, by DiffSynth-Studio and musubi-tuner.

Weights are the same numbers in all of them. What differs is how layers are named, and whether the file says alpha,
which decides how strongly it acts: an output is multiplied by alpha / rank.
"""

import copy
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key

from .lora import (
    LORA_FILE_NAME,
    METADATA_KEY,
    PREFIX,
    acting_alpha,
    check_lora_config,
    check_replaceable,
    check_weights,
    described,
    expert_of,
    known_config,
    lora_state,
    read_tensors,
    write_lora,
)
from .wan_names import diffusers_name, layer_with_underscores, original_name


CONFIG_KEY = "video_trl_adapter"  # an exported adapter's configuration, for the way back
#: `alpha` of files whose tools multiply by nothing.
RANK: Literal["rank"] = "rank"
# What tools put before a layer's name: ComfyUI, DiffSynth-Studio where it is told to leave it, PEFT.
_PEFT_PREFIX = "base_model.model."
_PREFIXES = ("diffusion_model.", "model.diffusion_model.", "pipe.dit.", _PEFT_PREFIX, PREFIX)
_FLAT_PREFIX = re.compile("lora_unet_+")  # of musubi-tuner and VideoX-Fun, with underscores for dots
# The two matrices, in files of all tools; some have the adapter's name in between, as `lora_A.default.weight`.
_MATRIX = re.compile(r"(?P<layer>.+)\.lora_(?P<which>A|B|down|up)(\.(?P<adapter>[^.]+))?\.weight")
_MATRICES = {"A": "lora_A", "down": "lora_A", "B": "lora_B", "up": "lora_B"}

Alpha = float | Literal["rank"]


def read_adapter(
    source: str | os.PathLike[str], *, alpha: Alpha | None = None, scale: float = 1.0
) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """
    Read an adapter, whichever of the known layouts it is in.

    Args:
        source (`str` or `Path`): A `.safetensors` file, or a folder with `pytorch_lora_weights.safetensors`.
        alpha (`float` or `"rank"`, *optional*): What the adapter was trained with, for files that do not say it.
        scale (`float`, *optional*, defaults to `1.0`): Factor of what the adapter adds to each output, beside alpha /
            rank. 1 leaves it as it was trained, 0 is the base model.

    Returns:
        `tuple[dict[str, torch.Tensor], peft.LoraConfig]`: Weights by PEFT's names, on the CPU, and the configuration.

    Raises:
        ValueError: No such file, or one of no known layout, with parts that LoRA does not have, or of several
            adapters; alpha is not known, or is given although the file says it; a number that is not finite.
    """
    path = Path(source)
    path = path / LORA_FILE_NAME if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"No adapter at {path}; expected a .safetensors file, or a folder with {LORA_FILE_NAME}.")
    if alpha is not None and alpha != RANK and not (math.isfinite(alpha) and alpha != 0):
        raise ValueError(f"`alpha` must be a finite number other than 0, or {RANK!r}, got {alpha!r}.")
    if not math.isfinite(scale):
        raise ValueError(f"`scale` must be a finite number, got {scale!r}.")
    tensors, header = read_tensors(path)
    if METADATA_KEY in header:
        weights, config = lora_state(tensors, header, path)
        _refuse_alpha(alpha, path)
    else:
        weights, alphas = _renamed(tensors, path)
        if CONFIG_KEY in header:
            config = known_config(described(header[CONFIG_KEY], path), path)
            _refuse_alpha(alpha, path)
        else:
            alphas |= _alphas_of_peft(weights, path)
            config = _config_of(weights, _all_alphas(weights, alphas, alpha, path))
        check_weights(weights, config, path)
    try:
        check_lora_config(config)
    except ValueError as error:
        raise ValueError(f"{path} would not act as it was trained. {error}") from error
    if config.use_dora and scale != 1:
        raise ValueError(
            f"{path} is an adapter with DoRA, which replaces weights instead of adding to them: with `scale={scale}` "
            "it would be another one, and not the base with 0. Leave the scale at 1."
        )
    return weights, _scaled(config, scale)


def import_lora(
    source: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    alpha: Alpha | None = None,
    scale: float = 1.0,
) -> Path:
    """
    Bring a published adapter to the layout of diffusers, with rank, alpha and targets as metadata.

    Args:
        source (`str` or `Path`): The file, as for [`read_adapter`].
        directory (`str` or `Path`): Folder to write `pytorch_lora_weights.safetensors` into; made where needed.
        alpha (`float` or `"rank"`, *optional*): What the adapter was trained with, for files that do not say it.
        scale (`float`, *optional*, defaults to `1.0`): Factor of what the adapter adds to each output.

    Returns:
        `Path`: The file.

    Raises:
        ValueError: As in [`read_adapter`], or a file of others would be replaced.
    """
    weights, config = read_adapter(source, alpha=alpha, scale=scale)
    check_replaceable(Path(directory) / LORA_FILE_NAME)
    return write_lora(directory, weights, config, config.base_model_name_or_path, expert_of(source))


def _scaled(config: LoraConfig, scale: float) -> LoraConfig:
    if scale == 1:
        return config
    scaled = copy.copy(config)
    scaled.lora_alpha = config.lora_alpha * scale
    scaled.alpha_pattern = {name: alpha * scale for name, alpha in config.alpha_pattern.items()}
    return scaled


def _refuse_alpha(alpha: Alpha | None, path: Path) -> None:
    if alpha is not None:
        raise ValueError(
            f"{path} says its alpha, so `alpha={alpha!r}` would have no effect. Leave it out; `scale` makes an "
            "adapter act more or less strongly."
        )


def _renamed(tensors: Mapping[str, torch.Tensor], path: Path) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Weights by PEFT's names, and the alpha of layers that have one."""
    weights: dict[str, torch.Tensor] = {}
    alphas: dict[str, float] = {}
    names, unknown = set(), []
    for key, tensor in tensors.items():
        found = _MATRIX.fullmatch(key)
        name = _layer(key.removesuffix(".alpha") if found is None else found["layer"])
        if name is None or (found is None and not key.endswith(".alpha")):
            unknown.append(key)
        elif found is None:
            alphas[name] = _number(tensor, key, path)
        else:
            names.add(found["adapter"])
            ours = f"{name}.{_MATRICES[found['which']]}.weight"
            if ours in weights:
                raise ValueError(f"{path} holds two tensors for {ours!r}, one of them {key!r}. Keep one.")
            weights[ours] = tensor
    if unknown or not weights:
        raise ValueError(
            f"{path}: expected LoRA matrices of layers with the names of diffusers (transformer....) or of Wan's "
            f"original code (blocks.0.self_attn.q, with or without diffusion_model.), got {sorted(unknown)[:3]}. "
            "Where diffusers reads it, load it yourself: `pipeline.load_lora_weights`."
        )
    if len(names) > 1:
        raise ValueError(f"{path} holds several adapters, {sorted(map(str, names))}. Keep the tensors of one.")
    layers = {key.rpartition(".lora_")[0] for key in weights}
    halves = [layer for layer in sorted(layers) if len({f"{layer}.lora_{m}.weight" for m in "AB"} - set(weights))]
    halves += sorted(set(alphas) - layers)
    if halves:
        raise ValueError(f"{path}: expected two matrices of every layer; one is missing of {halves[:3]}.")
    return weights, alphas


def _number(tensor: torch.Tensor, key: str, path: Path) -> float:
    """The alpha in a tensor."""
    value = float(tensor) if tensor.numel() == 1 else math.nan
    if not (math.isfinite(value) and value != 0):
        raise ValueError(f"{path}: expected one finite number other than 0 in {key!r}, got {tensor.tolist()}.")
    return value


def _layer(name: str) -> str | None:
    """Name of a layer in diffusers, from that in a file; `None` where it is of no known layout."""
    if flat := _FLAT_PREFIX.match(name):
        return layer_with_underscores(name[flat.end() :])
    prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")
    inner = name.removeprefix(prefix)
    known = prefix in (PREFIX, _PEFT_PREFIX) or original_name(inner) is not None
    return diffusers_name(inner) or (inner if known else None)


def _alphas_of_peft(weights: Mapping[str, torch.Tensor], path: Path) -> dict[str, float]:
    """The alpha of every layer of a file that PEFT has saved, from the configuration that it has put beside it."""
    beside = path.with_name("adapter_config.json")
    if path.name != "adapter_model.safetensors" or not beside.is_file():
        return {}
    config = known_config(described(beside.read_text(encoding="utf-8"), beside), beside)
    try:
        check_lora_config(config)
    except ValueError as error:
        raise ValueError(f"{beside}: the adapter would not act as it was trained. {error}") from error
    alphas = {}
    for name, rank in _ranks(weights).items():
        names = (original_name(name) or name, name)  # patterns may have the names of the original code
        keys = [get_pattern_key(config.rank_pattern.keys(), each) for each in names]
        said = next((config.rank_pattern[key] for key in keys if key in config.rank_pattern), config.r)
        if config.use_dora or config.lora_bias or said != rank:
            raise ValueError(
                f"{beside}: expected plain matrices of rank {rank} of {name!r}, as {path.name} has, got r={said}, "
                f"use_dora={config.use_dora}, lora_bias={config.lora_bias}. Put the configuration of this adapter "
                "beside it."
            )
        in_pattern = get_pattern_key(config.alpha_pattern.keys(), names[0]) in config.alpha_pattern
        alphas[name] = acting_alpha(config, names[0] if in_pattern else name, rank)
    return alphas


def _ranks(weights: Mapping[str, torch.Tensor]) -> dict[str, int]:
    return {name.removesuffix(".lora_A.weight"): len(w) for name, w in weights.items() if ".lora_A." in name}


def _all_alphas(
    weights: Mapping[str, torch.Tensor], alphas: Mapping[str, float], alpha: Alpha | None, path: Path
) -> dict[str, float]:
    """The alpha of every layer: the file's, else the given one."""
    ranks = _ranks(weights)
    silent = sorted(set(ranks) - set(alphas))
    if not silent:
        _refuse_alpha(alpha, path)
    elif alpha is None:
        raise ValueError(
            f"{path} does not say the alpha of {len(silent)} of its {len(ranks)} layers (rank {ranks[silent[0]]}), "
            "and with it how strongly it acts (alpha / rank). Give what it was trained with, `alpha=64` or "
            f"`--adapter_alpha 64`; or {RANK!r} in place of the number where both are the same, as they are in "
            "DiffSynth-Studio, and as ComfyUI takes such a file."
        )
    given = {name: float(ranks[name] if alpha == RANK else alpha) for name in silent if alpha is not None}
    return {**given, **alphas}


def _config_of(weights: Mapping[str, torch.Tensor], alphas: Mapping[str, float]) -> LoraConfig:
    """The configuration of plain LoRA matrices."""
    ranks = _ranks(weights)
    (rank, _), (alpha, _) = Counter(ranks.values()).most_common(1)[0], Counter(alphas.values()).most_common(1)[0]
    return LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        target_modules=sorted(ranks),
        rank_pattern={name: value for name, value in ranks.items() if value != rank},
        alpha_pattern={name: value for name, value in alphas.items() if value != alpha},
    )
