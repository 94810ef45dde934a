"""The example scripts, run as a person runs them: arguments in, files out."""

import inspect
import json

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from trl import TrlParser

from tests.support.adapters import IN_FOLDER
from tests.support.paths import EXAMPLES
from tests.support.scripts import load_script
from tests.support.tiny import tiny_group_dataset, tiny_wan_pipeline
from tests.support.trainer.repa_runs import tiny_teacher
from video_trl import VideoDPOConfig, VideoGroupDPOConfig, VideoRegDPOConfig, VideoREPAConfig, VideoSFTConfig
from video_trl.curation import GTPairConfig, PhyAugConfig, RoundsConfig, SelfPairsConfig
from video_trl.experiment import ExperimentArguments, _claim
from video_trl.load import ScriptArguments
from video_trl.sandbox import load_sandbox
from video_trl.trainer.checkpoints.weights import named_checkpoint


CONFIGS = sorted((EXAMPLES / "configs").glob("*.yaml"))
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
# Last word of a configuration's name -> the script that reads it, and its arguments.
TRAINING = {
    "dpo": ("train_dpo", VideoDPOConfig),
    "gdpo": ("train_gdpo", VideoGroupDPOConfig, ExperimentArguments),
    "reg-dpo": ("train_reg_dpo", VideoRegDPOConfig),
    "repa": ("train_repa", VideoREPAConfig),
    "sft": ("train_sft", VideoSFTConfig),
}
CURATION = {
    "gt-pair": ("curate_gt_pairs", GTPairConfig),
    "phyaug": ("curate_phyaug", PhyAugConfig),
    "rounds": ("curate_gt_pairs", RoundsConfig),  # of `video-trl rounds`, as the next one
    "self-pairs": ("curate_gt_pairs", SelfPairsConfig),  # of `video-trl curate`; it has no script of its own
}
STUDIES = {"repa-study": ("studies/repa", VideoREPAConfig)}
TRAINING_SCRIPTS = ["train_dpo", "train_gdpo", "train_reg_dpo", "train_sft"]  # REPA's needs a teacher: tested apart


def _load(name):
    """An example as a module: scripts are no package, and their dataclasses need a module to be looked up in."""
    return load_script(EXAMPLES / f"{name}.py", f"example_{name.replace('/', '_')}")


def _parse(config, *overrides):
    readers = TRAINING | STUDIES | CURATION
    method = max((name for name in readers if f"-{config.stem}".endswith(f"-{name}")), key=len)  # -reg-dpo is no -dpo
    script, config_class, *further = readers[method]
    parser = TrlParser((_load(script).ScriptArguments, config_class, *further))
    device = ["--use_cpu"] if method in TRAINING | STUDIES else []
    return parser.parse_args_and_config(args=["--config", str(config), *device, *overrides])


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_configuration_is_understood_to_the_last_key(config):
    """The parser raises at a key that no dataclass has; what it has read must be what the file says."""
    values = {name: value for arguments in _parse(config) for name, value in vars(arguments).items()}
    for key, value in yaml.safe_load(config.read_text()).items():
        expected = [value] if key == "report_to" and isinstance(values[key], list) else value
        assert values[key] == ([] if expected == ["none"] else expected), key


def test_command_line_wins_over_the_file(tmp_path):
    _, training_args, _ = _parse(EXAMPLES / "configs" / "sandbox-gdpo.yaml", "--max_steps", "3", "--beta", "50")
    assert (training_args.max_steps, training_args.beta) == (3, 50)


def test_a_misspelt_key_is_refused(tmp_path):
    config = tmp_path / "typo-gdpo.yaml"
    config.write_text("output_dir: x\nlearning_rte: 1.0e-5\n")
    with pytest.raises(ValueError, match="learning_rte"):
        _parse(config)


def test_the_14b_dpo_configuration_holds_the_numbers_of_reg_dpo_s_baseline():
    _, args = _parse(EXAMPLES / "configs" / "wan2.1-14b-dpo.yaml")
    assert (args.height, args.width, args.num_frames, args.fps) == (720, 1280, 81, 16)
    assert (args.lora_rank, args.lora_alpha, args.learning_rate, args.beta) == (16, 32, 5e-6, 500)
    assert (args.per_device_train_batch_size, args.optim.value, args.save_steps) == (1, "adamw_torch", 300)


def test_wan_configurations_read_all_clips_at_the_rate_of_the_model():
    """81 frames are 5 s at 16 fps; without a common rate, real clips of 24 or 30 fps become slow motion."""
    _, args, _ = _parse(EXAMPLES / "configs" / "wan2.1-1.3b-gdpo.yaml")
    assert (args.num_frames, args.fps) == (81, 16)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_script_starts_with_its_requirements_and_says_how_to_run_it(script):
    text = script.read_text()
    assert text.startswith("# /// script\n")
    assert f"accelerate launch examples/{script.name}" in text or f"python examples/{script.name}" in text


@pytest.mark.parametrize("script", TRAINING_SCRIPTS)
def test_a_model_without_a_dataset_is_refused_before_anything_is_loaded(script, tmp_path):
    arguments = ["--model_name_or_path", "no/such-model", "--output_dir", str(tmp_path), "--use_cpu"]
    with pytest.raises(ValueError, match="needs --dataset_name"):
        _load(script).main(arguments)


@pytest.mark.parametrize("script", TRAINING_SCRIPTS)
@pytest.mark.parametrize("name", ["no-such/dataset", "no/such/folder"])
def test_an_unknown_dataset_is_refused_with_the_way_out(script, name, tmp_path):
    arguments = ["--dataset_name", name, "--output_dir", str(tmp_path), "--use_cpu"]
    with pytest.raises(ValueError, match=rf"got '{name}', which cannot be loaded.*Check the spelling"):
        _load(script).main(arguments)


@pytest.mark.parametrize("script, config", [entry[:2] for entry in TRAINING.values()])
def test_resuming_takes_a_folder_or_true(script, config, tmp_path):
    assert "resume_from_checkpoint=named_checkpoint(" in inspect.getsource(_load(script))
    for value, expected in ((None, None), ("True", True), ("true", True), ("False", None), ("out/c-5", "out/c-5")):
        args = config(str(tmp_path), use_cpu=True, resume_from_checkpoint=value)
        assert named_checkpoint(args.resume_from_checkpoint) == expected


def test_probe_prints_a_table_and_keeps_every_answer(tmp_path, capsys):
    sizes = ["--num_train", "12", "--num_test", "6", "--noise_levels", "0.5", "--output", str(tmp_path / "probe.json")]
    whole = tmp_path / "trained"  # what a training of all weights leaves
    load_sandbox().pipeline.transformer.save_pretrained(whole / "transformer")
    _load("probe_physion").main([*sizes, "--adapters", str(whole)])
    printed = capsys.readouterr().out
    assert "| features | roll | chase | bounce | all |" in printed.splitlines()
    results = json.loads((tmp_path / "probe.json").read_text())["results"]
    assert list(results) == ["pixels", "sandbox", str(whole), "sandbox (teacher)"]
    assert results[str(whole)] == results["sandbox"] != results["pixels"]
    assert all(len(result["probabilities"]) == 6 and name in printed for name, result in results.items())
    with pytest.raises(ValueError, match="needs `physion`"):
        _load("probe_physion").main(["--model_name_or_path", "no/such-model"])


@pytest.mark.slow
def test_repa_study_end_to_end(tmp_path):
    """Two steps of two arms: to leave every file and table that the full study leaves."""
    script = _load("studies/repa")
    folder = ["--config", str(script.STUDY_CONFIG), "--output_dir", str(tmp_path)]
    sizes = ["--base_steps", "2", "--base_clips", "8", "--num_clips", "8", "--max_steps", "2", "--held_out", "6"]
    run = [*folder, *sizes, "--eval_prompts", "2", "--eval_seeds", "1", "--probe_train", "12", "--probe_test", "6"]
    run += ["--use_cpu", "--cache_dir", str(tmp_path / "cache")]
    script.main([*run, "--arms", "base", "sft", "trd", "oracle-stop-0.5", "--seeds", "0", "1"])
    assert len(list((tmp_path / "results").glob("*.json"))) == 7
    page, picture = tmp_path / "repa.md", tmp_path / "repa.svg"
    script.main([*folder, "--use_cpu", "--report", str(page), "--figure", str(picture)])
    text = page.read_text()
    assert (
        text.count("| trd |") == text.count("| oracle-stop-0.5 |") == 4
        and text.count("| teacher |") == 1
        and "better" not in text
    )
    assert "<svg" in picture.read_text()
    with pytest.raises(ValueError, match="arms of"):
        script.main([*run, "--arms", "dpo"])


@pytest.mark.parametrize("option", ["--push_to_hub", "--resume_from_checkpoint"])
def test_sandbox_experiment_refuses_the_options_of_a_single_run(option, tmp_path):
    arguments = [option, "true", "--output_dir", str(tmp_path), "--use_cpu"]
    with pytest.raises(ValueError, match=rf"got {option}\. .*--dataset_name .*table"):
        _load("train_gdpo").main(arguments)
    assert not (tmp_path / "dataset").exists()


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """The tiny pipeline as a folder in diffusers layout, as a repository would be."""
    folder = tmp_path_factory.mktemp("model")
    tiny_wan_pipeline().save_pretrained(folder)
    return folder


def _two_steps(tiny_model, dataset, output_dir):
    return [
        *("--model_name_or_path", str(tiny_model), "--dataset_name", str(dataset), "--output_dir", str(output_dir)),
        *("--max_steps", "2", "--per_device_train_batch_size", "2", "--learning_rate", "1e-2", "--lora_rank", "4"),
        *("--cache_dir", str(output_dir / "cache"), "--use_cpu", "--report_to", "none"),
    ]


@pytest.mark.parametrize("script", TRAINING_SCRIPTS)
def test_training_from_folders_leaves_an_adapter_that_a_fresh_pipeline_loads(script, tiny_model, tmp_path):
    groups = tiny_group_dataset(n=4, m=2)
    if script == "train_sft":
        groups = groups.select_columns(["prompt", "chosen"]).rename_column("chosen", "video")
    groups.save_to_disk(tmp_path / "data")
    teacher = []
    if script == "train_repa":
        tiny_teacher().model.save_pretrained(tmp_path / "teacher")
        teacher = ["--teacher", str(tmp_path / "teacher"), "--fps", "8"]
    _load(script).main([*_two_steps(tiny_model, tmp_path / "data", tmp_path / "out"), *teacher])

    assert (tmp_path / "out" / "README.md").is_file()
    pipeline = tiny_wan_pipeline()
    call = {"num_frames": 5, "height": 32, "width": 32, "num_inference_steps": 2, "output_type": "np"}
    before = pipeline("a ball falls", generator=torch.Generator().manual_seed(0), **call).frames
    pipeline.load_lora_weights(tmp_path / "out", **IN_FOLDER)
    after = pipeline("a ball falls", generator=torch.Generator().manual_seed(0), **call).frames
    assert np.isfinite(after).all() and not np.array_equal(before, after)


def _experiment_arguments(folder):
    """Few clips and two steps: not to learn anything, but to leave every file that the full run leaves."""
    arguments = "--found_clips 12 --num_rejected 2 --max_steps 2 --logging_steps 1".split()
    return [*arguments, "--output_dir", str(folder), "--cache_dir", str(folder / "cache"), "--use_cpu"]


def test_sandbox_experiment_end_to_end(tmp_path, capsys):
    script = _load("train_gdpo")
    arguments = "--eval_prompts 2 --seeds 0 1 --arms_at_once 1 --per_device_train_batch_size 2".split()
    arguments += _experiment_arguments(tmp_path)
    script.main(["--config", str(script.SANDBOX_CONFIG), *arguments])

    arms = {
        "SFT as found": "sft-as-found",
        "SFT judged": "sft-judged",
        "PhyGDPO": "phygdpo",
        "Reg-DPO": "reg-dpo",
    }
    written = {}
    for name in arms.values():
        for seed in (0, 1):
            adapter = tmp_path / f"{name}-seed{seed}" / "pytorch_lora_weights.safetensors"
            written[adapter] = adapter.stat().st_mtime_ns
            assert (adapter.parent / "README.md").is_file()
    page = (tmp_path / "report.html").read_text()
    assert page.count("<video") == 2 * 5  # of the base, and of the arms of the first seed
    order = ["sentences that no model was trained on", "<h2>Videos", "<h2>Scores", "<h2>Comparison"]
    order += ["Which way the clips went", "Diversity over noises", "<h2>Training curves", "eval_prompts: 2"]
    assert sorted(order, key=page.index) == order
    results = json.loads((tmp_path / "results.json").read_text())
    assert [(run["method"], run["seed"]) for run in results["runs"]] == [
        (arm, seed) for arm in arms for seed in (0, 1)
    ]
    assert len(results["base"]) == 2 * 2 and results["settings"]["beta"] == 500 and 0.9 < results["real_pc"] <= 1
    assert len(results["base_modes"]) == 4 and set(results["shown"]["cases"]) <= set(range(4))
    assert results["shown"]["rule"] in page
    lawful = sum(mode == "lawful" for mode in results["runs"][-2]["modes"])
    assert f"{lawful} after Reg-DPO" in results["sentence"] and "law of motion in" in results["sentence"]
    assert not any(run["win_gaps"] for run in results["runs"] if run["method"].startswith("SFT"))  # no reference
    assert all(run["cpu_seconds"] > 0 for run in results["runs"])
    judge = load_sandbox().judge
    for row in results["base"] + results["runs"][-1]["records"]:
        score = judge.score([row["video"]], [row["prompt"]])[0]
        assert row["pc"] == pytest.approx(score["pc"], abs=0.15)  # the file is compressed, the judge saw the frames
    assert [entry["metric"] for entry in results["comparisons"]] == [
        m for m in ("pc", "sa", "joint") for _ in range(7)
    ]
    printed = capsys.readouterr().out
    assert "PhyGDPO vs base" in printed and "PhyGDPO vs SFT judged" in printed and "better" not in printed
    assert results["sentence"] in printed
    phases = [line for line in printed.splitlines() if line.startswith("[")]
    assert len(phases) == 1 + 1 + 8 and "about 0 min left" in phases[-1] and max(map(len, phases)) < 100

    videos = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.mp4")}
    script.main(["--config", str(script.SANDBOX_CONFIG), *arguments])  # once more: nothing is trained or made again
    assert {adapter: adapter.stat().st_mtime_ns for adapter in written} == written
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.mp4")} == videos
    assert json.loads((tmp_path / "results.json").read_text())["sentence"] == results["sentence"]


def test_arms_of_one_recipe_are_not_shown_as_those_of_another(tmp_path):
    """The folder is whole, nothing would be trained again, and the page would name the new settings."""
    script = _load("train_gdpo")

    def claim(**changes):
        arguments = ["--config", str(script.SANDBOX_CONFIG), "--use_cpu", "--output_dir", str(tmp_path)]
        arguments += [word for name, value in changes.items() for word in (f"--{name}", str(value))]
        parser = TrlParser((ScriptArguments, ExperimentArguments, VideoGroupDPOConfig))
        data, experiment, args = parser.parse_args_and_config(args=arguments)
        _claim(tmp_path, data, experiment, args)

    claim()
    claim(seeds=3, eval_prompts=12, arms_at_once=1, controls=True)  # more of the same
    for change in ({"learning_rate": 0.5}, {"max_steps": 7}, {"found_clips": 9}, {"num_rejected": 1}):
        with pytest.raises(ValueError, match=f"arms of another recipe.*{next(iter(change))}.*another `output_dir`"):
            claim(**change)


@pytest.mark.parametrize("option", ["eval_prompts", "arms_at_once"])
def test_an_experiment_that_could_not_end_does_not_begin(option, tmp_path):
    script = _load("train_gdpo")
    with pytest.raises(ValueError, match=option):
        script.main(["--config", str(script.SANDBOX_CONFIG), "--output_dir", str(tmp_path), f"--{option}", "0"])
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_arms_trained_two_at_a_time_are_those_of_one_at_a_time(tmp_path, capsys):
    script = _load("train_gdpo")
    results = []
    for at_once in ("1", "2"):
        folder = tmp_path / at_once
        arguments = ["--eval_prompts", "2", "--arms_at_once", at_once, *_experiment_arguments(folder)]
        script.main(["--config", str(script.SANDBOX_CONFIG), *arguments])
        adapters = [load_file(path) for path in sorted(folder.glob("*-seed0/pytorch_lora_weights.safetensors"))]
        scores = [run["records"] for run in json.loads((folder / "results.json").read_text())["runs"]]
        results.append((adapters, [[row["pc"] for row in rows] for rows in scores]))
    (one, scores), (two, scores_of_two) = results
    assert len(one) == len(two) == 4 and scores == scores_of_two
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert capsys.readouterr().out.count("Done: ") == 2 * (1 + 1 + 4)
