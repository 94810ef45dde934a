"""Generate the videos of an evaluation run from prompts and seeds, with any diffusers video pipeline."""

import inspect
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from ...data.video_io import write_video
from ...files import announce, fingerprint, remove_leftovers
from ...hub.attach import find_adapter, load_adapter
from ...hub.published import Alpha
from ...judges import VideoJudge
from ...load import SANDBOX, generation_defaults, load_pipeline, pipeline_source
from ...models import rules_of, supported_pipelines
from ...models.mixed_precision import inputs_cast_for_vae
from .prompts import EvaluationPrompt
from .run import VIDEO_FOLDER, Case, EvaluationRun, cases_of, claimed, create_run, shard
from .score import open_scores, require_scores, write_scores


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class VideoGenerator:
    """
    A pipeline together with what has to be known to get the same videos again.

    Attributes:
        pipeline (`DiffusionPipeline`): Text-to-video or image-to-video pipeline on its device, adapter loaded.
        model (`str`): Repository id or path, or any name for a pipeline that was made in memory.
        fps (`float`): Frames per second that the model generates at (Wan 16, CogVideoX 8).
        call_kwargs (`dict`): Arguments of the pipeline's call beside the prompt: size, frames, steps, guidance.
        revision (`str`, *optional*): Commit or hash of the weights; by default the weights in memory are hashed.
        adapter (`str`, *optional*): Where the adapter came from.
        adapter_hash (`str`, *optional*): Hash of its file.
        adapter_alpha (`float` or `"rank"`, *optional*): Alpha that was given beside a file that does not say it.
        adapter_scale (`float`, *optional*, defaults to `1.0`): Factor of what the adapter adds to each output.
    """

    pipeline: DiffusionPipeline
    model: str
    fps: float
    call_kwargs: Mapping[str, Any] = field(default_factory=dict)
    revision: str | None = None
    adapter: str | None = None
    adapter_hash: str | None = None
    adapter_alpha: Alpha | None = None
    adapter_scale: float = 1.0

    def describe(self) -> dict[str, Any]:
        """What determines the videos beside prompts and seeds; goes into JSON."""
        revision = self.revision or _weights_hash(self.pipeline)
        given = {"adapter_alpha": (self.adapter_alpha, None), "adapter_scale": (self.adapter_scale, 1)}
        return {
            "pipeline": type(self.pipeline).__name__,
            "revision": revision,
            "adapter_hash": self.adapter_hash,
            "dtype": str(self.pipeline.dtype).removeprefix("torch."),
            "fps": self.fps,
            "call_kwargs": dict(self.call_kwargs),
            # Only where they do something: runs that were begun without them are finished as they are.
            **{name: value for name, (value, neutral) in given.items() if value != neutral},
        }


def load_generator(
    model: str = SANDBOX,
    *,
    adapter: str | None = None,
    adapter_alpha: Alpha | None = None,
    adapter_scale: float = 1.0,
    revision: str | None = None,
    fps: float | None = None,
    call_kwargs: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    device: str | None = None,
) -> VideoGenerator:
    """
    Loads a pipeline, with or without a LoRA adapter.

    Args:
        model (`str`, *optional*, defaults to `"sandbox"`): Repository id or path of a pipeline in diffusers layout.
        adapter (`str`, *optional*): Repository id or folder with `pytorch_lora_weights.safetensors`, or a file in any
            layout that [`~video_trl.hub.read_adapter`] knows.
        adapter_alpha (`float` or `"rank"`, *optional*): What the adapter was trained with, for files that do not say
            it.
        adapter_scale (`float`, *optional*, defaults to `1.0`): Factor of what the adapter adds to each output.
        revision (`str`, *optional*): Branch, tag or commit of the model's repository.
        fps (`float`, *optional*): Frames per second that the model generates at. Needed only for pipelines of none of
            the families in `video_trl.models`. Pipelines that take a `frame_rate` are told.
        call_kwargs (`dict`, *optional*): Arguments of the pipeline's call, over the sandbox's own for the sandbox.
        dtype (`str`, *optional*): `"float32"`, `"bfloat16"` or `"float16"` for all but the VAE, which is float32.
            By default bfloat16 on an accelerator and float32 on the CPU.
        device (`str`, *optional*): By default the accelerator of this process (`LOCAL_RANK`), else the CPU.

    Returns:
        [`VideoGenerator`]

    Raises:
        ValueError: If the model or adapter is not there, the adapter does not fit or its alpha is not known, or the
            frame rate is not known.
    """
    place = torch.device(device) if device else _default_device()
    adapter_file = find_adapter(adapter, adapter_alpha, adapter_scale)  # before gigabytes are loaded
    default_fps, default_call = generation_defaults(model)
    if model == SANDBOX:
        if revision or dtype not in (None, "float32"):
            raise ValueError("The sandbox has one revision and one dtype (float32): leave `revision` and `dtype` out.")
        pipeline, folder = load_pipeline(model), Path(pipeline_source(model))
    else:
        folder = _pipeline_folder(model, revision)
        kind = DiffusionPipeline.load_config(folder)["_class_name"]
        if fps is None and kind not in supported_pipelines():
            raise ValueError(f"`fps` is needed for {model!r}, a {kind}: the rate it generates at.")
        weights_dtype = _torch_dtype(dtype or ("float32" if place.type == "cpu" else "bfloat16"))
        pipeline = load_pipeline(
            str(folder), dtype={"vae": torch.float32, "default": weights_dtype}, local_files_only=True
        )
    pipeline.set_progress_bar_config(disable=True)
    if adapter_file is not None:
        load_adapter(pipeline, adapter_file, model, alpha=adapter_alpha, scale=adapter_scale)
    fps, wanted_call = wanted_by_family(pipeline, fps or default_fps)
    return VideoGenerator(
        pipeline=pipeline.to(place),
        model=model,
        fps=fps,
        call_kwargs={**wanted_call, **default_call, **(call_kwargs or {})},
        revision=folder.name if folder.parent.name == "snapshots" else fingerprint(folder),
        adapter=adapter,
        adapter_hash=None if adapter_file is None else fingerprint(adapter_file),
        adapter_alpha=adapter_alpha,
        adapter_scale=adapter_scale,
    )


def wanted_by_family(pipeline: DiffusionPipeline, fps: float | None) -> tuple[float, dict[str, Any]]:
    """
    Frames per second of a pipeline's videos, its family's if not given, and what its call must be told beside a size.

    Raises:
        ValueError: If the rate is not given, and the pipeline is of no family in `video_trl.models`.
    """
    rules = rules_of(pipeline)
    fps = fps or (None if rules is None else rules.fps)
    if fps is None:
        raise ValueError(f"`fps` is needed for a {type(pipeline).__name__}: the rate it generates at.")
    takes = inspect.signature(pipeline.__call__).parameters
    call: dict[str, Any] = {"frame_rate": fps} if "frame_rate" in takes else {}
    if rules is not None and rules.guidance_scale is not None:
        call["guidance_scale"] = rules.guidance_scale
    return fps, call


def generate_run(
    run_dir: str | os.PathLike[str],
    generator: VideoGenerator,
    prompts: Sequence[EvaluationPrompt | str],
    *,
    seeds: Sequence[int] = (0,),
    name: str = "model",
    training_seed: int | None = None,
    benchmark: str = "custom",
    batch_size: int = 1,
    judge: VideoJudge | None = None,
    rank: int | None = None,
    num_ranks: int | None = None,
) -> EvaluationRun:
    """
    Generates the videos of a run that are not there yet. Under `torchrun` or `accelerate launch` each process takes
    its part; it returns when its own videos are there.

    A video depends on its prompt and seed (the noise comes from a CPU generator of its own) and, up to the order of
    floating-point sums, not on batch size or number of processes.

    Args:
        run_dir (path): Directory of the run, new or begun with the same arguments.
        generator ([`VideoGenerator`]): The model.
        prompts (list of [`EvaluationPrompt`] or `str`), seeds (list of `int`): One video of each prompt for each seed.
        name (`str`), training_seed (`int`), benchmark (`str`): As in [`EvaluationRun`].
        batch_size (`int`, *optional*, defaults to `1`): Videos generated together; those with an image, and of
            pipelines that fail for several, go singly.
        judge ([`~video_trl.judges.VideoJudge`], *optional*): Scores the frames of each video as the pipeline makes
            them. Without one, [`score_run`] scores the files, whose compression moves exact scores a little.
        rank (`int`, *optional*), num_ranks (`int`, *optional*): Part of this process, by default as launched.

    Returns:
        [`EvaluationRun`]

    Raises:
        ValueError: If the directory holds another run or another process works there, first frames are missing or not
            taken, the pipeline gives values that are not finite, or the judge leaves a video without a score.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    rules = rules_of(generator.pipeline)
    batch_size = 1 if rules is not None and rules.one_video_a_call else batch_size
    run = create_run(
        run_dir,
        name=name,
        prompts=prompts,
        seeds=seeds,
        source=_images(generator.pipeline, prompts) | generator.describe(),
        provenance={"model": generator.model, "adapter": generator.adapter},
        training_seed=training_seed,
        benchmark=benchmark,
    )
    default_rank, default_ranks = shard()
    if default_ranks > 1:
        announce(run.folder.resolve(), default_rank)
    cases = cases_of(run, default_rank if rank is None else rank, default_ranks if num_ranks is None else num_ranks)
    folder = run.folder / VIDEO_FOLDER
    scores = None if judge is None else open_scores(run, judge, of_frames=True)
    failures: list[str] = []
    with claimed(folder / ".lock", [position for position, _ in cases]):
        remove_leftovers(folder)
        # The frames are gone when a run was stopped between a video and its score: such a video is made again.
        todo = [
            case
            for _, case in cases
            if not run.video(case).is_file() or (scores is not None and not (scores / f"{case.key}.json").is_file())
        ]
        done = len(cases) - len(todo)
        with tqdm(total=len(cases), initial=done, desc=f"Generating {name}", unit="video") as progress:
            for batch in _batches(todo, batch_size):
                videos = _generate(generator, batch)
                for case, video in zip(batch, videos, strict=True):
                    write_video(run.video(case), video, generator.fps)
                if judge is not None and scores is not None:
                    failures += write_scores(run, judge, batch, list(videos), scores)
                progress.update(len(batch))
    if judge is not None:
        require_scores(judge, failures, len(cases))
    return run


@torch.no_grad()
def _generate(generator: VideoGenerator, cases: Sequence[Case]) -> np.ndarray:
    """Videos of the cases, uint8 `(N, T, H, W, 3)`."""
    texts = [case.prompt.generation_text or case.prompt.text for case in cases]
    noise = [torch.Generator("cpu").manual_seed(case.noise_seed) for case in cases]
    kwargs = dict(generator.call_kwargs)
    if cases[0].prompt.image is not None:
        with Image.open(cases[0].prompt.image) as image:
            kwargs["image"] = image.convert("RGB")
    with inputs_cast_for_vae(generator.pipeline):
        frames = np.asarray(generator.pipeline(prompt=texts, generator=noise, output_type="np", **kwargs).frames)
    for case, video in zip(cases, frames, strict=True):
        if not np.isfinite(video).all():
            raise ValueError(
                f"The pipeline gave values that are not finite for {case.prompt.text!r} with seed {case.seed}. Check "
                "the adapter, and the dtype: float16 overflows in many video models."
            )
    return np.rint(frames.clip(0, 1) * 255).astype(np.uint8)


def _check_images(pipeline: DiffusionPipeline, prompts: Sequence[EvaluationPrompt | str]) -> None:
    """Raise a `ValueError` where a pipeline would miss a first frame, or not know what to do with one."""
    kind, takes = type(pipeline).__name__, inspect.signature(pipeline.__call__).parameters.values()
    images = sum(isinstance(prompt, EvaluationPrompt) and prompt.image is not None for prompt in prompts)
    if images and not any(each.name == "image" or each.kind is each.VAR_KEYWORD for each in takes):
        raise ValueError(
            f"{kind} makes videos of text alone, and {images} of {len(prompts)} prompts have an `image`. Use an "
            "image-to-video model, or leave the images out."
        )
    if images < len(prompts) and "ImageToVideo" in kind:
        raise ValueError(
            f"{kind} makes videos of first frames, and {len(prompts) - images} of {len(prompts)} prompts have none. "
            "Name one for each, in the column `image` of the file of prompts."
        )


def _images(pipeline: DiffusionPipeline, prompts: Sequence[EvaluationPrompt | str]) -> dict[str, str]:
    """What the first frames are, where prompts have them and the pipeline takes them: paths alone would not tell."""
    _check_images(pipeline, prompts)
    paths = [prompt.image for prompt in prompts if isinstance(prompt, EvaluationPrompt) and prompt.image is not None]
    try:
        return {"images_hash": fingerprint(*map(Path, paths))} if paths else {}
    except OSError as error:
        raise ValueError(f"The image of a prompt cannot be read: {error}.") from error


def _batches(cases: Sequence[Case], size: int) -> Iterator[list[Case]]:
    """Consecutive cases; one with an image stands alone, since pipelines take one image a call."""
    batch: list[Case] = []
    for case in cases:
        if case.prompt.image is not None:
            yield [case]
            continue
        batch.append(case)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _weights_hash(pipeline: DiffusionPipeline) -> str:
    """Hash of the weights of all networks of a pipeline, adapters included, and of the scheduler's settings."""
    # Private entries are no settings, and diffusers lists them in an order that changes from process to process.
    settings = {key: value for key, value in pipeline.scheduler.config.items() if not key.startswith("_")}
    modules = {name: part for name, part in sorted(pipeline.components.items()) if isinstance(part, nn.Module)}
    return fingerprint(settings, *(piece for entry in modules.items() for piece in entry))


def _pipeline_folder(model: str, revision: str | None) -> Path:
    """Folder of a pipeline: a local one, or the snapshot of a repository, whose name is its commit."""
    if Path(model).is_dir():
        if not (Path(model) / "model_index.json").is_file():
            raise ValueError(f"Expected a pipeline in diffusers layout in {model!r}, found no model_index.json.")
        if revision is not None:
            raise ValueError(f"`revision` names a commit of a repository, but {model!r} is a folder.")
        return Path(model)
    try:
        return Path(DiffusionPipeline.download(model, revision=revision))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise ValueError(
            f"No folder {model!r}, and the repository of that id cannot be loaded ({error}). Check the spelling, the "
            "connection, and `hf auth login` where it is private; or use 'sandbox', which needs no download."
        ) from error


def _torch_dtype(name: str) -> torch.dtype:
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in dtypes:
        raise ValueError(f"`dtype` must be one of {', '.join(dtypes)}; got {name!r}.")
    return dtypes[name]


def _default_device() -> torch.device:
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    return torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", 0)))
