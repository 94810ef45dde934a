"""Put a published adapter on a pipeline, where it belongs and as strongly as it was trained."""

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from torch import nn

from ...hub.lora import LORA_FILE_NAME, PREFIX, adapter_metadata, component_for
from ...hub.published import Alpha, read_adapter
from ...models import experts_of, pipeline_index


def find_adapter(adapter: str | None, alpha: Alpha | None = None, scale: float = 1.0) -> Path | None:
    """
    The file of an adapter, which is fetched and read as a whole: so that it fails before a model is loaded.

    Args:
        adapter (`str`, *optional*): Repository id or folder with `pytorch_lora_weights.safetensors`, or a file.
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
            path = Path(hf_hub_download(adapter, LORA_FILE_NAME))
        except (OSError, HfHubHTTPError, HFValidationError) as error:
            raise ValueError(
                f"No folder {adapter!r}, and {LORA_FILE_NAME} of the repository of that id can't be loaded: {error}"
            ) from error
    read_adapter(path, alpha=alpha, scale=scale)
    return path


def load_adapter(
    pipeline: DiffusionPipeline, file: Path, model: str, *, alpha: Alpha | None = None, scale: float = 1.0
) -> None:
    """
    Add an adapter, in evaluation mode, to the transformer that it is for.

    Args:
        pipeline (`DiffusionPipeline`): The pipeline, without an adapter.
        file (`Path`): What [`find_adapter`] found.
        model (`str`): How messages call the pipeline.
        alpha (`float` or `"rank"`, *optional*): As in [`~video_trl.hub.read_adapter`].
        scale (`float`, defaults to `1.0`): As there.

    Raises:
        ValueError: If a layer of the file is not there in the model or has another size, or if the pipeline has
            several transformers and the file does not say which one it is for.
    """
    weights, config = read_adapter(file, alpha=alpha, scale=scale)
    experts = {expert.name: expert.component for expert in experts_of(pipeline_index(pipeline))}
    transformer = pipeline.components[component_for(file, experts, repr(model))]
    _check_fit(transformer, weights, file, model)
    named = {PREFIX + name: weight for name, weight in weights.items()}
    transformer.load_lora_adapter(named, adapter_name="default", metadata=adapter_metadata(config))
    transformer.eval()  # diffusers adds layers in training mode, with the dropout that a file asks for


def _check_fit(transformer: nn.Module, weights: Mapping[str, torch.Tensor], file: Path, model: str) -> None:
    """Raise a `ValueError` if a layer of the file is not there in the model: diffusers only logs a warning."""
    modules = dict(transformer.named_modules())
    layers = [name.removesuffix(".lora_A.weight") for name in weights if name.endswith(".lora_A.weight")]
    fitting = []
    for layer in layers:
        size = len(weights[f"{layer}.lora_B.weight"]), weights[f"{layer}.lora_A.weight"].shape[1]
        if layer in modules and tuple(modules[layer].weight.shape[:2]) == size:
            fitting.append(layer)
    if len(fitting) < max(len(layers), 1):
        many = f"Only {len(fitting)} of the {len(layers)} layers of {file} fit"
        none = f"No weight of {file} fits"
        raise ValueError(f"{many if fitting else none} {model!r}. Pass an adapter of this model.")
