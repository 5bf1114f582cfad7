"""A first look at a source: a sample of its cutouts as a backbone will see them, and what is odd about them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.figure import Figure
from numpy.typing import NDArray

from galembed.backbones import InputContract
from galembed.cutouts import Cutout
from galembed.errors import BadRequest, GalembedError, UnreadableInput
from galembed.mappings import FluxMapping
from galembed.pictures import Picture, mosaic, rgb
from galembed.schemas import SOURCES
from galembed.sources import SourceReader

_LONGEST_ID: Final = 26


@dataclass(frozen=True)
class Look:
    """A sample of a source.

    Attributes
    ----------
    root : str
        Where it was read.
    listed : int
        Sources in the list.
    rejected : mapping of str to int
        Rows that cannot be sources, by reason.
    rows : pa.Table
        The sampled ones, `galembed.schemas.SOURCES`.
    results : tuple of Cutout or GalembedError
        One for each row.
    crop : float
        Centre fraction kept of an image whose source has no size.
    """

    root: str
    listed: int
    rejected: Mapping[str, int]
    rows: pa.Table
    results: tuple[Cutout | GalembedError, ...]
    crop: float

    @property
    def cutouts(self) -> list[Cutout]:
        """Those that could be cut."""
        return [result for result in self.results if isinstance(result, Cutout)]


def look(reader: SourceReader, contract: InputContract, *, count: int = 24, seed: int = 0) -> Look:
    """Cut a random sample of a source, spread over its files.

    Parameters
    ----------
    reader : SourceReader
    contract : InputContract
        The backbone's; its size and field of view are used.
    count : int
        Sources to sample; all of them where there are fewer.
    seed : int

    Raises
    ------
    BadRequest
        If the list has no source.
    """
    listing = reader.sources()
    rejected = Counter(listing.rejected["reason"].to_pylist())
    if not len(listing.table):
        raise BadRequest(f"{reader.root} lists no source ({_counted(rejected) or 'nor any rejected row'})")
    rows = listing.table.select(SOURCES.names).take(pa.array(_spread(listing.table, count, seed)))
    return Look(
        root=reader.root,
        listed=len(listing.table),
        rejected=rejected,
        rows=rows,
        results=tuple(_cut(reader, rows.slice(number, 1), contract) for number in range(len(rows))),
        crop=reader.crop,
    )


def _spread(table: pa.Table, count: int, seed: int) -> NDArray[np.int64]:
    """Return row numbers, one at random from each of `count` equal stretches of the list in the order of its files."""
    order = pc.sort_indices(table, sort_keys=[("source_uri", "ascending")]).to_numpy().astype(np.int64)
    edges = np.linspace(0, len(order), min(count, len(order)) + 1).astype(np.int64)
    chosen: NDArray[np.int64] = order[np.random.default_rng(seed).integers(edges[:-1], edges[1:])]
    return chosen


def _cut(reader: SourceReader, row: pa.Table, contract: InputContract) -> Cutout | GalembedError:
    try:
        return next(iter(reader.cutouts(row, contract)))[1]
    except OSError as error:
        return UnreadableInput(f"{row['source_uri'][0]}: {error}")


def look_figure(seen: Look, mapping: FluxMapping) -> Figure:
    """Return a mosaic: each picture with id, field, coverage and flags; a failure as an empty frame with its reason.

    Parameters
    ----------
    seen : Look
    mapping : FluxMapping
        Draws flux; display images are drawn as they are.
    """
    pictures: list[Picture] = [
        rgb(result.pixels, mapping) if isinstance(result, Cutout) else _short(seen, result) for result in seen.results
    ]
    titles = [_title(row, result, seen.crop) for row, result in zip(seen.rows.to_pylist(), seen.results, strict=True)]
    return mosaic(pictures, titles)


def _short(seen: Look, error: GalembedError) -> str:
    """Return what a failure says, without the folder that all files are in."""
    return str(error).replace(f"{seen.root.rstrip('/')}/", "")


def _title(row: Mapping[str, Any], result: Cutout | GalembedError, crop: float) -> str:
    name = str(row["source_id"])
    lines = [name if len(name) <= _LONGEST_ID else f"…{name[1 - _LONGEST_ID :]}"]
    if isinstance(result, GalembedError):
        return "\n".join([*lines, f"{row['survey']}  {result.reason}"])
    field = f"crop {crop:g}" if result.fov_arcsec is None else f"{result.fov_arcsec:.1f}″"
    covered = "" if result.coverage == 1 else f"  {min(result.coverage, 0.99):.0%} covered"
    return "\n".join([*lines, f"{row['survey']}  {field}{covered}", *([result.flags] if result.flags else [])])


def look_text(seen: Look) -> str:
    """Return a summary in words: how many sources, what was rejected, and how the sampled ones came out.

    The first failure of each reason is told in full.
    """
    errors = [
        (str(name), result)
        for name, result in zip(seen.rows["source_id"].to_pylist(), seen.results, strict=True)
        if isinstance(result, GalembedError)
    ]
    failed = Counter(error.reason for _, error in errors)
    flags = Counter(word for cutout in seen.cutouts for word in cutout.flags.split())
    incomplete = sum(cutout.coverage < 1 for cutout in seen.cutouts)
    fields = [cutout.fov_arcsec for cutout in seen.cutouts if cutout.fov_arcsec is not None]
    lines = [
        f"sources    {seen.listed:,} listed" + (f"; rejected: {_counted(seen.rejected)}" if seen.rejected else ""),
        f"sampled    {len(seen.results)}: {len(seen.cutouts)} cut"
        + (f", failed: {_counted(failed)}" if failed else ""),
    ]
    examples = {error.reason: f"           {name}: {_short(seen, error)}" for name, error in reversed(errors)}
    lines += [examples[reason] for reason in sorted(examples)]
    if seen.cutouts:
        lines += [f"coverage   {incomplete} of {len(seen.cutouts)} have pixels without data"]
        lines += [f"flagged    {_counted(flags) or 'none'}"]
        width = (
            f"median {np.median(fields):.1f} arcsec ({min(fields):.1f} to {max(fields):.1f})"
            if fields
            else f"unknown: no scale; crop {seen.crop:g}"
        )
        lines += [f"field      {width}"]
    return "\n".join(lines)


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items()))
