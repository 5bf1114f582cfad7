"""JWST i2d mosaics, and grizli's."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits

from galembed.cutouts import Cutout
from galembed.errors import BadRequest, MissingBand, UnknownUnit, UnreadableInput
from galembed.sources import open_source
from galembed.sources.layouts import find_tiles
from galembed.surveys import load_survey
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

SIDE = 6.0
SHORT, LONG = 0.031, 0.063
STERADIAN = (np.pi / 180 / 3600) ** 2  # of a square arcsec
I2D = {"f115w": ("blue", SHORT), "f200w": ("green", SHORT), "f444w": ("red", LONG)}
MOSAIC = {"f814w": ("blue", 0.04), "f200w": ("green", 0.02), "f444w": ("red", 0.04)}
NAMES = {"f814w": "f814w", "f200w": "f200w-clear", "f444w": "f444w-clear"}


def shape_of(pixel: float) -> tuple[int, int]:
    return round(10 / pixel), round(11 / pixel)


def write_i2d(
    folder: Path,
    *,
    order: str = "SCI ERR CON WHT",
    unit: str = "MJy/sr",
    area: float = 1.0,
    hole: bool = False,
    **science: object,
) -> None:
    """One target in three bands of two pixel scales; `area` stretches PIXAR_SR, `hole` has weight 0 and light in it."""
    for band, (role, pixel) in I2D.items():
        shape = shape_of(pixel)
        wcs = tan_wcs(shape, pixel, offset=(0.18 / pixel, -0.11 / pixel), rotation=77.0)
        image = star_image(shape, wcs, njy(MAGNITUDE[role]) / (1e15 * pixel**2 * STERADIAN), 0.4)
        weight = np.full(shape, 3000.0, np.float32)
        if hole:
            weight[: shape[0] // 3] = 0
            image[: shape[0] // 3] = 7e4
        cards = celestial_cards(wcs) + fits.Header(
            {"BUNIT": unit, "PIXAR_SR": pixel**2 * STERADIAN * area, "PHOTMJSR": 1.7} | science
        )
        hdus = {
            "SCI": fits.ImageHDU(image, cards, name="SCI"),
            "ERR": fits.ImageHDU(np.full(shape, 0.01, np.float32), name="ERR"),
            "CON": fits.ImageHDU(np.ones((1, *shape), np.int32), name="CON"),
            "WHT": fits.ImageHDU(weight, name="WHT"),
        }
        primary = fits.PrimaryHDU(
            header=fits.Header({"TELESCOP": "JWST", "INSTRUME": "NIRCAM", "FILTER": band.upper(), "PUPIL": "CLEAR"})
        )
        name = f"jw01345-o001_t021_nircam_clear-{band}"
        (folder / name).mkdir()
        fits.HDUList([primary, *(hdus[key] for key in order.split())]).writeto(folder / name / f"{name}_i2d.fits")


def write_mosaic(
    folder: Path,
    *,
    version: str = "v7.2",
    unit: str | None = "10.0*nanoJansky",
    photfnu: float = 1e-8,
    brighter: float = 0.0,
    weights: bool = True,
    left: float | None = None,
    **extra: object,
) -> None:
    """One field with HST and JWST bands, as the archive serves it; `left` fills a third without taking its weight."""
    for band, (role, pixel) in MOSAIC.items():
        shape = shape_of(pixel)
        wcs = tan_wcs(shape, pixel, offset=(0.18 / pixel, -0.11 / pixel))
        total = njy(MAGNITUDE[role] - brighter) / 10
        image = star_image(shape, wcs, total, 0.4, sky=1e-9 * total)
        if left is not None:
            image[:, : shape[1] // 3] = left
        header = celestial_cards(wcs) + fits.Header({"GRIZLIV": "1.8.16", "FILTER": band.upper(), "PUPIL": "CLEAR"})
        # As on the archive's page: factors that are in the pixels already, and the area of the detector's pixel.
        header.update({"PHOTSCAL": 1.0014, "PHOTMJSR": 0.3925, "PIXAR_SR": 9.31e-14, "OPHOTFNU": 9.3e-8, "ZP": 26.5})
        header.update({"PHOTFNU": photfnu} | extra)
        if unit is not None:
            header["BUNIT"] = unit
        root = f"cosmos-grizli-{version}-{NAMES[band]}_drc"
        planes = {"sci": image} | ({"wht": np.ones(shape, np.float32)} if weights else {})
        for kind, data in planes.items():
            plain = folder / "plain.fits"
            fits.PrimaryHDU(data, header).writeto(plain)
            (folder / f"{root}_{kind}.fits.gz").write_bytes(gzip.compress(plain.read_bytes(), 1))
            plain.unlink()
        binned = fits.PrimaryHDU(np.ones((shape[0] // 4, shape[1] // 4), np.int32), header)
        binned.writeto(folder / f"{root}_exp.fits.gz")


def read(folder: Path, bands: dict[str, str] | None) -> Cutout:
    return read_star(folder, side=SIDE, catalogue=write_catalogue(folder / "s.csv"), bands=bands)


def roles(table: dict[str, tuple[str, float]]) -> dict[str, str]:
    return {role: band for band, (role, _) in table.items()}


@pytest.mark.parametrize("order", ["SCI ERR CON WHT", "SCI WHT CON ERR"])
def test_i2d_bands_of_two_pixel_scales_are_aligned_and_in_njy(tmp_path: Path, order: str) -> None:
    write_i2d(tmp_path, order=order)
    cutout = read(tmp_path, roles(I2D))
    assert_star(cutout, side=SIDE, native_pixel=SHORT)
    assert cutout.coverage == 1


@pytest.mark.parametrize("order", ["SCI ERR CON WHT", "SCI WHT CON ERR"])
def test_i2d_weight_zero_is_no_data_wherever_the_weight_stands(tmp_path: Path, order: str) -> None:
    write_i2d(tmp_path, order=order, hole=True)
    cutout = read(tmp_path, roles(I2D))
    assert_star(cutout, side=SIDE, native_pixel=SHORT)
    # The lower third of 10 arcsec is the hole, and the star is 0.11 arcsec below the middle.
    assert cutout.coverage == pytest.approx(1 - (10 / 3 - (5 - 0.11 - SIDE / 2)) / SIDE, abs=0.01)


def test_i2d_in_another_unit_is_refused(tmp_path: Path) -> None:
    write_i2d(tmp_path, unit="DN/s")
    with pytest.raises(UnknownUnit, match="BUNIT is 'DN/s', a calibrated i2d image is in MJy/sr"):
        read(tmp_path, roles(I2D))


def test_i2d_whose_pixels_were_binned_is_refused(tmp_path: Path) -> None:
    write_i2d(tmp_path, area=0.25)
    with pytest.raises(UnknownUnit, match="so the image was binned"):
        read(tmp_path, roles(I2D))


def test_i2d_without_a_pixel_area_is_refused(tmp_path: Path) -> None:
    write_i2d(tmp_path, PIXAR_SR=0.0)
    with pytest.raises(UnknownUnit, match=r"PIXAR_SR is 0\.0, so a pixel has no flux"):
        read(tmp_path, roles(I2D))


def test_i2d_bands_have_to_be_chosen(tmp_path: Path) -> None:
    write_i2d(tmp_path)
    with pytest.raises(MissingBand, match=r"no band for blue, green, red; present are f115w, f200w, f444w"):
        read(tmp_path, None)


def test_i2d_whose_header_names_another_filter_is_refused(tmp_path: Path) -> None:
    write_i2d(tmp_path)
    folder = tmp_path / "jw01345-o001_t021_nircam_clear-f115w"
    (folder / "jw01345-o001_t021_nircam_clear-f115w_i2d.fits").rename(
        folder / "jw01345-o001_t021_nircam_clear-f150w_i2d.fits"
    )
    with pytest.raises(MissingBand, match="name says band f150w, its header f115w"):
        read(tmp_path, roles(I2D) | {"blue": "f150w"})


@pytest.mark.parametrize(
    ("name", "tile", "band"),
    [
        ("jw02731-o001_t017_nircam_f444w-f470n_i2d.fits", "jw02731-o001_t017_nircam", "f470n"),
        ("jw02731-o001_t017_nircam_f405n-f444w_i2d.fits", "jw02731-o001_t017_nircam", "f405n"),
        ("jw02731-o001_t017_nircam_f150w2-f162m_i2d.fits", "jw02731-o001_t017_nircam", "f162m"),
        ("jw01345-o001_t021_nircam_clear-f150w2_i2d.fits", "jw01345-o001_t021_nircam", "f150w2"),
        ("jw02731-o002_t017_miri_f1130w_i2d.fits", "jw02731-o002_t017_miri", "f1130w"),
        ("jw01245-o037_t001_nircam_clear-f070w-sub400p_i2d.fits", "jw01245-o037_t001_nircam-sub400p", "f070w"),
        ("jw01088-o003_t001_niriss_clearp-f356w_i2d.fits", "jw01088-o003_t001_niriss", "f356w"),
        ("abell2744clu-grizli-v7.2-clearp-f277w_drc_sci.fits.gz", "abell2744clu", "f277w"),
        ("abell2744clu-grizli-v7.2-f115wn-clear_drc_sci.fits.gz", "abell2744clu", "f115wn"),
        ("gds-grizli-v7.0-f160w_drz_sci.fits.gz", "gds", "f160w"),
        ("gds-grizli-v7.0-f850lp_drc_sci.fits.gz", "gds", "f850lp"),
        ("gds-grizli-v7.2-f444w-f405n_drc_sci.fits.gz", "gds", "f405n"),
        ("primer-cosmos-east-grizli-v7.2-f770w_drz_sci.fits.gz", "primer-cosmos-east", "f770w"),
        ("outthere-hudfn-f200wn-clear_drc_sci.fits", "outthere-hudfn", "f200wn"),
    ],
)
def test_names_give_the_tile_and_the_narrower_filter(name: str, tile: str, band: str) -> None:
    named = [parsed for layout in load_survey("jwst").layouts if (parsed := layout.parse(name))]
    assert [(each.tile, each.band, each.kind) for each in named] == [(tile, band, "image")]


@pytest.mark.parametrize(
    "name", ["gds-grizli-v7.2-f444w-clear_drc_exp.fits.gz", "gds-grizli-v7.2-f356w-grismr_drc_sci.fits"]
)
def test_exposure_maps_and_grisms_are_left_out(name: str) -> None:
    assert not find_tiles([f"/a/{name}"], load_survey("jwst").layouts[1], "/a")


def test_mosaics_of_two_telescopes_and_pixel_scales_are_aligned_and_in_njy(tmp_path: Path) -> None:
    write_mosaic(tmp_path)
    cutout = read(tmp_path, roles(MOSAIC))
    assert_star(cutout, side=SIDE, native_pixel=0.02)
    assert cutout.coverage == 1


@pytest.mark.parametrize("left", [0.0, np.nan])
@pytest.mark.parametrize("weights", [True, False])
def test_zero_and_nan_of_a_mosaic_are_no_data(tmp_path: Path, left: float, weights: bool) -> None:
    write_mosaic(tmp_path, left=left, weights=weights)
    cutout = read(tmp_path, roles(MOSAIC))
    assert_star(cutout, side=SIDE, native_pixel=0.02)
    # A third of 11 arcsec is blank, and the star is 0.18 arcsec right of the middle.
    assert cutout.coverage == pytest.approx(1 - (11 / 3 - (5.5 + 0.18 - SIDE / 2)) / SIDE, abs=0.01)


def test_photfnu_alone_or_bunit_alone_says_the_unit(tmp_path: Path) -> None:
    (tmp_path / "photfnu").mkdir()
    write_mosaic(tmp_path / "photfnu", unit=None)
    (tmp_path / "bunit").mkdir()
    write_mosaic(tmp_path / "bunit", photfnu=0.0)
    for folder in ("photfnu", "bunit"):
        assert_star(read(tmp_path / folder, roles(MOSAIC)), side=SIDE, native_pixel=0.02)


@pytest.mark.parametrize(
    ("unit", "photfnu", "message"),
    [
        (None, 0.0, r"neither BUNIT nor PHOTFNU \(0\.0\) says the unit"),
        ("10.0*nanoJansky", 9.3e-8, r"BUNIT is '10\.0\*nanoJansky' and PHOTFNU 9\.3e-08 Jy, which is 93 nJy"),
        ("ELECTRONS/S", 1e-8, "BUNIT 'ELECTRONS/S' cannot be turned into nJy"),
    ],
)
def test_a_mosaic_whose_header_does_not_say_its_unit_is_refused(
    tmp_path: Path, unit: str | None, photfnu: float, message: str
) -> None:
    write_mosaic(tmp_path, unit=unit, photfnu=photfnu)
    with pytest.raises(UnknownUnit, match=message):
        read(tmp_path, roles(MOSAIC))


def test_the_newest_version_of_a_mosaic_wins(tmp_path: Path) -> None:
    write_mosaic(tmp_path, version="v7.0", brighter=1.0)
    write_mosaic(tmp_path, version="v7.2")
    assert_star(read(tmp_path, roles(MOSAIC)), side=SIDE, native_pixel=0.02)


def test_a_weight_of_another_grid_is_refused(tmp_path: Path) -> None:
    write_mosaic(tmp_path)
    name = tmp_path / "cosmos-grizli-v7.2-f814w_drc"
    Path(f"{name}_exp.fits.gz").rename(f"{name}_wht.fits.gz")
    with pytest.raises(UnreadableInput, match="do not belong together"):
        read(tmp_path, roles(MOSAIC))


def test_hst_mosaics_of_grizli_are_not_taken_for_drizzled_hst_files(tmp_path: Path) -> None:
    write_mosaic(tmp_path, TELESCOP="HST", PHOTFLAM=1e-19, PHOTPLAM=8000.0)
    reader = open_source(tmp_path, catalogue=write_catalogue(tmp_path / "s.csv"), bands=roles(MOSAIC))
    assert reader.survey == "jwst"


def test_mosaics_beside_another_survey_are_an_error_that_names_both(tmp_path: Path) -> None:
    write_mosaic(tmp_path)
    header = celestial_cards(tan_wcs((40, 40), 0.396)) + fits.Header({"BUNIT": "nanomaggy", "FILTER": "r"})
    fits.writeto(tmp_path / "frame-r-002820-3-0122.fits", np.ones((40, 40), np.float32), header)
    with pytest.raises(BadRequest, match=r"(?s)more than one survey:.*sdss: 1 tile.*jwst: 1 tile.*GRIZLIV"):
        read(tmp_path, roles(MOSAIC))


def test_version_ten_is_newer_than_version_two() -> None:
    layout = load_survey("jwst").layout("mosaic")
    names = [f"/d/abell-grizli-v7.{minor}-f444w-clear_drc_sci.fits" for minor in (2, 10, 9)]
    (tile,) = find_tiles(names, layout, "/d").values()
    assert tile.first_image == names[1]
    assert tile.superseded == (names[0], names[2])
