"""Labels matched to sources by position on the sky, for tables whose ids are another survey's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from astropy import units as u
from astropy.table import Table
from numpy.typing import ArrayLike, NDArray

from galembed.catalogues import GUESSES
from galembed.errors import BadRequest
from galembed.sky import unit_vectors

Positions = tuple[ArrayLike, ArrayLike]


@dataclass(frozen=True)
class Matches:
    """Labels and the sources that they are of.

    Attributes
    ----------
    labels, sources : ndarray, shape (match,), int
        Row numbers in either table; each source once, in order of `sources`.
    unmatched : int
        Labels without a source within the radius, or without a position.
    ambiguous : int
        Labels that are left out, since there are several sources within the radius, or other labels that say something
        else are as near to the source.
    """

    labels: NDArray[np.intp]
    sources: NDArray[np.intp]
    unmatched: int
    ambiguous: int


def label_positions(table: Table) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the right ascension and declination of each row, shape (row,), ICRS, deg; NaN where there is none.

    The columns are the first pair of `galembed.catalogues.GUESSES` that the table has.

    Raises
    ------
    BadRequest
        If there is no such pair, or it does not hold angles of that range.
    """
    spelt = {name.lower().lstrip("#").strip(): name for name in table.colnames}
    pairs = zip(GUESSES["ra"], GUESSES["dec"], strict=True)
    names = next(((spelt[ra], spelt[dec]) for ra, dec in pairs if ra in spelt and dec in spelt), None)
    if names is None:
        raise BadRequest(
            f"the labels have no positions to match by radius, only {', '.join(table.colnames[:30])}; "
            "call the columns ra and dec, in degrees"
        )
    ra, dec = (_degrees(table, name) for name in names)
    for name, angles, least, most in ((names[0], ra, -180, 360), (names[1], dec, -90, 90)):
        outside = angles[np.isfinite(angles) & ((angles < least) | (angles > most))]
        if len(outside):
            raise BadRequest(f"column {name!r} of the labels holds {outside[0]:g}, not from {least} to {most} deg")
    return ra, dec


def _degrees(table: Table, name: str) -> NDArray[np.float64]:
    values = np.ma.asarray(table[name])
    if values.dtype.kind not in "iuf":
        raise BadRequest(f"column {name!r} of the labels holds {values.dtype}; a position is in decimal degrees")
    angles = np.ma.filled(values.astype(np.float64), np.nan)
    unit = u.Unit(table[name].unit or u.deg)
    if not unit.is_equivalent(u.deg):
        raise BadRequest(f"column {name!r} of the labels has unit {unit}, which is not an angle")
    return np.asarray(angles * unit.to(u.deg), np.float64)


def sky_pairs(sources: Positions, labels: Positions, radius_arcsec: float) -> NDArray[np.int64]:
    """Return the pairs of a label and a source that are close, shape (pair, 2), row numbers.

    Parameters
    ----------
    sources, labels : pair of array_like, each of shape (row,)
        Right ascension and declination, ICRS, deg; NaN = no position.
    radius_arcsec : float
        Largest distance along a great circle.

    Raises
    ------
    BadRequest
        If the radius is not above 0 and at most a degree.
    """
    from scipy.spatial import cKDTree

    if not 0 < radius_arcsec <= 3600:
        raise BadRequest(f"--radius is in arcsec, above 0 and at most 3600, got {radius_arcsec:g}")
    (ra, dec), (label_ra, label_dec) = ([np.asarray(angle, np.float64) for angle in one] for one in (sources, labels))
    here = np.flatnonzero(np.isfinite(ra) & np.isfinite(dec))
    there = np.flatnonzero(np.isfinite(label_ra) & np.isfinite(label_dec))
    if not len(here) or not len(there):
        return np.empty((0, 2), np.int64)
    chord = 2 * np.sin(np.radians(radius_arcsec / 3600) / 2)
    tree = cKDTree(unit_vectors(label_ra[there], label_dec[there]))
    near = tree.query_ball_point(unit_vectors(ra[here], dec[here]), chord)
    counts = [len(found) for found in near]
    found = np.array([at for one in near for at in one], np.int64)
    return np.stack([there[found], np.repeat(here, counts)], axis=1).astype(np.int64)


def matches(pairs: NDArray[np.int64], values: Sequence[object]) -> Matches:
    """Return which labels are of which sources, where that is plain.

    Parameters
    ----------
    pairs : ndarray, shape (pair, 2), int64
        See `sky_pairs`.
    values : sequence
        What each label says.
    """
    numbers: dict[object, int] = {}
    codes = np.array([numbers.setdefault(value, len(numbers)) for value in values], np.int64)
    label, source = pairs[:, 0], pairs[:, 1]
    several = np.bincount(label, minlength=len(values)) > 1
    order = np.lexsort((codes[label], source))
    changed = (np.diff(source[order]) == 0) & (np.diff(codes[label[order]]) != 0)
    disputed = np.isin(source, source[order][1:][changed])
    several[label[disputed]] = True
    plain = ~several[label]
    sources, first = np.unique(source[plain], return_index=True)
    there = np.zeros(len(values), bool)
    there[label] = True
    return Matches(label[plain][first], sources, int((~there).sum()), int((there & several).sum()))
