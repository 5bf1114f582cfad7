"""Hyper Suprime-Cam SSP (PDR2, PDR3): coadd patches and the cutout service's files, one band each."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from astropy.io import fits

from galembed.errors import MissingBand, UnknownUnit, UnreadableInput
from galembed.photometry import nanojansky_per_count
from galembed.planes import OpenFiles, Pixels, Plane, celestial_wcs, contents, per_reference_pixel, pixel_arcsec
from galembed.surveys import Evidence, Fact, Layout, Survey

_HEADER = "header of a PDR2 wide cutout"
ZERO_POINT: Final = Fact(
    "AB magnitude of one count, from the header's FLUXMAG0 (27.0 in PDR2 and PDR3)", 27.0, Evidence.SEEN, _HEADER
)
PIXEL: Final = Fact("native pixel, arcsec", 0.168, Evidence.SEEN, _HEADER + " (CD1_1)")
OVERLAP: Final = Fact("overlap of patches, pixels", 100, Evidence.UNVERIFIED, "not used; patches are aligned by WCS")
NO_DATA_PLANES: Final = Fact(
    "mask planes that mean no data; their bits are read from the mask's own MP_ keywords",
    ("BAD", "NO_DATA"),
    Evidence.UNVERIFIED,
    "Multimodal Universe's HSC script masks bits 0 BAD, 1 SAT, 8 NO_DATA; numbering differs between releases",
)
STAR_PLANES: Final = Fact(
    "mask planes that mean light of a bright star", ("BRIGHT_OBJECT", "SAT"), Evidence.UNVERIFIED, "HSC pipeline names"
)


_MASK_BITS: Final = 32


def _planes(files: OpenFiles, bands: Sequence[str] | None) -> Mapping[str, tuple[Plane, ...]]:
    planes = {}
    for band in bands or files.bands:
        file, path = files.open("image", band), files.path("image", band)
        if file is None or path is None or ("image", band) not in files.files:
            continue
        _require_filter(file, band, path)
        image, mask = _image_and_mask(file, path)
        wcs = celestial_wcs(image.hdu.header)
        if wcs is not None:
            PIXEL.confirmed(pixel_arcsec(wcs), image.where)
        planes[band] = (
            Plane(
                band=band,
                image=image,
                wcs=wcs,
                factor=per_reference_pixel(nanojansky_per_count(zero_point(file, path)), wcs, path),
                mask=mask,
                no_data_bits=_bits(mask, NO_DATA_PLANES.value, required=True),
                star_bits=_bits(mask, STAR_PLANES.value, required=False),
            ),
        )
    return planes


def zero_point(file: fits.HDUList, path: str) -> float:
    """Return the AB magnitude of one count.

    Raises
    ------
    UnknownUnit
        If no header has a positive FLUXMAG0.
    """
    value = next((hdu.header["FLUXMAG0"] for hdu in file if "FLUXMAG0" in hdu.header), None)
    if not isinstance(value, int | float) or not np.isfinite(value) or value <= 0:
        raise UnknownUnit(f"{path}: FLUXMAG0 is {value!r}, so its counts have no zero point; nothing is guessed")
    return float(2.5 * np.log10(value))


def _image_and_mask(file: fits.HDUList, path: str) -> tuple[Pixels, Pixels | None]:
    """Return the image and, where it is not an empty HDU, the mask; by name, else by the pipeline's order."""
    named = {hdu.name: (number, hdu) for number, hdu in enumerate(file)}
    number, hdu = named.get("IMAGE") or (1, file[1] if len(file) > 1 else file[0])
    if not hdu.is_image or len(hdu.shape or ()) != 2 or 0 in hdu.shape:
        raise UnreadableInput(f"{path}: HDU {number} holds no image; {contents(file)}")
    at, mask = named.get("MASK") or (2, file[2] if len(file) > 2 else None)
    present = mask is not None and mask.is_image and len(mask.shape or ()) == 2 and 0 not in mask.shape
    return Pixels(hdu, f"{path}[{number}]"), Pixels(mask, f"{path}[{at}]") if present else None


def _bits(mask: Pixels | None, names: Sequence[str], *, required: bool) -> int:
    """Return the bits of named mask planes, from the mask header's MP_<name> = bit number."""
    if mask is None:
        return 0
    known = {key[3:]: int(value) for key, value in mask.hdu.header.items() if key.startswith("MP_")}
    if required and not any(name in known for name in names):
        raise UnreadableInput(
            f"{mask.where}: the mask names none of the planes {', '.join(names)} (MP_ keywords), and bit numbers "
            "differ between releases; fetch the file with its full header"
        )
    return sum(1 << known[name] for name in names if 0 <= known.get(name, -1) < _MASK_BITS)


def _require_filter(file: fits.HDUList, band: str, path: str) -> None:
    named = next((str(hdu.header["FILTER"]).strip() for hdu in file if "FILTER" in hdu.header), None)
    if named is not None and _band(named) != band:
        raise MissingBand(f"{path}: its name says band {band}, its header FILTER = {named!r}; rename it")


def _band(text: str) -> str:
    """Return ``i`` for ``HSC-I``, ``HSC-I2`` and ``i``."""
    return text.removeprefix("HSC-").rstrip("2").lower()


def _recognise(file: fits.HDUList) -> str | None:
    if any("FLUXMAG0" in hdu.header for hdu in file):
        return "header keyword FLUXMAG0 and a filter HSC-<band> in the names"
    return None


_BANDS: Final = {spelt: _band(spelt) for band in "GRIZY" for spelt in (f"HSC-{band}", f"HSC-{band}2")}

SURVEY: Final = Survey(
    name="hsc",
    title="Hyper Suprime-Cam SSP (PDR2, PDR3)",
    bands=("g", "r", "i", "z", "y"),
    roles={"blue": "g", "green": "r", "red": "i"},
    layouts=(
        Layout(
            name="patch",
            scope="tile",
            names="calexp-HSC-<BAND>-<tract>-<patch>.fits",
            pattern=re.compile(r"(?P<kind>calexp)-(?P<band>HSC-[GRIZY]2?)-(?P<tile>\d+-\d+,\d+)\.fits(?:\.fz|\.gz)?"),
            kinds={"calexp": "image"},
            band_names=_BANDS,
            planes=_planes,
            recognise=_recognise,
            by_folder=False,
        ),
        Layout(
            name="cutout",
            scope="cutout",
            names="<name>_HSC-<BAND>.fits, or the service's <n>-cutout-HSC-<BAND>-<tract>-<rerun>.fits",
            pattern=re.compile(
                r"(?!calexp-)(?P<tile>.+?[-_])(?P<band>HSC-[GRIZY]2?)(?P<rest>[-_].+)?\.fits(?:\.fz|\.gz)?"
            ),
            band_names=_BANDS,
            planes=_planes,
            recognise=_recognise,
        ),
    ),
    facts=(ZERO_POINT, PIXEL, OVERLAP, NO_DATA_PLANES, STAR_PLANES),
)
