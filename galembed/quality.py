"""Warnings about a cutout: words for the `flags` column, so that an odd picture is not a silent vector."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

FLAGS: Final = {
    "partial": "part of the field lies outside the survey",
    "blank": "nothing in the field rises above the noise",
    "star": "more than half of the field is under a bright star's light, by the survey's mask",
    "neighbour": "nearly all the light in the field belongs to something that is not in the middle",
}
"""What each word means."""

_SIGMA: Final = 5.0
_MIDDLE: Final = 0.5
_OWN_SHARE: Final = 0.1
_BLOCK: Final = 4


def flags_of(flux: NDArray[np.float32], *, partial: bool = False, star_share: float = 0.0) -> str:
    """Return the words that apply to a cutout, separated by blanks; empty if none does.

    Parameters
    ----------
    flux : ndarray, shape (band, size, size)
        NaN = no data.
    partial : bool
        Part of it lies outside the survey.
    star_share : float
        Fraction of the field that the survey's mask calls a bright star's light.
    """
    words = []
    if partial:
        words.append("partial")
    light, middle = _detected(flux)
    total = float(light.sum())
    own = float(light[middle].sum())
    if star_share > 0.5:
        words.append("star")
    elif total == 0:
        words.append("blank")
    elif own < _OWN_SHARE * total:
        words.append("neighbour")
    return " ".join(words)


def _detected(flux: NDArray[np.float32]) -> tuple[NDArray[Any], tuple[slice, slice]]:
    """Return light above the noise in blocks of 4 x 4 pixels (0 without data), and the blocks of the middle.

    The noise is that of the blocks, from the median absolute deviation below the median: neither is moved
    by a galaxy that fills less than half of the field.
    """
    plane = flux.sum(axis=0)
    size = plane.shape[0] // _BLOCK * _BLOCK
    start = (plane.shape[0] - size) // 2
    square = plane[start : start + size, start : start + size]
    blocks = square.reshape(size // _BLOCK, _BLOCK, size // _BLOCK, _BLOCK).mean(axis=(1, 3))
    known = blocks[np.isfinite(blocks)]
    sky = np.median(known) if known.size else 0.0
    noise = 1.4826 * np.median(sky - known[known <= sky]) if known.size else 0.0
    light = np.where(blocks - sky > _SIGMA * noise, blocks - sky, 0.0)
    count = len(blocks)
    edge = round(count * (1 - _MIDDLE) / 2)
    inner = slice(edge, count - edge)
    return light, (inner, inner)
