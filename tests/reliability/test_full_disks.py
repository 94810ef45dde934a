"""A disk that is full, at each step of writing: an error that says so, nothing half written, and then the rest."""

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.reliability.kills import Work, forked, leftovers
from tests.support.reliability.works import WORKS


NAMES = [name for name in WORKS if name not in ("training, 2 processes", "evaluation")]


def run(work: Work, folder: Path, limit: int | None = None) -> int:
    """Exit code of a process that does the work; no file of it can grow beyond the limit, as under a quota."""

    def limited(place: Path, rank: int) -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            sys.stderr = open(os.devnull, "w")
        work.start(place, rank)

    process = forked(limited, folder, 0)
    process.join()
    return process.exitcode


@pytest.mark.parametrize("name", NAMES)
def test_a_quota_at_each_writing_step(tmp_path, name):
    """The limits are the sizes of what is written: under each of them another file fails."""
    work, straight = WORKS[name], tmp_path / "straight"
    straight.mkdir()
    work.prepare(straight)
    before = {path: path.stat().st_size for path in straight.rglob("*") if path.is_file()}
    assert run(work, straight) == 0
    written = [path for path in straight.rglob("*") if path.is_file() and path not in before]
    sizes = sorted({path.stat().st_size for path in written} - {0})
    place = tmp_path / "limited"
    place.mkdir()
    work.prepare(place)
    codes = [run(work, place, size - 1) for size in (sizes[0], sizes[len(sizes) // 2], sizes[-1])]
    assert codes[0] == 1 and set(codes) <= {0, 1}
    assert run(work, place) == 0
    assert work.result(place) == work.result(straight) and not leftovers(place)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system in memory that is soon full; only root can mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk_and_then_room(tmp_path, small_disk, name):
    work, straight = WORKS[name], tmp_path / "straight"
    straight.mkdir()
    work.prepare(straight)
    assert run(work, straight) == 0
    work.prepare(small_disk)
    filler = small_disk / "filler"
    room = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize
    codes = []
    for left in (0, 8_000, 40_000, 150_000):
        filler.write_bytes(bytes(max(room - left, 0)))
        codes.append(run(work, small_disk))
        filler.unlink()
        room = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize
    assert codes[0] == 1
    assert run(work, small_disk) == 0
    assert work.result(small_disk) == work.result(straight) and not leftovers(small_disk)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_disk_that_cannot_be_written_to(small_disk, name):
    work = WORKS[name]
    work.prepare(small_disk)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    before = sorted(small_disk.rglob("*"))
    assert run(work, small_disk) == 1
    assert sorted(small_disk.rglob("*")) == before
