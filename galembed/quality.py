"""Warnings about a cutout: words for the `flags` column, so that an odd picture is not a silent vector."""

from __future__ import annotations

from functools import reduce
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
_MAD_TO_SIGMA: Final = 1.4826  # of a normal distribution, as is the next
_QUARTILE_SIGMA: Final = 0.6745


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

    The noise comes from the differences of blocks beside each other, the sky from the darkest quarter: a galaxy
    that fills most of the field moves neither much.
    """
    size = flux.shape[-1] // _BLOCK * _BLOCK
    start = (flux.shape[-1] - size) // 2
    plane = reduce(np.add, [band[start : start + size, start : start + size] for band in flux])
    rows = reduce(np.add, [plane[at::_BLOCK] for at in range(_BLOCK)])
    blocks = reduce(np.add, [rows[:, at::_BLOCK] for at in range(_BLOCK)]) / _BLOCK**2
    known = blocks[np.isfinite(blocks)]
    steps = np.abs(np.concatenate([(blocks[1:] - blocks[:-1]).ravel(), (blocks[:, 1:] - blocks[:, :-1]).ravel()]))
    noise = _MAD_TO_SIGMA / np.sqrt(2) * _quantile(steps[np.isfinite(steps)], 0.5)
    sky = _quantile(known, 0.25) + _QUARTILE_SIGMA * noise
    light = np.where(blocks - sky > _SIGMA * noise, blocks - sky, 0.0)
    count = len(blocks)
    edge = round(count * (1 - _MIDDLE) / 2)
    inner = slice(edge, count - edge)
    return light, (inner, inner)


def _quantile(values: NDArray[np.floating[Any]], share: float) -> float:
    """Return a quantile, 0 of nothing; numpy's own takes ten times as long on a few hundred numbers."""
    if not values.size:
        return 0.0
    at = int(share * (values.size - 1))
    return float(np.partition(values, at)[at])
