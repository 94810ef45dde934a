"""A real HTTP server on loopback that answers chat requests by a script, and misbehaves when the script says so."""

import gzip
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


GOOD = {
    "description_of_video": "A red ball falls.",
    "sa_reason": "It is red and it falls.",
    "sa": 5,
    "pc_reason": "It speeds up as it falls.",
    "pc": 3,
}


@dataclass(frozen=True)
class Step:
    """
    What to do with a request: an answer (text, or an object that goes into JSON), or a fault.

    Attributes:
        answer: content of the message.
        status: HTTP status; anything but 200 sends `body`.
        body: raw body instead of a chat completion.
        headers: further headers.
        delay: seconds before the first byte.
        fault: `"disconnect"` (close without a byte), `"cut"` (close in the middle), `"drip"` (a byte now and then, for
            a minute), `"drip headers"`, `"1xx"` (interim responses without end), `"endless"` (a body without end).
        finish: `finish_reason`.
        refusal: what the model says instead of answering.
    """

    answer: Any = field(default_factory=lambda: GOOD)
    status: int = 200
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    fault: str = ""
    finish: str = "stop"
    refusal: str | None = None

    def payload(self) -> bytes:
        if self.body is not None:
            return self.body
        content = self.answer if isinstance(self.answer, str) else json.dumps(self.answer)
        message = {"role": "assistant", "content": None if self.refusal else content, "refusal": self.refusal}
        choice = {"index": 0, "message": message, "finish_reason": self.finish}
        return json.dumps({"id": "x", "model": "tiny-vlm-0123", "choices": [choice]}).encode()


GZIP = {"Content-Encoding": "gzip"}
BOMB = gzip.compress(bytes(2**28))  # 256 MiB in 261 kB
# Replies that a client has to get over, each by itself, by asking again.
FAULTS = {
    **{f"status {code}": Step(status=code, body=b"oops") for code in (408, 409, 425, 429, 500, 502, 503, 504)},
    **{f"status {code}": Step(status=code, body=b"<html>") for code in (520, 521, 522, 524, 529, 599)},
    **{
        f"Retry-After: {value}": Step(status=429, headers={"Retry-After": value})
        for value in (
            "nan", "-nan", "inf", "-inf", "1e999", "-1", "soon", "", "9" * 500, "1_000_000_000",
            "Fri, 31 Dec 9999 23:59:59 GMT", "Fri, 31 Dec 99999 23:59:59 GMT", "Fri, 99 Dec 2026 23:59:59 GMT",
            "Mon, 01 Jan 0001 00:00:00 +2359", "Thu, 01 Jan 1970 00:00:00 GMT",
        )
    },
    "disconnect": Step(fault="disconnect"),
    "cut": Step(fault="cut"),
    "drip": Step(fault="drip"),
    "drip headers": Step(fault="drip headers"),
    "1xx": Step(fault="1xx"),
    "endless": Step(fault="endless"),
    "gzip bomb": Step(body=BOMB, headers=GZIP),
    "dripped gzip": Step(body=gzip.compress(b"{}" * 99), headers=GZIP, fault="drip"),
    "cut gzip": Step(body=BOMB[:1000], headers=GZIP),
    "not gzip": Step(headers=GZIP),
    "other packing": Step(headers={"Content-Encoding": "br"}),
    "two packings": Step(headers={"Content-Encoding": "gzip, gzip"}),
    "no packing": Step(headers={"Content-Encoding": "\u00e4\u00f6"}),
    "html": Step(body=b"<html>bad gateway</html>"),
    "list": Step(body=b"[1, 2]"),
    "number": Step(body=b"7"),
    "nothing": Step(body=b""),
    "bytes": Step(body=b"\xff\xfe\x00"),
    "deep": Step(body=b"[" * 200_000),
    "deep object": Step(body=b'{"a":' * 200_000),
    "no choices": Step(body=b'{"choices": []}'),
    "choices of another kind": Step(body=b'{"choices": [{"message": [1]}]}'),
    "surrogates": Step(body=b'{"model": "\\ud800", "choices": [{"message": {"content": "\\udfff\\ud800 red"}}]}'),
    "surrogates in a refusal": Step(refusal="no \ud800"),
    "deep answer": Step("[" * 100_000),
    "empty answer": Step(""),
    "answer of another kind": Step(body=b'{"choices": [{"message": {"content": [{"type": "text"}]}}]}'),
    "NaN": Step('{"description_of_video": NaN}'),
    "prose": Step("maybe"),
    "cut answer": Step(finish="length"),
}  # fmt: skip


class Server(ThreadingHTTPServer):
    """
    Attributes:
        script: steps in order, the last one repeats; or a function that makes one for a request.
        requests: parsed bodies, in order of arrival.
        headers_seen: headers of each request.
        busiest: most requests that were under way at once.
        times: when each arrived.
        whole: steps that were sent to their end, in this order.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, script: list[Step | Callable[[Any], Step]]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script, self.requests, self.headers_seen, self.times = script, [], [], []
        self.paths: list[str] = []
        self.whole: list[Step] = []
        self.busy = self.busiest = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            step = server.script[min(len(server.requests), len(server.script) - 1)]
            step = step if isinstance(step, Step) else step(body)
            server.requests.append(body)
            server.paths.append(self.path)
            server.headers_seen.append(dict(self.headers))
            server.times.append(time.monotonic())
            server.busy += 1
            server.busiest = max(server.busiest, server.busy)
        try:
            self._answer(step)
            server.whole.append(step)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client gave up
        finally:
            with server.lock:
                server.busy -= 1

    def _answer(self, step: Step) -> None:
        time.sleep(step.delay)
        payload = step.payload() + b" " * (1200 if step.fault == "drip" else 0)
        if step.fault == "disconnect":
            # Zero seconds of linger: the client sees a reset, as from a server that was killed.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            return
        if step.fault == "drip headers":
            self._drip(b"HTTP/1.1 200 OK\r\n" + b"X-Filler: x\r\n" * 1000)
            return
        if step.fault == "1xx":
            self._drip(b"HTTP/1.1 102 Processing\r\n\r\n" * 1000, piece=27)
            return
        self.send_response(step.status)
        if step.fault == "endless":
            self.end_headers()
            while True:
                self.wfile.write(bytes(2**16))
        for name, value in {"Content-Type": "application/json", **step.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        if step.fault == "cut":
            self.wfile.write(payload[: len(payload) // 2])
            self.close_connection = True
        elif step.fault == "drip":
            self._drip(payload)
        else:
            self.wfile.write(payload)

    def _drip(self, payload: bytes, piece: int = 1) -> None:
        self.close_connection = True
        for start in range(0, len(payload), piece):
            self.wfile.write(payload[start : start + piece])
            time.sleep(0.05)


@contextmanager
def serving(*script: Step | Callable[[Any], Step]) -> Iterator[Server]:
    """A server in a thread of its own, on a free port."""
    server = Server(list(script))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def free_port() -> int:
    """A port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
