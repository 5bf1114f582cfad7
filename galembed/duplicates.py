"""The same object twice in a store: by position and likeness, or by likeness alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
from astropy import units as u
from astropy.table import Column, MaskedColumn, Table
from numpy.typing import ArrayLike, NDArray

from galembed.errors import BadRequest
from galembed.progress import Show
from galembed.scans import row_filter, row_numbers, scan, silent, take
from galembed.search import HIT_COLUMNS, arrow_columns
from galembed.sky import separation_arcsec, unit_vectors
from galembed.store import Store, matrix

MAX_PAIRS: Final = 20_000_000
"""Pairs from which on a question is refused: they are held in memory."""

EXACT_BELOW: Final = 20_000
"""Sources up to which a search by likeness alone compares each with each."""

MISSED: Final = 0.001
"""Chance to miss a pair just at the threshold in a larger store, where likeness alone is asked for."""

_ZONE: Final = 1_000_000  # sources
_BLOCK: Final = 2048
_PART: Final = 32_768
_HELD_BYTES: Final = 2 << 30
_CODE_BYTES: Final = 256 << 20
_ROUNDING: Final = 1e-6  # of a cosine in float32
_MEMBER_COLUMNS: Final = (*HIT_COLUMNS, "coverage", "flags")

Pairs = NDArray[np.int64]
Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Duplicates:
    """What is in a store more than once; `str` says it in a line or two.

    Attributes
    ----------
    members : Table
        A row for each source that has a duplicate: `group` (1, 2, ...), `keep`, `survey`, `source_id`, `ra` and `dec`
        (deg), `fov` (arcsec), `coverage`, `flags`; for what is not kept `duplicate_of` (``survey:id``), and the
        `separation` (arcsec) and `similarity` (cosine) from that one, masked for the others. Best first in each group.
    pairs : Table
        A row for each pair: `group`, `survey_1`, `source_id_1`, `survey_2`, `source_id_2`, `separation` (arcsec, NaN
        without a position), `similarity` (cosine).
    unlike : int
        Pairs within the radius that are less similar than asked for.
    unplaced : int
        Sources without a position.
    exact : bool
        Every pair was found. False where a large store was searched by likeness alone.
    """

    members: Table
    pairs: Table
    unlike: int
    unplaced: int
    exact: bool

    @property
    def groups(self) -> int:
        """Sources that pairs connect, counted once together."""
        return len(np.unique(self.members["group"]))

    def __str__(self) -> str:
        lines = [
            f"{len(self.pairs):,} pairs of {len(self.members):,} sources in {self.groups:,} groups: "
            f"{np.sum(~self.members['keep']):,} sources are duplicates of one that is kept"
        ]
        if self.unlike:
            lines.append(f"{self.unlike:,} more pairs within the radius are less similar")
        if self.unplaced:
            lines.append(f"{self.unplaced:,} sources have no position and were not compared")
        if not self.exact:
            lines.append(f"up to {MISSED:.1%} of the pairs just at the threshold may be missing")
        return "\n".join(lines)


def duplicates(
    store: Store,
    *,
    radius: float | None = 1.0,
    similarity: float = 0.98,
    where: str | None = None,
    cone: Sequence[float] | None = None,
    box: Sequence[float] | None = None,
    region: Any = None,
    prefer: Sequence[str] = (),
    seed: int = 0,
    show: Show | None = None,
) -> Duplicates:
    """Find objects that are there more than once: in two tiles, or in two surveys.

    Parameters
    ----------
    store : Store
    radius : float or None
        Largest separation of a pair, arcsec, above 0 and at most 3600. None: any separation, and sources without a
        position too (pictures); for near-identical vectors.
    similarity : float
        Least cosine of a pair, from -1 (any pair within the radius) to 1.
    where, cone, box, region
        As in `Store.similar`.
    prefer : sequence of str
        Surveys whose sources are kept rather than others', the first rather than the second.
    seed : int
        Of the search by likeness alone.
    show : callable, optional
        Called with a stage, how many are done and of how many.

    Returns
    -------
    Duplicates
        Pairs that share a source are one group. Going from the best source to the worst, each is kept unless it is
        paired with one that is: a chain of pairs keeps more than one. The best is of a preferred survey, then has the
        fewest flags, then the most coverage, then comes first by survey and id.

    Raises
    ------
    BadRequest
        If an argument does not fit the store, or more than `MAX_PAIRS` pairs come out.

    Notes
    -----
    By position: 24 bytes a source are held, and pairs are sought in zones of declination. By likeness alone: up to
    `EXACT_BELOW` sources each is compared with each; beyond, those that lie on the same side of all of a set of random
    planes are, for so many sets that a pair at the threshold is missed with a chance of `MISSED`. Vectors are held up
    to 2 GiB, and read again where there are more.

    References
    ----------
    Charikar 2002, STOC, 380 (random planes).
    """
    if radius is not None and not 0 < radius <= 3600:
        raise BadRequest(f"--radius is in arcsec, above 0 and at most 3600, got {radius:g}")
    if not -1 <= similarity <= 1:
        raise BadRequest(f"--similarity is a cosine, from -1 to 1, got {similarity:g}")
    tell = show or silent
    condition = row_filter(store, where, cone, box, region)
    rows, ra, dec = _positions(store, condition)
    unlike, exact = 0, True
    if radius is not None:
        near = close_pairs(ra, dec, radius)
        likeness = _likeness(store, rows, near, tell)
        alike = likeness >= similarity - _ROUNDING
        unlike = int(np.sum(~alike))
        pairs, likeness = near[alike], likeness[alike]
        unplaced = int(np.sum(~np.isfinite(ra)))
    else:
        pairs, likeness, exact = _alike(store, rows, condition, similarity, seed, tell)
        unplaced = 0
    separation = separation_arcsec(ra[pairs[:, 0]], dec[pairs[:, 0]], ra[pairs[:, 1]], dec[pairs[:, 1]])
    members, table = _tables(store, rows, pairs, separation, likeness, prefer, tell)
    return Duplicates(members, table, unlike, unplaced, exact)


def _positions(store: Store, condition: str | None) -> tuple[NDArray[np.uint64], NDArray[Any], NDArray[Any]]:
    """Return row numbers, in their order, and positions (deg, NaN = none)."""
    parts = [
        (row_numbers(batch), *(batch.column(name).to_numpy(zero_copy_only=False).copy() for name in ("ra", "dec")))
        for batch in scan(store, ["ra", "dec"], condition)
    ]
    if not parts:
        return np.empty(0, np.uint64), np.empty(0), np.empty(0)
    rows, ra, dec = (np.concatenate(part) for part in zip(*parts, strict=True))
    order = np.argsort(rows)
    return rows[order], ra[order].astype(np.float64), dec[order].astype(np.float64)


# -------------------------------------------------------------------------------------------------------- position


def close_pairs(ra: ArrayLike, dec: ArrayLike, radius_arcsec: float) -> Pairs:
    """Return the pairs of positions that are close, shape (pair, 2): places in the input, each pair once.

    Parameters
    ----------
    ra, dec : array_like, shape (n,)
        ICRS, deg; NaN = no position.
    radius_arcsec : float
        Largest distance along a great circle.

    Raises
    ------
    BadRequest
        If there are more than `MAX_PAIRS`.
    """
    from scipy.spatial import cKDTree

    ra, dec = np.asarray(ra, np.float64), np.asarray(dec, np.float64)
    known = np.flatnonzero(np.isfinite(ra) & np.isfinite(dec))
    known = known[np.argsort(dec[known], kind="stable")]
    # A little wider than asked for, against rounding; the separations decide below.
    chord = 2 * math.sin(math.radians(radius_arcsec / 3600) / 2) * (1 + 1e-9) + 1e-14
    reach = radius_arcsec / 3600 * (1 + 1e-9) + 1e-12
    found = [np.empty((0, 2), np.int64)]
    count = 0
    for start in range(0, len(known), _ZONE):
        stop = min(start + _ZONE, len(known))
        end = int(np.searchsorted(dec[known], dec[known[stop - 1]] + reach, side="right"))
        zone = known[start:end]
        tree = cKDTree(unit_vectors(ra[zone], dec[zone]))
        count += (int(tree.count_neighbors(tree, chord)) - len(zone)) // 2
        if count > MAX_PAIRS:
            raise BadRequest(
                f"there are more than {MAX_PAIRS:,} pairs within {radius_arcsec:g} arcsec; give a smaller --radius, or "
                "fewer sources with --where (are positions filled in with a constant?)"
            )
        near = tree.query_pairs(chord, output_type="ndarray")
        found.append(zone[near[near[:, 0] < stop - start]])
    pairs = np.concatenate(found)
    first, second = pairs.T
    return np.asarray(pairs[separation_arcsec(ra[first], dec[first], ra[second], dec[second]) <= radius_arcsec])


def _likeness(store: Store, rows: NDArray[np.uint64], pairs: Pairs, tell: Show) -> NDArray[np.float32]:
    """Return the cosine of each pair."""
    likeness = np.empty(len(pairs), np.float32)
    for start in range(0, len(pairs), _PART):
        part = pairs[start : start + _PART]
        places, which = np.unique(part, return_inverse=True)
        vectors = matrix(take(store, rows[places], ["vector"]).column("vector"))
        first, second = which.reshape(part.shape).T
        likeness[start : start + len(part)] = np.einsum("ij,ij->i", vectors[first], vectors[second])
        tell("pairs", start + len(part), len(pairs))
    return likeness


# -------------------------------------------------------------------------------------------------- likeness alone


class _Vectors:
    """Vectors by place: held if they are few enough, else read when asked for."""

    def __init__(self, store: Store, rows: NDArray[np.uint64], condition: str | None):
        self._store, self._rows = store, rows
        self._held: Vectors | None = None
        if len(rows) * store.dim * 4 <= _HELD_BYTES:
            self._held = np.empty((len(rows), store.dim), np.float32)
            for batch in scan(store, ["vector"], condition):
                self._held[np.searchsorted(rows, row_numbers(batch))] = matrix(batch.column("vector"))

    def __call__(self, places: NDArray[np.int64]) -> Vectors:
        if self._held is not None:
            return self._held[places]
        return matrix(take(self._store, self._rows[places], ["vector"]).column("vector"))


def _alike(
    store: Store, rows: NDArray[np.uint64], condition: str | None, similarity: float, seed: int, tell: Show
) -> tuple[Pairs, NDArray[np.float32], bool]:
    """Return the pairs at least so similar, their cosines, and whether each was compared with each."""
    vectors = _Vectors(store, rows, condition)
    bits, sets = _plan(len(rows), similarity)
    found, likeness = np.empty(0, np.int64), np.empty(0, np.float32)
    rng = np.random.default_rng(seed)
    at_once = max(1, _CODE_BYTES // (4 * max(len(rows), 1)))
    done = 0
    while done < sets:
        for codes in _codes(store, rows, condition, bits, min(at_once, sets - done), rng):
            parts = [(found, likeness)]
            count = len(found)
            for pairs, cosines in _within(codes, vectors, similarity):
                parts.append((pairs.min(axis=1) * len(rows) + pairs.max(axis=1), cosines))
                count += len(pairs)
                if count > 2 * MAX_PAIRS:
                    break
            found, first = np.unique(np.concatenate([keys for keys, _ in parts]), return_index=True)
            likeness = np.concatenate([cosines for _, cosines in parts])[first]
            if len(found) > MAX_PAIRS:
                raise BadRequest(
                    f"there are more than {MAX_PAIRS:,} pairs of similarity {similarity:g}; give a higher "
                    "--similarity, or leave out what all looks the same (--where \"flags = ''\")"
                )
            done += 1
            tell("sets of planes", done, sets)
    return np.stack(np.divmod(found, max(len(rows), 1)), axis=1), likeness, bits == 0


def _plan(count: int, similarity: float) -> tuple[int, int]:
    """Return how many planes in a set and how many sets cost least; no plane: each is compared with each."""
    if count <= EXACT_BELOW:
        return 0, 1
    same_side = 1 - math.acos(min(similarity, 1 - _ROUNDING)) / math.pi
    options = [(0, 1)]
    for bits in range(1, 25):
        options.append((bits, math.ceil(math.log(MISSED) / math.log1p(-(same_side**bits)))))
    # Comparing with a bucket, and what it costs besides to sort a source into it.
    return min(options, key=lambda option: option[1] * (count / 2 ** option[0] + 256))


def _codes(
    store: Store, rows: NDArray[np.uint64], condition: str | None, bits: int, sets: int, rng: np.random.Generator
) -> NDArray[np.uint32]:
    """Return the sides of each source, a bit for each plane, shape (set, source)."""
    codes = np.zeros((sets, len(rows)), np.uint32)
    if not bits:
        return codes
    planes = rng.normal(size=(store.dim, sets * bits)).astype(np.float32)
    weights = 2 ** np.arange(bits, dtype=np.uint32)
    for batch in scan(store, ["vector"], condition):
        sides = (matrix(batch.column("vector")) @ planes > 0).reshape(-1, sets, bits)
        codes[:, np.searchsorted(rows, row_numbers(batch))] = (sides @ weights).T
    return codes


def _within(codes: NDArray[np.uint32], vectors: _Vectors, similarity: float) -> Iterator[tuple[Pairs, Vectors]]:
    """Yield pairs of sources with the same code that are similar, and their cosines."""
    order = np.argsort(codes, kind="stable")
    edges = np.concatenate([[0], np.flatnonzero(np.diff(codes[order])) + 1, [len(order)]])
    at = 0
    while at < len(edges) - 1:
        last = max(at + 1, int(np.searchsorted(edges, edges[at] + _PART, side="right")) - 1)
        places = order[edges[at] : edges[last]]
        if len(places) > _PART:  # one large bucket
            parts = [places[start : start + _PART] for start in range(0, len(places), _PART)]
            for number, part in enumerate(parts):
                mine = vectors(part)
                for other in parts[number:]:
                    for first, second, cosines in _cross(mine, mine if other is part else vectors(other), similarity):
                        yield np.stack([part[first], other[second]], axis=1), cosines
        else:
            mine = vectors(places)
            for start, end in zip(edges[at:last] - edges[at], edges[at + 1 : last + 1] - edges[at], strict=True):
                if end - start > 1:
                    bucket = mine[start:end]
                    for first, second, cosines in _cross(bucket, bucket, similarity):
                        yield np.stack([places[start + first], places[start + second]], axis=1), cosines
        at = last


def _cross(mine: Vectors, other: Vectors, similarity: float) -> Iterator[tuple[Any, Any, Vectors]]:
    """Yield places in two sets of vectors that are similar, and the cosines; if both are one set, each pair once."""
    for row in range(0, len(mine), _BLOCK):
        for column in range(row if mine is other else 0, len(other), _BLOCK):
            cosines = mine[row : row + _BLOCK] @ other[column : column + _BLOCK].T
            first, second = np.nonzero(cosines >= similarity - _ROUNDING)
            if mine is other and row == column:
                first, second = first[first < second], second[first < second]
            if len(first):
                yield row + first, column + second, cosines[first, second]


# ---------------------------------------------------------------------------------------------------------- groups


def _tables(
    store: Store,
    rows: NDArray[np.uint64],
    pairs: Pairs,
    separation: NDArray[np.float64],
    likeness: NDArray[np.float32],
    prefer: Sequence[str],
    tell: Show,
) -> tuple[Table, Table]:
    """Return the members of the groups, and the pairs."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    places, which = np.unique(pairs, return_inverse=True)
    which = which.reshape(pairs.shape)
    graph = coo_array((np.ones(len(which), bool), which.T), shape=(len(places), len(places))).tocsr()
    groups = connected_components(graph, directed=False)[1]
    found = take(store, rows[places], _MEMBER_COLUMNS)
    best = _best_first(found, groups, prefer)
    kept = _kept(best, graph + graph.T)
    keep = kept == np.arange(len(places))
    members = Table(arrow_columns(found), copy=False)
    members.add_columns([groups + 1, keep], names=["group", "keep"], indexes=[0, 0])
    keys = np.char.add(np.char.add(members["survey"].astype(str), ":"), members["source_id"].astype(str))
    members["duplicate_of"] = Column(np.where(keep, "", keys[kept]), dtype=str)
    ra, dec = (np.ma.filled(np.ma.asarray(members[name]).astype(np.float64), np.nan) for name in ("ra", "dec"))
    members["separation"] = MaskedColumn(
        separation_arcsec(ra, dec, ra[kept], dec[kept]), mask=keep, unit=u.arcsec, description="from duplicate_of"
    )
    members["similarity"] = MaskedColumn(
        _likeness(store, rows, np.stack([places, places[kept]], axis=1), tell),
        mask=keep,
        description="cosine, with duplicate_of",
    )
    table = Table({"group": (groups[which[:, 0]] + 1).astype(np.int32)})
    for number in (0, 1):
        for name in ("survey", "source_id"):
            table[f"{name}_{number + 1}"] = members[name][which[:, number]]
    table["separation"] = Column(separation, unit=u.arcsec)
    table["similarity"] = likeness
    return members[best], table


def _kept(best: NDArray[np.intp], graph: Any) -> NDArray[np.intp]:
    """Return for each source the kept one that it is paired with; itself if it is kept.

    Going from the best to the worst, a source is kept unless it is paired with one that is.
    """
    kept = np.full(len(best), -1, np.intp)
    for source in best.tolist():
        if kept[source] < 0:
            kept[source] = source
            pairs = graph.indices[graph.indptr[source] : graph.indptr[source + 1]]
            kept[pairs[kept[pairs] < 0]] = source
    return kept


def _best_first(found: pa.Table, groups: NDArray[Any], prefer: Sequence[str]) -> NDArray[np.intp]:
    """Return the order by group and, within one, by which to keep."""
    rank = {survey: number for number, survey in enumerate(prefer)}
    surveys = np.array(found.column("survey").to_pylist(), str)
    ids = np.array(found.column("source_id").to_pylist(), str)
    preferred = np.array([rank.get(survey, len(rank)) for survey in surveys], np.int64)
    flags = np.array([len(words.split()) for words in found.column("flags").to_pylist()], np.int64)
    coverage = found.column("coverage").to_numpy()
    return np.lexsort((ids, surveys, -coverage, flags, preferred, groups))
