"""Estimate camera motion between two small grey pictures: an affine map by weighted least squares on a pyramid."""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage


Array = NDArray[np.float64]

MARGIN = 3  # near its edge, a blurred picture mirrors itself: the same place looks different in the middle of another
_LEVELS = 3
_ITERATIONS = 4
_DAMPING = 1e-3  # a picture without texture in one direction says nothing about motion along it


def register(fixed: Array, moving: Array) -> Array:
    """
    The affine map that takes pixels of `fixed` to where they are in `moving`.

    Args:
        fixed, moving: `(H, W)` pictures of one size, smooth (blurred by a pixel or so), at least 16 pixels a side.

    Returns:
        `(2, 3)`: `position = map @ (y, x, 1)` in pixels, (y, x) order. Bodies that move on their own are outliers
        and get little weight.
    """
    matrix = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    for level in reversed(range(_LEVELS)):
        scale = 2**level
        if min(fixed.shape) // scale < 12:
            continue
        small_fixed, small_moving = _shrink(fixed, scale), _shrink(moving, scale)
        # Shrinking by averages moves the origin: the centre of the first big pixel lies at (scale - 1) / 2.
        shift = (scale - 1) / 2
        matrix[:, 2] = (matrix[:, 2] + matrix[:, :2].sum(axis=1) * shift - shift) / scale
        matrix = _refine(small_fixed, small_moving, matrix)
        matrix[:, 2] = matrix[:, 2] * scale - matrix[:, :2].sum(axis=1) * shift + shift
    return matrix


def warp(moving: Array, matrix: Array, order: int = 3) -> tuple[Array, NDArray[np.bool_]]:
    """`moving` seen from `fixed`'s place, `(H, W)`, and where both pictures are `MARGIN` pixels from their edges."""
    height, width = moving.shape
    y, x = np.ogrid[:height, :width]
    inside = np.zeros((height, width), dtype=bool)
    inside[MARGIN:-MARGIN, MARGIN:-MARGIN] = True
    for row, side in zip(matrix, (height, width), strict=True):
        place = row[0] * y + row[1] * x + row[2]
        inside &= (place >= MARGIN) & (place <= side - 1 - MARGIN)
    warped = ndimage.affine_transform(moving, matrix[:, :2], matrix[:, 2], order=order, mode="nearest")
    return warped, inside


def _shrink(image: Array, scale: int) -> Array:
    height, width = image.shape[0] // scale, image.shape[1] // scale
    return image[: height * scale, : width * scale].reshape(height, scale, width, scale).mean(axis=(1, 3))


def _refine(fixed: Array, moving: Array, matrix: Array) -> Array:
    """Gauss-Newton with weights that fall for large residuals; gradients are those of the fixed picture."""
    height, width = fixed.shape
    y, x = (axis.ravel() for axis in np.mgrid[:height, :width])
    size = max(height, width)
    gradient_y, gradient_x = (gradient.ravel() for gradient in np.gradient(fixed))
    # Columns in units of the picture, so that slopes and shifts weigh alike.
    columns = np.stack([y / size, x / size, np.ones_like(y, dtype=float)])
    jacobian = np.concatenate([gradient_y * columns, gradient_x * columns]).T  # (HW, 6)
    for _ in range(_ITERATIONS):
        warped, inside = warp(moving, matrix, order=1)
        residual = (warped - fixed).ravel()
        spread = 1 + 2 * float(np.median(np.abs(residual)))
        weight = inside.ravel() / (1 + (residual / spread) ** 2)
        weighted = jacobian * weight[:, None]
        normal = weighted.T @ jacobian
        normal += _DAMPING * (np.trace(normal) / 6 + 1e-6) * np.eye(6)
        step = np.linalg.solve(normal, weighted.T @ residual).reshape(2, 3) / [size, size, 1]
        # Inverse composition to first order: the update is small, and the next iteration corrects it.
        matrix = matrix - step
        if np.abs(step[:, 2]).max() < 0.005:
            break
    return matrix
