"""JWST imaging: the pipeline's stage-3 `_i2d` mosaics, and grizli's (DAWN JWST Archive), with HST bands beside them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Final

from astropy.io import fits
from astropy.wcs import WCS

from galembed.errors import UnknownUnit, UnreadableInput
from galembed.photometry import nanojansky_per_unit
from galembed.planes import OpenFiles, Plane, celestial_wcs, contents, per_reference_pixel, pixel_arcsec
from galembed.surveys import Evidence, Fact, Layout, Survey
from galembed.surveys.hst import extension, require_filter

UNIT: Final = Fact(
    "nJy of one pixel of 1 MJy/sr: this times PIXAR_SR",
    1e15,
    Evidence.DOCUMENTED,
    "JWST user documentation, flux pages: AB = -6.10 - 2.5 log10(value x PIXAR_SR)",
)
HDUS: Final = Fact(
    "SCI is the first extension; the order of the others (ERR, CON, WHT, VAR_...) is not guaranteed",
    "SCI",
    Evidence.DOCUMENTED,
    "spacetelescope/jwst docs/jwst/data_products/science_products.rst",
)
AREA_STRAY: Final = Fact(
    "largest relative difference between PIXAR_SR and a pixel of the WCS; binned images differ by more",
    0.05,
    Evidence.DOCUMENTED,
    "our rule; the nominal area of a detector's pixel is up to 3% from that of a mosaic's",
)
MOSAIC_UNIT: Final = Fact(
    "unit of grizli's mosaics, with PHOTFNU = 1e-8 Jy a pixel; PHOTMJSR, PHOTSCAL and OPHOTFNU are in the pixels "
    "already, and PIXAR_SR is the detector's",
    "10.0*nanoJansky",
    Evidence.DOCUMENTED,
    "grizli aws/visit_processor.py; header printed in the archive's `DJA Imaging Data Products`",
)
MOSAIC_WEIGHT: Final = Fact(
    "_wht is inverse variance; it, NaN and an exact 0 of the image mean no data",
    0,
    Evidence.DOCUMENTED,
    "DJA Imaging Data Products",
)

_MOSAIC_BUNIT: Final = re.compile(r"([\d.]+(?:e[+-]?\d+)?)\s*\*\s*nanojansky", re.IGNORECASE)
_MOSAIC_BUNIT_ROUNDING: Final = 0.0005  # it is written with three decimals
_STRAY_UNIT: Final = 0.01


def _i2d_planes(files: OpenFiles, bands: Sequence[str] | None) -> Mapping[str, tuple[Plane, ...]]:
    planes = {}
    for band in bands or files.bands:
        if ("image", band) not in files.files:
            continue
        file, path = files.open("image", band), files.path("image", band)
        assert file is not None
        assert path is not None
        image = extension(file, path, HDUS.value)
        if image is None:
            raise UnreadableInput(f"{path}: no image extension {HDUS.value}; {contents(file)}")
        header = image.hdu.header
        require_filter((header, file[0].header), band, path)
        wcs = celestial_wcs(header)
        factor = per_reference_pixel(_i2d_unit(header, wcs, image.where), wcs, image.where)
        weight = extension(file, path, "WHT")
        planes[band] = (Plane(band, image, wcs, factor, weight, zero_is_no_data=weight is None),)
    return planes


def _i2d_unit(header: fits.Header, wcs: WCS | None, where: str) -> float:
    """Return nJy for one pixel unit."""
    unit, area = str(header.get("BUNIT", "")).replace(" ", ""), header.get("PIXAR_SR")
    if unit != "MJy/sr":
        raise UnknownUnit(
            f"{where}: BUNIT is {unit or None!r}, a calibrated i2d image is in MJy/sr; nothing is guessed"
        )
    if not isinstance(area, int | float) or not 0 < area < math.inf:
        raise UnknownUnit(f"{where}: PIXAR_SR is {area!r}, so a pixel has no flux; nothing is guessed")
    if wcs is not None:
        found = math.radians(pixel_arcsec(wcs) / 3600) ** 2
        if abs(area / found - 1) > AREA_STRAY.value:
            raise UnknownUnit(
                f"{where}: PIXAR_SR is {area:.4g} sr and the WCS has pixels of {found:.4g} sr, so the image was binned "
                "and its unit may be old; describe it in a --survey file"
            )
    # A surface brightness needs no area of its own; the nominal one strays from the pixel's by up to 3%.
    return float(found if wcs is not None else area) * float(UNIT.value)


def _mosaic_planes(files: OpenFiles, bands: Sequence[str] | None) -> Mapping[str, tuple[Plane, ...]]:
    planes = {}
    for band in bands or files.bands:
        image = files.image("image", band)
        if image is None:
            continue
        header = image.hdu.header
        require_filter((header,), re.sub("[nu]$", "", band) if _MARKED.fullmatch(band) else band, image.where)
        wcs = celestial_wcs(header)
        factor = per_reference_pixel(mosaic_unit(header, image.where), wcs, image.where)
        planes[band] = (Plane(band, image, wcs, factor, files.image("weight", band), zero_is_no_data=True),)
    return planes


def mosaic_unit(header: fits.Header, where: str) -> float:
    """Return nJy for one pixel unit of a grizli mosaic, from BUNIT and PHOTFNU (Jy).

    Raises
    ------
    UnknownUnit
        If neither says it, or they disagree.
    """
    text = str(header.get("BUNIT", "") or "").strip()
    match = _MOSAIC_BUNIT.fullmatch(text)
    try:
        by_unit = float(match[1]) if match else nanojansky_per_unit(text) if text else None
    except UnknownUnit as error:
        raise UnknownUnit(f"{where}: {error}") from error
    photfnu = header.get("PHOTFNU")
    by_photfnu = photfnu * 1e9 if isinstance(photfnu, int | float) and 0 < photfnu < math.inf else None
    if by_unit is None and by_photfnu is None:
        raise UnknownUnit(f"{where}: neither BUNIT nor PHOTFNU ({photfnu!r}) says the unit; nothing is guessed")
    if by_unit is None or by_photfnu is None:
        return float(by_unit or by_photfnu or 0)
    if abs(by_unit - by_photfnu) > _STRAY_UNIT * by_photfnu + _MOSAIC_BUNIT_ROUNDING:
        raise UnknownUnit(
            f"{where}: BUNIT is {text!r} and PHOTFNU {photfnu} Jy, which is {by_photfnu:.4g} nJy; correct the wrong one"
        )
    return float(by_photfnu)


def _recognise_i2d(file: fits.HDUList) -> str | None:
    telescope = str(file[0].header.get("TELESCOP", "")).strip()
    if telescope == "JWST" and any(hdu.name == HDUS.value for hdu in file):
        return "header TELESCOP = JWST, extension SCI and _i2d at the end of the names"
    return None


def _recognise_mosaic(file: fits.HDUList) -> str | None:
    keys = [key for key in ("GRIZLIV", "PHOTFNU", "OPHOTFNU") if any(key in hdu.header for hdu in file)]
    return f"header keywords {', '.join(keys)} and <field>-<filter>_drz_sci names" if keys else None


# A narrow filter stands in NIRCam's pupil wheel beside a wide one, which passes more and says less.
_BESIDE: Final = r"(?:clearp?-|f150w2-|f322w2-|f444w-)?"
_AFTER: Final = r"(?:-clearp?|-f444w)?"
_MARKED: Final = re.compile(r"f\d{3}[wmn2lpx]+[nu]")  # grizli's mark for NIRISS (n) and UVIS (u)

_BANDS: Final = (
    "f070w f090w f115w f140m f150w f150w2 f162m f164n f182m f187n f200w f210m f212n f250m f277w f300m f322w2 f323n "
    "f335m f356w f360m f405n f410m f430m f444w f460m f466n f470n f480m "
    "f560w f770w f1000w f1130w f1280w f1500w f1800w f2100w f2550w"
)

SURVEY: Final = Survey(
    name="jwst",
    title="JWST imaging (i2d, and grizli mosaics)",
    bands=tuple(_BANDS.split()),
    roles={},
    layouts=(
        Layout(
            name="i2d",
            scope="tile",
            names="jw<program>-<observation>_<target>_<instrument>_<pupil>-<filter>_i2d.fits",
            pattern=re.compile(
                rf"(?P<tile>.+?[-_]){_BESIDE}(?P<band>f\d{{3,4}}(?:w2?|[mn])){_AFTER}(?P<rest>[-_].+?)?"
                r"_i2d\.fits(?:\.gz|\.fz)?"
            ),
            planes=_i2d_planes,
            recognise=_recognise_i2d,
            by_folder=False,
        ),
        Layout(
            name="mosaic",
            scope="tile",
            names="<field>-grizli-<version>-<filter>_{drz,drc}_{sci,wht}.fits.gz",
            pattern=re.compile(
                rf"(?P<tile>.+?)(?:-grizli-(?P<version>v[\d.]+))?-{_BESIDE}"
                rf"(?P<band>f\d{{3,4}}(?:lp|w2?|[mnx])[nu]?){_AFTER}_dr[cz]_(?P<kind>sci|wht)\.fits(?:\.gz|\.fz)?"
            ),
            kinds={"sci": "image", "wht": "weight"},
            planes=_mosaic_planes,
            recognise=_recognise_mosaic,
            by_folder=False,
        ),
    ),
    facts=(UNIT, HDUS, AREA_STRAY, MOSAIC_UNIT, MOSAIC_WEIGHT),
)
