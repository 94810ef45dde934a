"""Tiny pipelines with adapters, and one output of their transformers."""

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig

from tests.support.tiny import tiny_pipeline
from video_trl import hub


ATTENTION = ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"]
# For `load_lora_weights` of a folder: without a network diffusers before 0.42 does not look what is in it.
IN_FOLDER = (
    {"weight_name": hub.LORA_FILE_NAME} if tuple(map(int, diffusers.__version__.split(".")[:2])) < (0, 42) else {}
)


def adapter(family: str, folder: Path, **config: Any) -> tuple[DiffusionPipeline, Path]:
    """A pipeline with an adapter that has moved, and its file."""
    pipeline = tiny_pipeline(family)
    pipeline.transformer.add_adapter(LoraConfig(**({"r": 4, "lora_alpha": 4, "target_modules": ATTENTION} | config)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in pipeline.transformer.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return pipeline, hub.save_lora(pipeline.transformer, folder, base_model="somebody/base")


def output(pipeline: DiffusionPipeline) -> torch.Tensor:
    """One call of the transformer on fixed noise."""
    generator = torch.Generator().manual_seed(0)
    transformer = pipeline.transformer
    for parameter in transformer.parameters():  # loaded ones lie where they lie in the file, and kernels notice
        parameter.data = parameter.data.clone()
    inputs = {
        "hidden_states": torch.randn(1, transformer.config.in_channels, 2, 4, 4, generator=generator),
        "encoder_hidden_states": torch.randn(1, 512, 16, generator=generator),
        "timestep": torch.tensor([500]),
    }
    if transformer.config.image_dim is not None:
        inputs["encoder_hidden_states_image"] = torch.randn(1, 5, 16, generator=generator)
    with torch.no_grad():
        return transformer(**inputs, return_dict=False)[0]
