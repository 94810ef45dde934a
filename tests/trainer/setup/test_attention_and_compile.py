"""Attention back ends and compiled blocks change the speed of a training, not what it computes."""

import math

import pytest
import torch
from accelerate.utils import is_torch_version
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support import rounding
from tests.support.tiny import tiny_encoded_group, tiny_latents_shape, tiny_pipeline
from tests.support.trainer.runs import SMOOTH_ADAM, disturb_adapter, losses
from video_trl import VideoDPOConfig, VideoDPOTrainer, VideoREPAConfig
from video_trl.trainer.setup import attention_and_compile
from video_trl.trainer.setup.attention_and_compile import (
    attention_backends,
    check_compile,
    is_compiled,
    probe_attention_backend,
    set_attention_backend,
)
from video_trl.trainer.step.passes import SamePathCheck
from video_trl.trainer.step.reference_errors import load_errors, save_errors


FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def config(directory, **changes):
    defaults = {"output_dir": str(directory), "use_cpu": True, "max_steps": 2, "lora_rank": 2, "learning_rate": 1e-2}
    quiet = {"logging_steps": 1, "save_strategy": "no", "disable_tqdm": True}
    return VideoDPOConfig(**(defaults | quiet | changes))


def dpo(directory, family="wan-t2v", **changes):
    rows = tiny_encoded_group(4, latents_shape=tiny_latents_shape(family), family=family)
    return VideoDPOTrainer(tiny_pipeline(family), config(directory, **changes), rows)


class CountFusedAttention(TorchDispatchMode):
    """Number of calls of the kernel that torch chooses by itself on a CPU."""

    calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += function is FUSED
        return function(*args, **(kwargs or {}))


# ---- attention back ends --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["wan-t2v", "wan-i2v", "cogvideox-t2v"])
def test_a_back_end_takes_over_all_attention_and_gives_the_same_losses(tmp_path, family):
    runs = {}
    for name in (None, "_native_math"):
        made = dpo(tmp_path / str(name), family, attention_backend=name, **SMOOTH_ADAM)
        with CountFusedAttention() as counted:
            made.train()
        assert (counted.calls == 0) == (name == "_native_math")
        runs[name] = losses(made)
        assert runs[name][0] == pytest.approx(math.log(2), abs=1e-7)
    assert runs["_native_math"] == pytest.approx(runs[None], rel=1e-3)
    assert runs[None][1] != runs[None][0]


def test_the_copied_reference_gets_the_back_end_and_nothing_else_does(tmp_path):
    before = _AttentionBackendRegistry.get_active_backend()
    made = dpo(tmp_path, attention_backend="_native_math", use_peft=False)
    for transformer in (made.model, made.reference.transformer):
        used = {module.processor._attention_backend for module in transformer.modules() if "processor" in dir(module)}
        assert used == {"_native_math"}
    assert made.reference.transformer is not made.model
    assert _AttentionBackendRegistry.get_active_backend() == before
    made.train()
    assert losses(made)[0] == pytest.approx(math.log(2), abs=1e-7)


def test_cogvideox_goes_through_the_dispatcher_with_the_numbers_of_its_own_processor():
    results = []
    for name in (None, "native"):
        transformer = tiny_pipeline("cogvideox-t2v").transformer
        if name is not None:
            set_attention_backend(transformer, name)
        kinds = {type(module.processor) for module in transformer.modules() if "processor" in dir(module)}
        assert (kinds == {CogVideoXAttnProcessor2_0}) == (name is None)
        block, generator = transformer.transformer_blocks[0], torch.Generator().manual_seed(0)
        width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
        video, text = (torch.randn(2, n, width, generator=generator, requires_grad=True) for n in (6, 5))
        rotary = tuple(torch.randn(6, transformer.config.attention_head_dim, generator=generator) for _ in range(2))
        outputs = block.attn1(video, encoder_hidden_states=text, image_rotary_emb=rotary)
        total = sum(output.square().sum() for output in outputs)
        results.append([*outputs, *torch.autograd.grad(total, (video, text))])
    for ours, theirs in zip(*results, strict=True):
        rounding.assert_close(ours, theirs, rounding.SINGLE)


def test_an_unknown_back_end_is_refused_with_the_list_before_anything_is_loaded(tmp_path):
    with pytest.raises(ValueError, match="must be one of .*'_native_cudnn'.*'flash'.*, got 'flsh'"):
        config(tmp_path, attention_backend="flsh")
    with pytest.raises(ValueError, match="no backward pass"):
        config(tmp_path, attention_backend="sage")
    assert not [name for name in attention_backends() if "sage" in name]


def test_a_back_end_without_its_library_is_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(ValueError, match="`attention_backend='flash'` cannot be used here: .*flash-attn"):
        config(tmp_path, attention_backend="flash")


def test_a_back_end_that_does_not_run_here_is_refused_before_data_are_encoded(tmp_path):
    with pytest.raises(ValueError, match="'_native_cudnn'` does not run forward and backward on cpu in torch.float32"):
        dpo(tmp_path, attention_backend="_native_cudnn")


def test_the_probe_sees_other_numbers(monkeypatch):
    wrong = _AttentionBackendRegistry._backends["_native_math"]
    monkeypatch.setitem(
        _AttentionBackendRegistry._backends, "_native_math", lambda *args, **kwargs: 1.01 * wrong(*args, **kwargs)
    )
    with pytest.raises(ValueError, match="differ from torch's own attention by 0.0"):
        probe_attention_backend("_native_math", 12, torch.device("cpu"), torch.float32)


# ---- one numeric path -----------------------------------------------------------------------------------------------


def test_a_difference_of_one_bit_in_the_first_step_is_refused_and_later_ones_are_not():
    check = SamePathCheck({"compile_blocks": True})
    error = torch.tensor([0.5, 1.25])
    check.see_reference(error)
    with pytest.raises(ValueError, match=r"compile_blocks=True their errors differ: 1\.2500001\d* and 1\.25 \("):
        check.see_policy(torch.nextafter(error, torch.tensor([0.0, 2.0])).where(torch.tensor([False, True]), error))
    check.see_policy(error + 1)  # has been looked at

    unused = SamePathCheck({})
    unused.see_reference(error)
    unused.see_policy(error + 1)


@pytest.mark.parametrize("step_mode", ["concat", "sequential"])
def test_training_stops_if_the_paths_differ_before_anything_is_learned(tmp_path, step_mode):
    made = dpo(tmp_path, attention_backend="_native_math", step_mode=step_mode)
    disturb_adapter(made)
    with pytest.raises(ValueError, match="attention_backend='_native_math' their errors differ"):
        made.train()


@pytest.mark.parametrize("kept", [False, True])
def test_so_it_does_where_the_errors_of_the_reference_are_looked_up(tmp_path, kept):
    settings = {"attention_backend": "_native_math", "precompute_ref_errors": 1, "cache_dir": str(tmp_path)}
    if kept:
        dpo(tmp_path, **settings).train()
    made = dpo(tmp_path, **settings)
    disturb_adapter(made)
    with pytest.raises(ValueError, match="attention_backend='_native_math' their errors differ"):
        made.train()


def test_looked_up_errors_need_no_equal_bits(tmp_path):
    """They may come from other batches or another machine; the reference itself runs once more, and is compared."""
    settings = {"attention_backend": "_native_math", "precompute_ref_errors": 1, "cache_dir": str(tmp_path)}
    dpo(tmp_path, **settings).train()
    (path,) = tmp_path.glob("reference_errors/*.safetensors")
    save_errors(path, [error * (1 + 1e-6) for error in load_errors(path)])
    made, passes = dpo(tmp_path, **settings), []
    made.model.register_forward_pre_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    made.train()
    assert passes == [False, True, True]


# ---- compiled blocks ------------------------------------------------------------------------------------------------


compiles = pytest.mark.skipif(is_torch_version("<", "2.13"), reason="refused with this torch")


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"activation_checkpointing": True, "step_mode": "sequential"}])
def test_compiled_blocks_train_alike_and_start_at_log_2(tmp_path, monkeypatch, changes):
    # A run that was killed leaves half a library in the common folder.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    changes = {"max_steps": 3, **SMOOTH_ADAM, **changes}
    plain, compiled = (dpo(tmp_path / str(on), compile_blocks=on, **changes) for on in (False, True))
    plain.train()
    compiled.train()
    assert losses(compiled)[0] == pytest.approx(math.log(2), abs=1e-7)
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


@compiles
def test_blocks_are_compiled_of_policy_and_reference_and_not_of_a_later_trainer(tmp_path):
    made = dpo(tmp_path, compile_blocks=True, use_peft=False)
    for transformer in (made.model, made.reference.transformer):
        assert all(map(is_compiled, transformer.blocks))
    again = VideoDPOTrainer(
        made.pipeline, config(tmp_path, compile_blocks=True, use_peft=False), tiny_encoded_group(2)
    )
    for block in [*again.model.blocks, *again.reference.transformer.blocks]:
        assert block.forward._torchdynamo_orig_callable.__self__ is block  # also of a copy of compiled ones
    later = VideoDPOTrainer(made.pipeline, config(tmp_path, use_peft=False), tiny_encoded_group(2))
    assert not any(map(is_compiled, [*later.model.blocks, *later.reference.transformer.blocks]))


def test_what_does_not_go_with_compiled_blocks_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="compile anew for every size"):
        config(tmp_path, compile_blocks=True, resolution_buckets=["32x32", "32x48"])
    with pytest.raises(ValueError, match="`checkpointing_policy='attention'` is not supported"):
        config(tmp_path, compile_blocks=True, checkpointing_policy="attention")
    with pytest.raises(ValueError, match="looks into a block"):
        VideoREPAConfig(output_dir=str(tmp_path), use_cpu=True, compile_blocks=True)
    with monkeypatch.context() as patched:
        patched.setattr(attention_and_compile, "is_torch_version", lambda *_: True)
        with pytest.raises(
            ValueError, match="`compile_blocks` needs torch 2.13 or newer, this is .* were wrong with 2.6"
        ):
            check_compile(torch.device("cpu"))
    if is_torch_version("<", "2.13"):
        return
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="Install g\\+\\+"):
        check_compile(torch.device("cpu"))
