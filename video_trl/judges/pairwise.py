"""
Which of two videos is better, by a vision-language model on a server: segment by segment, and in both orders.

Models judge a few seconds poorly and one second better, and prefer what they see first. So both videos are cut into
segments of equal times, each pair of segments is shown in both orders, and a vote counts only where the two answers
agree; the majority of the segments decides. DenseDPO (https://huggingface.co/papers/2506.03517, Table 3 and A.6)
reports 53.5 % agreement with people for whole videos of 5 s, 70.6 % by segments, and some 10 points for both orders.
"""

import contextlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, model_validator
from tqdm.auto import tqdm

from .answers import AsWord, with_texts
from .base import Video
from .chat import ChatClient, ChatError, ChatQuestion
from .frames import check_request, evenly_spaced, frame_rate, quoted, sample_frames, size_within
from .precomputed import SUFFIXES, read_table
from .score_table import append_rows, write_rows
from .weights import text_hash


Preference = Literal["a", "b", "same"]
_COLUMNS = ("chosen", "rejected", "prompt", "preference", "judge", "details")
_START = '\n{"pair": ["'  # of a file of unfinished verdicts


class Comparison(BaseModel):
    """What the model has to answer; the reason comes first, so that the choice follows from it."""

    model_config = ConfigDict(extra="ignore", strict=True, json_schema_extra={"additionalProperties": False})

    reason: str
    better: Annotated[Literal["first", "second", "same"], AsWord]

    @model_validator(mode="before")
    @classmethod
    def _choice_alone(cls, value: Any) -> Any:
        """An answer that gives its choice without a reason is one."""
        return with_texts(value, "reason")


SYSTEM = (
    "You compare videos made by generative models. You look closely, frame by frame. Which video comes first says "
    "nothing about its quality. Answer with JSON only."
)
QUESTION = """You see {count} frames of a first video and then {count} frames of a second one, both in order and from
the same {seconds:.2g} seconds. Both are meant to show: {caption}

{criterion}
Say what you see in both, and then which is better: "first", "second", or "same" where neither clearly is."""
CRITERIA = {
    "pc": "Which one obeys the laws of physics better? Think of gravity, inertia, collisions, solidity, fluids, and "
    "of things that appear, vanish or change shape. Leave beauty and the caption aside.",
    "sa": "Which one shows better what the caption says, with all its objects, attributes and actions?",
    "quality": "Which one is the better video: clear, steady, smooth, complete in its motion, without artefacts?",
}


@dataclass(frozen=True)
class PairVerdict:
    """
    Attributes:
        preference (`str` or None): "a", "b" or "same"; None where no segment got its answers.
        segments (`list[str | None]`): The same for each segment: "same" where the two orders disagree, or both say so.
        answers (`list[list[str | None]]`): What was said about each segment in each order, in terms of "a" and "b".
        error (`str`): Why an answer is missing; empty if none is.
    """

    preference: Preference | None
    segments: list[Preference | None]
    answers: list[list[Preference | None]]
    error: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class PairwiseJudge:
    """
    Compares pairs of videos.

    Args:
        client: the server and its model.
        criterion: `"pc"`, `"sa"` or `"quality"`.
        segment_seconds: length of a segment; None for the whole video at once.
        both_orders: ask about each segment twice, with the videos exchanged.
        num_frames: frames of each video in a question.
        max_pixels: of each frame.
        fps: frames per second of clips given as arrays; files know their own.

    Raises:
        ValueError: a setting out of range.
    """

    version = 1  # goes up when equal settings would judge differently

    def __init__(
        self,
        client: ChatClient,
        *,
        criterion: Literal["pc", "sa", "quality"] = "pc",
        segment_seconds: float | None = 1.0,
        both_orders: bool = True,
        num_frames: int = 8,
        max_pixels: int = 448 * 448,
        fps: float = 16.0,
    ) -> None:
        if criterion not in CRITERIA or num_frames < 2 or max_pixels < 64 * 64 or not fps > 0:
            raise ValueError(
                f"Expected `criterion` among {', '.join(CRITERIA)}, `num_frames` >= 2, `max_pixels` >= 4096 and `fps` "
                f"> 0, got {criterion!r}, {num_frames}, {max_pixels} and {fps}."
            )
        if segment_seconds is not None and not segment_seconds > 0:
            raise ValueError(f"`segment_seconds` must be positive, or None for whole videos, got {segment_seconds}.")
        self.client, self.criterion, self.segment_seconds = client, criterion, segment_seconds
        self.both_orders, self.num_frames, self.max_pixels, self.fps = both_orders, num_frames, max_pixels, fps

    @property
    def identity(self) -> str:
        """Model, question and settings: equal identities may share verdicts."""
        question = text_hash(SYSTEM, QUESTION, CRITERIA[self.criterion])
        return (
            f"pairwise:v{self.version}:model={self.client.model}:question={question}:{self.criterion},"
            f"segments={self.segment_seconds},"
            f"orders={1 + self.both_orders},frames={self.num_frames},pixels={self.max_pixels},fps={self.fps:g},"
            f"{self.client.sampling}"
        )

    def compare(self, first: Sequence[Video], second: Sequence[Video], prompts: Sequence[str]) -> list[PairVerdict]:
        """
        Compares pairs.

        Args:
            first, second: the videos called "a" and "b", paths or uint8 `(T, H, W, 3)`. What the longer one of a pair
                has beyond the shorter one is not shown.
            prompts: one sentence for each pair.

        Returns:
            A verdict for each pair. An answer that is missing costs its own segment.

        Raises:
            ValueError: a request that cannot be answered.
            ChatUnavailableError: the server cannot be used.
        """
        check_request(first, prompts)
        check_request(second, prompts)
        spans = [self._spans(a, b) for a, b in zip(first, second, strict=True)]
        asked = [
            (number, place, swapped)
            for number, of_pair in enumerate(spans)
            for place in range(len(of_pair))
            for swapped in ((False, True) if self.both_orders else (False,))
        ]
        replies = self.client.ask_all(
            [
                partial(
                    self._question, (first[number], second[number]), prompts[number], spans[number][place], swapped
                )
                for number, place, swapped in asked
            ]
        )
        answers: list[list[list[Preference | None]]] = [[[] for _ in of_pair] for of_pair in spans]
        errors = [""] * len(prompts)
        for (number, place, swapped), reply in zip(asked, replies, strict=True):
            if isinstance(reply, ChatError):
                errors[number] = errors[number] or str(reply)
                answers[number][place].append(None)
            else:
                answers[number][place].append(_named(reply.answer.better, swapped))
        return [_verdict(given, error) for given, error in zip(answers, errors, strict=True)]

    def _spans(self, *pair: Video) -> list[tuple[float, float]]:
        """Beginning and end of each segment in seconds: of equal lengths, as near to the wished one as can be."""
        from ..data.video_io import probe_video

        length = min(probe_video(video).num_frames / frame_rate(video, self.fps) for video in pair)
        count = 1 if self.segment_seconds is None else max(round(length / self.segment_seconds), 1)
        edges = np.linspace(0, length, count + 1)
        return list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))

    def _question(
        self, pair: tuple[Video, Video], prompt: str, span: tuple[float, float], swapped: bool
    ) -> ChatQuestion[Comparison]:
        shown = [self._frames(video, span) for video in (reversed(pair) if swapped else pair)]
        count = min(map(len, shown))
        text = QUESTION.format(
            count=count,
            seconds=span[1] - span[0],
            caption=quoted(prompt),
            criterion=CRITERIA[self.criterion],
        )
        images = [frame for frames in shown for frame in frames[evenly_spaced(len(frames), count)]]
        return ChatQuestion(text, Comparison, images, SYSTEM)

    def _frames(self, video: Video, span: tuple[float, float]) -> np.ndarray:
        fps = frame_rate(video, self.fps)

        def within(total: int, wanted: int) -> np.ndarray:
            start = min(int(span[0] * fps + 1e-6), total - 1)
            end = min(max(int(np.ceil(span[1] * fps - 1e-6)), start + 1), total)
            return start + evenly_spaced(end - start, wanted)

        size = partial(size_within, max_pixels=self.max_pixels, multiple=2)
        return sample_frames(video, self.num_frames, within, size)[0]


def compare_table(
    table: str | os.PathLike[str], output: str | os.PathLike[str], judge: PairwiseJudge, *, batch_size: int = 8
) -> list[PairVerdict]:
    """
    Compares the pairs of a table, "a" being the chosen and "b" the rejected video, and writes `chosen`, `rejected`,
    `prompt`, `preference` ("chosen", "rejected", "same" or nothing), `judge` and `details`. Verdicts are kept in
    `NAME.unfinished.jsonl` as they come; called again, the judge is asked for what is missing there.

    Args:
        table: `.csv`, `.jsonl` or `.parquet` file with the columns `prompt`, `chosen` and `rejected` (paths, relative
            ones from the table's folder).
        output: file to write, with one of the same endings. An older one of this function is replaced.
        judge: compares.
        batch_size: pairs asked about together.

    Returns:
        A verdict for each row.

    Raises:
        ValueError: before anything is asked: missing columns or videos, another ending, or a file of somebody else
            under one of the two names.
    """
    table, output = Path(table), Path(output)
    if output.suffix not in SUFFIXES or batch_size < 1:
        raise ValueError(
            f"Expected a file {', '.join(SUFFIXES)} and `batch_size` >= 1, got {output} and {batch_size}."
        )
    rows = read_table(table)
    for number, row in enumerate(rows, start=1):
        if not all(isinstance(row.get(name), str) for name in _COLUMNS[:3]):
            raise ValueError(
                f"{table}, row {number}: expected texts in the columns prompt, chosen and rejected, got {row}."
            )
    if output.exists() and not set(_COLUMNS) <= set(read_table(output)[0]):
        raise ValueError(f"{output} is no table of verdicts, and is not overwritten. Pass another file, or move it.")
    pairs = [(table.parent / row["chosen"], table.parent / row["rejected"], row["prompt"]) for row in rows]
    missing = [str(path) for pair in pairs for path in pair[:2] if not path.is_file()]
    if missing:
        raise ValueError(f"{table}: {len(missing)} videos are not there: {', '.join(missing[:10])}.")
    from ..data.video_io import video_hash  # the data package loads diffusers

    keys = [(video_hash(chosen), video_hash(rejected), prompt) for chosen, rejected, prompt in pairs]
    kept = output.with_name(f"{output.name}.unfinished.jsonl")
    known = _known_verdicts(kept, judge.identity)
    unknown = [number for number, key in enumerate(keys) if key not in known]
    for start in tqdm(range(0, len(unknown), batch_size), desc="Comparing", unit="batch", disable=None):
        batch = unknown[start : start + batch_size]
        verdicts = judge.compare(*zip(*(pairs[number] for number in batch), strict=True))
        known |= {keys[number]: verdict for number, verdict in zip(batch, verdicts, strict=True)}
        answered = [number for number in batch if known[keys[number]].preference is not None]
        append_rows(
            kept, [{"pair": keys[n], "judge": judge.identity, "verdict": known[keys[n]].to_dict()} for n in answered]
        )
    found = [known[key] for key in keys]
    names = {"a": "chosen", "b": "rejected", "same": "same", None: ""}
    written = [
        (row["chosen"], row["rejected"], row["prompt"], names[it.preference], judge.identity, json.dumps(it.to_dict()))
        for row, it in zip(rows, found, strict=True)
    ]
    write_rows(output, [dict(zip(_COLUMNS, values, strict=True)) for values in written])
    if all(verdict.preference is not None for verdict in found):
        kept.unlink(missing_ok=True)
    return found


def _known_verdicts(kept: Path, identity: str) -> dict[tuple[str, str, str], PairVerdict]:
    known: dict[tuple[str, str, str], PairVerdict] = {}
    if not kept.exists():
        return known
    content = kept.read_text(encoding="utf-8", errors="replace")
    if not content.startswith(_START[: len(content)]):
        raise ValueError(f"{kept} is no file of unfinished verdicts, and is not changed. Move it away.")
    for line in content.split("\n"):
        with contextlib.suppress(ValueError):  # half a line of a process that was stopped
            row = json.loads(line)
            if row["judge"] == identity:
                known[tuple(row["pair"])] = PairVerdict(**row["verdict"])
    return known


def _named(better: str, swapped: bool) -> Preference:
    if better == "same":
        return "same"
    return "a" if (better == "first") != swapped else "b"


def _verdict(answers: list[list[Preference | None]], error: str) -> PairVerdict:
    segments: list[Preference | None] = []
    for given in answers:
        if None in given:
            segments.append(None)
        else:
            segments.append(given[0] if len(set(given)) == 1 else "same")
    votes = Counter(vote for vote in segments if vote is not None)
    if not votes:
        return PairVerdict(None, segments, answers, error)
    preference: Preference = "same"
    if votes["a"] != votes["b"]:
        preference = "a" if votes["a"] > votes["b"] else "b"
    return PairVerdict(preference, segments, answers, error)
