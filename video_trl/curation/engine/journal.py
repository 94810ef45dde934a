"""
What a process is computing, on disk: when it is killed, by a decoder's crash or for its memory, what is left of the
journal says over which rows. Whether one of them is to blame, or the machine was switched off, shows when each is
computed once more in a process of its own.
"""

import json
import logging
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ...files import write_atomically


logger = logging.getLogger(__name__)

_SECONDS = 600.0  # for one row: a forked process may hang on a lock that a thread of this one held


@contextmanager
def noted(store: Path, index: int, keys: list[str], *, deaths: int = 0) -> Iterator[None]:
    """
    Rows that process `index` computes in the block, and how many processes were killed over them before. Only a kill
    leaves the note: an exception is told anyway.
    """
    note = store / f"computing-{index}.json"
    write_atomically(note, json.dumps({"keys": keys, "deaths": deaths}))
    try:
        yield
    finally:
        note.unlink(missing_ok=True)


def interrupted(store: Path) -> dict[str, int]:
    """
    Rows that processes, this one or others, were computing when they were killed, or are still computing; and how
    many processes had been killed over them before.
    """
    rows: dict[str, int] = {}
    for note in store.glob("computing-*.json"):
        try:
            content = json.loads(note.read_text())
        except FileNotFoundError:  # its process is done with them
            continue
        rows |= dict.fromkeys(content["keys"], content["deaths"])
    return rows


def forget(store: Path) -> None:
    """Removes all notes; to be called when nothing is left to compute."""
    for note in store.glob("computing-*.json"):
        note.unlink(missing_ok=True)


def death_of(function: Callable[[], object], seconds: float = _SECONDS) -> str | None:
    """
    Calls a function in a forked process.

    Returns:
        `str`, *optional*: How the process was killed, in words; None where it was not: the function returned, raised
            (as it will do here), or was not done within `seconds`.
    """

    def child() -> None:
        try:
            function()
        except Exception:
            logger.debug("failed alone", exc_info=True)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
        logger.warning("a trial of a row took more than %g s; the row is computed all the same", seconds)
        return None
    code = process.exitcode or 0
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}" if code else None
