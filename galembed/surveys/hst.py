"""Hubble Space Telescope: drizzled mosaics `_drz` and `_drc`, of the archive's pipelines and of science teams."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from astropy.io import fits

from galembed.errors import MissingBand, UnknownUnit
from galembed.photometry import nanojansky_per_count
from galembed.planes import OpenFiles, Pixels, Plane, celestial_wcs, per_reference_pixel
from galembed.surveys import Evidence, Fact, Layout, Survey

AB_CONSTANT: Final = Fact(
    "AB magnitude of one electron a second: -2.5 log10(PHOTFLAM) - 5 log10(PHOTPLAM) + this",
    -2.408,
    Evidence.DOCUMENTED,
    "STScI zero-point pages; PHOTFLAM in erg/cm2/s/Angstrom, PHOTPLAM in Angstrom",
)
UNITS: Final = Fact(
    "BUNIT, and whether its pixels still have to be divided by EXPTIME",
    {"ELECTRONS/S": False, "ELECTRON/S": False, "ELECTRONS": True, "ELECTRON": True},
    Evidence.DOCUMENTED,
    "PHOTFLAM's own comment in ACS and WFC3 headers is `ergs/cm2/Ang/electron`; astrodrizzle's final_units",
)
COUNTS: Final = Fact(
    "as above, of counts: times the gain they are electrons, so PHOTFLAM's comment has to say that it is of counts",
    {"COUNTS/S": False, "COUNTS": True},
    Evidence.UNVERIFIED,
    "drizzlepac outputimage.py writes `counts * gain = electrons` beside them; WFPC2 and NICMOS",
)
WEIGHT: Final = Fact(
    "WHT is used only as `no data where it is 0`: it may be exposure time or inverse variance",
    0,
    Evidence.DOCUMENTED,
    "astrodrizzle's final_wht_type",
)

_FILTER_KEYS: Final = ("FILTER", "FILTER1", "FILTER2", "FILTNAM1", "FILTNAM2", "PUPIL")
_FILTER: Final = re.compile(r"f\d{3,4}(?:lp|w2?|[mnx])")
_PER_COUNT: Final = re.compile(r"/\s*(?:counts?|dn)\b", re.IGNORECASE)


def extension(file: fits.HDUList, path: str, name: str) -> Pixels | None:
    """Return the two-dimensional image HDU of that EXTNAME, wherever it stands, or None."""
    for number, hdu in enumerate(file):
        if hdu.name == name and hdu.is_image and len(hdu.shape or ()) == 2 and 0 not in hdu.shape:
            return Pixels(hdu, f"{path}[{number}]")
    return None


def header_filters(headers: Iterable[fits.Header]) -> tuple[str, ...]:
    """Return the filters that headers name, lower case; empty wheel positions (CLEAR) are left out."""
    values = (str(header[key]).strip().lower() for header in headers for key in _FILTER_KEYS if key in header)
    return tuple(dict.fromkeys(value for value in values if _FILTER.fullmatch(value)))


def require_filter(headers: Iterable[fits.Header], band: str, path: str) -> None:
    """Check the filter in a file's name against its headers, where they name any.

    Raises
    ------
    MissingBand
        If they name others.
    """
    named = header_filters(headers)
    if named and band not in named:
        raise MissingBand(f"{path}: its name says band {band}, its header {' and '.join(named)}; rename it")


def _planes(files: OpenFiles, bands: Sequence[str] | None) -> Mapping[str, tuple[Plane, ...]]:
    planes = {}
    for band in (bands or files.bands) if files.bands else ("",):
        if ("image", band) not in files.files:
            continue
        file, path = files.open("image", band), files.path("image", band)
        assert file is not None
        assert path is not None
        image = extension(file, path, "SCI") or files.image("image", band)
        assert image is not None
        headers = (image.hdu.header, file[0].header)
        if band:
            require_filter(headers, band, path)
        weight = extension(file, path, "WHT")
        if weight is None and ("weight", band) in files.files:
            weight = files.image("weight", band)
        wcs = celestial_wcs(image.hdu.header)
        name = band or _only_filter(headers, path)
        factor = per_reference_pixel(nanojansky_per_pixel(headers, image.where), wcs, path)
        planes[name] = (Plane(name, image, wcs, factor, weight, zero_is_no_data=weight is None),)
    return planes


def _only_filter(headers: Sequence[fits.Header], path: str) -> str:
    named = header_filters(headers)
    if len(named) != 1:
        found = " and ".join(named) or "none"
        raise MissingBand(f"{path}: neither its name nor its header says one filter (header: {found}); rename it")
    return named[0]


def nanojansky_per_pixel(headers: Sequence[fits.Header], where: str) -> float:
    """Return nJy for one pixel unit.

    Parameters
    ----------
    headers : sequence of Header
        Of the image, then of the primary HDU: each keyword is taken from the first that has it.

    Raises
    ------
    UnknownUnit
        If BUNIT, PHOTFLAM, PHOTPLAM or EXPTIME does not say it.
    """
    flam, plam = (_positive(headers, key, where) for key in ("PHOTFLAM", "PHOTPLAM"))
    unit = str(_value(headers, "BUNIT") or "").strip().upper().replace(" ", "")
    totals = UNITS.value | COUNTS.value
    if unit not in totals:
        raise UnknownUnit(f"{where}: BUNIT is {unit or None!r}, and nothing is guessed; known are {', '.join(totals)}")
    if unit in COUNTS.value:
        comment = next(header.comments["PHOTFLAM"] for header in headers if "PHOTFLAM" in header)
        if not _PER_COUNT.search(comment):
            raise UnknownUnit(
                f"{where}: BUNIT is {unit!r}, which times the gain are electrons, and PHOTFLAM is not of counts "
                f"({comment or 'no comment'}); multiply by the gain and write ELECTRONS, or use a --survey file"
            )
    zero_point = -2.5 * math.log10(flam) - 5 * math.log10(plam) + AB_CONSTANT.value
    factor = nanojansky_per_count(zero_point)
    return factor / _positive(headers, "EXPTIME", where) if totals[unit] else factor


def _value(headers: Sequence[fits.Header], key: str) -> Any:
    return next((header[key] for header in headers if key in header), None)


def _positive(headers: Sequence[fits.Header], key: str, where: str) -> float:
    value = _value(headers, key)
    if not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UnknownUnit(f"{where}: {key} is {value!r}, so its pixels have no zero point; nothing is guessed")
    return float(value)


def _recognise(file: fits.HDUList) -> str | None:
    telescopes = {str(hdu.header["TELESCOP"]).strip().upper() for hdu in file if "TELESCOP" in hdu.header}
    if "HST" in telescopes and any("PHOTFLAM" in hdu.header for hdu in file):
        return "header TELESCOP = HST with PHOTFLAM, and _drz or _drc at the end of the names"
    return None


_BANDS: Final = (
    "f225w f275w f336w f390w f435w f438w f450w f475w f555w f606w f625w f702w f775w f814w f850lp "
    "f098m f105w f110w f125w f140w f160w"
)

SURVEY: Final = Survey(
    name="hst",
    title="Hubble Space Telescope, drizzled",
    bands=tuple(_BANDS.split()),
    roles={},
    layouts=(
        Layout(
            name="drizzled",
            scope="tile",
            names="<name>_<filter>_{drz,drc}.fits (perhaps with <name>_<filter>_wht.fits), or <name>_{drz,drc}.fits",
            # A visit's `total` image adds filters up.
            pattern=re.compile(
                r"(?!.*_total_)(?P<tile>.+?[-_])(?:(?P<band>(?i:f\d{3}(?:lp|[wmnx])))(?P<rest>[-_].+?)?_)?"
                r"(?P<kind>drz|drc|wht)\.fits(?:\.gz|\.fz)?"
            ),
            kinds={"drz": "image", "drc": "image", "wht": "weight"},
            band_names={band.upper(): band for band in _BANDS.split()},
            planes=_planes,
            recognise=_recognise,
            by_folder=False,
        ),
    ),
    facts=(AB_CONSTANT, UNITS, COUNTS, WEIGHT),
)
