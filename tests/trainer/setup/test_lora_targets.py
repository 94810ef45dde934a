"""`lora_target_modules`: which layers an adapter changes; such adapters reload wherever the default one does."""

import copy

import pytest
import torch
from peft import LoraConfig

from tests.support.adapters import IN_FOLDER
from tests.support.tiny import FAMILIES, tiny_encoded_group, tiny_pipeline, tiny_wan_pipeline
from tests.support.trainer.runs import config, disturb_adapter, trainer
from tests.trainer.test_families import TRAINERS, make, velocity
from video_trl import hub
from video_trl.models import family_for, lora_targets
from video_trl.trainer.planning.counter import count_step


PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
SELF_ATTENTION = {f"attn1.{name}" for name in PROJECTIONS}
FFN = {"wan": {"ffn.net.0.proj", "ffn.net.2"}, "cogvideox": {"ff.net.0.proj", "ff.net.2"}}
REST = {  # of the linear layers of a block
    "wan-t2v": {f"attn2.{name}" for name in PROJECTIONS},
    "wan-i2v": {f"attn2.{name}" for name in (*PROJECTIONS, "add_k_proj", "add_v_proj")},
    "cogvideox-t2v": {"norm1.linear", "norm2.linear"},
    "cogvideox-i2v": {"norm1.linear", "norm2.linear"},
}


def adapted(made) -> set[str]:
    """Layers with an adapter, without the number of their block; every block must have the same."""
    blocks: dict[str, set[str]] = {}
    for name, _ in made.model.named_parameters():
        if "lora_A" in name:
            _, number, layer = name.partition(".lora_A")[0].split(".", 2)
            blocks.setdefault(number, set()).add(layer)
    layers = list(blocks.values())
    assert len(layers) == len(made.family.blocks(made.model)) and all(each == layers[0] for each in layers)
    return layers[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_preset_adapts_the_layers_that_it_names(family, tmp_path):
    ffn = FFN[family.split("-")[0]]
    expected = {
        "attention": SELF_ATTENTION,
        "attention+ffn": SELF_ATTENTION | ffn,
        "all-linear": SELF_ATTENTION | ffn | REST[family],
    }
    for preset, layers in expected.items():
        for choice in (preset, [preset]):  # in Python and files, and on the command line
            assert adapted(make(family, "SFT", tmp_path, lora_target_modules=choice)) == layers
    assert adapted(make(family, "SFT", tmp_path)) == SELF_ATTENTION


@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_takes_names_of_layers(name, tmp_path):
    made = make("wan-t2v", name, tmp_path, lora_target_modules=["attn2.to_q", "ffn.net.2"])
    assert adapted(made) == {"attn2.to_q", "ffn.net.2"}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_on_all_linear_layers_reloads_and_is_exported(family, tmp_path):
    """Adapter file, resumption, and for Wan the layout of the original code: the same prediction everywhere."""
    options = {"lora_target_modules": "all-linear"}
    made = make(family, "GroupDPO", tmp_path / "run", max_steps=1, save_strategy="epoch", **options)
    made.train()
    made.save_model()
    trained, fresh = velocity(made.pipeline, family), tiny_pipeline(family)
    assert not torch.equal(velocity(fresh, family), trained)
    fresh.load_lora_weights(str(tmp_path / "run"), **IN_FOLDER)
    torch.testing.assert_close(velocity(fresh, family), trained, rtol=0, atol=1e-6)
    again = make(family, "GroupDPO", tmp_path / "run", max_steps=2, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert again.state.global_step == 2
    if family.startswith("wan"):
        exported = hub.export_lora(tmp_path / "run", tmp_path / "comfyui" / "all.safetensors")
        fresh = tiny_pipeline(family)
        fresh.load_lora_weights(str(exported.parent), weight_name=exported.name)
        torch.testing.assert_close(velocity(fresh, family), trained, rtol=0, atol=1e-6)


def test_the_reference_of_an_adapter_on_all_linear_layers_is_the_base(tmp_path):
    made = trainer(config(tmp_path, lora_target_modules="all-linear"))
    disturb_adapter(made)
    base = velocity(tiny_wan_pipeline(), "wan-t2v")
    assert not torch.equal(velocity(made.pipeline, "wan-t2v"), base)
    with made.reference():
        assert torch.equal(velocity(made.pipeline, "wan-t2v"), base)


@pytest.mark.parametrize(
    ("choice", "match"),
    [
        ("atention", "must be one of 'attention', 'attention\\+ffn', 'all-linear'.*got 'atention'.*'attn1.to_k'"),
        (["attn1.to_q", "attn3.to_q"], "got \\['attn1.to_q', 'attn3.to_q'\\]"),
        (["attention", "attn2.to_q"], "must be one of"),
        ([], "must be one of"),
        (["norm_q"], "must be one of"),  # no linear layer
    ],
)
def test_layers_that_do_not_exist_are_refused_before_anything_is_encoded(choice, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        trainer(config(tmp_path, lora_target_modules=choice))


def test_a_choice_of_layers_for_an_adapter_that_is_not_made_is_refused(tmp_path):
    chosen = {"lora_target_modules": "all-linear"}
    with pytest.raises(ValueError, match="but `peft_config` describes another"):
        trainer(config(tmp_path, **chosen), peft_config=LoraConfig(target_modules=["attn1.to_q"]))
    with pytest.raises(ValueError, match="but `use_peft=False` trains all weights"):
        trainer(config(tmp_path, use_peft=False, **chosen))
    pipeline = tiny_wan_pipeline()
    pipeline.transformer.add_adapter(LoraConfig(target_modules=["attn1.to_q"]))
    with pytest.raises(ValueError, match="but the transformer already carries one"):
        trainer(config(tmp_path, **chosen), model=pipeline)
    assert adapted(trainer(config(tmp_path), model=pipeline)) == {"attn1.to_q"}


@pytest.mark.parametrize("choice", ["attention", "attention+ffn", "all-linear", ["blocks.1.ffn.net.2"]], ids=str)
def test_the_planner_counts_the_weights_of_the_adapter(choice, tmp_path):
    """Of a single block, the planner takes them for those of every block: it looks at a few blocks only."""
    made = trainer(config(tmp_path, lora_target_modules=choice), train_dataset=tiny_encoded_group(2))
    trained = sum(weight.numel() for weight in made.model.parameters() if weight.requires_grad)
    workload = made.workload()
    assert workload.lora_target_modules == choice
    counted = count_step(
        workload.config,
        workload.latents_shape,
        num_videos=2,
        lora_rank=workload.lora_rank,
        lora_target_modules=choice,
        bf16=False,
    ).trained
    assert counted == (2 if isinstance(choice, list) else 1) * trained


def test_targets_do_not_depend_on_the_weights():
    transformer = tiny_wan_pipeline().transformer
    family = family_for(transformer)
    assert lora_targets(family, copy.deepcopy(transformer).to("meta"), "all-linear") == lora_targets(
        family, transformer, "all-linear"
    )
