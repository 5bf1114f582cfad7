"""Planes: one unit, one mask, NaN where there is no data; and damaged files, drawn by hypothesis."""

from __future__ import annotations

import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from galembed import planes
from galembed.backbones import FieldOfView, InputContract
from galembed.cutouts import Cutout
from galembed.errors import GalembedError, MissingBand, UnknownUnit, UnreadableInput
from galembed.files import as_stored, open_fits
from galembed.mappings import LEGACY_DR2
from galembed.planes import (
    Box,
    OpenFiles,
    Pixels,
    Plane,
    celestial_wcs,
    header_unit,
    images,
    per_reference_pixel,
    pixel_arcsec,
    require_bands,
    require_checksums,
)
from galembed.sources import open_source
from galembed.sources.layouts import read_planes
from galembed.surveys import load_survey
from tests.galembed.surveys.stars import celestial_cards, tan_wcs

SHAPE = (6, 8)


def pixels(data: np.ndarray, where: str = "a.fits[0]") -> Pixels:
    return Pixels(fits.PrimaryHDU(data), where)


def read(tmp_path: Path, image: np.ndarray, box: Box | None = None, **others: object) -> np.ndarray:
    """Write an image with its weight or mask, and read it as a plane."""
    named = {name: value for name, value in others.items() if isinstance(value, np.ndarray)}
    hdus = [fits.PrimaryHDU(image), *(fits.ImageHDU(value, name=name) for name, value in named.items())]
    fits.HDUList(hdus).writeto(tmp_path / "a.fits", overwrite=True)
    with open_fits(str(tmp_path / "a.fits")) as file:
        found = dict(zip(["image", *named], images(file, "a.fits"), strict=True))
        rest = {name: value for name, value in others.items() if name not in named}
        return Plane("g", wcs=None, factor=2.0, **found, **rest).read(box)  # type: ignore[arg-type]


def where_nan(flux: np.ndarray) -> set[tuple[int, int]]:
    return {(int(y), int(x)) for y, x in np.argwhere(np.isnan(flux))}


def test_no_data_is_where_the_weight_is_not_positive(tmp_path: Path) -> None:
    weight = np.ones(SHAPE, np.float32)
    weight[1, 2], weight[3, 4], weight[5, 6] = 0, -1, np.nan
    flux = read(tmp_path, np.full(SHAPE, 3, np.float32), weight=weight)
    assert flux.dtype == np.float32
    assert where_nan(flux) == {(1, 2), (3, 4), (5, 6)}
    assert set(flux[np.isfinite(flux)]) == {6.0}


def test_only_the_named_bits_of_a_mask_are_no_data(tmp_path: Path) -> None:
    mask = np.zeros(SHAPE, np.int32)
    mask[0, 0], mask[1, 1], mask[2, 2] = 1 << 5, 1 << 12, (1 << 5) | 1
    flux = read(tmp_path, np.ones(SHAPE, np.float32), mask=mask, no_data_bits=1 << 5)
    assert where_nan(flux) == {(0, 0), (2, 2)}


def test_a_mask_of_unsigned_and_wide_integers_keeps_its_highest_bit(tmp_path: Path) -> None:
    for kind, bit in ((np.uint16, 15), (np.uint32, 31), (np.int64, 40)):
        mask = np.zeros(SHAPE, kind)
        mask[1, 1] = kind(1) << kind(bit)
        flux = read(tmp_path, np.ones(SHAPE, np.float32), mask=mask, no_data_bits=1 << bit)
        assert where_nan(flux) == {(1, 1)}


def test_a_mask_of_floats_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnreadableInput, match="a mask holds integers, this has"):
        read(tmp_path, np.ones(SHAPE, np.float32), mask=np.ones(SHAPE, np.float32), no_data_bits=1)


def test_a_bit_that_no_mask_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnreadableInput, match="a mask has 63 bits at most"):
        read(tmp_path, np.ones(SHAPE, np.float32), mask=np.ones(SHAPE, np.int32), no_data_bits=1 << 999)


def test_zeros_are_no_data_where_it_is_said(tmp_path: Path) -> None:
    image = np.ones(SHAPE, np.float32)
    image[4, 4] = 0
    assert where_nan(read(tmp_path, image, zero_is_no_data=True)) == {(4, 4)}
    assert read(tmp_path, image)[4, 4] == 0


def test_nan_infinity_and_more_flux_than_there_is_are_no_data(tmp_path: Path) -> None:
    image = np.ones(SHAPE, np.float32)
    image[0, 0], image[1, 1], image[2, 2], image[3, 3] = np.nan, np.inf, -1e36, 3e38
    flux = read(tmp_path, image)
    assert where_nan(flux) == {(0, 0), (1, 1), (2, 2), (3, 3)}


def test_blank_integers_are_no_data_and_bscale_is_applied(tmp_path: Path) -> None:
    stored = np.full(SHAPE, 100, np.int16)
    stored[2, 3] = -32768
    fits.PrimaryHDU(stored).writeto(tmp_path / "a.fits")
    with fits.open(tmp_path / "a.fits", mode="update", do_not_scale_image_data=True) as file:
        file[0].header.update({"BSCALE": 0.5, "BZERO": 10.0, "BLANK": -32768})
    with open_fits(str(tmp_path / "a.fits")) as file:
        flux = Plane("g", images(file, "a.fits")[0], None, 1.0).read((slice(1, 4), slice(2, 6)))
    assert where_nan(flux) == {(1, 1)}
    assert flux[0, 0] == 60


def test_a_box_is_the_same_part_of_the_whole_plane(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    image = rng.normal(size=SHAPE).astype(np.float32)
    others = {
        "weight": rng.integers(0, 2, SHAPE).astype(np.float32),
        "mask": rng.integers(0, 4, SHAPE).astype(np.int16),
    }
    whole, part = (read(tmp_path, image, box, **others, no_data_bits=2) for box in (None, (slice(2, 5), slice(1, 7))))
    np.testing.assert_array_equal(part, whole[2:5, 1:7])


def test_a_weight_of_another_shape_is_refused() -> None:
    with pytest.raises(UnreadableInput, match=r"b\.fits\[0\] has \(3, 8\) pixels.*do not belong together"):
        Plane("g", pixels(np.ones(SHAPE)), None, 1.0, weight=pixels(np.ones((3, 8)), "b.fits[0]"))


@pytest.mark.parametrize("kind", ["weight", "mask"])
def test_a_weight_or_mask_file_without_an_image_is_damaged(tmp_path: Path, kind: str) -> None:
    fits.PrimaryHDU().writeto(tmp_path / "b.fits")
    files = OpenFiles("tile", {(kind, "g"): str(tmp_path / "b.fits")})
    with pytest.raises(UnreadableInput, match=rf"b\.fits: a {kind} file without an image in it"):
        files.open(kind, "g")
    files.close()


def test_a_file_of_several_images_is_not_guessed_at(tmp_path: Path) -> None:
    one = fits.ImageHDU(np.ones(SHAPE))
    fits.HDUList([fits.PrimaryHDU(), one, one.copy()]).writeto(tmp_path / "a.fits")
    files = OpenFiles("tile", {("image", "g"): str(tmp_path / "a.fits")})
    with pytest.raises(UnreadableInput, match="2 images where one was expected; its HDUs are"):
        files.image("image", "g")
    files.close()


def test_missing_bands_are_named_with_those_there_are() -> None:
    with pytest.raises(MissingBand, match=r"t: no band r, i; it has g, z\. Choose with --bands"):
        require_bands(["g", "z"], ["r", "g", "i", "r"], "t")


def test_the_oldest_spelling_of_a_rotation_is_obeyed() -> None:
    cards = celestial_cards(tan_wcs(SHAPE, 0.25, rotation=30.0))
    matrix = np.array([[cards.pop(f"CD{i}_{j}") for j in (1, 2)] for i in (1, 2)])
    for i in (1, 2):
        cards[f"CDELT{i}"] = 0.25 / 3600
        for j in (1, 2):
            cards[f"PC00{i}00{j}"] = matrix[i - 1, j - 1] / (0.25 / 3600)
    wcs = celestial_wcs(cards)
    assert wcs is not None
    np.testing.assert_allclose(wcs.pixel_scale_matrix, matrix, rtol=1e-12)
    assert "PC001001" in cards


@pytest.mark.parametrize(
    "cards",
    [
        {"CDELT1": -1e-4, "CDELT2": 1e-4, "CROTA2": 30.0},
        {"CDELT1": -1e-4, "CDELT2": 1e-4, "PC1_1": 0.8, "PC1_2": 0.6, "PC2_1": -0.6, "PC2_2": 0.8, "LONPOLE": 150.0},
        {"CTYPE1": "RA---TPV", "CTYPE2": "DEC--TPV", "PV1_1": 1.0, "PV1_7": 0.3, "PV2_1": 1.0, "PV2_10": 0.2},
        {"CTYPE1": "RA---TAN-SIP", "CTYPE2": "DEC--TAN-SIP", "A_ORDER": 2, "B_ORDER": 2, "A_0_2": 1e-4, "B_2_0": 3e-4},
        {"CTYPE1": "RA---ZPN", "CTYPE2": "DEC--ZPN", "PV2_1": 1.0, "PV2_3": 4000.0},
    ],
)
def test_no_card_of_the_wcs_is_passed_over(cards: dict[str, object]) -> None:
    """astropy is given the cards of the WCS alone, and finds what it finds in the whole header."""
    matrix = {} if "CDELT1" in cards else {"CD1_1": -1e-4, "CD1_2": 2e-5, "CD2_1": 1e-5, "CD2_2": 1e-4}
    common = {"NAXIS": 2, "BUNIT": "nJy", "CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "RADESYS": "ICRS"}
    place = {"CRPIX1": 50.5, "CRPIX2": 40.0, "CRVAL1": 150.0, "CRVAL2": 2.0}
    header = fits.Header(common | place | matrix | cards)
    header["HISTORY"] = "PV1_1 = 7"
    ours = celestial_wcs(header)
    assert ours is not None
    places = np.random.default_rng(0).uniform(0, 100, (50, 2))
    np.testing.assert_array_equal(ours.all_pix2world(places, 0), WCS(header, naxis=2).all_pix2world(places, 0))
    plain = header.copy()
    del plain[list(cards)[-1]]
    assert np.abs(WCS(plain, naxis=2).all_pix2world(places, 0) - ours.all_pix2world(places, 0)).max() > 1e-9


def test_an_alternate_wcs_is_never_taken() -> None:
    pixel_offsets = fits.Header({"CTYPE1A": "LINEAR", "CTYPE2A": "LINEAR", "CRVAL1A": 12000.0, "CRPIX1A": 1.0})
    assert celestial_wcs(pixel_offsets) is None
    primary = celestial_wcs(celestial_cards(tan_wcs(SHAPE, 0.168)) + pixel_offsets)
    assert primary is not None
    assert primary.wcs.alt.strip() == ""
    assert pixel_arcsec(primary) == pytest.approx(0.168, rel=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"CD1_1": 0.0, "CD1_2": 0.0},
        {"CD1_1": 1e30},
        {"CD1_1": 1e-9},
        {"CD1_2": -0.2499 / 3600, "CD2_1": 0.25 / 3600},
        {"CRVAL1": 1e9},
        {"CRVAL2": 91.0},
        {"CTYPE1": "FREQ"},
        {"CTYPE2": ""},
        {"CTYPE1": "RA---QQQ"},
        {"CUNIT1": "kg"},
        {"CRPIX1": "one"},
    ],
)
def test_a_sky_wcs_that_cannot_be_used_is_damaged(change: dict[str, object]) -> None:
    cards = celestial_cards(tan_wcs(SHAPE, 0.25))
    cards.update(change)
    with pytest.raises(UnreadableInput, match=r"damaged: the sky WCS \(.*\) cannot be used"):
        celestial_wcs(cards)


@pytest.mark.parametrize("key", ["CRPIX1", "CRPIX2", "CRVAL1", "CRVAL2", "CTYPE1", "CTYPE2"])
def test_half_a_sky_wcs_is_damaged(key: str) -> None:
    cards = celestial_cards(tan_wcs(SHAPE, 0.25))
    del cards[key]
    with pytest.raises(UnreadableInput, match="cannot be used"):
        celestial_wcs(cards)


def test_a_linear_wcs_is_no_sky_wcs() -> None:
    assert celestial_wcs(fits.Header({"CTYPE1": "LINEAR", "CTYPE2": "LINEAR", "CRVAL1": 3.0})) is None
    assert celestial_wcs(fits.Header()) is None


def test_an_image_whose_middle_is_nowhere_is_damaged() -> None:
    wcs = WCS(naxis=2)
    wcs.wcs.ctype, wcs.wcs.cdelt, wcs.wcs.crpix = ["RA---SIN", "DEC--SIN"], [1e-4, 1e-4], [1e7, 1.0]
    with pytest.raises(UnreadableInput, match="the middle of the image is nowhere on the sky"):
        Plane("g", pixels(np.ones(SHAPE)), wcs, 1.0)


def test_a_flux_per_pixel_becomes_one_per_reference_pixel_only_with_a_scale() -> None:
    factor = per_reference_pixel(10.0, tan_wcs(SHAPE, 0.131), "a.fits")
    assert factor == pytest.approx(10.0 * (0.262 / 0.131) ** 2, rel=1e-6)
    with pytest.raises(UnknownUnit, match=r"a\.fits: a flux per pixel needs a sky WCS"):
        per_reference_pixel(10.0, None, "a.fits")


@pytest.mark.parametrize(("unit", "expected"), [("nJy", 1.0), ("uJy", 1e3), ("Jy", 1e9)])
def test_units_become_nanojansky(unit: str, expected: float) -> None:
    assert header_unit(fits.Header({"BUNIT": f"{unit} "}), "a.fits") == pytest.approx(expected)


def test_no_unit_and_no_flux_are_refused() -> None:
    with pytest.raises(UnknownUnit, match="the header has no BUNIT"):
        header_unit(fits.Header(), "a.fits")
    with pytest.raises(UnknownUnit, match=r"a\.fits: .*adu"):
        header_unit(fits.Header({"BUNIT": "adu"}), "a.fits")


def test_whatever_a_damaged_header_leads_to_names_the_tile() -> None:
    def planes(files: OpenFiles, bands: object) -> dict[str, tuple[Plane, ...]]:
        if bands == ["g"]:
            raise MissingBand("no file is named here")
        return {"g": (1 << int("one"),)}  # type: ignore[dict-item]

    layout = replace(load_survey("generic").layouts[0], planes=planes)
    files = OpenFiles("/survey/tile-7", {})
    with pytest.raises(UnreadableInput, match=r"/survey/tile-7: damaged headers \(ValueError: invalid literal"):
        read_planes(layout, files, None)
    with pytest.raises(MissingBand, match="/survey/tile-7: no file is named here"):
        read_planes(layout, files, ["g"])


@pytest.mark.parametrize("compressed", [False, True])
def test_data_that_are_not_those_of_datasum_are_damaged(tmp_path: Path, compressed: bool) -> None:
    data = np.arange(90 * 70, dtype=np.int32).reshape(90, 70)
    hdu = fits.CompImageHDU(data) if compressed else fits.ImageHDU(data)
    path = tmp_path / "a.fits"
    fits.HDUList([fits.PrimaryHDU(), hdu]).writeto(path, checksum=True)
    with open_fits(str(path)) as file:
        require_checksums(file, "a.fits")
        at = file[1].fileinfo()["datLoc"] + as_stored(file[1]).size - 1
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    with open_fits(str(path)) as file, pytest.raises(UnreadableInput, match=r"a\.fits\[1\]: damaged.*DATASUM"):
        require_checksums(file, "a.fits")


def cube(path: Path, shape: tuple[int, int], pixel: float, rotation: float, *, compressed: bool) -> None:
    data = np.random.default_rng(0).normal(1, 0.1, (3, *shape)).astype(np.float32)
    header = celestial_cards(tan_wcs(shape, pixel, rotation=rotation)) + fits.Header(
        {"BANDS": "grz", "IMAGETYP": "image"}
    )
    options = {"compression_type": "GZIP_2", "quantize_level": 0.0, "tile_shape": (1, 16, 16)}
    hdu = fits.CompImageHDU(data, header, **options) if compressed else fits.PrimaryHDU(data, header)
    hdu.writeto(path, checksum=True)


def read_all(folder: Path) -> list[Cutout | GalembedError]:
    reader = open_source(folder)
    contract = InputContract(16, FieldOfView(0.0, 4.0, 4.0), LEGACY_DR2)
    return [result for _, result in reader.cutouts(reader.sources().table, contract)]


@settings(max_examples=100, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    shape=st.tuples(st.integers(20, 40), st.integers(20, 40)),
    pixel=st.floats(0.1, 0.6),
    rotation=st.floats(0, 360),
    compressed=st.booleans(),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), max_size=3),
    keep=st.floats(0, 1) | st.just(1.0),
    value=st.none()
    | st.tuples(st.integers(0, 200), st.sampled_from(["0", "-1", "'x'", "999999999", "1E300", "T", ""])),
)
def test_any_damage_is_a_cutout_or_a_named_error_and_data_under_datasum_never_change(
    shape: tuple[int, int],
    pixel: float,
    rotation: float,
    compressed: bool,
    flips: list[tuple[float, int]],
    keep: float,
    value: tuple[int, str] | None,
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cube(folder / "a.fits", shape, pixel, rotation, compressed=compressed)
        (good,) = read_all(folder)
        assert isinstance(good, Cutout)
        content = bytearray((folder / "a.fits").read_bytes())
        with fits.open(folder / "a.fits", disable_image_compression=True) as file:
            data = file[-1].fileinfo()["datLoc"]
        if value is not None:
            at = value[0] * 80 % data
            content[at + 10 : at + 80] = value[1].rjust(20).ljust(70).encode()
        for place, bit in flips:
            content[data + int(place * (len(content) - data))] ^= 1 << bit
        (folder / "b.fits").write_bytes(content[: int(keep * len(content))])
        results = read_all(folder)
    assert isinstance(results[0], Cutout)
    bad = results[1]
    assert isinstance(bad, Cutout | GalembedError)
    if isinstance(bad, Cutout) and value is None:
        np.testing.assert_array_equal(bad.pixels, good.pixels)


@pytest.mark.parametrize("compression", ["HCOMPRESS_1", "RICE_1"])
def test_threads_that_decompress_at_once_all_get_the_right_pixels(tmp_path: Path, compression: str) -> None:
    """cfitsio's HCOMPRESS keeps its state in globals, and astropy lets go of the interpreter around it."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2**12, (400, 400)).astype(np.int32)
    path = tmp_path / "plane.fits"
    fits.CompImageHDU(truth, compression_type=compression, tile_shape=(100, 100)).writeto(path)

    def read(_: int) -> bool:
        with fits.open(path) as file:
            pixels = Pixels(file[1], "plane")
            return all(np.array_equal(pixels.read(), truth) for _ in range(5))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(24)))


def test_the_first_dithered_plane_of_a_process_is_read_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """cfitsio fills its table of dithers at first use, and another thread would read it half filled."""
    path = tmp_path / "plane.fits"
    noise = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    fits.CompImageHDU(noise, compression_type="RICE_1", quantize_method=1).writeto(path)
    section = fits.CompImageHDU.section.fget
    inside, together = threading.Semaphore(1), threading.Barrier(2, timeout=30)

    class Alone:
        """Fails when a second thread comes in."""

        def __init__(self, hdu: fits.CompImageHDU) -> None:
            self.hdu = hdu

        def __getitem__(self, part: object) -> object:
            assert inside.acquire(blocking=False), "two threads fill the table"
            time.sleep(0.05)
            inside.release()
            return section(self.hdu)[part]

    class Together:
        """Waits until two threads are in it."""

        def __init__(self, hdu: fits.CompImageHDU) -> None:
            self.hdu = hdu

        def __getitem__(self, part: object) -> object:
            together.wait()
            return section(self.hdu)[part]

    def read(_: int) -> None:
        with fits.open(path) as file:
            Pixels(file[1], "plane").read()

    with ThreadPoolExecutor(2) as pool:
        monkeypatch.setattr(planes, "_dithers_filled", threading.Event())
        monkeypatch.setattr(fits.CompImageHDU, "section", property(Alone))
        list(pool.map(read, range(2)))
        monkeypatch.setattr(fits.CompImageHDU, "section", property(Together))
        list(pool.map(read, range(2)))
