"""The one reader of images: files, columns and benchmark rows give the same pixels as a served model gets."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from dop_search.utils.errors import DataError

_MIN_FULL_RANGE = 4096
"""16-bit images without a larger value hold 8- to 12-bit data: scaled by their format they would be all but black."""


def read_image(source: Any, where: str) -> Image.Image:
    """An RGB image, as ``transformers.image_utils.load_image`` gives it: turned upright by its EXIF tag, first frame.

    Images of more than 8 bits, which that clips to white or black, are scaled: 16 bits as Pillow scales colours of 16
    bits (``value // 256``), floats within 0..1 by 255. Integers and floats within 0..255 are taken as they are.

    Args:
        source: a path, the bytes of a file, ``{"bytes", "path"}`` as data sets hold it, or a decoded image.
        where: what errors name.

    Raises:
        DataError: if it is none of these, cannot be decoded, or has a range that says nothing about its brightness.
    """
    found = source
    if isinstance(found, dict):
        found = found.get("bytes") or found.get("path")
    name = f" {str(found)!r}" if isinstance(found, (str, Path)) else ""
    try:
        if isinstance(found, bytes):
            found = Image.open(io.BytesIO(found))
        elif isinstance(found, (str, Path)):
            found = Image.open(_regular(Path(found)))
        if not isinstance(found, Image.Image):
            raise DataError(f"{where}: an image is needed, but got {type(found).__name__}")
        upright = ImageOps.exif_transpose(found)
        return _scaled(upright, found.format).convert("RGB")
    except DataError:
        raise
    except Exception as error:  # decoders raise anything on damaged files
        raise _unreadable(name, where, error) from error


def check_image(path: Path, where: str) -> None:
    """Read no more than the header: DataError if there is no such file, it is no image, or a decompression bomb."""
    try:
        Image.open(_regular(path)).close()
    except Exception as error:  # as above
        raise _unreadable(f" {str(path)!r}", where, error) from error


def _regular(path: Path) -> Path:
    """Opening a pipe or a device can wait for ever."""
    if not path.is_file():
        raise FileNotFoundError("there is no such file" if not path.exists() else "it is not a regular file")
    return path


def _scaled(image: Image.Image, file_format: str | None) -> Image.Image:
    """Images of one channel and more than 8 bits, scaled to 8; all others as they are."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode.startswith("I;16") or (image.mode == "I" and file_format == "PPM"):
        if 0 < high < _MIN_FULL_RANGE:
            raise ValueError(f"a 16-bit image with no value above {high}, of 65535; save it with 8 bits")
        values = values // 256
    elif image.mode == "F" and low >= 0.0 and high <= 1.0:
        values = (values * 255.0).round()
    elif not (low >= 0 and high <= 255):  # NaN is neither
        raise ValueError(f"values of {low}..{high}, which say nothing about brightness; save it with 8 or 16 bits")
    return Image.fromarray(values.astype(np.uint8))


def _unreadable(name: str, where: str, error: Exception) -> DataError:
    reason = str(error) or type(error).__name__
    return DataError(f"{where}: cannot read the image{name} ({reason}); fix or drop it")
