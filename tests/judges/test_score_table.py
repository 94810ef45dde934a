"""Tables of videos and their scores, by the function and by `examples/score_videos.py`, run as a person runs it."""

import csv
import importlib.util
import json

import pytest

from tests.support.judges.server import GOOD, Step, serving
from tests.support.paths import EXAMPLES
from video_trl.judges.precomputed import read_table
from video_trl.judges.score_table import score_table
from video_trl.load import load_judge


SCRIPT = EXAMPLES / "score_videos.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("example_score_videos", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def demo(example, tmp_path_factory):
    """The folder of the run without arguments."""
    folder = tmp_path_factory.mktemp("demo")
    example.main(["--output", str(folder / "scores.csv")])
    return folder


def test_the_demo_tells_lawful_clips_from_others(demo):
    with open(demo / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    for row in rows:
        assert (float(row["pc"]) > 0.9) == ("lawful" in row["video"]), row["video"]
        assert "explanation" in json.loads(row["details"]) and row["judge"].startswith("sandbox-exact:")


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_the_table_is_a_judge(demo, tmp_path, suffix):
    clips, output = demo / "clips", tmp_path / f"scores{suffix}"
    rows = score_table(clips / "prompts.csv", output, load_judge("sandbox"))
    scores = load_judge(output).score([clips / row["video"] for row in rows], [row["prompt"] for row in rows])
    assert [score["pc"] for score in scores] == [row["pc"] for row in rows]
    assert [score["pc"] > 0.9 for score in scores] == [True, False] * 4
    assert list(read_table(output)[0]) == ["video", "video_hash", "prompt", "sa", "pc", "judge", "details"]


def test_paths_start_at_the_folder_that_is_given(demo, tmp_path):
    table = tmp_path / "prompts.csv"
    table.write_bytes((demo / "clips" / "prompts.csv").read_bytes())
    with pytest.raises(ValueError, match="8 of 8 videos are not there"):
        score_table(table, tmp_path / "scores.csv", load_judge("sandbox"))
    assert len(score_table(table, tmp_path / "scores.csv", load_judge("sandbox"), folder=demo / "clips")) == 8


def test_videos_without_a_score_are_told_apart(example, demo, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("HTTP_PROXY", raising=False)
    monkeypatch.delenv("http_proxy", raising=False)
    output = tmp_path / "scores.csv"
    options = json.dumps({"model": "m", "concurrency": 1, "backoff": 0.01})
    with serving(Step(), Step(status=400, body=b"too large"), Step(GOOD)) as server:
        arguments = ["--table", str(demo / "clips" / "prompts.csv"), "--output", str(output)]
        arguments += ["--judge", server.url, "--options", options]
        example.main(arguments)
        assert "7 videos have scores" in capsys.readouterr().out
        assert [row["video"] for row in read_table(output) if "too large" in row["details"]] == [
            row["video"] for row in read_table(output) if not row["sa"]
        ]
        assert len(server.requests) == 8
        example.main(arguments)  # asks for what is missing only
        assert len(server.requests) == 9 and "8 videos have scores" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "output", "batch_size", "message"),
    [
        ("video,prompt\na.mp4,x\n", "scores.txt", 8, "ends in .csv, .jsonl, .parquet"),
        ("video,prompt\na.mp4,x\n", "scores.csv", 0, "must be positive"),
        ("file,text\na.mp4,x\n", "scores.csv", 8, "columns video and prompt"),
        ("video,prompt\na.mp4,x\n", "scores.csv", 8, r"1 of 1 videos are not there: .*a\.mp4"),
    ],
)
def test_what_is_refused_before_anything_is_judged(tmp_path, content, output, batch_size, message):
    (tmp_path / "prompts.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        score_table(tmp_path / "prompts.csv", tmp_path / output, load_judge("sandbox"), batch_size=batch_size)
