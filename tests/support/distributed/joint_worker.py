"""What each of two processes does in the test of the joint objective, video by video; run by torchrun."""

import sys
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist

from tests.support.tiny import tiny_encoded_group
from tests.support.trainer.repa_runs import with_tokens
from tests.support.trainer.runs import SMOOTH_ADAM, RecordGradients, config, trainer


OPTIONS = {"align_layer": 1, "projector_width": 8, "margin": 0.05, "head_learning_rate": 1e-2}


def run(directory: Path, **settings: object) -> RecordGradients:
    """Train on four rows; the gradients of every step."""
    recorder = RecordGradients()
    joint = {"repa_coeff": 70.0, "repa_options": OPTIONS, "sft_weight": 20.0, "beta": 50.0, "loss_type": "sum"}
    args = config(
        directory, step_mode="sequential", max_steps=2, max_grad_norm=0.0, **joint, **SMOOTH_ADAM, **settings
    )
    rows = with_tokens(tiny_encoded_group(4, latents_shape=(4, 3, 4, 4)))
    torch.manual_seed(0)
    trainer(args, train_dataset=rows, callbacks=[recorder]).train()
    return recorder


def main() -> None:
    directory = Path(sys.argv[1])
    recorder = run(directory / "run", per_device_train_batch_size=1, ddp_backend="gloo")
    if dist.get_rank() == 0:
        for number, step in enumerate(recorder.steps):
            safetensors.torch.save_file(step, directory / f"gradients-{number}.safetensors")


if __name__ == "__main__":
    main()
