"""VideoMAE and VideoMAEv2: the real model's numbers, positions at other sizes, and the authors' layout of weights."""

import argparse
import json

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from transformers import VideoMAEConfig, VideoMAEModel

from tests.support.teachers import models
from video_trl.load import load_teacher
from video_trl.teachers import VideoMAETeacher
from video_trl.teachers.base import normalise
from video_trl.teachers.videomae import convert_videomaev2, sinusoid_table


def test_tokens_at_the_native_size_are_those_of_the_model():
    model, clip = models.videomae(), models.video(5)
    expected = model(normalise(clip[:, 1:])).last_hidden_state  # mean pooling: no final norm
    torch.testing.assert_close(VideoMAETeacher(model)(clip).tokens.flatten(1, 2), expected)


def test_tokens_are_the_residual_stream_also_of_a_model_with_a_final_norm():
    model, clip = models.videomae(use_mean_pooling=False), models.video(5)
    hidden = model(normalise(clip[:, 1:]), output_hidden_states=True)
    tokens = VideoMAETeacher(model)(clip).tokens.flatten(1, 2)
    torch.testing.assert_close(tokens, hidden.hidden_states[-1])
    assert not torch.allclose(tokens, hidden.last_hidden_state, atol=0.1)


def test_the_table_is_that_of_the_model():
    table = models.videomae().embeddings.position_embeddings[0]
    torch.testing.assert_close(sinusoid_table((2, 4, 4), 24), table, atol=1e-6, rtol=0)


def test_positions_at_another_size_are_interpolated_and_survive_saving(tmp_path):
    """`transformers` would count the new tokens through; the table of the pretraining has to be stretched instead."""
    model, clip = models.videomae(), models.video(13, 48, 64)
    table = sinusoid_table((2, 4, 4), 24).view(2, 4, 4, 24).permute(0, 3, 1, 2)
    table = F.interpolate(table, (6, 8), mode="bicubic")  # (2, D, 6, 8)
    centres = (torch.arange(6) + 0.5) / 6 * 2 - 0.5  # of the 6 new frames among the 2 old ones
    weights = torch.stack([1 - centres.clamp(0, 1), centres.clamp(0, 1)], 1)  # (6, 2)
    expected = torch.einsum("tf,fdhw->thwd", weights, table).reshape(-1, 24)
    teacher = VideoMAETeacher(model, height=48, width=64)
    torch.testing.assert_close(teacher.positions((6, 6, 8)), expected)
    stock = VideoMAEModel(VideoMAEConfig(**{**model.config.to_dict(), "image_size": [48, 64], "num_frames": 12}))
    assert (stock.embeddings.position_embeddings[0] - expected).abs().max() > 1

    stock.load_state_dict(model.state_dict())
    stock.embeddings.position_embeddings = expected[None]
    tokens = teacher(clip).tokens
    torch.testing.assert_close(tokens.flatten(1, 2), stock.eval()(normalise(clip[:, 1:])).last_hidden_state)

    model.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(load_teacher(str(tmp_path / "saved"), height=48, width=64)(clip).tokens, tokens)


def test_a_pretraining_checkpoint_loads(tmp_path):
    whole = models.videomae_with_decoder()
    whole.save_pretrained(tmp_path / "whole")
    expected = VideoMAETeacher(whole.videomae)(models.video(5)).tokens
    torch.testing.assert_close(load_teacher(str(tmp_path / "whole"))(models.video(5)).tokens, expected)


def test_missing_weights_are_refused(tmp_path):
    model = models.videomae()
    model.save_pretrained(tmp_path / "model")
    weights = model.state_dict()
    del weights["encoder.layer.1.output.dense.bias"]
    safetensors.torch.save_file(weights, tmp_path / "model" / "model.safetensors")
    with pytest.raises(ValueError, match="lacks weights of VideoMAE: encoder.layer.1.output.dense.bias"):
        load_teacher(str(tmp_path / "model"))


# ---- VideoMAEv2 -----------------------------------------------------------------------------------------------------


def model_v2():
    """Without a bias of keys, which the authors' model has none of, and that of transformers before 5.18 has."""
    model = models.videomae(image_size=224, patch_size=16, num_frames=16)
    for layer in model.encoder.layer:
        if layer.attention.attention.key.bias is not None:
            torch.nn.init.zeros_(layer.attention.attention.key.bias)
    return model


def authors_layout(model, prefix=""):
    """The weights of a model under the names that VideoMAEv2's authors give them, with what they add."""
    weights = {"patch_embed.proj.weight": model.embeddings.patch_embeddings.projection.weight}
    weights["patch_embed.proj.bias"] = model.embeddings.patch_embeddings.projection.bias
    for index, layer in enumerate(model.encoder.layer):
        attention = layer.attention.attention
        qkv = [attention.query.weight, attention.key.weight, attention.value.weight]
        weights |= {
            f"blocks.{index}.norm1.weight": layer.layernorm_before.weight,
            f"blocks.{index}.norm1.bias": layer.layernorm_before.bias,
            f"blocks.{index}.norm2.weight": layer.layernorm_after.weight,
            f"blocks.{index}.norm2.bias": layer.layernorm_after.bias,
            f"blocks.{index}.attn.qkv.weight": torch.cat(qkv),
            f"blocks.{index}.attn.q_bias": attention.query.bias,
            f"blocks.{index}.attn.v_bias": attention.value.bias,
            f"blocks.{index}.attn.proj.weight": layer.attention.output.dense.weight,
            f"blocks.{index}.attn.proj.bias": layer.attention.output.dense.bias,
            f"blocks.{index}.mlp.fc1.weight": layer.intermediate.dense.weight,
            f"blocks.{index}.mlp.fc1.bias": layer.intermediate.dense.bias,
            f"blocks.{index}.mlp.fc2.weight": layer.output.dense.weight,
            f"blocks.{index}.mlp.fc2.bias": layer.output.dense.bias,
        }
    weights |= {"fc_norm.weight": torch.ones(24), "fc_norm.bias": torch.zeros(24)}
    weights |= {"head.weight": torch.zeros(710, 24), "head.bias": torch.zeros(710)}
    return {prefix + key: tensor.detach().clone() for key, tensor in weights.items()}


@pytest.mark.parametrize(
    ("name", "prefix", "container"),
    [
        ("vit_b_k710_dl_from_giant.pth", "", "module"),
        ("vit_g_hybrid_pt.pth", "encoder.", "model"),
        ("finetuned.pth", "module.backbone.", None),
        ("model.safetensors", "model.", None),
    ],
)
def test_the_published_layouts_give_the_tokens_of_the_model(tmp_path, name, prefix, container):
    model, clip = model_v2(), models.video(5, 32, 48)
    weights = authors_layout(model, prefix)
    path = tmp_path / name
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(weights, path)
    else:
        torch.save({container: weights, "epoch": 1} if container else weights, path)
    teacher = load_teacher(str(path), num_attention_heads=2, height=32, width=48)
    expected = VideoMAETeacher(model, height=32, width=48)(clip).tokens
    assert torch.equal(teacher(clip).tokens, expected)
    assert teacher.model.config.layer_norm_eps == 1e-6 and teacher.native_grid == (8, 14, 14)


def test_a_repo_that_brings_its_own_code_is_read_without_running_it(tmp_path):
    model, clip = model_v2(), models.video(5, 32, 48)
    code = {"AutoModel": "modeling_videomaev2.VideoMAEv2"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "VideoMAEv2_Base", "auto_map": code}))
    safetensors.torch.save_file(authors_layout(model, "model."), tmp_path / "model.safetensors")
    teacher = load_teacher(str(tmp_path), num_attention_heads=2, height=32, width=48)
    assert torch.equal(teacher(clip).tokens, VideoMAETeacher(model, height=32, width=48)(clip).tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("blocks.1.mlp.fc2.bias"), "missing encoder.layer.1.output.dense.bias; unknown none"),
        (lambda w: w.update({"blocks.1.gamma_1": torch.ones(24)}), "missing none; unknown blocks.1.gamma_1"),
        (
            lambda w: w.update({"blocks.1.norm1.bias": torch.ones(23)}),
            "another shape encoder.layer.1.layernorm_before",
        ),
        (lambda w: w.update({"pos_embed": torch.zeros(1, 1568, 24)}), "positions are learned"),
        (lambda w: w.pop("patch_embed.proj.weight"), "No VideoMAEv2 encoder"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, change, message):
    weights = authors_layout(model_v2())
    change(weights)
    torch.save(weights, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=message):
        load_teacher(str(tmp_path / "weights.pth"), num_attention_heads=2)


def test_the_sinusoids_in_a_checkpoint_are_no_harm():
    weights = authors_layout(model_v2()) | {"pos_embed": sinusoid_table((8, 14, 14), 24)[None]}
    config, converted = convert_videomaev2(weights, num_attention_heads=2)
    expected = VideoMAEModel(config).state_dict()
    assert converted.keys() == {name for name in expected if not name.endswith(".attention.key.bias")}


def test_heads_of_an_unpublished_width_must_be_named():
    with pytest.raises(ValueError, match="num_attention_heads"):
        convert_videomaev2(authors_layout(model_v2()))


def test_a_file_with_more_than_tensors_is_refused(tmp_path):
    torch.save({"model": authors_layout(model_v2()), "args": argparse.Namespace(lr=1e-3)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="save its tensors as .safetensors"):
        load_teacher(str(tmp_path / "weights.pth"), num_attention_heads=2)
