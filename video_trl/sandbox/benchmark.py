"""The sandbox benchmark: held-out sentences -> generated mp4s -> scores of the exact judge."""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline

from ..data.video_io import write_video
from ..judges import VideoJudge
from .data.generate import generate
from .world.prompts import parse_prompt
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
