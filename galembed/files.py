"""Files by path or fsspec URL: listing them, their versions, and opening FITS whatever the compression."""

from __future__ import annotations

import bz2
import datetime
import gzip
import hashlib
import io
import math
import os
import re
import struct
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final

import fsspec
import fsspec.config
from astropy.io import fits
from astropy.utils.exceptions import AstropyWarning
from fsspec.registry import known_implementations

from galembed.errors import BadRequest, GalembedError, UnreadableInput

FITS_ENDINGS: Final = (".fits", ".fit", ".fits.gz", ".fits.fz", ".fits.bz2", ".fit.gz", ".fts")

_DECOMPRESS: Final = {".gz": gzip.decompress, ".bz2": bz2.decompress}

_FETCHED_BYTES: Final = 2**20
"""Bytes that travel at a time. fsspec's own 5 MB (50 MB on S3) take most of a compressed plane for one source of it."""

_CONNECT_SECONDS: Final = 10
_SILENT_SECONDS: Final = 60
"""How long a web server may be silent. aiohttp's own limit is on a whole download: 300 s. s3fs has 5 s and 15 s."""

_MARKS: Final = ("ETag", "etag", "blob_id", "xet_hash", "LastModified", "Last-Modified", "last_modified", "mtime")
"""What file systems call the mark of a file's contents, the surest first."""


def is_url(place: str | Path) -> bool:
    """Tell whether `place` is an fsspec URL (`s3://`, `https://`...) and not a path."""
    return "://" in str(place)


def _is_web(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


def resolve(place: str | Path) -> str:
    """Return an absolute path, or a URL without its last slash."""
    return str(place).rstrip("/") if is_url(place) else str(Path(place).resolve())


def find_files(root: str, endings: tuple[str, ...] = ()) -> list[str]:
    """Return the files under a folder or URL in the order of their names; hidden ones are left out.

    Parameters
    ----------
    root : str
        As `resolve` returns it.
    endings : tuple of str
        Lower case; every file without them.

    Raises
    ------
    UnreadableInput
        If there is no such folder, it cannot be listed, or it is a file.
    BadRequest
        If nothing is installed that reads such a URL.
    """
    return sorted(
        uri
        for uri in (_remote_files(root) if is_url(root) else _local_files(root))
        if not endings or uri.lower().endswith(endings)
    )


def _local_files(root: str) -> Iterable[str]:
    if not os.path.isdir(root):
        what = "is a file; give the folder that holds it" if os.path.exists(root) else "does not exist"
        raise UnreadableInput(f"{root} {what}; a source is a folder of FITS or JPEG/PNG files, or a survey tree")
    seen = {os.path.realpath(root)}
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in [name for name in folders if os.path.islink(os.path.join(folder, name))]:
            place = os.path.realpath(os.path.join(folder, name))
            if place in seen or f"{folder}{os.sep}".startswith(f"{place}{os.sep}"):
                folders.remove(name)  # it leads back to where we are, or to where we were
            seen.add(place)
        yield from (os.path.join(folder, name) for name in names if not name.startswith("."))


def _remote_files(root: str) -> Iterable[str]:
    system, path = _file_system(root)
    try:
        system.invalidate_cache(path)  # sizes and ETags too are kept with listings
        # On the web, folders that cannot be listed would be left out without a word.
        found = system.find(path, **({"on_error": "raise"} if _is_web(root) else {}))
    except Exception as error:  # each file system raises its own kinds
        raise UnreadableInput(f"{root} cannot be listed ({type(error).__name__}: {error})") from error
    if not found or found == [path]:
        what = "is a file; give the folder that holds it" if found else "holds no file that can be listed"
        raise UnreadableInput(f"{root} {what}; a source is a folder of FITS or JPEG/PNG files, or a survey tree")
    return [system.unstrip_protocol(name) for name in found if not name.rpartition("/")[2].startswith(".")]


def relative(uri: str, root: str) -> str:
    """Return the part of `uri` below `root`, with forward slashes."""
    return uri[len(root) :].lstrip("/" + os.sep).replace(os.sep, "/")


def file_version(*uris: str | Path) -> str:
    """Return size and modification time (or ETag) of files together, as kept in `source_version`.

    Raises
    ------
    UnreadableInput
        If one of several is gone, or the server does not answer.
    """
    sizes, stamps = zip(*(_size_and_stamp(str(uri)) for uri in uris), strict=True)
    # The latest time stands for all, but the last of some ETags in the alphabet does not.
    several = len(uris) > 1 and any(map(is_url, uris))
    mark = hashlib.md5("\n".join(stamps).encode(), usedforsecurity=False).hexdigest() if several else max(stamps)
    return f"{sum(sizes)}-{mark}"


def _size_and_stamp(uri: str) -> tuple[int, str]:
    if not is_url(uri):
        with _fetching(uri):
            stat = os.stat(uri)
        return stat.st_size, _stamp(stat.st_mtime)
    system, path = _file_system(uri)
    with _fetching(uri):
        info: Mapping[str, Any] = system.info(path)
    mark = next((info[name] for name in _MARKS if info.get(name)), "")
    if isinstance(mark, datetime.datetime):
        mark = _stamp(mark.timestamp())
    return int(info.get("size") or 0), str(mark).strip('"')


def _stamp(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y%m%dT%H%M%S.%f")


def open_fits(uri: str) -> fits.HDUList:
    """Open a FITS file for reading, after a look at its structure.

    `.gz` and `.bz2` are decompressed to memory first, since neither has random access; from a plain or
    `.fz` file behind a URL only the blocks that are asked for travel.

    Raises
    ------
    UnreadableInput
        If it is missing, cannot be fetched, is empty, not FITS, shorter or longer than its headers say, or they cannot
        be read.
    """
    stream: IO[bytes] | None = None
    file = None
    try:
        stream = _stream(uri)
        if stream is None:
            with open(uri, "rb") as plain:
                count = _count_hdus(plain)
        else:
            count = _count_hdus(stream, thorough=not is_url(uri))
            stream.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AstropyWarning)
            file = fits.open(stream if stream is not None else uri, memmap=False)
            _require_readable(file, count)
        return file
    except GalembedError:
        _close(file, stream)
        raise
    except Exception as error:  # damaged headers make astropy raise almost anything
        _close(file, stream)
        if isinstance(error, _TruncatedError):
            raise UnreadableInput(f"{uri}: truncated ({error}); fetch it again") from error
        told = str(error) if isinstance(error, _DamagedError) else f"{type(error).__name__}: {error}"
        raise UnreadableInput(f"{uri}: damaged or not a FITS file ({_hint(uri) or told}); fetch it again") from error


def open_headers(path: str) -> fits.HDUList:
    """Open a local, plain FITS file whose data may be cut off, to look at its headers.

    Raises
    ------
    UnreadableInput
        If its headers do not follow one another.
    """
    try:
        with open(path, "rb") as plain:
            _count_hdus(plain, thorough=False, whole=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AstropyWarning)
            return fits.open(path, memmap=False)
    except Exception as error:
        raise UnreadableInput(f"{path}: damaged or not a FITS file ({error}); fetch it again") from error


def _stream(uri: str) -> IO[bytes] | None:
    """Return a stream of FITS bytes, or None for a file that astropy opens by its path."""
    decompress = _DECOMPRESS.get(os.path.splitext(uri)[1].lower())
    if not is_url(uri):
        with _fetching(uri):
            if os.path.getsize(uri) == 0:
                raise UnreadableInput(f"{uri} is empty; fetch it again")
            packed = Path(uri).read_bytes() if decompress else b""
        return io.BytesIO(decompress(packed)) if decompress else None
    system, path = _file_system(uri)
    with _fetching(uri):
        if decompress:
            packed = system.cat_file(path)
        else:
            stream = system.open(path, "rb", block_size=_FETCHED_BYTES, cache_type="blockcache")
    if decompress:
        return io.BytesIO(decompress(packed))
    return io.BufferedReader(_Fetched(uri, stream, lambda: system.cat_file(path)))


def _file_system(uri: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URL, and the path on it.

    Raises
    ------
    BadRequest
        If nothing is installed that reads such a URL.
    """
    protocol = uri.partition("://")[0]
    options: dict[str, Any] = {}
    if _is_web(uri) and "client_kwargs" not in fsspec.config.conf.get(protocol, {}):
        import aiohttp

        patience = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_SILENT_SECONDS)
        options["client_kwargs"] = {"timeout": patience}
    try:
        system, path = fsspec.core.url_to_fs(uri, **options)
    except ImportError as error:
        library = known_implementations.get(protocol, {"class": protocol})["class"].partition(".")[0]
        raise BadRequest(
            f"{uri}: {protocol}:// is read by {library}, which is not here; pip install {library}"
        ) from error
    except ValueError as error:
        raise BadRequest(f"{uri}: {protocol}:// is not read ({error}); give a folder, or s3:// or https://") from error
    return system, path


@contextmanager
def _fetching(uri: str) -> Iterator[None]:
    """Turn what a file system raises into an error of ours: each has its own kinds."""
    try:
        yield
    except GalembedError:
        raise
    except FileNotFoundError as error:
        # fsspec says so of a web page whatever went wrong; the cause knows.
        cause = error.__cause__ if _is_web(uri) else None
        if cause is None or getattr(cause, "status", None) in (404, 410):
            raise UnreadableInput(f"{uri} is missing; fetch it again") from error
        raise _unfetched(uri, cause) from error
    except Exception as error:
        if is_url(uri):
            _file_system(uri)[0].invalidate_cache()  # S3 refuses a file that was replaced since it was listed
        raise _unfetched(uri, error) from error


def _unfetched(uri: str, error: BaseException) -> UnreadableInput:
    what, check = ("fetched", "address, network and credentials") if is_url(uri) else ("read", "its permissions")
    return UnreadableInput(f"{uri} cannot be {what} ({type(error).__name__}: {error}); check {check}, then try again")


class _Fetched(io.RawIOBase):
    """A remote file whose failures are told apart from damage."""

    def __init__(self, uri: str, stream: IO[bytes], whole: Callable[[], bytes]) -> None:
        self._uri = uri
        self._whole = whole
        with _fetching(uri):
            # Without a size there is no random access.
            self._stream = stream if getattr(stream, "size", None) is not None else self._download(stream)

    def _download(self, stream: IO[bytes]) -> IO[bytes]:
        stream.close()
        return io.BytesIO(self._whole())

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def readinto(self, buffer: Any) -> int:
        with _fetching(self._uri):
            at = self._stream.tell()
            try:
                data = self._stream.read(len(buffer))
            except ValueError:  # fsspec's for a server that gives whole files only
                self._stream = self._download(self._stream)
                self._stream.seek(at)
                data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()


_BLOCK: Final = 2880
_MOST: Final = 999
"""Axes of an image, and columns of a table (FITS 4.0, sections 4.4.1 and 7.3.1)."""
_KNOWN: Final = (fits.PrimaryHDU, fits.GroupsHDU, fits.ImageHDU, fits.CompImageHDU, fits.BinTableHDU, fits.TableHDU)
_REGISTERED: Final = ("A3DTABLE", "DUMP", "FITS", "FOREIGN", "IUEIMAGE")
"""Extensions that astropy does not know by name, from the IAU FITS working group's registry; none holds an image."""


_BYTES: Final = dict(zip("LBIJKAEDCMPQX", (1, 1, 2, 4, 8, 1, 4, 8, 8, 16, 8, 16, 1), strict=True))
_DECODER_TAKES: Final = {"BLOCKSIZE": (16, 32), "BYTEPIX": (1, 2, 4, 8), "SMOOTH": (0, 1)}
"""Parameters of Rice and HCOMPRESS (FITS 4.0, section 10.4). astropy hands on any number, and -1 ends the process."""


class _DamagedError(ValueError):
    """A file's structure is not that of FITS."""


class _TruncatedError(_DamagedError):
    """A file ends before its data do."""


def _count_hdus(stream: IO[bytes], *, thorough: bool = True, whole: bool = True) -> int:
    """Walk over a file's HDUs by their mandatory cards (FITS 4.0, sections 3 and 4.4.1), and return their number.

    astropy lets most of this pass, or only warns of it; it reads on for ever where a size is negative, and through
    every one of a billion axes or columns.

    Parameters
    ----------
    stream : binary file
    thorough : bool
        Look also at the zeros that fill up the last block of each array: over a network, a request each.
    whole : bool
        Whether it is an error that the file ends before its data do.
    """
    size = stream.seek(0, os.SEEK_END)
    at = count = 0
    while at < size:
        header = _header(stream, at, size, count)
        if header is None:
            break
        data, stop = at + len(header), at + len(header) + _data_size(header, count)
        at = -(-stop // _BLOCK) * _BLOCK
        if at > size:
            if whole:
                raise _TruncatedError(f"{size} bytes, HDU {count} ends at {at}")
            return count + 1
        if thorough and b"'TABLE   '" not in header[:80] and _read(stream, stop, at).strip(b"\0"):
            raise _DamagedError(f"bytes between the data of HDU {count} and the end of their block at {data}")
        count += 1
    if count == 0:
        raise _DamagedError("no header in it")
    return count


def _header(stream: IO[bytes], at: int, size: int, count: int) -> bytes | None:
    """Return the blocks of a header, or None where only zeros follow."""
    header = b""
    while at + len(header) < size:
        block = _read(stream, at + len(header), at + len(header) + _BLOCK)
        if not header and not block.startswith(b"SIMPLE  =" if count == 0 else b"XTENSION="):
            if count == 0 or (block + stream.read()).strip(b"\0"):
                raise _DamagedError(f"there is no header at byte {at}, after {count} HDU(s)")
            return None
        header += block
        if any(block[card : card + 80].rstrip() == b"END" for card in range(0, len(block), 80)):
            return header
    raise _DamagedError(f"the header of HDU {count} has no end")


def _data_size(header: bytes, count: int) -> int:
    """Return the bytes of data that a header promises, without those that fill up the last block."""
    cards = [header[at : at + 80].decode("latin-1") for at in range(0, len(header), 80)]
    names = [card[:8].rstrip() for card in cards]

    def number(name: str, default: int | None = None) -> int:
        if name not in names and default is not None:
            return default
        text = cards[names.index(name)][10:].partition("/")[0] if name in names else ""
        try:
            return int(text)
        except ValueError as error:
            raise _DamagedError(f"HDU {count} has {name} = {text.strip() or 'nothing'}") from error

    for name in ("NAXIS", "ZNAXIS", "TFIELDS"):
        if not 0 <= number(name, None if name == "NAXIS" else 0) <= _MOST:
            raise _DamagedError(f"HDU {count} has {name} = {number(name)}")
    axes = number("NAXIS")
    wanted = ["BITPIX", "NAXIS", *(f"NAXIS{axis + 1}" for axis in range(axes))]
    if names[1 : 1 + len(wanted)] != wanted:
        raise _DamagedError(
            f"HDU {count} goes on with {', '.join(names[1 : 1 + len(wanted)])}, not {', '.join(wanted)}"
        )
    bits, shape = number("BITPIX"), [number(name) for name in wanted[2:]]
    if bits not in (8, 16, 32, 64, -32, -64) or ("TABLE" in cards[0] and bits != 8):
        raise _DamagedError(f"HDU {count} has BITPIX = {bits}")
    if shape[:1] == [0] and "GROUPS" in names:
        shape = shape[1:]
    groups, more = number("GCOUNT", 1), number("PCOUNT", 0)
    if min([groups, more, *shape]) < 0:
        raise _DamagedError(f"HDU {count} has a negative size")
    return abs(bits) // 8 * groups * (more + math.prod(shape)) if axes else 0


def _require_readable(file: fits.HDUList, count: int) -> None:
    """Check that astropy sees every HDU, knows its type and can read its cards and tiles."""
    for number, hdu in enumerate(file):
        stored = as_stored(hdu)
        if not isinstance(hdu, _KNOWN) and str(stored.header.get("XTENSION", "")).strip() not in _REGISTERED:
            raise _DamagedError(f"HDU {number} is of no known type")
        for card in stored.header.cards:
            _ = card.value  # parsed when asked for
        if isinstance(hdu, fits.CompImageHDU):
            _require_streams(hdu.fileinfo(), stored.header, _tile_pixels(stored.header))
    if len(file) != count:
        raise _DamagedError(f"{len(file)} of {count} HDUs can be read")


def _tile_pixels(header: fits.Header) -> list[int]:
    """Return the pixels of each tile of a compressed image, after checking what its decoder is told."""
    shape = [header[f"ZNAXIS{axis + 1}"] for axis in range(header["ZNAXIS"])]
    tile = [header.get(f"ZTILE{axis + 1}", length if axis == 0 else 1) for axis, length in enumerate(shape)]
    if not all(type(length) is int and length > 0 for length in (*shape, *tile)):
        raise _DamagedError(f"tiles of {tile} pixels in an image of {shape}")
    tiles = math.prod(-(-length // side) for length, side in zip(shape, tile, strict=True))
    if tiles != header["NAXIS2"]:
        raise _DamagedError(f"an image of {shape} pixels has {tiles} tiles of {tile}, the table has {header['NAXIS2']}")
    # PLIO's stream is of 16-bit words and the others' of bytes, so one is not taken for the other.
    words = re.match(r"1?[PQ]I", str(header["TFORM1"])) is not None
    if header["TTYPE1"] == "COMPRESSED_DATA" and words != (header["ZCMPTYPE"] == "PLIO_1"):
        raise _DamagedError(f"{header['ZCMPTYPE']} tiles in a column of {header['TFORM1']}")
    told = {*header, *(str(header.get(f"TTYPE{column + 1}")) for column in range(header["TFIELDS"]))}
    if ("ZSCALE" in told) != ("ZZERO" in told):
        raise _DamagedError("floats are compressed as integers, and one of ZSCALE and ZZERO is missing")
    for number in range(1, _MOST):
        name, value = header.get(f"ZNAME{number}"), header.get(f"ZVAL{number}")
        if name is None:
            break
        if name in _DECODER_TAKES and value not in _DECODER_TAKES[name]:
            raise _DamagedError(f"{name} = {value} is nothing that a decoder takes")
    pixels = [1]
    for length, side in zip(shape, tile, strict=True):
        lengths = [min(side, length - start) for start in range(0, length, side)]
        pixels = [before * along for along in lengths for before in pixels]
    return pixels


def _require_streams(info: Mapping[str, Any], header: fits.Header, pixels: Sequence[int]) -> None:
    """Check where the stream of each tile lies, and the size that one of HCOMPRESS gives itself.

    The decoder trusts that size, and writes beyond its memory.
    """
    stream, width, rows = info["file"], header["NAXIS1"], header["NAXIS2"]
    columns = _columns(header)
    if sum(size for _, size in columns) != width:
        raise _DamagedError(f"the columns of the tiles' table are not its {width} bytes wide")
    table = _read(stream, info["datLoc"], info["datLoc"] + width * rows)
    heap = info["datLoc"] + header.get("THEAP", width * rows)
    end = info["datLoc"] + width * rows + header["PCOUNT"]
    hcompress = header["ZCMPTYPE"] == "HCOMPRESS_1"
    at = 0
    for number, (kind, size) in enumerate(columns):
        if kind in "PQ":
            places = struct.Struct(">2q" if kind == "Q" else ">2i")
            for row, wanted in enumerate(pixels):
                length, offset = places.unpack_from(table, row * width + at)
                if length < 0 or offset < 0 or (length and heap + offset + length > end):
                    raise _DamagedError(f"the stream of tile {row} is not in the table's heap")
                if hcompress and number == 0 and length:
                    magic, height, along = struct.unpack(">2s2i", _read(stream, heap + offset, heap + offset + 10))
                    if magic != b"\xdd\x99" or min(height, along) < 1 or height * along != wanted:
                        raise _DamagedError(f"the HCOMPRESS stream of tile {row} is not of its {wanted} pixels")
        at += size


def _columns(header: fits.Header) -> list[tuple[str, int]]:
    """Return letter and bytes of each column (FITS 4.0, table 18)."""
    columns = []
    for number in range(header["TFIELDS"]):
        form = re.match(r"(\d*)([LXBIJKAEDCMPQ])", str(header[f"TFORM{number + 1}"]))
        if form is None:
            raise _DamagedError(f"TFORM{number + 1} = {header[f'TFORM{number + 1}']}")
        repeat, kind = int(form[1] or 1), form[2]
        columns.append((kind, -(-repeat // 8) if kind == "X" else repeat * _BYTES[kind]))
    return columns


def _read(stream: IO[bytes], start: int, stop: int) -> bytes:
    if stop <= start:
        return b""
    stream.seek(start)
    return stream.read(stop - start)


def as_stored(hdu: Any) -> Any:
    """Return the HDU whose header and size are those in the file: a compressed image is a table there."""
    return getattr(hdu, "_bintable", hdu)


def _close(*opened: Any) -> None:
    for item in opened:
        if item is not None:
            item.close()


def _hint(uri: str) -> str:
    """Return what a file is that only has the name of a FITS file."""
    if is_url(uri):
        return ""
    with open(uri, "rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer: `git lfs pull` brings the file"
    return (
        "an HTML page, perhaps the server's error message" if head.lstrip()[:5].lower() in (b"<!doc", b"<html") else ""
    )
