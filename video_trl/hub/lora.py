"""Check LoRA adapters, and read and write them as files that a diffusers pipeline loads."""

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from diffusers import ModelMixin
from peft import LoraConfig, PeftConfig, get_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors import safe_open

from ..files import tensor_checksum, write_atomically


LORA_FILE_NAME = "pytorch_lora_weights.safetensors"
AVERAGE_FOLDER = "ema"  # files of averaged weights, under the names of the others
METADATA_KEY = "lora_adapter_metadata"  # where diffusers looks for rank and alpha
CHECKSUM_KEY = "checksum"  # of all tensors with their names, and of the other metadata
EXPERT_KEY = "video_trl_expert"  # the transformer that an adapter is for, where a pipeline has several
PREFIX = "transformer."  # without it a pipeline loads nothing, and only logs a warning


# Options of an adapter that is proven to be trained, saved, act the same in a fresh pipeline, and be continued: by
# tests/hub/test_round_trips.py.
_PROVEN = (
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "use_rslora",
    "use_dora",
    "lora_bias",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "layers_pattern",
    "init_lora_weights",
)
# Options that change neither weights nor outputs of a model in evaluation.
_NEUTRAL = (
    "lora_dropout",
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
)


def check_lora_config(config: PeftConfig) -> None:
    """
    Accept only adapters that leave the base weights alone and that a pipeline reloads to the same numbers.

    Args:
        config (`peft.PeftConfig`): The adapter's configuration.

    Raises:
        ValueError: Not a LoRA configuration; an initialisation that changes the base weights (PiSSA, OLoRA, CorDA,
            LoftQ, ...), so that switching the adapter off would not give the reference back; `modules_to_save`,
            `trainable_token_indices` or `bias != "none"`, which a LoRA file for diffusers cannot hold; any other
            option that is not known to survive saving and loading; a scale of 0, with which nothing is learned.
    """
    if type(config) is not LoraConfig:  # AdaLoRA's is derived from it
        raise ValueError(
            f"`peft_config` must be a `peft.LoraConfig`, got {type(config).__name__}: diffusers pipelines would not "
            "load the saved file. Use `LoraConfig(r=48, lora_alpha=48, target_modules=[...])`."
        )
    if config.init_lora_weights not in (True, False, "gaussian"):
        raise ValueError(
            f"`init_lora_weights={config.init_lora_weights!r}` may change the base weights, and the base model with "
            "its adapter off is the reference; expected True, False or 'gaussian'."
        )
    if config.modules_to_save:
        raise ValueError(
            f"`modules_to_save` must be empty, got {config.modules_to_save}: a LoRA file cannot hold whole modules. "
            "Name them in `target_modules` instead."
        )
    if config.layer_replication:
        raise ValueError("`layer_replication` must be empty: it changes the base model, and with it the reference.")
    if config.trainable_token_indices:
        raise ValueError("`trainable_token_indices` must be empty: a video transformer has no token embedding.")
    if config.bias != "none":
        raise ValueError(
            f"`bias` must be 'none', got {config.bias!r}: trained base biases are lost when saving a LoRA."
        )
    alphas = {"lora_alpha": config.lora_alpha, **config.alpha_pattern}
    useless = {name: alpha for name, alpha in alphas.items() if not alpha or not math.isfinite(alpha)}
    if useless:
        raise ValueError(f"The scale of an adapter must be a finite number other than 0, got alpha of {useless}.")
    usual = vars(LoraConfig())
    known = (*_PROVEN, *_NEUTRAL)
    others = {name: value for name, value in vars(config).items() if name not in known and value != usual.get(name)}
    if others:
        listed = ", ".join(f"{name.lstrip('_')}={value!r}" for name, value in others.items())
        raise ValueError(
            f"`peft_config` has {listed}, which is not known to be saved, loaded by a pipeline and continued to the "
            f"same numbers. Leave it at its default; supported options: {', '.join(_PROVEN)}."
        )


def save_lora(
    transformer: ModelMixin,
    directory: str | os.PathLike[str],
    adapter_name: str = "default",
    base_model: str | None = None,
) -> Path:
    """
    Write an adapter as `pytorch_lora_weights.safetensors`, which `pipeline.load_lora_weights(directory)` finds.

    The file carries rank, alpha and targets as metadata (without it diffusers takes alpha = rank). It is written under
    a temporary name and then renamed, so a full disk or a kill leaves an older file whole.

    Args:
        transformer (`ModelMixin`): Model with the adapter, added by `add_adapter`.
        directory (`str` or `Path`): Folder to write into; made where needed.
        adapter_name (`str`, defaults to `"default"`): Which adapter to save.
        base_model (`str`, *optional*): Repository id or path of the base model, recorded in the file.

    Returns:
        `Path`: The file.

    Raises:
        ValueError: No adapter of that name.
        OSError: The file cannot be written, for instance because the disk is full.
    """
    configs: dict[str, LoraConfig] = getattr(
        transformer, "peft_config", {}
    )  # diffusers sets it with the first adapter
    if adapter_name not in configs:
        raise ValueError(
            f"No adapter {adapter_name!r} to save; the model has {sorted(configs)}. Call `add_adapter` first."
        )
    weights = adapter_weights(transformer, adapter_name, transformer.state_dict())
    return write_lora(directory, weights, configs[adapter_name], base_model)


def adapter_weights(
    transformer: ModelMixin, adapter_name: str, state: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """
    Those of the weights `state` of a transformer that belong to an adapter, under the names of its files.

    PEFT before 0.20 takes all weights whose names contain the adapter's name anywhere.
    """
    own = re.compile(rf"\.lora_\w+\.{re.escape(adapter_name)}(\.|$)")
    state = {name: weight for name, weight in state.items() if own.search(name)}
    return get_peft_model_state_dict(transformer, state_dict=state, adapter_name=adapter_name)


def write_lora(
    directory: str | os.PathLike[str],
    weights: Mapping[str, torch.Tensor],
    config: LoraConfig,
    base_model: str | None = None,
    expert: str | None = None,
) -> Path:
    """
    Write weights and configuration of an adapter as `save_lora` does.

    Args:
        directory (`str` or `Path`): Folder to write into; made where needed.
        weights (`dict[str, torch.Tensor]`): By PEFT's names, without the adapter's.
        config (`peft.LoraConfig`): Configuration, with rank and alpha.
        base_model (`str`, *optional*): Repository id or path of the base model, recorded in the file.
        expert (`str`, *optional*): Which of the base model's several transformers it is for, recorded too.

    Returns:
        `Path`: The file.

    Raises:
        OSError: The file cannot be written, for instance because the disk is full.
    """
    settings = adapter_metadata(config)
    if base_model is not None:
        settings[f"{PREFIX}base_model_name_or_path"] = base_model
    tensors = {PREFIX + name: weight.detach().to("cpu").contiguous() for name, weight in weights.items()}
    # Patterns stay in their order: of two that name a layer, the first one holds.
    header = {"format": "pt", METADATA_KEY: json.dumps(dict(sorted(settings.items())), indent=2)}
    header |= {} if expert is None else {EXPERT_KEY: expert}
    return write_tensors(Path(directory) / LORA_FILE_NAME, tensors, header)


def adapter_metadata(config: LoraConfig) -> dict[str, Any]:
    """What diffusers is told of an adapter, beside its weights."""
    # Only what differs from the defaults: another version of PEFT need not know every option of this one. And no
    # dropout: diffusers adds adapters in training mode, where it would make noise of every video.
    defaults = LoraConfig().to_dict()
    always = ("r", "lora_alpha", "target_modules", "rank_pattern")  # diffusers before 0.40 asks for the last one
    options = {name: value for name, value in config.to_dict().items() if name in _PROVEN}
    settings = {key: value for key, value in options.items() if key in always or value != defaults[key]}
    return {PREFIX + key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}


def load_lora_state(directory: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """
    Read what `save_lora` wrote.

    Args:
        directory (`str` or `Path`): Folder with `pytorch_lora_weights.safetensors`, or that file.

    Returns:
        `tuple[dict[str, torch.Tensor], peft.LoraConfig]`: Weights by name without the `transformer.` prefix, on the
        CPU, ready for `peft.set_peft_model_state_dict`, and the adapter's configuration.

    Raises:
        ValueError: No such file, or a file without the metadata; as in [`lora_state`].
    """
    path = Path(directory)
    path = path / LORA_FILE_NAME if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"No LoRA weights at {path}; expected a folder with {LORA_FILE_NAME} as `save_lora` writes it."
        )
    return lora_state(*read_tensors(path), path)


def lora_state(
    tensors: Mapping[str, torch.Tensor], header: Mapping[str, str], path: Path
) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """
    What [`load_lora_state`] returns, from the tensors and the metadata of the file `path`.

    Raises:
        ValueError: No metadata, options that the PEFT that is installed does not know, or weights that are not those
            of the options, whole and finite.
    """
    if METADATA_KEY not in header:
        raise ValueError(
            f"{path} lacks the metadata '{METADATA_KEY}', so its alpha is unknown. Save it with "
            "`video_trl.hub.save_lora`, or bring it here with `video_trl.hub.import_lora`."
        )
    settings = described(header[METADATA_KEY], path)
    # diffusers writes the prefix for pipelines, and none where a transformer saves its adapter itself.
    prefix = PREFIX if any(name.startswith(PREFIX) for name in (*tensors, *settings)) else ""
    others = [name for name in (*tensors, *settings) if not name.startswith(prefix)]
    if others:
        raise ValueError(
            f"{path} holds more than the adapter of one transformer: {others[:3]} lack the prefix '{PREFIX}'. Keep "
            "the tensors and metadata of one."
        )
    config = known_config({key.removeprefix(prefix): value for key, value in settings.items()}, path)
    weights = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    check_weights(weights, config, path)
    return weights, config


def check_weights(weights: Mapping[str, torch.Tensor], config: LoraConfig, path: Path) -> None:
    """
    Raise a `ValueError` unless the weights in the file `path` are the whole of an adapter of this configuration.

    diffusers loads what fits, and only logs a warning of the rest.

    Args:
        weights (`dict[str, torch.Tensor]`): By PEFT's names, without the adapter's.
        config (`peft.LoraConfig`): The configuration.
        path (`Path`): The file, for messages.
    """
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for name, weight in weights.items():
        if not (weight.is_floating_point() and weight.float().isfinite().all()):
            raise ValueError(
                f"{path}: expected finite numbers, of a floating dtype, got other ones in {name!r} ({weight.dtype})."
            )
        layer, _, part = name.rpartition(".lora_")
        layers.setdefault(layer, {})[part] = weight
    parts = {"A.weight", "B.weight"}
    parts |= {"magnitude_vector"} if config.use_dora else set()
    parts |= {"B.bias"} if config.lora_bias else set()
    if not layers:
        raise ValueError(f"{path} holds no weights.")
    for layer, found in sorted(layers.items()):
        if set(found) != parts:
            raise ValueError(
                f"{path}: by its options every layer has {sorted(parts)}, got {sorted(found)} of {layer!r}. A part of "
                "it is missing, or its metadata are another adapter's."
            )
        down, up = found["A.weight"], found["B.weight"]
        rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), layer), config.r)
        if min(down.ndim, up.ndim) < 2 or not len(down) == up.shape[1] == rank:
            raise ValueError(
                f"{path}: expected matrices of rank {rank} of {layer!r}, got shapes {tuple(down.shape)} and "
                f"{tuple(up.shape)}."
            )


def described(text: str, path: Path) -> dict[str, Any]:
    """
    What the metadata of the file `path` say of its adapter.

    Raises:
        ValueError: If they are no JSON object.
    """
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: what it says of its adapter is no JSON ({error}). Save it again.") from error
    if not isinstance(settings, dict):
        raise ValueError(
            f"{path}: what it says of its adapter is no JSON object, got {settings!r:.80}. Save it again."
        )
    return settings


def known_config(settings: Mapping[str, Any], path: Path) -> LoraConfig:
    """
    The configuration that the file `path` holds.

    Raises:
        ValueError: If the PEFT that is installed does not know one of its options, or refuses its value.
    """
    unknown = sorted(set(settings) - {field.name for field in fields(LoraConfig)})
    if unknown:
        raise ValueError(f"{path} has options {unknown} that this version of PEFT does not know. Update PEFT.")
    ranks = {"r": settings.get("r", 8), **_pattern(settings, "rank_pattern", path)}
    alphas = {"lora_alpha": settings.get("lora_alpha", 8), **_pattern(settings, "alpha_pattern", path)}
    wrong = {name: rank for name, rank in ranks.items() if type(rank) is not int or rank < 1}
    wrong |= {name: alpha for name, alpha in alphas.items() if type(alpha) not in (int, float)}
    if wrong:
        raise ValueError(f"{path}: expected positive whole ranks and alphas that are numbers, got {wrong}.")
    try:
        return LoraConfig(**settings)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} has options that PEFT refuses ({error}).") from error


def acting_alpha(config: LoraConfig, name: str, rank: int) -> float:
    """What the output of a layer of this rank is multiplied by, times the rank."""
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), name), config.lora_alpha)
    return float(alpha) * math.sqrt(rank) if config.use_rslora else float(alpha)


def _pattern(settings: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    pattern = settings.get(name) or {}
    if not isinstance(pattern, dict):
        raise ValueError(f"{path}: expected `{name}` to be an object, got {pattern!r:.80}.")
    return pattern


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: Mapping[str, str]) -> Path:
    """Write tensors on the CPU, metadata and their checksum as a safetensors file, whole or not at all."""
    content = safetensors.torch.save(tensors, {**metadata, CHECKSUM_KEY: _checksum(tensors, metadata)})
    end = 8 + int.from_bytes(content[:8], "little")
    # safetensors writes metadata in another order each time; equal tensors are to make equal files.
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return write_atomically(path, len(text).to_bytes(8, "little") + text + content[end:])


def expert_of(directory: str | os.PathLike[str]) -> str | None:
    """The transformer that an adapter's file says it is for; `None` where a pipeline has one."""
    path = Path(directory)
    with safe_open(path / LORA_FILE_NAME if path.is_dir() else path, framework="pt") as file:
        return (file.metadata() or {}).get(EXPERT_KEY)


def check_replaceable(path: Path) -> None:
    """Raise a `ValueError` if a file that is to be written is there, and `write_tensors` has not written it."""
    if path.exists():
        try:
            with safe_open(path, framework="pt") as file:
                ours = CHECKSUM_KEY in (file.metadata() or {})
        except (safetensors.SafetensorError, OSError):
            ours = False
        if not ours:
            raise ValueError(f"{path} was not written by video_trl and stays. Pass another place, or move it.")


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """
    Tensors of a safetensors file, on the CPU, and its metadata.

    Raises:
        ValueError: The file is incomplete or is no such file, or its tensors and metadata are not those of the
            checksum in it.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors, header = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}). Fetch or save it again.") from error
    others = {name: text for name, text in header.items() if name != CHECKSUM_KEY}
    # Older files have a checksum of their tensors alone.
    if CHECKSUM_KEY in header and header[CHECKSUM_KEY] not in (_checksum(tensors, others), _checksum(tensors, {})):
        raise ValueError(f"{path} is damaged: its content is not that of its checksum. Fetch or save it again.")
    return tensors, header


def _checksum(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    items: list[tuple[str, str | torch.Tensor]] = [*sorted(tensors.items()), *sorted(metadata.items())]
    return tensor_checksum(*(part for item in items for part in item))
