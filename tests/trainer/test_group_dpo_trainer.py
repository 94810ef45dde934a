"""The loss of `VideoGroupDPOTrainer` against the same computation written out by hand."""

import hashlib
import math
import struct

import pytest
import torch

from tests.support import rounding
from tests.support.tiny import TEXT_DIM, tiny_encoded_group, tiny_group_dataset, tiny_transformer, tiny_wan_pipeline
from tests.support.trainer.runs import (
    assert_equal_weights,
    config,
    disturb_adapter,
    double,
    first_batch,
    frozen_weights,
    losses,
    trained_weights,
    trainer,
)
from video_trl import VideoGroupDPOConfig, VideoGroupDPOTrainer, VideoRegDPOConfig, VideoRegDPOTrainer
from video_trl.trainer.group_dpo_config import as_sft_weight


LOSS_TYPES = ("sampled", "sum", "plackett_luce")
SHAPE = (4, 2, 4, 4)


def generator_of(seed: int, step: int, index: int) -> torch.Generator:
    digest = hashlib.blake2b(struct.pack("<3q", seed, step, index), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def weights_of(row: dict) -> list[tuple[float, float]]:
    """(alpha, gamma) of each rejected video, Eq. 10 with the paper's values, in Python floats."""
    pairs = []
    for sa, pc in row["rejected_scores"].tolist():
        v = 1 - (sa + pc) / 2
        alpha = 0.5 + 0.5 / (1 + math.exp(-5.0 * (v - 0.5)))
        gamma = (1 + 0.6 / (1 + math.exp(-2.0 * (v - 0.4)))) / 0.5
        pairs.append((alpha, gamma))
    return pairs


def error_by_hand(transformer, latents, noise, sigma, prompt_embeds) -> torch.Tensor:
    """Mean squared velocity error of one video, from one call of the bare transformer; prompt padded with zeros."""
    padded = torch.zeros(1, 16, TEXT_DIM, dtype=transformer.dtype)
    padded[0, : len(prompt_embeds)] = prompt_embeds
    noisy = ((1 - sigma) * latents + sigma * noise).to(transformer.dtype)
    velocity = transformer(noisy[None], torch.tensor([1000 * sigma]), padded, return_dict=False)[0][0]
    return ((velocity - (noise - latents)) ** 2).mean()


def loss_by_hand(made, rows: list[dict], beta: float) -> torch.Tensor:
    """Loss of a batch at step 0, group by group and video by video; gradients reach the adapter."""
    args, transformer, total = made.args, made.model, torch.zeros(())
    weight = as_sft_weight(args.sft_weight)
    for index, row in enumerate(rows):
        generator = generator_of(args.seed, 0, index)
        sigma = torch.rand((), generator=generator, dtype=torch.float64).float().item()
        drawn = int(torch.randint(3, (), generator=generator))
        compared = [drawn] if args.loss_type == "sampled" else [0, 1, 2]
        videos = [row["chosen_latents"], *(row["rejected_latents"][j] for j in compared)]
        noises = [torch.randn(*SHAPE, generator=generator) for _ in videos]
        rewards, errors = [], []
        for video, own_noise in zip(videos, noises, strict=True):
            noise = noises[0] if args.shared_noise else own_noise
            policy = error_by_hand(transformer, video, noise, sigma, row["prompt_embeds"])
            transformer.disable_adapters()
            with torch.no_grad():
                reference = error_by_hand(transformer, video, noise, sigma, row["prompt_embeds"])
            transformer.enable_adapters()
            rewards.append(-(beta / 2) * (policy - reference))
            errors.append(policy)
        margins = [rewards[0] - reward for reward in rewards[1:]]
        if args.loss_type == "plackett_luce":
            total = total + torch.log1p(sum(torch.exp(-margin) for margin in margins))
            others = sum(math.exp(-margin.item()) for margin in margins)
            ratio = beta / 2 * others / (1 + others)  # probability that the chosen video is not the first
        else:
            weights = weights_of(row) if args.physics_rewarding else [(1.0, 1.0)] * 3
            factor = 3 if args.loss_type == "sampled" else 1
            ratio = 0.0
            for j, margin in zip(compared, margins, strict=True):
                alpha, gamma = weights[j]
                total = total + factor * gamma * torch.log1p(torch.exp(-alpha * margin))
                ratio += beta / 2 * factor * gamma * alpha / (1 + math.exp(alpha * margin.item()))
        r = weight[1] * ratio if isinstance(weight, tuple) else weight
        total = total + r * errors[0]
    return total / len(rows)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_first_loss_has_its_closed_form(tmp_path, loss_type):
    """Policy and reference agree bit for bit before the first update, so only the weights and log 2 remain."""
    rows = tiny_encoded_group(2)
    made = trainer(config(tmp_path, loss_type=loss_type), train_dataset=rows)
    if loss_type == "plackett_luce":
        expected = math.log(1 + 3)
    elif loss_type == "sum":
        expected = sum(gamma * math.log(2) for row in rows for _, gamma in weights_of(row)) / 2
    else:
        expected = 0.0
        for index, row in enumerate(rows):
            generator = generator_of(made.args.seed, 0, index)
            torch.rand((), generator=generator, dtype=torch.float64)
            expected += 3 * weights_of(row)[int(torch.randint(3, (), generator=generator))][1] * math.log(2) / 2
    loss, outputs = made.compute_loss(made.model, first_batch(made, 0, 1), return_outputs=True)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=2e-7)
    assert torch.equal(outputs["chosen_rewards"], torch.zeros(2))
    assert not outputs["rejected_rewards"].any()


@pytest.mark.parametrize("shared_noise", [True, False])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_and_gradients_equal_the_computation_by_hand(tmp_path, loss_type, shared_noise):
    rows = tiny_encoded_group(2)
    args = config(tmp_path, loss_type=loss_type, shared_noise=shared_noise, beta=50.0)
    made = trainer(args, model=double(tiny_wan_pipeline()), train_dataset=rows)
    disturb_adapter(made)
    parameters = [weight for weight in made.model.parameters() if weight.requires_grad]
    loss = made.compute_loss(made.model, first_batch(made, 0, 1))
    gradients = torch.autograd.grad(loss, parameters)
    expected = loss_by_hand(made, rows, beta=50.0)
    expected_gradients = torch.autograd.grad(expected, parameters)
    assert loss.item() == pytest.approx(expected.item(), rel=rounding.by_hand(beta=50.0))
    largest = max(gradient.abs().max() for gradient in expected_gradients)
    assert largest > 0.1
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert (gradient - expected_gradient).abs().max() < 1e-4 * largest


@pytest.mark.parametrize("sft_weight", [30.0, "dgr", "0.4*dgr"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_regularised_loss_equals_the_computation_by_hand(tmp_path, loss_type, sft_weight):
    """r * error of the chosen video: r a number, or the ratio that the loss weighs that error's gradient by."""
    rows = tiny_encoded_group(2)
    args = config(tmp_path, loss_type=loss_type, sft_weight=sft_weight, beta=50.0)
    made = trainer(args, model=double(tiny_wan_pipeline()), train_dataset=rows)
    disturb_adapter(made)
    parameters = [weight for weight in made.model.parameters() if weight.requires_grad]
    loss = made.compute_loss(made.model, first_batch(made, 0, 1))
    expected = loss_by_hand(made, rows, beta=50.0)
    assert loss.item() == pytest.approx(expected.item(), rel=rounding.by_hand(beta=50.0))
    gradients = torch.autograd.grad(loss, parameters)
    expected_gradients = torch.autograd.grad(expected, parameters)
    largest = max(gradient.abs().max() for gradient in expected_gradients)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert (gradient - expected_gradient).abs().max() < 1e-4 * largest


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_weight_of_zero_is_no_weight(tmp_path, loss_type):
    weights = []
    for changes in ({}, {"sft_weight": 0}, {"sft_weight": "0*dgr"}):
        made = trainer(config(tmp_path, loss_type=loss_type, max_steps=3, **changes))
        made.train()
        weights.append((trained_weights(made), made.state.log_history[:-1]))
    for trained, log in weights[1:]:
        assert_equal_weights(trained, weights[0][0])
        assert log == weights[0][1]


@pytest.mark.parametrize("sft_weight", ["dgr", "0.4*dgr", 20.0])
def test_with_one_rejected_video_it_is_reg_dpo(tmp_path, sft_weight):
    """Without physics weights and with m = 1 the regularised group loss is Reg-DPO's, in loss and metrics."""
    mode, coefficient = ("fixed", 20.0) if sft_weight == 20.0 else ("dgr", 0.4 if "*" in sft_weight else 1.0)
    rows = tiny_encoded_group(2, m=1)
    ours = trainer(config(tmp_path, sft_weight=sft_weight, physics_rewarding=False), train_dataset=rows)
    args = VideoRegDPOConfig(
        str(tmp_path), use_cpu=True, lora_rank=4, lora_alpha=4, sft_weight_mode=mode, sft_coefficient=coefficient
    )
    theirs = VideoRegDPOTrainer(tiny_wan_pipeline(), args, rows)
    values, recorded = [], []
    for made in (ours, theirs):
        disturb_adapter(made)
        made.record = recorded.append
        values.append(made.compute_loss(made.model, first_batch(made, 0, 1)).item())
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    for name in ("loss/dpo", "loss/sft", "sft_weight", "chosen_weight", "win_gap"):
        torch.testing.assert_close(recorded[0][name], recorded[1][name])


def test_held_out_gaps_are_logged_where_there_are_rows_to_evaluate_on(tmp_path):
    """Ten times a run unless it is said otherwise; the training is the same to the last bit."""
    runs = {}
    for name, changes, extra in (
        ("default", {}, {"eval_dataset": tiny_encoded_group(2, seed=5)}),
        ("four", {"heldout_evaluations": 4}, {"eval_dataset": tiny_encoded_group(2, seed=5)}),
        ("off", {"heldout_evaluations": 0}, {"eval_dataset": tiny_encoded_group(2, seed=5)}),
        ("own", {"eval_strategy": "epoch"}, {"eval_dataset": tiny_encoded_group(2, seed=5)}),
        ("none", {}, {}),
    ):
        args = config(tmp_path, max_steps=20, **changes)
        made = trainer(args, rows=20, **extra)
        assert args.eval_strategy == changes.get("eval_strategy", "no")  # the caller's configuration stays as it was
        made.train()
        steps = [entry["step"] for entry in made.state.log_history if "eval_win_gap" in entry]
        runs[name] = (steps, trained_weights(made))
    assert runs["default"][0] == list(range(2, 21, 2)) and runs["four"][0] == [5, 10, 15, 20]
    assert runs["off"][0] == runs["none"][0] == [] and runs["own"][0] == [10, 20]
    for _, weights in runs.values():
        assert_equal_weights(weights, runs["none"][1])


def test_one_rejected_video_without_weights_is_diffusion_dpo(tmp_path):
    """With m = 1 and alpha = gamma = 1 all three losses are -log sigmoid of the reward margin."""
    values = []
    for loss_type in LOSS_TYPES:
        args = config(tmp_path, loss_type=loss_type, physics_rewarding=False)
        made = trainer(args, model=double(tiny_wan_pipeline()), train_dataset=tiny_encoded_group(2, m=1))
        disturb_adapter(made)
        loss, outputs = made.compute_loss(made.model, first_batch(made, 0, 1), return_outputs=True)
        margins = outputs["chosen_rewards"] - outputs["rejected_rewards"][:, 0]
        assert loss.item() == pytest.approx(-torch.nn.functional.logsigmoid(margins).mean().item(), rel=1e-6)
        values.append(loss.item())
    assert values == pytest.approx([values[0]] * 3, rel=1e-6)


def test_pgr_hyperparameters_reach_the_loss(tmp_path):
    made = trainer(config(tmp_path, loss_type="sum", alpha_min=0.8, lam=2.0, gamma_mode="official"))
    sa_pc = made.train_dataset[0]["rejected_scores"]
    v = 1 - sa_pc.mean(dim=1)
    alpha = 0.8 + 0.2 * torch.sigmoid(5 * (v - 0.5))
    gamma = (1 + 2 * torch.sigmoid(2 * (v - 0.4))) / alpha
    loss = made.compute_loss(made.model, first_batch(made, 0))
    assert loss.item() == pytest.approx(gamma.sum().item() * math.log(2), rel=1e-6)


def test_metrics_are_means_over_everything_since_the_last_log(tmp_path):
    made = trainer(config(tmp_path, logging_steps=3, logging_first_step=False, max_steps=3, loss_type="sum"))
    seen = []
    original = made.record

    def record(metrics):
        seen.extend((name, values.detach().clone()) for name, values in metrics.items())
        original(metrics)

    made.record = record
    made.train()
    logged = made.state.log_history[0]
    names = {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "win_gap", "lose_gap"}
    for name in names | {"alpha", "gamma"}:
        values = torch.cat([values.float().flatten() for key, values in seen if key == name])
        assert len(values) in (6, 18)
        assert logged[name] == pytest.approx(values.mean().item(), rel=1e-5, abs=1e-9), name
    difference, scale = logged["rewards/chosen"] - logged["rewards/rejected"], abs(logged["rewards/chosen"])
    assert logged["rewards/margins"] == pytest.approx(difference, abs=rounding.LOGGED * (scale + abs(difference)))
    assert logged["rewards/chosen"] == pytest.approx(-250 * logged["win_gap"], rel=1e-4)
    with pytest.raises(ValueError, match="given 'learning_rate', 'loss', which Trainer logs itself"):
        original({"loss": torch.ones(2), "learning_rate": torch.ones(2), "mine": torch.ones(2)})


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_training_learns_the_preference_and_leaves_the_base_alone(tmp_path, loss_type):
    made = trainer(config(tmp_path, loss_type=loss_type, max_steps=30), rows=2)
    before, base = trained_weights(made), frozen_weights(made)
    made.train()
    last = made.state.log_history[-2]
    assert sum(losses(made)[-5:]) < 0.5 * sum(losses(made)[:5])
    assert last["rewards/accuracies"] == 1.0 and last["rewards/margins"] > 1
    assert_equal_weights(frozen_weights(made), base)
    assert all(not torch.equal(weight, before[name]) for name, weight in trained_weights(made).items())


def test_the_documented_call_works_on_raw_videos(tmp_path, monkeypatch):
    """Positional arguments, hardly any configuration, mp4 files in, an adapter out."""
    monkeypatch.chdir(tmp_path)
    pipeline = tiny_wan_pipeline()
    args = VideoGroupDPOConfig(output_dir="out", num_train_epochs=1, cache_dir=str(tmp_path / "cache"))
    made = VideoGroupDPOTrainer(pipeline, args, tiny_group_dataset(2, 2))
    assert made.model is pipeline.transformer and made.pipeline is pipeline
    made.train()
    made.save_model()
    assert made.state.global_step == 2
    card = (tmp_path / "out" / "README.md").read_text()
    assert "group-dpo" in card and "max_sequence_length=16" in card and "'out'" in card
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()


def test_without_args_the_output_directory_names_model_and_method(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = VideoGroupDPOTrainer(tiny_transformer(), None, tiny_encoded_group(2))
    assert made.args.output_dir == "WanTransformer3DModel-GroupDPO"
    assert made.pipeline is None and made.max_sequence_length == 512


def test_a_preference_dataset_is_a_group_of_one(tmp_path):
    rows = [{**row, "rejected_latents": row["rejected_latents"][:1]} for row in tiny_encoded_group(2)]
    for row in rows:
        del row["rejected_scores"]
    made = trainer(config(tmp_path, physics_rewarding=False, max_steps=1), train_dataset=rows)
    made.train()
    assert losses(made) == [pytest.approx(math.log(2), rel=2e-7)]


def test_evaluation_reports_the_metrics_of_training_per_sample_and_repeatably(tmp_path):
    reports = []
    for batch_size in (1, 2):  # three samples: the mean must be over samples, not over batches of unequal size
        args = config(tmp_path, per_device_eval_batch_size=batch_size)
        made = trainer(args, model=double(tiny_wan_pipeline()), eval_dataset=tiny_encoded_group(3, seed=9))
        disturb_adapter(made)
        reports += [made.evaluate(), made.evaluate()]
    names = {"eval_loss", "eval_win_gap", "eval_lose_gap", "eval_alpha", "eval_gamma", "eval_rewards/margins"}
    for name in names | {"eval_rewards/accuracies", "eval_rewards/chosen", "eval_rewards/rejected"}:
        assert reports[0][name] == reports[1][name] and reports[2][name] == reports[3][name]
        assert reports[0][name] == pytest.approx(reports[2][name], rel=1e-4), name
    assert reports[0]["eval_rewards/margins"] != 0


def test_several_evaluation_datasets_keep_their_names(tmp_path):
    datasets = {"easy": tiny_encoded_group(2, seed=1), "hard": tiny_encoded_group(2, seed=2)}
    report = trainer(config(tmp_path), eval_dataset=datasets).evaluate()
    assert {"eval_easy_loss", "eval_hard_loss", "eval_easy_rewards/margins"} <= report.keys()
    assert report["eval_easy_gamma"] != report["eval_hard_gamma"]


def test_evaluation_sees_the_same_noise_at_every_step_and_training_does_not(tmp_path):
    made = trainer(config(tmp_path), eval_dataset=tiny_encoded_group(3, seed=9))
    disturb_adapter(made)
    evaluations, training = [], []
    for step in (0, 5):
        made.state.global_step = step
        evaluations.append(made.evaluate()["eval_rewards/chosen"])
        training.append(made.compute_loss(made.model, first_batch(made, 0, 1)).item())
    assert evaluations[0] == evaluations[1]
    assert training[0] != training[1]
