"""Stack encoded rows into batches. Noise and timesteps are drawn in the training step, not here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..models.base import ModelFamily
from .columns import as_scores, as_tensor


Row = Mapping[str, Any]


@dataclass(frozen=True)
class VideoCollator:
    """
    Stack rows of the video type.

    Args:
        family (`ModelFamily`): Pads prompt embeddings the way the pipeline does.
        max_sequence_length (`int`): Number of tokens `L` to pad prompt embeddings to.

    Returns, from `__call__(rows)`:
        `dict`: `latents` float32 `(B, C, F, H, W)`, `prompt_embeds` `(B, L, D)` in the dtype they are stored in, the
        family's further `condition_columns` float32, `index` int64 `(B,)`, the rows' `"index"`.

    Raises:
        ValueError: The rows have latents of different shapes, or a prompt has more than `max_sequence_length` tokens.
    """

    family: ModelFamily
    max_sequence_length: int

    def __call__(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        return {"latents": _stack(rows, "latents"), **_conditions(self.family, self.max_sequence_length, rows)}


@dataclass(frozen=True)
class GroupCollator:
    """
    Stack rows of the group type, or of the preference type (m = 1).

    Args:
        family (`ModelFamily`): Pads prompt embeddings the way the pipeline does.
        max_sequence_length (`int`): Number of tokens `L` to pad prompt embeddings to.

    Returns, from `__call__(rows)`:
        `dict`: `chosen_latents` float32 `(B, C, F, H, W)`, `rejected_latents` float32 `(B, m, C, F, H, W)`,
        `prompt_embeds` `(B, L, D)` in the dtype they are stored in, the family's further `condition_columns` float32,
        `sa` and `pc` float32 `(B, m)` when all rows carry `rejected_scores`, `num_rejected` int64 `(B,)` when only the
        first so many rejected videos of each row are to be compared with, `weight` float32 `(B,)` when they carry
        one, `loss_weights` float32 `(B, 1, F, H, W)` when one of them carries some (`H` and `W` are 1 where all have
        one number a latent frame), `index` int64 `(B,)`, the rows' `"index"`.

    Raises:
        ValueError: The rows differ in the shape of their latents or in their number of rejected videos, or a prompt
            has more than `max_sequence_length` tokens.
    """

    family: ModelFamily
    max_sequence_length: int

    def __call__(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        batch = {
            "chosen_latents": _stack(rows, "chosen_latents"),
            "rejected_latents": _stack(rows, "rejected_latents"),
        }
        if batch["chosen_latents"].shape[1:] != batch["rejected_latents"].shape[2:]:
            raise ValueError(
                f"Rows {_indices(rows)}: chosen latents of shape {tuple(batch['chosen_latents'].shape[1:])}, rejected "
                f"latents of shape {tuple(batch['rejected_latents'].shape[2:])}; expected the same. Encode them "
                "at one size."
            )
        # Who needs scores has checked that all rows have them; others are not to stop for a row that lacks them.
        if all(row.get("rejected_scores") is not None for row in rows):
            scores = torch.stack([torch.from_numpy(as_scores(row["rejected_scores"])) for row in rows])  # (B, m, 2)
            batch["sa"], batch["pc"] = scores[..., 0].contiguous(), scores[..., 1].contiguous()
        if "num_rejected" in rows[0]:
            batch["num_rejected"] = torch.tensor([row["num_rejected"] for row in rows])
        if all(row.get("weight") is not None for row in rows):
            batch["weight"] = torch.tensor([float(row["weight"]) for row in rows])
        if any(row.get("loss_weights") is not None for row in rows):
            batch["loss_weights"] = _loss_weights(rows, batch["chosen_latents"].shape[2])
        return {**batch, **_conditions(self.family, self.max_sequence_length, rows)}


def _loss_weights(rows: Sequence[Row], frames: int) -> torch.Tensor:
    """`(B, 1, F, H, W)`; ones for a row that has none."""
    given = [row.get("loss_weights") for row in rows]
    weights = [torch.ones(frames) if each is None else torch.as_tensor(each).float() for each in given]
    weights = [each[:, None, None] if each.ndim == 1 else each for each in weights]  # (F, 1, 1) or (F, H, W)
    return torch.stack(torch.broadcast_tensors(*weights))[:, None]


def _indices(rows: Sequence[Row]) -> list[int]:
    return [int(row["index"]) for row in rows]


def _stack(rows: Sequence[Row], column: str) -> torch.Tensor:
    tensors = [as_tensor(row[column]).float() for row in rows]
    if any(tensor.shape != tensors[0].shape for tensor in tensors):
        shapes = {index: tuple(tensor.shape) for index, tensor in zip(_indices(rows), tensors, strict=True)}
        raise ValueError(
            f"'{column}' must have one shape in a batch, got (by row) {shapes}. Encode all videos with the same "
            "`num_frames`, `height`, `width` and number of rejected videos, or train with a batch size of 1."
        )
    return torch.stack(tensors)


def _conditions(family: ModelFamily, max_sequence_length: int, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """What the transformer is conditioned on, the prompts padded, and the numbers of the rows."""
    for index, row in zip(_indices(rows), rows, strict=True):
        tokens = len(row["prompt_embeds"])
        if tokens > max_sequence_length:
            raise ValueError(
                f"Row {index}: prompt embeddings of {tokens} tokens, expected at most {max_sequence_length} "
                "(`max_sequence_length`). Raise it or encode the prompts again."
            )
    prompts = [{name: as_tensor(row[name]) for name in family.prompt_columns} for row in rows]
    conditions = family.pad_prompts(prompts, max_sequence_length)
    conditions |= {name: _stack(rows, name) for name in family.condition_columns if name not in conditions}
    return {**conditions, "index": torch.tensor(_indices(rows), dtype=torch.int64)}
