"""
Rejected videos made from the chosen one: they share its scene, and differ in what the model made of it.

A chosen video is noised in part and denoised by the frozen model: its coarse layout stays, its motion is the model's
(DenseDPO, https://huggingface.co/papers/2506.03517). Or a region of it, moving through space and time, is painted anew
while the rest is kept (LocalDPO, https://huggingface.co/papers/2601.04068); the region is written as `loss_weights`,
so that only it is compared. Neither needs a judge, and each video costs less than one sampling.
"""

import inspect
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import datasets
import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm.auto import tqdm

from ..data.columns import MapDataset, column_names, undecoded
from ..data.video_io import VideoDecodeError, probe_video, read_video, video_hash, write_video
from ..files import atomic_file, fingerprint
from ..models import ModelFamily, family_of
from ..models.base import FRAME_RATE


logger = logging.getLogger(__name__)

Kind = Literal["partial", "repaint"]
PAIRS = "pairs.parquet"

_VERSION = 1  # raise it when the same settings make other videos


@dataclass(frozen=True)
class MatchedLosers:
    """
    How rejected videos are made of a chosen one.

    Args:
        kind (`str`, defaults to `"partial"`): `"partial"`: the whole video is noised in part. `"repaint"`: a region.
        eta (`Sequence[float]`, defaults to `(0.65, 0.8)`): Noise level at which denoising begins, drawn uniformly
            for each video, in (0, 1): proportion of noise (rectified flow), or of the timesteps.
        seeds (`Sequence[int]`, defaults to `(0,)`): One rejected video of each chosen one for each of them.
        round_trip (`bool`, defaults to `True`): Write the chosen video as the VAE decodes it too, so that the traces
            of VAE and file do not tell chosen from rejected. Off: the row names the file as it was given.
        num_frames (`int`, *optional*): Frames that videos are cut to; unset: as they are.
        fps (`float`, *optional*): Frames per second that they are brought to.
        height (`int`, *optional*): Pixels, with `width`.
        width (`int`, *optional*): Pixels.
        num_inference_steps (`int`, *optional*): Steps of a whole sampling, of which a part is done; unset: the
            pipeline's. As at evaluation: losers that are sampled otherwise are told apart by that.
        guidance_scale (`float`, *optional*): The same.
        negative_prompt (`str`, defaults to `""`): For guidance.

    Raises:
        ValueError: If one is out of range.
    """

    kind: Kind = "partial"
    eta: Sequence[float] = (0.65, 0.8)
    seeds: Sequence[int] = (0,)
    round_trip: bool = True
    num_frames: int | None = None
    fps: float | None = None
    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str = ""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"`kind` must be one of {', '.join(map(repr, get_args(Kind)))}, got {self.kind!r}.")
        if len(self.eta) != 2 or not 0 < self.eta[0] <= self.eta[1] < 1:
            raise ValueError(f"`eta` must be two noise levels, 0 < low <= high < 1, got {tuple(self.eta)}.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"`seeds` must be different numbers, at least one, got {list(self.seeds)}.")
        for name in ("num_inference_steps", "guidance_scale"):
            value = self.__dict__[name]
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"`{name}` must be positive, got {value}.")

    def pixels(self) -> dict[str, Any]:
        """Keyword arguments of `read_video`."""
        return {name: self.__dict__[name] for name in ("num_frames", "fps", "height", "width")}


def matched_losers(
    dataset: MapDataset,
    pipeline: DiffusionPipeline,
    output_dir: str | os.PathLike[str],
    how: MatchedLosers,
    *,
    weights: str = "",
) -> Path:
    """
    Make rejected videos of the chosen video of every row. A run that was stopped makes no video twice.

    Args:
        dataset (`MapDataset`): Raw rows with `prompt` and `chosen`, or `video`.
        pipeline (`DiffusionPipeline`): The frozen model, on its device.
        output_dir (`str` or `Path`): Where videos and the table go.
        how ([`MatchedLosers`]): How.
        weights (`str`, defaults to `""`): What tells the pipeline's weights from others; part of the files' names.

    Returns:
        `Path`: A table, `pairs.parquet`: `prompt`, `chosen`, `rejected` (one video a seed), with `"repaint"`
        `loss_weights` (latent frames, rows, columns), and `provenance` (JSON). A row whose video cannot be read, or is
        too short, is left out with a warning.

    Raises:
        ValueError: If rows have no chosen video or none that can be read, the pipeline has several transformers, or a
            video has a size or length that its VAE does not take.
    """
    columns = column_names(dataset)
    column = next((name for name in ("chosen", "video") if name in columns), None)
    if column is None or "prompt" not in columns:
        raise ValueError(f"Expected rows with 'prompt' and 'chosen' (or 'video'), got {columns}. Rename yours.")
    maker = _Maker(pipeline, how)
    rows, root, made = undecoded(dataset), Path(output_dir), []
    for number in tqdm(range(len(rows)), desc="Matched losers"):
        row = rows[number]
        try:
            made.append(maker.row(row["prompt"], row[column], root, weights))
        except VideoDecodeError as error:
            logger.warning("Row %d is left out: %s", number, error)
    if not made:
        raise ValueError(f"None of {len(rows)} chosen videos can be used; the log says why.")
    with atomic_file(root / PAIRS) as partial:
        datasets.Dataset.from_list(made).to_parquet(partial)
    return root / PAIRS


@dataclass
class _Maker:
    """The pipeline with what is asked of it, and the embeddings of the negative prompt."""

    pipeline: DiffusionPipeline
    how: MatchedLosers
    _empty: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.family: ModelFamily = family_of(self.pipeline)
        if self.family.experts(dict(self.pipeline.config)):
            raise ValueError(
                "The pipeline has a transformer for high noise and one for low noise; matched losers are made by one. "
                "Use a pipeline with a single transformer, such as Wan2.1."
            )
        takes = inspect.signature(self.pipeline.__call__).parameters
        self.steps: int = self.how.num_inference_steps or takes["num_inference_steps"].default
        if self.family.guidance is not None:  # the transformer is told, and makes one forward a step
            self.family = self.family.with_guidance(self.how.guidance_scale or self.family.guidance)
            self.guidance = 1.0
        elif "guidance_scale" in takes:
            self.guidance = self.how.guidance_scale or takes["guidance_scale"].default
        else:
            self.guidance = self.how.guidance_scale or self.pipeline.components["guider"].guidance_scale
        length = self.family.prompt_length(self.pipeline.transformer) or self.family.published_prompt_tokens
        self.length = min(length, self.pipeline.tokenizer.model_max_length)

    def row(self, prompt: str, source: Any, root: Path, weights: str) -> dict[str, Any]:
        """The row of one chosen video, its files written."""
        identity = self.identity(prompt, source, weights)
        names = [f"videos/{identity}-{seed}.mp4" for seed in self.how.seeds]
        rate = self.how.fps or probe_video(source).fps
        video = read_video(source, **self.how.pixels())  # (T, H, W, 3)
        self.family.check_video(self.pipeline.vae, video.shape[:3])
        device = self.pipeline.transformer.device
        pixels = torch.from_numpy(video).to(device).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        latents = self.family.encode_video(self.pipeline.vae, pixels).to(device)  # (1, C, F, H, W)
        generator = torch.Generator().manual_seed(int(fingerprint(identity, "mask")[:15], 16))
        frames, height, width = latents.shape[-3:]
        mask = moving_region((frames, height, width), generator) if self.how.kind == "repaint" else None
        if mask is not None:
            mask[: self.family.given_frames] = False
        etas = {}
        for seed, name in zip(self.how.seeds, names, strict=True):
            generator = torch.Generator().manual_seed(int(fingerprint(identity, seed)[:15], 16))
            low, high = self.how.eta
            etas[name] = low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()
            if not (root / name).is_file():
                conditions = self._conditions(prompt, video, rate)
                noise = torch.randn(latents.shape, generator=generator).to(device)
                write_video(
                    root / name, self._decoded(self._denoise(latents, noise, conditions, etas[name], mask)), rate
                )
        chosen = f"videos/{identity}-chosen.mp4"
        if self.how.round_trip:
            if not (root / chosen).is_file():
                write_video(root / chosen, self._decoded(latents), rate)
        else:
            chosen = _path_of(source)
        masked = {} if mask is None else {"loss_weights": mask.float().tolist()}
        provenance = json.dumps({"kind": self.how.kind, "eta": etas, "round_trip": self.how.round_trip})
        return {"prompt": prompt, "chosen": chosen, "rejected": names, **masked, "provenance": provenance}

    def identity(self, prompt: str, source: Any, weights: str) -> str:
        """What the names of a row's files begin with: another one for all that makes other videos."""
        guidance = self.guidance if self.family.guidance is None else self.family.guidance
        settings = [_VERSION, weights, self.how.kind, list(self.how.eta), self.how.pixels(), self.steps, guidance]
        return fingerprint(settings, self.how.negative_prompt, prompt, video_hash(source))

    @torch.no_grad()
    def _denoise(
        self, latents: Tensor, noise: Tensor, conditions: dict[str, Tensor], eta: float, mask: Tensor | None
    ) -> Tensor:
        """Latents with noise of level `eta`, denoised; where there is a mask `(F, H, W)`, only inside of it."""
        process, transformer = self.family.noise_process, self.pipeline.transformer
        inside = (
            torch.ones_like(latents, dtype=torch.bool) if mask is None else mask.to(latents.device).expand_as(latents)
        )
        inside = inside.clone()
        inside[:, :, : self.family.given_frames] = False
        timesteps = self._timesteps(eta, latents.shape).to(latents.device)
        noisy = process.add_noise(latents, noise, timesteps[:1])
        for number, now in enumerate(timesteps):
            velocity = self.family.predict(transformer, noisy, now[None], conditions).float()
            if self.guidance > 1:
                unconditional = self.family.predict(
                    transformer, noisy, now[None], conditions | self._negative()
                ).float()
                velocity = unconditional + self.guidance * (velocity - unconditional)
            clean, direction = process.separate(noisy, velocity, now[None])
            if number + 1 == len(timesteps):
                return torch.where(inside, clean, latents)
            after = timesteps[number + 1 : number + 2]
            kept = process.add_noise(latents, noise, after)  # what is outside stays what it was, with its noise
            noisy = torch.where(inside, process.add_noise(clean, direction, after), kept)
        raise AssertionError("there is at least one timestep")

    def _timesteps(self, eta: float, shape: Sequence[int]) -> Tensor:
        """Of the part of a whole sampling that begins at noise level `eta`, descending."""
        tokens = math.prod(self.family.token_grid(self.pipeline.transformer, shape))
        shift = self.family.flow_shift(self.pipeline.scheduler.config, tokens) or 1.0
        first = eta / (shift - (shift - 1) * eta)  # what the shift makes `eta` of
        count = max(1, round(self.steps * first))
        levels = torch.linspace(first, first / count, count, dtype=torch.float64)
        return self.family.noise_process.sample_timesteps(levels, scheme="shifted", shift=shift)

    def _conditions(self, prompt: str, video: np.ndarray, rate: float) -> dict[str, Tensor]:
        device = self.pipeline.transformer.device
        first = PIL.Image.fromarray(video[0])
        conditions = self._prompt(prompt, first)
        conditions |= self.family.encode_image(self.pipeline, [first], len(video))
        if FRAME_RATE in self.family.condition_columns:
            conditions[FRAME_RATE] = torch.tensor([rate], dtype=torch.float32)
        return {name: value.to(device) for name, value in conditions.items()}

    def _prompt(self, prompt: str, image: PIL.Image.Image) -> dict[str, Tensor]:
        encoded = self.family.encode_prompt_with_image(self.pipeline, [prompt], [image], self.length)
        return self.family.pad_prompts(encoded, self.length)

    def _negative(self) -> dict[str, Tensor]:
        if not self._empty:
            device = self.pipeline.transformer.device
            black = PIL.Image.new("RGB", (64, 64))  # which pipelines show a text encoder beside the negative prompt
            self._empty = {
                name: value.to(device) for name, value in self._prompt(self.how.negative_prompt, black).items()
            }
        return self._empty

    def _decoded(self, latents: Tensor) -> np.ndarray:
        """uint8 `(T, H, W, 3)`."""
        video = self.family.decode_latents(self.pipeline.vae, latents)[0].permute(1, 2, 3, 0)
        return ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()


def _path_of(source: Any) -> str:
    path = source.get("path") if isinstance(source, Mapping) else source
    if not isinstance(path, str | os.PathLike) or not os.path.isfile(path):
        raise ValueError(
            "`round_trip=False` names the chosen videos' own files in the table, and a row has none: its video is "
            "held in memory, or in the dataset. Leave `round_trip` on."
        )
    return os.path.abspath(path)


def moving_region(shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """
    A region of random smooth outline that moves through the frames along a line.

    Args:
        shape (`tuple[int, int, int]`): Frames, rows and columns.
        generator (`torch.Generator`): What it is drawn from.

    Returns:
        `torch.Tensor` of that shape: bool, true inside; at least one place of every frame is.
    """
    frames, height, width = shape
    start, end = 0.2 + 0.6 * torch.rand(2, 2, generator=generator)  # (row, column), proportions of the picture
    centres = start + torch.linspace(0, 1, frames)[:, None] * (end - start)  # (F, 2)
    short = min(height, width)
    down = ((torch.arange(height) + 0.5) / height - centres[:, :1])[:, :, None] * (height / short)  # (F, H, 1)
    right = ((torch.arange(width) + 0.5) / width - centres[:, 1:])[:, None, :] * (width / short)  # (F, 1, W)
    distance, angle = torch.hypot(down, right), torch.atan2(down.expand(shape), right.expand(shape))
    size = 0.15 + 0.2 * torch.rand((), generator=generator)
    waves = torch.tensor([2.0, 3.0, 4.0])
    heights, phases = (
        0.3 * torch.rand(3, generator=generator) / waves,
        2 * math.pi * torch.rand(3, generator=generator),
    )
    outline = size * (1 + (heights * torch.cos(waves * angle[..., None] + phases)).sum(dim=-1))
    return (distance <= outline) | (distance == distance.amin(dim=(1, 2), keepdim=True))
