"""A folder of FITS cutouts: one source a file, or a file for each band."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from galembed.backbones import InputContract
from galembed.cutouts import Cutout, require_coverage
from galembed.errors import GalembedError, MissingWCS
from galembed.files import FITS_ENDINGS, find_files
from galembed.mappings import ROLES
from galembed.quality import flags_of
from galembed.sources import Options, SourceList
from galembed.sources.folders import list_places, reject
from galembed.sources.layouts import Candidate, TileFiles, find_tiles, tile_files
from galembed.sources.open_tiles import OpenTile, View, ordered
from galembed.surveys import Layout, Survey, choose_bands, load_survey


@dataclass(frozen=True)
class CutoutReader:
    """Reads a folder of FITS cutouts; see `galembed.sources.open_source` for the attributes."""

    root: str
    survey: str
    layout: str
    bands: Mapping[str, str]
    catalogue: str | None = None
    crop: float = 0.5
    min_coverage: float = 0.0
    fov: str = ""
    carry: tuple[str, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    kind: str = "flux"
    evidence: str = ""

    @classmethod
    def open(cls, root: str, candidate: Candidate, present: Sequence[str], options: Options) -> CutoutReader:
        """Return a reader, after checking that the first cutouts have every band.

        Raises
        ------
        MissingBand
            If a band is in none of them (`present` are in some); the message names those that are.
        """
        return cls(
            root=root,
            survey=candidate.reference,
            layout=candidate.layout.name,
            bands=choose_bands(candidate.survey, options.bands, present),
            catalogue=options.catalogue,
            crop=options.crop,
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
        """Return one source for each cutout; positions come from the headers when the pixels are read."""
        files = find_files(self.root, FITS_ENDINGS)
        tiles = find_tiles(files, self._layout, self.root)
        listed = list_places(
            {uri: tuple(tile.files.values()) for uri, tile in tiles.items()},
            self.root,
            FITS_ENDINGS,
            survey=self._record.name,
            catalogue=self.catalogue,
            carry=self.carry,
            columns=self.columns,
            fov=self.fov,
        )
        claimed = {path for tile in tiles.values() for path in (*tile.files.values(), *tile.superseded)}
        strangers = [path for path in files if path not in claimed]
        if not strangers:
            return listed
        rows = list_places(
            {path: (path,) for path in strangers},
            self.root,
            FITS_ENDINGS,
            survey=self._record.name,
            catalogue=None,
            carry=(),
            columns={},
        ).table
        message = f"its name is none of {self._record.title}'s cutouts ({self._layout.names})"
        messages = [f"{path}: {message}; move it elsewhere, or rename it" for path in strangers]
        return SourceList(listed.table, pa.concat_tables([listed.rejected, reject(rows, "unrecognised", messages)]))

    def cutouts(self, rows: pa.Table, contract: InputContract) -> Iterator[tuple[int, Cutout | GalembedError]]:
        """Yield (row number, cutout or the reason there is none) for each row."""
        for number, row in enumerate(rows.select(["source_uri", "ra", "dec", "size", "fov"]).to_pylist()):
            try:
                yield number, self._cutout(row, contract)
            except GalembedError as error:
                yield number, error

    def _cutout(self, row: Mapping[str, Any], contract: InputContract) -> Cutout:
        files: TileFiles = tile_files(row["source_uri"], self._layout)
        tile = OpenTile(files, self._layout, tuple(self.bands.values()))
        try:
            return self._cut(tile, row, contract)
        finally:
            tile.close()

    def _cut(self, tile: OpenTile, row: Mapping[str, Any], contract: InputContract) -> Cutout:
        reference = tile.reference
        x, y, width, height = tile.frame
        ra, dec, scale = row["ra"], row["dec"], reference.pixel_arcsec
        if reference.wcs is not None:
            if ra is None or dec is None:
                ra, dec = (float(angle) for angle in reference.wcs.all_pix2world([(x, y)], 0)[0])
            else:
                x, y = (float(at) for at in reference.wcs.all_world2pix([(ra, dec)], 0, quiet=True)[0])
        side = row["fov"] or contract.field_of_view.side_arcsec(row["size"])
        if scale is None and (row["size"] is not None or row["fov"] is not None):
            raise MissingWCS(
                f"{tile.uri}: the field of view is in arcsec, and the header has no sky WCS to turn it into pixels; "
                "leave the catalogue's size (or --fov) out and choose --crop"
            )
        pixels = side / scale if side and scale else self.crop * min(height, width)
        view = View(reference.wcs, x, y, pixels, contract.size)
        flux = ordered(tile.cut(view), tile.bands, self.bands)
        worst = require_coverage(flux, tuple(self.bands[role] for role in ROLES), self.min_coverage)
        partial = view.crosses(reference.shape) and bool(np.isnan(flux[:, view.outside(reference.shape)]).any())
        flags = flags_of(flux, partial=partial, star_share=tile.star_share(view))
        fov = pixels * scale if scale else None
        return Cutout(flux, worst, fov, ra, dec, tile.read_seconds, flags)
