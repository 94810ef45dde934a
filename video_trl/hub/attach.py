"""Put a published adapter on a pipeline, where it belongs and as strongly as it was trained."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft import set_peft_model_state_dict
from torch import nn

from ..models import experts_of, pipeline_index
from .lora import LORA_FILE_NAME, PREFIX, adapter_metadata, expert_of
from .published import Alpha, read_adapter


def find_adapter(
    adapter: str | os.PathLike[str] | None, alpha: Alpha | None = None, scale: float = 1.0
) -> Path | None:
    """
    The file of an adapter, which is fetched and read as a whole: so that it fails before a model is loaded.

    Args:
        adapter (`str` or `Path`, *optional*): Repository id, or folder with `pytorch_lora_weights.safetensors`, or a
            file.
        alpha (`float` or `"rank"`, *optional*): As in [`~video_trl.hub.read_adapter`].
        scale (`float`, defaults to `1.0`): As there.

    Raises:
        ValueError: If it is not there, or as in `read_adapter`; or if there is none for `alpha` or `scale` to change.
    """
    if not adapter:
        if alpha is not None or scale != 1:
            raise ValueError(
                "`adapter_alpha` and `adapter_scale` say how an adapter acts: pass `adapter`, or neither."
            )
        return None
    path = Path(adapter)
    if path.is_dir():
        path = path / LORA_FILE_NAME
        if not path.is_file():
            raise ValueError(f"No adapter in {adapter!r}: expected the file {LORA_FILE_NAME}.")
    elif not path.is_file():
        try:
            path = Path(hf_hub_download(os.fspath(adapter), LORA_FILE_NAME))
        except (OSError, HfHubHTTPError, HFValidationError) as error:
            raise ValueError(
                f"No folder {adapter!r}, and {LORA_FILE_NAME} of the repository of that id can't be loaded: {error}"
            ) from error
    read_adapter(path, alpha=alpha, scale=scale)
    return path


def load_adapter(
    pipeline: DiffusionPipeline,
    file: Path,
    model: str,
    *,
    alpha: Alpha | None = None,
    scale: float = 1.0,
    expert: str | None = None,
    unrounded: bool = False,
) -> str:
    """
    Add an adapter, in evaluation mode, to the transformer that it is for.

    Args:
        pipeline (`DiffusionPipeline`): The pipeline, without an adapter.
        file (`Path`): What [`find_adapter`] found.
        model (`str`): How messages call the pipeline.
        alpha (`float` or `"rank"`, *optional*): As in [`~video_trl.hub.read_adapter`].
        scale (`float`, defaults to `1.0`): As there.
        expert (`str`, *optional*): Which of the pipeline's several transformers to put it on; by default the one that
            the file names.
        unrounded (`bool`, defaults to `False`): Keep its weights in float32, to train them further, where diffusers
            rounds them to the precision of the transformer.

    Returns:
        `str`: The component of the pipeline that has it now.

    Raises:
        ValueError: If a layer of the file is not there in the model or has another size, or if the pipeline has
            several transformers and the file does not say which one it is for, or another one than `expert`.
    """
    weights, config = read_adapter(file, alpha=alpha, scale=scale)
    component = _component(pipeline, file, model, expert)
    transformer = pipeline.components[component]
    _check_fit(transformer, weights, file, model)
    named = {PREFIX + name: weight for name, weight in weights.items()}
    transformer.load_lora_adapter(named, adapter_name="default", metadata=adapter_metadata(config))
    if unrounded:
        for name, parameter in transformer.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.float()
        set_peft_model_state_dict(transformer, weights, adapter_name="default")
    transformer.eval()  # diffusers adds layers in training mode, with the dropout that a file asks for
    return component


def _component(pipeline: DiffusionPipeline, file: Path, model: str, expert: str | None) -> str:
    experts, name = {each.name: each.component for each in experts_of(pipeline_index(pipeline))}, expert_of(file)
    if None not in (expert, name) and expert != name:
        raise ValueError(f"{file} is for the transformer {name!r}, not for {expert!r}.")
    name = name or expert
    if name is None and len(experts) > 1:
        raise ValueError(
            f"{model!r} has the transformers {sorted(experts)}, and {file} does not say which one it is for. Load it "
            "yourself (`pipeline.load_lora_weights`, with `load_into_transformer_2=True` for the second) and pass the "
            "pipeline in a `VideoGenerator`."
        )
    if name is not None and name not in experts:
        raise ValueError(f"{file} is for the transformer {name!r} of a pipeline with several; {model!r} has one.")
    return "transformer" if name is None else experts[name]


def _check_fit(transformer: nn.Module, weights: Mapping[str, torch.Tensor], file: Path, model: str) -> None:
    """Raise a `ValueError` if a layer of the file is not there in the model: diffusers only logs a warning."""
    modules = dict(transformer.named_modules())
    layers = [name.removesuffix(".lora_A.weight") for name in weights if name.endswith(".lora_A.weight")]
    fitting = []
    for layer in layers:
        size = len(weights[f"{layer}.lora_B.weight"]), weights[f"{layer}.lora_A.weight"].shape[1]
        if _size(modules.get(layer)) == size:
            fitting.append(layer)
    if len(fitting) < max(len(layers), 1):
        many = f"Only {len(fitting)} of the {len(layers)} layers of {file} fit"
        none = f"No weight of {file} fits"
        raise ValueError(f"{many if fitting else none} {model!r}. Pass an adapter of this model.")


def _size(module: nn.Module | None) -> tuple[int, int] | None:
    """What a layer puts out and takes in; weights of few bits are packed into other shapes."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        return module.out_channels, module.in_channels
    return None
