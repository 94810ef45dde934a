"""What each of two processes does in the test of `VideoREPATrainer`; run by `torchrun --nproc_per_node 2`."""

import atexit
import json
import os
import sys
from pathlib import Path

import safetensors.torch
import torch.distributed as dist

from tests.support.trainer.repa_runs import repa_trainer
from tests.support.trainer.runs import SMOOTH_ADAM, RecordGradients


HELD = []  # what a script keeps until Python ends: its trainer
SETTINGS = {"max_steps": 3, "max_grad_norm": 0.0, "spatial_pooling": "conv", "activation_checkpointing": True}


def run(directory: Path, **settings: object) -> tuple[list[dict], RecordGradients]:
    """Train on six rows; the log and the gradients of every step."""
    recorder = RecordGradients()
    made = repa_trainer(directory, callbacks=[recorder], **SETTINGS, **SMOOTH_ADAM, **settings)
    made.train()
    if os.environ.get("RANK") == "0":
        HELD.append(made)
    return [entry for entry in made.state.log_history if "trd/raw" in entry], recorder


def note_threads(directory: Path) -> None:
    """Write down the names of the threads of this process."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    (directory / f"threads-{os.environ['RANK']}.json").write_text(json.dumps(names))


def main() -> None:
    directory = Path(sys.argv[1])
    atexit.register(note_threads, directory)  # before a trainer is made, so that it runs after what the trainer leaves
    log, recorder = run(directory / "run", per_device_train_batch_size=1, ddp_backend="gloo")
    if dist.get_rank() == 0:
        safetensors.torch.save_file(recorder.steps[0], directory / "gradients.safetensors")
        note_threads(directory)
        (directory / "running.json").write_text((directory / "threads-0.json").read_text())
        (directory / "log.json").write_text(json.dumps(log))


if __name__ == "__main__":
    main()
