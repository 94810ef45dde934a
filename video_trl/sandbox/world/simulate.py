"""
A world of moving bodies: sampled, simulated and drawn, deterministic by seed.

`simulate(seed)` is the whole interface: it returns a clip with its sentence, its law and, on request, a violation of
that law. Units are those of `laws.py` (frame heights, seconds); colours are RGB in [0, 1]; videos are uint8
`(T, H, W, 3)`.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from . import laws
from .drawing import Appearance, draw
from .geometry import FLOOR, PIVOT, WATER, ramp_axes, ramp_top
from .prompts import ACTIONS, DIRECTIONS, MOTIONS, STILL_SCENES, PromptSpec, Split, body_colours, describe, templates
from .wild import sample_look


NUM_FRAMES, HEIGHT, WIDTH, FPS = 13, 64, 64, 8.0  # what the shipped pipeline was trained on

VIOLATIONS = (
    "no_gravity",
    "inverted_gravity",
    "energy_gain",
    "teleport",
    "vanish",
    "through_floor",
    "momentum",
    "reversal",
    "freeze",
)
_ANYWHERE = ("teleport", "vanish", "freeze")
_EVENTS = ("reversal", *_ANYWHERE)  # what happens to the path at one moment, whatever law made it
VIOLATIONS_OF: dict[str, tuple[str, ...]] = {
    "free_fall": ("no_gravity", "inverted_gravity", "energy_gain", "through_floor", *_ANYWHERE),
    "projectile": ("no_gravity", "inverted_gravity", "energy_gain", "through_floor", *_ANYWHERE),
    "rolling": ("energy_gain", "reversal", "teleport", "vanish"),  # a sudden stop is what much friction does
    "incline": ("no_gravity", "inverted_gravity", *_ANYWHERE),
    "collision": ("momentum", "energy_gain", *_ANYWHERE),
    "pendulum": ("no_gravity", "energy_gain", *_ANYWHERE),
    "buoyancy": ("inverted_gravity", "reversal", *_ANYWHERE),
}
# What the shipped base model gets wrong: few, discrete, plain to the eye, and as the sentence says in all but the law.
BASE_VIOLATIONS: dict[str, tuple[str, ...]] = {
    "free_fall": ("no_gravity",),
    "rolling": ("energy_gain", "reversal"),
    "incline": ("no_gravity",),
    "collision": ("momentum",),
    "buoyancy": ("reversal",),
}
# A violation that hardly moves anything is no violation: mean displacement against the lawful clip, in frame heights.
MIN_DISPLACEMENT = 0.06


Rendering = Literal["plain", "wild"]
Rng = np.random.Generator
Radii = tuple[float, ...]
Params = dict[str, float]


@dataclass(frozen=True)
class Scene:
    """One sampled situation: everything that decides the clip but its resolution."""

    spec: PromptSpec
    appearance: Appearance
    params: dict[str, float]
    violation: str | None = None
    event: dict[str, float] = field(default_factory=dict)  # when and how an event breaks the path


@dataclass(frozen=True)
class Clip:
    """
    A simulated clip.

    Attributes:
        video: uint8 `(T, H, W, 3)`.
        fps: frames per second.
        prompt: the sentence; action: its category; spec: what the sentence asks for.
        violation: name of the broken law, or None.
        positions: `(T, N, 2)` centres of the N bodies, (x, y) in frame heights, y up.
        visible: `(T, N)` bool.
        scene: what was sampled.
    """

    video: NDArray[np.uint8]
    fps: float
    prompt: str
    spec: PromptSpec
    violation: str | None
    positions: laws.Array
    visible: NDArray[np.bool_]
    scene: Scene

    @property
    def action(self) -> str:
        return ACTIONS[self.spec.motion]


def simulate(
    seed: int,
    *,
    motion: str | None = None,
    violation: str | None = None,
    spec: PromptSpec | None = None,
    split: Split = "train",
    rendering: Rendering = "plain",
    num_frames: int = NUM_FRAMES,
    height: int = HEIGHT,
    width: int = WIDTH,
    fps: float = FPS,
) -> Clip:
    """
    Samples and draws a clip. The same arguments give the same bytes, with one version of NumPy on one kind of
    processor.

    Args:
        seed: any integer >= 0.
        motion: one of `MOTIONS` or `STILL_SCENES`; drawn by the seed from `MOTIONS` when None.
        violation: one of `VIOLATIONS_OF[motion]`, "any" (drawn by the seed), or None for a lawful clip.
        spec: fixes motion, colours and direction, for a clip that must show a given sentence.
        split: which paraphrases the prompt is taken from.
        rendering: "wild" draws the same scene with texture, uneven light, tint, grain and a swaying camera.
        num_frames, height, width, fps: size of the clip, all positive; the motion is fitted to the duration.

    Raises:
        ValueError: unknown motion or rendering, a violation that the motion cannot show, a non-positive size.
    """
    if rendering not in ("plain", "wild"):
        raise ValueError(f'Expected `rendering` "plain" or "wild", got {rendering!r}.')
    if min(num_frames, height, width) < 1 or fps <= 0 or seed < 0:
        raise ValueError(
            f"Expected a seed >= 0 and positive num_frames, height, width and fps, got seed={seed}, "
            f"num_frames={num_frames}, height={height}, width={width}, fps={fps}."
        )
    rng = np.random.default_rng([seed, 0x5A17D])
    times = np.arange(num_frames) / fps
    scene = sample_scene(rng, times, width / height, motion=motion, violation=violation, spec=spec)
    positions, visible = trajectory(scene, times)
    look = sample_look(seed) if rendering == "wild" else None
    video = draw(scene.appearance, positions, visible, scene.params, scene.spec.motion, height, width, look)
    choices = templates(scene.spec.motion, split) or templates(scene.spec.motion, "train")
    prompt = describe(scene.spec, choices[rng.integers(len(choices))])
    return Clip(video, fps, prompt, scene.spec, scene.violation, positions, visible, scene)


def sample_scene(
    rng: np.random.Generator,
    times: laws.Array,
    aspect: float,
    *,
    motion: str | None = None,
    violation: str | None = None,
    spec: PromptSpec | None = None,
) -> Scene:
    """Draws a scene whose motion fits into `times` and a picture `aspect` frame heights wide. See `simulate`."""
    if spec is None:
        spec = _sample_spec(rng, motion)
    elif motion not in (None, spec.motion):
        raise ValueError(f"`motion={motion!r}` contradicts `spec.motion={spec.motion!r}`: pass one of the two.")
    if violation == "any":
        options = VIOLATIONS_OF.get(spec.motion, ())
        violation = options[rng.integers(len(options))] if options else None
    if violation is not None and violation not in VIOLATIONS_OF.get(spec.motion, ()):
        raise ValueError(
            f"Motion {spec.motion!r} cannot show the violation {violation!r}; it can show: "
            f"{', '.join(VIOLATIONS_OF.get(spec.motion, ())) or 'none'}."
        )
    duration = max(float(times[-1]), 0.5)
    for _ in range(200):
        appearance = Appearance.sample(rng, spec)
        params = _PARAMETERS[spec.motion](rng, spec.direction, appearance.radii, aspect, duration)
        scene = Scene(spec, appearance, params)
        if violation is None:
            return scene
        broken = _break_law(rng, scene, violation, times)
        if broken is not None and _displacement(scene, broken, times) >= MIN_DISPLACEMENT:
            return broken
    raise ValueError(
        f"No visible {violation!r} of {spec.motion!r} fits into {len(times)} frames over {times[-1]:.2f} s: "
        f"use a longer clip (8 frames and 1 s are enough)."
    )


def _sample_spec(rng: np.random.Generator, motion: str | None) -> PromptSpec:
    if motion is None:
        motion = MOTIONS[rng.integers(len(MOTIONS))]
    if motion not in MOTIONS + STILL_SCENES:
        raise ValueError(f"Unknown motion {motion!r}; expected one of {', '.join(MOTIONS + STILL_SCENES)}.")
    number = 2 if motion == "collision" else 1
    colours = tuple(str(c) for c in rng.choice(body_colours(motion), size=number, replace=False))
    return PromptSpec(motion, colours, DIRECTIONS[motion][rng.integers(len(DIRECTIONS[motion]))])


# ---- parameters of each motion: (rng, direction, radii, aspect, duration) -> params --------------


def _sign(direction: str) -> float:
    return 1.0 if direction in ("right", "up") else -1.0


def _free_fall(rng: Rng, direction: str, radii: Radii, aspect: float, duration: float) -> Params:
    return {
        "x": rng.uniform(0.2, 0.8) * aspect,
        "height": rng.uniform(0.4, 0.68),
        "vx": 0.0,
        "vy": 0.0,
        "gravity": laws.GRAVITY,
        "restitution": rng.uniform(0.6, 0.85),
    }


def _projectile(rng: Rng, direction: str, radii: Radii, aspect: float, duration: float) -> Params:
    sign, start = _sign(direction), rng.uniform(0.12, 0.2) * aspect
    return {
        "x": start if sign > 0 else aspect - start,
        "height": rng.uniform(0.05, 0.3),
        "vx": sign * rng.uniform(0.45, 0.7) * aspect / duration,
        "vy": rng.uniform(0.6, 1.1),
        "gravity": laws.GRAVITY,
        "restitution": rng.uniform(0.6, 0.85),
    }


def _rolling(rng: Rng, direction: str, radii: Radii, aspect: float, duration: float) -> Params:
    sign, start = _sign(direction), rng.uniform(0.12, 0.2) * aspect
    travel, stop = rng.uniform(0.45, 0.68) * aspect, rng.uniform(0.75, 1.3) * duration
    speed = 2 * travel / stop  # comes to rest after `travel` at time `stop`
    return {"x": start if sign > 0 else aspect - start, "vx": sign * speed, "deceleration": speed / stop}


def _incline(rng: Rng, direction: str, radii: Radii, aspect: float, duration: float) -> Params:
    # The ramp crosses the whole picture: the wider it is, the flatter, so that the block starts inside.
    angle = rng.uniform(0.57, 1.0) * min(math.radians(35), math.atan(0.7 / aspect))
    # The friction is chosen so that the block covers `length` of the ramp: steep ramps are rough ones.
    length = rng.uniform(0.45, 0.65) * aspect / math.cos(angle)
    acceleration = min(2 * length / duration**2, laws.incline_acceleration(angle, 0.0))
    return {
        "angle": angle,
        "x": rng.uniform(0.12, 0.2) * aspect,  # from the upper end
        "acceleration": acceleration,
        "aspect": aspect,
        "sign": _sign(direction),
        "drift": 0.0,
    }


def _collision(rng: Rng, direction: str, radii: Radii, aspect: float, duration: float) -> Params:
    sign, start = _sign(direction), rng.uniform(0.12, 0.18) * aspect
    target = rng.uniform(0.45, 0.55) * aspect
    contact = math.sqrt((radii[0] + radii[1]) ** 2 - (radii[0] - radii[1]) ** 2)  # both stand on one floor
    speed = (target - start - contact) / (rng.uniform(0.35, 0.5) * duration)
    after = laws.elastic_collision(sign * speed, radii[0] ** 2, radii[1] ** 2)
    return {
        "x": start if sign > 0 else aspect - start,
        "vx": sign * speed,
        "target": target if sign > 0 else aspect - target,
        "contact": contact,
        "after_first": after[0],
        "after_second": after[1],
    }


def _pendulum(rng: Rng, direction: str, radii: Radii, aspect: float, duration: float) -> Params:
    length = rng.uniform(0.42, 0.6)
    reach = math.asin(min(0.45 * aspect / length, 0.9))
    return {
        "angle": -_sign(direction) * rng.uniform(0.65, 1.0) * min(math.radians(60), reach),
        "length": length,
        "pivot_x": aspect / 2,
        "gravity": laws.GRAVITY,
        "growth": 0.0,
        "spin": 0.0,
    }


def _buoyancy(rng: Rng, direction: str, radii: Radii, aspect: float, duration: float) -> Params:
    rises = direction == "up"
    return {
        "x": rng.uniform(0.2, 0.8) * aspect,
        "depth": rng.uniform(0.38, 0.5) if rises else rng.uniform(0.1, 0.16),
        "density": rng.uniform(0.4, 0.7) if rises else rng.uniform(1.5, 2.2),
        "drag": rng.uniform(1.5, 2.5) if rises else rng.uniform(0.8, 1.6),
        "gravity": laws.GRAVITY,
    }


def _still(rng: Rng, direction: str, radii: Radii, aspect: float, duration: float) -> Params:
    return {"x": rng.uniform(0.25, 0.75) * aspect, "aspect": aspect}


_PARAMETERS = {
    "free_fall": _free_fall,
    "projectile": _projectile,
    "rolling": _rolling,
    "incline": _incline,
    "collision": _collision,
    "pendulum": _pendulum,
    "buoyancy": _buoyancy,
    "static": _still,
    "fade": _still,
    "pan": _still,
}


# ---- breaking a law ------------------------------------------------------------------------------


def _break_law(rng: np.random.Generator, scene: Scene, violation: str, times: laws.Array) -> Scene | None:
    """The scene with one law broken, or None when this scene offers no good moment for it."""
    if violation in _EVENTS:
        event = _sample_event(rng, scene, violation, times)
        return None if event is None else replace(scene, violation=violation, event=event)
    changes = _BROKEN_PARAMETERS[violation](rng, scene.params, scene.spec.motion, max(float(times[-1]), 0.5))
    return replace(scene, violation=violation, params={**scene.params, **changes})


def _no_gravity(rng: Rng, params: Params, motion: str, duration: float) -> Params:
    if motion == "free_fall":
        return {"gravity": 0.0, "vy": -rng.uniform(0.1, 0.2)}
    if motion == "incline":  # glides off, level, into the air
        covered = laws.slide(np.array(duration), params["acceleration"]) * math.cos(params["angle"])
        return {"acceleration": 0.0, "drift": params["sign"] * float(covered) / duration}
    if motion == "pendulum":  # a rod that turns at constant speed
        return {"gravity": 0.0, "spin": -math.copysign(rng.uniform(3.0, 4.0), params["angle"])}
    return {"gravity": 0.0}


def _inverted_gravity(rng: Rng, params: Params, motion: str, duration: float) -> Params:
    if motion == "incline":  # released further down, slides up
        return {"acceleration": -params["acceleration"], "x": params["x"] + 0.5 * params["aspect"]}
    if motion == "buoyancy":
        return {"density": 1 / params["density"]}
    return {"gravity": -laws.GRAVITY * rng.uniform(0.4, 0.8)}


def _energy_gain(rng: Rng, params: Params, motion: str, duration: float) -> Params:
    if motion == "rolling":
        slow = 0.25 * params["vx"]
        return {"vx": slow, "deceleration": -abs(params["vx"]) / duration * rng.uniform(0.8, 1.2)}
    if motion == "collision":
        gain = rng.uniform(2.6, 3.2)
        return {"after_first": params["after_first"] * gain, "after_second": params["after_second"] * gain}
    if motion == "pendulum":
        return {"growth": rng.uniform(0.9, 1.3) / duration}
    return {"restitution": rng.uniform(1.25, 1.5)}


def _through_floor(rng: Rng, params: Params, motion: str, duration: float) -> Params:
    return {"restitution": math.inf}


def _momentum(rng: Rng, params: Params, motion: str, duration: float) -> Params:
    # It flies back as fast as it came, as from a wall, and the ball that it hit does not move.
    return {"after_first": -params["vx"], "after_second": 0.0}


_BROKEN_PARAMETERS = {
    "no_gravity": _no_gravity,
    "inverted_gravity": _inverted_gravity,
    "energy_gain": _energy_gain,
    "through_floor": _through_floor,
    "momentum": _momentum,
}


def _sample_event(
    rng: np.random.Generator, scene: Scene, violation: str, times: laws.Array
) -> dict[str, float] | None:
    frame = int(rng.integers(max(1, len(times) // 4), max(2, len(times) // 2)))
    body = int(rng.integers(len(scene.appearance.radii)))
    if violation == "reversal":  # late enough for a way that can be seen, early enough for most of the way back
        low = round((0.46 if scene.spec.motion == "buoyancy" else 0.4) * len(times))  # lift takes a while to show
        return {"frame": float(rng.integers(low, max(low + 1, low + round(0.15 * len(times)))))}
    event = {"frame": float(frame), "body": float(body)}
    if violation != "teleport":
        return event
    aspect = scene.appearance.aspect(scene.params)
    positions, _ = trajectory(scene, times)
    angle, distance = rng.uniform(0, 2 * math.pi), rng.uniform(0.28, 0.42)
    jump = distance * np.array([math.cos(angle), math.sin(angle)])
    landed = positions[frame:, body] + jump
    inside = ((landed > [0.05, 0.05]) & (landed < [aspect - 0.05, 0.95])).all()
    return {**event, "dx": jump[0], "dy": jump[1]} if inside else None


def _displacement(lawful: Scene, broken: Scene, times: laws.Array) -> float:
    """Mean distance between the bodies of two scenes; a body that is gone counts as 0.3 away."""
    a, _ = trajectory(lawful, times)
    b, visible = trajectory(broken, times)
    distance = np.minimum(np.linalg.norm(a - b, axis=2), 0.3)
    return float(np.where(visible, distance, 0.3).mean(axis=0).max())


# ---- trajectories --------------------------------------------------------------------------------


def trajectory(scene: Scene, times: laws.Array) -> tuple[laws.Array, NDArray[np.bool_]]:
    """Centres `(T, N, 2)` and visibility `(T, N)` of the bodies of a scene at `times` (seconds)."""
    p, radii = scene.params, scene.appearance.radii
    match scene.spec.motion:
        case "free_fall" | "projectile":
            y = FLOOR + radii[0] + laws.bounce(times, p["height"], p["vy"], p["gravity"], p["restitution"])
            path = [np.stack([p["x"] + p["vx"] * times, y], axis=1)]
        case "rolling":
            x = laws.roll(times, p["x"], p["vx"], p["deceleration"])
            path = [np.stack([x, np.full_like(x, FLOOR + radii[0])], axis=1)]
        case "incline":
            slid = _along_ramp(p, p["x"] / math.cos(p["angle"]) + laws.slide(times, p["acceleration"]), radii[0])
            path = [slid + np.outer(times, [p["drift"], 0.0])]
        case "collision":
            after = (p["after_first"], p["after_second"])
            x = laws.collide(times, p["x"], p["vx"], p["target"], p["contact"], after)
            path = [np.stack([x[:, i], np.full_like(times, FLOOR + radii[i])], axis=1) for i in range(2)]
        case "pendulum":
            angle = laws.pendulum(times, p["angle"], p["length"], p["gravity"], p["spin"]) * (1 + p["growth"] * times)
            path = [_pendulum_bob(p, angle)]
        case "buoyancy":
            y = WATER + laws.buoyant(times, p["depth"], p["density"], p["drag"], radii[0], p["gravity"])
            path = [np.stack([np.full_like(times, p["x"]), np.maximum(y, FLOOR + radii[0])], axis=1)]
        case _:
            path = [np.tile([p["x"], FLOOR + radii[0]], (len(times), 1))]
    positions = np.stack(path, axis=1)
    return _apply_event(scene, positions)


def _along_ramp(p: dict[str, float], distance: laws.Array, size: float) -> laws.Array:
    """Centre of a block of half side `size` that slid `distance` from the upper end of the ramp."""
    along, normal = ramp_axes(p["angle"], p["sign"])
    return ramp_top(p) + distance[:, None] * along + size * normal


def _pendulum_bob(p: dict[str, float], angle: laws.Array) -> laws.Array:
    return np.stack([p["pivot_x"] + p["length"] * np.sin(angle), PIVOT - p["length"] * np.cos(angle)], axis=1)


def _apply_event(scene: Scene, positions: laws.Array) -> tuple[laws.Array, NDArray[np.bool_]]:
    visible = np.ones(positions.shape[:2], dtype=bool)
    if not scene.event:
        return positions, visible
    frame = int(scene.event["frame"])
    if scene.violation == "reversal":
        back = 2 * frame - np.arange(frame, len(positions))
        positions[frame:] = positions[back.clip(0)]
        return positions, visible
    body = int(scene.event["body"])
    match scene.violation:
        case "vanish":
            visible[frame:, body] = False
        case "freeze":
            positions[frame:] = positions[frame]
        case "teleport":
            positions[frame:, body] += [scene.event["dx"], scene.event["dy"]]
    return positions, visible
