"""Legacy Surveys bricks, and the three forms of the cutout service."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS
from numpy.typing import NDArray

from galembed.backbones import load_backbone
from galembed.cutouts import Cutout
from galembed.errors import BadRequest, UnknownUnit, UnreadableInput
from galembed.sources import open_source
from tests.galembed.surveys.stars import (
    MAGNITUDE,
    RA,
    assert_star,
    celestial_cards,
    njy,
    read_star,
    star_image,
    tan_wcs,
    write_catalogue,
)

PIXEL = 0.262
BRICK_PIXELS = 3600
BRICK_DEG = 0.25
BANDS = {"g": "blue", "r": "green", "z": "red"}
SKY = 1e-6  # so that no pixel is exactly zero
SIDE = 80 * PIXEL  # native pixels
WIDE = 72.0  # arcsec: more than a brick reaches beyond its own area
ALLMASK = {"g": 5, "r": 6, "z": 7}
GALAXY, BRIGHT = 12, 1


def nanomaggies(role: str) -> float:
    return njy(MAGNITUDE[role]) / 3631


def brick_name(ra: float, dec: float) -> str:
    return f"{round(ra * 10):04d}{'p' if dec >= 0 else 'm'}{round(abs(dec) * 10):03d}"


def window_of(ra: float, dec: float, place: tuple[float, float], reach: int = 180) -> tuple[WCS, tuple[int, int]]:
    """The part of a brick around a place, as WCS and shape: its true edges, and `reach` pixels on the other sides."""
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.crval = [ra, dec]
    wcs.wcs.crpix = [(BRICK_PIXELS + 1) / 2] * 2
    wcs.wcs.cd = np.diag([-PIXEL, PIXEL]) / 3600
    x, y = wcs.all_world2pix([place], 0)[0]
    x0, x1, y0, y1 = (int(np.clip(round(v), 0, BRICK_PIXELS)) for v in (x - reach, x + reach, y - reach, y + reach))
    wcs.wcs.crpix = wcs.wcs.crpix - [x0, y0]
    wcs.wcs.set()
    return wcs, (y1 - y0, x1 - x0)


def write_brick(
    root: Path,
    name: str,
    wcs: WCS,
    shape: tuple[int, int],
    star: tuple[float, float],
    *,
    compression: str = "RICE_1",
    ending: str = ".fits.fz",
    bits: NDArray[np.int32] | None = None,
    weight: NDArray[np.float32] | None = None,
    light: float = 0.0,
    unit: str = "nanomaggy",
) -> Path:
    """One brick as the pipeline compresses it; `light` is written where `weight` is 0."""
    folder = root / "south" / "coadd" / name[:3] / name
    folder.mkdir(parents=True)
    weight = np.full(shape, 400.0, np.float32) if weight is None else weight

    def save(kind: str, *images: np.ndarray, **how: object) -> None:
        head = celestial_cards(wcs) + fits.Header({"BUNIT": unit, "IMTYPE": kind.split("-")[0], "MAGZERO": 22.5})
        hdus = [fits.CompImageHDU(image, head, tile_shape=(100, 100), **how) for image in images]
        fits.HDUList([fits.PrimaryHDU(), *hdus]).writeto(folder / f"legacysurvey-{name}-{kind}{ending}")

    for band, role in BANDS.items():
        image = star_image(shape, wcs, nanomaggies(role), place=star, sky=SKY)
        image[weight == 0] = light
        lossy = {"quantize_level": -1e-4, "quantize_method": 2, "dither_seed": -1} if compression == "RICE_1" else {}
        save(f"image-{band}", image, compression_type=compression, **lossy)
        save(f"invvar-{band}", weight, compression_type=compression, **({"quantize_level": 16} if lossy else {}))
        save(f"nexp-{band}", np.ones(shape, np.int16), compression_type="HCOMPRESS_1")
        save(f"depth-{band}", np.ones(shape, np.float32), compression_type="GZIP_1")
    if bits is not None:
        wise = np.full(shape, -1, np.int16)
        save("maskbits", bits, wise, wise, compression_type="HCOMPRESS_1")
    return folder


def one_brick(root: Path, **how: object) -> tuple[Path, Path, tuple[int, int]]:
    """A brick with the star well inside: its folder, a catalogue, and its shape."""
    place = (RA, 2.25)
    wcs, shape = window_of(RA, 2.25, (RA + 0.01, 2.24))
    folder = write_brick(root, brick_name(*place), wcs, shape, (RA + 0.01, 2.24), **how)  # type: ignore[arg-type]
    return folder, write_catalogue(root / "s.csv", (RA + 0.01, 2.24)), shape


@pytest.mark.parametrize(
    ("compression", "ending"),
    [("RICE_1", ".fits.fz"), ("GZIP_1", ".fits.fz"), ("GZIP_2", ".fits.fz"), ("RICE_1", ".fits.gz")],
)
def test_a_brick_is_read_whatever_its_compression(tmp_path: Path, compression: str, ending: str) -> None:
    _, catalogue, shape = one_brick(tmp_path, compression=compression, ending=ending)
    assert shape == (360, 360)
    cutout = read_star(tmp_path, catalogue=catalogue)
    assert_star(cutout, native_pixel=PIXEL)
    assert cutout.coverage == 1
    assert cutout.flags == ""


def test_invvar_zero_is_no_data_and_an_exact_zero_beside_it_is(tmp_path: Path) -> None:
    weight = np.full((360, 360), 400.0, np.float32)
    weight[:150] = 0
    _, catalogue, _ = one_brick(tmp_path, weight=weight, light=5e5)
    cutout = read_star(tmp_path, catalogue=catalogue)
    assert_star(cutout, native_pixel=PIXEL)
    # The star is on row 180, and the cutout reaches 10 arcsec down.
    assert cutout.coverage == pytest.approx(1 - (149.5 - (180 - 10 / PIXEL)) * PIXEL / 20, abs=0.02)


@pytest.mark.parametrize(("band", "bit"), ALLMASK.items())
def test_allmask_is_no_data_in_its_band_and_only_the_optical_mask_counts(tmp_path: Path, band: str, bit: int) -> None:
    bits = np.full((360, 360), 1 << GALAXY, np.int32)
    bits[:150] |= 1 << bit
    _, catalogue, _ = one_brick(tmp_path, bits=bits)
    cutout = read_star(tmp_path, catalogue=catalogue)
    share = np.isfinite(cutout.pixels).mean(axis=(1, 2))
    masked = 1 - (149.5 - (180 - 10 / PIXEL)) * PIXEL / 20
    np.testing.assert_allclose(share, [masked if name == band else 1.0 for name in BANDS], atol=0.02)


def test_a_large_galaxys_bit_hides_nothing_and_a_bright_stars_is_a_flag(tmp_path: Path) -> None:
    _, catalogue, _ = one_brick(tmp_path, bits=np.full((360, 360), 1 << GALAXY | 1 << BRIGHT, np.int32))
    cutout = read_star(tmp_path, catalogue=catalogue)
    assert_star(cutout, native_pixel=PIXEL)
    assert (cutout.coverage, cutout.flags) == (1, "star")


@pytest.mark.parametrize("whole", [False, True])
def test_seeing_and_depth_at_the_source_are_carried(
    tmp_path: Path, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if whole:
        monkeypatch.setattr("galembed.sources.tiles.WHOLE_TILE_SOURCES", 1)
    folder, _, shape = one_brick(tmp_path)
    place = (RA + 0.01, 2.24)
    x, y = window_of(RA, 2.25, place)[0].all_world2pix([place], 0)[0]
    rows, columns = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    brick = brick_name(RA, 2.25)
    for band in BANDS:
        values = 1 + columns / 1000 + rows / 10
        fits.CompImageHDU(values, compression_type="GZIP_1").writeto(
            folder / f"legacysurvey-{brick}-psfsize-{band}.fits.fz"
        )
    fits.CompImageHDU(rows * np.nan, compression_type="GZIP_1").writeto(
        folder / f"legacysurvey-{brick}-galdepth-g.fits.fz"
    )
    (folder / f"legacysurvey-{brick}-galdepth-r.fits.fz").write_bytes(b"damaged")
    catalogue = write_catalogue(tmp_path / "t.ecsv", place, psfsize_r=1.5)
    reader = open_source(tmp_path, catalogue=catalogue, fov=20)
    listed = reader.sources().table
    assert listed.schema.field("psfsize_g").metadata[b"unit"] == b"arcsec"
    assert "galdepth_z" not in listed.column_names
    ((_, cutout),) = reader.cutouts(listed, load_backbone().contract)
    assert isinstance(cutout, Cutout)
    assert set(cutout.carried) == {
        "psfsize_g",
        "psfsize_z",
        "galdepth_g",
        "galdepth_r",
    }  # r's seeing is the catalogue's
    expected = 1 + round(x) / 1000 + round(y) / 10
    assert cutout.carried["psfsize_g"] == cutout.carried["psfsize_z"] == pytest.approx(expected, rel=1e-6)
    assert np.isnan([cutout.carried["galdepth_g"], cutout.carried["galdepth_r"]]).all()


def test_a_brick_in_another_unit_is_refused(tmp_path: Path) -> None:
    _, catalogue, _ = one_brick(tmp_path, unit="count")
    with pytest.raises(UnknownUnit, match="BUNIT is 'count', the Legacy Surveys' images are in nanomaggy"):
        read_star(tmp_path, catalogue=catalogue, survey="legacy")


def test_a_damaged_invvar_is_named(tmp_path: Path) -> None:
    folder, catalogue, _ = one_brick(tmp_path)
    path = next(folder.glob("*invvar-r*"))
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(UnreadableInput, match=r"invvar-r\.fits\.fz.*truncated"):
        read_star(tmp_path, catalogue=catalogue)


def corner(dec: float, rows: int) -> tuple[tuple[float, float], list[tuple[float, float]]]:
    """A place just inside one brick's own area at its north-east corner or eastern side, and the bricks around."""
    step = BRICK_DEG / np.cos(np.radians(dec))
    # Parallels are curved in a brick's pixels: at 80 deg by 2.8 arcsec at its corners.
    place = (RA + step / 2 * (1 - 2 / 450), dec + (BRICK_DEG / 2 - 5 / 3600 if rows == 2 else 0.0))
    return place, [(RA + column * step, dec + row * BRICK_DEG) for row in range(rows) for column in range(2)]


@pytest.mark.parametrize("dec", [2.0, 80.0])
@pytest.mark.parametrize("rows", [1, 2])
def test_light_beyond_a_bricks_edge_comes_from_the_neighbours(tmp_path: Path, dec: float, rows: int) -> None:
    place, bricks = corner(dec, rows)
    first, (height, _) = window_of(*bricks[0], place)
    x, y = first.all_world2pix([place], 0)[0]
    beyond = (-9.5, height + 8.5 if rows == 2 else y)
    star = tuple(first.all_pix2world([beyond], 0)[0])
    for brick in bricks:
        wcs, shape = window_of(*brick, place)
        # Lossless, since noise far from the middle moves the light's centre.
        write_brick(tmp_path, brick_name(*brick), wcs, shape, star, compression="GZIP_1")
    cutout = read_star(tmp_path, side=WIDE, size=400, catalogue=write_catalogue(tmp_path / "s.csv", place))
    assert_star(
        cutout,
        side=WIDE,
        native_pixel=PIXEL,
        sky=SKY * 3631,
        offset=((beyond[0] - x) * PIXEL, (beyond[1] - y) * PIXEL),
    )
    assert cutout.coverage == 1
    assert "partial" not in cutout.flags.split()
    assert len(cutout.neighbours) == 2 * rows - 1


def test_the_turn_between_bricks_at_high_declination_is_tested() -> None:
    place, bricks = corner(80.0, 1)
    one, other = (window_of(*brick, place)[0] for brick in bricks)
    points = other.all_world2pix(one.all_pix2world([(0, 0), (0, 300)], 0), 0)
    turn = np.degrees(np.arctan2(*(points[1] - points[0])))
    assert abs(turn) == pytest.approx(1.42, abs=0.02)  # 0.25 deg tan(80 deg)


def test_an_edge_with_nothing_beyond_it_is_partial(tmp_path: Path) -> None:
    place, bricks = corner(2.0, 1)
    wcs, shape = window_of(*bricks[0], place)
    write_brick(tmp_path, brick_name(*bricks[0]), wcs, shape, place)
    cutout = read_star(tmp_path, side=WIDE, size=400, catalogue=write_catalogue(tmp_path / "s.csv", place))
    x, _ = wcs.all_world2pix([place], 0)[0]
    assert cutout.flags == "partial"
    assert cutout.neighbours == ()
    assert cutout.coverage == pytest.approx(0.5 + (x + 0.5) * PIXEL / WIDE, abs=0.01)
    assert np.isnan(cutout.pixels[:, :, :20]).all()


def test_a_wide_fixed_field_reaches_the_neighbour_without_a_size(tmp_path: Path) -> None:
    (_, dec), bricks = corner(2.0, 1)
    place = (bricks[0][0] + BRICK_DEG / 2 - 15 / 3600, dec)
    for brick in bricks:
        wcs, shape = window_of(*brick, place, reach=260)
        write_brick(tmp_path, brick_name(*brick), wcs, shape, place)
    cutout = read_star(tmp_path, side=100.0, size=240, catalogue=write_catalogue(tmp_path / "s.csv", place))
    assert (cutout.coverage, len(cutout.neighbours)) == (1, 1)


def test_a_neighbour_is_not_opened_where_the_cutout_stays_inside(tmp_path: Path) -> None:
    place, bricks = corner(2.0, 1)
    for brick in bricks:
        wcs, shape = window_of(*brick, place)
        write_brick(tmp_path, brick_name(*brick), wcs, shape, place)
    cutout = read_star(tmp_path, side=SIDE, catalogue=write_catalogue(tmp_path / "s.csv", place))
    assert_star(cutout, side=SIDE, native_pixel=PIXEL, sky=SKY * 3631)
    assert cutout.neighbours == ()


def write_cube(
    path: Path,
    *,
    header: dict[str, object] | None = None,
    extra: Iterable[fits.ImageHDU] = (),
    shape: tuple[int, int] = (140, 140),
    zeros: int = 0,
    pixel: float = PIXEL,
) -> Path:
    """A cutout as the service resamples it: values do not change with `pixel`, and `zeros` rows were never observed."""
    wcs = tan_wcs(shape, pixel)
    cube = np.stack(
        [star_image(shape, wcs, nanomaggies(role) * (PIXEL / pixel) ** 2, sky=SKY) for role in BANDS.values()]
    )
    cube[:, :zeros] = 0
    head = celestial_cards(wcs) + fits.Header({"SURVEY": "DECaLS", "VERSION": "DR9", "IMAGETYP": "IMAGE"})
    head.update({"BANDS": "grz", "BAND0": "g", "BAND1": "r", "BAND2": "z"} if header is None else header)
    head.update({"IMAGEW": float(shape[1]), "IMAGEH": float(shape[0])})
    fits.HDUList([fits.PrimaryHDU(cube, head), *extra]).writeto(path)
    return path


@pytest.mark.parametrize(
    "header",
    [
        {"BANDS": "grz", "BAND0": "g", "BAND1": "r", "BAND2": "z"},
        {"BANDS": "grz"},
        {"BANDS": "g,r,z"},
        {"BANDS": "xyz", "BAND0": "g", "BAND1": "r", "BAND2": "z"},
    ],
)
def test_a_cubes_bands_are_read_in_each_spelling(tmp_path: Path, header: dict[str, object]) -> None:
    write_cube(tmp_path / "J1.fits", header=header)
    assert_star(read_star(tmp_path, side=SIDE), side=SIDE, native_pixel=PIXEL)


@pytest.mark.parametrize("pixel", [0.131, 0.524])
def test_a_cube_at_another_scale_has_the_same_pixel_values(tmp_path: Path, pixel: float) -> None:
    write_cube(tmp_path / "J1.fits", pixel=pixel)
    assert_star(read_star(tmp_path, fov=20.0), native_pixel=pixel, sky=SKY * 3631)


def test_a_single_band_is_a_plane(tmp_path: Path) -> None:
    shape = (140, 140)
    wcs = tan_wcs(shape, PIXEL)
    head = celestial_cards(wcs) + fits.Header({"IMAGETYP": "IMAGE", "BANDS": "r", "BAND0": "r", "IMAGEW": 140.0})
    fits.writeto(tmp_path / "J1.fits", star_image(shape, wcs, nanomaggies("green"), sky=SKY), head)
    cutout = read_star(tmp_path, bands="r", fov=SIDE)
    assert_star(cutout, side=SIDE, native_pixel=PIXEL, magnitudes=dict.fromkeys(MAGNITUDE, MAGNITUDE["green"]))


def test_exact_zeros_of_a_cube_are_no_data(tmp_path: Path) -> None:
    write_cube(tmp_path / "J1.fits", zeros=40)
    cutout = read_star(tmp_path, fov=30.0)
    assert_star(cutout, native_pixel=PIXEL, side=30.0)
    assert cutout.coverage == pytest.approx(1 - (39.5 - (69.5 - 15 / PIXEL)) * PIXEL / 30, abs=0.01)


def companion(kind: str, data: np.ndarray, *, by_name: bool) -> fits.ImageHDU:
    hdu = fits.ImageHDU(data, celestial_cards(tan_wcs((140, 140), PIXEL)))
    if by_name:
        hdu.name = kind
    else:
        hdu.header["IMAGETYP"] = kind
    return hdu


@pytest.mark.parametrize("by_name", [True, False])
def test_invvar_and_maskbits_of_a_cube_are_used(tmp_path: Path, by_name: bool) -> None:
    invvar = np.full((3, 140, 140), 400.0, np.float32)
    invvar[:, :40] = 0
    bits = np.full((140, 140), 1 << GALAXY, np.int16)
    bits[100:] |= 1 << ALLMASK["r"]
    extra = (companion("INVVAR", invvar, by_name=by_name), companion("MASKBITS", bits, by_name=by_name))
    write_cube(tmp_path / "J1.fits", extra=extra)
    cutout = read_star(tmp_path, fov=30.0)
    assert_star(cutout, native_pixel=PIXEL, side=30.0)
    holed = (39.5 - (69.5 - 15 / PIXEL)) * PIXEL / 30
    share = np.isfinite(cutout.pixels).mean(axis=(1, 2))
    np.testing.assert_allclose(share, [1 - holed, 1 - 2 * holed, 1 - holed], atol=0.01)


def write_subimage(path: Path, dec: float, *, weights: bool = True) -> tuple[float, float]:
    """Two bricks' native pixels around a place near the edges of both, each clipped; returns the place."""
    place, bricks = corner(dec, 1)
    hdus: list[fits.ImageHDU] = []
    for brick in bricks:
        wcs, shape = window_of(*brick, place, reach=128)
        for band, role in BANDS.items():
            head = celestial_cards(wcs) + fits.Header({"BRICK": brick_name(*brick), "BRICK_X0": 7, "BRICK_Y0": 9})
            head.update({"BAND": band, "IMAGEW": float(shape[1]), "IMAGEH": float(shape[0])})
            image = star_image(shape, wcs, nanomaggies(role), place=place, sky=SKY)
            hdus.append(fits.ImageHDU(image, head + fits.Header({"IMAGETYP": "image"})))
            if weights:
                weight = np.full(shape, 400.0, np.float32)
                weight[:70] = 0
                hdus.append(fits.ImageHDU(weight, head + fits.Header({"IMAGETYP": "invvar"})))
    primary = fits.PrimaryHDU(header=fits.Header({"SURVEY": "DECaLS", "IMAGETYP": "image"}))
    fits.HDUList([primary, *hdus]).writeto(path)
    return place


@pytest.mark.parametrize("dec", [2.0, 80.0])
def test_a_subimage_in_two_pieces_is_one_picture_of_the_place_asked_for(tmp_path: Path, dec: float) -> None:
    place = write_subimage(tmp_path / "J1.fits", dec, weights=False)
    cutout = read_star(tmp_path, side=60.0, size=340, fov=60.0)
    assert cutout.coverage == 1
    assert "partial" not in cutout.flags.split()
    # The service cuts whole pixels, so the middle of the file is known to half of one in each brick's grid.
    x, y = offset_of(cutout, place)
    assert max(abs(x), abs(y)) < 1.5 * PIXEL
    assert_star(cutout, side=60.0, native_pixel=PIXEL, sky=SKY * 3631, offset=(x, y))


def test_a_subimages_pieces_have_their_own_invvar(tmp_path: Path) -> None:
    write_subimage(tmp_path / "J1.fits", 2.0)
    cutout = read_star(tmp_path, side=60.0, size=340, fov=60.0)
    # 70 of 256 rows are blank, and the cutout takes 229 around the middle.
    assert cutout.coverage == pytest.approx(1 - (69.5 - (127.5 - 60 / PIXEL / 2)) * PIXEL / 60, abs=0.01)


def offset_of(cutout: Cutout, place: tuple[float, float]) -> tuple[float, float]:
    """Place against the cutout's middle, arcsec along x (west) and y (north)."""
    assert cutout.ra is not None
    assert cutout.dec is not None
    return (
        -(place[0] - cutout.ra) * 3600 * float(np.cos(np.radians(place[1]))),
        (place[1] - cutout.dec) * 3600,
    )


def test_bricks_beside_another_surveys_cutouts_are_an_error_that_names_both(tmp_path: Path) -> None:
    _, catalogue, _ = one_brick(tmp_path)
    head = celestial_cards(tan_wcs((40, 40), 0.396)) + fits.Header({"ORIGIN": "SDSS", "BUNIT": "nanomaggy"})
    fits.writeto(tmp_path / "J1_r.fits", np.ones((40, 40), np.float32), head)
    with pytest.raises(BadRequest, match=r"(?s)more than one survey:.*legacy: 1 tile.*sdss: 1 cutout.*ORIGIN = SDSS"):
        open_source(tmp_path, catalogue=catalogue)


def test_only_folders_with_cutouts_are_named_as_such(tmp_path: Path) -> None:
    head = celestial_cards(tan_wcs((40, 40), 0.396)) + fits.Header({"ORIGIN": "SDSS", "BUNIT": "nanomaggy"})
    for name in ("a_tables", "bricks", "cubes", "sdss"):
        (tmp_path / name).mkdir()
    one_brick(tmp_path / "bricks")
    for number in range(3):
        fits.BinTableHDU.from_columns([]).writeto(tmp_path / "a_tables" / f"{number}.fits")
    legacy = fits.Header({"BANDS": "grz", "IMAGETYP": "IMAGE"})
    fits.writeto(tmp_path / "cubes" / "1.fits", np.ones((3, 40, 40), np.float32), legacy)
    with pytest.raises(BadRequest, match=r"--catalogue TABLE.*; or give one of its folders of cutouts: cubes$"):
        open_source(tmp_path)
    fits.writeto(tmp_path / "sdss" / "J1_r.fits", np.ones((40, 40), np.float32), head)
    with pytest.raises(BadRequest, match=r"(?s)more than one survey:.*legacy: 1 cutout\(s\) in [^,]*/cubes, by header"):
        open_source(tmp_path)


@pytest.mark.shared_data
def test_a_real_subimage_has_three_bands_with_weights(shared_data: Path, tmp_path: Path) -> None:
    (tmp_path / "J1.fits").symlink_to(
        shared_data / "fits" / "decals_dr9_multiext_invvar" / "cutout_59.1067_-30.4848.fits"
    )
    cutout = read_star(tmp_path, side=256 * PIXEL, fov=256 * PIXEL)
    # Its name says what was asked for; whole pixels were cut.
    assert (cutout.ra, cutout.dec) == (pytest.approx(59.1067, abs=2e-4), pytest.approx(-30.4848, abs=2e-4))
    assert cutout.coverage > 0.99
