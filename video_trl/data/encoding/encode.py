"""Encode videos to latents and prompts to embeddings; each distinct one once, with a cache on disk."""

import logging
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import diffusers
import numpy as np
import PIL.Image
import torch
import transformers
from diffusers import DiffusionPipeline, ModelMixin
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ...files import fingerprint
from ...models import ModelFamily
from ...models.base import FRAME_RATE
from ..buckets import AspectBucket
from ..columns import MapDataset, check_columns, undecoded
from ..images import read_image
from ..video_io import probe_video, read_video
from .identity import module_settings, tokenizer_settings
from .inventory import IMAGE_COLUMN, Inventory, Row, check_shapes, take_inventory, usable_rows, video_shapes
from .processes import default_device, first_on_each_machine
from .store import EncodedDataset, EncodedWriter


logger = logging.getLogger(__name__)

_ENCODING_VERSION = 3  # raise it when the same input gives other numbers, so that old caches are not used


@dataclass(frozen=True)
class _Job:
    """The arguments of `encode_dataset`."""

    dataset: MapDataset
    pipeline: DiffusionPipeline
    family: ModelFamily
    row_type: str
    max_sequence_length: int
    pixels: dict[str, Any]  # keyword arguments of `read_video`
    buckets: tuple[AspectBucket, ...]
    max_crop: float
    batch_size: int
    on_bad_video: str
    device: torch.device
    before_encoding: Callable[[np.ndarray], None] | None
    latents_dtype: torch.dtype

    @property
    def image_columns(self) -> tuple[str, ...]:
        """Conditions that are made of a first frame; none for text-to-video."""
        return self.family.image_columns

    def networks(self, names: Iterable[str]) -> list[nn.Module]:
        """Components of the pipeline, by their names."""
        return [self.pipeline.components[name] for name in names]

    @property
    def encoders(self) -> list[nn.Module]:
        """Networks of the pipeline that encode; they are needed in training no more."""
        return self.networks(["vae", *self.family.text_encoders, *self.family.image_encoders])


def encode_dataset(
    dataset: MapDataset,
    pipeline: DiffusionPipeline,
    family: ModelFamily,
    row_type: str,
    *,
    cache_dir: str | os.PathLike[str],
    max_sequence_length: int,
    num_frames: int | None = None,
    fps: float | None = None,
    height: int | None = None,
    width: int | None = None,
    buckets: Sequence[AspectBucket] = (),
    max_crop: float = 1.0,
    batch_size: int = 8,
    on_bad_video: Literal["raise", "skip"] = "raise",
    device: torch.device | str | None = None,
    before_encoding: Callable[[np.ndarray], None] | None = None,
    latents_dtype: torch.dtype = torch.float32,
) -> EncodedDataset:
    """
    Encode a raw dataset with the pipeline's VAE and other encoders, or load the cached result.

    The cache is found by a fingerprint of everything that the numbers depend on: the content of every video and image,
    prompts, scores, weights and configuration of the encoders, tokenizer, sizes, and library versions. All videos are
    decoded once for checking before the first one is encoded. Under `torch.distributed` the first process of each
    machine does the work, from where a killed one left it. Afterwards the encoders are on the CPU, in evaluation mode.

    For image-to-video, a row may bring its first frame in the column `image` (a path, `{"path", "bytes"}`, a PIL image
    or a uint8 array); it is scaled and cropped as the videos are. Without one, the first frame of the only or chosen
    video is taken, and shared with the rejected ones.

    Args:
        dataset (`datasets.Dataset` or list of dicts): Raw rows of `row_type`.
        pipeline (`DiffusionPipeline`): Has the `vae`, `text_encoder`, `tokenizer` and, where the transformer takes
            `image_embeds`, the `image_encoder` and `image_processor` to encode with.
        family (`ModelFamily`): Of the pipeline's transformer.
        row_type (`str`): `"video"`, `"preference"` or `"group"`.
        cache_dir (`str` or `Path`): Where encoded datasets are kept, one folder each.
        max_sequence_length (`int`): Prompts are cut to this number of tokens.
        num_frames (`int`, *optional*): Train on the first so many frames of each video.
        fps (`float`, *optional*): Frames per second to bring the videos to.
        height, width (`int`, *optional*): Size in pixels: scaled to cover it, then centre-cropped.
        buckets (`Sequence[AspectBucket]`, *optional*): Several sizes instead: all videos of a row are brought to the
            one nearest to the shape of its only or chosen video.
        max_crop (`float`, defaults to `1.0`): Largest proportion of that video's picture that its bucket may cut
            off, in [0, 1]. A row that would lose more is treated as one with an unreadable video.
        batch_size (`int`, defaults to `8`): Videos, or prompts, in one call. Lower it when memory runs out.
        on_bad_video (`"raise"` or `"skip"`, defaults to `"raise"`): What to do with a row that has a video that cannot
            be read wholly: stop, or leave the row out and report it in the log and in `EncodedDataset.skipped`.
        device (`torch.device` or `str`, *optional*): Where to encode; the accelerator if there is one.
        before_encoding (callable, *optional*): Called with one video of each size, uint8 `(T, H, W, 3)`, when all have
            been checked and before the first is encoded. What it raises ends the call. Not called for what is cached.
        latents_dtype (`torch.dtype`, defaults to `torch.float32`): What latents of videos are rounded to and stored
            in; `torch.bfloat16` takes half of the disk and of the reading. Training computes in float32 either way.

    Returns:
        [`EncodedDataset`]: Rows in the order of `dataset`.

    Raises:
        VideoDecodeError: A video or image is missing, damaged, truncated or too short and `on_bad_video="raise"`.
        ValueError: Columns are wrong (see `check_columns`); the number of frames or a side does not suit the VAE; the
            videos of one row differ in size; no row is left; values are not finite; a file has changed meanwhile.
        OSError: The cache cannot be written. No incomplete cache is left under the final name.
    """
    job = _Job(
        dataset=dataset, pipeline=pipeline, family=family, row_type=row_type, max_sequence_length=max_sequence_length,
        pixels={"num_frames": num_frames, "fps": fps, "height": height, "width": width},
        buckets=tuple(buckets), max_crop=max_crop, batch_size=batch_size, on_bad_video=on_bad_video,
        device=default_device() if device is None else torch.device(device), before_encoding=before_encoding,
        latents_dtype=latents_dtype,
    )  # fmt: skip
    _check_job(job)
    encoded = EncodedDataset(Path(cache_dir) / first_on_each_machine(partial(_build, job, Path(cache_dir))))
    if encoded.skipped:
        videos = "; ".join(f"{skip.video}: {skip.reason}" for skip in encoded.skipped)
        logger.warning("Left out %d of %d rows with unreadable videos: %s", len(encoded.skipped), len(dataset), videos)
    for module in job.encoders:
        module.eval().to("cpu")
    return encoded


def _check_job(job: _Job) -> None:
    """Refuse what cannot be encoded before a video is read; sizes left to the files are checked after decoding."""
    if job.on_bad_video not in ("raise", "skip"):
        raise ValueError(f"`on_bad_video` must be 'raise' or 'skip', got {job.on_bad_video!r}.")
    if job.batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {job.batch_size}.")
    pairs = (*job.family.text_encoders.items(), *job.family.image_encoders.items())
    names = ("vae", *(name for pair in pairs for name in pair), job.family.prompt_image_processor)
    for component in filter(None, names):
        if job.pipeline.components.get(component) is None:
            raise ValueError(f"The pipeline has no {component!r} to encode with. Load it whole, or pass encoded data.")
    num_frames, height, width = job.pixels["num_frames"], job.pixels["height"], job.pixels["width"]
    if (height is None) != (width is None):
        raise ValueError(f"`height` and `width` must be given together, got {height} and {width}.")
    if job.buckets and height is not None:
        raise ValueError(f"Expected one size or `buckets`, got height={height}, width={width} and buckets. Drop one.")
    _, side = job.family.compression(job.pipeline.vae)  # suits every VAE, as one frame does
    sizes = [(bucket.height, bucket.width) for bucket in job.buckets] or [(height or side, width or side)]
    for size in sizes:
        job.family.check_video(job.pipeline.vae, (1 if num_frames is None else num_frames, *size))
    check_columns(job.dataset, job.row_type)


def _build(job: _Job, cache_dir: Path) -> str:
    """Encode unless it is done already; the name of the folder in `cache_dir`."""
    inventory = take_inventory(
        undecoded(job.dataset),
        job.row_type,
        with_images=bool(job.image_columns),
        on_bad_video=job.on_bad_video,
        buckets=job.buckets,
        max_crop=job.max_crop,
    )
    identity = _fingerprint(job, inventory.rows)
    directory = cache_dir / f"{job.row_type}-{identity}"
    if directory.is_dir():
        logger.info("Using the encoded dataset in %s.", directory)
        return directory.name
    shapes = video_shapes(inventory, job.pixels)
    rows, skipped = usable_rows(inventory)
    check_shapes(inventory, rows, shapes, partial(job.family.check_video, job.pipeline.vae))
    if job.before_encoding is not None:
        for digest in {shapes[row.videos[0]]: row.videos[0] for row in reversed(rows)}.values():
            job.before_encoding(_frames(job, inventory, digest))
    fps = job.pixels["fps"] or probe_video(inventory.read(rows[0].videos[0])).fps
    fps = None if math.isnan(fps) else fps
    with EncodedWriter(directory, job.row_type, identity, encoder=job.family.name, fps=fps) as writer:
        if not writer.complete:
            _encode_prompts(job, inventory, rows, shapes, writer)
            _encode_videos(job, inventory, rows, shapes, writer)
            if job.image_columns:
                _encode_images(job, inventory, rows, shapes, writer)
            for row in rows:
                if row.loss_weights is not None:
                    writer.add(_weights_key(row.loss_weights), torch.from_numpy(row.loss_weights))
            rates = _rates(job, inventory, rows, writer)
            index = [_index_row(job, row, shapes[row.videos[0]], rate) for row, rate in zip(rows, rates, strict=True)]
            writer.finish(index, skipped)
    return directory.name


def _fingerprint(job: _Job, rows: Sequence[Row]) -> str:
    """Hash of everything that the encoded numbers depend on: 32 hexadecimal digits."""
    settings = [job.row_type, job.family.name, job.pixels, job.max_sequence_length, job.on_bad_video]
    settings += [] if job.latents_dtype == torch.float32 else [str(job.latents_dtype)]
    versions = [_ENCODING_VERSION, diffusers.__version__, transformers.__version__]
    pipeline = job.pipeline
    parts: list[Any] = [versions, settings, [_identity(row) for row in rows]]
    for name, tokenizer in job.family.text_encoders.items():
        parts += [tokenizer_settings(pipeline.components[tokenizer])] if tokenizer else []
        parts += _parts_of(pipeline.components[name])
    parts += _parts_of(pipeline.vae)
    if job.family.prompt_image_processor is not None:
        parts.append(pipeline.components[job.family.prompt_image_processor].to_json_string())
    if job.image_columns:
        parts += [job.image_columns, [row.image for row in rows]]
    for name, processor in job.family.image_encoders.items():
        parts += [pipeline.components[processor].to_json_string()]
        parts += _parts_of(pipeline.components[name])
    return fingerprint(*parts)


def _parts_of(network: ModelMixin | PreTrainedModel) -> list[Any]:
    """Weights of an encoder, its configuration, and what that does not say."""
    return [network, _settings_of(network), module_settings(network)]


def _settings_of(network: ModelMixin | PreTrainedModel) -> dict[str, Any]:
    config = dict(network.config) if isinstance(network, ModelMixin) else network.config.to_dict()
    # Where the weights came from and which version wrote them do not change the numbers.
    return {k: v for k, v in config.items() if not k.startswith("_") and k != "transformers_version"}


def _encode_prompts(
    job: _Job,
    inventory: Inventory,
    rows: Sequence[Row],
    shapes: dict[str, tuple[int, int, int]],
    writer: EncodedWriter,
) -> None:
    """Embeddings of every distinct prompt; where the text encoder sees it, with every first frame of it."""
    row_of: dict[str, Row] = {}
    for row in rows:
        row_of.setdefault(_prompt_key(job, row, shapes[row.videos[0]]), row)
    distinct = list(row_of.items())
    _warn_of_long_prompts(job, list(dict.fromkeys(row.prompt for _, row in distinct)))
    with ExitStack() as stack, tqdm(total=len(distinct), desc="Encoding prompts") as progress:
        for network in job.networks(job.family.text_encoders):
            stack.enter_context(_placed(network, job.device))
        for start in range(0, len(distinct), job.batch_size):
            batch = distinct[start : start + job.batch_size]
            progress.update(len(batch))
            # Batches are whole also where a part is there from before: another size would change the last bits.
            if all(_column_key(key, column) in writer for key, _ in batch for column in job.family.prompt_columns):
                continue
            encoded = _encoded_prompts(job, inventory, [row for _, row in batch], shapes)
            for (key, row), columns in zip(batch, encoded, strict=True):
                for column in job.family.prompt_columns:
                    encoder = job.pipeline.components[next(iter(job.family.text_encoders))]
                    _check_finite(columns[column], f"The prompt {row.prompt!r}", encoder, "text encoder")
                    writer.add(_column_key(key, column), columns[column])


def _encoded_prompts(
    job: _Job, inventory: Inventory, rows: Sequence[Row], shapes: dict[str, tuple[int, int, int]]
) -> list[dict[str, torch.Tensor]]:
    images = []
    for row in rows if job.family.prompt_image_processor else ():
        _, height, width = shapes[row.videos[0]]
        images.append(PIL.Image.fromarray(_first_frame(job, inventory, row.image or row.videos[0], height, width)))
    prompts = [row.prompt for row in rows]
    return job.family.encode_prompt_with_image(job.pipeline, prompts, images, job.max_sequence_length)


def _warn_of_long_prompts(job: _Job, prompts: Sequence[str]) -> None:
    name = next(iter(job.family.text_encoders.values()))
    if not name:
        return
    lengths = [len(ids) for ids in job.pipeline.components[name](list(prompts), verbose=False)["input_ids"]]
    too_long = [number for number, length in enumerate(lengths) if length > job.max_sequence_length]
    if too_long:
        worst = max(too_long, key=lambda number: lengths[number])
        logger.warning(
            "%d of %d prompts are longer than %d tokens (`max_sequence_length`) and are cut there; the longest has "
            "%d: %.80r... Raise `max_sequence_length`, as far as the model was trained, or shorten them.",
            len(too_long),
            len(prompts),
            job.max_sequence_length,
            lengths[worst],
            prompts[worst],
        )


def _encode_videos(
    job: _Job,
    inventory: Inventory,
    rows: Sequence[Row],
    shapes: dict[str, tuple[int, int, int]],
    writer: EncodedWriter,
) -> None:
    by_shape: dict[tuple[int, int, int], list[str]] = defaultdict(list)
    for digest in dict.fromkeys(digest for row in rows for digest in row.videos):
        by_shape[shapes[digest]].append(digest)
    total = sum(map(len, by_shape.values()))
    with _placed(job.pipeline.vae, job.device), tqdm(total=total, desc="Encoding videos") as progress:
        for digests in by_shape.values():
            for start in range(0, len(digests), job.batch_size):
                batch = digests[start : start + job.batch_size]
                progress.update(len(batch))
                if all(_video_key(digest) in writer for digest in batch):
                    continue
                frames = np.stack([_frames(job, inventory, digest) for digest in batch])  # (B, T, H, W, 3)
                video = torch.from_numpy(frames).to(job.device).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
                latents = job.family.encode_video(job.pipeline.vae, video)
                for digest, latent in zip(batch, latents.cpu(), strict=True):
                    _check_finite(latent, inventory.names[digest], job.pipeline.vae)
                    writer.add(_video_key(digest), latent.to(job.latents_dtype))


def _encode_images(
    job: _Job,
    inventory: Inventory,
    rows: Sequence[Row],
    shapes: dict[str, tuple[int, int, int]],
    writer: EncodedWriter,
) -> None:
    """Conditions of every distinct first frame, for the length and size of the videos that it begins."""
    by_shape: dict[tuple[int, int, int], list[str]] = defaultdict(list)
    for row in rows:
        shape, digest = shapes[row.videos[0]], row.image or row.videos[0]
        if digest not in by_shape[shape]:
            by_shape[shape].append(digest)
    total = sum(map(len, by_shape.values()))
    networks = job.networks(["vae", *job.family.image_encoders])
    with ExitStack() as stack, tqdm(total=total, desc="Encoding first frames") as progress:
        for network in networks:
            stack.enter_context(_placed(network, job.device))
        for (num_frames, height, width), digests in by_shape.items():
            for start in range(0, len(digests), job.batch_size):
                batch = digests[start : start + job.batch_size]
                progress.update(len(batch))
                keys = [_image_key(c, d, (num_frames, height, width)) for c in job.image_columns for d in batch]
                if all(key in writer for key in keys):
                    continue
                frames = [_first_frame(job, inventory, digest, height, width) for digest in batch]
                conditions = job.family.encode_image(
                    job.pipeline, [PIL.Image.fromarray(frame) for frame in frames], num_frames
                )
                for column, values in conditions.items():
                    for digest, value in zip(batch, values.cpu(), strict=True):
                        _check_finite(value, inventory.names[digest], job.pipeline.vae, "VAE and image encoder")
                        writer.add(_image_key(column, digest, (num_frames, height, width)), value)


def _first_frame(job: _Job, inventory: Inventory, digest: str, height: int, width: int) -> np.ndarray:
    """uint8 `(height, width, 3)`: the row's own image, or what its video begins with."""
    if inventory.places[digest].column != IMAGE_COLUMN:
        return _frames(job, inventory, digest, num_frames=1)[0]
    image = read_image(inventory.read(digest), height=height, width=width)
    inventory.check_unchanged(digest)
    return image


def _frames(job: _Job, inventory: Inventory, digest: str, **changes: Any) -> np.ndarray:
    """uint8 `(T, height, width, 3)`: a video, of the content that its hash was made of."""
    video = read_video(inventory.read(digest), **(inventory.pixels_of(digest, job.pixels) | changes))
    inventory.check_unchanged(digest)
    return video


def _check_finite(encoded: torch.Tensor, name: str, encoder: nn.Module, what: str = "VAE") -> None:
    if not torch.isfinite(encoded).all():
        raise ValueError(
            f"{name}: encoding it ({encoder.dtype}) returned numbers that are not finite. Load the pipeline with its "
            f"{what} in float32."
        )


def _identity(row: Row) -> list[Any]:
    """What of a row the encoded dataset depends on."""
    optional = (row.weight, None if row.loss_weights is None else torch.from_numpy(row.loss_weights))
    return [row.prompt, row.videos, row.scores, *(each for each in optional if each is not None)]


def _rates(job: _Job, inventory: Inventory, rows: Sequence[Row], writer: EncodedWriter) -> list[float | None]:
    """Frames per second of each row's videos, kept for families that are conditioned on them; else `None`."""
    if FRAME_RATE not in job.family.condition_columns:
        return [None] * len(rows)
    rates = [job.pixels["fps"] or probe_video(inventory.read(row.videos[0])).fps for row in rows]
    for row, rate in zip(rows, rates, strict=True):
        if math.isnan(rate):
            raise ValueError(
                f"{row.names[0]} is an array without a frame rate, and the transformer ({job.family.name!r}) is "
                "conditioned on it. Set `fps`."
            )
    for rate in sorted(set(rates)):
        writer.add(_rate_key(rate), torch.tensor(rate, dtype=torch.float32))
    return rates


def _rate_key(rate: float) -> str:
    return f"{FRAME_RATE}/{rate!r}"


def _index_row(job: _Job, row: Row, shape: tuple[int, int, int], rate: float | None) -> dict[str, Any]:
    keys = [_video_key(digest) for digest in row.videos]
    videos = {"video": keys[0]} if job.row_type == "video" else {"chosen": keys[0], "rejected": keys[1:]}
    prompt = _prompt_key(job, row, shape)
    conditions = {column: _column_key(prompt, column) for column in job.family.prompt_columns}
    conditions |= {column: _image_key(column, row.image or row.videos[0], shape) for column in job.image_columns}
    conditions |= {} if rate is None else {FRAME_RATE: _rate_key(rate)}
    return {
        "prompt": row.prompt,
        "prompt_embeds": conditions.pop("prompt_embeds"),
        **videos,
        "rejected_scores": row.scores,
        "weight": row.weight,
        "loss_weights": None if row.loss_weights is None else _weights_key(row.loss_weights),
        **conditions,
    }


def _weights_key(weights: np.ndarray) -> str:
    return f"loss_weights/{fingerprint(torch.from_numpy(weights))}"


def _image_key(column: str, digest: str, shape: tuple[int, int, int]) -> str:
    return f"{column}/{digest}-{'x'.join(map(str, shape))}"


def _video_key(digest: str) -> str:
    return f"videos/{digest}"


def _prompt_key(job: _Job, row: Row, shape: tuple[int, int, int]) -> str:
    """Hash of what a row's prompt is encoded from: words, and the first frame where the text encoder sees that."""
    if job.family.prompt_image_processor is None:
        return fingerprint(row.prompt)
    return fingerprint(row.prompt, row.image or row.videos[0], list(shape[1:]))


def _column_key(prompt: str, column: str) -> str:
    return f"{'prompts' if column == 'prompt_embeds' else column}/{prompt}"


@contextmanager
def _placed(module: nn.Module, device: torch.device) -> Iterator[None]:
    """The module on `device` in evaluation mode; back on the CPU afterwards, with the device's memory given back."""
    module.eval().to(device)
    try:
        yield
    finally:
        module.to("cpu")
        if device.type != "cpu":
            torch.get_device_module(device).empty_cache()
