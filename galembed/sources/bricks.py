"""Legacy Surveys bricks with a catalogue: sources are cut from the compressed tiles, no files in between."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from astropy.io import fits
from astropy.utils.exceptions import AstropyWarning
from astropy.wcs import WCS
from numpy.typing import NDArray

from galembed.backbones import InputContract
from galembed.catalogues import read_catalogue
from galembed.cutouts import Cutout, require_coverage, resample
from galembed.errors import BadRequest, GalembedError, MissingWCS, NoData, UnknownUnit, UnreadableInput
from galembed.mappings import ROLES
from galembed.photometry import nanojansky_per_unit
from galembed.schemas import SOURCES
from galembed.sky import separation_arcsec
from galembed.sources import SourceList
from galembed.sources.folders import file_version, reject, split_duplicates
from galembed.surveys import LEGACY

_IMAGE: Final = re.compile(r"legacysurvey-(?P<brick>\d{4}[pm]\d{3})-image-(?P<band>\w+)\.fits(\.fz)?")
_PATTERN: Final = "legacysurvey-*-image-*.fits*"

_NEAR_ARCSEC: Final = 3600.0  # a brick is a quarter of a degree wide

WHOLE_TILE_SOURCES: Final = 80
"""From this many sources on, a 100 x 100 px compressed plane is cheaper decompressed whole than by section (measured:
full decompression 0.21 s a plane, a 256 px section 2.4 ms)."""


def holds_bricks(root: Path) -> bool:
    """Tell whether a folder is a tree of bricks, or one brick's files."""
    return any(_IMAGE.fullmatch(path.name) for path in root.rglob(_PATTERN))


@dataclass(frozen=True)
class BrickReader:
    """Reads bricks; see `galembed.sources.open_source` for the attributes."""

    root: str
    catalogue: str
    bands: Mapping[str, str]
    min_coverage: float = 0.0
    carry: tuple[str, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    crop: float = 1.0
    kind: str = "flux"

    @classmethod
    def open(
        cls,
        root: Path,
        catalogue: str | Path,
        *,
        bands: Mapping[str, str] | None,
        min_coverage: float,
        carry: tuple[str, ...],
        columns: Mapping[str, str],
    ) -> BrickReader:
        """Return a reader, after checking that some brick has every band.

        Raises
        ------
        MissingBand
            If no brick has all three; the message names the bands that are there.
        """
        bricks = find_bricks(root)
        present = tuple(sorted({band for brick in bricks.values() for band in brick}))
        chosen = LEGACY.choose_bands(bands, present)
        return cls(str(root), str(catalogue), chosen, min_coverage, carry, dict(columns))

    def sources(self) -> SourceList:
        """Return the catalogue's rows, each with the brick in which it lies farthest from the edge."""
        catalogue = read_catalogue(
            self.catalogue, columns=self.columns, carry=self.carry, need=("id", "ra", "dec", "size")
        )
        uris, versions = self._assign(catalogue)
        count = len(catalogue)
        table = pa.table(
            {
                "survey": pa.array([LEGACY.name] * count, pa.string()),
                **{name: catalogue[name] for name in ("source_id", "ra", "dec", "size")},
                "source_uri": pa.array(uris, pa.string()),
                "source_version": pa.array(versions, pa.string()),
            },
            schema=SOURCES,
        )
        for column in catalogue.schema:
            if column.name not in table.column_names:
                table = table.append_column(column, catalogue[column.name])
        table, twice = split_duplicates(table)
        table, adrift = _split_unusable(table)
        return SourceList(table, pa.concat_tables([twice, adrift]))

    def _assign(self, catalogue: pa.Table) -> tuple[list[str | None], list[str | None]]:
        ra, dec = (catalogue[name].to_numpy(zero_copy_only=False).astype(float) for name in ("ra", "dec"))
        best = np.full(len(ra), -np.inf)
        at = np.full(len(ra), -1)
        bricks = list(find_bricks(Path(self.root)).items())
        for number, (_, files) in enumerate(bricks):
            wcs, (height, width) = _tile_wcs(next(iter(files.values())))
            near = np.flatnonzero(separation_arcsec(ra, dec, *wcs.wcs.crval) < _NEAR_ARCSEC)
            x, y = wcs.all_world2pix(ra[near], dec[near], 0) if len(near) else (np.empty(0), np.empty(0))
            edge = np.min([x + 0.5, y + 0.5, width - 0.5 - x, height - 0.5 - y], axis=0)
            better = edge > np.maximum(best[near], 0)
            rows = near[better]
            best[rows], at[rows] = edge[better], number
        versions = [file_version(*files.values()) for _, files in bricks]
        uris = [bricks[i][0] if i >= 0 else None for i in at]
        return uris, [versions[i] if i >= 0 else None for i in at]

    def cutouts(self, rows: pa.Table, contract: InputContract) -> Iterator[tuple[int, Cutout | GalembedError]]:
        """Yield (row number, cutout or the reason there is none) for each row, brick by brick."""
        table = rows.select(["source_id", "source_uri", "ra", "dec", "size"]).to_pylist()
        by_tile: dict[str | None, list[int]] = {}
        for number, row in enumerate(table):
            by_tile.setdefault(row["source_uri"], []).append(number)
        for uri, numbers in by_tile.items():
            if uri is None:
                yield from (
                    (
                        number,
                        NoData(f"source {table[number]['source_id']} lies on none of the bricks in {self.root}"),
                    )
                    for number in numbers
                )
                continue
            try:
                tile = Brick.open(uri, self.bands, whole=len(numbers) >= WHOLE_TILE_SOURCES)
            except GalembedError as error:
                yield from ((number, error) for number in numbers)
                continue
            with tile:
                for number in numbers:
                    try:
                        yield number, self._cutout(tile, table[number], contract)
                    except GalembedError as error:
                        yield number, error

    def _cutout(self, tile: Brick, row: Mapping[str, Any], contract: InputContract) -> Cutout:
        side = contract.field_of_view.side_arcsec(row["size"])
        if side is None:
            raise BadRequest(
                f"source {row['source_id']} has no size, and the backbone's field of view follows it; "
                "name a column with --column size=COLUMN"
            )
        x, y = (float(value) for value in tile.wcs.all_world2pix([[row["ra"], row["dec"]]], 0)[0])
        side_pixels = side / LEGACY.pixel_arcsec
        before = tile.reading["seconds"]
        flux = tile.cut(x, y, side_pixels, contract.size)
        worst = require_coverage(flux, tuple(self.bands[role] for role in ROLES), self.min_coverage)
        return Cutout(flux, worst, side, row["ra"], row["dec"], tile.reading["seconds"] - before)


def find_bricks(root: Path) -> dict[str, dict[str, Path]]:
    """Return image files by brick and band; a brick is named ``.../legacysurvey-<brick>``."""
    bricks: dict[str, dict[str, Path]] = {}
    for path in sorted(root.rglob(_PATTERN)):
        if match := _IMAGE.fullmatch(path.name):
            bricks.setdefault(str(path.parent / f"legacysurvey-{match['brick']}"), {})[match["band"]] = path
    return bricks


@dataclass(frozen=True)
class Brick:
    """One open brick: planes are decompressed once, or by section where few sources are cut.

    Attributes
    ----------
    uri : str
        Common path of its files.
    bands : tuple of str
        Blue, green, red.
    whole : bool
        Decompress planes whole.
    reading : dict
        `seconds` spent reading and decompressing so far.
    """

    uri: str
    bands: tuple[str, ...]
    whole: bool
    wcs: WCS
    hdus: Mapping[str, Any]
    files: ExitStack
    reading: dict[str, float] = field(default_factory=lambda: {"seconds": 0.0})

    @classmethod
    def open(cls, uri: str, bands: Mapping[str, str], *, whole: bool) -> Brick:
        """Open a brick's files.

        Raises
        ------
        UnreadableInput
            If a file is missing or damaged.
        """
        names = tuple(bands[role] for role in ROLES)
        hdus: dict[str, Any] = {"maskbits": None} | {f"invvar-{band}": None for band in names}
        with ExitStack() as opened:
            for name in (*(f"image-{band}" for band in dict.fromkeys(names)), *hdus):
                path = _plane_path(uri, name)
                if path is not None:
                    file, hdus[name] = _open_plane(path)
                    opened.enter_context(file)
                elif name.startswith("image"):
                    raise UnreadableInput(f"{uri}-{name}.fits.fz is missing; fetch it, or choose other --bands")
            for band in names:
                unit = str(hdus[f"image-{band}"].header.get("BUNIT", "")).strip()
                if unit and unit != LEGACY.unit:
                    raise UnknownUnit(f"{uri}-image-{band}: BUNIT is {unit!r}, Legacy bricks are in {LEGACY.unit}")
            wcs = _sky_wcs(hdus[f"image-{names[0]}"].header, uri)
            return cls(uri, names, whole, wcs, hdus, opened.pop_all())

    def __enter__(self) -> Brick:
        return self

    def __exit__(self, *_: object) -> None:
        self.files.close()

    @cached_property
    def _planes(self) -> dict[str, NDArray[np.float32]]:
        return {}

    def cut(self, x: float, y: float, side: float, size: int) -> NDArray[np.float32]:
        """Return (3, size, size) flux in nJy per native pixel around 0-based pixel (x, y); `side` in pixels.

        Raises
        ------
        UnreadableInput
            If a compressed tile is damaged.
        """
        height, width = self.hdus[f"image-{self.bands[0]}"].shape
        reach = side / 2 + max(side / size, 1.0) + 1
        x0, x1 = (int(np.clip(value, 0, width)) for value in (np.floor(x - reach), np.ceil(x + reach) + 1))
        y0, y1 = (int(np.clip(value, 0, height)) for value in (np.floor(y - reach), np.ceil(y + reach) + 1))
        if x1 <= x0 or y1 <= y0:
            raise NoData(f"pixel ({x:.0f}, {y:.0f}) lies outside brick {self.uri}")
        box = (slice(y0, y1), slice(x0, x1))
        center = (x - x0, y - y0)
        return np.stack([resample(self._flux(band, box), center=center, side=side, size=size) for band in self.bands])

    def _flux(self, band: str, box: tuple[slice, slice]) -> NDArray[np.float32]:
        if not self.whole:
            return self._read(band, box)
        if band not in self._planes:
            self._planes[band] = self._read(band, (slice(None), slice(None)))
        return self._planes[band][box]

    def _read(self, band: str, box: tuple[slice, slice]) -> NDArray[np.float32]:
        """Return nJy; NaN where the weight is zero, the mask says so, or (without a weight map) the pixel is zero."""
        whole = box == (slice(None), slice(None))
        started = time.perf_counter()

        def pixels(name: str) -> NDArray[Any] | None:
            hdu = self.hdus[name]
            if hdu is None:
                return None
            try:
                return np.asarray(hdu.data if whole else hdu.section[box])
            except Exception as error:  # the decompressors raise many kinds, ValueError to zlib.error
                raise UnreadableInput(
                    f"{self.uri}-{name}: damaged ({type(error).__name__}: {error}); fetch it again"
                ) from error

        image, weight, bits = pixels(f"image-{band}"), pixels(f"invvar-{band}"), pixels("maskbits")
        assert image is not None
        flux = image.astype(np.float32) * np.float32(nanojansky_per_unit(LEGACY.unit))
        flux[(image == 0) if weight is None else ~(weight > 0)] = np.nan
        if bits is not None:
            flux[(bits & LEGACY.no_data_bits[band]) != 0] = np.nan
        self.reading["seconds"] += time.perf_counter() - started
        return flux


def _plane_path(uri: str, name: str) -> Path | None:
    candidates = (Path(f"{uri}-{name}{ending}") for ending in (".fits.fz", ".fits"))
    return next((path for path in candidates if path.exists()), None)


def _open_plane(path: Path) -> tuple[fits.HDUList, Any]:
    """Return an open file and its image HDU."""
    file = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AstropyWarning)
            file = fits.open(path, memmap=False)
            return file, next(hdu for hdu in file if hdu.is_image and len(getattr(hdu, "shape", ())) == 2)
    except (OSError, StopIteration, ValueError, TypeError, KeyError, IndexError) as error:
        if file is not None:
            file.close()
        reason = str(error) or "it holds no image"
        raise UnreadableInput(f"{path}: damaged or not a FITS image ({reason}); fetch it again") from error


def _tile_wcs(path: Path) -> tuple[WCS, tuple[int, int]]:
    file, hdu = _open_plane(path)
    with file:
        return _sky_wcs(hdu.header, str(path)), hdu.shape


def _sky_wcs(header: fits.Header, name: str) -> WCS:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AstropyWarning)
        wcs = WCS(header)
    if not wcs.has_celestial:
        raise MissingWCS(f"{name}: the header has no sky WCS, so no catalogue position can be found on this tile")
    return wcs


def _split_unusable(table: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Part the rows without a finite position or with an impossible size from the rest."""
    ra, dec, size = (table[name].to_numpy(zero_copy_only=False).astype(float) for name in ("ra", "dec", "size"))
    nowhere = ~np.isfinite(ra) | ~np.isfinite(dec) | (np.abs(np.nan_to_num(dec)) > 90)
    sizeless = ~nowhere & ~(size >= 0)  # 0 is a point source
    parts = []
    for mask, reason, text in (
        (nowhere, "bad_position", "has no finite position (ra {ra}, dec {dec})"),
        (sizeless, "bad_size", "has half-light radius {size} arcsec, which is no size"),
    ):
        rows = table.filter(mask)
        messages = [f"source {row['source_id']} {text.format(**row)}" for row in rows.select(SOURCES.names).to_pylist()]
        parts.append(reject(rows, reason, messages))
    return table.filter(~(nowhere | sizeless)), pa.concat_tables(parts)
