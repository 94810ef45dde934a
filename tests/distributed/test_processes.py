"""
Two processes with gloo compute what one computes: gradients, metrics, checkpoints, and when to stop.

The weights are float64, so that rounding hides nothing; see tests/support/rounding.py for what is left of it.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from tests.support import rounding
from tests.support.distributed.launch import launch_forked
from tests.support.rounding import assert_close_weights
from tests.support.tiny import tiny_encoded_group, tiny_wan_pipeline
from tests.support.trainer.heads import head_trainer
from tests.support.trainer.runs import (
    SMOOTH_ADAM,
    RecordGradients,
    assert_equal_weights,
    config,
    double,
    losses,
    mixed_shapes,
    trained_weights,
    trainer,
)
from video_trl.trainer.step.reference_errors import load_errors


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    """Folder with what two processes have written; `alone` in it is a checkpoint of one process to resume from."""
    directory = tmp_path_factory.mktemp("two")
    alone(directory / "alone", save_strategy="steps", save_steps=3)
    launch_forked("worker.py", directory)
    return directory


def alone(directory: Path, resume: Path | None = None, **settings: Any):
    """The same run in this process, with batches of four; with the gradients of its steps."""
    recorder = RecordGradients()
    data = {name: settings.pop(name) for name in ("train_dataset", "eval_dataset") if name in settings}
    defaults = {"per_device_train_batch_size": 4, "max_steps": 6, "max_grad_norm": 0.0, **SMOOTH_ADAM}
    model = double(tiny_wan_pipeline())
    made = trainer(config(directory, **(defaults | settings)), rows=8, model=model, callbacks=[recorder], **data)
    made.train(resume_from_checkpoint=resume and str(resume))
    return made, recorder.steps


def weights_of(directory: Path, name: str, kind: str = "weights"):
    return safetensors.torch.load_file(directory / f"{name}-{kind}.safetensors")


def report_of(directory: Path, name: str) -> dict[str, Any]:
    return json.loads((directory / f"{name}.json").read_text())


@pytest.mark.parametrize("name", ["split", "accumulated", "sequential"])
def test_two_processes_compute_the_step_of_one(two_processes, tmp_path, name):
    made, gradients = alone(tmp_path, max_steps=3)
    report = report_of(two_processes, name)
    assert report["losses"][0] == pytest.approx(losses(made)[0], rel=rounding.LOGGED)
    assert_close_weights(weights_of(two_processes, name, "gradients"), gradients[0], rounding.DOUBLE)
    assert report["losses"] == pytest.approx(losses(made), rel=1e-4)
    for metric, value in made.state.log_history[0].items():
        if "/" in metric or metric in ("alpha", "gamma", "win_gap", "lose_gap"):
            assert report["log"][metric] == pytest.approx(value, rel=rounding.LOGGED, abs=rounding.LOGGED), metric


def test_two_processes_compute_the_cached_errors_of_one(two_processes, tmp_path):
    cached = {"precompute_ref_errors": 2, "cache_dir": str(tmp_path / "cache")}
    made, gradients = alone(tmp_path, max_steps=3, **cached)
    # Cached errors are float32: where float32 rounds an error to the other neighbour, `beta` (5000) multiplies that.
    errors = 5000 / 2 * 2 * rounding.DOUBLE
    assert_close_weights(weights_of(two_processes, "banked", "gradients"), gradients[0], errors)
    assert report_of(two_processes, "banked")["losses"] == pytest.approx(losses(made), rel=1e-3)
    (theirs,), (ours,) = (
        [load_errors(path) for path in folder.glob("cache/reference_errors/*")] for folder in (two_processes, tmp_path)
    )
    assert len(theirs) == len(ours) == 8
    rounding.assert_close(torch.stack(theirs), torch.stack(ours), 2 * rounding.DOUBLE)  # neighbours


def test_all_weights_are_trained_alike(two_processes, tmp_path):
    made, gradients = alone(tmp_path, max_steps=2, use_peft=False, learning_rate=1e-3)
    terms = 4 * 4 * 8  # rows, videos of a row, tokens of a video
    assert_close_weights(weights_of(two_processes, "full", "gradients"), gradients[0], rounding.sums(terms))
    assert report_of(two_processes, "full")["losses"] == pytest.approx(losses(made), rel=1e-3)


def test_evaluation_counts_every_sample_once(two_processes, tmp_path):
    """Three samples on two processes: one is evaluated twice, to fill up, and must not count twice."""
    dataset = tiny_encoded_group(3, seed=9)
    made, _ = alone(tmp_path, eval_strategy="steps", eval_steps=3, eval_dataset=dataset)
    expected = [entry for entry in made.state.log_history if "eval_loss" in entry][0]
    actual = report_of(two_processes, "watched")["evaluations"][0]
    for metric in ("eval_loss", "eval_alpha", "eval_gamma", "eval_rewards/accuracies"):
        assert actual[metric] == pytest.approx(expected[metric], rel=1e-3), metric
    for metric in ("eval_rewards/margins", "eval_rewards/chosen", "eval_win_gap"):
        assert actual[metric] == pytest.approx(expected[metric], rel=1e-3, abs=1e-3), metric


def test_rows_of_several_shapes_make_the_same_steps(two_processes, tmp_path):
    """Eleven rows, four a step: one epoch has two full steps, one of two rows, and one of a single row."""
    made, gradients = alone(tmp_path, train_dataset=mixed_shapes(), eval_dataset=mixed_shapes())
    report = report_of(two_processes, "mixed")
    assert_close_weights(weights_of(two_processes, "mixed", "gradients"), gradients[0], rounding.DOUBLE)
    assert report["losses"] == pytest.approx(losses(made), rel=1e-3)
    evaluated = made.evaluate()
    for metric in ("eval_loss", "eval_alpha"):
        assert report["evaluations"][0][metric] == pytest.approx(evaluated[metric], rel=1e-3), metric
    shrunk, _ = alone(tmp_path / "shrunk", two_processes / "mixed" / "checkpoint-3", train_dataset=mixed_shapes())
    assert_close_weights(trained_weights(shrunk), trained_weights(made), weights_bound(made, gradients))


def weights_bound(made, gradients) -> float:
    """Of the weights after all steps, relative to the largest."""
    largest = max(float(gradient.abs().max()) for step in gradients for gradient in step.values())
    settings = {"learning_rate": 1e-2, "steps": 6, "epsilon": SMOOTH_ADAM["adam_epsilon"]}
    scale = max(float(weight.abs().max()) for weight in trained_weights(made).values())
    return rounding.adam(rounding.DOUBLE * largest, **settings) / scale


def test_a_module_beside_the_transformer_is_trained_alike(two_processes, tmp_path):
    recorder = RecordGradients()
    settings = {"max_grad_norm": 0.0, "max_steps": 2, "per_device_train_batch_size": 4}
    made = head_trainer(tmp_path, rows=8, callbacks=[recorder], **SMOOTH_ADAM, **settings)
    made.train()
    gradients = weights_of(two_processes, "head", "gradients")
    assert "trained_head.layers.0.weight" in gradients
    assert_close_weights(gradients, recorder.steps[0], rounding.SINGLE)  # as such a module is
    assert report_of(two_processes, "head")["losses"] == pytest.approx(losses(made), rel=1e-3)
    saved = safetensors.torch.load_file(two_processes / "head" / "checkpoint-2" / "head.safetensors")
    assert_close_weights(saved, dict(made.trained_head.named_parameters()), 1e-3)


def test_resuming_on_as_many_processes_is_bit_exact(two_processes):
    assert_equal_weights(weights_of(two_processes, "resumed"), weights_of(two_processes, "watched"))
    assert report_of(two_processes, "resumed")["losses"] == report_of(two_processes, "watched")["losses"]


def test_resuming_on_another_number_of_processes_agrees_to_rounding(two_processes, tmp_path):
    straight, gradients = alone(tmp_path / "straight")
    shrunk, _ = alone(tmp_path / "shrunk", two_processes / "watched" / "checkpoint-3")
    bound = weights_bound(straight, gradients)
    assert bound < 1e-4  # a step moves weights by about 1e-2
    assert_close_weights(trained_weights(shrunk), trained_weights(straight), bound)
    assert_close_weights(weights_of(two_processes, "grown"), trained_weights(straight), bound)
    assert_close_weights(weights_of(two_processes, "watched"), trained_weights(straight), bound)


def test_checkpoints_and_videos_are_written_once_and_whole(two_processes):
    run = two_processes / "watched"
    own = {"video_trl_output.json", ".video_trl.lock"}
    assert {path.name for path in run.iterdir()} == {"checkpoint-3", "checkpoint-6", "samples"} | own
    names = {path.name for path in (run / "checkpoint-6").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt", "pytorch_lora_weights.safetensors"} <= names
    assert {path.name for path in (run / "samples").iterdir()} == {"step_0", "step_3", "step_6"}


def test_a_bad_sample_of_one_process_stops_both(two_processes):
    stopped = sorted(path.name for path in two_processes.glob("stopped-*"))
    step = stopped[0].rsplit("-", 1)[1]
    assert stopped == [f"stopped-0-{step}", f"stopped-1-{step}"]
    reports = [json.loads(path.read_text()) for path in sorted((two_processes / "bad").glob("non_finite_*.json"))]
    assert [report["process"] for report in reports] == [0, 1]
    assert 5 in [sample["index"] for report in reports for sample in report["samples"]]


def test_a_signal_to_one_process_ends_both_after_one_step_and_nothing_is_lost(two_processes):
    assert sorted(path.name for path in two_processes.glob("ended-*")) == ["ended-0-4-75", "ended-1-4-75"]
    assert [path.name for path in (two_processes / "ended").glob("checkpoint-*")] == ["checkpoint-4"]
    assert_equal_weights(weights_of(two_processes, "continued"), weights_of(two_processes, "watched"))


def test_all_processes_refuse_the_folder_of_another_run(two_processes):
    texts = [path.read_text() for path in two_processes.glob("refused-*")]
    assert len(texts) == 2 and all("holds another run (checkpoint-6)" in text for text in texts)
