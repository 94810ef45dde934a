"""Encode the datasets, number their rows, and resolve the settings that depend on the pipeline."""

import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ModelMixin
from huggingface_hub import constants
from torch.utils.data import Dataset

from ...data import encode_dataset, is_encoded
from ...data.columns import MapDataset
from ...data.encoding.store import check_conditions
from ...models import ModelFamily
from ..base_config import VideoConfig
from ..parallel.mesh import check_context_parallelism
from .encoded_rows import check_encoded_rows


class IndexedDataset(Dataset[dict[str, Any]]):
    """
    Rows of a dataset, each with its position as `"index"`, which its noise is derived from.

    Args:
        rows (`MapDataset`): The rows.
        shapes (`Sequence[tuple[int, ...]]`): Shape `(C, F, H, W)` of the latents in each row.
    """

    def __init__(self, rows: MapDataset, shapes: Sequence[tuple[int, ...]]) -> None:
        assert len(rows) == len(shapes), (len(rows), len(shapes))
        self.rows, self.shapes = rows, shapes

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.rows[index], "index": index}


def encoded_cache_dir(args: VideoConfig) -> str:
    """Folder of encoded data: as configured, or beside what the Hub's libraries keep."""
    return args.cache_dir or os.path.join(constants.HF_HOME, "video_trl", "encoded")


def datasets_in(*datasets: Any) -> list[Any]:
    """The datasets in optional arguments, those in dicts included."""
    flat: list[Any] = []
    for dataset in datasets:
        if isinstance(dataset, dict):
            flat.extend(dataset.values())
        elif dataset is not None:
            flat.append(dataset)
    return flat


def for_each(function: Callable[[Any], Any], datasets: Any) -> Any:
    """The function of a dataset, or of every one in a dict; `None` for none."""
    if isinstance(datasets, dict):
        return {name: function(dataset) for name, dataset in datasets.items()}
    return None if datasets is None else function(datasets)


def prepare_rows(
    dataset: MapDataset,
    row_type: str,
    args: VideoConfig,
    *,
    pipeline: DiffusionPipeline | None,
    transformer: ModelMixin,
    family: ModelFamily,
    max_sequence_length: int,
    before_encoding: Callable[[np.ndarray], None] | None = None,
) -> IndexedDataset:
    """
    Encode a raw dataset, or take an encoded one as it is; check all its rows, and number them. `before_encoding` is
    that of `encode_dataset`.

    Raises:
        ValueError: If the dataset is raw and there is no pipeline to encode it, or videos or the latents of a row do
            not fit the transformer, or differ in shape within the row; and whatever `encode_dataset` raises.
    """
    if not is_encoded(dataset, row_type):
        if pipeline is None:
            raise ValueError(
                "`model` is a bare transformer and the dataset holds videos, which nothing can encode. Pass the "
                "pipeline as `model`, or a dataset encoded by `video_trl.data.encode_dataset`."
            )
        fits = partial(_check_video, family=family, transformer=transformer, vae=pipeline.components.get("vae"))
        shapes: set[tuple[int, ...]] = set()

        def look(video: np.ndarray) -> None:
            shapes.update(fits(video.shape[:3]))
            shift_for_sizes(args, pipeline, family, transformer, shapes)  # refuses sizes; again with all datasets
            if before_encoding is not None:
                before_encoding(video)

        for height, width in _sizes(args):
            if args.num_frames is not None:
                fits((args.num_frames, height, width))
        dataset = encode_dataset(
            dataset,
            pipeline,
            family,
            row_type,
            cache_dir=encoded_cache_dir(args),
            max_sequence_length=max_sequence_length,
            num_frames=args.num_frames,
            fps=args.fps,
            height=args.height,
            width=args.width,
            buckets=args.buckets(),
            max_crop=args.resolution_max_crop,
            batch_size=args.encode_batch_size,
            on_bad_video=args.on_bad_video,
            device=args.device,
            before_encoding=look,
            latents_dtype=torch.bfloat16 if args.latents_dtype == "bfloat16" else torch.float32,
        )
    check_conditions(dataset, family)
    of_rows = check_encoded_rows(
        dataset,
        row_type,
        transformer,
        family,
        max_sequence_length=max_sequence_length,
        cache_dir=Path(encoded_cache_dir(args)),
    )
    return IndexedDataset(dataset, of_rows)


def _sizes(args: VideoConfig) -> list[tuple[int, int]]:
    """Heights and widths that videos are brought to; none where files keep their own."""
    if args.height is not None and args.width is not None:
        return [(args.height, args.width)]
    return [(bucket.height, bucket.width) for bucket in args.buckets()]


def _check_video(
    shape: tuple[int, ...], *, family: ModelFamily, transformer: ModelMixin, vae: ModelMixin | None
) -> list[tuple[int, ...]]:
    """
    Shape of the latents of videos `(T, H, W)`, in a list. A `ValueError` unless VAE and transformer take them, because
    encoding them may take hours.
    """
    if vae is None:  # which is refused where it is needed
        return []
    family.check_video(vae, shape)
    frames, height, width = shape
    joined, side = family.compression(vae)
    channels = transformer.config.out_channels or transformer.config.in_channels
    latents = (channels, (frames - 1) // joined + 1, height // side, width // side)
    try:
        family.check_latents(transformer, latents)
    except ValueError as error:
        raise ValueError(f"Videos of {frames} frames of {height}x{width} (height x width): {error}") from error
    return [latents]


def resolve_max_sequence_length(
    args: VideoConfig, pipeline: DiffusionPipeline | None, family: ModelFamily, transformer: ModelMixin
) -> int:
    """
    Prompt length in tokens: what the transformer requires; else as configured, or the tokenizer's maximum but no more
    than the pipeline's default.

    Raises:
        ValueError: If another length is configured than the transformer requires.
    """
    configured, required = args.max_sequence_length, family.prompt_length(transformer)
    if required is not None and configured not in (None, required):
        raise ValueError(
            f"This transformer needs prompts of {required} tokens, padding included, got "
            f"`max_sequence_length={configured}`. Leave it unset."
        )
    configured = required or configured
    if configured is not None:
        return configured
    if pipeline is None or pipeline.components.get("tokenizer") is None:
        return family.published_prompt_tokens
    return min(family.published_prompt_tokens, pipeline.tokenizer.model_max_length)


def check_timesteps(
    args: VideoConfig,
    pipeline: DiffusionPipeline | None,
    family: ModelFamily,
    timestep_range: Sequence[float] | None,
) -> None:
    """
    Raise a `ValueError` if timesteps cannot be drawn: `"shifted"` without a shift, a range beyond the model's scale,
    one from which the scheme never draws, or a weighting of noise levels that is not for this model.
    """
    if args.timestep_sampling == "shifted" and args.timestep_shift is None:
        if pipeline is None or family.flow_shift(pipeline.scheduler.config, 1) is None:
            raise ValueError(
                "`timestep_sampling='shifted'` needs a shift, and there is no pipeline whose scheduler has one. Set "
                "`timestep_shift` (3.0 for Wan2.1 at 480p, 5.0 at 720p)."
            )
    process = family.noise_process
    args.check_noise_process(process)
    if timestep_range is not None and timestep_range[1] > process.num_train_timesteps:
        raise ValueError(
            f"`timestep_range={timestep_range}` ends beyond the model's last timestep, "
            f"{process.num_train_timesteps}. Lower it."
        )
    process.sample_timesteps(
        torch.full((1,), 0.5, dtype=torch.float64),
        scheme=args.timestep_sampling,
        shift=args.timestep_shift or 1.0,  # no shift makes a range empty
        logit_mean=args.timestep_logit_mean,
        logit_std=args.timestep_logit_std,
        timestep_range=timestep_range,
    )


def shift_for_sizes(
    args: VideoConfig,
    pipeline: DiffusionPipeline | None,
    family: ModelFamily,
    transformer: ModelMixin,
    shapes: set[tuple[int, ...]],
) -> float:
    """
    Shift of `timestep_sampling="shifted"`: as configured, or that of the pipeline's scheduler; else 1.

    Raises:
        ValueError: If context parallelism cannot divide videos with latents of these shapes, or they differ in the
            number of tokens, by which the scheduler shifts.
    """
    check_context_parallelism(transformer, family, shapes, args)
    if args.timestep_shift is not None or args.timestep_sampling != "shifted":
        return args.timestep_shift or 1.0
    assert pipeline is not None, "check_timesteps comes first"
    tokens = {math.prod(family.token_grid(transformer, shape)) for shape in shapes}
    shifts = {family.flow_shift(pipeline.scheduler.config, number) for number in tokens}
    if len(shifts) > 1:
        raise ValueError(
            f"The pipeline's scheduler shifts by the number of tokens, and the videos have {sorted(tokens)}, so "
            "`timestep_sampling='shifted'` would have several shifts. Set `timestep_shift`, or train at one size."
        )
    (shift,) = shifts
    assert shift is not None, "check_timesteps comes first"
    return shift
