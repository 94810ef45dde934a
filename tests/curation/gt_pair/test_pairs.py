"""The rows that GT-Pair writes, from tables of clips and generated videos."""

import json

import pyarrow as pa
import pytest

from tests.support.curation.clips import moving_video, write_clip
from video_trl.curation.engine.manifest import OUTCOME
from video_trl.curation.gt_pair.pairs import build_pairs


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    for number in range(5):
        write_clip(folder / f"{number}.mp4", moving_video(number)[:8], prompt=None)
    write_clip(folder / "short.mp4", moving_video(9)[:4], prompt=None)
    return folder


def clip(name, dropped_by=None):
    row = {"content": name, "prompt": f"prompt {name}", "video": f"{name}.mp4", "reference_image": f"{name}.png"}
    return (
        row
        | {"source_id": f"s{name}", "seconds": 0.5, "fps": 16.0}
        | dict.fromkeys(OUTCOME)
        | {"dropped_by": dropped_by}
    )


def job(content, rejected, seed, model="m"):
    row = {"content": content, "rejected": f"{rejected}.mp4", "model": model, "revision": "r", "seed": seed}
    return row | {"generation": "{}"} | dict.fromkeys(OUTCOME)


def rows_of(root, clips, jobs, row_type="auto"):
    tables = (pa.Table.from_pylist(rows) for rows in (clips, jobs))
    return build_pairs(*tables, root, row_type, {"a": 1}).with_format(None).to_list()


def test_a_clip_with_several_videos_is_a_group(root):
    jobs = [job("0", 1, 7), job("0", 2, 8, model="n"), job("3", 4, None)]
    first, second = rows_of(root, [clip("0"), clip("3"), clip("9", "cuts")], jobs)
    assert first["prompt"] == "prompt 0" and first["chosen"]["path"] == str(root / "0.mp4")
    assert [video["path"] for video in first["rejected"]] == [str(root / "1.mp4"), str(root / "2.mp4")]
    assert first["reference_image"] == str(root / "0.png") and first["generator"] == "m, n"
    assert first["seeds"] == [7, 8] and second["seeds"] == [] and len(second["rejected"]) == 1
    assert [each["seed"] for each in first["rejected_generation"]] == [7, 8]
    provenance = json.loads(first["provenance"])
    assert provenance["route"] == "gt-pair" and provenance["source"] == "s0" and provenance["fps"] == 16.0


def test_a_preference_row_for_each_video(root):
    jobs = [job("0", 1, 7), job("0", 2, None, model="n")]
    rows = rows_of(root, [clip("0")], jobs, "preference")
    assert [row["rejected"]["path"] for row in rows] == [str(root / "1.mp4"), str(root / "2.mp4")]
    assert [row["generator"] for row in rows] == ["m", "n"] and [row["seeds"] for row in rows] == [[7], []]
    assert [row["rejected_generation"]["model"] for row in rows] == ["m", "n"]


def test_clips_with_one_video_each_are_preference_rows(root):
    (row,) = rows_of(root, [clip("0")], [job("0", 1, 7)])
    assert row["rejected"]["path"] == str(root / "1.mp4")


def test_videos_of_two_formats_are_refused(root):
    with pytest.raises(ValueError, match=r"short.mp4: expected the format of .*0.mp4, \(8, 16.0, 96, 96\), got \(4,"):
        rows_of(root, [clip("0")], [job("0", "short", 7)])
