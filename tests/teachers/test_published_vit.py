"""V-JEPA (first version) and OmniMAE from files laid out as published, against the networks written out."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.support.teachers import models
from video_trl.load import load_teacher
from video_trl.teachers.base import normalise
from video_trl.trainer.repa_config import VideoREPAConfig


WIDTH, HEADS, DEPTH, PATCH = 192, 3, 2, 32


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1)) * (c // HEADS) ** -0.5
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, eps=1e-6), nn.LayerNorm(WIDTH, eps=1e-6)
        self.attn = Attention()
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(WIDTH, 2 * WIDTH), "fc2": nn.Linear(2 * WIDTH, WIDTH)})

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class Published(nn.Module):
    """The encoder that both papers share: 4 frames in 2 tubelets, 7 x 7 patches of 32 pixels."""

    def __init__(self, sequential: bool):
        super().__init__()
        proj = nn.Conv3d(3, WIDTH, (2, PATCH, PATCH), (2, PATCH, PATCH))
        # OmniMAE's projection follows a module without weights, which repeats single pictures.
        self.patch_embed = nn.ModuleDict({"proj": nn.Sequential(nn.Identity(), proj) if sequential else proj})
        self.pos_embed = nn.Parameter(torch.zeros(1, 2 * 7 * 7, WIDTH))
        self.blocks = nn.ModuleList([Block() for _ in range(DEPTH)])
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)

    def forward(self, video, positions):
        x = self.patch_embed["proj"](video.transpose(1, 2)).flatten(2).transpose(1, 2) + positions
        for block in self.blocks:
            x = block(x)
        return x


def vjepa(path, **changes):
    network = models.randomise(Published(False))
    weights = {f"module.backbone.{key}": value for key, value in network.state_dict().items()}
    other = {f"module.backbone.{key}": value + 1 for key, value in network.state_dict().items()}
    content = {"encoder": other, "target_encoder": weights | changes, "epoch": 300, "opt": {"state": {}}}
    torch.save(content, path)
    return network


def omnimae(path, **changes):
    network = models.randomise(Published(True))
    weights = {f"trunk.{key}": value for key, value in network.state_dict().items()}
    weights |= {
        "trunk.decoder.norm.weight": torch.ones(4),
        "trunk.mask_token": torch.ones(1),
        "head.bias": torch.ones(3),
    }
    torch.save(weights | changes, path)
    return network


KINDS = {"vjepa": (vjepa, "vitt16.pth.tar", "trilinear"), "omnimae": (omnimae, "vitt_pretrain.torch", "bicubic")}


def stretched(network, mode, grid):
    """Positions of another grid, by the interpolation of each."""
    table = network.pos_embed.detach()[0].view(2, 7, 7, WIDTH)
    if mode == "trilinear":
        factors = [new / old for new, old in zip(grid, (2, 7, 7), strict=True)]
        volume = F.interpolate(table.permute(3, 0, 1, 2)[None], scale_factor=factors, mode="trilinear")[0]
        return volume.permute(1, 2, 3, 0).flatten(0, 2)
    frames = F.interpolate(table.permute(0, 3, 1, 2), grid[1:], mode="bicubic")
    lines = F.interpolate(frames.permute(2, 3, 1, 0).flatten(0, 1), grid[0], mode="linear")
    return lines.permute(2, 0, 1).flatten(0, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_at_the_size_of_the_pretraining_and_at_another(kind, tmp_path):
    write, name, mode = KINDS[kind]
    network = write(tmp_path / name)
    square = models.video(5, 224, 224, batch_size=1)
    tokens = load_teacher(str(tmp_path / name))(square)
    expected = network(normalise(square[:, 1:]), network.pos_embed)
    assert tokens.grid == (2, 7, 7)
    torch.testing.assert_close(tokens.tokens.flatten(1, 2), expected, atol=2e-4, rtol=1e-4)

    wide = models.video(9, 64, 96, batch_size=1)
    teacher = load_teacher(str(tmp_path / name), height=64, width=96)
    tokens = teacher(wide)
    assert tokens.grid == (4, 2, 3)
    expected = network(normalise(wide[:, 1:]), stretched(network, mode, (4, 2, 3)))
    torch.testing.assert_close(tokens.tokens.flatten(1, 2), expected, atol=2e-4, rtol=1e-4)


def test_names_choose_the_margin_of_the_paper_and_tables_belong_to_the_identity(tmp_path):
    margins = {"vjepa": 0.05, "omnimae": 0.0}
    for kind, (write, name, _) in KINDS.items():
        write(tmp_path / name)
        teacher = load_teacher(str(tmp_path / name))
        assert (
            teacher.name.startswith(kind) and VideoREPAConfig(use_cpu=True).margin_for(teacher.name) == margins[kind]
        )
        first = teacher.identity
        write(
            tmp_path / name,
            **{("trunk." if kind == "omnimae" else "module.backbone.") + "pos_embed": torch.ones(1, 98, WIDTH)},
        )
        assert load_teacher(str(tmp_path / name)).identity != first == load_first(write, tmp_path / name).identity


def load_first(write, path):
    write(path)
    return load_teacher(str(path))


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_is_missing_unknown_or_misshapen_is_refused(kind, tmp_path):
    write, name, _ = KINDS[kind]
    prefix = "trunk." if kind == "omnimae" else "module.backbone."
    for change, message in (
        ({f"{prefix}blocks.0.gamma": torch.ones(2)}, "unknown blocks.0.gamma"),
        ({f"{prefix}blocks.1.mlp.fc2.weight": torch.ones(2, 2)}, "another shape encoder.layer.1.output.dense.weight"),
        ({f"{prefix}pos_embed": torch.ones(1, 99, WIDTH)}, "expected positions"),
        ({f"{prefix}blocks.2.norm1.weight": torch.ones(WIDTH)}, "missing encoder.layer.2"),
    ):
        write(tmp_path / name, **change)
        with pytest.raises(ValueError, match=message):
            load_teacher(str(tmp_path / name))
