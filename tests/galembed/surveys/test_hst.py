"""HST drizzled mosaics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits

from galembed.errors import BadRequest, MissingBand, UnknownUnit
from galembed.sources import open_source
from tests.galembed.surveys.stars import (
    MAGNITUDE,
    assert_star,
    celestial_cards,
    read_star,
    star_image,
    tan_wcs,
    write_catalogue,
)

PIXEL = 0.05
SHAPE = (260, 300)
SIDE = 8.0
BLANK = 120
# The star is 3.2 pixels right of the centre.
COVERAGE = 1 - (BLANK - 0.5 - (149.5 + 3.2 - SIDE / PIXEL / 2)) / (SIDE / PIXEL)
BANDS = {"blue": "f435w", "green": "f606w", "red": "f814w"}
PHOT = {"f435w": (3.0e-19, 4330.0), "f606w": (7.8e-20, 5921.0), "f814w": (7.0e-20, 8045.0)}
EXPTIME = 2028.0
PER_ELECTRON = "inverse sensitivity, ergs/cm2/Ang/electron"


def electrons(band: str, magnitude: float) -> float:
    """Rate of an AB magnitude from first principles: f_nu = f_lambda lambda^2 / c, and 3631 Jy is magnitude 0."""
    flam, plam = PHOT[band]
    jansky_per_electron = flam * plam**2 / 2.99792458e18 * 1e23
    return 3631 * 10 ** (-0.4 * magnitude) / jansky_per_electron


def cards(band: str, unit: str | None, comment: str = PER_ELECTRON) -> fits.Header:
    header = fits.Header({"PHOTPLAM": PHOT[band][1]})
    header["PHOTFLAM"] = (PHOT[band][0], comment)
    if unit is not None:
        header["BUNIT"] = unit
    return header


def write_drizzled(
    folder: Path,
    *,
    unit: str | None = "ELECTRONS/S",
    name: str = "hst_10188_10_acs_wfc_{band}_drz.fits",
    single: bool = False,
    weight: np.ndarray | None = None,
    blank: float | None = None,
    comment: str = PER_ELECTRON,
    bands: dict[str, str] = BANDS,
    **primary: object,
) -> None:
    """A field as MultiDrizzle and astrodrizzle write it, or (`single`) as one HDU; `blank` fills its left 40%."""
    for role, band in bands.items():
        wcs = tan_wcs(SHAPE, PIXEL, offset=(3.2, -4.7), rotation=30.0)
        rate = electrons(band, MAGNITUDE[role])
        total = rate * (EXPTIME if unit in ("ELECTRONS", "COUNTS") else 1)
        image = star_image(SHAPE, wcs, total, 0.3, sky=1e-9 * total)
        if blank is not None:
            image[:, :BLANK] = blank
        top = fits.Header(
            {"TELESCOP": "HST", "INSTRUME": "ACS", "FILTER1": "CLEAR1L", "FILTER2": band.upper()} | primary
        )
        if "EXPTIME" not in top:
            top["EXPTIME"] = EXPTIME
        science = celestial_cards(wcs) + cards(band, unit, comment)
        path = folder / name.format(band=band)
        if single:
            fits.PrimaryHDU(image, top + science).writeto(path)
            continue
        hdus = [fits.PrimaryHDU(header=top), fits.ImageHDU(image, science, name="SCI")]
        hdus.append(fits.ImageHDU(np.full(SHAPE, EXPTIME, np.float32) if weight is None else weight, name="WHT"))
        hdus.append(fits.ImageHDU(np.ones(SHAPE, np.int32), name="CTX"))
        fits.HDUList(hdus).writeto(path)


def read(folder: Path, **options: object):  # type: ignore[no-untyped-def]
    return read_star(folder, side=SIDE, **{"catalogue": write_catalogue(folder / "s.csv"), "bands": BANDS} | options)


def test_electrons_a_second_become_njy(tmp_path: Path) -> None:
    write_drizzled(tmp_path)
    assert_star(read(tmp_path), side=SIDE, native_pixel=PIXEL)


def test_electrons_are_divided_by_the_exposure(tmp_path: Path) -> None:
    write_drizzled(tmp_path, unit="ELECTRONS", name="hlsp_survey_hst_acs_gs_{band}_v1.0_drc.fits")
    assert_star(read(tmp_path), side=SIDE, native_pixel=PIXEL)


def test_electrons_without_an_exposure_are_refused(tmp_path: Path) -> None:
    write_drizzled(tmp_path, unit="ELECTRONS", EXPTIME=0.0)
    with pytest.raises(UnknownUnit, match=r"EXPTIME is 0\.0, so its pixels have no zero point"):
        read(tmp_path)


def test_counts_need_a_photflam_of_counts(tmp_path: Path) -> None:
    write_drizzled(tmp_path, unit="COUNTS")
    with pytest.raises(UnknownUnit, match="times the gain are electrons, and PHOTFLAM is not of counts"):
        read(tmp_path)


def test_counts_with_a_photflam_of_counts_are_read(tmp_path: Path) -> None:
    write_drizzled(tmp_path, unit="COUNTS", comment="inverse sensitivity, ergs/cm2/Ang/count")
    assert_star(read(tmp_path), side=SIDE, native_pixel=PIXEL)


@pytest.mark.parametrize("unit", [None, "MJy/sr"])
def test_another_unit_or_none_is_refused(tmp_path: Path, unit: str | None) -> None:
    write_drizzled(tmp_path, unit=unit)
    with pytest.raises(UnknownUnit, match=f"BUNIT is {unit.upper() if unit else None!r}, and nothing is guessed"):
        read(tmp_path)


@pytest.mark.parametrize("largest", [1.0, 1e7])
def test_a_weight_is_only_a_mask_where_it_is_zero(tmp_path: Path, largest: float) -> None:
    weight = np.full(SHAPE, largest, np.float32)
    weight[:, : SHAPE[1] // 2] /= 1000
    weight[:, :BLANK] = 0
    write_drizzled(tmp_path, weight=weight, blank=1e6)
    cutout = read(tmp_path)
    assert_star(cutout, side=SIDE, native_pixel=PIXEL)
    assert cutout.coverage == pytest.approx(COVERAGE, abs=0.01)


def test_a_single_extension_file_has_no_data_where_it_is_zero(tmp_path: Path) -> None:
    write_drizzled(tmp_path, single=True, name="HST_10188_10_ACS_WFC_{band}_drz.fits", blank=0.0)
    cutout = read(tmp_path)
    assert_star(cutout, side=SIDE, native_pixel=PIXEL)
    assert cutout.coverage == pytest.approx(COVERAGE, abs=0.01)


def test_a_weight_file_beside_a_single_extension_is_used(tmp_path: Path) -> None:
    write_drizzled(tmp_path, single=True, blank=1e6)
    weight = np.ones(SHAPE, np.float32)
    weight[:, :BLANK] = 0
    for band in BANDS.values():
        fits.PrimaryHDU(weight).writeto(tmp_path / f"hst_10188_10_acs_wfc_{band}_wht.fits")
    cutout = read(tmp_path)
    assert_star(cutout, side=SIDE, native_pixel=PIXEL)
    assert cutout.coverage == pytest.approx(COVERAGE, abs=0.01)


def test_upper_case_names_are_the_same_bands(tmp_path: Path) -> None:
    write_drizzled(tmp_path, name="HST_10188_10_ACS_WFC_{band}_drz.fits", bands={"blue": "f435w"})
    (tmp_path / "HST_10188_10_ACS_WFC_f435w_drz.fits").rename(tmp_path / "HST_10188_10_ACS_WFC_F435W_drz.fits")
    assert_star(read(tmp_path, bands="f435w"), side=SIDE, native_pixel=PIXEL, magnitudes=dict.fromkeys(BANDS, 19.0))


def test_a_name_without_a_filter_is_read_as_the_headers(tmp_path: Path) -> None:
    write_drizzled(tmp_path, name="j8fc02010_drc.fits", bands={"blue": "f606w"})
    assert_star(read(tmp_path, bands="f606w"), side=SIDE, native_pixel=PIXEL, magnitudes=dict.fromkeys(BANDS, 19.0))


def test_a_header_of_another_filter_is_refused(tmp_path: Path) -> None:
    write_drizzled(tmp_path, FILTER2="F775W")
    with pytest.raises(MissingBand, match="name says band f435w, its header f775w"):
        read(tmp_path)


def test_bands_have_to_be_chosen(tmp_path: Path) -> None:
    write_drizzled(tmp_path)
    with pytest.raises(MissingBand, match=r"no band for blue, green, red; present are f435w, f606w, f814w"):
        read(tmp_path, bands=None)


def test_a_visits_total_image_is_not_a_band(tmp_path: Path) -> None:
    write_drizzled(tmp_path)
    write_drizzled(tmp_path, name="hst_10188_10_acs_wfc_total_{band}_drz.fits")
    reader = open_source(tmp_path, catalogue=write_catalogue(tmp_path / "s.csv"), bands=BANDS)
    assert reader.sources().table["source_uri"].to_pylist() == [str(tmp_path / "hst_10188_10_acs_wfc")]


def test_files_of_another_survey_beside_them_are_named(tmp_path: Path) -> None:
    write_drizzled(tmp_path)
    header = celestial_cards(tan_wcs((40, 40), 0.262)) + fits.Header({"BANDS": "grz", "IMAGETYP": "IMAGE"})
    fits.writeto(tmp_path / "a.fits", np.ones((3, 40, 40), np.float32), header)
    with pytest.raises(BadRequest, match=r"(?s)more than one survey:.*legacy: 4 cutout.*hst: 1 tile.*TELESCOP = HST"):
        read(tmp_path)
