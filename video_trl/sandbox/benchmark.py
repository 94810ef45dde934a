"""The sandbox benchmark: held-out sentences -> generated mp4s -> scores of the exact judge."""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from ..data.video_io import write_video
from ..judges import VideoJudge
from .world.prompts import MOTIONS, Split, all_prompts, parse_prompt
from .world.simulate import FPS


JOINT_THRESHOLD = 0.5  # a clip counts as right when both scores reach it, as VideoPhy binarises its scores


@dataclass(frozen=True)
class Record:
    """One generated and judged clip: `sa`, `pc` in [0, 1]; `joint` is 1.0 when both reach 0.5; `video` is its mp4."""

    prompt: str
    category: str
    seed: int
    sa: float
    pc: float
    joint: float
    explanation: str
    video: str


def balanced_prompts(split: Split, number: int, seed: int = 0) -> list[str]:
    """
    `number` different sentences of a split, drawn by `seed`, the motions in turn.

    Raises:
        ValueError: the split has fewer sentences than asked for.
    """
    rng = np.random.default_rng(seed)
    pools = [list(rng.permutation(all_prompts(split, (motion,)))) for motion in MOTIONS]
    available = sum(len(pool) for pool in pools)
    if not 1 <= number <= available:
        raise ValueError(f"Expected between 1 and {available} prompts of the {split!r} split, got {number}.")
    turns = itertools.chain.from_iterable(itertools.zip_longest(*pools))
    return [str(prompt) for prompt in turns if prompt is not None][:number]


@torch.no_grad()
def generate(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    call_kwargs: dict[str, Any],
    *,
    batch_size: int = 16,
    description: str = "Generating",
) -> np.ndarray:
    """
    One video for each (prompt, seed), the same whatever the batch size up to float summation order.

    Returns:
        uint8 `(N, T, H, W, 3)`.
    """
    videos = []
    with tqdm(total=len(prompts), desc=description, unit="video") as progress:
        for start in range(0, len(prompts), batch_size):
            chunk = list(prompts[start : start + batch_size])
            generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[start : start + batch_size]]
            frames = pipeline(chunk, generator=generators, output_type="np", **call_kwargs).frames
            videos.append(np.rint(np.asarray(frames).clip(0, 1) * 255).astype(np.uint8))
            progress.update(len(chunk))
    return np.concatenate(videos)


def evaluate(
    pipeline: DiffusionPipeline,
    judge: VideoJudge,
    prompts: Sequence[str],
    seeds: Sequence[int],
    call_kwargs: dict[str, Any],
    output_dir: str | Path,
    *,
    batch_size: int = 16,
    name: str = "model",
) -> list[Record]:
    """
    Generates and judges every prompt with every seed.

    Args:
        pipeline: text-to-video pipeline, with or without an adapter loaded.
        judge: scores the videos.
        prompts: sentences; seeds: one video of each sentence for each seed.
        call_kwargs: size, steps and guidance, passed to the pipeline.
        output_dir: receives the mp4 files.
        batch_size: videos generated together.
        name: shown by the progress bar.

    Returns:
        Records in the order prompts x seeds, so that two models' records pair up by position.
    """
    cases = list(itertools.product(prompts, seeds))
    videos = generate(
        pipeline,
        [prompt for prompt, _ in cases],
        [_noise_seed(prompt, seed) for prompt, seed in cases],
        call_kwargs,
        batch_size=batch_size,
        description=f"Generating with {name}",
    )
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    scores = judge.score(list(videos), [prompt for prompt, _ in cases])
    records = []
    for index, ((prompt, seed), video, score) in enumerate(zip(cases, videos, scores, strict=True)):
        path = write_video(folder / f"{index:04d}.mp4", video, FPS)
        joint = float(score["sa"] >= JOINT_THRESHOLD and score["pc"] >= JOINT_THRESHOLD)
        category = parse_prompt(prompt).motion
        records.append(
            Record(prompt, category, seed, score["sa"], score["pc"], joint, score["explanation"], str(path))
        )
    return records


def _noise_seed(prompt: str, seed: int) -> int:
    """Another starting noise for every prompt, the same for every model."""
    return int(np.random.default_rng([seed, *prompt.encode()]).integers(2**31))


def as_columns(records: Sequence[Record]) -> dict[str, list[Any]]:
    """Records as columns, for `datasets.Dataset.from_dict` or a JSON file."""
    rows = [asdict(record) for record in records]
    return {key: [row[key] for row in rows] for key in rows[0]}
