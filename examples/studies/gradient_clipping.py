# /// script
# requires-python = ">=3.10"
# dependencies = ["video-trl"]
# ///
"""
What clipping the gradient (`max_grad_norm`) leaves of physics weights: the tables of docs/trainers/checks.md.

    python examples/studies/gradient_clipping.py --output_dir outputs/clipping

Groups of the sandbox with one rejected video each, so that a row has one physics weight, gamma * alpha. First at the
weights that every run starts from: the norm of each step's gradient, with and without physics weights, from which
follows what clipping leaves of them. Then some steps of training, with the norms that it meets.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from video_trl import VideoGroupDPOConfig, VideoGroupDPOTrainer
from video_trl.losses import physics_weights
from video_trl.sandbox import build_group_dataset, load_sandbox


LIMIT = 1.0  # the default of `max_grad_norm`


class RecordingTrainer(VideoGroupDPOTrainer):
    """Notes which rows each step has."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rows: list[list[int]] = []

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.rows.append(list(inputs["index"]))
        return super().compute_loss(model, inputs, *args, **kwargs)


def train(folder: Path, groups: Any, steps: int, **options: Any) -> tuple[list[list[int]], NDArray[np.float64]]:
    """Rows and norm of the gradient, before clipping, of each step."""
    config = VideoGroupDPOConfig(
        output_dir=str(folder / "run"),
        overwrite_output_dir=True,
        cache_dir=str(folder / "encoded"),
        max_steps=steps,
        lr_scheduler_type="constant",
        use_cpu=True,
        bf16=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    trainer = RecordingTrainer(load_sandbox().pipeline, config, groups)
    trainer.train()
    return trainer.rows, np.array([entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry])


def weights_of(groups: Any) -> NDArray[np.float64]:
    """gamma * alpha of each row, which multiplies its gradient in the first step."""
    import torch

    scores = [row["rejected_scores"][0] for row in groups]
    sa, pc = (torch.tensor([score[name] for score in scores], dtype=torch.float64) for name in ("sa", "pc"))
    alpha, gamma = physics_weights(sa, pc)
    return (alpha * gamma).numpy()


def frozen_table(folder: Path, groups: Any) -> list[str]:
    """What is left of physics weights in the first step, by rows a step."""
    weights = weights_of(groups)
    lines = [
        "| rows a step | steps clipped | norms | largest / smallest weight, off | at 1.0 | kept |",
        "|---|---|---|---|---|---|",
    ]
    for rows_a_step in (1, 4, 8):
        steps = len(groups) // rows_a_step
        # A rate at which nothing moves: every step is a first one.
        options = {"per_device_train_batch_size": rows_a_step, "learning_rate": 1e-12, "max_grad_norm": LIMIT}
        rows, norms = train(folder, groups, steps, **options)
        _, plain = train(folder, groups, steps, physics_rewarding=False, **options)
        clipping = np.minimum(1, LIMIT / norms) / np.minimum(1, LIMIT / plain)
        before = np.concatenate([weights[members] for members in rows])
        after = np.concatenate([weights[members] * factor for members, factor in zip(rows, clipping, strict=True)])
        kept = np.polyfit(np.log(before), np.log(after), 1)[0]
        lines.append(
            f"| {rows_a_step} | {np.mean(norms > LIMIT):.0%} | {norms.min():.1f} to {norms.max():.1f} | "
            f"{before.max() / before.min():.2f} | {after.max() / after.min():.2f} | {kept:.2f} |"
        )
    return lines


def trained_table(folder: Path, groups: Any, steps: int) -> list[str]:
    """Norms that a run meets."""
    lines = ["| rows a step | `max_grad_norm` | steps clipped at 1.0 | norms |", "|---|---|---|---|"]
    for rows_a_step in (1, 8):
        for limit in (LIMIT, 0.0):
            options = {"per_device_train_batch_size": rows_a_step, "learning_rate": 3e-4, "max_grad_norm": limit}
            _, norms = train(folder, groups, steps, **options)
            met = f"{np.mean(norms > LIMIT):.0%} | {norms.min():.1f} to {norms.max():.1f}"
            lines.append(f"| {rows_a_step} | {limit or 'off'} | {met} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what clipping leaves of physics weights.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/clipping"), help="folder of data")
    parser.add_argument("--groups", type=int, default=32, help="rows")
    parser.add_argument("--steps", type=int, default=24, help="steps of training")
    options = parser.parse_args()
    groups = build_group_dataset(
        load_sandbox(), options.output_dir / "dataset", num_groups=options.groups, num_rejected=1
    )
    spread = weights_of(groups)
    print(f"{len(groups)} rows, gamma * alpha from {spread.min():.2f} to {spread.max():.2f}\n")
    print("\n".join(frozen_table(options.output_dir, groups)), end="\n\n", flush=True)
    print("\n".join(trained_table(options.output_dir, groups, options.steps)))


if __name__ == "__main__":
    main()
