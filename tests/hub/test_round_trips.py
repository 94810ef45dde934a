"""
Every kind of adapter that is accepted, through its whole life: trained, saved, loaded by a stock pipeline to the same
output, continued to the same loss, exported and imported to the same tensors. What is not here is refused.
"""

import dataclasses
import random

import diffusers
import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig

from tests.support.adapters import IN_FOLDER
from tests.support.tiny import FAMILIES, MAX_SEQUENCE_LENGTH, tiny_encoded_video, tiny_latents_shape, tiny_pipeline
from video_trl import VideoSFTConfig, VideoSFTTrainer, hub
from video_trl.hub.lora import _NEUTRAL, _PROVEN
from video_trl.models import family_for


SELF = ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"]
# Option -> values to try beside the usual one. What depends on the family is a function of it.
OPTIONS = {
    "r": [1, 8],
    "lora_alpha": [1, 3, 16],
    "use_rslora": [True],
    "use_dora": [True],
    "lora_bias": [True],
    "lora_dropout": [0.5],
    "init_lora_weights": [False, "gaussian"],
    # The first entry that names a layer holds: what names one stands before what names all.
    "rank_pattern": [lambda blocks: {f"{blocks}.0.attn1.to_q": 8, "attn1.to_q": 2}],
    "alpha_pattern": [lambda blocks: {f"{blocks}.1.attn1.to_k": 16, "attn1.to_k": 2, "attn1.to_v": 1}],
    "layers_to_transform": [[0], 1],
    "layers_pattern": [lambda blocks: [blocks]],
    "exclude_modules": [["attn1.to_k"], r".*\.1\..*"],
    "target_modules": [
        lambda blocks: ["attn2.to_q", "attn2.to_v"] if blocks == "blocks" else ["attn1.to_q"],
        lambda blocks: ["ffn.net.0.proj", "ffn.net.2"] if blocks == "blocks" else ["ff.net.0.proj", "ff.net.2"],
        lambda blocks: r".*attn[12]\.to_[qv]",
        lambda blocks: ["patch_embedding", "proj_out"] if blocks == "blocks" else ["patch_embed.proj", "proj_out"],
        "all-linear",
    ],
}


def _pattern(blocks):
    return blocks


DIFFUSERS = Version(diffusers.__version__).release[:2]


# Options that do nothing alone.
NEEDS = {"layers_pattern": {"layers_to_transform": [1]}, "layers_to_transform": {"layers_pattern": _pattern}}
# PEFT before 0.21 looks for numbered blocks inside a module only: none is left, which is refused.
TRIED = [name for name in OPTIONS if name not in NEEDS or Version(peft.__version__) >= Version("0.21")]


def one_by_one():
    """The usual adapter, and those that differ from it by one option."""
    yield {}
    for name in TRIED:
        yield from ({name: value} | NEEDS.get(name, {}) for value in OPTIONS[name])


def together(number, seed=0):
    """Adapters with several options at once, drawn at random."""
    generator = random.Random(seed)
    for _ in range(number):
        names = generator.sample([name for name in TRIED if name != "layers_pattern"], 4)
        options = {name: generator.choice(OPTIONS[name]) for name in names}
        if "lora_bias" in options and options.get("init_lora_weights") == "gaussian":
            del options["lora_bias"]  # PEFT has no such adapter
        yield options | (NEEDS["layers_to_transform"] if "layers_to_transform" in options else {})


def label(options):
    return (
        ", ".join(f"{name}={'by family' if callable(value) else value}" for name, value in options.items()) or "usual"
    )


FAST = [("wan-t2v", options) for options in one_by_one()]
SLOW = [(family, options) for family in FAMILIES if family != "wan-t2v" for options in one_by_one()]
SLOW += [(family, options) for family in FAMILIES for options in together(8)]


def configured(family, options):
    blocks = "blocks" if family.startswith("wan") else "transformer_blocks"
    values = {name: value(blocks) if callable(value) else value for name, value in options.items()}
    return LoraConfig(**({"r": 4, "lora_alpha": 4, "target_modules": SELF} | values))


def trainer(folder, family, pipeline, **arguments):
    args = VideoSFTConfig(
        output_dir=str(folder), use_cpu=True, max_steps=2, learning_rate=1e-2, save_strategy="no", report_to="none",
        logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    return VideoSFTTrainer(pipeline, args, tiny_encoded_video(2, family=family), **arguments)


def output(pipeline, name):
    """One prediction on fixed noise, in whatever mode the pipeline's transformer is left."""
    family = family_for(pipeline.transformer, pipeline.scheduler)
    for weight in pipeline.transformer.parameters():  # loaded ones lie where they lie in the file; kernels notice
        weight.data = weight.data.clone()
    row = tiny_encoded_video(1, family=name)[0]
    length = family.prompt_length(pipeline.transformer) or MAX_SEQUENCE_LENGTH
    conditions = family.pad_prompts([{column: row[column] for column in family.prompt_columns}], length)
    conditions |= {column: row[column][None] for column in family.image_columns}
    noise = torch.randn(1, *tiny_latents_shape(name), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return family.predict(pipeline.transformer, noise, torch.tensor([500]), conditions)


def next_loss(made):
    """Loss of the first row with the noise of the first step."""
    made.model.eval()
    made.state.global_step = 0
    with torch.no_grad():
        return made.compute_loss(made.model, made.data_collator([made.train_dataset[0]])).item()


def is_exportable(config, weights):
    outside = [name for name in weights if not name.startswith("blocks.")]
    if any(name.startswith("patch_embedding.") for name in outside):
        return False
    if config.use_dora or config.lora_bias or (outside and (config.lora_alpha != config.r or config.use_rslora)):
        return False
    return not (outside and (config.rank_pattern or config.alpha_pattern))


def check_round_trip(folder, family, options):
    trained = trainer(folder, family, tiny_pipeline(family), peft_config=configured(family, options))
    base = output(tiny_pipeline(family), family)
    trained.train()
    trained.save_model()
    trained.model.eval()
    expected = output(trained.pipeline, family)
    assert not torch.equal(expected, base)  # the adapter does something, or the rest would prove nothing

    fresh = tiny_pipeline(family)
    fresh.load_lora_weights(str(folder), **IN_FOLDER)
    assert torch.equal(output(fresh, family), expected)

    continued = trainer(folder / "continued", family, fresh)
    assert next_loss(continued) == next_loss(trained)
    names = {
        name.replace(f".{continued.adapter_name}.", ".default.") for name, _ in continued.model.named_parameters()
    }
    assert names == {name for name, _ in trained.model.named_parameters()}

    weights, config = hub.load_lora_state(folder)
    same, _ = hub.load_lora_state(hub.import_lora(folder, folder / "read"))
    assert same.keys() == weights.keys() and all(torch.equal(same[name], weights[name]) for name in weights)
    if family.startswith("wan") and is_exportable(config, weights):
        exported = hub.export_lora(folder, folder / "original" / "adapter.safetensors")
        back, _ = hub.load_lora_state(hub.import_lora(exported, folder / "imported"))
        assert back.keys() == weights.keys() and all(torch.equal(back[name], weights[name]) for name in weights)
        stock = tiny_pipeline(family)
        stock.load_lora_weights(str(folder / "imported"), **IN_FOLDER)
        assert torch.equal(output(stock, family), expected)
        other = tiny_pipeline(family)
        other.load_lora_weights(str(exported.parent), weight_name=exported.name)
        if not (config.rank_pattern and DIFFUSERS < (0, 41)):  # which reads the alphas of whole modules then
            assert torch.allclose(output(other, family), expected, atol=1e-5)  # it multiplies weights by their scale


@pytest.mark.parametrize(("family", "options"), FAST, ids=[label(options) for _, options in FAST])
def test_an_adapter_comes_back_and_goes_on(tmp_path, family, options):
    check_round_trip(tmp_path, family, options)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "options"), SLOW, ids=[f"{family}: {label(options)}" for family, options in SLOW])
def test_an_adapter_of_every_family_comes_back_and_goes_on(tmp_path, family, options):
    check_round_trip(tmp_path, family, options)


def test_in_bfloat16_a_stock_pipeline_differs_by_the_rounding_of_the_adapter_alone(tmp_path):
    def half(pipeline):
        pipeline.transformer.bfloat16()
        return pipeline

    def output_in_half(pipeline):
        with torch.autocast("cpu", torch.bfloat16):
            return output(pipeline, "wan-t2v")

    trained = trainer(tmp_path, "wan-t2v", half(tiny_pipeline("wan-t2v")), peft_config=configured("wan-t2v", {}))
    trained.train()
    trained.save_model()
    trained.model.eval()
    weights = {name: weight for name, weight in trained.model.named_parameters() if ".lora_" in name}
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    for weight in weights.values():
        weight.data = weight.data.bfloat16()
    fresh = half(tiny_pipeline("wan-t2v"))
    fresh.load_lora_weights(str(tmp_path), **IN_FOLDER)
    assert torch.equal(output_in_half(fresh), output_in_half(trained.pipeline))


@pytest.mark.parametrize("alpha", [1, 4, 8])
@pytest.mark.parametrize("target", ["attn1.to_q", "attn2.to_v", "ffn.net.0.proj", "ffn.net.2", "add_k_proj"])
def test_an_export_keeps_the_scale_of_every_layer(tmp_path, alpha, target):
    """Also where diffusers' own converter multiplies the tensors that it is given."""
    targets = ["add_k_proj", "add_v_proj", "attn2.to_q"] if target == "add_k_proj" else [target]
    pipeline = tiny_pipeline("wan-i2v")
    config = LoraConfig(r=4, lora_alpha=alpha, target_modules=targets, init_lora_weights=False)
    pipeline.transformer.add_adapter(config)
    file = hub.save_lora(pipeline.transformer, tmp_path)
    before, _ = hub.load_lora_state(file)
    exported = hub.export_lora(file, tmp_path / "original" / "x.safetensors")
    back, config = hub.load_lora_state(hub.import_lora(exported, tmp_path / "back"))
    assert config.lora_alpha == alpha and all(torch.equal(back[name], before[name]) for name in before)


def test_the_matrix_holds_every_option_that_is_accepted():
    assert {*OPTIONS} == {*_PROVEN, "lora_dropout"} and "lora_dropout" in _NEUTRAL


def test_every_other_option_is_refused():
    """Those of later versions of PEFT too: what is accepted is listed."""
    others = [field.name for field in dataclasses.fields(LoraConfig) if field.name not in (*_PROVEN, *_NEUTRAL)]
    assert len(others) > 10 and "target_parameters" in others
    for name in others:
        config = LoraConfig(target_modules=["attn1.to_q"])
        config.__dict__[name] = "another value"
        with pytest.raises(ValueError, match=name):
            hub.check_lora_config(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            LoraConfig(target_parameters=["attn2.to_q.weight"]),
            "`peft_config` has target_parameters=.*not known to be sa",
        ),
        (LoraConfig(fan_in_fan_out=True), "fan_in_fan_out=True"),
        (LoraConfig(lora_alpha=0), "a finite number other than 0, got alpha of {'lora_alpha': 0}"),
        (LoraConfig(alpha_pattern={"to_q": 0}), "got alpha of {'to_q': 0}"),
        (peft.AdaLoraConfig(total_step=10), "must be a `peft.LoraConfig`, got AdaLoraConfig"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_refused_is_named(config, message):
    with pytest.raises(ValueError, match=message):
        hub.check_lora_config(config)
