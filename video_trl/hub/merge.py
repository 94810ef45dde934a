"""Merge an adapter into the weights of its base model, for tools that take no adapters."""

import os
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from ..files import atomic_folder
from ..load import load_pipeline
from .attach import find_adapter, load_adapter
from .published import Alpha


def merge_adapter(
    model: str,
    adapter: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    alpha: Alpha | None = None,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Path:
    """
    Write a pipeline whose transformer has an adapter in its weights: `DiffusionPipeline.from_pretrained(target)`.

    The product of each adapter is rounded once, to the precision of the weights. Merged weights are no longer a
    reference: keep the adapter.

    Args:
        model (`str`): Repository id or path of the base pipeline in diffusers layout, or `"sandbox"`.
        adapter (`str` or `Path`): Folder or file of the adapter, in any layout that [`~video_trl.hub.read_adapter`]
            knows.
        target (`str` or `Path`): Folder to write; must not exist.
        alpha (`float` or `"rank"`, *optional*): What the adapter was trained with, for files that do not say it.
        scale (`float`, defaults to `1.0`): Factor of the adapter's effect.
        dtype (`torch.dtype`, *optional*): Precision of the merged pipeline; by default float32, but for encoders of
            transformers, which keep that of their files.

    Returns:
        `Path`: The folder.

    Raises:
        ValueError: If the target exists, or the adapter is none, or does not fit the model as a whole.
        OSError: If the model cannot be loaded, or the folder cannot be written.
    """
    folder = Path(target)
    if folder.exists():
        raise ValueError(f"{folder} exists already. Name a new folder for the merged model.")
    file = find_adapter(adapter, alpha, scale)  # refuses what is no adapter, before the base is loaded
    assert file is not None
    pipeline = load_pipeline(model, **({} if dtype is None else {"dtype": dtype}))
    merge_into(pipeline, file, model, alpha=alpha, scale=scale)
    with atomic_folder(folder) as partial:
        pipeline.save_pretrained(partial)
    return folder


def merge_into(
    pipeline: DiffusionPipeline, file: Path, model: str, *, alpha: Alpha | None = None, scale: float = 1.0
) -> None:
    """
    Merge an adapter into a transformer of a pipeline, in place.

    Args:
        pipeline (`DiffusionPipeline`): The base.
        file (`Path`): The adapter's file.
        model (`str`): How messages call the pipeline.
        alpha (`float` or `"rank"`, *optional*): As for `merge_adapter`.
        scale (`float`, defaults to `1.0`): Factor of the adapter's effect.

    Raises:
        ValueError: If a layer of the adapter is not in the transformer, or a merged weight is not finite.
    """
    component = load_adapter(pipeline, file, model, alpha=alpha, scale=scale, unrounded=True)
    transformer = pipeline.components[component]  # some pipelines have no methods for adapters
    transformer.fuse_lora(safe_fusing=True, adapter_names=["default"])
    transformer.unload_lora()
