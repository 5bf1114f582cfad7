"""From native pixels to a backbone's grid: pure geometry on arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from galembed.errors import NoData


@dataclass(frozen=True)
class Cutout:
    """One source's pixels on a backbone's grid.

    Attributes
    ----------
    pixels : ndarray, shape (3, size, size)
        ``flux``: float32, nJy per (0.262 arcsec)^2, bands blue, green, red, NaN = no data.
        ``display``: uint8, R, G, B. Row 0 is the bottom of the picture.
    coverage : float
        Smallest fraction of pixels with data over the bands.
    fov_arcsec : float or None
        Side on the sky; None without a WCS.
    ra, dec : float or None
        Position of the source, ICRS, deg: the source list's, or the frame's centre where that has none.
    read_seconds : float
        Time spent reading and decompressing for it.
    flags : str
        Words of `galembed.quality` that warn about the picture, separated by blanks; empty if there is nothing to say.
    neighbours : tuple of str
        Other tiles that it was assembled from.
    tiles_opened : int
        Tiles that were not open yet.
    carried : mapping of str to float
        What the survey's maps say of the source: values of carried columns, NaN where a map has none.
    """

    pixels: NDArray[Any]
    coverage: float
    fov_arcsec: float | None
    ra: float | None = None
    dec: float | None = None
    read_seconds: float = 0.0
    flags: str = ""
    neighbours: tuple[str, ...] = ()
    tiles_opened: int = 0
    carried: Mapping[str, float] = field(default_factory=dict)


def resample(
    planes: NDArray[np.floating[Any]],
    *,
    center: tuple[float, float],
    side: float,
    size: int,
) -> NDArray[np.float32]:
    """Return a square of `planes` on a grid of `size` pixels, anti-aliased, surface brightness conserved.

    Each output pixel is the mean of the input under a triangle of half-width max(step, 1) input pixels, where
    step = side / size: linear interpolation when magnifying, area-like averaging when shrinking. All planes share
    the geometry, and are best given together.

    Parameters
    ----------
    planes : ndarray, shape (..., y, x)
        NaN = no data.
    center : (float, float)
        (x, y) of the square's centre, 0-based pixels, the first pixel's centre being (0, 0).
    side : float
        Side of the square in input pixels, > 0. It may reach over the edge.
    size : int
        Output pixels on a side.

    Returns
    -------
    ndarray, shape (..., size, size), float32
        NaN where less than half of the kernel's weight lies on pixels with data.
    """
    if abs(side - size) < _SAME_SIDE:
        return _shift(planes, center, size)
    step = side / size
    reach = max(step, 1.0)
    x, y = (middle + (np.arange(size) - (size - 1) / 2) * step for middle in center)
    window, (x, y), complete = _window(planes, x, y, reach)
    across, along = (_matrix(where, reach, length) for where, length in ((x, window.shape[-1]), (y, window.shape[-2])))

    def weigh(values: NDArray[np.float32]) -> NDArray[np.float32]:
        return _separable(values, along, across)

    return _mean(window, weigh, complete=complete)


def resample_at(
    planes: NDArray[np.floating[Any]],
    x: NDArray[np.floating[Any]],
    y: NDArray[np.floating[Any]],
    *,
    step: float,
) -> NDArray[np.float32]:
    """Return `planes` at any positions: a rotated, sheared or shifted grid.

    The kernel is that of `resample`, its axes those of the input; for a grid along those axes the two agree. Steps over
    8 pixels are taken in two: `resample`'s kernel makes a grid of about a fifth of a step, and a triangle over 5 of its
    pixels reads the positions off that; the second moment of both together is the one triangle's. A wave of 3 output
    pixels then differs by at most 0.012 of its amplitude, one of 8 by 0.002 (measured, steps of 8 to 30).

    Parameters
    ----------
    planes : ndarray, shape (..., y, x)
        NaN = no data.
    x, y : ndarray, shape (size, size)
        Position of each output pixel in `planes`, 0-based pixels. They may lie off the frame; NaN = nowhere.
    step : float
        Input pixels from one output pixel to the next, > 0.

    Returns
    -------
    ndarray, shape (..., size, size), float32
        NaN where less than half of the kernel's weight lies on pixels with data.
    """
    reach = max(step, 1.0)
    if step <= _LONGEST_STEP:
        window, (at_x, at_y), complete = _window(planes, x, y, reach)
        return _mean(window, lambda values: _gather(values, at_x, at_y, reach), complete=complete)
    coarse = reach / math.hypot(_COARSE_REACH, 1)  # a triangle's variance is reach^2 / 6, and variances add
    window, (at_x, at_y), complete = _window(planes, x, y, coarse * (_COARSE_REACH + 1))
    along, across = (
        _matrix(np.arange(-1, np.ceil(length / coarse) + 1) * coarse, coarse, length) for length in window.shape[-2:]
    )

    def weigh(values: NDArray[np.float32]) -> NDArray[np.float32]:
        return _gather(_separable(values, along, across), at_x / coarse + 1, at_y / coarse + 1, _COARSE_REACH)

    return _mean(window, weigh, complete=complete)


_SAME_SIDE: Final = 1e-9  # pixels: an angle divided by the pixel's, not quite a whole number
_LONGEST_STEP: Final = 8
_COARSE_REACH: Final = 5  # a whole number, so that sampling the triangle shifts nothing

_Taps = tuple[NDArray[np.intp], NDArray[np.float32]]
_Weigh = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def _mean(window: NDArray[np.float32], weigh: _Weigh, *, complete: bool) -> NDArray[np.float32]:
    """Return the weighted mean over pixels with data; `complete` says that the frame cuts no weight off."""
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        out = weigh(window)
        holed = ~np.isfinite(out).all(axis=(-2, -1))
        if not complete:  # the frame cuts the same off every plane
            share = weigh(np.ones((1, *window.shape[-2:]), np.float32))[0]
            share[share <= 0.5] = np.nan
            out /= share
    if holed.any():
        out[holed] = _mean_of_valid(window[holed], weigh)
    return out


def _mean_of_valid(window: NDArray[np.float32], weigh: _Weigh) -> NDArray[np.float32]:
    valid = np.isfinite(window)
    total, share = weigh(np.where(valid, window, np.float32(0))), weigh(valid.astype(np.float32))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(share > 0.5, total / share, np.float32(np.nan))


def _shift(planes: NDArray[np.floating[Any]], center: tuple[float, float], size: int) -> NDArray[np.float32]:
    """Return `resample` at a step of 1: two taps an axis, the same for every pixel."""
    corner = [middle - (size - 1) / 2 for middle in center[::-1]]
    first = [int(np.floor(position)) for position in corner]
    down, right = (np.float32(position - pixel) for position, pixel in zip(corner, first, strict=True))
    window = _padded(planes, first, size + 1)

    def weigh(values: NDArray[np.float32]) -> NDArray[np.float32]:
        rows = values[:-1] * (1 - down)
        if down:
            rows += values[1:] * down
        out = rows[:, :-1] * (1 - right)
        if right:
            rows *= right
            out += rows[:, 1:]
        return out

    out = np.empty((*window.shape[:-2], size, size), np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        for plane in np.ndindex(window.shape[:-2]):  # one by one they stay in the processor's cache
            out[plane] = weigh(window[plane])
        holed = [plane for plane in np.ndindex(out.shape[:-2]) if not np.isfinite(out[plane].sum())]
    for plane in holed:
        known = np.isfinite(out[plane])
        if not known.all():  # again, around the pixels without data only
            rows, columns = (np.flatnonzero(~known.all(axis=axis)) for axis in (1, 0))
            top, bottom, left, right_end = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
            around = window[plane][top : bottom + 1, left : right_end + 1]
            out[plane][top:bottom, left:right_end] = _mean_of_valid(around, weigh)
    return out


def _padded(planes: NDArray[np.floating[Any]], first: Sequence[int], side: int) -> NDArray[np.float32]:
    """Return a square of `planes` from (y, x) pixel `first` on, NaN beyond the frame."""
    spans = [(max(start, 0), min(start + side, length)) for start, length in zip(first, planes.shape[-2:], strict=True)]
    rows, columns = (slice(low, max(low, high)) for low, high in spans)
    window = np.asarray(planes[..., rows, columns], dtype=np.float32)
    if window.shape[-2:] == (side, side):
        return window
    out = np.full((*planes.shape[:-2], side, side), np.nan, np.float32)
    height, width = window.shape[-2:]
    if height and width:
        top, left = (low - start for (low, _), start in zip(spans, first, strict=True))
        out[..., top : top + height, left : left + width] = window
    return out


def _window(
    planes: NDArray[np.floating[Any]],
    x: NDArray[np.floating[Any]],
    y: NDArray[np.floating[Any]],
    reach: float,
) -> tuple[NDArray[np.float32], tuple[NDArray[np.float64], NDArray[np.float64]], bool]:
    """Return the part of `planes` within `reach`, the positions in it, and whether nothing is cut off by the frame."""
    spans, moved, complete = [], [], True
    for where, length in ((x, planes.shape[-1]), (y, planes.shape[-2])):
        # Nothing beyond the frame counts, and a position that is not known counts as there.
        near = np.clip(np.nan_to_num(where.astype(np.float64), nan=-np.inf), -2 - reach, length + 1 + reach)
        low, high = float(near.min()) - reach, float(near.max()) + reach
        start = min(max(int(np.ceil(low)), 0), length - 1)
        stop = max(min(int(np.ceil(high)), length), start + 1)
        complete &= low >= -1 and high <= length
        spans.append(slice(start, stop))
        moved.append(near - start)
    return np.asarray(planes[..., spans[1], spans[0]], dtype=np.float32), (moved[0], moved[1]), complete


def _kernel(positions: NDArray[np.float64], reach: float, length: int) -> _Taps:
    """Return pixels and weights (tap, ...); weights sum to 1 over the taps where none of them lies off the frame."""
    taps = np.arange(int(np.ceil(2 * reach))).reshape(-1, *(1,) * positions.ndim)
    pixels = np.floor(positions - reach) + 1 + taps
    weights = np.clip(1 - np.abs(pixels - positions) / reach, 0, None)
    weights /= weights.sum(axis=0)
    weights[(pixels < 0) | (pixels >= length)] = 0
    return np.clip(pixels, 0, length - 1).astype(np.intp), weights.astype(np.float32)


def _matrix(positions: NDArray[np.float64], reach: float, length: int) -> csr_array:
    """Return the kernel as a sparse matrix (size, length): no BLAS, whose threads would wake in every worker."""
    pixels, weights = (array.T for array in _kernel(positions, reach, length))
    used = weights > 0
    starts = np.concatenate([[0], np.cumsum(used.sum(axis=1))])
    return csr_array((weights[used], pixels[used], starts), shape=(len(positions), length))


def _separable(planes: NDArray[np.float32], along: csr_array, across: csr_array) -> NDArray[np.float32]:
    """Return `along` @ plane @ `across`.T for each plane."""
    out = np.empty((*planes.shape[:-2], along.shape[0], across.shape[0]), np.float32)
    for plane in np.ndindex(planes.shape[:-2]):
        out[plane] = (across @ np.ascontiguousarray((along @ np.ascontiguousarray(planes[plane])).T)).T
    return out


def _gather(
    planes: NDArray[np.float32], x: NDArray[np.float64], y: NDArray[np.float64], reach: float
) -> NDArray[np.float32]:
    """Return the weighted sums around positions (size, size), one pair of taps after the other."""
    height, width = planes.shape[-2:]
    (at_x, weights_x), (at_y, weights_y) = _kernel(x, reach, width), _kernel(y, reach, height)
    flat = planes.reshape(*planes.shape[:-2], height * width)
    out = np.zeros((*planes.shape[:-2], *x.shape), np.float32)
    for row, weight_y in zip(at_y * width, weights_y, strict=True):
        part = np.zeros_like(out)
        for column, weight_x in zip(at_x, weights_x, strict=True):
            part += weight_x * flat.take(row + column, axis=-1)
        out += weight_y * part
    return out


def coverage(flux: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Return the fraction of pixels with data in each band.

    Parameters
    ----------
    flux : ndarray, shape (band, y, x)
        NaN = no data.

    Returns
    -------
    ndarray, shape (band,), float64
    """
    with np.errstate(over="ignore", invalid="ignore"):
        whole = [np.isfinite(plane.sum()) for plane in flux]  # half the time of looking at each pixel
    return np.array(
        [
            1.0 if known else np.count_nonzero(np.isfinite(plane)) / plane.size
            for known, plane in zip(whole, flux, strict=True)
        ]
    )


def require_coverage(flux: NDArray[np.floating[Any]], bands: tuple[str, ...], minimum: float) -> float:
    """Return the smallest coverage over the bands.

    Raises
    ------
    NoData
        If a band has no data at all, or its coverage is below `minimum`, naming it.
    """
    fractions = coverage(flux)
    worst = int(np.argmin(fractions))
    if fractions[worst] == 0:
        raise NoData(f"band {bands[worst]} has no data anywhere in the cutout")
    if fractions[worst] < minimum:
        raise NoData(
            f"band {bands[worst]} has data in {fractions[worst]:.0%} of the cutout, "
            f"at least {minimum:.0%} is asked for (--min-coverage)"
        )
    return float(fractions[worst])
