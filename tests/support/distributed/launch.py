"""Start a worker script on several processes."""

import os
import subprocess
import sys
from pathlib import Path

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
