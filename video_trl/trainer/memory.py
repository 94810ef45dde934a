"""How much memory the activations of a step take, roughly, and which step mode follows from it."""

import logging
import math
from typing import Literal

import torch
from diffusers import ModelMixin

from ..adapters import VideoAdapter
from .preference_config import StepMode


logger = logging.getLogger(__name__)

# Share of an accelerator's memory to plan with: the allocator's gaps and the kernels' workspace need the rest.
_HEADROOM = 0.85


def activation_bytes(
    transformer: ModelMixin,
    adapter: VideoAdapter,
    latents_shape: tuple[int, ...],
    *,
    num_videos: int,
    dtype: torch.dtype,
    checkpointing: bool,
) -> int:
    """
    Bytes of activations at the peak of a step with the graphs of `num_videos` videos, within some ten percent.

    With checkpointing, these are the inputs of all blocks, and what one block needs while it is recomputed; without,
    everything that all blocks save. The factors are counts of live tensors of Wan's blocks; CogVideoX's are alike.

    Args:
        transformer (`ModelMixin`): Wan or CogVideoX.
        adapter (`VideoAdapter`): Of its family.
        latents_shape (`tuple[int, ...]`): Shape `(C, F, H, W)` of one video.
        num_videos (`int`): Videos whose graphs are alive at once.
        dtype (`torch.dtype`): Of the computation.
        checkpointing (`bool`): Whether blocks are recomputed in the backward pass.
    """
    config = transformer.config
    width = config.num_attention_heads * config.attention_head_dim
    inner = config.get("ffn_dim") or 4 * width
    depth, tokens = len(adapter.blocks(transformer)), math.prod(adapter.token_grid(transformer, latents_shape))
    if checkpointing:
        elements = width * depth + 34 * width + 1.8 * inner
    else:
        elements = depth * (25 * width + inner)
    return int(num_videos * tokens * elements * dtype.itemsize)


def accelerator_memory(device: torch.device) -> int | None:
    """Bytes of memory of an accelerator, free or not, so that plans are the same on every start; none for the CPU."""
    return None if device.type == "cpu" else torch.accelerator.get_memory_info(device)[1]


def choose_step_mode(requested: StepMode, memory: int | None, needed: int) -> Literal["concat", "sequential"]:
    """
    Settle `step_mode="auto"`.

    Args:
        requested (`str`): What the configuration says.
        memory (`int`, *optional*): Bytes of memory of the accelerator, if there is one.
        needed (`int`): Bytes that a step needs if all its videos go through the transformer at once.
    """
    if requested != "auto":
        return requested
    mode: Literal["concat", "sequential"] = "concat"
    if memory is not None and needed > _HEADROOM * memory:
        mode = "sequential"
    logger.info("step_mode='auto' is '%s': all videos at once would need about %.1f GiB.", mode, needed / 2**30)
    return mode
