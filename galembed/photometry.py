"""Fluxes and magnitudes. Everything downstream of the readers is in nJy."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from galembed.errors import UnknownUnit

AB_ZERO_POINT_NJY: Final = 31.4
"""AB magnitude of 1 nJy, to the two decimals that the Rubin and Euclid data products use (3631 Jy = AB 0)."""


def nanojansky_per_count(zero_point: float) -> float:
    """Return the flux of one count, in nJy.

    Parameters
    ----------
    zero_point : float
        AB magnitude of one count.

    Returns
    -------
    float
        10^((31.4 - zero_point) / 2.5); 3630.78 for a nanomaggy (zero point 22.5).
    """
    return float(10 ** (0.4 * (AB_ZERO_POINT_NJY - zero_point)))


NJY_PER_NANOMAGGY: Final = nanojansky_per_count(22.5)

_UNITS: Final = {
    "nanomaggy": NJY_PER_NANOMAGGY,
    "nanomaggies": NJY_PER_NANOMAGGY,
    "nmgy": NJY_PER_NANOMAGGY,
    "njy": 1.0,
    "ujy": 1e3,
    "mjy": 1e6,  # millijansky; MJy/sr is another spelling and another unit
    "jy": 1e9,
}


def nanojansky_per_unit(unit: str) -> float:
    """Return the factor that turns a FITS BUNIT into nJy.

    Raises
    ------
    UnknownUnit
        If `unit` is none of the spellings known here. Nothing is guessed.
    """
    key = unit.strip().lower()
    if key == "mjy" and unit.strip() == "MJy":
        raise UnknownUnit("BUNIT 'MJy' is megajansky, which no survey image uses; check the header")
    if key not in _UNITS:
        raise UnknownUnit(f"BUNIT {unit!r} cannot be turned into nJy; known units are {sorted(_UNITS)}")
    return _UNITS[key]


def ab_magnitude(flux: ArrayLike) -> NDArray[np.float64]:
    """Return AB magnitudes.

    Parameters
    ----------
    flux : array_like
        Flux in nJy.

    Returns
    -------
    ndarray, same shape, float64
        31.4 - 2.5 log10(flux); NaN where the flux is not positive or is NaN.
    """
    flux = np.asarray(flux, dtype=np.float64)
    positive = np.where(flux > 0, flux, np.nan)
    return np.asarray(AB_ZERO_POINT_NJY - 2.5 * np.log10(positive))
