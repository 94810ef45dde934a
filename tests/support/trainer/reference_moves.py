"""
Where a copied reference is while its errors are looked up, on a device that only exists in the tests (host_reads.py).

`python -m tests.support.trainer.reference_moves DIRECTORY` trains three times and prints, as JSON, the losses, and the
devices of the reference's weights in its passes and at the end of steps, in order. The second run has
the errors of the first, and in the third the reference is never moved.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from tests.support.tiny import tiny_encoded_group, tiny_wan_pipeline
from tests.support.trainer.host_reads import DEVICE, WatchedDevice, config, kernels
from tests.support.trainer.runs import losses
from video_trl import VideoDPOConfig, VideoDPOTrainer
from video_trl.trainer.publishing.progress import ClosingLine, ProgressReport


class Places(TrainerCallback):
    """Writes down `"pass on ..."` for each pass of the reference, `"step on ..."` at the end of each step."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def watch(self, trainer: VideoDPOTrainer) -> None:
        self.reference = trainer.reference.transformer
        self.reference.register_forward_pre_hook(lambda *_: self.see("pass"))
        trainer.add_callback(self)

    def see(self, what: str) -> None:
        (kind,) = {weight.device.type for weight in [*self.reference.parameters(), *self.reference.buffers()]}
        self.seen.append(f"{what} on {kind}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.see("step")


def run(directory: Path, *, stays: bool) -> tuple[list[float], list[str]]:
    """Three steps of two pairs, with an evaluation of one batch after the second."""
    settings = {"per_device_train_batch_size": 2, "logging_strategy": "steps", "logging_steps": 1, "use_peft": False}
    settings |= {"step_mode": "concat", "eval_strategy": "steps", "eval_steps": 2}
    settings |= {"precompute_ref_errors": 1, "cache_dir": str(directory / "cache"), "learning_rate": 1e-3}
    args = config(VideoDPOConfig, directory, **settings)
    made = VideoDPOTrainer(tiny_wan_pipeline(), args, tiny_encoded_group(4), tiny_encoded_group(2, seed=9))
    for kind in (ProgressReport, ClosingLine):
        made.remove_callback(kind)  # this device has no memory to ask about
    if stays:
        made.reference.set_aside = lambda: None
    places = Places()
    places.watch(made)
    made.train()
    evaluated = [entry["eval_loss"] for entry in made.state.log_history if "eval_loss" in entry]
    return losses(made) + evaluated, places.seen


def main(directory: Path) -> None:
    registered = kernels()  # as long as this lives
    with WatchedDevice():
        results = [run(directory, stays=stays) for stays in (False, False, True)]
    del registered
    sys.stdout.write(json.dumps(results) + "\n")


if __name__ == "__main__":
    os.environ["ACCELERATE_TORCH_DEVICE"] = str(DEVICE)
    main(Path(sys.argv[1]))
