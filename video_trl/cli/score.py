"""
Let a judge score the videos of runs, or of a table with the columns video (a path) and prompt.

Examples:

  video-trl score runs/base runs/phygdpo --judge videophy2
  video-trl score runs/base --judge http://localhost:8000/v1 --judge_options '{"model": "Qwen/Qwen3-VL-8B-Instruct"}'
  video-trl score clips.csv --judge sandbox --output scores.csv

Nothing is generated. Scores of a run stand beside those of other judges, and what is scored is not scored again; the
table that is written can be used as a judge (`--judge scores.csv`). Relative paths in a table start at its folder.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .options import JudgeArguments
from .parser import UsageError, parse, required, say


if TYPE_CHECKING:
    from ..judges import VideoJudge


@dataclass
class ScoreArguments:
    """What is written, and how much is judged at once."""

    output: str | None = field(
        default=None, metadata={"help": "Of a table of videos: file to write (.csv, .jsonl, .parquet)."}
    )
    batch_size: int = field(default=8, metadata={"help": "Videos given to the judge together."})


def run(argv: Sequence[str]) -> int:
    from ..judges.precomputed import SUFFIXES

    args, judge_args, paths = parse(
        "score",
        __doc__,
        [ScoreArguments, JudgeArguments],
        argv,
        positional="runs",
        positional_help="Run directories, or one table (.csv, .jsonl, .parquet).",
    )
    tables = [path for path in paths if Path(path).suffix in SUFFIXES]
    if tables and len(paths) > 1:
        raise UsageError(f"Pass either runs or one table, got {' '.join(paths)}.")
    if tables:
        output = Path(required("output", args.output, "scores.csv"))
        if output.suffix not in SUFFIXES:
            raise UsageError(f"--output must end in {', '.join(SUFFIXES)}, got {output}.")
        return _score_table(tables[0], output, judge_args.load(), args.batch_size)
    if args.output is not None:
        raise UsageError("--output is for a table of videos; scores of a run are kept in the run.")
    from ..evaluation.runs.run import load_run
    from ..evaluation.runs.score import score_run
    from ..evaluation.runs.tables import tabulate

    runs = [load_run(path) for path in paths]  # all of them, before a judge is loaded
    judge = judge_args.load()
    for folder in runs:
        score_run(folder.folder, judge, batch_size=args.batch_size)
        say(f"{tabulate(folder, judge=judge.name)}\n")
    return 0


def _score_table(table: str, output: Path, judge: "VideoJudge", batch_size: int) -> int:
    from ..judges.score_table import score_table

    rows = score_table(table, output, judge, batch_size=batch_size)
    scored = [row for row in rows if row["sa"] is not None]
    means = [sum(row[key] for row in scored) / max(len(scored), 1) for key in ("sa", "pc")]
    say(f"{len(scored)} of {len(rows)} videos scored, mean sa {means[0]:.3f}, mean pc {means[1]:.3f}, in {output}")
    return 0 if len(scored) == len(rows) else 1
