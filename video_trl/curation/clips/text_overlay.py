"""Estimate the proportion of a picture covered by text: strong edges that alternate as strokes of letters do."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage


class TextDetector(Protocol):
    """
    Anything that says how much of a clip is text, an OCR model for instance.

    Attributes:
        name: what the manifest's store is named by; another detector or version needs another name.
    """

    name: str

    def __call__(self, frames: NDArray[np.uint8]) -> float:
        """
        Args:
            frames: `(N, H, W, 3)`, a few moments of a clip, short side `TEXT_SHORT_EDGE`.

        Returns:
            Proportion of the picture, in [0, 1], that is covered by text.
        """


TEXT_SHORT_EDGE = 256


class StrokeDetector:
    """
    Looks for windows in which dark-to-bright and bright-to-dark edges follow each other along most rows, between two
    levels far apart. It sees lettering of about 3 % to 10 % of the short side; soft or very small subtitles escape it,
    and so does a single short word. Fences and window fronts can look like lettering to it.
    """

    name = "strokes-1"

    EDGE = 30.0  # grey levels between neighbours along a row
    WINDOW = (9, 33)  # rows, columns: about one line and three letters at TEXT_SHORT_EDGE
    ALTERNATIONS = 2.2  # of each sign, in a window, as a mean over its rows
    CONTRAST = 90.0  # grey levels between the darkest and the brightest in a window

    def __call__(self, frames: NDArray[np.uint8]) -> float:
        return float(np.mean([self.cover(frame) for frame in frames]))

    def cover(self, frame: NDArray[np.uint8]) -> float:
        """Text cover of one `(H, W, 3)` picture."""
        grey = frame.astype(np.float32) @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
        # Strokes go on for some rows, sensor noise does not. A soft edge rises over two pixels: see its whole height.
        step = ndimage.correlate1d(ndimage.uniform_filter1d(grey, 3, axis=0), [-1, 0, 1], axis=1)
        rising, falling = step > self.EDGE, step < -self.EDGE
        # Where a run of rising (falling) pixels starts: one mark an edge, however wide it is.
        marks = [(run[:, 1:] & ~run[:, :-1]).astype(np.float32) for run in (rising, falling)]
        density = np.minimum(*(ndimage.uniform_filter(mark, self.WINDOW) for mark in marks)) * self.WINDOW[1]
        span = ndimage.maximum_filter(grey, self.WINDOW) - ndimage.minimum_filter(grey, self.WINDOW)
        strokes = (density > self.ALTERNATIONS) & (span[:, 1:] > self.CONTRAST)
        return float(ndimage.maximum_filter(strokes, (5, 15)).mean())
