"""
Arithmetic of comparisons: intervals, paired differences, votes and rank totals. NumPy in, plain numbers out.

Three habits are built in, because a number without them misleads: a share comes with its count and an interval, a
comparison is paired wherever the prompts are shared, and nothing is called better while its interval, pooled over
the training seeds, contains zero or fewer than three seeds were trained.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata


MIN_SEEDS = 3
_RESAMPLES_AT_ONCE = 500  # bounds the memory: 500 x number of clusters indices at a time


def wilson_interval(k: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """
    Wilson score interval of a share `k / n`. Unlike the normal approximation it stays inside [0, 1] and keeps a
    width at `k = 0` and `k = n`.

    Args:
        k (`int`): Number of successes, in [0, n].
        n (`int`): Number of independent trials, at least 1.
        level (`float`, *optional*, defaults to `0.95`): Two-sided confidence level, in (0, 1).

    Returns:
        `tuple[float, float]`: Lower and upper end, both in [0, 1].

    Raises:
        ValueError: If there is no trial, if `k` is outside [0, n], or if `level` is outside (0, 1).
    """
    _check_level(level)
    if n < 1 or not 0 <= k <= n:
        raise ValueError(f"A share needs 0 <= k <= n and n >= 1, got k={k} and n={n}.")
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = k / n
    centre = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    denominator = 1 + z * z / n
    # At k = 0 and k = n the ends are exactly 0 and 1; rounding would leave 1e-17 beside them.
    low = 0.0 if k == 0 else (centre - spread) / denominator
    high = 1.0 if k == n else (centre + spread) / denominator
    return low, high


@dataclass(frozen=True)
class PairedDifference:
    """
    Mean difference of two methods measured on the same items, with its interval.

    Attributes:
        mean_a (`float`), mean_b (`float`): Mean of each method over all items.
        difference (`float`): `mean_a - mean_b`.
        low (`float`), high (`float`): Ends of the interval of `difference`.
        level (`float`): Confidence level of that interval.
        num_items (`int`): Paired measurements.
        num_clusters (`int`): Units that were resampled: the items, or the prompts they belong to.
    """

    mean_a: float
    mean_b: float
    difference: float
    low: float
    high: float
    level: float
    num_items: int
    num_clusters: int

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def paired_bootstrap(
    a: npt.ArrayLike,
    b: npt.ArrayLike,
    *,
    level: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
    clusters: Sequence[Hashable] | None = None,
) -> PairedDifference:
    """
    Percentile bootstrap interval of the mean of `a - b`, where `a[i]` and `b[i]` were measured on the same item.

    Several videos of one prompt are not independent. Give their prompt in `clusters` and whole prompts are resampled,
    each with all its videos; the interval then speaks about new prompts and not about new samples of these prompts.

    The percentile interval is somewhat too narrow for few clusters (below about 20): read it as optimistic there.

    Args:
        a (array of shape `(n,)`): Values of the first method, finite.
        b (array of shape `(n,)`): Values of the second method, in the same order.
        level (`float`, *optional*, defaults to `0.95`): Two-sided confidence level, in (0, 1).
        num_resamples (`int`, *optional*, defaults to `10000`): Bootstrap draws.
        seed (`int`, *optional*, defaults to `0`): Seed of the draws: the same input gives the same interval.
        clusters (sequence of length `n`, *optional*): Label of each item's cluster. Without it each item is its own.

    Returns:
        [`PairedDifference`]

    Raises:
        ValueError: If the shapes differ, a value is not finite, or there are fewer than two clusters (one would give
            an interval of width zero).
    """
    _check_level(level)
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"Paired values must be two vectors of one length, got shapes {a.shape} and {b.shape}.")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("Paired values must be finite. Remove the item from both methods, or score it again.")
    if num_resamples < 1:
        raise ValueError(f"`num_resamples` must be at least 1, got {num_resamples}.")
    sums, counts = _cluster_totals(a - b, clusters)

    rng = np.random.default_rng(seed)
    means = []
    for start in range(0, num_resamples, _RESAMPLES_AT_ONCE):
        size = (min(_RESAMPLES_AT_ONCE, num_resamples - start), len(sums))
        drawn = rng.integers(0, len(sums), size=size)
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return PairedDifference(
        mean_a=float(a.mean()),
        mean_b=float(b.mean()),
        difference=float((a - b).mean()),
        low=float(low),
        high=float(high),
        level=level,
        num_items=len(a),
        num_clusters=len(sums),
    )


def verdict(difference: PairedDifference, *, num_seeds: int) -> str:
    """
    The one sentence a result may claim. "better" and "worse" need an interval without zero AND at least three seeds.

    Args:
        difference ([`PairedDifference`]): Comparison, larger values being the good ones.
        num_seeds (`int`): Training runs with different seeds behind the comparison, at least 1.

    Raises:
        ValueError: If `num_seeds` is below 1.
    """
    if num_seeds < 1:
        raise ValueError(f"`num_seeds` counts training runs and must be at least 1, got {num_seeds}.")
    if not difference.excludes_zero:
        return "no difference shown"
    if num_seeds < MIN_SEEDS:
        direction = "higher" if difference.low > 0 else "lower"
        return f"{direction} in {num_seeds} seed{'s' if num_seeds > 1 else ''} (a verdict needs {MIN_SEEDS})"
    return "better" if difference.low > 0 else "worse"


def gsb_score(good: int, same: int, bad: int) -> float:
    """
    Good/Same/Bad score of method A against method B, (good + same) / (same + bad): 1 means a draw.

    Source: Reg-DPO (https://huggingface.co/papers/2511.01450), appendix A.6. Ties stand on both sides and pull the
    score towards 1, so report the three counts beside it.

    Args:
        good (`int`), same (`int`), bad (`int`): Votes for A, for neither, for B.

    Returns:
        `float`: The score; `inf` when A won every vote.

    Raises:
        ValueError: If a count is negative or all are zero.
    """
    if min(good, same, bad) < 0 or good + same + bad == 0:
        raise ValueError(f"Votes must not be negative and one must be there, got {good}/{same}/{bad}.")
    return (good + same) / (same + bad) if same + bad else math.inf


def rank_points(values: Mapping[str, Mapping[str, float]], decimals: int = 5) -> dict[str, dict[str, int]]:
    """
    Rank points of each method in each dimension: with n methods the best gets n and the worst 1; ties all take the
    higher points. Arguments and errors as in [`rank_total_score`].
    """
    if not values:
        raise ValueError("Ranking needs at least one method, got none.")
    dimensions = list(next(iter(values.values())))
    points: dict[str, dict[str, int]] = {method: {} for method in values}
    for method, row in values.items():
        if set(row) != set(dimensions):
            raise ValueError(
                f"Each method needs the same dimensions: {method!r} has {sorted(row)}, expected {sorted(dimensions)}."
            )
    for dimension in dimensions:
        column = np.round([float(values[method][dimension]) for method in values], decimals)
        if not np.isfinite(column).all():
            raise ValueError(f"Dimension {dimension!r} has a value that is not finite; it has no rank.")
        for method, rank in zip(values, rankdata(column, method="max"), strict=True):
            points[method][dimension] = int(rank)
    return points


def rank_total_score(
    values_by_method_and_dimension: Mapping[str, Mapping[str, float]], decimals: int = 5
) -> dict[str, int]:
    """
    Total_Score of Reg-DPO (https://huggingface.co/papers/2511.01450): a method's rank points, summed over dimensions.

    It depends on which methods are compared and ignores how far apart they are: a summary to read beside the values.

    Args:
        values_by_method_and_dimension (`dict[str, dict[str, float]]`): `values[method][dimension]`, larger is better.
        decimals (`int`, *optional*, defaults to `5`): Values are rounded first; the paper's ties need its 5 decimals.

    Returns:
        `dict[str, int]`: Total of each method, in the order given.

    Raises:
        ValueError: If there is no method, the dimensions differ between methods, or a value is not finite.
    """
    points = rank_points(values_by_method_and_dimension, decimals)
    return {method: sum(row.values()) for method, row in points.items()}


def _cluster_totals(
    differences: npt.NDArray[np.float64], clusters: Sequence[Hashable] | None
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Sum and number of the differences in each cluster, both of shape `(number of clusters,)`."""
    if clusters is None:
        labels = np.arange(len(differences))
    else:
        if len(clusters) != len(differences):
            raise ValueError(f"`clusters` must label all {len(differences)} items, got {len(clusters)} labels.")
        numbers: dict[Hashable, int] = {}
        labels = np.array([numbers.setdefault(label, len(numbers)) for label in clusters], dtype=np.int64)
    counts = np.bincount(labels)
    if len(counts) < 2:
        raise ValueError(
            f"An interval needs at least two clusters, got {len(counts)}: one would give an interval of width zero. "
            "Evaluate more prompts."
        )
    return np.bincount(labels, weights=differences).astype(np.float64), counts.astype(np.int64)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"`level` is a confidence level in (0, 1), such as 0.95; got {level}.")
