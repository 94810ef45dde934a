"""The three forms of the reference, and the weights that are and are not trained."""

import copy
import logging
import math

import pytest
import torch
from peft import LoraConfig

from tests.support.adapters import IN_FOLDER
from tests.support.tiny import tiny_encoded_group, tiny_transformer, tiny_wan_pipeline
from tests.support.trainer.runs import (
    assert_equal_weights,
    config,
    disturb_adapter,
    first_batch,
    frozen_weights,
    losses,
    trained_weights,
    trainer,
)
from video_trl import hub
from video_trl.trainer.setup.lora import disable_dropout


INPUTS = {
    "hidden_states": torch.randn(2, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0)),
    "timestep": torch.tensor([100.0, 700.0]),
    "encoder_hidden_states": torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(1)),
}


@torch.no_grad()
def predict(transformer) -> torch.Tensor:
    return transformer(**INPUTS, return_dict=False)[0]


def flags(made) -> dict[str, bool]:
    return {name: weight.requires_grad for name, weight in made.model.named_parameters()}


def test_the_reference_of_a_fresh_adapter_is_the_untouched_base(tmp_path):
    base = predict(tiny_transformer())
    made = trainer(config(tmp_path))
    disturb_adapter(made)
    policy, before = predict(made.model), flags(made)
    with made.reference() as reference:
        assert reference is made.model
        assert flags(made) == before  # PEFT's own switch would have cleared them
        assert torch.equal(predict(reference), base)
    assert flags(made) == before
    assert torch.equal(predict(made.model), policy) and not torch.equal(policy, base)
    made.model.add_adapter(LoraConfig(r=2, target_modules=["ffn.net.2"], init_lora_weights=False), "later")
    with made.reference() as reference:  # off as well, in layers that had no adapter before
        assert torch.equal(predict(reference), base)
    assert not torch.equal(predict(made.model), policy) and not torch.equal(predict(made.model), base)


def test_the_reference_switch_recovers_from_an_error(tmp_path):
    made = trainer(config(tmp_path))
    disturb_adapter(made)
    policy, before = predict(made.model), flags(made)
    with pytest.raises(RuntimeError, match="out of memory"), made.reference():
        raise RuntimeError("out of memory")
    assert flags(made) == before and torch.equal(predict(made.model), policy)


def test_a_starting_adapter_is_continued_against_its_frozen_copy(tmp_path):
    first = trainer(config(tmp_path / "first", max_steps=2))
    first.train()
    first.save_model()
    pipeline = tiny_wan_pipeline()
    pipeline.load_lora_weights(str(tmp_path / "first"), **IN_FOLDER)
    start = predict(pipeline.transformer)

    second = trainer(config(tmp_path / "second", loss_type="plackett_luce"), model=pipeline)
    assert second.adapter_name == "default_0"
    assert set(trained_weights(second)) and all("default_0" in name for name in trained_weights(second))
    loss = second.compute_loss(second.model, first_batch(second, 0, 1))
    assert loss.item() == pytest.approx(math.log(4), rel=2e-7)
    frozen = frozen_weights(second)
    second.train()
    second.save_model()
    assert_equal_weights(frozen_weights(second), frozen)
    assert any(".ref." in name for name in frozen)
    with second.reference() as reference:
        assert torch.equal(predict(reference), start)
    assert not torch.equal(predict(second.model), start)
    state, _ = hub.load_lora_state(tmp_path / "second")
    assert not any("ref" in name for name in state)
    fresh = tiny_wan_pipeline()
    fresh.load_lora_weights(str(tmp_path / "second"), **IN_FOLDER)
    assert torch.equal(predict(fresh.transformer), predict(second.model.eval()))


def test_a_given_ref_model_is_used_and_frozen(tmp_path):
    other = tiny_transformer(seed=5)
    made = trainer(config(tmp_path, max_steps=2), ref_model=other)
    with made.reference() as reference:
        assert torch.equal(predict(reference), predict(tiny_transformer(seed=5)))
    made.train()
    assert not any(weight.requires_grad or weight.grad is not None for weight in other.parameters())
    assert torch.equal(predict(other), predict(tiny_transformer(seed=5)))


@pytest.mark.parametrize("use_peft", [True, False])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_copy_as_reference_agrees_with_the_policy_to_the_last_bit(tmp_path, use_peft, bf16):
    """Also under autocast, before and during training: a second module must not take another numeric path."""
    args = config(tmp_path, use_peft=use_peft, bf16=bf16, loss_type="plackett_luce", max_steps=1)
    made = trainer(args, ref_model=tiny_wan_pipeline(), eval_dataset=tiny_encoded_group(1))
    assert made.evaluate()["eval_loss"] == pytest.approx(math.log(4), rel=2e-7)
    made.train()
    assert losses(made)[0] == pytest.approx(math.log(4), rel=2e-7)


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bf16", [False, True])
def test_the_first_loss_is_exact_in_mixed_precision_too(tmp_path, base_dtype, bf16):
    pipeline = tiny_wan_pipeline()
    pipeline.transformer.to(base_dtype)
    made = trainer(config(tmp_path, bf16=bf16, loss_type="plackett_luce", max_steps=2), model=pipeline)
    assert {weight.dtype for weight in trained_weights(made).values()} == {torch.float32}
    before = trained_weights(made)
    made.train()
    assert made.state.log_history[0]["loss"] == pytest.approx(math.log(4), rel=2e-7)
    assert all(not torch.equal(weight, before[name]) for name, weight in trained_weights(made).items())


def test_full_tuning_copies_the_reference_and_says_what_it_costs(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        made = trainer(config(tmp_path, use_peft=False, learning_rate=1e-3, loss_type="plackett_luce", max_steps=2))
    assert "GiB more" in caplog.text
    start, before = predict(made.model), trained_weights(made)
    assert len(before) == len(list(made.model.parameters()))
    made.train()
    assert made.state.log_history[0]["loss"] == pytest.approx(math.log(4), rel=2e-7)
    with made.reference() as reference:
        assert torch.equal(predict(reference), start)
    assert not torch.equal(predict(made.model), start)


def test_full_tuning_of_a_bfloat16_model_trains_in_float32(tmp_path, caplog):
    pipeline = tiny_wan_pipeline()
    pipeline.transformer.to(torch.bfloat16)
    with caplog.at_level(logging.WARNING):
        made = trainer(config(tmp_path, use_peft=False), model=pipeline)
    assert "float32" in caplog.text
    assert {weight.dtype for weight in made.model.parameters()} == {torch.float32}


def test_the_default_adapter_is_on_self_attention_only(tmp_path):
    made = trainer(config(tmp_path, lora_rank=48, lora_alpha=48))
    names = set(trained_weights(made))
    assert len(names) == 2 * 4 * 2  # blocks, projections, A and B
    assert all(".attn1.to_" in name for name in names)
    assert {weight.shape[0] for name, weight in trained_weights(made).items() if "lora_A" in name} == {48}


def test_a_given_peft_config_is_used_and_not_written_to(tmp_path):
    peft_config = LoraConfig(r=3, lora_alpha=6, target_modules=["to_q"])
    unchanged = copy.deepcopy(peft_config)
    made = trainer(config(tmp_path), peft_config=peft_config)
    assert len(trained_weights(made)) == 2 * 2 * 2  # attn1 and attn2
    assert peft_config == unchanged


def test_the_adapter_starts_the_same_whatever_the_caller_drew_before(tmp_path):
    torch.manual_seed(1)
    first = trained_weights(trainer(config(tmp_path)))
    torch.manual_seed(2)
    assert_equal_weights(trained_weights(trainer(config(tmp_path))), first)
    second = trained_weights(trainer(config(tmp_path, seed=7)))
    assert any(not torch.equal(weight, second[name]) for name, weight in first.items())


def test_dropout_that_came_with_the_model_is_switched_off_with_a_warning(tmp_path, caplog):
    """Also of an adapter that goes on: its file may ask for dropout that nobody asks for here."""
    pipeline = tiny_wan_pipeline()
    came = LoraConfig(r=4, lora_alpha=4, target_modules=["attn1.to_q"], lora_dropout=0.5)
    pipeline.transformer.add_adapter(came)
    with caplog.at_level(logging.WARNING):
        made = trainer(config(tmp_path), model=pipeline)
    assert "Dropout that came with the model is switched off, in 2 layers" in caplog.text
    batch = first_batch(made, 0)
    disturb_adapter(made)
    assert torch.equal(made.compute_loss(made.model, batch), made.compute_loss(made.model, batch))
    caplog.clear()
    disable_dropout(made.model)
    assert not caplog.records


def test_a_pipeline_can_be_trained_by_one_trainer_after_another(tmp_path):
    """First without, then with mixed precision: the second must not inherit the first one's numeric path."""
    pipeline = tiny_wan_pipeline()
    trainer(config(tmp_path, max_steps=1), model=pipeline).train()
    second = trainer(config(tmp_path, bf16=True, loss_type="plackett_luce", max_steps=2), model=pipeline)
    second.train()
    assert second.adapter_name == "default" and losses(second)[0] == pytest.approx(math.log(4), rel=2e-7)
    dtypes = []
    handle = pipeline.transformer.blocks[0].ffn.register_forward_hook(
        lambda module, args, out: dtypes.append(out.dtype)
    )
    second.compute_loss(second.model, first_batch(second, 0))
    handle.remove()
    assert set(dtypes) == {torch.bfloat16}
