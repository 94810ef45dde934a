"""
A blind side-by-side study of two or more runs: the pairs to compare, and the file of votes.

The page is served by `video_trl.evaluation.votes.server`, results are made by `video_trl.evaluation.votes.results`.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from ...files import fingerprint
from ..runs.run import Case, EvaluationRun, load_run
from .gsb import BAD, GOOD, SAME
from .held_file import HeldFile, read_lines


_FORMAT = 1
_KINDS: dict[str, type | tuple[type, ...]] = {"seed": int, "position": int, "seconds": (int, float), "answers": dict}
MAX_RATER_LENGTH, MAX_SECONDS = 64, 1e6
Side = Literal["left", "same", "right"]


@dataclass(frozen=True)
class VoteQuestion:
    """What raters are asked about a pair; without `ties` they have to choose a side."""

    key: str
    text: str
    ties: bool = True


QUESTIONS = {
    # Reg-DPO, appendix A.6
    "gsb": (
        VoteQuestion("video_quality", "Which video looks better and moves more smoothly?"),
        VoteQuestion("prompt_following", "Which video follows the sentence better?"),
    ),
    # The user study of PhyGDPO
    "physics": (VoteQuestion("physics", "Which video follows the laws of physics better?", ties=False),),
}


@dataclass(frozen=True)
class Task:
    """A pair of videos: the first run (A) against another one (B), for one prompt and seed."""

    key: str
    a: EvaluationRun
    b: EvaluationRun
    case: Case


@dataclass(frozen=True)
class Vote:
    """
    One rater's answers about one pair; a line of the file of votes.

    Attributes:
        study (`str`): Identity of the study.
        rater (`str`): Name the rater gave.
        task (`str`), prompt (`str`), seed (`int`): What was compared.
        a (`str`), b (`str`): Names of the two runs.
        left (`str`): `"a"` or `"b"`, whichever stood on the left for this rater.
        position (`int`): Place of the pair in the rater's order, from 0.
        answers (`dict[str, str]`): For each question `"good"`, `"same"` or `"bad"`, said of A.
        seconds (`float`): From showing the pair to the last answer.
        time (`str`): When, in UTC.
    """

    study: str
    rater: str
    task: str
    prompt: str
    seed: int
    a: str
    b: str
    left: str
    position: int
    answers: Mapping[str, str]
    seconds: float
    time: str


@dataclass(frozen=True)
class Study:
    """
    What is voted on: the first run against each other one, on the same prompts and seeds.

    Attributes:
        runs (`tuple[EvaluationRun, ...]`): Runs with distinct names; the first is A in every pair.
        kind (`str`): Key in `QUESTIONS`.
        videos (`dict[str, dict[str, str]]`): Content hash of each video, by run name and case.
    """

    runs: tuple[EvaluationRun, ...]
    kind: str
    videos: Mapping[str, Mapping[str, str]]

    @property
    def questions(self) -> tuple[VoteQuestion, ...]:
        return QUESTIONS[self.kind]

    @cached_property
    def tasks(self) -> dict[str, Task]:
        """Pairs by key."""
        first, *others = self.runs
        tasks = [
            Task(f"{number}/{case.key}", first, other, case)
            for number, other in enumerate(others, start=1)
            for case in first.cases
        ]
        return {task.key: task for task in tasks}

    @cached_property
    def identity(self) -> str:
        """Hash of the questions and of every video; votes of another study are refused."""
        return fingerprint([self.kind, list(self.videos.items())])

    def header(self) -> dict[str, Any]:
        """First line of the file of votes."""
        names = [run.name for run in self.runs]
        pairs = len(self.runs[0].cases)  # of each two runs
        return {
            "format": _FORMAT, "study": self.identity, "runs": names, "questions": self.kind, "pairs": pairs
        }  # fmt: skip

    def order(self, rater: str) -> list[str]:
        """Keys of all pairs in the rater's own random order; the same after a restart."""
        return sorted(self.tasks, key=lambda key: self._draw("order", rater, key))

    def left(self, rater: str, task: str) -> str:
        """`"a"` or `"b"`: which run stands on the left for this rater, as by a coin."""
        return "ab"[self._draw("side", rater, task)[0] & 1]

    def verdict(self, rater: str, task: str, side: Side) -> str:
        """A choice of side as a verdict about A."""
        if side == "same":
            return SAME
        return GOOD if (side == "left") == (self.left(rater, task) == "a") else BAD

    def _draw(self, *parts: str) -> bytes:
        return hashlib.blake2b(json.dumps([self.identity, *parts]).encode(), digest_size=16).digest()


def open_study(run_dirs: Sequence[str | os.PathLike[str]], kind: str = "gsb") -> Study:
    """
    Checks that the runs can be compared by people.

    Args:
        run_dirs (list of path): Two or more runs of the same prompts and seeds; the first is compared with each other.
        kind (`str`, *optional*, defaults to `"gsb"`): `"gsb"` (video quality and prompt following, with ties) or
            `"physics"` (one forced choice).

    Raises:
        ValueError: If there are fewer than two runs, names repeat, prompts or seeds differ, the kind is unknown, or a
            video is missing, unreadable or lies outside its run.
    """
    if kind not in QUESTIONS:
        raise ValueError(f"Unknown questions {kind!r}; expected one of {', '.join(QUESTIONS)}.")
    runs = tuple(load_run(folder) for folder in run_dirs)
    names = [run.name for run in runs]
    if len(runs) < 2 or len(set(names)) != len(names):
        raise ValueError(f"A vote compares two or more runs of distinct names, got {names}.")
    for run in runs[1:]:
        if [(case.prompt.text, case.seed) for case in run.cases] != [(c.prompt.text, c.seed) for c in runs[0].cases]:
            raise ValueError(
                f"{run.folder} has other prompts or seeds than {runs[0].folder}: their videos make no pairs. Generate "
                "both runs with the same prompts and seeds."
            )
    for run in runs:
        run.check_videos()
        outside = [case.key for case in run.cases if not inside(run, case)]
        if outside:
            raise ValueError(f"{run.folder}: video {outside[0]} leads out of the run. Copy the file into it.")
    return Study(runs, kind, {run.name: run.video_hashes() for run in runs})


def inside(run: EvaluationRun, case: Case) -> bool:
    """Whether the video, with all symbolic links followed, lies in its run."""
    return run.video(case).resolve().is_relative_to(run.folder.resolve())


class VoteFile:
    """
    The file of votes, held by one process, see [`~video_trl.evaluation.votes.held_file.HeldFile`].

    Args:
        path (path): JSON lines; made where needed.
        study ([`Study`]): What the votes are about.

    Raises:
        ValueError: If the file holds anything but votes of this study, or another process holds it.
    """

    def __init__(self, path: str | os.PathLike[str], study: Study) -> None:
        self.path, self.study = Path(path), study
        self._file = HeldFile(path, self._check, study.header())

    def add(self, vote: Vote) -> None:
        """
        Appends a vote; when this returns it is on the disk. A second vote on a pair replaces the first.

        Raises:
            ValueError: If the file was replaced by something else.
            OSError: If the vote cannot be written. The file is as it was.
        """
        self._file.add([asdict(vote)])

    def of(self, rater: str) -> dict[str, Vote]:
        """The rater's votes by task."""
        return {record["task"]: Vote(**record) for record in self._file.records if record["rater"] == rater}

    def close(self) -> None:
        """Lets the file go; votes that somebody removed meanwhile are put back."""
        self._file.close()

    def _check(self, content: bytes) -> list[dict[str, Any]]:
        header, votes = _parse(content, self.path)
        if header != self.study.header():
            raise ValueError(
                f"{self.path} holds votes about other videos or questions ({header}) than these runs "
                f"({self.study.header()}). Pass another file, or the runs of that one."
            )
        return [asdict(vote) for vote in votes]


def read_votes(path: str | os.PathLike[str]) -> tuple[dict[str, Any], list[Vote]]:
    """
    Header and votes of a file; of several votes of a rater on a pair the last one counts.

    Raises:
        ValueError: If the file is missing, is no file of votes, a line is damaged, or a vote belongs to another study.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise ValueError(
            f"There are no votes yet: expected the file {path}, which `video-trl vote RUN RUN` writes while people "
            "vote (--votes FILE names another)."
        ) from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read as a file of votes ({error}).") from error
    header, votes = _parse(content, Path(path))
    return header, list({(vote.rater, vote.task): vote for vote in votes}.values())


def _parse(content: bytes, path: Path) -> tuple[dict[str, Any], list[Vote]]:
    records = read_lines(content, path, "votes")
    header = records[0][1]
    if not (
        isinstance(header, dict)
        and header.get("format") == _FORMAT
        and header.keys() == {"format", "study", "runs", "questions", "pairs"}
        and isinstance(header["questions"], str)
        and header["questions"] in QUESTIONS
    ):
        raise ValueError(f"{path} is no file of votes in format {_FORMAT}: its first line must describe the study.")
    keys = {question.key for question in QUESTIONS[header["questions"]]}
    votes = []
    for number, record in records[1:]:
        try:
            vote = Vote(**record)
        except TypeError as error:
            raise ValueError(f"{path}: line {number} is no vote ({error}). Remove the line.") from error
        wrong = [name for name, value in record.items() if not isinstance(value, _KINDS.get(name, str))]
        if wrong or not 0 <= vote.seconds < MAX_SECONDS:
            wrong = wrong or ["seconds"]
            raise ValueError(f"{path}: line {number} is no vote ({wrong[0]}={record[wrong[0]]!r}). Remove the line.")
        if vote.study != header["study"]:
            raise ValueError(
                f"{path}: line {number} is a vote about study {vote.study}, not {header['study']} of the first line. "
                "Keep one file for each study: votes about different runs must not be joined."
            )
        if set(vote.answers) != keys or not all(answer in (GOOD, SAME, BAD) for answer in vote.answers.values()):
            raise ValueError(f"{path}: line {number} has answers {vote.answers} to the questions {sorted(keys)}.")
        votes.append(vote)
    return header, votes
