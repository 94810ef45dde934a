"""`repa_coeff`: the alignment of the chosen video beside the preference, from the same forward."""

from typing import Any

import pytest
import safetensors.torch
import torch

from tests.support import rounding
from tests.support.tiny import tiny_encoded_group, tiny_group_dataset, tiny_wan_pipeline
from tests.support.trainer.repa_runs import tiny_teacher, with_tokens
from tests.support.trainer.runs import (
    assert_equal_weights,
    config,
    disturb_adapter,
    double,
    first_batch,
    losses,
    trained_weights,
    trainer,
)
from video_trl import VideoREPAConfig
from video_trl.losses import trd_loss


SHAPE = (4, 3, 4, 4)  # latents of 9 frames
OPTIONS = {"align_layer": 1, "projector_width": 8, "margin": 0.05, "head_learning_rate": 1e-2}


def rows(n: int = 4) -> list[dict[str, Any]]:
    return with_tokens(tiny_encoded_group(n, latents_shape=SHAPE))


def joint(directory, *, train_dataset=None, model=None, **changes: Any) -> Any:
    options = {"repa_coeff": 0.7, "repa_options": OPTIONS, "beta": 50.0, "max_steps": 2}
    given = {} if model is None else {"model": model}
    return trainer(config(directory, **(options | changes)), train_dataset=train_dataset or rows(), **given)


def weights_of(made: Any) -> list[torch.nn.Parameter]:
    return [weight for name, weight in made.model.named_parameters() if weight.requires_grad and "head" not in name]


def alignment_by_hand(made: Any, denoising: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Relation loss of the chosen videos `(B,)`, each from a forward of its own."""
    values = []
    for number in range(len(tokens)):
        video = denoising[number * denoising.group_size : number * denoising.group_size + 1]
        kept: list[torch.Tensor] = []
        handle = made.model.blocks[0].register_forward_hook(lambda *args, kept=kept: kept.append(args[2]))
        made.family.predict(made.model, video.noisy_latents, video.timesteps, video.conditions)
        handle.remove()
        (plan,) = made.alignment._plans.values()
        student = made.alignment.head(kept[0], plan).projected
        values.append(trd_loss(student, plan.align_teacher(tokens[number : number + 1]), margin=0.05)[0])
    return torch.stack(values)


@pytest.mark.parametrize("changes", [{"loss_type": "sum", "sft_weight": "0.4*dgr"}, {"loss_type": "sampled"}], ids=str)
def test_the_joint_loss_is_the_sum_of_its_parts(changes, tmp_path):
    """Loss and gradient: those without the alignment, plus its coefficient times the relation loss by hand."""
    made = joint(tmp_path, repa_coeff=700.0, **changes)  # large enough that its part of the gradient is seen
    plain = joint(tmp_path, repa_coeff=0.0, repa_options=None, **changes)
    seen: dict[str, Any] = {}
    prepare = made.step.prepare

    def watch(*args: Any, **kwargs: Any) -> Any:
        seen["denoising"] = prepare(*args, **kwargs)
        return seen["denoising"]

    made.step.prepare, made.record = watch, seen.update
    for each in (made, plain):
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for weight in weights_of(each):
                weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    loss = made.compute_loss(made.model, first_batch(made, 0, 1))
    gradients = torch.autograd.grad(loss, weights_of(made))
    preference = plain.compute_loss(plain.model, first_batch(plain, 0, 1))
    expected = torch.autograd.grad(preference, weights_of(plain))
    tokens = made.alignment.look(first_batch(made, 0, 1)).tokens
    by_hand = alignment_by_hand(made, seen["denoising"], tokens)
    torch.testing.assert_close(seen["loss/alignment"], by_hand, rtol=1e-4, atol=1e-6)
    assert loss.item() == pytest.approx(preference.item() + 700 * by_hand.mean().item(), rel=1e-5)
    assert seen["trd/coefficient"].tolist() == [700.0, 700.0] and "loss/dpo" in seen
    added = torch.autograd.grad(700 * by_hand.mean(), weights_of(made), allow_unused=True)
    largest = max(gradient.abs().max() for gradient in gradients)
    for ours, theirs, more in zip(gradients, expected, added, strict=True):
        total = theirs if more is None else theirs + more
        assert (ours - total).abs().max() < 1e-3 * largest
    assert max(more.abs().max() for more in added if more is not None) > 1e-2 * largest  # it can be missed


def test_a_coefficient_of_zero_is_group_dpo_to_the_last_bit(tmp_path):
    """Also with rows that carry a teacher's tokens; and the preference is not changed by a head beside it."""
    plain = trainer(config(tmp_path, max_steps=2), train_dataset=tiny_encoded_group(4, latents_shape=SHAPE))
    zero = joint(tmp_path, repa_coeff=0.0, repa_options=None, beta=500.0)
    for made in (plain, zero):
        made.train()
    assert zero.alignment is None and zero.trained_head is None
    assert losses(plain) == losses(zero)
    assert_equal_weights(trained_weights(zero), trained_weights(plain))
    first = joint(tmp_path, max_steps=1, beta=500.0)
    first.train()
    log = first.state.log_history[0]
    assert log["loss/dpo"] == pytest.approx(plain.state.log_history[0]["loss"], rel=rounding.LOGGED)
    assert log["loss"] == pytest.approx(log["loss/dpo"] + 0.7 * log["loss/alignment"], rel=1e-5)


@pytest.mark.parametrize("mode", ["concat", "sequential"])
def test_no_model_is_asked_more_often(mode, tmp_path):
    counts = []
    for coefficient in (0.0, 0.7):
        options = OPTIONS if coefficient else None
        made = joint(tmp_path, repa_coeff=coefficient, repa_options=options, loss_type="sum", step_mode=mode)
        forwards: list[int] = []
        made.model.register_forward_hook(lambda *args, forwards=forwards: forwards.append(len(args[2][0])))
        made.compute_loss(made.model, first_batch(made, 0, 1)).backward()
        made.passes.backward()
        counts.append(forwards)
    assert counts[0] == counts[1] and sum(counts[0]) == (16 if mode == "concat" else 8 + 2 * 8 - 1)


@pytest.mark.parametrize("changes", [{"loss_type": "sum", "sft_weight": "0.4*dgr"}, {"safeguard": "output"}], ids=str)
def test_one_video_after_the_other_is_the_same_joint_step(changes, tmp_path):
    """Gradients of adapter and head, and every metric; also of an evaluation, which has no graph."""
    gradients, recorded = [], []
    for mode in ("concat", "singles", "sequential"):
        torch.manual_seed(0)  # the head
        made = joint(tmp_path, repa_coeff=700.0, step_mode=mode, model=double(tiny_wan_pipeline()), **changes)
        disturb_adapter(made)
        seen: dict[str, Any] = {}
        made.record = seen.update
        batch = first_batch(made, 0, 1)
        made.compute_loss(made.model, batch).backward()
        made.passes.backward()
        gradients.append({name: w.grad for name, w in made.model.named_parameters() if w.requires_grad})
        made.model.eval()
        with torch.no_grad():
            seen["evaluated"] = made.compute_loss(made.model, batch)
        recorded.append(seen)
    assert sum("head" in name for name in gradients[0]) > 0
    for ours, seen in zip(gradients[1:], recorded[1:], strict=True):
        rounding.assert_close_weights(ours, gradients[0], rounding.SINGLE)  # the head is float32
        assert seen.keys() == recorded[0].keys() >= {"trd/raw", "loss/alignment", "trd/coefficient"}
        for name, values in recorded[0].items():
            torch.testing.assert_close(seen[name], values, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("mode", ["concat", "sequential"])
def test_each_coefficient_at_zero_is_the_method_without_it_to_the_last_bit(mode, tmp_path):
    """Of fine-tuning beside the preference and its alignment, and of the alignment beside fine-tuning."""
    both = {"repa_coeff": 0.7, "repa_options": OPTIONS, "sft_weight": 20.0}
    without_sft, without_repa = both | {"sft_weight": 0.0}, both | {"repa_coeff": 0.0, "repa_options": None}
    neither = without_repa | {"sft_weight": 0.0}
    logs, weights = [], []
    pure = {"repa_coeff": 0.0, "repa_options": None}
    for changes in (pure, neither, without_sft, without_repa, both):
        made = joint(tmp_path, step_mode=mode, max_steps=1, **changes)
        made.train()
        logs.append(losses(made))
        weights.append({name: w for name, w in trained_weights(made).items() if "head" not in name})
    assert logs[0] == logs[1]
    assert_equal_weights(weights[1], weights[0])
    for left, right in ((0, 2), (0, 3), (2, 4), (3, 4)):  # and it is not a matter of course
        assert any(not torch.equal(weights[left][name], weight) for name, weight in weights[right].items())


def test_from_raw_videos_to_an_adapter(tmp_path):
    """The teacher is an object; scores leave videos out; reference errors are cached; the head is not published."""
    args = config(
        tmp_path,
        repa_coeff=0.5,
        repa_options=OPTIONS,
        max_steps=1,
        cache_dir=str(tmp_path / "cache"),
        fps=8,
        rejected_score_below=0.99,
        precompute_ref_errors=1,
        per_device_train_batch_size=1,
    )
    made = trainer(args, train_dataset=tiny_group_dataset(2, 2, num_frames=9), teacher=tiny_teacher())
    before = {name: weight.clone() for name, weight in made.trained_head.named_parameters()}
    made.train()
    assert made.state.log_history[0]["loss/alignment"] > 0 and made.alignment.margin == 0.05
    assert made.workload().alignment == (4, 4, 12)
    assert all(not torch.equal(weight, before[name]) for name, weight in made.trained_head.named_parameters())
    made.save_model()
    adapter = safetensors.torch.load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert adapter and not [name for name in adapter if "head" in name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"repa_coeff": -1.0}, "`repa_coeff` must be finite and not negative"),
        ({"repa_options": {"coefficient": 1.0}}, "has no coefficient.*the coefficient is `repa_coeff`"),
        ({"repa_options": {"align_depth": 3}}, "`repa_options` has no align_depth. It takes align_layer"),
        ({"repa_options": {"projector": "deep"}}, "`projector` must be one of"),
        ({"safeguard": "parameter"}, "`safeguard='parameter'` does not go with `repa_coeff`"),
        ({"resolution_buckets": ["32x32"]}, "`resolution_buckets=.*does not go with `repa_coeff`"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **({"repa_coeff": 0.5} | changes))


def test_a_teacher_is_needed_and_needs_its_coefficient(tmp_path):
    encoded = tiny_encoded_group(2, latents_shape=SHAPE)
    with pytest.raises(ValueError, match="encoded already, without the teacher's columns"):
        joint(tmp_path, train_dataset=encoded)
    with pytest.raises(ValueError, match="Expected a teacher, got none.*VideoGroupDPOTrainer"):
        joint(tmp_path, train_dataset=tiny_group_dataset(1, 1, num_frames=9))
    with pytest.raises(ValueError, match="`teacher` is for `repa_coeff`, which is 0"):
        trainer(config(tmp_path), teacher=tiny_teacher())


def test_options_can_be_given_as_text(tmp_path):
    """What a command line passes on."""
    args = config(tmp_path, repa_coeff=0.5, repa_options='{"teacher": "sandbox", "projector": "none"}')
    options = args.alignment_options()
    assert (options.teacher, options.projector, options.coefficient) == ("sandbox", "none", 0.5)
    args = VideoREPAConfig(str(tmp_path), use_cpu=True, teacher_kwargs='{"height": 160}')
    assert args.teacher_kwargs == {"height": 160}
