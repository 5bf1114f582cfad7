"""Regions of the sky as filters of a store: polygons of any shape, and MOCs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import astropy.units as u
import numpy as np
from astropy.coordinates import SkyCoord
from astropy_healpix import HEALPix
from numpy.typing import NDArray

from galembed.errors import ArtifactNotFound, BadRequest, UnreadableInput
from galembed.sky import HEALPIX_ORDER, cell_reach, unit_vectors

MAX_CORNERS: Final = 1000
"""Corners of a polygon: a filter compares every row near its edges with each of them."""

MAX_CELLS: Final = 200_000
"""Cells of a MOC, which all stand in the filter."""

_RANGES: Final = 96
_CELLS: Final = 96
_FINEST: Final = 18
_RA: Final = "((ra + 360) % 360)"
_OVER_POLE_DEG: Final = 1e-9
_MOC_FORMATS: Final = {".fits": "fits", ".fit": "fits", ".json": "json"}


def region_filter(region: Any) -> str:
    """Return the filter that keeps exactly the rows within a region of the sky.

    Parameters
    ----------
    region : array_like of shape (n, 2), SkyCoord, mocpy.MOC, str or Path
        The corners of a polygon, ICRS deg, in either direction; or a MOC, or the path of one (FITS, JSON, else
        ASCII). See `Polygon` for what lies inside of corners. The edge of a polygon belongs to no side in particular.

    Returns
    -------
    str
        Ranges of `_healpix_29`, which a BTREE index answers, and what is exact. Rows without a position fail.

    Raises
    ------
    BadRequest
        If it is no region, or one of more corners or cells than a filter can hold.
    ArtifactNotFound, UnreadableInput
        If a MOC's file is not there, or is none.
    """
    if isinstance(region, str | Path):
        return _moc_filter(_read_moc(Path(region).expanduser()))
    if hasattr(region, "to_depth29_ranges"):
        return _moc_filter(region)
    return Polygon.of(region).condition()


def region_text(region: Any) -> str:
    """Return a region in a line: a path, the corners of a polygon, or what a MOC covers."""
    if isinstance(region, str | Path):
        return str(region)
    if hasattr(region, "to_depth29_ranges"):
        return f"MOC of order {region.max_order}, {region.sky_fraction:.3g} of the sky"
    corners = _corners(region)
    text = " ".join(f"{value:.9g}" for value in corners[:4].ravel())
    return text if len(corners) <= 4 else f"{text} ... ({len(corners)} corners)"


# ---------------------------------------------------------------------------------------------------- polygons


@dataclass(frozen=True)
class Polygon:
    """A polygon on the sky: great-circle edges, convex or not, anywhere.

    Its edges must not cross. Inside is the smaller of the two sides, whatever the direction of the corners; what is
    more than half of the sky wants a MOC.

    A point is inside if its meridian crosses the edges an odd number of times on the way to the north pole. On an
    edge from (a1, d1) to (a2, d2), tan(dec) = (tan d1 sin(a2 - ra) + tan d2 sin(ra - a1)) / sin(a2 - a1). A corner at
    a pole, and an edge over one, stand for a path along the pole's line in the plane of ra and dec.

    Attributes
    ----------
    corners : ndarray, shape (n, 2)
        ICRS deg, ra in [0, 360); n >= 3.
    west, east : ndarray, shape (m,)
        Range of right ascension of each edge, deg, west <= ra < east, over 0 where west > east. Edges along a
        meridian, which no meridian crosses, are left out.
    tangents : ndarray, shape (m, 2)
        tan(dec) at west and at east, each divided by sin(east - west); inf for the line of the north pole.
    turned : bool
        Whether the points with an odd number of crossings are those outside.
    """

    corners: NDArray[np.float64]
    west: NDArray[np.float64]
    east: NDArray[np.float64]
    tangents: NDArray[np.float64]
    turned: bool

    @classmethod
    def of(cls, corners: Any) -> Polygon:
        """Return the polygon with these corners.

        Parameters
        ----------
        corners : array_like of shape (n, 2), or SkyCoord
            ICRS deg. The first may be repeated at the end.

        Raises
        ------
        BadRequest
            If there are fewer than 3 or more than `MAX_CORNERS` different ones, one is not on the sky, two in
            succession are opposite points of the sky, or edges cross.
        """
        kept = _corners(corners)
        kept = kept[np.any(kept != np.roll(kept, 1, axis=0), axis=1)]
        if not 3 <= len(kept) <= MAX_CORNERS:
            raise BadRequest(
                f"a polygon has 3 to {MAX_CORNERS} different corners, got {len(kept)}; give a MOC for a finer outline"
            )
        points = unit_vectors(kept[:, 0], kept[:, 1])
        following = np.roll(points, -1, axis=0)
        opposite = np.flatnonzero(np.linalg.norm(points + following, axis=1) < 1e-9)
        if len(opposite):
            raise BadRequest(f"corners {opposite[0] + 1} and {opposite[0] + 2} of the polygon are opposite points")
        crossing = _crossing_edges(points, following)
        if crossing is not None:
            raise BadRequest(
                f"edges {crossing[0] + 1} and {crossing[1] + 1} of the polygon cross; give the corners in the order of "
                "its outline, or a MOC"
            )
        path = _path(kept)
        ra1, dec1, ra2, dec2 = *path.T, *np.roll(path, -1, axis=0).T
        turn = (ra2 - ra1 + 180) % 360 - 180
        # The area south of the path: that of the points whose meridian crosses it northward.
        half = np.radians(turn) / 2
        excess = 2 * np.arctan2(np.tan(half) * np.sin(np.radians(dec1 + dec2) / 2), np.cos(np.radians(dec1 - dec2) / 2))
        turned = abs(float(np.sum(2 * half + excess))) > 2 * np.pi
        eastward = turn > 0
        used = (turn != 0) & ~((dec1 == -90) & (dec2 == -90))
        sine = np.sin(np.radians(np.abs(turn[used])))
        ends = np.where(eastward, [ra1, ra2, dec1, dec2], [ra2, ra1, dec2, dec1])[:, used]
        tangents = np.tan(np.radians(ends[2:])) / np.where(sine == 0, 1, sine)
        tangents[:, np.all(ends[2:] == 90, axis=0)] = np.inf
        return cls(kept, ends[0], ends[1], tangents.T, turned)

    def contains(self, ra: NDArray[np.float64], dec: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Tell which points lie inside.

        Parameters
        ----------
        ra, dec : ndarray, shape (n,)
            ICRS deg, finite.

        Returns
        -------
        ndarray, shape (n,), bool
        """
        ra = (ra + 360) % 360
        inside = np.full(len(ra), self.turned)
        height = np.tan(np.radians(dec))
        for west, east, (first, last) in zip(self.west, self.east, self.tangents, strict=True):
            within = (ra >= west) & (ra < east) if west < east else (ra >= west) | (ra < east)
            if math.isfinite(first):
                edge = first * np.sin(np.radians(east - ra)) + last * np.sin(np.radians(ra - west))
                within &= height < edge
            inside ^= within
        return inside

    def condition(self) -> str:
        """Return the filter; see `region_filter`."""
        inner, rim, order = self._cells()
        ranges = ranges_filter(cell_ranges(np.union1d(inner, rim), order))
        if not len(rim):
            return ranges
        exact = self._exact()
        if len(inner):
            exact = f"({ranges_filter(cell_ranges(inner, order))} OR {exact})"
        return f"({ranges} AND {exact})"

    def _exact(self) -> str:
        odd = _balanced([self._crossing(edge) for edge in range(len(self.west))], "<>")
        return f"(NOT {odd})" if self.turned else odd

    def _crossing(self, edge: int) -> str:
        west, east = float(self.west[edge]), float(self.east[edge])
        first, last = self.tangents[edge].tolist()
        within = f"({_RA} >= {west!r} {'AND' if west < east else 'OR'} {_RA} < {east!r})"
        if math.isinf(first):
            return within
        line = f"({first!r}) * sin(radians({east!r} - ra)) + ({last!r}) * sin(radians(ra - {west!r}))"
        return f"({within} AND tan(radians(dec)) < {line})"

    def _cells(self) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        """Return the cells that lie inside, those that may hold an edge, and their order.

        From the 12 base cells down, cells outside are dropped and those at the edge divided, until they are a
        hundred or so.
        """
        points = unit_vectors(self.corners[:, 0], self.corners[:, 1])
        inner, rim, order = np.empty(0, np.int64), np.arange(12), 0
        while True:
            lon, lat = HEALPix(nside=2**order, order="nested").healpix_to_lonlat(rim)
            ra, dec = lon.to_value(u.deg), lat.to_value(u.deg)
            near = _distance_to_edges(unit_vectors(ra, dec), points) <= cell_reach(2**order)
            inside = ~near & self.contains(ra, dec)
            inner, rim = np.concatenate([inner, rim[inside]]), rim[near]
            if order == _FINEST or len(rim) > _CELLS or not len(rim):
                return np.sort(inner), rim, order
            inner, rim = ((4 * cells[:, None] + np.arange(4)).ravel() for cells in (inner, rim))
            order += 1


def _corners(region: Any) -> NDArray[np.float64]:
    """Return corners as an array of shape (n, 2), ra in [0, 360)."""
    what = "a region is a polygon's corners, shape (n, 2) in ICRS deg or a SkyCoord, a MOC, or a MOC's path"
    if isinstance(region, SkyCoord):
        if region.ndim != 1:
            raise BadRequest(f"{what}; got a SkyCoord of shape {region.shape}")
        corners = np.stack([region.icrs.ra.deg, region.icrs.dec.deg], axis=1)
    else:
        try:
            corners = np.array(region, np.float64)
        except (TypeError, ValueError):
            raise BadRequest(f"{what}; got {type(region).__name__}") from None
        if corners.ndim != 2 or corners.shape[1] != 2 or not len(corners):
            raise BadRequest(f"{what}; got shape {corners.shape}")
    if not (np.isfinite(corners).all() and (np.abs(corners[:, 1]) <= 90).all()):
        bad = corners[~(np.isfinite(corners).all(axis=1) & (np.abs(corners[:, 1]) <= 90))][0]
        raise BadRequest(f"a corner of the polygon is not on the sky: ra {bad[0]}, dec {bad[1]} deg")
    corners[:, 0] = corners[:, 0] % 360 % 360  # a tiny negative number gives 360 the first time
    corners[np.abs(corners[:, 1]) == 90, 0] = 0
    return np.asarray(corners, np.float64)


def _path(corners: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the outline in the plane of ra and dec, with the stretches along the lines of the poles; shape (m, 2)."""
    path: list[tuple[float, float]] = []
    count = len(corners)
    for number, (ra, dec) in enumerate(corners.tolist()):
        (before, _), (after, after_dec) = corners[number - 1].tolist(), corners[(number + 1) % count].tolist()
        if abs(dec) == 90:
            path += [(before, dec), (after, dec)]
            continue
        path.append((ra, dec))
        over = abs(after_dec) < 90 and 180 - abs((after - ra + 180) % 360 - 180) < _OVER_POLE_DEG
        if over:
            pole = math.copysign(90.0, dec + after_dec)
            path += [(ra, pole), (after, pole)]
    return np.array(path)


def _crossing_edges(start: NDArray[np.float64], end: NDArray[np.float64]) -> tuple[int, int] | None:
    """Return two edges that cross within, or None. Arcs AB and CD cross if ABC, BDA, CDA and DCB turn the same way."""
    normal = np.cross(start, end)
    abc, abd = normal @ start.T, normal @ end.T  # of edge AB (row) with C and D of edge CD (column)
    cda, cdb = abc.T, abd.T
    crossing = (abc * abd < 0) & (cda * cdb < 0) & (abc * cdb > 0)
    count = np.arange(len(start))
    apart = (count[:, None] - count) % len(start)
    found = np.argwhere(crossing & (apart > 1) & (apart < len(start) - 1))
    return (int(found[0, 0]), int(found[0, 1])) if len(found) else None


def _distance_to_edges(points: NDArray[np.float64], corners: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the distance of points, shape (n, 3), to the nearest edge of a polygon, deg."""
    nearest = np.full(len(points), np.inf)
    for start, end in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        normal = np.cross(start, end)
        normal /= np.linalg.norm(normal)
        beside = (points @ np.cross(normal, start) > 0) & (points @ np.cross(end, normal) > 0)
        across = np.abs(np.arcsin(np.clip(points @ normal, -1, 1)))
        ends = np.arccos(np.clip(np.maximum(points @ start, points @ end), -1, 1))
        nearest = np.minimum(nearest, np.where(beside, across, ends))
    return np.asarray(np.degrees(nearest))


# ---------------------------------------------------------------------------------------------------- MOCs


def _read_moc(path: Path) -> Any:
    from mocpy import MOC

    if not path.is_file():
        raise ArtifactNotFound(f"no MOC at {path}; a region is a polygon's corners, a MOC, or a MOC's path")
    kind = _MOC_FORMATS.get(path.suffix.lower(), "ascii")
    try:
        return MOC.load(path, format=kind)
    except Exception as error:  # mocpy raises whatever its Rust does
        raise UnreadableInput(
            f"{path} cannot be read as a MOC in {kind.upper()}: {' '.join(str(error).split())}"
        ) from error


def _moc_filter(moc: Any) -> str:
    """Return the filter of a MOC: its ranges, or where they are many, ranges that cover it and its cells, by order."""
    ranges = np.asarray(moc.to_depth29_ranges, np.int64)
    if not len(ranges):
        return "(_healpix_29 < 0)"
    if len(ranges) <= _RANGES:
        return ranges_filter(ranges.tolist())
    cells = np.asarray(moc.uniq_hpx, np.uint64)
    if len(cells) > MAX_CELLS:
        raise BadRequest(
            f"the MOC has {len(cells):,} cells, a filter takes {MAX_CELLS:,}; make it coarser (`MOC.degrade_to_order`)"
        )
    # order and pixel of 4 * 4**order + pixel; the logarithm is exact where it matters, since powers of 4 are.
    orders = (np.frexp(cells.astype(np.float64))[1] - 3) // 2
    lists = []
    for order in np.unique(orders).tolist():
        pixels = cells[orders == order] - np.uint64(4 ** (order + 1))
        column = "_healpix_29" if order == HEALPIX_ORDER else f"_healpix_29 / {4 ** (HEALPIX_ORDER - order)}"
        lists.append(f"{column} IN ({', '.join(map(str, pixels.tolist()))})")
    gaps = ranges[1:, 0] - ranges[:-1, 1]
    breaks = np.sort(np.argsort(gaps)[len(gaps) - (_RANGES - 1) :])
    cover = zip(ranges[[0, *(breaks + 1)], 0].tolist(), ranges[[*breaks, -1], 1].tolist(), strict=True)
    return f"({ranges_filter(list(cover))} AND ({' OR '.join(lists)}))"


# ---------------------------------------------------------------------------------------------------- ranges


def cell_ranges(cells: NDArray[np.int64], order: int) -> list[tuple[int, int]]:
    """Return the half-open ranges of order-29 nested cells that sorted cells of `order`, at least one, take."""
    breaks = np.flatnonzero(np.diff(cells) > 1) + 1
    shift = 4 ** (HEALPIX_ORDER - order)
    return [(int(run[0]) * shift, (int(run[-1]) + 1) * shift) for run in np.split(cells, breaks)]


def ranges_filter(ranges: Sequence[Sequence[int]]) -> str:
    """Return the filter that keeps rows whose `_healpix_29` is in one of some half-open ranges."""
    return _balanced([f"(_healpix_29 >= {first} AND _healpix_29 < {end})" for first, end in ranges], "OR")


def _balanced(parts: Sequence[str], word: str) -> str:
    """Join expressions in pairs of pairs: parsers go as deep as the tree is."""
    if len(parts) == 1:
        return parts[0]
    middle = len(parts) // 2
    return f"({_balanced(parts[:middle], word)} {word} {_balanced(parts[middle:], word)})"
