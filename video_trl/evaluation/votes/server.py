"""
The web server of a study: a voting page on this machine only, on Starlette and uvicorn (extra `vote`).

It serves three files of the package, a JSON interface, and the videos that a rater is shown, under names that do not
reveal the model. It serves nothing else: a request is never used as a path.
"""

import asyncio
import hmac
import json
import logging
import os
import secrets
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from http import HTTPStatus
from importlib import resources
from pathlib import Path
from typing import Any, Protocol


try:
    import uvicorn
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("The voting page needs Starlette and uvicorn: pip install 'video-trl[vote]'.") from error
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from .study import MAX_RATER_LENGTH, MAX_SECONDS, Study, Task, Vote, VoteFile, inside, open_study


logger = logging.getLogger(__name__)

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_PAGES = {
    "/": ("vote.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/vote.js": ("vote.js", "text/javascript"),
    "/vote.css": ("vote.css", "text/css"),
}
_MAX_BODY = 16_384
_MAX_CONNECTIONS = 200  # each may have a video open: far from the 1,024 files that a process may usually have
_MAX_VIDEOS = 100_000  # names of shown videos that are remembered
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; media-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Desk(Protocol):
    """What a page asks for, whatever it asks people: a question, the next pair of a rater, a file of a video."""

    def describe(self) -> dict[str, Any]:
        """What the page has to know before the first pair."""

    def show(self, rater: str, back: int = 0) -> dict[str, Any]:
        """The first pair without an answer of the rater, or the one that was answered `back` answers ago."""

    def take(self, body: Any) -> None:
        """Check one answer and write it."""

    def video(self, name: str) -> Path:
        """File of a video that was shown under this name."""

    def close(self) -> None:
        """Take no more answers."""


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
        check_host(host, allowed_hosts)
        self.study = study = open_study(run_dirs, questions)
        self._page = PageServer(
            lambda: _Desk(study, VoteFile(votes_path, study)),
            _PAGES,
            host=host,
            port=port,
            allowed_hosts=allowed_hosts,
        )
        self.port, self.url = self._page.port, self._page.url

    def __enter__(self) -> "VotingServer":
        self._page.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._page.__exit__(*error)

    def wait(self) -> None:
        """Returns when the server is closed or the process is interrupted."""
        self._page.wait()


def check_host(host: str, allowed_hosts: Sequence[str]) -> None:
    """Raises a ValueError for an address that other machines see, without names under which they may open the page."""
    if host not in _LOOPBACK and not allowed_hosts:
        raise ValueError(
            f"Listening on {host!r} shows the page to other machines, without a password. Listen on 127.0.0.1 and "
            "forward the port by ssh, or say by `allowed_hosts` under which names the page may be opened."
        )


class PageServer:
    """
    A page of the package with its desk, on this machine, in a thread.

    Args:
        open_desk (`Callable`): Makes the desk, once the address is taken.
        pages (`Mapping`): Path of the page's files to their names in `templates` and their media types.
        host, port, allowed_hosts: As of [`serve_votes`].

    Raises:
        ValueError: If the address cannot be listened on; and what `open_desk` raises.
    """

    def __init__(
        self,
        open_desk: Callable[[], Desk],
        pages: Mapping[str, tuple[str, str]],
        *,
        host: str,
        port: int,
        allowed_hosts: Sequence[str],
    ) -> None:
        check_host(host, allowed_hosts)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, port), family=family, backlog=_MAX_CONNECTIONS)
        except (OSError, OverflowError) as error:
            raise ValueError(f"Cannot listen on {host}:{port} ({error}). Pass another `port`.") from error
        try:
            self._desk = open_desk()
        except BaseException:
            self._socket.close()
            raise
        self.port = int(self._socket.getsockname()[1])
        self.url = f"http://{'[::1]' if host == '::1' else host}:{self.port}/"
        # A page elsewhere can point a name of its own at this machine; the browser then tells us that name.
        hosts = {f"{name}:{self.port}" for name in ("127.0.0.1", "localhost", "[::1]")}
        hosts |= {name if ":" in name else f"{name}:{self.port}" for name in allowed_hosts}
        config = uvicorn.Config(
            _Guard(_application(self._desk, pages), hosts),
            http=_Connection,
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            backlog=_MAX_CONNECTIONS,
            timeout_keep_alive=60,
            timeout_graceful_shutdown=5,
        )
        self._server = uvicorn.Server(config)
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "PageServer":
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.should_exit = True
        if self._thread is not None:
            self._thread.join()
        self._desk.close()

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


class OpaqueNames:
    """Names of pairs and videos that tell a page nothing. Those of an earlier start of the program mean nothing."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)
        self._videos: dict[str, Any] = {}

    def name(self, *parts: str) -> str:
        """The name of a thing that these parts identify."""
        return hmac.new(self._secret, json.dumps(parts).encode(), "sha256").hexdigest()[:32]

    def show(self, video: Any, *parts: str) -> str:
        """Path under which a page finds a video; what it stands for is remembered for as long as names are kept."""
        name = self.name(*parts)
        self._videos[name] = video
        while len(self._videos) > _MAX_VIDEOS:
            del self._videos[next(iter(self._videos))]
        return f"/video/{name}"

    def shown(self, name: str) -> Any:
        """
        Raises:
            HTTPException: If no video was shown under this name.
        """
        if name not in self._videos:
            raise HTTPException(HTTPStatus.NOT_FOUND, "No such video.")
        return self._videos[name]


def next_pair(answered: Sequence[str], waiting: Sequence[str], back: int) -> tuple[str | None, dict[str, int]]:
    """
    The first pair that waits, none if all are answered, or the one that was answered `back` answers ago; and how many
    are done, of how many.

    Raises:
        HTTPException: If so many have not been answered.
    """
    if back and len(answered) < back:
        raise HTTPException(HTTPStatus.CONFLICT, "There is no earlier pair.")
    pair = answered[-back] if back else next(iter(waiting), None)
    return pair, {"done": len(answered), "total": len(answered) + len(waiting)}


class _Desk:
    """Hands out pairs and takes votes; one request at a time."""

    def __init__(self, study: Study, votes: VoteFile) -> None:
        self.study, self._votes = study, votes
        self._lock, self._open = threading.Lock(), True
        self._names = OpaqueNames()  # of videos: the pair, and which of its runs

    def describe(self) -> dict[str, Any]:
        questions = [{"key": q.key, "text": q.text, "ties": q.ties} for q in self.study.questions]
        return {"questions": questions, "total": len(self.study.tasks)}

    def show(self, rater: str, back: int = 0) -> dict[str, Any]:
        """The first pair without a vote of the rater; with `back`, the pair that was voted on so many votes ago."""
        with self._lock:
            order, votes = self.study.order(rater), self._votes.of(rater)
            voted, waiting = ([key for key in order if (key in votes) == done] for done in (True, False))
            key, state = next_pair(voted, waiting, back)
            return state | {"task": None if key is None else self._view(rater, self.study.tasks[key])}

    def take(self, body: Any) -> None:
        """Checks and writes one vote."""
        if not isinstance(body, dict) or set(body) != {"rater", "task", "answers", "seconds"}:
            raise HTTPException(HTTPStatus.BAD_REQUEST, "A vote has rater, task, answers and seconds.")
        rater, answers, seconds = checked_rater(body["rater"]), body["answers"], body["seconds"]
        with self._lock:
            if not self._open:
                raise HTTPException(HTTPStatus.SERVICE_UNAVAILABLE, "The voting program was stopped.")
            tokens = {self._names.name(rater, key): key for key in self.study.tasks}
            if not isinstance(body["task"], str) or body["task"] not in tokens:
                raise HTTPException(HTTPStatus.CONFLICT, "The page is of an earlier start. Reload it.")
            task = self.study.tasks[tokens[body["task"]]]
            if not isinstance(answers, dict) or set(answers) != {q.key for q in self.study.questions}:
                raise HTTPException(HTTPStatus.BAD_REQUEST, "Every question needs an answer.")
            for question in self.study.questions:
                if answers[question.key] not in ("left", "right", *(("same",) if question.ties else ())):
                    raise HTTPException(HTTPStatus.BAD_REQUEST, f"{answers[question.key]!r} is no answer.")
            if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds < MAX_SECONDS:
                raise HTTPException(HTTPStatus.BAD_REQUEST, "`seconds` must be a number.")
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
                time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            )
            try:
                self._votes.add(vote)
            except (OSError, ValueError) as error:
                text = f"The vote could not be saved ({error}). It is not counted."
                raise HTTPException(HTTPStatus.INSUFFICIENT_STORAGE, text) from error

    def close(self) -> None:
        """Waits for the vote that is being written and takes no more."""
        with self._lock:
            self._open = False
            self._votes.close()

    def video(self, name: str) -> Path:
        """File of a video that was shown, checked again: a link may have been put in its place."""
        with self._lock:
            task, side = self._names.shown(name)
        run = task.a if side == "a" else task.b
        if not inside(run, task.case) or not run.video(task.case).is_file():
            raise HTTPException(HTTPStatus.NOT_FOUND, "The video is gone.")
        return run.video(task.case)

    def _view(self, rater: str, task: Task) -> dict[str, Any]:
        left = self.study.left(rater, task.key)
        right = "b" if left == "a" else "a"
        return {
            "task": self._names.name(rater, task.key),
            "prompt": task.case.prompt.text,
            "left": self._names.show((task, left), rater, task.key, left),
            "right": self._names.show((task, right), rater, task.key, right),
        }


def checked_rater(name: Any) -> str:
    """A rater's name without spaces around it."""
    text = name.strip() if isinstance(name, str) else ""
    if not 1 <= len(text) <= MAX_RATER_LENGTH or not text.isprintable():
        raise HTTPException(
            HTTPStatus.BAD_REQUEST, f"Your name must have 1 to {MAX_RATER_LENGTH} printable characters."
        )
    return text


class _Guard:
    """Turns away requests of other pages, and sends the headers that keep a page from running foreign code."""

    def __init__(self, app: ASGIApp, hosts: set[str]) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        headers, app = Headers(scope=scope), self.app
        if headers.get("Host") not in self.hosts:
            app = _json({"error": "The page is not served under this name."}, HTTPStatus.MISDIRECTED_REQUEST)
        # Another site's page can send forms here, but neither this origin nor this kind of content.
        elif scope["method"] == "POST" and headers.get("Origin") not in {f"http://{host}" for host in self.hosts}:
            app = _json({"error": "Votes are taken from the voting page only."}, HTTPStatus.FORBIDDEN)
        await app(scope, receive, guarded)


class _Connection(H11Protocol):
    """
    One of at most `_MAX_CONNECTIONS`. One more, and that one is closed whose last answer lies furthest back: whoever
    opens connections and says nothing, or a byte now and then, keeps nobody else out.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.since = self.loop.time()
        if len(self.connections) > _MAX_CONNECTIONS:
            oldest: Any = min(self.connections, key=lambda connection: connection.since)  # type: ignore[union-attr]
            self.connections.discard(oldest)
            oldest.transport.abort()

    def on_response_complete(self) -> None:
        self.since = self.loop.time()
        super().on_response_complete()

    def shutdown(self) -> None:
        """A request that is still not whole a moment after the server's end is given up."""
        super().shutdown()
        self.loop.call_later(1, self.transport.abort)


def _application(desk: Desk, pages: Mapping[str, tuple[str, str]]) -> Starlette:
    def page(request: Request) -> Response:
        name, kind = pages[request.url.path]
        return Response(resources.files("video_trl").joinpath(f"templates/{name}").read_bytes(), media_type=kind)

    def study(request: Request) -> Response:
        return _json(desk.describe())

    def task(request: Request) -> Response:
        back = request.query_params.get("back", "0")
        if not (back.isascii() and back.isdigit() and len(back) < 10):
            raise HTTPException(HTTPStatus.BAD_REQUEST, "`back` must be a number.")
        return _json(desk.show(checked_rater(request.query_params.get("rater")), int(back)))

    def video(request: Request) -> Response:
        return FileResponse(desk.video(request.path_params["name"]), media_type="video/mp4")

    async def vote(request: Request) -> Response:
        if request.headers.get("Content-Type", "").partition(";")[0].strip().lower() != "application/json":
            raise HTTPException(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "Expected JSON.")
        content = b""
        try:
            async for chunk in request.stream():
                content += chunk
                if len(content) > _MAX_BODY:
                    raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "A vote is smaller than that.")
            body = json.loads(content)
        except (ValueError, RecursionError, ClientDisconnect) as error:
            raise HTTPException(HTTPStatus.BAD_REQUEST, "The vote is not JSON.") from error
        await run_in_threadpool(desk.take, body)
        return _json({"saved": True})

    async def refuse(request: Request, error: Any) -> Response:
        return _json({"error": error.detail}, error.status_code)

    routes = [
        *(Route(path, page) for path in pages),
        Route("/api/study", study),
        Route("/api/task", task),
        Route("/video/{name}", video),
        Route("/api/vote", vote, methods=["POST"]),
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: refuse})
    app.router.redirect_slashes = False
    return app


def _json(content: Any, status: int = HTTPStatus.OK) -> Response:
    return Response(json.dumps(content), status, media_type="application/json")
