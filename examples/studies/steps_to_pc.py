# /// script
# requires-python = ">=3.10"
# dependencies = ["video-trl"]
# ///
"""
Whether timesteps that are drawn together reach a given `pc` on the sandbox in fewer steps.

    python examples/studies/steps_to_pc.py --output_dir outputs/steps_to_pc

Fine-tuning on the clips that the judge passes, as in `preferences.py`: a hundred steps, measured after each twenty of
them on 42 held-out sentences with one noise. Recipe, rows and seeds are the same for both ways to draw.

The rule, written down before there were results: the steps that a way takes are those at which the mean `pc` over
seeds and sentences first reaches 0.65 (the base model is at 0.46, lawful clips at 0.995), on the straight line between
two measurements, the base model being that at step 0, and a hundred where it is not reached. "stratified" is
faster if the whole 95 % interval of the ratio of their steps is below 1. Intervals: 4,000 draws of sentences
with replacement, the same for both, each sentence with all its seeds.

What is there is not made again.
"""

import sys

import numpy as np
from preferences import Runner, parse

from video_trl.experiment import BASE, FIRST_NOISE_SEED, JUDGED, PROMPT_DRAW, evaluate_trained


DRAWS = ("independent", "stratified")
TARGET = 0.65
EVERY = 20  # steps between two measurements
OPTIONS = ("--output_dir", "outputs/steps_to_pc", "--num_rejected", "1", "--eval_seeds", "1")


def curve(runner: Runner, draw: str, seed: int) -> np.ndarray:
    """`pc` of each sentence after each `EVERY` steps, the base model first: `(measurements, sentences)`."""
    folder = runner.folder / f"{draw}-seed{seed}"
    last = folder / f"checkpoint-{runner.args.max_steps}"
    if not last.is_dir():
        options = {"save_strategy": "steps", "save_steps": EVERY, "save_only_model": True}
        runner.trainer(JUDGED, seed, output_dir=str(folder), timestep_draw=draw, **options).train()
    found = [measured(runner, BASE, None, None)]
    for step in range(EVERY, runner.args.max_steps + 1, EVERY):
        found.append(measured(runner, f"{folder.name}-step{step}", str(folder / f"checkpoint-{step}"), seed))
    return np.array(found)


def measured(runner: Runner, name: str, weights: str | None, seed: int | None) -> list[float]:
    """`pc` of each sentence."""
    from video_trl.evaluation.evaluate import sandbox_prompts

    table = evaluate_trained(
        runner.folder / "runs" / name,
        weights,
        sandbox_prompts(runner.experiment.eval_prompts, seed=PROMPT_DRAW),
        seeds=(FIRST_NOISE_SEED,),
        name=name,
        training_seed=seed,
    )
    return [float(score["pc"]) for score in table.scores]


def steps_to(target: float, means: np.ndarray) -> float:
    """Steps, at least one, at which a curve of means first reaches the target; all that there are if it does not."""
    steps = EVERY * np.arange(len(means))
    reached = np.flatnonzero(means >= target)
    if not len(reached):
        return float(steps[-1])
    between = slice(max(reached[0] - 1, 0), reached[0] + 1)
    return max(1.0, float(np.interp(target, means[between], steps[between])))


def rows(curves: dict[str, np.ndarray], resamples: int = 4000) -> list[str]:
    """The table; curves are `(measurements, sentences)`, means over the seeds."""
    number = curves[DRAWS[0]].shape[1]
    chosen = np.random.default_rng(0).integers(number, size=(resamples, number))
    steps = {draw: steps_to(TARGET, each.mean(axis=1)) for draw, each in curves.items()}
    drawn = {
        draw: np.array([steps_to(TARGET, each[:, some].mean(axis=1)) for some in chosen])
        for draw, each in curves.items()
    }
    lines = []
    for draw, each in curves.items():
        low, high = np.quantile(drawn[draw] / drawn[DRAWS[0]], (0.025, 0.975))
        means = " | ".join(f"{mean:.3f}" for mean in each.mean(axis=1))
        ratio = f"{steps[draw] / steps[DRAWS[0]]:.2f} | {low:.2f} to {high:.2f}"
        lines.append(f"| {draw} | {means} | {steps[draw]:.0f} | {ratio} |")
    return lines


def main(argv: list[str]) -> None:
    _, runner = parse([*OPTIONS, *argv])
    runner.claim_folder()
    seeds, last = runner.experiment.seeds, runner.args.max_steps
    curves = {draw: np.mean([curve(runner, draw, seed) for seed in seeds], axis=0) for draw in DRAWS}
    names = [
        "drawn",
        *(f"pc, step {step}" for step in range(0, last + 1, EVERY)),
        f"steps to {TARGET}",
        "ratio",
        "95 %",
    ]
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}", *rows(curves)]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
