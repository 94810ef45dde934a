"""Two processes under torchrun, ended in each of the ways in which clusters end them, and started again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support.distributed import ending_worker
from tests.support.paths import PYTHONPATH, ROOT
from video_trl.files import file_checksum


pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TORCHRUN = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node 2"
LORA = "pytorch_lora_weights.safetensors"


def start(directory: Path, *options: str) -> subprocess.Popen:
    """The launcher ignores SIGUSR1, and shares no store, as in examples/accelerate_configs/multi_node.*."""
    command = f'trap "" USR1; exec {TORCHRUN} {" ".join(options)} {ending_worker.__file__} {directory}'
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(["bash", "-c", command], env=environment, cwd=ROOT, start_new_session=True, **pipes)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while not path.exists():
        assert process.poll() is None, process.stderr.read()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def finish(directory: Path) -> str:
    """Start again until the end; the checksum of the adapter."""
    process = start(directory)
    assert process.wait(timeout=300) == 0, process.stderr.read()[-3000:]
    assert not list(directory.glob("_partial-*"))
    return file_checksum(directory / LORA)


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> str:
    return finish(tmp_path_factory.mktemp("straight") / "run")


def checkpoints(directory: Path) -> set[str]:
    return {path.name for path in directory.glob("checkpoint-*")}


def test_sigterm_to_the_launcher_saves_a_checkpoint(tmp_path, straight):
    process = start(tmp_path)
    wait_for(tmp_path / "step-1-1", process)
    process.terminate()
    errors = process.communicate(timeout=60)[1]
    assert process.returncode != 0 and "whose checkpoint is saved" in errors
    assert len(checkpoints(tmp_path)) == 1
    assert finish(tmp_path) == straight


def test_sigusr1_to_all_processes_ends_the_workers_with_75_and_not_the_launcher(tmp_path, straight):
    process = start(tmp_path)
    wait_for(tmp_path / "step-0-0", process)
    wait_for(tmp_path / "step-1-0", process)
    for each in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        each.send_signal(signal.SIGUSR1)  # as Slurm does
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and "exitcode  : 75" in errors
    assert len(checkpoints(tmp_path)) == 1 and "checkpoint-3" not in checkpoints(tmp_path)
    assert finish(tmp_path) == straight


def test_a_worker_that_dies_takes_the_launch_down_and_the_next_one_goes_on(tmp_path, straight):
    process = start(tmp_path)
    wait_for(tmp_path / "checkpoint-3", process)
    psutil.Process(process.pid).children()[-1].kill()
    assert process.wait(timeout=120) == 1
    assert checkpoints(tmp_path) == {"checkpoint-3"}
    assert finish(tmp_path) == straight


def test_an_elastic_launch_starts_its_processes_again_and_they_go_on(tmp_path, straight):
    process = start(tmp_path, "--max_restarts=1")
    wait_for(tmp_path / "checkpoint-3", process)
    psutil.Process(process.pid).children()[-1].kill()
    errors = process.communicate(timeout=400)[1]
    assert process.returncode == 0 and "TORCH_DISABLE_SHARE_RDZV_TCP_STORE" not in errors, errors[-3000:]
    assert file_checksum(tmp_path / LORA) == straight and not list(tmp_path.glob("_partial-*"))


def test_an_elastic_launch_told_to_end_saves_and_restarts_nothing(tmp_path, straight):
    process = start(tmp_path, "--max_restarts=1")
    wait_for(tmp_path / "step-1-1", process)
    process.terminate()
    errors = process.communicate(timeout=60)[1]
    assert process.returncode != 0 and "whose checkpoint is saved" in errors
    assert len(checkpoints(tmp_path)) == 1
    assert finish(tmp_path) == straight
