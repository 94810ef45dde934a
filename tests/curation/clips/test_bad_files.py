"""Every kind of file that a folder from the wild holds is either used rightly or dropped by a name that says why."""

import logging
from pathlib import Path

import numpy as np
import pytest

from tests.support.curation.clips import SMALL, audio_only, encode, first_stages, moving_video, rotate, write_clip
from video_trl.curation.clips.sources import list_clips
from video_trl.curation.engine.manifest import Shard, kept_rows, summarize
from video_trl.curation.gt_pair.pipeline import GTPairConfig, acquire
from video_trl.data import read_video


# File -> what becomes of it: None where it is used.
FATES = {
    "good.mp4": None,
    "variable_rate.mkv": None,
    "phone.mp4": None,
    "ten_bit.mp4": None,
    "odd_sides.mkv": None,
    "portrait.mp4": None,
    "Übung 视频 🎈.mp4": None,
    "a/same_name.mp4": None,
    "b/same_name.mp4": None,
    "copy.mp4": "repeated",
    "empty.mp4": "empty",
    "text.mp4": "unreadable",
    "truncated.mp4": "truncated",
    "damaged.mp4": "damaged",
    "sound.mp4": "no_video_stream",
    "one_frame.mp4": "duration",
    "short.mp4": "duration",
    "slow.mp4": "frame_rate",
    "tiny.mp4": "resolution",
    "cinema.mp4": "aspect",
    "untold.mp4": "no_prompt",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("wild")
    video = moving_video()
    frames = len(video)
    write_clip(root / "good.mp4", video)
    steps = np.random.default_rng(0).integers(20, 96, size=frames)  # 10 to 50 fps from frame to frame, 17 on average
    encode(root / "variable_rate.mkv", video, times_ms=np.cumsum(steps).tolist())
    write_clip(root / "phone.mp4", moving_video(1, height=64, width=112))
    rotate(root / "phone.mp4")
    encode(root / "ten_bit.mp4", moving_video(2), pix_fmt="yuv420p10le")
    encode(root / "odd_sides.mkv", moving_video(3, height=97, width=95), codec="ffv1", pix_fmt="yuv444p")
    write_clip(root / "portrait.mp4", moving_video(4, height=112, width=64))
    write_clip(root / "Übung 视频 🎈.mp4", seed=5)
    write_clip(root / "a" / "same_name.mp4", seed=6)
    write_clip(root / "b" / "same_name.mp4", seed=7)
    (root / "copy.mp4").write_bytes((root / "good.mp4").read_bytes())  # "copy" lies before "good"; it has no caption
    (root / "empty.mp4").write_bytes(b"")
    (root / "text.mp4").write_bytes(b"<html>404 not found</html>" * 50)
    data = write_clip(root / "truncated.mp4", seed=8).read_bytes()
    (root / "truncated.mp4").write_bytes(data[: 2 * len(data) // 3])
    noise = np.random.default_rng(0).integers(0, 256, video.shape, dtype=np.uint8)
    data = bytearray(write_clip(root / "damaged.mp4", noise).read_bytes())
    data[len(data) // 2 : len(data) // 2 + 60_000] = bytes(60_000)
    (root / "damaged.mp4").write_bytes(data)
    audio_only(root / "sound.mp4")
    write_clip(root / "one_frame.mp4", video[:1])
    write_clip(root / "short.mp4", video[:20])
    encode(root / "slow.mp4", video[:20], times_ms=list(range(0, 2000, 100)))
    write_clip(root / "tiny.mp4", moving_video(9, height=48, width=48))
    write_clip(root / "cinema.mp4", moving_video(10, height=64, width=160))
    write_clip(root / "untold.mp4", seed=11, prompt=None)
    return root


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """Stages 1 to 3 on that folder."""
    root = tmp_path_factory.mktemp("run")
    return root, first_stages(GTPairConfig(sources=[str(folder)], output_dir=str(root), **SMALL))


def test_every_file_has_the_fate_that_it_should_have(folder, run):
    rows = run[1].to_pylist()
    assert {str(Path(row["path"]).relative_to(folder)): row["dropped_by"] for row in rows} == FATES


def test_every_file_is_accounted_for(run):
    count = sum(fate is None for fate in FATES.values())
    line = summarize(run[1])
    assert line.startswith(f"{len(FATES)} clips in = {count} kept + ")
    assert sum(int(part.split()[0]) for part in line.split(" = ")[1].split(" + ")) == len(FATES)


def test_a_dropped_file_says_what_was_measured(folder, run):
    by_name = {Path(row["path"]).name: row for row in run[1].to_pylist()}
    assert (by_name["tiny.mp4"]["value"], by_name["tiny.mp4"]["limit"]) == (48, 64)
    assert by_name["slow.mp4"]["value"] == pytest.approx(10, abs=0.3) and by_name["slow.mp4"]["limit"] == 16
    assert by_name["cinema.mp4"]["value"] == pytest.approx(1 - (112 / 64) / 2.5, abs=0.02)
    assert "truncated.mp4: truncated. The header declares" in by_name["truncated.mp4"]["detail"]
    assert "got audio" in by_name["sound.mp4"]["detail"]
    assert by_name["copy.mp4"]["detail"] == f"same as {folder}/good.mp4"  # the one that has a caption stays


def test_what_is_kept_has_one_format_for_each_bucket(run):
    root, table = run
    sizes = {Path(row["path"]).stem: read_video(root / row["video"]).shape for row in kept_rows(table).to_pylist()}
    assert sizes["phone"] == sizes["portrait"] == (13, 112, 64, 3)  # upright, as the phone shows it
    assert {shape for name, shape in sizes.items() if name not in ("phone", "portrait")} == {(13, 64, 64, 3)}


def test_the_phones_clip_is_turned_and_not_squeezed(folder, run):
    root, table = run
    (row,) = [row for row in table.to_pylist() if row["path"].endswith("phone.mp4")]
    expected = read_video(folder / "phone.mp4", fps=8, num_frames=13, height=112, width=64)
    assert np.abs(read_video(root / row["video"]).astype(int) - expected).mean() < 4


def test_a_clip_that_changes_between_runs_is_looked_at_again(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = write_clip(tmp_path / "clips" / "clip.mp4", moving_video()[:1])
    config = GTPairConfig(sources=[str(path.parent)], output_dir=str(tmp_path / "run"), **SMALL)

    def fate():
        table = list_clips(config.sources, spool=tmp_path / "sources")
        return acquire(table, config, tmp_path / "stages", Shard(), needs_prompt=True)["dropped_by"].to_pylist()

    assert fate() == ["duration"]
    write_clip(path)
    assert fate() == [None]
