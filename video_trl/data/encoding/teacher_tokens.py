"""Compute the tokens of a frozen teacher once before a run, and cache them on disk as int8 with a scale per token."""

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...files import fingerprint
from ...teachers.base import TeacherTokens, VideoTeacher
from ..columns import MapDataset, column_names, undecoded
from ..video_io import read_video, source_name, video_hash
from .inventory import in_threads
from .processes import default_device, first_on_each_machine
from .store import EncodedDataset, EncodedWriter


logger = logging.getLogger(__name__)

_ROW_TYPE = "teacher"
_TOKENS_VERSION = 2  # raise it when the same tokens are stored as other numbers, so that old caches are not used


class TeacherTokenDataset(EncodedDataset):
    """
    Map-style dataset of a teacher's tokens, read from a folder of [`encode_teacher`]. Tensors are memory-mapped.

    A row is `{"teacher_tokens": int8 (F', N', D), "teacher_scale": float32 (F', N')}`; [`dequantise_tokens`] restores
    the tokens.

    Attributes:
        grid (`tuple[int, int, int]`): `(F', H', W')`, of all rows.
        frame_times (`torch.Tensor` of shape `(F',)`): Centre of each token frame, in frames of the clip.
        teacher (`str`): Identity of the teacher that made the tokens.

    Raises:
        ValueError: The folder holds no teacher's tokens, or a shard is missing or incomplete.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        super().__init__(directory)
        if self.row_type != _ROW_TYPE:
            raise ValueError(f"{self.directory} holds rows of type {self.row_type!r}, not a teacher's tokens.")
        frames, height, width = self._tensor(self.index.number_of("grid")).tolist()
        self.grid: tuple[int, int, int] = (frames, height, width)
        self.frame_times = self._tensor(self.index.number_of("frame_times"))
        self.teacher = str(self.encoder)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.index.row(index)
        return {name: self._tensor(row[name]) for name in ("teacher_tokens", "teacher_scale")}


def encode_teacher(
    dataset: MapDataset,
    teacher: VideoTeacher,
    *,
    column: str = "video",
    cache_dir: str | os.PathLike[str],
    num_frames: int | None = None,
    fps: float | None = None,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 8,
    device: torch.device | str | None = None,
) -> TeacherTokenDataset:
    """
    Encode the videos of a raw dataset with a teacher, or load the cached result.

    The cache is found by a fingerprint of everything that the tokens depend on: the content of every video, frames,
    size and frame rate, and the teacher's identity (weights, configuration, input size, code version). Each distinct
    video is encoded once. A folder gets its name only when it is whole. Under `torch.distributed` the first process of
    each machine does the work while the others wait. Afterwards the teacher is on the CPU.

    Args:
        dataset (`datasets.Dataset` or list of dicts): Raw rows.
        teacher (`VideoTeacher`): The encoder.
        column (`str`, defaults to `"video"`): Column with the videos.
        cache_dir (`str` or `Path`): Where encoded datasets are kept, one folder each.
        num_frames, fps, height, width: What the videos are brought to before the teacher sees them, as in
            `encode_dataset`; the teacher then resizes them to its own input size.
        batch_size (`int`, defaults to `8`): Videos in one call.
        device (`torch.device` or `str`, *optional*): Where to encode; the accelerator if there is one.

    Returns:
        [`TeacherTokenDataset`]: One row for each row of `dataset`, in its order.

    Raises:
        VideoDecodeError: A video is missing, damaged, truncated or too short.
        ValueError: There is no such column or no row; a video does not suit the teacher; the videos differ in size or
            length; the teacher returns values that are not finite.
        OSError: The cache cannot be written.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    if len(dataset) == 0:
        raise ValueError("The dataset has no rows. Pass at least one video.")
    if column not in column_names(dataset):
        raise ValueError(f"The dataset has no column {column!r}, only {', '.join(column_names(dataset))}.")
    pixels = {"num_frames": num_frames, "fps": fps, "height": height, "width": width}
    plain = undecoded(dataset)
    where = default_device() if device is None else torch.device(device)

    def build() -> str:
        return _build(plain, teacher, column, Path(cache_dir), pixels, batch_size, where)

    return TeacherTokenDataset(Path(cache_dir) / first_on_each_machine(build))


def quantise_tokens(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """
    Tokens in a quarter of the space: int8 values and one scale for each token.

    The relations that `trd_loss` compares hardly change: by 0.002 at most for tokens like a normal, by 0.01 where some
    channels are thirty times larger than the rest, against margins of 0.05 and 0.1.

    Args:
        tokens (`torch.Tensor` of shape `(..., D)`): Finite, any floating dtype.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: int8 `(..., D)` in [-127, 127], and float32 `(...,)`, 0 for a zero token.
    """
    tokens = tokens.float()
    scale = tokens.abs().amax(-1) / 127
    return (tokens / torch.where(scale > 0, scale, 1)[..., None]).round().to(torch.int8), scale


def dequantise_tokens(quantised: Tensor, scale: Tensor) -> Tensor:
    """float32 tokens `(..., D)` from what [`quantise_tokens`] returned."""
    return quantised.float() * scale[..., None]


def _build(
    dataset: MapDataset,
    teacher: VideoTeacher,
    column: str,
    cache_dir: Path,
    pixels: dict[str, Any],
    batch_size: int,
    device: torch.device,
) -> str:
    """Encode unless it is done already; the name of the folder in `cache_dir`."""
    cells = (dataset[number][column] for number in range(len(dataset)))
    digests = list(in_threads(video_hash, cells, len(dataset), "Hashing videos"))
    identity = fingerprint([_TOKENS_VERSION, teacher.identity, pixels, digests])
    directory = cache_dir / f"{_ROW_TYPE}-{identity}"
    if directory.is_dir():
        logger.info("Using the teacher's tokens in %s.", directory)
        return directory.name
    placed = teacher.to(device)
    try:
        with EncodedWriter(directory, _ROW_TYPE, identity, encoder=teacher.identity) as writer:
            if not writer.complete:
                first = _encode_rows(dataset, placed, column, digests, pixels, batch_size, writer)
                writer.add("grid", torch.tensor(first.grid))
                writer.add("frame_times", first.frame_times)
                rows = [
                    {"teacher_tokens": f"tokens/{digest}", "teacher_scale": f"scales/{digest}"} for digest in digests
                ]
                writer.finish(rows, [])
    finally:
        teacher.to("cpu")
    return directory.name


def _encode_rows(
    dataset: MapDataset,
    teacher: VideoTeacher,
    column: str,
    digests: list[str],
    pixels: dict[str, Any],
    batch_size: int,
    writer: EncodedWriter,
) -> TeacherTokens:
    """Encode each distinct video that is not there yet; the first batch in any case, whose tokens are returned."""
    first_rows = {digest: number for number, digest in reversed(list(enumerate(digests)))}
    rows = sorted(first_rows.values())
    first: TeacherTokens | None = None
    with tqdm(total=len(rows), desc="Encoding with the teacher") as progress:
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            progress.update(len(batch))
            if first is not None and all(f"scales/{digests[number]}" in writer for number in batch):
                continue
            sources = [dataset[number][column] for number in batch]
            names = [f"row {n}, {column} ({source_name(s)})" for n, s in zip(batch, sources, strict=True)]
            videos = [read_video(source, **pixels) for source in sources]
            for number, source, name in zip(batch, sources, names, strict=True):
                if video_hash(source) != digests[number]:
                    raise ValueError(f"{name}: the file has changed since encoding began. Start again.")
            encoded = teacher(_stack(videos, names))
            first = first or encoded
            _check_tokens(encoded, first, names)
            quantised, scales = quantise_tokens(encoded.tokens.cpu())
            for number, values, scale in zip(batch, quantised, scales, strict=True):
                writer.add(f"tokens/{digests[number]}", values)
                writer.add(f"scales/{digests[number]}", scale)
    assert first is not None
    return first


def _stack(videos: list[np.ndarray], names: list[str]) -> Tensor:
    """float `(B, T, 3, H, W)` in [0, 1]."""
    for video, name in zip(videos, names, strict=True):
        if video.shape != videos[0].shape:
            raise ValueError(
                f"{name}: expected (frames, height, width) {videos[0].shape[:3]} as of {names[0]}, got "
                f"{video.shape[:3]}. Set `num_frames`, `height` and `width`."
            )
    return torch.from_numpy(np.stack(videos)).movedim(-1, 2).float() / 255


def _check_tokens(encoded: TeacherTokens, first: TeacherTokens, names: list[str]) -> None:
    if encoded.grid != first.grid or not torch.equal(encoded.frame_times, first.frame_times):
        raise ValueError(
            f"{names[0]}: the teacher's grid is {encoded.grid}, that of the first video {first.grid}. Set "
            "`num_frames`, `height` and `width`."
        )
    finite = encoded.tokens.isfinite().flatten(1).all(1).tolist()
    if not all(finite):
        raise ValueError(
            f"{names[finite.index(False)]}: the teacher returned tokens that are not finite. Use float32."
        )
