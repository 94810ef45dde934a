"""
Marks from 1 to 5 for both videos of a pair, in several dimensions: the second strategy of Reg-DPO, appendix A.1.

The pairs are those of [`~video_trl.curation.annotated.pairs_to_mark`], the file of marks is what
[`~video_trl.curation.annotated.read_votes`] reads.
"""

import hashlib
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException

from ...data.video_io import VideoDecodeError, probe_video
from ...files import read_csv, read_json_lines
from .held_file import HeldFile, read_lines
from .server import OpaqueNames, PageServer, checked_rater, next_pair


logger = logging.getLogger(__name__)

#: Dimensions of Reg-DPO and what raters are asked in each; the names are those of `curation.annotated.DIMENSIONS`.
MARKED = {
    "image_quality": "How good is each picture: sharp, clean, well lit?",
    "motion_quality": "How good is the motion: smooth, natural, without breaks?",
    "reference_consistency": "How well does it keep to its first picture: the same things, the same look?",
    "instruction_adherence": "How well does it show what the sentence says?",
    "overall_quality": "How good is the video as a whole?",
}
_PAGES = {
    "/": ("marks.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/marks.js": ("marks.js", "text/javascript"),
    "/vote.css": ("vote.css", "text/css"),
}
_PAIR = ("pair_id", "prompt", "video_a", "video_b")
_SIDES = ("video_a", "video_b")


@dataclass(frozen=True)
class Pair:
    """Two videos of one prompt."""

    pair_id: str
    prompt: str
    video_a: str
    video_b: str


def read_pairs(path: str | os.PathLike[str]) -> list[Pair]:
    """
    Pairs of a `.csv` or `.jsonl` file with the columns `pair_id`, `prompt`, `video_a` and `video_b`; paths of videos
    are relative to the file.

    Raises:
        ValueError: Another kind of file, no pair, a value or a video that is missing, a file that is no video, or an
            id given twice.
    """
    path = Path(path)
    if path.suffix not in (".csv", ".jsonl"):
        raise ValueError(f"{path}: expected pairs in a .csv or .jsonl file.")
    rows: list[Any] = read_csv(path) if path.suffix == ".csv" else [row for _, row in read_json_lines(path)]
    pairs: dict[str, Pair] = {}
    for number, row in enumerate(rows):
        missing = [name for name in _PAIR if not isinstance(row, dict) or row.get(name) in (None, "")]
        if missing:
            raise ValueError(f"{path}, pair {number}: expected values for {missing}, got {row}.")
        # Absolute: a second start from another folder must not take the same video for another one.
        videos = (os.path.abspath(path.parent / str(row[side])) for side in _SIDES)
        pair = Pair(str(row["pair_id"]), str(row["prompt"]), *videos)
        gone = [video for video in (pair.video_a, pair.video_b) if not Path(video).is_file()]
        if gone or pair.pair_id in pairs:
            reason = f"there is no file {gone[0]}" if gone else f"the pair_id {pair.pair_id!r} stands there twice"
            raise ValueError(f"{path}, pair {number}: {reason}.")
        try:
            for video in (pair.video_a, pair.video_b):
                probe_video(video)  # the page shows it to people: no other file of this machine
        except VideoDecodeError as error:
            raise ValueError(f"{path}, pair {number}: {error}") from error
        pairs[pair.pair_id] = pair
    if not pairs:
        raise ValueError(f"{path}: expected at least one pair, got none.")
    return list(pairs.values())


class MarkFile:
    """
    The file of marks, held by one process, see [`~video_trl.evaluation.votes.held_file.HeldFile`]. A line for each
    video, rater and pair. Marks that are given again are further lines with `"correction": true`: the last one counts.

    Args:
        path (path): JSON lines; made where needed.
        dimensions (`Sequence[str]`): Every line has a mark in each.

    Raises:
        ValueError: If the file holds anything but marks in these dimensions, or another process holds it.
    """

    def __init__(self, path: str | os.PathLike[str], dimensions: Sequence[str]) -> None:
        self.path, self.dimensions = Path(path), tuple(dimensions)
        self._file = HeldFile(path, self._check)

    def of(self, rater: str) -> list[str]:
        """Ids of the pairs that the rater has marked, in the order of the file."""
        return list(dict.fromkeys(row["pair_id"] for row in self._file.records if row["annotator"] == rater))

    def add(self, rater: str, pair: Pair, marks: Mapping[str, Mapping[str, int]]) -> None:
        """
        Raises:
            ValueError: If the file was replaced by something else.
            OSError: If the marks cannot be written; the file is as it was.
        """
        again = {"correction": True} if pair.pair_id in self.of(rater) else {}
        self._file.add(
            [
                {"pair_id": pair.pair_id, "video": _file_of(pair, side), "annotator": rater, "prompt": pair.prompt}
                | dict(marks[side])
                | again
                for side in _SIDES
            ]
        )

    def close(self) -> None:
        """Lets the file go; marks that somebody removed meanwhile are put back."""
        self._file.close()

    def _check(self, content: bytes) -> list[dict[str, Any]]:
        texts, rows = ("pair_id", "video", "annotator", "prompt"), []
        for number, row in read_lines(content, self.path, "marks"):
            there = row if isinstance(row, dict) else {}
            wrong = [name for name in texts if not isinstance(there.get(name), str)]
            wrong += [name for name in self.dimensions if there.get(name) not in range(1, 6)]
            if wrong:
                raise ValueError(
                    f"{self.path}, line {number}: no mark of these dimensions: expected texts in {', '.join(texts)} "
                    f"and 1 to 5 in {', '.join(self.dimensions)}; {wrong[0]} is {there.get(wrong[0])!r}."
                )
            rows.append(there)
        return rows


def _file_of(pair: Pair, side: str) -> str:
    return pair.video_a if side == "video_a" else pair.video_b


class MarkingDesk:
    """Hands out pairs and takes marks; one request at a time. See [`~video_trl.evaluation.votes.server.Desk`]."""

    def __init__(self, pairs: Sequence[Pair], marks: MarkFile, questions: Mapping[str, str]) -> None:
        self._pairs, self._marks, self._questions = {pair.pair_id: pair for pair in pairs}, marks, dict(questions)
        self._lock, self._open = threading.Lock(), True
        self._names = OpaqueNames()

    def describe(self) -> dict[str, Any]:
        return {"questions": [{"key": key, "text": text} for key, text in self._questions.items()]}

    def order(self, rater: str) -> list[str]:
        """The pairs in an order of the rater's own, always the same one."""
        return sorted(self._pairs, key=lambda pair: hashlib.sha256(f"{rater}\0{pair}".encode()).digest())

    def show(self, rater: str, back: int = 0) -> dict[str, Any]:
        with self._lock:
            marked = [pair for pair in self._marks.of(rater) if pair in self._pairs]
            waiting = [pair for pair in self.order(rater) if pair not in marked]
            name, state = next_pair(marked, waiting, back)
            return state | {"task": None if name is None else self._view(rater, self._pairs[name])}

    def take(self, body: Any) -> None:
        if not isinstance(body, dict) or set(body) != {"rater", "task", "answers"}:
            raise HTTPException(HTTPStatus.BAD_REQUEST, "Marks have rater, task and answers.")
        rater, answers = checked_rater(body["rater"]), body["answers"]
        with self._lock:
            if not self._open:
                raise HTTPException(HTTPStatus.SERVICE_UNAVAILABLE, "The marking program was stopped.")
            of_token = {self._names.name(rater, name): pair for name, pair in self._pairs.items()}
            if not isinstance(body["task"], str) or body["task"] not in of_token:
                raise HTTPException(HTTPStatus.CONFLICT, "The page is of an earlier start. Reload it.")
            pair = of_token[body["task"]]
            if not isinstance(answers, dict) or set(answers) != {"left", "right"}:
                raise HTTPException(HTTPStatus.BAD_REQUEST, "Both videos need marks.")
            for marks in answers.values():
                if not isinstance(marks, dict) or set(marks) != set(self._questions):
                    raise HTTPException(HTTPStatus.BAD_REQUEST, "Every question needs a mark for both videos.")
                if any(isinstance(mark, bool) or mark not in (1, 2, 3, 4, 5) for mark in marks.values()):
                    raise HTTPException(HTTPStatus.BAD_REQUEST, "A mark is a whole number from 1 to 5.")
            left, right = self._sides(rater, pair)
            try:
                self._marks.add(rater, pair, {left: answers["left"], right: answers["right"]})
            except (OSError, ValueError) as error:
                text = f"The marks could not be saved ({error}). They are not counted."
                raise HTTPException(HTTPStatus.INSUFFICIENT_STORAGE, text) from error

    def video(self, name: str) -> Path:
        with self._lock:
            path = Path(self._names.shown(name))
            if not path.is_file():
                raise HTTPException(HTTPStatus.NOT_FOUND, "No such video.")
            return path

    def close(self) -> None:
        with self._lock:
            self._open = False
            self._marks.close()

    def _sides(self, rater: str, pair: Pair) -> tuple[str, str]:
        """Which of the two videos stands on the left for this rater, and which on the right."""
        swapped = hashlib.sha256(f"side\0{rater}\0{pair.pair_id}".encode()).digest()[0] % 2
        return (_SIDES[1], _SIDES[0]) if swapped else _SIDES

    def _view(self, rater: str, pair: Pair) -> dict[str, Any]:
        left, right = (
            self._names.show(_file_of(pair, side), rater, pair.pair_id, side) for side in self._sides(rater, pair)
        )
        return {"task": self._names.name(rater, pair.pair_id), "prompt": pair.prompt, "left": left, "right": right}


class MarkingServer:
    """
    Serves the marking page until it is closed.

    Args:
        pairs_path (path): File of pairs, see [`read_pairs`].
        marks_path (path): File of marks (.jsonl), new or of the same dimensions.
        dimensions (`Sequence[str]`): Some of `MARKED`; leave `reference_consistency` out for text to video.
        host, port, allowed_hosts: As of [`~video_trl.evaluation.votes.server.serve_votes`].

    Raises:
        ValueError: A file that cannot be used, an unknown dimension, or an address that cannot be listened on.
    """

    def __init__(
        self,
        pairs_path: str | os.PathLike[str],
        marks_path: str | os.PathLike[str],
        *,
        dimensions: Sequence[str] = tuple(MARKED),
        host: str = "127.0.0.1",
        port: int = 8321,
        allowed_hosts: Sequence[str] = (),
    ) -> None:
        unknown = [name for name in dimensions if name not in MARKED]
        if unknown or not dimensions or Path(marks_path).suffix != ".jsonl":
            raise ValueError(
                f"Expected dimensions among {', '.join(MARKED)} and a .jsonl file of marks, got {list(dimensions)} "
                f"and {os.fspath(marks_path)}."
            )
        pairs = read_pairs(pairs_path)
        questions = {name: MARKED[name] for name in dimensions}
        self._page = PageServer(
            lambda: MarkingDesk(pairs, MarkFile(marks_path, dimensions), questions),
            _PAGES,
            host=host,
            port=port,
            allowed_hosts=allowed_hosts,
        )
        self.port, self.url = self._page.port, self._page.url

    def __enter__(self) -> "MarkingServer":
        self._page.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._page.__exit__(*error)

    def serve(self) -> None:
        """Until Ctrl-C."""
        with self:
            try:
                logger.warning("Mark at %s (Ctrl-C ends it)", self.url)
                self._page.wait()
            except KeyboardInterrupt:
                logger.warning("Stopped. All marks that were given are saved.")
