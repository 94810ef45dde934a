"""What the doctor says of data whose fault is known."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.support.evaluation.runs import damage
from tests.support.tiny import tiny_wan_pipeline
from video_trl.cli import main
from video_trl.data.video_io import write_video
from video_trl.evaluation.data_doctor import diagnose, probe, separation, style_of
from video_trl.load import load_judge
from video_trl.sandbox import simulate


def auc_by_hand(groups) -> float:
    pairs = [(group[0], other) for group in groups for row in groups for other in row[1:]]
    return sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)


def test_auc_is_the_share_of_comparisons_and_its_interval_knows_the_rows():
    generator = np.random.default_rng(0)
    groups = [np.round(generator.normal([1.2, 0, 0]), 1) for _ in range(40)]  # rounded: ties
    found = separation("x", groups)
    assert found.auc == pytest.approx(auc_by_hand(groups)) and found.low < found.auc < found.high
    assert found.is_sure and 0.08 < found.high - found.low < 0.35
    assert not separation("x", [generator.normal(size=2) for _ in range(40)]).is_sure
    together = separation("x", groups, comparisons=7)
    assert together.low < found.low and found.high < together.high
    perfect = separation("x", [np.array([1.0, 0.0])] * 5)
    assert (perfect.auc, perfect.low, perfect.high, perfect.strength) == (1.0, 1.0, 1.0, 1.0)
    equal = separation("x", [np.zeros(3)] * 5)
    assert (equal.auc, equal.low, equal.high, equal.is_sure) == (0.5, 0.5, 0.5, False)
    uneven = [np.array([1.0, 0.0]), np.array([0.0, 2.0, 2.0, -1.0])]
    assert separation("x", uneven).auc == pytest.approx(auc_by_hand(uneven))


def test_the_probe_is_judged_on_rows_that_it_has_not_seen():
    generator = np.random.default_rng(1)
    noise = [generator.normal(size=(2, 30)) for _ in range(30)]  # more features than rows: it can fit anything
    assert not separation("probe", probe(noise)).is_sure
    shifted = [group + np.array([[0.8], [0.0]]) for group in noise]
    assert separation("probe", probe(shifted)).auc > 0.95


def clip(seed: int) -> np.ndarray:
    """Smooth noise, (9, 32, 32, 3), moving to the right."""
    coarse = np.random.default_rng(seed).integers(60, 180, size=(9, 9, 3))
    image = np.kron(coarse, np.ones((4, 4, 1)))[:32, :32]
    return np.stack([np.roll(image, shift, axis=1) for shift in range(9)]).astype(np.uint8)


def dataset(change, count: int = 8) -> list[dict]:
    return [
        {"prompt": "A ball.", "chosen": clip(seed), "rejected": [change(clip(100 + seed))]} for seed in range(count)
    ]


def blur(video: np.ndarray) -> np.ndarray:
    wide = video.astype(np.float32)
    for axis in (1, 2):
        wide = sum(np.roll(wide, shift, axis=axis) for shift in range(-2, 3)) / 5
    return wide.astype(np.uint8)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("brightness", lambda video: video + 40),
        ("sharpness", blur),
        ("frames", lambda video: video[:5]),
        ("motion", lambda video: np.repeat(video[:1], 9, axis=0)),
        ("saturation", lambda video: np.repeat(video.mean(axis=3, keepdims=True), 3, axis=3).astype(np.uint8)),
    ],
)
def test_a_confound_is_named(name, change):
    found = diagnose(dataset(change))
    assert [problem.split()[0] for problem in found.problems][0:1] and any(
        problem.startswith(f"{name} tells chosen from rejected") for problem in found.problems
    )
    assert next(each for each in found.style if each.name == name).strength == 1.0


def test_good_pairs_have_no_problem_and_a_probe_finds_what_no_measure_names():
    found = diagnose(dataset(lambda video: video, 12), pipeline=tiny_wan_pipeline())
    assert found.problems == [] and not found.probe.is_sure
    blurred = diagnose(dataset(blur, 12), pipeline=tiny_wan_pipeline())
    assert blurred.probe.is_sure and blurred.probe.auc > found.probe.auc
    # What training brings videos to is no confound.
    assert diagnose(dataset(lambda video: video[:5]), pixels={"num_frames": 5}).problems == []


def test_equal_pairs_and_scores_that_say_nothing():
    rows = dataset(lambda video: video)
    rows[3]["rejected"] = [rows[3]["chosen"].copy()]
    for number, row in enumerate(rows):
        row["rejected_scores"] = [{"sa": 0.5, "pc": number / 10}]
    found = diagnose(rows)
    assert any("(rows 3)" in problem for problem in found.problems)
    assert any("'sa' of `rejected_scores` hardly differ" in problem for problem in found.problems)
    assert not any("'pc' of" in problem for problem in found.problems)


def simulated(seed: int, violation: str | None) -> np.ndarray:
    return simulate(seed, motion="free_fall", violation=violation).video


def test_a_judge_is_tried_and_exchanged_columns_are_seen():
    """The sandbox's exact judge on lawful and unlawful clips, as they are and the wrong way round."""
    judge = load_judge("sandbox", fps=8)
    prompt = simulate(0, motion="free_fall").prompt
    right = [
        {"prompt": prompt, "chosen": simulated(seed, None), "rejected": [simulated(seed, "teleport")]}
        for seed in range(4)
    ]
    found = diagnose(right, judge=judge)
    assert found.judge.auc > 0.9 and not any("judge" in problem for problem in found.problems)
    wrong = [{**row, "chosen": row["rejected"][0], "rejected": [row["chosen"]]} for row in right]
    assert any("may be exchanged" in problem for problem in diagnose(wrong, judge=judge).problems)


def test_the_command_says_what_it_found(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = []
    for seed in range(4):
        for name, video in (("w", clip(seed)), ("l", clip(10 + seed)[:5])):
            write_video(f"{name}{seed}.mp4", video, 8)
        lines.append(json.dumps({"prompt": "A ball.", "winner": f"w{seed}.mp4", "rejected": f"l{seed}.mp4"}))
    Path("pairs.jsonl").write_text("\n".join(lines))
    assert main(["data", "doctor", "pairs.jsonl", "--column", "chosen=winner"]) == 1
    shown = capsys.readouterr().out
    assert "4 rows, 8 videos" in shown and "frames: AUC 1.00 [1.00, 1.00]" in shown
    assert "problem: frames tells chosen from rejected in 100%" in shown and "latents were not probed" in shown
    assert main(["data", "doctor"]) == 2


class Absent:
    """A server's judge, which has no answer for some."""

    name = identity = "absent"

    def score(self, videos, prompts):
        answers = {"A ball.": {"sa": 0.5, "pc": 0.5}}
        return [answers.get(prompt, {"sa": None, "pc": None, "error": "the server was away"}) for prompt in prompts]


def test_one_row_is_too_few():
    with pytest.raises(ValueError, match="at least two rows"):
        diagnose(dataset(blur, 1))
    assert style_of(np.zeros((1, 2, 2, 3), dtype=np.uint8))["sharpness"] == 0.0


def test_a_row_that_cannot_be_looked_at_is_named_and_left_out(tmp_path):
    damage(tmp_path / "bad.mp4")
    rows = dataset(lambda video: video, count=4)
    rows[1]["rejected"] = [str(tmp_path / "bad.mp4")]
    rows[2]["prompt"] = "No ball that the judge knows."
    found = diagnose([*rows, rows[3]], judge=Absent())
    assert found.rows == 4 and any("row 1 is left out" in problem for problem in found.problems)
    assert any("row 2 has no scores of the judge: the server was away" in problem for problem in found.problems)
    odd = [{**row, "chosen": row["chosen"][:, :31, :31]} if n == 1 else row for n, row in enumerate(dataset(blur, 3))]
    found = diagnose(odd, pipeline=tiny_wan_pipeline())  # 31 pixels are none that the VAE takes
    assert found.rows == 2 and sum("row 1 is left out" in problem for problem in found.problems) == 1
    with pytest.raises(
        ValueError, match=r"Fewer than two rows can be looked at.*row 1 is left out.*bad\.mp4: damaged"
    ):
        diagnose(rows[:2])
