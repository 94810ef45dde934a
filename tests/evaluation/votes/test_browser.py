"""The voting page in a real browser: load, play, vote by key and by mouse, reload, finish."""

import pytest

from tests.support.evaluation.browser import HOSTILE, chromium, page_of
from tests.support.evaluation.runs import make_run
from video_trl.data.video_io import write_video
from video_trl.evaluation.runs.prompts import EvaluationPrompt
from video_trl.evaluation.votes.server import VotingServer
from video_trl.evaluation.votes.study import read_votes


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture
def folders(tmp_path):
    prompts = [EvaluationPrompt(HOSTILE), EvaluationPrompt("A ball falls."), EvaluationPrompt("A block slides.")]
    for number, name in enumerate(("<b>ours</b>", "base")):
        make_run(tmp_path / str(number), name, [(0.2 + number / 2, 0.5)] * 3, prompts=prompts, scored=False)
    return [tmp_path / "0", tmp_path / "1"]


def _wait(page, done):
    page.locator("#count", has_text=f"{done} of 3").wait_for(timeout=20_000)
    page.locator("fieldset.active").wait_for(timeout=20_000)


def _wait_for_another_pair(page, done, press):
    """The count alone says nothing where it stays the same: keys are not taken while the page asks for a pair."""
    shown = page.locator("#left").get_attribute("src")
    press()
    page.wait_for_function("(shown) => document.getElementById('left').getAttribute('src') !== shown", arg=shown)
    _wait(page, done)


def _start(page, server, name):
    page.goto(server.url)
    page.fill("#name", name)
    page.click("text=Start")


def test_votes_by_key_and_mouse_survive_a_reload_and_a_restart(browser, folders, tmp_path):
    votes_path = tmp_path / "votes.jsonl"
    with page_of(browser, viewport={"width": 1280, "height": 800}) as page:
        with VotingServer(folders, votes_path, port=0) as server:
            _start(page, server, "Ada")
            _wait(page, 0)
            times = page.evaluate(
                "[...document.querySelectorAll('video')].map((v) => [v.paused, v.muted, v.videoWidth])"
            )
            assert times == [[False, True, 32], [False, True, 32]]  # both play
            page.keyboard.press("ArrowLeft")
            assert page.locator("button[aria-pressed=true]").inner_text() == "Left is better"
            page.keyboard.press("3")
            _wait(page, 1)
            page.locator("fieldset").nth(1).get_by_text("Same").click()  # in any order
            page.locator("fieldset").nth(0).get_by_text("Right is better").click()
            _wait(page, 2)
            page.keyboard.press(" ")  # plays again, and presses no button
            # a second thought about the second pair
            _wait_for_another_pair(page, 2, lambda: page.keyboard.press("Backspace"))
            page.keyboard.press("ArrowRight")
            _wait_for_another_pair(page, 2, lambda: page.keyboard.press("ArrowRight"))
            page.reload()  # the name is remembered
            _wait(page, 2)
            port = server.port
        with VotingServer(folders, votes_path, port=port):  # the page of the old server goes on with the new one
            page.reload()
            _wait(page, 2)
            page.keyboard.press("ArrowDown")
            page.keyboard.press("ArrowDown")
            page.get_by_text("All 3 pairs have your vote, Ada.").wait_for(timeout=20_000)
    _, votes = read_votes(votes_path)
    assert [vote.position for vote in votes] == [0, 1, 2] and {vote.rater for vote in votes} == {"Ada"}
    assert len(votes_path.read_text().splitlines()) == 1 + 4  # header, three votes and a corrected one
    wanted = [("left", "right"), ("right", "right"), ("same", "same")]
    for vote, sides in zip(votes, wanted, strict=True):
        ours = "left" if vote.left == "a" else "right"
        expected = ["same" if side == "same" else "good" if side == ours else "bad" for side in sides]
        assert list(vote.answers.values()) == expected and 0 < vote.seconds < 60


def test_prompts_and_names_are_shown_and_not_run(browser, folders, tmp_path):
    with VotingServer(folders, tmp_path / "votes.jsonl", port=0) as server, page_of(browser) as page:
        _start(page, server, "<i>Bo</i>")
        shown = []
        for done in range(3):
            _wait(page, done)
            shown.append(page.locator("#prompt").text_content())
            assert page.locator("img").count() == 0 and page.locator("#prompt *").count() == 0
            page.keyboard.press("1")
            page.keyboard.press("1")
        page.get_by_text("All 3 pairs have your vote, <i>Bo</i>.").wait_for(timeout=20_000)
        assert sorted(shown) == sorted([HOSTILE, "A ball falls.", "A block slides."])
        assert "ours" not in page.content()  # `page_of` also fails on any dialog, console error or outside request
        page.get_by_text("Change the last vote").click()
        _wait(page, 3)
        page.get_by_text("Left is better").first.click()


def test_a_forced_choice_has_no_same_and_a_phone_needs_no_scrolling_aside(browser, folders, tmp_path):
    with VotingServer(folders, tmp_path / "votes.jsonl", questions="physics", port=0) as server:
        with page_of(browser, viewport={"width": 360, "height": 740}) as page:
            _start(page, server, "Cy")
            _wait(page, 0)
            assert page.locator("fieldset button").all_inner_texts() == ["Left is better", "Right is better"]
            assert page.evaluate("document.documentElement.scrollWidth") <= 360
            assert page.locator("fieldset button").last.bounding_box()["y"] < 740  # in sight without scrolling
            page.keyboard.press("ArrowDown")
            assert page.locator("#count").inner_text() == "0 of 3"
            page.keyboard.press("ArrowRight")
            _wait(page, 1)


def test_a_server_that_is_gone_is_said_and_the_vote_can_be_given_again(browser, folders, tmp_path):
    votes_path = tmp_path / "votes.jsonl"
    context = browser.new_context()
    page = context.new_page()
    with VotingServer(folders, votes_path, port=0) as server:
        _start(page, server, "Di")
        _wait(page, 0)
        port = server.port
    for _ in range(2):
        page.keyboard.press("ArrowLeft")
    page.get_by_text("The voting program does not answer.").wait_for(timeout=20_000)
    assert not read_votes(votes_path)[1]
    with VotingServer(folders, votes_path, port=port):
        for _ in range(2):
            page.keyboard.press("ArrowLeft")
        page.get_by_text("Reload it.").wait_for(timeout=20_000)
        page.reload()
        _wait(page, 0)
    context.close()


def test_a_video_the_browser_cannot_play_is_said(browser, folders, tmp_path):
    with VotingServer(folders, tmp_path / "votes.jsonl", port=0) as server:
        for folder in folders:
            for video in (folder / "videos").glob("*.mp4"):
                video.write_bytes(b"broken after the start")
        context = browser.new_context()
        page = context.new_page()
        _start(page, server, "Ed")
        page.get_by_text("A video cannot be played.").wait_for(timeout=20_000)
        assert page.locator("fieldset button").first.is_disabled()
        context.close()


def test_wide_videos_keep_their_shape(browser, tmp_path):
    import numpy as np

    for number, name in enumerate(("ours", "base")):
        run = make_run(tmp_path / name, name, [(0.1, 0.1)], scored=False)
        write_video(run.video(run.cases[0]), np.full((3, 48, 96, 3), 60 * number, dtype=np.uint8), 8)
    with VotingServer([tmp_path / "ours", tmp_path / "base"], tmp_path / "votes.jsonl", port=0) as server:
        with page_of(browser, viewport={"width": 1280, "height": 800}) as page:
            _start(page, server, "Fay")
            page.locator("fieldset.active").wait_for(timeout=20_000)
            style = page.evaluate("getComputedStyle(document.getElementById('left')).objectFit")
            left, right = (page.locator(f"#{side}").bounding_box() for side in ("left", "right"))
            assert style == "contain" and left["width"] == right["width"] and left["y"] == right["y"]
