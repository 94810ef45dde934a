"""Leave out rejected videos whose judged physics is too good to be called rejected."""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ...data.columns import MapDataset, as_scores, as_tensor, cells, column_names
from .rows import IndexedDataset


logger = logging.getLogger(__name__)


class _ScoredRows:
    """Rows in which the `num_rejected` videos that stay come first; the others stand behind them, never compared."""

    def __init__(self, rows: MapDataset, kept: list[tuple[int, np.ndarray]]) -> None:
        self.made_of, self._kept = rows, kept

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        number, stays = self._kept[index]
        row = self.made_of[number]
        order = np.argsort(~stays, kind="stable")
        scores = as_scores(row["rejected_scores"])
        return {
            **row,
            "rejected_latents": as_tensor(row["rejected_latents"])[torch.from_numpy(order)],
            "rejected_scores": torch.from_numpy(scores[order]),
            "num_rejected": int(stays.sum()),
        }


def check_rejected_scores(dataset: MapDataset, below: float) -> None:
    """
    Raise a `ValueError` if a dataset, raw or encoded, has no scores, or no rejected video with a `pc` below the bound.
    """
    if "rejected_scores" not in column_names(dataset):
        raise ValueError(
            f"`rejected_score_below={below}` needs the column 'rejected_scores' (per rejected video 'sa' and 'pc' in "
            f"[0, 1]), got {column_names(dataset)}. Judge the rejected videos first, or leave the option out."
        )
    kept = _kept(dataset, below)
    if not kept:
        raise ValueError(
            f"`rejected_score_below={below}` leaves no rejected video: every 'pc' is at least that. Raise the bound."
        )


def keep_low_scores(rows: IndexedDataset, below: float) -> IndexedDataset:
    """
    The rows with a rejected video whose `pc` is below a bound, each with the number of these as `"num_rejected"`.

    Args:
        rows ([`IndexedDataset`]): Encoded rows with scores.
        below (`float`): The bound.
    """
    kept = _kept(rows.rows, below)
    logger.info(
        "`rejected_score_below=%g`: %d of %d rows stay, with %d rejected videos in all.",
        below,
        len(kept),
        len(rows),
        sum(int(stays.sum()) for _, stays in kept),
    )
    return IndexedDataset(_ScoredRows(rows.rows, kept), [rows.shapes[number] for number, _ in kept])


def _kept(dataset: MapDataset, below: float) -> list[tuple[int, np.ndarray]]:
    """Row, and which of its rejected videos `(m,)` stay, of every row that keeps one; without scores it does not."""
    scores = enumerate(cells(dataset, "rejected_scores"))
    stays = [(number, as_scores([] if cell is None else cell)[:, 1] < below) for number, cell in scores]
    return [(number, mask) for number, mask in stays if mask.any()]
