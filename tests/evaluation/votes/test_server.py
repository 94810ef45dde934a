"""The voting page's server over real sockets: what it gives, and what it refuses."""

import http.client
import json
import logging
import os
import resource
import socket
import struct
import threading
import time
from statistics import median

import pytest

from tests.support.evaluation.runs import make_run
from video_trl.evaluation.runs.prompts import EvaluationPrompt
from video_trl.evaluation.votes.server import VotingServer
from video_trl.evaluation.votes.study import read_votes


logger = logging.getLogger(__name__)

EVIL = "<img src=x onerror=alert(1)>\"'</script>"


def _serving(folder):
    prompts = [EvaluationPrompt(EVIL), EvaluationPrompt("plain")]
    for number, name in enumerate(("ours", "base")):
        make_run(folder / name, name, [(0.2 + number / 2, 0.5)] * 2, prompts=prompts, scored=False)
    (folder / "secret.txt").write_text("secret")
    return VotingServer([folder / "ours", folder / "base"], folder / "votes.jsonl", port=0)


@pytest.fixture
def server(tmp_path):
    with _serving(tmp_path) as running:
        yield running


@pytest.fixture(scope="module")
def refusing(tmp_path_factory):
    """The server of all requests that have to change nothing, and its file of votes."""
    folder = tmp_path_factory.mktemp("refusing")
    with _serving(folder) as running:
        yield running, folder / "votes.jsonl"


def _ask(server, path, *, method="GET", body=None, headers=None):
    """Status, headers and body; the defaults are what the page itself sends."""
    host = f"127.0.0.1:{server.port}"
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    sent = {"Host": host}
    if method == "POST":
        sent |= {"Origin": f"http://{host}", "Content-Type": "application/json"}
    sent |= headers or {}
    data = json.dumps(body).encode() if isinstance(body, dict | list) else body
    connection.request(method, path, data, {name: value for name, value in sent.items() if value is not None})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, response.headers, content


def _task(server, rater="Ada", back=0):
    status, _, content = _ask(server, f"/api/task?rater={rater}&back={back}")
    assert status == 200, content
    return json.loads(content)


def _ballot(server, rater="Ada", **changes):
    answers = {"video_quality": "left", "prompt_following": "same"}
    return {"rater": rater, "task": _task(server, rater)["task"]["task"], "answers": answers, "seconds": 2.5} | changes


_KINDS = (
    ("/", "text/html"),
    ("/page.js", "text/javascript"),
    ("/vote.js", "text/javascript"),
    ("/vote.css", "text/css"),
)


def test_page_is_served_with_a_policy_that_runs_no_foreign_code(server):
    for path, kind in _KINDS:
        status, headers, content = _ask(server, path)
        assert status == 200 and headers["Content-Type"].startswith(kind) and content
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "script-src 'self'" in policy
        assert headers["X-Content-Type-Options"] == "nosniff" and headers["Cache-Control"] == "no-store"
    assert b"<script>" not in _ask(server, "/")[2] and b"style=" not in _ask(server, "/")[2]
    assert all(b"innerHTML" not in _ask(server, script)[2] for script in ("/vote.js", "/page.js"))


def test_pairs_are_blind_and_prompts_are_data(server):
    view = _task(server)
    text = json.dumps(view)
    assert view["total"] == 2 and view["done"] == 0
    assert "ours" not in text and "base" not in text and "00000" not in text
    prompts = {_task(server, rater)["task"]["prompt"] for rater in "ABCDEFGH"}
    assert prompts == {EVIL, "plain"}
    assert _ask(server, "/api/task?rater=Ada")[1]["Content-Type"] == "application/json"


def test_votes_move_on_come_back_and_finish(server, tmp_path):
    first = _task(server)["task"]
    status, _, content = _ask(server, "/api/vote", method="POST", body=_ballot(server))
    assert (status, json.loads(content)) == (200, {"saved": True})
    second = _task(server)
    assert second["done"] == 1 and second["task"]["task"] != first["task"]
    assert _task(server, back=1)["task"]["task"] == first["task"]
    assert _ask(server, "/api/task?rater=Ada&back=2")[0] == 409
    assert _ask(server, "/api/vote", method="POST", body=_ballot(server))[0] == 200
    assert _task(server)["task"] is None and _task(server, "Bo")["done"] == 0
    _, votes = read_votes(tmp_path / "votes.jsonl")
    assert sorted(vote.position for vote in votes) == [0, 1] and {vote.rater for vote in votes} == {"Ada"}
    for vote in votes:
        assert vote.answers["video_quality"] == ("good" if vote.left == "a" else "bad")


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"task": "0" * 32}, 409),
        ({"task": None}, 409),
        ({"answers": {"video_quality": "left"}}, 400),
        ({"answers": {"video_quality": "left", "prompt_following": "good"}}, 400),
        ({"answers": {"video_quality": "left", "prompt_following": ["left"]}}, 400),
        ({"answers": ["left"]}, 400),
        ({"rater": ""}, 400),
        ({"rater": "x" * 65}, 400),
        ({"rater": "a\nb"}, 400),
        ({"rater": 3}, 400),
        ({"seconds": -1}, 400),
        ({"seconds": "2"}, 400),
        ({"extra": 1}, 400),
    ],
)
def test_ballots_that_are_not_whole_are_not_counted(refusing, changes, status):
    server, votes = refusing
    before = votes.read_bytes()
    assert _ask(server, "/api/vote", method="POST", body=_ballot(server) | changes)[0] == status
    assert votes.read_bytes() == before


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": None}, 403),
        ({"Origin": "null"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Host": "evil.example"}, 421),
    ],
)
def test_other_pages_cannot_vote(refusing, headers, status):
    server, votes = refusing
    before = votes.read_bytes()
    assert _ask(server, "/api/vote", method="POST", body=_ballot(server), headers=headers)[0] == status
    assert votes.read_bytes() == before


def test_bodies_that_are_no_ballot_are_refused(server):
    for body, status in ((b"not json", 400), (b"[" * 5000, 400), (b'"' + b"x" * 20_000 + b'"', 413)):
        assert _ask(server, "/api/vote", method="POST", body=body)[0] == status
    assert _ask(server, "/api/vote", method="POST", body=b"{}", headers={"Content-Length": "-1"})[0] == 400
    assert _ask(server, "/api/elsewhere", method="POST", body={})[0] == 404


def test_a_foreign_name_for_this_machine_sees_nothing(server):
    """What a page elsewhere gets when it points its own name at 127.0.0.1."""
    for host in ("evil.example", f"evil.example:{server.port}", "127.0.0.1", f"127.0.0.1:{server.port + 1}", ""):
        for path in ("/", "/api/study", "/api/task?rater=Ada"):
            assert _ask(server, path, headers={"Host": host})[0] == 421
    assert _ask(server, "/", headers={"Host": f"localhost:{server.port}"})[0] == 200


@pytest.mark.parametrize(
    "path",
    ["/../secret.txt", "/video/../../secret.txt", "/video/..%2f..%2fsecret.txt", "/videos/00000-0.mp4", "/run.json",
     "//etc/passwd", "/video/", "/video/" + "0" * 32, "/video//etc/passwd", "/vote.html", "/templates/report.html"],
)  # fmt: skip
def test_nothing_but_shown_videos_can_be_asked_for(refusing, path):
    server = refusing[0]
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=20)  # http.client would tidy up the path
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nConnection: close\r\n\r\n".encode())
    answer = b"".join(iter(lambda: connection.recv(65536), b""))
    connection.close()
    assert answer.startswith(b"HTTP/1.1 404") and b"secret" not in answer.split(b"\r\n\r\n")[1]


def test_a_link_put_in_place_of_a_video_is_not_followed(server, tmp_path):
    shown = _task(server)["task"]["left"]
    assert _ask(server, shown)[0] == 200
    for name in ("ours", "base"):
        for video in (tmp_path / name / "videos").glob("*.mp4"):
            video.unlink()
            video.symlink_to(tmp_path / "secret.txt")
    status, _, content = _ask(server, shown)
    assert status == 404 and b"secret" not in content


def test_videos_come_whole_and_in_ranges(server, tmp_path):
    shown = _task(server)["task"]["left"]
    status, headers, whole = _ask(server, shown)
    files = [path.read_bytes() for path in tmp_path.glob("*/videos/*.mp4")]
    assert status == 200 and whole in files and headers["Content-Type"] == "video/mp4"
    assert headers["Accept-Ranges"] == "bytes"
    size = len(whole)
    for wanted, part in (("bytes=0-9", whole[:10]), ("bytes=5-", whole[5:]), ("bytes=-7", whole[-7:]),
                         (f"bytes=3-{size * 9}", whole[3:])):  # fmt: skip
        status, headers, content = _ask(server, shown, headers={"Range": wanted})
        assert (status, content) == (206, part)
        assert headers["Content-Range"].endswith(f"/{size}")
    status, headers, content = _ask(server, shown, headers={"Range": f"bytes={size}-"})
    assert (status, content, headers["Content-Range"]) == (416, b"", f"bytes */{size}")
    status, headers, content = _ask(server, shown, method="HEAD")
    assert (status, content, headers["Content-Length"]) == (200, b"", str(size))


@pytest.mark.parametrize(
    ("header", "status", "span"),
    [
        (None, 200, (0, 100)),
        ("bytes=0-", 206, (0, 100)),
        ("bytes=10-19", 206, (10, 20)),
        ("bytes=99-99", 206, (99, 100)),
        ("bytes=-100", 206, (0, 100)),
        ("bytes=-500", 206, (0, 100)),
        ("bytes=a-b", 400, None),
        ("bytes=5", 400, None),
        ("lines=0-1", 400, None),
        ("bytes=" + "9" * 5000 + "-", 400, None),
        ("bytes=100-", 416, None),
        ("bytes=9-3", 400, None),
        ("bytes=-0", 416, None),
    ],
)
def test_byte_ranges(refusing, header, status, span):
    """What the framework makes of them; it answers 400 where our own server ignored a header that makes no sense."""
    server, votes = refusing
    shown = _task(server)["task"]["left"]
    content = bytes(range(100))
    for video in votes.parent.glob("*/videos/*.mp4"):
        video.write_bytes(content)
    got, _, part = _ask(server, shown, headers={"Range": header})
    assert got == status and (span is None or part == content[slice(*span)])
    assert _ask(server, shown)[2] == content  # the server goes on


def test_a_full_disk_is_told_to_the_rater(server, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    ballot = _ballot(server)
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        status, _, content = _ask(server, "/api/vote", method="POST", body=ballot)
    assert status == 507 and "No space left" in json.loads(content)["error"]
    assert _task(server)["done"] == 0
    assert _ask(server, "/api/vote", method="POST", body=ballot)[0] == 200


def test_it_listens_on_loopback_unless_names_are_given(server, tmp_path):
    folders, votes = [tmp_path / "ours", tmp_path / "base"], tmp_path / "other.jsonl"
    assert server.url == f"http://127.0.0.1:{server.port}/"
    with pytest.raises(ValueError, match="without a password"):
        VotingServer(folders, votes, host="0.0.0.0", port=0)
    assert not votes.exists()
    with pytest.raises(ValueError, match=rf"Cannot listen on 127.0.0.1:{server.port}"):
        VotingServer(folders, votes, port=server.port)
    with pytest.raises(ValueError, match="Another process is writing"):
        VotingServer(folders, tmp_path / "votes.jsonl", port=0)
    with VotingServer(folders, votes, port=0, allowed_hosts=["study.example", "localhost:9000"]) as open_server:
        for host, status in (
            (f"study.example:{open_server.port}", 200),
            ("localhost:9000", 200),
            ("study.example", 421),
        ):
            assert _ask(open_server, "/", headers={"Host": host})[0] == status


def test_a_restarted_server_refuses_the_ballots_of_an_old_page_and_knows_the_votes(server, tmp_path):
    ballot = _ballot(server)
    _ask(server, "/api/vote", method="POST", body=ballot)
    server.__exit__()
    with VotingServer([tmp_path / "ours", tmp_path / "base"], tmp_path / "votes.jsonl", port=0) as again:
        assert _task(again)["done"] == 1
        status, _, content = _ask(again, "/api/vote", method="POST", body=ballot)
        assert status == 409 and "Reload" in json.loads(content)["error"]


def _slow(server, kind, number):
    """Sockets that ask and never finish: in silence, in the middle of the headers, of the body, or of the answer."""
    host = f"127.0.0.1:{server.port}".encode()
    start = {
        "silent": b"",
        "headers": b"GET / HTTP/1.1\r\nHost: ",
        "body": b"POST /api/vote HTTP/1.1\r\nHost: %b\r\nOrigin: http://%b\r\nContent-Type: application/json\r\n"
        b"Content-Length: 9000\r\n\r\n{" % (host, host),
        "answer": b"GET /vote.js HTTP/1.1\r\nHost: %b\r\n\r\n" % host * 50,
    }[kind]
    sockets = []
    for _ in range(number):
        sockets.append(socket.create_connection(("127.0.0.1", server.port), timeout=20))
        sockets[-1].sendall(start)
    return sockets


@pytest.mark.parametrize("number", [250, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["silent", "headers", "body", "answer"])
def test_slow_sockets_keep_nobody_out(server, tmp_path, capfd, caplog, kind, number):
    """More of them than connections are kept; `--log-cli-level=INFO` shows the times."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # their other ends are in this process too
    threads = threading.active_count()
    sockets = _slow(server, kind, number)
    times = []
    try:
        for rater in range(number // 50):
            start = time.monotonic()
            assert _ask(server, "/")[0] == 200
            assert _ask(server, "/api/vote", method="POST", body=_ballot(server, f"rater{rater}"))[0] == 200
            times.append(time.monotonic() - start)
        assert threading.active_count() - threads <= 41  # anyio's 40 workers, and no thread for a connection
        assert len(server._page._server.server_state.connections) <= 200
    finally:
        for place, connection in enumerate(sockets):
            if place % 2:  # a reset, as from a browser that is killed
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()
    logger.info("%d x %s: page, pair and vote in %.3f s, longest %.3f s", number, kind, median(times), max(times))
    assert _task(server, "rater0")["done"] == 1
    server.__exit__()
    assert "Traceback" not in capfd.readouterr().err and "Traceback" not in caplog.text
    assert len(read_votes(tmp_path / "votes.jsonl")[1]) == len(times)


def test_a_page_that_goes_away_in_the_middle_of_a_video_leaves_no_traceback(server, tmp_path, capfd, caplog):
    shown = _task(server)["task"]["left"]
    for video in tmp_path.glob("*/videos/*.mp4"):
        video.write_bytes(bytes(8 * 2**20))  # more than the sockets hold
    for _ in range(5):
        connection = socket.create_connection(("127.0.0.1", server.port), timeout=20)
        connection.sendall(f"GET {shown} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n\r\n".encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    assert len(_ask(server, shown)[2]) == 8 * 2**20
    server.__exit__()
    assert "Traceback" not in capfd.readouterr().err + caplog.text and "Broken pipe" not in caplog.text


def test_a_votes_file_that_becomes_something_else_is_told_to_the_rater(server, tmp_path):
    """Saved over by another program: its file stays, the votes are kept beside it, and voting can go on later."""
    path = tmp_path / "votes.jsonl"
    ballot = _ballot(server)
    assert _ask(server, "/api/vote", method="POST", body=ballot)[0] == 200
    (tmp_path / "notes").write_text("my notes\nwithout an end")
    os.replace(tmp_path / "notes", path)
    status, _, content = _ask(server, "/api/vote", method="POST", body=ballot)
    assert status == 507 and "recovered-" in json.loads(content)["error"]
    assert path.read_text() == "my notes\nwithout an end"
    (recovered,) = tmp_path.glob("votes.jsonl.recovered-*")
    assert [vote.rater for vote in read_votes(recovered)[1]] == ["Ada"]
    path.unlink()
    assert _ask(server, "/api/vote", method="POST", body=_ballot(server, "Bo"))[0] == 200
    assert [vote.rater for vote in read_votes(path)[1]] == ["Ada", "Bo"]
