"""SDSS frames and files made from them."""

from __future__ import annotations

import bz2
from pathlib import Path

import pytest
from astropy.io import fits

from galembed.errors import MissingBand, UnreadableInput
from tests.galembed.surveys.stars import (
    MAGNITUDE,
    assert_star,
    celestial_cards,
    njy,
    read_star,
    star_image,
    tan_wcs,
    write_catalogue,
)

PIXEL = 0.396
SHAPE = (180, 220)
BANDS = {"g": "blue", "r": "green", "i": "red"}


def write_frames(folder: Path, *, pixel: float = PIXEL, **header: object) -> None:
    """One field in three bands, each with its own shift and turn, as the drift scan leaves them."""
    for number, (band, role) in enumerate(BANDS.items()):
        wcs = tan_wcs(SHAPE, pixel, offset=(3.3 * number, -7.7 * number), rotation=41.0 + 0.3 * number)
        image = star_image(SHAPE, wcs, njy(MAGNITUDE[role]) / 3631e9 * 1e9)  # nanomaggies
        cards = celestial_cards(wcs) + fits.Header({"BUNIT": "nanomaggy", "FILTER": band} | header)
        hdus = fits.HDUList([fits.PrimaryHDU(image, cards), fits.ImageHDU(image[0], name="CALIB")])
        plain = folder / "frame.fits"
        hdus.writeto(plain, overwrite=True)
        (folder / f"frame-{band}-002820-3-0122.fits.bz2").write_bytes(bz2.compress(plain.read_bytes()))
        plain.unlink()


def test_bands_of_a_frame_are_aligned_and_in_njy(tmp_path: Path) -> None:
    write_frames(tmp_path)
    cutout = read_star(tmp_path, catalogue=write_catalogue(tmp_path / "s.csv"))
    assert_star(cutout, native_pixel=PIXEL)


def test_a_frame_whose_header_names_another_band_is_refused(tmp_path: Path) -> None:
    write_frames(tmp_path, FILTER="u")
    with pytest.raises(MissingBand, match="name says band g, its header FILTER = 'u'"):
        read_star(tmp_path, catalogue=write_catalogue(tmp_path / "s.csv"))


def test_a_frame_of_another_pixel_is_not_a_frame(tmp_path: Path) -> None:
    write_frames(tmp_path, pixel=0.5)
    with pytest.raises(UnreadableInput, match=r"native pixel of a frame, arcsec is 0\.5"):
        read_star(tmp_path, catalogue=write_catalogue(tmp_path / "s.csv"))


@pytest.mark.shared_data
def test_real_reprojected_frames_are_one_source_in_three_bands(shared_data: Path) -> None:
    cutout = read_star(shared_data / "fits" / "sdss_band_per_file_bz2", side=120.0)
    assert cutout.coverage == 1
    assert cutout.fov_arcsec == pytest.approx(120.0)
