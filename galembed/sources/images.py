"""A folder of display images: JPEG or PNG, already stretched by somebody else."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
from PIL import Image, UnidentifiedImageError

from galembed.backbones import InputContract
from galembed.cutouts import Cutout
from galembed.errors import GalembedError, NoData, UnreadableInput
from galembed.sources import SourceList
from galembed.sources.folders import list_folder

ENDINGS: Final = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class ImageReader:
    """Reads a folder of pictures; see `galembed.sources.open_source` for the attributes."""

    root: str
    catalogue: str | None = None
    crop: float = 0.5
    carry: tuple[str, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    bands: Mapping[str, str] = field(default_factory=dict)
    kind: str = "display"

    @classmethod
    def open(
        cls,
        root: Path,
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
        return list_folder(
            Path(self.root),
            ENDINGS,
            survey="images",
            catalogue=self.catalogue,
            carry=self.carry,
            columns=self.columns,
        )

    def cutouts(self, rows: pa.Table, contract: InputContract) -> Iterator[tuple[int, Cutout | GalembedError]]:
        """Yield (row number, cutout or the reason there is none) for each row."""
        for number, row in enumerate(rows.select(["source_uri", "ra", "dec"]).to_pylist()):
            try:
                started = time.perf_counter()
                pixels = read_picture(Path(row["source_uri"]), crop=self.crop, size=contract.size)
                yield number, Cutout(pixels, 1.0, None, row["ra"], row["dec"], time.perf_counter() - started)
            except GalembedError as error:
                yield number, error


def read_picture(file: Path, *, crop: float, size: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Read a picture's centre.

    Parameters
    ----------
    file : Path
    crop : float
        Side of the square that is kept, as a fraction of the picture's shorter side.
    size : int
        Output pixels on a side; resampled with an anti-aliased triangle kernel.

    Returns
    -------
    ndarray, shape (3, size, size), uint8
        R, G, B; a grey picture three times. Row 0 is the bottom: files hold the top row first.

    Raises
    ------
    UnreadableInput
        If the file is not a whole picture.
    NoData
        If all its pixels are equal.
    """
    try:
        with Image.open(file) as picture:
            width, height = picture.size
            side = crop * min(width, height)
            box = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
            square = picture.convert("RGB").resize((size, size), Image.Resampling.BILINEAR, box=box)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise UnreadableInput(f"{file}: damaged or not a picture ({error}); fetch it again") from error
    pixels = np.asarray(square, np.uint8)[::-1].transpose(2, 0, 1)
    if pixels.min() == pixels.max():
        raise NoData(f"{file}: the centre of the picture is blank (every pixel is {pixels.min()})")
    return np.ascontiguousarray(pixels)
