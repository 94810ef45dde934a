"""What a trainer says it trains is what the optimizer holds, what acts in the forward, and what gets a gradient."""

import logging
import math
import re

import pytest
import torch
from peft import LoraConfig

from tests.support.adapters import IN_FOLDER
from tests.support.tiny import tiny_cogvideox_pipeline, tiny_encoded_group, tiny_encoded_video, tiny_wan_pipeline
from tests.support.trainer.heads import head_config, head_trainer
from tests.support.trainer.runs import config, losses, trained_weights, trainer
from video_trl import VideoDPOConfig, VideoDPOTrainer, VideoGroupDPOTrainer, VideoSFTTrainer
from video_trl.trainer.setup.startup_proof import check_trained


ATTENTION = ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """Folder of an adapter of two steps."""
    made = trainer(config(tmp_path_factory.mktemp("adapter"), max_steps=2))
    made.train()
    made.save_model()
    return made.args.output_dir


def with_adapter(adapter, name="s"):
    pipeline = tiny_wan_pipeline()
    pipeline.load_lora_weights(adapter, adapter_name=name, **IN_FOLDER)
    return pipeline


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2)


# ---- The optimizer ----


def test_an_optimizer_made_before_the_adapter_is_refused_before_anything_is_encoded(tmp_path):
    pipeline = tiny_wan_pipeline()
    raw = [{"prompt": "a", "chosen": "nowhere.mp4", "rejected": ["nowhere.mp4"]}]
    with pytest.raises(ValueError, match="made before the adapter.*Add the adapter first"):
        optimizers = (adamw(pipeline.transformer.parameters()), None)
        args = config(tmp_path, physics_rewarding=False)
        trainer(args, model=pipeline, optimizers=optimizers, train_dataset=raw)


@pytest.mark.parametrize("use_peft", [True, False])
def test_an_optimizer_that_lacks_trained_weights_is_refused(tmp_path, adapter, use_peft):
    pipeline = with_adapter(adapter) if use_peft else tiny_wan_pipeline()
    optimizer = adamw(pipeline.transformer.blocks[0].parameters())
    with pytest.raises(ValueError, match=r"lacks \d+ \(.*\) of the \d+ weights that are trained"):
        trainer(config(tmp_path, use_peft=use_peft), model=pipeline, optimizers=(optimizer, None))


def test_an_optimizer_of_another_model_is_refused(tmp_path, adapter):
    pipeline, other = with_adapter(adapter), with_adapter(adapter)
    with pytest.raises(ValueError, match=r"lacks 16 "):
        trainer(config(tmp_path), model=pipeline, optimizers=(adamw(other.transformer.parameters()), None))
    both = [*pipeline.transformer.parameters(), *other.transformer.parameters()]
    with pytest.raises(ValueError, match=r"holds \d+ tensors that are no weights of the model"):
        trainer(config(tmp_path), model=pipeline, optimizers=(adamw(both), None))


def test_an_optimizer_of_all_weights_trains_the_adapter_and_leaves_the_base(tmp_path, adapter):
    pipeline = with_adapter(adapter)
    optimizer = adamw(pipeline.transformer.parameters())
    made = trainer(config(tmp_path, max_steps=2), model=pipeline, optimizers=(optimizer, None))
    base = {name: weight.detach().clone() for name, weight in made.model.named_parameters() if "base_layer" in name}
    before = trained_weights(made)
    made.train()
    assert all(not torch.equal(weight, before[name]) for name, weight in trained_weights(made).items())
    assert all(torch.equal(dict(made.model.named_parameters())[name], weight) for name, weight in base.items())


def test_a_weight_that_leaves_the_optimizer_after_the_checks_stops_the_run(tmp_path):
    made = trainer(config(tmp_path))
    made.create_optimizer().param_groups[0]["params"].pop()
    with pytest.raises(ValueError, match=r"lacks 1 \(blocks.* of the 16 weights"):
        made.train()


class Averaging(torch.optim.SGD):
    """With modes, as schedule-free optimizers have them."""

    def train(self):
        pass

    def eval(self):
        pass


def test_an_optimizer_that_evaluates_other_weights_is_refused(tmp_path, adapter):
    """What is saved would not be what is evaluated; by name such optimizers are refused too."""
    pipeline = with_adapter(adapter)
    optimizer = Averaging(pipeline.transformer.parameters(), lr=1e-2)
    with pytest.raises(ValueError, match="class Averaging, which exchanges the weights for averaged ones"):
        trainer(config(tmp_path), model=pipeline, optimizers=(optimizer, None))


# ---- The state of an adapter ----


def switched_off(pipeline):
    pipeline.disable_lora()


def merged(pipeline):
    pipeline.fuse_lora()


def scaled(pipeline):
    pipeline.set_adapters(["s"], [0.5])


def scaled_in_one_layer(pipeline):
    pipeline.transformer.blocks[1].attn1.to_v.set_scale("s", 2.0)


def with_another_alpha_in_its_configuration(pipeline):
    pipeline.transformer.peft_config["s"].lora_alpha = 16  # the layers keep what they were made with


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (switched_off, r"'s' of the transformer is switched off.*in 8 layers such as 'blocks.0.attn1.to_q'.*enable_l"),
        (merged, r"is merged into the base, which rounds, in 8 layers.*Load base and adapter anew"),
        (scaled, r"is scaled, which its file does not say, in 8 layers.*set_adapters\(\['s'\], \[1.0\]\)"),
        (with_another_alpha_in_its_configuration, r"is scaled, which its file does not say, in 8 layers"),
        (scaled_in_one_layer, r"is scaled.*in 1 layers such as 'blocks.1.attn1.to_v'"),
    ],
)
@pytest.mark.parametrize("kind", [VideoGroupDPOTrainer, VideoSFTTrainer])
def test_an_adapter_that_would_not_act_as_its_file_is_refused(tmp_path, adapter, change, message, kind):
    pipeline = with_adapter(adapter)
    change(pipeline)
    with pytest.raises(ValueError, match=message):
        if kind is VideoSFTTrainer:
            VideoSFTTrainer(pipeline, head_config(tmp_path), tiny_encoded_video())
        else:
            trainer(config(tmp_path), model=pipeline)


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_whose_state_was_set_back_starts_from_the_same_function(tmp_path, rslora):
    """First loss log 2 at any scale of the configuration; what is saved acts as what was trained."""
    pipeline = tiny_wan_pipeline()
    targets = LoraConfig(r=4, lora_alpha=3, target_modules=ATTENTION, use_rslora=rslora, lora_dropout=0.5)
    pipeline.transformer.add_adapter(targets, adapter_name="s")
    for name, weight in pipeline.transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(1))
    pipeline.set_adapters(["s"], [0.5])
    pipeline.disable_lora()
    pipeline.enable_lora()
    pipeline.set_adapters(["s"], [1.0])
    args = VideoDPOConfig(
        output_dir=str(tmp_path), use_cpu=True, max_steps=1, beta=5000, logging_steps=1, save_strategy="no"
    )
    made = VideoDPOTrainer(pipeline, args, tiny_encoded_group(2))
    made.train()
    assert losses(made)[0] == pytest.approx(math.log(2), rel=2e-7)


def test_fused_projections_are_refused_and_can_be_undone(tmp_path):
    for make in (tiny_wan_pipeline, tiny_cogvideox_pipeline):
        pipeline = make()
        pipeline.transformer.fuse_qkv_projections()
        for use_peft in (True, False):
            with pytest.raises(ValueError, match=r"The projections of \d attention modules.*unfuse_qkv_projections"):
                trainer(config(tmp_path, use_peft=use_peft), model=pipeline)
    pipeline = tiny_wan_pipeline()
    pipeline.transformer.fuse_qkv_projections()
    pipeline.transformer.unfuse_qkv_projections()
    trainer(config(tmp_path, max_steps=1), model=pipeline).train()


def test_a_choice_of_layers_that_leaves_none_is_refused_before_anything_is_encoded(tmp_path):
    for options in ({"layers_to_transform": [0]}, {"exclude_modules": ".*"}, {"layers_pattern": "layers"}):
        peft_config = LoraConfig(target_modules=ATTENTION, **({"layers_to_transform": [1]} | options))
        with pytest.raises(ValueError, match=r"leaves no layer of WanTransformer3DModel to train.*such as 'blocks'"):
            trainer(config(tmp_path), peft_config=peft_config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["attn1"]}, "match 'blocks.0.attn1', which is a WanAttention"),
        ({"target_modules": r"blocks\.0\.attn1.*"}, "match 'blocks.0.attn1', which is a"),
        ({"target_modules": ["attn1.norm_q"]}, "match 'blocks.0.attn1.norm_q', which is a RMSNorm"),
        ({"rank_pattern": {"attn1.to_qq": 8}}, r"`rank_pattern` of `peft_config` names \['attn1.to_qq'\], and no mod"),
        ({"alpha_pattern": {"blocks.7.attn1.to_q": 8}}, r"`alpha_pattern` of `peft_config` names \['blocks.7"),
        ({"target_modules": "all-linear", "rank_pattern": {"nowhere": 8}}, r"names \['nowhere'\]"),
    ],
    ids=str,
)
def test_targets_and_patterns_that_name_nothing_to_train_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(config(tmp_path), peft_config=LoraConfig(**({"target_modules": ATTENTION} | options)))


def test_patterns_of_layers_that_are_not_targets_are_told(tmp_path, caplog):
    peft_config = LoraConfig(target_modules=["attn1.to_q"], rank_pattern={"attn1.to_k": 2, "attn1.to_q": 2})
    with caplog.at_level(logging.WARNING):
        trainer(config(tmp_path), peft_config=peft_config)
    assert "`rank_pattern` of `peft_config` names ['attn1.to_k'], which is not among its targets" in caplog.text


# ---- Gradients ----


@pytest.mark.parametrize("step_mode", ["concat", "sequential"])
def test_weights_without_a_gradient_stop_the_first_step_before_an_update(tmp_path, step_mode):
    """Here a block that is skipped; the message names its weights."""
    made = trainer(config(tmp_path, step_mode=step_mode))
    made.model.blocks[1].forward = lambda tokens, *args, **kwargs: tokens
    before = trained_weights(made)
    with pytest.raises(ValueError, match=r"In the first step 8 \(blocks\.1\..*\) of the 16 weights .* no gradient"):
        made.train()
    assert made.state.global_step == 0
    assert all(torch.equal(weight, before[name]) for name, weight in trained_weights(made).items())


def test_a_head_that_the_loss_does_not_use_is_found_too(tmp_path):
    made = head_trainer(tmp_path)
    made.trained_head.layers[2].register_forward_hook(lambda module, inputs, output: output.detach())
    with pytest.raises(ValueError, match=r"In the first step 3 \(trained_head\.layers\.0\.bias"):
        made.train()


def test_hooks_are_gone_after_the_first_step(tmp_path):
    made = trainer(config(tmp_path, max_steps=2, gradient_accumulation_steps=2))
    made.train()
    hooks = [weight._post_accumulate_grad_hooks for weight in made.model.parameters()]
    assert not any(hooks)
    made.train()  # and may come back


def test_what_is_trained_is_what_is_saved():
    transformer = tiny_wan_pipeline().transformer
    weights = dict(transformer.named_parameters())
    check_trained(transformer, weights.values())
    with pytest.raises(ValueError, match=r"1 would not be saved \(1 \(proj_out.bias\)\), and 0 that are saved"):
        check_trained(transformer, [weight for name, weight in weights.items() if name != "proj_out.bias"])
    weights["proj_out.bias"].requires_grad_(False)
    with pytest.raises(ValueError, match="and 1 that are saved would not be trained"):
        check_trained(transformer, weights.values())


# ---- Policy and reference ----


@pytest.mark.parametrize("step_mode", ["concat", "sequential"])
def test_policy_and_reference_that_differ_at_the_start_stop_the_run(tmp_path, step_mode):
    made = trainer(config(tmp_path, step_mode=step_mode))
    layer = made.model.blocks[0].attn1.to_v  # queries are normalised: their size has no effect
    layer.register_forward_hook(lambda module, inputs, output: output if module.disable_adapters else output * 1.5)
    with pytest.raises(ValueError, match="same model before the first step, and their errors differ: .*Look for what"):
        made.train()
    assert made.state.global_step == 0


def test_weights_that_were_changed_on_purpose_may_start_elsewhere(tmp_path):
    made = trainer(config(tmp_path, max_steps=1))
    with torch.no_grad():
        made.model.blocks[0].attn1.to_q.lora_B["default"].weight.fill_(0.1)
    made.train()
    assert losses(made)[0] != pytest.approx(math.log(2), rel=1e-6)


def test_another_model_as_reference_is_told(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer(config(tmp_path, max_steps=2), ref_model=tiny_wan_pipeline(seed=5)).train()
    assert (
        len(re.findall("Policy and reference differ before the first step, their errors .* being", caplog.text)) == 1
    )
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        trainer(config(tmp_path, max_steps=2), ref_model=tiny_wan_pipeline()).train()
    assert "differ" not in caplog.text


@pytest.mark.parametrize("use_peft", [True, False])
def test_a_reference_in_another_precision_is_refused(tmp_path, use_peft):
    half, full = tiny_wan_pipeline(), tiny_wan_pipeline()
    half.transformer.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"torch.float32 in the model and torch.bfloat16 in `ref_model`. Load"):
        trainer(config(tmp_path, use_peft=use_peft), model=full, ref_model=half)
    if use_peft:
        with pytest.raises(ValueError, match=r"torch.bfloat16 in the model and torch.float32 in `ref_model`"):
            trainer(config(tmp_path), model=half, ref_model=full)
    else:  # all weights are trained in float32, whatever they were
        made = trainer(config(tmp_path, use_peft=False, max_steps=1), model=half, ref_model=full)
        assert {weight.dtype for weight in made.model.parameters()} == {torch.float32}
