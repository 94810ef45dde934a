"""The tests of losses, noise processes and curation notice a fixed sample of what can be changed in them."""

import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.support.mutants import ONE_OF, SUBJECTS, mutants_of, sample_of
from tests.support.mutants_without_effect import WITHOUT_EFFECT
from tests.support.paths import ROOT


pytestmark = pytest.mark.slow
SAMPLED = [path for path in SUBJECTS if path.startswith(tuple(ONE_OF))]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("path", SAMPLED)
def test_changes_in_the_sample_are_noticed(path):
    """All of them: one that nothing notices gets a test, or its reason into the list of those without effect."""
    if not any(mutant.reason is None for mutant in sample_of(path)):
        return
    if path.endswith("/ray.py") and find_spec("ray") is None:
        pytest.skip("needs video-trl[ray]")
    command = [sys.executable, "-m", "tests.support.mutants", path, "--sample"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3600)
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]


def test_the_sample_is_large_and_few_of_it_have_no_effect():
    sample = [mutant for path in SAMPLED for mutant in sample_of(path)]
    assert len(sample) >= 60 and {mutant.kind for mutant in sample} >= {"sign", "off by one", "swapped arguments"}
    assert sum(mutant.reason is not None for mutant in sample) <= 0.05 * len(sample)


def test_every_file_with_something_to_change_has_its_tests():
    folders = [path for path in ONE_OF if path.endswith("/")]
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py") if file.name != "__init__.py"]
    assert {file.relative_to(ROOT).as_posix() for file in files} <= set(SUBJECTS)


def test_changes_without_effect_are_changes():
    """A line of the list that no change makes any more has to go."""
    for path, reasons in WITHOUT_EFFECT.items():
        lines = {mutant.after for mutant in mutants_of(path)}
        assert not {line for changed in reasons.values() for line in changed} - lines, path
