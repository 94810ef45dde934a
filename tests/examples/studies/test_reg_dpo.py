"""The stability study: its result files, what it refuses, and that its report says what the numbers say."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest

from tests.support.paths import EXAMPLES
from video_trl.files import write_atomically


SCRIPT = EXAMPLES / "studies" / "reg_dpo.py"
STEPS = (50, 100)


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("example_study_reg_dpo", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def result(study, arm, seed, setting):
    """A made-up run: the larger the weight, the lower the gaps, and 0.1 is added to a score for every unit of it."""
    weight = study.ARMS[arm][1] if study.ARMS[arm] else 0.0
    gain = {"base": 0.0, "dpo": -0.2}.get(arm, min(weight, 1.0) / 10)
    steps = (0,) if arm == "base" else STEPS
    scores = {
        str(step): [
            {"prompt": f"p{i}", "pc": 0.4 + 0.01 * (i % 7) + gain * step / 100, "sa": 0.8, "video": ""}
            for i in range(12)
        ]
        for step in steps
    }
    made = {"arm": arm, "seed": seed, "setting": setting, "scores": scores}
    if arm == "base":
        return made
    log = []
    for step in range(10, 101, 10):
        win = 0.001 * step * (1.0 if arm == "dpo" else 0.5 - weight) + 0.0001 * seed
        ratio = 125 * math.exp(-step / 20)
        entry = {"step": step, "loss": 0.69 * math.exp(-step / 20), "win_gap": win, "lose_gap": win + 0.02}
        entry |= {"s_theta": -0.02, "dgr": ratio}
        if arm != "dpo":
            entry |= {"loss/dpo": entry["loss"], "loss/sft": 0.2, "sft_weight": 50.0, "chosen_weight": ratio + 50.0}
            entry["loss"] = 20.0
        log.append(entry)
    return {**made, "log": log, "collapse": [70 + seed] if arm == "dpo" else []}


@pytest.fixture
def finished(study, tmp_path):
    """All result files of three seeds."""
    args = study.StudyArguments(output_dir=str(tmp_path))
    for arm in study.ARMS:
        for seed in (0, 1, 2):
            path = study.result_path(args, arm, seed)
            write_atomically(path, json.dumps(result(study, arm, seed, args.setting())))
    return args


def cells(page, start):
    """The row that starts with a text, of the tables behind the one of the training curves."""
    tables = page.split("### Scores of the judge")[1]
    (line,) = [line for line in tables.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_arms_are_those_of_the_paper(study):
    """r = 25, 50, 125, 300, 500 where DGR starts at 125; DGR times 1/5, 1/2, 1, 2; DPO; the base model."""
    fixed = [125 * weight[1] for weight in study.ARMS.values() if weight and weight[0] == "fixed"]
    assert fixed == pytest.approx([25, 50, 125, 300, 500])
    assert [weight[1] for weight in study.ARMS.values() if weight and weight[0] == "dgr"] == [0.2, 0.5, 1.0, 2.0]
    assert len(study.ARMS) == 11


def test_report_tables_follow_from_the_numbers(study, finished, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n\n{study.MARKS[0]}\nold text\n{study.MARKS[1]}\n\n## Reading\n")
    study.main(["--output_dir", finished.output_dir, "--report", str(page)])
    text = page.read_text()
    assert text.startswith("# Title") and text.endswith("## Reading\n") and "old text" not in text
    assert cells(text, "base")[1:] == ["0.426", "", "", "0.800", "", ""]
    assert cells(text, "dpo")[1:4] == ["0.226", "-0.200 [-0.200, -0.200] worse", ""]
    assert cells(text, "dgr-0.5")[2] == "+0.050 [+0.050, +0.050] better"
    assert cells(text, "dgr-0.5")[5] == "+0.000 [+0.000, +0.000] no difference shown"
    (training, _) = [line for line in text.splitlines() if line.startswith("| dpo |")]
    assert "0.0801 [0.08, 0.0802]" in training and training.endswith("| 70, 71, 72 |")
    outcomes = {cells(text, claim)[0]: cells(text, claim)[2] for claim in CLAIMS}
    assert outcomes == CLAIMS
    for figure in ("reg_dpo_curves.png", "reg_dpo_scores.png"):
        assert (tmp_path / figure).read_bytes().startswith(b"\x89PNG") and figure in text


CLAIMS = {
    "DPO: gradient ratio and loss fall sharply": "holds",
    "... while both gaps rise": "holds",
    "DPO degrades the videos": "in part: pc (1 of 2)",
    "the SFT term curbs the win gap": (
        "holds: fixed-0.2, fixed-0.4, fixed-1, fixed-2.4, fixed-4, dgr-0.2, dgr-0.5, dgr-1, dgr-2 (9 of 9)"
    ),
    "the win gap is negative from about r = DGR on": "holds: fixed-1, fixed-2.4, fixed-4, dgr-1, dgr-2 (5 of 5)",
    "r = DGR beats DPO": "in part: pc (1 of 2)",
    "r = DGR beats the base model": "in part: pc (1 of 2)",
    "beyond r = DGR nothing changes": "holds",
}


def test_a_page_without_place_for_the_tables_is_left_alone(study, finished, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Title\n")
    with pytest.raises(ValueError, match="expected each of the lines"):
        study.main(["--output_dir", finished.output_dir, "--report", str(page)])
    assert page.read_text() == "# Title\n" and not list(tmp_path.glob("*.png"))


def test_missing_results_and_those_of_another_setting_are_refused(study, finished, tmp_path):
    with pytest.raises(ValueError, match="base.json was made with .*'beta': 500.0.*expected .*'beta': 7.0"):
        study.main(["--output_dir", finished.output_dir, "--beta", "7"])
    (tmp_path / "dgr-2-seed1.json").unlink()
    with pytest.raises(ValueError, match="1 result files are missing: .*dgr-2-seed1.json"):
        study.main(["--output_dir", finished.output_dir, "--report", str(tmp_path / "page.md")])
    with pytest.raises(ValueError, match="got \\['ddpo'\\]"):
        study.main(["--output_dir", finished.output_dir, "--arms", "ddpo"])


def test_what_is_finished_is_not_made_again(study, finished, tmp_path):
    """With all files there, nothing is trained: no data set appears and no file changes."""
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    study.main(["--output_dir", finished.output_dir])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_two_steps_of_two_arms(study, tmp_path):
    """The real thing, small: data, training, evaluation and result files."""
    small = ["--num_groups", "2", "--max_steps", "2", "--eval_every", "2", "--eval_prompts", "2", "--batch_size", "1"]
    study.main([*small, "--output_dir", str(tmp_path), "--seeds", "0", "--arms", "base", "dgr-1"])
    results = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert {name: list(found["scores"]) for name, found in results.items()} == {"base": ["0"], "dgr-1-seed0": ["2"]}
    before, after = results["base"]["scores"]["0"], results["dgr-1-seed0"]["scores"]["2"]
    assert [record["prompt"] for record in before] == [record["prompt"] for record in after]
    assert len({record["prompt"] for record in before}) == 2
    assert all(Path(record["video"]).is_file() and 0 <= record["pc"] <= 1 for record in before + after)
