"""Display images: JPEG and PNG, already stretched by somebody else, in a folder.

What a file becomes is a contract, since a vector depends on it; `read_picture` states it. Pictures in Parquet tables
(`galembed.sources.image_tables`) go through the same function.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import fsspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from galembed.backbones import InputContract
from galembed.cutouts import Cutout
from galembed.errors import GalembedError, NoData, UnreadableInput
from galembed.files import find_files, is_url
from galembed.sources import SourceList
from galembed.sources.folders import list_places

ENDINGS: Final = (".jpg", ".jpeg", ".png")

MAX_PIXELS: Final = 1024**3 // 4 // 3
"""Most pixels that a picture may have: Pillow's own limit against decompression bombs, 9459 on a side."""

_FORMATS: Final = ("JPEG", "PNG")


@dataclass(frozen=True)
class ImageReader:
    """Reads a folder or URL of pictures; see `galembed.sources.open_source` for the attributes."""

    root: str
    catalogue: str | None = None
    crop: float = 0.5
    carry: tuple[str, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    bands: Mapping[str, str] = field(default_factory=dict)
    kind: str = "display"
    survey: str = "images"
    fov: str = ""
    evidence: str = ""

    @classmethod
    def open(
        cls,
        root: str | Path,
        *,
        catalogue: str | Path | None,
        crop: float,
        carry: tuple[str, ...],
        columns: Mapping[str, str],
    ) -> ImageReader:
        """Return a reader."""
        return cls(str(root), str(catalogue) if catalogue is not None else None, crop, carry, dict(columns))

    def sources(self) -> SourceList:
        """Return one source per file."""
        return list_places(
            {uri: (uri,) for uri in find_files(self.root, ENDINGS)},
            self.root,
            ENDINGS,
            survey=self.survey,
            catalogue=self.catalogue,
            carry=self.carry,
            columns=self.columns,
        )

    def cutouts(self, rows: pa.Table, contract: InputContract) -> Iterator[tuple[int, Cutout | GalembedError]]:
        """Yield (row number, cutout or the reason there is none) for each row."""
        for number, row in enumerate(rows.select(["source_uri", "ra", "dec"]).to_pylist()):
            try:
                started = time.perf_counter()
                uri = row["source_uri"]
                picture = _download(uri) if is_url(uri) else Path(uri)
                pixels = read_picture(picture, crop=self.crop, size=contract.size, name=uri)
                yield number, Cutout(pixels, 1.0, None, row["ra"], row["dec"], time.perf_counter() - started)
            except GalembedError as error:
                yield number, error


def read_picture(picture: Path | bytes, *, crop: float, size: int, name: str = "") -> NDArray[np.uint8]:
    """Read a picture's centre.

    Parameters
    ----------
    picture : Path or bytes
        A JPEG or PNG file, or what one holds. Whatever its name says, no other format is read.
    crop : float
        Side of the square that is kept, as a fraction of the picture's shorter side.
    size : int
        Output pixels on a side; resampled with an anti-aliased triangle kernel.
    name : str
        What messages call it; the path unless given.

    Returns
    -------
    ndarray, shape (3, size, size), uint8
        R, G, B; row 0 is the bottom, while files hold the top row first. 0 is black and 255 the file's full scale.

    Raises
    ------
    UnreadableInput
        If it is not a JPEG or PNG, is damaged or truncated (no part of it is used then), or has more than `MAX_PIXELS`.
        A PNG's checksums tell all damage; a JPEG has none, and wrong bytes inside one may go unseen.
    NoData
        If all its pixels are equal.

    Notes
    -----
    ===================  =============================================================================================
    grey, 1 to 8 bits    stretched to 0-255, as the PNG specification has it, and given three times
    grey, 16 bits        divided by 257 and rounded, so 65535 is white: nothing is clipped, nor stretched to its range
    colour, 16 bits      the high byte of each sample, which is at most one level from that
    palette              its colours
    transparent          laid over black, which is what flux without data is shown as, or nearly
    CMYK                 (1 - C)(1 - K) and so on, without a colour profile; profiles are not applied to RGB either
    EXIF orientation     obeyed, before the flip: what a viewer shows at the bottom is row 0
    animated             the first frame
    ===================  =============================================================================================
    """
    name = name or (str(picture) if isinstance(picture, Path) else "picture")
    too_large = f"{name}: more than {MAX_PIXELS:,} pixels, which is no cutout and may be a decompression bomb; cut it"
    try:
        data = picture if isinstance(picture, bytes) else picture.read_bytes()
        with Image.open(io.BytesIO(data), formats=_FORMATS) as unread:
            if unread.width * unread.height > MAX_PIXELS:
                raise UnreadableInput(too_large)
            unread.verify()  # a PNG's checksums, which decoding does not look at
        with Image.open(io.BytesIO(data), formats=_FORMATS) as opened:
            square = _square(_as_rgb(ImageOps.exif_transpose(opened)), crop, size)
    except UnreadableInput:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableInput(too_large) from error
    except UnidentifiedImageError as error:
        raise UnreadableInput(f"{name}: neither JPEG nor PNG, or damaged in its first bytes; fetch it again") from error
    except Exception as error:  # damaged chunks make Pillow's parsers raise almost anything
        raise UnreadableInput(f"{name}: damaged or not a picture ({error}); fetch it again") from error
    pixels = np.asarray(square, np.uint8)[::-1].transpose(2, 0, 1)
    if pixels.min() == pixels.max():
        raise NoData(f"{name}: the centre of the picture is blank (every pixel is {pixels.min()})")
    return np.ascontiguousarray(pixels)


def _download(uri: str) -> bytes:
    try:
        with fsspec.open(uri, "rb") as stream:
            return bytes(stream.read())
    except Exception as error:  # each file system raises its own kinds
        raise UnreadableInput(f"{uri} cannot be fetched ({type(error).__name__}: {error}); try again") from error


def _as_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):
        # Pillow's own conversion clips 16 bits at 255. Older versions of it open such a PNG as 32-bit integers.
        levels: NDArray[Any] = np.asarray(picture).astype(np.int64)
        return Image.fromarray(((levels + 128) // 257).astype(np.uint8)).convert("RGB")
    if picture.mode in ("LA", "PA", "RGBA") or "transparency" in picture.info:
        return Image.alpha_composite(Image.new("RGBA", picture.size, "black"), picture.convert("RGBA")).convert("RGB")
    return picture.convert("RGB")


def _square(picture: Image.Image, crop: float, size: int) -> Image.Image:
    """Return the picture's centre, resampled."""
    width, height = picture.size
    side = crop * min(width, height)
    box = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
    return picture.resize((size, size), Image.Resampling.BILINEAR, box=box)
