"""Counting rules, and every table of the papers that is a table of counts."""

import numpy as np
import pytest

from tests.support.evaluation.phygdpo_tables import (
    ITEMS_1B,
    NO_COUNT,
    PARTICIPANTS,
    PROMPTS,
    TABLE_1A,
    TABLE_1B,
    TABLE_1C,
    TABLE_2A_2C,
    TABLE_2B,
)
from tests.support.evaluation.runs import make_run
from tests.support.evaluation.videorepa_tables import STATES, TABLE_1
from video_trl.evaluation import proportion_of, sign_test, wilson_interval
from video_trl.evaluation.runs.prompts import EvaluationPrompt
from video_trl.evaluation.runs.score import score_run
from video_trl.evaluation.runs.tables import BENCHMARKS, benchmark_named, tabulate
from video_trl.judges import PhyGroundJudge, QwenVLJudge, RemoteJudge, VideoPhy2Judge, VideoScore2Judge


def _counts(printed, n, decimals):
    """Counts whose share is printed like this."""
    return [k for k in range(n + 1) if round(k / n, decimals) == printed]


def _one_count(printed, n, decimals=4):
    (k,) = _counts(printed, n, decimals)
    share = proportion_of([True] * k + [False] * (n - k))
    assert round(share.value, decimals) == printed and share.low < share.value < share.high
    return k


@pytest.mark.parametrize("table", [TABLE_1A, TABLE_2B], ids=["1a", "2b"])
def test_every_cell_of_phygdpo_tables_1a_and_2b_is_a_count(table):
    for method, row in table.items():
        counts = {g: _one_count(p, n) for (g, n), p in zip(PROMPTS.items(), row, strict=True)}
        # The 11 prompts without category hold what is left.
        assert 0 <= counts["all"] - counts["activity"] - counts["interaction"] <= 11, method
    assert [_one_count(p, n) for p, n in zip(table[next(reversed(table))], PROMPTS.values(), strict=True)] == [
        9, 66, 28, 96,
    ]  # fmt: skip


def test_cells_of_phygdpo_tables_2a_and_2c_that_are_no_count_are_the_known_ones():
    found = {
        (method, group)
        for method, row in TABLE_2A_2C.items()
        for (group, n), printed in zip(PROMPTS.items(), row, strict=True)
        if not _counts(printed, n, 4)
    }
    assert found == NO_COUNT


def test_the_lead_of_phygdpo_table_1a_over_veo_is_within_the_noise():
    """What the counts say: intervals overlap almost wholly on the hard actions, 9 against 8 of 180."""
    ours, veo = wilson_interval(9, 180), wilson_interval(8, 180)
    assert veo[0] < ours[0] < veo[1] < ours[1]


def test_phygdpo_table_1b_averages_weigh_categories_by_their_items():
    for method, (*row, printed) in TABLE_1B.items():
        average = np.dot(row, ITEMS_1B) / sum(ITEMS_1B)
        if method == "Lavie":
            assert average == pytest.approx(0.389, abs=5e-4) and printed == 0.36  # does not follow from its row
        else:
            assert abs(average - printed) <= 0.006, method  # the row itself is rounded to 0.005


def test_phygdpo_table_1c_is_one_vote_of_each_participant():
    wins = {}
    for method, printed in TABLE_1C.items():
        (wins[method],) = [k for k in range(PARTICIPANTS + 1) if round(100 * k / PARTICIPANTS, 1) == printed]
    assert wins["Veo3.1"] == 67 and wins["Vcrafter2"] == 98
    assert all(sign_test(k, PARTICIPANTS - k) < 0.01 for k in wins.values())


@pytest.mark.parametrize("method", ["HunyuanVideo*", "VideoREPA-2B*", "CogVideoX-5B", "VideoREPA-5B*"])
def test_rows_of_videorepa_table_1_are_counts_that_add_up(method):
    row = [value / 100 for value in TABLE_1[method]]
    for column in (0, 1):
        parts = [_one_count(round(p, 3), n, 3) for p, n in zip(row[column:6:2], STATES.values(), strict=True)]
        assert sum(parts) == _one_count(round(row[6 + column], 3), sum(STATES.values()), 3)


def test_physics_columns_of_videorepa_table_1_add_up():
    for method in set(TABLE_1) - {"VideoCrafter2", "LaVIE"}:  # these two were scored on other numbers of videos
        row = [round(value / 100, 3) for value in TABLE_1[method]]
        parts = [_one_count(p, n, 3) for p, n in zip(row[1:6:2], STATES.values(), strict=True)]
        assert sum(parts) == _one_count(row[7], 344, 3)


def test_tabulate_counts_groups_and_prints_n(tmp_path):
    prompts = [
        EvaluationPrompt("a", groups=("hard", "activity")),
        EvaluationPrompt("b", groups=("activity",)),
        EvaluationPrompt("c"),
    ]
    make_run(tmp_path, "model", [(0.9, 0.9), (0.9, 0.1), (0.1, 0.9)], prompts=prompts)
    table = tabulate(tmp_path)
    assert {group: (s["sa"].k, s["pc"].k, s["joint"].k, s["joint"].n) for group, s in table.proportions.items()} == {
        "all": (2, 2, 1, 3),
        "hard": (1, 1, 1, 1),
        "activity": (2, 1, 1, 2),
    }
    assert table.means["all"]["pc"] == pytest.approx(1.9 / 3, abs=0.03)
    text = str(table)
    assert "1/3 = 33.3 %" in text and "Judge: colour" in text
    assert [line.split()[:2] for line in text.splitlines()[3:6]] == [["all", "3"], ["hard", "1"], ["activity", "2"]]


def test_several_seeds_count_as_videos_of_one_prompt(tmp_path):
    make_run(tmp_path, "model", [(0.9, 0.9)] * 4 + [(0.1, 0.1)] * 4, seeds=(0, 1, 2, 3))
    share = tabulate(tmp_path).proportions["all"]["joint"]
    assert (share.k, share.n, share.num_clusters) == (4, 8, 2)
    assert (share.low, share.high) == pytest.approx(wilson_interval(1, 2))


@pytest.mark.parametrize(
    ("benchmark", "score", "passed"),
    [("videophy", 0.5, True), ("videophy", 0.4999, False), ("videophy2", 4 / 5, True), ("videophy2", 3 / 5, False)],
)
def test_thresholds_include_the_limit(benchmark, score, passed):
    passes = BENCHMARKS[benchmark].passes
    assert passes["joint"]({"sa": score, "pc": score}) == passes["sa"]({"sa": score}) == passed
    assert not passes["joint"]({"sa": 1.0, "pc": 0.0})


def test_the_recorded_rule_counts_unless_another_is_asked_for(tmp_path):
    make_run(tmp_path, "model", [(0.7, 0.7)], benchmark="videophy2")
    assert tabulate(tmp_path).proportions["all"]["joint"].k == 0
    assert tabulate(tmp_path, benchmark="videophy").proportions["all"]["joint"].k == 1
    with pytest.raises(ValueError, match="Unknown benchmark 'videophy3'"):
        benchmark_named("videophy3")


def test_a_judge_that_says_seed_or_prompt_does_not_change_whose_video_it_is(tmp_path):
    class Talkative:
        name = identity = "talkative"

        def score(self, videos, prompts):
            return [{"sa": 1.0, "pc": 0.5, "prompt": "asked of me", "seed": 7, "category": "mine"} for _ in prompts]

    run = make_run(tmp_path, "n", [(0.5, 0.5)], seeds=[3], scored=False)
    score_run(tmp_path, Talkative())
    (row,) = tabulate(run, judge="talkative").rows()
    assert (row["prompt"], row["seed"], row["category"], row["pc"]) == ("prompt 0", 3, "", 0.5)


class Rater:
    """A judge of this identity, and what it says of three videos."""

    def __init__(self, identity, *scores):
        self.name, self.identity, self.scores = identity[-40:], identity, scores

    def score(self, videos, prompts):
        return [{"sa": score, "pc": score} for score in self.scores]


def test_a_rating_of_four_passes_videophy2_whatever_the_judge_makes_of_it(tmp_path):
    """A server's 4 is 0.75, the benchmark's own 0.8: both are two of three; and what lies between is no 4 of 5."""
    run = make_run(tmp_path, "n", [(0.5, 0.5)] * 3, benchmark="videophy2", scored=False)
    options = {"base_url": "http://localhost:1/v1", "model": "m"}
    quarters = [RemoteJudge(**options).identity, PhyGroundJudge(**options).identity]
    quarters += [f"{VideoScore2Judge.name}:v1:weights=x", f"{QwenVLJudge.name}:v1:weights=x:prompts=y:rating,bfloat16"]
    raters = [Rater(identity, 0.5, 0.75, 1.0) for identity in quarters]
    raters += [Rater(f"{VideoPhy2Judge.name}:v1", 0.6, 0.8, 1.0), Rater("people:2024", 0.79, 0.8, 0.81)]
    raters.append(Rater(f"{QwenVLJudge.name}:v1:weights=x:prompts=y:yes_no,bfloat16", 0.75, 0.8, 0.9))
    for rater in raters:
        score_run(tmp_path, rater)
        assert tabulate(run, judge=rater.name).proportions["all"]["joint"].k == 2, rater.identity
