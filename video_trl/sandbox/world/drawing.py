"""Anti-aliased drawing of a scene: signed distances to discs, boxes, segments and half-planes, one sample a pixel."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import laws
from .geometry import FLOOR, PIVOT, WATER, ramp_axes, ramp_top
from .prompts import STILL_SCENES, PromptSpec
from .wild import Look


Image = NDArray[np.float64]

BODY_RGB = {
    "red": (0.86, 0.12, 0.12),
    "orange": (0.96, 0.52, 0.06),
    "yellow": (0.95, 0.87, 0.12),
    "green": (0.12, 0.66, 0.22),
    "blue": (0.12, 0.28, 0.88),
    "purple": (0.56, 0.16, 0.74),
}
# Backgrounds are dull on purpose: colour is what tells a body from its surroundings.
WALLS = ((0.80, 0.80, 0.80), (0.72, 0.75, 0.78), (0.84, 0.82, 0.77), (0.62, 0.64, 0.66), (0.78, 0.74, 0.74))
FLOORS = ((0.42, 0.38, 0.35), (0.35, 0.35, 0.37), (0.50, 0.47, 0.42), (0.30, 0.32, 0.31))
WATER_RGB = (0.55, 0.68, 0.76)
ROD_RGB = (0.25, 0.25, 0.27)


@dataclass(frozen=True)
class Appearance:
    """Radii (frame heights) and colours of the bodies, colours of the background, brightness slope of the wall."""

    radii: tuple[float, ...]
    colours: tuple[str, ...]
    wall: tuple[float, float, float]
    floor: tuple[float, float, float]
    slope: float
    decoration: float  # x of a poster on the wall of a still scene

    @classmethod
    def sample(cls, rng: np.random.Generator, spec: PromptSpec) -> "Appearance":
        return cls(
            radii=tuple(float(rng.uniform(0.07, 0.10)) for _ in spec.colours),
            colours=spec.colours,
            wall=WALLS[rng.integers(len(WALLS))],
            floor=FLOORS[rng.integers(len(FLOORS))],
            slope=float(rng.uniform(-0.12, 0.12)),
            decoration=float(rng.uniform(0.1, 0.6)),
        )

    @staticmethod
    def aspect(params: dict[str, float]) -> float:
        """Width of the picture in frame heights, as far as the parameters of the motion tell; 1 otherwise."""
        return params.get("aspect", 2 * params["pivot_x"] if "pivot_x" in params else 1.0)


def draw(
    appearance: Appearance,
    positions: laws.Array,
    visible: NDArray[np.bool_],
    params: dict[str, float],
    motion: str,
    height: int,
    width: int,
    look: Look | None = None,
) -> NDArray[np.uint8]:
    """
    Draws a scene.

    Args:
        appearance: sizes and colours.
        positions: `(T, N, 2)` centres in frame heights, y up.
        visible: `(T, N)`.
        params: parameters of the motion (ramp angle, pivot, ...).
        motion: decides the scenery and the shape of the body.
        height, width: of the picture, pixels.
        look: draws it "in the wild"; plainly if None.

    Returns:
        uint8 `(T, H, W, 3)`.
    """
    grid, progress = _pixel_grid(height, width), np.arange(len(positions)) / max(1, len(positions) - 1)
    camera = np.zeros((len(positions), 2)) if look is None else look.camera(progress)
    if motion == "pan":
        camera[:, 0] += 0.35 * progress
    moves, scenery = bool(camera.any()), _scenery(appearance, params, motion, grid, look)
    frames = np.empty((len(positions), height, width, 3))
    for index, (centres, shown) in enumerate(zip(positions, visible, strict=True)):
        view = grid + camera[index]
        image = _scenery(appearance, params, motion, view, look) if moves else scenery.copy()
        for body, centre in enumerate(centres):
            if not shown[body]:
                continue
            if motion == "pendulum":
                _paint(image, _segment(view, _pivot(params), centre) - 0.008, ROD_RGB, height)
            _paint_body(image, view, centre, appearance, body, params, motion, height)
        if motion == "fade":
            image *= 1 - 0.8 * progress[index]
        frames[index] = image
    if look is not None:
        frames = look.develop(frames, grid)
    return np.rint(frames.clip(0, 1) * 255).astype(np.uint8)


def _pixel_grid(height: int, width: int) -> Image:
    """`(H, W, 2)` pixel centres as (x, y) in frame heights, y up."""
    x, y = (np.arange(width) + 0.5) / height, 1 - (np.arange(height) + 0.5) / height
    return np.stack(np.broadcast_arrays(x[None, :], y[:, None]), axis=2)


def _scenery(appearance: Appearance, params: dict[str, float], motion: str, grid: Image, look: Look | None) -> Image:
    height = grid.shape[0]
    brightness = 1 + appearance.slope * (grid[..., 1:] - 0.5)
    image = np.array(appearance.wall) * brightness
    if motion in STILL_SCENES:
        poster = _box(grid, np.array([appearance.decoration, 0.65]), np.array([0.12, 0.1]), 0.0)
        _paint(image, poster, (0.55, 0.6, 0.58), height)
    if motion == "buoyancy":
        _paint(image, grid[..., 1] - WATER, WATER_RGB, height)
    if motion == "incline":
        _, normal = ramp_axes(params["angle"], params["sign"])
        _paint(image, (grid - ramp_top(params)) @ normal, tuple(0.8 * c for c in appearance.floor), height)
    _paint(image, grid[..., 1] - FLOOR, appearance.floor, height)
    return image if look is None else image + look.wall(grid)


def _paint_body(
    image: Image,
    grid: Image,
    centre: laws.Array,
    appearance: Appearance,
    body: int,
    params: dict[str, float],
    motion: str,
    height: int,
) -> None:
    radius, colour = appearance.radii[body], np.array(BODY_RGB[appearance.colours[body]])
    if motion == "incline":
        distance = _box(grid, centre, np.array([radius, radius]), -params["sign"] * params["angle"])
    else:
        distance = np.linalg.norm(grid - centre, axis=2) - radius
    # A soft light from the upper left makes a disc look like a ball.
    light = 1 + 0.15 * ((grid - centre) @ np.array([-0.7, 0.7]) / radius).clip(-1, 1)[..., None]
    _paint(image, distance, colour * light, height)


def _paint(image: Image, distance: Image, colour: ArrayLike, height: int) -> None:
    """Blends `colour` in place where `distance` (frame heights) is negative, over one pixel at the edge."""
    cover = (0.5 - distance * height).clip(0, 1)[..., None]
    image += cover * (np.asarray(colour) - image)


def _box(grid: Image, centre: laws.Array, half: laws.Array, angle: float) -> Image:
    """Signed distance to a box turned by `angle`."""
    cos, sin = math.cos(angle), math.sin(angle)
    offset = (grid - centre) @ np.array([[cos, -sin], [sin, cos]])
    outside = np.abs(offset) - half
    return np.linalg.norm(outside.clip(0), axis=2) + outside.max(axis=2).clip(max=0)


def _segment(grid: Image, start: laws.Array, end: laws.Array) -> Image:
    """Distance to a line segment."""
    direction = end - start
    along = ((grid - start) @ direction / (direction @ direction + 1e-12)).clip(0, 1)
    return np.linalg.norm(grid - start - along[..., None] * direction, axis=2)


def _pivot(params: dict[str, float]) -> laws.Array:
    return np.array([params["pivot_x"], PIVOT])
