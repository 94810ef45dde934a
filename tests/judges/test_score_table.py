"""Tables of videos and their scores, by the function and by `examples/score_videos.py`, run as a person runs it."""

import csv
import importlib.util
import json
import shutil

import pytest

from tests.support.evaluation.runs import damage
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
        ("file,text\na.mp4,x\n", "scores.csv", 8, "row 1: expected texts in the columns video and prompt"),
        ("video,prompt\na.mp4,x\n", "scores.csv", 8, r"1 of 1 videos are not there: .*a\.mp4"),
    ],
)
def test_what_is_refused_before_anything_is_judged(tmp_path, content, output, batch_size, message):
    (tmp_path / "prompts.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        score_table(tmp_path / "prompts.csv", tmp_path / output, load_judge("sandbox"), batch_size=batch_size)


@pytest.mark.parametrize(
    "row", ['{"video": "a.mp4"}', '{"video": null, "prompt": "x"}', '{"video": 3, "prompt": "x"}']
)
def test_a_row_that_lacks_something_is_named(tmp_path, row):
    (tmp_path / "t.jsonl").write_text(f'{{"video": "a.mp4", "prompt": "x"}}\n{row}\n')
    with pytest.raises(ValueError, match="row 2: expected texts in the columns video and prompt"):
        score_table(tmp_path / "t.jsonl", tmp_path / "scores.csv", load_judge("sandbox"))


class Counting:
    """Scores by the name of the file, and remembers what it was asked; `fails_at` is a call that raises."""

    name, identity = "counting", "counting:v1"

    def __init__(self, fails_at=None):
        self.asked, self.calls, self.fails_at = [], 0, fails_at

    def score(self, videos, prompts):
        self.calls += 1
        if self.calls == self.fails_at:
            raise RuntimeError("out of memory")
        self.asked += [video.name for video in videos]
        return [{"sa": len(prompt) / 1000, "pc": 0.1 + 0.2, "raw": {}} for prompt in prompts]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_scores_are_kept_as_they_come_and_only_the_missing_are_asked_for(demo, tmp_path, suffix):
    table, output = demo / "clips" / "prompts.csv", tmp_path / f"scores{suffix}"
    score_table(table, tmp_path / f"whole{suffix}", Counting(), batch_size=2)
    with pytest.raises(RuntimeError, match="out of memory"):
        score_table(table, output, Counting(fails_at=4), batch_size=2)
    assert not output.exists()
    kept = tmp_path / f"scores{suffix}.unfinished.jsonl"
    kept.write_bytes(kept.read_bytes()[:-30])  # killed while it wrote
    judge = Counting()
    score_table(table, output, judge, batch_size=2)
    assert len(judge.asked) == 3  # two of the batch that failed, and the one of the half line
    assert output.read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {output.name, f"whole{suffix}"}
    again = Counting()
    score_table(table, output, again)
    assert again.asked == [] and output.read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()
    other = Counting()
    other.identity = "counting:v2"
    assert len(score_table(table, output, other)) == 8 == len(other.asked)


def test_a_damaged_video_costs_its_own_score(demo, tmp_path):
    folder = tmp_path / "clips"
    shutil.copytree(demo / "clips", folder)
    rows = read_table(folder / "prompts.csv")
    damage(folder / rows[1]["video"])
    scores = score_table(folder / "prompts.csv", tmp_path / "scores.csv", load_judge("sandbox"), batch_size=4)
    assert [number for number, score in enumerate(scores) if score["sa"] is None] == [1]
    assert "damaged" in scores[1]["details"]


def test_a_file_that_is_no_table_of_scores_is_not_overwritten(demo, tmp_path):
    table = demo / "clips" / "prompts.csv"
    mine = tmp_path / "mine.csv"
    for content in (
        "video,prompt\na.mp4,x\n",
        "notes of mine",
        "video,video_hash,prompt,sa,pc,judge,details\na,b,c,0",
    ):
        mine.write_text(content)
        with pytest.raises(ValueError, match=r"mine\.csv"):
            score_table(table, mine, Counting(), batch_size=2)
        assert mine.read_text() == content


@pytest.mark.parametrize("content", [b"notes of mine", b'{"judge": "mine"}\n', b"\n\nnotes", bytes(range(256))])
def test_a_file_that_holds_no_unfinished_scores_is_neither_changed_nor_deleted(demo, tmp_path, content):
    mine, judge = tmp_path / "scores.csv.unfinished.jsonl", Counting()
    mine.write_bytes(content)
    with pytest.raises(ValueError, match="no file of unfinished scores"):
        score_table(demo / "clips" / "prompts.csv", tmp_path / "scores.csv", judge)
    assert mine.read_bytes() == content and not judge.asked


def test_a_table_that_was_cut_anywhere_is_refused_or_lacks_whole_rows(demo, tmp_path):
    output, cut = tmp_path / "scores.csv", tmp_path / "cut.csv"
    score_table(demo / "clips" / "prompts.csv", output, Counting())
    content = output.read_bytes()
    rows = read_table(output)
    for size in range(len(content)):
        cut.write_bytes(content[:size])
        try:
            found = read_table(cut)
        except ValueError as error:
            assert "cut.csv" in str(error)
        else:
            assert found == rows[: len(found)] and content[:size].endswith((b"\r", b"\n"))


def test_captions_that_a_spreadsheet_would_run_come_back_as_they_were(demo, tmp_path):
    captions = [
        '=HYPERLINK("http://x")',
        "+cmd|' /C calc'!A0",
        "-1+1",
        "@SUM(1)",
        "\t=1",
        "'=1",
        "plain\u2028text",
        " =1",
    ]
    videos = [row["video"] for row in read_table(demo / "clips" / "prompts.csv")]
    table = tmp_path / "prompts.jsonl"
    table.write_text(
        "".join(
            json.dumps({"video": v, "prompt": c}, ensure_ascii=False) + "\n"
            for v, c in zip(videos, captions, strict=True)
        )
    )
    score_table(table, tmp_path / "scores.csv", Counting(), folder=demo / "clips")
    assert [row["prompt"] for row in read_table(tmp_path / "scores.csv")] == captions
    with open(tmp_path / "scores.csv", newline="") as file:
        cells = [row["prompt"] for row in csv.DictReader(file)]
    assert all(cell.startswith(("'", "plain")) for cell in cells)
