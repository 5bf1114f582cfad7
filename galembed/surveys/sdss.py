"""Sloan Digital Sky Survey: calibrated frames, and cutouts made from them, one band a file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Final

from astropy.io import fits

from galembed.errors import MissingBand
from galembed.mappings import REFERENCE_PIXEL_ARCSEC
from galembed.planes import (
    OpenFiles,
    Pixels,
    Plane,
    celestial_wcs,
    contents,
    header_unit,
    pixel_arcsec,
)
from galembed.surveys import Evidence, Fact, Layout, Survey

UNIT: Final = Fact(
    "unit of the pixels, per native pixel also in resampled cutouts",
    "nanomaggy",
    Evidence.SEEN,
    "BUNIT of frames reprojected to 1.19 arcsec: a spiral's mean brightness within 40 arcsec is 22.9 mag/arcsec2 in g "
    "so read, which is ordinary, and 25.3 per pixel of the file, which is not; reprojection keeps surface brightness",
)
PIXEL: Final = Fact(
    "native pixel of a frame, arcsec",
    0.396,
    Evidence.SEEN,
    "SDSS data model; a third of a frame's that was reprojected to 682 x 496 px; each frame's WCS has to agree",
)
SHAPE: Final = Fact("frame, pixels", (2048, 1489), Evidence.DOCUMENTED, "SDSS data model, frame")
NO_WEIGHT: Final = Fact(
    "a frame has no weight map; every finite pixel is data", True, Evidence.DOCUMENTED, "SDSS data model, frame"
)


def _planes(files: OpenFiles, bands: Sequence[str] | None, *, frames: bool) -> Mapping[str, tuple[Plane, ...]]:
    planes = {}
    for band in bands or files.bands:
        file, path = files.open("image", band), files.path("image", band)
        if file is None or path is None or ("image", band) not in files.files:
            continue
        image = Pixels(file[0], f"{path}[0]")
        if len(file[0].shape or ()) != 2:
            raise MissingBand(f"{path}: the primary HDU holds no image; {contents(file)}")
        header = file[0].header
        # Headers of derived files are often copied from another band's, so only a frame's own has a say.
        if frames and str(header.get("FILTER", band)).strip() != band:
            raise MissingBand(f"{path}: its name says band {band}, its header FILTER = {header['FILTER']!r}; rename it")
        wcs = celestial_wcs(header)
        if frames:
            PIXEL.confirmed(pixel_arcsec(wcs) if wcs is not None else None, path)
        factor = header_unit(header, path) * (REFERENCE_PIXEL_ARCSEC / PIXEL.value) ** 2
        planes[band] = (Plane(band, image, wcs, factor),)
    return planes


def _recognise_frame(file: fits.HDUList) -> str | None:
    return "frame-<band>-<run>-<camcol>-<field> names" if len(file) else None


def _recognise_cutout(file: fits.HDUList) -> str | None:
    header = file[0].header
    if str(header.get("ORIGIN", "")).strip() == "SDSS" or str(header.get("TELESCOP", "")).strip() == "2.5m":
        return "header ORIGIN = SDSS and the band at the end of the names"
    return None


SURVEY: Final = Survey(
    name="sdss",
    title="Sloan Digital Sky Survey",
    bands=("u", "g", "r", "i", "z"),
    roles={"blue": "g", "green": "r", "red": "i"},
    layouts=(
        Layout(
            name="frame",
            scope="tile",
            names="frame-<band>-<run>-<camcol>-<field>.fits.bz2",
            pattern=re.compile(r"(?P<kind>frame)-(?P<band>[ugriz])-(?P<tile>\d{6}-\d-\d{4})\.fits(?:\.bz2|\.gz)?"),
            kinds={"frame": "image"},
            planes=partial(_planes, frames=True),
            recognise=_recognise_frame,
            by_folder=False,
        ),
        Layout(
            name="cutout",
            scope="cutout",
            names="<name>_<band>.fits",
            pattern=re.compile(r"(?!frame-|legacysurvey-)(?P<tile>.+)[-_](?P<band>[ugriz])\.fits(?:\.bz2|\.gz|\.fz)?"),
            planes=partial(_planes, frames=False),
            recognise=_recognise_cutout,
        ),
    ),
    facts=(UNIT, PIXEL, SHAPE, NO_WEIGHT),
)
