"""Sample more clips of the actions that the base model does badly (PhyGDPO, Section 2.1 and Eq. 1)."""

from collections.abc import Mapping, Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

from ..engine.manifest import digest


Integers = NDArray[np.int64]


@overload
def allocate(
    counts: Mapping[str, int],
    scores: Mapping[str, float],
    *,
    tau: float = ...,
    budget: int = ...,
    redistribute: bool = ...,
) -> dict[str, int]: ...
@overload
def allocate(
    counts: Sequence[int] | NDArray[np.integer],
    scores: Sequence[float] | NDArray[np.floating],
    *,
    tau: float = ...,
    budget: int = ...,
    redistribute: bool = ...,
) -> Integers: ...
def allocate(
    counts: Mapping[str, int] | Sequence[int] | NDArray[np.integer],
    scores: Mapping[str, float] | Sequence[float] | NDArray[np.floating],
    *,
    tau: float = 3.0,
    budget: int = 20_000,
    redistribute: bool = False,
) -> dict[str, int] | Integers:
    r"""
    How many clips to take from each action category: the worse the base model does it, the more.

    $$\mathcal{H}_r(k) = \min\Big(\mathcal{H}_f(k),\ N \frac{r_k}{\sum_j r_j}\Big), \qquad
      r_k = \exp(\tau d_k), \quad d_k = 1 - \mathcal{S}_f(k)$$

    Source: PhyGDPO (https://huggingface.co/papers/2512.24551), Eq. 1. Empty categories take no part in the sum. The
    quotas become integers by largest remainders (ties go to the harder category, then to the first one)
    before the cap: they add up to `budget` exactly wherever no category is too small.

    Args:
        counts (`dict[str, int]` or sequence of `int`): Clips there are of each category, H_f.
        scores (`dict[str, float]` or sequence of `float`):
            Mean judge score of the base model's videos, S_f, in [0, 1]; may be missing or NaN where the count is 0.
        tau (`float`, defaults to `3.0`): How much difficult categories are favoured; 0: all categories alike.
        budget (`int`, defaults to `20000`): N, clips to take in all.
        redistribute (`bool`, defaults to `False`):
            Offer what small categories leave over to the others, in the same proportions, until the budget is spent
            or every clip is taken: no category gets less than without it. Eq. 1 does not.

    Returns:
        `dict[str, int]` or `numpy.ndarray` of `int64`: Clips to take, like `counts`. Never more than there are, never
        more than `budget` in all; of two categories the harder one gets no less, unless it has fewer clips.

    Raises:
        ValueError: Lengths or names that differ, a negative count, a score outside [0, 1] of a category with clips,
            `tau` negative or not finite, `budget` below 1.
    """
    if isinstance(counts, Mapping):
        if not isinstance(scores, Mapping):
            raise ValueError("Expected `scores` by category, like `counts`.")
        missing = [name for name, count in counts.items() if count and name not in scores]
        if missing:
            raise ValueError(f"Categories without a score: {missing[:10]}. Judge their representatives first.")
        quotas = allocate(
            list(counts.values()),
            [scores.get(name, np.nan) for name in counts],
            tau=tau,
            budget=budget,
            redistribute=redistribute,
        )
        return dict(zip(counts, quotas.tolist(), strict=True))
    available, score = np.asarray(counts, dtype=np.int64), np.asarray(scores, dtype=np.float64)
    if available.ndim != 1 or available.shape != score.shape or (available < 0).any():
        raise ValueError(f"Expected a count >= 0 and a score for each category, got {available} and {score}.")
    if not 0 <= tau < np.inf or budget < 1:
        raise ValueError(f"Expected `tau` >= 0 and `budget` >= 1, got {tau} and {budget}.")
    there = available > 0
    if not ((score[there] >= 0) & (score[there] <= 1)).all():  # false for NaN as well
        raise ValueError(f"Expected scores in [0, 1], got {score[there].tolist()}.")
    difficulty = np.where(there, 1 - np.nan_to_num(score), 0.0)
    # A common factor cancels; without it, a large tau would overflow.
    weight = np.where(there, np.exp(tau * (difficulty - difficulty[there].max(initial=0.0))).clip(1e-300), 0.0)
    taken = np.minimum(available, _round(_quotas(weight, budget), budget, difficulty))
    if not redistribute:
        return taken
    left = min(budget, int(available.sum())) - int(taken.sum())
    return taken + _fill(available - taken, weight * (available > taken), difficulty, left)


def _quotas(weight: NDArray[np.float64], budget: int) -> NDArray[np.float64]:
    total = weight.sum()
    return weight * (budget / total) if total > 0 else weight


def _fill(available: Integers, weight: NDArray[np.float64], difficulty: NDArray[np.float64], budget: int) -> Integers:
    """Quotas with caps: a full category leaves the division, and the rest of the budget is divided again."""
    full = np.zeros(len(available), dtype=bool)
    while True:
        left = budget - int(available[full].sum())
        quotas = _quotas(np.where(full, 0.0, weight), left)
        over = ~full & (quotas > available)
        if not over.any():
            return np.where(full, available, _round(quotas, left, difficulty))
        full |= over


def _round(quotas: NDArray[np.float64], total: int, difficulty: NDArray[np.float64]) -> Integers:
    """Integers that add up to `total`, each the floor or the ceiling of its quota; ties go to the harder one."""
    floors = np.floor(quotas + 1e-9).astype(np.int64)
    rest = total - int(floors.sum())  # the sum of the remainders: none without a remainder gets one
    order = np.lexsort((np.arange(len(quotas)), -difficulty, -np.round(quotas - floors, 9)))
    floors[order[: max(rest, 0)]] += 1
    return floors


def representatives(categories: Sequence[str], similarities: Sequence[float], number: int) -> dict[str, list[int]]:
    """The `number` rows of each category (all where there are fewer) nearest to their action; ties in row order."""
    rows: dict[str, list[int]] = {}
    for row in sorted(range(len(categories)), key=lambda row: (-similarities[row], row)):
        rows.setdefault(categories[row], []).append(row)
    return {name: rows[name][:number] for name in sorted(rows)}


def draw(names: Sequence[str], number: int, seed: int) -> set[str]:
    """
    `number` of `names` without replacement: the same ones for a seed in every order, and with a larger number the same
    ones and more.
    """
    return set(sorted(names, key=lambda name: digest(f"{seed}\0{name}"))[:number])


def category_scores(categories: Sequence[str], scores: Sequence[float]) -> dict[str, float]:
    """S_f: the mean of each category's scores."""
    grouped: dict[str, list[float]] = {}
    for name, score in zip(categories, scores, strict=True):
        grouped.setdefault(name, []).append(score)
    return {name: sum(values) / len(values) for name, values in grouped.items()}
