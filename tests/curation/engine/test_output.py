"""Whose the folder of a curation run is: files of others stay as they are, and one launch works in it at a time."""

import json
from pathlib import Path

import pytest

from tests.support.curation.clips import write_clip
from tests.support.curation.phyaug_runs import config
from video_trl.curation import GTPairConfig, SelfPairsConfig, run_gt_pair, run_phyaug, run_self_pairs
from video_trl.curation.engine.manifest import Shard
from video_trl.curation.engine.output import OWNER_NAME, output_folder, sweep
from video_trl.files import partial_path


SMALL = {"model": "sandbox", "judge": "sandbox", "height": 64, "width": 64, "fps": 8.0, "num_frames": 13}
RUNS = {
    "gt-pair": lambda clips, out: run_gt_pair(GTPairConfig(sources=[clips], output_dir=out, fps=8.0, num_frames=13)),
    "phyaug": lambda clips, out: run_phyaug(config(Path(out)), [clips]),
    "self-pairs": lambda clips, out: run_self_pairs(SelfPairsConfig(output_dir=out, **SMALL)),
}


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize(
    "theirs", ["manifest.parquet", "pairs/train.parquet", "run.json", "groups/a", "videos.parquet"]
)
def test_files_of_others_stay(tmp_path, name, theirs):
    """Whatever the run would have written there, or of another kind of run, is not touched."""
    out = tmp_path / "out"
    path = out / theirs
    path.parent.mkdir(parents=True)
    path.write_text('{"state": "mine"}')
    write_clip(tmp_path / "clips" / "a.mp4", prompt="a red ball falls")
    (out / OWNER_NAME).write_text(json.dumps({"kind": "another"}))
    before = contents(out)
    with pytest.raises(ValueError, match="holds files of another"):
        RUNS[name](str(tmp_path / "clips"), str(out))
    assert contents(out) == before


OUTPUTS = ("manifest.parquet", "pairs")


@pytest.mark.parametrize("theirs", OUTPUTS)
def test_a_folder_without_an_owner_is_taken_unless_something_would_be_replaced(tmp_path, theirs):
    (tmp_path / "thesis.txt").write_text("years of work")
    with output_folder(tmp_path, "gt-pair", OUTPUTS, Shard()):
        pass
    (tmp_path / OWNER_NAME).unlink()
    (tmp_path / theirs).write_text("mine")
    with (
        pytest.raises(ValueError, match=f"{theirs}.*gt-pair has not written"),
        output_folder(tmp_path, "gt-pair", OUTPUTS, Shard()),
    ):
        pass
    (tmp_path / "stages").mkdir()  # of an earlier version, which did not write down whose it is
    with output_folder(tmp_path, "gt-pair", OUTPUTS, Shard()):
        assert json.loads((tmp_path / OWNER_NAME).read_text()) == {"kind": "gt-pair"}
    with output_folder(tmp_path, "gt-pair", OUTPUTS, Shard()):
        pass
    with pytest.raises(ValueError, match="files of gt-pair"), output_folder(tmp_path, "phyaug", OUTPUTS, Shard()):
        pass


def test_one_launch_at_a_time(tmp_path):
    with (
        output_folder(tmp_path, "gt-pair", OUTPUTS, Shard(0, 2)),
        output_folder(tmp_path, "gt-pair", OUTPUTS, Shard(1, 2)),
    ):
        with pytest.raises(ValueError, match="Another process works"), output_folder(tmp_path, "gt-pair", (), Shard()):
            pass
    with output_folder(tmp_path, "gt-pair", OUTPUTS, Shard()):
        pass


def test_only_our_own_leftovers_are_swept(tmp_path):
    """A project of the user may be the folder, with hidden files in its `videos`."""
    deep = tmp_path / "videos" / "480p"
    deep.mkdir(parents=True)
    leftover = partial_path(deep / "a.mp4")
    leftover.write_bytes(b"half")
    theirs = tmp_path / "videos" / ".git" / "objects"
    theirs.mkdir(parents=True)
    (theirs / "a").write_bytes(b"years of work")
    (deep / ".notes.txt").write_text("mine")
    sweep(tmp_path, ("videos", "stages"))
    assert not leftover.exists() and (theirs / "a").is_file() and (deep / ".notes.txt").is_file()
