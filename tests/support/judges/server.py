"""A real HTTP server on loopback that answers chat requests by a script, and misbehaves when the script says so."""

import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
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
        fault: `"disconnect"` (close without a byte), `"cut"` (close in the middle), `"drip"` (a byte now and then).
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


class Server(ThreadingHTTPServer):
    """
    Attributes:
        script: steps in order; the last one repeats.
        requests: parsed bodies, in order of arrival.
        headers_seen: headers of each request.
        busiest: most requests that were under way at once.
        times: when each arrived.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, script: list[Step]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script, self.requests, self.headers_seen, self.times = script, [], [], []
        self.paths: list[str] = []
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
            server.requests.append(body)
            server.paths.append(self.path)
            server.headers_seen.append(dict(self.headers))
            server.times.append(time.monotonic())
            server.busy += 1
            server.busiest = max(server.busiest, server.busy)
        try:
            self._answer(step)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client gave up
        finally:
            with server.lock:
                server.busy -= 1

    def _answer(self, step: Step) -> None:
        time.sleep(step.delay)
        payload = step.payload()
        if step.fault == "disconnect":
            # Zero seconds of linger: the client sees a reset, as from a server that was killed.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            return
        self.send_response(step.status)
        for name, value in {"Content-Type": "application/json", **step.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        if step.fault == "cut":
            self.wfile.write(payload[: len(payload) // 2])
            self.close_connection = True
        elif step.fault == "drip":
            for byte in payload:
                self.wfile.write(bytes([byte]))
                time.sleep(0.05)
        else:
            self.wfile.write(payload)


@contextmanager
def serving(*script: Step) -> Iterator[Server]:
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
