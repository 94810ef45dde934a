"""Load the pipeline and its transformer from the `model` argument, after checks that need no weights."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from peft import PeftModel

from ...load import SANDBOX, load_pipeline
from ...models import ModelFamily, family_for, pipeline_index, supported_pipelines
from ..base_config import VideoConfig
from .quantization import quantization_config


INDEX_NAME = "model_index.json"
_TWO_TRANSFORMERS = (
    "This {} holds two transformers, one for high and one for low noise; training one at all noise levels would harm "
    "it. Use a pipeline with a single transformer, such as Wan2.1."
)


def load_model(
    model: str | os.PathLike[str] | DiffusionPipeline | ModelMixin, args: VideoConfig
) -> tuple[DiffusionPipeline | None, ModelMixin]:
    """
    Resolve the `model` argument of a trainer.

    Args:
        model (`str`, `DiffusionPipeline` or `ModelMixin`): `"sandbox"`, a repository id or a path of a pipeline in
            diffusers layout, a pipeline, or a bare transformer.
        args (`VideoConfig`): Source of `model_init_kwargs` and of the precision that a named model is loaded in.

    Returns:
        `tuple[DiffusionPipeline | None, ModelMixin]`: The pipeline (none for a bare transformer) and its transformer.

    Raises:
        ValueError: If there is no such repository or folder, it is not in diffusers layout, lacks a component, holds a
            pipeline that is not supported, or if `model` is of another type.
    """
    if isinstance(model, str | os.PathLike):
        model = _load_pipeline(os.fspath(model), args)
    elif args.model_init_kwargs:
        raise ValueError(
            "`model_init_kwargs` is used when the model is named by a string, but it was passed as a "
            f"{type(model).__name__}. Pass the arguments to `from_pretrained` yourself."
        )
    elif args.quantization is not None:
        raise ValueError(
            f"`quantization={args.quantization!r}` is applied while a pipeline is loaded, but the model was passed as "
            f"a {type(model).__name__}. Name it by a string; or quantise it when you load it, with diffusers' "
            "`quantization_config`, and leave the option unset."
        )
    if isinstance(model, PeftModel):
        raise ValueError(
            "`model` is a `PeftModel`, whose adapter file diffusers pipelines do not load. Pass the bare transformer "
            "or pipeline, and the adapter's configuration as `peft_config`."
        )
    if isinstance(model, DiffusionPipeline):
        if "transformer" not in model.components:
            raise ValueError(f"Expected a pipeline with a `transformer`, got {type(model).__name__}, which has none.")
        if model.components.get("transformer_2") is not None or model.config.get("boundary_ratio") is not None:
            raise ValueError(_TWO_TRANSFORMERS.format(type(model).__name__))
        return model, model.transformer
    if isinstance(model, ModelMixin):
        return None, model
    raise ValueError(
        "`model` must be 'sandbox', a repository id, a path, a diffusers pipeline or a diffusers transformer, got "
        f"{type(model).__name__}."
    )


def find_family(pipeline: DiffusionPipeline | None, transformer: ModelMixin) -> ModelFamily:
    """
    Adapter of a transformer, with the noise schedule of its pipeline.

    Raises:
        ValueError: If the family is not supported; if there is no pipeline and the transformer alone does not say how
            it was trained (CogVideoX); or if the pipeline does not use the transformer as it is trained.
    """
    if pipeline is None:
        return family_for(transformer)
    index = pipeline_index(pipeline)
    family = family_for(transformer, pipeline.scheduler, index)
    if index["_class_name"] not in family.pipeline_classes:
        raise ValueError(
            f"This transformer is trained for {' or '.join(family.pipeline_classes)}, got it in a "
            f"{type(pipeline).__name__}, which conditions it otherwise. Load the checkpoint with that class, or use "
            f"another checkpoint; supported pipelines: {', '.join(supported_pipelines())}."
        )
    return family


def _load_pipeline(name: str, args: VideoConfig) -> DiffusionPipeline:
    if name == SANDBOX:
        if args.model_init_kwargs:
            raise ValueError("`model_init_kwargs` has no use with `model='sandbox'`, which is part of the package.")
        if args.quantization is not None:
            raise ValueError(f"`quantization={args.quantization!r}` has no use with `model='sandbox'`, which is tiny.")
        return load_pipeline(name)
    assert not isinstance(args.model_init_kwargs, str), "TrainingArguments parses JSON strings"
    kwargs: dict[str, Any] = dict(args.model_init_kwargs or {})
    _check_index(name, _read_index(name, kwargs), local=Path(name).is_dir())
    # Frozen weights may be bfloat16; trained ones, and the VAE, whose decoder is sensitive, are float32.
    frozen = torch.bfloat16 if args.bf16 else torch.float32
    dtypes = {
        "transformer": frozen if args.use_peft else torch.float32,
        "text_encoder": frozen,
        "default": torch.float32,
    }
    options: dict[str, Any] = {"dtype": dtypes}
    if args.quantization is not None:
        options["quantization_config"] = quantization_config(args.quantization, frozen)
    try:
        return DiffusionPipeline.from_pretrained(name, **(options | kwargs))
    except OSError as error:
        raise ValueError(f"Could not load the pipeline {name!r}: {error}") from error


def _read_index(name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The pipeline's table of components; a few hundred bytes, read before gigabytes of weights are."""
    if Path(name).is_dir():
        index = Path(name) / INDEX_NAME
        if not index.is_file():
            raise ValueError(
                f"Expected a pipeline in diffusers layout in {name!r}, got a folder without {INDEX_NAME} (it "
                f"holds {sorted(os.listdir(name))[:10]}). Save one with `pipeline.save_pretrained`, or pass the "
                "folder above."
            )
    else:
        index = Path(_download_index(name, kwargs))
    try:
        return json.loads(index.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{index} is not valid JSON ({error}). Fetch or save the pipeline again.") from error


def _download_index(name: str, kwargs: dict[str, Any]) -> str:
    hub_options = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in kwargs}
    try:
        return hf_hub_download(name, INDEX_NAME, **hub_options)
    except HFValidationError as error:
        raise ValueError(f"No folder {name!r}, and it is not a valid repository id ('owner/name') either.") from error
    except GatedRepoError as error:
        raise ValueError(
            f"The repository {name!r} is gated: accept its terms on the Hub and log in with `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"No folder {name!r} and no repository of that id on the Hub. Check the spelling; a private repository "
            "needs `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(f"The repository {name!r} has no revision {kwargs.get('revision')!r}.") from error
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"No folder {name!r}, and the repository of that id is not in the local cache while the Hub cannot be "
            "reached (offline mode, or no connection). Check the spelling, download it with "
            f"`hf download {name}` where there is a connection, or use model='sandbox', which needs none."
        ) from error
    except EntryNotFoundError as error:
        raise ValueError(
            f"The repository {name!r} has no {INDEX_NAME}: it is not in diffusers layout. Look for its variant with "
            "'-Diffusers' in the name."
        ) from error
    except HfHubHTTPError as error:
        raise ValueError(f"The Hub refused {name!r}: {error}") from error


def _check_index(name: str, index: dict[str, Any], *, local: bool) -> None:
    supported = supported_pipelines()
    if index.get("_class_name") not in supported:
        raise ValueError(f"{name!r} holds a {index.get('_class_name')}; supported pipelines: {', '.join(supported)}.")
    if index.get("transformer_2", [None, None]) != [None, None]:
        raise ValueError(f"{name!r}: {_TWO_TRANSFORMERS.format(index['_class_name'])}")
    components = [
        key for key, entry in index.items() if isinstance(entry, list) and len(entry) == 2 and None not in entry
    ]
    missing = [component for component in components if local and not (Path(name) / component).is_dir()]
    if missing:
        raise ValueError(
            f"The pipeline in {name!r} lacks the subfolder(s) {missing} that its {INDEX_NAME} lists. Copy or download "
            "it again, completely."
        )
