"""The smallest trainer with a head, which reads the hidden states of a block."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.support.tiny import tiny_encoded_video, tiny_wan_pipeline
from tests.support.trainer.runs import config as group_config
from video_trl import VideoSFTConfig, VideoSFTTrainer


class Head(nn.Module):
    """Two layers, one with a bias: both groups of the optimizer have a share in it."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, hidden), nn.Dropout(0.5), nn.Linear(hidden, 3, bias=False))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.layers(tokens)


class HeadTrainer(VideoSFTTrainer):
    """Supervised fine-tuning with a term that pulls the head's output, on the first block's tokens, to 1."""

    hidden = 5
    rate_of_head: float | None = None

    def make_head(self, transformer: nn.Module) -> nn.Module:
        head = Head(24, self.hidden)

        def keep(block: nn.Module, inputs: Any, tokens: torch.Tensor) -> None:
            if torch.is_grad_enabled() and transformer.training:
                self.outputs = head(tokens)  # (B, N, 3)

        self.family.blocks(transformer)[0].register_forward_hook(keep)
        return head

    def head_learning_rate(self) -> float | None:
        return self.rate_of_head

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        if self.model.training:
            loss = loss + (self.outputs.float() - 1).square().mean()
        return (loss, outputs) if return_outputs else loss


def head_config(directory: Path, **changes: Any) -> VideoSFTConfig:
    """The settings of the other short runs."""
    given = group_config(directory)
    names = (
        "output_dir use_cpu max_steps per_device_train_batch_size per_device_eval_batch_size lora_rank lora_alpha "
        "learning_rate logging_steps save_strategy disable_tqdm"
    ).split()
    return VideoSFTConfig(**({name: getattr(given, name) for name in names} | changes))


def head_trainer(directory: Path, rows: int = 6, kind: type[HeadTrainer] = HeadTrainer, **arguments: Any):
    """A trainer of a fresh tiny pipeline on encoded videos; what is no argument of the trainer goes to its config."""
    keys = ("optimizers", "callbacks", "train_dataset", "eval_dataset", "model")
    given = {name: arguments.pop(name) for name in keys if name in arguments}
    defaults = {"model": tiny_wan_pipeline(), "train_dataset": tiny_encoded_video(rows)}
    return kind(args=head_config(directory, **arguments), **(defaults | given))
