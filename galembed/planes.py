"""One band of one tile or cutout file, read as one unit with one mask: nJy per (0.262 arcsec)^2, NaN = no data."""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

import numpy as np
from astropy.io import fits
from astropy.utils.exceptions import AstropyWarning
from astropy.wcs import WCS
from astropy.wcs.utils import proj_plane_pixel_scales
from numpy.typing import NDArray

from galembed.errors import GalembedError, MissingBand, UnknownUnit, UnreadableInput
from galembed.files import as_stored, is_url, open_fits
from galembed.mappings import REFERENCE_PIXEL_ARCSEC
from galembed.photometry import nanojansky_per_unit

Box = tuple[slice, slice]

LARGEST_PLANE: Final = 2**31
"""Pixels. A damaged header may promise any number of them, and a compressed plane is allocated before it is read."""

LARGEST_FLUX: Final = 1e30
"""nJy per (0.262 arcsec)^2, AB magnitude -44. Beyond it is no light but damage or a mark; float32 ends at 3e38, and
sums over a cutout have to stay below."""

_CELESTIAL: Final = re.compile(r"RA--|DEC-|[A-Z]LON|[A-Z]LAT|[A-Z]{2}L[NT]")
"""How CTYPE begins on an axis of the sky (Calabretta & Greisen 2002, A&A 395, 1077, section 3.1)."""
_WCS_NUMBERS: Final = (
    *(f"{name}{axis}" for name in ("CRPIX", "CRVAL", "CDELT") for axis in (1, 2)),
    *(f"{name}{row}_{column}" for name in ("CD", "PC") for row in (1, 2) for column in (1, 2)),
)
_WCS_CARD: Final = re.compile(
    # FITS 4.0, tables 22 and 25 for images; SIP; distortions by table, which are refused for want of it; IRAF's.
    r"NAXIS|WCSAXES|C(TYPE|RPIX|RVAL|DELT|UNIT|ROTA)\d|(CD|PC|PV|PS)\d|L(ON|AT)POLE|RADE|EQUINOX|EPOCH"
    r"|[AB]P?_(ORDER|DMAX|\d)|C[PQ](DIS|ERR)|D[PQ]\d|D2IM|AXISCORR|DVERR|WAT\d|PROJP"
)
_LARGEST_PIXEL_ARCSEC: Final = 600.0
_SMALLEST_PIXEL_ARCSEC: Final = 1e-4
_MOST_STRETCHED: Final = 20.0
"""Longer over shorter side of a pixel, and one over the sine between its axes."""

_CHECKSUM_BLOCK: Final = 2**24
"""Bytes read at a time: an uncompressed Euclid tile is 1.5 GB."""


_DECOMPRESSOR: Final = threading.Lock()
_REENTRANT: Final = ("RICE_1", "GZIP_1", "GZIP_2", "NOCOMPRESS")
"""Decompressors that threads may be in at once."""


_dithers_filled = threading.Event()


@contextmanager
def _first_dithers() -> Iterator[None]:
    with _DECOMPRESSOR:
        yield
        _dithers_filled.set()


@dataclass(frozen=True)
class Pixels:
    """The array of one image HDU, or one plane of a cube, read when asked for.

    Attributes
    ----------
    hdu : astropy image HDU
    where : str
        File and HDU, for messages.
    index : int or None
        Plane of a cube.
    """

    hdu: Any
    where: str
    index: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(y, x)."""
        height, width = self.hdu.shape[-2:]
        return int(height), int(width)

    @property
    def compressed(self) -> bool:
        """Whether a section read decompresses tiles."""
        return isinstance(self.hdu, fits.CompImageHDU)

    def read(self, box: Box | None = None, *, keep: bool = False) -> NDArray[Any]:
        """Return (y, x) pixels as stored, scaled by BSCALE and BZERO; the whole plane without a box.

        Parameters
        ----------
        box : (slice, slice), optional
        keep : bool
            Let astropy keep a whole plane that is going to be read again; `forget` lets go of it.

        Raises
        ------
        UnreadableInput
            If the data are damaged.
        """
        try:
            if int(np.prod(self.shape)) > LARGEST_PLANE:
                raise ValueError(f"the header promises {self.shape} pixels")
            with self._turn(), warnings.catch_warnings(), np.errstate(over="ignore", invalid="ignore"):
                warnings.simplefilter("ignore", AstropyWarning)
                if keep and box is None:
                    data = self.hdu.data if self.index is None else self.hdu.data[self.index]
                else:
                    part = box or (slice(None), slice(None))
                    data = self.hdu.section[part] if self.index is None else self.hdu.section[(self.index, *part)]
            array = np.asarray(data)
            wanted = (
                self.shape
                if box is None
                else tuple(len(range(*part.indices(length))) for part, length in zip(box, self.shape, strict=True))
            )
            if array.shape != wanted:
                raise ValueError(f"{array.shape} pixels came out, not {wanted}")
        except GalembedError:
            raise
        except Exception as error:  # the decompressors raise many kinds, ValueError to zlib.error
            raise UnreadableInput(f"{self.where}: damaged ({type(error).__name__}: {error}); fetch it again") from error
        return array

    def forget(self) -> None:
        """Let go of a plane that `read` kept."""
        del self.hdu.data

    def _turn(self) -> AbstractContextManager[Any]:
        """Return what threads take turns by, where the decompressor cannot be in two places at once.

        astropy lets go of the interpreter around cfitsio, whose HCOMPRESS keeps its state in globals: two threads
        get each other's bits, now and then without an error. Its table of dithers is filled by whoever needs it first,
        and a second thread takes it half filled for whole.
        """
        if not self.compressed:
            return nullcontext()
        header = as_stored(self.hdu).header
        if header.get("ZCMPTYPE") not in _REENTRANT:
            return _DECOMPRESSOR
        if str(header.get("ZQUANTIZ", "")).startswith("SUBTRACTIVE_DITHER") and not _dithers_filled.is_set():
            return _first_dithers()
        return nullcontext()


@dataclass(frozen=True)
class Plane:
    """One band of one tile.

    Attributes
    ----------
    band : str
    image : Pixels
    wcs : WCS or None
        Celestial, two-dimensional.
    factor : float
        Flux of one (linear) pixel unit, nJy per (0.262 arcsec)^2.
    weight : Pixels or None
        No data where it is not > 0 (inverse variance, exposure, rms).
    mask : Pixels or None
    no_data_bits, star_bits : int
        Bits of `mask` that mean "no data", and "light of a bright star".
    zero_is_no_data : bool
        Whether an exact 0 in the image means "no data".
    linear : callable, optional
        Stored pixels to linear ones, for surveys that publish others.
    """

    band: str
    image: Pixels
    wcs: WCS | None
    factor: float
    weight: Pixels | None = None
    mask: Pixels | None = None
    no_data_bits: int = 0
    star_bits: int = 0
    zero_is_no_data: bool = False
    linear: Callable[[NDArray[Any]], NDArray[Any]] | None = None

    def __post_init__(self) -> None:
        for other in (self.weight, self.mask):
            if other is not None and other.shape != self.image.shape:
                raise UnreadableInput(
                    f"{other.where} has {other.shape} pixels and {self.image.where} {self.image.shape}; "
                    "they do not belong together"
                )
        if self.mask is not None and max(self.no_data_bits, self.star_bits) >> 63:
            raise UnreadableInput(
                f"{self.mask.where}: damaged (a mask has 63 bits at most, more are named); fetch it again"
            )
        if self.wcs is not None:
            height, width = self.image.shape
            with np.errstate(all="ignore"):
                middle = self.wcs.all_pix2world([((width - 1) / 2, (height - 1) / 2)], 0)
            if not np.isfinite(middle).all():
                raise UnreadableInput(
                    f"{self.image.where}: damaged (by its WCS the middle of the image is nowhere on the sky); "
                    "fetch it again"
                )

    @property
    def shape(self) -> tuple[int, int]:
        """(y, x)."""
        return self.image.shape

    @cached_property
    def pixel_arcsec(self) -> float | None:
        """Side of a square of a pixel's area, at the reference point; None without a WCS."""
        return None if self.wcs is None else pixel_arcsec(self.wcs)

    def read(self, box: Box | None = None) -> NDArray[np.float32]:
        """Return flux, nJy per (0.262 arcsec)^2; NaN where there is no data.

        Raises
        ------
        UnreadableInput
            If any of the files is damaged.
        """
        image = self.image.read(box)
        values = image if self.linear is None else self.linear(image)
        # A section of a compressed plane is nobody else's, and memory touched first costs as much as decompressing.
        own = values if self.image.compressed and values.dtype == np.float32 else None
        with np.errstate(over="ignore", invalid="ignore"):
            flux: NDArray[np.float32] = np.multiply(values, np.float32(self.factor), out=own, dtype=np.float32)
        if self.zero_is_no_data:
            flux[image == 0] = np.nan
        if self.weight is not None:
            flux[~(self.weight.read(box) > 0)] = np.nan
        if self.mask is not None and self.no_data_bits:
            flux[(self.bits(box) & self.no_data_bits) != 0] = np.nan
        wild = (flux > LARGEST_FLUX) | (flux < -LARGEST_FLUX)
        if wild.any():
            flux[wild] = np.nan
        return flux

    def bits(self, box: Box | None = None) -> NDArray[np.int64]:
        """Return the mask.

        Raises
        ------
        UnreadableInput
            If it does not hold integers.
        """
        assert self.mask is not None
        bits = self.mask.read(box, keep=True)
        if bits.dtype.kind not in "iu":
            raise UnreadableInput(f"{self.mask.where}: a mask holds integers, this has {bits.dtype}")
        return bits.astype(np.int64)


@dataclass(frozen=True)
class OpenFiles:
    """The files of one tile, opened when asked for and closed together.

    Attributes
    ----------
    uri : str
        Name of the tile or cutout.
    files : mapping of (kind, band) to str
        `kind` is ``image``, ``weight`` or ``mask``; `band` is empty where the file's name does not say.
    check : bool
        Compare data with their DATASUM, which takes reading them all; not needed for headers alone.
    """

    uri: str
    files: dict[tuple[str, str], str]
    check: bool = True
    _stack: ExitStack = field(default_factory=ExitStack)
    _opened: dict[str, fits.HDUList] = field(default_factory=dict)

    @property
    def bands(self) -> tuple[str, ...]:
        """Bands that the names of image files give, sorted."""
        return tuple(sorted({band for kind, band in self.files if kind == "image" and band}))

    def path(self, kind: str, band: str = "") -> str | None:
        """Return a file's path: the band's own, or the one for all bands."""
        return self.files.get((kind, band)) or self.files.get((kind, ""))

    def open(self, kind: str, band: str = "") -> fits.HDUList | None:
        """Return an open file, or None if the tile has none of that kind.

        Raises
        ------
        UnreadableInput
            If it cannot be opened.
        """
        path = self.path(kind, band)
        if path is None:
            return None
        if path not in self._opened:
            file = self._stack.enter_context(open_fits(path))
            if kind != "image" and not any(hdu.is_image and len(hdu.shape) > 1 for hdu in file):
                raise UnreadableInput(f"{path}: a {kind} file without an image in it; {contents(file)}; fetch it again")
            if self.check and not is_url(path):  # there, all bytes would have to travel
                require_checksums(file, path)
            self._opened[path] = file
        return self._opened[path]

    def image(self, kind: str, band: str = "") -> Pixels | None:
        """Return the only two-dimensional image of a file, or None if the tile has no such file.

        Raises
        ------
        UnreadableInput
            If the file holds no image or several.
        """
        file = self.open(kind, band)
        path = self.path(kind, band)
        if file is None or path is None:
            return None
        found = images(file, path)
        if len(found) != 1:
            raise UnreadableInput(f"{path}: {len(found)} images where one was expected; {contents(file)}")
        return found[0]

    def close(self) -> None:
        """Close every file."""
        self._stack.close()


def images(file: fits.HDUList, path: str, dimensions: int = 2) -> list[Pixels]:
    """Return the image HDUs of a file that have pixels."""
    return [
        Pixels(hdu, f"{path}[{number}]")
        for number, hdu in enumerate(file)
        if hdu.is_image and len(getattr(hdu, "shape", ()) or ()) == dimensions and 0 not in hdu.shape
    ]


def contents(file: fits.HDUList) -> str:
    """Return a file's HDUs in words, for messages."""
    described = [f"{number} {hdu.name or '-'} {getattr(hdu, 'shape', None) or ''}" for number, hdu in enumerate(file)]
    return "its HDUs are " + "; ".join(text.strip() for text in described[:8]) + ("; ..." if len(file) > 8 else "")


def require_bands(planes: Sequence[str], bands: Sequence[str], where: str) -> None:
    """Check that every asked band is there.

    Raises
    ------
    MissingBand
        Naming those that are there, and how to choose.
    """
    missing = [band for band in dict.fromkeys(bands) if band not in planes]
    if missing:
        present = ", ".join(dict.fromkeys(planes)) or "none"
        raise MissingBand(
            f"{where}: no band {', '.join(missing)}; it has {present}. Choose with --bands: one for all "
            f"(--bands {next(iter(planes), 'g')}), or one for each role (--bands red={next(iter(planes), 'g')})"
        )


def celestial_wcs(header: fits.Header) -> WCS | None:
    """Return the two-dimensional sky WCS of a header, or None if it has none.

    The oldest spelling of a rotation, ``PC001001`` (Pan-STARRS), is read as ``PC1_1``. An alternate WCS
    (``CTYPE1A``: HSC's pixel offsets) is never taken.

    Raises
    ------
    UnreadableInput
        If an axis is on the sky and the WCS cannot be used: cards are missing, are no numbers, or give a scale or
        place that no picture of the sky has (pixels over 10 arcmin, say).
    """
    if "PC001001" in header and "PC1_1" not in header:
        header = header.copy()
        for i in (1, 2):
            for j in (1, 2):
                if (old := f"PC00{i}00{j}") in header:
                    header[f"PC{i}_{j}"] = header[old]
                    del header[old]
    types = [str(header.get(f"CTYPE{axis}", "")).strip() for axis in (1, 2)]
    if not any(_CELESTIAL.match(name) for name in types):
        return None
    reason = "which no picture of the sky has"
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore", AstropyWarning)
            # wcslib takes its default for a number that is missing, or is none.
            cards = [card for card in header.cards if _WCS_CARD.match(card.keyword)]  # WCS spells all of them thrice
            values = {card.keyword: card.value for card in reversed(cards)}
            numbers = all(isinstance(values.get(key, 0.0), int | float) for key in _WCS_NUMBERS)
            paired = all((f"{name}1" in values) == (f"{name}2" in values) for name in ("CRPIX", "CRVAL"))
            wcs = WCS(fits.Header(cards), naxis=2)
            if numbers and paired and wcs.has_celestial and _plausible(wcs):
                if _equatorial(wcs):
                    return wcs
                reason = f"{wcs.wcs.radesys or 'its frame'}: only RA, then Dec, in ICRS or FK5 of J2000 is read"
    except Exception as error:  # wcslib and its wrappers refuse damaged headers in many ways
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    raise UnreadableInput(
        f"damaged: the sky WCS ({', '.join(name or 'nothing' for name in types)}) cannot be used ({reason}); "
        "fetch the file again, or delete CTYPE1 and CTYPE2 if it has no place on the sky"
    )


def _equatorial(wcs: WCS) -> bool:
    """Tell whether the axes are RA and Dec in ICRS, or in FK5 of J2000, which differs by less than 0.1 arcsec."""
    equinox = wcs.wcs.equinox
    return bool(
        (wcs.wcs.lng, wcs.wcs.lat) == (0, 1)
        and str(wcs.wcs.lngtyp).strip() == "RA"
        and (wcs.wcs.radesys.strip() in ("", "ICRS") or (wcs.wcs.radesys.strip() == "FK5" and equinox == 2000))
    )


def _plausible(wcs: WCS) -> bool:
    """Tell whether scale and reference point are ones that a picture of the sky can have."""
    scales = proj_plane_pixel_scales(wcs) * 3600
    longitude, latitude = wcs.wcs.crval[wcs.wcs.lng], wcs.wcs.crval[wcs.wcs.lat]
    return bool(
        np.all((scales > _SMALLEST_PIXEL_ARCSEC) & (scales < _LARGEST_PIXEL_ARCSEC))
        and scales.max() < _MOST_STRETCHED * scales.min()
        and abs(np.linalg.det(wcs.pixel_scale_matrix * 3600)) * _MOST_STRETCHED > scales.prod()
        and abs(longitude) <= 360
        and abs(latitude) <= 90
    )


def pixel_arcsec(wcs: WCS) -> float:
    """Return the side of a square of a pixel's area at the reference point, arcsec."""
    return float(np.sqrt(np.prod(proj_plane_pixel_scales(wcs))) * 3600)


def per_reference_pixel(factor: float, wcs: WCS | None, where: str) -> float:
    """Return nJy per (0.262 arcsec)^2 for one unit, from nJy per pixel for one unit.

    Raises
    ------
    UnknownUnit
        If there is no WCS: a flux per pixel is no surface brightness then.
    """
    if wcs is None:
        raise UnknownUnit(
            f"{where}: a flux per pixel needs a sky WCS to become a surface brightness, and there is none; "
            "say `pixel_arcsec:` in a description (--survey FILE.yaml)"
        )
    return factor * (REFERENCE_PIXEL_ARCSEC / pixel_arcsec(wcs)) ** 2


def header_unit(header: fits.Header, where: str, *, default: str | None = None) -> float:
    """Return nJy for one pixel unit, from BUNIT.

    Raises
    ------
    UnknownUnit
        If there is none and no default, or it is not one that becomes nJy.
    """
    unit = str(header.get("BUNIT", "") or "").strip() or default
    if unit is None:
        raise UnknownUnit(f"{where}: the header has no BUNIT, so its pixels have no unit; nothing is guessed")
    try:
        return nanojansky_per_unit(unit)
    except UnknownUnit as error:
        raise UnknownUnit(f"{where}: {error}") from error


def require_checksums(file: fits.HDUList, path: str) -> None:
    """Check the data of each HDU that carries a DATASUM (FITS 4.0, section 4.4.2.7).

    Raises
    ------
    UnreadableInput
        If the data are not those that were written.
    """
    for number, hdu in enumerate(file):
        stored = as_stored(hdu)
        expected = str(stored.header.get("DATASUM", "")).strip()
        info = hdu.fileinfo()
        if not expected.isdigit() or not info or not info["datSpan"]:
            continue
        stream = info["file"]
        stream.seek(info["datLoc"])
        if _ones_complement_sum(stream, info["datSpan"]) != int(expected):
            raise UnreadableInput(
                f"{path}[{number}]: damaged (its data do not match its DATASUM); fetch it again, or delete that "
                "keyword if a tool changed the data and left it"
            )


def _ones_complement_sum(stream: Any, size: int) -> int:
    total = 0
    for start in range(0, size, _CHECKSUM_BLOCK):
        raw = bytes(stream.read(min(_CHECKSUM_BLOCK, size - start)))
        total += int(np.frombuffer(raw + b"\0" * (-len(raw) % 4), ">u4").sum(dtype=np.uint64))
    while total >> 32:
        total = (total & 0xFFFFFFFF) + (total >> 32)
    return total
