"""Listing and opening files, near and far, whole and damaged."""

from __future__ import annotations

import bz2
import gzip
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest
from astropy.io import fits

from galembed.errors import UnreadableInput
from galembed.files import file_version, find_files, is_url, open_fits, open_headers, relative, resolve

IMAGE = np.arange(60 * 50, dtype=np.float32).reshape(60, 50)


def write(path: Path) -> Path:
    """Two HDUs: an image, and the same compressed by Rice without loss."""
    integers = fits.CompImageHDU(IMAGE.astype(np.int32), name="TILES", tile_shape=(20, 20))
    fits.HDUList([fits.PrimaryHDU(IMAGE), integers]).writeto(path)
    return path


def replaced(path: Path, old: bytes, new: bytes, hdu: int = 0) -> Path:
    """Replace the first card after an HDU's start that begins with `old`."""
    raw = path.read_bytes()
    with fits.open(path, disable_image_compression=True) as file:
        at = raw.index(old, file[hdu].fileinfo()["hdrLoc"])
    path.write_bytes(raw[:at] + new.ljust(80) + raw[at + 80 :])
    return path


def card(name: str, value: object) -> bytes:
    return fits.Card(name, value).image.encode()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """URL of a web server on the folder ``web`` of `tmp_path`."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None: ...

    (tmp_path / "web").mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path / "web")) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}"
        httpd.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("name", "pack"), [("a.fits", bytes), ("a.fits.gz", gzip.compress), ("a.fits.bz2", bz2.compress)]
)
def test_the_same_pixels_come_from_a_path_a_url_and_a_web_server(
    tmp_path: Path, server: str, name: str, pack: Callable[[bytes], bytes]
) -> None:
    content = pack(write(tmp_path / "plain").read_bytes())
    (tmp_path / "web" / name).write_bytes(content)
    fsspec.filesystem("memory").pipe(f"/{tmp_path.name}/{name}", content)
    for uri in (str(tmp_path / "web" / name), f"memory://{tmp_path.name}/{name}", f"{server}/{name}"):
        with open_fits(uri) as file:
            np.testing.assert_array_equal(file[0].section[10:20, 5:9], IMAGE[10:20, 5:9])
            np.testing.assert_array_equal(file[1].section[10:20, 5:9], IMAGE[10:20, 5:9])


def test_what_a_web_server_does_not_have_is_named(server: str) -> None:
    with pytest.raises(UnreadableInput, match=r"none\.fits is missing; fetch it again"):
        open_fits(f"{server}/none.fits")


def test_a_truncated_file_behind_a_url_is_unreadable(tmp_path: Path) -> None:
    content = write(tmp_path / "a.fits").read_bytes()
    fsspec.filesystem("memory").pipe(f"/{tmp_path.name}/b.fits", content[:9000])
    with pytest.raises(UnreadableInput, match=r"b\.fits: truncated \(9000 bytes, HDU 0 ends at 17280\)"):
        open_fits(f"memory://{tmp_path.name}/b.fits")


@pytest.mark.parametrize("ending", [".gz", ".bz2"])
def test_a_damaged_stream_is_unreadable(tmp_path: Path, ending: str) -> None:
    pack = gzip.compress if ending == ".gz" else bz2.compress
    content = bytearray(pack(write(tmp_path / "plain").read_bytes()))
    content[len(content) // 2] ^= 16
    (tmp_path / f"a.fits{ending}").write_bytes(content)
    with pytest.raises(UnreadableInput, match=rf"a\.fits{ending}: damaged"):
        open_fits(str(tmp_path / f"a.fits{ending}"))


def test_data_cut_off_are_named_and_headers_are_still_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.fits")
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(UnreadableInput, match=r"truncated \(9000 bytes, HDU 0 ends at 17280\)"):
        open_fits(str(path))
    with open_headers(str(path)) as file:
        assert file[0].header["NAXIS1"] == 50


@pytest.mark.parametrize("value", [10**9, -1, 2.5])
def test_a_number_of_axes_that_no_image_has_is_refused_at_once(tmp_path: Path, value: float) -> None:
    path = replaced(write(tmp_path / "a.fits"), b"NAXIS ", card("NAXIS", value))
    for open_it in (open_fits, open_headers):
        with pytest.raises(UnreadableInput, match=r"HDU 0 has NAXIS = "):
            open_it(str(path))


def test_a_negative_size_does_not_read_the_same_bytes_for_ever(tmp_path: Path) -> None:
    path = replaced(write(tmp_path / "a.fits"), b"GCOUNT", card("GCOUNT", -1), hdu=1)
    for open_it in (open_fits, open_headers):
        with pytest.raises(UnreadableInput, match="HDU 1 has a negative size"):
            open_it(str(path))


@pytest.mark.parametrize(
    ("old", "new", "hdu", "message"),
    [
        (b"XTENSION", card("XTENSION", "IMAGF"), 1, "HDU 1 is of no known type"),
        (b"NAXIS ", b"", 0, "HDU 0 has NAXIS = nothing"),
        (b"NAXIS1", card("NAXIS3", 50), 0, "HDU 0 goes on with BITPIX, NAXIS, NAXIS3, NAXIS2"),
        (b"BITPIX", card("BITPIX", 12), 0, "HDU 0 has BITPIX = 12"),
        (b"NAXIS2", card("NAXIS2", 59), 0, "bytes between the data of HDU 0 and the end of their block"),
        (b"NAXIS2", card("NAXIS2", 0), 0, "there is no header at byte 2880, after 1 HDU"),
        (b"TFIELDS", card("TFIELDS", 10**9), 1, "HDU 1 has TFIELDS = 1000000000"),
        (b"ZNAXIS1", card("ZNAXIS1", 10**9), 1, "has 150000000 tiles"),
        (b"ZCMPTYPE", card("ZCMPTYPE", "PLIO_1"), 1, "PLIO_1 tiles in a column of 1PB"),
        (b"TFORM1", card("TFORM1", "1QB(9)"), 1, "the columns of the tiles' table are not its 8 bytes wide"),
        (b"EXTNAME", b"EXTNAME = 'TILES", 1, "1 of 2 HDUs can be read"),
    ],
)
def test_a_damaged_header_is_named(tmp_path: Path, old: bytes, new: bytes, hdu: int, message: str) -> None:
    path = replaced(write(tmp_path / "a.fits"), old, new, hdu)
    with pytest.raises(UnreadableInput, match=rf"a\.fits: damaged or not a FITS file \(.*{message}"):
        open_fits(str(path))


def test_a_card_that_cannot_be_parsed_is_named(tmp_path: Path) -> None:
    fits.writeto(tmp_path / "a.fits", IMAGE, fits.Header({"BAND": "g"}))
    replaced(tmp_path / "a.fits", b"BAND", b"BAND    = 'g")
    with pytest.raises(UnreadableInput, match=r"VerifyError: Unparsable card \(BAND\)"):
        open_fits(str(tmp_path / "a.fits"))


@pytest.mark.parametrize(("name", "value"), [("ZVAL1", -1), ("ZVAL1", 17), ("ZVAL2", -1), ("ZVAL2", 3)])
def test_a_number_that_would_end_the_process_in_the_decoder_is_refused(tmp_path: Path, name: str, value: int) -> None:
    path = replaced(write(tmp_path / "a.fits"), name.encode(), card(name, value), hdu=1)
    with pytest.raises(UnreadableInput, match=rf"(BLOCKSIZE|BYTEPIX) = {value} is nothing that a decoder takes"):
        open_fits(str(path))


@pytest.mark.parametrize("byte", [0, 3, 9])
def test_an_hcompress_stream_of_more_pixels_than_its_tile_is_refused(tmp_path: Path, byte: int) -> None:
    bits = (np.arange(70 * 50).reshape(70, 50) % 7).astype(np.int32)
    path = tmp_path / "a.fits"
    fits.CompImageHDU(bits, compression_type="HCOMPRESS_1", tile_shape=(20, 20)).writeto(path)
    with open_fits(str(path)) as file:
        np.testing.assert_array_equal(file[1].data, bits)
    content = bytearray(path.read_bytes())
    content[content.index(b"\xdd\x99") + byte] ^= 64
    path.write_bytes(content)
    with pytest.raises(UnreadableInput, match="the HCOMPRESS stream of tile 0 is not of its 400 pixels"):
        open_fits(str(path))


@pytest.mark.parametrize("byte", [0, 4, 5])
def test_a_stream_that_lies_outside_of_its_heap_is_refused(tmp_path: Path, byte: int) -> None:
    path = write(tmp_path / "a.fits")
    with fits.open(path) as file:
        table = file[1].fileinfo()["datLoc"]
    content = bytearray(path.read_bytes())
    content[table + 8 + byte] ^= 128
    path.write_bytes(content)
    with pytest.raises(UnreadableInput, match="the stream of tile 1 is not in the table's heap"):
        open_fits(str(path))


def test_one_of_a_scale_and_a_zero_is_not_enough(tmp_path: Path) -> None:
    fits.CompImageHDU(IMAGE / 7).writeto(tmp_path / "a.fits")
    replaced(tmp_path / "a.fits", b"TTYPE3", card("TTYPE3", "deg"), hdu=1)
    with pytest.raises(UnreadableInput, match="one of ZSCALE and ZZERO is missing"):
        open_fits(str(tmp_path / "a.fits"))


def test_what_follows_the_last_hdu_must_be_zeros(tmp_path: Path) -> None:
    path = write(tmp_path / "a.fits")
    content = path.read_bytes()
    path.write_bytes(content + bytes(5760))
    open_fits(str(path)).close()
    path.write_bytes(content + bytes(5759) + b"x")
    with pytest.raises(UnreadableInput, match=r"no header at byte \d+, after 2 HDU\(s\)"):
        open_fits(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "an HTML page"),
        (b"SIMPLE  =                    T".ljust(2880), "has no end"),
    ],
)
def test_what_only_has_the_name_of_a_fits_file_is_said(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.fits").write_bytes(content)
    with pytest.raises(UnreadableInput, match=message):
        open_fits(str(tmp_path / "a.fits"))


def test_files_are_listed_in_order_without_hidden_ones_near_and_far(tmp_path: Path) -> None:
    for name in ("b.fits", "a/c.FITS", "a/.hidden.fits", ".git/d.fits", "a/e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
        fsspec.filesystem("memory").pipe(f"/{tmp_path.name}/{name}", b"x")
    root = resolve(tmp_path)
    assert [relative(path, root) for path in find_files(root, (".fits",))] == ["a/c.FITS", "b.fits"]
    far = f"memory://{tmp_path.name}"
    # A folder's name may begin with a dot in a bucket, where nobody hides anything by it.
    assert [path.rpartition("/")[2] for path in find_files(far, (".fits",))] == ["d.fits", "c.FITS", "b.fits"]
    assert all(is_url(path) for path in find_files(far))


@pytest.mark.parametrize("far", [False, True])
def test_a_root_that_is_a_file_or_absent_is_said(tmp_path: Path, far: bool) -> None:
    (tmp_path / "a.fits").write_bytes(b"x")
    fsspec.filesystem("memory").pipe(f"/{tmp_path.name}/a.fits", b"x")
    root = f"memory://{tmp_path.name}" if far else str(tmp_path)
    with pytest.raises(UnreadableInput, match="is a file; give the folder"):
        find_files(f"{root}/a.fits")
    with pytest.raises(UnreadableInput, match=r"cannot be listed|holds no file|does not exist"):
        find_files(f"{root}/nowhere")


@pytest.mark.parametrize("mark", ["ETag", "blob_id", "xet_hash", "LastModified"])
def test_the_version_far_away_is_size_and_the_mark_of_the_contents(mark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    system = SimpleNamespace(info=lambda _: {"name": "a", "size": 12, mark: "0a1b"})
    monkeypatch.setattr("galembed.files._file_system", lambda uri: (system, uri))
    assert file_version("hf://datasets/OWNER/NAME/a.parquet") == "12-0a1b"


def test_the_version_follows_size_and_time_of_every_file(tmp_path: Path) -> None:
    one, two = tmp_path / "1", tmp_path / "2"
    one.write_bytes(b"abc")
    two.write_bytes(b"de")
    before = file_version(one, two)
    assert before.startswith("5-")
    two.write_bytes(b"def")
    assert file_version(one, two).startswith("6-")
    fsspec.filesystem("memory").pipe(f"/{tmp_path.name}/1", b"abc")
    assert file_version(f"memory://{tmp_path.name}/1").startswith("3-")
