"""The labelled pool, and the rules that annotate it."""

import json

import datasets
import numpy as np
import pytest

from video_trl.data import VideoDecodeError, read_video
from video_trl.sandbox import simulate
from video_trl.sandbox.data.clip_pool import FAULT_SHARES, MOTION_SHARES, POOR_SHARES, _kinds, make_pool, pool_labels
from video_trl.sandbox.judge.annotator import annotate_clip
from video_trl.sandbox.world.prompts import MOTIONS, STILL_SCENES, parse_prompt


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool")
    return folder, datasets.load_from_disk(str(make_pool(folder, num_clips=60, seed=3))), pool_labels(folder)


def test_shares_are_as_declared():
    kinds = _kinds(20_000, seed=0)
    shares = {kind: kinds.count(kind) / len(kinds) for kind in {*MOTION_SHARES, *POOR_SHARES, *FAULT_SHARES}}
    rest = 1 - sum(POOR_SHARES.values()) - sum(FAULT_SHARES.values())
    assert sum(MOTION_SHARES.values()) == pytest.approx(1) and set(MOTION_SHARES) == set(MOTIONS)
    for kind, share in (POOR_SHARES | FAULT_SHARES | {k: rest * v for k, v in MOTION_SHARES.items()}).items():
        assert shares[kind] == pytest.approx(share, abs=0.01), kind
    assert set(_kinds(200, seed=1)[:1]) <= {*MOTION_SHARES, *POOR_SHARES, *FAULT_SHARES}


def test_rows_are_what_their_labels_say(pool):
    _, rows, labels = pool
    assert len(rows) == len(labels) == 60
    for row, label in zip(rows, labels, strict=True):
        assert label.rich == (label.kind in MOTIONS)
        if label.rich:
            assert parse_prompt(row["prompt"]).motion == label.kind and read_video(row["video"]).shape[0] == 13
        if label.kind == "false_caption":
            assert parse_prompt(row["prompt"]).motion in MOTIONS
        if label.kind in ("missing", "broken"):
            with pytest.raises(VideoDecodeError):
                read_video(row["video"])


def test_a_pool_is_drawn_once_and_another_one_is_not_taken_for_it(pool, tmp_path):
    folder, rows, _ = pool
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.mp4")}
    make_pool(folder, num_clips=60, seed=3)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*.mp4")}
    with pytest.raises(ValueError, match="holds another pool"):
        make_pool(folder, num_clips=61, seed=3)
    with pytest.raises(ValueError, match="`num_clips` >= 1"):
        make_pool(tmp_path, num_clips=0)
    with pytest.raises(ValueError, match="no whole pool"):
        pool_labels(tmp_path)


def test_a_pool_that_was_stopped_goes_on_with_the_same_bytes(pool, tmp_path):
    folder, rows, _ = pool
    make_pool(tmp_path, num_clips=60, seed=3)
    (tmp_path / "labels.json").unlink()
    victim = sorted((tmp_path / "videos").glob("*.mp4"))[0]
    victim.unlink()
    make_pool(tmp_path, num_clips=60, seed=3)
    assert victim.read_bytes() == (folder / "videos" / victim.name).read_bytes()
    assert json.loads((tmp_path / "labels.json").read_text()) == json.loads((folder / "labels.json").read_text())


@pytest.mark.parametrize("motion", [*MOTIONS, *STILL_SCENES])
def test_rules_tell_rich_clips_from_poor_ones(motion):
    clips = [simulate(50_000_000 + seed, motion=motion) for seed in range(12)]
    rich = [annotate_clip(clip.video, clip.prompt)["physics_richness"] >= 0.6 for clip in clips]
    assert sum(rich) >= 11 if motion in MOTIONS else not any(rich)


@pytest.mark.parametrize("motion", STILL_SCENES)
def test_rules_believe_pixels_not_captions(motion):
    for seed in range(12):
        clip = simulate(50_000_000 + seed, motion=motion)
        (colour,) = clip.spec.colours
        answer = annotate_clip(clip.video, f"A {colour} ball rolls to the right and slows down.")
        assert answer["physics_richness"] < 0.6 and answer["parse"]["actions"] == []
        assert "rolls" in answer["vision_check"]["removed"]


def test_rules_name_what_is_missing_and_what_was_not_said():
    clip = simulate(7, motion="rolling")
    (colour,) = clip.spec.colours
    other = "red" if colour != "red" else "green"
    check = annotate_clip(clip.video, f"A {other} ball rolls to the right.")["vision_check"]
    assert check == {"removed": [f"{other} body"], "added": [f"{colour} body"]}
    unknown = annotate_clip(clip.video, "Something happens.")
    assert unknown["physics_richness"] < 0.6 and unknown["vision_check"]["added"] == [f"{colour} body"]
    blank = annotate_clip(np.zeros((13, 64, 64, 3), np.uint8), clip.prompt)
    assert blank["physics_richness"] < 0.3 and blank["parse"]["entities"] == []
