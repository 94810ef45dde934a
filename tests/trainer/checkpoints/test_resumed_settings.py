"""What a run may be resumed from, and what becomes of settings that are not those of the checkpoint."""

import logging

import pytest
import torch

from tests.support.adapters import IN_FOLDER
from tests.support.tiny import tiny_encoded_group, tiny_wan_pipeline
from tests.support.trainer.runs import StopAfter, assert_equal_weights, config, trained_weights, trainer
from video_trl import VideoDPOConfig, VideoDPOTrainer
from video_trl.trainer.checkpoints.settings import ARGUMENTS_NAME, check_settings
from video_trl.trainer.checkpoints.weights import DESCRIPTION_NAME


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder of a run of six steps that was stopped after two, and of its last checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    trainer(config(folder, save_strategy="steps", save_steps=2), callbacks=[StopAfter(2)]).train()
    return folder / "checkpoint-2"


def resumed(run, folder, arguments=None, **changes):
    made = trainer(config(folder, **changes), **(arguments or {}))
    made.train(resume_from_checkpoint=str(run))
    return made


def test_weights_alone_are_no_checkpoint_to_resume(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True}
    trainer(config(tmp_path / "run", **saving), callbacks=[StopAfter(2)]).train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    with pytest.raises(ValueError, match=r"lacks optimizer.pt and scheduler.pt, without which .* would start anew"):
        resumed(checkpoint, tmp_path / "new")
    pipeline = tiny_wan_pipeline()  # the way out
    pipeline.load_lora_weights(str(checkpoint), **IN_FOLDER)
    trainer(config(tmp_path / "way-out", max_steps=1), model=pipeline).train()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt"])
def test_a_checkpoint_that_lost_a_state_is_refused(tmp_path, name):
    saving = {"save_strategy": "steps", "save_steps": 1}
    trainer(config(tmp_path / "run", **saving), callbacks=[StopAfter(1)]).train()
    (tmp_path / "run" / "checkpoint-1" / name).unlink()
    with pytest.raises(ValueError, match=name):
        resumed(tmp_path / "run" / "checkpoint-1", tmp_path / "new")


def test_the_same_settings_are_resumed_without_a_word(run, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        resumed(run, tmp_path, logging_steps=5, per_device_eval_batch_size=1, output_dir=str(tmp_path))
    assert not [record for record in caplog.records if record.name.startswith("video_trl")]


def test_the_numbers_of_the_optimizer_are_kept_and_said_to_be(run, tmp_path, caplog):
    straight = resumed(run, tmp_path / "straight")
    with caplog.at_level(logging.WARNING):
        other = resumed(run, tmp_path / "other", learning_rate=5e-3, weight_decay=0.1, adam_beta2=0.9)
    assert "keeps these settings" in caplog.text and "learning_rate: 0.01 / 0.005" in caplog.text
    assert "weight_decay: 0.01 / 0.1" in caplog.text and "adam_beta2: 0.999 / 0.9" in caplog.text
    assert_equal_weights(trained_weights(other), trained_weights(straight))


def test_arguments_of_the_optimizer_are_among_them(tmp_path, caplog):
    """A checkpoint has them in its groups of weights."""
    before = config(tmp_path, optim="sgd", optim_args="momentum=0.5")
    (tmp_path / ARGUMENTS_NAME).write_text(before.to_json_string())
    (tmp_path / DESCRIPTION_NAME).write_text("{}")
    with caplog.at_level(logging.WARNING):
        check_settings(tmp_path, config(tmp_path, optim="sgd", optim_args="momentum=0.9"), "GroupDPO")
    assert "keeps these settings" in caplog.text and "optim_args: momentum=0.5 / momentum=0.9" in caplog.text
    assert "with other settings" not in caplog.text


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({"metric_for_best_model": "loss"}, {"metric_for_best_model": "pc"}),
        ({"greater_is_better": False}, {"greater_is_better": True}),
    ],
)
def test_the_best_value_so_far_is_compared_with_none_of_another_metric(tmp_path, before, now):
    (tmp_path / ARGUMENTS_NAME).write_text(config(tmp_path, **before).to_json_string())
    (tmp_path / DESCRIPTION_NAME).write_text("{}")
    with pytest.raises(ValueError, match=f"cannot be resumed with another `{next(iter(now))}`"):
        check_settings(tmp_path, config(tmp_path, **now), "GroupDPO")
    check_settings(tmp_path, config(tmp_path, **before), "GroupDPO")
    check_settings(tmp_path, config(tmp_path), "GroupDPO")  # which looks for no best weights


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"beta": 100.0}, "beta: 500.0 / 100.0"),
        ({"timestep_sampling": "logit_normal"}, "timestep_sampling: uniform / logit_normal"),
        ({"max_grad_norm": 0.5}, "max_grad_norm"),
        ({"max_steps": 5}, "max_steps: 6 / 5"),
        ({"lr_scheduler_type": "constant"}, "lr_scheduler_type"),
    ],
)
def test_what_changes_the_rest_of_the_run_is_said(run, tmp_path, caplog, changes, said):
    straight = resumed(run, tmp_path / "straight")
    with caplog.at_level(logging.WARNING):
        other = resumed(run, tmp_path / "other", **changes)
    assert "with other settings, from this step on" in caplog.text and said in caplog.text
    before = trained_weights(straight)
    assert any(not torch.equal(weight, before[name]) for name, weight in trained_weights(other).items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim": "adafactor"}, "another `optim` .*'adafactor'; its states would mean nothing"),
        ({"optim": "sgd"}, "another `optim`"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}, "another `lr_scheduler_type`"),
    ],
)
def test_states_of_another_kind_are_refused(run, tmp_path, changes, message):
    arguments = {"eval_dataset": tiny_encoded_group(1)} if "eval_strategy" in changes else {}
    with pytest.raises(ValueError, match=message):
        resumed(run, tmp_path, arguments, **changes)


def test_an_optimizer_object_of_another_kind_is_refused(run, tmp_path):
    made = trainer(config(tmp_path))
    weights = [weight for weight in made.model.parameters() if weight.requires_grad]
    groups = [{"params": weights}, {"params": []}]  # with and without weight decay, as Trainer makes them
    made.optimizer = torch.optim.SGD(groups, lr=1e-2)
    with pytest.raises(ValueError, match="holds the states of another optimizer than SGD"):
        made.train(resume_from_checkpoint=str(run))


def test_another_method_is_refused(run, tmp_path):
    args = VideoDPOConfig(output_dir=str(tmp_path), use_cpu=True, lora_rank=4, lora_alpha=4, max_steps=4)
    made = VideoDPOTrainer(tiny_wan_pipeline(), args, tiny_encoded_group(6))
    with pytest.raises(ValueError, match="is of a run of GroupDPO, and this is DPO"):
        made.train(resume_from_checkpoint=str(run))
