"""Start a worker script on several processes."""

import os
import subprocess
import sys
from pathlib import Path

import torch.distributed as dist

from tests.support import forks
from tests.support.paths import PYTHONPATH, ROOT


def launch(worker: str, *arguments: object, processes: int = 2, seconds: int = 280) -> None:
    """Run a script of this folder by `torchrun`; its processes have one thread each."""
    repository = ROOT
    # `accelerate launch --cpu --num_processes 2` starts a single process; `--standalone` picks a free port.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    result = subprocess.run(
        [*command, str(Path(__file__).with_name(worker)), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH},
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert result.returncode == 0, result.stderr[-6000:]


def launch_forked(worker: str, *arguments: object, processes: int = 2, seconds: int = 280) -> None:
    """
    The same without importing everything in each process, and without `torchrun`, whose variables they get.

    For the fast tests; `launch` is in the slow ones, and test_ended_runs.py and test_train.py hold the launchers.
    """
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is there, as it is under torchrun
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    ranks = tuple({**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes))
    module = f"tests.support.distributed.{worker.removesuffix('.py')}"
    forked = forks.start("-m", module, *map(str, arguments), environments=ranks)
    assert forked.wait(seconds) == [0] * processes, forked.errors[-6000:]
