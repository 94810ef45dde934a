"""
Estimate the proportion of a picture covered by text: strokes that stand in a row, as letters do on a line.

Letters of a line have one baseline, one height, one width of stroke and one colour, stand apart from what surrounds
them, and are not all of one width. Leaves, blades of grass, bricks, windows and waves have some of that and not all.
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, sparse


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


TEXT_SHORT_EDGE = 480  # pixels: letters of 5 % of the height have strokes of 2 to 4

# Of a logistic regression on lines found in rendered subtitles and in textures without any text
# (drawn as in examples/studies/text_rule.py, and photographs): weight of each number of `_describe`, in its order.
_WEIGHTS = np.array([1.86, 1.44, -0.51, -0.63, -0.34, 1.59, -14.36, 0.74, -0.28, -3.22, -1.1, 3.63, -10.3, 0.04, -2.35, -2.25])  # fmt: skip  # noqa: E501
_BIAS = -4.79


class LineDetector:
    """
    Finds lines of at least five letters or pieces of words, of 2 % to 12 % of the short side, bright on dark or dark
    on bright. What it decides on is drawn at `TEXT_SHORT_EDGE`, whatever the size of the source. Single short words,
    slanted lettering and letters of a tenth of the height and more escape it.
    """

    name = "lines-1"

    CONTRAST = 70.0  # grey levels between a stroke and what surrounds it
    LOCAL = 0.5  # of the strongest stroke near by: lettering is made to stand out
    WIDEST = 13  # pixels of a stroke and a little
    REACH = 24  # pixels that "near by" means
    LEAST = 5  # strokes in a line
    CERTAINTY = 0.5  # log odds from which a line is one of text

    def __call__(self, frames: NDArray[np.uint8]) -> float:
        return float(np.mean([self.cover(frame) for frame in frames]))

    def cover(self, frame: NDArray[np.uint8]) -> float:
        """Text cover of one `(H, W, 3)` picture."""
        grey = frame.astype(np.float32) @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
        covered = sum(self._covered(picture) for picture in (grey, 255 - grey))
        return float(min(covered / grey.size, 1.0))

    def _covered(self, grey: NDArray[np.float32]) -> float:
        """Pixels in the boxes of the lines of bright strokes."""
        strokes = self._strokes(grey)
        area = 0.0
        for line in _chains(strokes, self.LEAST):
            members = strokes[line]
            if float(_describe(members, strokes) @ _WEIGHTS) + _BIAS > self.CERTAINTY:
                height, width = members[:, 2:4].max(axis=0) - members[:, :2].min(axis=0)
                area += float(height * width)
        return area

    def _strokes(self, grey: NDArray[np.float32]) -> NDArray[np.float64]:
        """
        Bright shapes that are thin: `(n, 8)`, sorted from left to right: top, left, bottom, right, level, width of
        the stroke, how uneven its level is, height above what surrounds it.
        """
        hat = grey - ndimage.maximum_filter(ndimage.minimum_filter(grey, self.WIDEST), self.WIDEST)
        mask = hat > np.maximum(self.CONTRAST, self.LOCAL * ndimage.maximum_filter(hat, self.REACH))
        labels, count = ndimage.label(mask, np.ones((3, 3)))
        if not count:
            return np.zeros((0, 8))
        boxes = [(y.start, x.start, y.stop, x.stop) for y, x in ndimage.find_objects(labels)]
        top, left, bottom, right = np.array(boxes, dtype=np.float64).T
        area = np.bincount(labels.ravel(), minlength=count + 1)[1:]
        height, width = bottom - top, right - left
        edge = TEXT_SHORT_EDGE
        usual = (height >= 0.01 * edge) & (height <= 0.12 * edge) & (width <= 6 * height)
        usual &= (area >= 8) & (area <= 0.85 * height * width + 4)  # a full rectangle is a window, not a letter
        border = np.zeros(count + 1)
        padded = np.pad(labels, 1)
        inner = padded[1:-1, 1:-1]
        for other in (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]):
            border += np.bincount(inner[other != inner], minlength=count + 1)
        # Levels of each shape, sorted: quantiles are then at known places.
        owner, level = labels[mask], grey[mask]
        ordered = level[np.lexsort((level, owner))]
        first = np.cumsum(area) - area
        high, middle = (ordered[(first + np.floor(part * (area - 1))).astype(int)] for part in (0.9, 0.5))
        peak = ndimage.maximum(hat, labels, np.arange(1, count + 1))
        columns = (top, left, bottom, right, high, 2 * area / border[1:].clip(1), (high - middle) / peak, peak)
        table = np.stack(columns, axis=1)[usual]
        return table[np.argsort(table[:, 1], kind="stable")]


def _chains(strokes: NDArray[np.float64], least: int) -> list[NDArray[np.int64]]:
    """Numbers of the strokes of each row in which neighbours are alike, stand close, and share a baseline."""
    strokes_even = np.flatnonzero(strokes[:, 6] < 0.7)
    top, left, bottom, right, level, stroke = strokes[strokes_even, :6].T
    height = bottom - top
    pairs: list[NDArray[np.int64]] = []
    for apart in range(1, min(40, max(len(top) - 1, 0)) + 1):
        a, b = np.arange(len(top) - apart), np.arange(apart, len(top))
        tall, low = np.maximum(height[a], height[b]), np.minimum(height[a], height[b])
        alike = (tall <= 2.2 * low) & (np.abs(level[a] - level[b]) < 40)
        alike &= np.maximum(stroke[a], stroke[b]) <= 2 * np.minimum(stroke[a], stroke[b])
        alike &= (left[b] - right[a] < 1.4 * tall) & (left[b] > left[a] + 0.3 * (right[a] - left[a]))
        alike &= np.abs(bottom[a] - bottom[b]) <= 0.2 * tall + 1
        pairs.append(np.stack([a[alike], b[alike]]))
    links = np.concatenate(pairs, axis=1) if pairs else np.zeros((2, 0), dtype=np.int64)
    if not links.size:
        return []
    graph = sparse.coo_matrix((np.ones(links.shape[1]), (links[0], links[1])), (len(top), len(top)))
    number, member = sparse.csgraph.connected_components(graph, directed=False)
    sizes = np.bincount(member, minlength=number)
    return [strokes_even[np.flatnonzero(member == chain)] for chain in np.flatnonzero(sizes >= least)]


def _describe(line: NDArray[np.float64], strokes: NDArray[np.float64]) -> NDArray[np.float64]:
    """What tells a line of text from a row of anything else; lengths in heights of its letters."""
    top, left, bottom, right, level, stroke, uneven, peak = line.T
    height, width = float(np.median(bottom - top)), right - left
    upper, lower, start, end = top.min(), bottom.max(), left.min(), right.max()
    others = strokes[strokes[:, 6] < 0.7]
    tall, middle = others[:, 2] - others[:, 0], (others[:, 0] + others[:, 2]) / 2
    alike = (np.abs(others[:, 4] - np.median(level)) < 25) & (tall > 0.5 * height) & (tall < 2 * height)
    alike &= (others[:, 3] > start) & (others[:, 1] < end)
    # Textures go on above and below; a line of text, or a second one, ends.
    above = np.sum(alike & (middle < upper) & (middle > upper - 3 * height)) / len(line)
    below = np.sum(alike & (middle > lower) & (middle < lower + 3 * height)) / len(line)
    return np.array([
        np.log(len(line)),
        np.mean(np.abs(bottom - np.median(bottom)) <= 0.12 * height + 1),
        min((lower - upper) / height, 5.0),
        np.std(level) / 20,
        np.std(stroke) / np.mean(stroke),
        np.std(width) / np.mean(width),
        np.median(uneven),
        min(float(np.median(stroke)) / height, 0.6),
        np.log(height / 24),
        np.log1p(min(above, below)),
        np.log1p(max(above, below)),
        np.median(peak) / 100,
        np.std(peak) / np.mean(peak),
        np.median(width) / height,
        np.sum(width) / (end - start),
        np.std(top) / height,
    ])  # fmt: skip
