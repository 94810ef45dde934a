"""SIGKILL at random moments: nothing is lost, results are equal bit for bit, nothing is left behind."""

import logging

import pytest

from tests.support.hub_server import serving, use
from tests.support.reliability.kills import Work, forked, kill_again_and_again, leftovers
from tests.support.reliability.works import WORKS, push_to


logger = logging.getLogger(__name__)

QUICK, LONG = 2, 40


def attack(work: Work, folder, kills: int) -> None:
    outcome = kill_again_and_again(work, folder, kills)
    logger.info(
        "%s: %d kills, %d times finished, %.0f s, faults: %s",
        work.name, outcome.kills, outcome.finished, outcome.seconds, outcome.faults or "none",
    )  # fmt: skip
    assert not outcome.faults and outcome.kills == kills


@pytest.mark.parametrize("name", [name for name in WORKS if name not in ("training, 2 processes", "evaluation")])
def test_some_kills(tmp_path, name):
    attack(WORKS[name], tmp_path, QUICK)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", WORKS)
def test_many_kills(tmp_path, name):
    attack(WORKS[name], tmp_path, LONG)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_kills_while_pushing(tmp_path, monkeypatch):
    with serving() as server:
        use(server, monkeypatch)
        attack(push_to(server), tmp_path, LONG)


def test_the_kills_would_find_what_is_not_whole_and_what_is_left(tmp_path):
    """Work that writes in place, and goes on from what it finds, ends with another result, or leaves its file."""

    def careless(folder, rank):
        for number in range(40):
            path = folder / f"{number}.txt"
            if not path.exists():
                with open(path, "w") as file:
                    for _ in range(40):
                        file.write("x" * 100)
                        file.flush()
        (folder / ".0.partial").touch()

    work = Work("careless", careless, lambda folder: {p.name: p.stat().st_size for p in folder.glob("*.txt")})
    assert kill_again_and_again(work, tmp_path, 20).faults
    process = forked(careless, tmp_path, 0)
    process.join()
    assert process.exitcode == 0 and leftovers(tmp_path)
