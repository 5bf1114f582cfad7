"""Any other survey: files whose headers say everything, or a description (YAML or TOML) that says what they do not.

::

    name: cfhtls                          # goes into the store's `survey` column
    files: "cfhtls_{tile}_{band}.fits"    # {tile} names a tile or cutout, {band} its band; more text may be a *
    scope: tile                           # tile (with a catalogue) or cutout (one source a file)
    bands: [g, r, i]                      # in the order of a cube's planes where the names hold no {band}
    roles: {blue: g, green: r, red: i}    # or choose with --bands
    zero_point: 30.0                      # AB magnitude of one count; or unit: nJy, uJy, nanomaggy...
    pixel_arcsec: 0.187                   # compared with the WCS; used where there is none
    hdu: SCI                              # name or number of the image; the only image without it
    weight: "cfhtls_{tile}_{band}_wht.fits"       # no data where it is not > 0; or weight_hdu: WHT in the same file
    mask: "cfhtls_{tile}_{band}_flag.fits"        # or mask_hdu: DQ
    no_data_bits: [0, 3]                  # bit numbers of the mask that mean no data
    zero_is_no_data: false
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import yaml
from astropy.io import fits

from galembed.errors import (
    ArtifactNotFound,
    BadRequest,
    GalembedError,
    MissingBand,
    UnknownUnit,
    UnreadableInput,
)
from galembed.mappings import REFERENCE_PIXEL_ARCSEC, ROLES
from galembed.photometry import nanojansky_per_count, nanojansky_per_unit
from galembed.planes import (
    OpenFiles,
    Pixels,
    Plane,
    celestial_wcs,
    contents,
    header_unit,
    images,
    per_reference_pixel,
    pixel_arcsec,
)
from galembed.surveys import SURVEYS, Evidence, Fact, Layout, Named, Survey
from galembed.surveys.legacy import cube_bands

_ENDING: Final = r"(?:\.fits|\.fit)?(?:\.gz|\.bz2|\.fz)?"
_STRAY_SCALE: Final = 0.01
"""Largest relative difference between a described pixel and the WCS."""


@dataclass(frozen=True)
class Description:
    """What a description file says; see the module for each item."""

    name: str
    bands: tuple[str, ...]
    files: str
    scope: str = "cutout"
    roles: Mapping[str, str] = field(default_factory=dict)
    zero_point: float | None = None
    unit: str | None = None
    pixel_arcsec: float | None = None
    hdu: str | int | None = None
    weight: str | None = None
    weight_hdu: str | int | None = None
    mask: str | None = None
    mask_hdu: str | int | None = None
    no_data_bits: tuple[int, ...] = ()
    zero_is_no_data: bool = False


def read_description(path: str | Path) -> Survey:
    """Read a survey's description.

    Raises
    ------
    ArtifactNotFound
        If there is no such file.
    BadRequest
        If an item is unknown, missing or makes no sense, naming it.
    """
    path = Path(path).resolve()
    if not path.exists():
        raise ArtifactNotFound(f"no survey description at {path}")
    try:
        text = path.read_text(encoding="utf-8")
        data = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise BadRequest(f"{path} cannot be read ({error})") from error
    if not isinstance(data, dict):
        raise BadRequest(f"{path}: a description is a list of `item: value` lines")
    known = Description.__dataclass_fields__
    unknown = sorted(set(data) - set(known))
    if unknown:
        raise BadRequest(f"{path}: unknown item(s) {', '.join(unknown)}; known are {', '.join(known)}")
    lacking = [name for name in ("name", "bands", "files") if not data.get(name)]
    if lacking:
        raise BadRequest(f"{path}: {', '.join(lacking)} missing")
    try:
        told = Description(
            **{
                **data,
                "name": str(data["name"]),
                "bands": tuple(str(band) for band in _listed(data, "bands")),
                "roles": {str(role): str(band) for role, band in (data.get("roles") or {}).items()},
                "zero_point": _number(data, "zero_point"),
                "pixel_arcsec": _number(data, "pixel_arcsec"),
                "no_data_bits": tuple(int(bit) for bit in _listed(data, "no_data_bits")),
            }
        )
        return _survey(_checked(told))
    except (TypeError, ValueError, AttributeError) as error:
        raise BadRequest(f"{path}: {error}") from error


def _listed(data: Mapping[str, Any], item: str) -> list[Any]:
    value = data.get(item) or []
    if not isinstance(value, list):
        raise ValueError(f"{item} is a list in brackets, got {value!r}")
    return value


def _number(data: Mapping[str, Any], item: str) -> float | None:
    value = data.get(item)
    try:
        number = None if value is None else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if number is not None and not math.isfinite(number):
        raise ValueError(f"{item} is a number, got {value!r}")
    return number


def _checked(told: Description) -> Description:
    if told.name in SURVEYS:
        raise BadRequest(f"name: {told.name} is the name of a survey that is known; choose another")
    if told.scope not in ("tile", "cutout"):
        raise BadRequest(f"scope is tile or cutout, got {told.scope!r}")
    if (told.zero_point is None) == (told.unit is None):
        raise BadRequest("give zero_point (AB magnitude of one count) or unit, one of them")
    if told.unit is not None:
        nanojansky_per_unit(told.unit)
    if told.pixel_arcsec is not None and told.pixel_arcsec <= 0:
        raise BadRequest(f"pixel_arcsec is the side of a pixel, got {told.pixel_arcsec}")
    if len(set(told.bands)) < len(told.bands):
        raise BadRequest(f"bands are named once each, got {', '.join(told.bands)}")
    if any(not 0 <= bit < 63 for bit in told.no_data_bits):
        raise BadRequest(f"no_data_bits are bit numbers from 0 on, got {told.no_data_bits}")
    if not isinstance(told.zero_is_no_data, bool):
        raise BadRequest(f"zero_is_no_data is true or false, got {told.zero_is_no_data!r}")
    for role, band in told.roles.items():
        if role not in ROLES or band not in told.bands:
            raise BadRequest(f"roles: {role}: {band} - the roles are {', '.join(ROLES)}, the bands {told.bands}")
    if told.no_data_bits and told.mask is None and told.mask_hdu is None:
        raise BadRequest("no_data_bits need a mask or mask_hdu")
    for template in (told.files, told.weight, told.mask):
        if template is not None and "{tile}" not in template:
            raise BadRequest(f"{template!r} needs {{tile}}, the part of a name that all files of a tile share")
    return told


def _survey(told: Description) -> Survey:
    layout = DescribedLayout(
        name="description",
        scope=told.scope,
        names=", ".join(filter(None, (told.files, told.weight, told.mask))),
        pattern=_form(told.files, told.bands),
        others={
            kind: _form(template, told.bands)
            for kind, template in (("weight", told.weight), ("mask", told.mask))
            if template
        },
        planes=partial(_described_planes, told=told),
        recognise=_never,
        by_folder=told.scope == "cutout",
    )
    facts = [
        Fact(what, value, Evidence.DOCUMENTED, "the user's description")
        for what, value in (
            ("AB magnitude of one count", told.zero_point),
            ("unit of the pixels", told.unit),
            ("pixel, arcsec", told.pixel_arcsec),
            ("bits of the mask that mean no data", told.no_data_bits or None),
        )
        if value is not None
    ]
    return Survey(told.name, f"{told.name} (described)", told.bands, dict(told.roles), (layout,), tuple(facts))


@dataclass(frozen=True, eq=False)
class DescribedLayout(Layout):
    """A layout whose weights and masks have patterns of their own.

    Attributes
    ----------
    others : mapping of str to re.Pattern
        Pattern of ``weight`` and ``mask`` files. They come first: ``{tile}_{band}.fits`` fits ``a_g_wht.fits`` too.
    """

    others: Mapping[str, re.Pattern[str]] = field(default_factory=dict)

    def parse(self, name: str) -> Named | None:
        """Return what a file's name says, or None if it is not of this layout."""
        for kind, pattern in (*self.others.items(), ("image", self.pattern)):
            if match := pattern.fullmatch(name):
                found = match.groupdict()
                return Named(found["tile"], kind, found.get("band") or "", "")
        return None


def _never(file: fits.HDUList) -> None:
    """Recognise nothing: a description is used where it is asked for."""


def _form(template: str, bands: Sequence[str]) -> re.Pattern[str]:
    text = re.sub(r"(\.fits|\.fit)?(\.gz|\.bz2|\.fz)?$", "", template)
    text = re.escape(text).replace(r"\*", ".*").replace(r"\{tile\}", "(?P<tile>.+?)", 1)
    names = "|".join(sorted(map(re.escape, bands), key=len, reverse=True))
    return re.compile(text.replace(r"\{band\}", f"(?P<band>{names})", 1) + _ENDING)


def _described_planes(
    files: OpenFiles, bands: Sequence[str] | None, *, told: Description
) -> Mapping[str, tuple[Plane, ...]]:
    named = bool(files.bands)
    planes = {}
    for band in bands or files.bands or told.bands:
        if band not in told.bands or (named and ("image", band) not in files.files):
            continue
        image = _pick(files, "image", band, told.hdu, told, named)
        assert image is not None
        weight = _pick(files, "weight", band, None, told, named)
        mask = _pick(files, "mask", band, None, told, named)
        for kind, template, found in (("weight", told.weight, weight), ("mask", told.mask, mask)):
            if template is not None and found is None:
                raise UnreadableInput(
                    f"{image.where}: the description has a {kind} file {template!r}, and there is none for it; "
                    f"correct the description, or fetch the {kind}"
                )
        if weight is None and told.weight_hdu is not None:
            weight = _pick(files, "image", band, told.weight_hdu, told, named)
        if mask is None and told.mask_hdu is not None:
            mask = _pick(files, "image", band, told.mask_hdu, told, named)
        wcs = celestial_wcs(image.hdu.header)
        planes[band] = (
            Plane(
                band,
                image,
                wcs,
                _described_factor(told, wcs, image.where),
                weight,
                mask,
                no_data_bits=sum(1 << bit for bit in told.no_data_bits),
                zero_is_no_data=told.zero_is_no_data,
            ),
        )
    return planes


def _described_factor(told: Description, wcs: Any, where: str) -> float:
    factor = (
        nanojansky_per_count(told.zero_point) if told.zero_point is not None else nanojansky_per_unit(told.unit or "")
    )
    if told.pixel_arcsec is None or wcs is None:
        if told.pixel_arcsec is not None:
            return factor * (REFERENCE_PIXEL_ARCSEC / told.pixel_arcsec) ** 2
        return per_reference_pixel(factor, wcs, where)
    found = pixel_arcsec(wcs)
    if abs(found - told.pixel_arcsec) > _STRAY_SCALE * told.pixel_arcsec:
        raise UnreadableInput(
            f"{where}: its WCS has pixels of {found:.5g} arcsec, the description says {told.pixel_arcsec}; correct one"
        )
    return per_reference_pixel(factor, wcs, where)


def _pick(
    files: OpenFiles, kind: str, band: str, hdu: str | int | None, told: Description, named: bool
) -> Pixels | None:
    """Return the pixels of a band: a plane of a cube where names hold no band, else the file's image."""
    file, path = files.open(kind, band), files.path(kind, band)
    if file is None or path is None:
        return None
    if hdu is None:
        dimensions = 3 if not named and len(told.bands) > 1 else 2
        found = images(file, path, dimensions)
        if len(found) != 1:
            raise UnreadableInput(f"{path}: {_not_one(file, path, dimensions, told)}; {contents(file)}")
        pixels = found[0]
    else:
        try:
            pixels = Pixels(file[hdu], f"{path}[{hdu}]")
        except (KeyError, IndexError):
            raise UnreadableInput(f"{path}: no HDU {hdu!r}; {contents(file)}") from None
        if not pixels.hdu.is_image or len(pixels.hdu.shape or ()) not in (2, 3):
            raise UnreadableInput(f"{path}: HDU {hdu!r} holds no image; {contents(file)}")
    if len(pixels.hdu.shape) == 2:
        if not named and len(told.bands) > 1:
            raise MissingBand(f"{pixels.where}: one plane for the bands {', '.join(told.bands)}")
        return pixels
    if pixels.hdu.shape[0] != len(told.bands):
        raise MissingBand(f"{pixels.where}: {pixels.hdu.shape[0]} planes for the bands {', '.join(told.bands)}")
    return Pixels(pixels.hdu, pixels.where, told.bands.index(band))


def _not_one(file: fits.HDUList, path: str, dimensions: int, told: Description) -> str:
    """Say what else there is than one image, and what to do about it."""
    what = "cube" if dimensions == 3 else "2-D image"
    others = len(images(file, path, 5 - dimensions))
    found = len(images(file, path, dimensions))
    if found:
        return (
            f"{found} {what}s where one was expected; name it with `hdu:` in the description, or write each to a "
            "file of its own where each is a source"
        )
    if not others:
        return f"no {what}; leave this file out of `files:`"
    if dimensions == 3:
        return (
            f"no cube of the bands {', '.join(told.bands)}, but {others} 2-D image(s); put {{band}} into `files:` "
            "where each band has a file, leave this file out of it, or give `bands:` one band"
        )
    return f"no 2-D image, but {others} cube(s); list the bands of its planes in `bands:`, with no {{band}} in `files:`"


def _self_described_planes(files: OpenFiles, bands: Sequence[str] | None) -> Mapping[str, tuple[Plane, ...]]:
    """Return planes of files whose headers name the bands (as the Legacy Surveys' do) and the unit."""
    file, path = files.open("image"), files.path("image")
    assert file is not None
    assert path is not None
    planes: dict[str, tuple[Plane, ...]] = {}
    found = [*images(file, path, 2), *images(file, path, 3)]
    for pixels in found:
        header = pixels.hdu.header
        names = cube_bands(header)
        planar = len(pixels.hdu.shape) == 2
        if len(names) != (1 if planar else pixels.hdu.shape[0]):
            continue
        wcs = celestial_wcs(header)
        factor = per_reference_pixel(header_unit(header, pixels.where), wcs, pixels.where)
        for index, band in enumerate(names):
            piece = pixels if planar else Pixels(pixels.hdu, pixels.where, index)
            planes[band] = (*planes.get(band, ()), Plane(band, piece, wcs, factor, zero_is_no_data=True))
    if not planes:
        raise _undescribed(found, file, path)
    return planes


def _undescribed(found: Sequence[Pixels], file: fits.HDUList, path: str) -> GalembedError:
    """Say everything that a file's header leaves open."""
    if not found:
        rows = [hdu.header["NAXIS2"] for hdu in file if isinstance(hdu, fits.BinTableHDU | fits.TableHDU)]
        if rows:
            return UnreadableInput(
                f"{path} is a table of {rows[0]} row(s) and holds no image; a table is given as --catalogue"
            )
        return UnreadableInput(f"{path} holds no 2-D image and no cube; {contents(file)}")
    header = found[0].hdu.header
    lacking = ["no band keywords (BANDS, BAND0... or BAND)"]
    unit = str(header.get("BUNIT", "") or "").strip()
    try:
        header_unit(header, path)
    except UnknownUnit:
        lacking.append(f"BUNIT {unit!r}, which does not become nJy" if unit else "no BUNIT")
    if celestial_wcs(header) is None:
        lacking.append("no sky WCS")
    error = UnknownUnit if len(lacking) > 1 and "BUNIT" in lacking[1] else MissingBand
    return error(f"{found[0].where}: the header has {', '.join(lacking)}")


def _recognise(file: fits.HDUList) -> str | None:
    for hdu in file:
        unit = str(hdu.header.get("BUNIT", "") or "").strip()
        if hdu.is_image and unit and cube_bands(hdu.header):
            try:
                nanojansky_per_unit(unit)
            except GalembedError:
                return None
            return f"headers name the bands ({' '.join(cube_bands(hdu.header))}) and the unit ({unit})"
    return None


SURVEY: Final = Survey(
    name="generic",
    title="Files that describe themselves",
    bands=(),
    roles={"blue": "g", "green": "r", "red": "z"},
    layouts=(
        Layout(
            name="cutout",
            scope="cutout",
            names="any name; BUNIT in the header, and BANDS, BAND0... or BAND",
            pattern=re.compile(r"(?P<tile>.+?)\.(?:fits|fit|fts)(?:\.fz|\.gz|\.bz2)?", re.IGNORECASE),
            planes=_self_described_planes,
            recognise=_recognise,
        ),
    ),
    facts=(
        Fact("unit, bands and pixel", "the header's", Evidence.DOCUMENTED, "each file says them, or is refused"),
        Fact("an exact zero is no data", True, Evidence.DOCUMENTED, "our rule, as in the Legacy Surveys' cutouts"),
    ),
)
