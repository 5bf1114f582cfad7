"""DESI Legacy Imaging Surveys: bricks, and the cutout service's three forms."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from astropy.io import fits
from astropy.wcs import WCS

from galembed.errors import MissingBand, UnknownUnit, UnreadableInput
from galembed.photometry import nanojansky_per_unit
from galembed.planes import OpenFiles, Pixels, Plane, celestial_wcs, contents
from galembed.surveys import Evidence, Fact, Layout, Survey

UNIT: Final = Fact(
    "unit of the pixels, per (0.262 arcsec)^2 whatever their sampling",
    "nanomaggy",
    Evidence.SEEN,
    "legacypipe coadds.py (BUNIT); cutout service: a galaxy served at 0.1 and 0.262 arcsec/px has equal pixel values",
)
PIXEL: Final = Fact("native pixel, arcsec", 0.262, Evidence.SEEN, "legacysurvey.org DR10 files.rst; CD of a DR6 brick")
OVERLAP: Final = Fact(
    "overlap that a cutout may rely on, arcsec in all",
    43.0,
    Evidence.DOCUMENTED,
    "3600 px of 0.262 arcsec on a 0.25 deg grid",
)
NO_DATA_BITS: Final = Fact(
    "bits of maskbits that mean no data: ALLMASK of each band (bit 12, large galaxies, is not masked)",
    {"g": 1 << 5, "r": 1 << 6, "z": 1 << 7, "i": 1 << 15},
    Evidence.DOCUMENTED,
    "legacysurvey.org DR10 bitmasks.rst",
)
STAR_BITS: Final = Fact(
    "bits of maskbits that mean light of a star: BRIGHT and MEDIUM",
    1 << 1 | 1 << 11,
    Evidence.DOCUMENTED,
    "legacysurvey.org DR10 bitmasks.rst",
)

MAPS: Final = Fact(
    "maps whose value at a source is carried: seeing (FWHM) and depth for galaxies",
    {"psfsize": "arcsec", "galdepth": "nanomaggy-2"},
    Evidence.DOCUMENTED,
    "legacysurvey.org DR10 files.rst",
)

_FACTOR: Final = nanojansky_per_unit(UNIT.value)


def _brick_planes(files: OpenFiles, bands: Sequence[str] | None) -> Mapping[str, tuple[Plane, ...]]:
    planes = {}
    for band in bands or files.bands:
        image = files.image("image", band)
        if image is None:
            continue
        _require_unit(image)
        weight = files.image("weight", band)
        mask = files.open("mask")
        planes[band] = (
            _plane(
                band,
                image,
                celestial_wcs(image.hdu.header),
                weight,
                # HDU 1 is the optical mask, the two others are WISE's.
                Pixels(mask[1], f"{files.path('mask')}[1]") if mask is not None and len(mask) > 1 else None,
            ),
        )
    return planes


def _place(tile: str) -> tuple[float, float]:
    """Return the centre of a brick from its name: ``0421p022`` is RA 42.1, Dec +2.2."""
    name = tile.removeprefix("legacysurvey-")
    return int(name[:4]) / 10, (1 if name[4] == "p" else -1) * int(name[5:]) / 10


def _recognise_brick(file: fits.HDUList) -> str | None:
    units = {str(hdu.header["BUNIT"]).strip() for hdu in file if hdu.is_image and "BUNIT" in hdu.header}
    return None if units - {UNIT.value} else "legacysurvey-<brick>-image-<band> names"


def _cutout_planes(files: OpenFiles, bands: Sequence[str] | None) -> Mapping[str, tuple[Plane, ...]]:
    file, path = files.open("image"), files.path("image")
    assert file is not None
    assert path is not None
    kinds: dict[str, list[tuple[int, Any]]] = {"image": [], "invvar": [], "maskbits": []}
    for number, hdu in enumerate(file):
        if hdu.is_image and hdu.header.get("NAXIS", 0) >= 2 and 0 not in (hdu.shape or (0,)):
            kind = str(hdu.header.get("IMAGETYP", hdu.name) or "image").strip().lower()
            kinds.get(kind, kinds["image"] if kind == "primary" else []).append((number, hdu))
    planes: dict[str, tuple[Plane, ...]] = {}
    for number, hdu in kinds["image"]:
        pieces = _by_band(hdu, number, path)
        if hdu.header["NAXIS"] == 3 or "BAND" not in hdu.header:
            weights = {band: p for n, other in kinds["invvar"] for band, p in _by_band(other, n, path, pieces).items()}
        else:
            weights = {
                band: Pixels(other, f"{path}[{n}]")
                for band in pieces
                for n, other in kinds["invvar"]
                if _same_piece(hdu.header, other.header)
            }
        wcs = celestial_wcs(hdu.header) if pieces else None
        for band, image in pieces.items():
            _require_unit(image)
            plane = _plane(band, image, wcs, weights.get(band), _mask_of(hdu.header, kinds["maskbits"], path))
            planes[band] = (*planes.get(band, ()), plane)
    if not planes:
        raise MissingBand(f"{path}: no image with band keywords (BANDS, BAND0... or BAND); {contents(file)}")
    if not any(name in hdu.header for hdu in file for name in ("IMAGETYP", "SURVEY", "CTYPE1")):
        raise UnreadableInput(
            f"{path}: no header tells what it is (IMAGETYP, SURVEY) or where on the sky (CTYPE1), as in the viewer's "
            "images of the PSF; take it out of the folder, or describe the files (--survey) if it shows a galaxy"
        )
    return planes


_PIECE: Final = ("BRICK", "BRICK_X0", "BRICK_Y0")


def _same_piece(image: fits.Header, other: fits.Header) -> bool:
    return all(image.get(key) == other.get(key) for key in ("BAND", *_PIECE))


def _mask_of(image: fits.Header, masks: Sequence[tuple[int, Any]], path: str) -> Pixels | None:
    """Return the mask of a piece: the only one, or that of the same brick and place."""
    fitting = [
        (number, hdu)
        for number, hdu in masks
        if len(masks) == 1 or all(image.get(key) == hdu.header.get(key) for key in _PIECE)
    ]
    if masks and len(fitting) != 1:
        raise UnreadableInput(
            f"{path}: {len(fitting)} of its {len(masks)} MASKBITS belong to {image.get('BRICK', 'an image')} "
            f"({', '.join(_PIECE)}); fetch it again"
        )
    return Pixels(fitting[0][1], f"{path}[{fitting[0][0]}]") if fitting else None


def _by_band(hdu: Any, number: int, path: str, like: Sequence[str] | Mapping[str, Any] = ()) -> dict[str, Pixels]:
    """Return the planes of an HDU by band; `like` gives the bands where its header does not."""
    names = cube_bands(hdu.header) or list(like)
    where = f"{path}[{number}]"
    if hdu.header["NAXIS"] == 3:
        if len(names) != hdu.shape[0]:
            raise UnreadableInput(f"{where}: {hdu.shape[0]} planes and {len(names)} band name(s) ({' '.join(names)})")
        return {band: Pixels(hdu, where, index) for index, band in enumerate(names)}
    if hdu.header["NAXIS"] == 2 and len(names) == 1:
        return {names[0]: Pixels(hdu, where)}
    return {}


def cube_bands(header: fits.Header) -> list[str]:
    """Return band names from `BAND0`, `BAND1`... or `BAND`, else from `BANDS` (``grz`` or ``g,r,z``)."""
    numbered = [str(header[key]).strip() for key in (f"BAND{i}" for i in range(40)) if key in header]
    if len(numbered) > 1:
        return numbered
    text = str(header.get("BANDS", "")).strip()
    if text:
        return [part.strip() for part in text.split(",")] if "," in text else list(text)
    return numbered or ([str(header["BAND"]).strip()] if "BAND" in header else [])


def _recognise_cutout(file: fits.HDUList) -> str | None:
    for hdu in file:
        keys = [key for key in ("IMAGETYP", "IMAGEW", "BRICK_X0") if key in hdu.header]
        if keys and hdu.is_image and cube_bands(hdu.header):
            return f"header keywords {', '.join(keys)} and bands {''.join(cube_bands(hdu.header))}"
    return None


def _require_unit(image: Pixels) -> None:
    unit = str(image.hdu.header.get("BUNIT", "") or "").strip()
    if unit and unit.lower() not in (UNIT.value, "nanomaggies"):
        raise UnknownUnit(f"{image.where}: BUNIT is {unit!r}, the Legacy Surveys' images are in {UNIT.value}")


def _plane(band: str, image: Pixels, wcs: WCS | None, weight: Pixels | None, mask: Pixels | None) -> Plane:
    return Plane(
        band=band,
        image=image,
        wcs=wcs,
        factor=_FACTOR,
        weight=weight,
        mask=mask,
        no_data_bits=NO_DATA_BITS.value.get(band, 0),
        star_bits=STAR_BITS.value,
        # Exact zeros stand where no exposure reached.
        zero_is_no_data=weight is None,
    )


SURVEY: Final = Survey(
    name="legacy",
    title="DESI Legacy Imaging Surveys (DR9, DR10)",
    bands=("g", "r", "i", "z"),
    roles={"blue": "g", "green": "r", "red": "z"},
    layouts=(
        Layout(
            name="brick",
            scope="tile",
            names="legacysurvey-<brick>-{image,invvar,psfsize,galdepth}-<band>.fits.fz, "
            "legacysurvey-<brick>-maskbits.fits.fz",
            pattern=re.compile(
                r"(?P<tile>legacysurvey-\d{4}[pm]\d{3})-(?P<kind>image|invvar|maskbits|psfsize|galdepth)"
                r"(?:-(?P<band>\w+))?\.fits(?:\.fz|\.gz)?"
            ),
            kinds={
                "image": "image",
                "invvar": "weight",
                "maskbits": "mask",
                "psfsize": "psfsize",
                "galdepth": "galdepth",
            },
            carried=MAPS.value,
            planes=_brick_planes,
            recognise=_recognise_brick,
            place=_place,
        ),
        Layout(
            name="cutout",
            scope="cutout",
            names="any name; a cube or 2-D image with BANDS or BAND0..., or one extension per (brick, band)",
            pattern=re.compile(r"(?P<tile>.+?)\.(?:fits|fit|fts)(?:\.fz|\.gz|\.bz2)?", re.IGNORECASE),
            planes=_cutout_planes,
            recognise=_recognise_cutout,
        ),
    ),
    facts=(UNIT, PIXEL, OVERLAP, NO_DATA_BITS, STAR_BITS, MAPS),
)
