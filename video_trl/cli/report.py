"""
Compare runs: a table of paired differences with intervals, and one self-contained HTML page with the videos.

Examples:

  video-trl report runs/base runs/phygdpo-seed0 runs/phygdpo-seed1 runs/phygdpo-seed2
  video-trl report runs/base runs/phygdpo --output phygdpo.html --votes votes.jsonl \\
      --curves PhyGDPO=out/phygdpo/checkpoint-200/trainer_state.json
  video-trl report runs/base --no_page                               the table alone

The first run is the baseline. Runs of one name are training seeds of one method: a method is called better only with
three of them. The runs need the same prompts and seeds, and scores of one judge.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from .parser import UsageError, parse, say


@dataclass
class ReportArguments:
    """What is compared, and what the page shows."""

    output: str = field(default="report.html", metadata={"help": "Page to write."})
    page: bool = field(default=True, metadata={"help": "Write the page."})
    baseline: str | None = field(default=None, metadata={"help": "Method compared with. Unset: the first run's."})
    judge: str | None = field(default=None, metadata={"help": "Whose scores, where several judges scored the runs."})
    benchmark: str | None = field(default=None, metadata={"help": "Rule to count by. Unset: the runs' own."})
    level: float = field(default=0.95, metadata={"help": "Confidence level of the intervals."})
    max_prompts: int = field(default=24, metadata={"help": "Prompts whose videos are embedded; 0 embeds all."})
    votes: str | None = field(default=None, metadata={"help": "File of votes on these runs."})
    curves: list[str] = field(
        default_factory=list, metadata={"help": "Training curves, as NAME=trainer_state.json of a checkpoint."}
    )
    title: str = field(default="Comparison", metadata={"help": "Heading of the page."})


def run(argv: Sequence[str]) -> int:
    args, runs = parse(
        "report", __doc__, [ReportArguments], argv, positional="runs", positional_help="Run directories."
    )
    curves = [text.partition("=")[::2] for text in args.curves]
    if not all(name and path for name, path in curves):
        raise UsageError(f"--curves are NAME=FILE, got {' '.join(args.curves)}.")
    from ..evaluation.report.comparison import compare_runs, training_curves, write_comparison
    from ..evaluation.report.page import summary_table
    from ..evaluation.runs.tables import tabulate

    options = {"baseline": args.baseline, "judge": args.judge, "benchmark": args.benchmark, "level": args.level}
    comparisons = compare_runs(runs, **options)
    for folder in runs:
        say(f"{tabulate(folder, judge=args.judge, benchmark=args.benchmark, level=args.level)}\n")
    if comparisons:
        say(summary_table(comparisons))
    if args.page:
        page = write_comparison(
            runs,
            args.output,
            **options,
            max_prompts=args.max_prompts or None,
            curves=[curve for name, path in curves for curve in training_curves(path, name)],
            votes_path=args.votes,
            title=args.title,
        )
        say(f"\nVideos, tables and curves: {page}")
    return 0
