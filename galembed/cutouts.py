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
    """

    pixels: NDArray[Any]
    coverage: float
    fov_arcsec: float | None
    ra: float | None = None
    dec: float | None = None


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
    (x0, weights_x), (y0, weights_y) = (
        _weights(length, middle, side / size, size)
        for length, middle in zip(plane.shape[::-1], center, strict=True)
    )
    window = plane[y0 : y0 + weights_y.shape[1], x0 : x0 + weights_x.shape[1]]
    window = np.asarray(window, dtype=np.float32)
    valid = np.isfinite(window)
    total = weights_y @ np.where(valid, window, np.float32(0)) @ weights_x.T
    if valid.all():
        share = weights_y.sum(axis=1)[:, None] * weights_x.sum(axis=1)[None, :]
    else:
        share = weights_y @ valid.astype(np.float32) @ weights_x.T
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(share > 0.5, total / share, np.nan).astype(np.float32)


def _weights(length: int, center: float, step: float, size: int) -> tuple[int, NDArray[np.float32]]:
    """Return the first input pixel touched and the kernel weights (size, touched), each full row summing to 1."""
    reach = max(step, 1.0)
    positions = center + (np.arange(size) - (size - 1) / 2) * step
    first, last = np.floor(positions[0] - reach), np.ceil(positions[-1] + reach)
    pixels = np.arange(first, last + 1)
    weights = np.clip(1 - np.abs(pixels[None, :] - positions[:, None]) / reach, 0, None)
    weights /= weights.sum(axis=1, keepdims=True)
    inside = (pixels >= 0) & (pixels < length)
    start = int(pixels[inside][0]) if inside.any() else 0
    return start, weights[:, inside].astype(np.float32)


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
