"""The estimate of many GPUs from the count of one."""

from dataclasses import replace

import pytest
import torch

import video_trl
from tests.support.tiny import tiny_cogvideox_pipeline, tiny_encoded_group, tiny_encoded_video, tiny_wan_pipeline
from tests.support.trainer.repa_runs import repa_trainer
from tests.support.trainer.runs import mixed_shapes
from tests.trainer.planning.test_counter import SHAPES, configuration
from video_trl.losses import trd_loss
from video_trl.models import family_for
from video_trl.trainer.planning.counter import LiveBytes, count_step
from video_trl.trainer.planning.estimate import (
    HEADROOM,
    Placement,
    Workload,
    _relation_bytes,
    describe_estimate,
    describe_recommendation,
    encoding_peak,
    estimate,
    recommend,
)


def workload(**changes) -> Workload:
    config = configuration(tiny_wan_pipeline().transformer, num_layers=2)
    return Workload(**({"config": config, "latents_shape": SHAPES["wan"], "num_videos": 2, "lora_rank": 4} | changes))


def test_one_gpu_is_the_count_itself():
    work = workload(reference="adapter")
    settings = {"num_videos": 2, "reference": "adapter", "lora_rank": 4, "step_mode": "sequential"}
    plan = count_step(work.config, work.latents_shape, checkpointing_policy="attention", **settings)
    found = estimate(work, Placement(step_mode="sequential", checkpointing_policy="attention"))
    assert found.peak == plan.peak and found.flops == plan.flops and found.sent == {}
    assert found.parts["adapter"] == 4 * plan.trained and found.parts["block inputs"] > 0
    without = estimate(work, Placement(step_mode="sequential", checkpointing_policy=None))
    assert without.peak > found.peak and "block inputs" not in without.parts


@pytest.mark.parametrize("lora_rank", [4, None])
def test_each_engine_divides_what_it_divides(lora_rank):
    work = workload(lora_rank=lora_rank)
    one = estimate(work, Placement()).parts
    plan = count_step(work.config, work.latents_shape, num_videos=2, lora_rank=lora_rank)
    engines = ("ddp", "zero1", "zero2", "zero3", "zero3-offload", "fsdp2")
    of = {name: estimate(work, Placement(8, name)) for name in engines}
    ddp, zero1, zero2, zero3, host, fsdp2 = (found.parts for found in of.values())
    assert zero1 == {**ddp, "optimizer": one["optimizer"] // 8}
    assert {**ddp, "buckets": 0} == {**one, "buckets": 0} and ddp["buckets"] == one["gradients"]
    assert zero2["weights"] == one["weights"] and zero2["optimizer"] == one["optimizer"] // 8
    assert zero2["gradients"] == one["gradients"] // 8 == fsdp2["gradients"]
    block = one["weights"] // 2
    assert fsdp2 == zero3 and fsdp2["weights"] == one["weights"] // 8 + 2 * block
    assert host["weights"] == 2 * block and "optimizer" not in host
    assert estimate(work, Placement(1, "zero3-offload")).parts["weights"] == 2 * block
    activations = [found.parts["other activations"] for found in of.values()]
    assert len(set(activations)) == 1  # data parallelism divides none of them
    gradients = 4 * of["ddp"].trained
    assert of["ddp"].sent == {"gradients": int(2 * 7 / 8 * gradients)}
    assert of["fsdp2"].sent["gradients"] == int(7 / 8 * gradients)
    # DeepSpeed has what is trained in bfloat16 as well, and hands it round once it is updated.
    half = gradients // 2
    for found in (of["zero1"], of["zero2"]):
        assert found.sent == {"gradients": int(2 * 7 / 8 * half), "weights": int(7 / 8 * half)}
    weights = one["weights"] + one.get("adapter", 0)
    base = one["weights"] if lora_rank else 0
    assert of["zero3"].sent == {"gradients": int(7 / 8 * half), "weights": int(7 / 8 * (base + half) * 2)}
    outside = 0 if lora_rank is None else one["weights"] - plan.block_weights  # of blocks: gathered once
    assert of["fsdp2"].sent["weights"] == int(7 / 8 * (2 * weights - outside))


def test_gpus_that_share_a_video_share_its_activations_and_operations():
    work = workload(reference="adapter")
    alone, shared = estimate(work, Placement(4)), estimate(work, Placement(4, context_parallel=2))
    for part in ("block inputs", "other activations"):
        assert shared.parts[part] == alone.parts[part] // 2
    assert shared.flops == alone.flops // 2 and shared.parts["weights"] == alone.parts["weights"]
    # Per block: q, k, v and output of half the tokens, half of it to the other; 2 videos x (reference, forward,
    # forward again, backward).
    tokens, width = shared.tokens, 24
    assert shared.sent["tokens and heads"] == 2 * 2 * 4 * (4 * tokens / 2 * width * 2) / 2


def test_one_graph_at_a_time_gathers_the_weights_more_often():
    work = workload(reference="adapter", num_videos=4)
    concat, one_by_one = (estimate(work, Placement(2, "zero3", step_mode=mode)) for mode in ("concat", "sequential"))
    # All at once: reference, forward, backward. One by one: 4, then 7 forwards of the policy and 4 backward passes.
    # The reference takes the base alone, and each backward pass sends its gradients.
    adapter, base = 2 * concat.trained, estimate(work, Placement()).parts["weights"]
    assert concat.sent["weights"] == (3 * base + 2 * adapter) / 2
    assert one_by_one.sent["weights"] == (15 * base + 11 * adapter) / 2
    assert one_by_one.sent["gradients"] == 4 * concat.sent["gradients"] == 4 * adapter / 2
    assert one_by_one.parts["block inputs"] == concat.parts["block inputs"] // 4


def test_the_relation_loss_is_counted():
    work = workload(num_videos=1, alignment=(2, 60, 16))
    counter = LiveBytes()
    with counter:
        student = torch.randn(1, 2, 60, 16, requires_grad=True)
        trd_loss(student, torch.randn(1, 2, 60, 16))[0].backward()
    assert _relation_bytes(work) == pytest.approx(counter.peak, rel=0.1)
    assert estimate(work, Placement()).parts["relation loss"] == _relation_bytes(work)


def test_the_cheapest_way_that_fits_is_recommended():
    work = workload(reference="adapter", latents_shape=(4, 4, 32, 32))
    peaks = {
        (mode, policy): estimate(work, Placement(step_mode=mode, checkpointing_policy=policy)).peak
        for mode, policy in [("concat", None), ("sequential", None), ("concat", "full"), ("sequential", "full")]
    }
    plenty = recommend(work, 2 * peaks["concat", None])
    assert (plenty.placement.step_mode, plenty.placement.checkpointing_policy) == ("concat", None)
    less = recommend(work, int(peaks["sequential", None] / HEADROOM) + 1)
    assert (less.placement.step_mode, less.placement.checkpointing_policy) == ("sequential", None)
    least = recommend(work, int(peaks["sequential", "full"] / HEADROOM) + 1)
    assert least.placement.step_mode == "sequential" and least.peak <= peaks["sequential", "full"]
    assert recommend(work, 1000) is None
    many = recommend(work, int(peaks["sequential", "full"] / HEADROOM / 1.3), num_gpus=8)
    assert many.placement.engine == "fsdp2" and many.peak <= peaks["sequential", "full"]
    # Fine-tuning has no step mode, and recomputes instead.
    tuned = recommend(replace(work, reference="none"), int(0.8 * peaks["concat", None]))
    assert tuned.placement.step_mode == "concat" and tuned.placement.checkpointing_policy is not None


@pytest.mark.parametrize(("kind", "bits"), [("nf4", 4.13), ("int8", 8.5), ("fp8", 8.5)])
def test_a_quantised_base_is_smaller_and_not_sharded(kind, bits):
    work = workload(reference="adapter", quantization=kind)
    whole, found = estimate(replace(work, quantization=None), Placement()), estimate(work, Placement())
    transformer = tiny_wan_pipeline().transformer
    numbers = sum(layer.weight.numel() for layer in transformer.blocks.modules() if type(layer) is torch.nn.Linear)
    saved = (whole.parts["weights"] - found.parts["weights"]) * 8 / numbers
    assert 16 - saved == pytest.approx(bits, rel=0.15)  # rows are short here, so that their scales take more
    assert found.parts["adapter"] == whole.parts["adapter"] and found.activations > whole.activations
    many = recommend(work, 2 * found.peak, num_gpus=8)
    assert many.placement.engine == "ddp" and recommend(work, found.parts["weights"], num_gpus=8) is None
    with pytest.raises(ValueError, match="`quantization='.*'` is for weights under an adapter"):
        estimate(replace(work, lora_rank=None), Placement())


@pytest.mark.slow
def test_fewer_bits_are_told_of_only_where_nothing_else_fits():
    config = configuration(tiny_wan_pipeline().transformer, num_layers=4, ffn_dim=16384)  # mostly weights
    work = workload(config=config, latents_shape=(4, 2, 4, 4), reference="adapter")
    slowest = Placement(step_mode="sequential", checkpointing_policy="offload", offload_weights=True)
    peaks = {kind: estimate(replace(work, quantization=kind), slowest).peak for kind in (None, "int8", "nf4")}
    cards = {kind: int(peak / HEADROOM) + 1 for kind, peak in peaks.items()}
    assert cards[None] > cards["int8"] > cards["nf4"]
    assert "quantization" not in describe_recommendation(work, cards[None], 1)
    for kind in ("int8", "nf4"):
        told = describe_recommendation(work, cards[kind], 1)
        assert "No configuration fits 1 GPU of " in told and f"Or use `quantization='{kind}'`" in told
        already = describe_recommendation(replace(work, quantization="int8"), cards["nf4"], 1)
        assert "No configuration fits" in already and "Or use" not in already


def test_cogvideox_is_estimated_too():
    config = configuration(tiny_cogvideox_pipeline().transformer)
    found = estimate(Workload(config, SHAPES["cogvideox"], 2, "adapter", lora_rank=4), Placement(2, "fsdp2"))
    text = describe_estimate(found)
    assert (
        "2 x fsdp2, step_mode=concat, activation checkpointing: full" in text
        and "sent, weights:" in text
        and "peak:" in text
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "fsdp"}, "`engine` must be one of ddp, zero1, zero2, zero3, zero3-offload, fsdp2, got 'fsdp'"),
        ({"num_gpus": 0}, "positive multiple of `context_parallel`, got 0 and 1"),
        ({"num_gpus": 8, "context_parallel": 3}, "got 8 and 3"),
    ],
)
def test_impossible_placements_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Placement(**changes)
    with pytest.raises(ValueError, match="`gpu_memory` must be a positive number of bytes, got 0"):
        recommend(workload(), 0)


def test_running_out_of_memory_comes_with_advice_and_goes_on(tmp_path, caplog):
    """A real error of torch, raised in the middle of a step, as an allocator would."""
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "max_steps": 2, "save_strategy": "no", "lora_rank": 4}
    args = video_trl.VideoDPOConfig(report_to="none", disable_tqdm=True, step_mode="concat", **settings)
    made = video_trl.VideoDPOTrainer(tiny_wan_pipeline(), args, tiny_encoded_group(2))

    def exhaust(module, arguments):
        raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")

    made.model.blocks[1].register_forward_pre_hook(exhaust)
    with pytest.raises(torch.OutOfMemoryError, match="tried to allocate"):
        made.train()
    (told,) = [record.message for record in caplog.records if "Memory ran out" in record.message]
    assert "one GPU, step_mode=concat, activation checkpointing: none" in told
    assert "step_mode=sequential" in told.partition("This should fit:")[2]


def test_a_trainer_describes_its_work(tmp_path):
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "per_device_train_batch_size": 2, "lora_rank": 8}
    args = video_trl.VideoGroupDPOConfig(
        loss_type="plackett_luce", physics_rewarding=False, step_mode="sequential", **settings
    )
    made = video_trl.VideoGroupDPOTrainer(tiny_wan_pipeline(), args, mixed_shapes())
    work = made.workload()
    assert (work.num_videos, work.reference, work.lora_rank, work.bf16) == (8, "adapter", 8, False)
    assert work.latents_shape == (4, 2, 4, 6)  # the larger of the two
    assert made.placement() == Placement(step_mode="sequential", checkpointing_policy=None)
    made.engine = "fsdp2"
    assert made.placement().engine == "fsdp2"
    full = video_trl.VideoSFTConfig(use_peft=False, activation_checkpointing=True, **settings)
    work = video_trl.VideoSFTTrainer(tiny_wan_pipeline(), full, tiny_encoded_video(2)).workload()
    assert (work.num_videos, work.reference, work.lora_rank) == (2, "none", None)


def test_a_trainer_with_a_teacher_describes_the_tokens_that_are_compared(tmp_path):
    made = repa_trainer(tmp_path)
    inputs = made.data_collator([made.train_dataset[0]])
    (plan,) = made.alignment._plans.values()
    teacher = plan.align_teacher(made.alignment.look(inputs).tokens)
    assert made.workload().alignment == tuple(teacher.shape[1:])
    assert "relation loss" in estimate(made.workload(), made.placement()).parts
    assert repa_trainer(tmp_path, alignment_loss="repa").workload().alignment is None


@pytest.mark.parametrize("pipeline", [tiny_wan_pipeline, tiny_cogvideox_pipeline])
def test_encoding_takes_what_is_counted(pipeline):
    made = pipeline()
    family = family_for(made.transformer, made.scheduler)
    counter = LiveBytes()
    for weight in made.vae.parameters():
        counter.add(weight)
    with counter, torch.no_grad():
        family.encode_video(made.vae, torch.rand(1, 3, 9, 64, 64))
    with torch.device("meta"):
        empty = type(made.vae).from_config(made.vae.config)
    assert encoding_peak(empty, family, (9, 64, 64)) == pytest.approx(counter.peak, rel=0.1)
