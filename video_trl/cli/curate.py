"""
Examples:

  video-trl curate gt-pairs --config examples/configs/gt-pair.yaml --sources my/clips --output_dir out/pairs
  video-trl train dpo --dataset_name out/pairs/pairs --output_dir out/dpo

  video-trl curate phyaug --config examples/configs/phyaug.yaml --sources my/clips
  video-trl train gdpo --dataset_name outputs/phyaug/groups --output_dir out/gdpo

  video-trl vote out/pairs --questions marks --votes marks.jsonl
  video-trl curate annotated --votes marks.jsonl --fill_to 4932 --output_dir out/marked

  video-trl curate self-pairs --prompts prompts.txt --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --output_dir out/own
  video-trl train dpo --dataset_name out/own/pairs --pair_weights --output_dir out/videodpo

A run that was stopped goes on where it was. docs/data/gt_pair.md, docs/data/phyaug.md and
docs/data/self_pairs.md explain every stage.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .parser import UsageError, nearest, parse, required, say
from .sources import read_dataclass


def run(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        listing = "\n".join(f"  {name:12}{summary}" for name, (summary, _) in RECIPES.items())
        say(f"usage: video-trl curate RECIPE [options]\n\n{listing}\n\n{__doc__.strip()}\n\nOptions: RECIPE --help")
        return 0
    name, *rest = argv
    if name not in RECIPES:
        raise UsageError(f"no recipe {name!r}{nearest(name, RECIPES)}; expected one of {', '.join(RECIPES)}.")
    return RECIPES[name][1](rest)


def gt_pairs(argv: Sequence[str]) -> int:
    config = _options("gt-pairs", "gt_pair.pipeline:GTPairConfig", argv)
    from ..curation import Shard, run_gt_pair

    required("sources", config.sources, "my/clips")
    result = run_gt_pair(config)
    if Shard.from_environment().index == 0:
        _say_where(result.funnel, Path(config.output_dir), "pairs", result.summary)
        if not len(result.pairs):
            from ..curation.engine.manifest import first_dropped

            kinds = "\n  ".join(first_dropped(result.manifest))
            say(f"No clip is left. The first that each rule dropped:\n  {kinds}\nTheir limits are options: --help.")
            return 1
    return 0


def phyaug(argv: Sequence[str]) -> int:
    config = _options("phyaug", "phyaug.config:PhyAugConfig", argv)
    from ..curation import Shard, run_phyaug

    required("sources", config.sources, "my/clips")
    result = run_phyaug(config)
    if Shard.from_environment().index == 0:
        _say_where(result.funnel, Path(config.output_dir), "groups", result.summary)
    return 0


@dataclass
class AnnotatedArguments:
    """Which marked pairs become the dataset."""

    votes: str | None = field(default=None, metadata={"help": "File of marks (.csv or .jsonl)."})
    output_dir: str = field(default="outputs/annotated", metadata={"help": "Folder of dataset and manifest."})
    dimensions: list[str] = field(
        default_factory=list, metadata={"help": "Dimensions that were marked. Unset: all five of Reg-DPO."}
    )
    min_raters: int = field(default=3, metadata={"help": "People who must have marked both videos."})
    min_difference: float = field(default=2.0, metadata={"help": "Least difference of the two means."})
    min_positive: float | None = field(
        default=None, metadata={"help": 'Least mean of the better video; 4 for the "ideal" subset.'}
    )
    fill_to: int | None = field(
        default=None,
        metadata={"help": "Further pairs with a difference of 1 and more, drawn until there are so many."},
    )
    seed: int = field(default=0, metadata={"help": "Which of them are drawn."})


def annotated(argv: Sequence[str]) -> int:
    (args,) = parse("curate annotated", __doc__, [AnnotatedArguments], argv)
    from ..curation.annotated import DIMENSIONS, annotated_pairs, read_votes
    from ..curation.engine.manifest import Shard, summarize, write_table
    from ..curation.engine.output import output_folder

    dimensions = args.dimensions or DIMENSIONS
    votes = read_votes(required("votes", args.votes, "marks.jsonl"), dimensions)
    for vote in votes:  # relative paths start at the table; a name without a file stays one
        beside = Path(args.votes).absolute().parent / vote["video"]
        vote["video"] = str(beside) if beside.is_file() else vote["video"]
    pairs, table = annotated_pairs(
        votes,
        dimensions=dimensions,
        min_raters=args.min_raters,
        min_difference=args.min_difference,
        min_positive=args.min_positive,
        fill_to=args.fill_to,
        seed=args.seed,
    )
    folder = Path(args.output_dir)
    with output_folder(folder, "annotated", ("manifest.parquet", "pairs"), Shard()):
        write_table(table, folder / "manifest.parquet")
        write_table(pairs.with_format("arrow")[:], folder / "pairs" / "train.parquet")
    say(f"{summarize(table)}\ndataset: {folder / 'pairs'}; every pair: {folder / 'manifest.parquet'}")
    return 0


def self_pairs(argv: Sequence[str]) -> int:
    config = _options("self-pairs", "self_pairs:SelfPairsConfig", argv)
    from ..curation import Shard, run_self_pairs

    result = run_self_pairs(config)
    if Shard.from_environment().index == 0:
        folder = Path(config.output_dir)
        say("\n".join(f"{stage:>14} {count:6d}" for stage, count in result.funnel.items()))
        say(f"dataset: {folder / 'pairs'}; every video with its scores: {folder / 'videos.parquet'}")
    return 0


def _options(recipe: str, path: str, argv: Sequence[str]) -> Any:
    """The configuration of a recipe, at `module:Class` of the curation; imported after the parser is content."""
    module, _, name = path.partition(":")
    stand_in = read_dataclass(f"video_trl.curation.{path}")
    if stand_in is not None:
        parse(f"curate {recipe}", __doc__, [stand_in], argv)
    kind = vars(importlib.import_module(f"..curation.{module}", __package__))[name]
    (config,) = parse(f"curate {recipe}", __doc__, [kind], argv)
    return config


def _say_where(funnel: Mapping[str, int], folder: Path, dataset: str, summary: str) -> None:
    for stage, count in funnel.items():
        say(f"{stage:>14} {count:6d}")
    say(f"dataset: {folder / dataset}; every clip: {folder / 'manifest.parquet'}\n{summary}")


RECIPES: dict[str, tuple[str, Callable[[Sequence[str]], int]]] = {
    "gt-pairs": ("real videos against generated ones (Reg-DPO's GT-Pair)", gt_pairs),
    "phyaug": ("groups of a real video and generated ones, judged (PhyGDPO's PhyAugPipe)", phyaug),
    "annotated": ("pairs that people have marked (Reg-DPO's second strategy)", annotated),
    "self-pairs": ("the model's own videos, best against worst by a judge (VideoDPO)", self_pairs),
}
