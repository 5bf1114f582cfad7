"""Pan-STARRS1 stacks: skycells with asinh pixels and companion masks, and the cutout service's files, one band each."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final

import numpy as np
from astropy.io import fits
from numpy.typing import NDArray

from galembed.errors import MissingBand, UnknownUnit, UnreadableInput
from galembed.photometry import nanojansky_per_count
from galembed.planes import OpenFiles, Pixels, Plane, celestial_wcs, per_reference_pixel, pixel_arcsec
from galembed.surveys import Evidence, Fact, Layout, Survey

_STACKS = "STScI, PS1 Stack images"
_SERVICE = "STScI, PS1 Image Cutout Service: FITS image format, WCS and flux-scaling notes"
_FLAGS = "STScI, PS1 Pixel flags in Image Table Data"

ZERO_POINT: Final = Fact(
    "AB magnitude of one count per second of EXPTIME (keyword FPA.ZP)", 25.0, Evidence.DOCUMENTED, _STACKS
)
PIXEL: Final = Fact("native pixel, arcsec", 0.25, Evidence.DOCUMENTED, _SERVICE)
ASINH: Final = Fact(
    "pixels v of a file with BSOFTEN and BOFFSET are asinh magnitudes: counts = BOFFSET + 2 BSOFTEN sinh(v / this)",
    float(2.5 * np.log10(np.e)),
    Evidence.DOCUMENTED,
    _SERVICE + "; legacysurvey/imagine views.py. The service's own cutouts are linear and lack both keywords",
)
LARGEST: Final = Fact(
    "asinh pixels cannot be brighter than this, magnitudes above the softening (10^10 times): such a file was made "
    "linear and kept its keywords",
    25.0,
    Evidence.DOCUMENTED,
    "our rule; 16-bit pixels of a stack end near 11 (BZERO + 32767 BSCALE of a header in legacypipe panstarrs.py)",
)
BLANK: Final = Fact(
    "a stored integer equal to BLANK is no data", True, Evidence.DOCUMENTED, "FITS 4.0, section 4.4.2.5"
)
MASK_PLANES: Final = Fact(
    "values of named mask planes, where the mask's own MSKNAMnn and MSKVALnn do not give them",
    {"BLANK": 0x0008, "STARCORE": 0x1000},
    Evidence.DOCUMENTED,
    _FLAGS,
)
NO_DATA_PLANE: Final = Fact("mask plane that means no data", "BLANK", Evidence.DOCUMENTED, _FLAGS)
STAR_PLANE: Final = Fact("mask plane that means light of a bright star", "STARCORE", Evidence.DOCUMENTED, _FLAGS)
WEIGHT: Final = Fact(
    "the wt image is a variance; no data where it is not > 0",
    "variance",
    Evidence.DOCUMENTED,
    _STACKS + "; legacypipe panstarrs.py",
)


def _planes(files: OpenFiles, bands: Sequence[str] | None) -> Mapping[str, tuple[Plane, ...]]:
    planes = {}
    for band in bands or files.bands:
        if ("image", band) not in files.files:
            continue
        image = files.image("image", band)
        assert image is not None
        header = image.hdu.header
        _require_filter(header, band, image.where)
        wcs = celestial_wcs(header)
        PIXEL.confirmed(None if wcs is None else pixel_arcsec(wcs), image.where)
        mask = files.image("mask", band)
        planes[band] = (
            Plane(
                band=band,
                image=image,
                wcs=wcs,
                factor=per_reference_pixel(nanojansky_per_count(zero_point(header, image.where)), wcs, image.where),
                weight=files.image("weight", band),
                mask=mask,
                no_data_bits=_bit(mask, NO_DATA_PLANE.value),
                star_bits=_bit(mask, STAR_PLANE.value),
                linear=_from_asinh(header, image.where),
            ),
        )
    return planes


def zero_point(header: fits.Header, where: str) -> float:
    """Return the AB magnitude of one count of a stack: 25 + 2.5 log10(EXPTIME).

    Raises
    ------
    UnknownUnit
        If EXPTIME is not positive.
    UnreadableInput
        If FPA.ZP is there and is not 25.
    """
    seconds = header.get("EXPTIME")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not np.isfinite(seconds) or seconds <= 0:
        raise UnknownUnit(
            f"{where}: EXPTIME is {seconds!r}, and counts need it for their zero point; nothing is guessed"
        )
    if "FPA.ZP" in header:
        ZERO_POINT.confirmed(header["FPA.ZP"], where, tolerance=1e-4)
    return float(ZERO_POINT.value + 2.5 * np.log10(seconds))


def _from_asinh(header: fits.Header, where: str) -> partial[NDArray[np.float32]] | None:
    """Return what makes pixels linear, or None for pixels that are."""
    found = {key: header.get(key) for key in ("BOFFSET", "BSOFTEN")}
    if all(value is None for value in found.values()):
        return None
    numbers = [value for value in found.values() if isinstance(value, int | float) and np.isfinite(value)]
    if len(numbers) < len(found) or numbers[1] <= 0:
        raise UnknownUnit(
            f"{where}: asinh pixels need BOFFSET and a positive BSOFTEN, the header has {found}; fetch it again"
        )
    return partial(linear_counts, offset=float(numbers[0]), softening=float(numbers[1]), where=where)


def linear_counts(pixels: NDArray[Any], *, offset: float, softening: float, where: str = "") -> NDArray[np.float32]:
    """Return counts from asinh pixels.

    Parameters
    ----------
    pixels : ndarray
        Asinh magnitudes above the softening, as read (after BSCALE and BZERO). NaN, no data, stays.
    offset, softening : float
        BOFFSET and BSOFTEN, counts.
    where : str
        File and HDU, for the message.

    Returns
    -------
    ndarray, same shape, float32
        ``BOFFSET + 2 BSOFTEN sinh(v / (2.5 log10 e))``.

    Raises
    ------
    UnreadableInput
        If the pixels are linear already.

    References
    ----------
    `ASINH` names them.
    """
    values = np.array(pixels, np.float32)
    brightest = np.max(np.abs(values), where=np.isfinite(values), initial=0.0)
    if brightest > LARGEST.value:
        raise UnreadableInput(
            f"{where}: BSOFTEN says that pixels are asinh magnitudes, yet one is {brightest:.4g}; the file was made "
            "linear and kept the keywords. Remove BSOFTEN and BOFFSET from its header, or fetch it again"
        )
    values /= np.float32(ASINH.value)
    np.sinh(values, out=values)
    values *= np.float32(2 * softening)
    values += np.float32(offset)
    return values


def _bit(mask: Pixels | None, name: str) -> int:
    """Return the value of a named mask plane, by the mask's own header where it names any."""
    if mask is None:
        return 0
    header = mask.hdu.header
    named = {
        str(header[key]).strip(): int(header[f"MSKVAL{key[6:]}"])
        for key in header
        if key.startswith("MSKNAM") and f"MSKVAL{key[6:]}" in header
    }
    values: Mapping[str, int] = named or MASK_PLANES.value
    if name not in values:
        raise UnreadableInput(
            f"{mask.where}: the mask names no plane {name}, MSKNAM gives {', '.join(values)}; fetch the file again"
        )
    return values[name]


def _require_filter(header: fits.Header, band: str, where: str) -> None:
    """Compare the band with FPA.FILTER, which reads ``i.00000``."""
    named = str(header.get("FPA.FILTER", band)).strip()
    if named.partition(".")[0] != band:
        raise MissingBand(f"{where}: its name says band {band}, its header FPA.FILTER = {named!r}; rename it")


def _recognise_skycell(file: fits.HDUList) -> str | None:
    return "skycell.<projection>.<cell>.stk.<band> names" if len(file) else None


def _recognise_cutout(file: fits.HDUList) -> str | None:
    for hdu in file:
        keys = [key for key in ("FPA.ZP", "PSCAMERA", "STK_ID") if key in hdu.header]
        if keys:
            return f"header keywords {', '.join(keys)} and the band at the end of the names"
    return None


SURVEY: Final = Survey(
    name="panstarrs",
    title="Pan-STARRS1 3pi stacks",
    bands=("g", "r", "i", "z", "y"),
    roles={"blue": "g", "green": "r", "red": "i"},
    layouts=(
        Layout(
            name="skycell",
            scope="tile",
            names="rings.v3.skycell.<projection>.<cell>.stk.<band>.unconv{,.mask,.wt}.fits",
            pattern=re.compile(
                r"(?P<tile>(?!cutout_)\w+\.[vV]\d+\.skycell\.\d+\.\d+)\.stk\.(?P<band>[grizy])"
                r"\.unconv(?P<kind>(?:\.mask|\.wt)?)\.fits(?:\.fz|\.gz)?"
            ),
            kinds={"": "image", ".mask": "mask", ".wt": "weight"},
            planes=_planes,
            recognise=_recognise_skycell,
        ),
        Layout(
            name="cutout",
            scope="cutout",
            names="<name>_<band>.fits, or <name>.stk.<band>.unconv.fits",
            pattern=re.compile(
                r"(?!(?!cutout_)\w+\.[vV]\d+\.skycell\.)(?P<tile>.+)[-_.](?P<band>[grizy])(?:\.unconv)?\.fits(?:\.fz|\.gz)?"
            ),
            planes=_planes,
            recognise=_recognise_cutout,
        ),
    ),
    facts=(
        ZERO_POINT,
        PIXEL,
        ASINH,
        LARGEST,
        BLANK,
        MASK_PLANES,
        NO_DATA_PLANE,
        STAR_PLANE,
        WEIGHT,
    ),
)
