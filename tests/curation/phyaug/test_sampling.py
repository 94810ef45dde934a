"""Eq. 1 of PhyGDPO: values by hand, and the properties that hold for every histogram."""

import math

import numpy as np
import pytest

from video_trl.curation.phyaug import allocate
from video_trl.curation.phyaug.sampling import category_scores, draw, representatives


def histograms(number: int = 200):
    """Random counts, scores, tau and budget, with empty, single and equal categories among them."""
    rng = np.random.default_rng(0)
    for case in range(number):
        size = int(rng.integers(1, 12))
        counts = rng.integers(0, (3, 40, 3000)[case % 3], size=size)
        scores = rng.choice([0.0, 0.25, 0.5, 1.0], size=size) if case % 4 == 0 else rng.random(size)
        yield counts, scores, float(rng.choice([0.0, 0.5, 3.0, 50.0])), int(rng.integers(1, 500))


def test_shares_are_those_of_the_equation():
    counts, scores = {"a": 1000, "b": 1000, "c": 1000}, {"a": 0.2, "b": 0.5, "c": 0.9}
    ratios = {name: math.exp(3 * (1 - score)) for name, score in scores.items()}
    expected = {name: 600 * ratio / sum(ratios.values()) for name, ratio in ratios.items()}
    taken = allocate(counts, scores, tau=3.0, budget=600)
    assert sum(taken.values()) == 600
    assert all(abs(taken[name] - expected[name]) < 1 for name in counts)
    assert taken == {"a": 392, "b": 160, "c": 48}


def test_printed_difficulties_give_the_printed_ratio():
    """d = 0.8 against d = 0.3 is exp(1.5) = 4.48 with the paper's tau."""
    hard, easy = allocate([10**9, 10**9], [0.2, 0.7], budget=10**8)
    assert hard / easy == pytest.approx(math.exp(1.5), rel=1e-6)


def test_what_small_categories_leave_over_is_not_spent_unless_asked_for():
    counts, scores = [10, 400, 500], [0.0, 0.5, 0.5]
    assert allocate(counts, scores, budget=300).tolist() == [10, 46, 46]
    spent = allocate(counts, scores, budget=300, redistribute=True)
    assert spent.tolist() == [10, 145, 145]


@pytest.mark.parametrize("redistribute", [False, True])
def test_properties_of_every_allocation(redistribute):
    for counts, scores, tau, budget in histograms():
        taken = allocate(counts, scores, tau=tau, budget=budget, redistribute=redistribute)
        again = allocate(list(counts), list(scores), tau=tau, budget=budget, redistribute=redistribute)
        assert taken.dtype == np.int64 and (taken == again).all()
        assert (0 <= taken).all() and (taken <= counts).all() and taken.sum() <= budget
        for a in range(len(counts)):
            for b in range(len(counts)):
                # Of equal ones the first may get one more.
                harder = scores[a] < scores[b] or (scores[a] == scores[b] and a < b)
                if harder and counts[a] and counts[b]:
                    assert taken[a] >= min(taken[b], counts[a]), (counts, scores, tau, budget, taken)
        if redistribute:
            assert taken.sum() == min(budget, counts.sum())
        elif counts.any() and (taken < counts)[counts > 0].all():
            assert taken.sum() == budget


def test_redistribution_takes_from_nobody():
    for counts, scores, tau, budget in histograms():
        plain = allocate(counts, scores, tau=tau, budget=budget)
        spent = allocate(counts, scores, tau=tau, budget=budget, redistribute=True)
        assert (spent >= plain).all()


def test_equal_scores_share_evenly_and_tau_zero_does_not_look_at_them():
    assert allocate([50] * 4, [0.3] * 4, budget=40).tolist() == [10] * 4
    assert allocate([50] * 4, [0.0, 0.3, 0.6, 1.0], tau=0.0, budget=42).tolist() == [11, 11, 10, 10]


def test_a_budget_beyond_the_pool_takes_everything_only_when_redistributed():
    assert allocate([5, 7], [0.0, 1.0], budget=10**6).tolist() == [5, 7]
    assert allocate([5, 7], [0.0, 1.0], tau=50.0, budget=20, redistribute=True).tolist() == [5, 7]


def test_a_huge_tau_neither_overflows_nor_forgets_the_easy_ones():
    assert allocate([3, 1000], [0.0, 1.0], tau=1e6, budget=10, redistribute=True).tolist() == [3, 7]


def test_the_papers_budget_is_the_default():
    assert allocate([10**6], [0.5]).tolist() == [20_000]
    assert allocate([5, 5], [0.5, 0.0], budget=1).tolist() == [0, 1]
    assert allocate([0, 0], [0.5, 0.0], budget=5).tolist() == [0, 0]


def test_empty_categories_take_no_part():
    assert allocate({"a": 0, "b": 100}, {"b": 0.5}, budget=20) == {"a": 0, "b": 20}
    with_nan = allocate([0, 100, 100], [float("nan"), 0.5, 0.5], budget=20)
    assert with_nan.tolist() == [0, 10, 10]


@pytest.mark.parametrize(
    ("counts", "scores", "options", "message"),
    [
        ({"a": 3}, {}, {}, "Categories without a score: .*a"),
        ({"a": 3}, [0.5], {}, "`scores` by category"),
        ([3, 4], [0.5], {}, "a count >= 0 and a score for each"),
        ([-1], [0.5], {}, "a count >= 0"),
        ([3], [1.2], {}, r"scores in \[0, 1\]"),
        ([3], [float("nan")], {}, r"scores in \[0, 1\]"),
        ([3], [0.5], {"tau": -1.0}, "`tau` >= 0"),
        ([3], [0.5], {"tau": float("inf")}, "`tau` >= 0"),
        ([3], [0.5], {"budget": 0}, "`budget` >= 1"),
    ],
)
def test_bad_histograms_are_refused(counts, scores, options, message):
    with pytest.raises(ValueError, match=message):
        allocate(counts, scores, **options)


def test_representatives_are_the_nearest_ones_and_ties_go_to_the_earlier_row():
    found = representatives(["a", "b", "a", "a", "b"], [0.5, 0.9, 0.7, 0.7, 0.1], 2)
    assert found == {"a": [2, 3], "b": [1, 4]}
    assert representatives(["a"], [0.1], 16) == {"a": [0]}


def test_a_draw_depends_on_seed_and_names_only():
    names = [f"clip{index}" for index in range(50)]
    ten = draw(names, 10, seed=0)
    assert len(ten) == 10 and ten == draw(names[::-1], 10, seed=0) and ten != draw(names, 10, seed=1)
    assert ten < draw(names, 20, seed=0) and draw(names, 99, seed=0) == set(names)
    often = [sum("clip7" in draw(names, 10, seed=seed) for seed in range(300))]
    assert 30 < often[0] < 95  # expected 60 of 300, three standard deviations about 21


def test_a_category_scores_the_mean_of_its_representatives():
    assert category_scores(["a", "b", "a"], [0.0, 0.4, 1.0]) == {"a": 0.5, "b": 0.4}
