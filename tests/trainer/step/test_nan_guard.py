"""A loss or gradient that is not finite stops the run before it does harm, and the report says where to look."""

import json

import pytest
import torch
from transformers import TrainerCallback

from tests.support.tiny import tiny_encoded_group
from tests.support.trainer.runs import StopAfter, assert_equal_weights, config, trained_weights, trainer
from video_trl.trainer.step.nan_guard import NonFiniteLossError


SAVING = {"save_strategy": "steps", "save_steps": 1}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_sample_stops_the_run_and_is_reported(tmp_path, value):
    rows = tiny_encoded_group(6)
    made = trainer(config(tmp_path, **SAVING, per_device_train_batch_size=1), train_dataset=rows)
    rows[4]["chosen_latents"][0, 0, 0, 0] = value  # after the check of all rows
    with pytest.raises(
        NonFiniteLossError, match="weights were not updated and earlier checkpoints are intact"
    ) as caught:
        made.train()
    step = made.state.global_step + 1
    report = json.loads((tmp_path / f"non_finite_step_{step}_process_0.json").read_text())
    assert report["step"] == step
    assert report["samples"] == [{"index": 4, "prompt": rows[4]["prompt"]}]
    assert str(tmp_path) in str(caught.value)
    assert all(weight.isfinite().all() for weight in trained_weights(made).values())
    if step > 1:
        assert (tmp_path / f"checkpoint-{step - 1}" / "trainer_state.json").is_file()
    assert not (tmp_path / f"checkpoint-{step}").exists()


def test_all_micro_batches_of_the_step_are_reported(tmp_path):
    rows = tiny_encoded_group(4)
    args = config(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    made = trainer(args, train_dataset=rows)
    rows[0]["chosen_latents"].fill_(float("nan"))
    with pytest.raises(NonFiniteLossError):
        made.train()
    report = json.loads((tmp_path / "non_finite_step_1_process_0.json").read_text())
    assert sorted(sample["index"] for sample in report["samples"]) == [0, 1, 2, 3]
    assert len(report["losses"]) == 4 and report["losses"].count("nan") == 1


class PoisonGradient(TrainerCallback):
    """Overwrites one gradient before the check, as an overflow in the backward pass would."""

    def on_substep_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == 1:
            next(w for w in kwargs["model"].parameters() if w.requires_grad).grad.view(-1)[0] = float("inf")


def test_a_gradient_that_is_not_finite_stops_the_run_although_the_loss_is(tmp_path):
    args = config(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    made = trainer(args, callbacks=[PoisonGradient()])
    with pytest.raises(NonFiniteLossError):
        made.train()
    assert made.state.global_step == 1
    report = json.loads((tmp_path / "non_finite_step_2_process_0.json").read_text())
    assert all(isinstance(loss, float) for loss in report["losses"])


BAD_ROW, BAD_STEP = 4, 2  # where the order of seed 42 brings this row, in batches of two


def run_into_bad_row(tmp_path, **changes):
    """A run of six steps that raises because of the second, and how many of them went through the loop."""
    rows, counted = tiny_encoded_group(6), StopAfter(100)
    made = trainer(
        config(tmp_path / "bad", heldout_evaluations=0, **changes),
        train_dataset=rows,
        eval_dataset=tiny_encoded_group(1),
    )
    rows[BAD_ROW]["chosen_latents"][0, 0, 0, 0] = float("nan")  # after the check of all rows
    made.add_callback(counted)
    with pytest.raises(NonFiniteLossError, match=f"Step {BAD_STEP}:"):
        made.train()
    report = json.loads((tmp_path / "bad" / f"non_finite_step_{BAD_STEP}_process_0.json").read_text())
    assert BAD_ROW in [sample["index"] for sample in report["samples"]] and report["losses"] == ["nan"]
    assert made.state.global_step == BAD_STEP - 1
    return made, counted.seen


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch"])
def test_from_the_bad_step_on_nothing_changes_until_the_host_looks(tmp_path, optim):
    """Weights and moments are those of a run that was stopped before it, to the last bit."""
    made, steps = run_into_bad_row(tmp_path, optim=optim, logging_steps=5)
    assert steps == (5 if optim == "adamw_torch_fused" else BAD_STEP - 1)
    good = trainer(config(tmp_path / "good", optim=optim), callbacks=[StopAfter(BAD_STEP - 1)])
    good.train()
    assert_equal_weights(trained_weights(made), trained_weights(good))
    ours, theirs = (run.optimizer.state_dict()["state"] for run in (made, good))
    assert ours.keys() == theirs.keys() and ours
    for number, moments in ours.items():
        assert moments.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(value, theirs[number][name]) for name, value in moments.items()), number


@pytest.mark.parametrize(
    ("changes", "seen"),
    [
        ({"logging_strategy": "no"}, 6),  # at the end
        ({"logging_strategy": "no", "eval_strategy": "steps", "eval_steps": 4}, 4),
        ({"logging_strategy": "no", "save_strategy": "steps", "save_steps": 3}, 3),
    ],
)
def test_the_host_looks_before_it_evaluates_saves_or_ends(tmp_path, changes, seen):
    made, steps = run_into_bad_row(tmp_path, optim="adamw_torch_fused", **changes)
    assert steps == seen
    assert not list((tmp_path / "bad").glob("checkpoint-*"))
    assert not [entry for entry in made.state.log_history if "eval_loss" in entry]


def test_a_checkpoint_does_not_hold_the_flag_and_a_new_run_forgets_it(tmp_path):
    made, _ = run_into_bad_row(tmp_path, logging_steps=5)
    assert "found_inf" not in str(made.optimizer.state_dict())
    made.train_dataset.rows[BAD_ROW]["chosen_latents"][0, 0, 0, 0] = 0.0
    before = trained_weights(made)
    made.train()
    assert made.state.global_step == 6
    assert all(not torch.equal(weight, before[name]) for name, weight in trained_weights(made).items())


def test_the_check_reads_each_step_on_its_own(tmp_path):
    """Nothing is carried over from step to step, in a run that stays finite."""
    made = trainer(config(tmp_path, max_steps=5))
    made.train()
    assert made.state.global_step == 5
    assert torch.isfinite(torch.tensor([entry["loss"] for entry in made.state.log_history[:5]])).all()
    assert not list(tmp_path.glob("non_finite*"))
