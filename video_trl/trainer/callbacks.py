"""Callbacks that users add to a trainer."""

import io
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..data import write_video
from .publishing.sampling import Sampler, SamplingCallback
from .setup.models import check_can_generate


logger = logging.getLogger(__name__)


class LogVideosCallback(SamplingCallback):
    """
    Generate the same videos, from fixed prompts and seeds, again and again during training.

    They are written to `<output_dir>/samples/step_<N>/<i>.mp4`, shown on the model card, uploaded with it, and sent to
    TensorBoard (as GIF), Weights & Biases and Trackio when `report_to` names them. The first set, `step_0`, shows the
    model before training. Videos are made on the main process while the others wait; the random state of training is
    left untouched.

    ```python
    trainer = VideoGroupDPOTrainer(model, args, dataset, callbacks=[LogVideosCallback(["A red ball falls."])])
    ```

    Args:
        prompts (`Sequence[str]`):
            Prompts, one video each.
        images (`Sequence[PIL.Image.Image]`, *optional*):
            For image-to-video, the first frame of each video. By default those of the first videos in the training
            data (the chosen ones), as the VAE shows them.
        seeds (`Sequence[int]`, *optional*):
            Seed of each video; `0, 1, 2, ...` by default.
        every_steps (`int`, *optional*):
            Optimizer steps from one set to the next. By default a set is made at each evaluation.
        fps (`float`, *optional*):
            Frames per second of the files; by default those of the training videos, or 16 where that is not known.
        call_kwargs (`Mapping[str, Any]`, *optional*):
            Further arguments of the pipeline's call, such as `num_inference_steps`. `num_frames`, `height` and `width`
            are by default those of the training data.

    Raises:
        ValueError: If there is no prompt, the number of seeds or images differs from that of prompts, or
            `every_steps` is not positive; and, when given to a trainer, if that trainer has no pipeline, or has one
            that takes no image and there are `images`.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        *,
        images: Sequence[Image.Image] | None = None,
        seeds: Sequence[int] | None = None,
        every_steps: int | None = None,
        fps: float | None = None,
        call_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"`prompts` must be a list with at least one prompt, got {prompts!r}.")
        for name, values in (("seeds", seeds), ("images", images)):
            if values is not None and len(values) != len(prompts):
                raise ValueError(f"`{name}` must have one entry per prompt ({len(prompts)}), got {len(values)}.")
        if every_steps is not None and every_steps < 1:
            raise ValueError(f"`every_steps` must be at least 1, got {every_steps}.")
        self.prompts = list(prompts)
        self.seeds = list(seeds) if seeds is not None else list(range(len(prompts)))
        self.images = None if images is None else list(images)
        self.every_steps = every_steps
        self.fps = fps
        self.call_kwargs = dict(call_kwargs or {})
        self._sampler: Sampler | None = None
        self._shown: int | None = None  # the step of the last set

    def use(self, sampler: Sampler) -> None:
        """Called by the trainer that the callback is given to."""
        check_can_generate(sampler.pipeline, "`LogVideosCallback`")
        if self.images is not None and "first_frame_latents" not in sampler.family.condition_columns:
            raise ValueError(
                f"`LogVideosCallback` was given images, but a {type(sampler.pipeline).__name__} takes none. Leave "
                "`images` out."
            )
        self._sampler = sampler
        sampler.prompts = sampler.prompts or self.prompts  # the model card shows the first callback's

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._shown = None
        if state.global_step == 0:
            self._log_videos(args, state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.every_steps is not None and state.global_step % self.every_steps == 0:
            self._log_videos(args, state)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.every_steps is None and self._shown != state.global_step:  # of several datasets, at the first
            self._log_videos(args, state)

    def _log_videos(self, args: TrainingArguments, state: TrainerState) -> None:
        assert self._sampler is not None, "the trainer calls use"
        self._shown = state.global_step
        if state.is_world_process_zero:
            videos, fps = self._generate(self._sampler), self.fps or self._sampler.fps
            folder = Path(args.output_dir) / "samples" / f"step_{state.global_step}"
            paths = [folder / f"{number:02d}.mp4" for number in range(len(videos))]
            for path, video in zip(paths, videos, strict=True):
                write_video(path, video, fps)
            writer = self._sampler.tensorboard()
            if writer is not None:
                for number, video in enumerate(videos):
                    _add_gif(writer, f"samples/{number:02d}", video, fps, state.global_step)
            for name in {"wandb", "trackio"} & set(args.report_to):
                _log_files(name, self.prompts, paths, state.global_step)
        PartialState().wait_for_everyone()

    def _generate(self, sampler: Sampler) -> list[np.ndarray]:
        """Videos uint8 `(T, H, W, 3)`, one per prompt."""
        videos = []
        call_kwargs = {**sampler.call_kwargs, **self.call_kwargs}
        with sampler.generation() as pipeline:
            for number, (prompt, seed) in enumerate(zip(self.prompts, self.seeds, strict=True)):
                if self.images is not None:
                    call_kwargs["image"] = self.images[number]
                elif "first_frame_latents" in sampler.family.condition_columns:
                    call_kwargs["image"] = sampler.first_frame(number)
                generator = torch.Generator("cpu").manual_seed(seed)
                frames = pipeline(prompt=prompt, generator=generator, output_type="np", **call_kwargs).frames[0]
                videos.append((frames * 255).round().astype(np.uint8))
        return videos


def _add_gif(writer: Any, tag: str, video: np.ndarray, fps: float, step: int) -> None:
    # `SummaryWriter.add_video` does the same with a package that is not installed here (moviepy).
    from tensorboard.compat.proto.summary_pb2 import Summary

    frames = [Image.fromarray(frame) for frame in video]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0)
    image = Summary.Image(
        height=video.shape[1], width=video.shape[2], colorspace=3, encoded_image_string=buffer.getvalue()
    )
    writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)
    writer.flush()


def _log_files(tracker: str, prompts: Sequence[str], paths: Sequence[Path], step: int) -> None:
    # Both packages offer the same two names; which of them is installed is the user's choice.
    import importlib

    module = importlib.import_module(tracker)
    videos = {
        f"samples/{path.stem}": module.Video(str(path), caption=prompt, format="mp4")
        for prompt, path in zip(prompts, paths, strict=True)
    }
    module.log({**videos, "train/global_step": step})  # the axis that transformers gives the curves
