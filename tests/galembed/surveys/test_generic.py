"""Files that a description (YAML or TOML) explains, and files whose headers say everything."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits

from galembed.errors import (
    ArtifactMismatch,
    ArtifactNotFound,
    BadRequest,
    GalembedError,
    MissingBand,
    MissingWCS,
    UnknownUnit,
    UnreadableInput,
)
from galembed.schemas import StoreContract
from galembed.sources import open_source
from galembed.surveys import _load, load_survey
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

PIXEL = 0.187
SHAPE = (150, 170)
SIDE = 80 * PIXEL
ZERO_POINT = 30.0
BANDS = {"g": "blue", "r": "green", "i": "red"}
ROLES = "roles: {blue: g, green: r, red: i}\n"
SKY = 1e-3
OFFSET = (2.7, -4.4)


def counts(role: str, zero_point: float = ZERO_POINT) -> float:
    """Counts of the star, from the definition of a zero point."""
    return float(10 ** (0.4 * (zero_point - MAGNITUDE[role])))


def described(folder: Path, text: str, name: str = "cfhtls.yaml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def write_cubes(folder: Path, *, with_wcs: bool = True, planes: int = 3, zeros: int = 0) -> None:
    """Two cubes without band keywords or units, of which one is the star's."""
    wcs = tan_wcs(SHAPE, PIXEL)
    cube = np.stack([star_image(SHAPE, wcs, counts(role), sky=SKY) for role in BANDS.values()])[:planes]
    cube[:, :zeros] = 0
    fits.writeto(folder / "Cut_a.fits", cube.astype(np.float64), celestial_cards(wcs) if with_wcs else None)


def write_files(folder: Path, *, pixel: float = PIXEL, hdu: bool = False) -> None:
    """One tile or cutout, a file a band, with weight and mask files; a fifth is masked, and another has no weight."""
    for number, (band, role) in enumerate(BANDS.items()):
        wcs = tan_wcs(SHAPE, pixel, offset=OFFSET, rotation=0.2 * number)
        image = star_image(SHAPE, wcs, counts(role), sky=SKY)
        weight, mask = np.ones(SHAPE, np.float32), np.full(SHAPE, 1 << 2, np.int16)
        image[:30] = image[-30:] = 1e7
        weight[:30] = 0
        mask[-30:] = 1 << 3
        cards = celestial_cards(wcs)
        if hdu:
            hdus = [fits.PrimaryHDU(), fits.ImageHDU(image, cards, name="SCI"), fits.ImageHDU(weight, name="WHT")]
            fits.HDUList([*hdus, fits.ImageHDU(mask, name="DQ")]).writeto(folder / f"D1_{band}.fits")
            continue
        fits.writeto(folder / f"D1_{band}.fits", image, cards)
        fits.writeto(folder / f"D1_{band}_wht.fits", weight, cards)
        fits.writeto(folder / f"D1_{band}_flag.fits", mask, cards)


CUBE = f"name: pair\nfiles: 'Cut_{{tile}}.fits'\nbands: [g, r, i]\n{ROLES}zero_point: 30.0\npixel_arcsec: {PIXEL}\n"
FILES = (
    "name: cfhtls\nfiles: 'D{tile}_{band}.fits'\nweight: 'D{tile}_{band}_wht.fits'\nmask: 'D{tile}_{band}_flag.fits'\n"
    f"bands: [g, r, i]\n{ROLES}zero_point: 30.0\nno_data_bits: [0, 3]\npixel_arcsec: {PIXEL}\n"
)
HDUS = (
    "name: cfhtls\nfiles: 'D{tile}_{band}.fits'\nhdu: SCI\nweight_hdu: WHT\nmask_hdu: DQ\n"
    f"bands: [g, r, i]\n{ROLES}zero_point: 30.0\nno_data_bits: [0, 3]\n"
)
TOML = """
name = "cfhtls"
files = "D{tile}_{band}.fits"
weight = "D{tile}_{band}_wht.fits"
mask = "D{tile}_{band}_flag.fits"
bands = ["g", "r", "i"]
roles = {blue = "g", green = "r", red = "i"}
zero_point = 30.0
no_data_bits = [0, 3]
"""


@pytest.mark.parametrize("with_wcs", [True, False])
def test_a_cube_without_keywords_is_read_by_its_description(tmp_path: Path, with_wcs: bool) -> None:
    write_cubes(tmp_path, with_wcs=with_wcs)
    cutout = read_star(tmp_path, side=SIDE, survey=described(tmp_path, CUBE), fov=None if not with_wcs else SIDE)
    if not with_wcs:
        assert cutout.fov_arcsec is None
        middle = cutout.pixels.sum(axis=(1, 2)) * (75 / 80 * PIXEL / 0.262) ** 2  # the middle 75 pixels, on 80
        np.testing.assert_allclose(middle, [njy(MAGNITUDE[role]) for role in BANDS.values()], rtol=0.01)
        return
    assert_star(cutout, side=SIDE, native_pixel=PIXEL)


@pytest.mark.parametrize(("text", "name"), [(FILES, "cfhtls.yaml"), (TOML, "cfhtls.toml")])
def test_a_tile_with_weight_and_mask_files_is_read(tmp_path: Path, text: str, name: str) -> None:
    write_files(tmp_path)
    scoped = f"scope: tile\n{text}" if name.endswith(".yaml") else f'scope = "tile"\n{text}'
    cutout = read_star(
        tmp_path,
        side=SIDE,
        survey=described(tmp_path, scoped, name),
        catalogue=write_catalogue(tmp_path / "s.csv"),
    )
    assert_star(cutout, side=SIDE, native_pixel=PIXEL)


@pytest.mark.parametrize(("text", "hdu"), [(FILES, False), (HDUS, True)])
def test_weights_and_masks_of_cutouts_are_no_data(tmp_path: Path, text: str, hdu: bool) -> None:
    write_files(tmp_path, hdu=hdu)
    side = 140 * PIXEL
    cutout = read_star(tmp_path, side=side, size=140, survey=described(tmp_path, text), fov=side)
    assert_star(cutout, side=side, native_pixel=PIXEL, offset=(OFFSET[0] * PIXEL, OFFSET[1] * PIXEL))
    # The frame's middle 140 rows of 150, less 30 at either end.
    assert cutout.coverage == pytest.approx(1 - 2 * 25 / 140, abs=0.02)


def test_zero_is_no_data_where_the_description_says_so(tmp_path: Path) -> None:
    write_cubes(tmp_path, zeros=50)
    for text, coverage in ((CUBE, 1.0), (CUBE + "zero_is_no_data: true\n", 1 - 15 / 80)):
        cutout = read_star(tmp_path, side=SIDE, survey=described(tmp_path, text, f"{coverage}.yaml"), fov=SIDE)
        assert cutout.coverage == pytest.approx(coverage, abs=0.01)


def test_a_described_unit_takes_the_place_of_a_zero_point(tmp_path: Path) -> None:
    wcs = tan_wcs(SHAPE, PIXEL)
    for band, role in BANDS.items():
        image = star_image(SHAPE, wcs, njy(MAGNITUDE[role]) / 1e3, sky=1e-9)
        fits.writeto(tmp_path / f"D1_{band}.fits.gz", image, celestial_cards(wcs))
    text = f"name: mine\nfiles: 'D{{tile}}_{{band}}.fits'\nbands: [g, r, i]\n{ROLES}unit: uJy\n"
    assert_star(
        read_star(tmp_path, side=SIDE, survey=described(tmp_path, text), fov=SIDE), side=SIDE, native_pixel=PIXEL
    )


def test_the_name_of_a_description_is_the_survey_of_the_rows(tmp_path: Path) -> None:
    write_cubes(tmp_path)
    table = open_source(tmp_path, survey=described(tmp_path, CUBE)).sources().table
    assert table["survey"].to_pylist() == ["pair"]
    assert table["source_id"].to_pylist() == ["Cut_a"]


def test_pixels_of_another_scale_than_described_are_refused(tmp_path: Path) -> None:
    write_cubes(tmp_path)
    text = CUBE.replace(f"pixel_arcsec: {PIXEL}", "pixel_arcsec: 0.2")
    with pytest.raises(UnreadableInput, match=r"its WCS has pixels of 0\.187 arcsec, the description says 0\.2"):
        read_star(tmp_path, survey=described(tmp_path, text))


def test_counts_without_a_wcs_or_a_described_pixel_are_refused(tmp_path: Path) -> None:
    write_cubes(tmp_path, with_wcs=False)
    text = CUBE.replace(f"pixel_arcsec: {PIXEL}\n", "")
    with pytest.raises(UnknownUnit, match="a flux per pixel needs a sky WCS"):
        read_star(tmp_path, survey=described(tmp_path, text))


def test_a_cube_with_other_planes_than_bands_is_refused(tmp_path: Path) -> None:
    write_cubes(tmp_path, planes=2)
    with pytest.raises(MissingBand, match=r"Cut_a\.fits\[0\]: 2 planes for the bands g, r, i"):
        read_star(tmp_path, survey=described(tmp_path, CUBE))


def test_a_named_hdu_that_is_not_there_is_refused(tmp_path: Path) -> None:
    write_files(tmp_path)
    with pytest.raises(UnreadableInput, match=r"D1_g\.fits: no HDU 'SCI'; its HDUs are 0 PRIMARY"):
        read_star(tmp_path, survey=described(tmp_path, HDUS.replace("_{band}.fits'", "_{band}.fits'", 1)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (CUBE + "zeropoint: 3\n", "unknown item.*zeropoint; known are"),
        (CUBE + "unit: nJy\n", r"give zero_point \(AB magnitude of one count\) or unit, one of them"),
        (CUBE.replace("zero_point: 30.0\n", ""), r"give zero_point \(AB magnitude of one count\) or unit"),
        (CUBE.replace("name: pair\n", ""), "name missing"),
        (CUBE.replace("{tile}", "x"), r"needs \{tile\}"),
        (CUBE + "scope: brick\n", "scope is tile or cutout, got 'brick'"),
        (CUBE.replace("red: i", "red: z"), "roles: red: z"),
        (CUBE + "no_data_bits: [3]\n", "no_data_bits need a mask or mask_hdu"),
        (CUBE.replace("zero_point: 30.0", "unit: counts"), "BUNIT 'counts' cannot be turned into nJy"),
        (CUBE.replace("zero_point: 30.0", "zero_point: thirty"), "zero_point is a number, got 'thirty'"),
        (CUBE.replace(f"pixel_arcsec: {PIXEL}", "pixel_arcsec: -1"), r"pixel_arcsec is the side of a pixel, got -1\.0"),
        (CUBE.replace("bands: [g, r, i]", "bands: gri"), "bands is a list in brackets, got 'gri'"),
        (CUBE.replace("bands: [g, r, i]", "bands: [g, r, i, g]"), "bands are named once each, got g, r, i, g"),
        (FILES.replace("[0, 3]", "[-1]"), r"no_data_bits are bit numbers from 0 on, got \(-1,\)"),
        (CUBE + "zero_is_no_data: 'false'\n", "zero_is_no_data is true or false, got 'false'"),
        ("- a\n- b\n", "a description is a list of `item: value` lines"),
        ("name: [\n", "cannot be read"),
    ],
)
def test_a_description_that_makes_no_sense_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(GalembedError, match=message) as caught:
        load_survey(described(tmp_path, text))
    assert isinstance(caught.value, BadRequest | UnknownUnit)
    assert "cfhtls.yaml" in str(caught.value)


def test_a_description_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactNotFound, match=r"no survey description at .*none\.yaml"):
        load_survey(str(tmp_path / "none.yaml"))


def test_files_of_other_names_are_told_apart_from_described_ones(tmp_path: Path) -> None:
    write_cubes(tmp_path)
    (tmp_path / "Cut_a.fits").rename(tmp_path / "other.fits")
    with pytest.raises(UnreadableInput, match=r"none of its 1 FITS files is named as pair \(described\)'s"):
        open_source(tmp_path, survey=described(tmp_path, CUBE))


def write_self_described(folder: Path, **header: object) -> None:
    wcs = tan_wcs(SHAPE, PIXEL)
    cube = np.stack([star_image(SHAPE, wcs, njy(MAGNITUDE[role]) / 1e3, sky=1e-9) for role in BANDS.values()])
    cards = celestial_cards(wcs) + fits.Header({"BUNIT": "uJy", "BANDS": "gri"} | header)
    fits.writeto(folder / "a.fits", cube, cards)


def test_headers_that_name_unit_and_bands_are_enough(tmp_path: Path) -> None:
    write_self_described(tmp_path)
    reader = open_source(tmp_path, bands={"red": "i"})
    assert reader.survey == "generic"
    assert_star(read_star(tmp_path, side=SIDE, bands={"red": "i"}, fov=SIDE), side=SIDE, native_pixel=PIXEL)


def test_an_unknown_unit_is_named(tmp_path: Path) -> None:
    write_self_described(tmp_path, BUNIT="JY/BEAM")
    with pytest.raises(
        UnknownUnit, match=r"(?s)BUNIT 'JY/BEAM' cannot be turned into nJy.*describe the files in FILE\.yaml"
    ):
        open_source(tmp_path)


@pytest.mark.shared_data
def test_a_real_cube_without_keywords_is_read_by_its_description(shared_data: Path, tmp_path: Path) -> None:
    text = (
        "name: pair\nfiles: 'Cut_{tile}.fits'\nbands: [g, r, i, z, y]\nroles: {blue: g, green: r, red: y}\n"
        "zero_point: 27.0\npixel_arcsec: 0.168\n"
    )
    path = shared_data / "fits" / "hsc_hst_pair" / "Cut_HSC1.fits"
    (tmp_path / path.name).symlink_to(path)
    side = 50 * 0.168
    cutout = read_star(tmp_path, side=side, size=50, survey=described(tmp_path, text), fov=side)
    expected = fits.getdata(path)[[0, 1, 4]] * njy(27.0) * (0.262 / 0.168) ** 2
    np.testing.assert_allclose(cutout.pixels, expected, rtol=1e-3, atol=1e-2 * expected.std())


def test_a_description_that_changes_is_read_again_and_is_no_longer_the_stores(tmp_path: Path) -> None:
    write_cubes(tmp_path)
    path = described(tmp_path, CUBE)
    before = open_source(tmp_path, survey=path)
    faint = read_star(tmp_path, survey=path)
    described(tmp_path, CUBE.replace("30.0", "25.0"))
    bright = read_star(tmp_path, survey=path)
    np.testing.assert_allclose(bright.pixels, faint.pixels * 100, rtol=1e-4)
    after = open_source(tmp_path, survey=path)
    one, other = (StoreContract("id", "/b", "flux", "fp32", survey=reader.survey) for reader in (before, after))
    one.require_same(one)
    with pytest.raises(ArtifactMismatch, match="another text of"):
        one.require_same(other)
    _load.cache_clear()  # as in a worker that has not read it yet
    with pytest.raises(ArtifactMismatch, match="was changed since it was used"):
        load_survey(before.survey)


def test_a_described_weight_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    write_files(tmp_path)
    text = FILES.replace("D{tile}_{band}_wht.fits", "D{tile}_{band}_weight.fits")
    with pytest.raises(UnreadableInput, match="has a weight file"):
        read_star(
            tmp_path, survey=described(tmp_path, text + "scope: tile\n"), catalogue=write_catalogue(tmp_path / "s.csv")
        )


def test_a_described_tile_may_keep_each_band_in_a_folder(tmp_path: Path) -> None:
    write_files(tmp_path)
    for band in BANDS:
        (tmp_path / band).mkdir()
        for file in tmp_path.glob(f"D1_{band}*.fits"):
            file.rename(tmp_path / band / file.name)
    survey = described(tmp_path, FILES + "scope: tile\n")
    assert read_star(tmp_path, survey=survey, catalogue=write_catalogue(tmp_path / "s.csv")).coverage > 0.5


def test_bands_of_other_shapes_without_a_wcs_are_not_lined_up_by_guess(tmp_path: Path) -> None:
    for band, size in zip(BANDS, (64, 128, 64), strict=True):
        fits.writeto(tmp_path / f"c_1_{band}.fits", np.random.default_rng(0).normal(size=(size, size)))
    text = f"name: x\nfiles: 'c_{{tile}}_{{band}}.fits'\nbands: [g, r, i]\n{ROLES}zero_point: 30.0\npixel_arcsec: 0.2\n"
    with pytest.raises(MissingWCS, match="bands on different grids"):
        read_star(tmp_path, survey=described(tmp_path, text))


def test_images_that_do_not_fit_a_description_say_what_to_change(tmp_path: Path) -> None:
    stamp = np.ones((20, 20), np.float32)
    one = "name: x\nfiles: '{tile}.fits'\nbands: [g]\nzero_point: 30.0\npixel_arcsec: 0.2\n"
    three = one.replace("[g]", "[g, r, i]") + ROLES
    for name, hdus, text, words in (
        ("a", [fits.PrimaryHDU(stamp), fits.ImageHDU(stamp)], one, r"2 2-D images where one .*name it with `hdu:`"),
        ("b", [fits.PrimaryHDU(stamp), fits.ImageHDU(stamp)], one, r"write each to a file of its own"),
        ("c", [fits.PrimaryHDU(stamp)], three, r"no cube of the bands g, r, i, but 1 2-D image\(s\); put \{band\}"),
        ("d", [fits.PrimaryHDU(np.ones((3, 20, 20)))], one, r"no 2-D image, but 1 cube\(s\); list the bands of its"),
        ("e", [fits.PrimaryHDU()], one, r"no 2-D image; leave this file out of `files:`"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        fits.HDUList(hdus).writeto(folder / "1.fits")
        survey = described(tmp_path, text)
        with pytest.raises(UnreadableInput, match=words):
            read_star(folder, survey=survey, bands="g")


def test_a_description_without_roles_names_the_band_that_it_has_where_no_file_can_be_read(tmp_path: Path) -> None:
    fits.writeto(tmp_path / "1.fits", np.ones((20, 20), np.float32))
    text = "name: x\nfiles: '{tile}.fits'\nbands: [Halpha]\nzero_point: 30.0\n"
    with pytest.raises(MissingBand, match=r"no band for blue, green, red; present are Halpha\..*--bands Halpha"):
        open_source(tmp_path, survey=described(tmp_path, text))
    with pytest.raises(UnknownUnit, match=r"there is none; say `pixel_arcsec:` in a description"):
        read_star(tmp_path, survey=described(tmp_path, text), bands="Halpha")


def test_a_description_may_not_take_a_surveys_name(tmp_path: Path) -> None:
    write_cubes(tmp_path)
    with pytest.raises(BadRequest, match="sdss is the name of a survey"):
        open_source(tmp_path, survey=described(tmp_path, CUBE.replace("name: pair", "name: sdss")))
