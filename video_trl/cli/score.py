"""
Let a judge score the videos of runs, or of a table with the columns video (a path) and prompt; or compare pairs.

Examples:

  video-trl score runs/base runs/phygdpo --judge videophy2
  video-trl score runs/base --judge http://localhost:8000/v1 --judge_options '{"model": "Qwen/Qwen3-VL-8B-Instruct"}'
  video-trl score clips.csv --judge sandbox --output scores.csv
  video-trl score pairs.csv --pairwise true --judge http://localhost:8000/v1 --judge_options '{"model": "m"}' \\
      --output verdicts.csv

Nothing is generated. Scores of a run stand beside those of other judges, and what is scored is not scored again; the
table that is written can be used as a judge (`--judge scores.csv`). Relative paths in a table start at its folder.
`--pairwise` takes a table with the columns prompt, chosen and rejected and says how often the model agrees with it.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .options import JudgeArguments, mapping
from .parser import UsageError, parse, required, say


if TYPE_CHECKING:
    from ..judges import VideoJudge


_PAIRWISE = ("criterion", "segment_seconds", "both_orders", "num_frames", "max_pixels", "fps")


@dataclass
class ScoreArguments:
    """What is written, and how much is judged at once."""

    output: str | None = field(
        default=None, metadata={"help": "Of a table of videos: file to write (.csv, .jsonl, .parquet)."}
    )
    batch_size: int = field(default=8, metadata={"help": "Videos given to the judge together."})
    pairwise: bool = field(
        default=False,
        metadata={"help": "Compare chosen with rejected, by segments and in both orders; --judge is a server's URL."},
    )


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
        if args.pairwise:
            return _compare(tables[0], output, judge_args, args.batch_size)
        return _score_table(tables[0], output, judge_args.load(), args.batch_size)
    if args.pairwise:
        raise UsageError("--pairwise is for a table with the columns prompt, chosen and rejected.")
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


def _compare(table: str, output: Path, judge_args: JudgeArguments, batch_size: int) -> int:
    from ..judges.chat import ChatClient
    from ..judges.pairwise import PairwiseJudge, compare_table

    if not judge_args.judge.startswith(("http://", "https://")):
        raise UsageError(f"--pairwise asks a server: expected --judge http://..., got {judge_args.judge!r}.")
    options = mapping("judge_options", judge_args.judge_options)
    own = {key: options.pop(key) for key in _PAIRWISE if key in options}
    try:
        judge = PairwiseJudge(ChatClient(judge_args.judge, **options), **own)
    except TypeError as error:
        raise UsageError(f"--judge_options: {error}") from error
    verdicts = compare_table(table, output, judge, batch_size=batch_size)
    counts = Counter(verdict.preference for verdict in verdicts)
    say(
        f"{len(verdicts)} pairs: chosen better in {counts['a']}, rejected in {counts['b']}, undecided "
        f"{counts['same']}, without an answer {counts[None]}; in {output}"
    )
    return 0 if not counts[None] else 1


def _score_table(table: str, output: Path, judge: "VideoJudge", batch_size: int) -> int:
    from ..judges.score_table import score_table

    rows = score_table(table, output, judge, batch_size=batch_size)
    scored = [row for row in rows if row["sa"] is not None]
    means = [sum(row[key] for row in scored) / max(len(scored), 1) for key in ("sa", "pc")]
    say(f"{len(scored)} of {len(rows)} videos scored, mean sa {means[0]:.3f}, mean pc {means[1]:.3f}, in {output}")
    return 0 if len(scored) == len(rows) else 1
