import json
import math

import numpy as np
import pytest

from tests.support.evaluation.runs import ColourJudge, colour_video, damage, make_run
from video_trl.data.video_io import write_video
from video_trl.evaluation.runs.run import load_run
from video_trl.evaluation.runs.score import load_scores, score_run
from video_trl.files import partial_path
from video_trl.judges import VideoJudge


SCORES = [(0.2, 0.4), (0.6, 0.8), (1.0, 0.0)]


class FixedJudge:
    """Gives what it was made with, whatever it sees."""

    def __init__(self, scores, name="fixed", identity="fixed 1"):
        self.scores, self.name, self.identity = list(scores), name, identity

    def score(self, videos, prompts):
        given, self.scores = self.scores[: len(videos)], self.scores[len(videos) :]
        return given


def test_scores_come_back_in_order_and_are_not_asked_for_again(tmp_path):
    run = make_run(tmp_path, "n", SCORES, scored=False)
    judge = ColourJudge()
    assert isinstance(judge, VideoJudge)
    score_run(tmp_path, judge, batch_size=2)
    scores = load_scores(run)
    for score, (sa, pc) in zip(scores, SCORES, strict=True):
        assert (score["sa"], score["pc"]) == pytest.approx((sa, pc), abs=0.03)
    assert scores[0]["explanation"].startswith("red 0.2")
    score_run(tmp_path, judge)
    assert judge.calls == ["prompt 0", "prompt 1", "prompt 2"]


def test_shards_score_every_video_once(tmp_path):
    run = make_run(tmp_path, "n", SCORES, scored=False)
    judge = ColourJudge()
    score_run(tmp_path, judge, rank=1, num_ranks=2)
    assert judge.calls == ["prompt 1"]
    with pytest.raises(ValueError, match=r"2 of 3 videos have no score, the first being 00000-0 \('prompt 0'\)"):
        load_scores(run)
    score_run(tmp_path, judge, rank=0, num_ranks=2)
    assert judge.calls == ["prompt 1", "prompt 0", "prompt 2"] and len(load_scores(run)) == 3


def test_a_killed_score_is_given_again_and_its_leftover_removed(tmp_path):
    run = make_run(tmp_path, "n", SCORES)
    folder = tmp_path / "scores" / "colour"
    leftover = partial_path(folder / "00001-0.json")
    (folder / "00001-0.json").rename(leftover)  # written, not yet renamed
    judge = ColourJudge()
    score_run(tmp_path, judge)
    assert judge.calls == ["prompt 1"] and len(load_scores(run)) == 3
    assert not leftover.exists()


@pytest.mark.parametrize("bad", [math.nan, None, 1.5, -0.1, "0.5", True])
def test_a_score_that_cannot_be_counted_is_named_and_the_others_are_kept(tmp_path, bad):
    run = make_run(tmp_path, "n", SCORES, scored=False)
    good = {"sa": 0.5, "pc": 0.5}
    broken = {"sa": 0.5, "pc": bad, "error": "the server was away"}
    with pytest.raises(ValueError, match=r"left 1 of 3 videos.*pc=.*the server was away.*00001-0 \('prompt 1'\)"):
        score_run(tmp_path, FixedJudge([good, broken, good]))
    score_run(tmp_path, FixedJudge([good]))  # one is missing, one is asked for
    assert load_scores(run) == [good] * 3


def test_a_damaged_video_costs_its_own_score(tmp_path):
    run = make_run(tmp_path, "n", SCORES, scored=False)
    damage(run.video(run.cases[0]))
    with pytest.raises(ValueError, match=r"left 1 of 3 videos.*00000-0\.mp4: damaged"):
        score_run(tmp_path, ColourJudge(), batch_size=2)
    assert len(list((tmp_path / "scores" / "colour").glob("0*.json"))) == 2


def test_a_judge_that_forgets_a_video_is_refused(tmp_path):
    make_run(tmp_path, "n", SCORES, scored=False)
    with pytest.raises(ValueError, match="gave 2 scores for 3 videos"):
        score_run(tmp_path, FixedJudge([{"sa": 0.5, "pc": 0.5}] * 2))


def test_scores_of_another_judge_of_the_same_name_are_not_mixed(tmp_path):
    make_run(tmp_path, "n", SCORES, scored=False)
    score_run(tmp_path, FixedJudge([{"sa": 0.5, "pc": 0.5}] * 3))
    with pytest.raises(ValueError, match="holds the scores of another judge.*fixed 1.*fixed 2"):
        score_run(tmp_path, FixedJudge([], identity="fixed 2"))


def test_several_judges_stand_side_by_side_and_one_has_to_be_named(tmp_path):
    run = make_run(tmp_path, "n", SCORES)
    score_run(tmp_path, FixedJudge([{"sa": 0.5, "pc": 0.5}] * 3, name="../of/another"))
    assert {path.name for path in (tmp_path / "scores").iterdir()} == {"colour", "_of_another"}
    with pytest.raises(ValueError, match=r"'\.\./of/another', 'colour'\]: name one"):
        load_scores(run)
    assert load_scores(run, "../of/another")[0] == {"sa": 0.5, "pc": 0.5}
    with pytest.raises(ValueError, match="no scores of the judge 'third'"):
        load_scores(run, "third")


def test_a_video_that_changed_after_it_was_scored_is_refused(tmp_path, monkeypatch):
    """And nothing is decoded to find that out."""
    run = make_run(tmp_path, "n", SCORES)
    for module in ("run.probe_video", "run.EvaluationRun.check_videos"):
        monkeypatch.setattr(f"video_trl.evaluation.runs.{module}", None)
    assert len(load_scores(run)) == 3
    write_video(run.video(run.cases[1]), colour_video(0.1, 0.1), 8)
    with pytest.raises(ValueError, match="00001-0.mp4 is not the video that was scored"):
        load_scores(load_run(tmp_path))


def test_unscored_and_incomplete_runs_are_refused(tmp_path):
    run = make_run(tmp_path, "n", SCORES, scored=False)
    with pytest.raises(ValueError, match="none: score it with `score_run`"):
        load_scores(run)
    run.video(run.cases[2]).unlink()
    with pytest.raises(ValueError, match="1 of 3 videos are missing"):
        score_run(tmp_path, ColourJudge())
    assert not list((tmp_path / "scores").glob("*/0*.json"))


def test_a_score_edited_to_nan_is_refused(tmp_path):
    run = make_run(tmp_path, "n", SCORES)
    path = tmp_path / "scores" / "colour" / "00000-0.json"
    content = json.loads(path.read_text())
    content["score"]["sa"] = math.nan
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="changed by hand: sa=nan"):
        load_scores(run)


def test_what_a_judge_adds_becomes_plain_json(tmp_path):
    run = make_run(tmp_path, "n", SCORES[:1], scored=False)
    raw = {"residual": math.inf, "track": np.array([1.5, math.nan]), "frames": (np.int64(3),), "ok": np.bool_(True)}
    score_run(tmp_path, FixedJudge([{"sa": np.float32(0.5), "pc": 1, "raw": raw}]))
    assert load_scores(run)[0] == {
        "sa": 0.5,
        "pc": 1,
        "raw": {"residual": None, "track": [1.5, None], "frames": [3], "ok": True},
    }
