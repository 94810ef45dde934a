"""
A Hub on this machine: the HTTP protocol of huggingface.co, as far as `huggingface_hub`, `datasets` and `diffusers` use
it to make repositories, upload to them (regular files and LFS, in one part or several), list and download.

It keeps what it was sent in memory, knows one token, and can be told to fail.
"""

import base64
import contextlib
import hashlib
import itertools
import json
import math
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest


TOKEN = "hf_LoopbackSecretToken0123456789abcdef"
USER = "somebody"
PART = 2048  # bytes of one part of an upload in several parts


@dataclass
class Failure:
    """
    What to answer instead, to requests whose "METHOD path" matches the pattern.

    `status` 0 cuts the connection, after reading `read` bytes of the body; with status -1 headers drip without end. It
    happens `times` times, then no more.
    """

    pattern: str
    status: int
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    read: int = 0


@dataclass
class Repository:
    """Files by path in each commit, newest last; the first one is empty, as on the Hub."""

    private: bool = False
    commits: list[tuple[str, str, dict[str, bytes]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.commit("initial commit", {})

    def commit(self, message: str, files: dict[str, bytes]) -> str:
        digest = hashlib.sha1(repr((len(self.commits), message, sorted(files))).encode()).hexdigest()
        self.commits.append((digest, message, files))
        return digest

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1][2]

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit of a branch or id, and its files."""
        if revision == "main":
            return self.commits[-1][0], self.files
        return next(((oid, files) for oid, _, files in self.commits if oid == revision), None)


class HubServer(ThreadingHTTPServer):
    """The server; `repositories` by kind and name, such as `models/somebody/adapter`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.failures: list[Failure] = []
        self.requests: list[str] = []
        self.several_parts = False
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fail(self, pattern: str, status: int, times: int = 1, **options: Any) -> None:
        self.failures.append(Failure(pattern, status, times, **options))

    def model(self, name: str) -> Repository:
        return self.repositories[f"models/{USER}/{name}"]

    def dataset(self, name: str) -> Repository:
        return self.repositories[f"datasets/{USER}/{name}"]


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):  # a client that went away
            self.close_connection = True

    def do_any(self) -> None:
        path = unquote(urlsplit(self.path).path)
        with self.server.lock:
            self.server.requests.append(f"{self.command} {path}")
            failure = self._failure(f"{self.command} {path}")
        if failure is not None:
            self._fail(failure)
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for pattern, needs_token, answer in _ROUTES:
            found = re.fullmatch(pattern, f"{self.command} {path}")
            if found is not None:
                if needs_token and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    self.send(401, {"error": "Invalid username or password."})
                else:
                    answer(self, body, *found.groups())
                return
        self.send(404, {"error": f"no such page: {self.command} {path}"}, {"X-Error-Code": "EntryNotFound"})

    do_GET = do_HEAD = do_POST = do_PUT = do_any

    def _failure(self, request: str) -> Failure | None:
        for failure in self.server.failures:
            if failure.times > 0 and fnmatch(request, failure.pattern):
                failure.times -= 1
                return failure
        return None

    def _fail(self, failure: Failure) -> None:
        if failure.status < 0:
            with contextlib.suppress(OSError):
                self.wfile.write(b"HTTP/1.1 200 OK\r\n")
                for number in itertools.count():
                    self.wfile.write(f"X-{number}: 1\r\n".encode())
                    time.sleep(0.05)
        if failure.status == 0:
            self.rfile.read(failure.read)
            self.close_connection = True
            self.connection.close()
            return
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send(failure.status, {"error": f"told to answer {failure.status}"}, failure.headers)

    def send(self, status: int, content: Any = None, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        """Keep the test's output clean."""

    # ---- Making repositories ----

    def whoami(self, body: bytes) -> None:
        self.send(200, {"name": USER, "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        owner = asked.get("organization") or USER
        if owner != USER:
            self.send(403, {"error": f"You don't have the rights to create a model under the namespace {owner!r}"})
            return
        kind = f"{asked.get('type', 'model')}s"
        key = f"{kind}/{owner}/{asked['name']}"
        prefix = "" if kind == "models" else f"{kind}/"
        answer = {"url": f"{self.server.url}/{prefix}{owner}/{asked['name']}"}
        with self.server.lock:
            if key in self.server.repositories:
                self.send(409, answer | {"error": "You already created this repo"})
                return
            self.server.repositories[key] = Repository(private=asked.get("visibility") == "private")
        self.send(200, answer)

    def validate(self, body: bytes) -> None:
        import yaml

        text = json.loads(body)["content"]
        warnings = [] if text.startswith("---\n") else [{"message": "empty or missing yaml metadata in repo card"}]
        front = {} if warnings else yaml.safe_load(text.split("---\n")[1])
        errors = [
            {"message": f'"{name}" must be a list'}
            for name in ("tags", "datasets", "widget", "model-index")
            if not isinstance(front.get(name, []), list)
        ]
        self.send(400 if errors else 200, {"errors": errors, "warnings": warnings})

    # ---- Uploading ----

    def preupload(self, body: bytes, kind: str, name: str, revision: str) -> None:
        repository = self.server.repositories.get(f"{kind}/{name}")
        if repository is None:
            self._no_repository()
            return
        answers = []
        for asked in json.loads(body)["files"]:
            large = asked["size"] > 1_000_000 or asked["path"].endswith((".safetensors", ".mp4", ".parquet", ".pt"))
            known = repository.files.get(asked["path"])
            answer = {"path": asked["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            answers.append(answer | ({} if known is None else {"oid": _oid(asked["path"], known)}))
        self.send(200, {"files": answers})

    def batch(self, body: bytes, name: str) -> None:
        answers = []
        for asked in json.loads(body)["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.server.blobs:
                verify = {"href": f"{self.server.url}/lfs/verify", "header": {}}
                upload: dict[str, Any] = {"href": f"{self.server.url}/lfs/{asked['oid']}", "header": {}}
                if self.server.several_parts:
                    parts = range(1, math.ceil(asked["size"] / PART) + 1)
                    upload["header"] = {str(n): f"{self.server.url}/lfs/{asked['oid']}/{n}" for n in parts}
                    upload["header"]["chunk_size"] = str(PART)
                    upload["href"] = f"{self.server.url}/lfs/complete"
                answer["actions"] = {"upload": upload, "verify": verify}
            answers.append(answer)
        transfer = "multipart" if self.server.several_parts else "basic"
        self.send(200, {"transfer": transfer, "objects": answers})

    def store(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self.send(400, {"error": "the content has another hash"})
            return
        self.server.blobs[oid] = body
        self.send(200, {})

    def store_part(self, body: bytes, oid: str, number: str) -> None:
        self.server.parts[oid, int(number)] = body
        self.send(200, {}, {"ETag": hashlib.md5(body).hexdigest()})

    def complete(self, body: bytes) -> None:
        asked = json.loads(body)
        stored = [self.server.parts[asked["oid"], part["partNumber"]] for part in asked["parts"]]
        assert [hashlib.md5(part).hexdigest() for part in stored] == [part["etag"] for part in asked["parts"]]
        self.store(b"".join(stored), asked["oid"])

    def verify(self, body: bytes) -> None:
        asked = json.loads(body)
        whole = len(self.server.blobs.get(asked["oid"], b"")) == asked["size"]
        self.send(200 if whole else 404, {})

    def commit(self, body: bytes, kind: str, name: str, revision: str) -> None:
        repository = self.server.repositories[f"{kind}/{name}"]
        header, *operations = (json.loads(line) for line in body.splitlines())
        files = dict(repository.files)
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.server.blobs:
                    self.send(400, {"error": f"{value['path']} was not uploaded"})
                    return
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
            else:
                files = {path: data for path, data in files.items() if not path.startswith(value["path"])}
        with self.server.lock:
            oid = repository.commit(header["value"]["summary"], files)
        self.send(200, {"commitUrl": f"{self.server.url}/{name}/commit/{oid}", "commitOid": oid, "success": True})

    # ---- Listing and downloading ----

    def info(self, body: bytes, kind: str, name: str, revision: str | None = None) -> None:
        found = self._at(f"{kind}/{name}", revision or "main")
        if found is None:
            return
        oid, files = found
        content: dict[str, Any] = {
            "id": name,
            "modelId": name,
            "sha": oid,
            "private": False,
            "tags": [],
            "downloads": 0,
        }
        content["siblings"] = [{"rfilename": path} for path in sorted(files)]
        card = files.get("README.md", b"").decode()
        if card.startswith("---\n"):
            import yaml

            content["cardData"] = yaml.safe_load(card.split("---\n")[1])
        self.send(200, content)

    def tree(self, body: bytes, kind: str, name: str, revision: str, folder: str | None = None) -> None:
        found = self._at(f"{kind}/{name}", revision)
        if found is None:
            return
        prefix = f"{folder.strip('/')}/" if folder and folder.strip("/") else ""
        listed: dict[str, dict[str, Any]] = {}
        for path, data in sorted(found[1].items()):
            if not path.startswith(prefix):
                continue
            inner = path.removeprefix(prefix)
            if "/" in inner and "recursive=true" not in self.path.lower():
                top = prefix + inner.split("/")[0]
                listed[top] = {"type": "directory", "path": top, "oid": "0" * 40, "size": 0}
            else:
                listed[path] = _entry(path, data)
        if prefix and not listed:
            self.send(404, {"error": "no such folder"}, {"X-Error-Code": "EntryNotFound"})
            return
        self.send(200, list(listed.values()))

    def paths_info(self, body: bytes, kind: str, name: str, revision: str) -> None:
        found = self._at(f"{kind}/{name}", revision)
        if found is None:
            return
        if self.headers.get("Content-Type", "").startswith("application/json"):
            asked = json.loads(body)["paths"]
        else:
            from urllib.parse import parse_qs

            asked = parse_qs(body.decode()).get("paths", [])
        entries = []
        for path in asked:
            if path in found[1]:
                entries.append(_entry(path, found[1][path]))
            elif any(name.startswith(f"{path}/") for name in found[1]):
                entries.append({"type": "directory", "path": path, "oid": "0" * 40, "size": 0})
        self.send(200, entries)

    def resolve(self, body: bytes, kind: str | None, name: str, revision: str, path: str) -> None:
        found = self._at(f"{kind or 'models'}/{name}", revision)
        if found is None:
            return
        oid, files = found
        if path not in files:
            self.send(404, {"error": "no such file"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": oid})
            return
        data = files[path]
        etag = f'"{_oid(path, data)}"'
        headers = {"X-Repo-Commit": oid, "ETag": etag}
        if _is_large(path):  # the Hub sends one on to where large files are
            self.server.blobs[hashlib.sha256(data).hexdigest()] = data
            # Another host, as on the Hub: a client takes what is said about the file from here.
            place = f"http://localhost:{self.server.server_port}/cdn/{hashlib.sha256(data).hexdigest()}"
            self.send(302, b"", headers | {"Location": place, "X-Linked-Etag": etag, "X-Linked-Size": str(len(data))})
            return
        self.send(200, data, headers)

    def blob(self, body: bytes, oid: str) -> None:
        data = self.server.blobs[oid]
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is None:
            self.send(200, data, {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})
            return
        first, last = int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1)
        self.send(206, data[first : last + 1], {"Content-Range": f"bytes {first}-{last}/{len(data)}"})

    def _at(self, key: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        repository = self.server.repositories.get(key)
        if repository is None or (repository.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            self._no_repository()
            return None
        found = repository.at(revision)
        if found is None:
            self.send(404, {"error": "no such revision"}, {"X-Error-Code": "RevisionNotFound"})
        return found

    def _no_repository(self) -> None:
        self.send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})


def _is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".mp4", ".parquet", ".pt"))


def _oid(path: str, data: bytes) -> str:
    """Git's id of a regular file, SHA-256 of a large one."""
    if _is_large(path):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entry(path: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": _oid(path, data)}
    if _is_large(path):
        entry["lfs"] = {"oid": _oid(path, data), "size": len(data), "pointerSize": 130}
    return entry


_KIND, _NAME = "(models|datasets)", r"([\w.-]+/[\w.-]+)"
_ROUTES = [  # "METHOD path", whether it needs a token, what answers
    (r"GET /api/whoami-v2", True, _Handler.whoami),
    (r"POST /api/repos/create", True, _Handler.create),
    (r"POST /api/validate-yaml", False, _Handler.validate),
    (rf"POST /api/{_KIND}/{_NAME}/preupload/([^/]+)", True, _Handler.preupload),
    (rf"POST /(?:datasets/)?{_NAME}\.git/info/lfs/objects/batch", True, _Handler.batch),
    (r"PUT /lfs/(\w+)", False, _Handler.store),
    (r"PUT /lfs/(\w+)/(\d+)", False, _Handler.store_part),
    (r"POST /lfs/complete", False, _Handler.complete),
    (r"POST /lfs/verify", False, _Handler.verify),
    (rf"POST /api/{_KIND}/{_NAME}/commit/([^/]+)", True, _Handler.commit),
    (rf"GET /api/{_KIND}/{_NAME}(?:/revision/([^/]+))?", False, _Handler.info),
    (rf"GET /api/{_KIND}/{_NAME}/tree/([^/]+)/?(.*)", False, _Handler.tree),
    (rf"POST /api/{_KIND}/{_NAME}/paths-info/([^/]+)", False, _Handler.paths_info),
    (rf"(?:GET|HEAD) /(?:(datasets)/)?{_NAME}/resolve/([^/]+)/(.+)", False, _Handler.resolve),
    (r"(?:GET|HEAD) /cdn/(\w+)", False, _Handler.blob),
]


@contextmanager
def serving() -> Iterator[HubServer]:
    """A Hub that runs until the end of the block."""
    with HubServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()


class Clock:
    """Stands in for the module `time` where a client waits between attempts: `waits` holds for how long it would."""

    def __init__(self, real: Any) -> None:
        self._real, self.waits = real, []

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def use(server: HubServer, monkeypatch: pytest.MonkeyPatch, token: str | None = TOKEN) -> Clock:
    """Make huggingface_hub, in this process, talk to a server, with a token, and without waiting."""
    import time

    from huggingface_hub import constants, hf_api
    from huggingface_hub.utils import _http

    from video_trl.hub import upload

    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(hf_api.api, "endpoint", server.url)  # behind the module's functions
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    clock = Clock(time)
    monkeypatch.setattr(_http, "time", clock)
    monkeypatch.setattr(upload, "time", clock)
    if token is None:
        monkeypatch.delenv("HF_TOKEN", raising=False)
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    return clock
