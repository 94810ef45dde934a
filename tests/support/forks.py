"""
Processes of Python that need not import torch, diffusers and the trainers again, which takes longer than what they do.

They are forked from a process that has imported them and done nothing else, one for each process of pytest. Apart
from that each is as `python -m MODULE ARGUMENT...` or `python -c CODE ARGUMENT...` would be: environment, `__main__`,
output and end of a fresh interpreter.
"""

import atexit
import contextlib
import gc
import importlib
import importlib.util
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import types
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from tests.support.paths import PYTHONPATH, ROOT


# The modules that the processes of the distributed tests consist of: importing them does nothing.
PRELOADED = [f"tests.support.distributed.{name}" for name in ("engine_runs", "repa_worker", "ring_worker", "worker")]
# What a test changes in the environment is not for the process that all others come from.
_ENVIRONMENT = dict(os.environ)


class Forked:
    """Processes at work; `output` and `errors` is what they have written so far, all together."""

    def __init__(self, pids: list[int], folder: Path, connection: Connection) -> None:
        self.pids, self._folder, self._connection = pids, folder, connection
        self.statuses: list[int] | None = None

    @property
    def output(self) -> str:
        return (self._folder / "output").read_text()

    @property
    def errors(self) -> str:
        return (self._folder / "errors").read_text()

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.statuses is None:
            for pid in self.pids:
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.kill(pid, number)

    def ended(self, seconds: float = 0.0) -> bool:
        """Whether all have ended, or do so in the next seconds; then `statuses` has their exit codes, as of Popen."""
        if self.statuses is None and self._connection.poll(seconds):
            self.statuses = json.loads(self._connection.recv_bytes())
        return self.statuses is not None

    def wait(self, seconds: float = 280.0) -> list[int]:
        """Exit codes; processes that take longer are killed."""
        if not self.ended(seconds):
            self.kill()
            self._connection.poll(60)
            raise TimeoutError(f"{self.pids} did not end within {seconds} seconds:\n{self.errors[-6000:]}")
        return self.statuses or []


def start(*command: str, environments: tuple[dict[str, str], ...] = ({},)) -> Forked:
    """
    A process for each environment, which is added to that of the test. They must have ended before others start, and
    what the imported libraries read from the environment as they were imported does not change.
    """
    folder = Path(tempfile.mkdtemp())
    for name in ("output", "errors"):
        (folder / name).touch()
    connection = _origin()
    assert not connection.poll(), "the processes before have not been waited for"
    variables = [{**os.environ, **environment} for environment in environments]
    connection.send_bytes(json.dumps([command, variables, str(folder)]).encode())
    return Forked(json.loads(connection.recv_bytes()), folder, connection)


@cache
def _origin() -> Connection:
    ours, theirs = multiprocessing.Pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, str(theirs.fileno())],
        env={**_ENVIRONMENT, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
    )
    theirs.close()
    atexit.register(process.wait)
    atexit.register(process.terminate)  # before
    return ours


def _serve(connection: Connection) -> None:
    """For each request, fork a process that forks those asked for, tells their ids and in the end their statuses."""
    for name in PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    while True:
        try:
            command, environments, folder = json.loads(connection.recv_bytes())
        except EOFError:
            return
        if watcher := os.fork():
            os.waitpid(watcher, 0)
            continue
        pids: list[int] = []
        for environment in environments:
            pids.append(os.fork())
            if not pids[-1]:
                connection.close()
                return _become(command, environment, Path(folder))
        connection.send_bytes(json.dumps(pids).encode())
        statuses: dict[int, int] = {}
        while len(statuses) < len(pids):
            pid, status = os.wait()
            statuses[pid] = os.waitstatus_to_exitcode(status)
            if statuses[pid] and len(pids) > 1:  # the others would wait for it
                for other in set(pids) - statuses.keys():
                    os.kill(other, signal.SIGTERM)
        connection.send_bytes(json.dumps([statuses[pid] for pid in pids]).encode())
        os._exit(0)


def _become(command: list[str], environment: dict[str, str], folder: Path) -> None:
    for name, number in (("output", 1), ("errors", 2)):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    random.seed()
    np.random.seed()
    how, what, *arguments = command
    module = types.ModuleType("__main__")
    module.__file__ = importlib.util.find_spec(what).origin if how == "-m" else None
    code = Path(module.__file__).read_text() if how == "-m" else what
    sys.modules["__main__"], sys.argv = module, [module.__file__ or "-c", *arguments]
    exec(compile(code, module.__file__ or "<string>", "exec"), module.__dict__)


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
