"""Agreement of raters beyond chance: Krippendorff's alpha."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt


Array = npt.NDArray[np.float64]

Metric = Literal["nominal", "ordinal", "interval"]


def krippendorff_alpha(units: Sequence[Sequence[float]], metric: Metric = "nominal") -> float | None:
    """
    Krippendorff's alpha (K. Krippendorff, Computing Krippendorff's Alpha-Reliability, 2011): 1 minus the observed
    disagreement over the one expected by chance. 1 is perfect agreement, 0 is chance. Any number of raters, and each
    rater may have left out units.

    Args:
        units (list of lists of `float`): Ratings of each unit, as many as it has, in any order. Units with fewer than
            two ratings say nothing about agreement and do not count.
        metric (`str`, *optional*, defaults to `"nominal"`): How far two ratings lie apart: `"nominal"` (equal or not),
            `"ordinal"` (by the ratings that lie between them) or `"interval"` (squared difference).

    Returns:
        `float` or `None`: Alpha, or none where it is undefined: no unit has two ratings, or all ratings are equal.

    Raises:
        ValueError: If the metric is unknown or a rating is not finite.
    """
    metrics: dict[str, Callable[[Array, Array], Array]] = {
        "nominal": _nominal,
        "ordinal": _ordinal,
        "interval": _interval,
    }
    if metric not in metrics:
        raise ValueError(f"`metric` must be one of {', '.join(metrics)}; got {metric!r}.")
    if not all(np.isfinite(value) for unit in units for value in unit):
        raise ValueError("Ratings must be finite. Leave out what a rater did not rate.")
    paired = [unit for unit in units if len(unit) >= 2]
    values = sorted({value for unit in paired for value in unit})
    if len(values) < 2:
        return None
    # counts[u, c]: ratings c of unit u. Each ordered pair of a unit's ratings weighs 1 / (number - 1).
    counts = np.array([[Counter(unit)[value] for value in values] for unit in paired], dtype=np.float64)
    sizes = counts.sum(axis=1)
    weights = 1 / (sizes - 1)
    coincidences = (counts * weights[:, None]).T @ counts - np.diag((counts * weights[:, None]).sum(axis=0))
    totals = counts.sum(axis=0)
    distance = metrics[metric](np.array(values), totals)
    expected = np.outer(totals, totals) - np.diag(totals)
    return float(1 - (totals.sum() - 1) * (coincidences * distance).sum() / (expected * distance).sum())


def _nominal(values: Array, totals: Array) -> Array:
    return 1.0 - np.eye(len(values))


def _ordinal(values: Array, totals: Array) -> Array:
    """Squared number of ratings from one value to the other, with half of each end."""
    middle = np.cumsum(totals) - totals / 2
    return np.asarray((middle[:, None] - middle[None, :]) ** 2, dtype=np.float64)


def _interval(values: Array, totals: Array) -> Array:
    return np.asarray((values[:, None] - values[None, :]) ** 2, dtype=np.float64)
