"""Rows of the sandbox that differ in whose winners there are, how many, how drawn, and against which losers."""

import numpy as np
import pytest

from video_trl.data.video_io import read_video
from video_trl.sandbox import SandboxJudge
from video_trl.sandbox.data.regimes import HELD_OUT, SandboxRows, own_best, worst_first


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A pool of 24 clips; of the first twelve the judge passes two."""
    return SandboxRows(tmp_path_factory.mktemp("rows"), found_clips=24, num_rejected=2, below=0.4)


@pytest.mark.slow
def test_rows_of_every_kind_come_from_one_pool(rows):
    judged, held_out, found = rows.of("judged"), rows.held_out(), rows.of("found groups")
    assert len(held_out) == max(1, round(HELD_OUT * (len(judged) + len(held_out)))) and len(judged) > 1
    assert not set(judged["provenance"]) & set(held_out["provenance"])
    # As found is the whole pool, most of it unlawful; what the judge passes is a part of it.
    assert len(found) == 24 and {*judged["prompt"], *held_out["prompt"]} < set(found["prompt"])
    scores = SandboxJudge().score([np.asarray(read_video(row["chosen"])) for row in found], found["prompt"])
    assert sum(float(score["pc"]) < 0.4 for score in scores) >= 3
    assert len(rows.of("first 2")) == 2 and rows.of("first 2")[0]["prompt"] == judged[0]["prompt"]
    own = rows.of("own best, own worst")
    assert [row["prompt"] for row in own] == judged["prompt"] and own[0]["chosen"] in judged[0]["rejected"]


@pytest.mark.slow
def test_the_wild_rendering_shows_the_same_sentence_otherwise(rows):
    plain, wild = rows.held_out()[0], rows.held_out(wild=True)[0]
    assert plain["prompt"] == wild["prompt"] and plain["rejected"] == wild["rejected"]
    pictures = [np.asarray(read_video(row["chosen"])).astype(float) for row in (plain, wild)]
    assert np.abs(pictures[0] - pictures[1]).mean() > 10


def test_an_unknown_kind_is_refused(rows):
    with pytest.raises(ValueError, match="Expected a kind of rows that `SandboxRows` describes, got 'clean'"):
        rows.of("clean")


def scored(*pcs):
    return {
        "prompt": "p",
        "rejected": list("abcdef"[: len(pcs)]),
        "rejected_scores": [{"sa": 1, "pc": pc} for pc in pcs],
    }


def test_videos_that_break_the_law_come_first_as_they_were_drawn_otherwise():
    assert worst_first(scored(0.9, 0.3, 0.5, 0.1), 3, 0.4)["rejected"] == ["b", "d", "a"]
    assert worst_first(scored(0.9, 0.3), 1, 0.4)["rejected_scores"] == [{"sa": 1, "pc": 0.3}]


def test_own_pairs_are_the_best_and_the_worst():
    row = own_best(scored(0.5, 0.9, 0.2, 0.9))
    assert (row["chosen"], row["chosen_pc"], row["rejected"]) == ("b", 0.9, ["c"])
    row = own_best(scored(0.5, 0.5, 0.5))
    assert (row["chosen"], row["rejected"]) == ("a", ["c"])
