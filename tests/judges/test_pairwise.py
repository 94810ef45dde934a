"""Pairs by a model on a server: by segments, in both orders, and in a table that can be gone on with."""

import csv

import numpy as np
import pytest

from tests.support.judges.server import Step, serving
from video_trl.cli import main
from video_trl.data.video_io import write_video
from video_trl.judges import ChatClient, PairwiseJudge, PhyGroundJudge
from video_trl.judges.chat import ChatUnavailableError
from video_trl.judges.pairwise import Comparison


def _clip(*greys):
    """One second of each grey at four frames a second."""
    return np.repeat(np.array(greys, np.uint8), 4)[:, None, None, None] * np.ones((1, 32, 48, 3), np.uint8)


def _greys(request):
    """Mean grey of each video of a question, as the server sees them."""
    import base64
    import io

    from PIL import Image

    parts = [part for part in request["messages"][1]["content"] if part["type"] == "image_url"]
    shown = [Image.open(io.BytesIO(base64.b64decode(p["image_url"]["url"].split(",")[1]))) for p in parts]
    half = len(shown) // 2
    return [float(np.mean([np.asarray(image).mean() for image in part])) for part in (shown[:half], shown[half:])]


def _brighter(request):
    first, second = _greys(request)
    better = "same" if abs(first - second) < 5 else "first" if first > second else "second"
    return Step({"reason": "It is brighter.", "better": better})


def _judge(server, **options):
    client = ChatClient(server.url, "m", backoff=0.01, max_retries=0, concurrency=1)
    return PairwiseJudge(client, **({"fps": 4.0, "num_frames": 4} | options))


def test_segments_vote_and_both_orders_are_asked():
    with serving(_brighter) as server:
        verdict, other = _judge(server).compare(
            [_clip(200, 30, 90), _clip(60)], [_clip(40, 120, 30, 250), _clip(60)], ["x", "y"]
        )
        assert len(server.requests) == 2 * 3 + 2
    assert verdict.preference == "a" and verdict.segments == [
        "a",
        "b",
        "a",
    ]  # the longer one's last second is not shown
    assert verdict.answers == [["a", "a"], ["b", "b"], ["a", "a"]] and verdict.error == ""
    assert other.preference == "same" and other.segments == ["same"]


def test_a_choice_counts_in_any_case_and_without_a_reason():
    assert Comparison.model_validate_json('{"better": " FIRST "}').better == "first"
    for other in ("1", "the first", "first or second", "tie"):
        with pytest.raises(ValueError, match="better"):
            Comparison.model_validate_json(f'{{"reason": "x", "better": "{other}"}}')


def test_a_model_that_prefers_what_comes_first_says_nothing():
    biased = Step({"reason": "It comes first.", "better": "first"})
    with serving(biased) as server:
        (verdict,) = _judge(server).compare([_clip(200)], [_clip(40)], ["x"])
        assert verdict.preference == "same" and verdict.answers == [["a", "b"]]
        (once,) = _judge(server, both_orders=False).compare([_clip(200)], [_clip(40)], ["x"])
        assert once.preference == "a"


def test_whole_videos_at_once_and_the_criterion():
    with serving(_brighter) as server:
        (verdict,) = _judge(server, segment_seconds=None, criterion="sa").compare(
            [_clip(200, 30)], [_clip(40, 120)], ['A "ball"']
        )
        text = server.requests[0]["messages"][1]["content"][-1]["text"]
    assert len(verdict.segments) == 1 and "what the caption says" in text and "same 2 seconds" in text
    assert '"A \\"ball\\""' in text


def test_a_missing_answer_costs_its_segment():
    with serving(_brighter, Step("maybe"), Step("maybe"), _brighter) as server:
        (verdict,) = _judge(server).compare([_clip(200, 200)], [_clip(40, 40)], ["x"])
    assert verdict.segments == [None, "a"] and verdict.preference == "a" and verdict.error


@pytest.mark.parametrize(
    "options", [{"criterion": "beauty"}, {"segment_seconds": 0}, {"num_frames": 1}, {"fps": float("nan")}]
)
def test_settings_out_of_range(options):
    with pytest.raises(ValueError):
        PairwiseJudge(ChatClient("http://localhost:1/v1", "m"), **options)


def _table(folder, rows=3):
    for name, grey in (("good", 200), ("bad", 40)):
        write_video(folder / f"{name}.mp4", _clip(grey), fps=4)
    path = folder / "pairs.csv"
    lines = ["prompt,chosen,rejected", *(f"Ball {n} falls.,good.mp4,bad.mp4" for n in range(rows - 1))]
    path.write_text("\n".join([*lines, "=1+1,bad.mp4,good.mp4\n"]))
    return path


def test_a_table_of_pairs_is_gone_on_with_and_counted(tmp_path, capsys):
    table, output = _table(tmp_path), tmp_path / "verdicts.csv"
    options = ["--judge_options", '{"model": "m", "segment_seconds": 1, "num_frames": 2, "max_retries": 0}']

    def ask(url):
        argv = ["score", str(table), "--pairwise", "true", "--judge", url, *options]
        return main([*argv, "--output", str(output), "--batch_size", "1"])

    with serving(_brighter, _brighter, Step(status=401, body=b"no")) as server:
        assert ask(server.url) == 1 and not output.exists()  # stopped after the first pair
    with serving(_brighter) as server:
        assert ask(server.url) == 0 and len(server.requests) == 4
    assert "3 pairs: chosen better in 2, rejected in 1, undecided 0, without an answer 0" in capsys.readouterr().out
    rows = list(csv.DictReader(output.open(newline="")))
    assert [row["preference"] for row in rows] == ["chosen", "chosen", "rejected"]
    assert rows[2]["prompt"] == "'=1+1" and not list(tmp_path.glob("*.unfinished.jsonl"))


def test_what_is_no_table_of_pairs(tmp_path, capsys):
    table = _table(tmp_path)
    (tmp_path / "mine.csv").write_text("a,b\n1,2\n")
    shared = ["score", str(table), "--pairwise", "true", "--judge_options", '{"model": "m"}']
    for argv, code, message in (
        ([*shared, "--judge", "sandbox", "--output", str(tmp_path / "v.csv")], 2, "--pairwise asks a server"),
        ([*shared, "--judge", "http://localhost:1/v1", "--output", str(tmp_path / "mine.csv")], 1, "no table of verd"),
        (["score", str(tmp_path), "--pairwise", "true"], 2, "--pairwise is for a table"),
    ):
        assert main(argv) == code and message in capsys.readouterr().err
    (tmp_path / "half.jsonl").write_text('{"prompt": "a", "chosen": "good.mp4"}\n')
    argv = ["score", str(tmp_path / "half.jsonl"), *shared[2:], "--judge", "http://localhost:1/v1"]
    assert main([*argv, "--output", str(tmp_path / "v.csv")]) == 1
    assert "row 1: expected texts in the columns prompt, chosen and rejected" in capsys.readouterr().err
    (tmp_path / "bad.mp4").unlink()
    assert main([*shared, "--judge", "http://localhost:1/v1", "--output", str(tmp_path / "v.csv")]) == 1
    assert "3 videos are not there" in capsys.readouterr().err


def test_a_server_that_cannot_be_used(tmp_path):
    with serving(Step(status=401, body=b"no")) as server, pytest.raises(ChatUnavailableError):
        _judge(server).compare([_clip(200)], [_clip(40)], ["x"])


def test_further_fields_of_a_request_are_part_of_who_judges():
    """They may turn the thoughts of a model off; without any the identity is what it was."""
    makers = (
        lambda **options: PairwiseJudge(ChatClient("http://localhost:1/v1", "m", **options)),
        lambda **options: PhyGroundJudge("http://localhost:1/v1", "m", **options),
    )
    for make in makers:
        plain = make().identity
        assert plain.endswith("temperature=0") and make(extra_body={}).identity == plain
        assert len({plain, *(make(extra_body={"top_p": value}).identity for value in (0.5, 0.9))}) == 3
