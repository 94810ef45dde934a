"""The cache: scores once, survives kills and company, never answers for another judge."""

import multiprocessing
import os
import shutil
import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.judges.server import GOOD, Step, serving
from video_trl.data import write_video
from video_trl.judges import CachedJudge, RemoteJudge, VideoJudge
from video_trl.sandbox import SandboxJudge, simulate


CLIPS = [simulate(seed, motion="free_fall") for seed in range(6)]
VIDEOS, PROMPTS = [clip.video for clip in CLIPS], [clip.prompt for clip in CLIPS]
FORK = multiprocessing.get_context("fork")


class LoggingJudge(SandboxJudge):
    """The exact judge, with a line in a file for each call: how many videos, and by whom."""

    def __init__(self, log: Path, delay: float = 0.0, **options: float) -> None:
        super().__init__(**options)
        self.log, self.delay = log, delay

    def score(self, videos, prompts):
        with open(self.log, "a") as file:
            file.write(f"{len(videos)} {os.getpid()}\n")
        time.sleep(self.delay)
        return super().score(videos, prompts)

    def calls(self) -> list[int]:
        return [int(line.split()[0]) for line in self.log.read_text().splitlines()] if self.log.exists() else []


@pytest.fixture
def judge(tmp_path):
    return LoggingJudge(tmp_path / "calls.log")


def test_a_second_run_costs_nothing(judge, tmp_path):
    path = tmp_path / "deep" / "cache.sqlite"
    first = CachedJudge(judge, path, chunk_size=4).score(VIDEOS, PROMPTS)
    assert judge.calls() == [4, 2]
    again = CachedJudge(judge, path)
    assert again.score(VIDEOS[::-1], PROMPTS[::-1]) == first[::-1] == SandboxJudge().score(VIDEOS, PROMPTS)[::-1]
    assert judge.calls() == [4, 2]
    assert isinstance(again, VideoJudge) and (again.name, again.identity) == (judge.name, judge.identity)


def test_only_what_is_new_is_scored(judge, tmp_path):
    cached = CachedJudge(judge, tmp_path / "cache.sqlite")
    cached.score(VIDEOS[:2], PROMPTS[:2])
    cached.score(VIDEOS[:4], PROMPTS[:4])
    cached.score(VIDEOS[:1], [PROMPTS[1]])  # another sentence for a known clip
    cached.score([VIDEOS[5]] * 3, [PROMPTS[5]] * 3)  # the same thing three times
    assert judge.calls() == [2, 2, 1, 1]


def test_a_file_is_known_by_its_content(judge, tmp_path):
    cached = CachedJudge(judge, tmp_path / "cache.sqlite")
    path = write_video(tmp_path / "a.mp4", VIDEOS[0], 8)
    renamed = shutil.copy(path, tmp_path / "b.mp4")
    assert cached.score([path], PROMPTS[:1]) == cached.score([str(renamed)], PROMPTS[:1])
    write_video(path, VIDEOS[1], 8)
    cached.score([path], PROMPTS[:1])
    assert judge.calls() == [1, 1]


def test_another_judge_never_answers(judge, tmp_path):
    path = tmp_path / "cache.sqlite"
    CachedJudge(judge, path).score(VIDEOS[:2], PROMPTS[:2])
    faster = LoggingJudge(judge.log, fps=16.0)
    assert faster.identity != judge.identity
    assert CachedJudge(faster, path).score(VIDEOS[:2], PROMPTS[:2]) == SandboxJudge(fps=16.0).score(
        VIDEOS[:2], PROMPTS[:2]
    )
    assert judge.calls() == [2, 2]


def test_a_failed_answer_is_asked_for_again(tmp_path, monkeypatch):
    monkeypatch.delenv("HTTP_PROXY", raising=False)
    monkeypatch.delenv("http_proxy", raising=False)
    with serving(Step("nonsense"), Step("nonsense"), Step(GOOD)) as server:
        cached = CachedJudge(RemoteJudge(server.url, "m", backoff=0.01), tmp_path / "cache.sqlite")
        assert [cached.score(VIDEOS[:1], PROMPTS[:1])[0]["sa"] for _ in range(3)] == [None, 1.0, 1.0]
        assert len(server.requests) == 3


def test_what_was_scored_before_an_error_stays(judge, tmp_path):
    cached = CachedJudge(judge, tmp_path / "cache.sqlite", chunk_size=2)
    with pytest.raises(ValueError, match="motion"):
        cached.score(VIDEOS[:3], [*PROMPTS[:2], "nothing that the sandbox knows"])
    cached.score(VIDEOS[:2], PROMPTS[:2])
    assert judge.calls() == [2, 1]


def test_a_kill_costs_the_call_under_way(judge, tmp_path):
    path = tmp_path / "cache.sqlite"
    slow = LoggingJudge(judge.log, delay=0.3)
    process = FORK.Process(target=lambda: CachedJudge(slow, path, chunk_size=1).score(VIDEOS, PROMPTS))
    process.start()
    while len(judge.calls()) < 4:
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)  # during the fourth call
    process.join()
    assert process.exitcode == -signal.SIGKILL and len(judge.calls()) == 4
    scores = CachedJudge(judge, path).score(VIDEOS, PROMPTS)
    assert judge.calls() == [1, 1, 1, 1, 3]
    assert scores == SandboxJudge().score(VIDEOS, PROMPTS)


def _score_all(judge, path, offset):
    order = [(i + offset) % len(VIDEOS) for i in range(len(VIDEOS))]
    CachedJudge(judge, path, chunk_size=1).score([VIDEOS[i] for i in order], [PROMPTS[i] for i in order])


def test_processes_share_a_file(judge, tmp_path):
    path = tmp_path / "cache.sqlite"
    processes = [FORK.Process(target=_score_all, args=(judge, path, 2 * offset)) for offset in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    before = len(judge.calls())
    assert CachedJudge(judge, path).score(VIDEOS, PROMPTS) == SandboxJudge().score(VIDEOS, PROMPTS)
    assert len(judge.calls()) == before
    with sqlite3.connect(path) as database:
        assert database.execute("SELECT count(*) FROM scores").fetchone() == (6,)


def test_a_file_that_is_no_cache_is_named(judge, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("this is no database, and long enough to be sure of it " * 50)
    with pytest.raises(ValueError, match=r"notes\.txt: cannot be used as a score cache"):
        CachedJudge(judge, path)
    with pytest.raises(ValueError, match="chunk_size"):
        CachedJudge(judge, tmp_path / "cache.sqlite", chunk_size=0)


@pytest.mark.parametrize("columns", ["visits (day TEXT)", "scores (player TEXT, points INT)"])
def test_a_database_of_something_else_is_not_changed(judge, tmp_path, columns):
    path = tmp_path / "mine.sqlite"
    with closing(sqlite3.connect(path)) as database:
        database.execute(f"CREATE TABLE {columns}")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="database of something else"):
        CachedJudge(judge, path)
    assert path.read_bytes() == before
