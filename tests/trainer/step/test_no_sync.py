"""Between two logs, no trainer makes the host wait for the device: shown on a device that writes waits down."""

import json
from pathlib import Path

import pytest
from torch.utils import backend_registration

from tests.support import forks


# What such a device is made with came after torch 2.6.
if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
    pytest.skip("this torch has no devices written in Python", allow_module_level=True)

FAST = ("sft", "dpo cogvideox-t2v", "reg-dpo sequential", "group-dpo", "repa")
SLOW = ("dpo wan-t2v", "dpo wan-i2v", "dpo cogvideox-i2v", "group-dpo full")


def waits(directory: Path, *names: str) -> dict[str, dict[str, list]]:
    """What `host_reads` reports; it registers a backend, which a process cannot take back."""
    process = forks.start("-m", "tests.support.trainer.host_reads", str(directory), *names)
    assert process.wait() == [0], process.errors[-3000:]
    return json.loads(process.output.splitlines()[-1])


def check(report: dict[str, list]) -> None:
    first, second, third = report["steps"]
    # The start of a run makes constants: the sum of losses, the noise schedule. Two results are read, once: norms of
    # the weights, and the errors of policy and reference, which must agree.
    proofs = tuple(f"copy from watched to cpu at {file}.py:" for file in ("preference_trainer", "passes"))
    assert all(wait.startswith(("copy from cpu to watched at ", *proofs)) for wait in first)
    assert second == third == []
    # The log looks at the losses, the gradient norm and the metrics: the device does write waits down.
    places = " ".join(report["log"])
    assert "nan_guard.py" in places and "aten._local_scalar_dense" in places


def test_no_step_waits_for_the_device(tmp_path):
    reports = waits(tmp_path, *FAST, "with a reader")
    assert set(reports) == {*FAST, "with a reader"}
    reader = reports.pop("with a reader")
    assert [len(step) for step in reader["steps"][1:]] == [1, 1]
    for report in reports.values():
        check(report)


@pytest.mark.slow
def test_no_step_of_the_other_families_waits_for_the_device(tmp_path):
    reports = waits(tmp_path, *SLOW)
    assert set(reports) == set(SLOW)
    for report in reports.values():
        check(report)
