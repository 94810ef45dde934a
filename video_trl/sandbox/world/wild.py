"""
The same scenes "in the wild": a textured wall, uneven light, a tint, film grain and a camera that is not quite still.

Bodies, colours and paths stay, so a clip obeys or breaks its law as before; what is new is the picture.
The camera sways by a fraction of a pixel of 64, and paths are judged as the camera sees them.
"""

import math
from dataclasses import dataclass

import numpy as np

from .laws import Array


_WAVES = 5  # of the texture


@dataclass(frozen=True)
class Look:
    """
    One shoot.

    Attributes:
        texture: `(waves, 4)` of amplitude, the two wave numbers and the phase; amplitudes sum to `contrast`.
        contrast: of the texture, of grey levels in [0, 1].
        light: how much brighter the right and the upper edge is than the left and the lower one.
        tint: factors of red, green and blue.
        grain: standard deviation of the noise of a pixel, of grey levels in [0, 1].
        shake: largest offset of the camera, frame heights.
        seed: of grain and shake.
    """

    texture: Array
    contrast: float
    light: tuple[float, float]
    tint: tuple[float, float, float]
    grain: float
    shake: float
    seed: int

    @classmethod
    def sample(cls, rng: np.random.Generator) -> "Look":
        amplitudes = rng.uniform(0.3, 1.0, _WAVES)
        wave_numbers = rng.uniform(2, 14, (_WAVES, 2)) * rng.choice([-1, 1], (_WAVES, 2))
        phases = rng.uniform(0, 2 * math.pi, _WAVES)
        red, green, blue = rng.uniform(0.92, 1.08, 3).tolist()
        return cls(
            texture=np.column_stack([amplitudes / amplitudes.sum(), wave_numbers, phases]),
            contrast=float(rng.uniform(0.10, 0.20)),
            light=(float(rng.uniform(-0.25, 0.25)), float(rng.uniform(-0.25, 0.25))),
            tint=(red, green, blue),
            grain=float(rng.uniform(0.01, 0.025)),
            shake=float(rng.uniform(0.2, 0.6) / 64),
            seed=int(rng.integers(2**31)),
        )

    def wall(self, grid: Array) -> Array:
        """What the texture adds to the brightness of the scenery at points `(..., 2)`: `(..., 1)`."""
        amplitude, across, up, phase = self.texture.T
        waves = np.sin(2 * math.pi * (grid[..., :1] * across + grid[..., 1:] * up) + phase)
        return self.contrast * (waves * amplitude).sum(axis=-1, keepdims=True)

    def camera(self, progress: Array) -> Array:
        """Offsets `(T, 2)` of the camera at `progress` in [0, 1]: a hand's sway, at most `shake` each way."""
        rng = np.random.default_rng([self.seed, 1])
        rates, phases = rng.uniform(0.5, 2.5, (2, 2)), rng.uniform(0, 2 * math.pi, (2, 2))
        return self.shake * np.sin(2 * math.pi * progress[:, None, None] * rates + phases).mean(axis=-1)

    def develop(self, frames: Array, grid: Array) -> Array:
        """Light, tint and grain on frames `(T, H, W, 3)` in [0, 1], at pixel places `(H, W, 2)`."""
        centre = grid - grid.mean(axis=(0, 1))
        light = 1 + centre @ np.array(self.light)
        noise = np.random.default_rng([self.seed, 2]).normal(0, self.grain, frames.shape)
        return frames * light[..., None] * np.array(self.tint) + noise


def sample_look(seed: int) -> Look:
    """The look of the clip of a seed: from a generator of its own, so that the scene is that of the plain clip."""
    return Look.sample(np.random.default_rng([seed, 0x717D]))
