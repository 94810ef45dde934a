"""V-JEPA 2: rotary positions at any size, against a computation written out by index."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.support import rounding
from tests.support.teachers import models
from video_trl.load import load_teacher
from video_trl.teachers import VJEPA2Teacher
from video_trl.teachers.base import normalise


def rotated(vector, position):
    """One axis' share of a query or key, turned channel by channel: pairs are neighbours, angles come round twice."""
    size = len(vector)
    result = torch.empty_like(vector)
    for c in range(size):
        angle = position * 10000 ** -((c % (size // 2)) / (size / 2))
        partner = -vector[c + 1] if c % 2 == 0 else vector[c - 1]
        result[c] = vector[c] * math.cos(angle) + partner * math.sin(angle)
    return result


def with_positions(heads, grid):
    """Queries or keys `(heads, N, D)` of all tokens, turned by their frame, row and column."""
    _, height, width = grid
    share = 2 * (heads.shape[-1] // 3 // 2)
    turned = heads.clone()
    for head in range(len(heads)):
        for n in range(heads.shape[1]):
            place = (n // (height * width), n // width % height, n % width)
            for axis, position in enumerate(place):
                part = slice(axis * share, (axis + 1) * share)
                turned[head, n, part] = rotated(heads[head, n, part], position)
    return turned


def written_out(encoder, pixels, grid):
    """Residual stream `(N, D)` of one clip after the last block."""
    tubes = F.conv3d(
        pixels.transpose(0, 1)[None],
        encoder.embeddings.patch_embeddings.proj.weight,
        encoder.embeddings.patch_embeddings.proj.bias,
        stride=(2, 8, 8),
    )
    x = tubes[0].flatten(1).T
    for layer in encoder.layer:
        attention, hidden = layer.attention, layer.norm1(x)
        query, key, value = (
            projection(hidden).view(len(x), 2, 12).transpose(0, 1)
            for projection in (attention.query, attention.key, attention.value)
        )
        scores = with_positions(query, grid) @ with_positions(key, grid).mT / math.sqrt(12)
        mixed = (scores.softmax(-1) @ value).transpose(0, 1).flatten(1)
        x = x + attention.proj(mixed)
        x = x + layer.mlp(layer.norm2(x))
    return x


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 40), (16, 16), (40, 24)])
def test_tokens_are_those_of_the_written_out_encoder_at_every_size(height, width):
    clip = models.video(5, height, width, batch_size=1)
    model = models.vjepa2()
    grid = (2, height // 8, width // 8)
    expected = written_out(model.encoder, normalise(clip[:, 1:])[0], grid)
    stock = model.encoder  # before the teacher takes it over
    stock.layernorm = torch.nn.Identity()
    stock_tokens = stock(normalise(clip[:, 1:])).last_hidden_state[0]
    tokens = VJEPA2Teacher(model, height=height, width=width)(clip).tokens[0].flatten(0, 1)
    rounding.assert_close(tokens, expected, rounding.SINGLE)
    if (height, width) == (32, 32):
        rounding.assert_close(stock_tokens, expected, rounding.SINGLE)
    else:  # `transformers` counts rows and columns of the square crop; once it does not, the override can go
        assert (stock_tokens - expected).abs().max() > 1e-2


def test_the_predictor_is_not_run_and_not_kept(tmp_path):
    model = models.vjepa2()
    model.save_pretrained(tmp_path / "saved")
    clip = models.video(5, 24, 40)
    expected = VJEPA2Teacher(model, height=24, width=40)(clip)
    loaded = load_teacher(str(tmp_path / "saved"), height=24, width=40)
    assert torch.equal(loaded(clip).tokens, expected.tokens)
    assert not [name for name, _ in loaded.model.named_modules() if "predictor" in name]
    assert expected.grid == (2, 3, 5) and expected.frame_times.tolist() == [1.5, 3.5]


def test_sizes_may_change_from_call_to_call():
    """Nothing of one grid is left over for the next."""
    small, large = (VJEPA2Teacher(models.vjepa2(), height=h, width=w) for h, w in ((16, 16), (24, 40)))
    clips = models.video(5, 16, 16), models.video(9, 16, 16)
    expected = [small(clip).tokens for clip in clips]
    large(models.video(5, 24, 40))
    again = VJEPA2Teacher(models.vjepa2(), height=16, width=16)
    assert all(torch.equal(again(clip).tokens, e) for clip, e in reversed(list(zip(clips, expected, strict=True))))
