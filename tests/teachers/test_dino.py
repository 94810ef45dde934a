"""DINOv2 and DINOv3: single frames, without prefix tokens."""

import pytest
import torch

from tests.support import rounding
from tests.support.teachers import models
from video_trl.load import load_teacher
from video_trl.teachers import DINOTeacher
from video_trl.teachers.base import normalise


KINDS = [(models.dinov2, 28, 42, 1), (models.dinov2_with_registers, 28, 42, 4), (models.dinov3, 32, 48, 5)]


@pytest.mark.parametrize(("make", "height", "width", "num_prefix_tokens"), KINDS)
def test_tokens_are_those_of_each_frame_without_the_prefix(make, height, width, num_prefix_tokens):
    model, clip = make(), models.video(3, height, width)
    encoded = DINOTeacher(model, height=height, width=width, skip_first_frame=False)(clip)
    assert encoded.grid == (3, 2, 3) and encoded.frame_times.tolist() == [0.0, 1.0, 2.0]
    for frame in range(3):
        hidden = model(normalise(clip[:, frame : frame + 1])[:, 0]).last_hidden_state
        assert hidden.shape[1] == num_prefix_tokens + 6
        rounding.assert_close(encoded.tokens[:, frame], hidden[:, num_prefix_tokens:], rounding.SINGLE)


@pytest.mark.parametrize(("stride", "frames"), [(1, [1, 2, 3, 4, 5, 6, 7, 8]), (2, [1, 3, 5, 7]), (4, [2, 6])])
def test_a_stride_takes_the_middle_frame_and_says_which(stride, frames):
    clip = models.video(9, 28, 28)
    encoded = DINOTeacher(models.dinov2(), frame_stride=stride)(clip)
    assert encoded.frame_times.tolist() == frames
    every = DINOTeacher(models.dinov2(), skip_first_frame=False)(clip).tokens
    rounding.assert_close(encoded.tokens, every[:, frames], rounding.SINGLE)


def test_frames_must_be_whole_strides():
    with pytest.raises(ValueError, match="multiple of 4, got 6"):
        DINOTeacher(models.dinov2(), frame_stride=4)(models.video(7, 28, 28))
    with pytest.raises(ValueError, match="at least 1"):
        DINOTeacher(models.dinov2(), frame_stride=0)
    assert DINOTeacher(models.dinov2()).identity != DINOTeacher(models.dinov2(), frame_stride=2).identity


@pytest.mark.parametrize(("make", "height", "width", "_"), KINDS)
def test_saved_models_load(tmp_path, make, height, width, _):
    model, clip = make(), models.video(3, height, width)
    model.save_pretrained(tmp_path / "saved")
    expected = DINOTeacher(model, height=height, width=width)(clip).tokens
    assert torch.equal(load_teacher(str(tmp_path / "saved"), height=height, width=width)(clip).tokens, expected)
