"""Sample videos in the middle of a training run without leaving a trace in it."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline
from torch import nn

from ...data.columns import as_tensor
from ...models import ModelFamily


@contextmanager
def generation(pipeline: DiffusionPipeline, device: torch.device) -> Iterator[DiffusionPipeline]:
    """
    Lend a pipeline whose transformer is being trained.

    Inside, all its networks are on `device` and in evaluation mode; afterwards each is back where and as it was, and
    the global random generators (Python's, NumPy's, torch's) stand where they stood.

    Args:
        pipeline (`DiffusionPipeline`): Pipeline to sample from.
        device (`torch.device`): Device of the transformer.

    Yields:
        `DiffusionPipeline`: The same pipeline.
    """
    modules = [module for module in pipeline.components.values() if isinstance(module, nn.Module)]
    before = [(module, module.training, next(module.parameters()).device) for module in modules]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [] if device.type == "cpu" else [device]
    forked = torch.random.fork_rng(devices=devices, device_type="cuda" if device.type == "cpu" else device.type)
    # A few videos are no reason to compile the blocks for their sizes too.
    with forked, torch.compiler.set_stance("force_eager"):
        try:
            for module in modules:
                module.eval().to(device)
            yield pipeline
        finally:
            for module, training, place in before:
                module.train(training).to(place)
            random.setstate(python_state)
            np.random.set_state(numpy_state)
            if device.type != "cpu":
                torch.accelerator.empty_cache()  # the VAE and text encoder have left; their memory is for training


def first_frame(pipeline: DiffusionPipeline, family: ModelFamily, row: Mapping[str, Any]) -> PIL.Image.Image:
    """
    What the only or chosen video of an encoded row begins with, as the VAE shows it: an image to generate from.

    Args:
        pipeline (`DiffusionPipeline`): Pipeline with its VAE.
        family ([`ModelFamily`]): Of the pipeline's transformer.
        row (`Mapping`): Encoded row, with `latents` or `chosen_latents` `(C, F, H, W)`.

    Returns:
        `PIL.Image.Image`: Of the size of the video.
    """
    latents = as_tensor(row["latents"] if "latents" in row else row["chosen_latents"])
    pixels = family.decode_latents(pipeline.vae, latents[None, :, :1])[0, :, 0]  # (3, H, W)
    frame = ((pixels * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return PIL.Image.fromarray(frame.permute(1, 2, 0).cpu().numpy())
