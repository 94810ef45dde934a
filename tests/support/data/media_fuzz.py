"""
Damage small media files in every way and read them; run as a script, since what it looks for may end the process.

    python -m tests.support.data.media_fuzz FOLDER FIRST LAST

prints one JSON line a file: its number, what was done to it, what became of it, seconds of the processor, megabytes
of the process.
"""

import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.data.media import CONTAINERS, numbered_frames, write_container
from video_trl.curation.clips.container import read_containers
from video_trl.curation.clips.measures import measure_batch
from video_trl.data import VideoDecodeError, read_video


Rng = np.random.Generator
_EXTREMES = [0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]


def seed_files(folder: Path) -> list[Path]:
    """A good file of every container: half a second with texture, so that most bytes are pictures."""
    video = numbered_frames(15)
    video[:, 10:38] = np.random.default_rng(0).integers(0, 256, (15, 28, 64, 3), dtype=np.uint8)
    paths = []
    for name in CONTAINERS:
        done = folder / f"{name}.{CONTAINERS[name][0]}"
        paths.append(done if done.is_file() else write_container(folder, name, video, Fraction(30)))
    return paths


def _flip_bits(data: bytearray, rng: Rng, low: int, high: int) -> None:
    for place in rng.integers(low, high, int(2 ** rng.uniform(0, 6))):
        data[place] ^= 1 << int(rng.integers(8))


def _extremes(data: bytearray, rng: Rng, low: int, high: int) -> None:
    """Lengths, counts and sizes of headers become the smallest and largest ones."""
    for place in rng.integers(low, high, int(rng.integers(1, 6))):
        width = int(rng.choice([1, 2, 4]))
        value = _EXTREMES[int(rng.integers(len(_EXTREMES)))] % (1 << 8 * width)
        data[place : place + width] = value.to_bytes(width, rng.choice(["big", "little"]))


def _block(data: bytearray, rng: Rng, low: int, high: int) -> None:
    start = int(rng.integers(low, high))
    length = int(2 ** rng.uniform(2, 11))
    data[start : start + length] = rng.bytes(length) if rng.random() < 0.5 else bytes(length)


def _cut(data: bytearray, rng: Rng, low: int, high: int) -> None:
    del data[int(rng.integers(low, high)) :]


def _take_out(data: bytearray, rng: Rng, low: int, high: int) -> None:
    start = int(rng.integers(low, high))
    del data[start : start + int(2 ** rng.uniform(0, 10))]


def _repeat(data: bytearray, rng: Rng, low: int, high: int) -> None:
    start = int(rng.integers(low, high))
    data[start:start] = data[start : start + int(2 ** rng.uniform(0, 10))]


MUTATIONS: tuple[Callable[[bytearray, Rng, int, int], None], ...] = (
    _flip_bits, _extremes, _block, _cut, _take_out, _repeat,
)  # fmt: skip


def damaged(paths: list[Path], number: int) -> tuple[Path, str, bytes]:
    """The seed file, the kind of damage and the bytes of a number; always the same ones."""
    rng = np.random.default_rng(number)
    path, mutation = paths[number % len(paths)], MUTATIONS[number // len(paths) % len(MUTATIONS)]
    data = bytearray(path.read_bytes())
    # Headers are a small part of a file and decide most: half of the damage goes to the first and last kilobyte.
    where = rng.random()
    low, high = (0, 1024) if where < 0.35 else (len(data) - 1024, len(data)) if where < 0.5 else (0, len(data))
    mutation(data, rng, max(low, 0), min(high, len(data)))
    return path, mutation.__name__.strip("_"), bytes(data)


def fate(source: dict[str, Any], path: Path) -> str:
    """What reading makes of it: "read", the kind of a `VideoDecodeError`, or the name of what got past."""
    kinds = set()
    try:
        read_video(source, fps=20)
    except VideoDecodeError as error:
        assert str(path) in str(error)
        kinds.add(error.kind)
    batch = {"path": [str(path)], "offset": [None], "length": [None]}
    for stage in (read_containers, measure_batch):
        (verdict,) = stage(batch)["dropped_by"]
        kinds |= {verdict} - {None}
    return " ".join(sorted(kinds)) or "read"


def outcomes(folder: Path, numbers: range) -> Iterator[dict[str, Any]]:
    paths = seed_files(folder / "good")
    for number in numbers:
        seed, mutation, data = damaged(paths, number)
        path = folder / f"{number}{seed.suffix}"
        path.write_bytes(data)
        begun = time.process_time()
        try:
            result = fate({"path": str(path), "bytes": data}, path)
        except Exception:
            result = "PAST " + traceback.format_exc(limit=-3)
        seconds = round(time.process_time() - begun, 2)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        yield {"file": path.name, "of": seed.stem, "mutation": mutation, "fate": result} | {
            "seconds": seconds, "megabytes": memory,
        }  # fmt: skip
        if not result.startswith("PAST"):
            os.unlink(path)


if __name__ == "__main__":
    first, last = int(sys.argv[2]), int(sys.argv[3])
    for outcome in outcomes(Path(sys.argv[1]), range(first, last)):
        sys.stdout.write(json.dumps(outcome) + "\n")
        sys.stdout.flush()
