"""
Read and write encoded datasets: safetensors shards and an index, in a folder named only when it is complete.

Every tensor has a checksum, in the header of its shard while the folder is filled and in the index afterwards, and is
compared with it whenever it is read. `index.json` says what all rows share and names the tables of the index, with
their checksums.
"""

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from ...files import (
    file_checksum,
    read_json,
    remove_leftovers,
    resumable_folder,
    tensor_checksum,
    unfinished_folders,
    write_atomically,
    write_json,
)
from ...models import ModelFamily
from ..columns import MapDataset, column_names
from .index import EncodedIndex, Form, write_index


logger = logging.getLogger(__name__)

_INDEX_NAME = "index.json"
_FORMAT = 3
_CHECKSUMS_KEY = "checksums"  # in the header of a shard
_LATENTS = {"video": "latents", "chosen": "chosen_latents", "rejected": "rejected_latents"}  # in the index, in rows
_SHARD_BYTES = 256 << 20  # a shard is built in memory before it is written
# A shard is written earlier where a kill would lose more than so much time, or so large a proportion of it.
_SECONDS_AT_STAKE, _PROPORTION_AT_STAKE = 5.0, 0.01


@dataclass(frozen=True)
class SkippedRow:
    """A row of the raw dataset that was left out: its number, its first video that cannot be read, and why."""

    row: int
    video: str
    reason: str


class EncodedDataset(Dataset[dict[str, Any]]):
    """
    Map-style dataset of encoded rows, read from a folder that `encode_dataset` wrote. Tensors are memory-mapped.

    A row of the group or preference type is `{"prompt": str, "chosen_latents": (C, F, H, W), "rejected_latents":
    (m, C, F, H, W), "prompt_embeds": (L_i, D), "rejected_scores": (m, 2)}`, the scores (columns `sa`, `pc`, in [0, 1])
    only where the raw rows had them, and so `"weight"`, a float, and `"loss_weights"`, `(F,)` or `(F, H, W)`. A row of
    the video type is `{"prompt", "latents", "prompt_embeds"}`. For image-to-video, `"first_frame_latents"` and, where
    the model takes them, `"image_embeds"` `(L, D)` are added; for some families further embeddings of the prompt, or
    the `"frame_rate"` `()`. Latents are float32 and normalised as the transformer takes them, scores are float32;
    embeddings have the dtype of their encoder and no padding that the collator can add.

    Args:
        directory (`str` or `Path`): The folder.

    Attributes:
        directory (`Path`): The folder.
        fingerprint (`str`): Hash of everything that the numbers depend on.
        row_type (`str`): `"video"`, `"preference"` or `"group"`.
        encoder (`str`): Name of the model family, or identity of the teacher, that encoded it; `None` if that is not
            recorded.
        fps (`float`): Frames per second that the videos were brought to, else those of the first one; `None` if it is
            an array, which has no clock, or that is not recorded.
        skipped (`list[SkippedRow]`): Rows of the raw dataset that were left out, by `on_bad_video="skip"`.
        forms (`list[dict]`): The distinct shapes of rows: that of the tensor, or of each, under every column.
        index ([`~video_trl.data.encoding.index.EncodedIndex`]): Its rows without their tensors.

    Raises:
        ValueError: The folder is no encoded dataset, or a shard is missing or incomplete.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        index_path = self.directory / _INDEX_NAME
        if not index_path.is_file():
            raise ValueError(f"{self.directory} is not an encoded dataset: it has no {_INDEX_NAME}. Encode it again.")
        index = self._read_index(index_path)
        for name, size in index["shards"].items():
            shard = self.directory / name
            num_bytes = shard.stat().st_size if shard.is_file() else None
            if num_bytes != size:
                raise ValueError(f"{shard}: expected {size} bytes, got {num_bytes}. {self._way_out}")
        self.fingerprint: str = index["fingerprint"]
        self.row_type: str = index["row_type"]
        self.encoder: str | None = index.get("encoder")
        self.fps: float | None = index.get("fps")
        self.skipped = [SkippedRow(**row) for row in index["skipped"]]
        self.forms: list[Form] = index["forms"]
        for name, checksum in index["tables"].items():
            table = self.directory / name
            if not table.is_file() or file_checksum(table) != checksum:
                raise ValueError(f"{table} is missing or damaged. {self._way_out}")
        self.index = EncodedIndex(self.directory)
        self._shards: dict[str, Any] = {}

    @property
    def column_names(self) -> list[str]:
        """Columns that some row has."""
        return [_LATENTS.get(name, name) for name in self.index.present]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.index.row(index)
        example: dict[str, Any] = {"prompt": row["prompt"]}
        if self.row_type == "video":
            example["latents"] = self._tensor(row["video"])
        else:
            example["chosen_latents"] = self._tensor(row["chosen"])
            example["rejected_latents"] = torch.stack([self._tensor(number) for number in row["rejected"]])
        others = [column for column in self.index.columns if column not in _LATENTS and row[column] is not None]
        example.update({column: self._tensor(row[column]) for column in others})
        if row.get("rejected_scores") is not None:
            example["rejected_scores"] = torch.tensor(row["rejected_scores"], dtype=torch.float32)
        if row.get("weight") is not None:
            example["weight"] = row["weight"]
        return example

    def rejected_counts(self) -> list[int]:
        """Number of rejected videos of each row; no tensor is read."""
        return self.index.rejected_counts()

    def rejected_scores(self) -> Iterator[Any]:
        """The judge's scores of each row, or none; no tensor is read."""
        return self.index.rejected_scores()

    def scores_are_whole(self) -> bool:
        """Whether every rejected video has an `(sa, pc)` in [0, 1]; no tensor is read."""
        return self.index.scores_are_whole()

    def loss_weights(self) -> Iterator[Tensor | None]:
        """Weights of the latents' elements in each row, or none; no other tensor is read."""
        return (None if number is None else self._tensor(number) for number in self.index.numbers("loss_weights"))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shards": {}}  # every worker maps the files itself

    def _tensor(self, number: int) -> Tensor:
        key, name, checksum = self.index.tensor(number)
        try:
            tensor: Tensor = self._open(name).get_tensor(key)
            intact = tensor_checksum(tensor) == checksum
        except SafetensorError as error:
            raise ValueError(f"{self.directory / name} is damaged: {key}: {error}. {self._way_out}") from error
        if not intact:
            raise ValueError(f"{self.directory / name} is damaged: the checksum of {key} differs. {self._way_out}")
        return tensor

    def _open(self, shard: str) -> Any:
        if shard not in self._shards:
            try:
                self._shards[shard] = safe_open(self.directory / shard, framework="pt", device="cpu")
            except SafetensorError as error:
                raise ValueError(f"{self.directory / shard} is damaged: {error}. {self._way_out}") from error
        return self._shards[shard]

    def _read_index(self, path: Path) -> dict[str, Any]:
        try:
            index = read_json(path)
        except ValueError as error:
            raise ValueError(f"{error} {self._way_out}") from error
        if not isinstance(index, dict) or index.get("format") != _FORMAT:
            raise ValueError(f"{path} is not in format {_FORMAT}, the one that this version reads. {self._way_out}")
        if index.pop("checksum", None) != _index_checksum(index):
            raise ValueError(f"{path} is damaged: its checksum differs. {self._way_out}")
        return index

    @property
    def _way_out(self) -> str:
        return f"Delete {self.directory} and encode again."


@runtime_checkable
class MadeOfRows(Protocol):
    """Rows that are made of others, of all or of some."""

    made_of: MapDataset


def encoded_origin(dataset: MapDataset) -> EncodedDataset | None:
    """The encoded dataset that rows are, or are made of; `None` if there is none."""
    while isinstance(dataset, MadeOfRows):
        dataset = dataset.made_of
    return dataset if isinstance(dataset, EncodedDataset) else None


def check_conditions(dataset: MapDataset, family: ModelFamily) -> None:
    """
    Check that encoded rows carry what a transformer is conditioned on.

    Args:
        dataset (`MapDataset`): Encoded rows.
        family ([`ModelFamily`]): Of the transformer that is to be trained on them.

    Raises:
        ValueError: If a column is missing, or the rows are known to be encoded for another family of models.
    """
    origin = encoded_origin(dataset)
    if origin is not None and origin.encoder is not None:
        # A family shares its VAE and text encoder; `"wan"` and `"wan-i2v"` are two forms of one.
        if origin.encoder.split("-")[0] != family.name.split("-")[0]:
            raise ValueError(
                f"{origin.directory} was encoded for {origin.encoder!r}, but the transformer is {family.name!r}: "
                "latents of one mean nothing to the other. Encode the videos with the pipeline that is trained."
            )
    columns = column_names(dataset)
    missing = [name for name in family.row_columns if name not in columns]
    if missing:
        raise ValueError(
            f"The transformer ({family.name!r}) is conditioned on {list(family.row_columns)}, and the encoded "
            f"rows lack {missing}; they have {columns}. Encode the videos again, with the pipeline that is trained."
        )


class EncodedWriter:
    """
    Write tensors and rows into a folder that gets its name, `directory`, on leaving the context.

    One process writes at a time; others wait. What a process that was killed, or failed, has written is there again
    for the next one, which asks for it by `key in writer`. If another process has finished the folder meanwhile,
    `complete` is true and there is nothing to add.

    ```python
    with EncodedWriter(directory, "group", fingerprint) as writer:
        if not writer.complete:
            writer.add("videos/0", latents)
            writer.finish(rows, skipped)
    ```
    """

    def __init__(
        self,
        directory: Path,
        row_type: str,
        fingerprint: str,
        *,
        encoder: str | None = None,
        fps: float | None = None,
        shard_bytes: int = _SHARD_BYTES,
    ) -> None:
        self._directory, self._row_type, self._fingerprint = directory, row_type, fingerprint
        self._encoder, self._fps, self._shard_bytes = encoder, fps, shard_bytes
        self._shards: dict[str, int] = {}
        self._tensors: dict[str, tuple[str, str, list[int]]] = {}  # shard, checksum and shape
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0

    def __enter__(self) -> "EncodedWriter":
        remove_leftovers(self._directory.parent)
        for other in unfinished_folders(self._directory.parent):
            if not other.name.startswith(f".{self._directory.name}."):
                logger.info("%s holds an unfinished encoding of other data; delete it if no one wants it.", other)
        self._context: AbstractContextManager[Path | None] = resumable_folder(self._directory)
        self._folder = self._context.__enter__()
        if self._folder is not None:
            self._find_shards(self._folder)
        self._started = self._written = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert kind is not None or self.complete or (self._partial / _INDEX_NAME).is_file(), "`finish` was not called"
        self._context.__exit__(kind, error, traceback)

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    @property
    def complete(self) -> bool:
        """Whether another process has finished the folder."""
        return self._folder is None

    @property
    def _partial(self) -> Path:
        assert self._folder is not None, "the folder is complete"
        return self._folder

    def add(self, key: str, tensor: Tensor) -> None:
        """
        Keep a tensor for the current shard, unless it is there already; a full shard is written. Numbers that are not
        finite are refused.
        """
        if key in self._tensors:
            return
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{key}: encoding it returned numbers that are not finite. Use an encoder in float32.")
        tensor = tensor.detach().cpu().contiguous()
        self._tensors[key] = (f"{len(self._shards):05d}.safetensors", tensor_checksum(tensor), list(tensor.shape))
        self._pending[key] = tensor
        self._pending_bytes += tensor.nbytes
        now = time.monotonic()
        at_stake = max(_SECONDS_AT_STAKE, _PROPORTION_AT_STAKE * (now - self._started))
        if self._pending_bytes >= self._shard_bytes or now - self._written >= at_stake:
            self._flush()

    def finish(self, rows: Sequence[Mapping[str, Any]], skipped: list[SkippedRow]) -> None:
        """Write the rest and the index. Rows are as `write_index` takes them."""
        if self._pending:
            self._flush()
        forms, tables = write_index(self._partial, rows, self._tensors)
        index = {
            "format": _FORMAT,
            "fingerprint": self._fingerprint,
            "row_type": self._row_type,
            "encoder": self._encoder,
            "fps": self._fps,
            "shards": self._shards,
            "tables": tables,
            "forms": forms,
            "skipped": [asdict(row) for row in skipped],
        }
        write_json(self._partial / _INDEX_NAME, index | {"checksum": _index_checksum(index)})

    def _flush(self) -> None:
        name = f"{len(self._shards):05d}.safetensors"
        checksums = {key: self._tensors[key][1] for key in self._pending}
        content = safetensors.torch.save(self._pending, {_CHECKSUMS_KEY: json.dumps(checksums)})
        write_atomically(self._partial / name, content)
        self._shards[name] = len(content)
        self._pending, self._pending_bytes, self._written = {}, 0, time.monotonic()

    def _find_shards(self, folder: Path) -> None:
        """Take over what a process before this one has written; shards after a damaged one are written again."""
        (folder / _INDEX_NAME).unlink(missing_ok=True)
        for shard in sorted(folder.glob("*.safetensors")):
            found = _tensors_in(shard) if shard.name == f"{len(self._shards):05d}.safetensors" else None
            if found is None:
                shard.unlink()
                continue
            self._shards[shard.name] = shard.stat().st_size
            self._tensors.update({key: (shard.name, checksum, shape) for key, (checksum, shape) in found.items()})
        if self._tensors:
            logger.info("Going on with an unfinished encoding: %d tensors are there.", len(self._tensors))


def _tensors_in(shard: Path) -> dict[str, tuple[str, list[int]]] | None:
    """Checksum, from the header of the shard, and shape of its tensors; none where a tensor has another checksum."""
    found = {}
    try:
        with safe_open(shard, framework="pt") as file:
            for key, checksum in json.loads(file.metadata()[_CHECKSUMS_KEY]).items():
                tensor = file.get_tensor(key)
                if tensor_checksum(tensor) != checksum:
                    return None
                found[key] = (checksum, list(tensor.shape))
    except (SafetensorError, KeyError, TypeError, ValueError):
        return None
    return found


def _index_checksum(index: Mapping[str, Any]) -> str:
    return tensor_checksum(json.dumps(index, sort_keys=True))
