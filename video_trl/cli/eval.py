"""
From a model to a table: prompts x seeds -> videos -> scores -> counts with intervals.

Examples:

  video-trl eval --num_prompts 7 --output_dir runs/base              the sandbox: no download, exact judge
  video-trl eval --num_prompts 7 --adapter out/phygdpo --output_dir runs/phygdpo
  video-trl eval --model_name_or_path Wan-AI/Wan2.1-T2V-1.3B-Diffusers --fps 16 \\
      --benchmark videophy2 --judge videophy2 --output_dir runs/wan  the benchmark's own prompts
  video-trl eval --benchmark phygenbench --results result.json       counts results of PhyGenBench's program
  video-trl eval --benchmark vbench --results base=a.json dpo=b.json the same for VBench; the first is the baseline

Stopped at any moment it goes on when started again with the same options. Another judge: `video-trl score`;
side by side: `video-trl report`; people: `video-trl vote`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from .frame import UsageError, parse, required, say
from .options import JudgeArguments, RunArguments


_READ = ("phygenbench", "vbench")


@dataclass
class EvalArguments:
    """How scores are counted."""

    benchmark: str = field(
        default="custom",
        metadata={
            "help": "Rule that scores are counted by: 'custom', 'videophy', 'videophy2'; or 'phygenbench', 'vbench', "
            "which read --results. For 'videophy' and 'videophy2' --prompts is the benchmark's CSV. Unset: the Hub's."
        },
    )
    results: list[str] = field(
        default_factory=list,
        metadata={"help": "Files that the benchmark's own program wrote; VBench's as NAME=FILE."},
    )


def run(argv: Sequence[str]) -> int:
    args, run_args, judge_args = parse("eval", __doc__, [EvalArguments, RunArguments, JudgeArguments], argv)
    if args.benchmark in _READ:
        files = required("results", args.results, "result.json" if args.benchmark == "phygenbench" else "base=a.json")
        say(_phygenbench(files) if args.benchmark == "phygenbench" else _vbench(files))
        return 0
    if args.results:
        raise UsageError(f"--results are read for {' and '.join(_READ)}, not for {args.benchmark!r}.")
    from ..evaluation.evaluate import evaluate_model
    from ..evaluation.tables import benchmark_named

    benchmark_named(args.benchmark)  # before a judge is loaded
    if run_args.model_name_or_path != "sandbox" and judge_args.judge == "sandbox":
        raise UsageError("--judge is needed: the sandbox's judges nothing but the sandbox's own sentences.")
    table = evaluate_model(
        run_args.output_dir,
        model=run_args.model_name_or_path,
        adapter=run_args.adapter,
        prompts=run_args.prompts,
        num_prompts=run_args.num_prompts,
        seeds=run_args.seeds,
        judge=judge_args.load(),
        name=run_args.name,
        training_seed=run_args.training_seed,
        benchmark=args.benchmark,
        revision=run_args.revision,
        fps=run_args.fps,
        call_kwargs=run_args.call_kwargs(),
        dtype=run_args.dtype,
        device=run_args.device,
        batch_size=run_args.batch_size,
    )
    if table is not None:  # the first process of several
        say(str(table))
    return 0


def _phygenbench(files: Sequence[str]) -> str:
    from ..evaluation.phygenbench import CATEGORIES, load_phygenbench_items, phygenbench_aggregate
    from ..evaluation.report import Table
    from ..evaluation.tables import text_table

    names, rows = list(dict.fromkeys(CATEGORIES.values())), []
    for file in files:
        items = load_phygenbench_items(file)
        for mode in ("published", "exact"):
            score = phygenbench_aggregate(items, mode)
            cells = [f"{score.by_category[name]:.3f}" if name in score.by_category else "" for name in names]
            rows.append([file, mode, str(len(items)), *cells, f"{score.average:.3f}"])
    header = ["file", "rounding", "prompts", *names, "average"]
    return text_table(Table("PhyGenBench", header, rows, "Share of the points; a prompt has three."))


def _vbench(files: Sequence[str]) -> str:
    from ..evaluation.tables import text_table
    from ..evaluation.vbench import load_vbench, vbench_table

    named = dict(file.partition("=")[::2] for file in files)
    if not all(named.values()) or len(named) < len(files):
        raise UsageError(f"--results of VBench are NAME=FILE with distinct names, got {' '.join(files)}.")
    return text_table(
        vbench_table({name: load_vbench(path).values for name, path in named.items()}, baseline=next(iter(named)))
    )
