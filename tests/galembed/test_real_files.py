"""Every FITS file of the shared data, alone in a folder: read, or refused for the right reason.

`FILES` is judged from the headers. What no header says cannot be guessed, so most are refused: single exposures are in
counts with the sky in them, stamps of other projects lost WCS and unit, catalogues are tables.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table
from astropy.wcs import WCS, FITSFixedWarning
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates

from galembed.backbones import FieldOfView, InputContract
from galembed.cutouts import Cutout
from galembed.errors import BadRequest, GalembedError, MissingBand, UnknownUnit, UnreadableInput
from galembed.files import FITS_ENDINGS
from galembed.mappings import LEGACY_DR2
from galembed.sources import open_source
from tests.galembed.surveys.stars import njy

pytestmark = pytest.mark.shared_data


@dataclass(frozen=True)
class Read:
    """A file that is read.

    Attributes
    ----------
    survey : str
    pixel : float
        arcsec
    bands : str
        The only band of a file that has one; it has to be asked for.
    share : float
        Of finite pixels, the smallest of the bands.
    """

    survey: str
    pixel: float
    bands: str = ""
    share: float = 1.0


@dataclass(frozen=True)
class Refused:
    """A file that is not.

    Attributes
    ----------
    error : type
    words : str
        Pattern of its message.
    cutting : bool
        Whether the headers are in order, so that only the pixels are refused.
    """

    error: type[GalembedError]
    words: str
    cutting: bool = False


TABLE = Refused(UnreadableInput, r"is a table of \d+ row\(s\) and holds no image; a table is given as --catalogue")
NO_UNIT = Refused(UnknownUnit, r"\[\d\]: the header has no band keywords \(BANDS, BAND0\.\.\. or BAND\), no BUNIT\.\n")
NOTHING = Refused(UnknownUnit, r"\[0\]: the header has no band keywords .*, no BUNIT, no sky WCS\.\n")
NOT_AS_WRITTEN = Refused(UnreadableInput, r"\[0\]: damaged \(its data do not match its DATASUM\); fetch it again")
NEEDS_CATALOGUE = Refused(BadRequest, r"holds 1 DESI Legacy .* brick\(s\): say which sources .* with --catalogue TABLE")

FILES: Mapping[str, Read | Refused] = {
    "catalogues/*.fits": TABLE,
    "cosmos_hst_100ext/real_galaxy_catalog_26_extension_example*.fits": TABLE,
    # A hundred stamps in one file; scale, filter and zero point are in its paper only.
    "cosmos_hst_100ext/real_galaxy_images_extension.fits": NOTHING,
    "decals_dr9_multiext_invvar/cutout_59.1067_-30.4848.fits": Read("legacy", 0.262),
    # A point spread function: it sums to 1, and has no place on the sky.
    "decals_dr9_multiext_invvar/copsf_59.1067_-30.4848.fits": Refused(UnknownUnit, r"the header has no BUNIT"),
    "decals_grz_cubes/example_a.fits": Read("legacy", 0.1),
    "decals_grz_cubes/example_b.fits": Read("legacy", 0.10136),
    # Three quarters of it were not observed in g in DR3; example_d is the same place in DR5.
    "decals_grz_cubes/example_bad_pix.fits": Read("legacy", 0.13025, share=0.2429),
    "decals_grz_cubes/example_d.fits": Read("legacy", 0.13025, share=0.9987),
    "decals_grz_cubes/example_incomplete.fits": Refused(
        UnreadableInput, r"truncated \(1389044 bytes, HDU 0 ends at 2162880\); fetch it again", cutting=True
    ),
    "decals_grz_cubes/small_225px.fits": Read("legacy", 0.262),
    "decals_grz_cubes/variable_size_162px.fits": Read("legacy", 0.262),
    # Exposures in counts, with their masks and weights; the distorted WCS (TPV) is understood, so it is not lacking.
    "decam_ccd_grz/c4d_*_oo[idw]_*.fits": NO_UNIT,
    "decam_ccd_grz/survey-*.fits.gz": TABLE,
    "decam_ccd_z_fz/c4d_*_oo[idw]_*.fits.fz": NO_UNIT,
    "decam_ccd_z_fz/survey-*.fits.gz": TABLE,
    "edge_cases/git_lfs_pointer_not_fits.fits": Refused(UnreadableInput, r"a Git LFS pointer: `git lfs pull` brings"),
    # IMUNIT and PIXSCALE say what BUNIT and a WCS would; see DESCRIBED.
    "edge_cases/simulated_no_wcs_float64.fits": NOTHING,
    # Radio: a flux per beam is no flux per pixel, and no optical magnitude.
    "first_radio_fanaroff_riley/*.fits": Refused(UnknownUnit, r"BUNIT 'JY/BEAM', which does not become nJy\.\n"),
    "hsc_hst_pair/Cut_HSC*.fits": NO_UNIT,  # see DESCRIBED
    "hsc_hst_pair/Cut_HST*.fits": NO_UNIT,
    "hsc_hst_pair/PSF_*.fits": NOTHING,
    "hsc_pdr2_small_cutouts/?-cutout-HSC-I-8279-pdr2_wide.fits": Read("hsc", 0.168, "i"),
    "hsc_pdr2_small_cutouts/star_cat_correct.fits": TABLE,
    # IRAF's stamps of 2004: neither WCS nor unit nor filter, so a description would have to invent them.
    "hst_visual_types/hstx*.r.fits": NOTHING,
    "legacypipe_testcase3/c4d_*_oo[idw]_*.fits": NO_UNIT,
    "legacypipe_testcase3/survey-*.fits.gz": TABLE,
    "legacypipe_testcase4/c4d_*_oo[idw]_*.fits": NO_UNIT,
    "legacypipe_testcase4/survey-*.fits.gz": TABLE,
    "legacysurvey_dr6_brick/blobs-0959p805.fits.gz": NO_UNIT,  # numbers of blobs, not light
    "legacysurvey_dr6_brick/derived-blob-catalogue-0959p805.fits": TABLE,
    "legacysurvey_dr6_brick/legacysurvey-0959p805-image-?.fits.fz": NEEDS_CATALOGUE,
    "legacysurvey_dr6_brick/legacysurvey-0959p805-invvar-?.fits.fz": Refused(
        UnknownUnit, r"BUNIT '1/nanomaggy\^2', which does not become nJy\.\n"
    ),
    "legacysurvey_dr6_brick/legacysurvey-0959p805-nexp-?.fits.fz": NO_UNIT,
    "legacysurvey_dr6_brick/survey-bricks*.fits.gz": TABLE,
    # Detector counts of 1987 and 1992.
    "no_wcs/*.fits": NOTHING,
    "sdss_band_per_file_bz2/reprojected_sdss_g.fits.bz2": Read("sdss", 1.1877, "g"),
    "sdss_band_per_file_bz2/reprojected_sdss_i.fits.bz2": Read("sdss", 1.1877, "i"),
    "sdss_band_per_file_bz2/reprojected_sdss_r.fits.bz2": Read("sdss", 1.1877, "r"),
    # CTYPE LINEAR is no place on the sky.
    "simulated_galsim_linear_wcs/galaxy1_img.fits": NOTHING,
    # Cut out of larger ones, the DATASUM of which stayed in the header.
    "wcs_variety/tnx.fits": NOT_AS_WRITTEN,
    "wcs_variety/tpv.fits.gz": NOT_AS_WRITTEN,
}

NOT_FITS = {
    "first_radio_fanaroff_riley/labels.csv",
    "hsc_pdr2_small_cutouts/star_cat_correct.csv",
    "hsc_pdr2_small_cutouts/star_cat_correct.votable",
    "hst_visual_types/labels.csv",
    "legacysurvey_dr6_brick/derived-blob-catalogue-0959p805.csv",
    "MANIFEST.csv",
}

DESCRIBED = {
    "hsc_hst_pair/Cut_HSC*.fits": (
        "name: pair\nfiles: 'Cut_{tile}.fits'\nbands: [g, r, i, z, y]\nroles: {blue: g, green: r, red: i}\n"
        "zero_point: 27.0\npixel_arcsec: 0.168\n",
        0.168,
    ),
    "edge_cases/simulated_no_wcs_float64.fits": (
        "name: illustris\nfiles: 'simulated_{tile}.fits'\nbands: [i]\nroles: {blue: i, green: i, red: i}\n"
        "unit: nanomaggy\npixel_arcsec: 0.1309045\n",
        0.1309045,
    ),
}
"""Description and pixel (arcsec) of files that need one."""


def native(size: int) -> InputContract:
    """As many pixels as the file has, where it has `size`: nothing is resampled."""
    return InputContract(size, FieldOfView(9.0, 8.0, 90.0), LEGACY_DR2)


def alone(folder: Path, *paths: Path) -> Path:
    for path in paths:
        (folder / path.name).symlink_to(path)
    return folder


def cut(folder: Path, contract: InputContract, **options: Any) -> Cutout:
    """The only cutout of a folder; a failure is raised."""
    reader = open_source(folder, **options)
    ((_, result),) = reader.cutouts(reader.sources().table, contract)
    if isinstance(result, GalembedError):
        raise result
    return result


def arcsec_per_pixel(cutout: Cutout) -> float:
    assert cutout.fov_arcsec is not None
    return cutout.fov_arcsec / cutout.pixels.shape[-1]


def magnitude(plane: NDArray[Any], step: float) -> float:
    """AB magnitude of all light of a plane in nJy per (0.262 arcsec)^2, of pixels of `step` arcsec."""
    return float(-2.5 * np.log10(np.nansum(plane) * (step / 0.262) ** 2 / 3631e9))


def brightest(plane: NDArray[Any], step: float) -> float:
    """AB magnitude within 3 arcsec of the brightest pixel, above the median."""
    y, x = np.unravel_index(np.nanargmax(plane), plane.shape)
    rows, columns = np.indices(plane.shape)
    return magnitude(np.where(np.hypot(rows - y, columns - x) * step < 3, plane - np.nanmedian(plane), 0), step)


def sky_image(path: Path) -> tuple[WCS, NDArray[Any]]:
    """The first image with a place on the sky."""
    with fits.open(path) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore", FITSFixedWarning)
        return next((WCS(hdu.header, naxis=2), hdu.data) for hdu in file if "CRVAL1" in hdu.header)


def matching(shared_data: Path, pattern: str) -> Iterator[Path]:
    root = shared_data / "fits"
    yield from (path for path in sorted(root.rglob("*")) if fnmatch(path.relative_to(root).as_posix(), pattern))


def test_every_file_has_one_expectation_and_every_expectation_a_file(shared_data: Path) -> None:
    root = shared_data / "fits"
    files = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    assert {name for name in files if not name.endswith(FITS_ENDINGS)} == NOT_FITS
    counts = {name: [pattern for pattern in FILES if fnmatch(name, pattern)] for name in files - NOT_FITS}
    assert {name: patterns for name, patterns in counts.items() if len(patterns) != 1} == {}
    assert set(FILES) == {pattern for patterns in counts.values() for pattern in patterns}


@pytest.mark.parametrize("pattern", [pattern for pattern, answer in FILES.items() if isinstance(answer, Refused)])
def test_a_file_that_cannot_be_read_is_refused_for_the_right_reason(
    shared_data: Path, tmp_path: Path, pattern: str
) -> None:
    expected = FILES[pattern]
    assert isinstance(expected, Refused)
    for number, path in enumerate(matching(shared_data, pattern)):
        folder = tmp_path / str(number)
        folder.mkdir()
        alone(folder, path)
        if expected.cutting:
            assert len(open_source(folder).sources().table) == 1
        with pytest.raises(expected.error, match=expected.words) as caught:
            cut(folder, native(32))
        assert type(caught.value) is expected.error
        assert expected is NEEDS_CATALOGUE or path.name in str(caught.value)
        # A description helps where something is not said, and not where there is nothing to describe.
        assert ("--survey FILE.yaml" in str(caught.value)) == (expected.error is UnknownUnit)


@pytest.mark.parametrize("pattern", [pattern for pattern, answer in FILES.items() if isinstance(answer, Read)])
def test_a_file_that_is_read_has_its_own_light_at_its_own_place(
    shared_data: Path, tmp_path: Path, pattern: str
) -> None:
    expected = FILES[pattern]
    assert isinstance(expected, Read)
    for number, path in enumerate(matching(shared_data, pattern)):
        folder = tmp_path / str(number)
        folder.mkdir()
        alone(folder, path)
        wcs, data = sky_image(path)
        height, width = data.shape[-2:]
        size = min(height, width)
        if expected.bands:
            with pytest.raises(MissingBand, match=rf"present are {expected.bands}\. Choose with --bands"):
                open_source(folder)
        reader = open_source(folder, bands=expected.bands or None)
        assert reader.survey == expected.survey
        result = cut(folder, native(size), bands=expected.bands or None, crop=1.0)
        middle = wcs.all_pix2world([((width - 1) / 2, (height - 1) / 2)], 0)[0]
        np.testing.assert_allclose((result.ra, result.dec), middle, atol=0.01 / 3600)
        assert result.fov_arcsec == pytest.approx(size * expected.pixel, rel=1e-3)
        assert result.coverage == pytest.approx(expected.share, abs=0.001)
        for plane in result.pixels:
            assert 10 < brightest(plane, expected.pixel) < 25
        if expected.survey == "legacy":
            blue, green, red = (np.nansum(np.where(result.pixels.min(axis=0) > 0, p, 0)) for p in result.pixels)
            assert blue < green < red  # galaxies are
        if data.ndim == 3:
            # Row by row as stored, in the order of BANDS: 3631 Jy is magnitude 0, one count is magnitude 22.5.
            light = np.where(data == 0, np.nan, data) * njy(22.5)
            np.testing.assert_allclose(result.pixels, light, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("number", range(2, 9))
def test_stars_of_hsc_have_the_magnitudes_and_places_of_its_catalogue(
    shared_data: Path, tmp_path: Path, number: int
) -> None:
    folder = shared_data / "fits" / "hsc_pdr2_small_cutouts"
    path = folder / f"{number}-cutout-HSC-I-8279-pdr2_wide.fits"
    catalogue = Table.read(folder / "star_cat_correct.csv")
    (star,) = (row for row in catalogue if str(row["star_filename"]).endswith(path.name))
    result = cut(alone(tmp_path, path), native(24), bands="i", crop=1.0)
    assert result.ra is not None
    assert result.dec is not None
    np.testing.assert_allclose((result.ra, result.dec), (star["ira"], star["idec"]), atol=0.1 / 3600)
    assert magnitude(result.pixels[0], arcsec_per_pixel(result)) == pytest.approx(star["imag_psf"], abs=0.06)


def test_one_galaxy_is_as_bright_whatever_its_sampling(shared_data: Path, tmp_path: Path) -> None:
    cubes = shared_data / "fits" / "decals_grz_cubes"
    results = []
    for name in ("example_a", "small_225px"):
        (tmp_path / name).mkdir()
        results.append(cut(alone(tmp_path / name, cubes / f"{name}.fits"), native(75), fov=20.0).pixels)
    fine, coarse = results
    np.testing.assert_allclose(np.median(fine / coarse, axis=(1, 2)), 1, atol=0.02)
    np.testing.assert_allclose(fine.sum(axis=(1, 2)), coarse.sum(axis=(1, 2)), rtol=0.01)


def test_what_two_releases_observed_of_one_galaxy_agrees(shared_data: Path, tmp_path: Path) -> None:
    cubes = shared_data / "fits" / "decals_grz_cubes"
    results = []
    for name in ("example_bad_pix", "example_d"):
        (tmp_path / name).mkdir()
        results.append(cut(alone(tmp_path / name, cubes / f"{name}.fits"), native(424), crop=1.0, bands="z").pixels[0])
    dr3, dr5 = results
    galaxy = dr5 > 20 * np.median(np.abs(dr5))
    assert galaxy.sum() > 1000
    assert np.median(dr3[galaxy] / dr5[galaxy]) == pytest.approx(1, abs=0.02)


def test_a_point_spread_function_beside_its_image_is_a_failure_of_its_own(shared_data: Path, tmp_path: Path) -> None:
    folder = alone(tmp_path, *(shared_data / "fits" / "decals_dr9_multiext_invvar").iterdir())
    for bands in (None, "r"):
        reader = open_source(folder, bands=bands)
        rows = reader.sources().table
        results = {rows["source_id"][number].as_py(): result for number, result in reader.cutouts(rows, native(64))}
        assert isinstance(results["cutout_59.1067_-30.4848"], Cutout)
        assert isinstance(results["copsf_59.1067_-30.4848"], UnreadableInput)
        assert "images of the PSF" in str(results["copsf_59.1067_-30.4848"])


def test_sdss_bands_come_from_the_names_and_a_spiral_is_as_bright_as_spirals_are(
    shared_data: Path, tmp_path: Path
) -> None:
    paths = sorted((shared_data / "fits" / "sdss_band_per_file_bz2").iterdir())
    result = cut(alone(tmp_path, *paths), native(496), crop=1.0)
    wcs, data = sky_image(paths[0])
    x, y = wcs.all_world2pix([(313.1475, -5.7114)], 0)[0]  # NGC 6978 (HCG 88a)
    rows, columns = np.indices((496, 496))
    step = arcsec_per_pixel(result)
    disc = np.hypot(rows - y, columns - (x - (data.shape[1] - 496) / 2)) * step < 40
    g, r, i = (magnitude(np.where(disc, plane - np.nanmedian(plane), 0), step) for plane in result.pixels)
    # All three headers say FILTER = 'g'.
    assert g > r + 0.3 > i + 0.3
    # Mean brightness within 40 arcsec; discs begin at about 21.7 in their middle (Freeman 1970, ApJ 160, 811).
    assert 21.7 < g + 2.5 * np.log10(np.pi * 40**2) < 24


def test_the_brick_is_cut_where_its_catalogue_says_with_its_light(shared_data: Path) -> None:
    folder = shared_data / "fits" / "legacysurvey_dr6_brick"
    catalogue = folder / "derived-blob-catalogue-0959p805.fits"
    reader = open_source(folder, catalogue=catalogue, bands="g", columns={"id": "blob_id"}, fov=40 * 0.262)
    listing = reader.sources()
    assert reader.survey == "legacy"
    assert len(listing.rejected) == 0
    assert set(listing.table["source_uri"].to_pylist()) == {f"{folder.resolve()}/legacysurvey-0959p805"}
    cutouts = dict(reader.cutouts(listing.table, native(40)))
    image = fits.getdata(folder / "legacysurvey-0959p805-image-g.fits.fz").astype(np.float64) * njy(22.5)
    steps = np.arange(40) - 19.5
    compared = 0
    for number, blob in enumerate(Table.read(catalogue)):
        result = cutouts[number]
        if isinstance(result, Cutout) and result.coverage == 1:
            assert (result.ra, result.dec) == pytest.approx((blob["ra"], blob["dec"]))
            # The catalogue has pixels too, so its places need no WCS here.
            grid = np.meshgrid(blob["y_pix0"] + steps, blob["x_pix0"] + steps, indexing="ij")
            np.testing.assert_allclose(
                result.pixels[0], map_coordinates(image, grid, order=1), rtol=0.01, atol=0.01 * result.pixels[0].max()
            )
            compared += 1
    assert compared > 80


@pytest.mark.parametrize("pattern", DESCRIBED)
def test_a_file_whose_description_says_the_rest_is_read(shared_data: Path, tmp_path: Path, pattern: str) -> None:
    text, pixel = DESCRIBED[pattern]
    description = tmp_path / "survey.yaml"
    description.write_text(text)
    for number, path in enumerate(matching(shared_data, pattern)):
        folder = tmp_path / str(number)
        folder.mkdir()
        size = fits.getheader(path)["NAXIS1"]
        result = cut(alone(folder, path), native(size), survey=str(description), crop=1.0)
        assert result.coverage == 1
        for plane in result.pixels:
            assert 10 < brightest(plane, pixel) < 25


def test_nanomaggies_that_a_description_gives_are_those_of_the_file(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "fits" / "edge_cases" / "simulated_no_wcs_float64.fits"
    text, pixel = DESCRIBED["edge_cases/simulated_no_wcs_float64.fits"]
    (tmp_path / "survey.yaml").write_text(text)
    result = cut(alone(tmp_path, path), native(424), survey=str(tmp_path / "survey.yaml"), crop=1.0)
    total = 22.5 - 2.5 * np.log10(fits.getdata(path).sum())
    assert magnitude(result.pixels[0], pixel) == pytest.approx(total, abs=0.001)
