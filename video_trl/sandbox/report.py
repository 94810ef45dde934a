"""What the sandbox experiment says in the end: paired comparisons, a page with the videos, and the numbers as JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..evaluation import (
    Column,
    Comparison,
    Curve,
    Sample,
    Table,
    paired_bootstrap,
    wilson_interval,
    write_report,
)
from .benchmark import Record


METRICS = ("pc", "sa", "joint")
BASE = "base"

# Chart -> the logged values it shows. A chart appears when the run logged all of them.
_CHARTS = {
    "Loss": ("loss",),
    "Implicit rewards": ("rewards/chosen", "rewards/rejected"),
    "Reward margin": ("rewards/margins",),
    "Share of groups ranked right": ("rewards/accuracies",),
    "Error gaps to the reference": ("win_gap", "lose_gap"),
    "Physics weights": ("alpha", "gamma"),
}


@dataclass(frozen=True)
class Run:
    """
    One trained adapter.

    Attributes:
        method (`str`): Name of the method, shown everywhere.
        seed (`int`): Training seed.
        records (list of [`Record`]): Held-out clips of the adapter, in the order of the base model's records.
        log_history (list of `dict`): `trainer.state.log_history`.
    """

    method: str
    seed: int
    records: Sequence[Record]
    log_history: Sequence[Mapping[str, Any]]


def compare_runs(base: Sequence[Record], runs: Sequence[Run]) -> list[Comparison]:
    """
    Every method against the base model, and the first method against each other one, in every metric. The runs of a
    method with different seeds are pooled; whole prompts are resampled, with all their videos of all training seeds.

    Args:
        base (list of [`Record`]): Held-out clips of the base model.
        runs (list of [`Run`]): Adapters; every method was trained with the same seeds.

    Raises:
        ValueError: If two models were not evaluated on the same prompts and noise, or methods have different seeds.
    """
    records: dict[str, list[Record]] = {}
    seeds: dict[str, list[int]] = {}
    for run in runs:
        records.setdefault(run.method, []).extend(run.records)
        seeds.setdefault(run.method, []).append(run.seed)
    if len({tuple(values) for values in seeds.values()}) != 1:
        raise ValueError(f"Methods are compared seed by seed; each needs the same training seeds, got {seeds}.")
    first, *others = records
    num_seeds = len(seeds[first])
    pairs = [(method, BASE) for method in records] + [(first, other) for other in others]
    # The base model has no training seed: its videos stand against those of every seed.
    records[BASE] = list(base) * num_seeds
    return [
        _compare(metric, a, records[a], b, records[b], num_seeds=num_seeds) for metric in METRICS for a, b in pairs
    ]


def write_sandbox_report(
    path: str | Path,
    base: Sequence[Record],
    runs: Sequence[Run],
    comparisons: Sequence[Comparison],
    *,
    notes: Sequence[str] = (),
    num_samples: int = 14,
) -> Path:
    """
    Writes the page of the experiment: comparisons, one row per run, videos side by side, and the curves of the first
    seed. The videos are those of the first held-out prompts, not chosen by their scores.

    Args:
        path (path): HTML file to write.
        base, runs: As in [`compare_runs`].
        comparisons (list of [`Comparison`]): What [`compare_runs`] returned.
        notes (list of `str`, *optional*): How the numbers were made.
        num_samples (`int`, *optional*, defaults to `14`): Prompts shown.

    Returns:
        `Path`: The file written.
    """
    first_seed = runs[0].seed
    shown = {BASE: base, **{run.method: run.records for run in runs if run.seed == first_seed}}
    columns = [Column(BASE, "the model before training")]
    columns += [Column(name, f"adapter trained with seed {first_seed}") for name in shown if name != BASE]
    return write_report(
        path,
        title="Sandbox: before and after",
        columns=columns,
        samples=[_sample(shown, index) for index in _one_per_prompt(base)[:num_samples]],
        comparisons=comparisons,
        tables=[_table_of_runs(base, runs)],
        curves=[curve for run in runs if run.seed == first_seed for curve in _curves(run)],
        notes=notes,
    )


def save_results(
    path: str | Path,
    base: Sequence[Record],
    runs: Sequence[Run],
    comparisons: Sequence[Comparison],
    settings: Mapping[str, Any],
) -> Path:
    """Writes every number behind the report as JSON, with the settings that made it."""
    content = {
        "settings": dict(settings),
        "comparisons": [{**asdict(comparison), "verdict": comparison.verdict} for comparison in comparisons],
        BASE: [asdict(record) for record in base],
        "runs": [
            {
                "method": run.method,
                "seed": run.seed,
                "records": [asdict(record) for record in run.records],
                "log_history": list(run.log_history),
            }
            for run in runs
        ],
    }
    Path(path).write_text(json.dumps(content, indent=1), encoding="utf-8")
    return Path(path)


def _values(records: Sequence[Record], metric: str) -> list[float]:
    return [{"pc": record.pc, "sa": record.sa, "joint": record.joint}[metric] for record in records]


def _compare(
    metric: str, a: str, records_a: Sequence[Record], b: str, records_b: Sequence[Record], *, num_seeds: int
) -> Comparison:
    keys_a, keys_b = ([(record.prompt, record.seed) for record in records] for records in (records_a, records_b))
    if keys_a != keys_b:
        raise ValueError(
            f"{a!r} and {b!r} were evaluated on different prompts or noise ({len(keys_a)} and {len(keys_b)} videos). "
            "Evaluate both with the same prompts and seeds, in the same order."
        )
    difference = paired_bootstrap(
        _values(records_a, metric), _values(records_b, metric), clusters=[prompt for prompt, _ in keys_a]
    )
    return Comparison(metric, a, b, difference, num_seeds)


def _table_of_runs(base: Sequence[Record], runs: Sequence[Run]) -> Table:
    """One row per evaluated model: means, share of clips right in both scores, and the gain in `pc` over base."""
    rows = []
    for name, seed, records in [(BASE, "", base), *((run.method, str(run.seed), run.records) for run in runs)]:
        right = sum(record.joint >= 1 for record in records)
        low, high = wilson_interval(right, len(records))
        gain = ""
        if records is not base:
            d = _compare("pc", name, records, BASE, base, num_seeds=1).difference
            gain = f"{d.difference:+.3f} [{d.low:+.3f}, {d.high:+.3f}]"
        means = [sum(values) / len(values) for values in (_values(records, "pc"), _values(records, "sa"))]
        joint = f"{right}/{len(records)} [{low:.2f}, {high:.2f}]"
        rows.append([name, seed, *(f"{mean:.3f}" for mean in means), joint, gain])
    return Table(
        "Each run",
        ["model", "training seed", "mean pc", "mean sa", "right in both", "pc over base"],
        rows,
        note="pc: physics; sa: agreement with the prompt; both from the exact judge, in [0, 1]. Right in both: sa and "
        "pc at least 0.5, with its Wilson 95 % interval. pc over base: paired, bootstrap 95 % interval over prompts.",
    )


def _one_per_prompt(records: Sequence[Record]) -> list[int]:
    first: dict[str, int] = {}
    for index, record in enumerate(records):
        first.setdefault(record.prompt, index)
    return list(first.values())


def _sample(shown: Mapping[str, Sequence[Record]], index: int) -> Sample:
    records = {name: records[index] for name, records in shown.items()}
    return Sample(
        prompt=records[BASE].prompt,
        videos={name: record.video for name, record in records.items()},
        scores={
            name: {"pc": record.pc, "sa": record.sa, "explanation": record.explanation}
            for name, record in records.items()
        },
        category=records[BASE].category,
    )


def _curves(run: Run) -> list[Curve]:
    curves = []
    for title, names in _CHARTS.items():
        entries = [entry for entry in run.log_history if all(name in entry for name in names)]
        if entries:
            series = {name: [float(entry[name]) for entry in entries] for name in names}
            curves.append(Curve(f"{run.method}: {title}", [entry["step"] for entry in entries], series))
    return curves
