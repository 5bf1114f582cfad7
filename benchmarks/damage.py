"""Damage to FITS files, and what in a file could tell of it. For damaged.py."""

from __future__ import annotations

import bz2
import gzip
import io
import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from astropy.io import fits
from astropy.table import Table

BLOCK = 2880


@dataclass(frozen=True)
class Part:
    """A stretch of an undamaged file: ``header``, ``pixels``, ``table``, ``heap`` or ``padding`` of an HDU."""

    start: int
    stop: int
    what: str
    hdu: int
    summed: bool
    compression: str


def parts_of(raw: bytes) -> list[Part]:
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


def _stream(raw: bytes) -> Any:
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


def damaged(raw: bytes, rng: np.random.Generator) -> tuple[bytes, Damage]:
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


def _truncated(raw: bytes, rng: np.random.Generator, inside: bool) -> tuple[bytes, str]:
    keep = int(rng.integers(0, len(raw)))
    if rng.random() < 0.5:
        keep = keep // BLOCK * BLOCK
    return raw[:keep], f"{keep} of {len(raw)} bytes"


def _flipped(raw: bytes, rng: np.random.Generator, inside: bool) -> tuple[bytes, str]:
    new = bytearray(raw)
    where = rng.integers(0, len(raw), int(rng.choice([1, 1, 8, 200])))
    for at in where:
        new[at] ^= 1 << int(rng.integers(8))
    return bytes(new), f"{len(where)} bit(s), the first in byte {where[0]}"


def _flipped_header(raw: bytes, rng: np.random.Generator, inside: bool) -> tuple[bytes, str]:
    if not inside:
        return _flipped(raw, rng, inside)
    at, card = draw_card(raw, rng)
    byte, bit = int(rng.integers(0, 80)), int(rng.integers(8))
    new = bytearray(card)
    new[byte] ^= 1 << bit
    return raw[:at] + bytes(new) + raw[at + 80 :], f"{text(card)} -> {text(bytes(new))}"


def _flipped_stream(raw: bytes, rng: np.random.Generator, inside: bool) -> tuple[bytes, str]:
    """Flip bits where decoders read how much there is: in the table of tiles and at the start of their streams."""
    parts = [part for part in parts_of(raw) if part.what in ("table", "heap")] if inside else []
    if not parts:
        return _flipped(raw, rng, inside)
    part = parts[int(rng.integers(len(parts)))]
    new, count = bytearray(raw), int(rng.integers(1, 6))
    for _ in range(count):
        new[part.start + int(rng.integers(min(64, part.stop - part.start)))] ^= 1 << int(rng.integers(8))
    return bytes(new), f"{count} bit(s) at the start of the {part.what} of HDU {part.hdu}"


def _lost_sectors(raw: bytes, rng: np.random.Generator, inside: bool) -> tuple[bytes, str]:
    length, fill = int(rng.choice([512, 4096])), bytes([int(rng.choice([0, 0, 255]))])
    start = int(rng.integers(0, max(1, len(raw) // 512))) * 512
    hole = raw[start : start + length]
    return raw[:start] + fill * len(hole) + raw[start + len(hole) :], f"{len(hole)} bytes from {start} on"


def _wrong_number(raw: bytes, rng: np.random.Generator, inside: bool) -> tuple[bytes, str]:
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


def _wrong_text(raw: bytes, rng: np.random.Generator, inside: bool) -> tuple[bytes, str]:
    if not inside:
        return _flipped(raw, rng, inside)
    at, card = draw_card(raw, rng, rb"[A-Z0-9_]+ *= +'")
    values = ["", " ", "image", "IMAGE", "BINTABLE", "RA---TAN-SIP", "DEC--TPV", "RA---TAB", "GLON-CAR", "FREQ", "deg"]
    values += ["arcsec", "1PB(9999)", "1QB(1)", "1000000000D", "E", "RICE_1", "GZIP_1", "PLIO_1", "x", "'" * 3, "é"]
    value = str(rng.choice(values))
    new = (card[:10] + f"'{value:8}'".encode("latin-1")).ljust(80)[:80]
    return raw[:at] + new + raw[at + 80 :], f"{text(card)} -> {value!r}"


def _missing_card(raw: bytes, rng: np.random.Generator, inside: bool) -> tuple[bytes, str]:
    if not inside:
        return _flipped(raw, rng, inside)
    at, card = draw_card(raw, rng)
    if rng.random() < 0.3:
        return raw[:at] + b" " * 80 + raw[at + 80 :], f"{text(card)} blanked"
    end = header_end(raw, at)
    return raw[:at] + raw[at + 80 : end] + b" " * 80 + raw[end:], f"{text(card)} left out"


def _moved_block(raw: bytes, rng: np.random.Generator, inside: bool) -> tuple[bytes, str]:
    length = BLOCK if rng.random() < 0.7 else int(rng.integers(1, BLOCK))
    start = int(rng.integers(0, max(1, len(raw) // BLOCK))) * BLOCK
    block, what = raw[start : start + length], str(rng.choice(["lost", "doubled", "swapped"]))
    if what == "lost":
        return raw[:start] + raw[start + length :], f"{length} bytes at {start} lost"
    if what == "doubled":
        return raw[: start + length] + block + raw[start + length :], f"{length} bytes at {start} doubled"
    after = raw[start + length : start + 2 * length]
    return raw[:start] + after + block + raw[start + 2 * length :], f"{length} bytes at {start} after the next"


def _another_file(raw: bytes, rng: np.random.Generator, inside: bool) -> tuple[bytes, str]:
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


def _file_of(hdu: Any) -> bytes:
    stream = io.BytesIO()
    hdu.writeto(stream)
    return stream.getvalue()


def cards_of(raw: bytes) -> Iterator[tuple[int, bytes]]:
    for part in parts_of(raw):
        if part.what == "header":
            for at in range(part.start, part.stop, 80):
                card = raw[at : at + 80]
                if card.strip():
                    yield at, card


def draw_card(raw: bytes, rng: np.random.Generator, pattern: bytes = b"") -> tuple[int, bytes]:
    found = [(at, card) for at, card in cards_of(raw) if not pattern or re.match(pattern, card)]
    return found[int(rng.integers(len(found)))]


def header_end(raw: bytes, at: int) -> int:
    return next(part.stop for part in parts_of(raw) if part.what == "header" and part.start <= at < part.stop)


def text(card: bytes) -> str:
    return repr(card[:40].decode("latin-1").rstrip())[1:-1]


def excuse_for(raw: bytes, new: bytes) -> str:
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


def word_sum(raw: bytes) -> int:
    """Return the ones' complement sum of 32-bit words (FITS 4.0, appendix J); zero has two forms."""
    return int(np.frombuffer(raw, ">u4").astype(object).sum()) % (2**32 - 1) if raw else 0


def _structure(raw: bytes, part: Part) -> tuple[Any, ...]:
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
