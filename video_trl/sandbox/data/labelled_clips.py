"""
Labelled footage for curation: clips that a pipeline should keep, and clips with one known defect each.

Bodies move by the laws of the sandbox before a textured wall, drawn fast enough for thousands of frames. Everything is
decided by the seed; the same arguments give the same bytes, with one version of NumPy on one kind of processor.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ..world.drawing import BODY_RGB
from ..world.geometry import FLOOR
from ..world.prompts import describe, templates
from ..world.simulate import Rng, sample_scene, trajectory


#: Kind of clip -> the defect that it must be dropped for; None: a good clip.
KINDS: dict[str, str | None] = {
    "small_ball": None,  # little of the picture moves: what scores of global motion take for a still
    "balls": None,
    "camera_pan": None,
    "sensor_noise": None,
    "static": "static",
    "slideshow": "slideshow",
    "fading_slideshow": "slideshow",
    "ken_burns": "slideshow",
    "cuts": "cuts",
    "fade": "blended",
    "dissolve": "blended",
    "flashes": "flashes",
    "text": "text",
}
MOTIONS = ("free_fall", "projectile", "rolling", "collision")  # those whose scenery is a floor and nothing else

Frame = NDArray[np.float32]  # (H, W, 3), grey levels from 0 to 255


@dataclass(frozen=True)
class Footage:
    """
    A labelled clip.

    Attributes:
        video: uint8 `(T, H, W, 3)`.
        fps: frames per second.
        prompt: what it shows, in the language of the sandbox.
        kind: one of `KINDS`.
    """

    video: NDArray[np.uint8]
    fps: float
    prompt: str
    kind: str

    @property
    def defect(self) -> str | None:
        return KINDS[self.kind]


def make_footage(
    kind: str, seed: int, *, height: int = 256, width: int = 448, fps: float = 24.0, seconds: float = 5.3
) -> Footage:
    """
    Draws a clip.

    Args:
        kind: one of `KINDS`.
        seed: any integer >= 0; scene, colours, and how strong the defect is.
        height, width: pixels, at least 32; fps, seconds: clock and length; the motion takes the whole clip.

    Raises:
        ValueError: Unknown kind, or a clip of less than 8 frames or 32 pixels.
    """
    num_frames = round(fps * seconds)
    if kind not in KINDS or num_frames < 8 or min(height, width) < 32:
        raise ValueError(
            f"Expected one of the kinds {', '.join(KINDS)}, at least 8 frames and sides of at least 32, got {kind!r}, "
            f"{num_frames} frames of {height}x{width}."
        )
    rng = np.random.default_rng([seed, list(KINDS).index(kind), 0xF007])
    times = np.arange(num_frames) / fps
    scene = _Scene(rng, times, height, width, small=kind == "small_ball", wide=kind == "camera_pan")
    frames = _DRAW[kind](rng, scene)
    sigma = rng.uniform(3.5, 6.0) if kind == "sensor_noise" else rng.uniform(0.0, 3.0)
    return Footage(_add_noise(rng, frames, sigma), fps, scene.prompt, kind)


class _Scene:
    """Bodies before a wall: `frame(index)` draws a moment of it, `still()` the first one."""

    def __init__(
        self, rng: Rng, times: NDArray[np.float64], height: int, width: int, *, small: bool = False, wide: bool = False
    ) -> None:
        self.times, self.height, self.width = times, height, width
        self.canvas_width = round(1.35 * width) if wide else width
        aspect = self.canvas_width / height
        scene = sample_scene(rng, times, aspect, motion=MOTIONS[rng.integers(len(MOTIONS))])
        choices = templates(scene.spec.motion, "train")
        self.prompt = describe(scene.spec, choices[rng.integers(len(choices))])
        self.positions, _ = trajectory(scene, times)
        shrink = rng.uniform(0.35, 0.5) if small else 1.0
        self.radii = [shrink * radius for radius in scene.appearance.radii]
        self.colours = [255 * np.array(BODY_RGB[colour], dtype=np.float32) for colour in scene.appearance.colours]
        self.canvas = _background(rng, height, self.canvas_width, scene.appearance.wall, scene.appearance.floor)

    def frame(self, index: int, left: float = 0.0) -> Frame:
        """`(H, W, 3)` at `times[index]`, from column `left` of the canvas on."""
        image = _cut_out(self.canvas, (left, 0, left + self.width, self.height), self.height, self.width)
        for body, centre in enumerate(self.positions[index]):
            place = centre * self.height - [left, 0]
            _draw_ball(image, place[0], self.height - place[1], self.radii[body] * self.height, self.colours[body])
        return image

    def moving(self) -> list[Frame]:
        return [self.frame(index) for index in range(len(self.times))]

    def still(self) -> Frame:
        return self.frame(len(self.times) // 4)

    def another(self, rng: Rng) -> "_Scene":
        return _Scene(rng, self.times, self.height, self.width)


def _background(rng: Rng, height: int, width: int, wall: tuple[float, ...], floor: tuple[float, ...]) -> Image.Image:
    """A wall and a floor with the texture of natural pictures: amplitude falls with spatial frequency."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    spectrum = rng.normal(size=(2, *frequency.shape)) / np.maximum(frequency, 2 / width) ** rng.uniform(1.0, 1.4)
    texture = np.fft.irfft2(spectrum[0] + 1j * spectrum[1], s=(height, width))
    texture *= rng.uniform(8, 28) / texture.std()
    rows = 1 - (np.arange(height) + 0.5) / height
    colour = np.where(rows[:, None] < FLOOR, np.array(floor), np.array(wall))[:, None, :] * 255
    picture = colour * rng.uniform(0.7, 1.0) + texture[..., None]
    for _ in range(rng.integers(2, 6)):  # things that stand around
        box_height, box_width = rng.uniform(0.08, 0.4, size=2) * height
        top, left = rng.uniform(0, 0.75) * height, rng.uniform(0, 1) * width
        area = np.s_[int(top) : int(top + box_height), int(left) : int(left + box_width)]
        picture[area] = 0.4 * picture[area] + 0.6 * rng.uniform(20, 230, size=3)
    return Image.fromarray(np.rint(picture.clip(0, 255)).astype(np.uint8))


def _cut_out(image: Image.Image, box: tuple[float, float, float, float], height: int, width: int) -> Frame:
    """The part of a picture inside a box of fractional corners, scaled to a size."""
    whole = box[:2] == (0, 0) and box[2:] == image.size == (width, height)
    part = image if whole else image.resize((width, height), Image.Resampling.BICUBIC, box=box)
    return np.array(part, dtype=np.float32)


def _draw_ball(image: Frame, x: float, y: float, radius: float, colour: NDArray[np.float32]) -> None:
    """Blends a shaded disc in place; only the pixels around it are touched."""
    height, width = image.shape[:2]
    top, bottom = max(math.floor(y - radius) - 1, 0), min(math.ceil(y + radius) + 2, height)
    left, right = max(math.floor(x - radius) - 1, 0), min(math.ceil(x + radius) + 2, width)
    if top >= bottom or left >= right:
        return
    rows, columns = np.mgrid[top:bottom, left:right] + 0.5
    cover = (radius + 0.5 - np.hypot(rows - y, columns - x)).clip(0, 1)[..., None]
    light = 1 - 0.2 * ((rows - y) + (columns - x))[..., None] / (2 * radius)
    patch = image[top:bottom, left:right]
    patch += (cover * (colour * light - patch)).astype(np.float32)


def _add_noise(rng: Rng, frames: list[Frame], sigma: float) -> NDArray[np.uint8]:
    """Sensor noise, cut from one large field at random places: drawing one for each frame costs ten times more."""
    height, width = frames[0].shape[:2]
    field = rng.normal(scale=sigma, size=(height + 64, width + 64, 3)).astype(np.float32)
    video = np.empty((len(frames), height, width, 3), dtype=np.uint8)
    for index, frame in enumerate(frames):
        top, left = rng.integers(64, size=2)
        video[index] = np.rint((frame + field[top : top + height, left : left + width]).clip(0, 255))
    return video


# ---- the kinds: (rng, scene) -> frames -----------------------------------------------------------


def _good(rng: Rng, scene: _Scene) -> list[Frame]:
    return scene.moving()


def _camera_pan(rng: Rng, scene: _Scene) -> list[Frame]:
    room = scene.canvas_width - scene.width
    path = np.linspace(0, room, len(scene.times)) if rng.random() < 0.5 else np.linspace(room, 0, len(scene.times))
    return [scene.frame(index, float(left)) for index, left in enumerate(path)]


def _static(rng: Rng, scene: _Scene) -> list[Frame]:
    return [scene.still()] * len(scene.times)


def _slides(rng: Rng, scene: _Scene) -> tuple[list[Frame], NDArray[np.intp], list[int]]:
    """Stills, which of them each frame shows, and the frames with which a new one begins."""
    count = len(scene.times)
    number = int(rng.integers(3, 6))
    stills = [scene.still(), *(scene.another(rng).still() for _ in range(number - 1))]
    starts = [round(count * (part + rng.uniform(-0.2, 0.2)) / number) for part in range(1, number)]
    shown = np.searchsorted(starts, np.arange(count), side="right")
    return stills, shown, starts


def _slideshow(rng: Rng, scene: _Scene) -> list[Frame]:
    stills, shown, _ = _slides(rng, scene)
    return [stills[index] for index in shown]


def _fading_slideshow(rng: Rng, scene: _Scene) -> list[Frame]:
    stills, shown, starts = _slides(rng, scene)
    frames = [stills[index] for index in shown]
    half = max(round(len(frames) * rng.uniform(0.03, 0.06)), 2)
    for slide, start in enumerate(starts):
        for index in range(max(start - half, 0), min(start + half, len(frames))):
            share = (index - start + half) / (2 * half)
            frames[index] = (1 - share) * stills[slide] + share * stills[slide + 1]
    return frames


def _ken_burns(rng: Rng, scene: _Scene) -> list[Frame]:
    """One picture, panned and zoomed over."""
    image = Image.fromarray(scene.still().clip(0, 255).astype(np.uint8))
    zoom = np.sort(rng.uniform(0.6, 1.0, size=2))[:: 1 if rng.random() < 0.5 else -1]
    zoom = zoom if abs(zoom[1] - zoom[0]) > 0.12 else np.array([1.0, 0.75])
    ends = [rng.uniform(0, 1 - value, size=2) for value in zoom]
    frames = []
    for share in np.linspace(0, 1, len(scene.times)):
        size = (1 - share) * zoom[0] + share * zoom[1]
        left, top = (1 - share) * ends[0] + share * ends[1]
        box = (left * scene.width, top * scene.height, (left + size) * scene.width, (top + size) * scene.height)
        frames.append(_cut_out(image, box, scene.height, scene.width))
    return frames


def _cuts(rng: Rng, scene: _Scene) -> list[Frame]:
    count, number = len(scene.times), int(rng.integers(3, 7))
    scenes = [scene, *(scene.another(rng) for _ in range(number - 1))]
    starts = [round(count * (part + rng.uniform(-0.2, 0.2)) / number) for part in range(1, number)]
    shown = np.searchsorted(starts, np.arange(count), side="right")
    return [scenes[which].frame(index) for index, which in enumerate(shown)]


def _fade(rng: Rng, scene: _Scene) -> list[Frame]:
    """From or to black or white, in part of the clip or all along."""
    count = len(scene.times)
    length = round(count * rng.choice([rng.uniform(0.15, 0.35), 1.0]))
    ramp = np.ones(count)
    ramp[:length] = np.linspace(rng.uniform(0.0, 0.2), 1, length)
    ramp = ramp if rng.random() < 0.5 else ramp[::-1]
    end = float(rng.choice([0.0, 255.0]))
    return [share * frame + (1 - share) * end for share, frame in zip(ramp.tolist(), scene.moving(), strict=True)]


def _dissolve(rng: Rng, scene: _Scene) -> list[Frame]:
    """One scene turns into another."""
    count = len(scene.times)
    half, middle = count * rng.uniform(0.06, 0.15), count * rng.uniform(0.35, 0.65)
    shares = ((np.arange(count) - middle) / (2 * half) + 0.5).clip(0, 1)
    pairs = zip(shares.tolist(), scene.moving(), scene.another(rng).moving(), strict=True)
    return [(1 - share) * first + share * second for share, first, second in pairs]


def _flashes(rng: Rng, scene: _Scene) -> list[Frame]:
    frames = scene.moving()
    for start in rng.choice(np.arange(3, len(frames) - 4), size=int(rng.integers(3, 8)), replace=False):
        strength = rng.uniform(0.5, 1.0)
        for index in range(start, start + int(rng.integers(1, 4))):
            frames[index] = frames[index] + strength * (255 - frames[index])
    return frames


def _text(rng: Rng, scene: _Scene) -> list[Frame]:
    """Several lines of lettering over a moving scene, with or without a plate behind."""
    size = round(scene.height * rng.uniform(0.05, 0.09))
    layer = Image.new("RGBA", (scene.width, scene.height))
    pen, font = ImageDraw.Draw(layer), ImageFont.load_default(size)
    words = scene.prompt.strip(".").split()
    bright = rng.random() < 0.6
    ink, plate = ((250, 250, 250, 255), (10, 10, 10, 170)) if bright else ((10, 10, 10, 255), (245, 245, 245, 170))
    top = int(rng.uniform(0.05, 0.3) * scene.height)
    for line in range(int(rng.integers(3, 7))):
        text = " ".join(rng.permutation(words))[: int(1.7 * scene.width / size)]
        place = (int(0.05 * scene.width), top + round(1.4 * size * line))
        pen.rectangle(pen.textbbox(place, text, font=font), fill=plate)
        pen.text(place, text, font=font, fill=ink)
    overlay = np.array(layer, dtype=np.float32)
    cover = overlay[..., 3:] / 255
    return [frame + cover * (overlay[..., :3] - frame) for frame in scene.moving()]


_DRAW: dict[str, Callable[[Rng, _Scene], list[Frame]]] = {
    "small_ball": _good,
    "balls": _good,
    "camera_pan": _camera_pan,
    "sensor_noise": _good,
    "static": _static,
    "slideshow": _slideshow,
    "fading_slideshow": _fading_slideshow,
    "ken_burns": _ken_burns,
    "cuts": _cuts,
    "fade": _fade,
    "dissolve": _dissolve,
    "flashes": _flashes,
    "text": _text,
}
