"""From native pixels to a backbone's grid: pure geometry on arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
    """

    pixels: NDArray[Any]
    coverage: float
    fov_arcsec: float | None
    ra: float | None = None
    dec: float | None = None
    read_seconds: float = 0.0


def resample(
    plane: NDArray[np.floating[Any]],
    *,
    center: tuple[float, float],
    side: float,
    size: int,
) -> NDArray[np.float32]:
    """Return a square of `plane` on a grid of `size` pixels, anti-aliased, surface brightness conserved.

    Each output pixel is the mean of the input under a triangle of half-width max(step, 1) input pixels: linear
    interpolation when magnifying, area-like averaging when shrinking.

    Parameters
    ----------
    plane : ndarray, shape (y, x)
        NaN = no data.
    center : (float, float)
        (x, y) of the square's centre, 0-based pixels, the first pixel's centre being (0, 0).
    side : float
        Side of the square in input pixels, > 0. It may reach over the edge.
    size : int
        Output pixels on a side.

    Returns
    -------
    ndarray, shape (size, size), float32
        NaN where less than half of the kernel's weight lies on pixels with data.
    """
    (at_x, weights_x), (at_y, weights_y) = (
        _kernel(length, middle, side / size, size) for length, middle in zip(plane.shape[::-1], center, strict=True)
    )
    left, bottom = at_x.min(), at_y.min()
    window = np.asarray(plane[bottom : at_y.max() + 1, left : at_x.max() + 1], dtype=np.float32)
    grid = (at_y - bottom, weights_y, at_x - left, weights_x)
    valid = np.isfinite(window)
    if valid.all():
        total, share = _gather(window, *grid), np.outer(weights_y.sum(axis=1), weights_x.sum(axis=1))
    else:
        total, share = _gather(np.where(valid, window, 0), *grid), _gather(valid.astype(np.float32), *grid)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(share > 0.5, total / share, np.nan).astype(np.float32)


_Taps = tuple[NDArray[np.intp], NDArray[np.float32]]


def _kernel(length: int, center: float, step: float, size: int) -> _Taps:
    """Return input pixels (size, tap) and weights (size, tap); a row sums to 1 where none of it lies off the frame."""
    reach = max(step, 1.0)
    positions = center + (np.arange(size) - (size - 1) / 2) * step
    pixels = np.ceil(positions - reach)[:, None] + np.arange(int(np.ceil(2 * reach)) + 1)
    weights = np.clip(1 - np.abs(pixels - positions[:, None]) / reach, 0, None)
    weights /= weights.sum(axis=1, keepdims=True)
    inside = (pixels >= 0) & (pixels < length)
    clipped = np.clip(pixels, 0, length - 1).astype(np.intp)
    return clipped, np.where(inside, weights, 0).astype(np.float32)


def _gather(
    window: NDArray[np.float32],
    at_y: NDArray[np.intp],
    weights_y: NDArray[np.float32],
    at_x: NDArray[np.intp],
    weights_x: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Return the separable weighted sum. Taps are few, and a matrix product would wake BLAS threads in every worker."""
    rows = np.zeros((len(at_y), window.shape[1]), np.float32)
    for tap in range(at_y.shape[1]):
        rows += weights_y[:, tap, None] * window[at_y[:, tap]]
    out = np.zeros((len(at_y), len(at_x)), np.float32)
    for tap in range(at_x.shape[1]):
        out += weights_x[:, tap] * rows[:, at_x[:, tap]]
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
    return np.asarray(np.isfinite(flux).mean(axis=(1, 2)))


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
