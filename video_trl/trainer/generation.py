"""Sample videos in the middle of a training run without leaving a trace in it."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import nn


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
    with torch.random.fork_rng(devices=devices, device_type="cuda" if device.type == "cpu" else device.type):
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
