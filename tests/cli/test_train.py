"""`video-trl train` and `encode`, on the sandbox at its smallest."""

import json
import math
import os
import re
import subprocess
import sys

import pytest
import yaml

from tests.support.curation.clips import SMALL, write_clip
from tests.support.curation.phyaug_runs import settings as phyaug_settings
from tests.support.paths import ROOT
from tests.support.tiny import tiny_wan_a14b_pipeline
from video_trl.cli import main
from video_trl.cli.methods import DataArguments, check_training, make_trainer
from video_trl.cli.train import split_launcher
from video_trl.data import write_video
from video_trl.hub import LORA_FILE_NAME
from video_trl.hub.lora import expert_of
from video_trl.methods import own_methods
from video_trl.sandbox import build_group_dataset, load_sandbox, simulate


COMMON = ["--use_cpu", "--report_to", "none", "--disable_tqdm", "true", "--save_strategy", "no", "--max_steps", "1"]
METHODS = {method.name: method for method in own_methods()}
SMALL_REPA = ["--align_layer", "4", "--teacher", "sandbox"]


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    """Three groups of a real clip and one generated video, as a saved dataset."""
    folder = tmp_path_factory.mktemp("groups")
    build_group_dataset(load_sandbox(), folder / "dataset", num_groups=3, num_rejected=1, batch_size=3)
    return folder / "dataset" / "table"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("encoded")


def options(name, groups, cache, output_dir):
    repa = SMALL_REPA if name == "repa" else []
    return ["--dataset_name", str(groups), "--cache_dir", str(cache), "--output_dir", str(output_dir), *COMMON, *repa]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_and_leaves_an_adapter(name, groups, cache, tmp_path, capsys):
    assert main(["train", name, *options(name, groups, cache, tmp_path)]) == 0
    assert (tmp_path / LORA_FILE_NAME).is_file() and (tmp_path / "README.md").is_file()
    told = capsys.readouterr()
    line = rf"1 step in \d+ s, .* peak memory \S+ GiB\. In {tmp_path}: {LORA_FILE_NAME} \(adapter\), README\.md \("
    assert re.match(line, told.out.splitlines()[-1])
    assert "peak memory" not in told.err and told.out.count("peak memory") == 1  # it is the only one


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("sft", {"on_collapse": "stop"}, "`on_collapse='stop'`: the method logs no gaps, which it watches"),
        ("sft", {"num_groups": 3}, "`num_groups=3`: a row of the method is one video"),
        ("gdpo", {"num_clips": 3}, "`num_clips=3`: a row of the method has several videos"),
        ("gdpo", {"dataset_split": "test"}, "`dataset_split='test'`: the rows are the sandbox's"),
        ("gdpo", {"dataset_name": "groups", "num_groups": 3}, "`num_groups=3`: `dataset_name` names the rows"),
        ("gdpo", {"evaluator_num_prompts": 3}, "`evaluator_num_prompts=3`: `evaluator_judge` is not given"),
        ("gdpo", {"sample_prompts": "p.txt"}, "`sample_prompts='p.txt'`: `sample_every` is not given"),
        ("gdpo", {"on_collapse": "stop", "num_groups": 3}, None),
        ("sft", {"num_clips": 3}, None),
    ],
)
def test_options_beside_the_configuration_that_have_no_effect_are_told(
    name, given, expected, groups, tmp_path, caplog
):
    trainer_class = METHODS[name].load()
    if "dataset_name" in given:
        given = given | {"dataset_name": str(groups)}
    args = trainer_class.config_class(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    check_training(trainer_class, DataArguments(**given), args)
    told = [record.getMessage() for record in caplog.records if "without effect" in record.getMessage()]
    assert [expected in line for line in told] == ([True] if expected else []), told


@pytest.mark.slow
def test_both_experts_are_trained_one_after_the_other(groups, tmp_path, capsys):
    tiny_wan_a14b_pipeline().save_pretrained(tmp_path / "model")
    argv = ["train", "dpo", *options("dpo", groups, tmp_path / "cache", tmp_path / "run")]
    argv += ["--model_name_or_path", str(tmp_path / "model")]
    assert main(argv) != 0 and "Set `expert`" in capsys.readouterr().err
    for name in ("both", "low_noise"):
        assert main([*argv, "--expert", name, "--dry_run"]) == 0
    assert capsys.readouterr().out.count("memory of a step") == 3
    assert main([*argv, "--expert", "both"]) == 0
    files = [tmp_path / "run" / name / LORA_FILE_NAME for name in ("high_noise", "low_noise")]
    assert [expert_of(file) for file in files] == ["high_noise", "low_noise"]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_weights_of_one_expert_are_not_taken_for_both(capsys):
    argv = ["train", "dpo", "--model_name_or_path", "a/b", "--dataset_name", "x", "--use_cpu", "--expert", "both"]
    assert main([*argv, "--init_adapter", "low.safetensors"]) != 0
    assert "--init_adapter names weights of one transformer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--learning_rate", "-1"], "`learning_rate` must be finite and not negative"),
        (["--eval_strategy", "steps", "--eval_steps", "1"], "needs an `eval_dataset`"),
        (["--report_to", "comet_ml"], "needs a package that is not installed"),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_a_dry_run_refuses_what_training_refuses(groups, tmp_path, capsys, extra, message, dry):
    argv = ["train", "gdpo", *options("gdpo", groups, tmp_path / "cache", tmp_path / "run"), *extra]
    assert main([*argv, *(["--dry_run"] if dry else [])]) != 0
    assert message in capsys.readouterr().err and not (tmp_path / "cache").exists()


def test_encode_prepares_what_training_then_finds(groups, tmp_path, capsys, caplog):
    argv = options("sft", groups, tmp_path / "encoded", tmp_path)
    assert main(["encode", "sft", *argv]) == 0
    assert capsys.readouterr().out.endswith(f"3 rows, latents (16, 4, 8, 8), in {tmp_path / 'encoded'}\n")
    assert main(["encode", "sft", *argv, "--eval_rows", "1"]) == 0
    assert capsys.readouterr().out.startswith("2 rows, ")  # the third one is held out, and encoded as well
    made = sorted((tmp_path / "encoded").iterdir())
    caplog.clear()
    assert main(["train", "sft", *argv]) == 0
    assert sorted((tmp_path / "encoded").iterdir()) == made
    assert any("Using the encoded dataset" in message for message in caplog.messages)


def test_evaluation_holds_rows_out_and_lets_the_judge_choose_the_best_step(groups, cache, tmp_path):
    sizes = ["--eval_rows", "1", "--evaluator_judge", "sandbox", "--evaluator_num_prompts", "1"]
    when = ["--eval_strategy", "steps", "--eval_steps", "1", "--save_strategy", "steps", "--save_steps", "1"]
    best = ["--load_best_model_at_end", "--metric_for_best_model", "eval_pc", "--greater_is_better", "true"]
    assert main(["train", "sft", *options("sft", groups, cache, tmp_path), *sizes, *when, *best]) == 0
    state = json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())
    (entry,) = [entry for entry in state["log_history"] if "eval_loss" in entry]
    assert 0 <= entry["eval_pc"] <= 1 and 0 <= entry["eval_sa"] <= 1 and entry["eval_joint"] in (0.0, 1.0)
    assert state["best_metric"] == entry["eval_pc"]
    assert (tmp_path / "evaluation" / "step-1" / "videos" / "00000-0.mp4").is_file()
    # Another training in the same folder is refused before anything is loaded; its evaluations are no reason to.
    again = ["train", "sft", *options("sft", groups, cache, tmp_path), *sizes, *when, "--seed", "1"]
    assert main(again) == 1
    assert main([*again, "--overwrite_output_dir"]) == 0
    assert main(["train", "sft", *options("sft", groups, cache, tmp_path / "new"), "--eval_rows", "3"]) == 2


@pytest.mark.parametrize(("name", "lora"), [("gdpo", True), ("sft", False)])
def test_dry_run_says_what_the_trainer_will_do_and_starts_nothing(name, lora, groups, cache, tmp_path, capsys):
    batch = ["--per_device_train_batch_size", "2", "--max_steps", "-1", "--num_train_epochs", "5"]
    weights = [] if lora else ["--no_use_peft"]
    argv = [*options(name, groups, cache, tmp_path / "out"), *batch, *weights]
    assert main(["train", name, *argv, "--dry_run", "--hub_token", "hf_secret"]) == 0
    printed = capsys.readouterr().out
    assert not (tmp_path / "out").exists() and "hf_secret" not in printed and "hub_token" not in printed
    trainer_class = METHODS[name].load()
    args = trainer_class.config_class(
        output_dir=str(tmp_path / "out"), cache_dir=str(cache), use_cpu=True, use_peft=lora, report_to="none"
    )
    trainer = make_trainer(trainer_class, DataArguments(dataset_name=str(groups)), args)
    grid = trainer.family.token_grid(trainer.model, trainer.train_dataset.shapes[0])
    assert (
        f"tokens of a video:      {math.prod(grid)} (13 x 64 x 64, latents (16, 4, 8, 8), grid 4 x 4 x 4)" in printed
    )
    trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    assert f"of which trained {trained:,}" in printed
    assert "memory of a step:       0.0" in printed and "other activations" in printed
    assert "rows:                   3\n" in printed
    assert "steps:                  10 of 2 rows, 5.00 epochs (1 process)" in printed
    (tmp_path / "eight.yaml").write_text("num_processes: 8\n")
    for launcher in (["--num_processes", "8"], [f"--accelerate_config={tmp_path / 'eight.yaml'}"]):
        assert main(["train", name, *argv, "--dry_run", *launcher]) == 0
        assert "steps:                  5 of 16 rows, 5.00 epochs (8 processes)" in capsys.readouterr().out


def test_configuration_of_a_dry_run_gives_the_same_run(groups, tmp_path, capsys):
    argv = ["--dataset_name", str(groups), "--use_cpu", "--beta", "100", "--learning_rate", "3e-4", "--seed", "5"]
    assert main(["train", "gdpo", *argv, "--dry_run"]) == 0
    printed = capsys.readouterr().out
    path = tmp_path / "again.yaml"
    path.write_text(printed.partition("\n")[2].partition("\n\n")[0])
    assert yaml.safe_load(path.read_text())["beta"] == 100
    assert main(["train", "gdpo", "--config", str(path), "--dry_run"]) == 0
    assert capsys.readouterr().out == printed


def test_dry_run_counts_the_videos_that_the_loss_of_a_row_compares(groups, capsys):
    """1 + m with the sum of all rejected videos, two with one of them, also for groups that the sandbox makes."""

    def memory(*options):
        argv = ["--dry_run", "--use_cpu", "--per_device_train_batch_size", "64", *options]
        assert main(["train", "gdpo", *argv]) == 0
        return float(re.search(r"memory of a step: +([\d.]+) GiB", capsys.readouterr().out)[1])

    sampled, three, seven = memory(), memory("--loss_type", "sum"), memory("--loss_type", "sum", "--num_rejected", "7")
    assert three > 1.5 * sampled and seven > 1.5 * three
    one = ["--dataset_name", str(groups)]  # a cell with one rejected video is one video, however it is stored
    assert memory("--loss_type", "sum", *one) == memory(*one)


def test_dry_run_lists_the_tokens_of_every_size(groups, capsys):
    argv = ["--dataset_name", str(groups), "--use_cpu", "--resolution_buckets", "64x64", "64x128"]
    assert main(["train", "gdpo", *argv, "--dry_run"]) == 0
    assert "64 (13 x 64 x 64, " in (printed := capsys.readouterr().out) and "; 128 (13 x 64 x 128, " in printed


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("sandbox-sft", "sft"),
        ("sandbox-dpo", "dpo"),
        ("sandbox-reg-dpo", "regdpo"),
        ("sandbox-repa", "repa"),
    ],
)
def test_configurations_of_the_examples_are_those_of_the_command(file, name, capsys):
    assert (
        main(["train", name, "--config", str(ROOT / f"examples/configs/{file}.yaml"), "--dry_run", "--use_cpu"]) == 0
    )
    assert "rows: " in capsys.readouterr().out


def test_options_of_the_launcher_are_told_apart():
    given = [
        "--num_processes",
        "8",
        "--config",
        "x.yaml",
        "--bf16",
        "--multi_gpu",
        "--main_process_port=29",
        "--seed",
        "1",
    ]
    launcher, ours = split_launcher(given)
    assert launcher == ["--num_processes", "8", "--multi_gpu", "--main_process_port=29"]
    assert ours == ["--config", "x.yaml", "--bf16", "--seed", "1"]
    assert split_launcher(["--max_steps", "2", "--deepspeed", "zero.json"])[0] == []
    assert split_launcher(["--accelerate_config", "fsdp.yaml"])[0] == ["--config_file", "fsdp.yaml"]


def test_a_typo_is_told_before_anything_is_launched(capsys):
    assert main(["train", "sft", "--num_processes", "8", "--num_clip", "7"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "did you mean 'num_clips'?" in line


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_launch_passes_everything_on_and_gives_the_exit_code_back(groups, cache, tmp_path):
    command = [sys.executable, "-m", "video_trl", "train", "sft", "--num_processes", "2", "--multi_gpu"]
    command += [*options("sft", groups, cache, tmp_path), "--ddp_backend", "gloo"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f" GiB. In {tmp_path}: {LORA_FILE_NAME} (adapter)") == 1  # of two processes
    assert (done.stdout + done.stderr).count("peak memory") == 1
    command += ["--output_dir", str(tmp_path / "other"), "--dataset_name", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and "--dataset_name: expected a table" in done.stderr


def test_sample_videos_and_early_stopping_without_rows_to_evaluate(groups, cache, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("A red ball falls to the floor.\n")
    when = ["--eval_strategy", "steps", "--eval_steps", "1", "--save_strategy", "steps", "--save_steps", "1"]
    best = ["--metric_for_best_model", "eval_pc", "--greater_is_better", "true", "--early_stopping_patience", "1"]
    videos = ["--sample_every", "2", "--sample_prompts", str(prompts)]
    judge = ["--evaluator_judge", "sandbox", "--evaluator_num_prompts", "1", "--learning_rate", "0"]
    argv = [*options("sft", groups, cache, tmp_path), *when, *best, *videos, *judge, "--max_steps", "9"]
    assert main(["train", "sft", *argv]) == 0
    state = json.loads(max(tmp_path.glob("checkpoint-*")).joinpath("trainer_state.json").read_text())
    assert state["global_step"] == 2  # the model stands still: the second evaluation is no better than the first
    assert not any("eval_loss" in entry for entry in state["log_history"])
    made = {str(path.relative_to(tmp_path / "samples")) for path in (tmp_path / "samples").glob("step_*/*.mp4")}
    assert made == {"step_0/00.mp4", "step_2/00.mp4"}


def test_curated_pairs_are_a_dataset_to_train_on(tmp_path, capsys):
    (tmp_path / "clips").mkdir()
    write_clip(tmp_path / "clips" / "a.mp4", prompt="A red ball falls.")
    model = {"model_options": {"sandbox": {"dtype": "float32", "call_kwargs": {"num_inference_steps": 1}}}}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump({**SMALL, **model}))
    argv = ["--sources", str(tmp_path / "clips"), "--output_dir", str(tmp_path / "out")]
    assert main(["curate", "gt-pairs", "--config", str(tmp_path / "small.yaml"), *argv]) == 0
    pairs = str(tmp_path / "out" / "pairs")
    assert f"dataset: {pairs};" in capsys.readouterr().out
    assert main(["train", "dpo", "--dataset_name", pairs, "--dry_run", "--use_cpu"]) == 0
    assert "rows:                   1\n" in capsys.readouterr().out


def test_curated_groups_are_a_dataset_to_train_on(tmp_path, capsys):
    clip = simulate(40_000_000, motion="rolling")
    path = write_video(tmp_path / "clips" / "a.mp4", clip.video, clip.fps)
    path.with_suffix(".txt").write_text(clip.prompt)
    output = tmp_path / "out"
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(phyaug_settings(output, seeds=[0], budget=1)))
    argv = ["curate", "phyaug", "--config", str(tmp_path / "small.yaml"), "--sources", str(tmp_path / "clips")]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert f"dataset: {output / 'groups'};" in printed and "1 clip in = 1 kept" in printed
    assert main(["train", "gdpo", "--dataset_name", str(output / "groups"), "--dry_run", "--use_cpu"]) == 0
    assert "rows:                   1\n" in capsys.readouterr().out
