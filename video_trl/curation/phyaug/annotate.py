"""
Score how much physics a clip shows, with a vision-language model: the filter of PhyAugPipe (PhyGDPO, Algorithm 1).

All steps of the paper's chain of thought are one structured request. The answer is validated here. The label is
computed from the score, not asked of the model.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Annotated, Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, WrapValidator, field_validator, model_validator

from ...data.video_io import VideoDecodeError
from ...judges.answers import AnswerError, read_answer
from ...judges.chat import (
    ChatClient,
    ChatError,
    ChatQuestion,
    ChatRefusedError,
    ChatUnavailableError,
    InvalidAnswerError,
)
from ...judges.frames import evenly_spaced, frame_rate, quoted, sample_frames, size_within
from ...judges.weights import text_hash
from ...load import SANDBOX, annotation_rules
from ..clips.sources import open_clip
from ..engine.manifest import Batch


RICH = 0.60  # Algorithm 1, step 4
MAX_EXTENDED_WORDS = 100  # Algorithm 1, step 5
COT_VERSION = 1

#: Columns that the filter adds. `parse`, `vision_check` and `physics_scores` are JSON.
ANNOTATED: dict[str, pa.DataType] = {
    "parse": pa.string(),
    "vision_check": pa.string(),
    "reason": pa.string(),
    "extended": pa.string(),
    "physics_scores": pa.string(),
    "physics_richness": pa.float64(),
    "physics_label": pa.int8(),
    "annotator": pa.string(),  # everything that the annotation depends on besides the clip
}

Unit = Field(ge=0.0, le=1.0)


def _what_is_valid(value: Any, validate: Callable[[Any], Any]) -> list[Any]:
    """Of a list that decides nothing, the items that are what was asked for."""
    kept = []
    for item in value if isinstance(value, list) else []:
        with suppress(ValidationError):
            kept += validate([item])
    return kept


def _text_or_none(value: Any, validate: Callable[[Any], str]) -> str:
    return validate(value if isinstance(value, str) else "")


class _Strict(BaseModel):
    # The schema asks for these keys and no others; others in an answer are no reason to drop a clip.
    model_config = ConfigDict(extra="ignore", strict=True, json_schema_extra={"additionalProperties": False})


class _Side(_Strict):
    """Side data: an answer without it, or with another shape of it, is no reason to drop a clip with a good score."""

    @model_validator(mode="before")
    @classmethod
    def _none_where_missing(cls, value: Any) -> Any:
        return dict.fromkeys(cls.model_fields) | value if isinstance(value, dict) else value


class Entity(_Side):
    """A physical object; `material` is null where it cannot be told."""

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    name: str
    material: str | None


class Action(_Side):
    """Who does what to whom; `target` is null where nothing is acted on."""

    agent: str
    verb: str
    target: str | None


class Parse(_Side):
    """Step 1, as step 2 left it."""

    entities: Annotated[list[Entity], WrapValidator(_what_is_valid)]
    actions: Annotated[list[Action], WrapValidator(_what_is_valid)]
    forces: Annotated[list[str], WrapValidator(_what_is_valid)]
    outcomes: Annotated[list[str], WrapValidator(_what_is_valid)]


class VisionCheck(_Side):
    """Step 2: elements of the caption that the frames do not show, and visible ones that it does not name."""

    removed: Annotated[list[str], WrapValidator(_what_is_valid)]
    added: Annotated[list[str], WrapValidator(_what_is_valid)]


class Scores(_Strict):
    """Step 4: what the richness is made of."""

    interaction: float = Unit
    forces_outcomes: float = Unit
    causal_clarity: float = Unit
    penalty: float = Unit


class Annotation(_Strict):
    """The answer. `original` and the label of Algorithm 1 are added by the pipeline, which knows them better."""

    # Only the score decides, so that only the score can make an answer invalid: the rest is taken as far as it is what
    # was asked for. (What stands above goes to the model, with the schema.)

    parse: Parse
    vision_check: VisionCheck
    reason: Annotated[str, WrapValidator(_text_or_none)]
    scores: Scores
    physics_richness: float = Unit
    extended: Annotated[str, WrapValidator(_text_or_none)]

    @model_validator(mode="before")
    @classmethod
    def _score_alone(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        parts = {name: value.get(name) for name in ("parse", "vision_check")}
        parts = {name: part if isinstance(part, dict) else {} for name, part in parts.items()}
        return {"reason": None, "scores": None, "extended": None} | value | parts

    @field_validator("scores", mode="wrap")
    @classmethod
    def _scores_or_none(cls, value: Any, validate: Callable[[Any], Scores]) -> Scores:
        try:
            return validate(value)
        except ValidationError:
            return Scores.model_construct()

    @field_validator("extended")
    @classmethod
    def _cut(cls, text: str) -> str:
        words = text.split()
        return text if len(words) <= MAX_EXTENDED_WORDS else " ".join(words[:MAX_EXTENDED_WORDS])


SYSTEM = (
    "You annotate real videos for a study of physics in video generation. You report what the frames show, never what "
    "usually happens, and you answer with one JSON object."
)
QUESTION = """These are {count} frames of one video, in order, at these seconds: {seconds}.
Its caption: {caption}

Work through these steps.
1. parse: list the entities with their materials, the actions (agent, verb, target), the forces and the outcomes that
   the caption and the frames hold. Name every agent. List nothing that is guessed.
2. vision_check: compare the list with the frames. Take out what the frames do not show (name it in "removed"), put in
   what they show and the list lacks (name it in "added"), and give `parse` as it is afterwards.
3. reason: in one or two sentences, how the entities act on each other through forces and what comes of it.
4. scores, each from 0 to 1: "interaction" (how many entities, and how much they act on each other), "forces_outcomes"
   (whether forces and outcomes are visible), "causal_clarity" (whether the reason leads from cause to effect), and
   "penalty" (camera motion instead of motion, stylised or edited footage, only the aftermath is shown).
   physics_richness, from 0 to 1: all of it weighed, minus the penalty. 0 is a still picture, 0.6 a visible physical
   process, 1 several bodies that visibly act on each other.
5. extended: the caption with the causes from step 3 written into it. Add no entity, force or sensation that is not in
   `parse`. At most {words} words.

Answer with JSON of this schema only:
{schema}"""


def question_for(clip: "SeenClip") -> str:
    """The request in words."""
    return QUESTION.format(
        count=len(clip.frames),
        seconds=", ".join(f"{time:.2f}" for time in clip.seconds),
        caption=quoted(clip.prompt),
        words=MAX_EXTENDED_WORDS,
        schema=json.dumps(Annotation.model_json_schema()),
    )


def prompt_hash() -> str:
    """Of the prompt template and the schema: goes into every record and the dataset card."""
    return text_hash(SYSTEM, QUESTION, json.dumps(Annotation.model_json_schema()))


@dataclass(frozen=True)
class SeenClip:
    """
    What an annotator is shown.

    Attributes:
        frames: uint8 `(T, H, W, 3)`.
        seconds: `(T,)` times of the frames.
        prompt: the caption.
    """

    frames: NDArray[np.uint8]
    seconds: NDArray[np.float64]
    prompt: str


@dataclass(frozen=True)
class Failure:
    """No annotation: `reason` is what the manifest counts ("invalid_answer", "no_answer"), `detail` says more."""

    reason: str
    detail: str


class Annotator(Protocol):
    """
    Reads clips.

    Attributes:
        identity: everything that annotations depend on besides the clip: model, prompts, settings.
        num_frames, max_pixels, multiple: how many frames it is shown, evenly spaced, and at what size.
    """

    num_frames: int
    max_pixels: int

    @property
    def identity(self) -> str: ...

    @property
    def multiple(self) -> int: ...

    def annotate(self, clips: Sequence[SeenClip]) -> list[Annotation | Failure]:
        """One annotation, or the reason why there is none, for each clip."""


@dataclass
class RemoteAnnotator:
    """
    A model behind an OpenAI-compatible server; an invalid answer is shown to it once, with what is wrong.

    Args:
        client: the server and the model, with retries, timeouts and concurrency.
        num_frames, max_pixels: frames sent with each request, and pixels of each.
    """

    client: ChatClient
    num_frames: int = 8
    max_pixels: int = 448 * 448
    multiple: int = 2

    @property
    def identity(self) -> str:
        return (
            f"remote:v{COT_VERSION}:model={self.client.model}:prompts={prompt_hash()}:frames={self.num_frames},"
            f"pixels={self.max_pixels},temperature={self.client.temperature:g}"
        )

    def annotate(self, clips: Sequence[SeenClip]) -> list[Annotation | Failure]:
        """
        Raises:
            ChatUnavailableError: the server cannot be used at all: better to stop than to drop every clip.
        """
        replies = self.client.ask_all([partial(self._question, clip) for clip in clips])
        for reply in replies:
            if isinstance(reply, ChatUnavailableError) and not isinstance(reply, ChatRefusedError):
                raise reply
        return [_failure(reply) if isinstance(reply, ChatError) else reply.answer for reply in replies]

    def _question(self, clip: SeenClip) -> ChatQuestion[Annotation]:
        return ChatQuestion(question_for(clip), Annotation, list(clip.frames), SYSTEM)


class QwenAnnotator:
    """
    Qwen2.5-VL or Qwen3-VL in this process; greedy, with one repair.

    Args:
        model: folder or repository id.
        num_frames, max_pixels: as for `RemoteAnnotator`.
        max_tokens: longest answer.
        options: of `QwenVL`: `device`, `dtype`, `revision`.
    """

    def __init__(
        self, model: str, *, num_frames: int = 8, max_pixels: int = 448 * 448, max_tokens: int = 1024, **options: Any
    ) -> None:
        from ...judges.qwen_vl_model import QwenVL

        self.vlm = QwenVL(model, **options)
        self.num_frames, self.max_pixels, self.max_tokens = num_frames, max_pixels, max_tokens
        self.multiple = self.vlm.multiple

    @cached_property
    def identity(self) -> str:
        from ...judges.weights import weights_identity

        return (
            f"qwen-vl:v{COT_VERSION}:weights={weights_identity(self.vlm.folder)}:prompts={prompt_hash()}:"
            f"frames={self.num_frames},pixels={self.max_pixels},dtype={str(self.vlm.dtype).removeprefix('torch.')}"
        )

    def annotate(self, clips: Sequence[SeenClip]) -> list[Annotation | Failure]:
        return [self._annotate(clip) for clip in clips]

    def _annotate(self, clip: SeenClip) -> Annotation | Failure:
        patches = self.vlm.patches(clip.frames, clip.seconds)
        turns = [question_for(clip).replace("<|", "< |")]  # a caption cannot end the user's turn
        fault = ""
        for _ in range(2):
            text = self.vlm.answer(patches, *turns, system=SYSTEM, max_new_tokens=self.max_tokens)
            try:
                return read_answer(text, Annotation)
            except AnswerError as error:
                fault = str(error)
            turns += [text, f"That was no valid answer ({fault}). Answer with JSON of the schema only."]
        return Failure("invalid_answer", fault)


class RuleAnnotator:
    """The rules of [`~video_trl.sandbox.judge.annotator.annotate_clip`], for sandbox clips; sees every frame."""

    num_frames, max_pixels, multiple = 10_000, 4096 * 4096, 1

    @property
    def identity(self) -> str:
        return annotation_rules()[0]

    def annotate(self, clips: Sequence[SeenClip]) -> list[Annotation | Failure]:
        _, annotate_clip = annotation_rules()
        return [Annotation.model_validate(annotate_clip(clip.frames, clip.prompt)) for clip in clips]


def load_annotator(name: str, options: dict[str, Any]) -> Annotator:
    """
    Makes an annotator.

    Args:
        name: "sandbox" (rules), "http://host:8000/v1" (needs the option `model`), or a folder or repository id of a
            Qwen-VL model.
        options: of its class; those of `ChatClient` for a server.

    Raises:
        ValueError: no such model, or an option missing or unknown.
    """
    try:
        if name == SANDBOX:
            return RuleAnnotator(**options)
        if name.startswith(("http://", "https://")):
            shown = {key: options[key] for key in ("num_frames", "max_pixels") if key in options}
            rest = {key: value for key, value in options.items() if key not in shown}
            return RemoteAnnotator(ChatClient(name, **rest), **shown)
        return QwenAnnotator(name, **options)
    except TypeError as error:
        raise ValueError(f"annotator {name!r}: {error}. Check `annotator_options`.") from error


def check_annotator(name: str, options: dict[str, Any]) -> None:
    """
    Finds what `load_annotator` would stumble over, without reading weights or asking a server.

    Raises:
        ValueError: as `load_annotator`.
    """
    from ...judges.weights import resolve_weights

    if name == SANDBOX or name.startswith(("http://", "https://")):
        load_annotator(name, options)
    else:
        resolve_weights(name, options.get("revision"), ["config.json"])


@dataclass
class AnnotateBatch:
    """
    Stage "annotate" as a batch function. It travels to other processes without the model, which loads at first use.

    Args:
        make: makes the annotator.
    """

    make: Callable[[], Annotator]
    _annotator: Annotator | None = field(default=None, init=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {"make": self.make, "_annotator": None}

    def __call__(self, batch: Batch) -> Batch:
        """Columns `path`, `offset`, `length`, `prompt` -> the columns `ANNOTATED`."""
        self._annotator = annotator = self._annotator or self.make()
        identity = annotator.identity
        rows: list[dict[str, Any]] = []
        clips: list[SeenClip] = []
        for path, offset, length, prompt in zip(
            *(batch[name] for name in ("path", "offset", "length", "prompt")), strict=True
        ):
            rows.append(dict.fromkeys((*ANNOTATED, "dropped_by", "detail")))
            try:
                clips.append(_see(open_clip(path, offset, length), prompt, annotator))
            except VideoDecodeError as error:
                rows[-1] |= {"dropped_by": error.kind, "detail": str(error)}
        answers = iter(annotator.annotate(clips))
        for row in rows:
            if row["dropped_by"] is None:
                answer = next(answers)
                row["annotator"] = identity
                row |= _dropped(answer) if isinstance(answer, Failure) else _columns(answer)
        return {name: [row[name] for row in rows] for name in (*ANNOTATED, "dropped_by", "detail")}


def _see(clip: Any, prompt: str, annotator: Annotator) -> SeenClip:
    frames, indices = sample_frames(
        clip,
        annotator.num_frames,
        evenly_spaced,
        lambda h, w: size_within(h, w, annotator.max_pixels, annotator.multiple),
    )
    return SeenClip(frames, indices / frame_rate(clip, 16.0), prompt)


def _columns(answer: Annotation) -> dict[str, Any]:
    return {
        "parse": answer.parse.model_dump_json(),
        "vision_check": answer.vision_check.model_dump_json(),
        "reason": answer.reason,
        "extended": answer.extended,
        "physics_scores": answer.scores.model_dump_json(),
        "physics_richness": answer.physics_richness,
        "physics_label": int(answer.physics_richness >= RICH),
    }


def _dropped(failure: Failure) -> dict[str, Any]:
    return {"dropped_by": failure.reason, "detail": failure.detail[:1000]}


def _failure(error: ChatError) -> Failure:
    return Failure("invalid_answer" if isinstance(error, InvalidAnswerError) else "no_answer", str(error))
