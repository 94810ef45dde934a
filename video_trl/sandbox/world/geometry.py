"""Where things stand in the pictures of the sandbox, in frame heights, y up."""

import math

import numpy as np

from .laws import Array


FLOOR = 0.12  # height of the floor line
PIVOT = 0.92  # height of a pendulum's pivot
WATER = 0.62  # height of the water surface


def ramp_top(p: dict[str, float]) -> Array:
    """Upper end of the ramp, which falls across the whole picture and ends on the floor."""
    x = 0.0 if p["sign"] > 0 else p["aspect"]
    return np.array([x, FLOOR + p["aspect"] * math.tan(p["angle"])])


def ramp_axes(angle: float, sign: float) -> tuple[Array, Array]:
    """Unit vectors down the ramp and away from it."""
    along = np.array([sign * math.cos(angle), -math.sin(angle)])
    return along, np.array([sign * math.sin(angle), math.cos(angle)])
