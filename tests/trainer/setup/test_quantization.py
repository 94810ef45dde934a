"""A quantised base under the adapter: shared by policy and reference, frozen, smaller, and not in what is saved."""

import importlib.util
import math
from dataclasses import replace

import pytest
import torch
from diffusers import WanPipeline
from torch import Tensor

from tests.support.adapters import IN_FOLDER
from tests.support.tiny import tiny_encoded_group, tiny_transformer, tiny_wan_pipeline
from tests.support.trainer.runs import assert_equal_weights, losses, trained_weights
from video_trl import VideoDPOConfig, VideoDPOTrainer
from video_trl.trainer.planning.counter import LiveBytes
from video_trl.trainer.planning.estimate import estimate
from video_trl.trainer.setup.quantization import check_optimizer, keep_weights_quantised, plain, quantization_config


torchao = pytest.importorskip("torchao")


def config(directory, **changes):
    defaults = {"output_dir": str(directory), "use_cpu": True, "max_steps": 2, "lora_rank": 2, "learning_rate": 1e-2}
    quiet = {"logging_steps": 1, "save_strategy": "no", "disable_tqdm": True}
    return VideoDPOConfig(**(defaults | quiet | changes))


@pytest.fixture(scope="module")
def saved_pipeline(tmp_path_factory):
    """A pipeline on disk whose transformer has sides that the kernels for 8 bits take."""
    pipeline = tiny_wan_pipeline()
    pipeline.transformer = tiny_transformer(num_attention_heads=2, attention_head_dim=32, ffn_dim=128)
    directory = tmp_path_factory.mktemp("pipeline")
    pipeline.save_pretrained(directory)
    return directory


def stored_bytes(weight: Tensor) -> int:
    """Bytes of a weight, of the tensors inside it where it is quantised."""
    if type(weight.data) is Tensor:
        return weight.nbytes
    names, _ = weight.data.__tensor_flatten__()
    return sum(stored_bytes(getattr(weight.data, name)) for name in names)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_only_the_adapter_is_trained_on_a_smaller_base_and_fits_the_whole_one(tmp_path, saved_pipeline, kind):
    made = VideoDPOTrainer(str(saved_pipeline), config(tmp_path, quantization=kind), tiny_encoded_group(4))
    named = dict(made.model.named_parameters())
    trained = {name for name, weight in named.items() if weight.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    quantised = {name for name, weight in named.items() if type(weight.data).__module__.startswith("torchao")}
    assert quantised and all(name.startswith("blocks.") for name in quantised)
    whole = WanPipeline.from_pretrained(saved_pipeline).transformer
    linear = [module.weight for module in whole.blocks.modules() if isinstance(module, torch.nn.Linear)]
    assert len(quantised) == len(linear)
    assert sum(stored_bytes(named[name]) for name in quantised) < 0.4 * sum(weight.nbytes for weight in linear)

    before = {name: plain(weight).clone() for name, weight in named.items() if name not in trained}
    made.train()
    assert losses(made)[0] == pytest.approx(math.log(2), abs=1e-7)
    assert losses(made)[1] != losses(made)[0]
    for name, weight in before.items():
        assert torch.equal(plain(named[name]), weight), name

    made.save_model()
    pipeline = WanPipeline.from_pretrained(saved_pipeline)
    pipeline.load_lora_weights(tmp_path, **IN_FOLDER)
    loaded = {name: w for name, w in pipeline.transformer.named_parameters() if ".lora_" in name}
    ours = [w for name, w in sorted(named.items()) if name in trained]
    assert len(loaded) == len(ours)
    for (_, theirs), weight in zip(sorted(loaded.items()), ours, strict=True):
        assert torch.equal(theirs, weight)


def test_a_quantised_run_resumes_exactly_and_not_on_another_base(tmp_path, saved_pipeline):
    def made(name, **changes):
        args = config(tmp_path / name, **({"quantization": "int8", "max_steps": 3} | changes))
        return VideoDPOTrainer(str(saved_pipeline), args, tiny_encoded_group(4))

    straight = made("run", save_strategy="steps", save_steps=1)
    straight.train()
    resumed, checkpoint = made("resumed"), str(tmp_path / "run" / "checkpoint-1")
    resumed.train(resume_from_checkpoint=checkpoint)
    assert_equal_weights(trained_weights(resumed), trained_weights(straight))
    with pytest.raises(ValueError, match="cannot be resumed by this trainer"):
        made("other", quantization=None).train(resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_no_layer_holds_its_whole_weight_until_the_backward_pass(kind):
    def layers(*, ours: bool) -> torch.nn.Module:
        torch.manual_seed(0)
        made = torch.nn.Sequential(*[torch.nn.Linear(256, 256) for _ in range(8)])
        made = made.to(torch.bfloat16).requires_grad_(False)
        rule = quantization_config(kind, torch.bfloat16).quant_mapping["transformer"].quant_type
        torchao.quantization.quantize_(made, rule)
        if ours:
            keep_weights_quantised(made)
        return made

    whole = 256 * 256 * 2
    found = []
    for ours in (False, True):
        model, counter = layers(ours=ours), LiveBytes()
        inputs = torch.randn(4, 256, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
        with counter:
            output = model(inputs)
            saved = counter.live
            output.float().square().sum().backward()
        found.append((output.detach(), inputs.grad))
        assert saved >= 8 * whole if not ours else saved <= 0.6 * 8 * whole
    (output, gradient), (our_output, our_gradient) = found
    assert torch.equal(our_output, output)
    # torchao multiplies 8-bit integers by their scale after the product, we before it: bfloat16 rounds in between.
    torch.testing.assert_close(our_gradient, gradient, rtol=0, atol=0.02 * float(gradient.abs().max()))


@pytest.mark.parametrize("policy", [None, "full"])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_training_takes_the_memory_that_was_planned(tmp_path, kind, policy):
    pipeline = tiny_wan_pipeline()
    pipeline.transformer = tiny_transformer(num_attention_heads=4, attention_head_dim=64, ffn_dim=1024, num_layers=4)
    pipeline.save_pretrained(tmp_path / "pipeline")
    changes = {"max_steps": 1, "bf16": True, "optim": "sgd", "activation_checkpointing": policy is not None}
    args = config(tmp_path, quantization=kind, step_mode="concat", **changes)
    made = VideoDPOTrainer(str(tmp_path / "pipeline"), args, tiny_encoded_group(1))
    counter = LiveBytes()
    for weight in made.model.parameters():
        counter.add(weight)
    stored = counter.live
    with counter:
        made.train()
    work = made.workload()
    assert work.quantization == kind
    found = estimate(work, made.placement())
    assert found.parts["weights"] + found.parts["adapter"] == pytest.approx(stored, rel=0.05)  # some stay in float32
    assert found.peak - found.parts["optimizer"] == pytest.approx(counter.peak, rel=0.1)
    whole = estimate(replace(work, quantization=None), made.placement())
    assert found.parts["weights"] < 0.6 * whole.parts["weights"]


def test_what_cannot_be_quantised_is_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(ValueError, match="`quantization` must be one of 'nf4', 'int8', 'fp8', got 'int4'"):
        config(tmp_path, quantization="int4")
    with pytest.raises(ValueError, match="Train an adapter"):
        config(tmp_path, quantization="int8", use_peft=False)
    args = config(tmp_path, quantization="int8")
    with pytest.raises(ValueError, match="passed as a WanPipeline. Name it by a string; or quantise it when you load"):
        VideoDPOTrainer(tiny_wan_pipeline(), args, tiny_encoded_group(2))
    with pytest.raises(ValueError, match="no use with `model='sandbox'`"):
        VideoDPOTrainer("sandbox", args, tiny_encoded_group(2))


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_a_missing_library_is_refused_with_the_command_that_installs_it(tmp_path):
    with pytest.raises(ValueError, match="needs the package bitsandbytes.*pip install 'video-trl\\[quantization\\]'"):
        config(tmp_path, quantization="nf4")
    for name in ("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit", "lion_8bit"):
        with pytest.raises(ValueError, match=f"`optim='{name}'` needs the package bitsandbytes.*pip install"):
            config(tmp_path, optim=name)
    check_optimizer("adamw_torch_fused")


def large_enough():
    """A pipeline some of whose weights have the size from which their moments are quantised, 4096 entries."""
    pipeline = tiny_wan_pipeline()
    pipeline.transformer = tiny_transformer(num_attention_heads=2, attention_head_dim=32, ffn_dim=128, num_layers=1)
    return pipeline


def check_8_bit_adamw(tmp_path, optim, moment):
    """Full tuning with moments in 8 bits follows the run with whole ones."""
    runs = {}
    for name in ("adamw_torch", optim):
        args = config(tmp_path / name, optim=name, use_peft=False, learning_rate=1e-3, max_steps=3)
        runs[name] = VideoDPOTrainer(large_enough(), args, tiny_encoded_group(4))
        runs[name].train()
    assert losses(runs[optim])[0] == pytest.approx(math.log(2), abs=1e-7)
    assert losses(runs[optim]) == pytest.approx(losses(runs["adamw_torch"]), rel=0.05)
    moments = [value for state in runs[optim].optimizer.state.values() for value in state.values()]
    assert moment in {f"{type(value).__name__} {value.dtype}" for value in moments if isinstance(value, Tensor)}


def test_8_bit_adamw_of_bitsandbytes_trains_all_weights(tmp_path):
    pytest.importorskip("bitsandbytes")
    check_8_bit_adamw(tmp_path, "adamw_bnb_8bit", "Tensor torch.uint8")


@pytest.mark.slow
def test_8_bit_adamw_of_torchao_trains_all_weights(tmp_path):
    check_8_bit_adamw(tmp_path, "adamw_torch_8bit", "OptimState8bit torch.float32")
