"""`examples/score_videos.py`, run as a person runs it."""

import csv
import importlib.util
import json

import pyarrow.parquet
import pytest

from tests.support.judges.server import GOOD, Step, serving
from tests.support.paths import EXAMPLES
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


def test_the_table_is_a_judge(example, demo, tmp_path):
    clips, output = demo / "clips", tmp_path / "scores.parquet"
    example.main(["--videos", str(clips), "--prompts", str(clips / "prompts.csv"), "--output", str(output)])
    rows = example.read_prompts(clips / "prompts.csv", clips)
    judge = load_judge(output)
    scores = judge.score([clips / row["video"] for row in rows], [row["prompt"] for row in rows])
    assert [score["pc"] > 0.9 for score in scores] == [True, False] * 4
    names = pyarrow.parquet.read_table(output).column_names
    assert names == ["video", "video_hash", "prompt", "sa", "pc", "judge", "details"]


def test_videos_without_a_score_are_told_apart(example, demo, tmp_path, monkeypatch):
    monkeypatch.delenv("HTTP_PROXY", raising=False)
    monkeypatch.delenv("http_proxy", raising=False)
    clips, output = demo / "clips", tmp_path / "scores.csv"
    arguments = ["--videos", str(clips), "--prompts", str(clips / "prompts.csv"), "--output", str(output)]
    options = json.dumps({"model": "m", "concurrency": 1, "backoff": 0.01})
    with serving(Step(), Step(status=400, body=b"too large"), Step(GOOD)) as server:
        arguments += ["--judge", server.url, "--options", options]
        with pytest.raises(SystemExit, match="1 videos have no score.*too large"):
            example.main(arguments)
        assert len(server.requests) == 8
        example.main(arguments)  # asks for what is missing only
        assert len(server.requests) == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--videos", "x"], "go together"),
        (["--output", "scores.txt"], "must end in"),
        (["--options", "[1]"], "JSON object"),
        (["--batch_size", "0"], "must be positive"),
    ],
)
def test_bad_arguments(example, arguments, message, capsys):
    with pytest.raises(SystemExit):
        example.main(arguments)
    assert message in capsys.readouterr().err


def test_bad_tables(example, tmp_path):
    table = tmp_path / "prompts.csv"
    table.write_text("file,text\na.mp4,x\n")
    with pytest.raises(SystemExit, match="columns video and prompt"):
        example.read_prompts(table, tmp_path)
    table.write_text("video,prompt\na.mp4,x\n")
    with pytest.raises(SystemExit, match=r"lacks 1 of 1 videos: a\.mp4"):
        example.read_prompts(table, tmp_path)
