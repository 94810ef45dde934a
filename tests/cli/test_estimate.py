"""`video-trl estimate`."""

import json
import re

import pytest
import yaml

from tests.support.tiny import tiny_wan_pipeline
from video_trl.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline of which only the JSON files are there: weights are not needed."""
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_wan_pipeline().save_pretrained(folder)
    for path in folder.rglob("*.safetensors"):
        path.unlink()
    return folder


SIZE = ["--num_frames", "17", "--height", "512", "--width", "512"]


def test_parts_and_verdict_of_the_sandbox(capsys):
    assert main(["estimate", "gdpo"]) == 0
    printed = capsys.readouterr().out
    assert "one GPU, step_mode=concat, activation checkpointing: full; 64 tokens a video" in printed
    for part in ("weights:", "adapter:", "gradients:", "optimizer:", "block inputs:", "peak:", "GFLOP", "Fits 80 GiB"):
        assert part in printed
    assert printed.startswith("gdpo of sandbox, the built-in tiny model; --model_name_or_path names a real")
    sizes = re.findall(r"([\d.]+) (?:GiB|MiB|GFLOP)", printed)
    assert len(sizes) > 8 and all(float(size) > 0 for size in sizes)  # nothing is rounded away
    assert re.search(r"Before training: 0\.\d+ GiB to encode a video, 0\.\d+ GiB of text encoder", printed)


def test_a_file_of_a_training_is_read_and_options_win(folder, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    run = {"model_name_or_path": str(folder), "num_frames": 5, "height": 32, "width": 32, "beta": 500, "lora_rank": 8}
    file.write_text(yaml.safe_dump(run | {"max_steps": 10, "loss_type": "plackett_luce", "step_mode": "sequential"}))
    assert main(["estimate", "gdpo", "--config", str(file)]) == 0
    eight = capsys.readouterr().out
    assert "step_mode=sequential" in eight
    assert main(["estimate", "gdpo", f"--config={file}", "--lora_rank", "4", "--num_rejected", "2"]) == 0
    assert capsys.readouterr().out != eight
    printed = []
    for targets in (None, "all-linear", ["attn1.to_q", "ffn.net.2"]):
        file.write_text(yaml.safe_dump(run | {"lora_target_modules": targets, "lora_rank": 100_000}))
        assert main(["estimate", "gdpo", "--config", str(file)]) == 0
        printed.append(re.search(r"adapter: .*", capsys.readouterr().out)[0])
    assert len(set(printed)) == 3
    file.write_text(yaml.safe_dump(run | {"lora_rnk": 8}))
    assert main(["estimate", "gdpo", "--config", str(file)]) == 2
    assert "no option 'lora_rnk' (did you mean 'lora_rank'?)" in capsys.readouterr().err


def test_what_does_not_fit_comes_with_what_does(folder, capsys):
    argv = ["estimate", "dpo", "--model_name_or_path", str(folder), *SIZE, "--step_mode", "concat"]
    argv += ["--no_activation_checkpointing"]
    assert main([*argv, "--gpu_gib", "1"]) == 0
    fitting = capsys.readouterr().out
    assert "Fits 1 GiB" in fitting and "activation checkpointing: none" in fitting
    peak = (float(re.search(r"peak: +([\d.]+) MiB", fitting)[1]) - 0.006) / 1024  # less than what was rounded
    assert main([*argv, "--gpu_gib", str(peak)]) == 0
    printed = capsys.readouterr().out
    assert f"Does not fit {peak:g} GiB" in printed
    assert "step_mode=sequential, activation checkpointing: none" in printed.partition("This should fit:")[2]
    assert main([*argv, "--gpu_gib", "0.0001", "--num_gpus", "2"]) == 0
    assert (
        "No configuration fits 2 GPUs of 0.0001 GiB. Use more GPUs, fewer frames or a lower resolution."
        in capsys.readouterr().out
    )


def test_other_engines_and_methods(folder, capsys):
    shared = ["--model_name_or_path", str(folder), *SIZE]
    assert main(["estimate", "repa", *shared, "--relation_tokens", "50"]) == 0
    assert "relation loss:" in capsys.readouterr().out
    assert main(["estimate", "regdpo", *shared, "--no_use_peft", "--num_gpus", "4", "--engine", "fsdp2"]) == 0
    printed = capsys.readouterr().out
    assert "4 x fsdp2" in printed and "sent, weights:" in printed and "adapter:" not in printed


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["gdpo", "--gpu_gib", "0"], 2, "--gpu_gib must be positive, got 0"),
        (["gdpo", "--engine", "horovod"], 1, "`engine` must be one of ddp"),
        (["gdpo", "--num_gpus", "3", "--context_parallel_size", "2"], 1, "positive multiple"),
        (
            ["gdpo", "--group_parallel_size", "3"],
            2,
            "must divide the number of videos that the loss of a row",
        ),
        (["gdpo", "--group_parallel_size", "2"], 2, "the number of GPUs, 1"),
        (["gdpo", "--quantization", "int8", "--engine", "fsdp2", "--num_gpus", "2"], 1, "got the engine 'fsdp2'"),
        (["gdpo", "--checkpointing_policy", "some"], 1, "`checkpointing_policy` must be one of"),
        (["ppo"], 2, "no method 'ppo'"),
    ],
)
def test_wrong_input_is_refused(argv, code, message, capsys):
    assert main(["estimate", *argv]) == code
    assert message in capsys.readouterr().err


def test_a_size_is_needed_for_a_real_model(folder, capsys):
    assert json.loads((folder / "transformer" / "config.json").read_text())["_class_name"] == "WanTransformer3DModel"
    assert main(["estimate", "dpo", "--model_name_or_path", str(folder)]) == 2
    assert "--num_frames is needed" in capsys.readouterr().err
