"""Read first frames that a dataset stores as images."""

import io
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps

from ..files import fingerprint
from .video_file import open_bytes
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
        VideoDecodeError: The image is missing, damaged or too large, its levels are no bytes and not of 16 bits, or an
            array has another shape or dtype.
    """
    if isinstance(source, np.ndarray):
        pixels = source
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3 or 0 in pixels.shape:
            raise VideoDecodeError(
                f"<image array>: expected uint8 of shape (height, width, 3), got {pixels.dtype} {pixels.shape}."
            )
    else:
        pixels = _pixels(source)
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


def _pixels(source: ImageSource) -> np.ndarray:
    """Upright RGB of 8 bits. Levels of 16 bits are scaled: PIL would make white of all that are above 255."""
    image = _open(source)
    if image.mode in ("I", "F"):
        raise VideoDecodeError(
            f"{image_name(source)}: expected levels of 8 or 16 bits, got 32 (mode {image.mode!r}), of unknown range. "
            "Convert it to a PNG with 8 bits, or drop its row."
        )
    try:
        image = PIL.ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=-1)
        return np.asarray(image.convert("RGB"))
    except Exception as error:  # whatever PIL makes of damaged tags and palettes
        raise _unreadable(source, error) from error


def _open(source: ImageSource) -> PIL.Image.Image:
    if isinstance(source, PIL.Image.Image):
        return source
    cell: Mapping[str, Any] = source if isinstance(source, Mapping) else {"path": source}
    if cell.get("bytes") is None and not isinstance(cell.get("path"), str | os.PathLike):
        raise VideoDecodeError(
            f"{image_name(source)}: expected a path, a dict with 'path' or 'bytes', an image or a uint8 array, got "
            f"{type(source).__name__}."
        )
    with open_bytes(cell) as file:
        content = io.BytesIO(file.read())
    try:
        image = PIL.Image.open(content)
        image.load()  # damage behind the header shows only here
    except Exception as error:  # damaged files make PIL raise far more than it documents
        raise _unreadable(source, error) from error
    return image


def _unreadable(source: ImageSource, error: Exception) -> VideoDecodeError:
    words = f"cannot read the image ({error or type(error).__name__}). Check the path and the file, or drop its row."
    return VideoDecodeError(f"{image_name(source)}: {words}")
