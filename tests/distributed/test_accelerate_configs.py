"""The example configurations are read by accelerate itself, and give the engines that they are named for."""

import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from tests.support.distributed.cpu_engines import reset
from tests.support.paths import EXAMPLES
from tests.support.trainer.runs import config
from video_trl.trainer.parallel.engines import requested_engine


FOLDER = EXAMPLES / "accelerate_configs"
ENGINES = {
    "ddp": "ddp",
    "fsdp2": "fsdp2",
    "fsdp2_context_parallel": "fsdp2",
    "deepspeed_zero2": "zero2",
    "deepspeed_zero3": "zero3",
    "deepspeed_zero3_offload": "zero3",
}


def test_every_file_is_tested():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(ENGINES)


@pytest.mark.parametrize(("name", "engine"), ENGINES.items())
def test_accelerate_sets_up_the_engine(name, engine, tmp_path, monkeypatch):
    if engine.startswith("zero") and find_spec("deepspeed") is None:
        load_config_from_file(str(FOLDER / f"{name}.yaml"))  # refuses what it does not know
        pytest.skip("needs video-trl[deepspeed]")
    path = FOLDER / f"{name}.yaml"
    loaded = load_config_from_file(str(path))
    assert loaded.num_processes == 8
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    if engine.startswith("zero"):
        arguments.deepspeed_fields_from_accelerate_config = ",".join(loaded.deepspeed_config)  # as `launch` does
        _, environment = prepare_deepspeed_cmd_env(arguments)
    else:
        environment = prepare_multi_gpu_env(arguments)
    with monkeypatch.context() as patched:
        for variable, value in environment.items():
            if variable.startswith(("ACCELERATE_", "FSDP_")):
                patched.setenv(variable, value)
        patched.setenv("ACCELERATE_USE_CPU", "true")
        try:
            assert requested_engine(config(tmp_path, bf16=True)) == engine
        finally:
            reset()


@pytest.mark.parametrize("name", ["multi_node.sh", "multi_node.sbatch"])
def test_scripts_are_whole(name):
    path = FOLDER / name
    assert path.stat().st_mode & 0o111, "can be run"
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_the_multi_node_script_starts_accelerate_on_every_machine(tmp_path):
    """With a stand-in for the command, which shows what it is given."""
    (tmp_path / "accelerate").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (tmp_path / "accelerate").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "NODES": "4", "HEAD": "10.0.0.1", "RANK": "2", "ENGINE": "ddp"}
    script = [str(FOLDER / "multi_node.sh"), "examples/train_dpo.py", "--beta", "10"]
    output = subprocess.run(script, env=environment, capture_output=True, text=True, check=True).stdout.split("\n")
    given = dict(zip(output[1::2], output[2::2], strict=False))
    assert output[0] == "launch" and Path(given["--config_file"]) == FOLDER / "ddp.yaml"
    assert given["--num_processes"] == "32" and given["--machine_rank"] == "2" and given["--rdzv_backend"] == "c10d"
    assert given["--max_restarts"] == "0"
    assert output[-4:-1] == ["examples/train_dpo.py", "--beta", "10"]
    missing = subprocess.run(script, env=environment | {"HEAD": ""}, capture_output=True, text=True)
    assert missing.returncode and "address of the first machine" in missing.stderr
