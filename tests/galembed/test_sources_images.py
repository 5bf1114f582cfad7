"""Display images: what each kind of JPEG and PNG becomes, and tables of them."""

from __future__ import annotations

import contextlib
import io
import json
import re
import struct
import warnings
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from galembed.backbones import FieldOfView, InputContract
from galembed.cutouts import Cutout
from galembed.errors import BadRequest, GalembedError, NoData, UnreadableInput
from galembed.mappings import LEGACY_DR2
from galembed.schemas import SOURCES, conform
from galembed.sources import SourceReader
from galembed.sources.image_tables import ImageTableReader, holds_image_table
from galembed.sources.images import ImageReader, read_picture

CONTRACT = InputContract(16, FieldOfView(0.0, 10.0, 10.0), LEGACY_DR2)


# One picture.


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(lines: list[bytes], width: int, depth: int, colour: int, *, extra: bytes = b"", height: int = 0) -> bytes:
    """Encode a PNG by hand (PNG specification, 3rd edition): unfiltered lines of packed samples."""
    header = struct.pack(">IIBBBBB", width, height or len(lines), depth, colour, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + line for line in lines))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def two_lines(top: bytes, bottom: bytes, depth: int, colour: int, **others: Any) -> np.ndarray[Any, Any]:
    """Return R, G, B of the top and the bottom line, shape (2, 3), of a PNG whose lines have one value each."""
    per_pixel = len(top)
    width = 8 if depth < 8 else 2
    repeat = width * depth // 8 if depth < 8 else width
    pixels = read_picture(
        png([top * repeat, bottom * repeat] if per_pixel else [], width, depth, colour, **others), crop=1.0, size=2
    )
    assert (pixels[:, :, 0] == pixels[:, :, 1]).all()
    return pixels[:, ::-1, 0].T.astype(int)


def encoded(image: np.ndarray[Any, Any] | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, kind, **options)
    return stream.getvalue()


def galaxy(seed: int = 0, side: int = 48) -> np.ndarray[Any, Any]:
    """A smooth blob off centre, shape (side, side, 3), uint8."""
    y, x = np.mgrid[:side, :side] / side
    spot = np.exp(-((x - 0.4) ** 2 + (y - 0.3 - 0.02 * seed) ** 2) / 0.05)
    return np.asarray(np.stack([250 * spot, 180 * spot, 90 * spot], -1) + 3, np.uint8)


@pytest.mark.parametrize(
    ("depth", "dark", "bright", "expected"),
    [
        (1, b"\x00", b"\xff", (0, 255)),
        (2, b"\x55", b"\xaa", (85, 170)),
        (4, b"\x11", b"\xcc", (17, 204)),
        (8, b"\x07", b"\xc8", (7, 200)),
        (16, struct.pack(">H", 300), struct.pack(">H", 65535), (1, 255)),
        (16, struct.pack(">H", 257 * 40), struct.pack(">H", 257 * 40 + 129), (40, 41)),
    ],
)
def test_grey_is_scaled_from_its_depth_without_clipping(
    depth: int, dark: bytes, bright: bytes, expected: tuple[int, int]
) -> None:
    lines = two_lines(dark, bright, depth, 0)
    np.testing.assert_array_equal(lines, np.repeat(expected, 3).reshape(2, 3))


def test_sixteen_bit_colour_is_scaled_to_within_a_level() -> None:
    top, bottom = (1000, 30000, 65535), (257, 0, 12345)
    lines = two_lines(struct.pack(">3H", *top), struct.pack(">3H", *bottom), 16, 2)
    np.testing.assert_allclose(lines, np.array([top, bottom]) / 257, atol=1)


def test_a_palette_gives_its_colours_and_a_transparent_one_black() -> None:
    palette = chunk(b"PLTE", bytes([10, 20, 30, 200, 100, 50]))
    np.testing.assert_array_equal(two_lines(b"\0", b"\1", 8, 3, extra=palette), [[10, 20, 30], [200, 100, 50]])
    clear = palette + chunk(b"tRNS", bytes([0, 255]))
    np.testing.assert_array_equal(two_lines(b"\0", b"\1", 8, 3, extra=clear), [[0, 0, 0], [200, 100, 50]])


@pytest.mark.parametrize(
    ("colour", "top", "bottom", "expected"),
    [
        (4, (200, 255), (200, 0), [[200, 200, 200], [0, 0, 0]]),
        (6, (200, 100, 50, 255), (200, 100, 50, 51), [[200, 100, 50], [40, 20, 10]]),
    ],
    ids=["grey", "colour"],
)
def test_transparent_pixels_are_laid_over_black(
    colour: int, top: tuple[int, ...], bottom: tuple[int, ...], expected: list[list[int]]
) -> None:
    np.testing.assert_array_equal(two_lines(bytes(top), bytes(bottom), 8, colour), expected)


def test_a_colour_declared_transparent_is_black() -> None:
    key = chunk(b"tRNS", struct.pack(">3H", 9, 8, 7))
    np.testing.assert_array_equal(
        two_lines(bytes([9, 8, 7]), bytes([9, 8, 8]), 8, 2, extra=key), [[0, 0, 0], [9, 8, 8]]
    )


def test_cmyk_becomes_rgb_by_the_plain_product() -> None:
    inks = np.zeros((32, 32, 4), np.uint8)
    inks[:16], inks[16:] = (51, 102, 204, 0), (0, 0, 0, 153)
    pixels = read_picture(encoded(Image.fromarray(inks, "CMYK"), "JPEG", quality=100), crop=1.0, size=32)
    np.testing.assert_allclose(pixels[:, 24, 8], [204, 153, 51], atol=3)
    np.testing.assert_allclose(pixels[:, 8, 8], [102, 102, 102], atol=3)


# EXIF 2.32, tag 274: which side of the picture the first row and the first column are.
AS_STORED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: upright.swapaxes(0, 1)[::-1],
    7: lambda upright: upright.swapaxes(0, 1)[::-1, ::-1],
    8: lambda upright: upright.swapaxes(0, 1)[:, ::-1],
}


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("orientation", AS_STORED)
def test_the_exif_orientation_is_obeyed_before_the_flip(orientation: int, kind: str) -> None:
    upright = np.zeros((32, 32, 3), np.uint8)
    upright[:16, :16], upright[:16, 16:], upright[16:, :16] = 240, 160, 80
    exif = Image.Exif()
    exif[274] = orientation
    stored = np.ascontiguousarray(AS_STORED[orientation](upright))
    pixels = read_picture(encoded(stored, kind, exif=exif), crop=1.0, size=32)
    np.testing.assert_allclose(pixels[0, 8::16, 8::16].astype(int), [[80, 0], [240, 160]], atol=3)


def test_of_an_animated_png_the_first_frame_is_read() -> None:
    frames = [Image.fromarray(galaxy(seed)) for seed in range(3)]
    moving = encoded(frames[0], save_all=True, append_images=frames[1:])
    assert b"acTL" in moving
    np.testing.assert_array_equal(
        read_picture(moving, crop=1.0, size=48), read_picture(encoded(galaxy(0)), crop=1.0, size=48)
    )


def test_row_0_is_the_bottom_and_pixels_at_full_size_are_the_files() -> None:
    image = galaxy()
    pixels = read_picture(encoded(image), crop=1.0, size=48)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, image[::-1].transpose(2, 0, 1))


def test_a_file_and_its_bytes_give_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded(galaxy(), "JPEG"))
    file = tmp_path / "a.jpg"
    np.testing.assert_array_equal(
        read_picture(file, crop=0.7, size=20), read_picture(file.read_bytes(), crop=0.7, size=20)
    )


@pytest.mark.parametrize("side", [10_000, 40_000], ids=["warned of", "refused by Pillow"])
@pytest.mark.parametrize("action", ["ignore", "error"])
def test_a_decompression_bomb_is_an_error_of_ours(side: int, action: Any) -> None:
    bomb = png([b"\0" * (side // 8)], side, 1, 0, height=side)
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        with pytest.raises(UnreadableInput, match=r"stamp: more than 89,478,485 pixels"):
            read_picture(bomb, crop=0.5, size=8, name="stamp")


@pytest.mark.parametrize(
    ("kind", "options"),
    [("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True})],
    ids=["png", "jpeg", "progressive jpeg"],
)
@pytest.mark.parametrize("filling", [None, b"\0", b"\xff"], ids=["cut off", "zeros to the end", "ones to the end"])
def test_a_truncated_picture_is_refused_or_whole(kind: str, options: dict[str, Any], filling: bytes | None) -> None:
    whole = encoded(galaxy(), kind, **options)
    expected = read_picture(whole, crop=1.0, size=48)
    refused = 0
    for length in range(len(whole)):
        try:
            pixels = read_picture(
                whole[:length].ljust(len(whole) if filling else 0, filling or b" "), crop=1.0, size=48
            )
        except UnreadableInput:
            refused += 1
        else:
            np.testing.assert_array_equal(pixels, expected)
    assert refused > 0.95 * len(whole)


def test_a_png_with_one_changed_byte_is_refused_or_whole() -> None:
    whole = encoded(galaxy())
    expected = read_picture(whole, crop=1.0, size=48)
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 0x5A
        with contextlib.suppress(UnreadableInput):
            np.testing.assert_array_equal(read_picture(bytes(damaged), crop=1.0, size=48), expected)


@settings(max_examples=300)
@given(
    kind=st.sampled_from(["PNG", "JPEG"]),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_damaged_bytes_raise_nothing_but_errors_of_ours(kind: str, changes: list[tuple[float, int]]) -> None:
    exif = Image.Exif()
    exif[274] = 6
    data = bytearray(encoded(galaxy(), kind, exif=exif))
    for place, value in changes:
        data[int(place * len(data))] = value
    with contextlib.suppress(UnreadableInput, NoData):
        assert read_picture(bytes(data), crop=0.5, size=8).shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (encoded(galaxy(), "GIF"), "neither JPEG nor PNG"),
        (b"version https://git-lfs.github.com/spec/v1", "neither JPEG nor PNG"),
        (b"", "neither JPEG nor PNG"),
        (b"\xff\xd8\xff\xe0 not a picture", "fetch it again"),
    ],
)
def test_another_format_is_refused_whatever_its_name(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(content)
    with pytest.raises(UnreadableInput, match=rf"a\.png: .*{message}"):
        read_picture(file, crop=0.5, size=8)


def test_a_blank_picture_has_no_data() -> None:
    with pytest.raises(NoData, match="every pixel is 7"):
        read_picture(encoded(np.full((9, 9, 3), 7, np.uint8)), crop=0.5, size=8)


def test_a_folder_may_be_a_url() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/stamps/a/J1.png", encoded(galaxy()))
    try:
        source = ImageReader.open("memory:///stamps", catalogue=None, crop=1.0, carry=(), columns={})
        rows = source.sources().table
        assert rows["source_id"].to_pylist() == ["a/J1"]
        ((_, cutout),) = source.cutouts(rows, CONTRACT)
        assert isinstance(cutout, Cutout)
        np.testing.assert_array_equal(cutout.pixels, read_picture(encoded(galaxy()), crop=1.0, size=16))
    finally:
        memory.rm("/stamps", recursive=True)
    ((_, failure),) = source.cutouts(rows, CONTRACT)
    assert "cannot be fetched (FileNotFoundError" in str(failure)


# Tables of pictures.

FEATURES = {"id_str": {"dtype": "string", "_type": "Value"}, "image": {"_type": "Image"}}


def hugging_face(columns: dict[str, Any], features: dict[str, Any] = FEATURES) -> pa.Table:
    """Return a table with the metadata that `datasets` writes."""
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.table(columns).replace_schema_metadata(metadata)


def structs(pictures: list[bytes | None]) -> pa.Array:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.array([None if data is None else {"bytes": data, "path": "x.png"} for data in pictures], kind)


def write(file: Path, table: pa.Table, **options: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file, **options)
    return file


def shards(root: Path) -> Path:
    """Write Galaxy Zoo Evo's layout: two shards of three galaxies."""
    for shard in range(2):
        numbers = range(3 * shard, 3 * shard + 3)
        write(
            root / "data" / f"train-{shard:05d}-of-00002.parquet",
            hugging_face(
                {
                    "image": structs([encoded(galaxy(number)) for number in numbers]),
                    "id_str": [f"J{number}" for number in numbers],
                    "dataset_name": ["gz_desi"] * 3,
                    "ra": [10.0 + number for number in numbers],
                    "dec": [-5.0, np.nan, 5.0],
                    "smooth-or-featured-dr5_smooth": pa.array([3, None, 5], pa.int32()),
                    "mag_r": pa.array([17.5, np.nan, 18.0], pa.float32()),
                }
            ),
            row_group_size=2,
        )
    return root


def reader(root: Path, **options: Any) -> ImageTableReader:
    return ImageTableReader.open(root, **{"catalogue": None, "crop": 1.0, "carry": (), "columns": {}} | options)


def results(root: Path, rows: pa.Table | None = None) -> dict[int, Cutout | GalembedError]:
    source = reader(root)
    found = list(source.cutouts(source.sources().table if rows is None else rows, CONTRACT))
    assert len(dict(found)) == len(found)
    return dict(found)


def test_a_hugging_face_dataset_is_listed_with_its_columns(tmp_path: Path) -> None:
    root = shards(tmp_path)
    listed = reader(root, carry=("smooth-or-featured-dr5_smooth", "dataset_name")).sources()
    conform(listed.table, SOURCES)
    assert len(listed.rejected) == 0
    rows = listed.table.to_pylist()
    assert [row["source_id"] for row in rows] == ["J0", "J1", "J2", "J3", "J4", "J5"]
    assert rows[5]["source_uri"] == f"{root}/data/train-00001-of-00002.parquet#2"
    assert rows[5]["source_version"].startswith(f"{(root / 'data/train-00001-of-00002.parquet').stat().st_size}-")
    assert (rows[5]["ra"], rows[5]["dec"], rows[5]["size"]) == (15.0, 5.0, None)
    assert rows[1]["dec"] is None
    assert [row["mag_r"] for row in rows] == [17.5, None, 18.0] * 2
    assert [row["smooth-or-featured-dr5_smooth"] for row in rows] == [3, None, 5] * 2
    assert rows[0]["dataset_name"] == "gz_desi"


def test_its_pictures_are_those_of_a_folder_of_the_same_files(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for number in range(6):
        (folder / f"J{number}.png").write_bytes(encoded(galaxy(number)))
    files = ImageReader.open(folder, catalogue=None, crop=1.0, carry=(), columns={})
    listed = files.sources().table
    expected = {listed["source_id"][number].as_py(): cutout for number, cutout in files.cutouts(listed, CONTRACT)}
    for number, cutout in results(shards(tmp_path / "table")).items():
        from_file = expected[f"J{number}"]
        assert isinstance(cutout, Cutout)
        assert isinstance(from_file, Cutout)
        np.testing.assert_array_equal(cutout.pixels, from_file.pixels)
        assert cutout.ra == 10.0 + number


def test_any_rows_in_any_order_are_each_answered_once(tmp_path: Path) -> None:
    root = shards(tmp_path)
    rows = reader(root).sources().table.take([4, 0, 4, 2])
    found = results(root, rows)
    assert sorted(found) == [0, 1, 2, 3]
    for number, seed in enumerate([4, 0, 4, 2]):
        cutout = found[number]
        assert isinstance(cutout, Cutout)
        np.testing.assert_array_equal(cutout.pixels, read_picture(encoded(galaxy(seed)), crop=1.0, size=16))


def test_a_row_is_found_in_a_long_file_with_several_row_groups(tmp_path: Path) -> None:
    pictures = [np.stack([np.full((4, 4), n), *np.mgrid[:4, :4]], -1).astype(np.uint8) for n in range(150)]
    file = write(tmp_path / "t.parquet", pa.table({"png": [encoded(p) for p in pictures]}), row_group_size=70)
    wanted = [0, 31, 32, 33, 69, 70, 71, 102, 139, 140, 149]
    found = results(file, reader(file).sources().table.take(wanted))
    reds = [cutout.pixels[0, 0, 0] for _, cutout in sorted(found.items()) if isinstance(cutout, Cutout)]
    assert reds == wanted


def test_one_file_without_ids_has_file_and_row_for_ids(tmp_path: Path) -> None:
    file = write(tmp_path / "cutouts.parquet", pa.table({"jpg": [encoded(galaxy(n), "JPEG") for n in range(2)]}))
    assert reader(file).sources().table["source_id"].to_pylist() == ["cutouts.parquet#0", "cutouts.parquet#1"]
    assert {type(result) for result in results(file).values()} == {Cutout}
    below = reader(tmp_path).sources().table["source_id"].to_pylist()
    assert below == ["cutouts.parquet#0", "cutouts.parquet#1"]


def test_a_row_without_an_id_and_one_whose_id_came_before(tmp_path: Path) -> None:
    picture = encoded(galaxy())
    table = pa.table({"image": [picture] * 3, "id": ["a", None, " a "]})
    listed = reader(write(tmp_path / "t.parquet", table)).sources()
    assert listed.table["source_id"].to_pylist() == ["a", "t.parquet#1"]
    assert listed.rejected["source_id"].to_pylist() == ["a#row3"]
    assert listed.rejected["reason"].to_pylist() == ["duplicate_key"]


def test_a_row_without_a_picture_or_with_a_damaged_one_fails_alone(tmp_path: Path) -> None:
    table = hugging_face({"image": structs([encoded(galaxy()), None, b"\x89PNG\r\n\x1a\n damaged", encoded(galaxy())])})
    table = pa.concat_tables(
        [table, hugging_face({"image": pa.array([{"bytes": None, "path": "a.png"}], table["image"].type)})]
    )
    file = write(tmp_path / "t.parquet", table)
    found = results(file)
    assert [type(found[number]) for number in range(5)] == [
        Cutout,
        UnreadableInput,
        UnreadableInput,
        Cutout,
        UnreadableInput,
    ]
    assert f"{file}#1: the table holds no picture" in str(found[1])
    assert f"{file}#2: damaged" in str(found[2])
    assert "only names a.png" in str(found[4])


def overwrite_pictures(file: Path, group: int) -> None:
    """Replace the stored pictures of one row group by noise."""
    with pq.ParquetFile(file) as parquet:
        chunks = [parquet.metadata.row_group(group).column(number) for number in range(parquet.metadata.num_columns)]
        (bytes_chunk,) = [chunk for chunk in chunks if chunk.path_in_schema == "image.bytes"]
        start = bytes_chunk.dictionary_page_offset or bytes_chunk.data_page_offset
        size = bytes_chunk.total_compressed_size
    data = bytearray(file.read_bytes())
    data[start : start + size] = np.random.default_rng(0).bytes(size)
    file.write_bytes(data)


def test_listing_reads_no_pictures_and_a_damaged_row_group_fails_alone(tmp_path: Path) -> None:
    file = write(
        tmp_path / "t.parquet",
        hugging_face({"image": structs([encoded(galaxy(n)) for n in range(6)]), "id_str": list("abcdef")}),
        row_group_size=2,
    )
    overwrite_pictures(file, 1)
    assert len(reader(file).sources().table) == 6
    found = results(file)
    assert [isinstance(found[number], Cutout) for number in range(6)] == [True, True, False, False, True, True]
    assert f"{file}#2: row group 1 is damaged" in str(found[2])


def test_rows_that_are_no_longer_there_fail_by_name(tmp_path: Path) -> None:
    root = shards(tmp_path)
    rows = reader(root).sources().table
    first = root / "data" / "train-00000-of-00002.parquet"
    write(first, hugging_face({"image": structs([encoded(galaxy())])}))
    (root / "data" / "train-00001-of-00002.parquet").unlink()
    found = results(root, rows)
    assert isinstance(found[0], Cutout)
    assert f"{first}#2: the file holds 1 pictures now" in str(found[2])
    assert "train-00001-of-00002.parquet#0: the file is damaged or gone" in str(found[3])
    elsewhere = rows.slice(0, 1).set_column(
        rows.column_names.index("source_uri"), SOURCES.field("source_uri"), pa.array(["a.png"])
    )
    assert "a.png is not FILE#ROW" in str(results(root, elsewhere)[0])


def test_a_damaged_shard_is_one_failure_and_the_rest_are_listed(tmp_path: Path) -> None:
    root = shards(tmp_path)
    shard = root / "data" / "train-00001-of-00002.parquet"
    shard.write_bytes(shard.read_bytes()[:-100])
    listed = reader(root).sources()
    assert len(listed.table) == 3
    (failure,) = listed.rejected.to_pylist()
    assert failure["source_id"] == "data/train-00001-of-00002.parquet"
    assert failure["reason"] == "unreadable"
    assert "damaged or not a Parquet file" in failure["message"]


def test_shards_may_differ_in_the_type_of_a_column(tmp_path: Path) -> None:
    picture = structs([encoded(galaxy())])
    write(tmp_path / "a.parquet", pa.table({"image": picture, "id": ["a"], "redshift": pa.array([0.5], pa.float32())}))
    write(tmp_path / "b.parquet", pa.table({"image": picture, "id": ["b"], "redshift": pa.nulls(1)}))
    write(tmp_path / "c.parquet", pa.table({"image": picture, "id": ["c"]}).slice(1))
    assert reader(tmp_path).sources().table["redshift"].to_pylist() == [0.5, None]
    write(tmp_path / "d.parquet", pa.table({"image": picture, "id": ["d"], "redshift": ["low"]}))
    with pytest.raises(BadRequest, match="has another type in one file than in the next"):
        reader(tmp_path).sources()


def test_a_table_of_pictures_takes_no_catalogue_and_carries_only_what_it_has(tmp_path: Path) -> None:
    root = shards(tmp_path)
    with pytest.raises(BadRequest, match="its own columns are its catalogue"):
        reader(root, catalogue="c.fits")
    with pytest.raises(BadRequest, match="spin"):
        reader(root, carry=("spin",)).sources()


def test_a_folder_without_pictures_in_its_tables_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "votes.parquet", pa.table({"id": ["a"]}))
    with pytest.raises(UnreadableInput, match="no Parquet table with a column of JPEG or PNG"):
        reader(tmp_path).sources()
    (tmp_path / "votes.parquet").write_bytes(b"PAR1 cut off")
    with pytest.raises(UnreadableInput, match=r"votes\.parquet: damaged or not a Parquet file"):
        reader(tmp_path).sources()


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (hugging_face({"image": structs([b""])}), True),
        (pa.table({"img": structs([b""])}), True),
        (hugging_face({"stamp": pa.array([b""])}, {"stamp": {"_type": "Image"}}), True),
        (pa.table({"jpeg": pa.array([b""], pa.large_binary())}), True),
        (pa.table({"stamp": pa.array([b""])}), False),
        (hugging_face({"audio": structs([b""])}, {"audio": {"_type": "Audio"}}), False),
        (pa.table({"image": ["a.png"], "ra": [1.0]}), False),
        (pa.table({"image": pa.array([{"path": "a.png"}])}), False),
        (pa.table({"id": ["a"], "ra": [1.0]}), False),
    ],
)
def test_a_column_of_pictures_is_recognised_by_its_schema(tmp_path: Path, table: pa.Table, expected: bool) -> None:
    file = write(tmp_path / "default" / "train" / "0000.parquet", table)
    assert holds_image_table(file) is expected
    assert holds_image_table(tmp_path) is expected


def test_other_and_damaged_files_hold_no_pictures(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"not Parquet")
    (tmp_path / "b.png").write_bytes(encoded(galaxy()))
    assert not holds_image_table(tmp_path)
    assert not holds_image_table(tmp_path / "b.png")
    shards(tmp_path)
    assert holds_image_table(tmp_path)


def test_of_several_columns_of_pictures_the_one_called_image_is_read(tmp_path: Path) -> None:
    table = pa.table({"mask": structs([encoded(galaxy(9))]), "image": structs([encoded(galaxy(1))])})
    cutout = results(write(tmp_path / "t.parquet", table))[0]
    assert isinstance(cutout, Cutout)
    np.testing.assert_array_equal(cutout.pixels, read_picture(encoded(galaxy(1)), crop=1.0, size=16))


def published(root: Path) -> str:
    """Copy a folder to memory, and return its URL."""
    memory = fsspec.filesystem("memory")
    memory.put(f"{root}/", f"/{root.name}/", recursive=True)
    return f"memory:///{root.name}"


def test_a_data_set_at_a_url_is_listed_and_read_as_from_disk(tmp_path: Path) -> None:
    url = published(shards(tmp_path))
    assert holds_image_table(url)
    there, here = (ImageTableReader(root, 1.0, ("dataset_name",)) for root in (url, str(tmp_path)))
    listed, expected = there.sources().table, here.sources().table
    assert listed.drop_columns(["source_uri", "source_version"]).equals(
        expected.drop_columns(["source_uri", "source_version"])
    )
    assert listed["source_uri"][4].as_py() == f"{url}/data/train-00001-of-00002.parquet#1"
    for (number, cutout), (other, wanted) in zip(
        there.cutouts(listed, CONTRACT), here.cutouts(expected, CONTRACT), strict=True
    ):
        assert number == other
        assert isinstance(cutout, Cutout)
        assert isinstance(wanted, Cutout)
        np.testing.assert_array_equal(cutout.pixels, wanted.pixels)
    assert len(ImageTableReader(f"{url}/data/train-00000-of-00002.parquet").sources().table) == 3


def test_a_shard_at_a_url_that_is_gone_or_damaged_is_told_by_name(tmp_path: Path) -> None:
    url = published(shards(tmp_path))
    source = ImageTableReader(url)
    rows = source.sources().table
    memory = fsspec.filesystem("memory")
    memory.rm(f"/{tmp_path.name}/data/train-00000-of-00002.parquet")
    memory.pipe(f"/{tmp_path.name}/data/train-00001-of-00002.parquet", b"PAR1 cut off")
    for _, result in source.cutouts(rows, CONTRACT):
        assert isinstance(result, UnreadableInput)
        assert re.search(r"train-0000\d-of-00002\.parquet#\d: the file is damaged or gone", str(result))
    assert not holds_image_table(url)
    with pytest.raises(UnreadableInput, match=r"no Parquet table.*train-00001-of-00002\.parquet: damaged or not"):
        source.sources()


def test_both_readers_are_source_readers(tmp_path: Path) -> None:
    readers: list[SourceReader] = [reader(tmp_path), ImageReader(str(tmp_path))]
    for each in readers:
        assert (each.kind, each.root, dict(each.bands)) == ("display", str(tmp_path), {})


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("folder", "count"),
    [
        ("galaxy10_decals_samples", 80),
        ("gz1_small", 3186),
        ("gz2_kaggle_5class", 1542),
        ("gz2_spiral_odd", 1400),
        ("gz2_star_artefact", 642),
        ("gz2_unlabelled", 344),
        ("gz2_votes_1000", 700),
        ("gz_decals_rings", 330),
    ],
)
def test_every_real_picture_is_read(shared_data: Path, folder: str, count: int) -> None:
    root = shared_data / "images" / folder
    assert holds_image_table(root)
    source = reader(root, crop=0.5)
    listed = source.sources()
    assert (len(listed.table), listed.rejected["message"].to_pylist()) == (count, [])
    refused = Counter(
        str(result) for _, result in source.cutouts(listed.table, CONTRACT) if isinstance(result, GalembedError)
    )
    assert refused == {}


@pytest.mark.shared_data
def test_real_catalogues_are_no_tables_of_pictures(shared_data: Path) -> None:
    assert not holds_image_table(shared_data / "votes")
