"""Merge an adapter into the weights of its base model, for tools that take no adapters."""

import os
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from ..files import atomic_folder
from ..load import load_pipeline
from .lora import PREFIX, adapter_metadata, component_for, load_lora_state


def merge_adapter(
    model: str,
    adapter: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Path:
    """
    Write a pipeline whose transformer has an adapter in its weights: `DiffusionPipeline.from_pretrained(target)`.

    The product of each adapter is rounded once, to the precision of the weights. Merged weights are no longer a
    reference: keep the adapter.

    Args:
        model (`str`): Repository id or path of the base pipeline in diffusers layout, or `"sandbox"`.
        adapter (`str` or `Path`): Folder or file of the adapter, as the trainers write it.
        target (`str` or `Path`): Folder to write; must not exist.
        scale (`float`, defaults to `1.0`): Factor of the adapter's effect.
        dtype (`torch.dtype`, *optional*): Precision of the merged pipeline; by default that of the base's files.

    Returns:
        `Path`: The folder.

    Raises:
        ValueError: If the target exists, or the adapter is none, or of another model.
        OSError: If the model cannot be loaded, or the folder cannot be written.
    """
    folder = Path(target)
    if folder.exists():
        raise ValueError(f"{folder} exists already. Name a new folder for the merged model.")
    load_lora_state(adapter)  # refuses what is no adapter, before the base is loaded
    pipeline = load_pipeline(model, **({} if dtype is None else {"dtype": dtype}))
    merge_into(pipeline, adapter, scale=scale)
    with atomic_folder(folder) as partial:
        pipeline.save_pretrained(partial)
    return folder


def merge_into(pipeline: DiffusionPipeline, adapter: str | os.PathLike[str], *, scale: float = 1.0) -> None:
    """
    Merge an adapter into a transformer of a pipeline, in place.

    Args:
        pipeline (`DiffusionPipeline`): The base.
        adapter (`str` or `Path`): As for `merge_adapter`.
        scale (`float`, defaults to `1.0`): Factor of the adapter's effect.

    Raises:
        ValueError: If the adapter has no layer of the transformer, or is for another one of several; or if a merged
            weight is not finite.
    """
    several = pipeline.components.get("transformer_2") is not None
    experts = {"high_noise": "transformer", "low_noise": "transformer_2"} if several else {}
    transformer = pipeline.components[component_for(adapter, experts, "the base")]
    weights, config = load_lora_state(adapter)
    named = {PREFIX + name: weight for name, weight in weights.items()}
    try:
        transformer.load_lora_adapter(named, adapter_name="merged", metadata=adapter_metadata(config))
        transformer.fuse_lora(lora_scale=scale, safe_fusing=True, adapter_names=["merged"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise ValueError(
            f"{adapter} does not fit the {type(transformer).__name__} of the base: "
            f"{' '.join(str(error).split())[:500]}"
        ) from error
    transformer.unload_lora()
