"""
Measures the exact judge: lawful against violated clips, for every motion and violation, and lawful paths that tremble.

`python -m video_trl.sandbox.judge.calibration --out docs/benchmarks/sandbox_judge.md` writes the table of the docs.
"""

import argparse
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ..world.drawing import draw
from ..world.prompts import MOTIONS
from ..world.simulate import VIOLATIONS, VIOLATIONS_OF, Clip, Rendering, simulate
from .judge import SandboxJudge


logger = logging.getLogger(__name__)

Scores = NDArray[np.float64]
Degrade = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]


@dataclass(frozen=True)
class Calibration:
    """
    Scores by what was shown; each value is `(n, 2)`: `sa` and `pc` of n clips.

    Attributes:
        clean: by motion.
        violated: by (motion, violation).
    """

    clean: dict[str, Scores]
    violated: dict[tuple[str, str], Scores]

    def auc(self, violation: str, motions: Iterable[str] = MOTIONS) -> float:
        """Area under the ROC curve of `pc` for lawful against violated clips, pooled over motions that can show it."""
        able = [motion for motion in motions if (motion, violation) in self.violated]
        lawful = np.concatenate([self.clean[motion][:, 1] for motion in able])
        broken = np.concatenate([self.violated[motion, violation][:, 1] for motion in able])
        above = (lawful[:, None] > broken).mean() + 0.5 * (lawful[:, None] == broken).mean()
        return float(above)


def calibrate(
    seeds: Iterable[int],
    *,
    degrade: Degrade | None = None,
    violations: bool = True,
    rendering: Rendering = "plain",
) -> Calibration:
    """
    Scores a lawful clip and one for every violation, for each motion and seed.

    Args:
        seeds: of the simulator; 1,000,000 and above are held out.
        degrade: changes each clip before it is judged, such as a blur.
        violations: False leaves `violated` empty.
        rendering: as in `simulate`.
    """
    judge, seeds = SandboxJudge(), list(seeds)

    def scores(motion: str, violation: str | None) -> Scores:
        request: dict[str, Any] = {"motion": motion, "violation": violation, "rendering": rendering}
        clips = [simulate(seed, split="heldout", **request) for seed in seeds]
        videos = [clip.video if degrade is None else degrade(clip.video) for clip in clips]
        results = judge.score(videos, [clip.prompt for clip in clips])
        return np.array([[result["sa"], result["pc"]] for result in results])

    pairs = [(motion, violation) for motion in MOTIONS for violation in VIOLATIONS_OF[motion]] if violations else []
    clean = {motion: scores(motion, None) for motion in tqdm(MOTIONS, desc="lawful", disable=len(seeds) < 50)}
    violated = {pair: scores(*pair) for pair in tqdm(pairs, desc="violated", disable=len(seeds) < 50)}
    return Calibration(clean, violated)


@dataclass(frozen=True)
class Tremble:
    """Offsets of a lawful path: normal, of `sigma` pixels of 64 in each direction, one for each of `hold` frames."""

    sigma: float
    hold: int = 1

    def __str__(self) -> str:
        return f"{self.sigma:g} px, {'every frame anew' if self.hold == 1 else f'held for {self.hold} frames'}"

    def of(self, clip: Clip, rng: np.random.Generator) -> NDArray[np.uint8]:
        """The clip drawn with a trembling path; like a latent frame, the first offset is held for one frame."""
        frames, bodies, _ = clip.positions.shape
        offsets = rng.normal(0, self.sigma / 64, (1 + math.ceil((frames - 1) / self.hold), bodies, 2))
        path = clip.positions + np.concatenate([offsets[:1], offsets[1:].repeat(self.hold, axis=0)])[:frames]
        size = clip.video.shape[1:3]
        return draw(clip.scene.appearance, path, clip.visible, clip.scene.params, clip.spec.motion, *size)


TREMBLES = (Tremble(0.5), Tremble(1.0), Tremble(1.5), Tremble(1.0, hold=4), Tremble(2.0, hold=4))


def calibrate_trembles(seeds: Iterable[int], trembles: Iterable[Tremble] = TREMBLES) -> dict[str, dict[str, Scores]]:
    """
    Scores lawful clips whose path trembles: motion -> tremble -> `(n, 3)` of `sa`, `pc` and the reported `jitter` in
    pixels of 64.
    """
    judge, seeds = SandboxJudge(), list(seeds)
    result: dict[str, dict[str, Scores]] = {}
    for motion in MOTIONS:
        clips = [simulate(seed, motion=motion, split="heldout") for seed in seeds]
        result[motion] = {}
        for tremble in trembles:
            rng = np.random.default_rng(0)
            scores = judge.score([tremble.of(clip, rng) for clip in clips], [clip.prompt for clip in clips])
            values = [[score["sa"], score["pc"], 64 * score["jitter"]] for score in scores]
            result[motion][str(tremble)] = np.array(values)
    return result


def tremble_table(result: dict[str, dict[str, Scores]]) -> str:
    """Markdown: one row for each motion, one column for each tremble, `mean pc (jitter)` in the cells."""
    names = list(next(iter(result.values())))
    lines = ["| motion | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    rows = [(motion, list(scores.values())) for motion, scores in result.items()]
    rows.append(("all", [np.concatenate([scores[name] for scores in result.values()]) for name in names]))
    for motion, cells in rows:
        texts = [f"{cell[:, 1].mean():.2f} ({cell[:, 2].mean():.1f} px)" for cell in cells]
        lines.append(f"| {motion} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def table(result: Calibration) -> str:
    """Markdown: one row for each motion, one column for each violation, `AUC (mean pc, mean sa)` in the cells."""
    lines = [
        "| motion | lawful: pc, sa | " + " | ".join(VIOLATIONS) + " |",
        "|---" * (len(VIOLATIONS) + 2) + "|",
    ]
    for motion in MOTIONS:
        sa, pc = result.clean[motion].mean(axis=0)
        cells = []
        for violation in VIOLATIONS:
            if (motion, violation) not in result.violated:
                cells.append("")
                continue
            broken_sa, broken_pc = result.violated[motion, violation].mean(axis=0)
            cells.append(f"{result.auc(violation, (motion,)):.3f} ({broken_pc:.2f}, {broken_sa:.2f})")
        lines.append(f"| {motion} | {pc:.3f}, {sa:.3f} | " + " | ".join(cells) + " |")
    sa, pc = np.concatenate(list(result.clean.values())).mean(axis=0)
    pooled = []
    for violation in VIOLATIONS:
        broken = np.concatenate([s for (_, name), s in result.violated.items() if name == violation]).mean(axis=0)
        pooled.append(f"**{result.auc(violation):.3f}** ({broken[1]:.2f}, {broken[0]:.2f})")
    lines.append(f"| all | {pc:.3f}, {sa:.3f} | " + " | ".join(pooled) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Measure the sandbox's exact judge on held-out clips.")
    parser.add_argument("--first", type=int, default=1_000_000, help="first seed (1,000,000 and above are held out)")
    parser.add_argument("--count", type=int, default=100, help="seeds for each motion and violation")
    parser.add_argument("--out", type=Path, help="markdown file to write; the log if left out")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    seeds = range(options.first, options.first + options.count)
    text = (
        "# The exact judge, measured\n\n"
        f"Made by `python -m video_trl.sandbox.judge.calibration --first {options.first} --count {options.count}`: "
        f"{options.count} clips for each cell. AUC of `pc`, lawful against violated clips, and in brackets the mean "
        "`pc` and `sa` of the violated ones.\n\n"
        + table(calibrate(seeds))
        + "\n\n## In the wild\n\nThe same clips with texture, uneven light, tint, grain and a swaying camera.\n\n"
        + table(calibrate(seeds, rendering="wild"))
        + "\n\n## Lawful paths that tremble\n\nNormal offsets of the given standard deviation in each direction, on "
        "exactly lawful paths. Mean `pc`, and in brackets the mean of the reported `jitter`.\n\n"
        + tremble_table(calibrate_trembles(seeds))
        + "\n"
    )
    if options.out is None:
        logger.info(text)
    else:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
