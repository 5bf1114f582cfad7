"""Which images are trained on and which are held out: given, or drawn by place on the sky; never by row order."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from galembed.errors import BadRequest, SchemaMismatch
from galembed.sky import healpix_index, unit_vectors

SPLITS: Final = ("train", "validation", "test")
"""Sides of a split, the one that must leak least into the others last."""

SAME_PLACE_ARCSEC: Final = 2.0
"""Sources closer than this are taken for one object under two ids."""

_CELL_ORDERS: Final = (6, 10)  # 0.9 deg; 3.4 arcmin for a survey of a few tiles
_SPELLINGS: Final = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_HUB_FILE: Final = re.compile(r"(?:^|/)(train|validation|test)(?:-\d+-of-\d+[^/]*|/\d+)\.(?:parquet|pq)$")


@dataclass(frozen=True)
class Shares:
    """How much is held out.

    Attributes
    ----------
    validation : float
        Of what is not for testing.
    test : float
        Of everything.

    Raises
    ------
    BadRequest
        If either is not in [0, 1).
    """

    validation: float = 0.1
    test: float = 0.0

    def __post_init__(self) -> None:
        for name, share in (("validation", self.validation), ("test", self.test)):
            if not 0 <= share < 1:
                raise BadRequest(f"the share kept for {name} must lie in [0, 1), got {share:g}")


SHARES: Final = Shares()
"""A tenth for validation."""


@dataclass(frozen=True)
class Split:
    """The side of each row, and how far it may still move.

    Attributes
    ----------
    ranks : ndarray, shape (row,), int8
        Places in `SPLITS`.
    limits : ndarray, shape (row,), int8
        The farthest rank that `together` may give a row: its own where its side was given.
    """

    ranks: NDArray[np.int8]
    limits: NDArray[np.int8]

    @property
    def names(self) -> NDArray[np.str_]:
        """The side of each row in words, shape (row,)."""
        return np.array(SPLITS)[self.ranks]

    def together(self, pairs: NDArray[np.int64]) -> Split:
        """Return the split with linked rows on one side: of theirs, the one that is held out most.

        A row whose side was given stays; one of a given training part goes to validation at most, so that a given
        test set stays as it is.

        Parameters
        ----------
        pairs : ndarray, shape (pair, 2), int64
            Row numbers; links are followed through any number of rows.
        """
        groups = group_of(len(self.ranks), pairs)
        most = np.zeros(len(self.ranks), np.int8)
        np.maximum.at(most, groups, self.ranks)
        return Split(np.maximum(self.ranks, np.minimum(most[groups], self.limits)), self.limits)

    def apart(self, pairs: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the pairs of which one row is trained on and the other is not, shape (pair, 2)."""
        held_out = self.ranks[pairs] > 0
        across: NDArray[np.bool_] = held_out[:, 0] != held_out[:, 1]
        return pairs[across]

    def take(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> Split:
        """Return the split of some rows."""
        return Split(self.ranks[rows], self.limits[rows])


def draw_split(
    ids: Sequence[str],
    ra: ArrayLike,
    dec: ArrayLike,
    *,
    given: Sequence[str] | None = None,
    shares: Shares = SHARES,
) -> Split:
    """Split sources by where they lie on the sky, so that neither an object nor its neighbourhood is on both sides.

    A cell of the sky (HEALPix order 6, 0.9 deg), or an id where there is no position, has a number from its own name
    alone (SHA-256): the order of the rows, and which others there are, change nothing. There are two exceptions. Where
    the cells are so few that a side would get less than half or more than twice its share, smaller cells (order 10,
    3.4 arcmin) decide, then the ids, of which at last those with the smallest numbers are held out. And of rows within
    `SAME_PLACE_ARCSEC` of one another on both sides of a cell's edge, all are held out.

    Parameters
    ----------
    ids : sequence of str
    ra, dec : array_like, shape (row,)
        ICRS, deg; NaN = no position.
    given : sequence of str, optional
        One of `SPLITS` for each row, or empty where its side is to be drawn. Where no row is given to validation, it
        is drawn from those given to training; where any row is given, no test set is drawn.
    shares : Shares

    Returns
    -------
    Split
    """
    sides = np.array(given if given is not None else [""] * len(ids), dtype="U10")
    ra, dec = np.asarray(ra, np.float64), np.asarray(dec, np.float64)
    if (sides != "").any():
        shares = Shares(shares.validation, 0.0)
    fixed = np.isin(sides, ("test",) if not (sides == "validation").any() else SPLITS)
    ranks = np.zeros(len(ids), np.int8)
    for rank, name in enumerate(SPLITS):
        ranks[sides == name] = rank
    limits = np.where(fixed, ranks, np.where((sides == "train") | (shares.test == 0), 1, 2)).astype(np.int8)
    free = np.flatnonzero(~fixed)
    if len(free) and (shares.validation or shares.test):
        ranks[free] = _drawn([ids[int(at)] for at in free], ra[free], dec[free], shares)
    return Split(ranks, limits).together(close_pairs(ra, dec))


def _drawn(ids: Sequence[str], ra: NDArray[np.float64], dec: NDArray[np.float64], shares: Shares) -> NDArray[np.int8]:
    """Return ranks by sky cell, by smaller cells or by id: the first that gives each side about its share."""
    names: list[str] = []
    for order in (*_CELL_ORDERS, None):
        names = list(ids) if order is None else _cells(ids, ra, dec, order)
        draws = _numbers("", names)
        tests = _numbers("test:", names) < shares.test
        validates = (draws < shares.validation) & ~tests
        rest = max(1, int((~tests).sum()))
        if _is_near(tests.mean(), shares.test) and _is_near(validates.sum() / rest, shares.validation):
            return np.where(tests, 2, validates).astype(np.int8)
    # Too few rows to leave it to chance: those with the smallest numbers.
    places = sorted(range(len(ids)), key=lambda at: (draws[at], names[at]))
    ranks = np.zeros(len(ids), np.int8)
    held_out = [(rank, share) for rank, share in ((1, shares.validation), (2, shares.test)) if share]
    held_out = held_out[: max(len(ids) - 1, 0)]
    taken = 0
    for rank, share in held_out:
        count = min(max(1, round(share * len(ids))), (len(ids) - 1) // len(held_out))
        ranks[places[taken : taken + count]] = rank
        taken += count
    return ranks


def _is_near(got: float, wanted: float) -> bool:
    return wanted / 2 <= got <= 2 * wanted


def _cells(ids: Sequence[str], ra: NDArray[np.float64], dec: NDArray[np.float64], order: int) -> list[str]:
    placed = np.isfinite(ra) & np.isfinite(dec)
    names = np.array([*ids, None], dtype=object)[:-1]
    if placed.any():
        names[placed] = healpix_index(ra[placed], dec[placed], order).astype(str)
    return list(names)


def _numbers(salt: str, names: Sequence[str]) -> NDArray[np.float64]:
    """Return a number in [0, 1) for each name, from the name alone."""
    known = {name: int(hashlib.sha256(f"{salt}{name}".encode()).hexdigest()[:8], 16) / 2**32 for name in set(names)}
    return np.array([known[name] for name in names], np.float64)


def close_pairs(ra: ArrayLike, dec: ArrayLike, within_arcsec: float = SAME_PLACE_ARCSEC) -> NDArray[np.int64]:
    """Return the pairs of rows at the same place.

    Parameters
    ----------
    ra, dec : array_like, shape (row,)
        ICRS, deg; NaN = no position, and no pair.
    within_arcsec : float

    Returns
    -------
    ndarray, shape (pair, 2), int64
        Row numbers.
    """
    ra, dec = np.asarray(ra, np.float64), np.asarray(dec, np.float64)
    placed = np.flatnonzero(np.isfinite(ra) & np.isfinite(dec))
    if len(placed) < 2:
        return np.empty((0, 2), np.int64)
    chord = 2 * np.sin(np.radians(within_arcsec / 3600) / 2)
    # Very many rows at one place would make as many pairs as their square: one of each place stands for them.
    places, first, same = np.unique(
        unit_vectors(ra[placed], dec[placed]), axis=0, return_index=True, return_inverse=True
    )
    exact = np.stack([placed[first[same.ravel()]], placed], axis=1)
    near = placed[first[cKDTree(places).query_pairs(chord, output_type="ndarray")]].reshape(-1, 2)
    pairs: NDArray[np.int64] = np.concatenate([exact[exact[:, 0] != exact[:, 1]], near]).astype(np.int64)
    return pairs


def equal_pairs(keys: Iterable[bytes]) -> NDArray[np.int64]:
    """Return the pairs (first row, later row) with equal keys, shape (pair, 2); an empty key equals none."""
    first: dict[bytes, int] = {}
    pairs = [(at, row) for row, key in enumerate(keys) if key and (at := first.setdefault(key, row)) != row]
    return np.array(pairs, np.int64).reshape(-1, 2)


def group_of(count: int, pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the number of the group that each row belongs to, shape (row,): rows linked by pairs share one."""
    links = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    groups: NDArray[np.int64] = connected_components(links, directed=False)[1].astype(np.int64)
    return groups


def named_side(text: str | None) -> str:
    """Return the side that a table's word names, one of `SPLITS`; empty for an empty word.

    Raises
    ------
    SchemaMismatch
        If it is no such word.
    """
    word = "" if text is None else text.strip().lower()
    if word and word not in _SPELLINGS:
        raise SchemaMismatch(f"{text!r} names no side of a split; give train, validation or test, or leave it empty")
    return _SPELLINGS.get(word, "")


def side_of_file(path: str) -> str:
    """Return the side that a Hugging Face data set's file holds by its name, empty for other names.

    Parameters
    ----------
    path : str
        ``data/train-00000-of-00003.parquet`` as `datasets` uploads it (huggingface/datasets 00724a7,
        src/datasets/data_files.py), or ``default/train/0000.parquet`` as the hub's own conversion has it.
    """
    found = _HUB_FILE.search(path)
    return found.group(1) if found else ""
