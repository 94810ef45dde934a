"""
Will the two balls touch? Clips that end before the answer, for the probe of physical understanding.

The sandbox's counterpart of Physion's object contact prediction: the world's laws, drawing and clip size, two balls,
and a question whose answer follows from the motion seen so far. Half of the clips of every scenario are answered yes.
Units are those of `laws.py`.
"""

import math
from collections.abc import Callable

import numpy as np

from ...data.probe_clips import ProbeClip
from ..world import laws
from ..world.drawing import Appearance, draw
from ..world.geometry import FLOOR
from ..world.prompts import PromptSpec, body_colours
from ..world.simulate import FPS, HEIGHT, NUM_FRAMES, WIDTH


HORIZON = 1.25  # seconds after the clip in which a contact counts
_CLEAR = 0.03  # least distance between the surfaces: at the end of the clip, and in a clip that is answered no
_STEP = 0.01  # seconds between the moments that are checked for a contact

Rng = np.random.Generator
Radii = tuple[float, float]
Path = Callable[[laws.Array], laws.Array]  # times (T,) -> centres (T, 2, 2)


def contact_clips(number: int, *, seed: int, num_frames: int = NUM_FRAMES) -> list[ProbeClip]:
    """
    Simulated clips with the question whether their two balls will touch, scenarios and answers in turn.

    - `roll`: one ball rolls towards a resting one, slowed down by friction. It arrives, or stops before.
    - `chase`: one ball rolls behind another, both slowed down by friction. It catches up, or does not.
    - `bounce`: one ball bounces along the floor towards a resting one. It hits, or jumps over, or stays behind.

    Args:
        number (`int`): How many; a multiple of 6 gives every scenario as often as every other, half of each "yes".
        seed (`int`): Another seed gives other clips; the same gives the same bytes (see `simulate`).
        num_frames (`int`, defaults to that of the sandbox): Length of the clips, which end before the answer shows.

    Returns:
        `list[ProbeClip]`: With uint8 arrays `(T, H, W, 3)` as videos.
    """
    scenarios = list(_SCENARIOS)
    clips = []
    for index in range(number):
        scenario, label = scenarios[index // 2 % len(scenarios)], index % 2 == 0
        rng = np.random.default_rng([seed, index, 0xC047AC7])
        clips.append(_sample(rng, f"{scenario}-{seed}-{index}", scenario, label, num_frames))
    return clips


def _sample(rng: Rng, name: str, scenario: str, label: bool, num_frames: int) -> ProbeClip:
    """Draws scenes until one has the wanted answer, clearly, and does not show it."""
    seen = np.arange(num_frames) / FPS
    future = np.arange(seen[-1], seen[-1] + HORIZON, _STEP)
    colours = tuple(str(colour) for colour in rng.choice(body_colours("collision"), size=2, replace=False))
    spec = PromptSpec("collision", colours, "right")
    for _ in range(10_000):
        appearance = Appearance.sample(rng, spec)
        radii = (appearance.radii[0], appearance.radii[1])
        path = _SCENARIOS[scenario](rng, radii, float(seen[-1]))
        mirrored = rng.uniform() < 0.5
        gap_seen, gap_later = (_gap(path(times), radii) for times in (np.arange(0, seen[-1], _STEP), future))
        touches = gap_later <= 0
        if gap_seen > _CLEAR and touches == label and (touches or gap_later > _CLEAR) and _inside(path(seen), radii):
            positions = path(seen)
            if mirrored:
                positions[..., 0] = WIDTH / HEIGHT - positions[..., 0]
            visible = np.ones(positions.shape[:2], dtype=bool)
            video = draw(appearance, positions, visible, {}, "collision", HEIGHT, WIDTH)
            return ProbeClip(name, video, label, scenario)
    raise AssertionError(f"no scene of {scenario} answers {label} within {num_frames} frames")


def _gap(positions: laws.Array, radii: Radii) -> float:
    """Least distance between the surfaces of the two balls; not positive where they touch."""
    distance = np.linalg.norm(positions[:, 0] - positions[:, 1], axis=1)
    return float(distance.min() - sum(radii))


def _inside(positions: laws.Array, radii: Radii) -> bool:
    x, reach = positions[..., 0], np.array(radii)
    return bool((x > reach).all() and (x < WIDTH / HEIGHT - reach).all() and (positions[..., 1] < 1 - reach).all())


def _on_floor(x: laws.Array, radius: float) -> laws.Array:
    return np.stack([x, np.full_like(x, FLOOR + radius)], axis=1)


def _resting(x: float, radius: float) -> Path:
    return lambda times: _on_floor(np.full_like(times, x), radius)


def _rolling(x: float, speed: float, stop: float, radius: float) -> Path:
    return lambda times: _on_floor(laws.roll(times, x, speed, speed / stop), radius)


def _together(first: Path, second: Path) -> Path:
    return lambda times: np.stack([first(times), second(times)], axis=1)


def _roll(rng: Rng, radii: Radii, duration: float) -> Path:
    start, target = rng.uniform(0.12, 0.2), rng.uniform(0.66, 0.86)
    stop = duration * rng.uniform(1.1, 2.0)
    travel = (target - start - sum(radii)) * rng.uniform(0.6, 1.7)
    return _together(_rolling(start, 2 * travel / stop, stop, radii[0]), _resting(target, radii[1]))


def _chase(rng: Rng, radii: Radii, duration: float) -> Path:
    start = rng.uniform(0.11, 0.16)
    ahead = start + sum(radii) + rng.uniform(0.1, 0.3)
    speed = rng.uniform(0.15, 0.4) * 1.5 / duration
    behind = _rolling(start, speed, duration * rng.uniform(1.0, 3.0), radii[0])
    return _together(
        behind, _rolling(ahead, speed * rng.uniform(0.3, 1.0), duration * rng.uniform(0.8, 2.0), radii[1])
    )


def _bounce(rng: Rng, radii: Radii, duration: float) -> Path:
    start, target = rng.uniform(0.12, 0.2), rng.uniform(0.6, 0.85)
    height, restitution = rng.uniform(0.3, 0.6), rng.uniform(0.75, 0.95)
    speed = (target - start) / duration * rng.uniform(0.45, 0.95)

    def bouncing(times: laws.Array) -> laws.Array:
        y = FLOOR + radii[0] + laws.bounce(times, height, 0.0, laws.GRAVITY, restitution)
        return np.stack([start + speed * times, y], axis=1)

    return _together(bouncing, _resting(target, radii[1]))


_SCENARIOS: dict[str, Callable[[Rng, Radii, float], Path]] = {"roll": _roll, "chase": _chase, "bounce": _bounce}

assert math.isclose(WIDTH / HEIGHT, 1.0), "start and target positions are chosen for square pictures"
