"""
Let a judge score the videos of runs, or of a table with the columns video (a path) and prompt.

Examples:

  video-trl score runs/base runs/phygdpo --judge videophy2
  video-trl score runs/base --judge http://localhost:8000/v1 --judge_options '{"model": "Qwen/Qwen3-VL-8B-Instruct"}'
  video-trl score clips.csv --judge sandbox --output scores.csv

Nothing is generated. Scores of a run stand beside those of other judges, and what is scored is not scored again; the
table that is written can be used as a judge (`--judge scores.csv`). Relative paths in a table start at its folder.
"""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import JudgeArguments
from .parser import UsageError, parse, required, say


if TYPE_CHECKING:
    from ..judges import VideoJudge

_SUFFIXES = (".csv", ".jsonl", ".parquet")


@dataclass
class ScoreArguments:
    """What is written, and how much is judged at once."""

    output: str | None = field(
        default=None, metadata={"help": "Of a table of videos: file to write (.csv or .jsonl)."}
    )
    batch_size: int = field(default=8, metadata={"help": "Videos given to the judge together."})


def run(argv: Sequence[str]) -> int:
    args, judge_args, paths = parse(
        "score",
        __doc__,
        [ScoreArguments, JudgeArguments],
        argv,
        positional="runs",
        positional_help="Run directories, or one table (.csv, .jsonl, .parquet).",
    )
    tables = [path for path in paths if Path(path).suffix in _SUFFIXES]
    if tables and len(paths) > 1:
        raise UsageError(f"Pass either runs or one table, got {' '.join(paths)}.")
    if tables:
        output = Path(required("output", args.output, "scores.csv"))
        if output.suffix not in (".csv", ".jsonl"):
            raise UsageError(f"--output must end in .csv or .jsonl, got {output}.")
        return _score_table(Path(tables[0]), output, judge_args.load(), args.batch_size)
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


def _score_table(table: Path, output: Path, judge: "VideoJudge", batch_size: int) -> int:
    from tqdm.auto import tqdm

    from ..data.video_io import video_hash
    from ..judges.precomputed import read_table

    rows = read_table(table)
    if not {"video", "prompt"} <= set(rows[0]):
        raise ValueError(f"{table}: expected the columns video and prompt, got {', '.join(rows[0])}.")
    paths = [table.parent / row["video"] for row in rows]
    hashes = [video_hash(path) for path in paths]  # names what is missing before anything is judged
    found: list[dict[str, Any]] = []
    for start in tqdm(range(0, len(rows), batch_size), desc="Scoring", unit="batch", disable=None):
        batch = slice(start, start + batch_size)
        scores = judge.score(paths[batch], [row["prompt"] for row in rows[batch]])
        for row, digest, score in zip(rows[batch], hashes[batch], scores, strict=True):
            told = {key: value for key, value in score.items() if key not in ("sa", "pc")}
            found.append(
                {"video": row["video"], "video_hash": digest, "prompt": row["prompt"], "sa": score["sa"],
                 "pc": score["pc"], "judge": judge.identity, "details": json.dumps(told)}
            )  # fmt: skip
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(output, "w", encoding="utf-8", newline="") as file:
        if output.suffix == ".csv":
            writer = csv.DictWriter(file, found[0])
            writer.writeheader()
            writer.writerows(found)
        else:
            file.writelines(json.dumps(row) + "\n" for row in found)
    scored = [row for row in found if row["sa"] is not None]
    means = [sum(row[key] for row in scored) / max(len(scored), 1) for key in ("sa", "pc")]
    say(f"{len(scored)} of {len(found)} videos scored, mean sa {means[0]:.3f}, mean pc {means[1]:.3f}, in {output}")
    return 0 if len(scored) == len(found) else 1
