"""Votes joined to images: what a training run reads."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from galembed.backbones import FieldOfView, InputContract
from galembed.errors import BadRequest, GalembedError, UnreadableInput
from galembed.questions import QuestionTree
from galembed.sky import healpix_index
from galembed.sources import SourceReader, open_source
from training.votes import read_votes

MARGIN: Final = 1.5
"""Field read for training over the field a network sees, so that rotation and zoom find pixels."""

VALIDATION_SHARE: Final = 0.1
_CELL_ORDER: Final = 6  # 0.9 deg
_HALF_MAX: Final = 65504.0


@dataclass(frozen=True)
class VotedImages:
    """Images with votes.

    Attributes
    ----------
    reader : SourceReader
    rows : pa.Table
        One source per row; see `galembed.schemas.SOURCES`.
    votes : ndarray, shape (row, answer), float32
    """

    reader: SourceReader
    rows: pa.Table
    votes: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.rows)


def open_voted_images(
    source: Path,
    tree: QuestionTree,
    *,
    votes: Path | None = None,
    catalogue: Path | None = None,
    crop: float | None = None,
    columns: Mapping[str, str] | None = None,
) -> VotedImages:
    """Join a folder of images to a vote table.

    Parameters
    ----------
    source : Path
        A folder of FITS cutouts or pictures; or what `galembed simulate` wrote, whose parts are then found.
    tree : QuestionTree
    votes : Path, optional
        A table for `training.votes.read_votes`.
    catalogue : Path, optional
        Sizes and positions by id.

    Raises
    ------
    BadRequest
        If there is no vote table, or no image has votes.
    SchemaMismatch
        If the vote table does not fit the tree; see `training.votes.read_votes`.
    """
    source = Path(source)
    if votes is None and (source / "votes.parquet").exists():
        votes = source / "votes.parquet"
        if catalogue is None and (source / "cutouts.fits").exists():
            catalogue = source / "cutouts.fits"
        source = source / "cutouts" if (source / "cutouts").is_dir() else source
    if votes is None:
        raise BadRequest(f"{source} holds no votes.parquet: name the vote table with --votes")
    reader = open_source(source, catalogue=catalogue, crop=crop, columns=columns)
    listing = reader.sources().table
    ids, counts = read_votes(votes, tree)
    at = pc.index_in(listing["source_id"], value_set=pa.array(ids, pa.string()))
    matched = pc.is_valid(at).to_numpy(zero_copy_only=False)
    if not matched.any():
        raise BadRequest(
            f"{votes}: none of its {len(ids)} ids ({ids[0] if ids else 'none'}, ...) is an image in {source} "
            f"({listing['source_id'][0] if len(listing) else 'empty'}, ...)"
        )
    found = listing.filter(matched)
    return VotedImages(reader, found, counts[at.drop_null().to_numpy()])


def is_validation(rows: pa.Table) -> NDArray[np.bool_]:
    """Return which rows are kept for validation: a tenth of the sky's cells, or of the ids where there is no position.

    The choice depends on a row's own position or id alone, never on its place in the table.
    """
    ids = rows["source_id"].to_pylist()
    ra, dec = (rows[name].to_numpy(zero_copy_only=False).astype(float) for name in ("ra", "dec"))
    placed = np.isfinite(ra) & np.isfinite(dec)
    names = np.array(ids, dtype=object)
    if placed.any():
        names[placed] = healpix_index(ra[placed], dec[placed], _CELL_ORDER).astype(str)
    draws = {name: int(hashlib.sha256(str(name).encode()).hexdigest()[:8], 16) / 2**32 for name in set(names)}
    return np.array([draws[name] < VALIDATION_SHARE for name in names])


class _Reader(Dataset[tuple[Tensor, str]]):
    """Pixels by row number, or the reason there are none; runs in worker processes."""

    def __init__(self, images: VotedImages, contract: InputContract, margin: float) -> None:
        fov = contract.field_of_view
        self._rows = images.rows
        self._contract = replace(
            contract,
            size=round(contract.size * margin),
            field_of_view=FieldOfView(fov.radii * margin, fov.min_arcsec * margin, fov.max_arcsec * margin),
        )
        self._reader = images.reader
        if images.reader.kind == "display" or images.rows["size"].null_count:
            self._reader = replace(images.reader, crop=min(1.0, images.reader.crop * margin))  # type: ignore[type-var]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> tuple[Tensor, str]:
        _, cutout = next(iter(self._reader.cutouts(self._rows.slice(number, 1), self._contract)))
        if isinstance(cutout, GalembedError):
            size = self._contract.size
            return torch.zeros((3, size, size), dtype=self.dtype), str(cutout)
        pixels = torch.from_numpy(cutout.pixels)
        return (pixels.clamp(-_HALF_MAX, _HALF_MAX).half() if self.dtype == torch.float16 else pixels), ""

    @property
    def dtype(self) -> torch.dtype:
        return torch.float16 if self._reader.kind == "flux" else torch.uint8


@dataclass(frozen=True)
class Prepared:
    """Images read once, checked, and laid out for random access; memory stays that of the pages in use.

    Attributes
    ----------
    pixels : ndarray, shape (row, 3, y, x), float16 or uint8
        Flux in nJy per (0.262 arcsec)^2, clipped to +-65504 (far above where any mapping is white), NaN = no data; or
        R, G, B. A memory map.
    votes : ndarray, shape (row, answer), float32
    rows : ndarray, shape (row,), int
        Place in `pixels`; unreadable images are left out.
    table : pa.Table
        The sources of `rows`.
    """

    pixels: NDArray[Any]
    votes: NDArray[np.float32]
    rows: NDArray[np.int64]
    table: pa.Table

    def take(self, mask: NDArray[np.bool_]) -> Prepared:
        """Return the rows of a mask."""
        return Prepared(self.pixels, self.votes[mask], self.rows[mask], self.table.filter(mask))

    def __len__(self) -> int:
        return len(self.rows)


class PreparedImages(Dataset[tuple[Tensor, Tensor]]):
    """Batches of prepared images: indexed by a list of row numbers, gives pixels (n, 3, y, x) and votes (n, answer)."""

    def __init__(self, prepared: Prepared, margin: int) -> None:
        self._prepared = prepared
        self._cut = slice(margin, -margin or None)

    def __len__(self) -> int:
        return len(self._prepared)

    def __getitem__(self, numbers: list[int]) -> tuple[Tensor, Tensor]:
        rows = np.sort(np.asarray(numbers))
        pixels = torch.from_numpy(self._prepared.pixels[self._prepared.rows[rows]][:, :, self._cut, self._cut])
        votes = torch.from_numpy(self._prepared.votes[rows])
        return (pixels.float() if pixels.dtype == torch.float16 else pixels), votes


class EpochOrder(Sampler[list[int]]):
    """Batches of row numbers, shuffled anew each epoch; the order is a function of seed and epoch alone.

    `epoch` is asked when an epoch begins: a trainer tells samplers the epoch of a resumed run too late.
    """

    def __init__(self, count: int, batch: int, seed: int, epoch: Callable[[], int]) -> None:
        self._count, self._batch, self._seed, self._epoch = count, batch, seed, epoch

    def __len__(self) -> int:
        return self._count // self._batch

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng([self._seed, self._epoch()]).permutation(self._count)
        yield from order[: len(self) * self._batch].reshape(len(self), self._batch).tolist()


def prepare(images: VotedImages, contract: InputContract, file: Path, *, workers: int) -> tuple[Prepared, list[str]]:
    """Read every image once into `file`; return what can be trained on and the reasons of the rest.

    An image holds `MARGIN` times the contract's field, at the contract's pixel scale.

    Raises
    ------
    UnreadableInput
        If no image can be read.
    """
    dataset = _Reader(images, contract, MARGIN)
    file.parent.mkdir(parents=True, exist_ok=True)
    size = round(contract.size * MARGIN)
    dtype = np.float16 if dataset.dtype == torch.float16 else np.uint8
    pixels = np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=(len(dataset), 3, size, size))
    loader: DataLoader[Any] = DataLoader(dataset, batch_size=64, num_workers=workers)
    reasons: list[str] = []
    with Progress(console=Console(stderr=True)) as bars:
        for batch, why in bars.track(loader, description="reading"):
            pixels[len(reasons) : len(reasons) + len(why)] = batch.numpy()
            reasons += why
    good = np.array([not reason for reason in reasons])
    if not good.any():
        raise UnreadableInput(f"none of {len(reasons)} images can be read; the first: {reasons[0]}")
    prepared = Prepared(pixels, images.votes, np.arange(len(reasons)), images.rows).take(good)
    return prepared, [reason for reason in reasons if reason]
