"""An evaluator runs on one process; all of them know what it measured, and none waits for ever when it fails."""

import json

import pytest

from tests.support.distributed.launch import launch


@pytest.mark.slow
def test_what_it_measures_and_that_it_failed_is_known_to_all(tmp_path):
    launch("evaluator_worker.py", tmp_path, seconds=200)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["calls"] == [1, 2, 3] and second["calls"] == []
    assert first["best"] == second["best"] == 0.2
    assert first["failure"] == "ConnectionError: the judge's server does not answer"
    assert second["failure"].startswith("RuntimeError: The evaluator failed on the main process")
    assert "does not answer" in second["failure"]
