"""
Errors of the reference, computed before training for a bank of K fixed noises per sample.

The reference never changes, so its error on a video, a noise and a timestep needs computing once. Training with fresh
noise in every step never meets the same twice; with a bank it does, from the (K + 1)-th epoch on at the latest.
"""

import hashlib
import json
import logging
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from ...data import EncodedDataset
from ...data.columns import as_tensor
from ..setup.rows import IndexedDataset
from .noise import EVALUATION_STEP


logger = logging.getLogger(__name__)

_VERSION = 1  # of the way in which noise is drawn and errors are computed
_FIRST_STEP = EVALUATION_STEP - 1  # draw k of the bank is made under step _FIRST_STEP - k, which no training reaches


def bank_step(number: int) -> int:
    """Step under which the noise with this number, in [0, K), is drawn."""
    return _FIRST_STEP - number


class ReferenceBank:
    """
    Errors of the reference on every video of every row, for each noise of the bank.

    Args:
        seed (`int`): Seed of the run.
        errors (`Sequence[torch.Tensor]`): For each row, `(K, V)` float32, the V videos in the order of the loss.
    """

    def __init__(self, seed: int, errors: Sequence[Tensor]) -> None:
        self.errors = errors
        self._seed, self._size = seed, len(errors[0])

    def number(self, step: int, index: int) -> int:
        """Which noise, in [0, K), a row sees at an optimizer step: uniform, a function of (seed, step, row)."""
        packed = struct.pack("<3q", self._seed, step, index)
        return int.from_bytes(hashlib.blake2b(packed, digest_size=8, person=b"bank").digest(), "little") % self._size

    def look_up(self, step: int, indices: Sequence[int]) -> Tensor:
        """Errors `(N,)` of the videos of these rows, side by side, with the noise that they see at this step."""
        return torch.cat([self.errors[index][self.number(step, index)] for index in indices])


def fill(
    rows: IndexedDataset,
    size: int,
    batch_size: int,
    errors_of: Callable[[list[int], int], Tensor],
    *,
    rank: int,
    num_ranks: int,
) -> list[Tensor]:
    """
    Compute the errors of a bank, the rows divided among the processes.

    Batches are of one shape and always full, the last ones with rows repeated: kernels, and with them the last bits,
    are those of training.

    Args:
        rows (`IndexedDataset`): The rows of training.
        size (`int`): Noises K per row.
        batch_size (`int`): Rows of a micro-batch.
        errors_of (`Callable`): Indices of rows and the number of a noise to errors `(len(indices) * V,)`.
        rank (`int`), num_ranks (`int`): Which of the shares of the rows this process computes, with those with which
            it shares rows. Every process must call this, and makes as many batches.
    """
    batches = _full_batches(rows, batch_size)
    of_each = -(-len(batches) // num_ranks)
    mine = [batches[(rank + turn * num_ranks) % len(batches)] for turn in range(of_each)]
    found: list[tuple[int, Tensor]] = []
    for indices in tqdm(mine, desc="Errors of the reference", disable=not PartialState().is_main_process):
        errors = [errors_of(indices, number).view(len(indices), -1) for number in range(size)]
        together = torch.stack(errors, dim=1).float().cpu()  # (B, K, V)
        found.extend(zip(indices, together.unbind(), strict=True))
    return [errors for _, errors in sorted(dict(gather_object(found)).items())]


def _full_batches(rows: IndexedDataset, batch_size: int) -> list[list[int]]:
    of_shape: dict[tuple[int, ...], list[int]] = {}
    for index, shape in enumerate(rows.shapes):
        of_shape.setdefault(tuple(shape), []).append(index)
    return [
        [members[(start + offset) % len(members)] for offset in range(batch_size)]
        for members in of_shape.values()
        for start in range(0, len(members), batch_size)
    ]


def bank_path(directory: Path, rows: IndexedDataset, settings: Mapping[str, Any]) -> Path:
    """Where a bank is kept: its name is a hash of the rows' contents and of the settings it depends on."""
    described = {**settings, "rows": _fingerprint(rows), "version": _VERSION}
    digest = hashlib.blake2b(json.dumps(described, sort_keys=True, default=str).encode(), digest_size=16)
    return directory / "reference_errors" / f"{digest.hexdigest()}.safetensors"


def _fingerprint(rows: IndexedDataset) -> str:
    if isinstance(rows.rows, EncodedDataset):
        return rows.rows.fingerprint
    digest = hashlib.blake2b(digest_size=16)
    for number in range(len(rows.rows)):
        for name, value in sorted(rows.rows[number].items()):
            digest.update(name.encode())
            if isinstance(value, str):
                digest.update(value.encode())
            else:
                tensor = as_tensor(value)
                digest.update(str((tensor.shape, tensor.dtype)).encode())
                digest.update(tensor.flatten().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_bank(path: Path, errors: Sequence[Tensor]) -> None:
    """Write the errors of all rows; the file is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    shapes = torch.tensor([tuple(row.shape) for row in errors])
    safetensors.torch.save_file({"errors": torch.cat([row.flatten() for row in errors]), "shapes": shapes}, partial)
    os.replace(partial, path)


def load_bank(path: Path) -> list[Tensor]:
    """Read what `save_bank` wrote."""
    stored = safetensors.torch.load_file(path)
    shapes = stored["shapes"].tolist()
    parts = stored["errors"].split([size * videos for size, videos in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
