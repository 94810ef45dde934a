"""
Measures the exact judge: lawful against violated clips, for every motion and violation.

`python -m video_trl.sandbox.judge.calibration --out docs/benchmarks/sandbox_judge.md` writes the table of the docs.
"""

import argparse
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ..world.prompts import MOTIONS
from ..world.simulate import VIOLATIONS, VIOLATIONS_OF, simulate
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


def calibrate(seeds: Iterable[int], *, degrade: Degrade | None = None, violations: bool = True) -> Calibration:
    """
    Scores a lawful clip and one for every violation, for each motion and seed.

    Args:
        seeds: of the simulator; 1,000,000 and above are held out.
        degrade: changes each clip before it is judged, such as a blur.
        violations: False leaves `violated` empty.
    """
    judge, seeds = SandboxJudge(), list(seeds)

    def scores(motion: str, violation: str | None) -> Scores:
        clips = [simulate(seed, motion=motion, violation=violation, split="heldout") for seed in seeds]
        videos = [clip.video if degrade is None else degrade(clip.video) for clip in clips]
        results = judge.score(videos, [clip.prompt for clip in clips])
        return np.array([[result["sa"], result["pc"]] for result in results])

    pairs = [(motion, violation) for motion in MOTIONS for violation in VIOLATIONS_OF[motion]] if violations else []
    clean = {motion: scores(motion, None) for motion in tqdm(MOTIONS, desc="lawful", disable=len(seeds) < 50)}
    violated = {pair: scores(*pair) for pair in tqdm(pairs, desc="violated", disable=len(seeds) < 50)}
    return Calibration(clean, violated)


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
    text = (
        "# The exact judge, measured\n\n"
        f"Made by `python -m video_trl.sandbox.judge.calibration --first {options.first} --count {options.count}`: "
        f"{options.count} clips for each cell. AUC of `pc`, lawful against violated clips, and in brackets the mean "
        "`pc` and `sa` of the violated ones.\n\n"
        + table(calibrate(range(options.first, options.first + options.count)))
        + "\n"
    )
    if options.out is None:
        logger.info(text)
    else:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
