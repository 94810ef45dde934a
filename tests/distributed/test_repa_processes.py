"""Two processes align as one does: the head lies inside the forward that distributed training watches."""

import json

import pytest
import safetensors.torch
import torch
from packaging.version import Version

from tests.support import rounding
from tests.support.distributed import joint_worker
from tests.support.distributed.launch import launch, launch_forked
from tests.support.distributed.repa_worker import run


def test_two_processes_compute_the_step_of_one(tmp_path):
    launch_forked("repa_worker.py", tmp_path)
    # A thread of gloo that is at work when Python ends is killed, and the process with it: none may be left by then.
    running, *ended = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("running", "threads-0", "threads-1")
    )
    assert any("gloo" in name for name in running) or Version(torch.__version__) < Version("2.7")  # without names
    assert not [name for names in ended for name in names if "gloo" in name]
    log, recorder = run(tmp_path / "alone", per_device_train_batch_size=2)
    gradients = safetensors.torch.load_file(tmp_path / "gradients.safetensors")
    assert sum(name.startswith("trained_head.") for name in gradients) == 8
    # The head is float32, and what it makes of the hidden states too.
    rounding.assert_close_weights(gradients, recorder.steps[0], rounding.SINGLE)
    for entry, expected in zip(json.loads((tmp_path / "log.json").read_text()), log, strict=True):
        for name in ("loss", "loss/diffusion", "loss/alignment", "trd/spatial", "trd/temporal", "trd/raw"):
            assert entry[name] == pytest.approx(expected[name], rel=1e-3), name


@pytest.mark.slow
def test_the_joint_objective_video_by_video_is_that_of_one_process(tmp_path):
    """The head is used by chosen videos alone, the last of which is in the pass that averages gradients."""
    launch("joint_worker.py", tmp_path)
    recorder = joint_worker.run(tmp_path / "alone", per_device_train_batch_size=2)
    for number, expected in enumerate(recorder.steps):
        gradients = safetensors.torch.load_file(tmp_path / f"gradients-{number}.safetensors")
        assert sum("trained_head." in name for name in gradients) == 6
        rounding.assert_close_weights(gradients, expected, 1e-3)
