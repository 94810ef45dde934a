"""Adapters as they are published: the same output whichever tool wrote the file, or a refusal before any work."""

import json

import pytest
import safetensors.torch
import torch

from tests.support import rounding
from tests.support.adapters import ATTENTION, adapter, output
from tests.support.tiny import tiny_pipeline, tiny_wan_pipeline
from video_trl import hub
from video_trl.cli import main
from video_trl.evaluation.runs.generate import load_generator
from video_trl.hub.attach import find_adapter, load_adapter
from video_trl.hub.lora import write_lora
from video_trl.hub.wan_names import original_name


TARGETS = [*ATTENTION, "attn2.to_q", "ffn.net.0.proj", "ffn.net.2", "proj_out"]
# How a tool writes a matrix ("A" or "B") of a layer, which has the given name in the original code and in diffusers.
LAYOUTS = {
    "DiffSynth-Studio": lambda theirs, ours, which: f"{theirs}.lora_{which}.default.weight",
    "the authors of PhyGDPO": lambda theirs, ours, which: f"{theirs}.lora_{which}.dpo.weight",
    "DiffSynth-Studio with its prefix": lambda theirs, ours, which: f"pipe.dit.{theirs}.lora_{which}.default.weight",
    "diffusion-pipe": lambda theirs, ours, which: f"diffusion_model.{theirs}.lora_{which}.weight",
    "musubi-tuner": lambda theirs, ours, which: (
        f"lora_unet_{theirs.replace('.', '_')}.lora_{'down' if which == 'A' else 'up'}.weight"
    ),
    "VideoX-Fun": lambda theirs, ours, which: (
        f"lora_unet__{theirs.replace('.', '_')}.lora_{'down' if which == 'A' else 'up'}.weight"
    ),
    "older diffusers": lambda theirs, ours, which: f"transformer.{ours}.lora_{which}.weight",
    "PEFT": lambda theirs, ours, which: f"base_model.model.{ours}.lora_{which}.weight",
}


def publish(file, target, layout, alpha=None):
    """The adapter in a file as another tool would have written it, with or without alpha."""
    tensors = {}
    for key, tensor in hub.load_lora_state(file)[0].items():
        ours, _, which = key.removesuffix(".weight").rpartition(".lora_")
        name = LAYOUTS[layout](original_name(ours), ours, which)
        tensors[name] = tensor
        if alpha is not None:
            tensors[f"{name.rpartition('.lora_')[0]}.alpha"] = torch.tensor(float(alpha))
    safetensors.torch.save_file(tensors, target)
    return target


def loaded(file, family="wan-t2v", **options):
    """Output of a fresh pipeline with a published adapter."""
    pipeline = tiny_pipeline(family)
    load_adapter(pipeline, find_adapter(str(file), **options), "tiny", **options)
    return output(pipeline)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_acts_as_the_adapter_that_was_trained(tmp_path, layout):
    trained, file = adapter("wan-t2v", tmp_path / "ours", lora_alpha=2, target_modules=TARGETS)
    silent = publish(file, tmp_path / "silent.safetensors", layout)
    assert torch.equal(loaded(silent, alpha=2), output(trained))
    told = publish(file, tmp_path / "told.safetensors", layout, alpha=2)
    assert torch.equal(loaded(told), output(trained))
    weights, config = hub.load_lora_state(hub.import_lora(silent, tmp_path / "back", alpha=2))
    ours, _ = hub.load_lora_state(file)
    assert weights.keys() == ours.keys() and all(torch.equal(weights[name], ours[name]) for name in ours)
    assert (config.r, config.lora_alpha) == (4, 2)


def test_image_to_video_has_its_own_layers(tmp_path):
    targets = [*TARGETS, "add_k_proj", "add_v_proj"]
    trained, file = adapter("wan-i2v", tmp_path / "ours", target_modules=targets)
    silent = publish(file, tmp_path / "silent.safetensors", "DiffSynth-Studio")
    assert torch.equal(loaded(silent, "wan-i2v", alpha="rank"), output(trained))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_alpha_that_is_not_known_is_asked_for(tmp_path, layout, capsys):
    """No guess: an adapter of rank 128 and alpha 64 would act twice as strongly."""
    _, file = adapter("wan-t2v", tmp_path / "ours")
    silent = publish(file, tmp_path / "silent.safetensors", layout)
    message = r"does not say the alpha of 8 of its 8 layers \(rank 4\).*`--adapter_alpha 64`; or 'rank'"
    for read in (
        lambda: hub.read_adapter(silent),
        lambda: hub.import_lora(silent, tmp_path / "back"),
        lambda: hub.export_lora(silent, tmp_path / "x.safetensors"),
        lambda: load_generator("no-such/model", adapter=str(silent), fps=8),  # before a model is looked for
    ):
        with pytest.raises(ValueError, match=message):
            read()
    assert main(["generate", "--adapter", str(silent), "--output_dir", str(tmp_path / "run")]) == 1
    assert "--adapter_alpha 64" in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert not (tmp_path / "back").exists()


def test_an_adapter_of_cogvideox_acts_at_the_scale_that_it_was_trained_at(tmp_path):
    """As VideoREPA's is published: of rank 2 alpha, without a word of alpha."""
    trained, file = adapter("cogvideox-t2v", tmp_path / "ours", r=8, lora_alpha=4)
    silent = tmp_path / "pytorch_lora_weights.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(file), silent)  # without metadata
    with pytest.raises(ValueError, match="does not say the alpha of 8 of its 8 layers"):
        find_adapter(str(tmp_path))
    pipeline = tiny_pipeline("cogvideox-t2v")
    load_adapter(pipeline, find_adapter(str(tmp_path), alpha=4), "tiny", alpha=4)
    assert pipeline.transformer.transformer_blocks[0].attn1.to_q.scaling == {"default": 0.5}
    ours, theirs = dict(trained.transformer.named_parameters()), dict(pipeline.transformer.named_parameters())
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_layers_without_alpha_beside_others_are_asked_for_too(tmp_path):
    _, file = adapter("wan-t2v", tmp_path / "ours", target_modules=["attn1.to_q"])
    told = safetensors.torch.load_file(publish(file, tmp_path / "told.safetensors", "diffusion-pipe", alpha=2))
    del told["diffusion_model.blocks.1.self_attn.q.alpha"]
    safetensors.torch.save_file(told, tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match="the alpha of 1 of its 2 layers"):
        hub.read_adapter(tmp_path / "half.safetensors")
    _, config = hub.read_adapter(tmp_path / "half.safetensors", alpha=8)
    assert {config.lora_alpha, *config.alpha_pattern.values()} == {2, 8} and len(config.alpha_pattern) == 1


def test_a_scale_of_one_is_exact_and_others_are_in_proportion(tmp_path):
    trained, file = adapter("wan-t2v", tmp_path / "ours", alpha_pattern={"blocks.0.attn1.to_k": 8})
    half, _ = adapter("wan-t2v", tmp_path / "half", lora_alpha=2, alpha_pattern={"blocks.0.attn1.to_k": 4})
    assert torch.equal(loaded(file, scale=1.0), output(trained))
    assert torch.equal(loaded(file, scale=0.5), output(half)) and not torch.equal(output(half), output(trained))
    assert torch.equal(loaded(file, scale=0.0), output(tiny_pipeline("wan-t2v")))
    exported = hub.export_lora(file, tmp_path / "comfyui" / "half.safetensors", scale=0.5)
    rounding.assert_close(loaded(exported), output(half), rounding.SINGLE)
    stock = tiny_pipeline("wan-t2v")
    stock.load_lora_weights(str(exported.parent), weight_name=exported.name)
    rounding.assert_close(output(stock), output(half), rounding.SINGLE)
    assert torch.equal(loaded(hub.import_lora(file, tmp_path / "imported", scale=0.5)), output(half))


def test_a_file_that_asks_for_dropout_generates_without(tmp_path):
    """As diffusers writes it, with all options of PEFT; it would make another video each time."""
    trained, file = adapter("wan-t2v", tmp_path / "ours")
    weights, config = hub.load_lora_state(file)
    options = {**config.to_dict(), "lora_dropout": 0.5, "target_modules": sorted(config.target_modules)}
    header = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in options.items()})}
    tensors = {f"transformer.{name}": weight for name, weight in weights.items()}
    safetensors.torch.save_file(tensors, tmp_path / "dropout.safetensors", header)
    assert torch.equal(loaded(tmp_path / "dropout.safetensors"), output(trained))


def test_a_run_says_how_strongly_its_adapter_acted(tmp_path):
    tiny_wan_pipeline().save_pretrained(tmp_path / "model")
    _, file = adapter("wan-t2v", tmp_path / "ours")
    silent = publish(file, tmp_path / "silent.safetensors", "DiffSynth-Studio")
    told = {"model": str(tmp_path / "model"), "fps": 8, "adapter": str(file)}
    neutral = load_generator(**told).describe()
    assert load_generator(**told, adapter_scale=1.0).describe() == neutral and "adapter_scale" not in neutral
    assert load_generator(**told, adapter_scale=0.5).describe() == neutral | {"adapter_scale": 0.5}
    given = load_generator(**(told | {"adapter": str(silent)}), adapter_alpha=64).describe()
    assert given == neutral | {"adapter_alpha": 64, "adapter_hash": given["adapter_hash"]}


def test_an_adapter_of_one_expert_goes_to_it(tmp_path):
    _, file = adapter("wan-t2v", tmp_path / "ours")
    weights, config = hub.load_lora_state(file)
    low = write_lora(tmp_path / "low", weights, config, expert="low_noise")
    pipeline = tiny_pipeline("wan-a14b-t2v")
    load_adapter(pipeline, low, "tiny")
    assert pipeline.transformer_2.peft_config["default"].r == 4 and "default" not in pipeline.get_list_adapters()
    assert not any(".lora_" in name for name, _ in pipeline.transformer.named_parameters())
    with pytest.raises(ValueError, match="'tiny' has the transformers .*does not say which one it is for"):
        load_adapter(tiny_pipeline("wan-a14b-t2v"), file, "tiny")
    with pytest.raises(ValueError, match="is for the transformer 'low_noise'.*'tiny' has one"):
        load_adapter(tiny_pipeline("wan-t2v"), low, "tiny")
    exported = hub.export_lora(low, tmp_path / "x.safetensors")
    assert exported.name == "x_low_noise.safetensors"
    again = hub.import_lora(exported, tmp_path / "again")
    assert hub.lora.expert_of(again) == "low_noise" and hub.load_lora_state(again)[1].r == 4


MATRICES = {"blocks.0.self_attn.q.lora_A.x.weight": torch.zeros(2, 16)}
WHOLE = MATRICES | {"blocks.0.self_attn.q.lora_B.x.weight": torch.zeros(16, 2)}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (MATRICES, "expected two matrices of every layer; one is missing of .*blocks.0.attn1.to_q"),
        (
            WHOLE | {"blocks.1.self_attn.q.lora_A.y.weight": torch.zeros(2, 16)},
            r"holds several adapters, \['x', 'y'\]",
        ),
        (WHOLE | {"blocks.0.self_attn.q.diff_b": torch.zeros(16)}, "got .*'blocks.0.self_attn.q.diff_b'"),
        (WHOLE | {"blocks.0.self_attn.z.lora_A.x.weight": torch.zeros(2, 16)}, "got .*self_attn.z"),
        (WHOLE | {"blocks.0.self_attn.q.dora_scale": torch.zeros(16)}, "got .*dora_scale"),
        ({"blocks.0.self_attn.q.weight": torch.zeros(16, 16)}, "got .*'blocks.0.self_attn.q.weight'"),
        (
            WHOLE | {"blocks.0.self_attn.q.alpha": torch.tensor(float("nan"))},
            "one finite number other than 0 in",
        ),
        (WHOLE | {"blocks.0.self_attn.q.alpha": torch.tensor(float("inf"))}, "one finite number other than 0"),
        (WHOLE | {"blocks.0.self_attn.q.alpha": torch.tensor(0)}, "one finite number other than 0"),
        (WHOLE | {"blocks.0.self_attn.q.alpha": torch.ones(2)}, r"one finite number other than 0 .*got \[1.0, 1.0\]"),
        (WHOLE | {"transformer.blocks.0.attn1.to_q.lora_down.x.weight": torch.ones(2, 16)}, "holds two tensors for"),
        (MATRICES | {"blocks.0.self_attn.q.lora_B.x.weight": torch.zeros(16, 4)}, "expected matrices of rank 2 of"),
        ({name: tensor.flatten() for name, tensor in WHOLE.items()}, "expected matrices of rank"),
        ({name: tensor.to(torch.int8) for name, tensor in WHOLE.items()}, r"of a floating dtype.*torch.int8"),
        (WHOLE | {"blocks.0.self_attn.q.lora_B.x.weight": torch.full((16, 2), torch.nan)}, "expected finite numbers"),
        (WHOLE | {"blocks.0.self_attn.q.lokr_w1": torch.zeros(4, 4)}, "got .*lokr_w1"),
        (WHOLE | {"transformer_2.blocks.0.attn1.to_q.lora_A.x.weight": torch.zeros(2, 16)}, "got .*transformer_2"),
    ],
    ids=[
        *("half", "several", "bias", "layer", "DoRA", "no adapter", "alpha nan", "alpha inf", "alpha 0", "two alphas"),
        *("twice", "ranks", "vectors", "integers", "nan", "LoKr", "two transformers"),
    ],
)
def test_what_is_no_whole_adapter_is_refused(tmp_path, tensors, message):
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=message):
        hub.read_adapter(tmp_path / "x.safetensors", alpha="rank")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 4}, "says its alpha, so `alpha=4` would have no effect"),
        ({"scale": float("nan")}, "`scale` must be a finite number, got nan"),
        ({"alpha": 0}, "`alpha` must be a finite number other than 0"),
    ],
    ids=str,
)
def test_options_that_cannot_be_meant_are_refused(tmp_path, options, message):
    _, file = adapter("wan-t2v", tmp_path / "ours")
    with pytest.raises(ValueError, match=message):
        hub.read_adapter(file, **options)


@pytest.mark.parametrize("layout", ["DiffSynth-Studio", "diffusion-pipe", "older diffusers"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float64], ids=str)
def test_weights_of_every_floating_dtype_are_the_numbers_that_they_are(tmp_path, layout, dtype):
    _, file = adapter("wan-t2v", tmp_path / "ours")
    tensors = safetensors.torch.load_file(publish(file, tmp_path / "x.safetensors", layout))
    safetensors.torch.save_file({name: w.to(dtype) for name, w in tensors.items()}, tmp_path / "x.safetensors")
    read, _ = hub.read_adapter(tmp_path / "x.safetensors", alpha=4)
    ours, _ = hub.load_lora_state(file)
    assert all(torch.equal(read[name], ours[name].to(dtype)) for name in ours)
    assert loaded(tmp_path / "x.safetensors", alpha=4).isfinite().all()


def test_layers_of_several_ranks_and_alphas_act_each_by_its_own(tmp_path):
    """As LyCORIS and tools that cut ranks write them; some layers of one kind only."""
    config = {"rank_pattern": {"blocks.0.attn1.to_q": 8, "blocks.1.attn1.to_k": 1}, "target_modules": ATTENTION}
    trained, file = adapter("wan-t2v", tmp_path / "ours", alpha_pattern={"blocks.1.attn1.to_v": 3}, **config)
    tensors = safetensors.torch.load_file(publish(file, tmp_path / "x.safetensors", "musubi-tuner", alpha=4))
    tensors["lora_unet_blocks_1_self_attn_v.alpha"] = torch.tensor(3, dtype=torch.bfloat16)
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    assert torch.equal(loaded(tmp_path / "x.safetensors"), output(trained))


@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_has_saved_says_its_alpha_beside_it(tmp_path, rslora):
    config = {"target_modules": ATTENTION, "alpha_pattern": {"blocks.0.attn1.to_q": 1}, "use_rslora": rslora}
    trained, file = adapter("wan-t2v", tmp_path / "ours", lora_alpha=2, **config)
    theirs = publish(file, tmp_path / "adapter_model.safetensors", "PEFT")
    trained.transformer.peft_config["default"].save_pretrained(tmp_path)
    rounding.assert_close(loaded(theirs), output(trained), rounding.SINGLE)
    with pytest.raises(ValueError, match="says its alpha, so `alpha=2` would have no effect"):
        hub.read_adapter(theirs, alpha=2)
    beside = tmp_path / "adapter_config.json"
    beside.write_text(beside.read_text().replace('"init_lora_weights": true', '"init_lora_weights": "pissa"'))
    with pytest.raises(ValueError, match="adapter_config.json: the adapter would not act as it was trained.*pissa"):
        hub.read_adapter(theirs)


@pytest.mark.parametrize("changed", [{"r": 16}, {"use_dora": True}, {"lora_bias": True}, {"rank_pattern": {"q": 2}}])
def test_a_configuration_of_another_adapter_beside_a_file_of_peft_is_noticed(tmp_path, changed):
    trained, file = adapter("wan-t2v", tmp_path / "ours", lora_alpha=2, target_modules=ATTENTION)
    theirs = publish(file, tmp_path / "adapter_model.safetensors", "PEFT")
    trained.transformer.peft_config["default"].save_pretrained(tmp_path)
    beside = tmp_path / "adapter_config.json"
    beside.write_text(json.dumps(json.loads(beside.read_text()) | changed))
    with pytest.raises(ValueError, match=r"adapter_config.json: expected plain matrices of rank \d+ of 'blocks"):
        hub.read_adapter(theirs)


def test_what_a_transformer_saves_itself_is_read(tmp_path):
    """`transformer.save_lora_adapter`: the metadata of diffusers, without the prefix for pipelines."""
    trained, _ = adapter("wan-t2v", tmp_path / "ours", lora_alpha=2)
    trained.transformer.save_lora_adapter(tmp_path / "own")
    assert torch.equal(loaded(tmp_path / "own" / hub.LORA_FILE_NAME), output(trained))


@pytest.mark.parametrize(
    ("options", "changed", "message"),
    [
        (
            {"use_dora": True},
            {"use_dora": False},
            r"layer has \['A.weight', 'B.weight'\], got .*magnitude_vector",
        ),
        ({}, {"use_dora": True}, "every layer has .*'magnitude_vector'.*, got"),
        ({"lora_bias": True}, {"lora_bias": False}, r"got \['A.weight', 'B.bias', 'B.weight'\] of"),
        ({}, {"r": 8}, r"expected matrices of rank 8 of .*got shapes \(4, 24\)"),
        ({}, {"rank_pattern": {"attn1.to_v": 2}}, "expected matrices of rank 2 of 'blocks.0.attn1.to_v'"),
    ],
    ids=str,
)
def test_metadata_of_another_adapter_are_noticed(tmp_path, options, changed, message):
    """diffusers loads what fits, and logs the rest."""
    _, file = adapter("wan-t2v", tmp_path / "ours", **options)
    header = {"target_modules": ATTENTION, "r": 4, "lora_alpha": 4} | options | changed
    settings = json.dumps({f"transformer.{key}": value for key, value in header.items()})
    safetensors.torch.save_file(
        safetensors.torch.load_file(file), tmp_path / "x.safetensors", {"lora_adapter_metadata": settings}
    )
    with pytest.raises(ValueError, match=message):
        hub.read_adapter(tmp_path / "x.safetensors")


def test_an_adapter_with_dora_has_no_other_scale(tmp_path):
    """Its magnitudes stay where its matrices are scaled to nothing."""
    trained, file = adapter("wan-t2v", tmp_path / "ours", use_dora=True)
    assert torch.equal(loaded(file), output(trained))
    with pytest.raises(ValueError, match="DoRA, which replaces weights.*`scale=0.0`"):
        hub.read_adapter(file, scale=0.0)


def test_the_command_line_names_what_is_wrong(tmp_path, capsys):
    _, file = adapter("wan-t2v", tmp_path / "ours")
    silent = publish(file, tmp_path / "silent.safetensors", "DiffSynth-Studio")
    words = ["export", str(silent), str(tmp_path / "back"), "--to", "diffusers"]
    assert main([*words, "--adapter_alpha", "lots"]) == 2
    assert "--adapter_alpha is a number, or 'rank', got 'lots'" in capsys.readouterr().err
    assert main([*words, "--adapter_alpha", "rank", "--adapter_scale", "0.5"]) == 0
    assert hub.load_lora_state(tmp_path / "back")[1].lora_alpha == 2
    assert main(["generate", "--adapter_scale", "0.5", "--output_dir", str(tmp_path / "run")]) == 1
    assert "pass `adapter`, or neither" in capsys.readouterr().err
    with pytest.raises(ValueError, match="this layout needs alpha and `scale` above 0"):
        hub.export_lora(file, tmp_path / "x.safetensors", scale=-1)
