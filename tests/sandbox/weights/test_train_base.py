"""The script that makes the sandbox's weights: its parts, and the whole of it at a hundredth of its length."""

import re

import numpy as np
import pytest
import torch

from tests.support import rounding
from video_trl.sandbox import load_sandbox, simulate
from video_trl.sandbox.weights import train_transformer
from video_trl.sandbox.weights.pipeline import LATENT_CHANNELS, build_pipeline, build_vae
from video_trl.sandbox.weights.train_base import Phase, foreground_weight, main, sample_batch, train_base
from video_trl.sandbox.weights.train_transformer import (
    VIOLATED_SHARE,
    Corpus,
    Schedule,
    TransformerRun,
    draw_rows,
    encode_corpus,
    measure_latents,
    normalised,
)
from video_trl.sandbox.weights.training import bfloat16_layers, orthogonalised, to_tensor, warm_cosine
from video_trl.sandbox.world.prompts import BASE_MOTIONS, parse_prompt


def test_crops_follow_the_bodies_and_whole_clips_stay_whole():
    clips = [simulate(seed) for seed in range(4)]
    rng = np.random.default_rng(0)
    crops = sample_batch(clips, Phase(1, 12, (5,), 1e-3), rng)
    assert crops.shape == (12, 3, 5, 32, 32) and crops.abs().max() <= 1
    share = (foreground_weight(crops) > 1).float().mean()
    whole = sample_batch(clips, Phase(1, 2, (13,), 1e-3, whole=True), rng)
    assert whole.shape == (2, 3, 13, 64, 64)
    assert share > 2 * (foreground_weight(whole) > 1).float().mean()


def test_the_foreground_is_the_ball_and_not_the_room():
    clip = simulate(1, motion="rolling")
    weight = foreground_weight(to_tensor(clip.video[None]))[0, 0].numpy()
    for frame, (x, y) in enumerate(clip.positions[:, 0]):
        assert weight[frame, int((1 - y) * 64), int(x * 64)] == 9
    assert (weight[:, :20] == 1).all()


def test_the_learning_rate_warms_up_and_decays():
    values = [warm_cosine(step, 1000, warmup=50) for step in range(1000)]
    assert values[0] == pytest.approx(0.02) and max(values) == pytest.approx(1.0, abs=0.02)
    assert values[-1] == pytest.approx(0.02, abs=1e-3)


def test_the_corpus_is_kept_and_normalised_by_what_the_vae_config_says(tmp_path):
    torch.manual_seed(0)
    vae, path = build_vae().eval(), tmp_path / "lawful.safetensors"
    raw = encode_corpus(vae, path, 10, seed=0, violated=False)
    assert raw.latents.shape == (10, LATENT_CHANNELS, 4, 8, 8) and len(raw.prompts) == 10
    measure_latents(vae, raw)
    latents = normalised(vae, raw).latents
    bound = rounding.sums(2 * latents[:, 0].numel())  # measured over them, and measured again
    torch.testing.assert_close(latents.mean((0, 2, 3, 4)), torch.zeros(LATENT_CHANNELS), atol=bound, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3, 4)), torch.ones(LATENT_CHANNELS), atol=bound, rtol=0)
    again = encode_corpus(None, path, 10, seed=0, violated=False)  # nothing is encoded twice
    assert torch.equal(again.latents, raw.latents) and again.prompts == raw.prompts
    with pytest.raises(ValueError, match="holds 10 clips, expected 11"):
        encode_corpus(vae, path, 11, seed=0, violated=False)


def test_the_corpora_are_lawful_and_violated_clips_of_the_base_models_motions(tmp_path):
    vae = build_vae().eval()
    lawful, violated = (
        encode_corpus(vae, tmp_path / f"{violated}.safetensors", 10, seed=0, violated=violated)
        for violated in (False, True)
    )
    assert {parse_prompt(prompt).motion for prompt in lawful.prompts} == set(BASE_MOTIONS)
    assert [parse_prompt(prompt).motion for prompt in violated.prompts] == 2 * list(BASE_MOTIONS)
    assert not torch.equal(lawful.latents, violated.latents)


def test_the_learning_rate_stays_and_then_falls_to_zero():
    schedule = Schedule(lawful=300, mixed=200, final=100)
    rates = [schedule.rate(step) for step in range(schedule.steps)]
    assert rates[0] == pytest.approx(0.01) and rates[99:500] == [1.0] * 401
    assert rates[550] == pytest.approx(0.5) and rates[-1] == pytest.approx(0.01)
    assert [schedule.violated_share(step) for step in (0, 299, 300, 599)] == [0, 0, VIOLATED_SHARE, VIOLATED_SHARE]


def test_the_mixture_has_its_share_of_violated_rows():
    rng = np.random.default_rng(0)
    rows = np.concatenate([draw_rows(rng, 100, 50, 0.57) for _ in range(200)])
    assert (rows >= 100).mean() == pytest.approx(0.57, abs=0.02) and rows.max() == 149 and rows.min() == 0
    assert (draw_rows(rng, 100, 50, 0.0) < 100).all()


def corpus(number: int, seed: int) -> Corpus:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(number, LATENT_CHANNELS, 4, 8, 8, generator=generator)
    return Corpus(latents, ["A red ball falls and bounces on the floor."] * number)


@pytest.fixture
def small_batches(monkeypatch):
    """What a step computes is the same for a few rows; where bfloat16 is emulated, 32 of them take ten seconds."""
    monkeypatch.setattr(train_transformer, "BATCH_SIZE", 4)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("train_text", [True, False])
def test_a_run_that_is_cut_goes_on_as_if_it_had_not_been(tmp_path, train_text):
    def trained(folder, *schedules):
        for schedule in schedules:  # each in a process of its own, as far as the weights are concerned
            torch.manual_seed(0)
            pipeline = build_pipeline()
            run = TransformerRun(pipeline, train_text=train_text, seed=0)
            run.train(corpus(4, 0), corpus(4, 1), schedule, folder)
        return pipeline

    # One schedule in one go; then the same, cut in its second step by a shorter one that has no final leg.
    whole = trained(tmp_path / "whole", Schedule(2, 1, 2))
    cut = trained(tmp_path / "cut", Schedule(2, 0, 0), Schedule(2, 1, 2))
    for name in ("transformer", "text_encoder"):
        for key, value in whole.components[name].state_dict().items():
            assert torch.equal(value, cut.components[name].state_dict()[key]), key


@pytest.mark.usefixtures("small_batches")
def test_the_average_of_the_weights_is_what_stays(tmp_path):
    torch.manual_seed(0)
    pipeline = build_pipeline()
    before = pipeline.transformer.blocks[0].attn1.to_q.weight.detach().clone()
    text_before = pipeline.text_encoder.get_input_embeddings().weight.detach().clone()
    run = TransformerRun(pipeline, train_text=False, seed=0)
    run.train(corpus(4, 0), corpus(4, 1), Schedule(3, 0, 0), tmp_path)
    after = pipeline.transformer.blocks[0].attn1.to_q.weight
    assert not torch.equal(before, after)
    assert torch.equal(after, run.average["transformer.blocks.0.attn1.to_q.weight"])
    assert torch.equal(text_before, pipeline.text_encoder.get_input_embeddings().weight)


@pytest.mark.parametrize("shape", [(24, 40), (64, 16), (16, 64)])
def test_orthogonalised_updates_have_singular_values_near_one(shape):
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalised(matrices))
    assert values.min() > 0.3 and values.max() < 1.3
    alone = torch.cat([orthogonalised(matrix[None]) for matrix in matrices])
    torch.testing.assert_close(orthogonalised(matrices), alone, atol=0.02, rtol=0.05)


def test_bfloat16_layers_compute_the_same_function_and_leave_no_trace():
    torch.manual_seed(0)
    transformer = build_pipeline().transformer
    inputs = (torch.randn(2, LATENT_CHANNELS, 4, 8, 8), torch.tensor([100.0, 900.0]), torch.randn(2, 24, 64))
    with torch.no_grad():
        exact = transformer(*inputs, return_dict=False)[0]
        with bfloat16_layers(transformer):
            quick = transformer(*inputs, return_dict=False)[0]
        after = transformer(*inputs, return_dict=False)[0]
    assert 0 < (quick - exact).norm() / exact.norm() < 0.01
    assert torch.equal(after, exact)


@pytest.mark.parametrize("arguments", [{"vae_scale": 0}, {"corpus_clips": 0}, {"schedule": Schedule(0, 0, 0)}])
def test_a_size_that_makes_no_sense_is_refused(tmp_path, arguments):
    with pytest.raises(ValueError, match=re.escape("Expected steps, `corpus_clips` and `vae_scale` > 0")):
        train_base(tmp_path / "out", tmp_path / "work", **arguments)


@pytest.mark.slow
def test_the_command_makes_a_pipeline_that_load_sandbox_takes(tmp_path):
    output = str(tmp_path / "out")
    sizes = ["--vae-scale", "0.002", "--clips", "10", "--lawful", "2", "--mixed", "2", "--final", "1"]
    main(["--output", output, "--work", str(tmp_path / "work"), *sizes])
    sandbox = load_sandbox(output)
    frames = sandbox.pipeline(sandbox.train_prompts[0], output_type="np", **sandbox.call_kwargs).frames
    assert frames.shape == (1, 13, 64, 64, 3) and np.isfinite(frames).all()
