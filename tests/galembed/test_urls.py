"""The readers on object storage and web servers: the same pixels as from disk, and failures with names."""

from __future__ import annotations

import io
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import s3fs
from astropy.io import fits
from astropy.table import Table
from astropy.wcs import WCS

from galembed import files
from galembed.backbones import FieldOfView, InputContract
from galembed.cutouts import Cutout
from galembed.errors import BadRequest, GalembedError, UnreadableInput
from galembed.files import file_version, find_files, open_fits
from galembed.mappings import LEGACY_DR2
from galembed.sources import SourceReader, open_source, tiles

PIXEL = 0.262
SIDE = 40 * PIXEL
CONTRACT = InputContract(40, FieldOfView(0.0, SIDE, SIDE), LEGACY_DR2)
BRICK = "coadd/040/0400p020/legacysurvey-0400p020"
Publish = Callable[[Path], str]


def tan_header(shape: tuple[int, int]) -> fits.Header:
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.crval = [40.0, 2.0]
    wcs.wcs.crpix = [(shape[1] + 1) / 2, (shape[0] + 1) / 2]
    wcs.wcs.cd = np.diag([-PIXEL, PIXEL]) / 3600
    return wcs.to_header()


def write_cubes(folder: Path) -> None:
    head = tan_header((60, 60))
    head["BANDS"], head["IMAGETYP"] = "grz", "image"
    for seed, name in enumerate(("a.fits", "south/b.fits", "south/c.fits.gz")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        fits.writeto(folder / name, np.random.default_rng(seed).normal(1, 0.1, (3, 60, 60)).astype(np.float32), head)


def write_brick(folder: Path, side: int = 300, sources: int = 5) -> Path:
    """A brick of noise and its catalogue, which stays on disk."""
    head = tan_header((side, side))
    head["BUNIT"] = "nanomaggy"
    (folder / BRICK).parent.mkdir(parents=True)
    rng = np.random.default_rng(1)
    for band in "grz":
        pixels = rng.normal(1, 0.1, (side, side)).astype(np.float32)
        image = fits.CompImageHDU(pixels, head, compression_type="RICE_1", tile_shape=(100, 100), quantize_level=16)
        image.writeto(folder / f"{BRICK}-image-{band}.fits.fz")
    places = WCS(head).all_pix2world(np.linspace((60, 60), (side - 60, side - 60), sources), 0)
    catalogue = folder.parent / "sources.ecsv"
    Table({"id": np.arange(sources), "ra": places[:, 0], "dec": places[:, 1]}).write(catalogue)
    return catalogue


def read_all(reader: SourceReader) -> dict[str, Cutout | GalembedError]:
    rows = reader.sources().table
    ids = rows["source_id"].to_pylist()
    return {ids[number]: result for number, result in reader.cutouts(rows, CONTRACT)}


def assert_same(reader: SourceReader, other: SourceReader, count: int) -> None:
    """Every source is read by both, to the last bit."""
    here, there = read_all(reader), read_all(other)
    assert list(here) == list(there)
    assert len(here) == count
    for one, two in zip(here.values(), there.values(), strict=True):
        assert isinstance(one, Cutout)
        assert isinstance(two, Cutout)
        np.testing.assert_array_equal(one.pixels, two.pixels)
        assert (one.ra, one.dec, one.fov_arcsec) == (two.ra, two.dec, two.fov_arcsec)


@dataclass
class Web:
    """A web server on a folder, with listings."""

    url: str
    stop: Callable[[], None]
    sent: dict[str, int] = field(default_factory=dict)
    """Bytes sent of each file."""


class WholeFiles(SimpleHTTPRequestHandler):
    """Python's own server: it knows no ranges."""

    def log_message(self, format: str, *args: object) -> None: ...


class Ranges(WholeFiles):
    """The same, with ranges."""

    def __init__(self, *args: object, sent: dict[str, int], **options: object) -> None:
        self.sent = sent
        super().__init__(*args, **options)  # type: ignore[arg-type]

    def send_head(self) -> io.BytesIO | BinaryIO | None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            return super().send_head()
        content, span = path.read_bytes(), re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        part = content[int(span[1]) : int(span[2]) + 1] if span else content
        self.send_response(206 if span else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Last-Modified", self.date_time_string(int(path.stat().st_mtime)))
        if span:
            self.send_header("Content-Range", f"bytes {span[1]}-{int(span[1]) + len(part) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "GET":
            self.sent[path.name] = self.sent.get(path.name, 0) + len(part)
        return io.BytesIO(part)


def serve(handler: Callable[..., BaseHTTPRequestHandler]) -> tuple[str, Callable[[], None]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return f"http://127.0.0.1:{server.server_address[1]}", stop


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Web]:
    sent: dict[str, int] = {}
    url, stop = serve(partial(Ranges, directory=str(tmp_path / "survey"), sent=sent))
    yield Web(url, stop, sent)
    stop()


@pytest.fixture(params=["s3", "http"])
def publish(request: pytest.FixtureRequest) -> Publish:
    """Bring the folder ``survey`` of `tmp_path` to a place with a URL."""
    if request.param == "http":
        url = request.getfixturevalue("web").url
        return lambda folder: str(url)
    root = request.getfixturevalue("bucket")

    def upload(folder: Path) -> str:
        far = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
        for path in folder.rglob("*.*"):
            far.pipe_file(f"{root}/survey/{path.relative_to(folder).as_posix()}", path.read_bytes())
        return f"{root}/survey"

    return upload


def test_a_folder_of_cutouts_is_read_as_from_disk(tmp_path: Path, publish: Publish) -> None:
    write_cubes(tmp_path / "survey")
    assert_same(open_source(tmp_path / "survey"), open_source(publish(tmp_path / "survey")), count=3)


@pytest.mark.parametrize("whole", [1, 100], ids=["whole", "section"])
def test_bricks_are_cut_as_from_disk(
    tmp_path: Path, publish: Publish, whole: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "WHOLE_TILE_SOURCES", whole)
    catalogue = write_brick(tmp_path / "survey")
    far = open_source(publish(tmp_path / "survey"), catalogue=catalogue)
    assert_same(open_source(tmp_path / "survey", catalogue=catalogue), far, count=5)


def test_a_version_follows_the_contents_of_every_file(tmp_path: Path, publish: Publish) -> None:
    catalogue = write_brick(tmp_path / "survey")

    def versions() -> set[str]:
        reader = open_source(publish(tmp_path / "survey"), catalogue=catalogue)
        return set(reader.sources().table["source_version"].to_pylist())

    seen = versions()
    assert seen == versions()
    for number, path in enumerate(sorted((tmp_path / "survey").rglob("*.fz")), start=1):
        with fits.open(path, mode="update", disable_image_compression=True) as file:
            file[1].header["TELESCOP"] = f"T{number}"  # of the same size
        os.utime(path, (number * 100, number * 100))
        fresh = versions()
        assert len(fresh) == 1
        assert not fresh & seen
        seen |= fresh


def test_a_second_listing_sees_what_was_replaced_since(tmp_path: Path, publish: Publish) -> None:
    write_cubes(tmp_path / "survey")
    reader = open_source(publish(tmp_path / "survey"))
    before = reader.sources().table["source_version"].to_pylist()
    path = tmp_path / "survey" / "a.fits"
    path.write_bytes((tmp_path / "survey" / "south" / "b.fits").read_bytes())  # of the same size
    os.utime(path, (1e9, 1e9))
    publish(tmp_path / "survey")
    after = reader.sources().table["source_version"].to_pylist()
    assert [one == two for one, two in zip(before, after, strict=True)] == [False, True, True]


def test_a_file_replaced_since_it_was_listed_is_read_when_tried_again(tmp_path: Path, bucket: str) -> None:
    write_cubes(tmp_path / "survey")
    far = s3fs.S3FileSystem(skip_instance_cache=True)
    far.put_file(str(tmp_path / "survey/a.fits"), f"{bucket}/survey/a.fits")
    reader = open_source(f"{bucket}/survey")
    rows = reader.sources().table
    far.put_file(str(tmp_path / "survey/south/b.fits"), f"{bucket}/survey/a.fits")
    (first,) = dict(reader.cutouts(rows, CONTRACT)).values()
    assert isinstance(first, UnreadableInput)
    assert "cannot be fetched" in str(first)
    (second,) = dict(reader.cutouts(rows, CONTRACT)).values()
    there = read_all(open_source(tmp_path / "survey" / "south"))["b"]
    assert isinstance(second, Cutout)
    assert isinstance(there, Cutout)
    np.testing.assert_array_equal(second.pixels, there.pixels)


def test_a_section_of_a_big_plane_moves_a_part_of_it(tmp_path: Path, web: Web) -> None:
    catalogue = write_brick(tmp_path / "survey", side=3000, sources=3)
    size = (tmp_path / "survey" / f"{BRICK}-image-g.fits.fz").stat().st_size
    assert size > 7 * files._FETCHED_BYTES
    reader = open_source(web.url, catalogue=catalogue)
    middle = reader.sources().table.slice(1, 1)
    web.sent.clear()
    ((_, result),) = reader.cutouts(middle, CONTRACT)
    assert isinstance(result, Cutout)
    # A block for headers and the table of tiles, and one or two where the tiles are; fsspec's own would be it all.
    assert set(web.sent) == {f"legacysurvey-0400p020-image-{band}.fits.fz" for band in "grz"}
    assert max(web.sent.values()) <= 3 * files._FETCHED_BYTES


@pytest.mark.parametrize("refused", [False, True], ids=["ignored", "refused"])
def test_a_server_without_ranges_is_read_whole(tmp_path: Path, refused: bool) -> None:
    class Handler(WholeFiles):
        def end_headers(self) -> None:
            if refused:
                self.send_header("Accept-Ranges", "none")
            super().end_headers()

    image = np.random.default_rng(0).normal(size=(900, 900)).astype(np.float32)
    assert image.nbytes > 3 * files._FETCHED_BYTES
    fits.writeto(tmp_path / "a.fits", image)
    url, stop = serve(partial(Handler, directory=str(tmp_path)))
    try:
        with open_fits(f"{url}/a.fits") as file:
            np.testing.assert_array_equal(file[0].section[880:], image[880:])
            np.testing.assert_array_equal(file[0].section[:20], image[:20])
    finally:
        stop()


def test_a_server_that_goes_away_is_not_taken_for_damage(tmp_path: Path, web: Web) -> None:
    write_cubes(tmp_path / "survey")
    reader = open_source(web.url)
    rows = reader.sources().table
    web.stop()
    results = dict(reader.cutouts(rows, CONTRACT))
    assert len(results) == 3
    for result in results.values():
        assert isinstance(result, UnreadableInput)
        assert re.search(r"cannot be fetched \(.*check address, network and credentials", str(result))
    with pytest.raises(UnreadableInput, match="cannot be listed"):
        reader.sources()


def test_a_server_that_goes_away_in_the_middle_of_a_tile_is_not_taken_for_damage(tmp_path: Path, web: Web) -> None:
    catalogue = write_brick(tmp_path / "survey", side=1500, sources=2)
    reader = open_source(web.url, catalogue=catalogue)
    with open_fits(f"{web.url}/{BRICK}-image-g.fits.fz") as file:
        web.stop()
        with pytest.raises(UnreadableInput, match=r"image-g\.fits\.fz cannot be fetched \(Client"):
            _ = file[1].section[1400:, 1400:]
    with pytest.raises(UnreadableInput, match="cannot be listed"):
        reader.sources()


def test_a_silent_server_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = threading.Event()

    class Silent(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer.wait(20)

        do_HEAD = do_GET  # noqa: N815 - the name that the server calls

    monkeypatch.setattr(files, "_SILENT_SECONDS", 0.3)
    url, stop = serve(Silent)
    try:
        with pytest.raises(UnreadableInput, match=r"a\.fits cannot be fetched \(.*[Tt]ime"):
            open_fits(f"{url}/a.fits")
    finally:
        answer.set()
        stop()


def test_what_the_web_server_lacks_is_named(tmp_path: Path, web: Web) -> None:
    write_cubes(tmp_path / "survey")
    with pytest.raises(UnreadableInput, match=r"/nowhere (cannot be listed|holds no file)"):
        open_source(f"{web.url}/nowhere")
    with pytest.raises(UnreadableInput, match=r"a\.fits is a file; give the folder"):
        open_source(f"{web.url}/a.fits")
    reader = open_source(web.url)
    rows = reader.sources().table
    (tmp_path / "survey" / "a.fits").unlink()
    with pytest.raises(UnreadableInput, match=r"/a\.fits is missing; fetch it again"):
        raise dict(reader.cutouts(rows, CONTRACT))[0]  # type: ignore[misc]
    with pytest.raises(UnreadableInput, match=r"/a\.fits is missing"):
        file_version(f"{web.url}/a.fits")


def test_a_folder_that_may_not_be_listed_is_not_left_out(tmp_path: Path) -> None:
    class Guarded(WholeFiles):
        def send_head(self) -> io.BytesIO | BinaryIO | None:
            if not self.path.startswith("/south"):
                return super().send_head()
            self.send_error(403)
            return None

    write_cubes(tmp_path / "survey")
    url, stop = serve(partial(Guarded, directory=str(tmp_path / "survey")))
    try:
        with pytest.raises(UnreadableInput, match=r"cannot be listed \(ClientResponseError: 403"):
            open_source(url)
        with pytest.raises(UnreadableInput, match=r"b\.fits cannot be fetched \(ClientResponseError: 403"):
            open_fits(f"{url}/south/b.fits")
    finally:
        stop()


def test_what_the_bucket_lacks_is_named(tmp_path: Path, bucket: str) -> None:
    with pytest.raises(UnreadableInput, match=r"s3://no-such-bucket/survey cannot be listed \(.*does not exist"):
        open_source("s3://no-such-bucket/survey")
    with pytest.raises(UnreadableInput, match=r"survey holds no file that can be listed"):
        open_source(f"{bucket}/survey")
    with pytest.raises(UnreadableInput, match=r"survey/a\.fits is missing; fetch it again"):
        open_fits(f"{bucket}/survey/a.fits")


@pytest.mark.parametrize("code", ["InvalidAccessKeyId", "AccessDenied"])
def test_wrong_credentials_are_said(amazon: Callable[[str], None], code: str) -> None:
    class Forbids(WholeFiles):
        def send_head(self) -> None:
            body = f"<Error><Code>{code}</Code><Message>{code} it is</Message></Error>".encode()
            self.send_response(403)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    url, stop = serve(Forbids)
    amazon(url)
    try:
        with pytest.raises(UnreadableInput, match=rf"s3://bucket/survey cannot be listed \(PermissionError: {code}"):
            open_source("s3://bucket/survey")
        with pytest.raises(UnreadableInput, match=r"a\.fits cannot be fetched \(PermissionError: .*credentials"):
            open_fits("s3://bucket/survey/a.fits")
    finally:
        stop()


def test_absent_credentials_are_said(amazon: Callable[[str], None], moto: str, monkeypatch: pytest.MonkeyPatch) -> None:
    amazon(moto)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(UnreadableInput, match=r"cannot be listed \(NoCredentialsError"):
        open_source("s3://bucket/survey")


def test_an_s3_that_cannot_be_reached_is_said(amazon: Callable[[str], None]) -> None:
    url, stop = serve(WholeFiles)
    stop()  # nobody listens there any more
    amazon(url)
    with pytest.raises(UnreadableInput, match=r"cannot be listed \(EndpointConnectionError: Could not connect"):
        find_files("s3://bucket/survey")
    with pytest.raises(UnreadableInput, match=r"cannot be fetched \(EndpointConnectionError"):
        open_fits("s3://bucket/survey/a.fits")


def test_a_library_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(BadRequest, match=r"s3://bucket/survey: s3:// is read by s3fs, .*pip install s3fs"):
        open_source("s3://bucket/survey")


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(BadRequest, match=r"s4://bucket: s4:// is not read \(Protocol not known"):
        open_source("s4://bucket")
