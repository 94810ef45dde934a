"""Dataset rows with a teacher's tokens, or with the pixels that it encodes during training; their collator."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...data import GroupCollator, VideoCollator, column_names
from ...data.columns import MapDataset, fingerprint_of
from ...data.encoding.teacher_tokens import TeacherTokenDataset
from ...data.video_io import read_video
from ...files import fingerprint


#: What a row of an encoded dataset needs besides latents and prompt embeddings: int8 tokens `(F', N', D)` with float
#: scales `(F', N')`, the grid `(F', H', W')` of the tokens, and the centre of each token frame, in pixel frames.
TEACHER_COLUMNS = ("teacher_tokens", "teacher_scale", "teacher_grid", "teacher_frame_times")


def has_teacher_tokens(dataset: MapDataset) -> bool:
    """Whether the rows of a dataset carry the teacher's tokens already."""
    return set(TEACHER_COLUMNS) <= set(column_names(dataset))


def check_teacher_rows(rows: MapDataset, shapes: Sequence[tuple[int, ...]]) -> None:
    """
    Check what every row carries for the teacher, before the first step; nothing but the teacher's columns is read.

    Args:
        rows (`MapDataset`): Encoded video rows with `TEACHER_COLUMNS`.
        shapes (`Sequence[tuple[int, ...]]`): Shape of the latents in each row; rows of one shape share a batch.

    Raises:
        ValueError: If a row lacks a column, has scales that are not finite, or differs from the others with the same
            latents in the shape of its tokens or their places. Names the row.
    """
    if isinstance(rows, datasets.Dataset):
        rows = rows.select_columns(list(TEACHER_COLUMNS)).with_format("numpy")
    first: dict[tuple[int, ...], tuple[int, list[Any]]] = {}
    for number in tqdm(range(len(rows)), desc="Checking teacher tokens", delay=2):
        row = rows[number]
        missing = [name for name in TEACHER_COLUMNS if row.get(name) is None]
        if missing:
            raise ValueError(f"Row {number}: expected a value in {missing}, got none. Encode it again, or drop it.")
        tokens, scale, grid, times = (torch.as_tensor(row[name]) for name in TEACHER_COLUMNS)
        if not scale.isfinite().all():
            raise ValueError(f"Row {number}: 'teacher_scale' is not finite. Encode it again in float32, or drop it.")
        form = [tuple(tokens.shape), tuple(scale.shape), grid.tolist(), times.tolist()]
        other, expected = first.setdefault(shapes[number], (number, form))
        if form != expected:
            raise ValueError(
                f"Row {number}: expected (shapes of tokens and scales, grid, frame times) {expected} as in row "
                f"{other}, whose latents have the same shape, got {form}. Encode all rows with one teacher."
            )


class TeacherRows:
    """
    Encoded video rows with the teacher's tokens beside them: rows of [`VideoREPATrainer`] in their final form.

    Args:
        rows (`MapDataset`): Encoded video rows, such as an `EncodedDataset`.
        tokens (`TeacherTokenDataset`): What `encode_teacher` made of the same videos, row by row.

    Raises:
        ValueError: If there are not as many tokens as rows.
    """

    def __init__(self, rows: MapDataset, tokens: TeacherTokenDataset) -> None:
        if len(rows) != len(tokens):
            raise ValueError(
                f"Expected the teacher's tokens of {len(rows)} videos, got those of {len(tokens)}. Encode both from "
                "the same dataset."
            )
        self.rows, self.tokens, self.made_of = rows, tokens, rows
        self._place = {
            "teacher_grid": torch.tensor(tokens.grid),
            "teacher_frame_times": torch.as_tensor(tokens.frame_times, dtype=torch.float32),
        }

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return {**self.rows[index], **self.tokens[index], **self._place}

    @property
    def column_names(self) -> list[str]:
        return [*column_names(self.rows), *TEACHER_COLUMNS]

    @property
    def fingerprint(self) -> str | None:
        rows = fingerprint_of(self.rows)
        return None if rows is None else fingerprint(rows, self.tokens.fingerprint)


class PixelRows:
    """
    Encoded video rows with the frames of their video, for a teacher that looks at them in every step.

    Args:
        rows (`MapDataset`): Encoded video rows.
        videos (`MapDataset`): The raw rows that they were made from, one by one, column `video`.
        pixels (`dict`): Keyword arguments of `read_video` that `rows` were encoded with.
    """

    def __init__(self, rows: MapDataset, videos: MapDataset, pixels: Mapping[str, Any]) -> None:
        assert len(rows) == len(videos), (len(rows), len(videos))
        self.rows, self.videos, self.pixels, self.made_of = rows, videos, dict(pixels), rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        video = read_video(self.videos[index]["video"], **self.pixels)
        return {**self.rows[index], "video": torch.from_numpy(video)}

    @property
    def column_names(self) -> list[str]:
        return [*column_names(self.rows), "video"]


class SelectedRows:
    """Some rows of a dataset of any kind, in the order given."""

    def __init__(self, rows: MapDataset, indices: Iterable[int]) -> None:
        self.rows, self.indices = rows, list(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self.rows[self.indices[index]]

    @property
    def column_names(self) -> list[str]:
        return column_names(self.rows)


def stack_teacher(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """
    Stack what rows carry for the teacher; nothing where they carry nothing.

    Returns:
        `dict`: `teacher_tokens` int8 `(B, F', N', D)`, `teacher_scale` `(B, F', N')`, `teacher_grid` int64 `(3,)` and
        `teacher_frame_times` float32 `(F',)`; or `video` uint8 `(B, T, H, W, 3)`.

    Raises:
        ValueError: If the tokens or videos of the rows differ in shape or place.
    """
    batch = {}
    names = [name for name in ("video", *TEACHER_COLUMNS) if name in rows[0]]
    for name in names:
        tensors = [torch.as_tensor(row[name]) for row in rows]
        if any(tensor.shape != tensors[0].shape for tensor in tensors):
            shapes = {int(row["index"]): tuple(tensor.shape) for row, tensor in zip(rows, tensors, strict=True)}
            raise ValueError(
                f"'{name}' must have one shape in a batch, got (by row) {shapes}. Set `num_frames`, `height` and "
                "`width`, or train with a batch size of 1."
            )
        batch[name] = torch.stack(tensors)
    for name in ("teacher_grid", "teacher_frame_times"):
        if name in batch:
            if not (batch[name] == batch[name][0]).all():
                raise ValueError(f"'{name}' must agree in a batch, got {batch[name].tolist()}. Use one teacher size.")
            batch[name] = batch[name][0]
    return batch


@dataclass(frozen=True)
class TeacherVideoCollator(VideoCollator):
    """Stack video rows, as [`VideoCollator`] does, and what they carry for the teacher: see [`stack_teacher`]."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        return super().__call__(rows) | stack_teacher(rows)


@dataclass(frozen=True)
class TeacherGroupCollator(GroupCollator):
    """Stack group rows, as [`GroupCollator`] does, and what they carry for the teacher: see [`stack_teacher`]."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        return super().__call__(rows) | stack_teacher(rows)
