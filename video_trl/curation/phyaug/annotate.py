"""
Score how much physics a clip shows, with a vision-language model: the filter of PhyAugPipe (PhyGDPO, Algorithm 1).

All steps of the paper's chain of thought are one structured request. The answer is validated here, its score is
capped by what else it says, and the label is computed from the score, not asked of the model. A first stage that reads
captions alone, as the official code has one, spares the frames of clips that nobody would keep.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

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
from ...judges.frames import evenly_spaced, frame_rate, sample_frames, size_within
from ...load import SANDBOX, annotation_rules
from ..clips.sources import open_clip
from ..engine.manifest import Batch
from .annotation import (
    RICH,
    Annotation,
    CaptionAnnotation,
    SeenClip,
    capped_richness,
    prompt_hash,
    question_for,
    system_for,
)


COT_VERSION = 3
NO_ANSWER = ("no_answer",)  # what a server did not answer, it may answer another time

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
#: Columns of the first of two stages, which reads captions; `text_draft` is JSON.
CAPTION_ANNOTATED: dict[str, pa.DataType] = {
    "text_draft": pa.string(),
    "text_richness": pa.float64(),
    "text_annotator": pa.string(),
}


Annotated = Annotation | CaptionAnnotation


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

    def annotate(self, clips: Sequence[SeenClip]) -> list[Annotated | Failure]:
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

    def annotate(self, clips: Sequence[SeenClip]) -> list[Annotated | Failure]:
        """
        Raises:
            ChatUnavailableError: the server cannot be used at all: better to stop than to drop every clip.
        """
        replies = self.client.ask_all([partial(self._question, clip) for clip in clips])
        for reply in replies:
            if isinstance(reply, ChatUnavailableError) and not isinstance(reply, ChatRefusedError):
                raise reply
        return [_failure(reply) if isinstance(reply, ChatError) else reply.answer for reply in replies]

    def _question(self, clip: SeenClip) -> ChatQuestion[Any]:
        images = [] if clip.frames is None else list(clip.frames)
        return ChatQuestion(question_for(clip), clip.answer, images, system_for(clip))


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

        self.vlm = QwenVL.load(model, **options)
        self.num_frames, self.max_pixels, self.max_tokens = num_frames, max_pixels, max_tokens
        self.multiple = self.vlm.multiple

    @cached_property
    def identity(self) -> str:
        from ...judges.weights import weights_identity

        return (
            f"qwen-vl:v{COT_VERSION}:weights={weights_identity(self.vlm.folder)}:prompts={prompt_hash()}:"
            f"frames={self.num_frames},pixels={self.max_pixels},dtype={str(self.vlm.dtype).removeprefix('torch.')}"
        )

    def annotate(self, clips: Sequence[SeenClip]) -> list[Annotated | Failure]:
        return [self._annotate(clip) for clip in clips]

    def _annotate(self, clip: SeenClip) -> Annotated | Failure:
        patches = None if clip.frames is None else self.vlm.patches(clip.frames, clip.seconds)
        turns = [question_for(clip).replace("<|", "< |")]  # a caption cannot end the user's turn
        fault = ""
        for _ in range(2):
            text = self.vlm.answer(patches, *turns, system=system_for(clip), max_new_tokens=self.max_tokens)
            try:
                return read_answer(text, clip.answer)
            except AnswerError as error:
                fault = str(error)
            turns += [text, f"That was no valid answer ({fault}). Answer with JSON of the schema only."]
        return Failure("invalid_answer", fault)


class RuleAnnotator:
    """The rules of `video_trl.sandbox.judge.annotator`, for sandbox clips and sentences; sees every frame."""

    num_frames, max_pixels, multiple = 10_000, 4096 * 4096, 1

    @property
    def identity(self) -> str:
        return annotation_rules()[0]

    def annotate(self, clips: Sequence[SeenClip]) -> list[Annotated | Failure]:
        _, annotate = annotation_rules()
        return [clip.answer.model_validate(annotate(clip.frames, clip.prompt)) for clip in clips]


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
        captions: ask about captions alone, with the columns `CAPTION_ANNOTATED` for an answer.
    """

    make: Callable[[], Annotator]
    captions: bool = False
    _annotator: Annotator | None = field(default=None, init=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {"make": self.make, "captions": self.captions, "_annotator": None}

    def __call__(self, batch: Batch) -> Batch:
        """Columns `path`, `offset`, `length`, `prompt`, `text_draft` -> the columns `ANNOTATED`."""
        self._annotator = annotator = self._annotator or self.make()
        if self.captions:
            return self._read_captions(batch["prompt"], annotator)
        identity = annotator.identity
        rows: list[dict[str, Any]] = []
        clips: list[SeenClip] = []
        for path, offset, length, prompt, draft in zip(
            *(batch[name] for name in ("path", "offset", "length", "prompt", "text_draft")), strict=True
        ):
            rows.append(dict.fromkeys((*ANNOTATED, "dropped_by", "detail")))
            try:
                clips.append(_see(open_clip(path, offset, length), prompt, draft, annotator))
            except VideoDecodeError as error:
                rows[-1] |= {"dropped_by": error.kind, "detail": str(error)}
        answers = iter(annotator.annotate(clips))
        for row in rows:
            if row["dropped_by"] is None:
                answer = next(answers)
                row["annotator"] = identity
                row |= _dropped(answer) if isinstance(answer, Failure) else _columns(answer)
        return {name: [row[name] for row in rows] for name in (*ANNOTATED, "dropped_by", "detail")}

    @staticmethod
    def _read_captions(prompts: Sequence[str], annotator: Annotator) -> Batch:
        rows: list[dict[str, Any]] = []
        for answer in annotator.annotate([SeenClip(None, np.zeros(0), prompt) for prompt in prompts]):
            row = dict.fromkeys((*CAPTION_ANNOTATED, "dropped_by", "detail")) | {"text_annotator": annotator.identity}
            if isinstance(answer, Failure):
                row |= _dropped(answer)
            else:
                row["text_draft"] = answer.model_dump_json(include={"parse", "reason"})
                row["text_richness"] = capped_richness(answer)[0]
            rows.append(row)
        return {name: [row[name] for row in rows] for name in rows[0]}


def _see(clip: Any, prompt: str, draft: str | None, annotator: Annotator) -> SeenClip:
    frames, indices = sample_frames(
        clip,
        annotator.num_frames,
        evenly_spaced,
        lambda h, w: size_within(h, w, annotator.max_pixels, annotator.multiple),
    )
    return SeenClip(frames, indices / frame_rate(clip, 16.0), prompt, draft)


def _columns(answer: Annotated) -> dict[str, Any]:
    assert isinstance(answer, Annotation)
    richness, capped_by = capped_richness(answer)
    claims = {"claimed": answer.physics_richness, "capped_by": capped_by}
    return {
        "parse": answer.parse.model_dump_json(),
        "vision_check": answer.vision_check.model_dump_json(),
        "reason": answer.reason,
        "extended": answer.extended,
        "physics_scores": json.dumps(answer.scores.model_dump() | answer.penalties.model_dump() | claims),
        "physics_richness": richness,
        "physics_label": int(richness >= RICH),
    }


def _dropped(failure: Failure) -> dict[str, Any]:
    return {"dropped_by": failure.reason, "detail": failure.detail[:1000]}


def _failure(error: ChatError) -> Failure:
    return Failure("invalid_answer" if isinstance(error, InvalidAnswerError) else NO_ANSWER[0], str(error))
