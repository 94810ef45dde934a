"""
Finding the coloured bodies of a clip, from pixels alone.

Backgrounds are dull and bodies are not, so a body is where the chroma differs from that of its row of the picture. A
pixel's *cover* is that difference over the one a body of its hue would make: 1 inside, fractions at the edge, which is
what makes centroids sub-pixel. Lengths are in frame heights, y points up.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..world.drawing import BODY_RGB, WATER_RGB
from ..world.prompts import COLOURS


Array = NDArray[np.float64]

WORKING_SIZE = 64  # larger pictures are averaged down to about this many pixels on the short side
COVER_RANGE = (0.2, 0.8)  # covers that count as nothing and as all; symmetric about 1/2, which keeps areas unbiased
MIN_CHROMA = 0.075  # below this a pixel is background: three standard deviations of noise of 5/255
VIVID_CHROMA = 0.2  # above this a pixel belongs to a body; walls, ramps and floors differ by 0.1 at most
MAX_VIVID = 0.4  # a clip with a larger share of vivid pixels is noise or a colourful scene: no bodies to follow
TYPICAL_RADIUS = 0.085
RADII = (0.035, 0.2)  # what passes for a body
_CELL = 1 / 16  # of the histogram that finds where most of a colour is; three cells are about one body
_REACH = 0.16  # a first window around that place


@dataclass(frozen=True)
class Body:
    """
    One tracked body.

    Attributes:
        colour: nearest of `COLOURS`; `hue` in degrees.
        positions: `(T, 2)` centroids (x, y); 0 where nothing was found.
        area: `(T,)` covered area, squared frame heights.
        concentration: `(T,)` share of the body's colour in that frame that lies at the centroid; 1 for one clean blob.
        confidence: `(T,)` in [0, 1], that the body is in the frame.
        radius: of a disc with the body's typical area.
    """

    colour: str
    hue: float
    positions: Array
    area: Array
    concentration: Array
    confidence: Array
    radius: float

    @property
    def typical_area(self) -> float:
        return math.pi * self.radius**2


@dataclass(frozen=True)
class Observation:
    """
    What the pixels of a clip say.

    Attributes:
        bodies: largest first.
        aspect: width of the picture in frame heights.
        luminance: `(T, h, w)` float32 in [0, 1], averaged down to the working size.
        plain: `(T, h, w)` bool, pixels of the scenery rather than of a body.
        row_luminance: `(h,)` median of each row.
        row_chroma: `(h, 2)` median chroma of each row.
    """

    bodies: tuple[Body, ...]
    aspect: float
    luminance: NDArray[np.float32]
    plain: NDArray[np.bool_]
    row_luminance: Array
    row_chroma: Array


@dataclass(frozen=True)
class _Pixels:
    """Chromatic pixels of a clip as flat `(P,)` arrays; `weight` is a covered area, `colour` an index of `COLOURS`."""

    frame: NDArray[np.intp]
    x: Array
    y: Array
    weight: Array
    chroma: Array
    colour: NDArray[np.intp]
    num_frames: int
    aspect: float


def observe(video: NDArray[np.uint8]) -> Observation:
    """
    Finds the bodies of a clip.

    Args:
        video: uint8 `(T, H, W, 3)`.
    """
    height, width = video.shape[1:3]
    small, factor = _shrink(video)
    red, green, blue = (small[..., i] for i in range(3))
    chroma = np.stack([red - 0.5 * (green + blue), (math.sqrt(3) / 2) * (green - blue)])
    luminance = 0.3 * red + 0.59 * green + 0.11 * blue
    row_chroma = _row_median(chroma)
    difference = chroma - row_chroma.T.astype(np.float32)[:, None, :, None]
    squared = difference[0] ** 2 + difference[1] ** 2
    chromatic, vivid = squared > MIN_CHROMA**2, squared > VIVID_CHROMA**2
    bodies: tuple[Body, ...] = ()
    if vivid.mean() < MAX_VIVID:
        bodies = _separate(_read_pixels(chroma, difference, chromatic, row_chroma, factor / height, width / height))
    row_luminance = _row_median(luminance[None])[:, 0]
    return Observation(bodies, width / height, luminance, ~vivid, row_luminance, row_chroma)


def chroma_of(rgb: tuple[float, float, float]) -> Array:
    """`(2,)` hue plane coordinates of a colour: grey is the origin, red lies on the first axis."""
    red, green, blue = rgb
    return np.array([red - 0.5 * (green + blue), math.sqrt(3) / 2 * (green - blue)])


_REFERENCES = np.stack([chroma_of(BODY_RGB[name]) for name in COLOURS])  # (6, 2)
COLOUR_HUES = {name: math.degrees(math.atan2(c[1], c[0])) for name, c in zip(COLOURS, _REFERENCES, strict=True)}
WATER_CHROMA = chroma_of(WATER_RGB)


def hue_distance(a: float, b: float) -> float:
    """Angle between two hues, degrees, in [0, 180]."""
    return abs((a - b + 180) % 360 - 180)


def _shrink(video: NDArray[np.uint8]) -> tuple[NDArray[np.float32], int]:
    """The clip in [0, 1], averaged over square blocks, and the side of a block; what is left over is cut."""
    factor = max(1, round(min(video.shape[1:3]) / WORKING_SIZE))
    if factor == 1:
        return video.astype(np.float32) / np.float32(255), 1
    rows, columns = video.shape[1] // factor, video.shape[2] // factor
    small = np.empty((len(video), rows, columns, 3), dtype=np.float32)
    for index, frame in enumerate(video):
        blocks = frame[: rows * factor, : columns * factor].reshape(rows, factor, columns, factor, 3)
        small[index] = blocks.mean(axis=(1, 3), dtype=np.float32) / 255
    return small, factor


def _row_median(planes: NDArray[np.float32]) -> Array:
    """`(h, C)` median over time and columns of planes `(C, T, h, w)`; every other column is enough."""
    rows = planes[..., ::2].transpose(2, 0, 1, 3)
    return np.median(rows.reshape(*rows.shape[:2], -1), axis=2).astype(np.float64)


def _read_pixels(
    chroma: NDArray[np.float32],
    difference: NDArray[np.float32],
    chromatic: NDArray[np.bool_],
    row_chroma: Array,
    pixel: float,
    aspect: float,
) -> _Pixels:
    """The pixels marked by `chromatic`, with `pixel` the side of one in frame heights."""
    frame, row, column = np.nonzero(chromatic)
    references = _REFERENCES - row_chroma[:, None, :]  # (h, 6, 2): what a body of each colour would add to its row
    size = np.linalg.norm(references, axis=2)
    found = difference[:, frame, row, column].T.astype(np.float64)
    along = np.einsum("pc,pkc->pk", found, (references / size[..., None])[row])
    colour = along.argmax(axis=1)
    cover = along[np.arange(len(row)), colour] / size[row, colour]
    inside = cover[cover > 0.4]
    # A clip may be a little pale or bright as a whole; what fades within a clip must lose area.
    scale = float(np.quantile(inside, 0.75).clip(0.6, 1.15)) if len(inside) else 1.0
    low, high = COVER_RANGE
    weight = ((cover / scale - low) / (high - low)).clip(0, 1)
    keep = weight > 0
    frame, row, column = frame[keep], row[keep], column[keep]
    return _Pixels(
        frame=frame,
        x=(column + 0.5) * pixel,
        y=1 - (row + 0.5) * pixel,
        weight=weight[keep] * pixel**2,
        chroma=chroma[:, frame, row, column].T.astype(np.float64),
        colour=colour[keep],
        num_frames=chroma.shape[1],
        aspect=aspect,
    )


def _separate(pixels: _Pixels) -> tuple[Body, ...]:
    """Groups pixels into bodies: one for each colour with enough area, unless it lies on top of a larger one."""
    frames, number = pixels.num_frames, len(COLOURS)
    mass = np.bincount(pixels.frame * number + pixels.colour, pixels.weight, minlength=frames * number)
    typical = np.sort(mass.reshape(frames, number), axis=0)[-max(1, frames // 4) :].mean(axis=0)
    candidates = [int(k) for k in np.argsort(-typical) if typical[k] > 0.3 * math.pi * RADII[0] ** 2 * 4]
    groups: list[list[int]] = []
    places: list[Array] = []
    for colour in candidates:
        where, area, _ = _locate(pixels, pixels.colour == colour, steps=1)
        host = next((i for i, other in enumerate(places) if _coincide(where, area, other)), None)
        if host is None:
            groups.append([colour])
            places.append(np.column_stack([where, area]))
        else:
            groups[host].append(colour)
    owner = _assign(pixels, groups)
    bodies = [_body(pixels, owner == index) for index in range(len(groups))]
    found = [body for body in bodies if body is not None]
    return tuple(sorted(found, key=lambda body: -float((body.area * body.confidence).sum())))


def _coincide(where: Array, area: Array, other: Array) -> bool:
    """Whether two colours are mostly found within one radius of each other: shades of one body."""
    both = (area > 0) & (other[:, 2] > 0)
    if not both.any():
        return False
    return float(np.median(np.linalg.norm(where - other[:, :2], axis=1)[both])) < TYPICAL_RADIUS


def _assign(pixels: _Pixels, groups: list[list[int]]) -> NDArray[np.intp]:
    """Index of the nearest body for every pixel, by hue: at a contact, mixed colours go to one of the two bodies."""
    if len(groups) < 2:
        return np.zeros(len(pixels.frame), dtype=np.intp)
    hues = np.angle(pixels.chroma @ np.array([1.0, 1j]))
    centres = []
    for group in groups:
        member = np.isin(pixels.colour, group)
        centres.append(np.angle(pixels.weight[member] @ pixels.chroma[member] @ np.array([1.0, 1j])))
    return np.cos(hues[:, None] - np.array(centres)).argmax(axis=1)


def _body(pixels: _Pixels, member: NDArray[np.bool_]) -> Body | None:
    """The body made of the given pixels, or None when they are too few or too spread out to be one."""
    positions, area, concentration = _locate(pixels, member)
    present = area > 0.25 * area.max(initial=0.0)
    if not present.any():
        return None
    reference = float(np.quantile(area[present], 0.65))
    radius = math.sqrt(reference / math.pi)
    if not RADII[0] < radius < RADII[1]:
        return None
    mean = (pixels.weight[member] ** 2) @ pixels.chroma[member]
    hue = math.degrees(math.atan2(mean[1], mean[0]))
    colour = min(COLOURS, key=lambda name: hue_distance(hue, COLOUR_HUES[name]))
    confidence = presence(area / reference, concentration)
    return Body(colour, hue, positions, area, concentration, confidence, radius)


def presence(relative_area: Array, concentration: Array) -> Array:
    """Confidence in [0, 1] that a body is there, from its area over the expected one and its concentration."""
    enough = ((relative_area - 0.15) / 0.45).clip(0, 1)
    not_too_much = (1 - (relative_area - 1.5) / 1.0).clip(0, 1)
    return enough * not_too_much * ((concentration - 0.3) / 0.4).clip(0, 1)


def _locate(pixels: _Pixels, member: NDArray[np.bool_], steps: int = 5) -> tuple[Array, Array, Array]:
    """Centroid `(T, 2)`, area `(T,)` and concentration `(T,)` of the main blob of the given pixels in each frame."""
    frames = pixels.num_frames
    frame, weight = pixels.frame[member], pixels.weight[member]
    x, y = pixels.x[member], pixels.y[member]
    total = _per_frame(frame, weight, frames)
    centre_x, centre_y = _densest(frame, weight, x, y, frames, pixels.aspect)
    area, reach = total, _REACH
    for step in range(steps):
        inside = (x - centre_x[frame]) ** 2 + (y - centre_y[frame]) ** 2 < reach**2
        held = weight * inside
        area = _per_frame(frame, held, frames)
        safe = np.maximum(area, 1e-12)
        centre_x = _per_frame(frame, held * x, frames) / safe
        centre_y = _per_frame(frame, held * y, frames) / safe
        if step == 2:  # the size is known now: look no further than the body reaches
            found = area[area > 0.25 * area.max(initial=0.0)]
            radius = math.sqrt(float(np.median(found)) / math.pi) if len(found) else TYPICAL_RADIUS
            reach = min(1.5 * radius + 0.025, _REACH)
    return np.stack([centre_x, centre_y], axis=1), area, area / np.maximum(total, 1e-12)


def _per_frame(frame: NDArray[np.intp], values: Array, frames: int) -> Array:
    """Sums `(T,)` of the values of each frame."""
    return np.bincount(frame, values, minlength=frames).astype(np.float64, copy=False)


def _densest(
    frame: NDArray[np.intp], weight: Array, x: Array, y: Array, frames: int, aspect: float
) -> tuple[Array, Array]:
    """Centre of the 3x3 cells that hold the most weight in each frame: `(T,)` x and `(T,)` y."""
    columns, rows = math.ceil(aspect / _CELL), math.ceil(1 / _CELL)
    index = (frame * rows + (y / _CELL).astype(np.intp)) * columns + (x / _CELL).astype(np.intp)
    grid = np.bincount(index, weight, minlength=frames * rows * columns).reshape(frames, rows, columns)
    padded = np.pad(grid, ((0, 0), (1, 1), (1, 1)))
    tall = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    boxes = tall[..., :-2] + tall[..., 1:-1] + tall[..., 2:]
    best = boxes.reshape(frames, -1).argmax(axis=1)
    return (best % columns + 0.5) * _CELL, (best // columns + 0.5) * _CELL
