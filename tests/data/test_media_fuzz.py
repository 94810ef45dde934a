"""Damaged media files: none ends the process, hangs, takes the machine's memory, or is lost from the books."""

import json
import subprocess
import sys
from collections import Counter

import pytest

from tests.support.data.media import CONTAINERS
from tests.support.data.media_fuzz import MUTATIONS, damaged, seed_files
from tests.support.paths import ROOT


# Seconds of the processor for a file of a few kilobytes that is read three times.
LONGEST = 20
# Seconds of the clock for all files of a test: a hang, on a machine that does other things as well.
HANG = 1500
# Of the process; torch and the codecs are about 500 MB of it.
MOST_MEGABYTES = 1500


def run(folder, first, last):
    command = [sys.executable, "-m", "tests.support.data.media_fuzz", str(folder), str(first), str(last)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"ended with {done.returncode} after {rows[-1:]}: {done.stderr[-2000:]}"
    return rows


def check(rows, count):
    assert len(rows) == count
    assert [row for row in rows if row["fate"].startswith("PAST") or "unmeasured" in row["fate"]] == []
    assert max(row["seconds"] for row in rows) < LONGEST and max(row["megabytes"] for row in rows) < MOST_MEGABYTES
    fates = Counter(row["fate"] == "read" for row in rows)
    assert fates[True] > 0.02 * count and fates[False] > 0.3 * count  # neither all refused nor all let through


@pytest.mark.timeout(HANG + 100)
def test_every_kind_of_damage_in_every_container(tmp_path):
    count = len(CONTAINERS) * len(MUTATIONS)
    rows = run(tmp_path, 0, count)
    assert len({(row["of"], row["mutation"]) for row in rows}) == count
    check(rows, count)


def test_damage_is_the_same_every_time(tmp_path):
    paths = seed_files(tmp_path)
    assert damaged(paths, 7) == damaged(paths, 7) != damaged(paths, 7 + len(paths))


@pytest.mark.slow
@pytest.mark.timeout(HANG + 100)
@pytest.mark.parametrize("part", range(25))
def test_thousands_of_damaged_files(tmp_path, part):
    """In pieces of about a minute."""
    check(run(tmp_path, 1000 + 100 * part, 1100 + 100 * part), 100)
