# /// script
# requires-python = ">=3.10"
# dependencies = ["video-trl"]
# ///
"""
How well the filters of GT-Pair tell labelled footage apart: the tables of docs/benchmarks/gt_pair.md.

    python examples/studies/gt_pair_filters.py --first 1000 --count 20

The thresholds were chosen on the seeds below 1000.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata
from tqdm.auto import tqdm

from video_trl.curation import GTPairConfig, apply_rules, measure_clip
from video_trl.curation.engine.manifest import OUTCOME, Rule
from video_trl.data import write_video
from video_trl.evaluation import wilson_interval
from video_trl.sandbox.data.labelled_clips import KINDS, make_footage


FPS = (24.0, 30.0, 25.0, 16.0, 45.0)
CRF = (18, 23, 28)  # of the files that are measured: near lossless to clearly compressed


def measure_footage(first: int, count: int, height: int, width: int) -> list[dict[str, Any]]:
    """The measures of one clip of every kind for every seed, with the label."""
    rows = []
    with tempfile.TemporaryDirectory() as folder, tqdm(total=count * len(KINDS), unit="clip") as progress:
        for seed in range(first, first + count):
            for kind in KINDS:
                clip = make_footage(kind, seed, height=height, width=width, fps=FPS[seed % len(FPS)])
                path = write_video(Path(folder) / "clip.mp4", clip.video, clip.fps, crf=CRF[seed % len(CRF)])
                measures = {name: float(value) for name, value in measure_clip(path).items()}
                rows.append({"kind": kind, "seed": seed, **measures})
                progress.update()
    return rows


def area_under_curve(good: Sequence[float], bad: Sequence[float]) -> float:
    """Probability that a bad clip's value is above a good one's; ties count half."""
    ranks = rankdata([*bad, *good])[: len(bad)]
    return float((ranks.sum() - len(bad) * (len(bad) + 1) / 2) / (len(bad) * len(good)))


def verdicts(rows: list[dict[str, Any]], rules: Sequence[Rule]) -> list[str | None]:
    """What each row would be dropped by."""
    batch = {name: [row[name] for row in rows] for name in rows[0]} | {name: [None] * len(rows) for name in OUTCOME}
    return apply_rules(batch, rules)["dropped_by"]


def proportion(count: int, total: int) -> str:
    low, high = wilson_interval(count, total)
    return f"{count}/{total} [{low:.2f}, {high:.2f}]"


def span(values: Sequence[float]) -> str:
    """Smallest and largest."""
    return f"{min(values):.3g} to {max(values):.3g}"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line a rule and kind of footage, then the good kinds."""
    rules = GTPairConfig(sources=["labelled footage"]).filter_rules()
    good = [row for row in rows if KINDS[row["kind"]] is None]
    lines = [
        "| rule | column | kept if | good footage has | footage | it has | AUC | dropped by this rule | by any rule |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for rule in rules:
        fine = [row[rule.column] for row in good]
        for kind in (kind for kind, defect in KINDS.items() if defect == rule.name):
            bad = [row for row in rows if row["kind"] == kind]
            poor = [row[rule.column] for row in bad]
            auc = area_under_curve(fine, poor)
            auc = 1 - auc if rule.minimum is not None else auc
            limit = f">= {rule.minimum:g}" if rule.minimum is not None else f"<= {rule.maximum:g}"
            alone = sum(name is not None for name in verdicts(bad, [rule]))
            any_rule = sum(name is not None for name in verdicts(bad, rules))
            cells = (rule.name, f"`{rule.column}`", limit, span(fine), kind, span(poor), f"{auc:.4f}")
            lines.append(f"| {' | '.join(cells)} | {proportion(alone, len(bad))} | {proportion(any_rule, len(bad))} |")
    lines += ["", "| good footage | kept | dropped by |", "|---|---|---|"]
    for kind in (kind for kind, defect in KINDS.items() if defect is None):
        names = verdicts([row for row in good if row["kind"] == kind], rules)
        dropped = ", ".join(sorted({name for name in names if name is not None})) or "-"
        lines.append(f"| {kind} | {proportion(names.count(None), len(names))} | {dropped} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the filters of GT-Pair on labelled footage.")
    parser.add_argument("--first", type=int, default=1000, help="first seed; those below 1000 chose the thresholds")
    parser.add_argument("--count", type=int, default=20, help="seeds: clips of every kind")
    parser.add_argument("--height", type=int, default=256, help="of the clips, in pixels")
    parser.add_argument("--width", type=int, default=448, help="of the clips, in pixels")
    parser.add_argument("--measures", type=Path, help="JSON file to keep the measures in; read where it exists")
    options = parser.parse_args()
    if options.measures is not None and options.measures.is_file():
        rows = json.loads(options.measures.read_text())
    else:
        rows = measure_footage(options.first, options.count, options.height, options.width)
        if options.measures is not None:
            options.measures.write_text(json.dumps(rows))
    seeds = np.unique([row["seed"] for row in rows])
    print(f"{len(rows)} clips, {options.width}x{options.height}, seeds {seeds.min()} to {seeds.max()}\n")
    print(table(rows))


if __name__ == "__main__":
    main()
