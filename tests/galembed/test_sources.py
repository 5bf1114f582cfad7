"""Folders and bricks, in the surveys' own layouts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from astropy.io import fits
from astropy.table import Table
from astropy.wcs import WCS
from PIL import Image

from galembed.backbones import FieldOfView, InputContract
from galembed.cutouts import Cutout
from galembed.errors import (
    BadRequest,
    GalembedError,
    MissingBand,
    MissingWCS,
    NoData,
    UnknownUnit,
    UnreadableInput,
)
from galembed.mappings import LEGACY_DR2
from galembed.photometry import NJY_PER_NANOMAGGY
from galembed.sources import open_source

SCALE = 0.262
FLUX = {"g": 100.0, "r": 250.0, "z": 400.0}  # nanomaggies
ROLES = {"blue": "g", "green": "r", "red": "z"}


def header(shape: tuple[int, int], ra: float = 40.0, dec: float = 2.0) -> fits.Header:
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.crval = [ra, dec]
    wcs.wcs.crpix = [(shape[1] + 1) / 2, (shape[0] + 1) / 2]
    wcs.wcs.cd = np.diag([-SCALE, SCALE]) / 3600
    return wcs.to_header() + fits.Header({"BUNIT": "nanomaggy"})


def star(shape: tuple[int, int], x: float, y: float, flux: float, sigma: float = 2.0) -> np.ndarray:
    yy, xx = np.mgrid[: shape[0], : shape[1]]
    profile = np.exp(-((xx - x) ** 2 + (yy - y) ** 2) / (2 * sigma**2))
    return (1e-6 + flux * profile / (2 * np.pi * sigma**2)).astype(np.float32)


def write_cube(path: Path, shape: tuple[int, int] = (61, 61), bands: str = "grz") -> Path:
    center = ((shape[1] - 1) / 2, (shape[0] - 1) / 2)
    cube = np.stack([star(shape, *center, FLUX.get(band, 50.0)) for band in bands])
    head = header(shape)
    head["BANDS"] = bands
    head["IMAGETYP"] = "image"
    del head["BUNIT"]
    fits.writeto(path, cube, head)
    return path


def write_brick(
    root: Path,
    brick: str = "0400p020",
    shape: tuple[int, int] = (400, 400),
    dec: float = 2.0,
    bands: str = "grz",
) -> tuple[Path, np.ndarray]:
    """A brick with one star at a known place; returns the folder and the star's (ra, dec)."""
    folder = root / "coadd" / brick[:3] / brick
    folder.mkdir(parents=True)
    head = header(shape, dec=dec)
    x, y = 141.3, 207.8
    for band in bands:
        image = fits.CompImageHDU(
            star(shape, x, y, FLUX[band]),
            head,
            compression_type="RICE_1",
            tile_shape=(100, 100),
            quantize_level=-1e-5,
        )
        image.writeto(folder / f"legacysurvey-{brick}-image-{band}.fits.fz")
        weight = np.ones(shape, np.float32)
        weight[:, 350:] = 0
        fits.CompImageHDU(weight, head, compression_type="RICE_1", tile_shape=(100, 100)).writeto(
            folder / f"legacysurvey-{brick}-invvar-{band}.fits.fz"
        )
    return folder, WCS(head).all_pix2world([[x, y]], 0)[0]


def contract(side_arcsec: float, size: int = 40) -> InputContract:
    return InputContract(size, FieldOfView(0.0, side_arcsec, side_arcsec), LEGACY_DR2)


def only(source: Path, contract: InputContract, **options: object) -> Cutout | GalembedError:
    reader = open_source(source, **options)  # type: ignore[arg-type]
    rows = reader.sources().table
    return dict(reader.cutouts(rows, contract))[0]


def test_a_cutout_cube_gives_njy_at_the_right_place(tmp_path: Path) -> None:
    write_cube(tmp_path / "J1.fits")
    cutout = only(tmp_path, contract(40 * SCALE))
    assert isinstance(cutout, Cutout)
    np.testing.assert_allclose(
        cutout.pixels.sum(axis=(1, 2)) / NJY_PER_NANOMAGGY, [FLUX[band] for band in "grz"], rtol=0.01
    )
    assert (cutout.ra, cutout.dec) == pytest.approx((40.0, 2.0))
    assert cutout.coverage == 1


def test_source_id_is_the_relative_path_without_the_ending(tmp_path: Path) -> None:
    (tmp_path / "south").mkdir()
    write_cube(tmp_path / "south" / "J1.fits")
    assert open_source(tmp_path).sources().table["source_id"].to_pylist() == ["south/J1"]


def test_two_files_of_one_name_are_one_source_and_one_rejected_row(tmp_path: Path) -> None:
    write_cube(tmp_path / "J1.fits")
    write_cube(tmp_path / "J1.fits.gz")
    listing = open_source(tmp_path).sources()
    assert listing.table["source_id"].to_pylist() == ["J1"]
    assert listing.rejected["reason"].to_pylist() == ["duplicate_key"]
    assert listing.rejected["source_id"].to_pylist() == ["J1#row2"]


@pytest.mark.parametrize("keep", [100, 3000, 20000])
def test_a_truncated_file_is_unreadable(tmp_path: Path, keep: int) -> None:
    write_cube(tmp_path / "J0.fits")
    file = write_cube(tmp_path / "J1.fits")
    file.write_bytes(file.read_bytes()[:keep])
    reader = open_source(tmp_path)
    good, bad = (result for _, result in reader.cutouts(reader.sources().table, contract(10)))
    assert isinstance(good, Cutout)
    assert isinstance(bad, UnreadableInput)
    assert "J1.fits" in str(bad)


def test_a_folder_of_nothing_that_can_be_read_says_what_the_first_file_is(tmp_path: Path) -> None:
    (tmp_path / "J1.fits").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UnreadableInput, match="Git LFS pointer"):
        open_source(tmp_path)


def test_a_missing_band_names_those_there_are_and_can_be_replaced(tmp_path: Path) -> None:
    write_cube(tmp_path / "J1.fits", bands="gz")
    with pytest.raises(MissingBand, match=r"no band for r \(green\); present are g, z.*--bands green=g"):
        open_source(tmp_path)
    write_cube(tmp_path / "J0.fits")
    reader = open_source(tmp_path)
    results = dict(reader.cutouts(reader.sources().table, contract(10)))
    assert isinstance(results[0], Cutout)
    assert isinstance(results[1], MissingBand)
    assert "no band r; it has g, z" in str(results[1])
    (tmp_path / "J0.fits").unlink()
    assert isinstance(only(tmp_path, contract(10), bands={"green": "g"}), Cutout)
    assert isinstance(only(tmp_path, contract(10), bands="z"), Cutout)


def test_pixels_without_a_unit_are_refused(tmp_path: Path) -> None:
    file = write_cube(tmp_path / "J1.fits")
    with fits.open(file, mode="update") as hdus:
        del hdus[0].header["IMAGETYP"]
    with pytest.raises(UnknownUnit, match="no BUNIT"):
        open_source(tmp_path)


def test_pixels_of_another_scale_become_the_same_surface_brightness(tmp_path: Path) -> None:
    file = write_cube(tmp_path / "J1.fits")
    with fits.open(file, mode="update") as hdus:
        del hdus[0].header["IMAGETYP"]
        hdus[0].header["BUNIT"] = "nJy"
        for axis in (1, 2):
            hdus[0].header[f"CDELT{axis}"] = hdus[0].header.get(f"CDELT{axis}", 1.0) / 2
    cutout = only(tmp_path, contract(61 * SCALE / 2, 61))
    assert isinstance(cutout, Cutout)
    np.testing.assert_allclose(cutout.pixels, fits.getdata(file) * 4, rtol=1e-5)


def test_zeros_are_no_data(tmp_path: Path) -> None:
    file = write_cube(tmp_path / "J1.fits")
    with fits.open(file, mode="update") as hdus:
        hdus[0].data[1, :, :15] = 0
    cutout = only(tmp_path, contract(61 * SCALE, 61))
    assert isinstance(cutout, Cutout)
    assert cutout.coverage == pytest.approx(1 - 15 / 61, abs=0.01)
    with fits.open(file, mode="update") as hdus:
        hdus[0].data[1] = 0
    assert isinstance(only(tmp_path, contract(10)), NoData)


def test_a_catalogue_gives_sizes_and_columns_by_id(tmp_path: Path) -> None:
    write_cube(tmp_path / "J1.fits")
    write_cube(tmp_path / "J2.fits")
    Table({"id": ["J2"], "shape_r": [1.5], "mag_r": [17.5]}).write(tmp_path / "c.ecsv")
    table = open_source(tmp_path, catalogue=tmp_path / "c.ecsv").sources().table
    assert table["size"].to_pylist() == [None, 1.5]
    assert table["mag_r"].to_pylist() == [None, 17.5]
    Table({"id": ["J9"]}).write(tmp_path / "d.ecsv")
    with pytest.raises(BadRequest, match="none of its ids"):
        open_source(tmp_path, catalogue=tmp_path / "d.ecsv").sources()


def test_a_size_without_a_wcs_is_refused_and_a_crop_is_not(tmp_path: Path) -> None:
    file = write_cube(tmp_path / "J1.fits")
    cube = fits.getdata(file)
    fits.writeto(file, cube, fits.Header({"BANDS": "grz", "IMAGETYP": "image"}), overwrite=True)
    assert isinstance(only(tmp_path, contract(10)), Cutout)
    Table({"id": ["J1"], "shape_r": [1.5]}).write(tmp_path / "c.ecsv")
    result = only(tmp_path, contract(10), catalogue=tmp_path / "c.ecsv")
    assert isinstance(result, MissingWCS)
    assert "choose --crop" in str(result)


def test_a_tile_without_a_wcs_is_an_error(tmp_path: Path) -> None:
    folder, _ = write_brick(tmp_path)
    path = folder / "legacysurvey-0400p020-image-g.fits.fz"
    fits.CompImageHDU(fits.getdata(path), compression_type="RICE_1").writeto(path, overwrite=True)
    Table({"id": ["s"], "ra": [40.0], "dec": [2.0], "shape_r": [1.0]}).write(tmp_path / "s.fits")
    with pytest.raises(MissingWCS, match="no sky WCS"):
        open_source(tmp_path, catalogue=tmp_path / "s.fits").sources()


@pytest.mark.parametrize("whole", [True, False])
def test_a_brick_gives_njy_at_the_catalogued_position(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    monkeypatch.setattr("galembed.sources.tiles.WHOLE_TILE_SOURCES", 1 if whole else 10)
    _, (ra, dec) = write_brick(tmp_path)
    Table({"id": ["s"], "ra": [ra], "dec": [dec], "shape_r": [1.0]}).write(tmp_path / "sources.fits")
    cutout = only(tmp_path, contract(40 * SCALE), catalogue=tmp_path / "sources.fits")
    assert isinstance(cutout, Cutout)
    np.testing.assert_allclose(
        cutout.pixels.sum(axis=(1, 2)) / NJY_PER_NANOMAGGY, [FLUX[band] for band in "grz"], rtol=0.01
    )
    offsets = np.arange(40) - 19.5
    image = cutout.pixels[1]
    assert abs((image.sum(axis=0) * offsets).sum() / image.sum()) < 0.1
    assert abs((image.sum(axis=1) * offsets).sum() / image.sum()) < 0.1


def test_zero_weight_is_no_data(tmp_path: Path) -> None:
    _, _ = write_brick(tmp_path)
    ra, dec = WCS(header((400, 400))).all_pix2world([[350, 200]], 0)[0]
    Table({"id": ["s"], "ra": [ra], "dec": [dec], "shape_r": [1.0]}).write(tmp_path / "sources.fits")
    cutout = only(tmp_path, contract(40 * SCALE), catalogue=tmp_path / "sources.fits")
    assert isinstance(cutout, Cutout)
    assert cutout.coverage == pytest.approx(0.5, abs=0.03)


def test_a_catalogue_without_any_size_is_refused_where_the_field_follows_it(tmp_path: Path) -> None:
    write_brick(tmp_path)
    Table({"id": ["s"], "ra": [40.0], "dec": [2.0]}).write(tmp_path / "s.fits")
    listed = open_source(tmp_path, catalogue=tmp_path / "s.fits").sources()
    following, fixed = FieldOfView(9.0, 8.0, 90.0), FieldOfView(0.0, 20.0, 20.0)
    with pytest.raises(BadRequest, match=r"none of the 1 sources has a size.*--column size=COLUMN.*--fov ARCSEC"):
        listed.require_field(following)
    listed.require_field(fixed)
    open_source(tmp_path, catalogue=tmp_path / "s.fits", fov="20").sources().require_field(following)
    Table({"id": ["s", "t"], "ra": [40.0] * 2, "dec": [2.0] * 2, "shape_r": [1.0, np.nan]}).write(tmp_path / "t.fits")
    open_source(tmp_path, catalogue=tmp_path / "t.fits").sources().require_field(following)


def test_each_source_goes_to_the_brick_where_it_is_farthest_from_the_edge(tmp_path: Path) -> None:
    write_brick(tmp_path, "0400p020", dec=2.0)
    write_brick(tmp_path, "0400p021", dec=2.0 + 300 * SCALE / 3600)
    dec = 2.0 + np.array([-100, 100, 145, 160, 400]) * SCALE / 3600
    Table({"id": list("abcde"), "ra": [40.0] * 5, "dec": dec, "shape_r": [1.0] * 5}).write(tmp_path / "s.fits")
    table = open_source(tmp_path, catalogue=tmp_path / "s.fits").sources().table
    names = [uri and Path(uri).name[-8:] for uri in table["source_uri"].to_pylist()]
    assert names == ["0400p020", "0400p020", "0400p020", "0400p021", "0400p021"]


def test_a_source_on_no_brick_fails_by_name(tmp_path: Path) -> None:
    write_brick(tmp_path)
    Table({"id": ["far"], "ra": [200.0], "dec": [2.0], "shape_r": [1.0]}).write(tmp_path / "s.fits")
    result = only(tmp_path, contract(10), catalogue=tmp_path / "s.fits")
    assert isinstance(result, NoData)
    assert "source far lies on none of the tiles" in str(result)


def test_bad_positions_and_sizes_are_rejected_rows(tmp_path: Path) -> None:
    write_brick(tmp_path)
    Table({"id": list("abc"), "ra": [40.0, np.nan, 40.0], "dec": [2.0, 2.0, 95.0], "shape_r": [-1.0, 1.0, 1.0]}).write(
        tmp_path / "s.fits"
    )
    listing = open_source(tmp_path, catalogue=tmp_path / "s.fits").sources()
    assert len(listing.table) == 0
    assert dict(
        zip(listing.rejected["source_id"].to_pylist(), listing.rejected["reason"].to_pylist(), strict=True)
    ) == {
        "a": "bad_size",
        "b": "bad_position",
        "c": "bad_position",
    }


def test_a_damaged_brick_fails_its_sources_and_no_others(tmp_path: Path) -> None:
    folder, (ra, dec) = write_brick(tmp_path)
    write_brick(tmp_path, "0400p030", dec=3.0)
    Table({"id": ["a", "b"], "ra": [ra, 40.0], "dec": [dec, 3.0], "shape_r": [1.0, 1.0]}).write(tmp_path / "s.fits")
    file = folder / "legacysurvey-0400p020-image-r.fits.fz"
    reader = open_source(tmp_path, catalogue=tmp_path / "s.fits")
    rows = reader.sources().table
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    results = dict(reader.cutouts(rows, contract(10)))
    assert isinstance(results[0], UnreadableInput)
    assert isinstance(results[1], Cutout)


def test_bricks_need_a_catalogue_and_their_bands(tmp_path: Path) -> None:
    write_brick(tmp_path, bands="gz")
    with pytest.raises(BadRequest, match="--catalogue"):
        open_source(tmp_path)
    with pytest.raises(MissingBand, match="--bands green=g"):
        open_source(tmp_path, catalogue=tmp_path / "s.fits")


def test_pictures_are_turned_bottom_row_first_and_cropped(tmp_path: Path) -> None:
    picture = np.zeros((90, 90, 3), np.uint8)
    picture[30:45, 30:60] = (200, 100, 50)  # upper half of the middle third
    Image.fromarray(picture).save(tmp_path / "J1.png")
    cutout = only(tmp_path, contract(10, 30), crop=1 / 3)
    assert isinstance(cutout, Cutout)
    assert cutout.pixels.dtype == np.uint8
    np.testing.assert_array_equal(cutout.pixels[:, 25, 15], [200, 100, 50])
    np.testing.assert_array_equal(cutout.pixels[:, 5, 15], [0, 0, 0])


def test_a_damaged_or_blank_picture_fails(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a picture")
    Image.new("RGB", (50, 50), (7, 7, 7)).save(tmp_path / "b.png")
    reader = open_source(tmp_path)
    results = dict(reader.cutouts(reader.sources().table, contract(10)))
    assert isinstance(results[0], UnreadableInput)
    assert isinstance(results[1], NoData)


def test_an_empty_mixed_or_absent_folder_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UnreadableInput, match="nothing to embed"):
        open_source(tmp_path)
    with pytest.raises(UnreadableInput, match="does not exist"):
        open_source(tmp_path / "nowhere")
    write_cube(tmp_path / "J1.fits")
    Image.new("RGB", (5, 5)).save(tmp_path / "J1.png")
    with pytest.raises(BadRequest, match="1 FITS and 1 JPEG/PNG"):
        open_source(tmp_path)
    with pytest.raises(BadRequest, match="--crop must lie in"):
        open_source(tmp_path, crop=1.5)


@pytest.mark.shared_data
def test_every_real_legacy_cube_is_read_and_the_truncated_one_refused(shared_data: Path) -> None:
    reader = open_source(shared_data / "fits" / "decals_grz_cubes")
    rows = reader.sources().table
    results = {rows["source_id"][i].as_py(): result for i, result in reader.cutouts(rows, contract(30))}
    assert isinstance(results.pop("example_incomplete"), UnreadableInput)
    assert len(results) == 6
    assert all(isinstance(result, Cutout) for result in results.values())
    # The same galaxy, sampled at 0.1 and at 0.262 arcsec: surface brightness is what stays.
    fine, native = (results[name].pixels for name in ("example_a", "small_225px"))
    assert np.median(fine / native) == pytest.approx(1, abs=0.02)


@pytest.mark.shared_data
def test_the_real_brick_is_cut_with_chosen_bands(shared_data: Path) -> None:
    folder = shared_data / "fits" / "legacysurvey_dr6_brick"
    reader = open_source(
        folder,
        catalogue=folder / "derived-blob-catalogue-0959p805.fits",
        bands={"green": "g", "red": "g"},
        columns={"id": "blob_id", "size": "npix"},
    )
    rows = reader.sources().table
    results = [result for _, result in reader.cutouts(rows.slice(0, 20), contract(20))]
    assert sum(isinstance(result, Cutout) for result in results) >= 18


def test_source_tables_have_the_declared_schema(tmp_path: Path) -> None:
    from galembed.schemas import SOURCES, conform

    write_cube(tmp_path / "J1.fits")
    listing = open_source(tmp_path).sources()
    assert isinstance(conform(listing.table, SOURCES), pa.Table)
    assert listing.rejected.column_names[-3:] == ["stage", "reason", "message"]


def test_a_damaged_brick_beside_a_good_one_is_a_row_of_its_own(tmp_path: Path) -> None:
    good, place = write_brick(tmp_path)
    bad, _ = write_brick(tmp_path, "0401p020", dec=2.02)
    (bad / "legacysurvey-0401p020-image-g.fits.fz").write_bytes(b"SIMPLE")
    Table({"id": ["a"], "ra": [place[0]], "dec": [place[1]], "shape_r": [2.0]}).write(tmp_path / "s.fits")
    listing = open_source(tmp_path, catalogue=tmp_path / "s.fits").sources()
    assert listing.table["source_uri"].to_pylist() == [str(good / "legacysurvey-0400p020")]
    assert listing.rejected["source_id"].to_pylist() == ["coadd/040/0401p020/legacysurvey-0401p020#tile"]
    assert listing.rejected["reason"].to_pylist() == ["unreadable"]
    assert "image-g.fits.fz" in listing.rejected["message"][0].as_py()
    (good / "legacysurvey-0400p020-image-g.fits.fz").write_bytes(b"SIMPLE")
    with pytest.raises(UnreadableInput, match=r"0400p020-image-g"):
        open_source(tmp_path, catalogue=tmp_path / "s.fits").sources()


def positioned(brick_folder: Path, x: float, y: float) -> tuple[float, float]:
    """The sky position of a pixel of a brick that `write_brick` wrote."""
    with fits.open(next(brick_folder.glob("*-image-g.fits.fz"))) as hdus:
        ra, dec = WCS(hdus[1].header).all_pix2world([[x, y]], 0)[0]
    return float(ra), float(dec)


def read_at(root: Path, place: tuple[float, float], side: float = 10.0) -> Cutout | GalembedError:
    Table({"id": ["a"], "ra": [place[0]], "dec": [place[1]]}).write(root / "s.csv", overwrite=True)
    return only(root, contract(side), catalogue=root / "s.csv", fov=side)


def test_where_a_tile_has_no_data_another_that_covers_the_place_fills_in(tmp_path: Path) -> None:
    first, _ = write_brick(tmp_path)
    place = positioned(first, 375.0, 200.0)  # 25 px inside, where the weight is 0
    assert isinstance(read_at(tmp_path, place, side=8.0), NoData)
    second, _ = write_brick(tmp_path, "0401p020")
    for file in second.iterdir():  # there the place is 20 px inside, with data
        with fits.open(file) as hdus:
            image, head = np.array(hdus[1].data), hdus[1].header.copy()
        head["CRPIX1"] -= 355
        fits.CompImageHDU(image, head, compression_type="RICE_1", tile_shape=(100, 100)).writeto(file, overwrite=True)
    cutout = read_at(tmp_path, place, side=8.0)
    assert isinstance(cutout, Cutout)
    assert cutout.coverage == 1
    assert cutout.neighbours == (str(second / "legacysurvey-0401p020"),)


def test_a_neighbour_without_a_band_is_passed_over(tmp_path: Path) -> None:
    first, _ = write_brick(tmp_path)
    write_brick(tmp_path, "0400p021", dec=2.0 + 380 * SCALE / 3600, bands="gr")
    cutout = read_at(tmp_path, positioned(first, 200.0, 385.0))
    assert isinstance(cutout, Cutout)
    assert cutout.flags.split()[0] == "partial"
    assert cutout.neighbours == ()


def test_a_source_goes_to_a_tile_with_all_bands_before_a_deeper_one(tmp_path: Path) -> None:
    first, _ = write_brick(tmp_path)
    write_brick(tmp_path, "0400p021", dec=2.0 + 200 * SCALE / 3600, bands="gr")
    Table({"id": ["a"], "ra": [40.0], "dec": [positioned(first, 200.0, 380.0)[1]]}).write(tmp_path / "s.csv")
    listed = open_source(tmp_path, catalogue=tmp_path / "s.csv", fov=10).sources().table
    assert listed["source_uri"][0].as_py().endswith("0400p020")


def test_a_north_and_a_south_copy_of_a_brick_take_one_place(tmp_path: Path) -> None:
    for region in ("north", "south"):
        for number, offset in enumerate((0, 380)):
            folder, _ = write_brick(tmp_path / region, f"0400p02{number}", dec=2.0 + offset * SCALE / 3600)
    Table({"id": ["a"], "ra": [40.0], "dec": [2.0 + 185 * SCALE / 3600]}).write(tmp_path / "s.csv")
    listed = open_source(tmp_path, catalogue=tmp_path / "s.csv", fov=20).sources().table
    assert [name[-4:] for name in (listed["source_uri"][0].as_py(), *listed["neighbours"][0].as_py())] == [
        "p020",
        "p021",
    ]
    assert folder.exists()


def test_files_that_come_later_are_seen_in_the_same_process(tmp_path: Path) -> None:
    folder, place = write_brick(tmp_path)
    first = read_at(tmp_path, tuple(place))
    bits = np.zeros((400, 400), np.int32)
    bits[:, :140] = 1 << 5
    fits.CompImageHDU(bits, compression_type="RICE_1").writeto(folder / "legacysurvey-0400p020-maskbits.fits.fz")
    second = read_at(tmp_path, tuple(place))
    assert isinstance(first, Cutout)
    assert isinstance(second, Cutout)
    assert (first.coverage, second.coverage) == (1, pytest.approx(0.5, abs=0.1))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"CTYPE1": "GLON-TAN", "CTYPE2": "GLAT-TAN"}, "only RA, then Dec"),
        ({"CTYPE1": "DEC--TAN", "CTYPE2": "RA---TAN", "CRVAL1": 2.0, "CRVAL2": 40.0}, "only RA, then Dec"),
        ({"RADESYS": "FK4", "EQUINOX": 1950.0}, "FK4: only RA"),
    ],
)
def test_a_sky_wcs_in_other_coordinates_is_refused(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    write_cube(tmp_path / "J0.fits")
    file = write_cube(tmp_path / "J1.fits")
    with fits.open(file, mode="update") as hdus:
        hdus[0].header.update(changes)
    reader = open_source(tmp_path)
    result = dict(reader.cutouts(reader.sources().table, contract(10)))[1]
    assert isinstance(result, UnreadableInput)
    assert words in str(result)


def test_impossible_positions_and_radii_of_a_folders_catalogue_are_rejected_rows(tmp_path: Path) -> None:
    for name in "abcd":
        write_cube(tmp_path / f"{name}.fits")
    Table(
        {
            "id": list("abc"),
            "ra": [40.0, -999.0, 40.0],
            "dec": [2.0, -999.0, 2.0],
            "petro_th50": [3.0, 3.0, -9999.0],
            "petro_th90": [9.0, 9.0, -9999.0],
        }
    ).write(tmp_path / "c.csv")
    listing = open_source(tmp_path, catalogue=tmp_path / "c.csv").sources()
    assert listing.table["source_id"].to_pylist() == ["a", "d"]  # d is in no row, so its header has its place
    assert listing.rejected["reason"].to_pylist() == ["bad_position", "bad_size"]
    ruled = open_source(tmp_path, catalogue=tmp_path / "c.csv", fov="gz_decals").sources()
    assert ruled.table["source_id"].to_pylist() == ["a"]
    assert ruled.table["fov"].to_pylist() == [pytest.approx(424 * 0.12)]
    assert ruled.rejected["reason"].to_pylist() == ["bad_position", "bad_size", "bad_size"]


def test_folders_behind_links_are_read_once(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    write_cube(elsewhere / "J1.fits")
    root = tmp_path / "root"
    root.mkdir()
    (root / "south").symlink_to(elsewhere)
    (root / "again").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(root)
    assert len(open_source(root).sources().table) == 1


def test_a_second_catalogue_row_of_a_file_is_a_rejected_row(tmp_path: Path) -> None:
    write_cube(tmp_path / "J1.fits")
    Table({"id": ["J1", "other", "J1", "other"], "shape_r": [2.0, 3.0, 4.0, 5.0]}).write(tmp_path / "c.csv")
    listing = open_source(tmp_path, catalogue=tmp_path / "c.csv").sources()
    assert listing.table["size"].to_pylist() == [2.0]
    assert listing.rejected["source_id"].to_pylist() == ["J1#row3"]
    assert "row 3 is not used" in listing.rejected["message"][0].as_py()
