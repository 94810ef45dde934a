"""Describe a run before it starts: configuration, rows, tokens, memory and steps. No weights are loaded."""

import importlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..load import pipeline_source
from .methods import DataArguments, training_rows
from .parser import required


if TYPE_CHECKING:
    import torch
    from diffusers import ModelMixin

    from ..data.columns import MapDataset

_GIB = 2**30
Shape = tuple[int, int, int, int]
"""Of the latents of a video: `(C, F, H, W)`."""


def describe(
    trainer_class: type[Any], data: DataArguments, args: Any, *, processes: int = 1, engine: Any = "ddp"
) -> str:
    """Configuration, rows, tokens, parameters and steps of `video-trl train` on so many processes of an engine."""
    dataset = _named_dataset(data)
    rows, row = training_rows(trainer_class, data, dataset)
    if rows is not None:
        rows -= data.eval_rows
    revision = (args.model_init_kwargs or {}).get("revision")
    check_expert(data.model_name_or_path, revision, args.expert)
    family, transformer, vae = empty_models(data.model_name_or_path, revision)
    _check_encoded(dataset, trainer_class, args, family, transformer)
    shapes = _shapes(family, vae, row, args)
    facts = {
        "rows": _rows(rows, data.eval_rows),
        "tokens of a video": "; ".join(_tokens(family, transformer, shapes)),
        **_cost(
            trainer_class,
            family,
            transformer,
            max(shapes.values(), key=math.prod),
            _rejected(row, data),
            args,
            processes,
            engine,
        ),
        "steps": _steps(rows, args, processes),
    }
    lines = [f"{key + ':':24}{value}" for key, value in facts.items()]
    return "\n".join(["# configuration, where it is not the default", _configuration(data, args), *lines])


def _named_dataset(data: DataArguments) -> "MapDataset | None":
    if data.dataset_name is None:
        return None
    from ..data.tables import load_rows

    return load_rows(data.dataset_name, data.dataset_split, data.column)


def _check_encoded(
    dataset: "MapDataset | None", trainer_class: type[Any], args: Any, family: Any, transformer: "ModelMixin"
) -> None:
    """Every row of an encoded dataset, as the trainer checks it."""
    from ..data.columns import is_encoded
    from ..trainer.setup.encoded_rows import check_encoded_rows
    from ..trainer.setup.rows import encoded_cache_dir

    if dataset is not None and is_encoded(dataset, trainer_class.row_type):
        length = family.prompt_length(transformer) or args.max_sequence_length or family.published_prompt_tokens
        where = Path(encoded_cache_dir(args))
        check_encoded_rows(
            dataset, trainer_class.row_type, transformer, family, max_sequence_length=length, cache_dir=where
        )


def _rows(rows: int | None, held_out: int) -> str:
    if rows is None:
        return "--dataset_name says how many"
    return f"{rows}" + (f", and {held_out} held out" if held_out else "")


def _configuration(data: DataArguments, args: Any) -> str:
    """YAML that gives the same run through `--config`, without tokens, which `to_dict` masks."""
    changes: dict[str, Any] = {}
    for values, usual in ((asdict(data), asdict(DataArguments())), (args.to_dict(), type(args)().to_dict())):
        changed = {name: value for name, value in values.items() if value != usual[name]}
        changes |= {name: value for name, value in changed.items() if name != "dry_run"}
    return yaml.safe_dump(changes, sort_keys=False)


def check_expert(name: str, revision: str | None, expert: str | None) -> None:
    """Raise a `ValueError` unless an expert is chosen where a pipeline has several transformers, and only there."""
    from ..trainer.setup.models import choose_expert

    known = _known(name, revision)
    kwargs: dict[str, Any] = {} if revision is None else {"revision": revision}
    index = known.get("index", {}) if known is not None else _index(pipeline_source(name), kwargs)
    choose_expert(index, expert, repr(name))


def empty_models(name: str, revision: str | None) -> tuple[Any, "ModelMixin", "ModelMixin"]:
    """
    Family, transformer and VAE of a pipeline, the networks without memory (on the device `meta`).

    Of a checkpoint whose configurations ship with the package nothing is asked of the Hub.
    """
    import torch
    from diffusers import AutoModel

    from ..models import family_for

    known = _known(name, revision)
    if known is not None:
        scheduler = _diffusers_class(known["scheduler"]).from_config(known["scheduler"])
        with torch.device("meta"):
            transformer, vae = (
                _diffusers_class(known[part]).from_config(known[part]) for part in ("transformer", "vae")
            )
        return family_for(transformer, scheduler, known.get("index")), transformer, vae
    kwargs: dict[str, Any] = {} if revision is None else {"revision": revision}
    name = pipeline_source(name)
    # Not through the pipeline: it would load the weights of the parts that are optional for some of its checkpoints.
    index = _index(name, kwargs)
    scheduler_class = _diffusers_class({"_class_name": index["scheduler"][1]})
    scheduler = scheduler_class.from_pretrained(name, subfolder="scheduler", **kwargs)
    with torch.device("meta"):
        transformer, vae = (AutoModel.from_config(name, subfolder=part, **kwargs) for part in ("transformer", "vae"))
    return family_for(transformer, scheduler, index), transformer, vae


def empty_encoders(name: str, revision: str | None, components: Iterable[str]) -> "dict[str, torch.nn.Module]":
    """Encoders of a pipeline, by the names of its components, without memory."""
    import torch

    known, kwargs = _known(name, revision), {} if revision is None else {"revision": revision}
    name = pipeline_source(name)
    index = {} if known is not None else _index(name, kwargs)
    encoders: dict[str, torch.nn.Module] = {}
    for component in components:
        config = None if known is None else known[component]
        library, kind = index[component] if config is None else (config.get("_library"), config["_class_name"])
        encoder: Any = getattr(_library(library), kind)
        if library not in (None, "transformers"):  # one of diffusers
            config = config or encoder.load_config(name, subfolder=component, **kwargs)
            with torch.device("meta"):
                encoders[component] = encoder.from_config(config)
            continue
        config_class = encoder.config_class
        made = config_class(**config) if config else config_class.from_pretrained(name, subfolder=component, **kwargs)
        with torch.device("meta"):
            encoders[component] = encoder(made)
    return encoders


def _library(name: str | None) -> Any:
    """The module of a name in a `model_index.json`: a package, or the folder of a pipeline in diffusers."""
    if name in (None, "transformers", "diffusers"):
        return importlib.import_module(name or "transformers")
    return importlib.import_module(f"diffusers.pipelines.{name}")


def _known(name: str, revision: str | None) -> Any:
    """Configurations that ship with the package, unless a folder of that name or a revision is meant."""
    from ..models.checkpoints import known_checkpoint

    return None if revision is not None or Path(name).is_dir() else known_checkpoint(name)


def _diffusers_class(config: Mapping[str, Any]) -> Any:
    import diffusers

    return getattr(diffusers, config["_class_name"])


def _index(name: str, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """
    The table of parts of a pipeline.

    Raises:
        ValueError: If there is no such pipeline, or no connection to the Hub.
    """
    from diffusers import DiffusionPipeline

    from ..load import refuse_file
    from ..models.checkpoints import known_checkpoints

    refuse_file(name)
    try:
        return DiffusionPipeline.load_config(name, **kwargs)
    except OSError as error:
        raise ValueError(
            f"{name!r}: no folder of a pipeline in diffusers layout, and no repository that can be read "
            f"({str(error).strip().splitlines()[0]}). Without a connection these are known: "
            f"{', '.join(known_checkpoints())}."
        ) from error


def latents_shape(family: Any, vae: "ModelMixin", size: tuple[int, int, int]) -> Shape:
    """
    Shape `(C, F, H, W)` of the latents of a video of so many frames, height and width.

    Raises:
        ValueError: If the VAE does not take that size.
    """
    import torch

    family.check_video(vae, size)
    frames, *sides = size
    # Of an image: a video goes through most VAEs in parts, each of which takes as long.
    channels, _, height, width = family.encode_video(vae, torch.empty(1, 3, 1, *sides, device="meta")).shape[1:]
    return channels, (frames - 1) // family.compression(vae)[0] + 1, height, width


def reference_pass(trainer_class: type[Any], args: Any) -> Any:
    """What computes the reference's errors in a run without a `ref_model`, as a `Workload` has it."""
    return "none" if not trainer_class.has_reference(args) else "adapter" if args.use_peft else "copy"


def _shapes(family: Any, vae: "ModelMixin", row: Mapping[str, Any], args: Any) -> dict[str, Shape]:
    """
    For every size of training, the shape of the latents. The VAE encodes a video without memory.

    Raises:
        UsageError: If there is neither a row nor an option that says how large videos are.
    """
    from ..data.columns import as_tensor
    from ..data.video_io import video_shape

    latents = next((row[key] for key in ("latents", "chosen_latents") if key in row), None)
    if latents is not None:
        channels, frames, height, width = as_tensor(latents).shape
        return {"encoded": (channels, frames, height, width)}
    shapes: dict[str, Shape] = {}
    video = next((row[key] for key in ("video", "chosen") if key in row), None)
    sizes = [(bucket.height, bucket.width) for bucket in args.buckets()] or [(args.height, args.width)]
    for height, width in sizes:
        if video is None:
            size = (required("num_frames", args.num_frames, "81"), required("height", height, "480"), width)
        else:
            options = {"num_frames": args.num_frames, "fps": args.fps, "height": height, "width": width}
            size = video_shape(video, **options)
        shapes[" x ".join(map(str, size))] = latents_shape(family, vae, size)
    return shapes


def _tokens(family: Any, transformer: Any, shapes: Mapping[str, Shape]) -> list[str]:
    grids = {size: family.token_grid(transformer, shape) for size, shape in shapes.items()}
    return [
        f"{math.prod(grid)} ({size}, latents {shapes[size]}, grid {grid[0]} x {grid[1]} x {grid[2]})"
        for size, grid in grids.items()
    ]


def _rejected(row: Mapping[str, Any], data: DataArguments) -> int:
    """Rejected videos of a row."""
    from ..data.columns import as_videos

    if not row:
        return data.num_rejected
    return len(row["rejected_latents"] if "rejected_latents" in row else as_videos(row.get("rejected", [])))


def _cost(
    trainer_class: type[Any],
    family: Any,
    transformer: Any,
    shape: Shape,
    rejected: int,
    args: Any,
    processes: int,
    engine: Any,
) -> dict[str, str]:
    """Parameters, and memory by part."""
    from ..trainer.planning.estimate import Placement, Workload, accelerator_memory, estimate, fitting_step_mode

    num_videos = trainer_class.videos_per_row(args, rejected) // vars(args).get("group_parallel_size", 1)
    workload = Workload.of(transformer, shape, num_videos, args, reference_pass(trainer_class, args))
    policy = args.checkpointing_policy if args.gradient_checkpointing else None
    shared = 1 if processes % args.context_parallel_size else args.context_parallel_size
    placement = Placement(processes, engine, shared, "concat", policy, offload_weights=args.offload_weights)
    mode = vars(args).get("step_mode", "concat")  # methods that do not compare videos have none
    if mode == "auto":
        tokens = math.prod(family.token_grid(transformer, shape))
        mode = fitting_step_mode(workload, placement, accelerator_memory(args.device), tokens)
    cost = estimate(workload, replace(placement, step_mode=mode))
    parameters = sum(parameter.numel() for parameter in transformer.parameters())
    parts = ", ".join(f"{part} {count / _GIB:.3g}" for part, count in cost.parts.items())
    return {
        "parameters": f"{parameters + cost.trained * args.use_peft:,}, of which trained {cost.trained:,}",
        "memory of a step": f"{cost.peak / _GIB:.2f} GiB with step_mode={mode}: {parts}",
    }


def _steps(rows: int | None, args: Any, processes: int) -> str:
    """As transformers.Trainer counts them: an epoch ends with a smaller step where batches do not divide it."""
    each = args.per_device_train_batch_size * max(processes // args.processes_per_row, 1)
    launched = f"{processes} process{'' if processes == 1 else 'es'}"
    batch = each * args.gradient_accumulation_steps
    rows_of_step = f"{batch} row{'' if batch == 1 else 's'}"
    if rows is None:
        total = args.max_steps if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
        return f"{total} of {rows_of_step} ({launched})"
    epoch = math.ceil(math.ceil(rows / each) / args.gradient_accumulation_steps)
    total = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * epoch)
    return f"{total} of {rows_of_step}, {total / epoch:.2f} epochs ({launched})"
