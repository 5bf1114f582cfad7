"""Damaged survey files: each ends as a cutout or as an error of the library, in bounded time and memory.

    python benchmarks/damaged.py [--files 5000] [--seed 0] [--out docs/benchmarks.md]

Writes small files as the surveys do (random shape, scale, rotation and place; with and without DATASUM), damages one,
and reads it as a job does: `open_source`, `sources`, `cutouts` on a folder that holds it, and `cutouts` alone, for a
file damaged after the listing. Each file is read in a process of its own kind, with a time limit. A reading ends as:

- refused: an error of `galembed.errors`;
- equal: the cutout of the undamaged file, to the bit;
- changed: another cutout. Allowed only where nothing in the file can tell: pixels or Rice streams without DATASUM,
  and values in headers (no reader here checks CHECKSUM: tools that edit a header often leave an old one);
- finding: anything else. A crash, a hang, another exception, a warning that escapes, a cutout that breaks its
  contract, more memory than `MEMORY`, or a changed cutout although DATASUM, compression or structure could tell.
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import io
import math
import multiprocessing
import os
import platform
import re
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import astropy
import numpy as np
import pyarrow as pa
from astropy.io import fits
from astropy.table import Table
from astropy.wcs import WCS
from numpy.typing import NDArray

from galembed.backbones import FieldOfView, InputContract
from galembed.cutouts import Cutout
from galembed.errors import GalembedError
from galembed.mappings import LEGACY_DR2
from galembed.sources import SourceReader, open_source

SECONDS = 20.0
"""Allowed for one file; a hundred times what an undamaged one takes."""
MEMORY = 256 << 20
"""Bytes that the process may grow by while it reads one file; undamaged ones take about 5 MiB."""
ADDRESS_SPACE = 8 << 30
VARIANTS = 4
BLOCK = 2880
SIZE = 32

Bytes = bytes


# --- undamaged files, as the surveys write them ---


@dataclass(frozen=True)
class Sky:
    """A random frame on the sky."""

    shape: tuple[int, int]
    wcs: WCS

    @classmethod
    def draw(cls, rng: np.random.Generator, smallest: int, largest: int, pixel: tuple[float, float]) -> Sky:
        shape = (int(rng.integers(smallest, largest)), int(rng.integers(smallest, largest)))
        wcs = WCS(naxis=2)
        projection = rng.choice(["TAN", "SIN", "ZEA"])
        wcs.wcs.ctype = [f"RA---{projection}", f"DEC--{projection}"]
        wcs.wcs.crval = [rng.uniform(0, 360), np.degrees(np.arcsin(rng.uniform(-1, 1)))]
        wcs.wcs.crpix = [(shape[1] + 1) / 2 + rng.uniform(-3, 3), (shape[0] + 1) / 2 + rng.uniform(-3, 3)]
        turn, scale = rng.uniform(0, 2 * np.pi), rng.uniform(*pixel) / 3600
        wcs.wcs.cd = scale * np.array([[-np.cos(turn), np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        wcs.wcs.set()
        return cls(shape, wcs)

    def header(self, **cards: object) -> fits.Header:
        return self.wcs.to_header() + fits.Header(cards)

    def image(self, rng: np.random.Generator, flux: float) -> NDArray[np.float32]:
        rows, columns = np.mgrid[: self.shape[0], : self.shape[1]]
        x, y = (self.shape[1] - 1) / 2, (self.shape[0] - 1) / 2
        blob = np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 50)
        return (flux * blob + rng.normal(0, 0.02, self.shape)).astype(np.float32)


def write_cube(folder: Path, name: str, rng: np.random.Generator, sums: bool) -> None:
    sky = Sky.draw(rng, 48, 90, (0.1, 0.6))
    cube = np.stack([sky.image(rng, flux) for flux in (1, 2, 3)])
    header = sky.header(BANDS="grz", BAND0="g", BAND1="r", BAND2="z", IMAGETYP="image", SURVEY="LegacySurvey")
    fits.PrimaryHDU(cube, header).writeto(folder / f"{name}.fits", checksum=sums)


def write_subimage(folder: Path, name: str, rng: np.random.Generator, sums: bool) -> None:
    sky = Sky.draw(rng, 48, 90, (0.262, 0.262))
    hdus = fits.HDUList([fits.PrimaryHDU()])
    for band, flux in zip("grz", (1, 2, 3), strict=True):
        cards = {"BRICK": "0421p022", "BRICK_X0": 100, "BRICK_Y0": 200, "BAND": band}
        weight = np.full(sky.shape, 400, np.float32)
        weight[:, :5] = 0
        hdus.append(fits.ImageHDU(sky.image(rng, flux), sky.header(IMAGETYP="image", **cards)))
        hdus.append(fits.ImageHDU(weight, sky.header(IMAGETYP="invvar", **cards)))
    hdus.writeto(folder / f"{name}.fits", checksum=sums)


def write_brick(folder: Path, name: str, rng: np.random.Generator, sums: bool, kind: str = "RICE_1") -> None:
    sky = Sky.draw(rng, 125, 175, (0.262, 0.262))  # HCOMPRESS wants at least 4 pixels in the last tile of 60
    ra, dec = sky.wcs.wcs.crval
    brick = f"{int(ra * 10) % 3600:04d}{'p' if dec >= 0 else 'm'}{int(abs(dec) * 10):03d}"
    head = sky.header(BUNIT="nanomaggy")
    level = {"quantize_level": 16.0} if kind == "RICE_1" else {"quantize_level": 0.0}

    def write(data: NDArray[Any], what: str, **options: Any) -> None:
        hdu = fits.CompImageHDU(data, head, tile_shape=(60, 60), **options)
        path = folder / f"legacysurvey-{brick}-{what}.fits.fz"
        fits.HDUList([fits.PrimaryHDU(), hdu]).writeto(path, checksum=sums)

    for band, flux in zip("grz", (1, 2, 3), strict=True):
        weight = np.full(sky.shape, 400, np.float32) + rng.normal(0, 1, sky.shape).astype(np.float32)
        weight[:40] = 0
        write(sky.image(rng, flux), f"image-{band}", compression_type=kind, **level)
        write(weight, f"invvar-{band}", compression_type=kind, **level)
    bits = (rng.random(sky.shape) < 0.02).astype(np.int32) << 6
    write(bits, "maskbits", compression_type="HCOMPRESS_1" if kind == "RICE_1" else kind)
    x, y = (sky.shape[1] - 1) / 2, (sky.shape[0] - 1) / 2
    ((ra, dec),) = sky.wcs.all_pix2world([(x, y)], 0)
    Table({"id": ["s"], "ra": [ra], "dec": [dec], "shape_r": [1.0]}).write(folder / "sources.csv")


def write_gzip_brick(folder: Path, name: str, rng: np.random.Generator, sums: bool) -> None:
    write_brick(folder, name, rng, sums, str(rng.choice(["GZIP_1", "GZIP_2"])))


def write_hsc(folder: Path, name: str, rng: np.random.Generator, sums: bool) -> None:
    sky = Sky.draw(rng, 48, 90, (0.168, 0.168))
    for band in "GRI":
        bits = (rng.random(sky.shape) < 0.02).astype(np.int32) << 8
        planes = fits.Header({"MP_BAD": 0, "MP_SAT": 1, "HIERARCH MP_NO_DATA": 8, "HIERARCH MP_BRIGHT_OBJECT": 9})
        hdus = fits.HDUList(
            [
                fits.PrimaryHDU(header=fits.Header({"FLUXMAG0": 63095734448.0194, "FILTER": f"HSC-{band}"})),
                fits.ImageHDU(sky.image(rng, 5), sky.header(), name="IMAGE"),
                fits.ImageHDU(bits, sky.header() + planes, name="MASK"),
                fits.ImageHDU(np.full(sky.shape, 0.01, np.float32), sky.header(), name="VARIANCE"),
            ]
        )
        hdus.writeto(folder / f"{name}_HSC-{band}.fits", checksum=sums)


def write_sdss(folder: Path, name: str, rng: np.random.Generator, sums: bool) -> None:
    sky = Sky.draw(rng, 48, 90, (0.3, 0.5))
    for band in "gri":
        hdu = fits.PrimaryHDU(sky.image(rng, 1), sky.header(BUNIT="nanomaggy", ORIGIN="SDSS", FILTER=band))
        packed(folder, hdu, f"{name}_{band}.fits.bz2", sums)


def write_gzipped_cube(folder: Path, name: str, rng: np.random.Generator, sums: bool) -> None:
    write_cube(folder, name, rng, sums)
    plain = folder / f"{name}.fits"
    (folder / f"{name}.fits.gz").write_bytes(gzip.compress(plain.read_bytes(), 1))
    plain.unlink()


def packed(folder: Path, hdu: Any, name: str, sums: bool) -> None:
    plain = folder / "plain"
    hdu.writeto(plain, checksum=sums)
    (folder / name).write_bytes(bz2.compress(plain.read_bytes()))
    plain.unlink()


FORMS: dict[str, Callable[[Path, str, np.random.Generator, bool], None]] = {
    "Legacy cube": write_cube,
    "Legacy subimage, invvar": write_subimage,
    "Legacy brick, Rice and HCOMPRESS": write_brick,
    "Legacy brick, GZIP tiles": write_gzip_brick,
    "HSC cutout": write_hsc,
    "SDSS cutout, .bz2": write_sdss,
    "Legacy cube, .gz": write_gzipped_cube,
}
TILES = ("Legacy brick, Rice and HCOMPRESS", "Legacy brick, GZIP tiles")


# --- damage ---


@dataclass(frozen=True)
class Part:
    """A stretch of an undamaged file: ``header``, ``pixels``, ``table``, ``heap`` or ``padding`` of an HDU."""

    start: int
    stop: int
    what: str
    hdu: int
    summed: bool
    compression: str


def parts_of(raw: Bytes) -> list[Part]:
    found = []
    with fits.open(_stream(raw), disable_image_compression=True) as hdus:
        for number, hdu in enumerate(hdus):
            info, header = hdu.fileinfo(), hdu.header
            summed, kind = "DATASUM" in header, str(header.get("ZCMPTYPE", ""))
            at = info["datLoc"]
            pieces = [("header", info["hdrLoc"], at)]
            if kind:
                table = header["NAXIS1"] * header["NAXIS2"]
                pieces += [("table", at, at + table), ("heap", at + table, at + hdu.size)]
            else:
                pieces += [("pixels", at, at + hdu.size)]
            pieces += [("padding", at + hdu.size, at + info["datSpan"])]
            found += [Part(a, b, what, number, summed, kind) for what, a, b in pieces if b > a]
    return found


def _stream(raw: Bytes) -> Any:
    return io.BytesIO(raw)


@dataclass(frozen=True)
class Damage:
    """What was done to a file.

    Attributes
    ----------
    kind : str
    note : str
        For people.
    excuse : str
        Why nothing in the file can tell; empty where something can.
    """

    kind: str
    note: str
    excuse: str


def damaged(raw: Bytes, rng: np.random.Generator) -> tuple[Bytes, Damage]:
    kind = str(rng.choice(list(KINDS), p=np.array(list(KINDS.values())) / sum(KINDS.values())))
    outer = next((name for magic, name in ((b"\x1f\x8b", "gz"), (b"BZh", "bz2")) if raw.startswith(magic)), "")
    inside = not outer or rng.random() < 0.5
    unpacked = raw if not outer else gzip.decompress(raw) if outer == "gz" else bz2.decompress(raw)
    content = unpacked if inside else raw
    new, note = globals()[f"_{kind}"](content, rng, inside)
    excuse = excuse_for(content, new) if inside else ""
    if inside and outer:
        new = gzip.compress(new, 1) if outer == "gz" else bz2.compress(new)
    return new, Damage(kind, f"{note}{'' if inside else f' of the .{outer} stream'}", excuse)


KINDS = {
    "truncated": 3,
    "flipped": 4,
    "flipped_header": 4,
    "flipped_stream": 2,
    "lost_sectors": 2,
    "wrong_number": 5,
    "wrong_text": 3,
    "missing_card": 4,
    "moved_block": 2,
    "another_file": 1,
}
"""Kinds of damage, and how often each is drawn."""


def _truncated(raw: Bytes, rng: np.random.Generator, inside: bool) -> tuple[Bytes, str]:
    keep = int(rng.integers(0, len(raw)))
    if rng.random() < 0.5:
        keep = keep // BLOCK * BLOCK
    return raw[:keep], f"{keep} of {len(raw)} bytes"


def _flipped(raw: Bytes, rng: np.random.Generator, inside: bool) -> tuple[Bytes, str]:
    new = bytearray(raw)
    where = rng.integers(0, len(raw), int(rng.choice([1, 1, 8, 200])))
    for at in where:
        new[at] ^= 1 << int(rng.integers(8))
    return bytes(new), f"{len(where)} bit(s), the first in byte {where[0]}"


def _flipped_header(raw: Bytes, rng: np.random.Generator, inside: bool) -> tuple[Bytes, str]:
    if not inside:
        return _flipped(raw, rng, inside)
    at, card = draw_card(raw, rng)
    byte, bit = int(rng.integers(0, 80)), int(rng.integers(8))
    new = bytearray(card)
    new[byte] ^= 1 << bit
    return raw[:at] + bytes(new) + raw[at + 80 :], f"{text(card)} -> {text(bytes(new))}"


def _flipped_stream(raw: Bytes, rng: np.random.Generator, inside: bool) -> tuple[Bytes, str]:
    """Flip bits where decoders read how much there is: in the table of tiles and at the start of their streams."""
    parts = [part for part in parts_of(raw) if part.what in ("table", "heap")] if inside else []
    if not parts:
        return _flipped(raw, rng, inside)
    part = parts[int(rng.integers(len(parts)))]
    new, count = bytearray(raw), int(rng.integers(1, 6))
    for _ in range(count):
        new[part.start + int(rng.integers(min(64, part.stop - part.start)))] ^= 1 << int(rng.integers(8))
    return bytes(new), f"{count} bit(s) at the start of the {part.what} of HDU {part.hdu}"


def _lost_sectors(raw: Bytes, rng: np.random.Generator, inside: bool) -> tuple[Bytes, str]:
    length, fill = int(rng.choice([512, 4096])), bytes([int(rng.choice([0, 0, 255]))])
    start = int(rng.integers(0, max(1, len(raw) // 512))) * 512
    hole = raw[start : start + length]
    return raw[:start] + fill * len(hole) + raw[start + len(hole) :], f"{len(hole)} bytes from {start} on"


def _wrong_number(raw: Bytes, rng: np.random.Generator, inside: bool) -> tuple[Bytes, str]:
    if not inside:
        return _flipped(raw, rng, inside)
    at, card = draw_card(raw, rng, rb"[A-Z0-9_]+ *= +[-+0-9.]")
    old = card[10:].partition(b"/")[0].strip().decode()
    number = float(old.replace("D", "E")) if re.fullmatch(r"[-+0-9.ED]+", old) else 1.0
    choices = [0, -1, 1, int(number) + 1, int(number) - 1, int(number) * 2, -int(number), 999, 10**9, 2**31, 2**63]
    choices += ["1E30", "-1E308", "1E-30", "1E999", "NaN", "'one'", "T", "", repr(number * 1.5), repr(number + 0.5)]
    value = str(choices[int(rng.integers(len(choices)))])
    new = card[:10] + value.rjust(20).encode() + b" " * 50
    return raw[:at] + new[:80] + raw[at + 80 :], f"{text(card)} -> {value}"


def _wrong_text(raw: Bytes, rng: np.random.Generator, inside: bool) -> tuple[Bytes, str]:
    if not inside:
        return _flipped(raw, rng, inside)
    at, card = draw_card(raw, rng, rb"[A-Z0-9_]+ *= +'")
    values = ["", " ", "image", "IMAGE", "BINTABLE", "RA---TAN-SIP", "DEC--TPV", "RA---TAB", "GLON-CAR", "FREQ", "deg"]
    values += ["arcsec", "1PB(9999)", "1QB(1)", "1000000000D", "E", "RICE_1", "GZIP_1", "PLIO_1", "x", "'" * 3, "é"]
    value = str(rng.choice(values))
    new = (card[:10] + f"'{value:8}'".encode("latin-1")).ljust(80)[:80]
    return raw[:at] + new + raw[at + 80 :], f"{text(card)} -> {value!r}"


def _missing_card(raw: Bytes, rng: np.random.Generator, inside: bool) -> tuple[Bytes, str]:
    if not inside:
        return _flipped(raw, rng, inside)
    at, card = draw_card(raw, rng)
    if rng.random() < 0.3:
        return raw[:at] + b" " * 80 + raw[at + 80 :], f"{text(card)} blanked"
    end = header_end(raw, at)
    return raw[:at] + raw[at + 80 : end] + b" " * 80 + raw[end:], f"{text(card)} left out"


def _moved_block(raw: Bytes, rng: np.random.Generator, inside: bool) -> tuple[Bytes, str]:
    length = BLOCK if rng.random() < 0.7 else int(rng.integers(1, BLOCK))
    start = int(rng.integers(0, max(1, len(raw) // BLOCK))) * BLOCK
    block, what = raw[start : start + length], str(rng.choice(["lost", "doubled", "swapped"]))
    if what == "lost":
        return raw[:start] + raw[start + length :], f"{length} bytes at {start} lost"
    if what == "doubled":
        return raw[: start + length] + block + raw[start + length :], f"{length} bytes at {start} doubled"
    after = raw[start + length : start + 2 * length]
    return raw[:start] + after + block + raw[start + 2 * length :], f"{length} bytes at {start} after the next"


def _another_file(raw: Bytes, rng: np.random.Generator, inside: bool) -> tuple[Bytes, str]:
    other = {
        "empty": b"",
        "one byte": b"S",
        "HTML": b"<!DOCTYPE html><html><body>503 Service Unavailable</body></html>",
        "an LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "random bytes": rng.bytes(len(raw)),
        "zeros": bytes(len(raw)),
        "an empty FITS file": _file_of(fits.PrimaryHDU()),
        "a table": _file_of(fits.BinTableHDU(Table({"a": [1.0, 2.0]}))),
        "a 1-D image": _file_of(fits.PrimaryHDU(np.zeros(100, np.float32))),
    }
    name = str(rng.choice(list(other)))
    return other[name], name


def _file_of(hdu: Any) -> Bytes:
    stream = io.BytesIO()
    hdu.writeto(stream)
    return stream.getvalue()


def cards_of(raw: Bytes) -> Iterator[tuple[int, Bytes]]:
    for part in parts_of(raw):
        if part.what == "header":
            for at in range(part.start, part.stop, 80):
                card = raw[at : at + 80]
                if card.strip():
                    yield at, card


def draw_card(raw: Bytes, rng: np.random.Generator, pattern: Bytes = b"") -> tuple[int, Bytes]:
    found = [(at, card) for at, card in cards_of(raw) if not pattern or re.match(pattern, card)]
    return found[int(rng.integers(len(found)))]


def header_end(raw: Bytes, at: int) -> int:
    return next(part.stop for part in parts_of(raw) if part.what == "header" and part.start <= at < part.stop)


def text(card: Bytes) -> str:
    return repr(card[:40].decode("latin-1").rstrip())[1:-1]


def excuse_for(raw: Bytes, new: Bytes) -> str:
    """Return why nothing in a FITS file can tell that it was damaged, or an empty string where something can."""
    parts = parts_of(raw)
    ends = [max(part.stop for part in parts if part.hdu == hdu) for hdu in {part.hdu for part in parts}]
    if new and len(new) in ends and raw.startswith(new):
        return "cut off between two HDUs"
    if len(raw) != len(new):
        return ""
    different = np.flatnonzero(np.frombuffer(raw, np.uint8) != np.frombuffer(new, np.uint8))
    reasons = set()
    for part in parts:
        if not ((different >= part.start) & (different < part.stop)).any():
            continue
        if part.what == "header":
            (size, *form), (size_now, *form_now) = _structure(raw, part), _structure(new, part)
            fits_in = size <= size_now <= -(-size // BLOCK) * BLOCK
            told = form != form_now or not fits_in
            reasons.add(
                "" if told else "value in a header" if size == size_now else "data longer within the last block"
            )
        elif part.what == "padding":
            reasons.add("")
        elif part.summed:
            span = [other for other in parts if other.hdu == part.hdu and other.what != "header"]
            low, high = min(other.start for other in span), max(other.stop for other in span)
            same_sum = word_sum(raw[low:high]) == word_sum(new[low:high])
            reasons.add("order of words, which DATASUM does not see" if same_sum else "")
        elif part.what == "heap":
            reasons.add("" if part.compression.startswith("GZIP") else f"{part.compression} stream without DATASUM")
        else:
            reasons.add({"table": "table of compressed tiles", "pixels": "pixels"}[part.what] + " without DATASUM")
    return "" if "" in reasons else "; ".join(sorted(reasons))


def word_sum(raw: Bytes) -> int:
    """Return the ones' complement sum of 32-bit words (FITS 4.0, appendix J); zero has two forms."""
    return int(np.frombuffer(raw, ">u4").astype(object).sum()) % (2**32 - 1) if raw else 0


def _structure(raw: Bytes, part: Part) -> tuple[Any, ...]:
    """Return what a header says about the bytes that follow it: their number first."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            header = fits.Header.fromstring(raw[part.start : part.stop].decode("latin-1"))
            first = str(header.cards[0].image)[:8]
            axes = [header[f"NAXIS{axis + 1}"] for axis in range(header["NAXIS"])]
            width = abs(header["BITPIX"]) // 8 if header["BITPIX"] in (8, 16, 32, 64, -32, -64) else 0
            tiles = [header.get(f"ZNAXIS{axis + 1}") for axis in range(min(header.get("ZNAXIS", 0), 9))]
            tiles += [-(-n // header.get(f"ZTILE{axis + 1}", 1)) for axis, n in enumerate(tiles)]
            kind = str(header.get("XTENSION", "")).strip()
            forms = [header.get(key) for i in range(9) for key in (f"TFORM{i}", f"TTYPE{i}")]
            groups, more = int(header.get("GCOUNT", 1)), int(header.get("PCOUNT", 0))
            size = width * groups * (more + math.prod(map(int, axes)) if axes else 0)
            return size, first, kind, width, *tiles, *forms, header.get("ZIMAGE"), str(header.get("ZCMPTYPE"))[:4]
    except Exception:  # a header that cannot be read tells
        return -1, "unreadable"


# --- reading, in workers ---


@dataclass(frozen=True)
class Base:
    """An undamaged source."""

    folder: Path
    reader: SourceReader
    rows: pa.Table
    contract: InputContract
    cutout: Cutout
    victims: tuple[Path, ...]


@dataclass(frozen=True)
class Result:
    """What became of one damaged file: the worst of its two readings."""

    number: int
    form: str
    summed: bool
    damage: Damage
    outcome: str
    detail: str
    seconds: float = 0.0
    memory: int = 0


ORDER = ("equal", "refused", "changed", "finding")


def make_base(folder: Path, form: str, sums: bool, variant: int, seed: int) -> Base:
    folder.mkdir(parents=True)
    rng = np.random.default_rng([seed, list(FORMS).index(form), int(sums), variant])
    FORMS[form](folder, "a", rng, sums)
    before = set(folder.iterdir())
    if form not in TILES:
        FORMS[form](folder, "b", rng, sums)
    fixed = form in TILES or variant % 2
    contract = InputContract(SIZE, FieldOfView(0.0 if fixed else 9.0, 8.0, 8.0 if fixed else 90.0), LEGACY_DR2)
    reader = open_source(folder, catalogue=folder / "sources.csv" if form in TILES else None)
    rows = reader.sources().table
    rows = rows.slice(len(rows) - 1)
    ((_, cutout),) = reader.cutouts(rows, contract)
    if isinstance(cutout, GalembedError):
        raise cutout
    victims = sorted(path for path in (before if form in TILES else set(folder.iterdir()) - before))
    return Base(folder, reader, rows, contract, cutout, tuple(path for path in victims if path.suffix != ".csv"))


def same(one: Cutout, other: Cutout) -> bool:
    places = ((one.ra, other.ra), (one.dec, other.dec), (one.fov_arcsec, other.fov_arcsec))
    return np.array_equal(one.pixels, other.pixels, equal_nan=True) and all(
        a == b or (a is not None and b is not None and abs(a - b) < 1e-9) for a, b in places
    )


def broken(cutout: Cutout) -> str:
    """Return how a cutout breaks its contract, or an empty string."""
    pixels = cutout.pixels
    if pixels.dtype != np.float32 or pixels.shape != (3, SIZE, SIZE):
        return f"pixels are {pixels.dtype} {pixels.shape}"
    if np.isinf(pixels).any():
        return "infinite pixels"
    if not 0 < cutout.coverage <= 1 or not np.isfinite(pixels).any(axis=(1, 2)).all():
        return f"coverage {cutout.coverage}"
    for name, value, low, high in (
        ("ra", cutout.ra, -360, 360),
        ("dec", cutout.dec, -90, 90),
        ("fov", cutout.fov_arcsec, 0, 1e9),
    ):
        if value is not None and not low <= value <= high:
            return f"{name} is {value}"
    return ""


def judge(base: Base, damage: Damage, read: Callable[[], Cutout | GalembedError]) -> tuple[str, str]:
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", ResourceWarning)  # the last few tiles stay open
        try:
            result = read()
        except GalembedError as error:
            result = error
        except BaseException as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(last.filename).name}:{last.lineno}"
            return "finding", f"{type(error).__name__} at {where}: {error}"
    if heard:
        return "finding", f"warning: {heard[0].category.__name__}: {heard[0].message}"
    if isinstance(result, GalembedError):
        told = f"{type(result).__name__}: {result}"
        return ("finding", f"memory: {told}") if "Unable to allocate" in told else ("refused", told)
    if why := broken(result):
        return "finding", f"contract: {why}"
    if same(base.cutout, result):
        return "equal", ""
    return ("changed", damage.excuse) if damage.excuse else ("finding", "changed in silence")


def read_case(base: Base, number: int, form: str, sums: bool, seed: int, folder: Path) -> Result:
    rng = np.random.default_rng([seed, 1, number])
    victim = base.victims[int(rng.integers(len(base.victims)))]
    content, damage = damaged(victim.read_bytes(), rng)
    shutil.copytree(base.folder, folder)
    (folder / victim.name).write_bytes(content)
    damage = replace(damage, note=f"{victim.name}: {damage.note}")

    def moved(path: str) -> str:
        return path.replace(str(base.folder), str(folder))

    def as_a_tree() -> Cutout | GalembedError:
        reader = open_source(folder, catalogue=folder / "sources.csv" if form in TILES else None)
        listing = reader.sources().table
        at = listing["source_id"].to_pylist().index(base.rows["source_id"][0].as_py())
        return next(reader.cutouts(listing.slice(at, 1), base.contract))[1]

    def after_listing() -> Cutout | GalembedError:
        reader = replace(base.reader, root=moved(base.reader.root))  # type: ignore[type-var]
        row = base.rows.to_pylist()[0]
        rows = pa.Table.from_pylist([row | {"source_uri": moved(row["source_uri"])}], base.rows.schema)
        return next(reader.cutouts(rows, base.contract))[1]

    start, rest = time.perf_counter(), reset_peak()
    verdicts = [judge(base, damage, as_a_tree), judge(base, damage, after_listing)]
    seconds, memory = time.perf_counter() - start, peak() - rest
    outcome, detail = max(verdicts, key=lambda verdict: ORDER.index(verdict[0]))
    if memory > MEMORY and outcome != "finding":
        outcome, detail = "finding", f"memory: {memory >> 20} MiB"
    shutil.rmtree(folder)
    return Result(number, form, sums, damage, outcome, detail, seconds, memory)


def reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def work(pipe: Connection, seed: int, scratch: Path) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    warnings.simplefilter("ignore", ResourceWarning)  # tiles that stay open until the end
    bases: dict[tuple[str, bool, int], Base] = {}
    scratch.mkdir(parents=True)
    while (number := pipe.recv()) is not None:
        form, sums, variant = case(number)
        key = (form, sums, variant)
        if key not in bases:
            bases[key] = make_base(scratch / f"base{len(bases)}", form, sums, variant, seed)
            pipe.send("ready")
        pipe.send(read_case(bases[key], number, form, sums, seed, scratch / f"case{number}"))


def case(number: int) -> tuple[str, bool, int]:
    form = list(FORMS)[number % len(FORMS)]
    number //= len(FORMS)
    return form, bool(number % 2), number // 2 % VARIANTS


class Worker:
    """A process that reads damaged files, one at a time."""

    def __init__(self, context: Any, seed: int, scratch: Path) -> None:
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=work, args=(other, seed, scratch), daemon=True)
        self.process.start()
        other.close()
        self.number = -1
        self.since = 0.0

    def give(self, number: int) -> None:
        self.number, self.since = number, time.monotonic()
        self.pipe.send(number)

    def stop(self) -> None:
        self.process.kill()
        self.process.join()


def run(files: int, seed: int, workers: int, scratch: Path) -> Iterator[Result]:
    context = multiprocessing.get_context("spawn")
    waiting, started = iter(range(files)), 0
    crew: list[Worker] = []

    def hire() -> None:
        nonlocal started
        number = next(waiting, None)
        if number is not None:
            worker = Worker(context, seed, scratch / f"worker{started}")
            started += 1
            crew.append(worker)
            worker.give(number)

    for _ in range(workers):
        hire()
    while crew:
        ready = wait([worker.pipe for worker in crew], timeout=1.0)
        for worker in list(crew):
            lost = ""
            if worker.pipe in ready:
                try:
                    result = worker.pipe.recv()
                except EOFError:
                    worker.process.join()
                    lost = f"the process died (exit code {worker.process.exitcode})"
                else:
                    if result == "ready":  # a base was made; the clock starts now, after its import too
                        worker.since = time.monotonic()
                        continue
                    yield result
                    number = next(waiting, None)
                    if number is None:
                        crew.remove(worker)
                        worker.pipe.send(None)
                        worker.process.join()
                    else:
                        worker.give(number)
                    continue
            elif time.monotonic() - worker.since > SECONDS + 40 * (worker.number < workers):
                lost = f"more than {SECONDS:.0f} s"
            if lost:
                worker.stop()
                crew.remove(worker)
                form, sums, _ = case(worker.number)
                yield Result(worker.number, form, sums, Damage("?", "", ""), "finding", lost)
                hire()


# --- the report ---


def table(results: list[Result], key: Callable[[Result], str], title: str) -> list[str]:
    rows: dict[str, Counter[str]] = {}
    for result in results:
        rows.setdefault(key(result), Counter())[result.outcome] += 1
    rows = dict(sorted(rows.items())) | {"all": Counter(result.outcome for result in results)}
    lines = [f"| {title} | files | refused | equal | changed | findings |", "| --- |" + " ---: |" * 5]
    for name, counts in rows.items():
        cells = [sum(counts.values()), *(counts[outcome] for outcome in ("refused", "equal", "changed", "finding"))]
        lines.append(f"| {name} | " + " | ".join(f"{cell:,}" for cell in cells) + " |")
    return lines


def report(results: list[Result], seed: int, minutes: float) -> str:
    changed = Counter(result.detail for result in results if result.outcome == "changed")
    slowest = max(result.seconds for result in results)
    most = max(result.memory for result in results)
    lines = [
        "## Damaged files",
        "",
        f"`python benchmarks/damaged.py --files {len(results)} --seed {seed}`",
        "",
        "Small files in seven of the surveys' forms, each damaged once and read as a job reads it, from the tree and",
        "after the listing. Refused: an error of `galembed.errors`. Equal: the undamaged file's cutout to the bit.",
        "Changed: another cutout, from damage that nothing in the file can tell. Findings: crashes, hangs, other",
        "exceptions, escaped warnings, broken cutouts, and changes that DATASUM, compression or structure could tell.",
        "",
        *table(results, lambda result: f"{result.form}{', DATASUM' if result.summed else ''}", "form"),
        "",
        *table(results, lambda result: result.damage.kind.replace("_", " "), "damage"),
        "",
        "| why nothing can tell | files |",
        "| --- | ---: |",
        *(f"| {reason} | {count:,} |" for reason, count in changed.most_common()),
        "",
        "CHECKSUM covers headers too, and is not checked: a tool that edits a header often leaves the old one.",
        "",
        f"Slowest file {slowest:.1f} s; most memory beyond the process's own {most >> 20} MiB; {minutes:.0f} min,",
        f"two shared cores ({platform.machine()}), Python {platform.python_version()}, astropy {astropy.__version__},",
        f"numpy {np.__version__}.",
    ]
    return "\n".join(lines) + "\n"


def write_section(page: Path, section: str) -> None:
    """Put a section into a Markdown page, in the place of the one with its heading."""
    heading = section.splitlines()[0]
    before, found, rest = page.read_text(encoding="utf-8").partition(f"{heading}\n")
    after = re.search(r"^## ", rest, flags=re.MULTILINE) if found else None
    tail = rest[after.start() :] if after else ""
    page.write_text(f"{before.rstrip()}\n\n{section}" + (f"\n{tail}" if tail else ""), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--out", type=Path, help="Markdown page whose section is replaced.")
    parser.add_argument("--details", type=Path, help="Write each file's outcome here.")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    start, results = time.monotonic(), []
    with tempfile.TemporaryDirectory() as scratch:
        for result in run(arguments.files, arguments.seed, arguments.workers, Path(scratch)):
            results.append(result)
            if result.outcome == "finding":
                print(
                    f"finding {result.number}: {result.form}, {result.damage.kind}, {result.damage.note}: "
                    f"{result.detail}",
                    file=sys.stderr,
                    flush=True,
                )
    section = report(results, arguments.seed, (time.monotonic() - start) / 60)
    print(section)
    if arguments.details is not None:
        lines = (
            "\t".join(map(str, (r.number, r.form, r.summed, r.damage.kind, r.damage.note, r.outcome, r.detail)))
            for r in results
        )
        arguments.details.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if arguments.out is not None:
        write_section(arguments.out, section)
    if any(result.outcome == "finding" for result in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
