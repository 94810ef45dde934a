"""From the datasets a user passes to rows that a collator takes, and the settings that depend on the pipeline."""

import os
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from huggingface_hub import constants
from safetensors import safe_open
from torch.utils.data import Dataset

from ..adapters import VideoAdapter
from ..data import ENCODED_COLUMNS, EncodedDataset, encode_dataset, is_encoded
from ..data.columns import MapDataset
from .base_config import _BaseVideoConfig


DEFAULT_MAX_SEQUENCE_LENGTH = 512


class IndexedDataset(Dataset[dict[str, Any]]):
    """Rows of a dataset, each with its position as `"index"`, which its noise is derived from."""

    def __init__(self, rows: MapDataset) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.rows[index], "index": index}


def datasets_in(*datasets: Any) -> list[Any]:
    """The datasets in optional arguments, those in dicts included."""
    found: list[Any] = []
    for dataset in datasets:
        if isinstance(dataset, dict):
            found.extend(dataset.values())
        elif dataset is not None:
            found.append(dataset)
    return found


def prepare_rows(
    dataset: MapDataset,
    row_type: str,
    args: _BaseVideoConfig,
    *,
    pipeline: DiffusionPipeline | None,
    transformer: ModelMixin,
    adapter: VideoAdapter,
    max_sequence_length: int,
    batch_size: int,
) -> IndexedDataset:
    """
    Encode a raw dataset, or take an encoded one as it is, check its latents and number its rows.

    Raises:
        ValueError: If the dataset is raw and there is no pipeline to encode it, or the latents of a row do not fit
            the transformer, or differ in shape where `batch_size` rows are to be stacked; and whatever
            `encode_dataset` raises.
    """
    if not is_encoded(dataset, row_type):
        if pipeline is None:
            raise ValueError(
                "`model` is a bare transformer and the dataset holds videos, which nothing can encode. Pass the "
                "pipeline as `model`, or a dataset encoded by `video_trl.data.encode_dataset`."
            )
        dataset = encode_dataset(
            dataset,
            pipeline,
            adapter,
            row_type,
            cache_dir=args.cache_dir or os.path.join(constants.HF_HOME, "video_trl", "encoded"),
            max_sequence_length=max_sequence_length,
            num_frames=args.num_frames,
            fps=args.fps,
            height=args.height,
            width=args.width,
            batch_size=args.encode_batch_size,
            on_bad_video=args.on_bad_video,
            device=args.device,
        )
    _check_latents(dataset, row_type, transformer, adapter, batch_size)
    return IndexedDataset(dataset)


def _check_latents(
    dataset: MapDataset, row_type: str, transformer: ModelMixin, adapter: VideoAdapter, batch_size: int
) -> None:
    rows_of: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, shapes in enumerate(_latents_shapes(dataset, row_type)):
        if len(set(shapes)) > 1:
            raise ValueError(f"Row {number}: expected latents of one shape (C, F, H, W), got {sorted(set(shapes))}.")
        if shapes[0] not in rows_of:
            try:
                adapter.check_latents(transformer, shapes[0])
            except ValueError as error:
                raise ValueError(f"Row {number}: {error}") from error
        rows_of[shapes[0]].append(number)
    if batch_size > 1 and len(rows_of) > 1:
        found = "; ".join(
            f"{shape} in {len(rows)} row(s) from row {rows[0]} on" for shape, rows in list(rows_of.items())[:5]
        )
        raise ValueError(
            f"A batch of {batch_size} rows needs latents of one shape (C, F, H, W), got {len(rows_of)} shapes: "
            f"{found}. Set `num_frames`, `height` and `width` when encoding, or a batch size of 1 per device."
        )


def _latents_shapes(dataset: MapDataset, row_type: str) -> Iterator[list[tuple[int, ...]]]:
    """The shapes `(C, F, H, W)` in every row; of an `EncodedDataset` from the headers of its files."""
    if not isinstance(dataset, EncodedDataset):
        columns = [column for column in ENCODED_COLUMNS[row_type] if column.endswith("latents")]
        for number in range(len(dataset)):
            row = dataset[number]
            yield [tuple(torch.as_tensor(row[column]).shape[-4:]) for column in columns]
        return
    shape_of: dict[str, tuple[int, ...]] = {}
    for shard in sorted(set(dataset._shard_of.values())):
        with safe_open(dataset.directory / shard, framework="pt") as file:
            shape_of.update({key: tuple(file.get_slice(key).get_shape()) for key in file.keys()})  # noqa: SIM118
    for row in dataset._rows:
        keys = [row["video"]] if dataset.row_type == "video" else [row["chosen"], *row["rejected"]]
        yield [shape_of[key] for key in keys]


def generation_kwargs(
    dataset: IndexedDataset, row_type: str, pipeline: DiffusionPipeline | None, max_sequence_length: int
) -> dict[str, Any]:
    """Arguments of the pipeline's call that make videos of the size, and with the prompt padding, of the training."""
    call: dict[str, Any] = {"max_sequence_length": max_sequence_length}
    if pipeline is not None:
        column = next(name for name in ENCODED_COLUMNS[row_type] if name.endswith("latents"))
        frames, height, width = torch.as_tensor(dataset[0][column]).shape[-3:]
        call["num_frames"] = (frames - 1) * pipeline.vae_scale_factor_temporal + 1
        call["height"] = height * pipeline.vae_scale_factor_spatial
        call["width"] = width * pipeline.vae_scale_factor_spatial
    return call


def resolve_max_sequence_length(args: _BaseVideoConfig, pipeline: DiffusionPipeline | None) -> int:
    """Prompt length in tokens: as configured, or the tokenizer's maximum but no more than 512."""
    if args.max_sequence_length is not None:
        return args.max_sequence_length
    if pipeline is None:
        return DEFAULT_MAX_SEQUENCE_LENGTH
    return min(DEFAULT_MAX_SEQUENCE_LENGTH, pipeline.tokenizer.model_max_length)


def resolve_timestep_shift(args: _BaseVideoConfig, pipeline: DiffusionPipeline | None) -> float:
    """Shift of `timestep_sampling="shifted"`: as configured, or that of the pipeline's scheduler; else 1."""
    if args.timestep_shift is not None or args.timestep_sampling != "shifted":
        return args.timestep_shift or 1.0
    config = {} if pipeline is None else pipeline.scheduler.config
    shift = config.get("flow_shift", config.get("shift"))  # one scheduler family's name for it, and the other's
    if shift is None:
        raise ValueError(
            "`timestep_sampling='shifted'` needs a shift, and there is no pipeline whose scheduler has one. Set "
            "`timestep_shift` (3.0 for Wan2.1 at 480p, 5.0 at 720p)."
        )
    return float(shift)
