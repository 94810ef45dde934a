# /// script
# requires-python = ">=3.10"
# dependencies = ["video-trl[curation]"]
# ///
"""
Groups for physics-aware preference optimisation (PhyAugPipe of PhyGDPO, https://huggingface.co/papers/2512.24551).

Without arguments it draws a labelled pool of 2,400 sandbox clips, runs the whole pipeline on it, and says how well the
filter told the clips apart and where the sampling went:

    accelerate launch examples/curate_phyaug.py

With sources it curates them; docs/data/phyaug.md explains every stage:

    accelerate launch examples/curate_phyaug.py --config examples/configs/phyaug.yaml --sources my/clips

A run that was stopped goes on where it was when the same command is given again.
"""

import logging
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from video_trl.curation.phyaug.pipeline import PhyAugConfig, PhyAugResult


SANDBOX_CONFIG = Path(__file__).parent / "configs" / "sandbox-phyaug.yaml"


@dataclass
class ScriptArguments:
    """What the sandbox demonstration is made of; what is curated and how is said by [`PhyAugConfig`]."""

    pool_clips: int = field(default=2400, metadata={"help": "Sandbox demonstration: clips in the pool."})
    push_to: str | None = field(
        default=None, metadata={"help": "Repository, 'user/name', that the finished dataset is uploaded to."}
    )


def main(argv: list[str]) -> None:
    from trl import TrlParser

    from video_trl.curation.engine.manifest import Shard
    from video_trl.curation.phyaug.pipeline import PhyAugConfig, push_groups, run_phyaug

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    script_args, config = TrlParser((ScriptArguments, PhyAugConfig)).parse_args_and_config(args=argv)
    demonstration = not config.sources
    if demonstration and (config.model, config.annotator) != ("sandbox", "sandbox"):
        raise ValueError(
            f"--model {config.model} --annotator {config.annotator} need --sources: only the sandbox brings its own "
            "clips. Pass folders, tars or datasets with captions (docs/data/phyaug.md)."
        )
    if demonstration:
        if Shard.from_environment().count > 1:
            raise ValueError("The sandbox demonstration draws its pool in one process: use --num_processes 1.")
        from video_trl.sandbox.data.clip_pool import make_pool

        pool = Path(config.output_dir) / "pool"
        config = replace(config, sources=[str(make_pool(pool, num_clips=script_args.pool_clips))])
    result = run_phyaug(config)
    if Shard.from_environment().index > 0:
        return
    if demonstration:
        print(compared(result, Path(config.output_dir) / "pool"))
    print(described(result, config))
    if script_args.push_to is not None:
        print(push_groups(config.output_dir, script_args.push_to).commit_url)


def compared(result: "PhyAugResult", pool: Path) -> str:
    """Against the labels: what the filter kept, which category it was given, and who is sampled more than before."""
    from video_trl.sandbox.data.clip_pool import pool_labels
    from video_trl.sandbox.world.prompts import ACTIONS, MOTIONS

    labels = pool_labels(pool)
    rows = result.manifest.select(["dropped_by", "physics_label", "category"]).to_pylist()
    after = ("no_action", "ambiguous_action", "no_score", "not_sampled", "generation", None)
    passes = [row["dropped_by"] in after for row in rows]
    rich = [label.rich for label in labels]
    hits = sum(a and b for a, b in zip(passes, rich, strict=True))
    right = sum(
        row["category"] == ACTIONS[label.kind]
        for row, label, passed in zip(rows, labels, passes, strict=True)
        if passed and label.kind in MOTIONS
    )
    lines = [
        f"precision  {proportion(hits, sum(passes))}: clips kept by the filter that are rich in physics",
        f"recall     {proportion(hits, sum(rich))}: clips rich in physics that the filter kept",
        f"categories {proportion(right, hits)}: of these, clips sorted under their true action",
    ]
    for kind in dict.fromkeys(label.kind for label in labels if not label.rich):
        of_kind = [passed for passed, label in zip(passes, labels, strict=True) if label.kind == kind]
        if any(of_kind):
            lines.append(f"  kept by mistake: {sum(of_kind)} of {len(of_kind)} {kind}")
    lines.append(f"{'action':>32}   found  score  difficulty  sampled  proportion of category")
    for row in sorted(result.categories, key=lambda row: -(row.difficulty or 0)):
        lines.append(
            f"{row.name:>32} {row.available:7d}  {row.score:.3f}  {row.difficulty:10.3f}  {row.sampled:7d}"
            f"  {row.sampled / max(row.available, 1):.2f}"
        )
    return "\n".join(lines)


def proportion(count: int, total: int) -> str:
    from video_trl.evaluation import wilson_interval

    low, high = wilson_interval(count, max(total, 1))
    return f"{count}/{total} [{low:.3f}, {high:.3f}]"


def described(result: "PhyAugResult", config: "PhyAugConfig") -> str:
    """The funnel and where everything is; the last line accounts for every clip."""
    lines = [f"{stage:>14} {count:8d}" for stage, count in result.funnel.items()]
    folder = Path(config.output_dir)
    lines.append(f"dataset for --dataset_name: {folder / 'groups'}; funnel: {folder / 'funnel.html'}")
    return "\n".join([*lines, result.summary])


if __name__ == "__main__":
    main(sys.argv[1:] or ["--config", str(SANDBOX_CONFIG)])
