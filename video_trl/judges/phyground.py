"""
PhyGround (https://huggingface.co/papers/2605.10806): ratings from 1 to 5 of single laws of physics, by a model on a
server.

Each video is asked about alignment, order of events and persistence, and about the laws that apply to its prompt, one
question each. Questions and criteria here are our own words for the 13 laws. The authors' judge, PhyJudge-9B, was
trained on theirs and has to be asked with them: `template` takes the YAML file that stands beside its weights, and
`rubric` a file with its sub-questions and criteria. Its card names no licence, so nothing of it is shipped or loaded.
"""

import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, create_model

from .answers import AsNumber
from .base import Video
from .chat import ChatClient, ChatError, ChatQuestion
from .frames import check_request, evenly_spaced, quoted, sample_frames, size_within
from .weights import text_hash


GENERAL = ("SA", "PTV", "persistence")
_Rating = Annotated[Literal[1, 2, 3, 4, 5], AsNumber]
#: Law -> what obeying it means, and what to look for.
LAWS: dict[str, tuple[str, tuple[str, ...]]] = {
    "gravity": (
        "things without support fall, and faster as they fall",
        ("Does anything hang in the air?", "Do falling things speed up?"),
    ),
    "inertia": (
        "things keep their motion until a force changes it",
        ("Does anything start, stop or turn by itself?", "Do heavy things change their motion slowly?"),
    ),
    "momentum": (
        "what one body gains in a push another one loses",
        ("Are speeds after a push in keeping with the masses?", "Does anything gain speed from nothing?"),
    ),
    "impenetrability": (
        "solid bodies do not pass through each other",
        ("Does anything reach into or through something solid?", "Do things rest on surfaces and not in them?"),
    ),
    "collision": (
        "bodies that meet bounce, stop or break at the moment of contact",
        ("Is there contact before the effect?", "Do directions after it fit the impact?"),
    ),
    "material": (
        "things bend, break, stretch or stay rigid as what they are made of does",
        ("Does anything rigid bend, or anything brittle stretch?", "Do deformations fit the force?"),
    ),
    "buoyancy": (
        "light things float and heavy ones sink",
        ("Do things float or sink as their material would?", "Do floating things lie at a steady height?"),
    ),
    "displacement": (
        "what enters a liquid pushes it aside or up",
        ("Does the level or surface answer to what enters?", "Are there splashes and waves where they should be?"),
    ),
    "flow_dynamics": (
        "liquids run downwards and along what guides them",
        ("Does the liquid flow down and around obstacles?", "Does its speed fit its thickness?"),
    ),
    "boundary_interaction": (
        "liquids meet walls and vessels without crossing them",
        ("Does the liquid stay inside its vessel?", "Does it wet, drip or rebound where it meets a surface?"),
    ),
    "fluid_continuity": (
        "the amount of liquid stays the same",
        ("Does liquid appear or vanish?", "Is what is poured out missing where it came from?"),
    ),
    "reflection": (
        "mirrors and water show what stands before them",
        ("Do mirror images move with their things?", "Are place and orientation of images right?"),
    ),
    "shadow": (
        "shadows fit the light, the body and the ground",
        ("Do shadows move with their bodies?", "Do all shadows agree with one light?"),
    ),
}
_GENERAL_QUESTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "SA": ("the video shows what the caption says", ("Are all things there?", "Do they do what is said?")),
    "PTV": ("events follow each other in a possible order", ("Do causes come first?", "Are steps missing?")),
    "persistence": ("things keep their shape, look and number", ("Does anything vanish, appear or change?",)),
}
SYSTEM = "You judge videos made by generative models, strictly and by what is seen."
QUESTION = """These are {count} frames of one video, evenly spaced and in order. A model made it from a first frame and
this caption:
{caption}

Rate one thing from 1 to 5: {name}, that is, whether {criterion}. {scope}
Before you rate, think about:
{questions}

5 = clearly right, 4 = right but for small faults, 3 = partly right or not to be told, 2 = mostly wrong, 1 = severely
wrong. Answer with JSON of one key: {{"{name}": 3}}"""


class PhyGroundJudge:
    """
    `sa` is the rating of alignment, `pc` the mean rating of the laws that apply, both r -> (r - 1) / 4; without laws
    `pc` is the mean of order and persistence. All ratings stand in `raw`.

    Args:
        base_url: address of the server, as for `ChatClient`.
        model: the model's name on the server.
        prompts: PhyGround's `phyground.json` or its folder, which says what laws apply to a prompt.
        laws: laws that are asked about for prompts that do not stand there; all 13.
        template: the published `subq+human.yaml`, for PhyJudge-9B.
        rubric: YAML or JSON with `sub_questions` (name -> list) and `criteria` (law -> text) for the template.
        num_frames: frames shown, evenly spaced; 32 as for the published servers.
        max_pixels: of each frame.
        options: of `ChatClient`.

    Raises:
        ValueError: a setting out of range, an unknown law, or a file that is missing or of another form.
    """

    version = 1  # goes up when equal settings would score differently

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        prompts: str | os.PathLike[str] | None = None,
        laws: Sequence[str] = tuple(LAWS),
        template: str | os.PathLike[str] | None = None,
        rubric: str | os.PathLike[str] | None = None,
        num_frames: int = 32,
        max_pixels: int = 448 * 448,
        **options: Any,
    ) -> None:
        unknown = sorted(set(laws) - set(LAWS))
        if unknown or num_frames < 2 or max_pixels < 64 * 64:
            raise ValueError(
                f"Expected `laws` among {', '.join(LAWS)}, `num_frames` >= 2 and `max_pixels` >= 4096, got {unknown}, "
                f"{num_frames} and {max_pixels}."
            )
        if (template is None) != (rubric is None):
            raise ValueError("`template` and `rubric` go together: the published questions have both.")
        self.client = ChatClient(base_url, model, **options)
        self.name = f"phyground-{model.rsplit('/', 1)[-1]}"
        self.laws, self.num_frames, self.max_pixels = tuple(laws), num_frames, max_pixels
        self._laws_of = {} if prompts is None else {entry["prompt"]: entry["laws"] for entry in read_entries(prompts)}
        self._template = None if template is None or rubric is None else _Published(Path(template), Path(rubric))

    @property
    def identity(self) -> str:
        """Model, questions and settings; see `RemoteJudge.identity`."""
        ours = text_hash(SYSTEM, QUESTION, repr(LAWS), repr(_GENERAL_QUESTIONS))
        questions = ours if self._template is None else self._template.hash
        laws = text_hash(json.dumps([self.laws, self._laws_of]))
        return (
            f"phyground:v{self.version}:model={self.client.model}:questions={questions}:laws={laws}:frames="
            f"{self.num_frames},pixels={self.max_pixels},{self.client.sampling}"
        )

    def laws_of(self, prompt: str) -> tuple[str, ...]:
        """What is asked about for a prompt."""
        return tuple(self._laws_of.get(prompt, self.laws))

    def score(self, videos: Sequence[Video], prompts: Sequence[str]) -> list[dict[str, Any]]:
        """
        Scores each video; see `VideoJudge.score`.

        Returns:
            For each video `sa` and `pc` in [0, 1] and `raw`: the rating of each question. A video of which a question
            got no valid answer has `sa` and `pc` None and an `error`.

        Raises:
            ValueError: a request that cannot be answered, or a file that is no readable video.
            ChatUnavailableError: the server cannot be used.
        """
        check_request(videos, prompts)
        asked = [(number, name) for number, prompt in enumerate(prompts) for name in (*GENERAL, *self.laws_of(prompt))]
        replies = self.client.ask_all(
            [partial(self._question, videos[number], prompts[number], name) for number, name in asked]
        )
        ratings: list[dict[str, int]] = [{} for _ in videos]
        errors: list[str] = ["" for _ in videos]
        for (number, name), reply in zip(asked, replies, strict=True):
            if isinstance(reply, ChatError):
                errors[number] = errors[number] or f"{name}: {reply}"
            else:
                ratings[number][name] = reply.answer.model_dump()[name]
        return [
            {"sa": None, "pc": None, "error": error, "raw": given} if error else _scores(given)
            for given, error in zip(ratings, errors, strict=True)
        ]

    def _question(self, video: Video, prompt: str, name: str) -> ChatQuestion[Any]:
        frames, _ = sample_frames(
            video, self.num_frames, evenly_spaced, lambda h, w: size_within(h, w, self.max_pixels, multiple=2)
        )
        answer = _answer(name)
        if self._template is not None:
            return ChatQuestion(self._template.question(prompt, name), answer, list(frames), self._template.system)
        criterion, questions = {**_GENERAL_QUESTIONS, **LAWS}[name]
        scope = "" if name in GENERAL else "Leave aside whether the video fits the caption."
        text = QUESTION.format(
            count=len(frames),
            caption=quoted(prompt),
            name=name,
            criterion=criterion,
            scope=scope,
            questions="\n".join(f"- {question}" for question in questions),
        )
        return ChatQuestion(text, answer, list(frames), SYSTEM)


class _Published:
    """The template and sub-questions that PhyJudge was trained with."""

    def __init__(self, template: Path, rubric: Path) -> None:
        content, more = (_mapping_in(path) for path in (template, rubric))
        try:
            self.system = str(content["system_prompt"])
            self._general: Mapping[str, str] = {name: str(content["eval_prompts"][name]) for name in GENERAL}
            self._physical = str(content["physical_template"])
            questions = more["sub_questions"]
            self._questions = {name: [str(text) for text in questions[name]] for name in (*GENERAL, *LAWS)}
            self._criteria = {name: str(more["criteria"][name]) for name in LAWS}
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{template} and {rubric}: expected `system_prompt`, `eval_prompts` with {', '.join(GENERAL)} and "
                f"`physical_template`, and `sub_questions` and `criteria` of all laws; {error} is missing."
            ) from error
        self.hash = text_hash(template.read_text(encoding="utf-8"), rubric.read_text(encoding="utf-8"))

    def question(self, prompt: str, name: str) -> str:
        block = "\n".join(f"- {question}" for question in self._questions[name])
        if name in self._general:
            return self._general[name].format(prompt=prompt, questions_block=block)
        return self._physical.format(law=name, criteria=self._criteria[name], prompt=prompt, questions_block=block)


def read_entries(source: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """
    The prompts of PhyGround's `phyground.json`.

    Args:
        source: the file, or a folder with `prompts/phyground.json` or `phyground.json`.

    Returns:
        `list[dict]`: `prompt`, `laws` (a tuple), `domain`, `name` (of a video's file, without ending) and `image` (as
            it stands there) of each.

    Raises:
        ValueError: the file is missing or of another form, or names a law that there is not.
    """
    path = Path(source)
    if path.is_dir():
        path = next(
            (path / name for name in ("prompts/phyground.json", "phyground.json") if (path / name).is_file()), path
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected PhyGround's phyground.json ({error}).") from error
    listed = content.get("prompts") if isinstance(content, dict) else content
    if not isinstance(listed, list) or not listed or not all(isinstance(entry, dict) for entry in listed):
        raise ValueError(f"{path}: expected a list of prompts, as PhyGround publishes it.")
    entries = []
    for number, entry in enumerate(listed):
        laws, prompt = entry.get("physical_laws") or [], str(entry.get("prompt") or "").strip().strip('"')
        unknown = sorted(set(map(str, laws)) - set(LAWS))
        if not prompt or unknown:
            raise ValueError(
                f"{path}, entry {number}: expected a prompt and laws among {', '.join(LAWS)}, got {unknown}."
            )
        entries.append(
            {
                "prompt": prompt,
                "laws": tuple(laws),
                "domain": str(entry.get("_domain") or entry.get("domain") or ""),
                "name": str(entry.get("id_stem") or entry.get("video") or ""),
                "image": str(entry.get("first_frame_image") or ""),
            }
        )
    return entries


def _mapping_in(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a YAML or JSON file ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a mapping, got {type(content).__name__}.")
    return content


def _answer(name: str) -> type[BaseModel]:
    config = ConfigDict(extra="ignore", strict=True, json_schema_extra={"additionalProperties": False})
    made: type[BaseModel] = create_model("Rating", __config__=config, **{name: (_Rating, ...)})  # type: ignore[call-overload]
    return made


def _scores(ratings: Mapping[str, int]) -> dict[str, Any]:
    laws = [rating for name, rating in ratings.items() if name in LAWS] or [ratings["PTV"], ratings["persistence"]]
    return {"sa": (ratings["SA"] - 1) / 4, "pc": (sum(laws) / len(laws) - 1) / 4, "raw": dict(ratings)}
