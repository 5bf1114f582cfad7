"""An open tile: planes decompressed once or by section, cut on any grid, other tiles filling in over its edge."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from astropy.wcs import WCS
from numpy.typing import NDArray

from galembed.cutouts import resample, resample_at
from galembed.errors import MissingWCS, UnreadableInput
from galembed.mappings import ROLES
from galembed.planes import Box, OpenFiles, Pixels, Plane, require_bands
from galembed.sources.layouts import TileFiles, read_planes
from galembed.surveys import Layout

_SAME_GRID_PIXELS: Final = 0.01
_STRAIGHT_PIXELS: Final = 0.05
"""A grid turned, sheared or stretched against another by less than this over a cutout is taken as only shifted."""


@dataclass(frozen=True)
class View:
    """The grid of a cutout: a square in the pixels of a reference plane.

    Attributes
    ----------
    wcs : WCS or None
        Of the reference plane.
    x, y : float
        Centre, 0-based pixels.
    side : float
        Reference pixels.
    size : int
        Output pixels on a side.
    """

    wcs: WCS | None
    x: float
    y: float
    side: float
    size: int

    @property
    def step(self) -> float:
        """Reference pixels per output pixel."""
        return self.side / self.size

    def outside(self, shape: tuple[int, int]) -> NDArray[np.bool_]:
        """Return which output pixels, (y, x), have their centre off a reference plane of (y, x) `shape`."""
        steps = (np.arange(self.size) - (self.size - 1) / 2) * self.step
        off = [
            (at + steps < -0.5) | (at + steps > length - 0.5) for at, length in ((self.y, shape[0]), (self.x, shape[1]))
        ]
        return np.asarray(off[0][:, None] | off[1][None, :])

    def crosses(self, shape: tuple[int, int]) -> bool:
        """Tell whether any output pixel lies off a reference plane."""
        reach = self.side / 2 - self.step / 2
        return bool(
            min(self.x, self.y) - reach < -0.5 or self.x + reach > shape[1] - 0.5 or self.y + reach > shape[0] - 0.5
        )


@dataclass
class _Grid:
    """Planes that share shape and WCS, and their flux once it is decompressed."""

    planes: list[Plane]
    whole: NDArray[np.float32] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.planes[0].shape

    @property
    def wcs(self) -> WCS | None:
        return self.planes[0].wcs


class OpenTile:
    """One tile, its files open.

    Parameters
    ----------
    files : TileFiles
    layout : Layout
    bands : sequence of str
        Bands to read, once each; all of them without.

    Attributes
    ----------
    uri : str
    bands : tuple of str
    read_seconds : float
        Spent on opening, reading and decompressing so far.
    """

    def __init__(self, files: TileFiles, layout: Layout, bands: Sequence[str] | None) -> None:
        started = time.perf_counter()
        self.uri = files.uri
        self._files = OpenFiles(files.uri, files.files)
        self._stars: NDArray[np.bool_] | None = None
        self._grids: list[_Grid] = []
        try:
            planes = read_planes(layout, self._files, bands and tuple(dict.fromkeys(bands)))
            if bands is not None:
                require_bands(list(planes) or files.bands, bands, files.uri)
            self.bands = tuple(dict.fromkeys(bands)) if bands is not None else tuple(planes)
            self._grids = _by_grid([planes[band] for band in self.bands])
        except BaseException:
            self.close()
            raise
        self.read_seconds = time.perf_counter() - started

    @property
    def reference(self) -> Plane:
        """The plane whose pixels positions are in: the largest of the first band's."""
        first = [p for grid in self._grids for p in grid.planes if p.band == self.bands[0]]
        return max(first, key=lambda plane: plane.shape[0] * plane.shape[1])

    @property
    def frame(self) -> tuple[float, float, float, float]:
        """The box around all pieces of the first band: x and y of its centre, width and height, reference pixels.

        A file may hold a band in pieces of neighbouring tiles; its middle is that of all of them together.
        """
        reference = self.reference
        edges = []
        for grid in self._grids:
            if any(plane.band == self.bands[0] for plane in grid.planes):
                height, width = grid.shape
                x, y = (width - 1) / 2, (height - 1) / 2
                # Middles of the sides, since corners of a piece that is turned stick out.
                points = np.array([(-0.5, y), (width - 0.5, y), (x, -0.5), (x, height - 0.5)])
                if grid.wcs is not None and reference.wcs is not None and grid.wcs is not reference.wcs:
                    points = reference.wcs.all_world2pix(grid.wcs.all_pix2world(points, 0), 0, quiet=True)
                edges.append(points)
        low, high = np.nanmin(np.concatenate(edges), axis=0), np.nanmax(np.concatenate(edges), axis=0)
        (x, y), (width, height) = (low + high) / 2, high - low
        return float(x), float(y), float(width), float(height)

    def close(self) -> None:
        """Close the files and forget the pixels."""
        self._files.close()
        self._grids = []

    def decompress(self) -> None:
        """Read compressed planes whole, so that each is decompressed once; sections of others cost little."""
        masks: dict[int, Pixels] = {}
        for grid in self._grids:
            if grid.whole is None and any(plane.image.compressed for plane in grid.planes):
                grid.whole = self._read(grid, None)
                masks |= {id(plane.mask.hdu): plane.mask for plane in grid.planes if plane.mask is not None}
        if masks and self.reference.mask is not None:
            self._stars = (self.reference.bits() & self.reference.star_bits) != 0
        for mask in masks.values():
            mask.forget()

    def release(self) -> None:
        """Forget decompressed planes; the files stay open."""
        for grid in self._grids:
            grid.whole = None
        self._stars = None

    def cut(self, view: View) -> NDArray[np.float32]:
        """Return flux, (band, size, size), nJy per (0.262 arcsec)^2, bands as in `bands`; NaN where there is none.

        Raises
        ------
        UnreadableInput
            If a file is damaged.
        MissingWCS
            If the view is in another tile's pixels and there is no WCS to carry it over.
        """
        if len(self._grids) == 1:
            return self._cut_grid(self._grids[0], view)
        flux = np.full((len(self.bands), view.size, view.size), np.nan, np.float32)
        for grid in self._grids:
            cut = self._cut_grid(grid, view)
            for plane, values in zip(grid.planes, cut, strict=True):
                target = flux[self.bands.index(plane.band)]
                np.copyto(target, values, where=np.isnan(target))
        return flux

    def _cut_grid(self, grid: _Grid, view: View) -> NDArray[np.float32]:
        if view.wcs is grid.wcs and (view.wcs is not None or grid.shape == self.reference.shape):
            center, scale, bent, corners = (view.x, view.y), 1.0, 0.0, [view.side / 2 + max(view.step, 1.0) * 2 + 1] * 2
        else:
            center, matrix = _placed(view, grid)
            scale = float(np.sqrt(abs(np.linalg.det(matrix))))
            bent = float(np.abs(matrix - scale * np.eye(2)).max()) * view.side
            corners = (np.abs(matrix).sum(axis=1) * view.side / 2 + max(scale * view.step, 1.0) * 2 + 1).tolist()
        height, width = grid.shape
        x0, x1 = _clipped(center[0], corners[0], width)
        y0, y1 = _clipped(center[1], corners[1], height)
        if x1 <= x0 or y1 <= y0:
            return np.full((len(grid.planes), view.size, view.size), np.nan, np.float32)
        if grid.whole is not None:
            values = grid.whole[:, y0:y1, x0:x1]
        else:
            values = self._read(grid, (slice(y0, y1), slice(x0, x1)))
        x, y = center[0] - x0, center[1] - y0
        if bent < _STRAIGHT_PIXELS:
            return resample(values, center=(x, y), side=view.side * scale, size=view.size)
        steps = (np.arange(view.size) - (view.size - 1) / 2) * view.step
        along_x, along_y = np.meshgrid(steps, steps)
        at_x = x + matrix[0, 0] * along_x + matrix[0, 1] * along_y
        at_y = y + matrix[1, 0] * along_x + matrix[1, 1] * along_y
        return resample_at(values, at_x, at_y, step=view.step * scale)

    def _read(self, grid: _Grid, box: Box | None) -> NDArray[np.float32]:
        started = time.perf_counter()
        first = grid.planes[0].read(box)
        stack = np.empty((len(grid.planes), *first.shape), np.float32)
        stack[0] = first
        for number, plane in enumerate(grid.planes[1:], start=1):
            stack[number] = plane.read(box)
        self.read_seconds += time.perf_counter() - started
        return stack

    def values_at(self, kind: str, band: str, places: NDArray[np.float64], *, whole: bool) -> NDArray[np.float32]:
        """Return a map's values at pixels (x, y) of the reference plane; NaN where it has none.

        A map that is absent, damaged or of another shape has none anywhere: it says something of a source, and is no
        part of it.
        """
        started = time.perf_counter()
        values = np.full(len(places), np.nan, np.float32)
        try:
            pixels = self._files.image(kind, band) if (kind, band) in self._files.files else None
            if pixels is None or pixels.shape != self.reference.shape:
                return values
            height, width = pixels.shape
            x, y = np.rint(np.nan_to_num(places, nan=-1)).astype(int).T
            on = np.flatnonzero((x >= 0) & (x < width) & (y >= 0) & (y < height))
            if whole:
                values[on] = pixels.read()[y[on], x[on]]
            for at in () if whole else on:
                values[at] = pixels.read((slice(y[at], y[at] + 1), slice(x[at], x[at] + 1)))[0, 0]
        except UnreadableInput:
            return values
        finally:
            self.read_seconds += time.perf_counter() - started
        return values

    def star_share(self, view: View) -> float:
        """Return the fraction of a view's pixels on this tile under a bright star's light; 0 without such a mask."""
        plane = self.reference
        if plane.mask is None or not plane.star_bits:
            return 0.0
        height, width = plane.shape
        x0, x1 = _clipped(view.x, view.side / 2, width)
        y0, y1 = _clipped(view.y, view.side / 2, height)
        if x1 <= x0 or y1 <= y0:
            return 0.0
        box = (slice(y0, y1), slice(x0, x1))
        stars = self._stars[box] if self._stars is not None else (plane.bits(box) & plane.star_bits) != 0
        return float(stars.mean())


def _clipped(center: float, reach: float, length: int) -> tuple[int, int]:
    if not math.isfinite(center):
        return 0, 0
    return max(0, math.floor(center - reach)), min(length, math.ceil(center + reach) + 1)


def _by_grid(bands: Sequence[tuple[Plane, ...]]) -> list[_Grid]:
    """Group planes by shape and WCS; a second piece of a band is a grid of its own."""
    grids: list[_Grid] = []
    for pieces in bands:
        for piece in pieces:
            fitting = (
                grid
                for grid in grids
                if piece.band not in {plane.band for plane in grid.planes} and _same_grid(grid.planes[0], piece)
            )
            grid = next(fitting, None)
            if grid is None:
                grids.append(_Grid([piece]))
            else:
                grid.planes.append(piece)
    return grids


def _same_grid(one: Plane, other: Plane) -> bool:
    if one.shape != other.shape or (one.wcs is None) != (other.wcs is None):
        return False
    if one.wcs is None or other.wcs is None:
        return True
    height, width = one.shape
    corners = np.array([(0, 0), (width - 1, 0), (0, height - 1), (width - 1, height - 1), (width / 2, height / 2)])
    there = other.wcs.all_world2pix(one.wcs.all_pix2world(corners, 0), 0, quiet=True)
    return bool(np.abs(there - corners).max() < _SAME_GRID_PIXELS)


def _placed(view: View, grid: _Grid) -> tuple[tuple[float, float], NDArray[np.float64]]:
    """Return a view's centre in a grid's pixels, and the matrix from view pixels to those.

    Over a cutout the map between two sky projections is affine to far below a pixel.
    """
    if view.wcs is None or grid.wcs is None:
        raise MissingWCS(f"{grid.planes[0].image.where}: bands on different grids need a sky WCS to be aligned")
    half = view.side / 2
    points = np.array(
        [(view.x, view.y)] + [(view.x + dx, view.y + dy) for dx, dy in ((half, 0), (-half, 0), (0, half), (0, -half))]
    )
    there = grid.wcs.all_world2pix(view.wcs.all_pix2world(points, 0), 0, quiet=True)
    if not np.isfinite(there).all():
        return (-np.inf, -np.inf), np.eye(2)
    matrix = np.stack([(there[1] - there[2]) / view.side, (there[3] - there[4]) / view.side], axis=1)
    return (float(there[0, 0]), float(there[0, 1])), matrix


def ordered(flux: NDArray[np.float32], bands: Sequence[str], roles: Mapping[str, str]) -> NDArray[np.float32]:
    """Return flux with its planes in the order of `galembed.mappings.ROLES`; one band may play several roles."""
    at = [bands.index(roles[role]) for role in ROLES]
    return flux if at == list(range(len(bands))) else flux[at]
