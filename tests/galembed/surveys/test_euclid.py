"""Euclid MER tiles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits

from galembed.cutouts import Cutout
from galembed.errors import BadRequest, GalembedError, MissingBand, UnknownUnit, UnreadableInput
from galembed.files import FITS_ENDINGS, find_files
from galembed.sources import open_source
from galembed.sources.layouts import find_tiles
from galembed.surveys.euclid import SURVEY
from tests.galembed.surveys.stars import (
    MAGNITUDE,
    assert_star,
    celestial_cards,
    read_star,
    star_image,
    tan_wcs,
    write_catalogue,
)

PIXEL = 0.1
SHAPE = (260, 270)
BANDS = {"VIS": "blue", "NIR-Y": "green", "DES-G": "red"}
FOLDERS = {"VIS": "VIS", "NIR-Y": "NISP", "DES-G": "DECAM"}
MAGZERO = {"VIS": 24.57, "NIR-Y": 29.8, "DES-G": 30.0}
ROLES = {role: band for band, role in BANDS.items()}
TILE = "TILE102018211"
FIRST, SECOND = "20241018T142710.276838Z", "20241025T120300.417407Z"


def tile_path(root: Path, band: str, kind: str, time: str = FIRST, digest: str = "ACBD03") -> Path:
    """A file of a tile where the archive keeps it: in a folder for each instrument."""
    folder = root / TILE.removeprefix("TILE") / FOLDERS[band]
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"BGSUB-MOSAIC-{band}" if kind == "BGSUB" else f"MOSAIC-{band}-{kind}"
    return folder / f"EUC_MER_{stem}_{TILE}-{digest}_{time}_00.00.fits"


def write_tile(root: Path, *, time: str = FIRST, scale: float = 1.0, pixel: float = PIXEL, **header: object) -> None:
    """Background-subtracted mosaics in the primary HDU, with noise; every band on the same pixels."""
    rng = np.random.default_rng(3)
    wcs = tan_wcs(SHAPE, pixel, offset=(3.4, -8.2))
    for band, role in BANDS.items():
        flux = 10 ** (-0.4 * (MAGNITUDE[role] - MAGZERO[band]))
        image = scale * star_image(SHAPE, wcs, flux, fwhm_arcsec=0.6)
        image += (1e-7 * flux * rng.standard_normal(SHAPE)).astype(np.float32)
        cards = celestial_cards(wcs) + fits.Header({"MAGZERO": MAGZERO[band], "EXPTIME": 100.0})
        for key, value in header.items():
            if value is None:
                cards.remove(key)
            else:
                cards[key] = value
        fits.PrimaryHDU(image, cards).writeto(tile_path(root, band, "BGSUB", time))


def write_companion(root: Path, kind: str, data: np.ndarray) -> None:
    """RMS or FLAG of each band; its hash and time are its own."""
    for band in BANDS:
        fits.PrimaryHDU(data).writeto(tile_path(root, band, kind, "20241017T160703.183124Z", "D0DB63"))


def read_tile(root: Path, **options: object) -> Cutout:
    path = root / "s.csv"
    catalogue = path if path.exists() else write_catalogue(path)
    return read_star(root, catalogue=catalogue, **({"bands": ROLES} | options))


def test_bands_of_a_tile_are_in_njy_by_their_own_zero_points(tmp_path: Path) -> None:
    write_tile(tmp_path)
    write_companion(tmp_path, "RMS", np.full(SHAPE, 0.1, np.float32))
    write_companion(tmp_path, "FLAG", np.zeros(SHAPE, np.int32))
    cutout = read_tile(tmp_path)
    assert_star(cutout, native_pixel=PIXEL)
    assert cutout.coverage == 1


def test_one_band_plays_all_roles_when_it_is_chosen(tmp_path: Path) -> None:
    write_tile(tmp_path)
    assert_star(
        read_tile(tmp_path, bands="VIS"), native_pixel=PIXEL, magnitudes=dict.fromkeys(MAGNITUDE, MAGNITUDE["blue"])
    )


def test_bands_have_to_be_chosen(tmp_path: Path) -> None:
    write_tile(tmp_path)
    with pytest.raises(MissingBand, match=r"present are DES-G, NIR-Y, VIS\. Choose with --bands"):
        read_tile(tmp_path, bands=None)


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_rms_of_zero_or_nan_is_no_data(tmp_path: Path, value: float) -> None:
    rms = np.full(SHAPE, 0.1, np.float32)
    rms[150:190] = value
    write_tile(tmp_path)
    write_companion(tmp_path, "RMS", rms)
    assert read_tile(tmp_path).coverage == pytest.approx(0.8, abs=0.03)


def test_exact_zeros_are_no_data(tmp_path: Path) -> None:
    write_tile(tmp_path)
    path = tile_path(tmp_path, "NIR-Y", "BGSUB")
    with fits.open(path, mode="update") as file:
        file[0].data[150:190] = 0
    assert read_tile(tmp_path).coverage == pytest.approx(0.8, abs=0.03)


def test_bits_of_flag_are_not_taken_for_missing_data(tmp_path: Path) -> None:
    write_tile(tmp_path)
    write_companion(tmp_path, "FLAG", np.full(SHAPE, 0x0008_0001, np.int32))
    assert read_tile(tmp_path).coverage == 1


def test_of_two_versions_the_newest_is_read_and_the_older_named(tmp_path: Path) -> None:
    write_tile(tmp_path, time=SECOND)
    reader = open_source(tmp_path, catalogue=write_catalogue(tmp_path / "s.csv"), bands=ROLES)
    alone = reader.sources().table["source_version"].to_pylist()
    write_tile(tmp_path, time=FIRST, scale=3.0)
    assert_star(read_tile(tmp_path), native_pixel=PIXEL)
    (tile,) = find_tiles(find_files(str(tmp_path), FITS_ENDINGS), SURVEY.layouts[0], str(tmp_path)).values()
    assert tile.superseded == tuple(sorted(str(tile_path(tmp_path, band, "BGSUB", FIRST)) for band in BANDS))
    # What is on record is the version that was read, so another one reads as a change.
    assert reader.sources().table["source_version"].to_pylist() == alone


def test_a_newer_version_changes_the_version_on_record(tmp_path: Path) -> None:
    write_tile(tmp_path, time=FIRST)
    reader = open_source(tmp_path, catalogue=write_catalogue(tmp_path / "s.csv"), bands=ROLES)
    before = reader.sources().table["source_version"].to_pylist()
    write_tile(tmp_path, time=SECOND)
    assert reader.sources().table["source_version"].to_pylist() != before


@pytest.mark.parametrize(
    ("header", "error", "message"),
    [
        ({"MAGZERO": None}, UnknownUnit, "MAGZERO is None, so its counts have no zero point"),
        ({"MAGZERO": "24.6"}, UnknownUnit, "MAGZERO is '24.6'"),
        ({"PV1_1": 1.001, "PV2_1": 1.001}, UnreadableInput, "its WCS has the terms PV1_1, PV2_1"),
    ],
)
def test_a_tile_whose_header_does_not_say_enough_is_refused(
    tmp_path: Path, header: dict[str, object], error: type[GalembedError], message: str
) -> None:
    write_tile(tmp_path, **header)
    with pytest.raises(error, match=message):
        read_tile(tmp_path)


def test_a_tile_of_another_pixel_is_refused(tmp_path: Path) -> None:
    write_tile(tmp_path, pixel=0.3)
    with pytest.raises(UnreadableInput, match=r"arcsec is 0\.3 by its header, expected 0\.1"):
        read_tile(tmp_path)


def test_an_rms_of_another_tile_is_refused(tmp_path: Path) -> None:
    write_tile(tmp_path)
    write_companion(tmp_path, "RMS", np.ones((90, 90), np.float32))
    with pytest.raises(UnreadableInput, match="they do not belong together"):
        read_tile(tmp_path)


def test_other_products_of_a_tile_are_left_alone(tmp_path: Path) -> None:
    write_tile(tmp_path)
    for other in ("BGMOD-VIS", "MOSAIC-VIS", "FINAL-SEGMAP", "CATALOG-PSF-VIS"):
        fits.PrimaryHDU(np.ones((9, 9))).writeto(tmp_path / f"EUC_MER_{other}_{TILE}-B260B9_{FIRST}_00.00.fits")
    assert_star(read_tile(tmp_path), native_pixel=PIXEL)


def test_tiles_among_another_survey_are_recognised_and_named(tmp_path: Path) -> None:
    write_tile(tmp_path)
    assert open_source(tmp_path, catalogue=write_catalogue(tmp_path / "s.csv"), bands="VIS").survey == "euclid"
    for band in "gri":
        header = fits.Header({"ORIGIN": "SDSS", "BUNIT": "nanomaggy"})
        fits.PrimaryHDU(np.ones(SHAPE, np.float32), header).writeto(tmp_path / f"m31_{band}.fits")
    with pytest.raises(BadRequest, match=r"(?s)more than one survey:.*sdss: 1 cutout.*euclid: 1 tile"):
        open_source(tmp_path, catalogue=tmp_path / "s.csv", bands="VIS")
