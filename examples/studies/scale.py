# /// script
# requires-python = ">=3.10"
# dependencies = ["video-trl"]
# ///
"""
Time and memory of opening an encoded dataset and making a trainer on it, from a hundred rows to a million.

    python examples/studies/scale.py --rows 100 10000 1000000 --output_dir outputs/scale

Each size is measured in a process of its own. All rows are in the index, each with tensors of its own; only those of
the first 64 rows are on the disk, since making a trainer reads no others.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path


NUM_REJECTED = 3
ON_DISK = 64


def write_dataset(directory: Path, number: int) -> float:
    """A group dataset of so many rows; seconds that writing its index took."""
    import torch

    from video_trl.data.encoding import index, store

    def names(row: int) -> list[str]:
        return [f"videos/{row:032x}-{part}" for part in range(1 + NUM_REJECTED)]

    with store.EncodedWriter(directory, "group", "scale", encoder="wan", fps=8.0) as writer:
        for row in range(min(number, ON_DISK)):
            for name in names(row):
                writer.add(name, torch.randn(16, 4, 8, 8))
        writer.add("prompts/0", torch.randn(16, 64))
        rows = [
            {
                "prompt": f"A red ball rolls to the right, take {row}.",
                "prompt_embeds": "prompts/0",
                "chosen": names(row)[0],
                "rejected": names(row)[1:],
                "rejected_scores": [[0.9, 0.1 + 0.1 * part] for part in range(NUM_REJECTED)],
            }
            for row in range(number)
        ]
        for row in range(ON_DISK, number):
            for name in names(row):
                writer._tensors[name] = ("00000.safetensors", "0" * 32, [16, 4, 8, 8])
        start = time.process_time()
        writer.finish(rows, [])
    assert (directory / index.ROWS_NAME).is_file()
    return time.process_time() - start


def measure(directory: Path) -> dict[str, float]:
    """CPU seconds and growth of peak memory of opening the dataset and making a trainer."""
    from video_trl import VideoGroupDPOConfig, VideoGroupDPOTrainer
    from video_trl.data import EncodedDataset
    from video_trl.sandbox import load_sandbox

    transformer = load_sandbox().pipeline.transformer
    args = VideoGroupDPOConfig(str(directory / "run"), report_to="none", use_cpu=True, bf16=False)
    before, start = _peak_mib(), time.process_time()
    dataset = EncodedDataset(directory)
    opened = time.process_time() - start
    trainer = VideoGroupDPOTrainer(transformer, args, dataset)
    made = time.process_time() - start
    next(iter(trainer.get_train_dataloader().batch_sampler))
    return {
        "opened, CPU s": opened,
        "trainer made, CPU s": made,
        "first batch drawn, CPU s": time.process_time() - start,
        "peak memory over that before, MiB": _peak_mib() - before,
    }


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100, 10_000, 1_000_000])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/scale"))
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure is not None:
        sys.stdout.write(json.dumps(measure(args.measure)) + "\n")
        return
    for number in args.rows:
        directory = args.output_dir / str(number)
        written = write_dataset(directory, number) if not directory.exists() else float("nan")
        size = sum(path.stat().st_size for path in directory.glob("*.arrow")) / 2**20
        command = [sys.executable, __file__, "--measure", str(directory)]
        line = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
        found = {"rows": number, "index written, CPU s": written, "index, MiB": size, **json.loads(line)}
        sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
