import math

import numpy as np
import pytest

from tests.support.evaluation.reg_dpo_tables import GSB
from video_trl.evaluation.votes.gsb import gsb, majority


def _verdicts(good, same, bad):
    return ["good"] * good + ["same"] * same + ["bad"] * bad


@pytest.mark.parametrize(("table", "comparison", "dimension", "good", "same", "bad", "printed"), GSB)
def test_every_published_row_recomputes_from_single_verdicts(table, comparison, dimension, good, same, bad, printed):
    result = gsb(_verdicts(good, same, bad), num_resamples=200)
    assert (result.good, result.same, result.bad, result.n) == (good, same, bad, good + same + bad)
    assert round(result.score, 2) == printed
    assert result.score_interval[0] < result.score < result.score_interval[1]
    assert result.net == pytest.approx((good - bad) / (good + same + bad))
    assert result.verdict() == "A preferred"  # all 24 comparisons of the paper hold on their own


def test_net_interval_is_that_of_the_mean_and_covers():
    """Of n independent verdicts net is a mean: its standard error is known."""
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(100):
        drawn = rng.choice(["good", "same", "bad"], size=80, p=[0.4, 0.3, 0.3])
        low, high = gsb(list(drawn), num_resamples=400, seed=trial).net_interval
        covered += low <= 0.1 <= high
    assert 0.89 <= covered / 100 <= 1


def test_copies_of_a_prompt_do_not_narrow_the_interval():
    once = _verdicts(12, 4, 4)
    names = [f"p{i}" for i in range(20)]
    single = gsb(once, names)
    repeated = gsb(once * 5, names * 5)
    assert repeated.net_interval == pytest.approx(single.net_interval) and repeated.p_value == single.p_value
    free = gsb(once * 5)
    assert free.net_interval[1] - free.net_interval[0] < 0.6 * (single.net_interval[1] - single.net_interval[0])


def test_no_preference_while_zero_is_inside_or_the_correction_says_no():
    assert gsb(_verdicts(10, 5, 9)).verdict() == "no preference shown"
    clear = gsb(_verdicts(30, 5, 9))
    assert clear.verdict() == "A preferred" and clear.verdict(p_adjusted=0.2).endswith("after correction")
    assert gsb(_verdicts(9, 5, 30)).verdict() == "B preferred"


def test_all_good_is_infinite_and_all_same_is_a_draw():
    best = gsb(_verdicts(6, 0, 0))
    assert best.score == math.inf and best.score_interval == (math.inf, math.inf) and best.win_rate == 1
    some = gsb(_verdicts(6, 0, 1))
    assert some.score_interval[1] == math.inf and not math.isnan(some.score_interval[0])
    draw = gsb(_verdicts(0, 6, 0))
    assert (draw.score, draw.net, draw.win_rate, draw.p_value) == (1, 0, 0.5, 1)


@pytest.mark.parametrize(
    ("verdicts", "prompts", "message"),
    [([], None, "none at all"), (["good", "better"], None, "better"), (["good"], ["a", "b"], "label all 1")],
)
def test_bad_input(verdicts, prompts, message):
    with pytest.raises(ValueError, match=message):
        gsb(verdicts, prompts)


@pytest.mark.parametrize(
    ("votes", "expected"),
    [
        (["good"], "good"),
        (["good", "bad"], "same"),
        (["good", "good", "bad"], "good"),
        (["bad", "same", "good"], "same"),
        (["same", "bad", "bad"], "bad"),
    ],
)
def test_majority(votes, expected):
    assert majority(votes) == expected


def test_labels_may_stand_in_an_array():
    verdicts, labels = ["good", "bad", "good"], [0, 0, 1]
    assert gsb(verdicts, np.array(labels)) == gsb(verdicts, labels)
