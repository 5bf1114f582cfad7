"""Euclid MER mosaics (Q1): one background-subtracted file for each tile and band, with its RMS and FLAG files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from astropy.io import fits

from galembed.errors import UnknownUnit, UnreadableInput
from galembed.photometry import nanojansky_per_count
from galembed.planes import OpenFiles, Pixels, Plane, celestial_wcs, contents, per_reference_pixel, pixel_arcsec
from galembed.surveys import Evidence, Fact, Layout, Survey

_PRODUCT = "Euclid Q1 DPDD, Background-Subtracted Mosaic Product"
_NAMES = "IRSA, Data Products in Euclid Quick Release 1"

ZERO_POINT: Final = Fact(
    "AB magnitude of one count: each file's own MAGZERO", "MAGZERO", Evidence.DOCUMENTED, _PRODUCT + " (ZeroPoint)"
)
PIXEL: Final = Fact("pixel of every band, ground-based ones included, arcsec", 0.1, Evidence.DOCUMENTED, _PRODUCT)
OVERLAP: Final = Fact(
    "overlap that a cutout may rely on, arcsec in all", 120.0, Evidence.DOCUMENTED, "core of 30', 32' with its border"
)
WEIGHT: Final = Fact("no data where RMS is not > 0", True, Evidence.DOCUMENTED, "our rule; " + _NAMES)
ZERO_IS_NO_DATA: Final = Fact(
    "an exact zero is no data: a background-subtracted pixel with data has noise", True, Evidence.DOCUMENTED, "our rule"
)
FLAG_BITS: Final = Fact(
    "bits of FLAG that mean no data in a mosaic: none is used, since the one table that was read is of VIS exposures "
    "(bit 0 INVALID)",
    0,
    Evidence.UNVERIFIED,
    "Euclid DPDD, VIS Flag Map Product",
)
LINEAR: Final = Fact(
    "the WCS is linear; DPDD 1 allows PV terms, which a plain TAN does not have in FITS, so they are refused",
    True,
    Evidence.DOCUMENTED,
    _PRODUCT + " (WCS)",
)
VERSION: Final = Fact(
    "of two files of one tile, band and kind, the one with the later time in its name is read",
    "newest",
    Evidence.DOCUMENTED,
    "our rule; " + _NAMES + " has the form of the names",
)


def _planes(files: OpenFiles, bands: Sequence[str] | None) -> Mapping[str, tuple[Plane, ...]]:
    planes = {}
    for band in bands or files.bands:
        image = _primary(files, "image", band)
        if image is None:
            continue
        _require_linear(image)
        wcs = celestial_wcs(image.hdu.header)
        PIXEL.confirmed(None if wcs is None else pixel_arcsec(wcs), image.where)
        factor = nanojansky_per_count(zero_point(image.hdu.header, image.where))
        planes[band] = (
            Plane(
                band=band,
                image=image,
                wcs=wcs,
                factor=per_reference_pixel(factor, wcs, image.where),
                weight=_primary(files, "weight", band),
                zero_is_no_data=ZERO_IS_NO_DATA.value,
            ),
        )
    return planes


def _primary(files: OpenFiles, kind: str, band: str) -> Pixels | None:
    """Return the image in the primary HDU of a band's file, or None if there is no such file."""
    if (kind, band) not in files.files:
        return None
    file, path = files.open(kind, band), files.path(kind, band)
    assert file is not None
    if len(file[0].shape or ()) != 2:
        raise UnreadableInput(f"{path}: the primary HDU holds no image; {contents(file)}")
    return Pixels(file[0], f"{path}[0]")


def _require_linear(image: Pixels) -> None:
    bent = [key for key in image.hdu.header if re.fullmatch(r"PV[12]_\d+", key)]
    if bent:
        raise UnreadableInput(
            f"{image.where}: its WCS has the terms {', '.join(bent)}, which mean something else in a plain TAN; "
            "the mosaics of Q1 have none. Spell it TPV and describe the file with --survey FILE.yaml"
        )


def zero_point(header: fits.Header, where: str) -> float:
    """Return the AB magnitude of one count.

    Raises
    ------
    UnknownUnit
        If MAGZERO is not a number.
    """
    value = header.get("MAGZERO")
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
        raise UnknownUnit(f"{where}: MAGZERO is {value!r}, so its counts have no zero point; nothing is guessed")
    return float(value)


def _recognise(file: fits.HDUList) -> str | None:
    return "EUC_MER_BGSUB-MOSAIC names" if len(file) else None


SURVEY: Final = Survey(
    name="euclid",
    title="Euclid MER mosaics (Q1)",
    bands=("VIS", "NIR-Y", "NIR-J", "NIR-H"),
    roles={},
    layouts=(
        Layout(
            name="tile",
            scope="tile",
            names="EUC_MER_BGSUB-MOSAIC-<band>_TILE<tile>-<hash>_<time>_*.fits, EUC_MER_MOSAIC-<band>-{RMS,FLAG}_...",
            # The look-ahead finds the kind, which stands before the band in one name and after it in the others.
            pattern=re.compile(
                r"EUC_MER_(?=[^_]*(?P<kind>BGSUB|RMS|FLAG))(?:BGSUB-)?MOSAIC-(?P<band>VIS|[A-Z]+-[A-Z])(?:-RMS|-FLAG)?"
                r"_(?P<tile>TILE\d+)-[0-9A-Z]+_(?P<version>\d{8}T[\d.]+)Z_\d\d\.\d\d\.fits(?:\.gz|\.fz)?"
            ),
            kinds={"BGSUB": "image", "RMS": "weight", "FLAG": "mask"},
            planes=_planes,
            recognise=_recognise,
            by_folder=False,
        ),
    ),
    facts=(ZERO_POINT, PIXEL, OVERLAP, WEIGHT, ZERO_IS_NO_DATA, FLAG_BITS, LINEAR, VERSION),
)
