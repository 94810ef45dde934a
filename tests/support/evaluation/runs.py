"""Runs of real mp4 files whose colours are their scores, and a judge that reads the colours."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from video_trl.data.video_io import read_video, write_video
from video_trl.evaluation.runs.prompts import EvaluationPrompt
from video_trl.evaluation.runs.run import EvaluationRun, create_run
from video_trl.evaluation.runs.score import score_run


class ColourJudge:
    """`sa` is the mean red and `pc` the mean green of a video."""

    name, identity = "colour", "colour 1"

    def __init__(self):
        self.calls = []

    def score(self, videos, prompts):
        self.calls.extend(prompts)
        means = [read_video(video).mean(axis=(0, 1, 2)) / 255 for video in videos]
        return [{"sa": red, "pc": green, "explanation": f"red {red:.2f}"} for red, green, _ in means]


def damage(path: Path) -> None:
    """The file can be opened, and not be decoded."""
    noise = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    content = bytearray(write_video(path, noise, fps=8).read_bytes())
    middle = len(content) // 2
    content[middle : middle + 400] = bytes([255]) * 400
    path.write_bytes(content)


def colour_video(sa: float, pc: float, num_frames: int = 3) -> np.ndarray:
    """uint8 (T, 32, 32, 3) of one colour."""
    video = np.zeros((num_frames, 32, 32, 3), dtype=np.uint8)
    video[..., 0], video[..., 1] = round(255 * sa), round(255 * pc)
    return video


def make_run(
    folder: Path,
    name: str,
    scores: Sequence[tuple[float, float]],
    *,
    prompts: Sequence[str | EvaluationPrompt] | None = None,
    seeds: Sequence[int] = (0,),
    training_seed: int | None = None,
    benchmark: str = "custom",
    scored: bool = True,
) -> EvaluationRun:
    """A run with a video of each score, in the order prompts x seeds."""
    prompts = prompts or [f"prompt {index}" for index in range(len(scores) // len(seeds))]
    source = {"revision": name, "fps": 8}
    run = create_run(
        folder,
        name=name,
        prompts=prompts,
        seeds=seeds,
        source=source,
        training_seed=training_seed,
        benchmark=benchmark,
    )
    for case, (sa, pc) in zip(run.cases, scores, strict=True):
        write_video(run.video(case), colour_video(sa, pc), 8)
    if scored:
        score_run(folder, ColourJudge())
    return run
