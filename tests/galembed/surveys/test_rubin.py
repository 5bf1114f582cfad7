"""Rubin DP1 deep coadds and the cutout service's files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS

from galembed.cutouts import Cutout
from galembed.errors import BadRequest, GalembedError, MissingBand, UnknownUnit, UnreadableInput
from galembed.sources import open_source
from tests.galembed.surveys.stars import (
    DEC,
    MAGNITUDE,
    RA,
    assert_star,
    celestial_cards,
    njy,
    read_star,
    star_image,
    write_catalogue,
)

PIXEL = 0.2
SHAPE = (170, 190)
BANDS = {"g": "blue", "r": "green", "i": "red"}
RUN = "lsst_cells_v1_LSSTComCam_runs_DRP_DP1_DM-51335"
TRACT = (14999.0, 14999.0)
"""Reference pixel of the tract, 1-based."""
ORIGIN = (17780, 11900)
"""Of the patch in the tract (x, y)."""
CUT = (70, 50)
"""First pixel of a cutout in its patch (x, y)."""
CUT_SHAPE = (104, 110)


def patch_wcs() -> WCS:
    """The TAN of a tract in pixels of the patch, with the star at (95.3, 84.6), 0.2 deg from the reference point."""
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.cd = np.diag([-PIXEL, PIXEL]) / 3600
    wcs.wcs.crpix = np.array(TRACT) - ORIGIN
    wcs.wcs.crval = [RA, DEC]
    for _ in range(5):  # shift the tract until the star falls where it should
        sky = wcs.all_pix2world([(95.3, 84.6)], 0)[0]
        wcs.wcs.crval = wcs.wcs.crval + np.array([RA, DEC]) - sky
    return wcs


def exposure(band: str, *, mask: np.ndarray | None = None) -> fits.HDUList:
    """An Exposure as the pipeline writes it: all but the WCS in the primary header, then three planes and tables."""
    primary = fits.Header({"BUNIT": "nJy"})
    primary["HIERARCH LSST BUTLER DATASETTYPE"] = "deep_coadd"
    primary["HIERARCH LSST BUTLER DATAID BAND"] = band
    wcs = patch_wcs()
    cards = celestial_cards(wcs) + fits.Header(
        {"LTV1": -float(ORIGIN[0]), "LTV2": -float(ORIGIN[1]), "INHERIT": True, "RADESYS": "ICRS"}
    )
    for axis in (1, 2):
        cards.update({f"CTYPE{axis}A": "LINEAR", f"CRPIX{axis}A": 1.0, f"CRVAL{axis}A": float(ORIGIN[axis - 1])})
    image = star_image(SHAPE, wcs, njy(MAGNITUDE[BANDS[band]]))
    planes = {"BAD": 0, "SAT": 1, "DETECTED": 5, "NO_DATA": 8, "INEXACT_PSF": 11}
    bits = fits.Header()
    for plane, bit in planes.items():
        bits[f"HIERARCH MP_{plane}"] = bit
    hdus = {
        "IMAGE": (image, cards),
        "MASK": (np.full(SHAPE, 1 << 5 | 1 << 11, np.int32) if mask is None else mask, cards + bits),
        "VARIANCE": (np.full(SHAPE, 4.0, np.float32), cards),
    }
    table = fits.BinTableHDU.from_columns([fits.Column("id", "J", array=[1])], name="ARCHIVE_INDEX")
    found = fits.HDUList([fits.PrimaryHDU(header=primary)])
    found += [fits.ImageHDU(data, header, name=name) for name, (data, header) in hdus.items()]
    return fits.HDUList([*found, table])


def write_coadds(root: Path, *, compress: bool = False, mask: np.ndarray | None = None) -> None:
    """A patch in three bands, each in a folder of its own, as a Butler keeps them."""
    for band in BANDS:
        folder = root / "deep_coadd" / "5063" / "14" / band
        folder.mkdir(parents=True)
        hdus = exposure(band, mask=mask)
        if compress:
            hdus[1] = fits.CompImageHDU(hdus[1].data, hdus[1].header, name="IMAGE", tile_shape=(50, 50))
        hdus.writeto(folder / f"deep_coadd_5063_14_{band}_{RUN}.fits")


def coadd_path(root: Path, band: str) -> Path:
    return root / "deep_coadd" / "5063" / "14" / band / f"deep_coadd_5063_14_{band}_{RUN}.fits"


def cutout_of(band: str, mode: str) -> fits.HDUList:
    """What the cutout service returns for a CUTOUTMODE, with the header that it writes."""
    full = exposure(band)
    keep = {"Image": ["IMAGE"], "Masked-image": ["IMAGE", "MASK", "VARIANCE"]}.get(mode, [hdu.name for hdu in full[1:]])
    full[0].header.update(
        {"BTLRNAME": "deep_coadd", "BTLRK000": "band", "BTLRV000": band, "BTLRK001": "tract", "BTLRV001": 5063}
        | {"ST_TYPE": "CIRCLE", "ST_RA": RA, "ST_DEC": DEC, "ST_RAD": 10 / 3600}
    )
    found: list[object] = [full[0]]
    for name in keep:
        hdu = full[name]
        if hdu.is_image:
            x, y = CUT
            hdu.data = hdu.data[y : y + CUT_SHAPE[0], x : x + CUT_SHAPE[1]]
            for axis, shift in ((1, x), (2, y)):
                hdu.header[f"CRPIX{axis}"] -= shift
                hdu.header[f"LTV{axis}"] -= shift
                hdu.header[f"CRVAL{axis}A"] += shift
        found.append(hdu)
    return fits.HDUList(found)


def write_cutouts(folder: Path, *, mode: str = "Image", name: str = "ngc1_{}.fits") -> list[Path]:
    paths = [folder / name.format(band) for band in BANDS]
    for band, path in zip(BANDS, paths, strict=True):
        cutout_of(band, mode).writeto(path)
    return paths


def read_tile(root: Path) -> Cutout:
    return read_star(root, catalogue=write_catalogue(root / "s.csv"))


def change(paths: list[Path], hdu: int | str, **cards: object) -> None:
    for path in paths:
        with fits.open(path, mode="update") as file:
            file[hdu].header.update(cards)


@pytest.mark.parametrize("compress", [False, True])
def test_a_patch_far_from_the_reference_of_its_tract_is_placed_by_its_header(tmp_path: Path, compress: bool) -> None:
    write_coadds(tmp_path, compress=compress)
    cutout = read_tile(tmp_path)
    assert_star(cutout, native_pixel=PIXEL)
    assert cutout.coverage == 1


@pytest.mark.parametrize("mode", ["Image", "Masked-image", "Exposure"])
def test_every_cutout_mode_is_read(tmp_path: Path, mode: str) -> None:
    write_cutouts(tmp_path, mode=mode)
    # The star is at (95.3, 84.6) of the patch, the cutout's middle at (124.5, 101.5).
    offset = ((95.3 - 124.5) * PIXEL, (84.6 - 101.5) * PIXEL)
    assert_star(read_star(tmp_path, side=20.8, size=104), side=20.8, native_pixel=PIXEL, offset=offset)


def test_a_cutout_without_a_band_in_its_name_is_of_the_band_in_its_header(tmp_path: Path) -> None:
    cutout_of("r", "Image").writeto(tmp_path / "0f3a9c1e5b7d4f6a.fits")
    cutout = read_star(tmp_path, side=20.8, size=104, bands="r")
    offset = ((95.3 - 124.5) * PIXEL, (84.6 - 101.5) * PIXEL)
    magnitudes = dict.fromkeys(MAGNITUDE, MAGNITUDE["green"])
    assert_star(cutout, side=20.8, native_pixel=PIXEL, offset=offset, magnitudes=magnitudes)


def test_a_cutout_in_one_band_does_not_stand_for_three(tmp_path: Path) -> None:
    cutout_of("r", "Image").writeto(tmp_path / "0f3a9c1e5b7d4f6a.fits")
    with pytest.raises(MissingBand, match=r"no band for g .*present are r"):
        read_star(tmp_path)


def test_planes_are_found_by_name_in_any_order(tmp_path: Path) -> None:
    write_coadds(tmp_path)
    for band in BANDS:
        with fits.open(coadd_path(tmp_path, band)) as file:
            shuffled = fits.HDUList([file[0], file["VARIANCE"], file["ARCHIVE_INDEX"], file["MASK"], file["IMAGE"]])
            shuffled.writeto(coadd_path(tmp_path, band), overwrite=True)
    assert_star(read_tile(tmp_path), native_pixel=PIXEL)


@pytest.mark.parametrize("bit", [8, 3])
def test_the_mask_says_which_bit_is_no_data(tmp_path: Path, bit: int) -> None:
    mask = np.zeros(SHAPE, np.int32)
    mask[100:120] = 1 << bit
    write_coadds(tmp_path, mask=mask)
    change([coadd_path(tmp_path, band) for band in BANDS], "MASK", **{"HIERARCH MP_NO_DATA": 3})
    expected = 1.0 if bit == 8 else 0.8
    assert read_tile(tmp_path).coverage == pytest.approx(expected, abs=0.03)


def test_a_mask_that_names_no_planes_is_refused(tmp_path: Path) -> None:
    write_coadds(tmp_path)
    with fits.open(coadd_path(tmp_path, "g"), mode="update") as file:
        del file["MASK"].header["MP_NO_DATA"]
    with pytest.raises(UnreadableInput, match="does not name its plane NO_DATA"):
        read_tile(tmp_path)


def test_a_variance_that_is_nan_is_no_data(tmp_path: Path) -> None:
    write_coadds(tmp_path)
    with fits.open(coadd_path(tmp_path, "r"), mode="update") as file:
        file["VARIANCE"].data[100:120] = np.nan
    assert read_tile(tmp_path).coverage == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize(
    ("hdu", "cards", "error", "message"),
    [
        ("PRIMARY", {"BUNIT": ""}, UnknownUnit, "no BUNIT"),
        ("IMAGE", {"BUNIT": "adu"}, UnknownUnit, "'adu'"),
        ("IMAGE", {"LTV1": -17780.4}, UnreadableInput, "are no whole pixels"),
        ("IMAGE", {"CRPIX1": -2700.0}, UnreadableInput, "reference pixel of the tract"),
        ("IMAGE", {"CD1_1": -0.263 / 3600, "CD2_2": 0.263 / 3600}, UnreadableInput, r"arcsec is 0\.263 by its header"),
        ("PRIMARY", {"HIERARCH LSST BUTLER DATAID BAND": "z"}, MissingBand, "name says band r, its header z"),
        (
            "PRIMARY",
            {"HIERARCH LSST BUTLER DATASETTYPE": "visit_image"},
            UnreadableInput,
            "is a visit_image: only deep",
        ),
        ("IMAGE", {"CTYPE1": "RA---TAN-SIP", "CTYPE2": "DEC--TAN-SIP"}, UnreadableInput, "has a TAN-SIP WCS"),
        ("MASK", {"MSKN0000": "NO_DATA", "MSKM0000": 1}, UnreadableInput, r"Rubin DP2 \(CellCoadd\)"),
        ("IMAGE", {"EXTNAME": "OTHER"}, UnreadableInput, "no HDU named IMAGE"),
    ],
)
def test_a_coadd_that_is_not_as_documented_is_refused(
    tmp_path: Path, hdu: str, cards: dict[str, object], error: type[GalembedError], message: str
) -> None:
    write_coadds(tmp_path)
    change([coadd_path(tmp_path, "r")], hdu, **cards)
    with pytest.raises(error, match=message):
        read_tile(tmp_path)


def test_a_cutout_whose_wcs_misses_its_own_position_is_refused(tmp_path: Path) -> None:
    paths = write_cutouts(tmp_path)
    for path in paths:
        with fits.open(path, mode="update") as file:
            for axis in (1, 2):  # shifted by the place in the tract where that in the patch is due
                file[1].header[f"CRPIX{axis}"] -= ORIGIN[axis - 1]
                file[1].header[f"LTV{axis}"] -= ORIGIN[axis - 1]
    with pytest.raises(UnreadableInput, match="so the WCS is wrong; fetch it with CUTOUTMODE=Exposure"):
        read_star(tmp_path)


def test_cutouts_of_visits_are_refused(tmp_path: Path) -> None:
    change(write_cutouts(tmp_path), 0, BTLRNAME="visit_image")
    with pytest.raises(UnreadableInput, match="is a visit_image: only deep coadds are read"):
        read_star(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "visit_image_LSSTComCam_g_g_01_2024120600239_R22_S00_LSSTComCam_runs_DRP_DP1_DM-1.fits",
            "visit images are not",
        ),
        ("deep_coadd_5063_14_g_lsst_cells_v2_LSSTCam_runs_DRP_DP2_DM-54000.fits", r"Rubin DP2 \(CellCoadd\)"),
        ("ngc1_CellCoadd_g.fits", r"Rubin DP2 \(CellCoadd\)"),
    ],
)
def test_releases_that_are_not_read_are_refused_by_name(tmp_path: Path, name: str, message: str) -> None:
    exposure("g").writeto(tmp_path / name)
    with pytest.raises(BadRequest, match=message):
        open_source(tmp_path, catalogue=write_catalogue(tmp_path / "s.csv"))


def test_coadds_among_another_survey_are_recognised_and_named(tmp_path: Path) -> None:
    write_coadds(tmp_path)
    assert open_source(tmp_path, catalogue=write_catalogue(tmp_path / "s.csv")).survey == "rubin"
    for band in BANDS:
        header = fits.Header({"ORIGIN": "SDSS", "BUNIT": "nanomaggy"})
        fits.PrimaryHDU(np.ones(SHAPE, np.float32), header).writeto(tmp_path / f"m31_{band}.fits")
    with pytest.raises(BadRequest, match=r"(?s)more than one survey:.*sdss: 1 cutout.*rubin: 1 tile"):
        open_source(tmp_path, catalogue=tmp_path / "s.csv")
