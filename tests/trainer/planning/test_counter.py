"""What the planner says against what training takes, on real tensors of the same sizes."""

import json
from typing import Any

import pytest

import video_trl
from tests.support.tiny import (
    tiny_cogvideox_i2v_pipeline,
    tiny_cogvideox_pipeline,
    tiny_encoded_group,
    tiny_encoded_video,
    tiny_latents_shape,
    tiny_wan_i2v_pipeline,
    tiny_wan_pipeline,
)
from video_trl.trainer.planning.counter import LiveBytes, count_step


# name, family, trainer, rejected videos, changes of the configuration
MEASURED = [
    ("wan sft", "wan", "SFT", 0, {}),
    ("wan sft checkpointed", "wan", "SFT", 0, {"activation_checkpointing": True}),
    ("wan sft full", "wan", "SFT", 0, {"use_peft": False}),
    ("wan pair", "wan", "DPO", 1, {"step_mode": "concat"}),
    ("wan pair checkpointed", "wan", "DPO", 1, {"step_mode": "concat", "activation_checkpointing": True}),
    ("wan pair sequential", "wan", "DPO", 1, {"step_mode": "sequential"}),
    ("wan pair bf16", "wan", "DPO", 1, {"step_mode": "concat", "bf16": True}),
    ("wan pair full", "wan", "RegDPO", 1, {"step_mode": "concat", "use_peft": False}),
    ("wan group", "wan", "GroupDPO", 3, {"step_mode": "concat", "loss_type": "plackett_luce"}),
    ("wan group singles", "wan", "GroupDPO", 3, {"step_mode": "singles", "activation_checkpointing": True}),
    ("wan group sequential", "wan", "GroupDPO", 3, {"step_mode": "sequential", "loss_type": "plackett_luce"}),
    ("wan sft attention", "wan", "SFT", 0, {"activation_checkpointing": True, "checkpointing_policy": "attention"}),
    ("wan pair attention", "wan", "DPO", 1, {"activation_checkpointing": True, "checkpointing_policy": "attention"}),
    ("cogvideox sft", "cogvideox", "SFT", 0, {}),
    ("cogvideox pair", "cogvideox", "DPO", 1, {"step_mode": "concat"}),
    ("cogvideox pair sequential", "cogvideox", "RegDPO", 1, {"step_mode": "sequential"}),
    ("cogvideox group checkpointed", "cogvideox", "GroupDPO", 3, {"activation_checkpointing": True}),
]
SHAPES = {"wan": (4, 4, 16, 16), "cogvideox": (4, 3, 16, 16)}


def configuration(transformer: Any, **changes: Any) -> dict[str, Any]:
    """What stands in config.json."""
    return json.loads(transformer.to_json_string()) | changes


def measured_peak(directory, family: str, name: str, num_rejected: int, changes: dict[str, Any]) -> tuple[int, Any]:
    """Bytes that are alive at the peak of the first step of training."""
    pipeline = tiny_wan_pipeline() if family == "wan" else tiny_cogvideox_pipeline()
    settings = {
        "output_dir": str(directory),
        "use_cpu": True,
        "max_steps": 1,
        "lora_rank": 4,
        "lora_alpha": 4,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "optim": "sgd",  # has no state, which would come on top after the peak
        **({"physics_rewarding": False, "loss_type": "plackett_luce"} if name == "GroupDPO" else {}),
        **changes,
    }
    known = {"family": "wan-t2v" if family == "wan" else "cogvideox-t2v", "latents_shape": SHAPES[family]}
    rows = tiny_encoded_group(1, m=num_rejected, **known) if num_rejected else tiny_encoded_video(1, **known)
    args = getattr(video_trl, f"Video{name}Config")(**settings)
    made = getattr(video_trl, f"Video{name}Trainer")(pipeline, args, rows)
    counter = LiveBytes()
    modules = [made.model, *([made.reference.transformer] if not args.use_peft and num_rejected else [])]
    for module in modules:
        for weight in module.parameters():
            counter.add(weight)
    with counter:
        made.train()
    return counter.peak, pipeline.transformer


@pytest.mark.parametrize(
    ("family", "name", "num_rejected", "changes"), [case[1:] for case in MEASURED], ids=[case[0] for case in MEASURED]
)
def test_the_plan_is_within_three_percent_of_what_training_takes(tmp_path, family, name, num_rejected, changes):
    peak, transformer = measured_peak(tmp_path, family, name, num_rejected, changes)
    full = not changes.get("use_peft", True)
    plan = count_step(
        configuration(transformer),
        SHAPES[family],
        num_videos=1 + num_rejected,
        reference="none" if not num_rejected else "copy" if full else "adapter",
        step_mode=changes.get("step_mode", "concat"),
        checkpointing=changes.get("activation_checkpointing", False),
        checkpointing_policy=changes.get("checkpointing_policy", "full"),
        lora_rank=None if full else 4,
        bf16=changes.get("bf16", False),
        prompt_tokens=16,
    )
    assert plan.peak - plan.optimizer == pytest.approx(peak, rel=0.03)


def test_more_blocks_cost_what_a_block_costs(monkeypatch):
    """Depth is extrapolated; counting all blocks says the same."""
    config = configuration(tiny_wan_pipeline().transformer, num_layers=9)
    settings = {"num_videos": 2, "reference": "adapter", "lora_rank": 4, "bf16": False, "prompt_tokens": 16}
    fast = count_step(config, SHAPES["wan"], **settings)
    monkeypatch.setattr("video_trl.trainer.planning.counter._FEW_BLOCKS", 9)
    assert count_step(config, SHAPES["wan"], **settings) == fast


def test_a_group_one_by_one_costs_the_memory_of_one_video_and_three_forwards_more():
    config = configuration(tiny_wan_pipeline().transformer, attention_head_dim=48)  # wide next to the latents
    shared = {"lora_rank": 4, "bf16": False, "checkpointing": False}
    one = count_step(config, (4, 4, 32, 32), num_videos=1, **shared)
    concat = count_step(config, (4, 4, 32, 32), num_videos=4, reference="adapter", **shared)
    sequential = count_step(
        config, (4, 4, 32, 32), num_videos=4, reference="adapter", step_mode="sequential", **shared
    )
    assert sequential.activations <= 1.35 * one.activations  # on top come the latents of the other three
    assert sequential.peak <= 0.3 * concat.peak and sequential.flops <= 1.3 * concat.flops


def test_image_to_video_takes_its_conditions(tmp_path):
    for pipeline in (tiny_wan_i2v_pipeline(), tiny_cogvideox_i2v_pipeline()):
        config = configuration(pipeline.transformer)
        shape = tiny_latents_shape("wan-i2v" if "image_dim" in config else "cogvideox-i2v")
        assert count_step(config, shape, num_videos=2, reference="adapter", lora_rank=4).activations > 0


@pytest.mark.parametrize(
    ("config", "shape", "changes", "message"),
    [
        ({"_class_name": "UNet"}, (4, 4, 16, 16), {}, "config.json of one of WanTransformer3DModel, Cog.*got.*'UNet'"),
        ({}, (4, 4, 16, 16), {}, "folder `transformer`"),
        (None, (5, 4, 16, 16), {}, "must have 4 channels"),
        (None, (4, 4, 16, 16), {"num_videos": 0}, "`num_videos` must be at least 1, got 0"),
        (None, (4, 4, 16, 16), {"lora_rank": 0}, "`lora_rank` must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_planned_is_refused(config, shape, changes, message):
    config = configuration(tiny_wan_pipeline().transformer) if config is None else config
    with pytest.raises(ValueError, match=message):
        count_step(config, shape, **({"num_videos": 1} | changes))
