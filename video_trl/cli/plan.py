"""What a training would be, from configurations and the first row alone: no weights are loaded."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import yaml

from .data import DataArguments, classes, training_rows


if TYPE_CHECKING:
    from diffusers import ModelMixin

_GIB = 2**30


def describe(name: str, data: DataArguments, args: Any) -> str:
    """Configuration, rows, tokens, parameters and steps of `video-trl train`."""
    rows, row = training_rows(name, data, args)
    rows -= data.eval_rows
    adapter, transformer, vae = empty_models(data.model_name_or_path, args)
    told = {
        "rows": f"{rows}" + (f", and {data.eval_rows} held out" if data.eval_rows else ""),
        "tokens of a video": "; ".join(_tokens(adapter, transformer, vae, row, args)),
        **_weights(transformer, args, uses_reference=classes(name)[0].uses_reference),
        "steps": _steps(rows, args),
    }
    lines = [f"{key + ':':24}{value}" for key, value in told.items()]
    return "\n".join(["# configuration, where it is not the default", _configuration(data, args), *lines])


def _configuration(data: DataArguments, args: Any) -> str:
    """YAML that gives the same run through `--config`, without tokens, which `to_dict` masks."""
    shown: dict[str, Any] = {}
    for values, usual in ((asdict(data), asdict(DataArguments())), (args.to_dict(), type(args)().to_dict())):
        changed = {name: value for name, value in values.items() if value != usual[name]}
        shown |= {name: value for name, value in changed.items() if name != "dry_run"}
    return yaml.safe_dump(shown, sort_keys=False)


def empty_models(name: str, args: Any) -> tuple[Any, "ModelMixin", "ModelMixin"]:
    """Adapter, transformer and VAE of a pipeline, the networks without memory (on the device `meta`)."""
    import torch
    from diffusers import AutoModel, DiffusionPipeline
    from peft import LoraConfig

    from ..adapters import adapter_for

    kwargs: dict[str, Any] = {key: value for key, value in (args.model_init_kwargs or {}).items() if key == "revision"}
    if name == "sandbox":
        from ..sandbox.pipeline import PIPELINE_PATH

        name = str(PIPELINE_PATH)
    absent = dict.fromkeys(("transformer", "vae", "text_encoder", "tokenizer", "image_encoder", "image_processor"))
    index = DiffusionPipeline.load_config(name, **kwargs)
    given = {key: None for key in absent if key in index}
    scheduler = DiffusionPipeline.from_pretrained(name, **kwargs, **given).scheduler
    with torch.device("meta"):
        transformer, vae = (AutoModel.from_config(name, subfolder=part, **kwargs) for part in ("transformer", "vae"))
        adapter = adapter_for(transformer, scheduler)
        if args.use_peft:
            transformer.requires_grad_(False)
            transformer.add_adapter(
                LoraConfig(r=args.lora_rank, lora_alpha=args.lora_alpha, target_modules=adapter.lora_target_modules)
            )
    return adapter, transformer, vae


def _tokens(adapter: Any, transformer: Any, vae: Any, row: Mapping[str, Any], args: Any) -> list[str]:
    """For every size of training: pixels, latents, tokens. The VAE encodes a video without memory."""
    import torch

    from ..data.columns import as_tensor
    from ..data.video_io import read_video

    shapes: dict[str, tuple[int, ...]] = {}
    latents = next((row[key] for key in ("latents", "chosen_latents") if key in row), None)
    if latents is not None:
        shapes["encoded"] = tuple(as_tensor(latents).shape)
    else:
        video = next(row[key] for key in ("video", "chosen") if key in row)
        sizes = [(bucket.height, bucket.width) for bucket in args.buckets()] or [(args.height, args.width)]
        for height, width in sizes:
            frames = read_video(video, num_frames=args.num_frames, fps=args.fps, height=height, width=width)
            adapter.check_video(vae, frames.shape[:3])
            pixels = torch.empty(1, 3, *frames.shape[:3], device="meta")
            shown = " x ".join(map(str, frames.shape[:3]))
            shapes[shown] = tuple(adapter.encode_video(vae, pixels).shape[1:])
    grids = {shown: adapter.token_grid(transformer, shape) for shown, shape in shapes.items()}
    return [
        f"{math.prod(grid)} ({shown}, latents {tuple(shapes[shown])}, grid {grid[0]} x {grid[1]} x {grid[2]})"
        for shown, grid in grids.items()
    ]


def _weights(transformer: Any, args: Any, *, uses_reference: bool) -> dict[str, str]:
    parameters = list(transformer.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    frozen = sum(parameter.numel() for parameter in parameters) - trained
    of_frozen = 2 if args.bf16 else 4
    # What is trained stands in float32 with a gradient and two moments of AdamW; all weights need a copied reference.
    held = frozen * of_frozen + trained * 16 + (trained * 4 if uses_reference and not args.use_peft else 0)
    return {
        "parameters": f"{frozen + trained:,}, of which trained {trained:,}",
        "memory without videos": f"{held / _GIB:.2f} GiB: weights, gradients, AdamW; activations come on top",
    }


def _steps(rows: int, args: Any) -> str:
    """As transformers.Trainer counts them: an epoch ends with a smaller step where batches do not divide it."""
    each = args.per_device_train_batch_size * args.world_size
    epoch = math.ceil(math.ceil(rows / each) / args.gradient_accumulation_steps)
    total = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * epoch)
    batch = each * args.gradient_accumulation_steps
    return f"{total} of {batch} rows, {total / epoch:.2f} epochs ({args.world_size} processes)"
