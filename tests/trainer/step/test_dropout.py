"""Dropout of an adapter's inputs: a function of seed, step, row and layer, in passes of the policy in training."""

import math

import pytest
import torch
from peft import LoraConfig

from tests.support import rounding
from tests.support.cells import EVERY, later_ones_slow
from tests.support.tiny import TINY_FAMILIES, tiny_encoded_group, tiny_encoded_video, tiny_wan_pipeline
from tests.support.trainer.runs import (
    StopAfter,
    assert_equal_weights,
    config,
    disturb_adapter,
    double,
    first_batch,
    losses,
    trained_weights,
    trainer,
)
from tests.trainer.test_families import rows_for, tiny_pipeline
from video_trl import VideoDPOConfig, VideoDPOTrainer, VideoSFTConfig, VideoSFTTrainer
from video_trl.hub import load_lora_state
from video_trl.trainer.step.dropout import AdapterDropout, dropout_of, with_same_dropout


def tuned(directory, model=None, rows=None, callbacks=None, **changes):
    """Supervised fine-tuning of an adapter that acts already, in float64, with a half of its inputs dropped."""
    given = {
        "output_dir": str(directory), "use_cpu": True, "max_steps": 4, "lora_rank": 4, "lora_alpha": 4,
        "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True,
        "per_device_train_batch_size": 2, "lora_dropout": 0.5,
    } | changes  # fmt: skip
    made = VideoSFTTrainer(
        double(model or tiny_wan_pipeline()),
        VideoSFTConfig(**given),
        tiny_encoded_video(4) if rows is None else rows,
        callbacks=callbacks,
    )
    disturb_adapter(made)
    return made


def gradients(made, batch):
    made.model.train()
    made.model.zero_grad()
    made.compute_loss(made.model, batch).backward()
    return {name: weight.grad.clone() for name, weight in made.model.named_parameters() if weight.requires_grad}


def dropped(streams, shape=(4, 500, 8), layer=0, probability=0.25):
    with dropout_of(streams):
        return AdapterDropout(probability, layer)(torch.ones(shape))


def test_masks_have_their_probability_and_are_a_function_of_seed_step_row_and_layer():
    rows = tuple((0, 1, row) for row in range(4))
    mask = dropped(rows)
    assert set(mask.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    kept = (mask > 0).double().mean().item()
    assert abs(kept - 0.75) < 5 * math.sqrt(0.75 * 0.25 / mask.numel())
    assert torch.equal(mask, dropped(rows))
    assert torch.equal(mask[1:2], dropped(rows[1:2], (1, 500, 8)))  # whatever is beside it
    assert torch.equal(mask.flatten(0, 1), dropped(rows, (2000, 8)))  # tokens of one video after another
    others = [dropped(tuple((seed, step, row) for *_, row in rows)) for seed, step in ((1, 1), (0, 2))]
    parts = [*mask, *others[0], *others[1], *dropped(rows, layer=1)]
    for number, part in enumerate(parts):
        assert not any(torch.equal(part, other) for other in parts[:number])


def test_outside_of_a_step_nothing_is_dropped_and_a_layer_without_rows_is_refused():
    inputs = torch.randn(3, 2)
    assert AdapterDropout(0.5, 0)(inputs) is inputs and with_same_dropout(abs) is abs
    with pytest.raises(ValueError, match=r"`lora_dropout` needs layers.*multiple of 2.*\(3, 2\).*lora_target_modules"):
        dropped(((0, 0, 0), (0, 0, 1)), (3, 2))


@pytest.mark.parametrize("policy", ["full", "offload", "attention"])
def test_a_block_that_is_computed_again_drops_the_same(policy, tmp_path):
    plain = tuned(tmp_path / "plain", use_dora=policy == "full")
    again = tuned(tmp_path / "again", use_dora=policy == "full", checkpointing_policy=policy)
    again.model.gradient_checkpointing_enable()  # as Trainer does when it trains
    batch = first_batch(plain, 0, 1)
    expected, got = gradients(plain, batch), gradients(again, batch)
    assert_equal_weights(expected, got)
    without = tuned(tmp_path / "without", lora_dropout=0.0, use_dora=policy == "full")
    assert any(not torch.equal(expected[name], weight) for name, weight in gradients(without, batch).items())


@pytest.mark.parametrize("family", later_ones_slow(EVERY))
def test_every_linear_layer_of_every_family_drops_by_row(family, tmp_path):
    options = TINY_FAMILIES[family].options
    made = tuned(tmp_path, tiny_pipeline(family), rows_for(family, "SFT"), lora_target_modules="all-linear", **options)
    both = made.compute_loss(made.model, first_batch(made, 0, 1), return_outputs=True)[1]["losses"]
    for row in range(2):
        (alone,) = made.compute_loss(made.model, first_batch(made, row), return_outputs=True)[1]["losses"]
        assert alone.item() == pytest.approx(both[row].item(), rel=rounding.DOUBLE)
    made.step.drops = False
    without = made.compute_loss(made.model, first_batch(made, 0, 1), return_outputs=True)[1]["losses"]
    assert not torch.isclose(without, both, rtol=1e-6).any()


def test_evaluations_drop_nothing_and_a_run_of_0_is_one_without(tmp_path):
    made, without = tuned(tmp_path / "a"), tuned(tmp_path / "b", lora_dropout=0.0)
    rows = tiny_encoded_video(2, seed=9)
    assert made.evaluate(rows)["eval_loss"] == without.evaluate(rows)["eval_loss"]
    assert not [module for module in without.model.modules() if isinstance(module, AdapterDropout)]
    again = tuned(tmp_path / "c", made.pipeline, lora_dropout=0.0)  # what the first trainer has set is gone
    assert not [module for module in again.model.modules() if isinstance(module, AdapterDropout)]


def test_a_resumed_run_and_another_batch_split_drop_the_same(tmp_path):
    saves = {"save_strategy": "steps", "save_steps": 2}
    whole = tuned(tmp_path / "whole", **saves)
    whole.train()
    halted = tuned(tmp_path / "halted", callbacks=[StopAfter(2)], **saves)
    halted.train()
    resumed = tuned(tmp_path / "halted", **saves)
    resumed.train(resume_from_checkpoint=True)
    assert_equal_weights(trained_weights(whole), trained_weights(resumed))
    split = tuned(tmp_path / "split", per_device_train_batch_size=1, gradient_accumulation_steps=2)
    split.train()
    assert losses(split) == pytest.approx(losses(whole), rel=1e-5)
    assert load_lora_state(tmp_path / "whole" / "checkpoint-4")[1].lora_dropout == 0.0


def test_a_pair_is_compared_by_one_network_with_a_reference_without_dropout(tmp_path):
    """The first loss of a new adapter is log 2; of one that goes on it is not, by what is dropped."""
    args = {"use_cpu": True, "max_steps": 1, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True}
    first = VideoDPOTrainer(
        tiny_wan_pipeline(), VideoDPOConfig(str(tmp_path / "first"), lora_dropout=0.5, **args), tiny_encoded_group(2)
    )
    first.train()
    assert losses(first) == [pytest.approx(math.log(2), rel=2e-7)]
    pipeline = first.pipeline
    disturb_adapter(first)
    twins = [row | {"rejected_latents": row["chosen_latents"][None]} for row in tiny_encoded_group(2, m=1)]
    second = VideoDPOTrainer(pipeline, VideoDPOConfig(str(tmp_path / "second"), lora_dropout=0.5, **args), twins)
    batch = first_batch(second, 0, 1)
    loss, outputs = second.compute_loss(second.model, batch, return_outputs=True)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)  # equal videos have equal errors under one mask
    second.train()
    assert second.state.log_history[0]["win_gap"] != 0


def test_a_given_peft_config_says_its_own(tmp_path, caplog):
    peft_config = LoraConfig(r=4, target_modules=["attn1.to_q"], lora_dropout=0.5)
    made = trainer(config(tmp_path, lora_dropout=0.1), peft_config=peft_config)
    layers = [module for module in made.model.modules() if isinstance(module, AdapterDropout)]
    assert [layer.probability for layer in layers] == [0.5, 0.5] and "that of `peft_config` counts" in caplog.text
    with pytest.raises(ValueError, match="`lora_dropout=0.5` with `compile_blocks=True` is not supported"):
        trainer(config(tmp_path, compile_blocks=True), peft_config=peft_config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_dropout": 1.0}, r"must be in \[0, 1\), got 1.0"),
        ({"lora_dropout": -0.1}, r"must be in \[0, 1\)"),
        ({"lora_dropout": math.nan}, r"must be in \[0, 1\)"),
        ({"lora_dropout": 0.1, "context_parallel_size": 2}, "`context_parallel_size=2` is not supported"),
    ],
    ids=str,
)
def test_what_cannot_be_dropped_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)
