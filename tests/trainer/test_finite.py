"""A loss or gradient that is not finite stops the run before it does harm, and the report says where to look."""

import json

import pytest
import torch
from transformers import TrainerCallback

from tests.tiny import tiny_encoded_group
from tests.trainer.runs import config, trained_weights, trainer
from video_trl.trainer.finite import NonFiniteLossError


SAVING = {"save_strategy": "steps", "save_steps": 1}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_sample_stops_the_run_and_is_reported(tmp_path, value):
    rows = tiny_encoded_group(6)
    rows[4]["chosen_latents"][0, 0, 0, 0] = value
    made = trainer(config(tmp_path, **SAVING, per_device_train_batch_size=1), train_dataset=rows)
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
    rows[0]["chosen_latents"].fill_(float("nan"))
    args = config(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    with pytest.raises(NonFiniteLossError):
        trainer(args, train_dataset=rows).train()
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


def test_the_check_reads_each_step_on_its_own(tmp_path):
    """Nothing is carried over from step to step, in a run that stays finite."""
    made = trainer(config(tmp_path, max_steps=5))
    made.train()
    assert made.state.global_step == 5
    assert torch.isfinite(torch.tensor([entry["loss"] for entry in made.state.log_history[:5]])).all()
    assert not list(tmp_path.glob("non_finite*"))
