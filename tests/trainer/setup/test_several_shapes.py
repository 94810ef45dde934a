"""Rows of several shapes in one run: batches of one shape, every row once, as exact as with one shape."""

import logging
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from datasets import concatenate_datasets
from diffusers import FlowMatchEulerDiscreteScheduler

from tests.support import rounding
from tests.support.tiny import tiny_encoded_group, tiny_group_dataset, tiny_mp4, tiny_wan_pipeline
from tests.support.trainer.runs import (
    SMOOTH_ADAM,
    RecordGradients,
    StopAfter,
    assert_equal_weights,
    config,
    double,
    losses,
    mixed_shapes,
    trained_weights,
    trainer,
)
from video_trl import VideoREPAConfig
from video_trl.models.wan import WanFamily
from video_trl.trainer.checkpoints.weights import check_description


def run(directory, resume=None, callbacks=(), rows=None, model=None, **changes):
    recorder = RecordGradients()
    made = trainer(
        config(directory, **({"max_grad_norm": 0.0, "max_steps": 8, "loss_type": "sum"} | changes)),
        model=model or tiny_wan_pipeline(),
        train_dataset=rows or mixed_shapes(),
        callbacks=[recorder, *callbacks],
    )
    made.train(resume_from_checkpoint=resume)
    return made, recorder.steps


def test_the_split_of_a_step_does_not_matter(tmp_path):
    """Eleven rows of two shapes, four a step: two full steps and two of three and two rows... whatever the split."""
    whole, gradients = run(tmp_path, model=double(tiny_wan_pipeline()), per_device_train_batch_size=4, **SMOOTH_ADAM)
    assert whole.state.epoch == 2.0  # four steps an epoch
    for batch, accumulation in ((2, 2), (1, 4)):
        division = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        split, split_gradients = run(tmp_path, model=double(tiny_wan_pipeline()), **division, **SMOOTH_ADAM)
        assert split.state.epoch == 2.0
        rounding.assert_close_weights(split_gradients[0], gradients[0], rounding.DOUBLE)
        assert losses(split) == pytest.approx(losses(whole), rel=1e-4)
        for entry, expected in zip(split.state.log_history[:8], whole.state.log_history[:8], strict=True):
            for metric in ("rewards/margins", "rewards/accuracies", "win_gap", "alpha"):
                assert entry[metric] == pytest.approx(expected[metric], rel=1e-3, abs=1e-4), metric


def test_each_step_is_the_mean_over_its_rows(tmp_path):
    """Against every row's own gradient, the weights held still."""
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "learning_rate": 0.0}
    made, gradients = run(tmp_path, model=double(tiny_wan_pipeline()), max_steps=4, **settings)
    sampler = made.get_train_dataloader().batch_sampler
    seen = sorted(row for rows in sampler.steps() for row in rows)
    assert seen == list(range(11)) and [len(rows) for rows in sampler.steps()].count(4) == 2
    made.model.train()
    for step, rows in enumerate(sampler.steps()):
        made.state.global_step = step
        made.model.zero_grad()
        for row in rows:
            made.compute_loss(made.model, made.data_collator([made.train_dataset[row]])).div(len(rows)).backward()
        expected = {name: w.grad for name, w in made.model.named_parameters() if w.grad is not None}
        rounding.assert_close_weights(gradients[step], expected, rounding.DOUBLE)


WORKERS = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}


@pytest.mark.parametrize("changes", [{}, pytest.param(WORKERS, marks=pytest.mark.slow)], ids=["none", "workers"])
def test_resuming_in_the_middle_of_an_epoch_is_bit_exact(tmp_path, changes):
    straight, _ = run(tmp_path)
    saving = {"save_strategy": "steps", "save_steps": 1}
    run(tmp_path / "run", callbacks=[StopAfter(6)], **saving, **changes)
    for step in (3, 6):
        resumed, _ = run(tmp_path / "resumed", str(tmp_path / "run" / f"checkpoint-{step}"), **changes)
        assert_equal_weights(trained_weights(resumed), trained_weights(straight))


def test_resuming_with_other_rows_per_step_warns(tmp_path, caplog):
    run(tmp_path, callbacks=[StopAfter(1)], save_strategy="steps", save_steps=1)
    checkpoint = tmp_path / "checkpoint-1"
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    for changes, warned in ((split, False), ({"per_device_train_batch_size": 3}, True)):
        caplog.clear()
        made = trainer(config(tmp_path / "other", **changes), train_dataset=mixed_shapes())
        check_description(checkpoint, made.checkpointer.description)
        assert ("rows_per_step: 2 / 3. The run goes on at the same step" in caplog.text) == warned


def test_evaluation_takes_several_shapes_and_counts_every_row_once(tmp_path):
    alone, together = (
        trainer(
            config(tmp_path, per_device_eval_batch_size=size),
            model=double(tiny_wan_pipeline()),
            eval_dataset=mixed_shapes(),
        ).evaluate()
        for size in (1, 4)
    )
    for metric in ("eval_loss", "eval_alpha", "eval_rewards/margins"):
        assert together[metric] == pytest.approx(alone[metric], rel=1e-4), metric
    made = trainer(config(tmp_path), eval_dataset={"a": mixed_shapes(), "b": tiny_encoded_group(3)})
    assert made.evaluate()["eval_a_loss"] == pytest.approx(alone["eval_loss"], rel=1e-4)


def test_shapes_with_fewer_rows_than_a_step_are_reported(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="video_trl"):
        trainer(config(tmp_path), train_dataset=mixed_shapes()).get_train_dataloader()
    assert "Rows: 11, of 2 shapes. Steps of an epoch: 5 of 2 rows, and 1 smaller. Every row counts" in caplog.text
    assert "fewer rows" not in caplog.text
    trainer(config(tmp_path, per_device_train_batch_size=6), train_dataset=mixed_shapes()).get_train_dataloader()
    assert "fewer rows than a step of 6 (rows by shape): {(4, 2, 4, 6): 5}" in caplog.text


def test_raw_videos_go_to_the_nearest_bucket_with_their_whole_row(tmp_path):
    """Two landscape rows, one with a rejected video in portrait, and a portrait row; no size is that of a bucket."""
    wide, tall = {"height": 40, "width": 72}, {"height": 72, "width": 40}
    rows = [*tiny_group_dataset(2, 2, **wide), *tiny_group_dataset(1, 2, seed=50, **tall)]
    rows[1]["rejected"][1] = {"path": None, "bytes": tiny_mp4(99, **tall)}
    args = config(
        tmp_path,
        cache_dir=str(tmp_path / "cache"),
        resolution_buckets=["32x64", "64x32"],
        max_steps=2,
        physics_rewarding=False,
    )
    made = trainer(args, train_dataset=rows)
    assert made.train_dataset.shapes == [(4, 2, 4, 8), (4, 2, 4, 8), (4, 2, 8, 4)]
    for number, shape in enumerate(made.train_dataset.shapes):
        assert made.train_dataset[number]["rejected_latents"].shape == (2, *shape)
    made.train()
    assert made.sampler.call_kwargs["height"] == 32 and made.sampler.call_kwargs["width"] == 64
    again = trainer(args, train_dataset=rows)
    assert again.train_dataset.rows.fingerprint == made.train_dataset.rows.fingerprint
    args.resolution_buckets = ["32x64", "48x32"]
    other = trainer(args, train_dataset=rows)
    assert other.train_dataset.shapes[2] == (4, 2, 6, 4)
    assert torch.equal(other.train_dataset[0]["chosen_latents"], made.train_dataset[0]["chosen_latents"])


def test_a_video_that_would_lose_too_much_is_a_bad_one(tmp_path):
    rows = [*tiny_group_dataset(1, 1), *tiny_group_dataset(1, 1, seed=9, height=16, width=64)]
    settings = {"cache_dir": str(tmp_path), "resolution_buckets": ["32x32"], "physics_rewarding": False}
    with pytest.raises(ValueError, match=r"row 1, chosen .*16x64 .* lose more than 30% .* buckets 32x32.*max_crop"):
        trainer(config(tmp_path, **settings), train_dataset=rows)
    made = trainer(config(tmp_path, on_bad_video="skip", **settings), train_dataset=rows)
    assert len(made.train_dataset) == 1 and [skip.row for skip in made.train_dataset.rows.skipped] == [1]
    allowed = trainer(config(tmp_path, resolution_max_crop=0.8, **settings), train_dataset=rows)
    assert len(allowed.train_dataset) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution_buckets": ["32x32"], "height": 32, "width": 32}, "exclude each other"),
        ({"resolution_buckets": ["32*32"]}, "Expected a size '<height>x<width>'"),
        ({"resolution_max_crop": 1.5}, r"must be in \[0, 1\], got 1.5"),
        ({"train_sampling_strategy": "sequential"}, "not supported: the rows of a step are of one shape"),
        ({"dataloader_drop_last": True}, "every row counts exactly once"),
        ({"accelerator_config": {"split_batches": True}}, "`split_batches=True` in `accelerator_config`"),
    ],
)
def test_settings_that_cannot_be_kept_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


def test_a_teacher_refuses_buckets_that_it_would_not_see(tmp_path):
    with pytest.raises(ValueError, match="the teacher would not see the same crop"):
        VideoREPAConfig(output_dir=str(tmp_path), use_cpu=True, resolution_buckets=["32x32"])


def test_a_bucket_that_the_vae_cannot_encode_is_refused_before_a_video_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "video_trl.data.encoding.encode.take_inventory", lambda *args, **options: pytest.fail("read the videos")
    )
    with pytest.raises(ValueError, match="must be divisible by 8.*got 36x32"):
        made = config(tmp_path, resolution_buckets=["32x32", "36x32"])
        trainer(made, train_dataset=tiny_group_dataset(1, 1))


def test_sizes_that_would_have_several_shifts_are_refused_before_a_video_is_encoded(tmp_path, monkeypatch):
    monkeypatch.setattr(WanFamily, "encode_video", lambda *args, **options: pytest.fail("encoded a video"))
    pipeline = tiny_wan_pipeline()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    groups = [tiny_group_dataset(1, 1, height=32, width=width) for width in (32, 48)]
    args = config(tmp_path, timestep_sampling="shifted")
    with pytest.raises(ValueError, match=r"the videos have \[\d+, \d+\].*several shifts. Set `timestep_shift`"):
        trainer(args, model=pipeline, train_dataset=concatenate_datasets(groups))


def truncated_mp4(path: Path) -> Path:
    """A real file whose index, at its beginning, promises more frames than the data that is left."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3), dtype=np.uint8)
    with av.open(path, "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=8, options={"threads": "1"})
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        for frame in noise:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    return path


def test_a_truncated_video_stops_the_trainer_or_its_row_is_skipped(tmp_path, caplog):
    rows = [*tiny_group_dataset(3, 2)]
    rows[1]["rejected"][1] = str(truncated_mp4(tmp_path / "clip.mp4"))
    settings = {"cache_dir": str(tmp_path), "num_frames": 5, "max_steps": 2}
    with pytest.raises(ValueError, match=r"row 1, rejected\[1\] \(.*clip.mp4\).*on_bad_video='skip'"):
        trainer(config(tmp_path, **settings), train_dataset=rows)
    made = trainer(config(tmp_path, on_bad_video="skip", **settings), train_dataset=rows)
    made.train()
    assert len(made.train_dataset) == 2 and len(losses(made)) == 2
    assert [(skip.row, "clip.mp4" in skip.video) for skip in made.train_dataset.rows.skipped] == [(1, True)]
    assert "Left out 1 of 3 rows with unreadable videos: row 1, rejected[1] (" in caplog.text
