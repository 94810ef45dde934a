"""What cannot be divided among processes, or is not installed, is refused, before a model is loaded where possible."""

import importlib.util

import pytest
import torch

from tests.support.distributed.cpu_engines import reset, zero
from tests.support.tiny import tiny_encoded_group, tiny_group_dataset, tiny_transformer, tiny_wan_pipeline
from tests.support.trainer.runs import config, trainer
from video_trl import VideoDPOConfig, VideoDPOTrainer, VideoGroupDPOTrainer, VideoREPAConfig, VideoREPATrainer
from video_trl.models import family_for
from video_trl.trainer import LogVideosCallback
from video_trl.trainer.parallel.engines import requested_engine
from video_trl.trainer.parallel.mesh import check_context_parallelism
from video_trl.trainer.setup.arguments import check_arguments, check_generation


class Loads:
    """Fails whatever tries to load it."""


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"context_parallel_size": 2}, "groups of 2 .*context_parallel_size=2"),
        ({"group_parallel_size": 4}, "groups of 4 .*group_parallel_size=4"),
        ({"context_parallel_size": 2, "group_parallel_size": 4}, "groups of 8"),
    ],
)
def test_the_number_of_processes_must_be_a_multiple(tmp_path, sizes, named):
    with pytest.raises(ValueError, match=named):
        trainer(config(tmp_path, **sizes), model=Loads())


@pytest.mark.parametrize("name", ["context_parallel_size", "group_parallel_size"])
def test_sizes_must_be_positive(tmp_path, name):
    with pytest.raises(ValueError, match=f"`{name}` must be positive"):
        config(tmp_path, **{name: 0})


def test_heads_that_cannot_be_divided_come_with_what_can(tmp_path):
    transformer = tiny_transformer(num_attention_heads=6, attention_head_dim=12)
    family = family_for(transformer)
    shapes = [(4, 3, 8, 8), (4, 1, 10, 10)]  # 48 tokens, and 25 tokens
    for size in (1, 2, 3, 6):
        check_context_parallelism(transformer, family, shapes, config(tmp_path, context_parallel_size=size))
    with pytest.raises(ValueError, match=r"size=4` must divide the 6 attention heads .*\[1, 2, 3, 6\] do"):
        check_context_parallelism(transformer, family, shapes, config(tmp_path, context_parallel_size=4))


@pytest.mark.parametrize("rows", [tiny_encoded_group, tiny_group_dataset])
def test_videos_of_a_row_that_cannot_be_divided_are_refused_before_they_are_encoded(tmp_path, rows):
    args = config(tmp_path, loss_type="plackett_luce", group_parallel_size=2)
    VideoGroupDPOTrainer.check_rows(rows(2, 1), args)
    with pytest.raises(ValueError, match=r"must divide the 3 videos .* \[1, 3\]"):
        VideoGroupDPOTrainer.check_rows(rows(2, 2), args)


def test_heads_are_counted_before_videos_are_encoded(tmp_path, monkeypatch):
    args = VideoDPOConfig(str(tmp_path), use_cpu=True, context_parallel_size=3, cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr(VideoDPOConfig, "world_size", 3)
    with pytest.raises(ValueError, match="size=3` must divide the 2 attention heads"):
        VideoDPOTrainer(tiny_wan_pipeline(), args, tiny_group_dataset(1, 1))
    assert not (tmp_path / "cache").exists()


def test_relation_distillation_sees_all_tokens_or_none(tmp_path, monkeypatch):
    args = VideoREPAConfig(output_dir=str(tmp_path), use_cpu=True, context_parallel_size=2)
    monkeypatch.setattr(VideoREPAConfig, "world_size", 2)
    with pytest.raises(ValueError, match="context_parallel_size=2.*not supported by VideoREPATrainer"):
        check_arguments(VideoREPATrainer, "sandbox", args, [{}], None, None, None, (None, None))


def test_deepspeed_that_is_not_installed(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "deepspeed" else find(name))
    with pytest.raises(ValueError, match=r"not installed. Run: pip install 'video-trl\[deepspeed\]'"):
        config(tmp_path, deepspeed={"zero_optimization": {"stage": 3}})
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="not installed"):
        config(tmp_path)


@pytest.mark.parametrize(
    ("fsdp_config", "named"),
    [
        ({"version": 1}, "second version"),
        ({"version": 2, "cpu_ram_efficient_loading": True}, "`cpu_ram_efficient_loading` is not supported"),
        ({"version": 2, "activation_checkpointing": True}, "`activation_checkpointing` is not supported"),
    ],
)
def test_kinds_of_fsdp_that_do_not_work(tmp_path, monkeypatch, fsdp_config, named):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "")  # put back what the arguments write into it
    args = config(tmp_path, fsdp=True, fsdp_config=fsdp_config)
    with pytest.raises(ValueError, match=named):
        requested_engine(args)


def test_quantised_weights_are_not_sharded(tmp_path, monkeypatch):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "")
    args = config(tmp_path, fsdp=True, fsdp_config={"version": 2})
    args.quantization = "int8"
    with pytest.raises(ValueError, match="quantization='int8'.*engine 'fsdp2'"):
        check_arguments(VideoGroupDPOTrainer, "sandbox", args, [{}], None, None, None, (None, None))


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs video-trl[deepspeed]")
@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"compile_blocks": True}, "`compile_blocks` .*'zero3'.* inside of the blocks.*FSDP2"),
        (
            {"activation_checkpointing": True, "checkpointing_policy": "attention"},
            "`checkpointing_policy='attention'` .*'zero3'.*Use 'full' or 'offload', or shard",
        ),
    ],
)
def test_what_deepspeed_cannot_do_with_weights_fetched_layer_by_layer(tmp_path, asked, named):
    try:
        with pytest.raises(ValueError, match=named):
            trainer(config(tmp_path, **zero(3), **asked), model=Loads())
        off = {"compile_blocks": False, "activation_checkpointing": False}
        for allowed in (zero(2) | asked, zero(3) | asked | off):
            args = config(tmp_path, **allowed)
            check_arguments(VideoGroupDPOTrainer, "sandbox", args, [{}], None, None, None, (None, None))
    finally:
        reset()


def test_deepspeed_takes_no_optimizer_object(tmp_path, monkeypatch):
    """transformers would drop it without a word and make the one that `optim` names."""
    monkeypatch.setattr("video_trl.trainer.setup.arguments.requested_engine", lambda args: "zero2")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    for pair in ((optimizer, None), (None, schedule)):
        with pytest.raises(ValueError, match="`optimizers` has no effect with the engine 'zero2'.*by `optim`"):
            check_arguments(VideoGroupDPOTrainer, "sandbox", config(tmp_path), [{}], None, None, None, pair)


def test_videos_are_not_generated_by_one_of_several_sharded_processes(tmp_path):
    callback, args = LogVideosCallback(["a red ball"]), config(tmp_path)
    check_generation("ddp", args, None, [callback])
    check_generation("zero2", args, lambda *_: {}, [])
    with pytest.raises(ValueError, match="LogVideosCallback .* engine 'fsdp2'"):
        check_generation("fsdp2", args, None, [callback])
    with pytest.raises(ValueError, match="context_parallel_size"):
        check_generation("ddp", config(tmp_path, context_parallel_size=2), None, [callback])


def test_one_video_at_a_time_needs_batches_of_one_row_where_passes_are_joint(tmp_path, monkeypatch):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "")
    rows = {"step_mode": "sequential", "per_device_train_batch_size": 2, "per_device_eval_batch_size": 1}

    def check(**changes):
        args = config(tmp_path, **(rows | changes))
        return check_arguments(VideoGroupDPOTrainer, "sandbox", args, [{}], None, None, None, (None, None))

    fsdp = {"fsdp": True, "fsdp_config": {"version": 2}}
    for passing in ({}, fsdp | {"step_mode": "auto"}, fsdp | {"per_device_train_batch_size": 1}):
        check(**passing)
    with pytest.raises(ValueError, match="under the engine 'fsdp2' needs batches of one row, got 2"):
        check(**fsdp)
