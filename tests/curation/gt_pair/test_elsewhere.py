"""Rejected videos that were made elsewhere, clips that are held out, and pairs for people to mark."""

import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.curation.clips import SMALL, moving_video, write_clip
from tests.support.judges.server import Step, serving
from video_trl.curation import GTPairConfig, run_gt_pair
from video_trl.curation.annotated import pairs_to_mark
from video_trl.curation.engine.manifest import Shard, new_manifest
from video_trl.curation.gt_pair.elsewhere import find_videos, jobs_elsewhere
from video_trl.curation.gt_pair.pipeline import _shared_names, write_captions
from video_trl.data import check_columns, probe_video, write_video
from video_trl.evaluation.runs.prompts import load_prompts


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Four clips; one generator's folder has a video of each, another's table of two, of which one is too short."""
    root = tmp_path_factory.mktemp("elsewhere")
    for seed in range(4):
        write_clip(root / "clips" / f"clip{seed}.mp4", seed=seed, prompt=f"a red ball falls {seed}")
        write_video(root / "kling" / f"clip{seed}.mp4", moving_video(10 + seed, height=128, width=96), 16.0)
    write_video(root / "other" / "a.mp4", moving_video(20), 16.0)
    write_video(root / "other" / "b.mp4", moving_video(21)[:5], 16.0)
    write_video(root / "other" / "c.mp4", moving_video(22)[:, ::2, ::2], 16.0)
    table = "source,video\nclips/clip0.mp4,a.mp4\nclip1,b.mp4\nclip2,c.mp4\n"
    (root / "other" / "table.csv").write_text(table)
    return root


def config(world, output_dir, **changes):
    values = SMALL | {
        "sources": [str(world / "clips")],
        "output_dir": str(output_dir),
        "models": [],
        "made_elsewhere": {"kling-2.1": str(world / "kling"), "other": str(world / "other" / "table.csv")},
        "row_type": "preference",
    }
    return GTPairConfig(**(values | changes))


@pytest.fixture(scope="module")
def done(world, tmp_path_factory):
    root = tmp_path_factory.mktemp("done")
    return root, run_gt_pair(config(world, root))


def test_videos_of_every_generator_become_pairs_in_the_format_of_the_clip(done):
    _, result = done
    check_columns(result.pairs, "preference")
    assert sorted(result.pairs["generator"][:]) == ["kling-2.1"] * 4 + ["other"]
    for row in result.pairs:
        assert probe_video(row["chosen"]) == probe_video(row["rejected"])
        assert row["seeds"] == [] and row["rejected_generation"]["model"] == row["generator"]
        assert json.loads(row["rejected_generation"]["settings"])["made"].endswith(".mp4")
    dropped = {row["dropped_by"]: row for row in result.generations.to_pylist() if row["dropped_by"] is not None}
    assert sorted(dropped) == ["too_short", "too_small"] and {row["model"] for row in dropped.values()} == {"other"}
    assert "pairs have 13" in dropped["too_short"]["detail"]
    assert "it would differ by its blur" in dropped["too_small"]["detail"]


def test_groups_want_a_video_of_every_generator(world, tmp_path):
    result = run_gt_pair(config(world, tmp_path, row_type="group"))
    assert len(result.pairs) == 1 and len(result.pairs[0]["rejected"]) == 2
    details = [row["detail"] for row in result.manifest.to_pylist() if row["dropped_by"] == "generation"]
    assert sorted(detail.partition(":")[0] for detail in details) == ["1 of 2 videos", "too_short", "too_small"]


def test_clips_are_held_out_with_what_an_evaluation_needs(world, tmp_path):
    result = run_gt_pair(config(world, tmp_path, num_held_out=2))
    held_out = [row for row in result.manifest.to_pylist() if row["dropped_by"] == "held_out"]
    assert len(held_out) == 2 and result.summary.startswith("4 clips in = 2 kept + 2 held_out")
    prompts = load_prompts(tmp_path / "held_out" / "prompts.jsonl")
    assert sorted(prompt.text for prompt in prompts) == sorted(row["prompt"] for row in held_out)
    assert all(prompt.image.endswith(".png") for prompt in prompts)
    clips = pq.read_table(tmp_path / "held_out" / "clips.parquet").to_pylist()
    assert {probe_video(row["video"]).num_frames for row in clips} == {13}
    assert not {row["prompt"] for row in held_out} & set(result.pairs["prompt"][:])
    assert datasets.load_dataset(str(tmp_path / "pairs"), split="train").num_rows == len(result.pairs)
    everything = run_gt_pair(config(world, tmp_path))  # all are trained on now: no prompts of an evaluation stay
    assert {row["prompt"] for row in held_out} < set(everything.pairs["prompt"][:])
    assert not list((tmp_path / "held_out").iterdir())
    with pytest.raises(ValueError, match="leaves none to train on"):
        run_gt_pair(config(world, tmp_path / "all", num_held_out=4))


def test_clips_without_a_caption_get_one_from_the_server_that_is_named(world, tmp_path):
    write_clip(tmp_path / "clips" / "clip0.mp4", moving_video(0), prompt=None)
    with serving(Step({"caption": "A ball rolls over the floor."})) as server:
        options = {"model": "tiny", "num_frames": 2}
        made = {"kling-2.1": str(world / "kling")}
        result = run_gt_pair(
            config(
                world,
                tmp_path / "run",
                sources=[str(tmp_path / "clips")],
                captioner=server.url,
                captioner_options=options,
                made_elsewhere=json.dumps(made),
            )
        )
    assert result.pairs["prompt"][:] == ["A ball rolls over the floor."]


def test_all_videos_of_a_clip_are_paired_for_marking(done):
    root, result = done
    pairs = pairs_to_mark(result.generations, root)
    (pair,) = pairs  # clip 0 alone has two videos
    assert pair["prompt"] == "a red ball falls 0" and pair["video_a"] != pair["video_b"]
    assert np.all([probe_video(pair[side]).num_frames == 13 for side in ("video_a", "video_b")])


def test_what_cannot_be_used_is_refused_by_name(world, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "columns.jsonl").write_text('{"clip": "a", "video": "b.mp4"}\n')
    (tmp_path / "twice.csv").write_text("source,video\nclip0,a.mp4\nx/clip0.mp4,b.mp4\n")
    for source, message in (
        ("empty", "no video in it"),
        ("columns.jsonl", "row 0: expected 'source' and 'video'"),
        ("twice.csv", "two videos for the clip 'clip0'"),
        ("nowhere", "expected a folder with videos, or a table"),
    ):
        with pytest.raises(ValueError, match=message):
            find_videos(tmp_path / source)
    (tmp_path / "numbers.csv").write_text("source,video\n007,a.mp4\n7,b.mp4\n")
    assert list(find_videos(tmp_path / "numbers.csv")) == ["007", "7"]
    write_video(tmp_path / "strange" / "x.mp4", moving_video(3), 16.0)
    with pytest.raises(ValueError, match="none of its 1 videos \\(x, ...\\) is named as a clip"):
        run_gt_pair(config(world, tmp_path / "run", made_elsewhere={"strange": str(tmp_path / "strange")}))
    with pytest.raises(ValueError, match="at least one model or generator"):
        config(world, tmp_path, made_elsewhere=None)


def test_names_in_a_table_are_texts_and_a_dot_in_them_is_no_ending(tmp_path):
    (tmp_path / "t.csv").write_text("\ufeffsource,video\n0007,a.mp4\n1e3,b.mp4\nscene.01,c.mp4\n", encoding="utf-8")
    assert list(find_videos(tmp_path / "t.csv")) == ["0007", "1e3", "scene.01"]
    for name, content in (("t.jsonl", "{"), ("t.parquet", "no parquet"), ("u.csv", 'source,video\n"a,b.mp4\n')):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=f"{name}: cannot be read as a table"):
            find_videos(tmp_path / name)


def _clips(*places, contents):
    """Clips of these names; one with an `@` lies in a tar."""
    clips = {
        "source_id": [place.replace("@", "/") for place in places],
        "path": [place.partition("@")[0] for place in places],
        "offset": [512 if "@" in place else None for place in places],
        "content": list(contents),
    }
    return clips | {name: ["x"] * len(places) for name in ("prompt", "reference_image", "bucket")}


def test_clips_of_a_tar_have_their_own_names(tmp_path):
    videos = {"clip7": write_video(tmp_path / "clip7.mp4", moving_video(1), 16.0)}
    clips = _clips("a/shard.tar@sub/clip6.mp4", "a/shard.tar@sub/clip7.mp4", contents=["c6", "c7"])
    assert jobs_elsewhere(clips, "kling", videos)["content"].to_pylist() == ["c7"]


def test_a_name_that_several_clips_have_tells_none_of_them(tmp_path):
    """Also where one was dropped: its video would be set against the other clip. Two copies of one clip are one."""
    video = write_video(tmp_path / "clip.mp4", moving_video(1), 16.0)
    clips = _clips("a/clip.mp4", "b/clip.mp4", "a/copy.mp4", "b/copy.mp4", contents=["c1", "c2", "c3", "c3"])
    types = {name: pa.int64() if name == "offset" else pa.string() for name in clips}
    shared = _shared_names(new_manifest(clips, types))
    assert shared == {"clip"}
    left = {name: values[1:2] for name, values in clips.items()}
    with pytest.raises(ValueError, match="may belong to b/clip.mp4 or to another clip.*Name it c2.mp4"):
        jobs_elsewhere(left, "kling", {"clip": video}, shared)
    assert jobs_elsewhere(left, "kling", {"c2": video}, shared)["content"].to_pylist() == ["c2"]


def test_a_caption_that_a_clip_came_with_is_not_kept_for_later(tmp_path):
    """The user took it away, so that one is written."""

    class Captioner:
        name = "writer"

        def __call__(self, videos):
            return [f"written for {video}" for video in videos]

    types = {"content": pa.string(), "prompt": pa.string(), "video": pa.string()}
    for prompt, expected in (("wrong", "wrong"), (None, f"written for {tmp_path}/v.mp4"), ("right", "right")):
        table = new_manifest({"content": ["c"], "prompt": [prompt], "video": ["v.mp4"]}, types)
        assert write_captions(table, Captioner(), tmp_path, Shard())["prompt"].to_pylist() == [expected]
