"""Nothing asks the network unasked: not when it is imported, not in a run of the sandbox, and no test does."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.network.sitecustomize import LOG_VARIABLE, attempts
from tests.support.paths import PYTHONPATH, ROOT


ELSEWHERE = "192.0.2.1"  # of no machine (RFC 5737)
TELEMETRY = (
    "HF_HUB_DISABLE_TELEMETRY",
    "HF_UPDATE_DOWNLOAD_COUNTS",
    "GRADIO_ANALYTICS_ENABLED",
    "RAY_USAGE_STATS_ENABLED",
    "WANDB_ERROR_REPORTING",
)
IMPORT_ALL = """
import importlib, pkgutil
import video_trl

for module in pkgutil.walk_packages(video_trl.__path__, "video_trl."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""
SANDBOX = """
from video_trl.cli import main

assert main(["eval", "--num_prompts", "1", "--num_inference_steps", "1", "--output_dir", "run"]) == 0
assert main(["score", "run", "--judge", "sandbox"]) == 0
assert main(["train", "sft", "--num_groups", "2", "--max_steps", "1", "--output_dir", "out"]) == 0
"""


def run(code: str, folder: Path, **variables: str) -> str:
    """What a process prints, in an environment without the settings that keep tests offline."""
    unset = ("HF_HUB_OFFLINE", *TELEMETRY)
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    command = [sys.executable, "-c", code]
    environment |= {"PYTHONPATH": PYTHONPATH, **variables}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("code", [IMPORT_ALL, SANDBOX], ids=["importing everything", "a run of the sandbox"])
def test_nothing_asks_the_network(tmp_path, code):
    log = tmp_path / "network.log"
    run(code, tmp_path, **{LOG_VARIABLE: str(log)})
    assert not log.exists() or log.read_text() == ""


def test_reports_of_use_are_off_unless_asked_for(tmp_path):
    code = f"import os, video_trl; print([os.environ.get(name) for name in {TELEMETRY!r}])"
    assert run(code, tmp_path).strip() == "['1', '0', 'False', '0', 'false']"
    assert run(code, tmp_path, WANDB_ERROR_REPORTING="true").strip() == "['1', '0', 'False', '0', 'true']"
    code = "import video_trl; from huggingface_hub import constants; print(constants.HF_HUB_DISABLE_TELEMETRY)"
    assert run(code, tmp_path).strip() == "True"


# ---- the guard of all tests -----------------------------------------------------------------------------------------


def datagram() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"hello", (ELSEWHERE, 53))


def connection() -> None:
    with socket.socket() as client:
        client.settimeout(1)
        client.connect_ex((ELSEWHERE, 80))


@pytest.mark.parametrize(
    "attempt",
    [
        connection,
        datagram,
        lambda: socket.create_connection((ELSEWHERE, 80), timeout=1),
        lambda: socket.getaddrinfo("example.invalid", 443),
        lambda: socket.gethostbyname("example.invalid"),
    ],
    ids=["connect", "datagram", "create_connection", "name", "old name"],
)
def test_an_attempt_fails_and_is_remembered(attempt):
    with pytest.raises(OSError, match="no network in tests"):
        attempt()
    assert attempts().startswith("socket.")


def test_an_attempt_of_another_process_fails_and_is_remembered(tmp_path):
    code = f"""
import socket

try:
    socket.create_connection(({ELSEWHERE!r}, 80), timeout=1)
except OSError as error:
    print(error)
"""
    assert "no network in tests" in run(code, tmp_path)
    assert ELSEWHERE in attempts()


def test_this_machine_can_be_reached():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for host in ("127.0.0.1", "localhost"):
            socket.create_connection((host, port), timeout=20).close()
    here, there = socket.socketpair()
    here.close()
    there.close()
    assert not attempts()


def test_who_swallows_the_error_fails_all_the_same(tmp_path):
    """By the fixture of `tests/conftest.py`, which every test has."""
    (tmp_path / "test_it.py").write_text(
        "import contextlib, socket\n\n\n"
        "def test_quiet():\n    pass\n\n\n"
        "def test_asks():\n    with contextlib.suppress(OSError):\n"
        f"        socket.create_connection(({ELSEWHERE!r}, 80), timeout=1)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "tests.conftest", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and f"socket.getaddrinfo {ELSEWHERE}" in done.stdout
    assert "2 passed, 1 error" in done.stdout
