"""Positions on the sky: HEALPix cells and angular distance."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from astropy import units as u
from astropy_healpix import HEALPix
from numpy.typing import ArrayLike, NDArray

HEALPIX_ORDER: Final = 29
"""Order of the `_healpix_29` column (nested), as in HATS catalogues; a cell is 0.4 milliarcsec wide."""


def healpix_index(ra: ArrayLike, dec: ArrayLike, order: int = HEALPIX_ORDER) -> NDArray[np.int64]:
    """Return nested HEALPix indices.

    Parameters
    ----------
    ra, dec : array_like, shape (n,)
        ICRS, deg; finite.
    order : int
        log2 of nside.

    Returns
    -------
    ndarray, shape (n,), int64
    """
    grid = HEALPix(nside=2**order, order="nested")
    cells = grid.lonlat_to_healpix(np.asarray(ra, float) * u.deg, np.asarray(dec, float) * u.deg)
    return np.asarray(cells, dtype=np.int64)


def cell_reach(nside: int) -> float:
    """Return the largest distance from a HEALPix cell's middle to its corner (deg; `healpix_base`'s max_pixrad)."""
    middle = (2 / 3, math.pi / (4 * nside))
    corner = (1 - (1 - 1 / nside) ** 2 / 3, 0.0)
    (z1, phi1), (z2, phi2) = middle, corner
    cosine = z1 * z2 + math.sqrt((1 - z1**2) * (1 - z2**2)) * math.cos(phi1 - phi2)
    return 1.01 * math.degrees(math.acos(cosine)) + 1e-6


def separation_arcsec(ra1: ArrayLike, dec1: ArrayLike, ra2: ArrayLike, dec2: ArrayLike) -> NDArray[np.float64]:
    """Return great-circle distances.

    Parameters
    ----------
    ra1, dec1, ra2, dec2 : array_like, broadcastable
        ICRS, deg. NaN gives NaN.

    Returns
    -------
    ndarray, float64
        Arcsec, by the haversine formula (accurate for small angles and at the poles).
    """
    ra1, dec1, ra2, dec2 = (np.radians(np.asarray(angle, np.float64)) for angle in (ra1, dec1, ra2, dec2))
    half = np.sin((dec2 - dec1) / 2) ** 2 + np.cos(dec1) * np.cos(dec2) * np.sin((ra2 - ra1) / 2) ** 2
    return np.asarray(np.degrees(2 * np.arcsin(np.sqrt(np.clip(half, 0, 1)))) * 3600)


def unit_vectors(ra: ArrayLike, dec: ArrayLike) -> NDArray[np.float64]:
    """Return positions as vectors of length 1, for searches by chord.

    Parameters
    ----------
    ra, dec : array_like, same shape
        ICRS, deg.

    Returns
    -------
    ndarray, shape (..., 3), float64
    """
    ra, dec = np.radians(np.asarray(ra, np.float64)), np.radians(np.asarray(dec, np.float64))
    return np.stack([np.cos(dec) * np.cos(ra), np.cos(dec) * np.sin(ra), np.sin(dec)], axis=-1)
