"""Krippendorff's alpha against his published examples and against the definition, written out pair by pair."""

import itertools
import math

import numpy as np
import pytest

from video_trl.evaluation.votes.agreement import krippendorff_alpha


NONE = None
# K. Krippendorff, Computing Krippendorff's Alpha-Reliability (2011): four observers, twelve units, missing values.
RATERS = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, NONE, NONE, NONE],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NONE, 3],
    [NONE, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NONE],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NONE],
]
UNITS = [[rater[unit] for rater in RATERS if rater[unit] is not None] for unit in range(12)]
# The same text: two observers, ten units, two categories.
TWO = list(zip([0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0], strict=True))


def _by_pairs(units, metric):
    """1 - mean squared distance within units / mean squared distance among all ratings, as the definition says."""
    units = [unit for unit in units if len(unit) > 1]
    pool = [value for unit in units for value in unit]

    def distance(a, b):
        if metric == "nominal":
            return float(a != b)
        if metric == "interval":
            return (a - b) ** 2
        low, high = min(a, b), max(a, b)
        return (sum(low <= v <= high for v in pool) - (pool.count(a) + pool.count(b)) / 2) ** 2

    observed = sum(
        sum(distance(a, b) for a, b in itertools.permutations(unit, 2)) / (len(unit) - 1) for unit in units
    ) / len(pool)
    expected = sum(distance(a, b) for a, b in itertools.permutations(pool, 2)) / (len(pool) * (len(pool) - 1))
    return 1 - observed / expected


@pytest.mark.parametrize(("metric", "published"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_published_example_with_missing_values(metric, published):
    assert round(krippendorff_alpha(UNITS, metric), 3) == published
    assert krippendorff_alpha(UNITS, metric) == pytest.approx(_by_pairs(UNITS, metric))


@pytest.mark.parametrize("metric", ["nominal", "ordinal", "interval"])
def test_published_binary_example(metric):
    """Of two categories there is only one distance, so the metric does not matter."""
    assert round(krippendorff_alpha(TWO, metric), 3) == 0.095


@pytest.mark.parametrize("metric", ["nominal", "ordinal", "interval"])
def test_random_ratings_agree_with_the_definition(metric):
    rng = np.random.default_rng(0)
    for _ in range(20):
        units = [rng.integers(0, 3, size=rng.integers(0, 5)).tolist() for _ in range(15)]
        assert krippendorff_alpha(units, metric) == pytest.approx(_by_pairs(units, metric))


def test_limits():
    assert krippendorff_alpha([[0, 0], [2, 2], [1, 1, 1]], "ordinal") == 1.0
    assert krippendorff_alpha([[0, 2], [2, 0]], "ordinal") < 0
    assert krippendorff_alpha([[1, 1], [1, 1]]) is None  # no variation: nothing to agree about
    assert krippendorff_alpha([[1], [2], []]) is None
    with pytest.raises(ValueError, match="'metric' must be|`metric` must be"):
        krippendorff_alpha(UNITS, "ratio")
    with pytest.raises(ValueError, match="finite"):
        krippendorff_alpha([[0, math.nan]])
