"""
The sandbox's exact judge: tracks the bodies of a clip, fits the law that its sentence promises, says what is wrong.

`pc` asks whether the bodies move as the law of the prompted motion says, whatever their colour and direction. `sa`
asks whether colours, number of bodies, kind of motion and direction are those of the sentence, lawful or not.

A generator can be lawful and imprecise: a path that trembles by a pixel keeps its `pc`. What is wrong with a picture
rather than with a law (trembling, changes of size, missing bodies) is reported beside the scores.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...files import fingerprint
from ...judges.base import Video
from ..world.prompts import COLOURS, STILL_SCENES, PromptSpec, parse_prompt
from . import fitting
from .scenery import Scenery, read_scenery
from .tracking import COLOUR_HUES, Body, Observation, hue_distance, observe, presence


Array = NDArray[np.float64]

TOLERANCE = 0.7  # distance from the law, in radii, at which half of a frame's credit is gone: 4 pixels of 64
PIXEL_TOLERANCE = 0.25  # pixels added to it: what the picture's resolution blurs
STEP_TOLERANCE = 1.5  # times that distance: the same for the step from one frame to the next
SHARPNESS = 3.0  # of that curve: flat for small distances, so that blur costs nothing
EXPONENT = 4.0  # of the mean agreement: 10 good frames of 13 give about 0.5
FULL_AGREEMENT = 0.93  # a mean agreement that counts as perfect: most of one frame of 13 is forgiven
MIN_EXTENT = (0.04, 0.14)  # movement (frame heights) that counts as none and as enough
MIN_EXTENT_COLLISION = (0.02, 0.07)  # two balls share the way
JUMP = (0.08, 0.25)  # a step off the law between two frames (frame heights) that counts as none and as a full jump
JUMP_PENALTY = 0.5
CUT = 0.2  # a jump this large is no part of the movement that `sa` looks at
SIZE_CHANGE = (1.5, 2.2)  # ratio of radii that counts as none and as another body
OUTSIDE = 0.2  # a body of which the law shows less than this share need not be seen
MIN_COUNTED = 0.6  # of the frames must show the motion all the same
BAD_FRAME = 0.5  # frames that agree less are named
TREMBLES = 0.006  # jitter (frame heights) that is worth a word: a third of a pixel of 64


@dataclass(frozen=True)
class _Physics:
    """What the law says about a clip; `agreement` `(T,)` in [0, 1]."""

    score: float
    agreement: Array
    presence: Array  # (T, N)
    movement: float
    jitter: float
    size_change: float
    jump: float
    jump_frame: int | None
    fit: fitting.Fit


class SandboxJudge:
    """
    Exact judge of sandbox clips, a `VideoJudge`; from pixels and sentence only.

    Args:
        fps: frames per second of clips given as arrays; files know their own.
    """

    name = "sandbox-exact"

    def __init__(self, fps: float = 8.0) -> None:
        if not fps > 0:
            raise ValueError(f"Expected `fps` > 0, got {fps!r}: pass the frame rate of the clips, for example 8.0.")
        self.fps = fps

    @property
    def identity(self) -> str:
        """See `VideoJudge.identity`; a change of the judge's code changes it."""
        return f"{self.name}:code={_code_hash()}:fps={self.fps:g}"

    def score(self, videos: Sequence[Video], prompts: Sequence[str]) -> list[dict[str, Any]]:
        """
        Scores each video; see `VideoJudge.score`.

        Args:
            videos: paths, or uint8 `(T, H, W, 3)` at `self.fps`.
            prompts: sentences that name a motion and a colour of the sandbox.

        Returns:
            For each video a dict with `sa`, `pc` and `explanation`; `motion` (the prompted law), `parameters` (fitted,
            in frame heights, seconds and radians), `residual` (mean distance from the law over confident frames, frame
            heights, or None), `agreement` (per frame), `worst_frames` (most disagreeing first), `missing_frames`,
            `jump_frame` (or None), `jitter` (how far the bodies tremble about their law, frame heights), `size_change`
            (largest ratio of a body's radius and its typical one, at least 1), `movement` in [0, 1], `bodies` (colours
            found) and `sa_parts` (the factors of `sa`: colour, number, motion, direction). All of it goes into JSON.

        Raises:
            ValueError: unequal numbers of videos and prompts, a sentence without motion or colour, a malformed array.
        """
        if len(videos) != len(prompts):
            raise ValueError(
                f"Expected one prompt for each video, got {len(videos)} videos and {len(prompts)} prompts."
            )
        return [self._score_one(video, prompt) for video, prompt in zip(videos, prompts, strict=True)]

    def _score_one(self, video: Video, prompt: str) -> dict[str, Any]:
        spec = parse_prompt(prompt)
        frames, fps = self._frames(video)
        times = np.arange(len(frames)) / fps
        seen = observe(frames)
        scenery = read_scenery(seen)
        chosen = match_bodies(seen.bodies, spec)
        bodies = [body for body in chosen if body is not None]
        found = [body.colour for body in seen.bodies]
        if len(bodies) < len(chosen):
            parts = _adherence(seen, scenery, chosen, spec, cut=None)
            missing = ", ".join(c for c, body in zip(spec.colours, chosen, strict=True) if body is None)
            report = _nothing_fitted(len(frames))
            report["explanation"] = (
                f"No body can be followed for: {missing} (bodies found: {', '.join(found) or 'none'})."
            )
        else:
            physics = _judge_physics(bodies, spec, times, seen.aspect, 1.0 / seen.luminance.shape[1])
            parts = _adherence(seen, scenery, chosen, spec, cut=physics.jump_frame if physics.jump > CUT else None)
            report = _report(physics, bodies, spec, parts)
        scores = {"sa": math.prod(parts.values()), "pc": report.pop("pc")}
        return scores | {"motion": spec.motion, "bodies": found, "sa_parts": parts} | report

    def _frames(self, video: Video) -> tuple[NDArray[np.uint8], float]:
        if isinstance(video, np.ndarray):
            if video.dtype != np.uint8 or video.ndim != 4 or video.shape[3] != 3 or min(video.shape) < 1:
                raise ValueError(
                    f"Expected a uint8 video of shape (T, H, W, 3), got {video.dtype} {video.shape}: "
                    f"convert floats in [0, 1] with `(video * 255).round().astype(np.uint8)`."
                )
            return video, self.fps
        from ...data.video_io import probe_video, read_video  # PyAV is needed for files only

        return read_video(video), probe_video(video).fps


# Every module that takes part in a score.
_SCORING_CODE = {
    "judge": ("fitting", "judge", "scenery", "tracking"),
    "world": ("drawing", "geometry", "laws", "prompts"),
}


@functools.cache
def _code_hash() -> str:
    """Of the modules above: 16 hexadecimal digits."""
    folder = Path(__file__).parents[1]
    files = [folder / package / f"{module}.py" for package, modules in _SCORING_CODE.items() for module in modules]
    return fingerprint(*files)[:16]


def _nothing_fitted(num_frames: int) -> dict[str, Any]:
    return {
        "pc": 0.0,
        "parameters": {},
        "residual": None,
        "agreement": [0.0] * num_frames,
        "worst_frames": list(range(num_frames))[:3],
        "missing_frames": list(range(num_frames)),
        "jump_frame": None,
        "jitter": 0.0,
        "size_change": 1.0,
        "movement": 0.0,
    }


# ---- which body is which --------------------------------------------------------------------------------------------


def match_bodies(bodies: tuple[Body, ...], spec: PromptSpec) -> list[Body | None]:
    """For each prompted colour the body that fits best; any body does, so that a wrong colour costs `sa` alone."""
    number = len(spec.colours)
    pool: list[Body | None] = [*bodies[: number + 2], *([None] * number)]
    best = max(
        itertools.permutations(range(len(pool)), number),
        key=lambda order: sum(_match(pool[i], colour) for i, colour in zip(order, spec.colours, strict=True)),
    )
    return [pool[i] for i in best]


def _match(body: Body | None, colour: str) -> float:
    if body is None:
        return 0.0
    return colour_score(body.hue, colour) + 0.1 * float(body.confidence.mean())


def colour_score(hue: float, colour: str) -> float:
    """In [0, 1]: 1 when `hue` (degrees) is clearly nearest to `colour`, 0 when clearly nearer to another."""
    wanted = hue_distance(hue, COLOUR_HUES[colour])
    other = min(hue_distance(hue, COLOUR_HUES[name]) for name in COLOURS if name != colour)
    return min(max(0.5 + (other - wanted) / 16.0, 0.0), 1.0)


# ---- pc -------------------------------------------------------------------------------------------------------------


def _judge_physics(bodies: list[Body], spec: PromptSpec, times: Array, aspect: float, pixel: float) -> _Physics:
    observed = np.stack([body.positions for body in bodies], axis=1)
    weights = np.stack([body.confidence for body in bodies], axis=1)
    radii = np.array([body.radius for body in bodies])
    scale = TOLERANCE * radii + PIXEL_TOLERANCE * pixel
    law = _law_for(spec, observed, weights, radii, times, aspect)
    fit = fitting.fit(law, observed, weights, scale, radii, aspect)
    share = fitting.visible_share(fit.positions, radii, aspect)
    area = np.stack([body.area / body.typical_area for body in bodies], axis=1)
    concentration = np.stack([body.concentration for body in bodies], axis=1)
    present = presence(area / share.clip(0.3), concentration)
    steps, jumps = _steps_off(observed - fit.positions, weights)
    close = 1 / (1 + (fit.residuals / scale) ** SHARPNESS) / (1 + (steps / (STEP_TOLERANCE * scale)) ** SHARPNESS)
    agreement = (close * present * _same_size(area / share.clip(0.3))).min(axis=1)
    jump_frame = int(jumps.max(axis=1).argmax())
    jump = float(jumps[jump_frame].max())
    movement = 1.0 if spec.motion in STILL_SCENES else _movement(bodies, spec.motion)
    gone = (share < OUTSIDE).any(axis=1) & (area < 0.5).any(axis=1)  # the law itself leads out of the picture
    counted = max(float((~gone).sum()), MIN_COUNTED * len(times))
    mean = min(float(agreement[~gone].sum()) / counted / FULL_AGREEMENT, 1.0)
    score = mean**EXPONENT * movement * (1 - JUMP_PENALTY * _ramp(jump, *JUMP))
    return _Physics(
        score=score,
        agreement=agreement,
        presence=present,
        movement=movement,
        jitter=_jitter(observed - fit.positions, weights),
        size_change=_size_change(area / share.clip(0.3), concentration),
        jump=jump,
        jump_frame=jump_frame if jump > JUMP[0] else None,
        fit=fit,
    )


def _law_for(
    spec: PromptSpec, observed: Array, weights: Array, radii: Array, times: Array, aspect: float
) -> fitting.Law:
    """The law that the sentence promises, with starting points read off the track."""
    confident = weights > 0.5
    use = confident[:, 0] if confident[:, 0].any() else np.ones(len(times), dtype=bool)
    path, path_times, radius = observed[use, 0], times[use], float(radii[0])
    match spec.motion:
        case "free_fall":
            return fitting.free_fall(times, path, radius, aspect)
        case "projectile":
            return fitting.projectile(times, path, path_times, radius, aspect)
        case "rolling":
            return fitting.rolling(times, path, path_times, radius, aspect)
        case "incline":
            half_side = radius * math.sqrt(math.pi) / 2  # of the square with the disc's area
            return fitting.incline(times, path, half_side, aspect)
        case "collision":
            return fitting.collision(times, observed, confident, radii, aspect)
        case "pendulum":
            return fitting.pendulum(times, path, path_times, radius, aspect)
        case "buoyancy":
            return fitting.buoyancy(times, path, radius, aspect, rises=spec.direction == "up")
        case _:
            return fitting.still(path, len(times), drifts=spec.motion == "pan")


def _ramp(value: float, low: float, high: float) -> float:
    """0 below `low`, 1 above `high`, linear between."""
    return min(max((value - low) / (high - low), 0.0), 1.0)


def _same_size(area: Array) -> Array:
    """`(T, N)` in [0, 1] from areas over the typical one: a body keeps its size."""
    ratio = np.exp(np.abs(np.log(np.sqrt(area.clip(1e-3)))))
    low, high = SIZE_CHANGE
    return 1 - ((ratio - low) / (high - low)).clip(0, 1)


def _jitter(off: Array, weights: Array) -> float:
    """
    Standard deviation of a tremble about the law, each direction for itself, from the changes of `off` `(T, N, 2)`
    from frame to frame; half of the changes may be anything, such as one broken law.
    """
    sure = np.minimum(weights[1:], weights[:-1]) > 0.5
    changes = np.abs(off[1:] - off[:-1])[sure]
    return float(np.median(changes)) / (0.6745 * math.sqrt(2)) if changes.size else 0.0


def _size_change(area: Array, concentration: Array) -> float:
    """Largest ratio of radii, up or down, from areas `(T, N)` over the typical one, in frames that show the body."""
    sure = (concentration > 0.7) & (area > 0.15)
    return float(np.exp(np.abs(np.log(np.sqrt(area[sure]))).max(initial=0.0)))


def _steps_off(off: Array, weights: Array) -> tuple[Array, Array]:
    """
    How far the steps between frames differ from the law's steps; next to missing frames they do not.

    Args:
        off: `(T, N, 2)` observed minus predicted positions.
        weights: `(T, N)` confidence.

    Returns:
        For each frame `(T, N)` the smaller of the differences of the steps into and out of it (one stray frame spoils
        itself, not its neighbours), and for each frame `(T, N)` the jump that leads into it: a difference that lasts.
    """

    def apart(lag: int) -> Array:
        """`(T, N)` change of `off` over the `lag` frames up to each frame; NaN where it cannot be known."""
        change = np.full(off.shape[:2], np.nan)
        both = np.minimum(weights[lag:], weights[:-lag]) > 0.5
        change[lag:] = np.where(both, np.linalg.norm(off[lag:] - off[:-lag], axis=2), np.nan)
        return change

    into, over = apart(1), apart(2)
    unknown = np.full_like(into[:1], np.nan)
    out_of = np.concatenate([into[1:], unknown])
    ahead = np.concatenate([over[1:], unknown])  # from the frame before to the frame after
    jumps = np.where(np.isnan(into), 0.0, np.fmin(np.fmin(into, over), ahead))
    return np.nan_to_num(np.fmin(into, out_of)), jumps


def _movement(bodies: list[Body], motion: str) -> float:
    """In [0, 1]: whether the bodies move at all, along the axis of the motion."""
    axis = 1 if motion in ("free_fall", "buoyancy") else 0
    enough = MIN_EXTENT_COLLISION if motion == "collision" else MIN_EXTENT
    return float(np.mean([_ramp(_extent(body)[axis], *enough) for body in bodies]))


def _extent(body: Body, cut: int | None = None) -> Array:
    """`(2,)` width and height of the region that a body visits, the larger of those before and from `cut`."""
    parts = [slice(None)] if cut is None else [slice(None, cut), slice(cut, None)]
    extent = np.zeros(2)
    for part in parts:
        path = body.positions[part][body.confidence[part] > 0.5]
        if len(path):
            extent = np.maximum(extent, np.ptp(path, axis=0))
    return extent


# ---- sa -------------------------------------------------------------------------------------------------------------


def _adherence(
    seen: Observation, scenery: Scenery, chosen: list[Body | None], spec: PromptSpec, cut: int | None
) -> dict[str, float]:
    """Factors of `sa`, each in [0, 1]; `cut` is the frame of a jump that is not to count as movement."""
    bodies = [body for body in chosen if body is not None]
    if not bodies:
        return {"colour": 0.0, "number": 0.0, "motion": 0.0, "direction": 0.0}
    colours = [
        0.0 if body is None else colour_score(body.hue, colour)
        for body, colour in zip(chosen, spec.colours, strict=True)
    ]
    return {
        "colour": 0.1 + 0.9 * math.prod(0.3 + 0.7 * c for c in colours) if max(colours) > 0 else 0.1,
        "number": _number_score(seen, len(bodies), len(spec.colours)),
        "motion": 0.1 + 0.9 * _motion_score(scenery, bodies, spec, cut),
        "direction": 0.25 + 0.75 * _direction_score(bodies, spec, cut),
    }


def _number_score(seen: Observation, matched: int, wanted: int) -> float:
    """Right number of bodies: a missing one or a stranger costs half; frames without any body cost half of theirs."""
    strangers = sum(float(body.confidence.mean()) > 0.3 for body in seen.bodies) - matched
    visible = max(float((body.confidence > 0.3).mean()) for body in seen.bodies)
    return 0.5 ** (wanted - matched) * 0.5 ** max(strangers, 0) * (0.5 + 0.5 * visible)


def _motion_score(scenery: Scenery, bodies: list[Body], spec: PromptSpec, cut: int | None) -> float:
    """Whether scenery and the shape of the paths are those of the prompted motion."""
    width, height = np.max([_extent(body, cut) for body in bodies], axis=0)
    moves = _ramp(max(width, height), *MIN_EXTENT)
    if spec.motion in STILL_SCENES:
        return 1 - moves if spec.motion != "pan" else 1.0
    wide, high = _ramp(width, 0.08, 0.2), _ramp(height, 0.04, 0.12)
    if spec.motion == "collision":
        wide = moves = _ramp(width, *MIN_EXTENT_COLLISION)
    shape = {
        "free_fall": high * (1 - wide),
        "projectile": wide * (0.15 + 0.85 * high),
        "rolling": wide * (1 - high),
        "incline": wide * (0.5 + 0.5 * high),
        "collision": wide * (1 - high),
        "pendulum": wide,
        "buoyancy": high * (1 - wide),
    }[spec.motion]
    # Where the scenery tells most of it, a motion that is cut short may look like less of itself.
    a, b = (0.6, 0.5) if spec.motion in ("incline", "pendulum", "buoyancy") else (0.25, 0.3)
    return scenery.match(spec.motion, bodies[0], cut) * (a + (1 - a) * shape) * (b + (1 - b) * moves)


def _direction_score(bodies: list[Body], spec: PromptSpec, cut: int | None) -> float:
    """Whether the first body moves the prompted way, by its mean displacement from where it was first seen."""
    sign = {"right": 1.0, "up": 1.0, "left": -1.0, "down": -1.0}.get(spec.direction)
    if sign is None:
        return 1.0
    path = bodies[0].positions[:cut][bodies[0].confidence[:cut] > 0.5]
    if len(path) < 2:
        return 0.0
    axis = 1 if spec.direction in ("up", "down") else 0
    way = float((path[1:, axis] - path[0, axis]).mean())
    return _ramp(sign * way, -0.02, 0.02)


# ---- explanation ----------------------------------------------------------------------------------------------------


def _report(physics: _Physics, bodies: list[Body], spec: PromptSpec, parts: dict[str, float]) -> dict[str, Any]:
    confident = np.stack([body.confidence for body in bodies], axis=1) > 0.5
    residual = float(physics.fit.residuals[confident].mean()) if confident.any() else None
    order = np.argsort(physics.agreement, kind="stable")
    worst = [int(i) for i in order[:3] if physics.agreement[i] < 0.9]
    missing = [int(i) for i in np.flatnonzero((physics.presence < 0.5).any(axis=1))]
    facts = {
        "pc": physics.score,
        "parameters": {name: round(value, 4) for name, value in physics.fit.parameters.items()},
        "residual": residual,
        "agreement": [round(float(a), 3) for a in physics.agreement],
        "worst_frames": worst,
        "missing_frames": missing,
        "jump_frame": physics.jump_frame,
        "jitter": round(physics.jitter, 4),
        "size_change": round(physics.size_change, 3),
        "movement": physics.movement,
    }
    return facts | {"explanation": _sentence(physics, facts, spec, parts)}


def _sentence(physics: _Physics, facts: dict[str, Any], spec: PromptSpec, parts: dict[str, float]) -> str:
    law = spec.motion.replace("_", " ")
    values = ", ".join(f"{name} {value:.2f}" for name, value in facts["parameters"].items())
    bad = [int(i) for i in np.flatnonzero(physics.agreement < BAD_FRAME)]
    text = f"Law of {law} ({values}): "
    if physics.movement < 0.5:
        text += "hardly anything moves"
    elif not bad:
        text += "obeyed in every frame"
    else:
        text += (
            f"obeyed in {len(physics.agreement) - len(bad)} of {len(physics.agreement)} frames, not in {_spans(bad)}"
        )
    if facts["residual"] is not None:
        text += f", mean distance {facts['residual']:.3f} frame heights"
    if physics.jitter > TREMBLES:
        text += f"; trembles by {physics.jitter:.3f}"
    if physics.size_change > SIZE_CHANGE[0]:
        text += f"; changes size by a factor of {physics.size_change:.1f}"
    if physics.jump_frame is not None:
        text += f"; jumps by {physics.jump:.2f} at frame {physics.jump_frame}"
    if facts["missing_frames"]:
        text += f"; a body is missing in {_spans(facts['missing_frames'])}"
    wrong = [name for name, value in parts.items() if value < 0.6]
    return text + (f"; not as the sentence says: {', '.join(wrong)}." if wrong else ".")


def _spans(frames: list[int]) -> str:
    """`[3, 5, 6, 7]` as `frames 3, 5-7`."""
    groups: list[list[int]] = []
    for frame in frames:
        if groups and frame == groups[-1][-1] + 1:
            groups[-1].append(frame)
        else:
            groups.append([frame])
    return "frames " + ", ".join(str(g[0]) if len(g) == 1 else f"{g[0]}-{g[-1]}" for g in groups)
