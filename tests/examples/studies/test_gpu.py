"""The prepared script for a GPU, at tiny sizes on a CPU."""

import json
from dataclasses import replace

import pytest

from tests.support.paths import EXAMPLES
from tests.support.scripts import load_script


@pytest.fixture(scope="module")
def study():
    return load_script(EXAMPLES / "studies" / "gpu.py")


def test_cases_have_names_of_their_own(study):
    assert len({case.key for case in study.cases()}) == len(study.cases())


@pytest.mark.slow
def test_every_part_runs_and_is_kept(study, tmp_path, monkeypatch):
    cases = [case for case in study.cases() if not case.compiled and case.model == "1.3B"]
    cases = [replace(case, attention="_native_math") if case.attention else case for case in cases]
    cases.append(study.Case("1.3B", "a back end that is not there", attention="none such"))
    monkeypatch.setattr(study, "cases", lambda: cases)
    monkeypatch.setattr(study, "MODELS", {"1.3B": study.MODELS["1.3B"]})
    here = ["--output_dir", str(tmp_path), "--tiny"]
    study.main([*here, "--plan"])
    study.main([*here, "--minutes", "0"])  # nothing but the device
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["passed over"]) >= {case.key for case in cases} and results["device"]["matmul_flops_per_s"] > 0
    study.main(here)
    results = json.loads((tmp_path / "results.json").read_text())
    assert "none such" in results["1.3B, a back end that is not there"]["error"]
    planned = json.loads((tmp_path / "plan.json").read_text())
    for key, expected in planned.items():
        if "not there" not in key:
            found = results[key]
            assert found["seconds"] > 0 and found["flops"] == expected["flops"]
            # Without what a loader brings; the moments of AdamW included.
            assert 0.85 * expected["peak"] < found["peak"] < 1.05 * expected["peak"], key
    times = {key: results[key]["seconds"] for key in planned if "not there" not in key}
    study.main(here)  # what is there is kept
    again = json.loads((tmp_path / "results.json").read_text())
    assert {key: again[key]["seconds"] for key in times} == times
