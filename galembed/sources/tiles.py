"""Survey tiles with a catalogue: sources are cut from the compressed tiles, no files in between."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Final

import numpy as np
import pyarrow as pa
from astropy.wcs import WCS
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from galembed.backbones import InputContract
from galembed.catalogues import read_catalogue
from galembed.cutouts import Cutout, require_coverage
from galembed.errors import BadRequest, GalembedError, MissingBand, MissingWCS, NoData, UnreadableInput
from galembed.files import FITS_ENDINGS, file_version, find_files, relative
from galembed.mappings import ROLES
from galembed.planes import OpenFiles, Plane
from galembed.quality import flags_of
from galembed.schemas import SOURCES
from galembed.sky import unit_vectors
from galembed.sources import Options, SourceList
from galembed.sources.folders import fields_of_view, reject, split_duplicates, split_unusable
from galembed.sources.layouts import Candidate, TileFiles, find_tiles, read_planes, tile_files
from galembed.sources.open_tiles import OpenTile, View, ordered
from galembed.surveys import PLACE_DEG, Layout, Survey, choose_bands, load_survey

WHOLE_TILE_SOURCES: Final = 80
"""From this many sources on, a compressed plane is cheaper decompressed whole than by section (measured on 100 x 100 px
RICE tiles, image and inverse variance: 3600 x 3600 planes 220 ms, sections of 162 px 2.0 ms and of 300 px 3.6 ms)."""

_STRIP_PIXELS: Final = 100

_OF_A_MAP: Final = {"doc": "from the survey's map, at the source"}
"""Metadata of a column that tiles' maps fill."""

MOST_TILES: Final = 4
"""Tiles that a cutout is assembled from, at most."""

_LARGEST_TILE_DEG: Final = 1.5
_REACH_RADII: Final = 14.0  # half as wide again as the built-in backbone's field: the margin that training adds
_REACH_ARCSEC: Final = (60.0, 600.0)

_recent: dict[int, dict[tuple[Any, ...], OpenTile]] = {}
"""Open tiles of each thread."""


@atexit.register
def close_tiles() -> None:
    """Close the tiles that stayed open."""
    for tiles in _recent.values():
        while tiles:
            tiles.popitem()[1].close()


@dataclass(frozen=True)
class TileReader:
    """Reads tiles; see `galembed.sources.open_source` for the attributes."""

    root: str
    catalogue: str
    survey: str
    layout: str
    bands: Mapping[str, str]
    min_coverage: float = 0.0
    fov: str = ""
    carry: tuple[str, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    crop: float = 1.0
    kind: str = "flux"
    evidence: str = ""

    @classmethod
    def open(cls, root: str, candidate: Candidate, present: Sequence[str], options: Options) -> TileReader:
        """Return a reader, after checking that some tile has every band.

        Raises
        ------
        MissingBand
            If a band is on none of the tiles (`present` are on some); the message names those that are.
        """
        return cls(
            root=root,
            catalogue=options.catalogue or "",
            survey=candidate.reference,
            layout=candidate.layout.name,
            bands=choose_bands(candidate.survey, options.bands, present),
            min_coverage=options.min_coverage,
            fov=options.fov,
            carry=options.carry,
            columns=options.columns,
            evidence=candidate.evidence,
        )

    @property
    def _record(self) -> Survey:
        return load_survey(self.survey)

    @property
    def _layout(self) -> Layout:
        return self._record.layout(self.layout)

    def sources(self) -> SourceList:
        """Return the catalogue's rows, each with the tile in which it lies farthest from the edge.

        Tiles that a cutout there may reach into are named with it, nearest first.
        """
        catalogue = read_catalogue(self.catalogue, columns=self.columns, carry=self.carry, need=("id", "ra", "dec"))
        count = len(catalogue)
        sizes = catalogue["size"] if "size" in catalogue.column_names else pa.nulls(count, pa.float64())
        fov = fields_of_view(self.fov, catalogue)
        table = pa.table(
            {
                "survey": pa.repeat(self._record.name, count),
                **{name: catalogue[name] for name in ("source_id", "ra", "dec")},
                "size": sizes,
                "fov": fov,
                "source_uri": pa.nulls(count, pa.string()),
                "source_version": pa.nulls(count, pa.string()),
                "neighbours": pa.nulls(count, pa.list_(pa.string())),
            },
            schema=SOURCES,
        )
        for column in catalogue.schema:
            if column.name not in (*table.column_names, "r90"):
                table = table.append_column(column, catalogue[column.name])
        tiles = find_tiles(find_files(self.root, FITS_ENDINGS), self._layout, self.root)
        for name, unit in self._maps(tiles.values()).items():
            if name not in table.column_names:
                maps = pa.field(name, pa.float32(), metadata={"unit": unit, **_OF_A_MAP})
                table = table.append_column(maps, pa.nulls(count, pa.float32()))
        table, twice = split_duplicates(table)
        table, unusable = split_unusable(table, fixed=bool(self.fov))
        assigned = assign(table, tiles, self._layout, self.bands.values())
        for name, values in (
            ("source_uri", assigned.uris),
            ("source_version", assigned.versions),
            ("neighbours", assigned.neighbours),
        ):
            table = table.set_column(table.column_names.index(name), SOURCES.field(name), values)
        rejected = pa.concat_tables([twice, unusable, self._unreadable(assigned.unreadable)])
        return SourceList(table, rejected, needs_size=True)

    def _maps(self, tiles: Iterable[TileFiles]) -> dict[str, str]:
        """Return the columns that maps of these tiles can fill, with their units."""
        there = {key for tile in tiles for key in tile.files}
        return {
            f"{kind}_{band}": unit
            for kind, unit in self._layout.carried.items()
            for band in dict.fromkeys(self.bands.values())
            if (kind, band) in there
        }

    def _unreadable(self, errors: Mapping[str, GalembedError]) -> pa.Table:
        """Return a row for each tile that has no known place: sources on it alone are on no tile."""
        rows = [
            dict.fromkeys(SOURCES.names)
            | {"survey": self._record.name, "source_id": f"{relative(uri, self.root)}#tile", "source_uri": uri}
            for uri in errors
        ]
        return pa.concat_tables(
            [
                reject(pa.Table.from_pylist([row], SOURCES), error.reason, [str(error)])
                for row, error in zip(rows, errors.values(), strict=True)
            ]
            or [reject(SOURCES.empty_table(), "", [])]
        )

    def cutouts(self, rows: pa.Table, contract: InputContract) -> Iterator[tuple[int, Cutout | GalembedError]]:
        """Yield (row number, cutout or the reason there is none) for each row, tile by tile."""
        table = rows.select(["source_id", "source_uri", "ra", "dec", "size", "fov", "neighbours"]).to_pylist()
        # A catalogue's own column of that name stays as it is.
        maps = [
            (kind, band)
            for kind in self._layout.carried
            for band in dict.fromkeys(self.bands.values())
            if (name := f"{kind}_{band}") in rows.column_names
            and _OF_A_MAP.items()
            <= {k.decode(): v.decode() for k, v in (rows.field(name).metadata or {}).items()}.items()
        ]
        by_tile: dict[str | None, list[int]] = {}
        for number, row in enumerate(table):
            by_tile.setdefault(row["source_uri"], []).append(number)
        for uri, numbers in by_tile.items():
            try:
                yield from self._cut_tile(uri, {number: table[number] for number in numbers}, contract, maps)
            except GalembedError as error:
                yield from ((number, error) for number in numbers)

    def _cut_tile(
        self,
        uri: str | None,
        rows: Mapping[int, Mapping[str, Any]],
        contract: InputContract,
        maps: Sequence[tuple[str, str]],
    ) -> Iterator[tuple[int, Cutout | GalembedError]]:
        """Yield the cutouts of one tile; what is raised before the first concerns them all."""
        if uri is None:
            for number, row in rows.items():
                yield number, NoData(f"source {row['source_id']} lies on none of the tiles in {self.root}")
            return
        tile, fresh = self._opened(uri)
        before = 0.0 if fresh else tile.read_seconds
        wcs = tile.reference.wcs
        if wcs is None:
            raise MissingWCS(f"{uri}: the header has no sky WCS, so no position can be found on this tile")
        whole = len(rows) >= WHOLE_TILE_SOURCES
        if whole:
            self._decompress(tile)
        places = wcs.all_world2pix([(row["ra"], row["dec"]) for row in rows.values()], 0, quiet=True)
        carried = {f"{kind}_{band}": tile.values_at(kind, band, places, whole=whole) for kind, band in maps}
        shared = tile.read_seconds - before  # charged to the first
        numbered = list(rows.items())
        # Strip by strip: a square's pixels are then mostly in the processor's cache, from the one before it.
        for at in np.lexsort((places[:, 0], places[:, 1] // _STRIP_PIXELS)).tolist():
            (number, row), (x, y) = numbered[at], places[at].tolist()
            try:
                cutout = self._cutout(tile, row, x, y, contract)
            except GalembedError as error:
                yield number, error
            else:
                if fresh or shared or carried:
                    cutout = replace(
                        cutout,
                        read_seconds=cutout.read_seconds + shared,
                        tiles_opened=cutout.tiles_opened + fresh,
                        carried={name: float(values[at]) for name, values in carried.items()},
                    )
                    fresh, shared = 0, 0.0
                yield number, cutout

    def _cutout(self, tile: OpenTile, row: Mapping[str, Any], x: float, y: float, contract: InputContract) -> Cutout:
        side = row["fov"] or contract.field_of_view.side_arcsec(row["size"])
        if side is None:
            raise BadRequest(
                f"source {row['source_id']} has no size, and the field of view follows it; name the catalogue's "
                "half-light radius with --column size=COLUMN, or fix the field with --fov ARCSEC"
            )
        reference = tile.reference
        if not (np.isfinite(x) and np.isfinite(y)):
            raise NoData(f"source {row['source_id']} lies outside the WCS of {tile.uri}")
        assert reference.pixel_arcsec is not None
        view = View(reference.wcs, x, y, side / reference.pixel_arcsec, contract.size)
        before = tile.read_seconds
        flux = tile.cut(view)
        seconds, opened, used, partial = tile.read_seconds - before, 0, [], False
        crosses = view.crosses(reference.shape)
        for uri in row["neighbours"] or ():
            if not np.isnan(flux).any():
                break
            try:
                other, fresh = self._opened(uri, keep=tile)
            except MissingBand:
                continue  # a tile at the edge of one band's survey; a damaged one fails the source
            before = 0.0 if fresh else other.read_seconds
            opened += fresh
            filling = other.cut(view)
            seconds += other.read_seconds - before
            new = np.isnan(flux) & np.isfinite(filling)
            if new.any():
                flux[new] = filling[new]
                used.append(uri)
        if crosses:
            partial = bool(np.isnan(flux[:, view.outside(reference.shape)]).any())
        flux = ordered(flux, tile.bands, self.bands)
        worst = require_coverage(flux, tuple(self.bands[role] for role in ROLES), self.min_coverage)
        flags = flags_of(flux, partial=partial, star_share=tile.star_share(view))
        return Cutout(flux, worst, side, row["ra"], row["dec"], seconds, flags, tuple(used), opened)

    def _opened(self, uri: str, keep: OpenTile | None = None) -> tuple[OpenTile, int]:
        """Return an open tile, and 1 if it was not open yet; `keep` is not closed for it.

        This thread's last few stay open: the next partition is often of the same one, and so are neighbours.
        """
        files = tile_files(uri, self._layout)
        tiles = _recent.setdefault(threading.get_ident(), {})
        key = (uri, self.survey, self.layout, *self.bands.values(), file_version(*files.files.values()))
        fresh = key not in tiles
        if fresh:
            while len(tiles) >= MOST_TILES:
                oldest = next(at for at, tile in tiles.items() if tile is not keep)
                tiles.pop(oldest).close()
            tiles[key] = OpenTile(files, self._layout, tuple(self.bands.values()))
        tiles[key] = tiles.pop(key)
        return tiles[key], int(fresh)

    def _decompress(self, tile: OpenTile) -> None:
        """Hold the planes of this tile, and of no other, in memory."""
        for other in _recent.get(threading.get_ident(), {}).values():
            if other is not tile:
                other.release()
        # Of a damaged plane, sections tell which sources it concerns.
        with suppress(UnreadableInput):
            tile.decompress()


@dataclass(frozen=True)
class Assigned:
    """The tiles of sources.

    Attributes
    ----------
    uris : pa.Array, string
        Tile in which each source lies farthest from the edge; null on none.
    versions : pa.Array, string
        Of the files of that tile and of the neighbours.
    neighbours : pa.Array, list of string
        Other tiles that a cutout may reach into, nearest first; null without.
    unreadable : mapping of str to GalembedError
        Tiles whose place on the sky is not known, and why.
    """

    uris: pa.Array
    versions: pa.Array
    neighbours: pa.Array
    unreadable: Mapping[str, GalembedError]


def assign(table: pa.Table, tiles: Mapping[str, TileFiles], layout: Layout, bands: Collection[str] = ()) -> Assigned:
    """Find the tiles of sources.

    Parameters
    ----------
    table : pa.Table
        With finite `ra` and `dec`, `size` and `fov`.
    tiles : mapping of str to TileFiles
    layout : Layout
    bands : collection of str
        A tile that has them all, by its files' names, comes before one that has not.

    Raises
    ------
    GalembedError
        The first tile's, if none near a source can be read or has a sky WCS.
    """
    ra, dec, size, fov = (
        table[name].to_numpy(zero_copy_only=False).astype(float) for name in ("ra", "dec", "size", "fov")
    )
    # Without a size the backbone's field is fixed, and any.
    by_size = np.clip(_REACH_RADII * np.nan_to_num(size, nan=np.inf), *_REACH_ARCSEC)
    reach = np.where(np.isfinite(fov), fov, by_size) / 2
    names = list(tiles)
    unreadable: dict[str, GalembedError] = {}
    pairs = list(_pairs(ra, dec, list(tiles.values()), layout, unreadable)) if len(ra) else []
    if unreadable and not pairs:
        raise next(iter(unreadable.values()))
    rows, numbers, depth = (
        np.concatenate([pair[at] for pair in pairs]) if pairs else np.empty(0, int) for at in range(3)
    )
    near = depth > -reach[rows] * np.sqrt(2)
    lacking = np.array([bool(tile.bands) and not set(bands) <= set(tile.bands) for tile in tiles.values()])
    off = depth[near] <= 0
    order = np.lexsort((-depth[near], lacking[numbers[near]], off, rows[near]))
    rows, numbers, depth = rows[near][order], numbers[near][order], depth[near][order]
    first = np.append(True, np.diff(rows) != 0)[: len(rows)]
    on = first & (depth > 0)
    best = np.full(len(ra), -1)
    best[rows[on]] = numbers[on]
    edge = np.full(len(ra), np.inf)
    edge[rows[on]] = depth[on]
    # One that holds the source may have data where the first has none.
    others = ~on & (best[rows] >= 0) & ((edge[rows] < reach[rows]) | (depth > 0))
    last = [name.rpartition("/")[2] for name in names]
    reached: dict[int, list[int]] = {}
    for row, number in zip(rows[others].tolist(), numbers[others].tolist(), strict=True):
        taken = reached.setdefault(row, [])
        # A brick of the same name (north and south) covers the same sky and would take the place of another.
        if len(taken) < MOST_TILES - 1 and last[number] not in {last[at] for at in (int(best[row]), *taken)}:
            taken.append(number)
    reached = {row: taken for row, taken in reached.items() if taken}

    @cache
    def version(*numbers: int) -> str:
        return file_version(*(path for number in numbers for path in tiles[names[number]].files.values()))

    placed = list(enumerate(best.tolist()))
    return Assigned(
        uris=pa.array([names[at] if at >= 0 else None for _, at in placed], pa.string()),
        versions=pa.array([version(at, *reached.get(row, ())) if at >= 0 else None for row, at in placed], pa.string()),
        neighbours=pa.array(
            [[names[n] for n in reached[row]] if row in reached else None for row, _ in placed],
            pa.list_(pa.string()),
        ),
        unreadable=unreadable,
    )


def _pairs(
    ra: NDArray[np.float64],
    dec: NDArray[np.float64],
    tiles: Sequence[TileFiles],
    layout: Layout,
    unreadable: dict[str, GalembedError],
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]]:
    """Yield, for each tile near some source: row numbers, the tile's number, and depth inside its edge, arcsec."""
    sky = cKDTree(unit_vectors(ra, dec))
    widest = _LARGEST_TILE_DEG + PLACE_DEG + _REACH_ARCSEC[1] / 3600
    for number, tile in enumerate(tiles):
        named = layout.parse(tile.first_image.rpartition("/")[2])
        place = layout.place(named.tile) if named else None
        if place is not None and not sky.query_ball_point(unit_vectors(*place), _chord(widest), return_length=True):
            continue
        try:
            wcs, (height, width), scale = _footprint(tile, layout)
        except GalembedError as error:
            unreadable[tile.uri] = error
            continue
        center = wcs.all_pix2world([[(width - 1) / 2, (height - 1) / 2]], 0)[0]
        radius = np.hypot(height, width) / 2 * scale / 3600 * 1.05 + _REACH_ARCSEC[1] / 3600
        near = np.sort(sky.query_ball_point(unit_vectors(*center), _chord(radius))).astype(np.int64)
        places = np.column_stack([ra[near], dec[near]])
        x, y = wcs.all_world2pix(places, 0, quiet=True).T if len(near) else np.empty((2, 0))
        depth = np.min([x + 0.5, y + 0.5, width - 0.5 - x, height - 0.5 - y], axis=0) * scale
        good = np.isfinite(depth)
        yield near[good], np.full(int(good.sum()), number), depth[good]


def _chord(degrees: float) -> float:
    return float(2 * np.sin(np.radians(min(degrees, 180)) / 2))


def _footprint(tile: TileFiles, layout: Layout) -> tuple[WCS, tuple[int, int], float]:
    """Return WCS, shape (y, x) and pixel (arcsec) of a tile's first image."""
    files = OpenFiles(tile.uri, tile.files, check=False)
    try:
        pieces = next(iter(read_planes(layout, files, tile.bands[:1] or None).values()), ())
        if not pieces:
            raise UnreadableInput(f"{tile.first_image}: no image in it")
        plane: Plane = max(pieces, key=lambda piece: piece.shape[0] * piece.shape[1])
        if plane.wcs is None or plane.pixel_arcsec is None:
            raise MissingWCS(
                f"{plane.image.where}: the header has no sky WCS, so no catalogue position can be found on this tile"
            )
        return plane.wcs, plane.shape, plane.pixel_arcsec
    finally:
        files.close()
