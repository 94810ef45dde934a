"""
The language of the sandbox: which sentence describes which motion, and back.

Sentences come in paraphrases. The last two of every motion are held out: nothing is trained on them, but every word in
them occurs in a training sentence, so a model that reads words rather than remembers sentences can follow them.
"""

import itertools
import re
from dataclasses import dataclass
from typing import Literal


Split = Literal["train", "heldout"]

MOTIONS = ("free_fall", "projectile", "rolling", "incline", "collision", "pendulum", "buoyancy")
BASE_MOTIONS = ("free_fall", "rolling", "incline", "collision", "buoyancy")  # what the shipped base model can draw
STILL_SCENES = ("static", "fade", "pan")  # physics-poor: what a curation pipeline has to reject
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")

ACTIONS = {
    "free_fall": "a ball falls and bounces",
    "projectile": "a ball is thrown",
    "rolling": "a ball rolls and slows down",
    "incline": "a block slides down a ramp",
    "collision": "two balls collide",
    "pendulum": "a pendulum swings",
    "buoyancy": "a ball rises or sinks in water",
    "static": "nothing moves",
    "fade": "the picture fades",
    "pan": "the camera pans",
}

# Wordings of each action for matching sentences by meaning; none of them is one of the sentences below.
ACTION_WORDINGS: dict[str, tuple[str, ...]] = {
    "free_fall": (ACTIONS["free_fall"], "a ball is dropped from above"),
    "projectile": (ACTIONS["projectile"], "a ball flies through the air in an arc"),
    "rolling": (ACTIONS["rolling"], "a ball rolls along the floor"),
    "incline": (ACTIONS["incline"],),
    "collision": (ACTIONS["collision"], "a ball hits another ball", "a ball at rest is hit"),
    "pendulum": (ACTIONS["pendulum"], "a ball hangs from a rod and swings"),
    "buoyancy": (ACTIONS["buoyancy"], "a ball moves in water"),
}

# `{a}` is the colour of the first body, `{b}` of the second, `{d}` the direction ("right", "left", "up", "down").
PARAPHRASES: dict[str, tuple[str, ...]] = {
    "free_fall": (
        "A {a} ball falls and bounces on the floor.",
        "A {a} ball is dropped and bounces on the floor.",
        "A {a} ball drops from above, hits the floor and bounces up.",
        "Dropped from above, a {a} ball falls to the floor and bounces.",
        "A {a} ball is dropped from above and bounces on the floor.",
        "A {a} ball falls from above, hits the floor and bounces.",
    ),
    "projectile": (
        "A {a} ball is thrown to the {d} and bounces on the floor.",
        "A {a} ball flies to the {d} in an arc.",
        "Thrown to the {d}, a {a} ball flies in an arc and hits the floor.",
        "A {a} ball is thrown to the {d} in an arc.",
        "A {a} ball flies to the {d} and bounces on the floor.",
        "Thrown to the {d}, a {a} ball bounces on the floor.",
    ),
    "rolling": (
        "A {a} ball rolls to the {d} and slows down.",
        "A {a} ball rolls along the floor to the {d}.",
        "Rolling to the {d}, a {a} ball slows down and stops.",
        "A {a} ball rolls to the {d} along the floor and stops.",
        "A {a} ball rolls along the floor to the {d} and slows down.",
        "Rolling along the floor to the {d}, a {a} ball stops.",
    ),
    "incline": (
        "A {a} block slides down a ramp to the {d}.",
        "A {a} block slides to the {d} down a steep ramp.",
        "Sliding down a ramp, a {a} block moves to the {d}.",
        "On a ramp, a {a} block slides down to the {d}.",
        "On a steep ramp, a {a} block slides to the {d}.",
        "Sliding down a steep ramp, a {a} block moves to the {d}.",
    ),
    "collision": (
        "A {a} ball rolls to the {d} and hits a {b} ball at rest.",
        "A {a} ball moves to the {d} and collides with a {b} ball.",
        "Moving to the {d}, a {a} ball hits a {b} ball at rest.",
        "A {b} ball at rest is hit by a {a} ball that rolls to the {d}.",
        "A {a} ball rolls to the {d} and collides with a {b} ball at rest.",
        "A {b} ball at rest is hit by a {a} ball that moves to the {d}.",
    ),
    "pendulum": (
        "A {a} pendulum swings to the {d}.",
        "A {a} ball hangs from a rod and swings to the {d}.",
        "Released from the side, a {a} pendulum swings to the {d}.",
        "A {a} ball on a rod swings to the {d} like a pendulum.",
        "A {a} ball hangs from a rod like a pendulum and swings to the {d}.",
        "Released from the side, a {a} ball on a rod swings to the {d}.",
    ),
    "buoyancy": (
        "A {a} ball moves {d} in water.",
        "In water, a {a} ball moves {d}.",
        "Released in water, a {a} ball moves {d}.",
        "A {a} ball is released in water and moves {d}.",
        "In water, a {a} ball is released and moves {d}.",
        "A {a} ball in water moves {d}.",
    ),
    "static": ("A {a} ball lies on the floor.", "A {a} ball at rest on the floor."),
    "fade": ("A {a} ball lies on the floor while the picture fades.",),
    "pan": ("The camera pans over a room with a {a} ball.",),
}
NUM_HELDOUT = 2

DIRECTIONS: dict[str, tuple[str, ...]] = {
    "free_fall": ("down",),
    "projectile": ("right", "left"),
    "rolling": ("right", "left"),
    "incline": ("right", "left"),
    "collision": ("right", "left"),
    "pendulum": ("right", "left"),
    "buoyancy": ("up", "down"),
    "static": ("none",),
    "fade": ("none",),
    "pan": ("none",),
}


@dataclass(frozen=True)
class PromptSpec:
    """What a sentence asks for: `motion` (of `MOTIONS` or `STILL_SCENES`), `colours` (one a body), `direction`."""

    motion: str
    colours: tuple[str, ...]
    direction: str


def templates(motion: str, split: Split) -> tuple[str, ...]:
    """Paraphrases of a motion in `split`. Still scenes are never evaluated, so all of theirs are "train"."""
    every = PARAPHRASES[motion]
    if motion in STILL_SCENES:
        return every if split == "train" else ()
    return every[:-NUM_HELDOUT] if split == "train" else every[-NUM_HELDOUT:]


def describe(spec: PromptSpec, template: str) -> str:
    """The sentence for `spec` in the words of `template`."""
    sentence = template.format(a=spec.colours[0], b=spec.colours[-1], d=spec.direction)
    return re.sub(r"\b([Aa]) (?=orange\b)", r"\1n ", sentence)


def all_prompts(split: Split, motions: tuple[str, ...] = MOTIONS) -> list[str]:
    """Every sentence of a split, in a fixed order: motions x colours x directions x paraphrases."""
    sentences = []
    for motion in motions:
        colours = itertools.permutations(COLOURS, 2) if motion == "collision" else ((c,) for c in body_colours(motion))
        for bodies, direction in itertools.product(colours, DIRECTIONS[motion]):
            spec = PromptSpec(motion, bodies, direction)
            sentences += [describe(spec, template) for template in templates(motion, split)]
    return sentences


def body_colours(motion: str) -> tuple[str, ...]:
    """Colours a body can have; blue is left out under water, where nobody could see it."""
    return tuple(c for c in COLOURS if c != "blue") if motion == "buoyancy" else COLOURS


# A word that only one motion uses decides; order matters where sentences share words ("rolls ... and hits a").
_KEYWORDS = (
    ("pan", r"\bcamera\b|\bpans?\b"),
    ("fade", r"\bfad(e|es|ing)\b"),
    ("buoyancy", r"\bwater\b|\bfloats?\b|\bsinks?\b"),
    ("pendulum", r"\bpendulum\b|\bswings?\b|\brod\b"),
    ("incline", r"\bramp\b|\bincline\b|\bslid(e|es|ing)\b"),
    ("collision", r"\bcollid(e|es|ing)\b|\bis hit by\b|\bhits an?\b"),
    ("rolling", r"\broll(s|ing)?\b"),
    ("projectile", r"\bthrown\b|\bfl(y|ies|ying)\b|\barc\b|\bthrow(s)?\b"),
    ("free_fall", r"\bfall(s|ing)?\b|\bdrop(s|ped|ping)?\b|\bbounc(e|es|ing)\b"),
    ("static", r"\blies\b|\bat rest\b|\brests?\b|\bstill\b"),
)


def parse_prompt(prompt: str) -> PromptSpec:
    """
    Reads a sentence of the sandbox, or a free one that uses its words.

    Raises:
        ValueError: no motion or no colour of the sandbox in the sentence.
    """
    text = prompt.lower()
    motion = next((name for name, pattern in _KEYWORDS if re.search(pattern, text)), None)
    colours = tuple(re.findall(rf"\b({'|'.join(COLOURS)})\b", text))
    if motion is None or not colours:
        missing = "motion" if motion is None else "colour"
        raise ValueError(
            f"Prompt {prompt!r} names no {missing} that the sandbox knows. Use one of {', '.join(COLOURS)} "
            f"and a motion such as {PARAPHRASES['projectile'][0]!r}."
        )
    if motion == "collision" and re.search(r"\bis hit by\b", text):
        colours = colours[::-1]  # the sentence names the resting ball first
    number = 2 if motion == "collision" else 1
    found = re.findall(r"\b(right|left|up|down)\b", text)
    allowed = DIRECTIONS[motion]
    direction = next((word for word in found if word in allowed), allowed[0])
    return PromptSpec(motion, colours[:number], direction)
