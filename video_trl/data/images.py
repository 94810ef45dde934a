"""Read first frames that a dataset stores as images."""

import io
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps

from ..files import fingerprint
from .video_io import VideoDecodeError, read_video


ImageSource = str | os.PathLike[str] | Mapping[str, Any] | np.ndarray | PIL.Image.Image


def read_image(source: ImageSource, *, height: int | None = None, width: int | None = None) -> np.ndarray:
    """
    An image as RGB pixels, upright, of the size that the frames of its video have.

    Args:
        source (`str`, `Path`, `dict`, `PIL.Image.Image` or `numpy.ndarray`): A file, a cell of a
            `datasets.Image(decode=False)` column (`{"path", "bytes"}`, bytes win), an image, or uint8 pixels
            `(H, W, 3)`.
        height, width (`int`, *optional*): Size in pixels, given together: scaled to cover it, then centre-cropped, as
            videos are.

    Returns:
        `numpy.ndarray` of shape `(H, W, 3)`, uint8.

    Raises:
        VideoDecodeError: The image is missing or damaged, or an array of another shape or dtype.
    """
    if isinstance(source, np.ndarray):
        pixels = source
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3 or 0 in pixels.shape:
            raise VideoDecodeError(
                f"<image array>: expected uint8 of shape (height, width, 3), got {pixels.dtype} {pixels.shape}."
            )
    else:
        pixels = np.asarray(PIL.ImageOps.exif_transpose(_open(source)).convert("RGB"))
    return read_video(pixels[None], height=height, width=width)[0]


def image_name(source: ImageSource) -> str:
    """How messages call an image: its path, or what is known when it has none."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    path = source.get("path") if isinstance(source, Mapping) else None
    return str(path or "<image>")


def image_hash(source: ImageSource) -> str:
    """
    Hash of an image's pixels: 32 hexadecimal digits.

    Raises:
        VideoDecodeError: The image cannot be read.
    """
    return fingerprint(np.ascontiguousarray(read_image(source)).data)


def _open(source: ImageSource) -> PIL.Image.Image:
    if isinstance(source, PIL.Image.Image):
        return source
    cell: Mapping[str, Any] = source if isinstance(source, Mapping) else {"path": source}
    file = cell.get("path") if cell.get("bytes") is None else io.BytesIO(cell["bytes"])
    if not isinstance(file, str | os.PathLike | io.BytesIO):
        raise VideoDecodeError(
            f"{image_name(source)}: expected a path, a dict with 'path' or 'bytes', an image or a uint8 array, got "
            f"{type(source).__name__}."
        )
    try:
        image = PIL.Image.open(file)
        image.load()  # damage behind the header shows only here
    except (OSError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise VideoDecodeError(
            f"{image_name(source)}: cannot read the image ({error}). Check the path and the file, or drop its row."
        ) from error
    return image
