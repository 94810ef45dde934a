"""Scores from a table: found by name or by content, never guessed."""

import csv
import json

import pyarrow
import pyarrow.parquet
import pytest

from tests.support.tiny import tiny_mp4, tiny_video
from video_trl.data import video_hash
from video_trl.judges import PrecomputedJudge, VideoJudge


ROWS = [
    {"video": "runs/7/a.mp4", "prompt": "a ball, red", "sa": 0.75, "pc": 0.0, "voter": "x"},
    {"video": "b.mp4", "prompt": 'a "blue" ball', "sa": 1.0, "pc": 0.25, "voter": "y"},
    {"video": "b.mp4", "prompt": "another", "sa": 0.5, "pc": 0.5, "voter": "y"},
]


def _write(path, rows):
    if path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.fixture
def clips(tmp_path):
    paths = [tmp_path / "clips" / name for name in ("a.mp4", "b.mp4")]
    paths[0].parent.mkdir()
    for seed, path in enumerate(paths):
        path.write_bytes(tiny_mp4(seed))
    return paths


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_rows_are_found_by_file_name_and_prompt(tmp_path, clips, suffix):
    judge = PrecomputedJudge(_write(tmp_path / f"scores{suffix}", ROWS))
    found = judge.score([clips[1], str(clips[0]), clips[1]], ["another", "a ball, red", 'a "blue" ball'])
    assert [(score["sa"], score["pc"]) for score in found] == [(0.5, 0.5), (0.75, 0.0), (1.0, 0.25)]
    assert found[1]["raw"] == {"video": "runs/7/a.mp4", "prompt": "a ball, red", "voter": "x"}
    assert isinstance(judge, VideoJudge)


def test_rows_are_found_by_content(tmp_path, clips):
    array = tiny_video(3)
    rows = [
        {"video_hash": video_hash(video), "prompt": "x", "sa": score, "pc": score}
        for video, score in ((clips[0], 0.25), (array, 0.5))
    ]
    judge = PrecomputedJudge(_write(tmp_path / "scores.jsonl", rows))
    assert [score["sa"] for score in judge.score([array, clips[0]], ["x", "x"])] == [0.5, 0.25]


def test_missing_rows_are_named(tmp_path, clips):
    judge = PrecomputedJudge(_write(tmp_path / "scores.csv", ROWS))
    with pytest.raises(ValueError, match=r"no row for 2 of 3 videos: .*a\.mp4 with 'A ball, red'; .*b\.mp4 with 'b'"):
        judge.score([clips[0], clips[0], clips[1]], ["a ball, red", "A ball, red", "b"])
    with pytest.raises(ValueError, match="no column `video_hash`"):
        judge.score([tiny_video(0)], ["x"])


def test_identity_follows_the_content(tmp_path):
    first = PrecomputedJudge(_write(tmp_path / "a.csv", ROWS)).identity
    assert PrecomputedJudge(_write(tmp_path / "b.csv", ROWS)).identity == first
    assert PrecomputedJudge(_write(tmp_path / "c.csv", ROWS[:1])).identity != first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sa": 4}, r"row 2: `sa` must be a number in \[0, 1\], got '4'"),
        ({"pc": "nan"}, "row 2: `pc`"),
        ({"pc": "good"}, "row 2: `pc`"),
        ({"sa": ""}, "row 2.*none for sa"),
        ({"prompt": ""}, "row 2.*none for prompt"),
        ({"video": "a.mp4", "prompt": "a ball, red"}, "row 2: other scores for 'a.mp4'"),
    ],
)
def test_bad_rows_are_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        PrecomputedJudge(_write(tmp_path / "scores.csv", [ROWS[0], ROWS[1] | change]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("scores.csv", b"", "expected rows"),
        ("scores.csv", b"video,prompt\na.mp4,x\n", "none for sa, pc"),
        ("scores.jsonl", b"{oops\n", "cannot be read as a table"),
        ("scores.jsonl", b"1\n2\n", "expected rows with named columns"),
        ("scores.parquet", b"PAR1 but not really", "cannot be read as a table"),
        ("scores.xlsx", b"x", r"ends in \.csv, \.jsonl or \.parquet"),
        ("scores.csv", b"\xff\xfe\x00", "cannot be read as a table"),
    ],
)
def test_files_that_are_no_tables(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        PrecomputedJudge(path)
    with pytest.raises(ValueError, match="gone.csv"):
        PrecomputedJudge(tmp_path / "gone.csv")
