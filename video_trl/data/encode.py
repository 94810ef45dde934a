"""Videos to latents and prompts to embeddings: every distinct one is encoded once, and the result is cached."""

import hashlib
import json
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import diffusers
import numpy as np
import torch
import torch.distributed as dist
import transformers
from diffusers import DiffusionPipeline
from torch import nn
from tqdm.auto import tqdm

from ..adapters import VideoAdapter
from .columns import MapDataset, as_scores, as_videos, check_columns, undecoded
from .encoded import EncodedDataset, EncodedWriter, SkippedRow
from .video_io import VideoDecodeError, VideoSource, read_video, source_name, video_hash


logger = logging.getLogger(__name__)

_ENCODING_VERSION = 1  # raise it when the same input gives other numbers, so that old caches are not used

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class _Place:
    """Where a video stands in the raw dataset."""

    row: int
    column: str
    position: int | None  # in a list of rejected videos

    def read(self, dataset: MapDataset) -> VideoSource:
        cell = dataset[self.row][self.column]
        return cell if self.position is None else as_videos(cell)[self.position]

    def name(self, source: VideoSource) -> str:
        suffix = "" if self.position is None else f"[{self.position}]"
        return f"row {self.row}, {self.column}{suffix} ({source_name(source)})"


@dataclass(frozen=True)
class _Row:
    prompt: str
    videos: tuple[str, ...]  # hashes; a group's chosen video first
    names: tuple[str, ...]  # what messages call these videos
    scores: list[list[float]] | None


@dataclass
class _Survey:
    """What a raw dataset holds, videos by the hash of their content."""

    rows: list[_Row]
    places: dict[str, _Place]  # first occurrence of each distinct video
    names: dict[str, str]  # of that occurrence
    bad: dict[str, str]  # unreadable videos and why


@dataclass(frozen=True)
class _Job:
    """The arguments of `encode_dataset`, checked."""

    dataset: MapDataset
    pipeline: DiffusionPipeline
    adapter: VideoAdapter
    row_type: str
    max_sequence_length: int
    pixels: dict[str, Any]  # keyword arguments of `read_video`
    batch_size: int
    on_bad_video: str
    device: torch.device


def encode_dataset(
    dataset: MapDataset,
    pipeline: DiffusionPipeline,
    adapter: VideoAdapter,
    row_type: str,
    *,
    cache_dir: str | os.PathLike[str],
    max_sequence_length: int,
    num_frames: int | None = None,
    fps: float | None = None,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 8,
    on_bad_video: Literal["raise", "skip"] = "raise",
    device: torch.device | str | None = None,
) -> EncodedDataset:
    """
    Encode a raw dataset with the pipeline's VAE and text encoder, or load the cached result.

    The cache is found by a fingerprint of everything that the numbers depend on: the content of every video, prompts,
    scores, weights and configuration of VAE and text encoder, tokenizer, sizes, and library versions. All videos are
    decoded once for checking before the first one is encoded. Under `torch.distributed` the first process of each
    machine does the work while the others wait, then load. Afterwards VAE and text encoder are on the CPU, in
    evaluation mode.

    Args:
        dataset (`datasets.Dataset` or list of dicts): Raw rows of `row_type`.
        pipeline (`DiffusionPipeline`): Has the `vae`, `text_encoder` and `tokenizer` to encode with.
        adapter (`VideoAdapter`): Of the pipeline's transformer.
        row_type (`str`): `"video"`, `"preference"` or `"group"`.
        cache_dir (`str` or `Path`): Where encoded datasets are kept, one folder each.
        max_sequence_length (`int`): Prompts are cut to this number of tokens.
        num_frames (`int`, *optional*): Train on the first so many frames of each video.
        fps (`float`, *optional*): Frames per second to bring the videos to.
        height, width (`int`, *optional*): Size in pixels: scaled to cover it, then centre-cropped.
        batch_size (`int`, defaults to `8`): Videos, or prompts, in one call. Lower it when memory runs out.
        on_bad_video (`"raise"` or `"skip"`, defaults to `"raise"`): What to do with a row that has a video that cannot
            be read wholly: stop, or leave the row out and report it in the log and in `EncodedDataset.skipped`.
        device (`torch.device` or `str`, *optional*): Where to encode; the accelerator if there is one.

    Returns:
        [`EncodedDataset`]: Rows in the order of `dataset`.

    Raises:
        VideoDecodeError: A video is missing, damaged, truncated or too short and `on_bad_video="raise"`.
        ValueError: Columns are wrong (see `check_columns`); the number of frames or a side does not suit the VAE; the
            videos of one row differ in size; no row is left; the VAE returns values that are not finite.
        OSError: The cache cannot be written. No incomplete cache is left under the final name.
    """
    if on_bad_video not in ("raise", "skip"):
        raise ValueError(f"`on_bad_video` must be 'raise' or 'skip', got {on_bad_video!r}.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    for component in ("vae", "text_encoder", "tokenizer"):
        if pipeline.components.get(component) is None:
            raise ValueError(f"The pipeline has no {component!r} to encode with. Load it whole, or pass encoded data.")
    _check_sizes(pipeline, adapter, num_frames, height, width)
    check_columns(dataset, row_type)
    job = _Job(
        dataset=undecoded(dataset),
        pipeline=pipeline,
        adapter=adapter,
        row_type=row_type,
        max_sequence_length=max_sequence_length,
        pixels={"num_frames": num_frames, "fps": fps, "height": height, "width": width},
        batch_size=batch_size,
        on_bad_video=on_bad_video,
        device=_default_device() if device is None else torch.device(device),
    )
    encoded = EncodedDataset(Path(cache_dir) / _first_on_each_machine(lambda: _build(job, Path(cache_dir))))
    if encoded.skipped:
        named = "; ".join(f"{skip.video}: {skip.reason}" for skip in encoded.skipped)
        logger.warning("Left out %d of %d rows with unreadable videos: %s", len(encoded.skipped), len(dataset), named)
    for module in (pipeline.vae, pipeline.text_encoder):
        module.eval().to("cpu")
    return encoded


def _check_sizes(
    pipeline: DiffusionPipeline, adapter: VideoAdapter, num_frames: int | None, height: int | None, width: int | None
) -> None:
    """Refuse what the VAE cannot encode before a video is read; sizes left to the files are checked after decoding."""
    if (height is None) != (width is None):
        raise ValueError(f"`height` and `width` must be given together, got {height} and {width}.")
    side = pipeline.vae_scale_factor_spatial  # suits every VAE, as one frame does
    adapter.check_video(pipeline.vae, (1 if num_frames is None else num_frames, height or side, width or side))


def _build(job: _Job, cache_dir: Path) -> str:
    """Encode unless it is done already; the name of the folder in `cache_dir`."""
    survey = _survey(job)
    fingerprint = _fingerprint(job, survey.rows)
    directory = cache_dir / f"{job.row_type}-{fingerprint}"
    if directory.is_dir():
        logger.info("Using the encoded dataset in %s.", directory)
        return directory.name
    shapes = _decode_all(job, survey)
    rows, skipped = _usable_rows(survey)
    _check_shapes(job, survey, rows, shapes)
    with EncodedWriter(directory, job.row_type, fingerprint) as writer:
        _encode_prompts(job, rows, writer)
        _encode_videos(job, survey, rows, shapes, writer)
        writer.finish([_index_row(row, job.row_type) for row in rows], skipped)
    return directory.name


def _survey(job: _Job) -> _Survey:
    """Hash every video. Only a file that cannot be opened is found bad here; decoding comes later."""
    survey = _Survey([], {}, {}, {})

    def hashed(item: tuple[int, Any]) -> tuple[_Row, list[_Place], list[str | None]]:
        number, row = item
        places, sources = zip(*_row_cells(row, number, job.row_type), strict=True)
        digests, reasons = zip(*map(_hash_or_reason, sources), strict=True)
        names = tuple(place.name(source) for place, source in zip(places, sources, strict=True))
        scores = None if job.row_type == "video" else row.get("rejected_scores")
        numbers = None if scores is None else as_scores(scores).tolist()
        return _Row(row["prompt"], digests, names, numbers), list(places), list(reasons)

    numbered = ((number, job.dataset[number]) for number in range(len(job.dataset)))
    for row, places, reasons in _in_threads(hashed, numbered, len(job.dataset), "Hashing videos"):
        survey.rows.append(row)
        for digest, name, place, reason in zip(row.videos, row.names, places, reasons, strict=True):
            survey.places.setdefault(digest, place)
            survey.names.setdefault(digest, name)
            if reason is not None:
                _note_bad(job, survey, digest, reason)
    return survey


def _row_cells(row: Any, number: int, row_type: str) -> list[tuple[_Place, VideoSource]]:
    if row_type == "video":
        return [(_Place(number, "video", None), row["video"])]
    rejected = enumerate(as_videos(row["rejected"]))
    return [
        (_Place(number, "chosen", None), row["chosen"]),
        *((_Place(number, "rejected", position), source) for position, source in rejected),
    ]


def _hash_or_reason(source: VideoSource) -> tuple[str, str | None]:
    try:
        return video_hash(source), None
    except VideoDecodeError as error:
        marker = hashlib.blake2b(str(error).encode(), digest_size=16).hexdigest()
        return f"unreadable-{marker}", _without_name(error, source)


def _without_name(error: VideoDecodeError, source: VideoSource) -> str:
    """The reason alone: the same damaged content may stand in several rows, under several names."""
    return str(error).removeprefix(f"{source_name(source)}: ")


def _note_bad(job: _Job, survey: _Survey, digest: str, reason: str) -> None:
    if job.on_bad_video == "raise":
        raise VideoDecodeError(
            f"{survey.names[digest]}: {reason} Or set `on_bad_video='skip'` to leave out such rows and list them."
        )
    survey.bad[digest] = reason


def _decode_all(job: _Job, survey: _Survey) -> dict[str, tuple[int, int, int]]:
    """(T, H, W) of every distinct video, by decoding all: damage shows before the expensive part, not hours later."""

    def shape_or_reason(item: tuple[str, VideoSource]) -> tuple[str, tuple[int, int, int] | None, str]:
        digest, source = item
        try:
            frames, height, width, _ = read_video(source, **job.pixels).shape
        except VideoDecodeError as error:
            return digest, None, _without_name(error, source)
        return digest, (frames, height, width), ""

    readable = {digest: place for digest, place in survey.places.items() if digest not in survey.bad}
    sources = ((digest, place.read(job.dataset)) for digest, place in readable.items())
    shapes = {}
    for digest, shape, reason in _in_threads(shape_or_reason, sources, len(readable), "Checking videos"):
        if shape is None:
            _note_bad(job, survey, digest, reason)
        else:
            shapes[digest] = shape
    return shapes


def _usable_rows(survey: _Survey) -> tuple[list[_Row], list[SkippedRow]]:
    rows, skipped = [], []
    for number, row in enumerate(survey.rows):
        bad = [position for position, digest in enumerate(row.videos) if digest in survey.bad]
        if bad:
            skipped.append(SkippedRow(number, row.names[bad[0]], survey.bad[row.videos[bad[0]]]))
        else:
            rows.append(row)
    if not rows:
        first = f"{skipped[0].video}: {skipped[0].reason}"
        raise ValueError(f"No row is left: all {len(skipped)} have an unreadable video. The first: {first}")
    return rows, skipped


def _check_shapes(job: _Job, survey: _Survey, rows: Sequence[_Row], shapes: dict[str, tuple[int, int, int]]) -> None:
    checked = set()
    for row in rows:
        for digest in row.videos:
            shape, first = shapes[digest], row.videos[0]
            if shape not in checked:
                try:
                    job.adapter.check_video(job.pipeline.vae, shape)
                except ValueError as error:
                    raise ValueError(f"{survey.names[digest]}: {error}") from error
                checked.add(shape)
            if shape != shapes[first]:
                raise ValueError(
                    f"{survey.names[digest]}: expected (frames, height, width) {shapes[first]} as of "
                    f"{survey.names[first]}, got {shape}. Set `num_frames`, `height` and `width`."
                )


def _fingerprint(job: _Job, rows: Sequence[_Row]) -> str:
    """Hash of everything that the encoded numbers depend on: 32 hexadecimal digits."""
    settings = [job.row_type, job.adapter.name, job.pixels, job.max_sequence_length, job.on_bad_video]
    versions = [_ENCODING_VERSION, diffusers.__version__, transformers.__version__]
    digest = hashlib.blake2b(json.dumps([versions, settings]).encode(), digest_size=16)
    for row in rows:
        digest.update(json.dumps([row.prompt, row.videos, row.scores]).encode())
    digest.update(json.dumps(sorted(job.pipeline.tokenizer.get_vocab().items())).encode())
    _hash_module(digest, job.pipeline.text_encoder, job.pipeline.text_encoder.config.to_dict())
    _hash_module(digest, job.pipeline.vae, dict(job.pipeline.vae.config))
    return digest.hexdigest()


def _hash_module(digest: "hashlib.blake2b", module: nn.Module, config: dict[str, Any]) -> None:
    # Where the weights came from and which version wrote them do not change the numbers.
    described = {k: v for k, v in config.items() if not k.startswith("_") and k != "transformers_version"}
    digest.update(json.dumps([type(module).__name__, described], sort_keys=True, default=str).encode())
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _encode_prompts(job: _Job, rows: Sequence[_Row], writer: EncodedWriter) -> None:
    prompts = list(dict.fromkeys(row.prompt for row in rows))
    with _placed(job.pipeline.text_encoder, job.device), tqdm(total=len(prompts), desc="Encoding prompts") as progress:
        for start in range(0, len(prompts), job.batch_size):
            batch = prompts[start : start + job.batch_size]
            embeds = job.adapter.encode_prompt(job.pipeline, batch, job.max_sequence_length)
            for prompt, embed in zip(batch, embeds, strict=True):
                writer.add(_prompt_key(prompt), embed)
            progress.update(len(batch))


def _encode_videos(
    job: _Job, survey: _Survey, rows: Sequence[_Row], shapes: dict[str, tuple[int, int, int]], writer: EncodedWriter
) -> None:
    by_shape: dict[tuple[int, int, int], list[str]] = defaultdict(list)
    for digest in dict.fromkeys(digest for row in rows for digest in row.videos):
        by_shape[shapes[digest]].append(digest)
    total = sum(map(len, by_shape.values()))
    with _placed(job.pipeline.vae, job.device), tqdm(total=total, desc="Encoding videos") as progress:
        for digests in by_shape.values():
            for start in range(0, len(digests), job.batch_size):
                batch = digests[start : start + job.batch_size]
                sources = [survey.places[digest].read(job.dataset) for digest in batch]
                frames = np.stack([read_video(source, **job.pixels) for source in sources])  # (B, T, H, W, 3)
                video = torch.from_numpy(frames).to(job.device).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
                latents = job.adapter.encode_video(job.pipeline.vae, video)
                for digest, latent in zip(batch, latents.cpu(), strict=True):
                    if not torch.isfinite(latent).all():
                        raise ValueError(
                            f"{survey.names[digest]}: the VAE ({job.pipeline.vae.dtype}) returned latents that are "
                            "not finite. Load the pipeline with its VAE in float32."
                        )
                    writer.add(_video_key(digest), latent)
                progress.update(len(batch))


def _index_row(row: _Row, row_type: str) -> dict[str, Any]:
    keys = [_video_key(digest) for digest in row.videos]
    videos = {"video": keys[0]} if row_type == "video" else {"chosen": keys[0], "rejected": keys[1:]}
    return {"prompt": row.prompt, "prompt_embeds": _prompt_key(row.prompt), **videos, "rejected_scores": row.scores}


def _video_key(digest: str) -> str:
    return f"videos/{digest}"


def _prompt_key(prompt: str) -> str:
    return f"prompts/{hashlib.blake2b(prompt.encode(), digest_size=16).hexdigest()}"


@contextmanager
def _placed(module: nn.Module, device: torch.device) -> Iterator[None]:
    """The module on `device` in evaluation mode; back on the CPU afterwards, with the device's memory given back."""
    module.eval().to(device)
    try:
        yield
    finally:
        module.to("cpu")
        if device.type != "cpu":
            torch.accelerator.empty_cache()


def _default_device() -> torch.device:
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def _in_threads(function: Callable[[T], R], items: Iterable[T], total: int, description: str) -> Iterator[R]:
    """`map` in threads, in order, with a progress bar; holds only a few items at a time."""
    workers = min(8, os.cpu_count() or 1)
    iterator = iter(items)
    with ThreadPoolExecutor(workers) as pool, tqdm(total=total, desc=description) as progress:
        while chunk := list(islice(iterator, 2 * workers)):
            for result in pool.map(function, chunk):
                progress.update()
                yield result


def _first_on_each_machine(work: Callable[[], str]) -> str:
    """
    Run `work` in one process of each machine while the others wait, and give all of them its result.

    The group is its own because encoding may take longer than the time limit of the default group. An error raises in
    every process, so that none waits for one that has given up.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return work()
    group = dist.new_group(backend="gloo", timeout=timedelta(days=30))
    result: str | None = None
    failure: Exception | None = None
    if int(os.environ.get("LOCAL_RANK", dist.get_rank())) == 0:
        try:
            result = work()
        except Exception as error:
            failure = error
    reports: list[Any] = [None] * dist.get_world_size()
    message = None if failure is None else (isinstance(failure, ValueError), f"{type(failure).__name__}: {failure}")
    dist.all_gather_object(reports, (result, message), group=group)
    dist.destroy_process_group(group)
    if failure is not None:
        raise failure
    for _, reported in reports:
        if reported is not None:
            is_value_error, text = reported
            raise ValueError(text) if is_value_error else RuntimeError(text)
    return next(name for name, _ in reports if name is not None)
