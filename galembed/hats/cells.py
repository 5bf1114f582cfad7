"""Which HEALPix cells a catalogue is cut into, from counts along the sky.

Positions are order-29 nested indices, the `_healpix_29` column: a cell of any order is one range of them, and cells
side by side in that order are side by side on the sky.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from galembed.errors import BadRequest

_ORDER: Final = 29
_FIRST: Final = 8  # 786,432 bins, 14 arcmin wide
_STEP: Final = 4  # orders between two counts of what is still too full

_Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Cell:
    """A HEALPix cell: `pixel` of `order`, nested, with `rows` rows."""

    order: int
    pixel: int
    rows: int

    @property
    def end(self) -> int:
        """First order-29 index after the cell."""
        return (self.pixel + 1) << _shift(self.order)

    @property
    def path(self) -> str:
        """Where its file lies below `dataset/`."""
        return f"Norder={self.order}/Dir={self.pixel // 10_000 * 10_000}/Npix={self.pixel}.parquet"


def count_bins(indices: Callable[[], Iterable[_Indices]], limit: int) -> tuple[_Indices, _Indices]:
    """Count rows along the sky in bins that hold at most `limit` rows each, or are one point of order 29.

    What is fuller than that is counted again in bins 4 orders finer: memory goes with the bins, not the rows.

    Parameters
    ----------
    indices : callable
        Called once for each count; yields the order-29 indices of all rows, in batches of any order.
    limit : int

    Returns
    -------
    starts, counts : ndarray, shape (n,), int64
        First order-29 index of each bin that is not empty, ascending, and its rows.
    """
    order, finer = 0, _FIRST
    parents = np.arange(12, dtype=np.int64)
    found: list[tuple[_Indices, _Indices]] = []
    while len(parents):
        counts = _count(indices(), parents, order, finer).ravel()
        bins = _children(parents, finer - order)
        full = (counts > limit) & (finer < _ORDER)
        done = (counts > 0) & ~full
        found.append((bins[done] << _shift(finer), counts[done]))
        parents, order, finer = bins[full], finer, min(finer + _STEP, _ORDER)
    starts, counts = (np.concatenate(parts) for parts in zip(*found, strict=True))
    along = np.argsort(starts)
    return starts[along], counts[along]


def cut_cells(starts: _Indices, counts: _Indices, limit: int) -> list[Cell]:
    """Return the largest cells that hold at most `limit` rows, in the order of the sky; none is empty.

    Parameters
    ----------
    starts, counts : ndarray, shape (n,), int64
        What `count_bins` returned for the same limit, or a lower one.
    limit : int

    Raises
    ------
    BadRequest
        If more rows than that lie at one point, where no cell can be cut.
    """
    until = np.concatenate([[0], np.cumsum(counts)])
    cells: list[Cell] = []
    pixels = np.arange(12, dtype=np.int64)
    for order in range(_ORDER + 1):
        low, high = (np.searchsorted(starts, (pixels + more) << _shift(order)) for more in (0, 1))
        rows = until[high] - until[low]
        fit = (rows > 0) & (rows <= limit)
        cells += [
            Cell(order, pixel, count) for pixel, count in zip(pixels[fit].tolist(), rows[fit].tolist(), strict=True)
        ]
        full = rows > limit
        if order == _ORDER and full.any():
            raise BadRequest(
                f"{int(rows.max()):,} rows lie at one point of the sky, more than the {limit:,} that a cell may have; "
                "ask for more rows per cell (--rows-per-pixel)"
            )
        pixels = _children(pixels[full], 1)
    return sorted(cells, key=lambda cell: cell.end)


def runs_of(starts: _Indices, counts: _Indices, limit: int) -> Iterator[tuple[int, int, int]]:
    """Yield (first index, end, rows) of stretches of the sky that hold at most `limit` rows where bins allow it."""
    until = np.concatenate([[0], np.cumsum(counts)])
    edges = np.append(starts, 12 << _shift(0))
    first = 0
    while first < len(starts):
        end = max(int(np.searchsorted(until, until[first] + limit, side="right")) - 1, first + 1)
        yield int(edges[first]), int(edges[end]), int(until[end] - until[first])
        first = end


def _count(batches: Iterable[_Indices], parents: _Indices, order: int, finer: int) -> _Indices:
    """Return rows in each bin of order `finer` within `parents` (ascending, of `order`), shape (parent, bin)."""
    depth = 2 * (finer - order)
    counts = np.zeros((len(parents), 1 << depth), dtype=np.int64)
    for indices in batches:
        bins = indices >> _shift(finer)
        row = np.minimum(np.searchsorted(parents, bins >> depth), len(parents) - 1)
        inside = parents[row] == bins >> depth
        np.add.at(counts, (row[inside], bins[inside] & ((1 << depth) - 1)), 1)
    return counts


def _children(pixels: _Indices, orders: int) -> _Indices:
    count = 1 << (2 * orders)
    return np.asarray((pixels[:, None] * count + np.arange(count)).ravel(), dtype=np.int64)


def _shift(order: int) -> int:
    """Return the bits by which an index of `order` is shorter than one of order 29."""
    return 2 * (_ORDER - order)
