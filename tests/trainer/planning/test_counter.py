"""What the planner says against what training takes, on real tensors of the same sizes."""

import json
import weakref
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch

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
from video_trl import diffusion
from video_trl.trainer.planning.counter import LiveBytes, count_step
from video_trl.trainer.planning.estimate import Placement, Workload, estimate
from video_trl.trainer.setup import activation_checkpointing


OFFLOAD = {"activation_checkpointing": True, "checkpointing_policy": "offload"}
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
    ("wan pair offload", "wan", "DPO", 1, {**OFFLOAD, "step_mode": "concat"}),
    ("wan group offload sequential", "wan", "GroupDPO", 3, {**OFFLOAD, "step_mode": "sequential"}),
    ("wan pair offload bf16", "wan", "DPO", 1, {**OFFLOAD, "bf16": True, "step_mode": "singles"}),
    ("wan pair weights on host", "wan", "DPO", 1, {"activation_checkpointing": True, "offload_weights": True}),
    ("wan pair all on host", "wan", "DPO", 1, {**OFFLOAD, "offload_weights": True, "step_mode": "sequential"}),
    ("cogvideox sft", "cogvideox", "SFT", 0, {}),
    ("cogvideox pair", "cogvideox", "DPO", 1, {"step_mode": "concat"}),
    ("cogvideox pair sequential", "cogvideox", "RegDPO", 1, {"step_mode": "sequential"}),
    ("cogvideox group checkpointed", "cogvideox", "GroupDPO", 3, {"activation_checkpointing": True}),
]
SLOW = ("wan pair offload", "wan pair offload bf16", "wan pair all on host")
SHAPES = {"wan": (4, 4, 16, 16), "cogvideox": (4, 3, 16, 16)}


def configuration(transformer: Any, **changes: Any) -> dict[str, Any]:
    """What stands in config.json."""
    return json.loads(transformer.to_json_string()) | changes


class Host:
    """The host's memory, apart from the device's although both are one here: what a graph saves there is bytes."""

    def __init__(self) -> None:
        self.live = self.peak = 0

    def saved(self, pin_memory: bool = False) -> AbstractContextManager[None]:
        return torch.autograd.graph.saved_tensors_hooks(self._put, self._get)

    def _put(self, tensor: torch.Tensor) -> Any:
        held = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().copy()
        self.live += held.nbytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(held, self._drop, held.nbytes)
        return held, tensor.dtype, tensor.shape

    def _get(self, saved: Any) -> torch.Tensor:
        held, dtype, shape = saved
        if not held.size:  # which numpy gives no stride that torch 2.6 could view
            return torch.empty(shape, dtype=dtype)
        return torch.from_numpy(held).clone().view(dtype).view(shape)

    def _drop(self, nbytes: int) -> None:
        self.live -= nbytes


def measured_peak(
    directory, family: str, name: str, num_rejected: int, changes: dict[str, Any], monkeypatch
) -> tuple[int, int, Any]:
    """Bytes that are alive on the device and in the host's memory at the peaks of the first step of training."""
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
    host = Host()
    monkeypatch.setattr(activation_checkpointing, "save_on_cpu", host.saved)
    for table in (diffusion._schedule, diffusion._schedule_on):
        table.cache_clear()  # as in a process of its own
    made = getattr(video_trl, f"Video{name}Trainer")(pipeline, args, rows)
    counter = LiveBytes()
    modules = [made.model, *([made.reference.transformer] if not args.use_peft and num_rejected else [])]
    for module in modules:
        for weight in module.parameters():
            counter.add(weight)
    with counter:
        made.train()
    return counter.peak, host.peak, pipeline.transformer


@pytest.mark.parametrize(
    ("family", "name", "num_rejected", "changes"),
    [pytest.param(*case[1:], id=case[0], marks=[pytest.mark.slow] * (case[0] in SLOW)) for case in MEASURED],
)
def test_the_plan_is_never_below_what_training_takes(tmp_path, monkeypatch, family, name, num_rejected, changes):
    """And at most three percent above it. What is moved to the host is counted apart, and to the byte."""
    measured, on_host, transformer = measured_peak(tmp_path, family, name, num_rejected, changes, monkeypatch)
    full = not changes.get("use_peft", True)
    workload = Workload(
        configuration(transformer),
        SHAPES[family],
        num_videos=1 + num_rejected,
        reference="none" if not num_rejected else "copy" if full else "adapter",
        lora_rank=None if full else 4,
        bf16=changes.get("bf16", False),
        frozen_dtype=torch.float32,  # the pipeline is an object, and was made so
        prompt_tokens=16,
    )
    policy = changes.get("checkpointing_policy", "full") if changes.get("activation_checkpointing") else None
    on_cpu = changes.get("offload_weights", False)
    mode = changes.get("step_mode", "concat")
    plan = estimate(workload, Placement(step_mode=mode, checkpointing_policy=policy, offload_weights=on_cpu))
    assert measured <= plan.peak - plan.parts["optimizer"] <= 1.03 * measured
    assert plan.host.get("block inputs", 0) == on_host


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
