"""`VideoDPOTrainer` and `VideoRegDPOTrainer` against the same computation written out by hand."""

import copy
import dataclasses
import hashlib
import math
import re
import struct

import pytest
import torch

from tests.support import rounding
from tests.support.paths import DOCS
from tests.support.tiny import (
    TEXT_DIM,
    tiny_encoded_group,
    tiny_encoded_video,
    tiny_group_dataset,
    tiny_transformer,
    tiny_wan_pipeline,
)
from tests.support.trainer.runs import (
    SMOOTH_ADAM,
    RecordGradients,
    assert_equal_weights,
    disturb_adapter,
    double,
    first_batch,
    frozen_weights,
    losses,
    trained_weights,
)
from video_trl import VideoDPOConfig, VideoDPOTrainer, VideoRegDPOConfig, VideoRegDPOTrainer
from video_trl.trainer import CollapseMonitor
from video_trl.trainer.base_config import VideoConfig
from video_trl.trainer.step.passes import AdapterReference, ModuleReference


SHAPE = (4, 2, 4, 4)
# Every way to weigh the regulariser: None is plain DPO.
WEIGHTS = [None, ("fixed", 0.0), ("fixed", 30.0), ("dgr", 0.5), ("dgr", 2.0)]


def make(directory, weight=("dgr", 1.0), *, train_dataset=None, rows=4, model=None, ref_model=None, **changes):
    """A trainer of a fresh tiny pipeline on encoded groups of 1 + 3 videos; `weight` None: the DPO trainer."""
    settings = {
        "output_dir": str(directory),
        "use_cpu": True,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "lora_rank": 4,
        "lora_alpha": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        **changes,
    }
    callbacks = settings.pop("callbacks", None)
    eval_dataset = settings.pop("eval_dataset", None)
    if weight is None:
        trainer_class, args = VideoDPOTrainer, VideoDPOConfig(**settings)
    else:
        mode, coefficient = weight
        trainer_class = VideoRegDPOTrainer
        args = VideoRegDPOConfig(sft_weight_mode=mode, sft_coefficient=coefficient, **settings)
    return trainer_class(
        model or tiny_wan_pipeline(),
        args,
        train_dataset or tiny_encoded_group(rows),
        eval_dataset,
        ref_model=ref_model,
        callbacks=callbacks,
    )


def error_by_hand(transformer, latents, noise, sigma, prompt_embeds):
    """Mean squared velocity error of one video, from one call of the bare transformer; prompt padded with zeros."""
    padded = torch.zeros(1, 16, TEXT_DIM, dtype=transformer.dtype)
    padded[0, : len(prompt_embeds)] = prompt_embeds
    noisy = ((1 - sigma) * latents + sigma * noise).to(transformer.dtype)
    velocity = transformer(noisy[None], torch.tensor([1000 * sigma]), padded, return_dict=False)[0][0]
    return ((velocity - (noise - latents)) ** 2).mean()


def loss_by_hand(made, rows, beta, weight, m=3):
    """Loss of a batch at step 0, pair by pair and video by video; gradients reach the adapter, but not through r."""
    total = torch.zeros(())
    for index, row in enumerate(rows):
        digest = hashlib.blake2b(struct.pack("<3q", made.args.seed, 0, index), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        sigma = torch.rand((), generator=generator, dtype=torch.float64).float().item()
        drawn = int(torch.randint(m, (), generator=generator))
        noises = [torch.randn(*SHAPE, generator=generator) for _ in range(2)]
        gaps, errors = [], []
        for position, video in enumerate((row["chosen_latents"], row["rejected_latents"][drawn])):
            noise = noises[0 if made.args.shared_noise else position]
            policy = error_by_hand(made.model, video, noise, sigma, row["prompt_embeds"])
            made.model.disable_adapters()
            with torch.no_grad():
                reference = error_by_hand(made.model, video, noise, sigma, row["prompt_embeds"])
            made.model.enable_adapters()
            errors.append(policy)
            gaps.append(policy - reference)
        s = gaps[0] - gaps[1]
        total = total + torch.log1p(torch.exp(beta / 2 * s))
        if weight is not None:
            mode, coefficient = weight
            ratio = beta / 2 * (1 - 1 / (1 + math.exp(beta / 2 * s.item())))
            total = total + coefficient * (ratio if mode == "dgr" else 1.0) * errors[0]
    return total / len(rows)


@pytest.mark.parametrize("shared_noise", [True, False])
@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_loss_and_gradients_equal_the_computation_by_hand(tmp_path, weight, shared_noise):
    rows = tiny_encoded_group(2)
    model = double(tiny_wan_pipeline())
    made = make(tmp_path, weight, model=model, train_dataset=rows, beta=50.0, shared_noise=shared_noise)
    disturb_adapter(made)
    parameters = [parameter for parameter in made.model.parameters() if parameter.requires_grad]
    loss = made.compute_loss(made.model, first_batch(made, 0, 1))
    gradients = torch.autograd.grad(loss, parameters)
    expected = loss_by_hand(made, rows, 50.0, weight)
    expected_gradients = torch.autograd.grad(expected, parameters)
    assert loss.item() == pytest.approx(expected.item(), rel=rounding.by_hand(beta=50.0))
    largest = max(gradient.abs().max() for gradient in expected_gradients)
    assert largest > 0.1
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert (gradient - expected_gradient).abs().max() < 1e-4 * largest


@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_first_loss_has_its_closed_form(tmp_path, weight):
    """Policy and reference agree bit for bit before the first update: log 2, plus r times the chosen error."""
    made = make(tmp_path, weight)
    loss, outputs = made.compute_loss(made.model, first_batch(made, 0, 1), return_outputs=True)
    logged = made.metrics.train.pop(made.accelerator)
    assert torch.equal(outputs["chosen_rewards"], torch.zeros(2))
    assert torch.equal(outputs["rejected_rewards"], torch.zeros(2))
    assert logged["dgr"] == 125.0 and logged["win_gap"] == logged["lose_gap"] == 0.0
    r = 0.0 if weight is None else weight[1] * (125.0 if weight[0] == "dgr" else 1.0)
    if weight is None or r == 0:
        assert loss.item() == torch.tensor(2.0).log().item()
    else:
        assert logged["sft_weight"] == r
        assert loss.item() == pytest.approx(math.log(2) + r * logged["loss/sft"], rel=1e-6)


def test_coefficient_zero_trains_as_dpo_does_bit_for_bit(tmp_path):
    runs = [make(tmp_path, weight) for weight in (None, ("dgr", 0.0))]
    for made in runs:
        made.train()
    assert losses(runs[0]) == losses(runs[1])
    assert_equal_weights(trained_weights(runs[0]), trained_weights(runs[1]))


def test_the_split_of_a_batch_does_not_matter(tmp_path):
    """4 and 2 x 2 samples an optimizer step: the same samples, drawn rejected videos, noise, losses and gradients."""
    runs = []
    for batch, accumulation in ((4, 1), (2, 2)):
        recorder = RecordGradients()
        made = make(
            tmp_path,
            rows=8,
            max_steps=2,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_grad_norm=0.0,
            callbacks=[recorder],
            model=double(tiny_wan_pipeline()),
            **SMOOTH_ADAM,
        )
        made.train()
        runs.append((made, recorder.steps))
    (whole, gradients), (split, split_gradients) = runs
    assert losses(split)[0] == pytest.approx(losses(whole)[0], rel=rounding.LOGGED)
    rounding.assert_close_weights(split_gradients[0], gradients[0], rounding.DOUBLE)
    assert losses(split) == pytest.approx(losses(whole), rel=1e-4)


def test_every_rejected_video_of_a_group_is_drawn_and_a_pair_is_a_group_of_one(tmp_path):
    """The loss at a step is that of the drawn rejected video alone; within a few steps each of three has its turn."""
    made = make(tmp_path, None, rows=1, per_device_train_batch_size=1)
    singles = []
    for number in range(3):
        rows = [{**row, "rejected_latents": row["rejected_latents"][[number]]} for row in tiny_encoded_group(1)]
        del rows[0]["rejected_scores"]
        singles.append(make(tmp_path, None, train_dataset=rows, per_device_train_batch_size=1))
    values = []
    for one in (made, *singles):
        disturb_adapter(one)
        values.append([])
        for step in range(8):
            one.state.global_step = step
            values[-1].append(one.compute_loss(one.model, first_batch(one, 0)).item())
    drawn = [[single[step] == group for single in values[1:]].index(True) for step, group in enumerate(values[0])]
    assert set(drawn) == {0, 1, 2}


@pytest.mark.parametrize("weight", [None, ("dgr", 1.0)], ids=str)
def test_training_learns_the_preference_and_leaves_the_base_alone(tmp_path, weight):
    made = make(tmp_path, weight, rows=2, max_steps=12, learning_rate=2e-2)
    before, base = trained_weights(made), frozen_weights(made)
    made.train()
    last = made.state.log_history[-2]
    assert last["rewards/margins"] > 0.5 and last["dgr"] < 100
    assert_equal_weights(frozen_weights(made), base)
    assert all(not torch.equal(value, before[name]) for name, value in trained_weights(made).items())


def test_the_regulariser_keeps_the_chosen_error_down(tmp_path):
    """The point of the method, on random data: after the same steps the win gap is lower than DPO's."""
    ends = []
    for weight in (None, ("dgr", 2.0)):
        made = make(tmp_path, weight, rows=2, max_steps=12, learning_rate=2e-2)
        made.train()
        ends.append(sum(entry["win_gap"] for entry in made.state.log_history if "win_gap" in entry))
    assert ends[1] < ends[0]


@pytest.mark.parametrize("weight", [None, ("fixed", 30.0), ("dgr", 1.0)], ids=str)
def test_metrics_are_logged_and_consistent(tmp_path, weight):
    made = make(tmp_path, weight, eval_dataset=tiny_encoded_group(3, seed=9))
    made.train()
    names = {"win_gap", "lose_gap", "s_theta", "dgr", "rewards/chosen", "rewards/rejected", "rewards/margins"}
    names |= {"rewards/accuracies"}
    if weight is not None:
        names |= {"loss/dpo", "loss/sft", "sft_weight", "chosen_weight"}
    general = {"loss", "grad_norm", "learning_rate", "epoch", "step"}
    entry = made.state.log_history[2]
    assert set(entry) == names | general
    assert entry["s_theta"] == pytest.approx(entry["win_gap"] - entry["lose_gap"], abs=1e-6)
    assert entry["rewards/chosen"] == pytest.approx(-250 * entry["win_gap"], rel=1e-4)
    if weight is not None:
        assert entry["chosen_weight"] == pytest.approx(entry["dgr"] + entry["sft_weight"], rel=1e-5)
        expected = 30.0 if weight[0] == "fixed" else entry["dgr"]
        assert entry["sft_weight"] == pytest.approx(expected, rel=1e-5)
    evaluation = made.evaluate()
    assert {f"eval_{name}" for name in names | {"loss"}} <= evaluation.keys()
    assert evaluation["eval_win_gap"] == made.evaluate()["eval_win_gap"]


@pytest.mark.parametrize("weight", [None, ("dgr", 1.0)], ids=str)
def test_full_fine_tuning_has_a_copied_reference(tmp_path, weight, caplog):
    made = make(tmp_path, weight, use_peft=False, learning_rate=1e-3)
    assert "copied as the reference" in caplog.text and "GiB" in caplog.text
    assert isinstance(made.reference, ModuleReference) and made.reference.transformer is not made.model
    reference = copy.deepcopy(made.reference.transformer.state_dict())
    made.train()
    first = made.state.log_history[0]
    r = first.get("sft_weight", 0.0) * first.get("loss/sft", 0.0)
    assert first["win_gap"] == 0.0 and first["loss"] == pytest.approx(math.log(2) + r, rel=1e-5)
    assert made.state.log_history[2]["win_gap"] != 0.0
    assert_equal_weights(dict(made.reference.transformer.state_dict()), reference)


def test_the_reference_is_the_adapter_switched_off_or_the_given_model(tmp_path):
    off = make(tmp_path, None, model=double(tiny_wan_pipeline()))
    assert isinstance(off.reference, AdapterReference)
    same, other = (
        make(tmp_path, None, model=double(tiny_wan_pipeline()), ref_model=tiny_transformer(seed).double())
        for seed in (0, 1)
    )
    values = []
    for made in (off, same, other):
        disturb_adapter(made)
        values.append(made.compute_loss(made.model, first_batch(made, 0, 1)).item())
    assert values[0] == pytest.approx(values[1], rel=rounding.DOUBLE)
    assert values[2] != pytest.approx(values[0], rel=1e-2)


@pytest.mark.parametrize("trainer_class", [VideoDPOTrainer, VideoRegDPOTrainer])
def test_the_documented_call_works_on_raw_videos(tmp_path, monkeypatch, trainer_class):
    """Positional arguments, hardly any configuration, mp4 files of groups in, an adapter out."""
    monkeypatch.chdir(tmp_path)
    pipeline = tiny_wan_pipeline()
    args = trainer_class.config_class(output_dir="out", max_steps=2, cache_dir=str(tmp_path / "cache"))
    made = trainer_class(pipeline, args, tiny_group_dataset(2, 2))
    made.train()
    made.save_model()
    card = (tmp_path / "out" / "README.md").read_text()
    assert trainer_class.tag in card and "'out'" in card
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()


def test_defaults_are_those_of_the_paper(tmp_path):
    for config_class in (VideoDPOConfig, VideoRegDPOConfig):
        args = config_class(str(tmp_path), use_cpu=True)
        assert (args.lora_rank, args.lora_alpha, args.learning_rate, args.beta) == (16, 32, 5e-6, 500.0)
    assert (args.sft_weight_mode, args.sft_coefficient) == ("dgr", 1.0)
    fixed = VideoRegDPOConfig(str(tmp_path), use_cpu=True, sft_weight_mode="fixed", beta=1000.0)
    assert fixed.sft_coefficient == 250.0  # DGR(0)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"beta": 0.0}, "`beta` must be positive"),
        ({"beta": math.nan}, "`beta` must be positive"),
        ({"sft_coefficient": -1.0}, "must not be negative.*0 is plain DPO"),
        ({"sft_coefficient": math.inf}, "must be finite"),
        ({"sft_weight_mode": "dynamic"}, "one of 'dgr', 'fixed'"),
    ],
)
def test_bad_values_are_refused(tmp_path, changes, match):
    with pytest.raises(ValueError, match=match):
        VideoRegDPOConfig(str(tmp_path), use_cpu=True, **changes)
    if "beta" in changes:
        with pytest.raises(ValueError, match=match):
            VideoDPOConfig(str(tmp_path), use_cpu=True, **changes)


@pytest.mark.parametrize("weight", [None, ("dgr", 1.0)], ids=str)
def test_bad_data_are_refused(tmp_path, weight):
    with pytest.raises(ValueError, match="preference dataset needs the columns.*missing"):
        make(tmp_path, weight, train_dataset=tiny_encoded_video(2))
    with pytest.raises(ValueError, match="at least one rejected video"):
        empty = [{**row, "rejected_latents": row["rejected_latents"][:0]} for row in tiny_encoded_group(2)]
        make(tmp_path, weight, train_dataset=empty)
    with pytest.raises(ValueError, match="must be a `Video"):
        other = VideoRegDPOConfig if weight is None else VideoDPOConfig
        trainer_class = VideoDPOTrainer if weight is None else VideoRegDPOTrainer
        trainer_class(tiny_wan_pipeline(), other(str(tmp_path), use_cpu=True), tiny_encoded_group(2))


PAGES = {None: ("dpo_trainer.md", VideoDPOConfig), ("dgr", 1.0): ("reg_dpo_trainer.md", VideoRegDPOConfig)}


def documented(page, heading):
    """Rows of the table in a section of a page; of each cell the words in back quotes."""
    text = (DOCS / "trainers" / page).read_text()
    section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    return [[re.findall(r"`([^`]+)`", cell) for cell in row.strip("|").split("|")] for row in rows]


@pytest.mark.parametrize("weight", PAGES, ids=str)
def test_the_page_names_every_option_and_every_metric(tmp_path, weight):
    page, config_class = PAGES[weight]
    shared = {field.name for field in dataclasses.fields(VideoConfig)}
    own = {field.name: repr(field.default) for field in dataclasses.fields(config_class) if field.name not in shared}
    assert {row[0][0]: row[1][0] for row in documented(page, "Options")} == own
    made = make(tmp_path, weight, max_steps=1)
    made.train()
    general = {"epoch", "step", "grad_norm", "learning_rate"}
    metrics = {name for row in documented(page, "Logged metrics") for name in row[0]}
    assert set(made.state.log_history[0]) - general == metrics


@pytest.mark.parametrize("use_peft", [True, False])
def test_mapo_asks_no_reference(tmp_path, use_peft):
    """One pass of the policy over a pair a step, no copy of the model, no gaps."""
    changes = {"loss_type": "mapo", "use_peft": use_peft, "learning_rate": 1e-2 if use_peft else 1e-3}
    made = make(tmp_path, None, eval_dataset=tiny_encoded_group(3, seed=9), heldout_evaluations=0, **changes)
    forwards: list[int] = []
    handle = made.model.register_forward_hook(lambda *args: forwards.append(len(args[2][0])))
    made.train()
    handle.remove()
    assert made.reference is None and made.args.beta == 0.1 and forwards == [4] * 3
    first = made.state.log_history[0]
    assert first["loss"] >= first["loss/sft"] > 0 and "win_gap" not in first
    assert made.evaluate()["eval_loss/sft"] > 0
    assert made.workload().reference == "none"
    with pytest.raises(ValueError, match="reads the gaps"):
        made.add_callback(CollapseMonitor())
        made.train()


def test_mapo_goes_through_both_step_modes_alike(tmp_path):
    values = []
    for mode in ("concat", "sequential"):
        made = make(tmp_path, None, loss_type="mapo", step_mode=mode, model=double(tiny_wan_pipeline()))
        disturb_adapter(made)
        loss = made.compute_loss(made.model, first_batch(made, 0, 1))
        loss.backward()
        made.passes.backward()
        values.append({name: weight.grad for name, weight in made.model.named_parameters() if weight.requires_grad})
    rounding.assert_close_weights(values[1], values[0], rounding.DOUBLE)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"gap": "log_ratio"}, "has no reference, and so no gaps: expected `gap='raw'`"),
        ({"win_gap_penalty": 1.0}, "expected `win_gap_penalty=0.0`, got 1.0"),
        ({"precompute_ref_errors": 2}, "expected `precompute_ref_errors=None`"),
        ({"label_smoothing": 0.1}, "belongs to `loss_type='sigmoid'`"),
    ],
)
def test_mapo_refuses_options_of_gaps(tmp_path, changes, match):
    with pytest.raises(ValueError, match=match):
        VideoDPOConfig(str(tmp_path), use_cpu=True, loss_type="mapo", **changes)


def test_mapo_takes_no_reference(tmp_path):
    with pytest.raises(ValueError, match="has no reference; leave `ref_model` out"):
        make(tmp_path, None, loss_type="mapo", ref_model=tiny_transformer())
