"""Model card of an adapter and the files that are published with it."""

import dataclasses
import os
import shutil
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from diffusers import ModelMixin
from transformers import TrainingArguments

from .. import hub
from .base_config import _BaseVideoConfig
from .checkpointing import TRANSFORMER_FOLDER


CARD_NAME = "README.md"
_GENERAL_SETTINGS = (
    "learning_rate",
    "lr_scheduler_type",
    "weight_decay",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "bf16",
    "seed",
)


def adapter_card(
    args: _BaseVideoConfig,
    *,
    repo_id: str,
    base_model: str,
    method: tuple[str, str, str | None],
    prompt: str | None,
    pipeline_class: str,
    call_kwargs: Mapping[str, Any],
    fps: float,
    progress: Mapping[str, Any],
    dataset_name: str | None = None,
    license: str | None = None,
) -> str:
    """
    README of an adapter that a trainer made.

    Args:
        args (`_BaseVideoConfig`): Arguments of the run, which become the table of settings.
        repo_id (`str`): Repository or folder of the adapter.
        base_model (`str`): Repository or path of the base model.
        method (`tuple[str, str, str | None]`): Tag, description and BibTeX of the method.
        prompt (`str`, *optional*): Prompt of the example.
        pipeline_class (`str`): Class of the pipeline in diffusers.
        call_kwargs (`Mapping[str, Any]`): Arguments of the pipeline's call in the example.
        fps (`float`): Frames per second of the example's video.
        progress (`Mapping[str, Any]`): More rows of the table of settings.
        dataset_name (`str`, *optional*): What the adapter was trained on.
        license (`str`, *optional*): Licence identifier.

    Returns:
        `str`: Markdown with YAML front matter.
    """
    tag, description, citation = method
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    own = [field.name for field in dataclasses.fields(args) if field.name not in inherited]
    settings = {name: args.__dict__[name] for name in (*_GENERAL_SETTINGS, *own)} | dict(progress)
    return hub.model_card(
        repo_id=repo_id,
        base_model=base_model,
        method=tag,
        method_name=description,
        prompt=prompt or "A red ball falls to the floor.",
        fps=fps,
        pipeline_class=pipeline_class,
        call_kwargs=call_kwargs,
        hyperparameters={
            name: value.value if isinstance(value, Enum) else value
            for name, value in settings.items()
            if value is not None
        },
        dataset=dataset_name,
        citation=citation,
        license=license,
    )


def base_model_name(model: Any, transformer: ModelMixin) -> str:
    """Repository or path that the user named, or that the pipeline or transformer remembers, or its class."""
    if isinstance(model, str | os.PathLike):
        return os.fspath(model)
    name = model.config.get("_name_or_path") or transformer.config.get("_name_or_path") or type(model).__name__
    return str(name)  # a pipeline loaded from a `Path` keeps that, which JSON has no form for


def copy_published_files(checkpoint: Path, output_directory: Path) -> None:
    """Copy weights and model card of a checkpoint to the folder that is uploaded to the Hub."""
    for name in (hub.LORA_FILE_NAME, CARD_NAME):
        if (checkpoint / name).is_file():
            shutil.copy(checkpoint / name, output_directory / name)
    if (checkpoint / TRANSFORMER_FOLDER).is_dir():
        shutil.copytree(checkpoint / TRANSFORMER_FOLDER, output_directory / TRANSFORMER_FOLDER, dirs_exist_ok=True)
