"""All videos in a forward, a forward a video, or one graph alive at a time: the same gradient, at other costs."""

import math
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import video_trl
from tests.support import rounding
from tests.support.cells import CELLS, later_ones_slow
from tests.support.rounding import assert_close_weights
from tests.support.tiny import TINY_FAMILIES, tiny_encoded_group, tiny_wan_pipeline
from tests.support.trainer.runs import SMOOTH_ADAM, RecordGradients, disturb_adapter, double, losses, mixed_shapes
from tests.trainer.test_families import rows_for, tiny_pipeline
from video_trl.trainer.planning.counter import LiveBytes
from video_trl.trainer.planning.estimate import HEADROOM, LONG_VIDEO, Placement, Workload, estimate, fitting_step_mode


SLOW = [pytest.mark.slow]
LOSSES: list[tuple[str, dict[str, Any]]] = [
    ("GroupDPO", {"loss_type": "sampled"}),
    ("GroupDPO", {"loss_type": "sum"}),
    ("GroupDPO", {"loss_type": "plackett_luce"}),
    ("GroupDPO", {"loss_type": "sum", "shared_noise": False, "activation_checkpointing": True}),
    ("GroupDPO", {"loss_type": "sampled", "sft_weight": "0.4*dgr"}),
    ("GroupDPO", {"loss_type": "sum", "sft_weight": 20.0, "rejected_score_below": 0.6}),
    ("GroupDPO", {"loss_type": "plackett_luce", "sft_weight": "dgr", "rejected_score_below": 0.6}),
    ("DPO", {}),
    ("DPO", {"lora_dropout": 0.3, "activation_checkpointing": True}),
    ("RegDPO", {"sft_weight_mode": "dgr"}),
    ("RegDPO", {"sft_weight_mode": "fixed", "use_peft": False, "learning_rate": 1e-3}),
]


def make(directory, name: str, mode: str, *, rows=None, model=None, callbacks=None, **changes: Any) -> Any:
    settings = {
        "output_dir": str(directory),
        "use_cpu": True,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "lora_rank": 4,
        "lora_alpha": 4,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "step_mode": mode,
        "beta": 50.0,  # a large one multiplies the rounding of the errors
        **changes,
    }
    args = getattr(video_trl, f"Video{name}Config")(**settings)
    rows = tiny_encoded_group(4) if rows is None else rows
    return getattr(video_trl, f"Video{name}Trainer")(model or tiny_wan_pipeline(), args, rows, callbacks=callbacks)


def run(directory, name: str, mode: str, *, model=None, **changes: Any) -> tuple[Any, list[dict[str, torch.Tensor]]]:
    """In float64: both modes are to compute the same, and not only what rounding lets pass."""
    recorder = RecordGradients()
    model = double(model or tiny_wan_pipeline())
    made = make(directory, name, mode, model=model, callbacks=[recorder], **SMOOTH_ADAM, **changes)
    if changes.get("use_peft", True):
        disturb_adapter(made)
    made.train()
    return made, recorder.steps


@pytest.mark.parametrize(("name", "changes"), LOSSES, ids=str)
def test_all_modes_compute_the_same_step(name, changes, tmp_path):
    concat, expected = run(tmp_path / "concat", name, "concat", **changes)
    sequential, gradients = run(tmp_path / "sequential", name, "sequential", **changes)
    singles, of_singles = run(tmp_path / "singles", name, "singles", **changes)
    # Two rows of two videos of eight tokens.
    bound = rounding.DOUBLE if changes.get("use_peft", True) else rounding.sums(2 * 2 * 8)
    assert_close_weights(gradients[0], expected[0], bound)
    assert_close_weights(of_singles[0], expected[0], bound)
    assert losses(singles) == pytest.approx(losses(concat), rel=1e-4)
    assert losses(sequential) == pytest.approx(losses(concat), rel=1e-4)
    for metric, value in concat.state.log_history[0].items():
        if metric not in ("epoch", "step"):
            assert sequential.state.log_history[0][metric] == pytest.approx(value, rel=1e-4, abs=rounding.LOGGED), (
                metric
            )
    assert sequential.evaluate(tiny_encoded_group(3, seed=9))["eval_loss"] == pytest.approx(
        concat.evaluate(tiny_encoded_group(3, seed=9))["eval_loss"], rel=1e-3
    )


@pytest.mark.parametrize("accumulation", [1, 2])
def test_accumulated_and_uneven_steps_are_weighed_alike(accumulation, tmp_path):
    """Eleven rows of two shapes: some steps are smaller, some micro-batches count for nothing."""
    changes = {
        "rows": mixed_shapes(),
        "loss_type": "plackett_luce",
        "physics_rewarding": False,
        "max_steps": 4,
        "per_device_train_batch_size": 4 // accumulation,
        "gradient_accumulation_steps": accumulation,
    }
    _, expected = run(tmp_path / "concat", "GroupDPO", "concat", **changes)
    _, gradients = run(tmp_path / "sequential", "GroupDPO", "sequential", **changes)
    assert_close_weights(gradients[0], expected[0], rounding.DOUBLE)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert_close_weights(ours, theirs, 1e-4)  # rounding grows with every update


@pytest.mark.parametrize("family", later_ones_slow(CELLS["one by one"]))
def test_conditions_of_every_family_follow_their_video(family, tmp_path):
    """A first frame belongs to its row, not to the batch."""
    options = TINY_FAMILIES[family].options
    steps = [
        run(tmp_path / mode, "DPO", mode, model=tiny_pipeline(family), rows=rows_for(family, "DPO"), **options)[1]
        for mode in ("concat", "sequential")
    ]
    assert_close_weights(steps[1][0], steps[0][0], rounding.DOUBLE)


@pytest.mark.parametrize("mode", ["singles", "sequential"])
def test_policy_and_reference_agree_to_the_last_bit_before_the_first_update(mode, tmp_path):
    made = make(tmp_path, "DPO", mode, max_steps=1)
    made.train()
    (first,) = losses(made)
    assert first == pytest.approx(math.log(2), abs=1e-7) and made.state.log_history[0]["rewards/margins"] == 0.0


def live_bytes(function: Callable[[], Any]) -> int:
    """Largest number of bytes that graphs hold for their backward pass at once, weights apart."""
    held: Counter[tuple[int, int]] = Counter()  # (address, bytes) of storages: several graphs may share one
    peak = 0

    class Saved:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

    def pack(tensor: torch.Tensor) -> Saved:
        nonlocal peak
        saved = Saved(tensor)
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            key = (storage.data_ptr(), storage.nbytes())
            held[key] += 1
            weakref.finalize(saved, held.subtract, [key])
        peak = max(peak, sum(nbytes for (_, nbytes), count in held.items() if count))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        function()
    return peak


def test_a_group_needs_the_memory_of_one_video(tmp_path):
    """The exact loss of a group of four; the paper left it for a bound because of this memory."""

    def peak(name: str, mode: str, m: int) -> int:
        rows = tiny_encoded_group(1, m=m, latents_shape=(4, 4, 16, 16))  # many tokens next to the weights
        loss = {"loss_type": "plackett_luce", "physics_rewarding": False}
        made = make(tmp_path, name, mode, rows=rows, max_steps=1, per_device_train_batch_size=1, **loss)
        return live_bytes(made.train)

    whole, one, pair = peak("GroupDPO", "concat", 3), peak("GroupDPO", "sequential", 3), peak("GroupDPO", "concat", 1)
    assert one <= 0.3 * whole and one <= 0.55 * pair


def test_checkpointed_singles_need_less_memory_than_all_at_once(tmp_path):
    """What is computed again in the backward pass is one video's at a time; the forwards are as many."""
    peaks, calls = {}, {}
    for mode in ("concat", "singles"):
        rows = tiny_encoded_group(1, m=3, latents_shape=(4, 4, 16, 16))
        loss = {"loss_type": "plackett_luce", "physics_rewarding": False, "activation_checkpointing": True}
        made = make(tmp_path, "GroupDPO", mode, rows=rows, max_steps=1, per_device_train_batch_size=1, **loss)
        sizes: list[int] = []
        made.model.register_forward_pre_hook(
            lambda module, args, kwargs, sizes=sizes: sizes.append(len(kwargs["hidden_states"])), with_kwargs=True
        )
        counter = LiveBytes()
        with counter:
            made.train()
        peaks[mode], calls[mode] = counter.peak, sizes
    assert calls == {"concat": [4, 4], "singles": [1] * 8}  # reference, then policy
    assert peaks["singles"] < peaks["concat"]


# Each policy is three counts of a step of four videos; the choice between them is one and the same.
@pytest.mark.parametrize("policy", [pytest.param(None, marks=SLOW), "full", pytest.param("attention", marks=SLOW)])
def test_auto_takes_the_fastest_mode_that_fits(policy):
    """The planner's own figures; of long videos a forward each is as fast as one for all, and needs less memory."""
    config = {**tiny_wan_pipeline().transformer.config, "_class_name": "WanTransformer3DModel"}
    work = Workload(config, (4, 4, 16, 16), num_videos=4, reference="adapter", lora_rank=4)
    peak = {
        mode: estimate(work, Placement(step_mode=mode, checkpointing_policy=policy)).peak
        for mode in ("concat", "singles", "sequential")
    }
    assert peak["sequential"] < peak["singles"] < peak["concat"]

    def chosen(memory: float | None, tokens: int, **placement: Any) -> str:
        where = Placement(checkpointing_policy=policy, **placement)
        return fitting_step_mode(work, where, None if memory is None else int(memory / HEADROOM), tokens)

    assert chosen(None, LONG_VIDEO - 1) == "concat" and chosen(None, LONG_VIDEO) == "singles"
    assert chosen(peak["concat"] + 2, LONG_VIDEO - 1) == "concat"
    assert chosen(peak["concat"] - 2, LONG_VIDEO - 1) == "singles"
    assert chosen(peak["concat"] + 2, LONG_VIDEO) == chosen(peak["singles"] + 2, LONG_VIDEO) == "singles"
    assert chosen(peak["singles"] - 2, LONG_VIDEO) == "sequential"
    assert chosen(None, LONG_VIDEO, engine="zero2") == "concat"


def test_auto_is_settled_for_the_trainers_own_step(tmp_path, monkeypatch):
    """On a CPU at once; with the memory of an accelerator, by what the step was estimated to take."""
    rows = tiny_encoded_group(1, m=3, latents_shape=(4, 4, 16, 16))
    loss = {"loss_type": "plackett_luce", "physics_rewarding": False, "per_device_train_batch_size": 1}
    settings = {"rows": rows, "activation_checkpointing": True, "checkpointing_policy": "attention", **loss}
    made = make(tmp_path, "GroupDPO", "auto", **settings)
    assert made.step_mode == "concat"  # 256 tokens
    step = [
        estimate(made.workload(), replace(made.placement(), step_mode=mode)).peak for mode in ("concat", "singles")
    ]
    for memory, mode in zip((step[0] + 2, step[0] - 2, step[1] - 2), ("concat", "singles", "sequential"), strict=True):
        monkeypatch.setattr(
            "video_trl.trainer.preference_trainer.accelerator_memory", lambda _, found=memory: int(found / HEADROOM)
        )
        made = make(tmp_path, "GroupDPO", "auto", **settings)
        assert made.step_mode == made.placement().step_mode == mode
    assert make(tmp_path, "GroupDPO", "concat", **settings).step_mode == "concat"


def test_an_unknown_mode_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`step_mode` must be one of 'auto', 'concat', 'singles', 'sequential', got"):
        make(tmp_path, "DPO", "both")
