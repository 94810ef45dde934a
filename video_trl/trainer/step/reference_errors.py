"""
Cache the errors of the reference, computed before training for K fixed noises per row.

The reference never changes, so its error on a video, a noise and a timestep needs computing once. Training with new
noise in every step never meets the same twice; with K noises it does, from the (K + 1)-th epoch on at the latest.
"""

import hashlib
import logging
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm import tqdm

from ...data import EncodedDataset
from ...data.columns import as_tensor
from ...files import fingerprint
from ...hub.lora import read_tensors, write_tensors
from ..setup.rows import IndexedDataset
from .denoising import EVALUATION_STEP, Denoising, to_device
from .passes import Beside, CheckedPasses, Passes, Reference


logger = logging.getLogger(__name__)

_VERSION = 1  # of the way in which noise is drawn and errors are computed
_FIRST_STEP = EVALUATION_STEP - 1  # noise k is drawn under step _FIRST_STEP - k, which no training reaches


def cached_step(number: int) -> int:
    """Step under which the noise with this number, in [0, K), is drawn."""
    return _FIRST_STEP - number


class CachedReferenceErrors:
    """
    Errors of the reference on every video of every row, for each of the K noises.

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


class CachedPasses:
    """
    Passes whose reference is looked up in training, once its errors are there.

    Args:
        passes ([`Passes`]): Compute the errors.
        checked ([`CheckedPasses`], *optional*): The same, compared in the first step.
        reference ([`Reference`]): Makes room while its errors are looked up.
        seed (`int`): Seed of the run.
        device (`torch.device`): Where errors are needed.
        now (`Callable`): Optimizer steps done so far, or `EVALUATION_STEP`.

    Attributes:
        errors ([`CachedReferenceErrors`], *optional*): Once they are there.
    """

    def __init__(
        self,
        passes: Passes,
        checked: CheckedPasses | None,
        reference: Reference,
        *,
        seed: int,
        device: torch.device,
        now: Callable[[], int],
    ) -> None:
        self._passes, self._checked, self._reference = passes, checked, reference
        self._seed, self._device, self._now = seed, device, now
        self.errors: CachedReferenceErrors | None = None
        self._number: int | None = None  # of the noise on which the reference is being measured
        self._measured: Tensor

    def noise_steps(self, indices: Sequence[int]) -> list[int]:
        """The step under which each sample draws its noise: one of those whose errors are known, in training."""
        if self._number is not None:
            return [cached_step(self._number)] * len(indices)
        now = self._now()
        if self.errors is None or now == EVALUATION_STEP:
            return [now] * len(indices)
        return [cached_step(self.errors.number(now, index)) for index in indices]

    def reference(self, denoising: Denoising, indices: Iterable[int]) -> Tensor:
        if self._number is not None:
            self._measured = self._passes.reference(denoising, indices)
            return self._measured
        if self.errors is None or self._now() == EVALUATION_STEP:
            return (self._checked or self._passes).reference(denoising, indices)
        if self._checked is not None and self._checked.is_due:
            # Cached errors may come from other batches or another machine: their last bits promise nothing.
            self._checked.reference(denoising, indices)
        self._reference.set_aside()  # until an evaluation
        return to_device(self._device, self.errors.look_up(self._now(), [int(index) for index in indices]))[0]

    def policy(self, model: nn.Module, denoising: Denoising, beside: Beside | None = None) -> Tensor:
        if self._number is not None:  # nobody asks for the loss
            return self._measured
        return (self._checked or self._passes).policy(model, denoising, beside)

    def backward(self) -> None:
        self._passes.backward()

    def measure(self, number: int, compute_loss: Callable[[], object]) -> Tensor:
        """Errors `(N,)` of the reference on the videos that a loss compares, with the noise of this number."""
        self._number = number
        try:
            with torch.no_grad():
                compute_loss()
        finally:
            self._number = None
        return self._measured

    def fill(self, path: Path, compute: Callable[[], list[Tensor]], accelerator: Accelerator) -> None:
        """
        Take the errors from a file where every process sees one, else compute them. Every process must call this.

        Args:
            path (`Path`): Where they are kept.
            compute (`Callable`): Makes them, see [`compute_errors`].
            accelerator (`Accelerator`): Of the trainer.
        """
        exists = torch.tensor(float(path.is_file()), device=self._device)
        if accelerator.reduce(exists, "mean") == 1:
            logger.info("Errors of the reference are taken from %s.", path)
            errors = load_errors(path)
        else:
            errors = compute()
            if accelerator.is_main_process:
                save_errors(path, errors)
        self.errors = CachedReferenceErrors(self._seed, errors)


def compute_errors(
    rows: IndexedDataset,
    size: int,
    batch_size: int,
    errors_of: Callable[[list[int], int], Tensor],
    *,
    rank: int,
    num_ranks: int,
) -> list[Tensor]:
    """
    Compute the errors of the reference, the rows divided among the processes.

    Batches are of one shape and always full, the last ones with rows repeated: kernels, and with them the last bits,
    are those of training.

    Args:
        rows (`IndexedDataset`): The rows of training.
        size (`int`): Noises K per row.
        batch_size (`int`): Rows of a micro-batch.
        errors_of (`Callable`): Indices of rows and the number of a noise to errors `(len(indices) * V,)`.
        rank (`int`), num_ranks (`int`): Which part of the rows this process computes, of how many. Processes that
            work on a row together have the same rank. Every process must call this, and makes as many batches.
    """
    batches = _full_batches(rows, batch_size)
    of_each = -(-len(batches) // num_ranks)
    mine = [batches[(rank + turn * num_ranks) % len(batches)] for turn in range(of_each)]
    row_errors: list[tuple[int, Tensor]] = []
    for indices in tqdm(mine, desc="Errors of the reference", disable=not PartialState().is_main_process):
        errors = [errors_of(indices, number).view(len(indices), -1) for number in range(size)]
        together = torch.stack(errors, dim=1).float().cpu()  # (B, K, V)
        if not together.isfinite().all():
            raise ValueError(
                f"Rows {indices}: the reference's errors are not finite. Look at their latents, or load the model in "
                "float32 or bfloat16."
            )
        row_errors.extend(zip(indices, together.unbind(), strict=True))
    return [errors for _, errors in sorted(dict(gather_object(row_errors)).items())]


def _full_batches(rows: IndexedDataset, batch_size: int) -> list[list[int]]:
    of_shape: dict[tuple[int, ...], list[int]] = {}
    for index, shape in enumerate(rows.shapes):
        of_shape.setdefault(tuple(shape), []).append(index)
    return [
        [members[(start + offset) % len(members)] for offset in range(batch_size)]
        for members in of_shape.values()
        for start in range(0, len(members), batch_size)
    ]


def cache_path(directory: Path, rows: IndexedDataset, settings: Mapping[str, Any]) -> Path:
    """Where errors are kept: the name is a hash of the rows' contents and of the settings they depend on."""
    described = {**settings, "rows": _fingerprint(rows), "version": _VERSION}
    return directory / "reference_errors" / f"{fingerprint(described)}.safetensors"


def _fingerprint(rows: IndexedDataset) -> str:
    if isinstance(rows.rows, EncodedDataset):
        return rows.rows.fingerprint
    hashes: list[str] = []
    for number in range(len(rows.rows)):
        hashes.extend(fingerprint(name, _content(value)) for name, value in sorted(rows.rows[number].items()))
    return fingerprint(hashes)


def _content(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    try:
        return as_tensor(value)
    except (TypeError, ValueError, RuntimeError):  # scores by name, lists of texts
        return value


def save_errors(path: Path, errors: Sequence[Tensor]) -> None:
    """Write the errors of all rows; the file is whole or absent."""
    shapes = torch.tensor([tuple(row.shape) for row in errors])
    tensors = {"errors": torch.cat([row.flatten() for row in errors]), "shapes": shapes}
    write_tensors(path, tensors, {})


def load_errors(path: Path) -> list[Tensor]:
    """Read what `save_errors` wrote; a `ValueError` if the file is damaged."""
    stored, _ = read_tensors(path)
    shapes = stored["shapes"].tolist()
    parts = stored["errors"].split([size * videos for size, videos in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
