# /// script
# requires-python = ">=3.10"
# dependencies = ["video-trl"]
# ///
"""
Clips per second of the first three stages of GT-Pair, against decoding the same files and doing nothing with them.

    python examples/studies/gt_pair_speed.py

Seconds are processor time, of all threads together: clips/s are those of one core, and other work on the machine
changes them little. Processes share nothing but the disk.
"""

import argparse
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from video_trl.curation import GTPairConfig, Shard
from video_trl.curation.clips.sources import list_clips
from video_trl.curation.engine.manifest import kept_rows
from video_trl.curation.gt_pair.pipeline import acquire, filter_clips, normalise
from video_trl.data import read_video, write_video
from video_trl.data.video_io import decode_video
from video_trl.sandbox.data.labelled_clips import make_footage


LIMIT = "decoding alone"


def timed(function: Callable[[], object]) -> float:
    """Seconds of processor time."""
    start = time.process_time()
    function()
    return time.process_time() - start


def run_once(folder: Path, files: list[Path], targets: list[np.ndarray]) -> dict[str, float]:
    """Processor time of each step for all files; stages write into a new folder, where nothing is done yet."""
    took = {LIMIT: timed(lambda: [sum(1 for _ in decode_video(path)) for path in files])}
    config = GTPairConfig(sources=[str(files[0].parent)])
    shard = Shard(0, 1)
    with tempfile.TemporaryDirectory(dir=folder) as run:
        root, start = Path(run), time.process_time()
        table = acquire(list_clips(config.sources, spool=root), config, root, shard, needs_prompt=False)
        took["1. acquisition"] = time.process_time() - start
        start = time.process_time()
        table = filter_clips(table, config, root, shard)
        took["2. filtering"] = time.process_time() - start
        start = time.process_time()
        table = normalise(table, config, root, shard)
        took["3. normalisation"] = time.process_time() - start
        assert len(kept_rows(table)) == len(files), "the footage of this benchmark is good"
        took["stages 1 to 3"] = sum(seconds for name, seconds in took.items() if name != LIMIT)
        took["encoding of stage 3 alone"] = timed(
            lambda: [write_video(root / "out.mp4", video, config.fps) for video in targets]
        )
    return took


def table(runs: list[dict[str, float]], clips: int) -> str:
    """Markdown: medians over the runs, with the smallest and the largest."""
    lines = ["| step | clips/s per core, median [lowest, highest] | time against decoding alone |", "|---|---|---|"]
    for name in runs[0]:
        speeds = [clips / run[name] for run in runs]
        ratios = [run[name] / run[LIMIT] for run in runs]
        cells = f"{np.median(speeds):.2f} [{min(speeds):.2f}, {max(speeds):.2f}] | {np.median(ratios):.2f} x"
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the speed of GT-Pair's stages.")
    parser.add_argument("--clips", type=int, default=3, help="files in each run")
    parser.add_argument("--runs", type=int, default=7, help="repetitions")
    parser.add_argument("--height", type=int, default=720, help="of the files, in pixels")
    parser.add_argument("--width", type=int, default=1280, help="of the files, in pixels")
    parser.add_argument("--fps", type=float, default=30.0, help="of the files")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        files = []
        for seed in tqdm(range(options.clips), desc="Drawing footage", unit="clip"):
            kind = ("balls", "camera_pan")[seed % 2]
            clip = make_footage(kind, seed, height=options.height, width=options.width, fps=options.fps)
            files.append(write_video(folder / "clips" / f"{seed}.mp4", clip.video, clip.fps, crf=18))
        targets = [read_video(path, num_frames=81, fps=16, height=720, width=1280) for path in files]
        run_once(folder, files, targets)  # not counted: imports and the disk's cache
        runs = [run_once(folder, files, targets) for _ in tqdm(range(options.runs), desc="Measuring", unit="run")]
        size = sum(path.stat().st_size for path in files) / len(files) / 2**20
    print(
        f"{options.clips} clips of {options.width}x{options.height}, {options.fps:g} fps, 5.3 s, H.264 of {size:.1f} "
        f"MiB; {options.runs} runs\n\n{table(runs, options.clips)}"
    )


if __name__ == "__main__":
    main()
