"""Short runs of `VideoREPATrainer` on tiny models with a tiny but real VideoMAE."""

from pathlib import Path
from typing import Any

import torch
from transformers import VideoMAEConfig, VideoMAEModel

from tests.support.tiny import tiny_encoded_video, tiny_latents_shape, tiny_pipeline
from video_trl import VideoREPAConfig, VideoREPATrainer
from video_trl.data.encoding.teacher_tokens import quantise_tokens
from video_trl.teachers import VideoMAETeacher


TEACHER_WIDTH = 12


def tiny_teacher(seed: int = 0, **config: Any) -> VideoMAETeacher:
    """VideoMAE of two layers for pictures of 32 x 32: 2 x 2 tokens for every two frames behind the first."""
    torch.manual_seed(seed)
    defaults = {
        "image_size": 32,
        "patch_size": 16,
        "num_frames": 8,
        "tubelet_size": 2,
        "hidden_size": TEACHER_WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "use_mean_pooling": True,
        "initializer_range": 0.3,  # tokens that differ from one another
    }
    return VideoMAETeacher(VideoMAEModel(VideoMAEConfig(**(defaults | config))), "tiny-videomae")


def with_tokens(rows: list[dict[str, Any]], frames: int = 4, seed: int = 0) -> list[dict[str, Any]]:
    """Encoded rows with tokens of a teacher that saw `2 * frames` frames behind the first, at 2 x 2 places."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for row in rows:
        tokens, scale = quantise_tokens(torch.randn(frames, 4, TEACHER_WIDTH, generator=generator))
        made.append(
            {
                **row,
                "teacher_tokens": tokens,
                "teacher_scale": scale,
                "teacher_grid": torch.tensor([frames, 2, 2]),
                "teacher_frame_times": 1.5 + 2 * torch.arange(frames),
            }
        )
    return made


def aligned_rows(n: int = 6, family: str = "wan-t2v") -> list[dict[str, Any]]:
    """Encoded rows of 9 frames with teacher tokens."""
    channels, _, height, width = tiny_latents_shape(family)
    return with_tokens(tiny_encoded_video(n, latents_shape=(channels, 3, height, width), family=family))


def repa_config(directory: Path, **changes: Any) -> VideoREPAConfig:
    """Six steps of two videos at a learning rate that moves the weights visibly; nothing is saved."""
    defaults: dict[str, Any] = {
        "output_dir": str(directory),
        "use_cpu": True,
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "lora_rank": 4,
        "lora_alpha": 4,
        "learning_rate": 1e-2,
        "head_learning_rate": 1e-2,
        "projector_width": 8,
        "align_layer": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return VideoREPAConfig(**(defaults | changes))


def repa_trainer(directory: Path, family: str = "wan-t2v", **arguments: Any) -> VideoREPATrainer:
    """A trainer of a fresh tiny pipeline on six rows; what is no argument of the trainer goes to its config."""
    keys = ("callbacks", "train_dataset", "eval_dataset", "evaluator", "model", "teacher")
    given = {name: arguments.pop(name) for name in keys if name in arguments}
    defaults = {"model": tiny_pipeline(family), "train_dataset": aligned_rows(family=family)}
    return VideoREPATrainer(args=repa_config(directory, **arguments), **(defaults | given))
