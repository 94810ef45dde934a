"""
Fitting the laws of motion to tracked positions.

A `Law` predicts positions for a whole batch of parameter vectors at once, in closed form where there is one, so that
many starting points and all partial derivatives cost one call each. Units as in `laws.py`; the tests hold the batched
forms to those of `laws.py`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ellipj

from ..world.geometry import FLOOR, PIVOT, WATER
from ..world.laws import GRAVITY, REST_SPEED


Array = NDArray[np.float64]

_DAMPING = np.array([1e-3, 1e-1, 10.0])  # tried side by side in every step; the best one is taken
_FLOOR_SLACK = 0.015  # the floor is known to a pixel
_BUOYANCY_STEP = 0.07  # seconds of the integration


@dataclass(frozen=True)
class Law:
    """
    A law of motion with free parameters.

    Attributes:
        names: of the P parameters.
        lower, upper: `(P,)` bounds: what the prompted motion may look like.
        starts: `(K, P)` where a fit begins.
        predict: `(K, P) -> (K, T, N, 2)` positions of the N bodies.
    """

    names: tuple[str, ...]
    lower: Array
    upper: Array
    starts: Array
    predict: Callable[[Array], Array]


@dataclass(frozen=True)
class Fit:
    """Best parameters, predicted centroids `(T, N, 2)` and distances to the observed ones `(T, N)`."""

    parameters: dict[str, float]
    positions: Array
    residuals: Array


def fit(
    law: Law,
    observed: Array,
    weights: Array,
    scale: Array,
    radii: Array,
    aspect: float,
    *,
    steps: int = 6,
    keep: int = 3,
) -> Fit:
    """
    Bounded robust least squares: damped Gauss-Newton on several starts at once.

    Args:
        law: what to fit.
        observed: `(T, N, 2)` centroids.
        weights: `(T, N)` in [0, 1], 0 where a body was not found.
        scale: `(N,)` distances at which a frame loses its say (Geman-McClure loss), so that the fit follows most
            frames and the others stand out.
        radii: `(N,)` of the bodies; a body half outside the picture is seen with a shifted centroid.
        aspect: width of the picture in frame heights.
        steps: Gauss-Newton steps.
        keep: how many of the best starts are refined.
    """

    def predict(parameters: Array) -> Array:
        return seen_centroids(law.predict(parameters), radii, aspect)

    def cost(residual: Array) -> Array:
        squared = (residual**2).sum(axis=3) / scale**2
        return (weights * squared / (1 + squared)).sum(axis=(1, 2))

    span = law.upper - law.lower
    epsilon = 1e-4 * span
    starts = law.starts.clip(law.lower, law.upper)
    costs = cost(predict(starts) - observed)
    best = np.argsort(costs)[:keep]
    points, costs = starts[best], costs[best]
    for _ in range(steps):
        probes = np.concatenate([points[:, None], points[:, None] + np.diag(epsilon)], axis=1)
        paths = predict(probes.reshape(-1, len(span))).reshape(*probes.shape[:2], *observed.shape)
        residual = paths[:, 0] - observed
        squared = (residual**2).sum(axis=3) / scale**2
        pull = np.sqrt(weights) / (1 + squared)  # square root of the loss's weight
        slopes = (paths[:, 1:] - paths[:, :1]) / 1e-4  # per span: parameters of like size
        jacobian = (slopes * pull[:, None, ..., None]).reshape(len(points), len(span), -1)
        target = (residual * pull[..., None]).reshape(len(points), -1, 1)
        moves = _damped_steps(jacobian, target) * span
        trials = (points[:, None] + moves).clip(law.lower, law.upper)
        values = cost(predict(trials.reshape(-1, len(span))) - observed).reshape(len(points), -1)
        choice = values.argmin(axis=1)
        rows = np.arange(len(points))
        better = values[rows, choice] < costs
        gain = float((costs - values[rows, choice])[better].max(initial=0.0))
        points[better], costs[better] = trials[rows, choice][better], values[rows, choice][better]
        if gain < 1e-3:
            break
    winner = points[costs.argmin()]
    positions = predict(winner[None])[0]
    residuals = np.linalg.norm(positions - observed, axis=2)
    return Fit(dict(zip(law.names, winner.tolist(), strict=True)), positions, residuals)


def _damped_steps(jacobian: Array, target: Array) -> Array:
    """Steps `(K, D, P)` for every damping, from Jacobians `(K, P, M)` and residuals `(K, M, 1)`."""
    normal = jacobian @ jacobian.transpose(0, 2, 1)
    gradient = jacobian @ target
    diagonal = np.einsum("kii->ki", normal) + 1e-6
    ridge = _DAMPING[:, None, None] * (np.eye(normal.shape[1]) * diagonal[:, None, None, :])
    return -np.linalg.solve(normal[:, None] + ridge, gradient[:, None])[..., 0]


def seen_centroids(positions: Array, radii: Array, aspect: float) -> Array:
    """Centroids `(..., N, 2)` of the visible parts of discs at `positions` in a picture `aspect` wide and 1 high."""
    limits = np.array([aspect, 1.0])
    size = radii[:, None]
    beyond_low, beyond_high = size - positions, positions + size - limits
    if max(beyond_low.max(), beyond_high.max()) <= 0:
        return positions
    shift_low, shift_high = _cut_disc(positions / size)[1], _cut_disc((limits - positions) / size)[1]
    return positions + size * (shift_low - shift_high)


def visible_share(positions: Array, radii: Array, aspect: float) -> Array:
    """Share in [0, 1] of the discs at `positions` `(..., N, 2)` that lies inside the picture: `(..., N)`."""
    size = radii[:, None]
    low, high = _cut_disc(positions / size)[0], _cut_disc((np.array([aspect, 1.0]) - positions) / size)[0]
    return (low + high - 1).clip(0, 1).prod(axis=-1)


def _cut_disc(distance: Array) -> tuple[Array, Array]:
    """Share of a unit disc on the near side of a chord at `distance`, and how far its centroid moves off the chord."""
    d = distance.clip(-0.98, 1)
    root = np.sqrt(1 - d**2)
    share = 1 - (np.arccos(d) - d * root) / math.pi
    return share, 2 / 3 * root**3 / (math.pi * share)


# ---- batched laws ---------------------------------------------------------------------------------------------------


def bounces(times: Array, height: Array, velocity: Array, restitution: Array, gravity: float = GRAVITY) -> Array:
    """`laws.bounce` for parameters `(K, 1)`, restitution below 1: heights above the floor `(K, T)`."""
    impact = np.sqrt(velocity**2 + 2 * gravity * height)
    landing = (velocity + impact) / gravity
    flight = 2 * restitution * impact / gravity  # duration of the flight after the first impact; later ones shrink
    since = (times - landing).clip(0)
    # Flights 1..n last flight * (1 - e^n) / (1 - e): invert for the number of the flight that is under way.
    rest = (1 - since * (1 - restitution) / flight.clip(1e-9)).clip(1e-12)
    number = np.floor(np.log(rest) / np.log(restitution) + 1e-9)
    speed = restitution ** (number + 1) * impact
    elapsed = since - flight * (1 - restitution**number) / (1 - restitution)
    later = np.where(speed < REST_SPEED, 0.0, (speed * elapsed - 0.5 * gravity * elapsed**2).clip(0))
    first = height + velocity * times - 0.5 * gravity * times**2
    return np.where(times < landing, first, later)


def rolls(times: Array, position: Array, velocity: Array, deceleration: Array) -> Array:
    """`laws.roll` for parameters `(K, 1)`, deceleration > 0: positions `(K, T)`."""
    moving = np.minimum(times, np.abs(velocity) / deceleration)
    return position + velocity * moving - 0.5 * np.sign(velocity) * deceleration * moving**2


def pendulums(times: Array, angle: Array, length: Array, gravity: float = GRAVITY) -> Array:
    """`laws.pendulum` released at rest, exactly, by elliptic functions; times `(T,)` or `(K, T)`: angles `(K, T)`."""
    modulus = np.sin(0.5 * np.abs(angle))
    phase = np.sqrt(gravity / length) * times
    _, cn, dn, _ = ellipj(phase, np.broadcast_to(modulus**2, phase.shape))
    return 2 * np.sign(angle) * np.arcsin((modulus * cn / dn).clip(-1, 1))


def buoyants(times: Array, depth: Array, density: Array, drag: Array, radius: float) -> Array:
    """`laws.buoyant` for parameters `(K,)`, by a leapfrog with implicit drag: heights above the surface `(K, T)`."""
    height, speed, now = -depth, np.zeros_like(depth), 0.0
    path = np.empty((len(times), len(depth)))
    for index, time in enumerate(times):
        substeps = math.ceil((time - now) / _BUOYANCY_STEP)
        h = (time - now) / max(1, substeps)
        for _ in range(substeps):
            height = height + 0.5 * h * speed
            submerged = np.minimum(np.maximum(0.5 - height / (2 * radius), 0.0), 1.0)
            push = h * GRAVITY * (submerged - density) / (density + 0.5 * submerged)
            brake = 0.5 * h * drag * submerged
            speed = (speed * (1 - brake) + push) / (1 + brake)
            height = height + 0.5 * h * speed
        path[index], now = height, time
    return path.T


# ---- the laws of the prompts ----------------------------------------------------------------------------------------


def _grid(*axes: tuple[float, ...] | Array) -> Array:
    """Cartesian product of the axes, `(K, P)`."""
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(axes))


def _law(bounds: dict[str, tuple[float, float]], starts: Array, predict: Callable[[Array], Array]) -> Law:
    lower, upper = (np.array([pair[i] for pair in bounds.values()], dtype=np.float64) for i in (0, 1))
    return Law(tuple(bounds), lower, upper, starts, predict)


def _columns(parameters: Array) -> list[Array]:
    return [parameters[:, i : i + 1] for i in range(parameters.shape[1])]


def _path(x: Array, y: Array) -> Array:
    """Positions `(K, T, 1, 2)` of one body from coordinates that broadcast to `(K, T)`."""
    return np.stack(np.broadcast_arrays(x, y), axis=-1)[:, :, None]


def free_fall(times: Array, path: Array, radius: float, aspect: float) -> Law:
    """Dropped, bounces on the floor. `path`: the observed `(n, 2)` positions of confident frames."""
    bounds = {
        "x": (0.0, aspect),
        "height": (0.15, 0.95),
        "velocity": (-0.2, 0.2),
        "restitution": (0.5, 0.92),
        "floor": (-_FLOOR_SLACK, _FLOOR_SLACK),
    }
    start = path[0, 1] - FLOOR - radius
    heights = start + np.array([-0.06, 0.0, 0.06])
    starts = _grid(
        (float(np.median(path[:, 0])),), np.append(heights, (0.4, 0.6)), (0.0,), (0.55, 0.65, 0.75, 0.85), (0.0,)
    )

    def predict(parameters: Array) -> Array:
        x, height, velocity, restitution, floor = _columns(parameters)
        return _path(x + 0 * times, FLOOR + radius + floor + bounces(times, height, velocity, restitution))

    return _law(bounds, starts, predict)


def projectile(times: Array, path: Array, path_times: Array, radius: float, aspect: float) -> Law:
    """Thrown, bounces on the floor."""
    duration = max(float(times[-1]), 1e-6)
    bounds = {
        "x": (-0.1, aspect + 0.1),
        "vx": (-1.2 * aspect / duration, 1.2 * aspect / duration),
        "height": (0.0, 0.6),
        "vy": (0.3, 1.5),
        "restitution": (0.5, 0.92),
        "floor": (-_FLOOR_SLACK, _FLOOR_SLACK),
    }
    lines = _line_starts(path_times, path[:, 0])
    height = float(path[0, 1] - FLOOR - radius)
    rest = _grid((height - 0.04, height + 0.02, 0.1, 0.22), (0.5, 0.7, 0.9, 1.1), (0.6, 0.72, 0.85), (0.0,))
    starts = np.concatenate([np.column_stack([np.tile(line, (len(rest), 1)), rest]) for line in lines])

    def predict(parameters: Array) -> Array:
        x, vx, height, vy, restitution, floor = _columns(parameters)
        return _path(x + vx * times, FLOOR + radius + floor + bounces(times, height, vy, restitution))

    return _law(bounds, starts, predict)


def _line_starts(times: Array, values: Array) -> list[tuple[float, float]]:
    """(start, slope) of straight lines through all, the first half and the second half of the values."""
    half = max(2, len(values) // 2)
    lines = []
    for t, v in ((times, values), (times[:half], values[:half]), (times[-half:], values[-half:])):
        if len(t) < 2:
            lines.append((float(v[0]), 0.0))
            continue
        differences = np.subtract.outer(v, v)[np.triu_indices(len(v), 1)]
        slope = float(np.median(differences / np.subtract.outer(t, t)[np.triu_indices(len(t), 1)]))
        lines.append((float(np.median(v - slope * t)), slope))
    return lines


def rolling(times: Array, path: Array, path_times: Array, radius: float, aspect: float) -> Law:
    """Rolls on the floor, slower and slower; the friction is one that stops it late in the clip or after it."""
    duration = max(float(times[-1]), 1e-6)
    fastest = 3.0 * aspect / duration
    bounds = {
        "x": (-0.1, aspect + 0.1),
        "vx": (-fastest, fastest),
        "stop": (0.7 * duration, 2.5 * duration),
        "floor": (-_FLOOR_SLACK, _FLOOR_SLACK),
    }
    first, slope = _line_starts(path_times, path[:, 0])[1]
    speeds = slope * np.array([0.9, 1.15, 1.5, 2.0])
    starts = _grid((first, float(path[0, 0])), speeds, np.array([0.72, 0.9, 1.2, 1.8]) * duration, (0.0,))

    def predict(parameters: Array) -> Array:
        x, vx, stop, floor = _columns(parameters)
        return _path(rolls(times, x, vx, np.abs(vx).clip(1e-6) / stop), FLOOR + radius + floor + 0 * times)

    return _law(bounds, starts, predict)


def incline(times: Array, path: Array, half_side: float, aspect: float) -> Law:
    """Slides from rest down a ramp that falls across the whole picture, to the right if `angle` is positive."""
    duration = max(float(times[-1]), 1e-6)
    reach = 1.2 * aspect
    bounds = {
        "start": (-0.1, reach),
        "angle": (-math.radians(45), math.radians(45)),
        "acceleration": (0.15 * 2 * aspect / duration**2, 1.1 * 2 * aspect / duration**2),
        "offset": (-0.04, 0.04),
    }
    way = path[-1] - path[0]
    sign = 1.0 if way[0] >= 0 else -1.0
    angle = math.atan2(-way[1], abs(way[0]) + 1e-9)
    angles = sign * np.array([angle if 0.2 < angle < 0.8 else 0.45, 0.38, 0.55])
    from_top = path[0, 0] if sign > 0 else aspect - path[0, 0]
    rates = np.array([0.3, 0.45, 0.6, 0.8]) * 2 * aspect / duration**2
    starts = _grid(np.array([from_top - 0.08, from_top, from_top + 0.08]), angles, rates, (0.0,))

    def predict(parameters: Array) -> Array:
        start, angle, acceleration, offset = _columns(parameters)
        side, steep = np.sign(angle), np.abs(angle)
        distance = start / np.cos(steep) + 0.5 * acceleration * times**2
        above = half_side + offset
        x = distance * np.cos(steep) + above * np.sin(steep)
        y = FLOOR + aspect * np.tan(steep) - distance * np.sin(steep) + above * np.cos(steep)
        return _path(np.where(side > 0, x, aspect - x), y)

    return _law(bounds, starts, predict)


def collision(times: Array, paths: Array, confident: NDArray[np.bool_], radii: Array, aspect: float) -> Law:
    """
    One ball hits another at rest, elastically; masses go with the squares of the radii.

    Args:
        paths: `(T, 2, 2)`, confident: `(T, 2)`.
    """
    duration = max(float(times[-1]), 1e-6)
    mover = _mover(paths, confident)
    target = 1 - mover
    bounds = {
        "x": (-0.1, aspect + 0.1),
        "vx": (-4 * aspect / duration, 4 * aspect / duration),
        "target": (0.0, aspect),
        "mass_ratio": (0.8, 1.25),  # over the one that the radii say
        "contact": (-0.02, 0.02),  # over the one that the radii say
        "floor": (-_FLOOR_SLACK, _FLOOR_SLACK),
    }
    touching = 2 * math.sqrt(radii[0] * radii[1])
    ratio = (radii[mover] / radii[target]) ** 2
    early = confident[:, mover] & (times <= 0.5 * duration)
    seen = np.flatnonzero(early if early.sum() >= 2 else confident[:, mover])
    first = float(paths[seen[0], mover, 0]) if len(seen) else 0.2
    rest = np.flatnonzero(confident[:, target])
    place = float(np.median(paths[rest[: max(1, len(rest) // 3)], target, 0])) if len(rest) else 0.5 * aspect
    speeds = math.copysign(aspect / duration, place - first) * np.array([0.3, 0.4, 0.5, 0.65, 0.85, 1.1])
    starts = _grid((first,), speeds, (place,), (1.0,), (0.0,), (0.0,))

    def predict(parameters: Array) -> Array:
        x, vx, aim, factor, slack, floor = _columns(parameters)
        hit = ((np.abs(aim - x) - touching - slack) / np.abs(vx).clip(1e-6)).clip(0)
        before, later = np.minimum(times, hit), (times - hit).clip(0)
        mass = ratio * factor
        first_path = x + vx * before + (mass - 1) / (mass + 1) * vx * later
        second_path = aim + 2 * mass / (mass + 1) * vx * later
        both = [first_path, second_path] if mover == 0 else [second_path, first_path]
        heights = [FLOOR + radii[i] + floor + 0 * times for i in range(2)]
        return np.concatenate([_path(both[i], heights[i]) for i in range(2)], axis=2)

    return _law(bounds, starts, predict)


def _mover(paths: Array, confident: NDArray[np.bool_]) -> int:
    """Index of the ball that moves first: the one that went further in the first third."""
    early = max(3, len(paths) // 3)
    spans = [
        np.ptp(paths[:early, i, 0][confident[:early, i]]) if confident[:early, i].any() else 0.0 for i in range(2)
    ]
    return int(spans[1] > spans[0])


def pendulum(times: Array, path: Array, path_times: Array, radius: float, aspect: float) -> Law:
    """Swings on a rod around a pivot in the middle of the picture, released at rest."""
    bounds = {"angle": (-1.4, 1.4), "length": (0.3, 0.75), "lead": (-0.1, 0.1)}
    offset = path - [aspect / 2, PIVOT]
    angles = np.arctan2(offset[:, 0], -offset[:, 1])
    length = float(np.median(np.linalg.norm(offset, axis=1)))
    first = float(angles[0])
    starts = _grid((first, 0.8 * first, 1.2 * first, -0.8, 0.8), (length, 0.45, 0.55), (0.0,))

    def predict(parameters: Array) -> Array:
        angle, length, lead = _columns(parameters)
        # Released `lead` seconds before the first frame; a pendulum's path is even in time.
        swing = pendulums(times + lead, angle, length)
        return _path(aspect / 2 + length * np.sin(swing), PIVOT - length * np.cos(swing))

    return _law(bounds, starts, predict)


def buoyancy(times: Array, path: Array, radius: float, aspect: float, rises: bool) -> Law:
    """Released at rest in water; a light ball rises, a heavy one sinks to the floor."""
    bounds = {
        "x": (0.0, aspect),
        "depth": (0.0, 0.55),
        "density": (0.25, 0.85) if rises else (1.25, 3.0),
        "drag": (0.5, 4.0),
    }
    depth = WATER - float(path[0, 1])
    densities = (0.35, 0.5, 0.65, 0.8) if rises else (1.4, 1.8, 2.3)
    starts = _grid((float(np.median(path[:, 0])),), (depth - 0.03, depth + 0.03), densities, (0.8, 1.4, 2.2))

    def predict(parameters: Array) -> Array:
        x, depth, density, drag = parameters.T
        height = WATER + buoyants(times, depth, density, drag, radius)
        return _path(x[:, None], np.maximum(height, FLOOR + radius))

    return _law(bounds, starts, predict)


def still(path: Array, num_frames: int, drifts: bool) -> Law:
    """Stands still, or drifts with a panning camera."""
    bounds = {"x": (-0.5, 3.0), "y": (0.0, 1.0), "drift": (-1.0, 1.0) if drifts else (-1e-6, 1e-6)}
    middle = np.median(path, axis=0)
    starts = np.array([[middle[0], middle[1], 0.0], [path[0, 0], path[0, 1], path[-1, 0] - path[0, 0]]])
    progress = np.linspace(0, 1, num_frames)

    def predict(parameters: Array) -> Array:
        x, y, drift = _columns(parameters)
        return _path(x + drift * progress, y)

    return _law(bounds, starts, predict)
