"""The marking page's server over real sockets: pairs of a run, marks on the disk, a dataset of them."""

import http.client
import json
import os
import re

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.support.evaluation.browser import HOSTILE, chromium, page_of
from tests.support.evaluation.held_files import CHANGES, OTHER_FILES
from tests.support.paths import ROOT
from video_trl.cli import main
from video_trl.curation.annotated import DIMENSIONS, annotated_pairs, read_votes
from video_trl.data import write_video
from video_trl.evaluation.votes.marks import MARKED, MarkFile, MarkingServer, Pair, read_pairs


@pytest.fixture
def pairs(tmp_path):
    for name in ("a0", "b0", "a1", "b1"):
        write_video(tmp_path / f"{name}.mp4", np.zeros((5, 32, 32, 3), np.uint8), 8.0)
    rows = [
        {"pair_id": f"p{n}", "prompt": f"ball {n}", "video_a": f"a{n}.mp4", "video_b": f"b{n}.mp4"} for n in range(2)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ask(server, path, body=None):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    host = f"127.0.0.1:{server.port}"
    headers = {"Host": host, "Origin": f"http://{host}", "Content-Type": "application/json"}
    connection.request("GET" if body is None else "POST", path, None if body is None else json.dumps(body), headers)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    is_json = response.headers["Content-Type"].startswith("application/json")
    return response.status, json.loads(content) if is_json else content


def marks(left, right):
    return {"left": dict.fromkeys(MARKED, left), "right": dict.fromkeys(MARKED, right)}


def bytes_of(server, task, side):
    return ask(server, task[side])[1]


def test_raters_mark_every_pair_and_the_marks_become_a_dataset(pairs, tmp_path):
    write_video(tmp_path / "a0.mp4", np.full((5, 32, 32, 3), 200, np.uint8), 8.0)  # the better one, by its look
    write_video(tmp_path / "a1.mp4", np.full((5, 32, 32, 3), 200, np.uint8), 8.0)
    good = (tmp_path / "a0.mp4").read_bytes()
    sides = set()
    with MarkingServer(pairs, tmp_path / "marks.jsonl", port=0) as server:
        assert [q["key"] for q in ask(server, "/api/study")[1]["questions"]] == list(DIMENSIONS) == list(MARKED)
        for rater in ("anna", "ben", "chris", "dora"):
            for done in range(2):
                shown = ask(server, f"/api/task?rater={rater}")[1]
                assert (shown["done"], shown["total"]) == (done, 2)
                task = shown["task"]
                first = bytes_of(server, task, "left") == good
                sides.add(first)
                answer = {"rater": rater, "task": task["task"], "answers": marks(5, 2) if first else marks(2, 5)}
                assert ask(server, "/api/vote", answer) == (200, {"saved": True})
            assert ask(server, f"/api/task?rater={rater}")[1]["task"] is None
    assert sides == {True, False}  # neither video stands on one side for all
    votes = read_votes(tmp_path / "marks.jsonl")
    assert len(votes) == 4 * 2 * 2
    dataset, _ = annotated_pairs(votes)
    assert {row["chosen"]["path"] for row in dataset} == {str(tmp_path / f"a{n}.mp4") for n in range(2)}
    out = tmp_path / "out"
    assert main(["curate", "annotated", "--votes", str(tmp_path / "marks.jsonl"), "--output_dir", str(out)]) == 0
    assert (out / "pairs" / "train.parquet").is_file()


def test_marks_survive_a_restart_and_can_be_changed(pairs, tmp_path):
    path = tmp_path / "marks.jsonl"
    with MarkingServer(pairs, path, port=0) as server:
        first = ask(server, "/api/task?rater=anna")[1]["task"]
        ask(server, "/api/vote", {"rater": "anna", "task": first["task"], "answers": marks(1, 1)})
    with MarkingServer(pairs, path, port=0) as server:
        with pytest.raises(ValueError, match="Another process is writing"):
            MarkingServer(pairs, path, port=0)
        shown = ask(server, "/api/task?rater=anna")[1]
        assert shown["done"] == 1 and shown["task"]["prompt"] != first["prompt"]
        again = ask(server, "/api/task?rater=anna&back=1")[1]["task"]
        assert again["prompt"] == first["prompt"]
        ask(server, "/api/vote", {"rater": "anna", "task": again["task"], "answers": marks(4, 3)})
    assert sorted(vote["overall_quality"] for vote in read_votes(path)) == [3, 4]


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"answers": {"left": dict.fromkeys(MARKED, 3)}}, 400),
        ({"answers": {"left": dict.fromkeys(MARKED, 3), "right": dict.fromkeys(MARKED, 6)}}, 400),
        ({"answers": {"left": dict.fromkeys(MARKED, 3), "right": dict.fromkeys(MARKED, True)}}, 400),
        ({"answers": {"left": {}, "right": {}}}, 400),
        ({"task": "nonsense"}, 409),
        ({"rater": ""}, 400),
    ],
)
def test_what_is_no_mark_changes_nothing(pairs, tmp_path, change, status):
    with MarkingServer(pairs, tmp_path / "marks.jsonl", port=0) as server:
        task = ask(server, "/api/task?rater=anna")[1]["task"]
        answer = {"rater": "anna", "task": task["task"], "answers": marks(3, 3)} | change
        assert ask(server, "/api/vote", answer)[0] == status
        assert ask(server, "/video/../pairs.jsonl")[0] == 404
    assert (tmp_path / "marks.jsonl").read_bytes() == b""  # held from the start


@pytest.mark.parametrize("by", ["the next pair", "the end"])
@pytest.mark.parametrize("change", CHANGES)
def test_marks_outlive_what_happens_to_their_file(tmp_path, change, by):
    path, dimensions = tmp_path / "held" / "marks.jsonl", ("overall_quality",)
    held = MarkFile(path, dimensions)
    for number, mark in enumerate((1, 2, 3)):
        pair = Pair("p", "a ball falls", "a.mp4", "b.mp4")
        held.add(f"rater {number}", pair, {side: {"overall_quality": mark} for side in ("video_a", "video_b")})
    CHANGES[change](path)
    expected = {"rater 0": 1, "rater 1": 2, "rater 2": 3}
    if by == "the next pair":
        held.add("rater 1", pair, {side: {"overall_quality": 5} for side in ("video_a", "video_b")})
        expected["rater 1"] = 5
        with pytest.raises(ValueError, match="Another process is writing"):  # the lock moved along
            MarkFile(path, dimensions)
    held.close()
    marked = {(vote["annotator"], vote["video"]): vote["overall_quality"] for vote in read_votes(path, dimensions)}
    assert marked == {(rater, video): mark for rater, mark in expected.items() for video in ("a.mp4", "b.mp4")}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_a_wrong_file_is_left_as_it_is(tmp_path, name):
    path = tmp_path / "other.jsonl"
    header = b'{"pair_id": "p", "video": "a.mp4", "annotator": "Ada", "prompt": "x", "overall_quality": 3}'
    path.write_bytes(OTHER_FILES[name].replace(b"{HEADER}", header))
    content = path.read_bytes()
    os.utime(path, ns=(1, 1))
    with pytest.raises(ValueError, match="other"):
        MarkFile(path, ("overall_quality",))
    assert path.read_bytes() == content and path.stat().st_mtime_ns == 1 and os.listdir(tmp_path) == ["other.jsonl"]


def test_files_of_pairs_and_dimensions_are_checked(pairs, tmp_path):
    for name, content, message in (
        ("none.csv", "pair_id,prompt,video_a,video_b\n", "at least one pair"),
        ("gone.csv", "pair_id,prompt,video_a,video_b\np,x,a0.mp4,no.mp4\n", "there is no file"),
        ("half.csv", "pair_id,prompt,video_a\np,x,a0.mp4\n", r"expected values for \['video_b'\]"),
        ("twice.csv", "pair_id,prompt,video_a,video_b\np,x,a0.mp4,b0.mp4\np,x,a1.mp4,b1.mp4\n", "stands there twice"),
        ("secret.csv", "pair_id,prompt,video_a,video_b\np,x,a0.mp4,pairs.jsonl\n", r"pairs\.jsonl"),
        ("pairs.txt", "", "in a .csv or .jsonl file"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            read_pairs(tmp_path / name)
    (tmp_path / "numbers.jsonl").write_text(
        json.dumps({"pair_id": 0, "prompt": "x", "video_a": "a0.mp4", "video_b": "b0.mp4"})
    )
    assert [pair.pair_id for pair in read_pairs(tmp_path / "numbers.jsonl")] == ["0"]
    with pytest.raises(ValueError, match="Expected dimensions among"):
        MarkingServer(pairs, tmp_path / "m.jsonl", dimensions=["beauty"], port=0)
    (tmp_path / "other.jsonl").write_text('{"annotator": "a", "pair_id": "p"}\n')
    with pytest.raises(ValueError, match="line 1: no mark of these dimensions"):
        MarkingServer(pairs, tmp_path / "other.jsonl", port=0)


def test_a_pair_is_marked_in_a_real_browser(pairs, tmp_path):
    rows = [json.loads(line) | {"prompt": HOSTILE} for line in pairs.read_text().splitlines()]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (
        chromium() as browser,
        MarkingServer(pairs, tmp_path / "marks.jsonl", port=0) as server,
        page_of(browser, viewport={"width": 1280, "height": 1200}) as page,
    ):
        page.goto(server.url)
        page.fill("#name", "anna")
        page.click("text=Start")
        for done in range(2):
            page.locator("#count", has_text=f"{done} of 2").wait_for(timeout=20_000)
            assert page.locator("#prompt").text_content() == HOSTILE and page.locator("#prompt *").count() == 0
            for side, mark in (("left", 2), ("right", 5)):
                for question in MARKED:
                    page.click(f"button[data-side={side}][data-question={question}][data-mark='{mark}']")
            page.click("#save")
        page.get_by_text("All 2 pairs have your marks, anna.").wait_for(timeout=20_000)
    lines = [json.loads(line) for line in (tmp_path / "marks.jsonl").read_text().splitlines()]
    assert sorted(line["image_quality"] for line in lines) == [2, 2, 5, 5]


def test_the_page_names_only_ids_that_it_has():
    folder = ROOT / "video_trl" / "templates"
    page, script = (folder / "marks.html").read_text(), (folder / "marks.js").read_text()
    used = set(re.findall(r'byId\("(\w+)"\)', script)) | {"welcome", "marking", "finished", "left", "right"}
    assert used <= set(re.findall(r'id="(\w+)"', page))


def test_a_video_is_the_same_from_wherever_the_page_is_started(pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_pairs(pairs.name) == read_pairs(pairs) == read_pairs(f"../{tmp_path.name}/{pairs.name}")


def test_paths_of_votes_begin_at_their_table(pairs, tmp_path, capsys):
    marks_of = {name: dict.fromkeys(DIMENSIONS, mark) for name, mark in (("a0.mp4", 5), ("b0.mp4", 1), ("far.mp4", 2))}
    lines = [
        {"pair_id": pair, "video": video, "annotator": "r", "prompt": "p"} | marks_of[video]
        for pair, videos in (("p", ("a0.mp4", "b0.mp4")), ("q", ("a0.mp4", "far.mp4")))
        for video in videos
    ]
    (tmp_path / "votes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    argv = ["--votes", str(tmp_path / "votes.jsonl"), "--min_raters", "1", "--output_dir", str(tmp_path / "out")]
    assert main(["curate", "annotated", *argv]) == 0
    rows = pq.read_table(tmp_path / "out" / "pairs").to_pylist()
    assert [row["chosen"]["path"] for row in rows] == [str(tmp_path / "a0.mp4")] * 2
    assert [row["rejected"]["path"] for row in rows] == [str(tmp_path / "b0.mp4"), "far.mp4"]
