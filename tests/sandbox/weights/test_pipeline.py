"""The shipped pipeline: real classes, small files, a faithful autoencoder, a base model that can be improved."""

import re

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from video_trl.sandbox import load_sandbox, simulate
from video_trl.sandbox.data.generate import generate
from video_trl.sandbox.data.prompts import balanced_prompts
from video_trl.sandbox.judge.modes import find_mode, mode_shares
from video_trl.sandbox.weights.pipeline import (
    CALL_KWARGS,
    MAX_PROMPT_TOKENS,
    PIPELINE_PATH,
    build_pipeline,
    build_tokenizer,
)
from video_trl.sandbox.world.prompts import BASE_MOTIONS, all_prompts, parse_prompt
from video_trl.sandbox.world.simulate import BASE_VIOLATIONS


@pytest.fixture(scope="module")
def sandbox():
    return load_sandbox()


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_the_tokenizer_knows_every_word_and_fits_every_sentence(split):
    tokenizer = build_tokenizer()
    sentences = all_prompts(split)
    for ids in tokenizer(sentences).input_ids:
        assert tokenizer.unk_token_id not in ids
        assert ids[-1] == tokenizer.eos_token_id and len(ids) <= MAX_PROMPT_TOKENS
    assert tokenizer("A crimson ball.").input_ids.count(tokenizer.unk_token_id) == 1
    assert tokenizer("a RED ball falls").input_ids == tokenizer("A red ball, falls.").input_ids


def test_a_fresh_pipeline_survives_saving(tmp_path):
    torch.manual_seed(0)
    pipeline = build_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path)
    reloaded = WanPipeline.from_pretrained(tmp_path)
    reloaded.set_progress_bar_config(disable=True)
    kwargs = {**CALL_KWARGS, "num_inference_steps": 2, "output_type": "np"}
    prompt = all_prompts("train")[0]
    videos = [p(prompt, generator=torch.Generator().manual_seed(0), **kwargs).frames for p in (pipeline, reloaded)]
    assert videos[0].shape == (1, 13, 64, 64, 3)
    np.testing.assert_allclose(*videos, atol=1e-4)  # loading may lay weights out otherwise, which reorders sums


def test_shipped_weights_are_small_safetensors_of_the_real_classes(sandbox):
    files = [path for path in PIPELINE_PATH.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files if path.suffix == ".safetensors") <= 16 * 2**20
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    assert type(sandbox.pipeline) is WanPipeline
    parameters = [*sandbox.pipeline.transformer.parameters(), *sandbox.pipeline.vae.parameters()]
    assert {p.dtype for p in parameters} == {torch.float32}


def test_prompts_are_split(sandbox):
    assert not set(sandbox.train_prompts) & set(sandbox.heldout_prompts)
    assert {parse_prompt(prompt).motion for prompt in sandbox.heldout_prompts} == set(BASE_MOTIONS)
    assert set(sandbox.call_kwargs) == set(CALL_KWARGS)


def through_the_autoencoder(sandbox, clips):
    video = torch.from_numpy(np.stack([clip.video for clip in clips])).permute(0, 4, 1, 2, 3) / 127.5 - 1
    with torch.no_grad():
        decoded = sandbox.pipeline.vae.decode(sandbox.pipeline.vae.encode(video).latent_dist.mode()).sample
    return list(((decoded.permute(0, 2, 3, 4, 1) + 1) * 127.5).round().clip(0, 255).to(torch.uint8).numpy())


@pytest.mark.parametrize("rendering", ["plain", "wild"])
def test_clean_clips_stay_lawful_through_the_autoencoder(sandbox, rendering):
    recognised = 0
    for motion in BASE_MOTIONS:
        clips = [simulate(1_500_000 + i, motion=motion, split="heldout", rendering=rendering) for i in range(6)]
        decoded = through_the_autoencoder(sandbox, clips)
        scores = sandbox.judge.score(decoded, [clip.prompt for clip in clips])
        assert np.mean([score["pc"] for score in scores]) >= 0.95, motion
        found = [find_mode(video, clip.prompt).name for video, clip in zip(decoded, clips, strict=True)]
        recognised += found.count("lawful")
    assert recognised >= 0.95 * 6 * len(BASE_MOTIONS)


def test_violated_clips_keep_their_violation_through_the_autoencoder(sandbox):
    for motion, names in BASE_VIOLATIONS.items():
        for violation in names:
            clips = [simulate(1_500_000 + i, motion=motion, violation=violation, split="heldout") for i in range(5)]
            decoded = through_the_autoencoder(sandbox, clips)
            found = [find_mode(video, clip.prompt).name for video, clip in zip(decoded, clips, strict=True)]
            assert found.count(violation) >= 4, (motion, found)


@pytest.mark.slow
def test_the_base_model_follows_prompts_and_breaks_laws_in_ways_that_have_names(sandbox):
    prompts = balanced_prompts("heldout", 84)
    videos = generate(sandbox.pipeline, prompts, list(range(84)), dict(sandbox.call_kwargs))
    scores = sandbox.judge.score(list(videos), prompts)
    shares = mode_shares([find_mode(video, prompt).name for video, prompt in zip(videos, prompts, strict=True)])
    assert np.mean([score["sa"] for score in scores]) >= 0.85
    assert 0.3 <= np.mean([score["pc"] for score in scores]) <= 0.55
    assert 0.3 <= shares["lawful"] <= 0.55 and shares["violated"] >= 0.25 and shares["neither"] <= 0.25


def test_a_folder_without_pipeline_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=re.escape("found no model_index.json")):
        load_sandbox(tmp_path)
