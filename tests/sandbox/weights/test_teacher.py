"""The sandbox's teacher: what it was trained on, and that the shipped one has learned something about motion."""

import re

import numpy as np
import pytest
import torch

from video_trl.load import load_teacher
from video_trl.sandbox import simulate
from video_trl.sandbox.weights.train_teacher import (
    MASKED_SHARE,
    build_model,
    main,
    patches,
    pixel_weights,
    random_masks,
    reconstruction_loss,
    sample_videos,
    train_teacher,
)
from video_trl.teachers.base import normalise


def as_video(clips):
    return torch.from_numpy(np.stack([clip.video for clip in clips])).movedim(-1, 2).float() / 255


def test_targets_are_in_the_order_of_the_decoder():
    """`transformers` reports an unweighted loss over the same pixels: ours with equal weights has to agree."""
    torch.manual_seed(0)
    model, video, masked = build_model(), torch.rand(2, 12, 3, 64, 64), random_masks(2, 96)
    output = model(normalise(video), bool_masked_pos=masked)
    expected = (output.logits - patches(video)[masked].view_as(output.logits)).square().mean()
    torch.testing.assert_close(output.loss, expected)
    plain = (output.logits - patches(normalise(video))[masked].view_as(output.logits)).square().mean()
    ones = torch.ones(2, 12, 1, 64, 64)
    torch.testing.assert_close(reconstruction_loss(model, video, ones, masked), plain)


def test_pixels_of_weight_zero_do_not_count():
    torch.manual_seed(0)
    model, video, masked = build_model(), torch.rand(2, 12, 3, 64, 64), random_masks(2, 96)
    weight = torch.ones(2, 12, 1, 64, 64)
    weight[..., 32:] = 0
    loss = reconstruction_loss(model, video, weight, masked)
    hidden = patches(torch.arange(64).expand(2, 12, 3, 64, 64) >= 32) & masked[..., None]
    assert hidden.any()
    difference = (
        model(normalise(video), bool_masked_pos=masked).logits - patches(normalise(video))[masked].view(2, 72, -1)
    ).square()
    counted = ~hidden[masked].view(2, 72, -1)
    torch.testing.assert_close(loss, difference[counted].mean())


def test_masks_hide_the_same_number_of_other_tokens_in_every_clip():
    masks = random_masks(4, 96)
    assert masks.sum(1).tolist() == [round(96 * MASKED_SHARE)] * 4
    assert len({tuple(mask.tolist()) for mask in masks}) == 4


def test_weights_follow_the_bodies_through_the_mirror():
    clip = simulate(1, motion="rolling")
    clips = clip.video[None, 1:]
    weights = pixel_weights(clips)
    assert weights.shape == (1, 12, 64, 64, 1) and set(np.unique(weights)) == {1, 9}
    video, weight = sample_videos(clips, weights, np.random.default_rng(0))
    columns = [(clip.positions[1:, 0, 0] * 64).astype(int), (64 - clip.positions[1:, 0, 0] * 64).astype(int)]
    rows = ((1 - clip.positions[1:, 0, 1]) * 64).astype(int)
    straight = (video == torch.from_numpy(clips).movedim(-1, 2).float() / 255).flatten(1).all(1)
    assert straight.any() and not straight.all()
    for sample, is_straight in zip(weight, straight.tolist(), strict=True):
        assert (sample[range(12), 0, rows, columns[0 if is_straight else 1]] == 9).all()


def test_a_short_run_writes_a_teacher_that_loads(tmp_path):
    main(["--output", str(tmp_path / "a"), "--scale", "0.0008", "--seed", "3"])
    train_teacher(tmp_path / "b", scale=0.0008, seed=3)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]
    teacher = load_teacher(str(tmp_path / "a"))
    assert teacher(as_video([simulate(0)])).grid == (6, 4, 4)
    with pytest.raises(ValueError, match=re.escape("Expected `scale` > 0")):
        train_teacher(tmp_path, scale=0)


def test_the_shipped_teacher_fits_the_clips_and_the_latents():
    teacher = load_teacher("sandbox")
    encoded = teacher(as_video([simulate(0), simulate(1)]))
    assert encoded.grid == (6, 4, 4) and encoded.tokens.shape == (2, 6, 16, 128)
    # Two token frames to each latent frame 1 to 3, which stand for frames 4k - 3 to 4k.
    assert encoded.frame_times.tolist() == [1.5, 3.5, 5.5, 7.5, 9.5, 11.5]
    assert encoded.tokens.isfinite().all()
    assert sum(tensor.nbytes for tensor in teacher.model.state_dict().values()) <= 6e6
