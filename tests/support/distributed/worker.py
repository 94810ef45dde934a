"""What each of two processes does in the distributed tests; one launch for all of them, because starting is slow.

Run by `torchrun --nproc_per_node 2`. The first process writes what it has seen for the tests to read.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import safetensors.torch
import torch.distributed as dist
from transformers import TrainerCallback

from tests.support.tiny import PROMPTS, tiny_encoded_group, tiny_wan_pipeline
from tests.support.trainer.heads import head_trainer
from tests.support.trainer.runs import (
    SMOOTH_ADAM,
    RecordGradients,
    config,
    double,
    losses,
    mixed_shapes,
    trained_weights,
    trainer,
)
from video_trl.trainer import LogVideosCallback
from video_trl.trainer.step.nan_guard import NonFiniteLossError


def train(name: str, directory: Path, resume: Path | str | None = None, output: str = "", **settings: Any) -> None:
    """Train on eight groups, in a folder of that name or `output`; keep gradients, final weights and the log."""
    recorder, arguments = RecordGradients(), {}
    for argument in ("callbacks", "eval_dataset", "train_dataset"):
        if argument in settings:
            arguments[argument] = settings.pop(argument)
    arguments["callbacks"] = [recorder, *arguments.get("callbacks", [])]
    args = config(directory / (output or name), ddp_backend="gloo", max_grad_norm=0.0, **SMOOTH_ADAM, **settings)
    made = trainer(args, rows=8, model=double(tiny_wan_pipeline()), **arguments)
    made.train(resume_from_checkpoint=resume and str(resume))
    keep(name, directory, made, recorder)


def train_head(directory: Path) -> None:
    """A module beside the transformer, trained on eight videos."""
    recorder = RecordGradients()
    settings = {"ddp_backend": "gloo", "max_grad_norm": 0.0, "max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    settings |= SMOOTH_ADAM
    made = head_trainer(directory / "head", rows=8, callbacks=[recorder], **settings)
    made.train()
    keep("head", directory, made, recorder)


def keep(name: str, directory: Path, made: Any, recorder: RecordGradients) -> None:
    if dist.get_rank() == 0:
        safetensors.torch.save_file(recorder.steps[0], directory / f"{name}-gradients.safetensors")
        safetensors.torch.save_file(trained_weights(made), directory / f"{name}-weights.safetensors")
        evaluations = [entry for entry in made.state.log_history if "eval_loss" in entry]
        report = {"losses": losses(made), "log": made.state.log_history[0], "evaluations": evaluations}
        (directory / f"{name}.json").write_text(json.dumps(report))


def stop_together(directory: Path) -> None:
    """One bad sample, seen by one of the processes in some step: both stop in that step."""
    rows = tiny_encoded_group(8)
    made = trainer(config(directory / "bad", ddp_backend="gloo", per_device_train_batch_size=1), train_dataset=rows)
    rows[5]["chosen_latents"].fill_(float("nan"))  # after the check of all rows
    try:
        made.train()
    except NonFiniteLossError:
        (directory / f"stopped-{dist.get_rank()}-{made.state.global_step}").touch()


def end_together(directory: Path) -> None:
    """The second process gets a signal in the third step; then the run goes on."""

    class Signal(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs) -> None:
            if state.global_step == 2 and args.process_index == 1:
                os.kill(os.getpid(), signal.SIGUSR1)

    settings = {"max_steps": 6, "max_grad_norm": 0.0, "ddp_backend": "gloo", **SMOOTH_ADAM}
    model = {"rows": 8, "model": double(tiny_wan_pipeline())}
    made = trainer(config(directory / "ended", **settings), callbacks=[Signal()], **model)
    try:
        made.train()
    except SystemExit as ended:
        (directory / f"ended-{dist.get_rank()}-{made.state.global_step}-{ended.code}").touch()
    try:
        trainer(config(directory / "watched", ddp_backend="gloo"), **model).train()
    except ValueError as error:
        (directory / f"refused-{dist.get_rank()}").write_text(str(error))
    train("continued", directory, "auto", output="ended", per_device_train_batch_size=2, max_steps=6)


def main() -> None:
    directory = Path(sys.argv[1])
    train("split", directory, per_device_train_batch_size=2, max_steps=3)
    train(
        "accumulated",
        directory,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        max_steps=3,
        activation_checkpointing=True,
    )
    train(
        "sequential",
        directory,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        max_steps=3,
        step_mode="sequential",
    )
    cached = {"precompute_ref_errors": 2, "cache_dir": str(directory / "cache")}
    train("banked", directory, per_device_train_batch_size=2, max_steps=3, **cached)
    train(
        "watched",
        directory,
        per_device_train_batch_size=2,
        max_steps=6,
        save_strategy="steps",
        save_steps=3,
        eval_strategy="steps",
        eval_steps=3,
        eval_dataset=tiny_encoded_group(3, seed=9),
        callbacks=[LogVideosCallback(PROMPTS[:1], call_kwargs={"num_inference_steps": 1})],
    )
    train("resumed", directory, directory / "watched" / "checkpoint-3", per_device_train_batch_size=2, max_steps=6)
    train("grown", directory, directory / "alone" / "checkpoint-3", per_device_train_batch_size=2, max_steps=6)
    train("full", directory, per_device_train_batch_size=2, max_steps=2, use_peft=False, learning_rate=1e-3)
    train(
        "mixed",
        directory,
        per_device_train_batch_size=2,
        max_steps=6,
        save_strategy="steps",
        save_steps=3,
        eval_strategy="steps",
        eval_steps=6,
        train_dataset=mixed_shapes(),
        eval_dataset=mixed_shapes(),
    )
    train_head(directory)
    stop_together(directory)
    end_together(directory)


if __name__ == "__main__":
    main()
