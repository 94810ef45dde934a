"""The tests of the mathematics notice what can be changed in it: 95 % of all changes at least. Slow, in pieces."""

import subprocess
import sys

import pytest

from tests.support.mutants import SUBJECTS, mutants_of
from tests.support.mutants_without_effect import WITHOUT_EFFECT
from tests.support.paths import ROOT


pytestmark = pytest.mark.slow
LINES = 150  # of a file in a piece: some fifty changes
PIECES = [
    pytest.param(path, part, parts, id=f"{path.removeprefix('video_trl/')}-{part}")
    for path in SUBJECTS
    for parts in [1 + (ROOT / path).read_text(encoding="utf-8").count("\n") // LINES]
    for part in range(parts)
]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("path", "part", "parts"), PIECES)
def test_changes_of_the_mathematics_are_noticed(path, part, parts):
    command = [sys.executable, "-m", "tests.support.mutants", path, "--part", str(part), "--parts", str(parts)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]


def test_changes_without_effect_are_changes():
    """A line of the list that no change makes any more has to go."""
    for path, reasons in WITHOUT_EFFECT.items():
        lines = {mutant.after for mutant in mutants_of(path)}
        assert not {line for changed in reasons.values() for line in changed} - lines, path
