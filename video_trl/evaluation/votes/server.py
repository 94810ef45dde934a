"""
The web server of a study: a voting page on this machine only, with the standard library.

It serves three files of the package, a JSON interface, and the videos that a rater is shown, under names that do not
reveal the model. It serves nothing else: a request is never used as a path.
"""

import hmac
import json
import logging
import os
import secrets
import shutil
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from .study import MAX_RATER_LENGTH, Study, Task, Vote, VoteFile, inside, open_study


logger = logging.getLogger(__name__)

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_PAGES = {
    "/": ("vote.html", "text/html; charset=utf-8"),
    "/vote.js": ("vote.js", "text/javascript; charset=utf-8"),
    "/vote.css": ("vote.css", "text/css; charset=utf-8"),
}
_MAX_BODY = 16_384
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; media-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class _Refused(Exception):
    """A request that is not answered; the text goes to the page."""

    def __init__(self, status: HTTPStatus, text: str) -> None:
        super().__init__(text)
        self.status = status


class VotingServer:
    """
    Serves the voting page until it is closed; see [`serve_votes`], which blocks.

    ```python
    with VotingServer(["runs/phygdpo", "runs/base"], "votes.jsonl", port=0) as server:
        print(server.url)
        ...
    ```

    Args and errors are those of [`serve_votes`].
    """

    def __init__(
        self,
        run_dirs: Sequence[str | os.PathLike[str]],
        votes_path: str | os.PathLike[str],
        *,
        questions: str = "gsb",
        host: str = "127.0.0.1",
        port: int = 8321,
        allowed_hosts: Sequence[str] = (),
    ) -> None:
        if host not in _LOOPBACK and not allowed_hosts:
            raise ValueError(
                f"Listening on {host!r} shows the page to other machines, without a password. Listen on 127.0.0.1 and "
                "forward the port by ssh, or say by `allowed_hosts` under which names the page may be opened."
            )
        self.study = open_study(run_dirs, questions)
        self._votes = VoteFile(votes_path, self.study)
        try:
            self._http = _HTTPServer((host, port), _Handler)
        except OSError as error:
            self._votes.close()
            raise ValueError(f"Cannot listen on {host}:{port} ({error.strerror}). Pass another `port`.") from error
        self.port = int(self._http.server_address[1])
        self.url = f"http://{'[::1]' if host == '::1' else host}:{self.port}/"
        # A page elsewhere can point a name of its own at this machine; the browser then tells us that name.
        self._http.hosts = {f"{name}:{self.port}" for name in ("127.0.0.1", "localhost", "[::1]")}
        self._http.hosts |= {name if ":" in name else f"{name}:{self.port}" for name in allowed_hosts}
        self._http.desk = _Desk(self.study, self._votes)
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "VotingServer":
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._http.shutdown()
        if self._thread is not None:
            self._thread.join()
        self._http.server_close()
        self._http.desk.close()

    def wait(self) -> None:
        """Returns when the server is closed or the process is interrupted."""
        assert self._thread is not None, "wait inside the `with` block"
        self._thread.join()


def serve_votes(
    run_dirs: Sequence[str | os.PathLike[str]],
    votes_path: str | os.PathLike[str],
    *,
    questions: str = "gsb",
    host: str = "127.0.0.1",
    port: int = 8321,
    allowed_hosts: Sequence[str] = (),
) -> None:
    """
    Shows pairs of videos in a web page and collects votes, until Ctrl-C. Start it again to go on: every rater goes on
    with the first pair that lacks a vote.

    Args:
        run_dirs (list of path): Two or more runs of the same prompts and seeds; the first against each other one.
        votes_path (path): File of votes, new or of the same runs and questions.
        questions (`str`, *optional*, defaults to `"gsb"`): `"gsb"` or `"physics"`, see `QUESTIONS`.
        host (`str`, *optional*, defaults to `"127.0.0.1"`): Address to listen on.
        port (`int`, *optional*, defaults to `8321`): Port; 0 takes a free one.
        allowed_hosts (list of `str`, *optional*): Names (or `name:port`, behind a forwarded port) under which the page
            may be opened beside the loopback ones. Needed to listen on another address: there is no password.

    Raises:
        ValueError: If the runs cannot be compared, the file of votes is another study's or in use, or the address
            cannot be listened on.
    """
    server = VotingServer(run_dirs, votes_path, questions=questions, host=host, port=port, allowed_hosts=allowed_hosts)
    with server:
        try:
            logger.warning("Vote at %s (Ctrl-C ends it; votes go to %s)", server.url, votes_path)
            server.wait()
        except KeyboardInterrupt:
            logger.warning("Stopped. All votes that were given are in %s.", votes_path)


class _Desk:
    """Hands out pairs and takes votes; one request at a time."""

    def __init__(self, study: Study, votes: VoteFile) -> None:
        self.study, self._votes = study, votes
        self._lock, self._open = threading.Lock(), True
        self._secret = secrets.token_bytes(32)
        self._videos: dict[str, tuple[Task, str]] = {}  # opaque name -> pair and which of its runs

    def describe(self) -> dict[str, Any]:
        questions = [{"key": q.key, "text": q.text, "ties": q.ties} for q in self.study.questions]
        return {"questions": questions, "total": len(self.study.tasks)}

    def show(self, rater: str, back: int = 0) -> dict[str, Any]:
        """The first pair without a vote of the rater; with `back`, the pair that was voted on so many votes ago."""
        with self._lock:
            order, votes = self.study.order(rater), self._votes.of(rater)
            open_tasks = [key for key in order if key not in votes]
            voted = [key for key in order if key in votes]
            state = {"done": len(voted), "total": len(order)}
            if back and len(voted) < back:
                raise _Refused(HTTPStatus.CONFLICT, "There is no earlier pair.")
            key = voted[-back] if back else next(iter(open_tasks), None)
            return state | {"task": None if key is None else self._view(rater, self.study.tasks[key])}

    def take(self, body: Any) -> None:
        """Checks and writes one vote."""
        if not isinstance(body, dict) or set(body) != {"rater", "task", "answers", "seconds"}:
            raise _Refused(HTTPStatus.BAD_REQUEST, "A vote has rater, task, answers and seconds.")
        rater, answers, seconds = checked_rater(body["rater"]), body["answers"], body["seconds"]
        with self._lock:
            if not self._open:
                raise _Refused(HTTPStatus.SERVICE_UNAVAILABLE, "The voting program was stopped.")
            tokens = {self._token(rater, key): key for key in self.study.tasks}
            if not isinstance(body["task"], str) or body["task"] not in tokens:
                raise _Refused(HTTPStatus.CONFLICT, "The page is of an earlier start. Reload it.")
            task = self.study.tasks[tokens[body["task"]]]
            if not isinstance(answers, dict) or set(answers) != {q.key for q in self.study.questions}:
                raise _Refused(HTTPStatus.BAD_REQUEST, "Every question needs an answer.")
            for question in self.study.questions:
                if answers[question.key] not in ("left", "right", *(("same",) if question.ties else ())):
                    raise _Refused(HTTPStatus.BAD_REQUEST, f"{answers[question.key]!r} is no answer.")
            if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds < 1e6:
                raise _Refused(HTTPStatus.BAD_REQUEST, "`seconds` must be a number.")
            vote = Vote(
                study=self.study.identity,
                rater=rater,
                task=task.key,
                prompt=task.case.prompt.text,
                seed=task.case.seed,
                a=task.a.name,
                b=task.b.name,
                left=self.study.left(rater, task.key),
                position=self.study.order(rater).index(task.key),
                answers={key: self.study.verdict(rater, task.key, side) for key, side in answers.items()},
                seconds=round(float(seconds), 3),
                time=datetime.now(UTC).isoformat(timespec="seconds"),
            )
            try:
                self._votes.add(vote)
            except OSError as error:
                text = f"The vote could not be saved ({error.strerror}). It is not counted."
                raise _Refused(HTTPStatus.INSUFFICIENT_STORAGE, text) from error

    def close(self) -> None:
        """Waits for the vote that is being written and takes no more."""
        with self._lock:
            self._open = False
            self._votes.close()

    def video(self, name: str) -> Path:
        """File of a video that was shown, checked again: a link may have been put in its place."""
        with self._lock:
            if name not in self._videos:
                raise _Refused(HTTPStatus.NOT_FOUND, "No such video.")
            task, side = self._videos[name]
        run = task.a if side == "a" else task.b
        if not inside(run, task.case) or not run.video(task.case).is_file():
            raise _Refused(HTTPStatus.NOT_FOUND, "The video is gone.")
        return run.video(task.case)

    def _view(self, rater: str, task: Task) -> dict[str, Any]:
        left = self.study.left(rater, task.key)
        right = "b" if left == "a" else "a"
        names = {side: self._token(rater, task.key, side) for side in (left, right)}
        self._videos |= {name: (task, side) for side, name in names.items()}
        return {
            "task": self._token(rater, task.key),
            "prompt": task.case.prompt.text,
            "left": f"/video/{names[left]}",
            "right": f"/video/{names[right]}",
        }

    def _token(self, *parts: str) -> str:
        return hmac.new(self._secret, json.dumps(parts).encode(), "sha256").hexdigest()[:32]


def checked_rater(name: Any) -> str:
    """A rater's name without spaces around it."""
    text = name.strip() if isinstance(name, str) else ""
    if not 1 <= len(text) <= MAX_RATER_LENGTH or not text.isprintable():
        raise _Refused(HTTPStatus.BAD_REQUEST, f"Your name must have 1 to {MAX_RATER_LENGTH} printable characters.")
    return text


class _HTTPServer(ThreadingHTTPServer):
    daemon_threads = True
    hosts: set[str]
    desk: _Desk

    def __init__(self, *args: Any) -> None:
        self._connections: set[socket.socket] = set()
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        """Ends open connections too: browsers keep them, and would go on asking a server that was closed."""
        super().server_close()
        for connection in list(self._connections):
            with suppress(OSError):  # it may have ended in this moment
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    server: _HTTPServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "video-trl", ""
    timeout = 60  # seconds of silence on a connection

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_HEAD(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _answer(self, method: Any) -> None:
        try:
            if self.headers.get("Host", "") not in self.server.hosts:
                raise _Refused(HTTPStatus.MISDIRECTED_REQUEST, "The page is not served under this name.")
            method()
        except _Refused as refusal:
            self.close_connection = True  # what is left of the request was not read
            self._send_json({"error": str(refusal)}, refusal.status)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the page was closed or asked for another part of the video

    def _get(self) -> None:
        url = urlsplit(self.path)
        query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        if url.path in _PAGES:
            name, kind = _PAGES[url.path]
            content = resources.files("video_trl").joinpath("templates", name).read_bytes()
            self._send(HTTPStatus.OK, kind, content)
        elif url.path == "/api/study":
            self._send_json(self.server.desk.describe())
        elif url.path == "/api/task":
            back = query.get("back", "0")
            if not _is_count(back):
                raise _Refused(HTTPStatus.BAD_REQUEST, "`back` must be a number.")
            self._send_json(self.server.desk.show(checked_rater(query.get("rater")), int(back)))
        elif url.path.startswith("/video/"):
            self._send_video(self.server.desk.video(url.path.removeprefix("/video/")))
        else:
            raise _Refused(HTTPStatus.NOT_FOUND, "No such page.")

    def _post(self) -> None:
        # Another site's page can send forms here, but neither this origin nor this kind of content.
        if self.headers.get("Origin") not in {f"http://{host}" for host in self.server.hosts}:
            raise _Refused(HTTPStatus.FORBIDDEN, "Votes are taken from the voting page only.")
        if self.headers.get_content_type() != "application/json":
            raise _Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "Expected JSON.")
        if urlsplit(self.path).path != "/api/vote":
            raise _Refused(HTTPStatus.NOT_FOUND, "No such page.")
        length = self.headers.get("Content-Length", "")
        if not _is_count(length):
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "Expected a Content-Length.")
        if int(length) > _MAX_BODY:
            raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "A vote is smaller than that.")
        try:
            body = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise _Refused(HTTPStatus.BAD_REQUEST, "The vote is not JSON.") from error
        self.server.desk.take(body)
        self._send_json({"saved": True})

    def _send_video(self, path: Path) -> None:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            span = byte_range(self.headers.get("Range"), size)
            if span is None:
                self._send_headers(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, "text/plain", 0, f"bytes */{size}")
                return
            start, stop = span
            partial = (start, stop) != (0, size)
            status = HTTPStatus.PARTIAL_CONTENT if partial else HTTPStatus.OK
            self._send_headers(
                status, "video/mp4", stop - start, f"bytes {start}-{stop - 1}/{size}" if partial else None, ranges=True
            )
            if self.command != "HEAD":
                file.seek(start)
                if partial:
                    self.wfile.write(file.read(stop - start))
                else:
                    shutil.copyfileobj(file, self.wfile)

    def _send_json(self, content: Any, status: HTTPStatus = HTTPStatus.OK) -> None:
        self._send(status, "application/json", json.dumps(content).encode())

    def _send(self, status: HTTPStatus, kind: str, content: bytes) -> None:
        self._send_headers(status, kind, len(content))
        if self.command != "HEAD":
            self.wfile.write(content)

    def _send_headers(
        self, status: HTTPStatus, kind: str, length: int, content_range: str | None = None, ranges: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length))
        if ranges:
            self.send_header("Accept-Ranges", "bytes")
        if content_range is not None:
            self.send_header("Content-Range", content_range)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)


def byte_range(header: str | None, size: int) -> tuple[int, int] | None:
    """
    Bytes `[start, stop)` that a `Range` header asks for; all of them without a header or with one that is not of the
    form `bytes=a-b`, `bytes=a-` or `bytes=-n`, which may be ignored. None if they lie outside the file.
    """
    unit, _, spec = (header or "").partition("=")
    first, dash, last = spec.strip().partition("-")
    numbers = [text for text in (first, last) if text]
    if unit.strip() != "bytes" or not dash or not numbers or not all(map(_is_count, numbers)):
        return 0, size
    if not first:
        length = min(int(last), size)
        return (size - length, size) if length else None
    start, stop = int(first), min(int(last) + 1, size) if last else size
    return (start, stop) if start < stop else None


def _is_count(text: str) -> bool:
    """A number in plain digits; `int` alone would take more, and very long ones take long."""
    return text.isascii() and text.isdigit() and len(text) < 19
