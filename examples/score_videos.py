# /// script
# requires-python = ">=3.11"
# dependencies = ["video-trl[judges]"]
# ///
"""
Judge a folder of videos: semantic adherence and physical commonsense of each, as a table.

Without arguments it simulates a few clips, lawful and not, and lets the sandbox's exact judge score them:

    python examples/score_videos.py

With a folder and a CSV with the columns video (a path in the folder) and prompt it judges these, by any judge:

    python examples/score_videos.py --videos clips --prompts prompts.csv --judge videophy2 --output scores.parquet
    python examples/score_videos.py --videos clips --prompts prompts.csv --judge http://localhost:8000/v1 \
        --options '{"model": "Qwen/Qwen3-VL-8B-Instruct"}'

Scores are remembered in a file beside the output, so that a run that was stopped, or one with more videos, goes on
where it was. `load_judge("scores.parquet")` reads the table as a judge.
"""

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any


OUTPUT_SUFFIXES = (".csv", ".jsonl", ".parquet")
DEMO_MOTIONS = ("free_fall", "projectile", "pendulum", "buoyancy")


def main(argv: list[str]) -> None:
    args = parse(argv)
    from tqdm import tqdm

    from video_trl.data.video_io import VideoDecodeError, video_hash
    from video_trl.load import load_judge

    folder, table = (args.videos, args.prompts) if args.videos else simulated_clips(args.output.parent / "clips")
    rows = read_prompts(table, folder)
    cache = args.output.with_name(args.output.stem + "-cache.sqlite")
    judge = load_judge(args.judge, cache=cache, **args.options)
    print(f"{len(rows)} videos, judge {judge.name}")
    results: list[dict[str, Any]] = []
    for start in tqdm(range(0, len(rows), args.batch_size), unit="batch", disable=None):
        batch = rows[start : start + args.batch_size]
        for row in batch:
            try:
                row["video_hash"] = video_hash(folder / row["video"])
            except VideoDecodeError as error:
                raise SystemExit(f"{error}") from None
        scores = judge.score([folder / row["video"] for row in batch], [row["prompt"] for row in batch])
        results += [row | score for row, score in zip(batch, scores, strict=True)]
    failed = write_scores(args.output, results, judge.identity)
    scored = [row for row in results if row["sa"] is not None]
    if scored:
        sa, pc = (sum(row[key] for row in scored) / len(scored) for key in ("sa", "pc"))
        print(f"mean sa {sa:.3f}, mean pc {pc:.3f} of {len(scored)} videos, in {args.output}")
    if failed:
        raise SystemExit(f"{len(failed)} videos have no score, see {args.output}; the first: {failed[0]['error']}")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=Path, help="Folder of the videos. Unset: simulated clips.")
    parser.add_argument("--prompts", type=Path, help="CSV with the columns video and prompt.")
    parser.add_argument("--judge", default="sandbox", help="Anything that `load_judge` knows.")
    parser.add_argument("--options", type=json.loads, default={}, help="Options of the judge, as a JSON object.")
    parser.add_argument("--output", type=Path, default=Path("outputs/scores/scores.csv"), help="Table to write.")
    parser.add_argument("--batch_size", type=int, default=16, help="Videos given to the judge together.")
    args = parser.parse_args(argv)
    if (args.videos is None) != (args.prompts is None):
        parser.error("--videos and --prompts go together")
    if args.output.suffix not in OUTPUT_SUFFIXES:
        parser.error(f"--output must end in {', '.join(OUTPUT_SUFFIXES)}, got {args.output}")
    if not isinstance(args.options, dict):
        parser.error(f"--options must be a JSON object, got {args.options!r}")
    if args.batch_size < 1:
        parser.error(f"--batch_size must be positive, got {args.batch_size}")
    return args


def read_prompts(table: Path, folder: Path) -> list[dict[str, Any]]:
    """Rows with `video` and `prompt`; refuses missing columns and missing files before a judge is loaded."""
    with open(table, encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"video", "prompt"} <= rows[0].keys():
        raise SystemExit(
            f"{table}: expected rows with the columns video and prompt, got {list(rows[0]) if rows else []}."
        )
    missing = [row["video"] for row in rows if not (folder / row["video"]).is_file()]
    if missing:
        raise SystemExit(f"{folder} lacks {len(missing)} of {len(rows)} videos: {', '.join(missing[:10])}.")
    return [{"video": row["video"], "prompt": row["prompt"]} for row in rows]


def write_scores(path: Path, results: list[dict[str, Any]], identity: str) -> list[dict[str, Any]]:
    """Write the table, what a judge adds as JSON in the column `details`; returns the rows without a score."""
    plain = ("video", "video_hash", "prompt", "sa", "pc")
    rows = []
    for result in results:
        details = {name: value for name, value in result.items() if name not in plain}
        rows.append({name: result[name] for name in plain} | {"judge": identity, "details": json.dumps(details)})
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with open(path, "w", encoding="utf-8", newline="") as file:
            if path.suffix == ".csv":
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
            else:
                file.writelines(json.dumps(row) + "\n" for row in rows)
    return [result for result in results if result["sa"] is None]


def simulated_clips(folder: Path) -> tuple[Path, Path]:
    """For each of a few motions a clip that obeys the law and one that does not, and the table of their sentences."""
    from video_trl.data.video_io import write_video
    from video_trl.sandbox import simulate

    rows = []
    for seed, motion in enumerate(DEMO_MOTIONS):
        for violation in (None, "teleport"):
            clip = simulate(seed, motion=motion, violation=violation)
            name = f"{motion}-{violation or 'lawful'}.mp4"
            write_video(folder / name, clip.video, clip.fps)
            rows.append({"video": name, "prompt": clip.prompt})
    table = folder / "prompts.csv"
    with open(table, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder, table


if __name__ == "__main__":
    main(sys.argv[1:])
