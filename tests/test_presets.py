"""Presets: each key is an option, each value has its source beside it, and each command fits the machines it names."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from tests.support.paths import EXAMPLES, ROOT
from video_trl.cli import main
from video_trl.cli.methods import DataArguments, parse_training
from video_trl.methods import own_methods
from video_trl.models.checkpoints import known_checkpoints
from video_trl.presets import PRESETS, load_preset, preset_text


METHODS = {method.name: method for method in own_methods()}
# Configurations of examples for real models; those of the sandbox and of curation are launched otherwise.
CONFIGS = {
    path.stem: path
    for path in (EXAMPLES / "configs").glob("*.yaml")
    if yaml.safe_load(path.read_text()).get("model_name_or_path", "sandbox") != "sandbox"
}
GPU_GIB = 80  # of the H100 and A100 that the papers name


def parsed(name, *options):
    method = METHODS[PRESETS[name]]
    argv = ["--preset", name, "--use_cpu", "--dataset_name", "x", *options]
    return parse_training("train", method, argv, "text")


def launch_command(text: str) -> list[str]:
    """The words of `video-trl train ...` in the head of a file."""
    head = text.partition("\nmodel_name_or_path")[0]
    (command,) = re.findall(r"^#   (video-trl train (?:.|\\\n)*?)(?<!\\)$", head, flags=re.MULTILINE)
    return shlex.split(re.sub(r"<[^>]*>", "DATA", re.sub(r"\\\n#", "", command)))


def test_every_file_is_listed_with_its_method():
    folder = ROOT / "video_trl" / "presets"
    assert sorted(path.stem for path in folder.glob("*.yaml")) == sorted(PRESETS)
    assert set(PRESETS.values()) <= set(METHODS)
    assert {load_preset(name)["model_name_or_path"] for name in PRESETS} <= set(known_checkpoints())


@pytest.mark.parametrize("name", PRESETS)
def test_every_value_is_an_option_and_says_where_it_stands(name):
    data, args = parsed(name)
    values = {**vars(data), **vars(args)}
    for key, value in load_preset(name).items():
        assert values[key] == value, key
    numbers, _, _ = preset_text(name).partition("# from here on nothing that the numbers")
    for line in numbers.splitlines()[:-1]:
        if line and not line.startswith("#"):
            assert re.search(r"  # \S", line), f"{name}: {line!r} names no source"


def test_numbers_of_phygdpo():
    _, args = parsed("phygdpo-paper")
    assert (args.height, args.width, args.max_steps) == (480, 832, 10_000)
    assert 8 * args.per_device_train_batch_size * args.gradient_accumulation_steps == 8
    assert (args.adam_beta1, args.adam_beta2, args.weight_decay) == (0.9, 0.999, 0.01)
    assert (args.learning_rate, args.lr_scheduler_kwargs["min_lr"]) == (1e-5, 1e-6)
    assert (args.lora_rank, args.lora_alpha) == (48, 48)
    assert (args.alpha_min, args.lam, args.kappa_gamma, args.b_gamma) == (0.5, 0.6, 2.0, 0.4)
    assert (args.kappa_alpha, args.b_alpha) == (5.0, 0.5)
    assert args.bf16 and args.activation_checkpointing


@pytest.mark.parametrize("name", ["regdpo-paper-t2v", "regdpo-paper-i2v"])
def test_numbers_of_reg_dpo(name):
    data, args = parsed(name)
    assert ("I2V-14B-720P" in data.model_name_or_path) == name.endswith("i2v")
    assert (args.height, args.width, args.num_frames, args.fps) == (720, 1280, 81, 16)
    assert (args.lora_rank, args.lora_alpha, args.learning_rate, args.beta) == (16, 32, 5e-6, 500)
    assert (args.per_device_train_batch_size, args.optim.value, args.save_steps) == (1, "adamw_torch", 300)
    assert (args.sft_weight_mode, args.sft_coefficient, args.context_parallel_size) == ("dgr", 1.0, 4)


@pytest.mark.parametrize("size", ["2b", "5b"])
@pytest.mark.parametrize("kind", ["paper", "official"])
def test_numbers_of_videorepa(size, kind):
    data, args = parsed(f"videorepa-{size}-{kind}")
    assert data.model_name_or_path == f"zai-org/CogVideoX-{size}"
    assert (args.height, args.width, args.num_frames) == (480, 720, 49)
    assert 8 * args.per_device_train_batch_size * args.gradient_accumulation_steps == 32
    assert (args.coefficient, args.margin, args.align_layer) == (0.5, 0.1, 18)
    assert (args.margin_mode, args.relation_weighting) == (("hard", "paper") if kind == "paper" else ("soft", "joint"))
    if size == "2b":
        assert (args.use_peft, args.learning_rate, args.max_steps) == (False, 2e-6, 4000)
    else:
        assert (args.use_peft, args.lora_rank, args.lora_alpha) == (True, 128, 64)
        assert (args.learning_rate, args.max_steps) == (1e-4, 2000)


def test_options_win_over_a_file_and_a_file_over_the_preset(tmp_path):
    _, args = parsed("phygdpo-paper", "--beta", "7")
    assert (args.beta, args.max_steps) == (7, 10_000)
    file = tmp_path / "run.yaml"
    file.write_text("preset: phygdpo-paper\nbeta: 9\nmax_steps: 5\n")
    argv = ["--config", str(file), "--use_cpu", "--dataset_name", "x", "--max_steps", "6"]
    data, args = parse_training("train", METHODS["gdpo"], argv, "text")
    assert (data.preset, args.beta, args.max_steps, args.lam) == ("phygdpo-paper", 9, 6, 0.6)


@pytest.mark.parametrize("verb", ["train", "estimate"])
def test_a_preset_of_another_method_and_an_unknown_one_are_refused(verb, capsys):
    assert main([verb, "dpo", "--preset", "phygdpo-paper"]) == 2
    assert "'phygdpo-paper' is for the method 'gdpo', not 'dpo'. There is none for 'dpo'." in capsys.readouterr().err
    assert main([verb, "gdpo", "--preset=phygdpo"]) == 2
    assert "no preset 'phygdpo'; expected one of phygdpo-paper, phygdpo-official" in capsys.readouterr().err


def sources():
    return [*PRESETS, *sorted(CONFIGS)]


def file_text(name: str) -> str:
    return CONFIGS[name].read_text() if name in CONFIGS else preset_text(name)


@pytest.mark.parametrize("name", sources())
def test_the_command_of_a_file_names_that_file_and_options_that_exist(name):
    command = launch_command(file_text(name))
    verb, method, *words = command[1:]
    assert verb == "train" and method in METHODS
    assert name in (
        words[words.index("--preset") + 1] if name in PRESETS else Path(words[words.index("--config") + 1]).stem
    )
    place = words.index("--config_file")
    assert Path(ROOT / words[place + 1]).is_file()
    if name in PRESETS:
        parse_training("train", METHODS[method], [*words[:place], *words[place + 2 :], "--use_cpu"], "text")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "videorepa-5b-paper" else pytest.mark.slow) for name in sources()]
)
def test_the_command_of_a_file_fits_its_machines(name, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, _, method, *words = launch_command(file_text(name))
    dataset, file = words.index("--dataset_name"), words.index("--config_file")
    argv = [word for place, word in enumerate(words) if place not in (dataset, dataset + 1, file, file + 1)]
    argv += ["--accelerate_config", words[file + 1], "--gpu_gib", str(GPU_GIB)]
    assert main(["estimate", method, *argv]) == 0
    printed = capsys.readouterr().out
    assert f"\nFits {GPU_GIB} GiB" in printed, printed
    number = yaml.safe_load(Path(words[file + 1]).read_text())["num_processes"]
    assert f"\n{number} x " in printed


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "videorepa-5b-paper" else pytest.mark.slow) for name in sources()]
)
def test_a_dry_run_needs_neither_gpu_nor_hub_nor_dataset(name, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    _, _, method, *words = launch_command(file_text(name))
    place = words.index("--dataset_name")
    assert main(["train", method, *words[:place], *words[place + 2 :], "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "rows:                   --dataset_name says how many" in printed
    assert "memory of a step: " in printed and "bf16: true" in printed and "use_cpu" not in printed


def test_a_run_needs_a_dataset(capsys):
    assert main(["train", "gdpo", "--preset", "phygdpo-paper", "--use_cpu"]) == 2
    assert "needs --dataset_name" in capsys.readouterr().err


def test_presets_are_named_in_the_help():
    (field,) = [field for field in DataArguments.__dataclass_fields__.values() if field.name == "preset"]
    assert all(name in field.metadata["help"] for name in PRESETS)
