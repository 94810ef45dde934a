# /// script
# requires-python = ">=3.10"
# dependencies = ["video-trl"]
# ///
"""
How much the gradient of a step varies by what it draws, on rows and weights that stay: timesteps drawn each for
itself, stratified and antithetic, and a noise for each video of a row instead of one for all.

    python examples/studies/gradient_variance.py --output_dir outputs/gradient_variance

Each method trains an adapter on the sandbox for a few steps. Then the weights stay, and the gradient of the same eight
rows is taken again and again, under another step's draws each time. All ways to draw see the same noises and rejected
videos; variance is the mean squared distance to the mean gradient, that of all ways whose mean is the same. Ratios are
to independent timesteps with a shared noise, with intervals from a paired bootstrap over the steps.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import video_trl
from video_trl.sandbox import load_sandbox
from video_trl.sandbox.data.datasets import build_group_dataset


ROWS = 8
METHODS: dict[str, dict[str, Any]] = {  # of the sandbox's own configuration, examples/configs/sandbox-gdpo.yaml
    "SFT": {},
    "DPO": {"beta": 500.0},
    "GroupDPO": {"beta": 500.0, "sft_weight": 500.0},
}
RANGES: dict[str, list[float] | None] = {"all": None, "850 to 1000": [850.0, 1000.0]}
DRAWS: dict[str, dict[str, Any]] = {
    "independent": {},
    "stratified": {"timestep_draw": "stratified"},
    "antithetic": {"timestep_draw": "antithetic"},
    "independent, a noise each": {"shared_noise": False},
}


def trainer(method: str, timesteps: list[float] | None, rows: Any, steps: int, directory: Path) -> Any:
    """A trainer whose adapter has been trained for some steps."""
    args = getattr(video_trl, f"Video{method}Config")(
        str(directory / "run"),
        lora_target_modules="all-linear",
        timestep_range=timesteps,
        per_device_train_batch_size=ROWS,
        max_steps=steps,
        learning_rate=1e-3,
        fps=8,
        bf16=False,
        use_cpu=True,
        cache_dir=str(directory / "cache"),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        overwrite_output_dir=True,
        **METHODS[method],
    )
    made = getattr(video_trl, f"Video{method}Trainer")("sandbox", args, rows)
    made.train()
    made.model.train()
    return made


def gradient(made: Any, batch: dict[str, Any], step: int) -> Tensor:
    """Of the adapter, flat, from the draws of a step."""
    made.state.global_step = step
    made.model.zero_grad(set_to_none=True)
    made.compute_loss(made.model, dict(batch)).backward()
    made.passes.backward()
    return torch.cat([weight.grad.flatten() for weight in made.model.parameters() if weight.grad is not None])


def distances(made: Any, batch: dict[str, Any], draws: int) -> dict[str, np.ndarray]:
    """For each way to draw, the squared distances of a step's gradient to the mean, and to that of its own way."""
    compares = "shared_noise" in vars(made.args)
    gradients = {}
    for name, options in DRAWS.items():
        if "shared_noise" in options and not compares:
            continue
        made.step.timestep_draw = options.get("timestep_draw", "independent")
        if compares:
            made.args.shared_noise = options.get("shared_noise", True)
        gradients[name] = torch.stack([gradient(made, batch, 10_000 + step) for step in range(draws)]).double()
    same = torch.cat([each for name, each in gradients.items() if "shared_noise" not in DRAWS[name]]).mean(dim=0)
    found = {}
    for name, each in gradients.items():
        mean, correction = (each.mean(dim=0), draws / (draws - 1)) if "shared_noise" in DRAWS[name] else (same, 1.0)
        found[name] = correction * (each - mean).square().sum(dim=1).numpy()
    found["mean"] = np.array([float(same.square().sum())])
    return found


def summary(found: dict[str, np.ndarray], resamples: int = 4000) -> list[dict[str, Any]]:
    """Variance by the squared norm of the mean, ratio to independent draws, and its 95 % interval."""
    rng = np.random.default_rng(0)
    base = found["independent"]
    chosen = rng.integers(len(base), size=(resamples, len(base)))
    rows = []
    for name in DRAWS:
        if name not in found:
            continue
        ratios = found[name][chosen].mean(axis=1) / base[chosen].mean(axis=1)
        low, high = np.quantile(ratios, (0.025, 0.975))
        variance = float(found[name].mean())
        ratio = variance / float(base.mean())
        relative = variance / float(found["mean"][0])
        rows.append({"draw": name, "variance": relative, "ratio": ratio, "low": float(low), "high": float(high)})
    return rows


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/gradient_variance"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--ranges", nargs="+", choices=RANGES, default=list(RANGES))
    parser.add_argument("--steps", type=int, default=20, help="of training before the weights stay")
    parser.add_argument("--draws", type=int, default=48)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    groups = build_group_dataset(load_sandbox(), args.output_dir / "rows", num_groups=24)
    rows = groups.select([number for number, row in enumerate(groups) if _is_compared(row)][:ROWS])
    path = args.output_dir / "results.json"
    results = json.loads(path.read_text()) if path.is_file() else {}
    sys.stdout.write("| method | timesteps | drawn | variance | ratio | 95 % |\n|---|---|---|---|---|---|\n")
    for method in args.methods:
        for name in args.ranges:
            key = f"{method}, {name}"
            if key not in results:
                made = trainer(method, RANGES[name], rows, args.steps, args.output_dir)
                batch = made.data_collator([made.train_dataset[number] for number in range(ROWS)])
                results[key] = summary(distances(made, batch, args.draws))
                path.write_text(json.dumps(results, indent=1))
            for row in results[key]:
                numbers = f"{row['variance']:.1f} | {row['ratio']:.2f} | {row['low']:.2f} to {row['high']:.2f}"
                sys.stdout.write(f"| {method} | {name} | {row['draw']} | {numbers} |\n")
            sys.stdout.flush()


def _is_compared(row: dict[str, Any]) -> bool:
    """Whether a rejected video is lawless, as in the sandbox's experiment."""
    return any(score["pc"] < 0.4 for score in row["rejected_scores"])


if __name__ == "__main__":
    main(sys.argv[1:])
