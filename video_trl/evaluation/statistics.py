"""
Statistics of evaluations: confidence intervals, paired differences, significance tests, votes and rank totals.

Three rules are built in, because a number without them misleads. A proportion has its count and an interval. A
comparison is paired where both models have the same prompts. A method is called better only if its interval, pooled
over the training seeds, excludes zero and at least three seeds were trained.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest, rankdata


MIN_SEEDS = 3
_RESAMPLES_AT_ONCE = 500  # bounds the memory: 500 x number of clusters indices at a time


def wilson_interval(k: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """
    Wilson score interval of a proportion `k / n`. Unlike the normal approximation it stays inside [0, 1] and keeps a
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
    if n < 1 or not 0 <= k <= n:
        raise ValueError(f"A proportion needs 0 <= k <= n and n >= 1, got k={k} and n={n}.")
    return _wilson(k / n, n, level)


@dataclass(frozen=True)
class Proportion:
    """
    Count `k` of `n` with the Wilson interval of `k / n`; printed as `96/590 = 16.3 % [13.5, 19.5]`.

    Attributes:
        k (`int`), n (`int`): Successes and trials.
        num_clusters (`int`): Prompts that the trials belong to.
        low (`float`), high (`float`): Ends of the interval, in [0, 1].
        level (`float`): Confidence level of the interval.
    """

    k: int
    n: int
    num_clusters: int
    low: float
    high: float
    level: float

    @property
    def value(self) -> float:
        return self.k / self.n

    def __str__(self) -> str:
        return f"{self.k}/{self.n} = {100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def proportion_of(
    passed: Sequence[bool], clusters: Sequence[Hashable] | None = None, level: float = 0.95
) -> Proportion:
    """
    Proportion of trials that passed, with a Wilson interval that knows about clusters.

    Several videos of one prompt are not independent. Their number is divided by the design effect (variance between
    clusters over that of independent trials) before it enters Wilson's formula: with one video a prompt this is the
    plain interval, and with copies of the same video it is the interval of the prompts alone.

    Args:
        passed (sequence of `bool`): Outcome of each trial; at least one.
        clusters (sequence, *optional*): Label of each trial's cluster. Without it each trial is its own.
        level (`float`, *optional*, defaults to `0.95`): Two-sided confidence level, in (0, 1).

    Returns:
        [`Proportion`]

    Raises:
        ValueError: If there is no trial, the labels are not as many as the trials, or `level` is outside (0, 1).
    """
    outcomes = np.asarray(passed, dtype=np.float64)
    if outcomes.size == 0:
        raise ValueError("A proportion needs at least one trial, got none.")
    k, n = int(outcomes.sum()), len(outcomes)
    sums, counts = _totals(outcomes, clusters)
    num_clusters, proportion = len(sums), k / n
    effective = float(num_clusters)
    if num_clusters > 1 and 0 < k < n:
        between = num_clusters / (num_clusters - 1) * float(((sums - proportion * counts) ** 2).sum()) / n**2
        # Never more than the videos there are, never fewer than the prompts. The variance is 0 when the prompts agree.
        effective = min(max(proportion * (1 - proportion) / between if between > 0 else n, num_clusters), n)
    low, high = _wilson(proportion, effective, level)
    return Proportion(k, n, num_clusters, low, high, level)


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
        indices = rng.integers(0, len(sums), size=size)
        means.append(sums[indices].sum(axis=1) / counts[indices].sum(axis=1))
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


def verdict(difference: PairedDifference, *, num_seeds: int, p_adjusted: float | None = None) -> str:
    """
    The one sentence a result may claim. "better" and "worse" need an interval without zero AND at least three seeds,
    and, where several comparisons were made, an adjusted p-value below one minus the interval's level.

    Args:
        difference ([`PairedDifference`]): Comparison, larger values being the good ones.
        num_seeds (`int`): Training runs with different seeds behind the comparison, at least 1.
        p_adjusted (`float`, *optional*): p-value after [`holm`], where the comparison is one of several.

    Raises:
        ValueError: If `num_seeds` is below 1.
    """
    if num_seeds < 1:
        raise ValueError(f"`num_seeds` counts training runs and must be at least 1, got {num_seeds}.")
    if not difference.excludes_zero:
        return "no difference shown"
    if p_adjusted is not None and p_adjusted > 1 - difference.level:
        return "no difference shown after correction"
    if num_seeds < MIN_SEEDS:
        direction = "higher" if difference.low > 0 else "lower"
        return f"{direction} in {num_seeds} seed{'s' if num_seeds > 1 else ''} (a verdict needs {MIN_SEEDS})"
    return "better" if difference.low > 0 else "worse"


def sign_test(wins: int, losses: int) -> float:
    """
    Two-sided exact sign test: probability of a split at least as uneven as this one if both sides were equally likely.
    Ties are left out before; on pairs of pass/fail outcomes this is McNemar's exact test.

    Args:
        wins (`int`), losses (`int`): Pairs that one side and the other side won.

    Returns:
        `float`: p-value in (0, 1]; 1 when there is no pair.

    Raises:
        ValueError: If a count is negative.
    """
    if min(wins, losses) < 0:
        raise ValueError(f"Counts of a sign test must not be negative, got {wins} and {losses}.")
    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> tuple[int, int, float]:
    """
    McNemar's exact test of two methods that passed or failed the same items.

    Args:
        a (sequence of `bool`), b (sequence of `bool`): Outcomes of each method, in the same order.

    Returns:
        `tuple[int, int, float]`: Items that only `a` passed, items that only `b` passed, and the two-sided p-value.

    Raises:
        ValueError: If the lengths differ.
    """
    if len(a) != len(b):
        raise ValueError(f"McNemar's test pairs outcomes of the same items, got {len(a)} and {len(b)}.")
    only_a = sum(bool(x) and not y for x, y in zip(a, b, strict=True))
    only_b = sum(bool(y) and not x for x, y in zip(a, b, strict=True))
    return only_a, only_b, sign_test(only_a, only_b)


def prompt_sign_test(a: npt.ArrayLike, b: npt.ArrayLike, clusters: Sequence[Hashable] | None = None) -> float:
    """
    Sign test over prompts: a prompt is won by the method with the higher mean over its videos; equal means are ties.

    Args:
        a (array of shape `(n,)`), b (array of shape `(n,)`): Values of each method on the same items, finite.
        clusters (sequence of length `n`, *optional*): Prompt of each item. Without it each item is its own.

    Returns:
        `float`: Two-sided p-value.
    """
    sums, _ = _totals(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64), clusters)
    # Means of equal values may differ in the last bits.
    return sign_test(int((sums > 1e-12).sum()), int((sums < -1e-12).sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """
    p-values adjusted by Holm's step-down method: comparing them with a level bounds the chance of a single false
    claim among all comparisons by that level, whatever their dependence.

    Args:
        p_values (sequence of `float`): p-values of all comparisons that were made, in [0, 1].

    Returns:
        `list[float]`: Adjusted p-values, in the order given.

    Raises:
        ValueError: If a value is outside [0, 1].
    """
    if not all(0 <= p <= 1 for p in p_values):
        raise ValueError(f"p-values must lie in [0, 1], got {list(p_values)}.")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


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
    """As [`_totals`], for an interval of the mean: one cluster would give it the width zero."""
    sums, counts = _totals(differences, clusters)
    if len(counts) < 2:
        raise ValueError(
            f"An interval needs at least two clusters, got {len(counts)}: one would give an interval of width zero. "
            "Evaluate more prompts."
        )
    return sums, counts


def _totals(
    values: npt.NDArray[np.float64], clusters: Sequence[Hashable] | None
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Sum and number of the values in each cluster, both of shape `(number of clusters,)`."""
    if clusters is None:
        labels = np.arange(len(values))
    else:
        if len(clusters) != len(values):
            raise ValueError(f"`clusters` must label all {len(values)} items, got {len(clusters)} labels.")
        numbers: dict[Hashable, int] = {}
        labels = np.array([numbers.setdefault(label, len(numbers)) for label in clusters], dtype=np.int64)
    return np.bincount(labels, weights=values).astype(np.float64), np.bincount(labels).astype(np.int64)


def _wilson(proportion: float, n: float, level: float) -> tuple[float, float]:
    """Wilson's formula; `n` may be an effective number, which is no integer."""
    _check_level(level)
    z = NormalDist().inv_cdf((1 + level) / 2)
    centre = proportion + z * z / (2 * n)
    spread = z * math.sqrt(proportion * (1 - proportion) / n + z * z / (4 * n * n))
    denominator = 1 + z * z / n
    # At 0 and 1 the ends are exactly 0 and 1; rounding would leave 1e-17 beside them.
    low = 0.0 if proportion == 0 else (centre - spread) / denominator
    high = 1.0 if proportion == 1 else (centre + spread) / denominator
    return low, high


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"`level` is a confidence level in (0, 1), such as 0.95; got {level}.")
