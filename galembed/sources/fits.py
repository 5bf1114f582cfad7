"""A folder of FITS cutouts, one source per file.

Read so far: the Legacy Surveys' cutout service, as a cube (`BANDS`, `BAND0`...) or as one extension per band (`BAND`,
`IMAGETYP`). Pixels without a unit are taken to be a survey's only where the header names that survey's layout.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from astropy.io import fits
from astropy.utils.exceptions import AstropyWarning
from astropy.wcs import WCS
from astropy.wcs.utils import proj_plane_pixel_scales
from numpy.typing import NDArray

from galembed.backbones import InputContract
from galembed.cutouts import Cutout, require_coverage, resample
from galembed.errors import GalembedError, MissingBand, MissingWCS, UnknownUnit, UnreadableInput
from galembed.mappings import REFERENCE_PIXEL_ARCSEC, ROLES
from galembed.photometry import nanojansky_per_unit
from galembed.sources import SourceList
from galembed.sources.folders import list_folder
from galembed.surveys import LEGACY

ENDINGS: Final = (".fits", ".fit", ".fits.gz", ".fits.fz", ".fits.bz2")


@dataclass(frozen=True)
class CutoutReader:
    """Reads a folder of FITS cutouts; see `galembed.sources.open_source` for the attributes."""

    root: str
    catalogue: str | None = None
    crop: float = 0.5
    bands: Mapping[str, str] = field(default_factory=lambda: dict(LEGACY.roles))
    min_coverage: float = 0.0
    carry: tuple[str, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    kind: str = "flux"

    @classmethod
    def open(
        cls,
        root: Path,
        *,
        catalogue: str | Path | None,
        crop: float,
        bands: Mapping[str, str] | None,
        min_coverage: float,
        carry: tuple[str, ...],
        columns: Mapping[str, str],
    ) -> CutoutReader:
        """Return a reader, its options checked."""
        return cls(
            str(root),
            str(catalogue) if catalogue is not None else None,
            crop,
            LEGACY.choose_bands(bands),
            min_coverage,
            carry,
            dict(columns),
        )

    def sources(self) -> SourceList:
        """Return one source per file; positions come from the headers when the pixels are read."""
        return list_folder(
            Path(self.root),
            ENDINGS,
            survey=LEGACY.name,
            catalogue=self.catalogue,
            carry=self.carry,
            columns=self.columns,
        )

    def cutouts(self, rows: pa.Table, contract: InputContract) -> Iterator[tuple[int, Cutout | GalembedError]]:
        """Yield (row number, cutout or the reason there is none) for each row."""
        for number, row in enumerate(rows.select(["source_uri", "ra", "dec", "size"]).to_pylist()):
            try:
                yield number, self._cutout(row, contract)
            except GalembedError as error:
                yield number, error

    def _cutout(self, row: Mapping[str, Any], contract: InputContract) -> Cutout:
        started = time.perf_counter()
        frame = read_frame(Path(row["source_uri"]), self.bands)
        read_seconds = time.perf_counter() - started
        _, height, width = frame.flux.shape
        center = ((width - 1) / 2, (height - 1) / 2)
        ra, dec, scale = row["ra"], row["dec"], None
        if frame.wcs is not None:
            scale = float(np.sqrt(np.prod(proj_plane_pixel_scales(frame.wcs))) * 3600)
            if ra is None or dec is None:
                ra, dec = (float(angle) for angle in frame.wcs.all_pix2world([center], 0)[0])
            else:
                center = tuple(float(x) for x in frame.wcs.all_world2pix([[ra, dec]], 0)[0])  # type: ignore[assignment]
        side = contract.field_of_view.side_arcsec(row["size"])
        if scale is None and row["size"] is not None:
            raise MissingWCS(
                f"{row['source_uri']}: the catalogue gives a size in arcsec, and the header has no sky WCS to turn it "
                "into pixels; leave the catalogue's size out and choose --crop"
            )
        side_pixels = side / scale if side and scale else self.crop * min(height, width)
        flux = np.stack([resample(plane, center=center, side=side_pixels, size=contract.size) for plane in frame.flux])
        worst = require_coverage(flux, tuple(self.bands[role] for role in ROLES), self.min_coverage)
        return Cutout(flux, worst, side_pixels * scale if scale else None, ra, dec, read_seconds)


@dataclass(frozen=True)
class Frame:
    """The pixels of one cutout file.

    Attributes
    ----------
    flux : ndarray, shape (3, y, x), float32
        nJy per (0.262 arcsec)^2; bands blue, green, red; NaN = no data.
    wcs : WCS or None
        Celestial, two-dimensional.
    """

    flux: NDArray[np.float32]
    wcs: WCS | None


def read_frame(path: Path, bands: Mapping[str, str]) -> Frame:
    """Read one cutout file.

    Parameters
    ----------
    path : Path
    bands : mapping of str to str
        Band for each role.

    Raises
    ------
    UnreadableInput
        If the file is missing, truncated or not FITS.
    MissingBand
        If a band is not in it.
    UnknownUnit
        If the header gives no unit and is not of a layout whose unit is known.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AstropyWarning)
            with fits.open(path, memmap=False) as hdus:
                planes, header = _planes(hdus, path)
                _require_bands(planes, bands, path)
                flux = np.stack([np.asarray(planes[bands[role]], np.float32) for role in ROLES])
            wcs = celestial_wcs(header)
    except GalembedError:
        raise
    except (OSError, TypeError, ValueError, EOFError, KeyError, IndexError) as error:
        raise UnreadableInput(f"{path}: damaged or not a FITS file ({error}); fetch it again") from error
    factor = _unit_factor(header, path)
    # The cutout service writes exact zeros where no exposure reached.
    flux = np.where(flux == 0, np.nan, flux * np.float32(factor))
    return Frame(flux.astype(np.float32), wcs)


def celestial_wcs(header: fits.Header) -> WCS | None:
    """Return the two-dimensional sky WCS of a header, or None if it has none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AstropyWarning)
        wcs = WCS(header, naxis=2)
    return wcs if wcs.has_celestial else None


def _planes(hdus: fits.HDUList, path: Path) -> tuple[dict[str, Any], fits.Header]:
    """Return 2-D images by band, and the header that describes them."""
    images = [hdu for hdu in hdus if hdu.is_image and hdu.header.get("NAXIS", 0) >= 2]
    for hdu in images:
        names = _cube_bands(hdu.header)
        if names and hdu.header["NAXIS"] == 3 and hdu.shape[0] == len(names):
            return dict(zip(names, hdu.data, strict=True)), hdu.header
        if len(names) == 1 and hdu.header["NAXIS"] == 2:
            return {names[0]: hdu.data}, hdu.header
    singles = {
        str(hdu.header["BAND"]).strip(): hdu
        for hdu in images
        if "BAND" in hdu.header and str(hdu.header.get("IMAGETYP", "image")).strip().lower() == "image"
    }
    if singles:
        return {band: hdu.data for band, hdu in singles.items()}, next(iter(singles.values())).header
    raise MissingBand(
        f"{path}: no image with band keywords (BANDS, BAND0... or BAND); its HDUs are "
        f"{[(hdu.name, getattr(hdu, 'shape', None)) for hdu in hdus]}. "
        "Only cutouts in the Legacy Surveys' layout are read so far"
    )


def _cube_bands(header: fits.Header) -> list[str]:
    numbered = [str(header[key]).strip() for key in (f"BAND{i}" for i in range(20)) if key in header]
    if len(numbered) > 1 or "BANDS" not in header:
        return numbered
    text = str(header["BANDS"]).strip()
    return text.split(",") if "," in text else list(text)


def _require_bands(planes: Mapping[str, Any], bands: Mapping[str, str], path: Path) -> None:
    missing = {role: band for role, band in bands.items() if band not in planes}
    if missing:
        raise MissingBand(
            f"{path}: no band {', '.join(f'{band} ({role})' for role, band in missing.items())}; it has "
            f"{', '.join(planes)}. Choose others with --bands, for example "
            + " ".join(f"--bands {role}={next(iter(planes))}" for role in missing)
        )


def _unit_factor(header: fits.Header, path: Path) -> float:
    """Return nJy per (0.262 arcsec)^2 for one pixel unit."""
    unit = str(header.get("BUNIT", "")).strip()
    legacy = "IMAGETYP" in header or "IMAGEW" in header
    if not unit and not legacy:
        raise UnknownUnit(
            f"{path}: the header has no BUNIT and is not the Legacy cutout service's, so its pixels have no unit; "
            "add BUNIT (nanomaggy, nJy, uJy, Jy) to the files"
        )
    factor = nanojansky_per_unit(unit or LEGACY.unit)
    if legacy or unit.lower().startswith(("nanomag", "nmgy")):
        return factor
    wcs = celestial_wcs(header)
    if wcs is None:
        raise UnknownUnit(f"{path}: pixels in {unit} need a WCS to become a surface brightness, and there is none")
    area = float(np.prod(proj_plane_pixel_scales(wcs))) * 3600**2
    return factor * REFERENCE_PIXEL_ARCSEC**2 / area
