import math

import numpy as np
import pytest

from tests.support.evaluation.reg_dpo_tables import GSB, TOTAL_SCORE
from video_trl.evaluation import (
    PairedDifference,
    gsb_score,
    holm,
    mcnemar,
    paired_bootstrap,
    prompt_sign_test,
    proportion_of,
    rank_points,
    rank_total_score,
    sign_test,
    verdict,
    wilson_interval,
)


# ---- wilson_interval ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "n", "level"), [(1, 10, 0.95), (7, 9, 0.95), (50, 100, 0.99), (3, 4, 0.8)])
def test_wilson_ends_are_the_shares_at_which_the_score_test_just_rejects(k, n, level):
    """The definition: |k/n - p| = z sqrt(p (1 - p) / n) at both ends, with z from an independent bisection."""
    z = _normal_quantile((1 + level) / 2)
    for end in wilson_interval(k, n, level):
        assert abs(k / n - end) == pytest.approx(z * math.sqrt(end * (1 - end) / n), rel=1e-6)


def test_wilson_keeps_a_width_at_the_borders_and_mirrors():
    low, high = wilson_interval(0, 12)
    assert low == 0.0 and 0.2 < high < 0.3
    mirrored = wilson_interval(12, 12)
    assert mirrored == pytest.approx((1 - high, 1.0))


@pytest.mark.parametrize(("k", "n", "level"), [(0, 0, 0.95), (5, 4, 0.95), (-1, 4, 0.95), (1, 4, 1.0), (1, 4, 95)])
def test_wilson_rejects(k, n, level):
    with pytest.raises(ValueError, match="k=|level"):
        wilson_interval(k, n, level)


# ---- paired_bootstrap -----------------------------------------------------------------------------------------------


def test_bootstrap_interval_is_that_of_the_mean_difference():
    """With many items the bootstrap agrees with the normal interval of the mean of the differences."""
    rng = np.random.default_rng(0)
    b = rng.normal(size=400)
    a = b + rng.normal(0.3, 0.5, size=400)
    result = paired_bootstrap(a, b)
    half = 1.96 * (a - b).std(ddof=1) / math.sqrt(400)
    assert result.difference == pytest.approx((a - b).mean())
    assert result.mean_a - result.mean_b == pytest.approx(result.difference)
    assert (result.low, result.high) == pytest.approx((result.difference - half, result.difference + half), abs=3e-3)
    assert (result.num_items, result.num_clusters, result.level) == (400, 400, 0.95)


def test_bootstrap_uses_the_pairing():
    """A small steady gain on items of very different difficulty shows in pairs; shuffling one side hides it."""
    rng = np.random.default_rng(1)
    b = rng.uniform(size=60)
    a = b + 0.05 + rng.normal(0, 0.01, size=60)
    assert paired_bootstrap(a, b).low > 0.04
    assert not paired_bootstrap(rng.permutation(a), b).excludes_zero


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(2)
    covered = 0
    for trial in range(300):
        differences = rng.normal(0.1, 1.0, size=40)
        result = paired_bootstrap(differences, np.zeros(40), num_resamples=500, seed=trial)
        covered += result.low <= 0.1 <= result.high
    assert 0.90 <= covered / 300 <= 0.98


def test_bootstrap_of_whole_prompts_is_not_narrowed_by_repeated_videos():
    """Ten copies of each video add nothing. Item by item the interval shrinks by sqrt(10); by prompt it does not."""
    rng = np.random.default_rng(3)
    a, b = rng.normal(0.2, 1, size=30), rng.normal(size=30)
    once = paired_bootstrap(a, b)
    repeated_a, repeated_b = np.repeat(a, 10), np.repeat(b, 10)
    prompts = [f"prompt {i // 10}" for i in range(300)]
    by_prompt = paired_bootstrap(repeated_a, repeated_b, clusters=prompts)
    by_item = paired_bootstrap(repeated_a, repeated_b)
    assert (by_prompt.low, by_prompt.high) == pytest.approx((once.low, once.high))
    assert (by_item.high - by_item.low) * math.sqrt(10) == pytest.approx(once.high - once.low, rel=0.1)
    assert (by_prompt.num_items, by_prompt.num_clusters) == (300, 30)


def test_bootstrap_weighs_items_and_not_prompts_when_prompts_have_different_sizes():
    """The estimate is the mean over videos, so an interval around it must be too."""
    result = paired_bootstrap([1, 1, 1, 0], [0, 0, 0, 0], clusters=["x", "x", "x", "y"])
    assert result.difference == 0.75
    assert (result.low, result.high) == (0.0, 1.0)


def test_bootstrap_is_deterministic_and_its_draws_follow_the_seed():
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=25), rng.normal(size=25)
    assert paired_bootstrap(a, b, seed=7) == paired_bootstrap(a, b, seed=7)
    assert paired_bootstrap(a, b, seed=7).low != paired_bootstrap(a, b, seed=8).low


def test_bootstrap_changes_sign_with_the_order_and_widens_with_the_level():
    rng = np.random.default_rng(5)
    a, b = rng.normal(0.5, 1, size=50), rng.normal(size=50)
    forward, backward = paired_bootstrap(a, b), paired_bootstrap(b, a)
    assert (backward.low, backward.high) == pytest.approx((-forward.high, -forward.low))
    wide = paired_bootstrap(a, b, level=0.99)
    assert wide.low < forward.low < forward.high < wide.high


@pytest.mark.parametrize(
    ("a", "b", "kwargs", "message"),
    [
        ([1.0, 2.0], [1.0], {}, "one length"),
        ([[1.0, 2.0]], [[1.0, 2.0]], {}, "one length"),
        ([1.0, math.nan], [1.0, 2.0], {}, "finite"),
        ([1.0], [0.0], {}, "two clusters"),
        ([1.0, 2.0], [0.0, 0.0], {"clusters": ["p", "p"]}, "two clusters"),
        ([1.0, 2.0], [0.0, 0.0], {"clusters": ["p"]}, "label all 2 items"),
        ([1.0, 2.0], [0.0, 0.0], {"level": 95}, "level"),
        ([1.0, 2.0], [0.0, 0.0], {"num_resamples": 0}, "num_resamples"),
    ],
)
def test_bootstrap_rejects(a, b, kwargs, message):
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(a, b, **kwargs)


# ---- verdict --------------------------------------------------------------------------------------------------------


def _difference(low, high):
    middle = (low + high) / 2
    return PairedDifference(middle, 0.0, middle, low, high, 0.95, num_items=30, num_clusters=30)


@pytest.mark.parametrize(
    ("low", "high", "num_seeds", "expected"),
    [
        (0.01, 0.2, 3, "better"),
        (-0.2, -0.01, 3, "worse"),
        (-0.01, 0.5, 3, "no difference shown"),
        (0.0, 0.5, 10, "no difference shown"),
        (-0.5, 0.0, 10, "no difference shown"),
        (0.01, 0.2, 2, "higher in 2 seeds (a verdict needs 3)"),
        (-0.2, -0.01, 1, "lower in 1 seed (a verdict needs 3)"),
    ],
)
def test_verdict(low, high, num_seeds, expected):
    assert verdict(_difference(low, high), num_seeds=num_seeds) == expected


@pytest.mark.parametrize("num_seeds", [1, 2, 3, 100])
def test_verdict_never_says_better_or_worse_while_zero_is_inside(num_seeds):
    for low in np.linspace(-1, 0, 11):
        for high in np.linspace(0, 1, 11):
            assert verdict(_difference(low, high), num_seeds=num_seeds) == "no difference shown"


def test_verdict_needs_a_seed():
    with pytest.raises(ValueError, match="num_seeds"):
        verdict(_difference(0.1, 0.2), num_seeds=0)


# ---- gsb_score and ranks: the paper's tables ------------------------------------------------------------------------


@pytest.mark.parametrize(("table", "comparison", "dimension", "good", "same", "bad", "printed"), GSB)
def test_gsb_score_gives_the_printed_score(table, comparison, dimension, good, same, bad, printed):
    assert round(gsb_score(good, same, bad), 2) == printed


def test_gsb_score_limits():
    assert gsb_score(5, 10, 5) == 1.0
    assert gsb_score(0, 9, 0) == 1.0
    assert gsb_score(3, 0, 0) == math.inf
    assert gsb_score(0, 0, 3) == 0.0


@pytest.mark.parametrize("votes", [(0, 0, 0), (-1, 2, 3), (1, 2, -3)])
def test_gsb_score_rejects(votes):
    with pytest.raises(ValueError, match="Votes"):
        gsb_score(*votes)


@pytest.mark.parametrize("table", TOTAL_SCORE)
def test_rank_total_score_gives_the_printed_ranks_and_totals(table):
    rows = TOTAL_SCORE[table]
    values = {method: dict(enumerate(numbers)) for method, (numbers, _, _) in rows.items()}
    assert rank_total_score(values) == {method: total for method, (_, _, total) in rows.items()}
    assert rank_points(values) == {method: dict(enumerate(ranks)) for method, (_, ranks, _) in rows.items()}


def test_rank_total_score_rounds_before_it_ranks():
    values = {"a": {"d": 0.123451}, "b": {"d": 0.123452}, "c": {"d": 0.1}}
    assert rank_total_score(values) == {"a": 3, "b": 3, "c": 1}
    assert rank_total_score(values, decimals=6) == {"a": 2, "b": 3, "c": 1}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "at least one method"),
        ({"a": {"x": 1.0}, "b": {"y": 1.0}}, "same dimensions"),
        ({"a": {"x": 1.0}, "b": {"x": math.nan}}, "not finite"),
    ],
)
def test_rank_total_score_rejects(values, message):
    with pytest.raises(ValueError, match=message):
        rank_total_score(values)


def _normal_quantile(probability: float) -> float:
    """Bisection on the normal distribution function, written with `math.erf`."""
    low, high = -10.0, 10.0
    for _ in range(80):
        middle = (low + high) / 2
        if 0.5 * (1 + math.erf(middle / math.sqrt(2))) < probability:
            low = middle
        else:
            high = middle
    return low


# ---- shares of clustered trials -------------------------------------------------------------------------------------


def test_proportion_of_independent_trials_is_the_plain_wilson_interval():
    for k, n in ((0, 5), (3, 10), (10, 10), (96, 590)):
        share = proportion_of([True] * k + [False] * (n - k))
        assert (share.low, share.high) == pytest.approx(wilson_interval(k, n))
        assert (share.k, share.n, share.num_clusters) == (k, n, n)
    assert str(share) == "96/590 = 16.3 % [13.5, 19.5]"


def test_proportion_of_copies_has_the_interval_of_the_prompts():
    passed = [True] * 4 + [False] * 8
    for copies in (2, 10):
        share = proportion_of(np.repeat(passed, copies), [i for i in range(12) for _ in range(copies)])
        assert (share.low, share.high) == pytest.approx(wilson_interval(4, 12), abs=0.02)
    all_passed = proportion_of([True] * 20, [i // 10 for i in range(20)])
    assert (all_passed.low, all_passed.high) == pytest.approx(wilson_interval(2, 2))


def test_proportion_of_independent_videos_of_a_prompt_is_not_widened():
    rng = np.random.default_rng(0)
    passed = rng.uniform(size=2000) < 0.3
    share = proportion_of(passed, [i // 10 for i in range(2000)])
    low, high = wilson_interval(int(passed.sum()), 2000)
    assert share.high - share.low == pytest.approx(high - low, rel=0.15)


def test_share_covers_the_truth_when_videos_of_a_prompt_hang_together():
    """Prompts are easy or hard, four videos each: items as trials would cover far too rarely."""
    rng = np.random.default_rng(1)
    covered, naive = 0, 0
    for _ in range(300):
        passed = rng.uniform(size=(40, 4)) < rng.choice([0.05, 0.75], size=(40, 1))
        clusters = np.repeat(np.arange(40), 4).tolist()
        share = proportion_of(passed.ravel().tolist(), clusters)
        covered += share.low <= 0.4 <= share.high
        low, high = wilson_interval(int(passed.sum()), 160)
        naive += low <= 0.4 <= high
    assert 0.92 <= covered / 300 <= 0.99 and naive / 300 < 0.88


def test_share_rejects_nothing_and_wrong_labels():
    with pytest.raises(ValueError, match="at least one trial"):
        proportion_of([])
    with pytest.raises(ValueError, match="label all 2"):
        proportion_of([True, False], ["a"])


# ---- tests and corrections ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (5, 5), (9, 1), (1, 9), (14, 0), (30, 17)])
def test_sign_test_sums_the_splits_that_are_at_least_as_uneven(wins, losses):
    n = wins + losses
    tail = sum(math.comb(n, k) for k in range(n + 1) if abs(k - n / 2) >= abs(wins - n / 2))
    assert sign_test(wins, losses) == pytest.approx(tail / 2**n)


def test_mcnemar_counts_only_what_differs():
    a = [True] * 10 + [True] * 8 + [False] * 2 + [False] * 5
    b = [True] * 10 + [False] * 8 + [True] * 2 + [False] * 5
    assert mcnemar(a, b) == (8, 2, sign_test(8, 2))
    with pytest.raises(ValueError, match="same items"):
        mcnemar([True], [])
    with pytest.raises(ValueError, match="negative"):
        sign_test(-1, 2)


def test_prompt_sign_test_takes_the_mean_of_a_prompt_and_leaves_ties_out():
    a, b = [1.0, 0.0, 1.0, 1.0, 0.3], [0.5, 0.4, 0.0, 1.0, 0.1]
    prompts = ["x", "x", "y", "z", "w"]  # x: +0.5 - 0.4 > 0; y > 0; z tie; w > 0
    assert prompt_sign_test(a, b, prompts) == sign_test(3, 0)
    assert prompt_sign_test([0.1 + 0.2], [0.3]) == 1.0


def test_holm_is_the_step_down_procedure():
    p_values = [0.01, 0.04, 0.03, 0.005]
    adjusted = holm(p_values)
    assert adjusted == pytest.approx([0.03, 0.06, 0.06, 0.02])
    rng = np.random.default_rng(0)
    for _ in range(50):
        p_values, level = rng.uniform(0, 0.2, size=5).tolist(), float(rng.uniform(0.01, 0.3))
        # The procedure itself: go through them from the smallest until one fails.
        rejected, order = set(), sorted(range(5), key=p_values.__getitem__)
        for rank, index in enumerate(order):
            if p_values[index] > level / (5 - rank):
                break
            rejected.add(index)
        assert {index for index, p in enumerate(holm(p_values)) if p <= level} == rejected
    assert holm([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        holm([math.nan])


def test_verdict_of_one_of_many_needs_the_corrected_p_value():
    clear = _difference(0.01, 0.2)
    assert verdict(clear, num_seeds=3, p_adjusted=0.05) == "better"
    assert verdict(clear, num_seeds=3, p_adjusted=0.051) == "no difference shown after correction"
    assert verdict(_difference(-0.01, 0.2), num_seeds=3, p_adjusted=0.0) == "no difference shown"
