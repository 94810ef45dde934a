# /// script
# requires-python = ">=3.10"
# dependencies = ["video-trl"]
# ///
"""
Time and memory of encoded datasets, trainers on them, and stages of a curation, from a hundred rows to a million.

    python examples/studies/scale.py --rows 100 10000 1000000 --output_dir outputs/scale

- `trainer`: opening an encoded dataset and making a trainer on it. All rows are in the index, each with tensors of its
  own; only those of the first 64 rows are on the disk, since making a trainer reads no others.
- `shards`: writing tensors of 4 KiB, one a row. Of a million rows it takes 4 GB of disk.
- `stage`: a stage of a curation that squares a number, in batches of 500 rows, and the same again, when all of it is
  there.

Each part and size in a process of its own. CPU seconds, and peaks of resident memory above what the process had;
pages of files that are mapped into memory count there, and are named apart. Linux only: it reads /proc.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path


NUM_REJECTED = 3
ON_DISK = 64
PARTS = ("trainer", "shards", "stage")


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


def trainer(directory: Path) -> dict[str, float]:
    """Opening the dataset, and making a trainer on it."""
    from video_trl import VideoGroupDPOConfig, VideoGroupDPOTrainer
    from video_trl.data import EncodedDataset
    from video_trl.sandbox import load_sandbox

    transformer = load_sandbox().pipeline.transformer
    args = VideoGroupDPOConfig(str(directory / "run"), report_to="none", use_cpu=True, bf16=False)
    measured = Measured()
    dataset = EncodedDataset(directory)
    opened = measured.seconds()
    made_trainer = VideoGroupDPOTrainer(transformer, args, dataset)
    made = measured.seconds()
    next(iter(made_trainer.get_train_dataloader().batch_sampler))
    found = {"opened, CPU s": opened, "trainer made, CPU s": made, "first batch drawn, CPU s": measured.seconds()}
    return found | measured.memory()


def shards(directory: Path, number: int) -> dict[str, float]:
    """Writing one tensor a row."""
    import torch

    from video_trl.data.encoding import store

    tensor, measured = torch.zeros(1, 16, 8, 8), Measured()
    with store.EncodedWriter(directory / "shards", "video", "scale", encoder="wan", fps=8.0) as writer:
        for row in range(number):
            writer.add(f"videos/{row:032x}", tensor + row)
        found = {"shards written, CPU s": measured.seconds()} | measured.memory()
        writer.add("prompts/0", torch.zeros(16, 64))
        writer.finish([{"prompt": "", "prompt_embeds": "prompts/0", "video": "videos/" + 32 * "0"}], [])
    shutil.rmtree(directory / "shards")
    return found


def stage(directory: Path, number: int) -> dict[str, float]:
    """A stage over so many rows, and the same when it is done."""
    import pyarrow as pa

    from video_trl.curation.engine.manifest import Stage, new_manifest, run_stage

    def squares(batch: dict[str, list[float]]) -> dict[str, list[float]]:
        return {"square": [value**2 for value in batch["x"]]}

    columns = {"source_id": [f"clip {row}" for row in range(number)], "x": [float(row) for row in range(number)]}
    table = new_manifest(columns, {"source_id": pa.string(), "x": pa.float64()})
    of_squares = Stage("squares", squares, {"square": pa.float64()}, "source_id", batch_size=500)
    measured = Measured()
    run_stage(table, of_squares, directory / "stage")
    first = measured.seconds()
    run_stage(table, of_squares, directory / "stage")
    again = measured.seconds() - first
    shutil.rmtree(directory / "stage")
    return {"stage, CPU s": first, "stage again, CPU s": again} | measured.memory()


class Measured:
    """CPU seconds, and MiB of resident memory at its peak, over those when this was made."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # starts the record of the peak anew
        self._before, self._files = self._resident("VmRSS"), self._resident("RssFile")
        self._start = time.process_time()

    def seconds(self) -> float:
        return time.process_time() - self._start

    def memory(self) -> dict[str, float]:
        return {
            "peak memory, MiB": self._resident("VmHWM") - self._before,
            "of it mapped files": self._resident("RssFile") - self._files,
        }

    def _resident(self, field: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100, 10_000, 1_000_000])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/scale"))
    parser.add_argument("--here", action="store_true", help="measure the first part and size in this process")
    args = parser.parse_args(argv)
    if args.here:
        part, number = args.parts[0], args.rows[0]
        directory = args.output_dir / str(number)
        sized = {"shards": shards, "stage": stage}
        found = trainer(directory) if part == "trainer" else sized[part](directory, number)
        sys.stdout.write(json.dumps(found) + "\n")
        return
    for part in args.parts:
        for number in args.rows:
            directory, found = args.output_dir / str(number), {"part": part, "rows": number}
            if part == "trainer" and not (directory / "index.json").is_file():
                found["index written, CPU s"] = write_dataset(directory, number)
                found["index, MiB"] = sum(path.stat().st_size for path in directory.glob("*.arrow")) / 2**20
            command = [sys.executable, __file__, "--here", "--parts", part, "--rows", str(number)]
            command += ["--output_dir", str(args.output_dir)]
            line = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
            sys.stdout.write(json.dumps(found | json.loads(line)) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
