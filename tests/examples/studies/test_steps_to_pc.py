"""The rule by which a way to draw timesteps is said to be faster."""

import numpy as np
import pytest

from tests.support.paths import EXAMPLES
from tests.support.scripts import load_script


@pytest.fixture(scope="module")
def study():
    load_script(EXAMPLES / "studies" / "preferences.py", "preferences")  # its neighbour, by its bare name
    return load_script(EXAMPLES / "studies" / "steps_to_pc.py", "steps_to_pc")


@pytest.mark.parametrize(
    ("means", "steps"),
    [
        ([0.45, 0.55, 0.75], 30),  # on the straight line
        ([0.45, 0.85, 0.5], 10),  # the first time
        ([0.45, 0.5, 0.6], 40),  # not reached
        ([0.7, 0.8, 0.9], 1),  # there from the start
    ],
)
def test_steps_are_those_at_which_the_target_is_first_reached(study, means, steps):
    assert study.steps_to(0.65, np.array(means)) == pytest.approx(steps)


def test_a_way_that_is_twice_as_fast_for_every_sentence_has_an_interval_at_a_half(study):
    slow = np.linspace(0.25, 1.05, 6)[:, None] + np.linspace(-0.01, 0.01, 8)
    fast = np.concatenate([slow[::2], slow[-1:].repeat(3, axis=0)])
    line = study.rows(dict(zip(study.DRAWS, (slow, fast), strict=True)), resamples=50)[1]
    assert line.endswith("| 25 | 0.50 | 0.50 to 0.50 |")
