"""Reading the scenery off the pixels: water, a ramp, a pendulum's rod."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..world.geometry import FLOOR, PIVOT, WATER
from .tracking import WATER_CHROMA, Body, Observation


# Contrasts that count as none and as enough: what noise makes at most, what blurred scenery makes at least.
_WATER_CONTRAST = (0.02, 0.06)  # chroma difference along the water's hue
_RAMP_CONTRAST = (0.05, 0.15)  # luminance difference of the two sides of the picture above the floor
_ROD_CONTRAST = (0.05, 0.13)  # how much darker than the wall the rod is

_ARC_SPREAD = (0.015, 0.04)  # standard deviation of the distance to the pivot (frame heights): a circle's, any path's
_ARC_LENGTH = (0.64, 0.72)  # mean distance to the pivot that a pendulum may have, and that a ball on the floor has


@dataclass(frozen=True)
class Scenery:
    """
    What stands around the bodies.

    Attributes:
        water, ramp: in [0, 1], whether there is some.
        observation: what the rod is looked up in: its place depends on the body.
    """

    water: float
    ramp: float
    observation: Observation

    def rod(self, body: Body) -> float:
        """In [0, 1], whether a dark line connects the body with the pivot."""
        seen = self.observation
        frames = np.flatnonzero(body.confidence > 0.5)
        if not len(frames):
            return 0.0
        pivot = np.array([seen.aspect / 2, PIVOT])
        steps = np.linspace(0.15, 0.65, 6)
        points = pivot + steps[:, None, None] * (body.positions[frames] - pivot)  # (6, n, 2)
        height, width = seen.luminance.shape[1:]
        row = ((1 - points[..., 1]) * height).astype(np.intp).clip(0, height - 1)
        column = (points[..., 0] * height).astype(np.intp)
        around = [seen.luminance[frames, row, (column + shift).clip(0, width - 1)] for shift in (-1, 0, 1)]
        darker = seen.row_luminance[row] - np.min(around, axis=0)
        return _share(float(np.median(darker)), *_ROD_CONTRAST)

    def arc(self, body: Body, cut: int | None) -> float:
        """In [0, 1], whether the body keeps a pendulum's distance to the pivot, up to frame `cut`."""
        pivot = np.array([self.observation.aspect / 2, PIVOT])
        path = body.positions[:cut][body.confidence[:cut] > 0.5]
        if len(path) < 3:
            return 0.0
        distance = np.linalg.norm(path - pivot, axis=1)
        return (1 - _share(float(distance.std()), *_ARC_SPREAD)) * (1 - _share(float(distance.mean()), *_ARC_LENGTH))

    def match(self, motion: str, body: Body, cut: int | None) -> float:
        """In [0, 1], whether the scenery is that of `motion`; scenery of another motion counts against it."""
        rod = self.rod(body)
        own = {"buoyancy": self.water, "incline": self.ramp, "pendulum": rod}
        strange = max((value for name, value in own.items() if name != motion), default=0.0)
        if motion == "pendulum":  # a rod is thin, and the first thing that a small autoencoder loses
            own["pendulum"] = max(rod, self.arc(body, cut))
        return own.get(motion, 1.0) * (1 - 0.7 * strange)


def read_scenery(seen: Observation) -> Scenery:
    """Looks for water and a ramp in a clip."""
    return Scenery(_water(seen), _ramp(seen), seen)


def _heights(seen: Observation) -> NDArray[np.float64]:
    rows = len(seen.row_luminance)
    return 1 - (np.arange(rows) + 0.5) / rows


def _water(seen: Observation) -> float:
    """Whether the colour changes towards that of water right at the surface."""
    y = _heights(seen)
    below, above = (y > WATER - 0.12) & (y < WATER - 0.03), (y > WATER + 0.03) & (y < WATER + 0.12)
    if not (below.any() and above.any()):
        return 0.0
    difference = seen.row_chroma[below].mean(axis=0) - seen.row_chroma[above].mean(axis=0)
    return _share(float(difference @ WATER_CHROMA) / float(np.linalg.norm(WATER_CHROMA)), *_WATER_CONTRAST)


def _ramp(seen: Observation) -> float:
    """
    Whether one side of the picture is darker than the other just above the floor, bodies left out, and more so than
    above every ramp, where only uneven light can make a difference.
    """
    y = _heights(seen)
    low, high = _sides(seen, (y > FLOOR + 0.16) & (y < FLOOR + 0.24)), _sides(seen, (y > 0.84) & (y < 0.98))
    return _share(abs(low - high), *_RAMP_CONTRAST)


def _sides(seen: Observation, band: NDArray[np.bool_]) -> float:
    """Luminance of the left quarter of the rows in `band` minus that of the right one; 0 where one is hidden."""
    luminance, plain = seen.luminance[:, band], seen.plain[:, band]
    quarter = max(1, luminance.shape[2] // 4)
    left, right = plain[..., :quarter], plain[..., -quarter:]
    if not (left.any() and right.any()):
        return 0.0
    return float(luminance[..., :quarter][left].mean() - luminance[..., -quarter:][right].mean())


def _share(value: float, low: float, high: float) -> float:
    return min(max((value - low) / (high - low), 0.0), 1.0)
