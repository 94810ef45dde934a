"""Every row of encoded data is looked at before the first step, once for each dataset."""

import logging
import math

import datasets
import pytest
import torch

from tests.support.tiny import (
    LATENTS_SHAPE,
    MAX_SEQUENCE_LENGTH,
    tiny_encoded_group,
    tiny_encoded_video,
    tiny_group_dataset,
    tiny_latents_shape,
    tiny_pipeline,
    tiny_transformer,
    tiny_wan_pipeline,
)
from tests.support.trainer.heads import head_config
from tests.support.trainer.runs import config, trainer
from video_trl import VideoDPOConfig, VideoDPOTrainer, VideoSFTTrainer
from video_trl.data import check_columns, encode_dataset
from video_trl.data.encoding.store import EncodedDataset
from video_trl.models import WanFamily, family_of
from video_trl.trainer.setup.encoded_rows import check_encoded_rows
from video_trl.trainer.setup.scored_rows import check_rejected_scores


def spoiled(rows, column, change, number=4):
    """The rows, of which one has another value in a column; a column that becomes None is gone."""
    rows = [dict(row) for row in rows]
    value = rows[number][column]
    rows[number][column] = change(value.clone() if isinstance(value, torch.Tensor) else value)
    return rows


def with_number(value):
    def change(tensor):
        tensor.view(-1)[-1] = value
        return tensor

    return change


def as_table(rows):
    plain = [{k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in row.items()} for row in rows]
    return datasets.Dataset.from_list(plain)


@pytest.mark.parametrize("wrap", [list, as_table])
@pytest.mark.parametrize(
    ("column", "change", "message"),
    [
        ("chosen_latents", with_number(math.nan), "Row 4: column 'chosen_latents' holds numbers that are not finite"),
        ("rejected_latents", with_number(math.inf), "Row 4: column 'rejected_latents' holds numbers that are not"),
        ("prompt_embeds", with_number(-math.inf), "Row 4: column 'prompt_embeds' holds numbers"),
        ("prompt_embeds", lambda t: t[:, :8], r"Row 4: expected 'prompt_embeds' of shape \('...', 16\) for this"),
        ("prompt_embeds", lambda t: t[0], r"Row 4: .*prompt"),
        ("prompt_embeds", lambda t: t.repeat(200, 1), "Row 4: prompt embeddings of .* tokens, expected at most 16"),
        ("chosen_latents", lambda t: t[:3], "Row 4: expected latents of one shape"),
        ("rejected_latents", lambda t: t[:, :, :1], "Row 4: expected latents of one shape"),
        ("rejected_latents", lambda t: t[:2], "Row 4: expected 3 rejected videos as in row 0, got 2"),
        ("rejected_latents", lambda t: t[0], "Row 4: expected"),
        ("chosen_latents", lambda t: None, "Row 4: expected .* got none"),
    ],
    ids=lambda value: "change" if callable(value) else str(value)[:30],
)
def test_a_bad_row_is_named_before_the_first_step(tmp_path, wrap, column, change, message):
    rows = spoiled(tiny_encoded_group(6), column, change)
    if wrap is as_table and rows[4][column] is not None and rows[4][column].ndim != rows[0][column].ndim:
        pytest.skip("a table does not take it")
    rows = wrap(rows)
    with pytest.raises(ValueError, match=message):
        trainer(config(tmp_path, cache_dir=str(tmp_path / "cache"), physics_rewarding=False), train_dataset=rows)


@pytest.mark.parametrize("wrap", [list, as_table])
@pytest.mark.parametrize(
    ("rate", "message"),
    [
        (None, "Row 1: .*column 'frame_rate'.*(got none|not finite)"),  # a table shows what is missing as NaN
        (math.nan, "Row 1: column 'frame_rate' holds numbers that are not finite"),
        (0.0, "Row 1: expected a positive number in column 'frame_rate', got 0.0"),
        (-8.0, "Row 1: expected a positive number"),
    ],
)
def test_frame_rates_are_checked_where_a_transformer_is_told_them(tmp_path, wrap, rate, message):
    rows = wrap(spoiled(tiny_encoded_video(2, family="ltx-t2v"), "frame_rate", lambda _: rate, number=1))
    pipeline = tiny_pipeline("ltx-t2v")
    with pytest.raises(ValueError, match=message):
        VideoSFTTrainer(pipeline, head_config(tmp_path, cache_dir=str(tmp_path / "cache")), rows)


def test_videos_of_another_size_than_the_transformer_takes_are_named(tmp_path):
    rows = spoiled(tiny_encoded_video(6), "latents", lambda latents: latents[:, :, :3])
    with pytest.raises(ValueError, match=r"Row 4: Latent frames, height and width must be divisible by the patch"):
        VideoSFTTrainer(tiny_wan_pipeline(), head_config(tmp_path), rows)


@pytest.mark.parametrize("family", ["wan-i2v", "cogvideox-i2v"])
def test_conditions_of_first_frames_are_looked_at_too(tmp_path, family):
    rows = tiny_encoded_video(6, family=family)

    def make(rows):
        return VideoSFTTrainer(tiny_pipeline(family), head_config(tmp_path), rows)

    make(rows)
    with pytest.raises(ValueError, match="Row 4: column 'first_frame_latents' holds numbers that are not finite"):
        make(spoiled(rows, "first_frame_latents", with_number(math.nan)))
    with pytest.raises(ValueError, match="Row 4: expected 'first_frame_latents' of shape"):
        make(spoiled(rows, "first_frame_latents", lambda latents: latents[..., :2]))
    if family == "wan-i2v":
        with pytest.raises(ValueError, match=r"Row 4: expected 'image_embeds' of shape \(5, 16\) as in rows with the"):
            make(spoiled(rows, "image_embeds", lambda embeds: embeds[:3]))


def test_a_row_without_scores_stops_only_those_who_use_them(tmp_path):
    rows = spoiled(tiny_encoded_group(6), "rejected_scores", lambda scores: None)
    args = {
        "output_dir": str(tmp_path / "dpo"),
        "save_strategy": "no",
        "use_cpu": True,
        "max_steps": 1,
        "per_device_train_batch_size": 6,
    }
    VideoDPOTrainer(tiny_wan_pipeline(), VideoDPOConfig(**args), rows).train()
    trainer(config(tmp_path, physics_rewarding=False, per_device_train_batch_size=6, max_steps=1)).train()
    with pytest.raises(ValueError, match="Row 4: expected scores of 3 rejected videos, got none"):
        trainer(config(tmp_path), train_dataset=rows)


def test_a_rejected_video_that_is_the_chosen_one_is_told(tmp_path, caplog):
    rows = tiny_encoded_group(6)
    rows[2]["rejected_latents"][1] = rows[2]["chosen_latents"]
    with caplog.at_level(logging.WARNING):
        trainer(config(tmp_path), train_dataset=rows)
    assert "In 1 rows a rejected video is the chosen one (the first is row 2)" in caplog.text


def encoded(directory, raw):
    return encode_dataset(
        raw, tiny_wan_pipeline(), WanFamily(), "group", cache_dir=directory, max_sequence_length=MAX_SEQUENCE_LENGTH
    )


def test_what_the_index_holds_is_not_read_again(tmp_path, monkeypatch, caplog):
    raw = tiny_group_dataset(3, 2)
    twin = {**raw[0], "rejected": [raw[0]["rejected"][0], raw[0]["chosen"]]}
    made = encoded(tmp_path, [*raw, twin, raw[0]])
    tensor, read = EncodedDataset._tensor, []

    def noting(dataset, number):
        read.append(dataset.index.tensor(number)[0])
        return tensor(dataset, number)

    monkeypatch.setattr(EncodedDataset, "_tensor", noting)
    with caplog.at_level(logging.WARNING):
        check_columns(made, "group", physics_rewarding=True)
        check_rejected_scores(made, below=1.1)
        shapes = check_encoded_rows(
            made, "group", tiny_transformer(), WanFamily(), max_sequence_length=MAX_SEQUENCE_LENGTH, cache_dir=tmp_path
        )
    assert shapes == [LATENTS_SHAPE] * 5
    assert shapes[0] is shapes[4]  # one object for all rows of a form, were they a million
    videos = {key for key in read if key.startswith("videos/")}
    assert len(videos) <= 3  # of the first row, whose columns are listed
    assert "the first is row 3" in caplog.text


def test_a_table_is_read_once(tmp_path, monkeypatch):
    args = config(tmp_path / "run", cache_dir=str(tmp_path / "cache"))
    reads = []
    rows = as_table(tiny_encoded_group(3))
    shapes = trainer(args, train_dataset=rows).train_dataset.shapes
    monkeypatch.setattr("video_trl.trainer.setup.encoded_rows._read_all", lambda *given: reads.append(given))
    assert trainer(args, train_dataset=rows).train_dataset.shapes == shapes
    assert not reads and len(list((tmp_path / "cache" / "checked").iterdir())) == 1


def test_a_prompt_that_cannot_be_padded_is_named_before_the_first_step(tmp_path):
    """CogVideoX attends to the padding that its text encoder has seen: nothing can be put behind an embedding."""
    pipeline = tiny_pipeline("cogvideox-t2v")
    rows = tiny_encoded_video(3, family="cogvideox-t2v", latents_shape=tiny_latents_shape("cogvideox-t2v"))
    rows[1]["prompt_embeds"] = rows[1]["prompt_embeds"][:-1]
    arguments = {"max_sequence_length": MAX_SEQUENCE_LENGTH, "cache_dir": tmp_path}
    with pytest.raises(ValueError, match=r"Row 1: Embedding 0 must have shape .*got \(15, 16\)"):
        check_encoded_rows(rows, "video", pipeline.transformer, family_of(pipeline), **arguments)


@pytest.mark.parametrize(
    "sizes", [{"num_frames": 5, "height": 24, "width": 32}, {}], ids=["configured", "of the files"]
)
def test_videos_that_do_not_fit_the_transformer_are_refused_before_they_are_encoded(tmp_path, sizes):
    """The VAE takes them: 24 pixels are 3 of a latent, which the transformer cannot cut into patches of 2."""
    pipeline = tiny_wan_pipeline()
    pipeline.vae.encode = None  # it is not asked
    rows = tiny_group_dataset(2, 1, height=24)
    args = VideoDPOConfig(str(tmp_path), use_cpu=True, cache_dir=str(tmp_path / "cache"), report_to="none", **sizes)
    with pytest.raises(ValueError, match=r"Videos of 5 frames of 24x32 .*: Latent frames, height and width must be"):
        VideoDPOTrainer(pipeline, args, rows)
    assert not list((tmp_path / "cache").glob("*/*"))
