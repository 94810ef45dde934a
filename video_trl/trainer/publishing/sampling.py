"""Generate videos during a run without changing its random state."""

import inspect
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline
from torch import nn
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from ...data.columns import as_tensor
from ...data.encoding.store import encoded_origin
from ...models import ModelFamily, rules_of
from ...models.base import FRAME_RATE
from ...models.mixed_precision import inputs_cast_for_vae
from ..setup.rows import IndexedDataset


def tensorboard_writer(callbacks: Iterable[TrainerCallback]) -> Any:
    """The writer of TensorBoard among the callbacks of a trainer; None where the run has none."""
    return next((each.tb_writer for each in callbacks if isinstance(each, TensorBoardCallback)), None)


class Sampler:
    """
    What whoever generates videos in the course of a run needs to know.

    Args:
        pipeline (`DiffusionPipeline`, *optional*): Pipeline whose transformer is trained.
        family ([`ModelFamily`]): Of the transformer.
        rows (`IndexedDataset`): What is trained, or evaluated, on.
        device (`torch.device`): Where the transformer is.
        max_sequence_length (`int`): Prompt length in tokens.
        fps (`float`, *optional*): As configured.
        averaged (`Callable`): Context in which the transformer has the weights to generate with.
        tensorboard (`Callable`): The writer of TensorBoard, if the run has one.

    Attributes:
        call_kwargs (`dict`): Arguments of the pipeline's call that make videos of the size, and with the prompt
            padding, of the rows: of the commonest size where there are several.
        fps (`float`): Frames per second: as configured or recorded when the rows were encoded; where neither is, what
            the model generates at.
        prompts (`list[str]`): What the sample videos in `<output_dir>/samples` are made of, in order.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline | None,
        family: ModelFamily,
        rows: IndexedDataset,
        *,
        device: torch.device,
        max_sequence_length: int,
        fps: float | None = None,
        averaged: Callable[[], AbstractContextManager[None]] = nullcontext,
        tensorboard: Callable[[], Any] = lambda: None,
    ) -> None:
        self._averaged = averaged
        self.pipeline, self.family, self.rows, self.device = pipeline, family, rows, device
        self.tensorboard = tensorboard
        self.prompts: list[str] = []
        origin = encoded_origin(rows.rows)
        recorded = None if origin is None else origin.fps
        rules = None if pipeline is None else rules_of(pipeline)
        self.fps = fps or recorded or (16.0 if rules is None else rules.fps)  # of no use to a bare transformer
        self.call_kwargs: dict[str, Any] = {"max_sequence_length": max_sequence_length}
        if pipeline is not None and pipeline.components.get("vae") is not None:
            (_, frames, height, width), _ = Counter(rows.shapes).most_common(1)[0]
            joined, side = family.compression(pipeline.vae)
            self.call_kwargs["num_frames"] = (frames - 1) * joined + 1
            if FRAME_RATE in family.condition_columns:
                self.call_kwargs[FRAME_RATE] = self.fps
            if family.guidance is not None:
                self.call_kwargs["guidance_scale"] = family.guidance
            self.call_kwargs["height"], self.call_kwargs["width"] = height * side, width * side
        if pipeline is not None:  # some take the size from an image, or have one length of prompts
            takes = inspect.signature(pipeline.__call__).parameters
            self.call_kwargs = {name: value for name, value in self.call_kwargs.items() if name in takes}

    @contextmanager
    def generation(self) -> Iterator[DiffusionPipeline]:
        """Context that lends the pipeline, see [`generation`], with the averaged weights where a run has them."""
        assert self.pipeline is not None, "refused for a bare transformer"
        with self._averaged(), generation(self.pipeline, self.device) as pipeline:
            yield pipeline

    def first_frame(self, number: int) -> PIL.Image.Image:
        """First frame of the chosen, or only, video of a row, an image to generate from."""
        assert self.pipeline is not None, "refused for a bare transformer"
        return first_frame(self.pipeline, self.family, self.rows[number % len(self.rows)])


class SamplingCallback(TrainerCallback):
    """A callback that generates: a trainer hands it its sampler, when it is made or given the callback."""

    def use(self, sampler: Sampler) -> None:
        """Take the sampler; a `ValueError` if it cannot do what the callback wants."""
        raise NotImplementedError


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
    with forked, torch.compiler.set_stance("force_eager"), inputs_cast_for_vae(pipeline):
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
                torch.get_device_module(device).empty_cache()  # VAE and text encoder have left; this is for training


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
