"""Pan-STARRS1 skycells and cutouts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from numpy.typing import NDArray

from galembed.cutouts import Cutout
from galembed.errors import BadRequest, GalembedError, MissingBand, UnknownUnit, UnreadableInput
from galembed.sources import open_source
from galembed.surveys.panstarrs import linear_counts
from tests.galembed.surveys.stars import (
    DEC,
    MAGNITUDE,
    RA,
    assert_star,
    read_star,
    star_image,
    tan_wcs,
    write_catalogue,
)

PIXEL = 0.25
SHAPE = (150, 170)
OFF_CENTRE = (2.3 * PIXEL, -1.7 * PIXEL)
"""Of the star, arcsec; a cutout without a catalogue is cut around its own middle."""
BANDS = {"g": "blue", "r": "green", "i": "red"}
SECONDS = {"g": 516.0, "r": 600.0, "i": 1080.0}
SOFTEN, OFFSET = 221.8863810555, 7.172080516815
BZERO, BSCALE, BLANK = 3.632529139519, 2.115535619667e-04, 32767
NAME = "rings.v3.skycell.1784.059.stk.{}.unconv{}.fits"


def counts(band: str) -> NDArray[np.float32]:
    """A star of its magnitude in a stack's counts: zero point 25 + 2.5 log10(EXPTIME)."""
    flux = 10 ** (-0.4 * (MAGNITUDE[BANDS[band]] - 25)) * SECONDS[band]
    return star_image(SHAPE, tan_wcs(SHAPE, PIXEL, offset=(2.3, -1.7)), flux)


def cards(band: str, pixel: float = PIXEL, **header: object) -> fits.Header:
    """Header of a skycell: WCS in the oldest spelling, no RADESYS."""
    found = fits.Header(
        {
            "CTYPE1": "RA---TAN",
            "CTYPE2": "DEC--TAN",
            "CRVAL1": RA,
            "CRVAL2": DEC,
            "CRPIX1": (SHAPE[1] + 1) / 2 + 2.3,
            "CRPIX2": (SHAPE[0] + 1) / 2 - 1.7,
            "CDELT1": pixel / 3600,
            "CDELT2": pixel / 3600,
            "PC001001": -1.0,
            "PC001002": 0.0,
            "PC002001": 0.0,
            "PC002002": 1.0,
            "EXPTIME": SECONDS[band],
            "PSCAMERA": "GPC1",
        }
    )
    found["HIERARCH FPA.FILTER"] = f"{band}.00000"
    found["HIERARCH FPA.ZP"] = 25.0
    for key, value in header.items():
        if value is None:
            found.pop(key, None)
        else:
            found[key] = value
    return found


def asinh_magnitudes(linear: NDArray[np.float32]) -> NDArray[np.float64]:
    """The inverse of UNCOMP = BOFFSET + 2 BSOFTEN sinh(TRUE / a), a = 2.5 / ln 10, of a skycell's header."""
    return 2.5 / np.log(10) * np.arcsinh((linear.astype(float) - OFFSET) / (2 * SOFTEN))


def write_compressed(path: Path, data: NDArray[np.generic], header: fits.Header, kind: str, **scale: float) -> None:
    """An empty primary HDU and a compressed image in HDU 1, one row a tile, scaled as the header says."""
    image = fits.CompImageHDU(data, header, compression_type=kind, tile_shape=(1, SHAPE[1]), quantize_level=0.0)
    fits.HDUList([fits.PrimaryHDU(), image]).writeto(path)
    if scale:
        with fits.open(path, mode="update", disable_image_compression=True) as file:
            file[1].header.update(scale)


def write_skycell(folder: Path, *, blank: slice | None = None, pixel: float = PIXEL, **header: object) -> None:
    for band in BANDS:
        stored = np.round((asinh_magnitudes(counts(band)) - BZERO) / BSCALE).astype(np.int16)
        if blank is not None:
            stored[blank] = BLANK
        asinh = {"BSOFTEN": SOFTEN, "BOFFSET": OFFSET} | header
        scale = {"BZERO": BZERO, "BSCALE": BSCALE, "BLANK": BLANK}
        write_compressed(folder / NAME.format(band, ""), stored, cards(band, pixel, **asinh), "RICE_1", **scale)


def write_mask(folder: Path, where: slice, value: int, **names: object) -> None:
    mask = np.zeros(SHAPE, np.uint16)
    mask[where] = value
    for band in BANDS:
        write_compressed(folder / NAME.format(band, ".mask"), mask, cards(band, **names), "GZIP_1")


def write_cutouts(folder: Path, *, asinh: bool = False, name: str = "m31_{}.fits", **header: object) -> None:
    for band in BANDS:
        keywords = ({"BSOFTEN": SOFTEN, "BOFFSET": OFFSET} if asinh else {}) | header
        data = asinh_magnitudes(counts(band)).astype(np.float32) if asinh else counts(band)
        fits.PrimaryHDU(data, cards(band, **keywords)).writeto(folder / name.format(band))


def read_tile(folder: Path) -> Cutout:
    return read_star(folder, catalogue=write_catalogue(folder / "s.csv"))


def test_a_star_on_a_skycell_has_its_place_and_flux(tmp_path: Path) -> None:
    write_skycell(tmp_path)
    cutout = read_tile(tmp_path)
    assert_star(cutout, native_pixel=PIXEL)
    assert cutout.coverage == 1


def test_cutouts_of_the_service_are_linear(tmp_path: Path) -> None:
    write_cutouts(tmp_path)
    assert_star(read_star(tmp_path), native_pixel=PIXEL, offset=OFF_CENTRE)


def test_cutouts_with_asinh_keywords_are_made_linear(tmp_path: Path) -> None:
    write_cutouts(tmp_path, asinh=True, name="cutout_rings.v3.skycell.1784.059.stk.{}.unconv.fits")
    assert_star(read_star(tmp_path), native_pixel=PIXEL, offset=OFF_CENTRE)


def test_linear_counts_invert_the_scaling_and_keep_nan() -> None:
    linear = np.array([-50, 0, 7.2, 1e3, 1e6, np.nan], np.float32)
    found = linear_counts(asinh_magnitudes(linear).astype(np.float32), offset=OFFSET, softening=SOFTEN)
    np.testing.assert_allclose(found, linear, rtol=1e-5, atol=1e-3)


def test_blank_pixels_are_no_data(tmp_path: Path) -> None:
    write_skycell(tmp_path, blank=slice(80, 96))
    cutout = read_tile(tmp_path)
    assert cutout.coverage == pytest.approx(0.8, abs=0.03)


def test_variance_of_zero_or_nan_is_no_data(tmp_path: Path) -> None:
    write_skycell(tmp_path)
    variance = np.full(SHAPE, 4.0, np.float32)
    variance[80:88], variance[88:96] = 0, np.nan
    for band in BANDS:
        write_compressed(tmp_path / NAME.format(band, ".wt"), variance, cards(band), "GZIP_1")
    cutout = read_tile(tmp_path)
    assert cutout.coverage == pytest.approx(0.8, abs=0.03)


def test_the_blank_plane_of_a_mask_is_no_data(tmp_path: Path) -> None:
    write_skycell(tmp_path)
    write_mask(tmp_path, slice(80, 96), 0x0008)
    cutout = read_tile(tmp_path)
    assert cutout.coverage == pytest.approx(0.8, abs=0.03)


def test_the_mask_header_names_its_planes(tmp_path: Path) -> None:
    names = {"MSKNUM": 2, "MSKNAM00": "BLANK", "MSKVAL00": 64, "MSKNAM01": "STARCORE", "MSKVAL01": 8}
    write_skycell(tmp_path)
    write_mask(tmp_path, slice(None), 8, **names)
    cutout = read_tile(tmp_path)
    assert cutout.coverage == 1
    assert cutout.flags == "star"


def test_a_mask_without_the_blank_plane_is_refused(tmp_path: Path) -> None:
    write_skycell(tmp_path)
    write_mask(tmp_path, slice(None), 0, MSKNAM00="DARK", MSKVAL00=4)
    with pytest.raises(UnreadableInput, match="names no plane BLANK, MSKNAM gives DARK"):
        read_tile(tmp_path)


@pytest.mark.parametrize(
    ("header", "error", "message"),
    [
        ({"EXPTIME": None}, UnknownUnit, "EXPTIME is None"),
        ({"EXPTIME": 0.0}, UnknownUnit, "EXPTIME is 0.0"),
        ({"BOFFSET": None}, UnknownUnit, "asinh pixels need BOFFSET and a positive BSOFTEN"),
        ({"FPA.ZP": 26.0}, UnreadableInput, "per second of EXPTIME .* is 26.* by its header, expected 25.0"),
        ({"FPA.FILTER": "w.00000"}, MissingBand, "name says band g, its header FPA.FILTER = 'w.00000'"),
    ],
)
def test_a_skycell_whose_header_does_not_say_enough_is_refused(
    tmp_path: Path, header: dict[str, object], error: type[GalembedError], message: str
) -> None:
    write_skycell(tmp_path, **header)
    with pytest.raises(error, match=message):
        read_tile(tmp_path)


def test_skycells_of_another_pixel_are_refused(tmp_path: Path) -> None:
    write_skycell(tmp_path, pixel=0.186)
    with pytest.raises(UnreadableInput, match=r"native pixel, arcsec is 0\.186 by its header, expected 0\.25"):
        read_tile(tmp_path)


def test_linear_pixels_that_kept_the_asinh_keywords_are_refused(tmp_path: Path) -> None:
    write_cutouts(tmp_path, BSOFTEN=SOFTEN, BOFFSET=OFFSET)
    with pytest.raises(UnreadableInput, match="made linear and kept the keywords"):
        read_star(tmp_path)


def test_skycells_among_another_survey_are_recognised_and_named(tmp_path: Path) -> None:
    (tmp_path / "ps1").mkdir()
    write_skycell(tmp_path / "ps1")
    assert open_source(tmp_path, catalogue=write_catalogue(tmp_path / "s.csv")).survey == "panstarrs"
    for band in BANDS:
        header = fits.Header({"ORIGIN": "SDSS", "BUNIT": "nanomaggy"})
        fits.PrimaryHDU(counts(band), header).writeto(tmp_path / f"m31_{band}.fits")
    with pytest.raises(BadRequest, match=r"(?s)more than one survey:.*sdss: 1 cutout.*panstarrs: 1 tile"):
        open_source(tmp_path, catalogue=tmp_path / "s.csv")
    assert open_source(tmp_path, catalogue=tmp_path / "s.csv", survey="panstarrs").survey == "panstarrs"
