"""The script that makes the sandbox's weights: its parts, and the whole of it at a hundredth of its length."""

import re

import numpy as np
import pytest
import torch

from tests.support import rounding
from video_trl.sandbox import load_sandbox, simulate
from video_trl.sandbox.weights.pipeline import LATENT_CHANNELS, build_pipeline, build_vae
from video_trl.sandbox.weights.train_base import (
    Phase,
    encode_corpus,
    foreground_weight,
    main,
    orthogonalised,
    sample_batch,
    to_tensor,
    train_base,
    train_transformer,
    warm_cosine,
)


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


def test_the_corpus_is_normalised_by_what_the_vae_config_says():
    torch.manual_seed(0)
    vae = build_vae().eval()
    latents, prompts = encode_corpus(vae, 8, seed=0, measure=True)
    assert latents.shape == (8, LATENT_CHANNELS, 4, 8, 8) and len(prompts) == 8
    bound = rounding.sums(2 * latents[:, 0].numel())  # measured over them, and measured again
    torch.testing.assert_close(latents.mean((0, 2, 3, 4)), torch.zeros(LATENT_CHANNELS), atol=bound, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3, 4)), torch.ones(LATENT_CHANNELS), atol=bound, rtol=0)
    assert len(vae.config.latents_mean) == len(vae.config.latents_std) == LATENT_CHANNELS
    assert all(deviation > 0 for deviation in vae.config.latents_std)

    # Training that starts from finished weights keeps their scale: it divides by what the config holds already.
    vae.register_to_config(latents_mean=[0.0] * LATENT_CHANNELS, latents_std=[2.0] * LATENT_CHANNELS)
    raw, _ = encode_corpus(vae, 8, seed=0, measure=False)
    assert vae.config.latents_std == [2.0] * LATENT_CHANNELS
    assert raw.std((0, 2, 3, 4)).max() != pytest.approx(1.0, abs=0.05)


def test_the_transformer_learns_and_keeps_the_average_of_its_weights():
    torch.manual_seed(0)
    pipeline = build_pipeline()
    before = pipeline.transformer.blocks[0].attn1.to_q.weight.detach().clone()
    text_before = pipeline.text_encoder.get_input_embeddings().weight.detach().clone()
    train_transformer(pipeline, torch.randn(4, LATENT_CHANNELS, 4, 8, 8), ["A red ball falls."] * 4, steps=3, seed=0)
    assert not torch.equal(before, pipeline.transformer.blocks[0].attn1.to_q.weight)
    assert not torch.equal(text_before, pipeline.text_encoder.get_input_embeddings().weight)
    assert not pipeline.transformer.training


@pytest.mark.parametrize("shape", [(24, 24), (64, 16), (16, 64)])
def test_orthogonalised_updates_have_singular_values_near_one(shape):
    values = torch.linalg.svdvals(orthogonalised(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
    assert values.min() > 0.3 and values.max() < 1.3


def test_a_scale_that_makes_no_sense_is_refused(tmp_path):
    with pytest.raises(ValueError, match=re.escape("Expected `scale` > 0")):
        train_base(tmp_path, scale=0)


@pytest.mark.slow
def test_the_command_makes_a_pipeline_that_load_sandbox_takes(tmp_path):
    main(["--output", str(tmp_path), "--scale", "0.002"])
    sandbox = load_sandbox(tmp_path)
    frames = sandbox.pipeline(sandbox.train_prompts[0], output_type="np", **sandbox.call_kwargs).frames
    assert frames.shape == (1, 13, 64, 64, 3) and np.isfinite(frames).all()
