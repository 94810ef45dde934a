"""
No network for tests: a process that imports this file reaches no machine but this one, and what it tries is written
down, for those who swallow the error.

Python imports a file of this name when it starts, so this folder in `PYTHONPATH` guards every process that a test
starts. Sockets that are not Python's own (gloo, a browser, Hugging Face's Xet) are not seen.

Nor does such a process wait for a disk. No test cuts the power, and what a killed process has written is there.
"""

import errno
import os
import sys
from typing import Any


#: File that attempts are written to, a line each.
LOG_VARIABLE = "VIDEO_TRL_TESTS_NETWORK_LOG"
# Events of Python's audit: with a socket and an address, a tuple if it is of a network; and with a host's name.
_SENT = {"socket.connect", "socket.sendto", "socket.sendmsg"}
_ASKED = {"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"}
_HERE = {"", "localhost", "::", "::1", "0.0.0.0"}


def attempts() -> str:
    """What was tried since the last call, by this process and those that it has started."""
    with open(os.environ[LOG_VARIABLE], "a+", encoding="utf-8") as file:
        file.seek(0)
        tried = file.read()
        file.truncate(0)
    return tried


def _guard(event: str, arguments: tuple[Any, ...]) -> None:
    if event in _SENT and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    elif event in _ASKED:
        host = arguments[0]
    else:
        return
    name = host.decode(errors="replace") if isinstance(host, bytes) else host
    if not isinstance(name, str) or name in _HERE or name.startswith(("127.", "::ffff:127.")):
        return
    if name.partition(".")[0] == os.uname().nodename.partition(".")[0]:
        return
    if path := os.environ.get(LOG_VARIABLE):
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{event} {name} by {sys.argv[:1]}\n")
    raise OSError(errno.ENETUNREACH, f"no network in tests: {event} {name}")


sys.addaudithook(_guard)
os.fsync = os.fstat  # looks at the descriptor as well; `posix.fsync` is the real one
