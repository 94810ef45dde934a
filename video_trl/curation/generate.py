"""
Stage 4: generate videos with any diffusers pipeline, from prompts or first frames, with several models and seeds.

A job is one video. Its name is a hash of everything that decides its pixels, and its file gets that name only when it
is complete. So a resumed run generates no video twice.
"""

import inspect
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from diffusers import AutoModel, DiffusionPipeline
from PIL import Image

from ..data.buckets import AspectBucket
from ..files import remove_leftovers
from ..load import SANDBOX, generation_defaults, load_pipeline
from ..models import GenerationRules, generation_rules
from ..models.mixed_precision import inputs_cast_for_vae
from .clips.normalise import normalise_video
from .engine.manifest import Batch, Shard, Stage, digest, new_manifest, run_stage


GENERATE_VERSION = 3  # raise it when the same job makes another file

#: Columns of a table of jobs.
JOB: dict[str, pa.DataType] = {
    "source_id": pa.string(),  # the clip that the job belongs to, and its number
    "content": pa.string(),
    "prompt": pa.string(),
    "reference_image": pa.string(),
    "bucket": pa.string(),
    "model": pa.string(),
    "revision": pa.string(),
    "seed": pa.int64(),
    "job": pa.string(),
}
#: Columns that generation adds: the file, relative to the run's folder, and how it was made.
GENERATED: dict[str, pa.DataType] = {"rejected": pa.string(), "generation": pa.string()}


@dataclass(frozen=True)
class VideoModel:
    """
    A model that makes videos.

    Args:
        name (`str`): Repository id or path of a diffusers pipeline, or "sandbox".
        revision (`str`, *optional*): Branch, tag or commit of the repository.
        fps (`float`, *optional*): Rate at which its frames are meant to be seen. Needed only for pipelines of none
            of the families in `video_trl.models`, which know it: 16 of Wan 2.1, 8 of CogVideoX, 24 of Wan 2.2's 5B.
        dtype (`str`, defaults to `"bfloat16"`): Attribute of `torch` that the weights are loaded in, except those of
            the VAE, whose rounding would be seen in the generated videos alone: they are float32.
        call_kwargs (`dict`, *optional*): Arguments of the pipeline's call: `num_frames`, `num_inference_steps`,
            `guidance_scale`, ... Without `height` and `width` it is asked for the size of the real clip.
        batch_size (`int`, defaults to `1`): Videos made in one call. Other sizes or processors change the last bits.
    """

    name: str
    revision: str | None = None
    fps: float | None = None
    dtype: str = "bfloat16"
    call_kwargs: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 1

    def __post_init__(self) -> None:
        if not isinstance(vars(torch).get(self.dtype), torch.dtype):
            raise ValueError(f"{self.name}: expected a dtype of torch such as 'bfloat16', got {self.dtype!r}.")
        if self.batch_size < 1 or (self.fps is not None and self.fps <= 0):
            raise ValueError(
                f"{self.name}: `batch_size` and `fps` must be positive, got {self.batch_size} and {self.fps}."
            )
        ours = {"prompt", "image", "generator", "output_type", "return_dict"} & set(self.call_kwargs)
        if ours:
            raise ValueError(f"{self.name}: {sorted(ours)} in `call_kwargs` are set for every video; leave them out.")

    @property
    def slug(self) -> str:
        """The name as a folder: readable, and another one for every model."""
        readable = "".join(letter if letter.isalnum() or letter in ".-" else "-" for letter in self.name)[-60:]
        return f"{readable.strip('-.')}-{digest(f'{self.name}@{self.revision}', 6)}"

    def settings(self) -> dict[str, Any]:
        """What decides its videos, as JSON values."""
        return {"model": self.name, "revision": self.revision, "dtype": self.dtype, "fps": self.fps} | {
            "call_kwargs": dict(self.call_kwargs)
        }


def check_model(model: VideoModel, num_frames: int, fps: float, sizes: Sequence[AspectBucket] = ()) -> None:
    """
    Finds what would stop a run at its fourth stage: a model that is not there, whose clips would be too short for
    pairs of `num_frames` at `fps`, whose frame rate is not known, or that does not make videos of `sizes`. Reads no
    weights.

    Raises:
        ValueError: One of these.
    """
    if model.name == SANDBOX:
        made_fps, call = generation_defaults(SANDBOX)
        assert made_fps is not None
        check_length(SANDBOX, model.call_kwargs.get("num_frames", call["num_frames"]), made_fps, num_frames, fps)
        return
    rules = _rules_of(model)
    if rules is not None and rules.lost_frames:
        raise ValueError(
            f"{model.name}: its pipeline throws the first {rules.lost_frames} frames of what it makes away, so videos "
            "do not begin with the frame that they are given, as the real clips do. Use another model."
        )
    made_fps = model.fps or (None if rules is None else rules.fps)
    if made_fps is None:
        raise ValueError(
            f"{model.name}: the frame rate of its videos is not known here; losers at another one than the model's "
            "would be slow or fast motion. Set `fps` in its options, as its model card has it."
        )
    if "num_frames" in model.call_kwargs:
        check_length(model.name, model.call_kwargs["num_frames"], made_fps, num_frames, fps)
    multiple = 1 if rules is None or {"height", "width"} <= set(model.call_kwargs) else rules.side_multiple
    unsuitable = [str(size) for size in sizes if size.height % multiple or size.width % multiple]
    if unsuitable:
        raise ValueError(
            f"{model.name} makes videos whose sides are multiples of {multiple}, and the clips are to be {unsuitable} "
            "(height x width). Let clips have such sides (`side_multiple` of GT-Pair, `height` and `width` of "
            "PhyAugPipe), or give the model a size of its own in `call_kwargs`: its videos are then scaled."
        )


def _rules_of(model: VideoModel) -> GenerationRules | None:
    """How to call the model's pipeline, from its small JSON files; `None` for one of no family."""
    try:
        index = DiffusionPipeline.load_config(model.name, revision=model.revision)
        if generation_rules(index, {}) is None:
            return None
        part = "transformer" if index["transformer"][0] is not None else "transformer_2"
        config = AutoModel.load_config(model.name, revision=model.revision, subfolder=part)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{model.name}: expected a pipeline in diffusers layout, on the Hub or in a folder, which cannot be "
            f"loaded ({error}). Check the spelling, the revision, and for the Hub the connection and `hf auth login`."
        ) from error
    return generation_rules(index, config)


def check_length(name: str, made_frames: int, made_fps: float, num_frames: int, fps: float) -> None:
    """Raises a ValueError for a model whose videos end before the last frame of a pair."""
    seconds, needed_seconds = made_frames / made_fps, (num_frames - 1) / fps
    if seconds < needed_seconds - 1e-6:
        raise ValueError(
            f"{name} makes {made_frames} frames at {made_fps:g} fps, {seconds:.2f} s; pairs of {num_frames} frames at "
            f"{fps:g} fps need {needed_seconds:.2f} s. Ask it for more frames in `call_kwargs`, set the model's "
            "frame rate as `fps`, or curate shorter clips (`num_frames`, `fps`)."
        )


def job_table(clips: Batch, model: VideoModel, seeds: Sequence[int], settings: Mapping[str, Any]) -> pa.Table:
    """
    One job for every clip and seed, in that order.

    Args:
        clips (`dict`): Columns `source_id`, `content`, `prompt`, `reference_image`, `bucket`.
        model ([`VideoModel`]): What makes them.
        seeds (`list[int]`): For each of them every clip gets a noise of its own, recorded in `seed`.
        settings (`dict`): What else decides the files (clock and length), as JSON values.
    """
    columns: Batch = {name: [] for name in JOB}
    description = json.dumps({**model.settings(), **settings, "version": GENERATE_VERSION}, sort_keys=True)
    names = ("source_id", "content", "prompt", "reference_image", "bucket")
    for row in zip(*(clips[name] for name in names), strict=True):
        for seed in seeds:
            clip = dict(zip(names, row, strict=True))
            noise = int(digest(f"{seed}\0{clip['content']}", 8), 16) % 2**31
            job = digest("\0".join([description, clip["content"], clip["prompt"], clip["bucket"], str(noise)]))
            clip |= {"model": model.name, "revision": model.revision, "seed": noise, "job": job}
            clip["source_id"] = f"{clip['source_id']} x {model.name} x {seed}"
            for name, values in columns.items():
                values.append(clip[name])
    return new_manifest(columns, JOB)


def run_jobs(
    jobs: pa.Table,
    model: VideoModel,
    root: str | os.PathLike[str],
    *,
    fps: float,
    num_frames: int,
    shard: Shard | None = None,
) -> pa.Table:
    """
    Generates the videos of the jobs of this process, in the format of the real clips.

    The model is loaded with the first job that has no file yet, so a finished stage loads nothing.

    Args:
        jobs (`pyarrow.Table`): Of one model, from [`job_table`].
        model ([`VideoModel`]): The model.
        root (`str` or `Path`): The run's folder; stores lie in `stages`, videos in `generated`.
        fps, num_frames: Clock and length of the files.
        shard ([`Shard`], *optional*): Part of this process.

    Returns:
        `pyarrow.Table`: The jobs with the columns `GENERATED`.

    Raises:
        ValueError: The model cannot be loaded, wants a reference image that is not there, or makes videos that are too
            short.
    """
    stage = generation_stage(model, root, fps=fps, num_frames=num_frames)
    remove_leftovers(Path(root) / "generated" / model.slug)
    return run_stage(jobs, stage, Path(root) / "stages", shard)


def generation_stage(model: VideoModel, root: str | os.PathLike[str], *, fps: float, num_frames: int) -> Stage:
    """What [`run_jobs`] runs, for other engines."""
    return Stage(
        name="generate",
        function=BatchGenerator(model, root, fps=fps, num_frames=num_frames),
        adds=GENERATED,
        key="job",
        settings={**model.settings(), "fps": fps, "num_frames": num_frames, "version": GENERATE_VERSION},
        batch_size=model.batch_size,
    )


class BatchGenerator:
    """A batch function with a model behind it, which is loaded when it is first needed. See [`run_jobs`]."""

    def __init__(self, model: VideoModel, root: str | os.PathLike[str], *, fps: float, num_frames: int) -> None:
        self.model, self.root, self.fps, self.num_frames = model, Path(root), fps, num_frames
        self.pipeline: DiffusionPipeline | None = None
        self.call_kwargs, self.model_fps, self.one_video_a_call = dict(model.call_kwargs), model.fps, False

    def __call__(self, batch: Batch) -> Batch:
        files = [Path("generated") / self.model.slug / f"{job}.mp4" for job in batch["job"]]
        finite = [True] * len(files)
        # A batch of videos has one size.
        for size in sorted(set(batch["bucket"])):
            rows = [
                row
                for row, file in enumerate(files)
                if batch["bucket"][row] == size and not (self.root / file).is_file()
            ]
            if rows:
                videos = self._make({name: [values[row] for row in rows] for name, values in batch.items()})
                for row, video in zip(rows, videos, strict=True):
                    finite[row] = bool(np.isfinite(video).all())
                    if finite[row]:
                        self._write(video, self.root / files[row], AspectBucket.parse(size))
        record = json.dumps(self.model.settings(), sort_keys=True)
        words = "the model returned values that are not finite"
        return {
            "rejected": [file.as_posix() if good else None for file, good in zip(files, finite, strict=True)],
            "generation": [record] * len(files),
            "dropped_by": [None if good else "not_finite" for good in finite],
            "detail": [None if good else words for good in finite],
        }

    def _make(self, batch: Batch) -> np.ndarray:
        """Videos `(N, T, H, W, 3)` in [0, 1] of N rows of one size."""
        pipeline = self._load()
        if self.one_video_a_call and len(batch["prompt"]) > 1:
            rows = range(len(batch["prompt"]))
            return np.concatenate([self._make({name: [batch[name][row]] for name in batch}) for row in rows])
        takes = inspect.signature(pipeline.__call__).parameters
        call: dict[str, Any] = {"prompt": batch["prompt"], "output_type": "np", **self.call_kwargs}
        size = AspectBucket.parse(batch["bucket"][0])
        for name, value in (("height", size.height), ("width", size.width), ("frame_rate", self.model_fps)):
            if name in takes:
                call.setdefault(name, value)
        if "image" in takes:
            call["image"] = [self._reference(path) for path in batch["reference_image"]]
        # The noise of each video comes from its own generator on the CPU: the same on every device and in every batch.
        call["generator"] = [torch.Generator("cpu").manual_seed(seed) for seed in batch["seed"]]
        if len(batch["prompt"]) == 1:  # image-to-video pipelines want one picture, not a list of one
            call |= {name: call[name][0] for name in ("prompt", "image", "generator") if name in call}
        with torch.no_grad(), inputs_cast_for_vae(pipeline):
            frames = np.asarray(pipeline(**call).frames, dtype=np.float32)
        asked, made = (call.get("height", size.height), call.get("width", size.width)), frames.shape[2:4]
        if made != asked:  # scaling would blur the generated videos alone: a difference that training would learn
            raise ValueError(
                f"{self.model.name} was asked for videos of {asked[0]}x{asked[1]} (height x width) and made "
                f"{made[0]}x{made[1]}. Curate clips of a size that it makes."
            )
        return frames

    def _reference(self, path: str | None) -> Image.Image:
        if path is None:
            raise ValueError(
                f"{self.model.name} makes videos from a first frame, and a row has no `reference_image`. Use a "
                "text-to-video model, or normalise the clips first."
            )
        with Image.open(self.root / path) as image:
            return image.convert("RGB")

    def _write(self, video: np.ndarray, path: Path, size: AspectBucket) -> None:
        assert self.model_fps is not None, "known once the model is loaded"
        check_length(self.model.name, len(video), self.model_fps, self.num_frames, self.fps)
        frames = np.rint(video.clip(0, 1) * 255).astype(np.uint8)
        normalise_video(
            frames,
            path,
            height=size.height,
            width=size.width,
            fps=self.fps,
            num_frames=self.num_frames,
            source_fps=self.model_fps,
        )

    def _load(self) -> DiffusionPipeline:
        if self.pipeline is not None:
            return self.pipeline
        name = self.model.name
        fps, call = generation_defaults(name)
        if name != SANDBOX:
            check_model(self.model, self.num_frames, self.fps)
            rules = _rules_of(self.model)
            if rules is not None:
                fps, self.one_video_a_call = rules.fps, rules.one_video_a_call
                call |= {} if rules.guidance_scale is None else {"guidance_scale": rules.guidance_scale}
        self.model_fps, self.call_kwargs = self.model.fps or fps, {**call, **self.call_kwargs}
        # The sandbox's pipeline has one revision and one dtype.
        dtypes = {"vae": torch.float32, "default": vars(torch)[self.model.dtype]}
        options = {"revision": self.model.revision, "dtype": dtypes}
        self.pipeline = load_pipeline(name, **({} if name == SANDBOX else options))
        if torch.cuda.is_available():
            self.pipeline.to(torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))))
        self.pipeline.set_progress_bar_config(disable=True)
        return self.pipeline
