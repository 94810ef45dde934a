"""
What a careful viewer would write about a sandbox clip: the rules behind PhyAugPipe's filter where no model is loaded.

The sentence is parsed with the sandbox's grammar, and every claim is then checked against tracked pixels. Nothing of
the simulator's state is read, so a sentence that promises what the clip does not show is found out.
"""

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..world.prompts import STILL_SCENES, PromptSpec, parse_prompt
from .tracking import Body, Observation, observe


ANNOTATOR_VERSION = 2

MIN_PATH = 0.08  # frame heights that a body must cover to count as moving
MIN_FADE = 0.15  # change of the picture's median luminance
MIN_SCENERY_CHANGE = 0.0015  # mean luminance difference of first and last frame, bodies left out
CAMERA_GAIN = 0.5  # of that difference is left when the frames are laid over each other along a camera's path

# motion -> verb, what the body acts on, forces, outcomes, and the sentence that joins them
_KNOWLEDGE: dict[str, tuple[str, str, tuple[str, ...], tuple[str, ...], str]] = {
    "free_fall": (
        "falls",
        "floor",
        ("gravity", "contact force of the floor"),
        ("it speeds up on the way down", "it bounces lower each time"),
        "gravity speeds it up until the floor throws it back with less energy",
    ),
    "projectile": (
        "is thrown",
        "floor",
        ("gravity", "contact force of the floor"),
        ("it flies in an arc", "it bounces"),
        "it keeps its sideways speed while gravity bends its path into an arc",
    ),
    "rolling": (
        "rolls",
        "floor",
        ("rolling friction",),
        ("it slows down", "it stops"),
        "friction with the floor takes its speed away",
    ),
    "incline": (
        "slides down",
        "ramp",
        ("gravity", "normal force of the ramp", "friction"),
        ("it speeds up along the ramp",),
        "the part of gravity along the ramp is stronger than friction and speeds it up",
    ),
    "collision": (
        "hits",
        "ball",
        ("contact force between the balls",),
        ("the first ball slows down", "the other one sets off"),
        "the first ball passes momentum to the one at rest",
    ),
    "pendulum": (
        "swings on",
        "rod",
        ("gravity", "tension of the rod"),
        ("it is fastest at the lowest point", "it comes to a halt on the other side"),
        "gravity pulls it down and the rod keeps it on a circle",
    ),
    "buoyancy": (
        "moves through",
        "water",
        ("buoyancy", "gravity", "drag of the water"),
        ("it reaches a steady speed",),
        "lift and weight differ, and the drag of the water limits its speed",
    ),
}
_MATERIALS = {"floor": "solid", "ramp": "solid", "rod": "metal", "water": "liquid", "ball": "rubber"}
_CAMERA_WORDS = re.compile(r"\b(camera|pans?|zooms?|fad(e|es|ing))\b", re.IGNORECASE)


def annotate_clip(frames: NDArray[np.uint8], prompt: str) -> dict[str, Any]:
    """
    All steps of PhyAugPipe's chain of thought for one clip.

    Args:
        frames: uint8 `(T, H, W, 3)`, all frames of the clip.
        prompt: its sentence.

    Returns:
        What a model is asked for: `parse`, `vision_check`, `reason`, `penalties`, `scores`, `physics_richness` and
        `extended`.
    """
    seen = observe(frames)
    panning, fading = _camera_moves(seen), _fades(seen)
    moving = [] if panning else [body for body in seen.bodies if _path(body).max(initial=0.0) > MIN_PATH]
    try:
        spec: PromptSpec | None = parse_prompt(prompt)
    except ValueError:
        spec = None
    told = list(spec.colours) if spec else []
    shown = [body.colour for body in seen.bodies]
    motion = spec.motion if spec and spec.motion not in STILL_SCENES else None
    confirmed = motion is not None and bool(moving) and not fading
    parse = _parse(shown, motion if confirmed else None)
    check = {
        "removed": [f"{colour} body" for colour in told if colour not in shown]
        + ([] if confirmed or motion is None else [_KNOWLEDGE[motion][0]]),
        "added": [f"{colour} body" for colour in shown if colour not in told],
    }
    penalty = _unit(0.5 * panning + 0.5 * fading + 0.3 * bool(_CAMERA_WORDS.search(prompt)))
    scores = {
        "contact": confirmed and len(parse["entities"]) > 1,
        "interaction": _unit(0.5 + 0.25 * len(moving) + 0.25 * (len(parse["entities"]) > 1)) if confirmed else 0.1,
        "forces_outcomes": 1.0 if confirmed else 0.0,
        "causal_clarity": 0.9 - 0.2 * min(len(check["removed"]), 2) if confirmed else 0.2,
    }
    richness = 0.35 * scores["interaction"] + 0.35 * scores["forces_outcomes"] + 0.3 * scores["causal_clarity"]
    reason = _KNOWLEDGE[motion][4] if confirmed and motion else _why_not(panning, fading, bool(moving))
    return {
        "parse": parse,
        "vision_check": check,
        "reason": reason[0].upper() + reason[1:] + ".",
        "penalties": _penalties(prompt, panning, fading),
        "scores": scores,
        "physics_richness": _unit(richness - penalty),
        "extended": f"{prompt.rstrip('. ')}: {reason}." if confirmed else prompt[:400],
    }


def annotate_sentence(prompt: str) -> dict[str, Any]:
    """
    What a careful reader would write about a sentence, without the clip.

    Returns:
        As `annotate_clip`, without `vision_check`.
    """
    try:
        spec: PromptSpec | None = parse_prompt(prompt)
    except ValueError:
        spec = None
    motion = spec.motion if spec and spec.motion not in STILL_SCENES else None
    parse = _parse(list(spec.colours) if spec else [], motion)
    camera = bool(_CAMERA_WORDS.search(prompt))
    reason = _KNOWLEDGE[motion][4] if motion else "nothing is said to act on anything"
    told = float(motion is not None)
    return {
        "parse": parse,
        "reason": reason[0].upper() + reason[1:] + ".",
        "penalties": _penalties(prompt, panning=False, fading=False),
        "scores": {
            "contact": motion is not None and len(parse["entities"]) > 1,
            "interaction": told,
            "forces_outcomes": told,
            "causal_clarity": told,
        },
        "physics_richness": _unit(0.9 * told - 0.3 * camera),
        "extended": f"{prompt.rstrip('. ')}: {reason}." if motion else prompt[:400],
    }


def _penalties(prompt: str, panning: bool, fading: bool) -> dict[str, str]:
    camera = "dominant" if panning else "some" if _CAMERA_WORDS.search(prompt) else "none"
    return {"camera_motion": camera, "stylised": "dominant" if fading else "none", "aftermath": "none"}


def _parse(shown: list[str], motion: str | None) -> dict[str, Any]:
    """Entities, actions, forces and outcomes that the pixels bear out."""
    noun = "block" if motion == "incline" else "ball"
    entities = [{"name": f"{colour} {noun}", "material": _MATERIALS["ball"]} for colour in shown]
    if motion is None:
        return {"entities": entities, "actions": [], "forces": [], "outcomes": []}
    verb, target, forces, outcomes, _ = _KNOWLEDGE[motion]
    if target != "ball":
        entities.append({"name": target, "material": _MATERIALS[target]})
    action = {"agent": entities[0]["name"], "verb": verb, "target": target}
    return {"entities": entities, "actions": [action], "forces": list(forces), "outcomes": list(outcomes)}


def _why_not(panning: bool, fading: bool, moving: bool) -> str:
    if panning:
        return "only the camera moves"
    if fading:
        return "the picture fades and nothing acts on anything"
    return "something moves, and the caption does not say why" if moving else "nothing moves"


def _path(body: Body) -> NDArray[np.float64]:
    """`(2,)` width and height of the region that a body visits, frame heights; empty if it is never seen."""
    visited = body.positions[body.confidence > 0.5]
    return np.ptp(visited, axis=0) if len(visited) else np.zeros(0)


def _fades(seen: Observation) -> bool:
    return float(np.ptp(np.median(seen.luminance, axis=(1, 2)))) > MIN_FADE


def _camera_moves(seen: Observation) -> bool:
    """Whether the scenery moves as the first body does: laid over each other along its way, the frames agree."""
    if not seen.bodies:
        return False
    body = seen.bodies[0]
    sure = np.flatnonzero(body.confidence > 0.5)
    if len(sure) < 2:
        return False
    first, last = int(sure[0]), int(sure[-1])
    pixels = seen.luminance.shape[1]
    step = round(float(body.positions[last, 0] - body.positions[first, 0]) * pixels)
    width = seen.luminance.shape[2]
    if step == 0 or abs(step) > width // 2:
        return False

    def difference(shift: int) -> float:
        before = slice(max(0, -shift), width - max(0, shift))
        after = slice(max(0, shift), width - max(0, -shift))
        both = seen.plain[first, :, before] & seen.plain[last, :, after]
        change = np.abs(seen.luminance[last, :, after] - seen.luminance[first, :, before])
        return float(change[both].mean()) if both.any() else 0.0

    still = difference(0)
    along = min(difference(step + shift) for shift in (-1, 0, 1))  # the path is known to a pixel
    return still > MIN_SCENERY_CHANGE and along < CAMERA_GAIN * still


def _unit(value: float) -> float:
    return min(max(value, 0.0), 1.0)
