"""The loss of `VideoREPATrainer` against the same computation written out, what it trains, and what it refuses."""

import json
import math

import datasets
import pytest
import safetensors.torch
import torch

from tests.support import rounding
from tests.support.adapters import IN_FOLDER
from tests.support.tiny import (
    tiny_encoded_video,
    tiny_group_dataset,
    tiny_mp4,
    tiny_transformer,
    tiny_wan_pipeline,
)
from tests.support.trainer.repa_runs import aligned_rows, repa_config, repa_trainer, tiny_teacher, with_tokens
from tests.support.trainer.runs import (
    RecordGradients,
    StopAfter,
    assert_equal_weights,
    first_batch,
    losses,
    trained_weights,
)
from tests.trainer.test_group_dpo_trainer import generator_of
from video_trl import VideoREPAConfig, VideoREPATrainer
from video_trl.data.encoding.teacher_tokens import dequantise_tokens
from video_trl.data.video_io import VideoDecodeError


SHAPE = (4, 3, 4, 4)  # latents of 9 frames


def relation_loss_by_hand(student: torch.Tensor, teacher: torch.Tensor, margin: float) -> torch.Tensor:
    """One mean over all pairs of tokens `(F, N, D)`, with a soft margin."""
    relations = []
    for tokens in (student, teacher):
        unit = tokens.flatten(0, 1) / tokens.flatten(0, 1).norm(dim=1, keepdim=True)
        relations.append(unit @ unit.T)
    return ((relations[0] - relations[1]).abs() - margin).clamp(min=0).mean()


def losses_by_hand(made, index: int, row: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Diffusion loss, alignment loss and raw relation error of one video at step 0, from the bare transformer."""
    generator = generator_of(42, 0, index)
    sigma = torch.rand((), generator=generator, dtype=torch.float64).float()
    torch.randint(1, (), generator=generator)
    noise = torch.randn(*SHAPE, generator=generator)
    padded = torch.zeros(1, 16, row["prompt_embeds"].shape[1])
    padded[0, : len(row["prompt_embeds"])] = row["prompt_embeds"]
    kept = []
    handle = made.model.blocks[0].register_forward_hook(lambda module, inputs, output: kept.append(output))
    noisy = (1 - sigma) * row["latents"] + sigma * noise
    velocity = made.model(noisy[None], 1000 * sigma[None], padded, return_dict=False)[0][0]
    handle.remove()
    hidden = kept[0].view(3, 4, 24)  # three latent frames of 2 x 2 tokens
    first, second, third = (made.alignment.head.projector[place] for place in (0, 2, 4))
    silu = torch.nn.functional.silu
    tokens = silu(silu(hidden @ first.weight.T + first.bias) @ second.weight.T + second.bias)
    tokens = tokens @ third.weight.T + third.bias
    # Centres 2.5 and 6.5 of latents 1 and 2 at the teacher's 1.5, 3.5, 5.5 and 7.5.
    shares = (0.0, 0.25, 0.75, 1.0)
    student, unprojected = (
        torch.stack([(1 - share) * side[1] + share * side[2] for share in shares]) for side in (tokens, hidden)
    )
    teacher = dequantise_tokens(row["teacher_tokens"][None], row["teacher_scale"][None])[0]
    error = (velocity - (noise - row["latents"])).square().mean()
    raw = relation_loss_by_hand(unprojected, teacher, 0.0)
    if made.args.alignment_loss == "repa":
        return error, -torch.nn.functional.cosine_similarity(student, teacher, dim=-1).mean(), raw
    return error, relation_loss_by_hand(student, teacher, made.alignment.margin), raw


@pytest.mark.parametrize("alignment_loss", ["trd", "repa"])
def test_loss_and_gradients_equal_the_computation_by_hand(tmp_path, alignment_loss):
    rows = aligned_rows(2)
    made = repa_trainer(tmp_path, train_dataset=rows, alignment_loss=alignment_loss, coefficient=0.7, margin=0.05)
    with torch.no_grad():
        for name, weight in made.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    parameters = [weight for weight in made.model.parameters() if weight.requires_grad]
    batch = first_batch(made, 0, 1)
    loss, outputs = made.compute_loss(made.model, batch, return_outputs=True)
    gradients = torch.autograd.grad(loss, parameters)

    by_hand = [losses_by_hand(made, index, row) for index, row in enumerate(rows)]
    expected = sum(error + 0.7 * alignment for error, alignment, _ in by_hand) / 2
    expected_gradients = torch.autograd.grad(expected, parameters)
    bound = rounding.SINGLE
    assert loss.item() == pytest.approx(expected.item(), rel=bound)
    assert outputs["alignment"].tolist() == pytest.approx([x.item() for _, x, _ in by_hand], rel=1e-4)
    assert outputs["losses"].mean().item() == pytest.approx(loss.item())
    logged = made.metrics.train.pop(made.accelerator)
    assert logged["trd/raw"] == pytest.approx(sum(raw.item() for *_, raw in by_hand) / 2, rel=1e-4)
    names = [name for name, weight in made.model.named_parameters() if weight.requires_grad]
    rounding.assert_close_weights(
        dict(zip(names, gradients, strict=True)), dict(zip(names, expected_gradients, strict=True)), bound
    )
    alignment = made.compute_loss(made.model, batch, return_outputs=True)[1]["alignment"].mean()
    alone = torch.autograd.grad(alignment, parameters, allow_unused=True)
    reached = {name for name, gradient in zip(names, alone, strict=True) if gradient is not None and gradient.any()}
    assert any("blocks.0" in name and "lora_A" in name for name in reached)
    assert sum("trained_head" in name for name in reached) == 6
    assert not any("blocks.1" in name for name in reached)  # lies behind the aligned block


def test_first_value_of_raw_is_the_projector_free_relation_error(tmp_path):
    rows = aligned_rows(2)
    made = repa_trainer(tmp_path, train_dataset=rows, max_steps=1, projector="none", margin=0.0)
    assert made.trained_head is None and not hasattr(made.model, "trained_head")
    made.train()
    log = made.state.log_history[0]
    assert log["trd/raw"] == pytest.approx(
        log["loss/alignment"], rel=1e-5
    )  # the projector is all that sets them apart
    # Four frames: one mean over all pairs is a quarter spatial and three quarters temporal.
    assert log["loss/alignment"] == pytest.approx(log["trd/spatial"] / 4 + log["trd/temporal"] * 3 / 4, rel=1e-5)
    assert log["loss"] == pytest.approx(log["loss/diffusion"] + 0.5 * log["loss/alignment"], rel=1e-4)
    assert log["trd/coefficient"] == 0.5


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("wan-t2v", {"projector": "none"}),
        ("wan-t2v", {"use_peft": False, "spatial_pooling": "conv"}),
        ("cogvideox-t2v", {}),
        ("cogvideox-t2v", {"use_peft": False, "spatial_pooling": "conv"}),
    ],
)
def test_training_lowers_the_relation_error(tmp_path, family, changes):
    recorder = RecordGradients()
    settings = {"coefficient": 10.0, "max_steps": 20, "margin": 0.0, "per_device_train_batch_size": 1} | changes
    if not settings.get("use_peft", True):
        settings["learning_rate"] = 1e-3
    rows = aligned_rows(1, family)
    made = repa_trainer(tmp_path, family, train_dataset=rows, callbacks=[recorder], **settings)
    made.train()
    alignment = [entry["loss/alignment"] for entry in made.state.log_history if "loss/alignment" in entry]
    assert sum(alignment[-5:]) < 0.9 * sum(alignment[:5])  # the noise differs from step to step
    heads = [] if made.trained_head is None else [name for name, _ in made.trained_head.named_parameters()]
    assert len(heads) == {"none": 0}.get(made.args.projector, 8 if "spatial_pooling" in changes else 6)
    assert {f"trained_head.{name}" for name in heads} <= recorder.steps[-1].keys()


def test_resuming_is_bit_exact_and_the_adapter_holds_no_head(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3}
    straight = repa_trainer(tmp_path / "straight", **saving)
    straight.train()
    stopped = repa_trainer(tmp_path / "stopped", callbacks=[StopAfter(3)], **saving)
    stopped.train()
    resumed = repa_trainer(tmp_path / "resumed", **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-3"))
    assert_equal_weights(trained_weights(resumed), trained_weights(straight))
    assert sum(name.startswith("trained_head") for name in trained_weights(straight)) == 6
    assert losses(resumed)[-3:] == losses(straight)[-3:]

    straight.save_model()
    adapter = safetensors.torch.load_file(tmp_path / "straight" / "pytorch_lora_weights.safetensors")
    assert adapter and not [name for name in adapter if "trained_head" in name]
    fresh = tiny_wan_pipeline()
    fresh.load_lora_weights(tmp_path / "straight", **IN_FOLDER)
    other = repa_trainer(tmp_path / "other", projector="linear")
    with pytest.raises(ValueError, match="trained_head"):
        other.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-3"))


def test_head_has_its_own_learning_rate(tmp_path):
    made = repa_trainer(tmp_path, max_steps=1, learning_rate=1e-3, head_learning_rate=0.0)
    before = {name: weight.clone() for name, weight in made.trained_head.named_parameters()}
    made.train()
    assert_equal_weights(dict(made.trained_head.named_parameters()), before)
    assert sorted({group["initial_lr"] for group in made.optimizer.param_groups if group["params"]}) == [0.0, 1e-3]


def test_tokens_of_the_cache_and_of_the_moment_agree(tmp_path):
    """Group rows, of which the chosen video is taken: encoded once and cached in 8 bit, or looked at in the step."""
    dataset = tiny_group_dataset(2, 1, num_frames=9)
    runs = {}
    for precompute in (True, False):
        made = repa_trainer(
            tmp_path / str(precompute),
            train_dataset=dataset,
            teacher=tiny_teacher(),
            precompute_teacher=precompute,
            cache_dir=str(tmp_path / "cache"),
            fps=8,
            max_steps=1,
        )
        batch = first_batch(made, 0, 1)
        seen = made.alignment.look(batch)
        runs[precompute] = (batch, seen, made.compute_loss(made.model, batch, return_outputs=True)[1])
        assert made.alignment.margin == 0.0  # VideoMAE's
    cached, online = runs[True], runs[False]
    assert "video" in online[0] and cached[0]["teacher_tokens"].dtype == torch.int8
    assert cached[1].grid == online[1].grid == (4, 2, 2)
    assert torch.equal(cached[1].frame_times, online[1].frame_times)
    scale = online[1].tokens.abs().amax(-1, keepdim=True)
    assert ((cached[1].tokens - online[1].tokens).abs() <= 0.51 / 127 * scale).all()
    assert torch.equal(cached[2]["errors"], online[2]["errors"])
    torch.testing.assert_close(cached[2]["alignment"], online[2]["alignment"], rtol=0, atol=5e-3)
    assert not torch.equal(cached[2]["alignment"], online[2]["alignment"])


def test_evaluation_and_metrics(tmp_path):
    made = repa_trainer(tmp_path, eval_dataset=aligned_rows(3), coefficient_warmup_steps=2, max_steps=1)
    made.train()
    metrics = made.evaluate()
    expected = {
        "loss",
        "loss/diffusion",
        "loss/alignment",
        "trd/spatial",
        "trd/temporal",
        "trd/raw",
        "trd/coefficient",
    }
    assert expected <= {name.removeprefix("eval_") for name in metrics}
    # One step is done: the second step of the warm-up comes next.
    assert metrics["eval_trd/coefficient"] == 0.5 and made.state.log_history[0]["trd/coefficient"] == 0.25


@pytest.mark.parametrize(
    ("changes", "values"),
    [
        ({}, {0: 0.5, 99: 0.5}),
        ({"coefficient_warmup_steps": 4}, {0: 0.125, 1: 0.25, 3: 0.5, 4: 0.5, 50: 0.5}),
        ({"coefficient_decay": "linear"}, {0: 0.5, 50: 0.25, 75: 0.125, 100: 0.0}),
        ({"coefficient_decay": "cosine"}, {0: 0.5, 25: 0.25 * (1 + math.cos(math.pi / 4)), 50: 0.25, 100: 0.0}),
        ({"coefficient_cutoff": 0.6}, {0: 0.5, 59: 0.5, 60: 0.0, 99: 0.0}),
        ({"coefficient_cutoff": 10}, {9: 0.5, 10: 0.0}),
        (
            {"coefficient_warmup_steps": 10, "coefficient_decay": "linear", "coefficient_cutoff": 50},
            {9: 0.5, 10: 0.5, 30: 0.25, 49: 0.0125, 50: 0.0},
        ),
    ],
)
def test_schedule_of_the_coefficient(tmp_path, changes, values):
    args = repa_config(tmp_path, **changes)
    for step, value in values.items():
        assert args.coefficient_at(step, 100) == pytest.approx(value), step


@pytest.mark.parametrize(
    ("name", "margin"),
    [
        ("OpenGVLab/VideoMAEv2-Base", 0.1),
        ("vit_b_k710_dl_from_giant.pth", 0.1),
        ("facebook/vjepa2-vitl-fpc64-256", 0.05),
        ("MCG-NJU/videomae-base", 0.0),
        ("sandbox", 0.0),
        ("facebook/dinov2-base", 0.1),
    ],
)
def test_margin_follows_the_teacher(tmp_path, name, margin):
    assert repa_config(tmp_path).margin_for(name) == margin
    assert repa_config(tmp_path, margin=0.3).margin_for(name) == 0.3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alignment_loss": "gram"}, "`alignment_loss` must be one of 'trd', 'repa'"),
        ({"coefficient": -0.5}, "`coefficient` must be finite and not negative"),
        ({"margin": 2.0}, r"`margin` must be in \[0, 2\)"),
        ({"norm": "l2", "margin": 0.1}, "`norm='l2'` has no margin"),
        ({"align_layer": 0}, "`align_layer` must be a block"),
        ({"align_layer": 2.5}, "`align_layer` must be a block"),
        ({"projector": "none", "spatial_pooling": "conv"}, "works on projected tokens"),
        ({"coefficient_cutoff": 0.0}, "`coefficient_cutoff` must be positive"),
        ({"row_chunk": 0}, "`row_chunk` must be at least 1"),
    ],
)
def test_bad_settings_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        repa_config(tmp_path, **changes)
    assert VideoREPAConfig(str(tmp_path), use_cpu=True, norm="l2").margin == 0.0


def test_what_cannot_be_aligned_is_refused_before_training(tmp_path):
    raw = tiny_group_dataset(1, 1, num_frames=9)
    for arguments, message in (
        ({"train_dataset": tiny_encoded_video(2)}, "encoded already, without the teacher's columns"),
        ({"train_dataset": raw}, "Expected a teacher, got none"),
        ({"align_layer": 3}, "`align_layer` must be a block from 1 to 2"),
        ({"train_dataset": with_tokens(tiny_encoded_video(2, latents_shape=(4, 1, 4, 4)))}, "Use longer videos"),
        (
            {"train_dataset": with_tokens(tiny_encoded_video(2, latents_shape=(4, 3, 4, 6)))},
            "3 token columns and the teacher 2",
        ),
        ({"temporal_target": "student", "train_dataset": short_rows()}, "Relations over time need two token frames"),
        ({"alignment_loss": "repa", "projector": "none"}, "the width of the transformer"),
        ({"train_dataset": raw, "teacher": tiny_teacher(), "fps": 8, "num_frames": 7}, "Set `num_frames` to 5 or 9"),
    ):
        with pytest.raises(ValueError, match=message):
            repa_trainer(tmp_path, **arguments)
    with pytest.raises(ValueError, match="Got a teacher twice"):
        VideoREPATrainer(tiny_wan_pipeline(), repa_config(tmp_path, teacher="sandbox"), raw, teacher=tiny_teacher())
    # A teacher that sees other places is found out with one video, before all of them are encoded.
    teacher = tiny_teacher(image_size=48)
    with pytest.raises(ValueError, match="2 token rows and the teacher 3"):
        repa_trainer(tmp_path, train_dataset=raw, teacher=teacher, fps=8, cache_dir=str(tmp_path / "none"))
    unseen = {"teacher": tiny_teacher(), "fps": 8, "cache_dir": str(tmp_path / "none"), "align_layer": 3}
    with pytest.raises(ValueError, match="`align_layer` must be a block from 1 to 2"):
        repa_trainer(tmp_path, train_dataset=raw, **unseen)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("column", "change", "message"),
    [
        ("teacher_tokens", lambda value: None, r"Row 3: expected a value in \['teacher_tokens'\], got none"),
        (
            "teacher_tokens",
            lambda value: value[:, :, :5],
            r"Row 3: expected .*\(4, 4, 12\).* as in row 0.*\(4, 4, 5\)",
        ),
        ("teacher_scale", lambda value: value * math.nan, "Row 3: 'teacher_scale' is not finite"),
        (
            "teacher_frame_times",
            lambda value: value + 1,
            "Row 3: expected .* as in row 0, whose latents have the same",
        ),
    ],
)
@pytest.mark.parametrize("as_dataset", [False, True])
def test_all_rows_with_tokens_are_checked_before_the_first_step(tmp_path, column, change, message, as_dataset):
    rows = aligned_rows(4)
    rows[3][column] = change(rows[3][column])
    if as_dataset:
        rows = datasets.Dataset.from_list(
            [{k: v.tolist() if hasattr(v, "tolist") else v for k, v in row.items()} for row in rows]
        )
    with pytest.raises(ValueError, match=message):
        repa_trainer(tmp_path, train_dataset=rows)


def test_a_bad_video_is_found_before_the_teacher_is_loaded(tmp_path, monkeypatch):
    whole = tiny_mp4(0, num_frames=9)
    cut = whole[: len(whole) // 2]
    rows = [{"prompt": "a", "video": {"path": None, "bytes": content}} for content in (whole, cut)]
    args = repa_config(tmp_path, teacher="facebook/vjepa2-vitl-fpc64-256", cache_dir=str(tmp_path / "cache"))
    loaded = []
    monkeypatch.setattr(
        "video_trl.trainer.repa.teacher_alignment.load_teacher", lambda *names, **_: loaded.append(names)
    )
    with pytest.raises(VideoDecodeError, match="row 1, video"):
        VideoREPATrainer(tiny_wan_pipeline(), args, rows)
    assert loaded == []


def test_one_video_of_every_size_is_shown_to_the_teacher_before_any_is_encoded(tmp_path):
    """A second size that cannot be aligned is not found hours later, also where the teacher looks in every step."""
    sizes = ((32, 32), (32, 48))
    rows = [
        {"prompt": "a", "video": {"path": None, "bytes": tiny_mp4(0, num_frames=9, height=height, width=width)}}
        for height, width in sizes
    ]
    made = {"train_dataset": rows, "teacher": tiny_teacher(), "precompute_teacher": False}
    with pytest.raises(ValueError, match="32 x 48 pixels would be squeezed"):
        repa_trainer(tmp_path / "run", **made, cache_dir=str(tmp_path / "cache"))
    assert not list((tmp_path / "cache").glob("video-*"))


def short_rows() -> list[dict]:
    return with_tokens(tiny_encoded_video(2, latents_shape=(4, 2, 4, 4)), frames=2)


def test_a_bare_transformer_trains_on_rows_with_tokens(tmp_path):
    made = repa_trainer(tmp_path, model=tiny_transformer(), max_steps=2, temporal_target="student")
    made.train()
    assert len(losses(made)) == 2
    assert json.loads(made.args.to_json_string())["alignment_loss"] == "trd"
