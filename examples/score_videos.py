# /// script
# requires-python = ">=3.10"
# dependencies = ["video-trl[judges]"]
# ///
"""
Judge videos: semantic adherence and physical commonsense of each, as a table that `load_judge` reads as a judge.

A few simulated clips, lawful and not, by the sandbox's exact judge; or the videos of a CSV with the columns video (a
path, from the folder of the CSV) and prompt, by any judge:

    python examples/score_videos.py
    python examples/score_videos.py --table clips/prompts.csv --judge videophy2 --output scores.parquet
    python examples/score_videos.py --table clips/prompts.csv --judge http://localhost:8000/v1 \
        --options '{"model": "Qwen/Qwen3-VL-8B-Instruct"}'

Scores are remembered beside the output: a run that was stopped, or one with more videos, goes on where it was.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

from video_trl.data import write_video
from video_trl.judges.score_table import score_table
from video_trl.load import load_judge
from video_trl.sandbox import simulate


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, help="CSV, JSON lines or parquet. Unset: simulated clips.")
    parser.add_argument("--judge", default="sandbox", help="Anything that `load_judge` knows.")
    parser.add_argument("--options", type=json.loads, default={}, help="Options of the judge, as a JSON object.")
    parser.add_argument("--output", type=Path, default=Path("outputs/scores/scores.csv"), help="Table to write.")
    args = parser.parse_args(argv)
    table = args.table or simulated_clips(args.output.parent / "clips")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    judge = load_judge(args.judge, cache=args.output.with_suffix(".sqlite"), **args.options)
    rows = [row for row in score_table(table, args.output, judge) if row["sa"] is not None]
    for row in rows:
        print(f"sa {row['sa']:.3f}  pc {row['pc']:.3f}  {row['video']}")
    print(f"{len(rows)} videos have scores of {judge.name}, in {args.output}")


def simulated_clips(folder: Path) -> Path:
    """For each of a few motions a clip that obeys the law and one that does not, and the table of their sentences."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "prompts.csv", "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["video", "prompt"])
        for seed, motion in enumerate(("free_fall", "projectile", "pendulum", "buoyancy")):
            for violation in (None, "teleport"):
                clip = simulate(seed, motion=motion, violation=violation)
                path = write_video(folder / f"{motion}-{violation or 'lawful'}.mp4", clip.video, clip.fps)
                table.writerow([path.name, clip.prompt])
    return folder / "prompts.csv"


if __name__ == "__main__":
    main(sys.argv[1:])
