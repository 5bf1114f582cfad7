"""Small pictures of sources, as JPEG: what a store keeps beside its vectors, and a page embeds."""

from __future__ import annotations

import io
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from galembed.cutouts import resample
from galembed.mappings import FluxMapping

PIXELS: Final = 64
"""Side of a stored picture."""

QUALITY: Final = 85


def thumbnail(pixels: NDArray[Any], mapping: FluxMapping, side: int = PIXELS) -> bytes:
    """Return a cutout as a small JPEG.

    Parameters
    ----------
    pixels : ndarray, shape (3, y, x)
        As in `galembed.cutouts.Cutout`, square: float32 flux, made smaller before it is mapped to colours, or uint8
        display. NaN is shown as empty sky.
    mapping : FluxMapping
        For flux.
    side : int
        Pixels of the picture; a smaller cutout stays as it is.
    """
    size = pixels.shape[-1]
    side = min(side, size)
    if pixels.dtype == np.uint8:
        image = Image.fromarray(np.ascontiguousarray(np.moveaxis(pixels, 0, -1)))
        return jpeg(np.asarray(image.resize((side, side), Image.Resampling.BOX)))
    middle = (size - 1) / 2
    small = resample(pixels, center=(middle, middle), side=size, size=side)
    return jpeg(np.moveaxis(np.asarray(mapping.channels(small)), 0, -1))


def jpeg(image: NDArray[Any], *, quality: int = QUALITY) -> bytes:
    """Return an image as JPEG, its top row first.

    Parameters
    ----------
    image : ndarray, shape (y, x, 3)
        uint8, or floats in [0, 1]; row 0 is the bottom.
    quality : int
        1 to 95.
    """
    pixels = image if image.dtype == np.uint8 else np.round(255 * image).astype(np.uint8)
    buffer = io.BytesIO()
    # On small pictures colour at full resolution costs 15 to 40%, of which Huffman tables of their own save most again.
    Image.fromarray(np.ascontiguousarray(pixels[::-1])).save(
        buffer, "JPEG", quality=quality, subsampling=0, optimize=True
    )
    return buffer.getvalue()


def image_of(data: bytes) -> NDArray[np.uint8]:
    """Return what `jpeg` wrote; shape (y, x, 3), row 0 at the bottom."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))[::-1]
