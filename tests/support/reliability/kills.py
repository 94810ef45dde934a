"""Kill a piece of work by SIGKILL at random moments, start it again, and look at what it leaves."""

import multiprocessing
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


#: Names that are to be gone when the work is done.
LEFTOVERS = (".*.partial", ".*.replaced", "_partial-*", ".*.unfinished", "*.tmp")


@dataclass(frozen=True)
class Work:
    """
    Something that can be started again and does the rest.

    Args:
        name (`str`): What reports call it.
        start (`Callable`): Does the work in a folder; called in a process of its own, with its number.
        result (`Callable`): What the folder holds when it is done, to be compared.
        prepare (`Callable`): Makes what the work starts from, before the first start.
        processes (`int`): That work together. A kill takes all of them, or one, whose launcher ends the others.
    """

    name: str
    start: Callable[[Path, int], None]
    result: Callable[[Path], Any]
    prepare: Callable[[Path], None] = lambda folder: None
    processes: int = 1


@dataclass
class Outcome:
    """What came of killing: `faults` is to be empty."""

    kills: int = 0
    finished: int = 0
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)


def kill_again_and_again(work: Work, folder: Path, kills: int, seed: int = 0) -> Outcome:
    """
    Start, kill and start again until so many kills are done; whenever the work comes to its end, compare the result
    with that of work that was never killed, look for leftovers, and begin anew in another folder.
    """
    outcome, moments, start = Outcome(), random.Random(seed), time.monotonic()
    expected, duration = _straight(work, folder / "straight")
    number = 0
    while True:
        place = folder / str(number)
        place.mkdir(parents=True)
        work.prepare(place)
        while not _finishes(work, place, outcome, moments.uniform(0, duration) if outcome.kills < kills else None):
            if outcome.faults:
                return outcome
        outcome.finished += 1
        if work.result(place) != expected:
            outcome.faults.append(f"{work.name}: another result in {place} than without kills")
        outcome.faults += [f"{work.name} has left {path}" for path in leftovers(place)]
        if outcome.kills >= kills or outcome.faults:
            outcome.seconds = time.monotonic() - start
            return outcome
        number += 1


def leftovers(folder: Path) -> list[Path]:
    return [path for pattern in LEFTOVERS for path in folder.rglob(pattern)]


def forked(function: Callable[..., None], *arguments: Any) -> multiprocessing.Process:
    """A started process that inherits all that is imported; what it prints goes nowhere, but for a traceback."""

    def quietly() -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        before = os.dup(sys.stderr.fileno()) if sys.stderr is sys.__stderr__ else os.dup(2)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        try:
            function(*arguments)
        except BaseException:
            os.write(before, traceback.format_exc().encode())
            os._exit(1)
        os._exit(0)  # without the exit handlers of pytest

    process = multiprocessing.get_context("fork").Process(target=quietly)
    process.start()
    return process


def _straight(work: Work, folder: Path) -> tuple[Any, float]:
    """The result of work that is not killed, and how long it takes."""
    folder.mkdir(parents=True)
    work.prepare(folder)
    start = time.monotonic()
    processes = [forked(work.start, folder, rank) for rank in range(work.processes)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * work.processes, work.name
    return work.result(folder), time.monotonic() - start


def _finishes(work: Work, folder: Path, outcome: Outcome, seconds: float | None) -> bool:
    """Start the work, and kill it after so many seconds if it still runs. False if it was killed, or failed."""
    processes = [forked(work.start, folder, rank) for rank in range(work.processes)]
    deadline = time.monotonic() + (600 if seconds is None else seconds)
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        time.sleep(0.001)
    running = [process for process in processes if process.is_alive()]
    if not running:
        codes = [process.exitcode for process in processes]
        if any(codes):
            outcome.faults.append(f"{work.name} ended with {codes} in {folder} after {outcome.kills} kills")
        return not any(codes)
    if seconds is None:
        outcome.faults.append(f"{work.name} hangs in {folder} after {outcome.kills} kills")
    for process in running[: 1 if outcome.kills % 2 else None] + running:  # one that dies alone, then a machine
        process.kill()
        process.join()
    killed = any(process.exitcode == -signal.SIGKILL for process in processes)
    outcome.kills += killed
    return not killed
