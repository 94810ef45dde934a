"""What the tables of the studies of rounds call better, and which arms and controls they have."""

import numpy as np
import pytest

from tests.support.paths import EXAMPLES
from tests.support.scripts import load_script


@pytest.fixture(scope="module")
def rounds():
    return load_script(EXAMPLES / "studies" / "rounds.py", "rounds")


@pytest.fixture(scope="module")
def tuned(rounds):
    return load_script(EXAMPLES / "studies" / "tuned_first.py", "tuned_first")  # its neighbour by its bare name


SENTENCES = [f"sentence {number}" for number in range(30)] * 3


def values(mean):
    return (mean + np.tile(np.linspace(-0.05, 0.05, 30), 3)).tolist()


def test_rounds_are_compared_with_each_control(rounds):
    scores = {rounds.ROUNDS: values(0.8), rounds.LAST: values(0.9), rounds.BASE: values(0.5)}
    scores |= {rounds.KEPT: values(0.8), rounds.SFT: values(0.7), rounds.LONGER: values(0.9)}
    lines = rounds.rows(scores, SENTENCES, 3)[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| base", "| first losers kept", "| SFT", "| SFT, equal time"]
    assert [line.split(" | ")[-1] for line in lines] == ["better |", "no difference shown |", "better |", "worse |"]
    assert "+0.300 [+0.300, +0.300]" in lines[0] and "| 0.500 |" in lines[0]
    assert rounds.rows(scores, SENTENCES, 1)[2].endswith("higher in 1 seed (a verdict needs 3) |")
    assert rounds.rows(scores, SENTENCES, 3, rounds.LAST)[-1].endswith("no difference shown |")


def test_preferences_after_fine_tuning_are_compared_with_every_control_that_there_is(tuned):
    scores = {arm: values(0.8) for arm in (tuned.BASE, *tuned.ARMS)} | {tuned.LOG_RATIO: values(0.9)}
    lines = tuned.rows(scores, SENTENCES, 3)[2:]
    assert len(lines) == 6 and [line.endswith("| better |") for line in lines] == [True] * 3 + [False] * 3
    second = {arm: scores[arm] for arm in (tuned.BASE, tuned.LOG_RATIO, tuned.LONGER, tuned.AGAIN)}
    assert [line.split(" | ")[0] for line in tuned.rows(second, SENTENCES, 3)[2:]] == [
        "| SFT, then log-ratio over SFT, equal time",
        "| SFT, then log-ratio over SFT, then SFT",
    ]


@pytest.mark.parametrize(("arm", "updates"), [("SFT", 400), ("SFT, equal time", 630), ("SFT, then SFT", 230)])
def test_controls_have_the_updates_of_equal_time(tuned, tmp_path, monkeypatch, arm, updates):
    study = tuned.Study(tuned.StudyArguments(output_dir=str(tmp_path)), 0)
    given = {}
    monkeypatch.setattr(tuned, "VideoSFTTrainer", lambda model, args, rows: given.update(vars(args)))
    monkeypatch.setattr(tuned.Study, "clips", [])
    monkeypatch.setattr(tuned.Study, "adapter", lambda self, name: tmp_path / name)
    study.trainer(arm, str(tmp_path))
    assert given["max_steps"] == updates
    assert given["init_adapter"] == (str(tmp_path / "SFT") if arm == tuned.AGAIN else None)
