"""Short runs on tiny models, and what to read off them."""

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from transformers import TrainerCallback

from tests.support.tiny import tiny_encoded_group, tiny_wan_pipeline
from video_trl import VideoGroupDPOConfig, VideoGroupDPOTrainer


# For runs that divide their steps otherwise: the usual 1e-8 would make a step of what is rounding (rounding.adam).
SMOOTH_ADAM = {"adam_epsilon": 0.1}


def config(directory: Path, **changes: Any) -> VideoGroupDPOConfig:
    """Six steps of two groups at a learning rate that moves the weights visibly; nothing is saved."""
    defaults: dict[str, Any] = {
        "output_dir": str(directory),
        "use_cpu": True,
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "lora_rank": 4,
        "lora_alpha": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return VideoGroupDPOConfig(**(defaults | changes))


def trainer(args: VideoGroupDPOConfig, rows: int = 6, **arguments: Any) -> VideoGroupDPOTrainer:
    """A trainer of a fresh tiny pipeline on `rows` encoded groups of 1 + 3 videos."""
    defaults = {"model": tiny_wan_pipeline(), "train_dataset": tiny_encoded_group(rows)}
    return VideoGroupDPOTrainer(args=args, **(defaults | arguments))


def double(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """The pipeline, its transformer in float64: what is trained then, is trained in float64 (rounding.DOUBLE)."""
    pipeline.transformer.double()
    return pipeline


def mixed_shapes(m: int = 3) -> list[dict[str, Any]]:
    """Eleven encoded groups, six of one shape and five of another, in turn."""
    square, wide = tiny_encoded_group(6, m), tiny_encoded_group(5, m, seed=1, latents_shape=(4, 2, 4, 6))
    return [row for pair in zip(square, wide, strict=False) for row in pair] + square[5:]


def trained_weights(made: VideoGroupDPOTrainer) -> dict[str, Tensor]:
    """Copies of the weights that are trained."""
    return {name: weight.detach().clone() for name, weight in made.model.named_parameters() if weight.requires_grad}


def frozen_weights(made: VideoGroupDPOTrainer) -> dict[str, Tensor]:
    """Copies of the weights that are not trained."""
    return {
        name: weight.detach().clone() for name, weight in made.model.named_parameters() if not weight.requires_grad
    }


def first_batch(made: VideoGroupDPOTrainer, *indices: int) -> dict[str, Tensor]:
    """The rows with these indices as `compute_loss` gets them, the model in training mode."""
    made.model.train()
    return made.data_collator([made.train_dataset[index] for index in indices])


def disturb_adapter(made: VideoGroupDPOTrainer, scale: float = 0.05) -> None:
    """Give a fresh adapter, whose output is 0, some output."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in made.model.parameters():
            if weight.requires_grad:
                weight.add_(scale * torch.randn(weight.shape, generator=generator))


def losses(made: VideoGroupDPOTrainer) -> list[float]:
    """Logged training losses, in order."""
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


class RecordGradients(TrainerCallback):
    """Keeps the gradients of every optimizer step, before the update."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.steps.append({name: weight.grad.clone() for name, weight in named if weight.grad is not None})


class StopAfter(TrainerCallback):
    """Ends training after a step, as an interruption would, while the schedule still aims at `max_steps`."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.seen = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen = state.global_step
        control.should_training_stop = state.global_step >= self.step


def assert_equal_weights(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Bit-equal, and not trivially so."""
    assert left.keys() == right.keys() and left
    for name, weight in left.items():
        assert torch.equal(weight, right[name]), name
