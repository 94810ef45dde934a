"""Read and write encoded datasets: safetensors shards and an index, in a folder named only when it is complete."""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import Dataset

from ...files import atomic_folder, read_json, remove_leftovers
from ...models import ModelFamily
from ..columns import MapDataset, column_names


logger = logging.getLogger(__name__)

_INDEX_NAME = "index.json"
_SHARD_BYTES = 256 << 20  # a shard is built in memory before it is written


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
    only where the raw rows had them, and so `"weight"`, a float. A row of the video type is `{"prompt", "latents",
    "prompt_embeds"}`. For image-to-video, `"first_frame_latents"` and, where the model takes them, `"image_embeds"`
    `(L, D)` are added; for some families further embeddings of the prompt, or the `"frame_rate"` `()`. Latents are
    float32 and normalised as the transformer takes them, scores are float32; embeddings have the dtype of their
    encoder and no padding that the collator can add.

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

    Raises:
        ValueError: The folder is no encoded dataset, or a shard is missing or incomplete.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        index_path = self.directory / _INDEX_NAME
        if not index_path.is_file():
            raise ValueError(f"{self.directory} is not an encoded dataset: it has no {_INDEX_NAME}. Encode it again.")
        index = read_json(index_path)
        for name, size in index["shards"].items():
            shard = self.directory / name
            num_bytes = shard.stat().st_size if shard.is_file() else None
            if num_bytes != size:
                raise ValueError(
                    f"{shard}: expected {size} bytes, got {num_bytes}. Delete {self.directory} and encode again."
                )
        self.fingerprint: str = index["fingerprint"]
        self.row_type: str = index["row_type"]
        self.encoder: str | None = index.get("encoder")
        self.fps: float | None = index.get("fps")
        self.skipped = [SkippedRow(**row) for row in index["skipped"]]
        self._rows: list[dict[str, Any]] = index["rows"]
        self._shard_of: dict[str, str] = index["tensors"]
        self._shards: dict[str, Any] = {}

    @property
    def column_names(self) -> list[str]:
        return list(self[0])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._rows[index]
        example: dict[str, Any] = {"prompt": row["prompt"]}
        if self.row_type == "video":
            example["latents"] = self._tensor(row["video"])
        else:
            example["chosen_latents"] = self._tensor(row["chosen"])
            example["rejected_latents"] = torch.stack([self._tensor(key) for key in row["rejected"]])
        example["prompt_embeds"] = self._tensor(row["prompt_embeds"])
        example.update({column: self._tensor(key) for column, key in row.get("conditions", {}).items()})
        if row.get("rejected_scores") is not None:
            example["rejected_scores"] = torch.tensor(row["rejected_scores"], dtype=torch.float32)
        if "weight" in row:
            example["weight"] = row["weight"]
        return example

    def latents_shapes(self) -> list[list[tuple[int, ...]]]:
        """The shapes `(C, F, H, W)` of the latents in every row, chosen ones first, from the headers of the files."""
        shape_of: dict[str, tuple[int, ...]] = {}
        for shard in sorted(set(self._shard_of.values())):
            with safe_open(self.directory / shard, framework="pt") as file:
                shape_of.update({key: tuple(file.get_slice(key).get_shape()) for key in file.keys()})  # noqa: SIM118
        of_one = self.row_type == "video"
        keys_of_rows = [[row["video"]] if of_one else [row["chosen"], *row["rejected"]] for row in self._rows]
        return [[shape_of[key] for key in keys] for keys in keys_of_rows]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shards": {}}  # every worker maps the files itself

    def _tensor(self, key: str) -> Tensor:
        name = self._shard_of[key]
        if name not in self._shards:
            self._shards[name] = safe_open(self.directory / name, framework="pt", device="cpu")
        return self._shards[name].get_tensor(key)


def check_conditions(dataset: MapDataset, family: ModelFamily) -> None:
    """
    Check that encoded rows carry what a transformer is conditioned on.

    Args:
        dataset (`MapDataset`): Encoded rows.
        family ([`ModelFamily`]): Of the transformer that is to be trained on them.

    Raises:
        ValueError: If a column is missing, or the rows are known to be encoded for another family of models.
    """
    if isinstance(dataset, EncodedDataset) and dataset.encoder is not None:
        # A family shares its VAE and text encoder; `"wan"` and `"wan-i2v"` are two forms of one.
        if dataset.encoder.split("-")[0] != family.name.split("-")[0]:
            raise ValueError(
                f"{dataset.directory} was encoded for {dataset.encoder!r}, but the transformer is {family.name!r}: "
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
    Write tensors and rows into a temporary folder, which becomes `directory` on leaving the context; an exception
    removes it. If another process has finished the same folder meanwhile, that one stays.

    ```python
    with EncodedWriter(directory, "group", fingerprint) as writer:
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
        self._tensors: dict[str, str] = {}
        self._pending: dict[str, Tensor] = {}

    def __enter__(self) -> "EncodedWriter":
        remove_leftovers(self._directory.parent)
        self._folder = atomic_folder(self._directory, replace=False)
        self._partial = self._folder.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert kind is not None or (self._partial / _INDEX_NAME).is_file(), "`finish` was not called"
        try:
            self._folder.__exit__(kind, error, traceback)
        except FileExistsError:
            if not (self._directory / _INDEX_NAME).is_file():
                raise
            logger.info("%s was finished by another process meanwhile; using it.", self._directory)

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    def add(self, key: str, tensor: Tensor) -> None:
        """Keep a tensor for the current shard; a full shard is written."""
        assert key not in self._tensors, key
        self._tensors[key] = f"{len(self._shards):05d}.safetensors"
        self._pending[key] = tensor.detach().cpu().contiguous()
        if sum(tensor.nbytes for tensor in self._pending.values()) >= self._shard_bytes:
            self._flush()

    def finish(self, rows: list[Mapping[str, Any]], skipped: list[SkippedRow]) -> None:
        """Write the rest and the index."""
        if self._pending:
            self._flush()
        index = {
            "fingerprint": self._fingerprint,
            "row_type": self._row_type,
            "encoder": self._encoder,
            "fps": self._fps,
            "shards": self._shards,
            "tensors": self._tensors,
            "rows": rows,
            "skipped": [asdict(row) for row in skipped],
        }
        (self._partial / _INDEX_NAME).write_text(json.dumps(index))

    def _flush(self) -> None:
        name = f"{len(self._shards):05d}.safetensors"
        self._shards[name] = (self._partial / name).write_bytes(safetensors.torch.save(self._pending))
        self._pending = {}
