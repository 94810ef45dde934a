"""
The laws of motion of the sandbox, as closed forms or small integrations over time.

Units: lengths in frame heights (1.0 is the height of the picture), time in seconds, angles in radians. `y` points up
and is 0 at the bottom edge. Every function takes `times` of shape `(T,)`, float64, increasing, and returns the
coordinate(s) at those times. The simulator draws what they return; the judge fits their parameters to what it tracked.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray


Array = NDArray[np.float64]

GRAVITY = 2.0  # frame heights / s^2: a ball dropped from the top reaches the floor in about 0.9 s
REST_SPEED = (
    0.05  # below this rebound speed a ball stays on the floor: stops the infinite series of ever smaller bounces
)


def bounce(times: Array, height: float, velocity: float, gravity: float, restitution: float) -> Array:
    """
    Height above the floor, `(T,)`, of a ball under constant gravity that bounces at height 0.

    Args:
        times: `(T,)` seconds, starting at or after 0.
        height: height above the floor at time 0, >= 0.
        velocity: upward velocity at time 0.
        gravity: downward acceleration; 0 gives straight lines, a negative value falls upwards.
        restitution: rebound speed over impact speed; above 1 every bounce gains energy. `math.inf` means no floor.
    """
    if math.isinf(restitution):
        return height + velocity * times - 0.5 * gravity * times**2
    path = np.empty_like(times)
    start, remaining = 0.0, np.ones(len(times), dtype=bool)
    while remaining.any():
        elapsed = times - start
        landing = _landing_time(height, velocity, gravity)
        here = remaining & (elapsed < landing)
        path[here] = (height + velocity * elapsed - 0.5 * gravity * elapsed**2)[here]
        remaining &= ~here
        if not remaining.any():
            break
        start += landing
        height, velocity = 0.0, -restitution * (velocity - gravity * landing)
        if velocity < REST_SPEED:
            path[remaining] = 0.0
            break
    return path


def _landing_time(height: float, velocity: float, gravity: float) -> float:
    """Seconds until `height` reaches 0 (`inf` if never)."""
    if gravity == 0.0:
        return -height / velocity if velocity < 0 else math.inf
    discriminant = velocity**2 + 2 * gravity * height
    if discriminant < 0:
        return math.inf
    landing = (velocity + math.sqrt(discriminant)) / gravity
    return landing if landing > 0 else math.inf


def roll(times: Array, position: float, velocity: float, deceleration: float) -> Array:
    """
    Position, `(T,)`, of a ball that rolls with constant friction until it stands still.

    Args:
        times: `(T,)` seconds.
        position: start.
        velocity: signed start velocity.
        deceleration: size of the friction deceleration; negative speeds the ball up (a violation).
    """
    if deceleration > 0:
        times = np.minimum(times, abs(velocity) / deceleration)
    return position + velocity * times - 0.5 * math.copysign(deceleration, deceleration * velocity) * times**2


def slide(times: Array, acceleration: float) -> Array:
    """Distance, `(T,)`, covered along an incline from rest with constant acceleration."""
    return 0.5 * acceleration * times**2


def incline_acceleration(angle: float, friction: float, gravity: float = GRAVITY) -> float:
    """Acceleration down a slope: `g (sin a - mu cos a)`."""
    return gravity * (math.sin(angle) - friction * math.cos(angle))


def elastic_collision(velocity: float, mass: float, target_mass: float) -> tuple[float, float]:
    """Velocities `(v1, v2)` after a head-on elastic collision with a body at rest."""
    total = mass + target_mass
    return (mass - target_mass) / total * velocity, 2 * mass / total * velocity


def collide(
    times: Array, position: float, velocity: float, target: float, contact: float, after: tuple[float, float]
) -> Array:
    """
    Positions `(T, 2)` of a ball that hits a ball at rest and of that ball.

    Args:
        times: `(T,)` seconds.
        position: start of the moving ball.
        velocity: its signed velocity, non-zero, towards `target`.
        target: where the other ball rests.
        contact: distance of the centres at contact (sum of the radii, less for balls of different size on one floor).
        after: velocities of the two balls after the collision.
    """
    hit = (abs(target - position) - contact) / abs(velocity)
    before, later = np.minimum(times, hit), np.maximum(times - hit, 0.0)
    return np.stack([position + velocity * before + after[0] * later, target + after[1] * later], axis=1)


def pendulum(
    times: Array, angle: float, length: float, gravity: float = GRAVITY, angular_velocity: float = 0.0
) -> Array:
    """
    Angle from the vertical, `(T,)`, of a pendulum with any amplitude and no friction.

    Args:
        times: `(T,)` seconds, starting at or after 0.
        angle: angle at time 0, radians.
        length: from the pivot to the centre of the bob.
        gravity: downward acceleration.
        angular_velocity: at time 0, rad/s.
    """

    return _integrate(lambda angle, _: -gravity / length * math.sin(angle), angle, angular_velocity, times)


def buoyant(times: Array, depth: float, density: float, drag: float, radius: float, gravity: float = GRAVITY) -> Array:
    """
    Height of the ball's centre above the water surface, `(T,)` (negative under water), released at rest.

    The upward force is that of the displaced water, with linear drag under water; the ball carries half its displaced
    water along (added mass of a sphere), which is what keeps light balls from shooting up.

    Args:
        times: `(T,)` seconds.
        depth: centre below the surface at time 0.
        density: of the ball over that of water: below 1 it rises, above 1 it sinks.
        drag: 1/s, deceleration per unit of velocity when fully under water.
        radius: of the ball.
        gravity: downward acceleration.
    """

    def acceleration(height: float, velocity: float) -> float:
        submerged = min(max((radius - height) / (2 * radius), 0.0), 1.0)
        lift = gravity * (submerged - density) / (density + 0.5 * submerged)
        return lift - drag * submerged * velocity

    return _integrate(acceleration, -depth, 0.0, times)


def _integrate(
    acceleration: Callable[[float, float], float], position: float, velocity: float, times: Array, step: float = 0.02
) -> Array:
    """Positions, `(T,)`, at `times` by classical Runge-Kutta on plain floats, ten times faster than on arrays."""
    path, now = np.empty_like(times), 0.0
    for index, time in enumerate(times.tolist()):
        substeps = max(1, math.ceil((time - now) / step))
        h = (time - now) / substeps
        for _ in range(substeps):
            a1 = acceleration(position, velocity)
            v2 = velocity + 0.5 * h * a1
            a2 = acceleration(position + 0.5 * h * velocity, v2)
            v3 = velocity + 0.5 * h * a2
            a3 = acceleration(position + 0.5 * h * v2, v3)
            v4 = velocity + h * a3
            a4 = acceleration(position + h * v3, v4)
            position += h / 6 * (velocity + 2 * v2 + 2 * v3 + v4)
            velocity += h / 6 * (a1 + 2 * a2 + 2 * a3 + a4)
        path[index], now = position, time
    return path
