"""What all teachers share: checks, resizing, times, identity."""

import pytest
import torch

from tests.support import rounding
from tests.support.teachers import models
from video_trl.load import load_teacher
from video_trl.teachers import TeacherTokens, VideoMAETeacher, VideoTeacher
from video_trl.teachers.base import normalise, resize


def teacher(**options):
    return VideoMAETeacher(models.videomae(), **options)


def test_tokens_have_a_grid_and_times():
    encoded = teacher(height=32, width=48)(models.video(9, 32, 48))
    assert isinstance(encoded, TeacherTokens) and isinstance(teacher(), VideoTeacher)
    assert encoded.grid == (4, 4, 6)
    assert encoded.tokens.shape == (2, 4, 24, 24) and encoded.tokens.dtype == torch.float32
    assert encoded.frame_times.tolist() == [1.5, 3.5, 5.5, 7.5]  # frame 0 is left out
    assert not encoded.tokens.requires_grad
    kept = teacher(skip_first_frame=False)(models.video(4))
    assert kept.grid == (2, 4, 4) and kept.frame_times.tolist() == [0.5, 2.5]


def test_the_first_frame_has_no_influence_when_it_is_left_out():
    clip = models.video(5)
    other = clip.clone()
    other[:, 0] = 0
    assert torch.equal(teacher()(clip).tokens, teacher()(other).tokens)
    other[:, 1] = 0
    assert not torch.equal(teacher()(clip).tokens, teacher()(other).tokens)


def test_autocast_and_batch_do_not_change_the_tokens():
    clip = models.video(5)
    expected = teacher()(clip).tokens
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(teacher()(clip).tokens, expected)
    rounding.assert_close(teacher()(clip[1:]).tokens, expected[1:], rounding.SINGLE)


def test_half_precision_weights():
    half = VideoMAETeacher(models.videomae().to(torch.bfloat16))
    encoded = half(models.video(5))
    assert encoded.tokens.dtype == torch.float32
    torch.testing.assert_close(encoded.tokens, teacher()(models.video(5)).tokens, atol=0.2, rtol=0.05)
    assert half.to("cpu") is half


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (torch.zeros(1, 5, 32, 32, 3), r"\(B, T, 3, H, W\)"),
        (torch.zeros(5, 3, 32, 32), r"\(B, T, 3, H, W\)"),
        (torch.zeros(1, 5, 3, 32, 32, dtype=torch.uint8), "/ 255"),
        (torch.full((1, 5, 3, 32, 32), -1.0), r"\(video \+ 1\) / 2"),
        (torch.zeros(1, 6, 3, 32, 32), "multiple of 2, got 5"),
        (torch.zeros(1, 1, 3, 32, 32), "multiple of 2, got 0"),
        (torch.zeros(1, 5, 3, 32, 48), "32 x 48 pixels would be squeezed to 32 x 32"),
    ],
)
def test_bad_videos_are_refused(clip, message):
    with pytest.raises(ValueError, match=message):
        teacher()(clip)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 32}, "go together"),
        ({"height": 30, "width": 32}, "multiples of its patch size 8"),
        ({"height": 0, "width": 0}, "multiples of its patch size 8"),
    ],
)
def test_bad_sizes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        teacher(**options)


def test_a_ratio_that_is_off_by_rounding_to_patches_is_taken():
    assert teacher(height=32, width=56)(models.video(5, 480, 832, batch_size=1)).grid == (2, 4, 7)


def test_unfiltered_resizing_is_the_official_one_and_aliases():
    """At a third of the size bicubic interpolation without a filter reads the centre of each 3 x 3 block alone."""
    clip = models.video(2, 96, 96)
    unfiltered, filtered = (resize(clip, (32, 32), antialias=antialias) for antialias in (False, True))
    torch.testing.assert_close(unfiltered, clip[..., 1::3, 1::3])
    assert filtered.std() < 0.4 * unfiltered.std()
    # The official code normalises first: the same, since the weights of the interpolation sum up to 1.
    torch.testing.assert_close(normalise(unfiltered), resize(normalise(clip), (32, 32), antialias=False))
    aliased = teacher(antialias=False)(clip.repeat(1, 2, 1, 1, 1)[:, :3])
    assert not torch.allclose(aliased.tokens, teacher()(clip.repeat(1, 2, 1, 1, 1)[:, :3]).tokens, atol=1e-2)


def test_normalisation_is_that_of_imagenet():
    pixels = normalise(torch.tensor([0.485, 0.456 + 0.224, 0.406 - 0.225]).view(1, 1, 3, 1, 1))
    torch.testing.assert_close(pixels.flatten(), torch.tensor([0.0, 1.0, -1.0]))


def test_identity_tells_apart_what_gives_other_tokens(tmp_path):
    original = teacher()
    models.videomae().save_pretrained(tmp_path / "copy")
    assert load_teacher(str(tmp_path / "copy")).identity == original.identity  # wherever it came from
    others = [
        VideoMAETeacher(models.randomise(models.videomae(), seed=1)),
        VideoMAETeacher(models.videomae(layer_norm_eps=1e-5)),
        VideoMAETeacher(models.videomae().to(torch.bfloat16)),
        teacher(height=48, width=48),
        teacher(antialias=False),
        teacher(skip_first_frame=False),
    ]
    assert len({original.identity, *(other.identity for other in others)}) == 7
