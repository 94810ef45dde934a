"""
What an annotator is asked about a clip, and what its answer is worth (PhyGDPO, Algorithm 1).

A score is not believed beyond what the rest of the answer allows: the caps are told to the model, and applied here.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    WrapValidator,
    field_validator,
    model_validator,
)

from ...judges.answers import AsNumber, AsTruth, as_truth
from ...judges.frames import quoted
from ...judges.weights import text_hash


RICH = 0.60  # Algorithm 1, step 4
MAX_EXTENDED_WORDS = 100  # Algorithm 1, step 5

#: Largest richness where a penalty applies "some" or "dominant". Those of dominant ones are the official code's; it
#: has 0.3, 0.4 and 0.4 subtracted for some, which leaves the others of 1.
CAPS = {
    "camera_motion": {"some": 0.70, "dominant": 0.20},
    "stylised": {"some": 0.60, "dominant": 0.10},
    "aftermath": {"some": 0.60, "dominant": 0.20},
}
#: And where no two entities touch, or the parse has no force or no outcome; these bounds of its scale are exclusive.
NO_CONTACT_CAP, NO_CAUSE_CAP = 0.74, 0.59

Unit = Annotated[float, Field(ge=0.0, le=1.0), AsNumber]


def _what_is_valid(value: Any, validate: Callable[[Any], Any]) -> list[Any]:
    """Of a list that decides nothing, the items that are what was asked for."""
    kept = []
    for item in value if isinstance(value, list) else []:
        with suppress(ValidationError):
            kept += validate([item])
    return kept


def _degree_or_none(value: Any, validate: Callable[[Any], str]) -> str:
    try:
        return validate(value.strip().casefold() if isinstance(value, str) else value)
    except ValidationError:
        return "none"


def _text_or_none(value: Any, validate: Callable[[Any], str]) -> str:
    return validate(value if isinstance(value, str) else "")


def _cut(text: str) -> str:
    """Side data: a text that is too long is no reason to drop a clip with a good score."""
    words = text.split()
    return text if len(words) <= MAX_EXTENDED_WORDS else " ".join(words[:MAX_EXTENDED_WORDS])


Degree = Annotated[Literal["none", "some", "dominant"], WrapValidator(_degree_or_none)]
Text = Annotated[str, WrapValidator(_text_or_none)]
Extended = Annotated[str, AfterValidator(_cut), WrapValidator(_text_or_none)]
Texts = Annotated[list[str], WrapValidator(_what_is_valid)]


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
    forces: Texts
    outcomes: Texts
    _says_no_cause: bool = PrivateAttr(default=False)

    @model_validator(mode="wrap")
    @classmethod
    def _note_what_is_said(cls, value: Any, validate: Callable[[Any], "Parse"]) -> "Parse":
        parse = validate(value)
        parse._says_no_cause = isinstance(value, dict) and [] in (value.get("forces"), value.get("outcomes"))
        return parse

    @property
    def says_no_cause(self) -> bool:
        """Whether it says that there is no force or no outcome; what it leaves out, or garbles, says nothing."""
        return self._says_no_cause


class VisionCheck(_Side):
    """Step 2: elements of the caption that the frames do not show, and visible ones that it does not name."""

    removed: Texts
    added: Texts


class Penalties(_Side):
    """Step 4: how much of the clip is camera motion, stylised or edited footage, or the mere aftermath of an event."""

    camera_motion: Degree
    stylised: Degree
    aftermath: Degree


class Scores(_Strict):
    """Step 4: what the richness is made of."""

    contact: Annotated[bool, AsTruth]
    interaction: Unit
    forces_outcomes: Unit
    causal_clarity: Unit


class _Answer(_Strict):
    # Only the score can make an answer invalid: the rest is taken as far as it is what was asked for, and what is not
    # there caps nothing. (Docstrings of models go to the annotator, with the schema; comments do not.)

    @model_validator(mode="before")
    @classmethod
    def _score_alone(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        names = [name for name in ("parse", "vision_check", "penalties") if name in cls.model_fields]
        sides = {name: value[name] if isinstance(value.get(name), dict) else {} for name in names}
        return {"reason": None, "scores": None, "extended": None} | value | sides

    @field_validator("scores", mode="wrap", check_fields=False)
    @classmethod
    def _scores_or_none(cls, value: Any, validate: Callable[[Any], Scores]) -> Scores:
        try:
            return validate(value)
        except ValidationError:  # what caps the richness counts, whatever stands beside it
            contact = as_truth(value.get("contact")) if isinstance(value, dict) else None
            return Scores.model_construct(contact=contact) if isinstance(contact, bool) else Scores.model_construct()


class Annotation(_Answer):
    """The answer. `original` and the label of Algorithm 1 are added by the pipeline, which knows them better."""

    parse: Parse
    vision_check: VisionCheck
    reason: Text
    penalties: Penalties
    scores: Scores
    physics_richness: Unit
    extended: Extended


class CaptionAnnotation(_Answer):
    """The answer of an annotator that is shown the caption alone."""

    parse: Parse
    reason: Text
    penalties: Penalties
    scores: Scores
    physics_richness: Unit
    extended: Extended


@dataclass(frozen=True)
class SeenClip:
    """
    What an annotator is shown.

    Attributes:
        frames: uint8 `(T, H, W, 3)`; None where it is asked about the caption alone.
        seconds: `(T,)` times of the frames.
        prompt: the caption.
        draft: what an annotator of captions wrote, as JSON, for this one to correct.
    """

    frames: NDArray[np.uint8] | None
    seconds: NDArray[np.float64]
    prompt: str
    draft: str | None = None

    @property
    def answer(self) -> type[Annotation] | type[CaptionAnnotation]:
        return CaptionAnnotation if self.frames is None else Annotation


SYSTEM = (
    "You annotate real videos for a study of physics in video generation. You report what the frames show, never what "
    "usually happens, and you answer with one JSON object."
)
CAPTION_SYSTEM = (
    "You annotate captions of real videos for a study of physics in video generation. You report what a caption says, "
    "and you answer with one JSON object."
)
SHOWN = """These are {count} frames of one video, in order, at these seconds: {seconds}.
Its caption: {caption}
{draft}
Work through these steps.
1. parse: list the entities with their materials, the actions (agent, verb, target), the forces and the outcomes that
   the caption and the frames hold. Name every agent. List nothing that is guessed.
2. vision_check: compare the list with the frames. Take out what the frames do not show (name it in "removed"), put in
   what they show and the list lacks (name it in "added"), and give `parse` as it is afterwards.
"""
TOLD = """This is the caption of a video that you do not see: {caption}

Work through these steps.
1. parse: list the entities with their materials, the actions (agent, verb, target), the forces and the outcomes that
   the caption holds. Name every agent. List nothing that is guessed.
2. There is nothing to check the list with.
"""
DRAFT = """Somebody who did not see the frames wrote this about the caption; correct it in the steps below: {draft}
"""
STEPS = """3. reason: in one or two sentences, how the entities act on each other through forces and what comes of it.
4. penalties, each "none", "some" or "dominant": "camera_motion" (the camera moves instead of the things, or beside
   them), "stylised" (cartoon, game, drawing, effects, edited footage), "aftermath" (only what an event left behind).
   scores: "contact" (whether two entities touch and pass on a force), and from 0 to 1 "interaction" (how many
   entities, and how much they act on each other), "forces_outcomes" (whether forces and outcomes are visible) and
   "causal_clarity" (whether the reason leads from cause to effect).
   physics_richness, from 0 to 1: all of it weighed. 0 is a still picture, 0.6 a visible physical process, 1 several
   bodies that visibly act on each other. It is at most
{caps}
5. extended: the caption with the causes from step 3 written into it. Add no entity, force or sensation that is not in
   `parse`. At most {words} words.

Answer with JSON of this schema only:
{schema}"""


def _told_caps() -> str:
    lines = [
        f'   - {caps["some"]:.2f} with some "{name}", {caps["dominant"]:.2f} where it is dominant'
        for name, caps in CAPS.items()
    ]
    lines.append(
        f"   - {NO_CONTACT_CAP:.2f} without contact, and {NO_CAUSE_CAP:.2f} without a force or an outcome in `parse`."
    )
    return "\n".join(lines)


def question_for(clip: SeenClip) -> str:
    """The request in words."""
    if clip.frames is None:
        head = TOLD.format(caption=quoted(clip.prompt))
    else:
        head = SHOWN.format(
            count=len(clip.frames),
            seconds=", ".join(f"{time:.2f}" for time in clip.seconds),
            caption=quoted(clip.prompt),
            draft="" if clip.draft is None else DRAFT.format(draft=clip.draft),
        )
    schema = json.dumps(clip.answer.model_json_schema())
    return head + STEPS.format(caps=_told_caps(), words=MAX_EXTENDED_WORDS, schema=schema)


def system_for(clip: SeenClip) -> str:
    """The system message."""
    return CAPTION_SYSTEM if clip.frames is None else SYSTEM


def prompt_hash() -> str:
    """Of the prompt templates and the schemas: goes into every record and the dataset card."""
    schemas = [json.dumps(answer.model_json_schema()) for answer in (Annotation, CaptionAnnotation)]
    return text_hash(SYSTEM, CAPTION_SYSTEM, SHOWN, TOLD, DRAFT, STEPS, _told_caps(), *schemas)


def capped_richness(answer: Annotation | CaptionAnnotation) -> tuple[float, list[str]]:
    """
    The richness that an answer gives, no more than its own findings allow.

    Returns:
        `tuple[float, list[str]]`: In [0, 1], and what it was capped by: names of penalties, "no contact", "no cause".
    """
    caps = {name: CAPS[name][degree] for name, degree in answer.penalties.model_dump().items() if degree != "none"}
    if answer.scores.model_dump().get("contact") is False:  # garbled scores have none
        caps["no contact"] = NO_CONTACT_CAP
    if answer.parse.says_no_cause:
        caps["no cause"] = NO_CAUSE_CAP
    claimed = answer.physics_richness
    return min(claimed, *caps.values(), 1.0), [name for name, cap in caps.items() if cap < claimed]
