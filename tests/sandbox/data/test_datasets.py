"""The sandbox's datasets, prompts and videos, on the shipped pipeline with few steps."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from video_trl.data import check_columns, read_video
from video_trl.sandbox import build_clip_dataset, build_group_dataset, load_sandbox, simulate
from video_trl.sandbox.data.datasets import REQUEST_NAME
from video_trl.sandbox.data.generate import generate
from video_trl.sandbox.data.prompts import balanced_prompts
from video_trl.sandbox.world.prompts import BASE_MOTIONS, all_prompts, parse_prompt


@pytest.fixture(scope="module")
def sandbox():
    loaded = load_sandbox()
    return replace(loaded, call_kwargs={**loaded.call_kwargs, "num_inference_steps": 2})


@pytest.fixture(scope="module")
def groups(sandbox, tmp_path_factory):
    folder = tmp_path_factory.mktemp("groups") / "dataset"
    return folder, build_group_dataset(sandbox, folder, num_groups=3, num_rejected=2, seed=5)


def test_groups_are_real_clips_against_judged_generated_ones(sandbox, groups):
    _, dataset = groups
    check_columns(dataset, "group", physics_rewarding=True)
    for row in dataset:
        chosen = read_video(row["chosen"])
        assert chosen.shape == (13, 64, 64, 3)
        assert sandbox.judge.score([chosen], [row["prompt"]])[0]["pc"] > 0.8
        assert row["prompt"] in all_prompts("train")
        assert len(row["rejected"]) == len(row["rejected_scores"]) == len(set(row["seeds"])) == 2
        for video, score in zip(row["rejected"], row["rejected_scores"], strict=True):
            judged = sandbox.judge.score([read_video(video)], [row["prompt"]])[0]
            assert judged["pc"] == pytest.approx(score["pc"], abs=0.15)  # the mp4 is lossy


def test_rejected_videos_come_back_from_their_recorded_seeds(sandbox, groups):
    row = groups[1][1]
    call_kwargs = {**sandbox.call_kwargs, "guidance_scale": 1.0}
    videos = generate(sandbox.pipeline, [row["prompt"]] * 2, row["seeds"], call_kwargs)
    for video, cell in zip(videos, row["rejected"], strict=True):
        assert np.abs(video.astype(int) - read_video(cell)).mean() < 3


def test_the_same_request_is_loaded_and_another_one_built_again(sandbox, groups):
    folder, dataset = groups
    stamp = (folder / REQUEST_NAME).stat().st_mtime_ns
    again = build_group_dataset(sandbox, folder, num_groups=3, num_rejected=2, seed=5)
    assert (folder / REQUEST_NAME).stat().st_mtime_ns == stamp
    assert again[0]["prompt"] == dataset[0]["prompt"]
    other = build_group_dataset(sandbox, folder.with_name("other"), num_groups=3, num_rejected=2, seed=6)
    assert other["prompt"] != dataset["prompt"]


def test_other_weights_of_the_base_model_make_another_dataset(sandbox, tmp_path):
    folder = tmp_path / "dataset"
    first = build_group_dataset(sandbox, folder, num_groups=1, num_rejected=1)
    retrained = load_sandbox()
    with torch.no_grad():
        retrained.pipeline.transformer.proj_out.bias.add_(0.5)
    other = replace(sandbox, pipeline=retrained.pipeline)
    second = build_group_dataset(other, folder, num_groups=1, num_rejected=1)
    assert np.abs(read_video(first[0]["rejected"][0]).astype(int) - read_video(second[0]["rejected"][0])).mean() > 3


def test_chosen_clips_in_the_wild_are_another_dataset(sandbox, tmp_path):
    plain, wild = (
        build_group_dataset(sandbox, tmp_path / name, num_groups=1, num_rejected=1, rendering=name)
        for name in ("plain", "wild")
    )
    assert plain[0]["prompt"] == wild[0]["prompt"]
    real = [read_video(rows[0]["chosen"]).astype(int) for rows in (plain, wild)]
    assert np.abs(real[0] - real[1]).mean() > 5
    assert sandbox.judge.score([real[1].astype(np.uint8)], [wild[0]["prompt"]])[0]["pc"] > 0.8


def test_a_folder_with_other_files_is_left_alone(sandbox, tmp_path):
    (tmp_path / "thesis.txt").write_text("all I have")
    with pytest.raises(ValueError, match="holds files that are not a sandbox dataset"):
        build_group_dataset(sandbox, tmp_path, num_groups=1)
    assert (tmp_path / "thesis.txt").read_text() == "all I have"


@pytest.mark.parametrize("arguments", [{"num_groups": 0}, {"num_rejected": 0}])
def test_empty_datasets_are_refused(sandbox, tmp_path, arguments):
    with pytest.raises(ValueError, match=re.escape("Expected num_groups >= 1 and num_rejected >= 1")):
        build_group_dataset(sandbox, tmp_path, **arguments)


def test_prompts_are_balanced_distinct_and_reproducible():
    prompts = balanced_prompts("heldout", 15)
    assert len(set(prompts)) == 15 and set(prompts) <= set(all_prompts("heldout"))
    motions = [parse_prompt(prompt).motion for prompt in prompts]
    assert {motion: motions.count(motion) for motion in BASE_MOTIONS} == dict.fromkeys(BASE_MOTIONS, 3)
    assert prompts == balanced_prompts("heldout", 15) != balanced_prompts("heldout", 15, seed=1)
    with pytest.raises(ValueError, match="Expected between 1 and"):
        balanced_prompts("heldout", 10_000)


def test_generation_does_not_depend_on_the_batch_size(sandbox):
    prompts = balanced_prompts("train", 3)
    one, many = (
        generate(sandbox.pipeline, prompts, [1, 2, 3], dict(sandbox.call_kwargs), batch_size=size) for size in (1, 3)
    )
    assert np.abs(one.astype(int) - many).max() <= 1


def test_clips_are_simulated_ones_with_their_sentences(tmp_path):
    rows = build_clip_dataset(tmp_path / "clips", num_clips=2)
    assert rows.column_names == ["prompt", "video"] and len(rows) == 2
    for number, row in enumerate(rows):
        clip = simulate(20_000_000 + number, motion=BASE_MOTIONS[number])
        assert row["prompt"] == clip.prompt
        video = read_video(row["video"])
        assert video.shape == clip.video.shape and abs(video.astype(int) - clip.video).mean() < 3
    with pytest.raises(ValueError, match="num_clips >= 1, got 0"):
        build_clip_dataset(tmp_path, num_clips=0)
