"""The ablation of PhyGDPO: its data, a small piece of it for real, and its report."""

import importlib.util
import json

import pytest

from tests.support.evaluation.runs import make_run
from tests.support.paths import EXAMPLES
from video_trl.evaluation.runs.prompts import EvaluationPrompt


SCRIPT = EXAMPLES / "studies" / "phygdpo.py"
SMALL = ["--num_groups", "3", "--num_rejected", "2", "--max_steps", "1", "--batch_size", "3", "--eval_prompts", "7"]


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("study_phygdpo", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pairs_of_the_models_own_videos_are_its_best_and_its_worst(study):
    scores = [{"sa": 0.5, "pc": 0.5}, {"sa": 0.9, "pc": 0.8}, {"sa": 0.2, "pc": 0.9}, {"sa": 0.4, "pc": 0.6}]
    group = {"rejected": ["a", "b", "c", "d"], "rejected_scores": scores}
    assert study.best_and_worst(group) == {"chosen": "b", "rejected": "d"}
    group["rejected_scores"] = [{"sa": 0.5, "pc": 0.5}] * 4
    assert study.best_and_worst(group) == {"chosen": "a", "rejected": "d"}


def test_hard_sentences_are_those_of_two_motions(study):
    prompts = study.prompts(10)
    hard = [prompt.category for prompt in prompts if study.HARD in prompt.groups]
    assert sorted(set(hard)) == ["collision", "free_fall"] and len(hard) == 4


@pytest.mark.slow
def test_arms_leave_weights_and_runs_and_are_not_made_again(study, tmp_path):
    argv = [*SMALL, "--output_dir", str(tmp_path), "--seeds", "0", "--arms", "base", "video-dpo", "phygdpo-copied"]
    study.main(argv)
    weights = tmp_path / "weights"
    assert (weights / "video-dpo-seed0" / "pytorch_lora_weights.safetensors").is_file()
    assert (weights / "phygdpo-copied-seed0" / "transformer" / "config.json").is_file()
    memory = json.loads((tmp_path / "memory" / "phygdpo-copied.json").read_text())
    assert memory["weights"] == 2 * 4 * memory["trained"]  # float32, all of them, twice
    # At the peak there are a gradient and two moments of AdamW for each trained weight, and more.
    assert memory["training"] > 3 * 4 * memory["trained"]
    args = study.StudyArguments(**json.loads((tmp_path / "setting.json").read_text()), output_dir=str(tmp_path))
    args.arms, args.seeds = ["base", "video-dpo", "phygdpo-copied"], [0]
    results = study.load_results(args)
    assert results["base"].values["pc"] != results["phygdpo-copied"].values["pc"]  # what was trained was evaluated
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    study.main(argv)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == made
    with pytest.raises(ValueError, match="was made with"):
        study.main([*argv, "--beta", "1"])


def test_report_counts_compares_and_says_better_only_with_reason(study, tmp_path):
    args = study.StudyArguments(output_dir=str(tmp_path / "out"), eval_prompts=10)
    prompts = [EvaluationPrompt(f"p{n}", groups=("hard",) if n < 4 else ()) for n in range(10)]
    gains = {"base": 0.0, "sft": 0.2, "flow-dpo": 0.2, "video-dpo": 0.2, "groupwise": 0.2, "phygdpo": 0.4,
             "phygdpo-copied": -0.2, "phygdpo-copied-slow": 0.0}  # fmt: skip
    for arm, gain in gains.items():
        for seed in args.seeds[:1] if arm == "base" else args.seeds:
            scores = [(0.8, 0.4 + gain)] * 10
            training_seed = None if arm == "base" else seed
            make_run(study.run_folder(args, arm, seed), arm, scores, prompts=prompts, training_seed=training_seed)
            folder = study.weights_folder(args, arm, seed)
            folder.mkdir(parents=True)
            (folder / "x.safetensors").write_bytes(bytes(2**20))
            log = {"log": [{"win_gap": 0.01 * (seed + 1), "loss": 1.0}], "seconds": {"train": 7.4}}
            (folder / "training.json").write_text(json.dumps(log))
        memory = {"weights": 2**20, "training": 2**21, "trained": 1234}
        (args.folder / "memory").mkdir(exist_ok=True)
        (args.folder / "memory" / f"{arm}.json").write_text(json.dumps(memory))
    page = tmp_path / "page.md"
    page.write_text("before\n" + "\n".join(study.MARKS) + "\nafter\n")
    argv = ["--output_dir", str(args.folder), "--eval_prompts", "10", "--report", str(page)]
    for _ in range(2):  # written again, the page does not grow
        study.main(argv)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and text.count("### Comparisons") == 1
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines()}
    assert "12/12 = 100.0 %" in rows["+ PGR"] and "30/30 = 100.0 %" in rows["+ PGR"] and "+0.4" in rows["+ PGR"]
    assert "| 0/4 = 0.0 %" in rows["base"] and "| 0/10 = 0.0 %" in rows["base"]  # its videos are counted once
    assert "1,234 | 1.0 MiB | 3.0 MiB | 1.0 MiB" in rows["copied reference"]
    assert "no difference shown" in rows["groupwise over flow-dpo"] and "better" not in rows["groupwise over flow-dpo"]
    assert "| better |" in rows["phygdpo over phygdpo-copied"]
    assert "0.02 [0.01, 0.03]" in rows["sft"] and "7, 7, 7" in rows["sft"]
    assert (tmp_path / "phygdpo_ablation.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="all arms"):
        study.main([*argv, "--arms", "base", "sft"])
