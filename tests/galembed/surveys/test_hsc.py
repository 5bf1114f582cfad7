"""HSC coadd patches, and the cutout service's files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS

from galembed.errors import MissingBand, UnknownUnit, UnreadableInput
from galembed.sources import open_source
from tests.galembed.surveys.stars import (
    DEC,
    MAGNITUDE,
    RA,
    assert_star,
    celestial_cards,
    read_star,
    star_image,
    write_catalogue,
)

PIXEL = 0.168
SHAPE = (230, 210)
SIDE = 120 * PIXEL
BANDS = {"G": "blue", "R": "green", "I": "red"}
SKY = 1e-6
PATCH = "calexp-HSC-{band}-9813-4,4.fits"
CUTOUT = "2-cutout-HSC-{band}-9813-pdr2_wide.fits"
FLUXMAG0 = 63095734448.0194  # as in a real PDR2 header
PLANES = {"BAD": 0, "SAT": 1, "INTRP": 2, "NO_DATA": 8, "BRIGHT_OBJECT": 9}


def tract_wcs(shape: tuple[int, int], pixel: float, offset: tuple[float, float] = (3.3, -6.2)) -> WCS:
    """A tract's WCS seen from a patch: the reference point is far outside the image."""
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.crval = [RA + 0.3, DEC - 0.4]
    wcs.wcs.cd = np.diag([-pixel, pixel]) / 3600
    wcs.wcs.crpix = [0.0, 0.0]
    x, y = wcs.all_world2pix([(RA, DEC)], 1)[0]
    wcs.wcs.crpix = [(shape[1] + 1) / 2 + offset[0] - x, (shape[0] + 1) / 2 + offset[1] - y]
    wcs.wcs.set()
    return wcs


def write_bands(
    folder: Path,
    name: str = PATCH,
    *,
    bands: str = "GRI",
    pixel: float = PIXEL,
    fluxmag0: float | None = FLUXMAG0,
    mask: bool = True,
    planes: dict[str, int] | None = None,
    masked: str = "NO_DATA",
    named: bool = True,
    **primary: object,
) -> None:
    """One patch or cutout, a file a band. The lower third is `masked` and holds light; without a mask there is none."""
    planes = PLANES if planes is None else planes
    for band in bands:
        wcs = tract_wcs(SHAPE, pixel)
        counts = (fluxmag0 or FLUXMAG0) * 10 ** (-0.4 * MAGNITUDE[BANDS[band]])  # AB = 2.5 log10(fluxMag0 / flux)
        image = star_image(SHAPE, wcs, counts, sky=SKY)
        bits = np.zeros(SHAPE, np.int32)
        if mask:
            image[: SHAPE[0] // 3] = 1e6
            bits[: SHAPE[0] // 3] = 1 << (planes or PLANES)[masked]
        cards = celestial_cards(wcs)
        # The pixel coordinates of the tract, which are no sky.
        cards.update({"CTYPE1A": "LINEAR", "CTYPE2A": "LINEAR", "CRPIX1A": 1.0, "CRPIX2A": 1.0, "CRVAL1A": 2739.0})
        cards.update({"CRVAL2A": 26802.0, "CUNIT1A": "PIXEL", "CUNIT2A": "PIXEL", "LTV1": -2739.0, "LTV2": -26802.0})
        top = fits.Header(
            {"FILTER": band.lower(), "BGMEAN": 0.0127} | ({} if fluxmag0 is None else {"FLUXMAG0": fluxmag0})
        )
        top.update(primary)
        empty = fits.ImageHDU() if not mask else None
        hdus = [
            fits.PrimaryHDU(header=top),
            fits.ImageHDU(image, cards, name="IMAGE" if named else ""),
            empty
            or fits.ImageHDU(
                bits, fits.Header({f"HIERARCH MP_{k}": v for k, v in planes.items()}), name="MASK" if named else ""
            ),
            empty or fits.ImageHDU(np.ones(SHAPE, np.float32), name="VARIANCE" if named else ""),
        ]
        if mask:
            hdus.append(fits.BinTableHDU.from_columns([fits.Column("id", "J", array=[1])], name="ARCHIVE_INDEX"))
        fits.HDUList(hdus).writeto(folder / name.format(band=band))


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("planes", [PLANES, {"BAD": 3, "NO_DATA": 0}])
def test_a_patch_is_masked_by_the_planes_that_its_mask_names(
    tmp_path: Path, named: bool, planes: dict[str, int]
) -> None:
    write_bands(tmp_path, named=named, planes=planes)
    cutout = read_star(tmp_path, side=SIDE, size=120, catalogue=write_catalogue(tmp_path / "s.csv"))
    assert_star(cutout, side=SIDE, native_pixel=PIXEL)
    # The star is 6.2 rows below the middle of 230, 76 of which are masked.
    assert cutout.coverage == pytest.approx(1 - (75.5 - (114.5 - 6.2 - 60)) / 120, abs=0.01)


def test_a_patchs_saturated_pixels_are_a_flag_and_not_a_hole(tmp_path: Path) -> None:
    write_bands(tmp_path, masked="SAT")
    cutout = read_star(tmp_path, side=SIDE, size=120, catalogue=write_catalogue(tmp_path / "s.csv", (RA, DEC - 0.002)))
    assert cutout.coverage == 1
    assert "star" in cutout.flags.split()


def test_a_mask_that_names_no_plane_is_refused(tmp_path: Path) -> None:
    write_bands(tmp_path, planes={"DETECTED": 5, "BAD_": 0}, masked="DETECTED")
    with pytest.raises(UnreadableInput, match=r"the mask names none of the planes BAD, NO_DATA \(MP_ keywords\)"):
        read_star(tmp_path, catalogue=write_catalogue(tmp_path / "s.csv"))


@pytest.mark.parametrize("fluxmag0", [FLUXMAG0, 57543993733.7])
def test_a_cutout_with_empty_mask_hdus_is_read_by_its_own_zero_point(tmp_path: Path, fluxmag0: float) -> None:
    write_bands(tmp_path, CUTOUT, mask=False, fluxmag0=fluxmag0)
    cutout = read_star(tmp_path, side=SIDE, size=120, fov=SIDE, catalogue=write_ids(tmp_path))
    assert_star(cutout, side=SIDE, native_pixel=PIXEL)
    assert cutout.coverage == 1


def write_ids(folder: Path) -> Path:
    """A catalogue that gives the cutout's source its place, which is not the middle of the frame."""
    path = folder / "ids.csv"
    path.write_text(f"id,ra,dec\n2-cutout-9813-pdr2_wide,{RA},{DEC}\n")
    return path


def test_a_cutouts_source_is_in_the_middle_without_a_catalogue(tmp_path: Path) -> None:
    write_bands(tmp_path, CUTOUT, mask=False)
    cutout = read_star(tmp_path, side=SIDE, size=120, fov=SIDE)
    assert_star(cutout, side=SIDE, native_pixel=PIXEL, offset=(3.3 * PIXEL, -6.2 * PIXEL))


def test_names_of_a_download_tool_are_one_source(tmp_path: Path) -> None:
    write_bands(tmp_path, "36411452835238206_17.9_HSC-{band}.fits", mask=False)
    assert open_source(tmp_path).sources().table["source_id"].to_pylist() == ["36411452835238206_17.9"]


def test_a_single_band_needs_a_choice(tmp_path: Path) -> None:
    write_bands(tmp_path, CUTOUT, mask=False, bands="I")
    with pytest.raises(MissingBand, match=r"no band for g \(blue\), r \(green\); present are i\..*--bands i"):
        open_source(tmp_path)
    cutout = read_star(tmp_path, side=SIDE, size=120, fov=SIDE, bands="i", catalogue=write_ids(tmp_path))
    assert_star(cutout, side=SIDE, native_pixel=PIXEL, magnitudes=dict.fromkeys(MAGNITUDE, MAGNITUDE["red"]))


def test_counts_without_a_zero_point_are_refused(tmp_path: Path) -> None:
    write_bands(tmp_path, fluxmag0=None)
    with pytest.raises(UnknownUnit, match="FLUXMAG0 is None, so its counts have no zero point"):
        read_star(tmp_path, survey="hsc", catalogue=write_catalogue(tmp_path / "s.csv"))


def test_pixels_of_another_scale_are_not_hsc(tmp_path: Path) -> None:
    write_bands(tmp_path, pixel=0.2)
    with pytest.raises(UnreadableInput, match=r"native pixel, arcsec is 0\.2 by its header, expected 0\.168"):
        read_star(tmp_path, catalogue=write_catalogue(tmp_path / "s.csv"))


def test_a_header_of_another_filter_is_refused(tmp_path: Path) -> None:
    write_bands(tmp_path, FILTER="HSC-Z")
    with pytest.raises(MissingBand, match="its name says band g, its header FILTER = 'HSC-Z'"):
        read_star(tmp_path, catalogue=write_catalogue(tmp_path / "s.csv"))


@pytest.mark.shared_data
def test_real_cutouts_are_one_source_each(shared_data: Path, tmp_path: Path) -> None:
    for path in (shared_data / "fits" / "hsc_pdr2_small_cutouts").glob("*-cutout-*.fits"):
        (tmp_path / path.name).symlink_to(path)
    reader = open_source(tmp_path, bands="i")
    assert reader.survey == "hsc"
    assert len(reader.sources().table) == 7
