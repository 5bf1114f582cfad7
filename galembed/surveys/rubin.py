"""Rubin Observatory DP1: deep coadds, and the cutout service's files of them. Visit images and DP2 are refused."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from astropy.io import fits
from astropy.wcs import WCS

from galembed.errors import MissingBand, UnreadableInput
from galembed.planes import (
    OpenFiles,
    Pixels,
    Plane,
    celestial_wcs,
    contents,
    header_unit,
    per_reference_pixel,
    pixel_arcsec,
)
from galembed.surveys import Evidence, Fact, Layout, Survey

_COADD = "dp1.lsst.io, Deep coadd"

UNIT: Final = Fact("unit of the pixels (BUNIT has to say it)", "nJy", Evidence.DOCUMENTED, _COADD)
PIXEL: Final = Fact(
    "pixel of a coadd, arcsec", 0.2, Evidence.UNVERIFIED, "legacypipe lsst.py; each file's WCS has to agree"
)
WCS_RULE: Final = Fact(
    "a coadd's WCS is the exact TAN of its tract. The header's CRPIX counts in the file's own pixels: it already holds "
    "the patch's offset, and CRPIX - LTV is the tract's reference pixel, one for all bands",
    "CRPIX as it stands",
    Evidence.DOCUMENTED,
    _COADD + "; lsst/afw ExposureFitsReader. The same writer's HSC files have CRPIX - LTV = (18000, 18000)",
)
OVERLAP: Final = Fact("overlap of patches and tracts, pixels", 200, Evidence.DOCUMENTED, "dmtn-326.lsst.io")
NO_DATA_PLANE: Final = Fact(
    "mask plane that means no data; its bit is read from the mask's own MP_ keyword",
    "NO_DATA",
    Evidence.UNVERIFIED,
    "name in the Science Pipelines (HSC, kbmod); the file's own header has to give it",
)
WEIGHT: Final = Fact("VARIANCE is in nJy^2; no data where it is not > 0", "nJy^2", Evidence.DOCUMENTED, _COADD)
DATASET: Final = Fact(
    "dataset type that is read (keywords BTLRNAME or LSST BUTLER DATASETTYPE)",
    "deep_coadd",
    Evidence.DOCUMENTED,
    "dp1.lsst.io, Known issues: the FITS WCS of visit images is approximate, and was wrong before 2026-01-08",
)
CUTOUT: Final = Fact(
    "keywords of a cutout: its dataset, its data ID in pairs, and the circle that it was cut with, deg",
    ("BTLRNAME", "BTLRKnnn", "BTLRVnnn", "ST_RA", "ST_DEC", "ST_RAD"),
    Evidence.DOCUMENTED,
    "lsst/dax_images_cutout, _image_cutout.py and stencils.py",
)
CELLS: Final = Fact(
    "keyword that only a DP2 CellCoadd's mask has", "MSKN0000", Evidence.DOCUMENTED, "legacypipe lsst.py (DP2)"
)


def _planes(files: OpenFiles, bands: Sequence[str] | None) -> Mapping[str, tuple[Plane, ...]]:
    planes: dict[str, tuple[Plane, ...]] = {}
    for name in bands or files.bands or ("",):
        file, path = files.open("image", name), files.path("image", name)
        if file is None or path is None:
            continue
        band = _band(file, name if ("image", name) in files.files else "", path)
        if band in planes or (bands and band != name):
            continue
        planes[band] = (_plane(file, band, path),)
    _require_one_tract([plane for (plane,) in planes.values()])
    return planes


def _plane(file: fits.HDUList, band: str, path: str) -> Plane:
    _require_deep_coadd(file, path)
    image = _named(file, "IMAGE", path)
    if image is None:
        raise UnreadableInput(f"{path}: no HDU named IMAGE with an image; {contents(file)}")
    mask = _named(file, "MASK", path)
    wcs = celestial_wcs(image.hdu.header)
    if wcs is not None:
        PIXEL.confirmed(pixel_arcsec(wcs), image.where)
        _require_own_centre(wcs, image, file[0].header)
    # The pipeline leaves everything but the WCS in the primary header (INHERIT).
    header = image.hdu.header if "BUNIT" in image.hdu.header else file[0].header
    return Plane(
        band=band,
        image=image,
        wcs=wcs,
        factor=per_reference_pixel(header_unit(header, image.where), wcs, image.where),
        weight=_named(file, "VARIANCE", path),
        mask=mask,
        no_data_bits=0 if mask is None else 1 << _bit(mask, NO_DATA_PLANE.value),
    )


def _named(file: fits.HDUList, name: str, path: str) -> Pixels | None:
    """Return a plane by EXTNAME, whatever the order; None if it is absent or empty."""
    for number, hdu in enumerate(file):
        if hdu.name == name and hdu.is_image:
            return Pixels(hdu, f"{path}[{number}]") if len(hdu.shape or ()) == 2 and 0 not in hdu.shape else None
    return None


def _bit(mask: Pixels, name: str) -> int:
    bit = mask.hdu.header.get(f"MP_{name}")
    if not isinstance(bit, int) or isinstance(bit, bool):
        raise UnreadableInput(
            f"{mask.where}: the mask does not name its plane {name} (keyword MP_{name}), and bit numbers differ "
            "between releases; fetch the file with its full header"
        )
    return bit


def _data_id(header: fits.Header) -> dict[str, str]:
    """Return what a primary header says of the dataset: its type and its dimensions."""
    found = {
        key.removeprefix("LSST BUTLER DATAID ").lower(): str(header[key]).strip()
        for key in header
        if key.startswith("LSST BUTLER DATAID ")
    }
    # The cutout service writes pairs instead: BTLRK000 = 'band', BTLRV000 = 'g'.
    found |= {
        str(header[key]).strip().lower(): str(header[f"BTLRV{key[5:]}"]).strip()
        for key in header
        if re.fullmatch(r"BTLRK\d{3}", key) and f"BTLRV{key[5:]}" in header
    }
    kind = header.get("BTLRNAME", header.get("LSST BUTLER DATASETTYPE"))
    return found if kind is None else found | {"dataset type": str(kind).strip()}


def _band(file: fits.HDUList, named: str, path: str) -> str:
    """Return the band that the name gives, else the header, after comparing the two."""
    told = _data_id(file[0].header).get("band", "")
    if named and told and named != told:
        raise MissingBand(f"{path}: its name says band {named}, its header {told}; rename it")
    if not named and not told:
        raise MissingBand(f"{path}: neither its name nor its header says which band it is; name it <name>_<band>.fits")
    return named or told


def _require_deep_coadd(file: fits.HDUList, path: str) -> None:
    kind = _data_id(file[0].header).get("dataset type", DATASET.value)
    bent = next((h for h in file if str(h.header.get("CTYPE1", "")).strip().endswith("-SIP")), None)
    if kind != DATASET.value or bent is not None:
        what = f"is a {kind}" if kind != DATASET.value else "has a TAN-SIP WCS, which only single visits have"
        raise UnreadableInput(
            f"{path} {what}: only deep coadds are read, since the FITS WCS of visits is approximate and was wrong "
            "before 2026-01-08; take the cutout from the deep_coadd"
        )
    if any(CELLS.value in hdu.header for hdu in file):
        raise UnreadableInput(f"{path}: {_NO_CELLS}")


def _require_own_centre(wcs: WCS, image: Pixels, primary: fits.Header) -> None:
    """Check that a cutout's WCS puts the circle that it was cut with on the cutout.

    The service's quick modes have shifted CRPIX by the position in the tract instead of that in the patch, which
    puts the cutout up to a tract away.
    """
    place = [primary.get(key) for key in ("ST_RA", "ST_DEC")]
    if not all(isinstance(angle, int | float) for angle in place):
        return
    x, y = (float(at) for at in wcs.all_world2pix([place], 0, quiet=True)[0])
    height, width = image.shape
    # A circle over the coadd's edge is clipped: its centre may lie off the cutout, though no farther than its radius.
    off = np.hypot(max(-x, 0.0, x - width + 1), max(-y, 0.0, y - height + 1))
    if not off <= float(primary.get("ST_RAD", 0.0)) * 3600 / PIXEL.value + 1:
        raise UnreadableInput(
            f"{image.where}: its WCS puts the position that it was cut at (ST_RA {place[0]}, ST_DEC {place[1]}) at "
            f"pixel ({x:.0f}, {y:.0f}) of {width} x {height}, so the WCS is wrong; fetch it with CUTOUTMODE=Exposure"
        )


def _require_one_tract(planes: Sequence[Plane]) -> None:
    """Check the offsets of a patch: whole pixels, and against one reference pixel of the tract in every band."""
    tracts: list[tuple[Any, ...]] = []
    for plane in planes:
        header = plane.image.hdu.header
        offset = [header.get(key) for key in ("LTV1", "LTV2")]
        if plane.wcs is None or not all(isinstance(value, int | float) for value in offset):
            continue
        if any(value != round(value) for value in offset):
            raise UnreadableInput(
                f"{plane.image.where}: LTV1, LTV2 = {offset} are no whole pixels, so this is no part of a tract's "
                "grid; fetch it again, without resampling"
            )
        tracts.append((*(plane.wcs.wcs.crpix - offset), *plane.wcs.wcs.crval))
        if not np.allclose(tracts[0], tracts[-1], rtol=0, atol=1e-3):
            raise UnreadableInput(
                f"{plane.image.where} and {planes[0].image.where}: the reference pixel of the tract (CRPIX - LTV) and "
                f"its position differ, {tracts[-1]} and {tracts[0]}; one has a wrong WCS, or they are of two tracts"
            )


def _recognise_coadd(file: fits.HDUList) -> str | None:
    return "deep_coadd_<tract>_<patch>_<band> names" if len(file) else None


def _recognise_cutout(file: fits.HDUList) -> str | None:
    told = _data_id(file[0].header)
    if not told:
        return None
    return f"header keywords of Rubin's Butler (dataset type {told.get('dataset type', 'not given')})"


_NO_CELLS: Final = (
    "Rubin DP2 (CellCoadd) is another layout than DP1's, and is not read until one of its files has been seen; "
    "describe the files with --survey FILE.yaml"
)

SURVEY: Final = Survey(
    name="rubin",
    title="Rubin Observatory DP1 deep coadds",
    bands=("u", "g", "r", "i", "z", "y"),
    roles={"blue": "g", "green": "r", "red": "i"},
    layouts=(
        Layout(
            name="coadd",
            scope="tile",
            names="deep_coadd_<tract>_<patch>_<band>_<skymap>_<run>.fits",
            pattern=re.compile(r"(?P<tile>deep_coadd_\d+_\d+)_(?P<band>[ugrizy])_\w.*\.fits(?:\.fz|\.gz)?"),
            planes=_planes,
            recognise=_recognise_coadd,
            by_folder=False,
        ),
        Layout(
            name="cutout",
            scope="cutout",
            names="<name>_<band>.fits; or any name, each file a source in the band that its header gives",
            pattern=re.compile(
                r"(?!(?:deep|template)_coadd_)(?P<tile>.+?)(?:[-_](?P<band>[ugrizy]))?\.fits(?:\.fz|\.gz)?"
            ),
            planes=_planes,
            recognise=_recognise_cutout,
        ),
    ),
    facts=(UNIT, PIXEL, WCS_RULE, OVERLAP, NO_DATA_PLANE, WEIGHT, DATASET, CUTOUT, CELLS),
    refused={
        r"[_.-]DP2[^/]*$|(?i:cell_?coadd)[^/]*$": _NO_CELLS,
        r"(?:visit_image|difference_image)_[^/]*$": (
            "visit images are not read, since their FITS WCS is approximate and was wrong before 2026-01-08; give the "
            "folder of the deep coadds alone"
        ),
    },
)
