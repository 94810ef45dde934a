"""Load the pipeline and its transformer from the `model` argument, after checks that need no weights."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
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

from ...hub.attach import find_adapter, load_adapter
from ...load import DTYPE_OPTION, SANDBOX, load_pipeline, refuse_file
from ...models import Expert, ModelFamily, experts_of, family_for, pipeline_index, supported_pipelines
from ..base_config import VideoConfig
from .quantization import quantization_config
from .single_file import load_transformer_file


INDEX_NAME = "model_index.json"
# Components that make the embeddings of prompts, large and frozen; one works on what another has made.
_OF_PROMPTS = ("text_encoder", "text_encoder_2", "connectors")


def load_model(
    model: str | os.PathLike[str] | DiffusionPipeline | ModelMixin, args: VideoConfig
) -> tuple[DiffusionPipeline | None, ModelMixin, Expert | None]:
    """
    Resolve the `model` argument of a trainer.

    Args:
        model (`str`, `DiffusionPipeline` or `ModelMixin`): `"sandbox"`, a repository id or a path of a pipeline in
            diffusers layout, a pipeline, or a bare transformer.
        args (`VideoConfig`): Source of `model_init_kwargs` and of the precision that a named model is loaded in.

    Returns:
        `tuple[DiffusionPipeline | None, ModelMixin, Expert | None]`: The pipeline (none for a bare transformer), the
        transformer that is trained, and which of several that is. Of a named pipeline the others are not loaded.

    Raises:
        ValueError: If a pipeline of several transformers is not told which one to train; if there is no such
            repository or folder, it is not in diffusers layout, lacks a component, holds a pipeline that is not
            supported, or if `model` is of another type.
    """
    if isinstance(model, str | os.PathLike):
        file = None if args.init_adapter is None else _find_adapter(args.init_adapter)
        name, model = os.fspath(model), _load_pipeline(os.fspath(model), args)
        if file is not None:
            expert = choose_expert(pipeline_index(model), args.expert, name)
            _check_file_name("init_adapter", args.init_adapter, pipeline_index(model), expert)
            load_adapter(model, file, name, expert=None if expert is None else expert.name, unrounded=True)
    elif args.init_adapter is not None:
        raise ValueError(
            f"`init_adapter={args.init_adapter!r}` is loaded when the model is named by a string, but it was passed "
            f"as a {type(model).__name__}. Load it yourself: `pipeline.load_lora_weights(...)`."
        )
    elif args.model_init_kwargs:
        raise ValueError(
            "`model_init_kwargs` is used when the model is named by a string, but it was passed as a "
            f"{type(model).__name__}. Pass the arguments to `from_pretrained` yourself."
        )
    elif args.transformer_file is not None:
        raise ValueError(
            f"`transformer_file={args.transformer_file!r}` takes the place of weights while a pipeline is loaded, but "
            f"the model was passed as a {type(model).__name__}. Name it by a string, or leave the option unset."
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
        return model, *_choose_transformer(model, args)
    if isinstance(model, ModelMixin):
        if args.expert is not None:
            raise ValueError(
                f"`expert={args.expert!r}` needs a pipeline, which says what timesteps its transformers are for; "
                "`model` is a bare transformer. Set `timestep_range` instead."
            )
        return None, model, None
    raise ValueError(
        "`model` must be 'sandbox', a repository id, a path, a diffusers pipeline or a diffusers transformer, got "
        f"{type(model).__name__}."
    )


def _find_adapter(path: str) -> Path:
    """The file of the adapter that training starts from, read as a whole before a model is loaded."""
    try:
        file = find_adapter(path)
    except ValueError as error:
        raise ValueError(
            f"`init_adapter={path!r}` cannot be loaded: {error} Bring a file of another tool here first: `video-trl "
            "export FILE FOLDER --to diffusers`, with `--adapter_alpha` where it does not say its alpha."
        ) from error
    assert file is not None
    return file


def _check_file_name(option: str, file: str | None, index: Mapping[str, Any], expert: Expert | None) -> None:
    """Raise a `ValueError` if a file is called after another transformer of the pipeline than the trained one."""
    letters = re.sub("[^a-z]", "", Path(file or "").name.lower())
    called = [each for each in experts_of(index) if each.name.replace("_", "") in letters]
    if expert is not None and len(called) == 1 and called[0] != expert:
        raise ValueError(
            f"`{option}={file!r}` is called after the transformer {called[0].name!r}, and the run trains "
            f"{expert.name!r}: their weights have the same names and shapes. Set `expert`, or give the other file."
        )


def _choose_transformer(pipeline: DiffusionPipeline, args: VideoConfig) -> tuple[ModelMixin, Expert | None]:
    kind = type(pipeline).__name__
    if not {"transformer", "transformer_2"} & set(pipeline.components):
        raise ValueError(f"Expected a pipeline with a `transformer`, got {kind}, which has none.")
    expert = choose_expert(pipeline_index(pipeline), args.expert, kind)
    component = "transformer" if expert is None else expert.component
    transformer = pipeline.components.get(component)
    if transformer is None or (expert is None and pipeline.components.get("transformer_2") is not None):
        found = sorted(name for name, part in pipeline.components.items() if isinstance(part, ModelMixin))
        raise ValueError(f"Expected the {kind} with `{component}` as its transformer to train, got one with {found}.")
    return transformer, expert


def choose_expert(index: Mapping[str, Any], name: str | None, source: str) -> Expert | None:
    """
    Which of the transformers of a pipeline is trained.

    Args:
        index (`Mapping`): Content of the pipeline's `model_index.json`.
        name (`str`, *optional*): The option `expert`.
        source (`str`): What messages call the pipeline.

    Returns:
        `Expert` or `None`: `None` where there is one transformer.

    Raises:
        ValueError: If there are several and none is named, or one is named that is not there.
    """
    experts = experts_of(index)
    if not experts and name is not None:
        raise ValueError(
            f"`expert={name!r}` chooses one of several transformers, and {source} has one. Leave it unset."
        )
    chosen = [expert for expert in experts if expert.name == name]
    if experts and not chosen:
        raise ValueError(
            f"{source} has a transformer for each part of the noise: {' and '.join(map(str, experts))}. A run trains "
            f"one of them, within its timesteps; trained at all, it would be harmed. Set `expert`, got {name!r}. "
            "`video-trl train ... --expert both` does one run after the other."
        )
    return chosen[0] if chosen else None


def check_can_generate(pipeline: DiffusionPipeline | None, what: str, *, needed: bool = True) -> None:
    """
    Raise a `ValueError` that says what wants to generate, if that is needed and there is no pipeline, or one of its
    transformers is not loaded.
    """
    if not needed:
        return
    if pipeline is None:
        raise ValueError(
            f"{what} generates with the trainer's pipeline, but the trainer was given a bare transformer. Pass the "
            "pipeline as `model`."
        )
    lacking = [each for each in experts_of(pipeline_index(pipeline)) if pipeline.components[each.component] is None]
    if lacking:
        raise ValueError(
            f"{what} generates with the trainer's pipeline, which was loaded without {lacking[0]}. Load the whole "
            "pipeline and pass it as `model`, which takes the memory of both, or generate after the run."
        )


def resolve_timestep_range(args: VideoConfig, expert: Expert | None) -> list[float] | None:
    """
    Timesteps to train at: `timestep_range`, within those of the expert; `None` for all.

    Raises:
        ValueError: If the two have nothing in common.
    """
    if expert is None:
        return args.timestep_range
    low, high = args.timestep_range or (expert.low, expert.high)
    low, high = max(low, expert.low), min(high, expert.high)
    if not low < high:
        raise ValueError(f"`timestep_range={args.timestep_range}` leaves nothing of the expert {expert}. Change one.")
    return [low, high]


def find_family(
    pipeline: DiffusionPipeline | None, transformer: ModelMixin, guidance: float | None = None
) -> ModelFamily:
    """
    Family of a transformer, with the noise schedule of its pipeline, and the guidance scale that it is to be told.

    Raises:
        ValueError: If the family is not supported; if there is no pipeline and the transformer alone does not say how
            it was trained (CogVideoX); or if the pipeline does not use the transformer as it is trained.
    """
    index = None if pipeline is None else pipeline_index(pipeline)
    family = family_for(transformer, None if pipeline is None else pipeline.scheduler, index)
    if guidance is not None:
        if family.guidance is None:
            raise ValueError(
                f"`embedded_guidance={guidance}` is for transformers that are told one; {family.name!r} is not."
            )
        family = family.with_guidance(guidance)
    if index is not None and index["_class_name"] not in family.pipeline_classes:
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
        for option in ("quantization", "transformer_file"):
            value = args.__dict__[option]
            if value is not None:
                raise ValueError(f"`{option}={value!r}` has no use with `model='sandbox'`, which is tiny and whole.")
        return load_pipeline(name)
    assert not isinstance(args.model_init_kwargs, str), "TrainingArguments parses JSON strings"
    kwargs: dict[str, Any] = dict(args.model_init_kwargs or {})
    refuse_file(name)
    index = _read_index(name, kwargs)
    expert = _check_index(name, index, args.expert, local=Path(name).is_dir())
    left_out = [each.component for each in experts_of(index) if each != expert]
    # Frozen weights may be bfloat16; trained ones, and the VAE, whose decoder is sensitive, are float32.
    frozen = torch.bfloat16 if args.bf16 else torch.float32
    component = "transformer" if expert is None else expert.component
    dtypes = {
        component: frozen if args.use_peft else torch.float32,
        **{name: frozen for name in _OF_PROMPTS if name in index},
        "default": torch.float32,
    }
    options: dict[str, Any] = {DTYPE_OPTION: dtypes}
    if args.quantization is not None:
        options["quantization_config"] = quantization_config(args.quantization, frozen, component)
    parts: dict[str, Any] = dict.fromkeys(left_out)
    _check_file_name("transformer_file", args.transformer_file, index, expert)
    if args.transformer_file is not None:
        parts[component] = load_transformer_file(
            args.transformer_file, index[component][1], name, component, dtypes[component], kwargs
        )
    # The base class would load a component all the same that is optional for this one and given as `None`.
    pipeline_class = getattr(diffusers, index["_class_name"])
    try:
        return pipeline_class.from_pretrained(name, **(options | parts | _with_dtypes(kwargs)))
    except OSError as error:
        raise ValueError(f"Could not load the pipeline {name!r}: {error}") from error


def _with_dtypes(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `from_pretrained` with dtypes in place of their names, which diffusers would pass over."""
    for key in ("dtype", "torch_dtype"):
        value = kwargs.get(key)
        if isinstance(value, Mapping):
            kwargs = kwargs | {key: {part: _dtype(key, each) for part, each in value.items()}}
        elif value is not None:
            kwargs = kwargs | {key: _dtype(key, value)}
    given = [kwargs[key] for key in ("dtype", "torch_dtype") if key in kwargs]  # the newer name wins
    others = {key: value for key, value in kwargs.items() if key not in ("dtype", "torch_dtype")}
    return others | ({DTYPE_OPTION: given[0]} if given else {})


def _dtype(key: str, value: Any) -> torch.dtype:
    dtype = torch.__dict__.get(value.removeprefix("torch.")) if isinstance(value, str) else value
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(
            f"`{key}` in `model_init_kwargs` must be a floating dtype such as 'bfloat16', or a mapping of components "
            f"to such, got {value!r}."
        )
    return dtype


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
    elif Path(name).is_file():
        raise ValueError(
            f"Expected a pipeline in diffusers layout (a folder, or a repository id), got the file {name!r}. Weights "
            "of a transformer in one file are `transformer_file`, beside the pipeline that it belongs to."
        )
    else:
        index = Path(_download_index(name, kwargs))
    try:
        return json.loads(index.read_text())
    except (ValueError, RecursionError) as error:
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


def _check_index(name: str, index: dict[str, Any], chosen: str | None, *, local: bool) -> Expert | None:
    supported = supported_pipelines()
    if index.get("_class_name") not in supported:
        raise ValueError(f"{name!r} holds a {index.get('_class_name')}; supported pipelines: {', '.join(supported)}.")
    expert = choose_expert(index, chosen, repr(name))
    left_out = {each.component for each in experts_of(index) if each != expert}
    components = [
        key
        for key, entry in index.items()
        if isinstance(entry, list) and len(entry) == 2 and None not in entry and key not in left_out
    ]
    missing = [component for component in components if local and not (Path(name) / component).is_dir()]
    if missing:
        raise ValueError(
            f"The pipeline in {name!r} lacks the subfolder(s) {missing} that its {INDEX_NAME} lists. Copy or download "
            "it again, completely."
        )
    return expert
