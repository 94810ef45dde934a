"""LoRA files in the layout of the models' original code: read by diffusers' own converter, and back bit for bit."""

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from tests.support import rounding
from tests.support.adapters import ATTENTION, IN_FOLDER, adapter, output
from tests.support.tiny import tiny_pipeline, tiny_transformer
from video_trl import hub
from video_trl.hub.wan_names import diffusers_name, original_name


EVERYWHERE = ".*(to_[qkv]|to_out.0|add_[kv]_proj|net.0.proj|net.2|linear_[12]|time_proj|proj_out)"
WAN_FAMILIES = ("wan-t2v", "wan-i2v")


@pytest.mark.parametrize("family", WAN_FAMILIES)
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"target_modules": EVERYWHERE},
        {"lora_alpha": 32},
        {"r": 8, "lora_alpha": 1},
        {"use_rslora": True, "lora_alpha": 8},
        pytest.param(
            {"rank_pattern": {"blocks.0.attn1.to_q": 8}, "alpha_pattern": {"blocks.1.attn1.to_k": 16}},
            marks=pytest.mark.skipif(bool(IN_FOLDER), reason="older diffusers mixes up the alphas of layers"),
        ),
    ],
    ids=["attention", "everywhere", "alpha 32", "alpha 1/8", "rank-stabilised", "patterns"],
)
def test_the_stock_pipeline_reads_an_export_to_bit_equal_output(tmp_path, family, config):
    trained, file = adapter(family, tmp_path, **config)
    exported = hub.export_lora(file, tmp_path / "comfyui" / "physics.safetensors")
    fresh = tiny_pipeline(family)
    base = output(fresh)
    fresh.load_lora_weights(str(exported.parent), weight_name=exported.name)
    assert torch.equal(output(fresh), output(trained)) and not torch.equal(output(trained), base)


def test_a_scale_that_is_no_power_of_two_is_exact_up_to_rounding(tmp_path):
    """diffusers multiplies a weight with it instead of the output."""
    trained, file = adapter("wan-t2v", tmp_path, r=6, lora_alpha=4)
    exported = hub.export_lora(file, tmp_path / "a.safetensors")
    fresh = tiny_pipeline("wan-t2v")
    fresh.load_lora_weights(str(tmp_path), weight_name=exported.name)
    rounding.assert_close(output(fresh), output(trained), rounding.SINGLE)


@pytest.mark.parametrize("family", WAN_FAMILIES)
@pytest.mark.parametrize("config", [{}, {"r": 6, "lora_alpha": 6}, {"use_rslora": True, "lora_alpha": 8}], ids=str)
def test_there_and_back_is_the_same_file(tmp_path, family, config):
    _, file = adapter(family, tmp_path / "ours", **config)
    exported = hub.export_lora(tmp_path / "ours", tmp_path / "theirs.safetensors")
    back = hub.import_lora(exported, tmp_path / "back")
    with safe_open(back, framework="pt") as again, safe_open(file, framework="pt") as ours:
        assert again.metadata() == ours.metadata() and list(again.keys()) == list(ours.keys())
        assert all(torch.equal(again.get_tensor(key), ours.get_tensor(key)) for key in ours.keys())
        with safe_open(exported, framework="pt") as theirs:
            assert not set(theirs.keys()) & set(ours.keys())


def test_names_are_those_of_the_original_code(tmp_path):
    """Every name of the map, written out; the shapes are those of the layers that they belong to."""
    _, file = adapter("wan-i2v", tmp_path / "wan", target_modules=EVERYWHERE, r=2, lora_alpha=2)
    with safe_open(hub.export_lora(file, tmp_path / "wan.safetensors"), framework="pt") as exported:
        keys = set(exported.keys())
        assert exported.get_tensor("diffusion_model.blocks.0.self_attn.q.alpha").item() == 2
        assert exported.get_tensor("diffusion_model.blocks.1.ffn.0.lora_down.weight").shape == (2, 24)
        assert exported.get_tensor("diffusion_model.blocks.1.ffn.0.lora_up.weight").shape == (32, 2)
    layers = {key.removeprefix("diffusion_model.").rpartition(".lora_")[0] for key in keys if ".lora_" in key}
    inner = (
        "self_attn.q self_attn.k self_attn.v self_attn.o cross_attn.q cross_attn.k cross_attn.v cross_attn.o".split()
    )
    inner += ["cross_attn.k_img", "cross_attn.v_img", "ffn.0", "ffn.2"]
    outer = "time_embedding.0 time_embedding.2 time_projection.1 text_embedding.0 text_embedding.2 head.head".split()
    outer += ["img_emb.proj.1", "img_emb.proj.3"]
    assert layers == {f"blocks.{block}.{name}" for block in (0, 1) for name in inner} | set(outer)


def test_every_linear_layer_of_wan_has_a_name():
    """A new version of diffusers that renames or adds one shows here."""
    transformer = tiny_transformer(in_channels=12, image_dim=16, added_kv_proj_dim=24)
    linear = {name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)}
    named = {original_name(name): name for name in linear}
    assert None not in named and len(named) == len(linear)
    assert {diffusers_name(theirs) for theirs in named} == linear


@pytest.mark.parametrize("matrices", [("lora_down", "lora_up"), ("lora_A", "lora_B")])
@pytest.mark.parametrize("alpha", [None, 2.0, 4.0])
def test_a_file_of_another_tool_becomes_an_adapter(tmp_path, matrices, alpha):
    """With either spelling, with alpha or, where it is given, without; the result is what diffusers makes of it."""
    _, file = adapter("wan-t2v", tmp_path / "ours")
    foreign = {}
    for key, tensor in hub.load_lora_state(file)[0].items():
        layer, _, matrix = key.removesuffix(".weight").rpartition(".lora_")
        name = f"diffusion_model.{original_name(layer)}"
        foreign[f"{name}.{matrices['AB'.index(matrix)]}.weight"] = tensor
        if alpha is not None:
            foreign[f"{name}.alpha"] = torch.tensor(alpha)
    safetensors.torch.save_file(foreign, tmp_path / "foreign.safetensors")
    ours, theirs = tiny_pipeline("wan-t2v"), tiny_pipeline("wan-t2v")
    given = "rank" if alpha is None else None
    ours.load_lora_weights(
        str(hub.import_lora(tmp_path / "foreign.safetensors", tmp_path / "back", alpha=given).parent), **IN_FOLDER
    )
    theirs.load_lora_weights(str(tmp_path), weight_name="foreign.safetensors")
    assert torch.equal(output(ours), output(theirs))
    config = ours.transformer.peft_config["default_0"]
    assert (config.r, config.lora_alpha) == (4, 4 if alpha is None else alpha)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "with DoRA, which this layout has no place for"),
        ({"lora_bias": True}, "with biases"),
        ({"target_modules": ["patch_embedding", *ATTENTION]}, "no name for 'patch_embedding'"),
        ({"target_modules": ["attn1.to_q", "proj_out"], "lora_alpha": 8}, "'proj_out' has alpha 8 and rank 4"),
        ({"target_modules": ["attn1.to_q", "add_k_proj"]}, "diffusers would not read .*add_k_proj"),
        ({"target_modules": ["proj_out"]}, "expected an adapter of Wan, with layers in `blocks`"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_would_not_come_back_is_refused_and_nothing_written(tmp_path, config, message):
    _, file = adapter("wan-i2v", tmp_path / "ours", **config)
    with pytest.raises(ValueError, match=message):
        hub.export_lora(file, tmp_path / "theirs.safetensors")
    assert not (tmp_path / "theirs.safetensors").exists()


def test_other_files_are_refused(tmp_path):
    _, file = adapter("cogvideox-t2v", tmp_path / "ours")
    with pytest.raises(ValueError, match="For CogVideoX nothing is to be exported: ComfyUI takes `pytorch_lora"):
        hub.export_lora(file, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="must end in .safetensors"):
        hub.export_lora(adapter("wan-t2v", tmp_path / "wan")[1], tmp_path / "folder")
    with pytest.raises(ValueError, match="No adapter at .*nowhere"):
        hub.import_lora(tmp_path / "nowhere", tmp_path / "back")
    safetensors.torch.save_file({"lora_te_layers_0_q_proj.lora_down.weight": torch.zeros(1)}, tmp_path / "b")
    with pytest.raises(ValueError, match="expected LoRA matrices of layers.*lora_te_layers_0"):
        hub.import_lora(tmp_path / "b", tmp_path / "back")


def test_a_file_of_others_is_not_replaced(tmp_path):
    _, file = adapter("wan-t2v", tmp_path / "ours")
    hub.export_lora(file, hub.export_lora(file, tmp_path / "theirs.safetensors"))  # its own is
    mine = tmp_path / "mine" / hub.LORA_FILE_NAME
    mine.parent.mkdir()
    safetensors.torch.save_file({"a": torch.ones(1)}, mine)
    before = mine.read_bytes()
    with pytest.raises(ValueError, match="was not written by video_trl and stays"):
        hub.export_lora(file, mine)
    with pytest.raises(ValueError, match="was not written by video_trl and stays"):
        hub.import_lora(tmp_path / "theirs.safetensors", mine.parent)
    assert mine.read_bytes() == before
