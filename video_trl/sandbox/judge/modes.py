"""
Which way a clip went: lawful, one of the named violations of its motion, or neither.

The tracked path is compared with simulated ones of the same sentence, lawful and violated, and with what lies between
the nearest of them. A model that fails by breaking a law leaves clips near a violation; one that fails by imprecision
leaves them near nothing. Lengths are in frame heights.
"""

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..world.prompts import PromptSpec, parse_prompt
from ..world.simulate import BASE_VIOLATIONS, FPS, sample_scene, trajectory
from .judge import match_bodies
from .tracking import observe


Array = NDArray[np.float64]

LAWFUL, NEITHER = "lawful", "neither"

MAX_DISTANCE = 0.03  # mean distance to a path that still counts as that path: two pixels of 64
PREFERENCE = 0.006  # a lawful path this much further away than the nearest violated one still wins
UNSEEN = 0.3  # distance of a body that is seen where the path says it is gone, or the other way round
BANK_SIZE = 1200  # simulated paths for each way that a sentence can go
NEIGHBOURS = 8  # paths that a clip may lie between
_SHARPEST_MIX = 0.5  # how far beyond its neighbours a path may be continued
_SEED = 0xBA4C


@dataclass(frozen=True)
class Mode:
    """
    Where a clip belongs.

    Attributes:
        name: "lawful", the name of a violation, or "neither".
        distances: mean distance to the nearest path of each kind; empty where a body could not be followed.
    """

    name: str
    distances: dict[str, float]


@dataclass(frozen=True)
class _Bank:
    """Simulated paths `(K, T, N, 2)` of one kind, and whether the bodies are in the picture `(K, T, N)`."""

    paths: Array
    shown: NDArray[np.bool_]


def find_mode(video: NDArray[np.uint8], prompt: str, *, fps: float = FPS) -> Mode:
    """
    Finds the way that a clip went.

    Args:
        video: uint8 `(T, H, W, 3)`.
        prompt: its sentence, of one of the motions in `BASE_VIOLATIONS`.
        fps: frames per second.

    Raises:
        ValueError: the sentence is of another motion, whose ways have no names.
    """
    spec = parse_prompt(prompt)
    if spec.motion not in BASE_VIOLATIONS:
        raise ValueError(
            f"Ways to go are known for {', '.join(BASE_VIOLATIONS)}, got {prompt!r} of motion {spec.motion!r}."
        )
    seen = observe(video)
    bodies = [body for body in match_bodies(seen.bodies, spec) if body is not None]
    if len(bodies) < len(spec.colours):
        return Mode(NEITHER, {})
    positions = np.stack([body.positions for body in bodies], axis=1)
    visible = np.stack([body.confidence > 0.5 for body in bodies], axis=1)
    # Colours and the side that a body goes to are a matter of the sentence, not of the law: a bank of paths to the
    # right serves for all. Up and down are different laws.
    direction = "right" if spec.direction == "left" else spec.direction
    banks = _banks(spec.motion, direction, len(video), fps, seen.aspect)
    views = [(positions, visible), (positions[:, ::-1], visible[:, ::-1])][: len(spec.colours)]
    if direction == "right":
        views += [(np.stack([seen.aspect - p[..., 0], p[..., 1]], axis=-1), v) for p, v in views]
    distances = {name: min(_nearest(bank, *view) for view in views) for name, bank in banks.items()}
    best = min(distances, key=lambda name: distances[name])
    if distances[LAWFUL] <= distances[best] + PREFERENCE:
        best = LAWFUL
    return Mode(best if distances[best] <= MAX_DISTANCE else NEITHER, distances)


def mode_shares(modes: Sequence[str]) -> dict[str, float]:
    """Shares of lawful clips, of those with a named violation (together, as "violated"), and of neither."""
    counts = Counter(LAWFUL if m == LAWFUL else NEITHER if m == NEITHER else "violated" for m in modes)
    return {name: counts[name] / max(1, len(modes)) for name in (LAWFUL, "violated", NEITHER)}


@functools.cache
def _banks(motion: str, direction: str, num_frames: int, fps: float, aspect: float) -> dict[str, _Bank]:
    """Paths of every way that a sentence can go."""
    times = np.arange(num_frames) / fps
    spec = PromptSpec(motion, ("red", "green") if motion == "collision" else ("red",), direction)
    banks = {}
    for number, violation in enumerate((None, *BASE_VIOLATIONS[motion])):
        rng = np.random.default_rng([_SEED, number])
        scenes = [sample_scene(rng, times, aspect, spec=spec, violation=violation) for _ in range(BANK_SIZE)]
        paths, visible = (np.stack(part) for part in zip(*(trajectory(s, times) for s in scenes), strict=True))
        margin = 0.05  # a body that is cut by the edge by more than this is not followed reliably
        inside = ((paths > -margin) & (paths < np.array([aspect, 1.0]) + margin)).all(axis=-1)
        banks[violation or LAWFUL] = _Bank(paths, visible & inside)
    return banks


def _nearest(bank: _Bank, positions: Array, visible: NDArray[np.bool_]) -> float:
    """Distance to the nearest path of the bank, or to what lies between the nearest ones."""
    distances = _distances(bank.paths, bank.shown, positions, visible)
    order = distances.argsort()[:NEIGHBOURS]
    closest, shown = bank.paths[order[0]], bank.shown[order[0]]
    counted = shown & visible
    if not counted.any():
        return float(distances[order[0]])
    # The path is continued from the nearest one along its differences to the others, by ridge regression.
    directions = (bank.paths[order[1:]] - closest)[:, counted].reshape(len(order) - 1, -1)
    target = (positions - closest)[counted].reshape(-1)
    gram = directions @ directions.T
    weights = np.linalg.solve(gram + (1e-3 * np.trace(gram) + 1e-9) * np.eye(len(gram)), directions @ target)
    weights = weights.clip(-_SHARPEST_MIX, 1 + _SHARPEST_MIX)
    mixed = closest + np.tensordot(weights, bank.paths[order[1:]] - closest, axes=1)
    between = _distances(mixed[None], shown[None], positions, visible)[0]
    return float(min(distances[order[0]], between))


def _distances(paths: Array, shown: NDArray[np.bool_], positions: Array, visible: NDArray[np.bool_]) -> Array:
    """`(K,)` mean distances to paths `(K, T, N, 2)`, the worst frame of 13 left out: one bad frame is no other way."""
    off = np.minimum(np.linalg.norm(paths - positions, axis=-1), UNSEEN)
    off = np.where(shown & visible, off, np.where(shown != visible, UNSEEN, 0.0)).mean(axis=2)
    kept = off.shape[1] - round(off.shape[1] / 13)
    return np.sort(off, axis=1)[:, :kept].mean(axis=1)
