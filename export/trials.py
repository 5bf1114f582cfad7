"""Cutouts to prove engines on: some to calibrate with, others to compare on, and a gallery to search in."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from galembed.backbones import Backbone
from galembed.errors import ArtifactNotFound, BadRequest
from galembed.fidelity import Trial, make_trial
from galembed.progress import Advance, progress
from galembed.runtimes.torch import TorchRuntime
from galembed.sources import SourceReader

IMAGES: Final = 1000
"""Cutouts that an engine is compared on, and the fewest that one in fewer bits should be."""

GALLERY: Final = 5000
CALIBRATION: Final = 256
_AT_ONCE: Final = 512


@dataclass(frozen=True)
class Evidence:
    """What engines of one backbone are proved on.

    Attributes
    ----------
    trial : Trial
    calibration : mapping of str to ndarray
        By door; none of them is in the trial. May be empty.
    sources : str
        Where they are from, for the record.
    """

    trial: Trial
    calibration: Mapping[str, NDArray[Any]]
    sources: str


@contextmanager
def gather(
    backbone: Backbone,
    verify: SourceReader | None = None,
    calibrate: SourceReader | None = None,
    *,
    images: int = IMAGES,
    gallery: int = GALLERY,
    calibration: int = CALIBRATION,
    fewest: int = 1,
    quiet: bool = False,
) -> Iterator[Evidence]:
    """Cut out what engines are proved on, and have torch embed it; yield it while its files are there.

    The backbone's own samples are always compared on. Sources are taken in the order of a hash of their ids, so that
    the same survey gives the same images, gallery and calibration.

    Parameters
    ----------
    backbone : Backbone
    verify : SourceReader, optional
        To compare on. Without it there are the samples alone, and no gallery.
    calibrate : SourceReader, optional
        To find the ranges of int8 with; `verify`'s other sources unless given.
    images, gallery, calibration : int
        How many, at most. Where there are fewer readable sources, calibration and images come before the gallery.
    fewest : int
        Images to compare on, and others in the gallery, that there have to be; at 1 there need be no gallery.

    Raises
    ------
    BadRequest
        If there is nothing, or too little, to compare on.
    """
    with tempfile.TemporaryDirectory(prefix="galembed-trial-") as scratch:
        folder = Path(scratch)
        found = _samples(backbone)
        searched: dict[str, NDArray[Any]] = {}
        measured: dict[str, NDArray[Any]] = {}
        keys: set[str] = set()
        if verify is not None:
            own = calibration if calibrate is None else 0
            cut, keys = _cutouts(backbone, verify, own + images + gallery, folder / "verify.npy", quiet=quiet)
            measured = {verify.kind: cut[:own]} if own else {}
            found[verify.kind] = _joined(found.get(verify.kind), cut[own : own + images], folder / "images.npy")
            searched = {verify.kind: cut[own + images :]} if len(cut) > own + images else {}
        if calibrate is not None:
            cut, _ = _cutouts(backbone, calibrate, calibration, folder / "calibrate.npy", keys, quiet=quiet)
            measured = {calibrate.kind: _others(cut, found.get(calibrate.kind), searched.get(calibrate.kind))}
        if not sum(map(len, found.values())):
            raise BadRequest(f"{backbone.path} has no samples to compare on; give some with --verify SOURCE")
        compared, others = (sum(map(len, part.values())) for part in (found, searched))
        if fewest > 1 and min(compared, others) < fewest:
            raise BadRequest(
                f"an engine in fewer bits is proved on at least {fewest:,} cutouts among as many others, and there are "
                f"{compared:,} and {others:,}; give a larger --verify SOURCE "
                "(`galembed simulate survey/ --bricks 0 --cutouts 6500` makes one)"
            )
        numbers = [answer in backbone.values for answer in backbone.answers]
        total = sum(map(len, [*found.values(), *searched.values()]))
        with progress("torch in float32", total, quiet=quiet) as advance:
            trial = make_trial(TorchRuntime(backbone, device="cpu"), found, searched, numbers=numbers, advance=advance)
        yield Evidence(trial, measured, verify.root if verify else "the backbone's samples")


def _cutouts(
    backbone: Backbone,
    reader: SourceReader,
    count: int,
    file: Path,
    taken: set[str] | None = None,
    *,
    quiet: bool,
) -> tuple[NDArray[Any], set[str]]:
    """Return up to `count` cutouts in the order of their hashed ids, on disk, and their keys."""
    table = reader.sources().table
    columns = [table[name].to_pylist() for name in ("survey", "source_id", "ra", "dec")]
    names, hashes = [], []
    for survey, name, ra, dec in zip(*columns, strict=True):
        hashes.append(hashlib.sha256(f"{survey}/{name}".encode()).digest())
        names.append(f"{survey}/{name} at {ra} {dec}")  # two simulations give the same ids to other galaxies
    order = sorted(range(len(names)), key=hashes.__getitem__)
    order = [at for at in order if names[at] not in (taken or ())]
    size = backbone.contract.size
    dtype = np.float32 if reader.kind == "flux" else np.uint8
    pixels = _on_disk(file, dtype, (max(min(count, len(order)), 1), 3, size, size))
    keys: set[str] = set()
    with progress(f"cutouts of {Path(reader.root).name}", min(count, len(order)), quiet=quiet) as advance:
        while order and len(keys) < count:
            step = min(count - len(keys), _AT_ONCE)
            chosen, order = order[:step], order[step:]
            keys |= _cut(backbone, reader, table, chosen, names, pixels, len(keys), advance)
    if not keys:
        free = len(names) - len(taken or ())
        raise BadRequest(
            f"none of the {free:,} sources of {reader.root} can be read"
            if free > 0
            else f"all {len(names):,} sources of {reader.root} are taken to verify on; give --calibrate another SOURCE"
        )
    return pixels[: len(keys)], keys


def _cut(
    backbone: Backbone,
    reader: SourceReader,
    table: pa.Table,
    chosen: list[int],
    names: list[str],
    pixels: NDArray[Any],
    start: int,
    advance: Advance,
) -> set[str]:
    """Write the readable cutouts among the chosen rows, in the order chosen, from `start` on."""
    by_tile = sorted(range(len(chosen)), key=lambda at: str(table["source_uri"][chosen[at]]))
    found: dict[int, NDArray[Any]] = {}
    for at, cutout in reader.cutouts(table.take(pa.array([chosen[at] for at in by_tile])), backbone.contract):
        if not isinstance(cutout, Exception):
            found[by_tile[at]] = cutout.pixels
        advance(1)
    for place, at in enumerate(sorted(found)):
        pixels[start + place] = found[at]
    return {names[chosen[at]] for at in found}


def _samples(backbone: Backbone) -> dict[str, NDArray[Any]]:
    try:
        return {kind: array for kind, array in backbone.samples().items() if len(array)}
    except ArtifactNotFound:
        return {}


def _others(cut: NDArray[Any], *used: NDArray[Any] | None) -> NDArray[Any]:
    """Return the cutouts whose pixels are in none of the others: one folder may be given twice, by two names."""
    known = {_digest(image) for part in used if part is not None for image in part}
    return cut[[_digest(image) not in known for image in cut]]


def _digest(image: NDArray[Any]) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(image).tobytes()).digest()


def _joined(samples: NDArray[Any] | None, cut: NDArray[Any], file: Path) -> NDArray[Any]:
    if samples is None:
        return cut
    both = _on_disk(file, cut.dtype, (len(samples) + len(cut), *cut.shape[1:]))
    both[: len(samples)], both[len(samples) :] = samples, cut
    return both


def _on_disk(file: Path, dtype: Any, shape: tuple[int, ...]) -> NDArray[Any]:
    """Return zeros in a file that has no name any more: a process that is killed leaves nothing behind."""
    array = np.lib.format.open_memmap(file, "w+", dtype, shape)
    file.unlink()
    return array
