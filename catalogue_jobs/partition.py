"""One partition: rows in, vectors and failures out. Pure but for the reader, which opens files."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from galembed.backbones import InputContract
from galembed.cutouts import Cutout
from galembed.errors import GalembedError, UnreadableInput
from galembed.runtimes import Embedded, Runtime
from galembed.schemas import FAILURES, THUMBNAIL, StoreContract, conform
from galembed.sky import healpix_index
from galembed.sources import SourceReader
from galembed.thumbnails import thumbnail

_READING: Final = ("unreadable", "missing_band", "unknown_unit", "unexpected", "not_found", "mismatch")
_LONGEST_MESSAGE: Final = 600
_STRINGS: Final = pa.list_(pa.string())
_NO_PIXELS: Final = np.empty((3, 0, 0), np.float32)


@dataclass(frozen=True)
class Timings:
    """Seconds spent in each stage.

    Attributes
    ----------
    read : float
        As far as the reader tells: a cutout may have a `read_seconds`.
    cut : float
        The rest of the time spent in the reader, and in making thumbnails.
    wait : float
        Until the engine was free: another partition was in it.
    infer, write : float
    """

    read: float = 0.0
    cut: float = 0.0
    wait: float = 0.0
    infer: float = 0.0
    write: float = 0.0

    def __add__(self, other: Timings) -> Timings:
        return Timings(*(getattr(self, item.name) + getattr(other, item.name) for item in fields(self)))


@dataclass(frozen=True)
class Outcome:
    """What became of a partition's rows: each is in one of the two tables.

    Attributes
    ----------
    embeddings, failures : pa.Table
        In the store's schemas.
    timings : Timings
    tiles_opened : int
        Survey tiles opened for it, as far as the reader tells.
    """

    embeddings: pa.Table
    failures: pa.Table
    timings: Timings
    tiles_opened: int = 0


class UnexpectedError(GalembedError):
    """A reader raised something that it does not raise on purpose."""

    reason = "unexpected"


class _NonFiniteError(GalembedError):
    reason = "non_finite"


class _ZeroNormError(GalembedError):
    reason = "zero_norm"


@dataclass
class _Collected:
    """Vectors of the rows that worked, and reasons of those that did not."""

    rows: list[int] = field(default_factory=list)
    cutouts: list[Cutout] = field(default_factory=list)
    vectors: list[Embedded] = field(default_factory=list)
    thumbnails: dict[int, bytes] = field(default_factory=dict)
    failures: list[tuple[int, str, GalembedError]] = field(default_factory=list)


def embed_partition(
    rows: pa.Table,
    reader: SourceReader,
    runtime: Runtime,
    contract: InputContract,
    schema: pa.Schema,
    *,
    partition: str,
    batch: int | None = None,
    turn: AbstractContextManager[Any] | None = None,
) -> Outcome:
    """Embed the sources of one partition.

    A source that cannot be read or cut, for whatever reason, and one whose vector is not finite become
    failures. What the runtime raises is no source's fault and goes up.

    Parameters
    ----------
    rows : pa.Table
        Source list rows, carried columns included.
    schema : pa.Schema
        Of the store's `embeddings`; with a `thumbnail`, each row gets one.
    partition : str
        Its name, for each row.
    batch : int, optional
        Images given to the runtime at once; the runtime's own number unless given.
    turn : context manager, optional
        Entered for each call of the runtime: a lock that partitions of one process share.
    """
    turn = turn or nullcontext()
    batch = batch or runtime.batch
    collected = _Collected()
    read = cut = wait = infer = 0.0
    tiles_opened = 0
    waiting: list[tuple[int, Cutout]] = []

    def flush() -> None:
        nonlocal wait, infer
        asked = time.perf_counter()
        with turn:
            start = time.perf_counter()
            _infer(waiting, runtime, reader.kind, collected)
            infer += time.perf_counter() - start
        wait += start - asked
        waiting.clear()

    side = StoreContract.from_schema(schema).thumbnails if THUMBNAIL.name in schema.names else 0
    outcomes = cut_all(rows, reader, contract)
    while True:
        start = time.perf_counter()
        item = next(outcomes, None)
        cut += time.perf_counter() - start
        if item is None:
            break
        number, outcome = item
        if isinstance(outcome, GalembedError):
            collected.failures.append((number, "read" if outcome.reason in _READING else "cut", outcome))
            continue
        read += outcome.read_seconds
        tiles_opened += outcome.tiles_opened
        if side:
            start = time.perf_counter()
            collected.thumbnails[number] = thumbnail(outcome.pixels, contract.mapping, side)
            cut += time.perf_counter() - start
        waiting.append((number, outcome))
        if len(waiting) >= batch:
            flush()
    if waiting:
        flush()
    return Outcome(
        _embeddings(rows, collected, schema, reader.kind, runtime.engine, partition),
        failure_rows(rows, collected.failures, partition),
        Timings(read=min(read, cut), cut=max(cut - read, 0.0), wait=wait, infer=infer),
        tiles_opened,
    )


def cut_all(
    rows: pa.Table, reader: SourceReader, contract: InputContract
) -> Iterator[tuple[int, Cutout | GalembedError]]:
    """Yield (row number, cutout or why there is none) once for each row, whatever the reader raises.

    A reader that raises takes the rest of its rows with it: they are then tried one by one up to the culprit,
    and the rest together again.
    """
    size = contract.size
    remaining = np.arange(len(rows))
    alone = False
    while len(remaining):
        numbers = remaining[:1] if alone else remaining
        seen = np.zeros(len(rows), bool)
        try:
            for at, outcome in reader.cutouts(rows.take(pa.array(numbers)), contract):
                number = int(numbers[at])
                if not seen[number]:
                    seen[number] = True
                    yield number, _checked(outcome, reader.kind, size)
        except Exception as error:
            if len(numbers) == 1 and not seen[numbers[0]]:
                seen[numbers[0]] = True
                yield int(numbers[0]), _unexpected(error)
                alone = False
            else:
                alone = True
        else:
            for number in numbers[~seen[numbers]]:
                seen[number] = True
                yield int(number), UnexpectedError("the reader returned nothing for this source")
        remaining = remaining[~seen[remaining]]


def failure_rows(rows: pa.Table, failures: list[tuple[int, str, GalembedError]], partition: str) -> pa.Table:
    """Return failures as a table.

    Parameters
    ----------
    rows : pa.Table
        Source list rows.
    failures : list of (row number, stage, error)
    """
    taken = rows.take(pa.array([number for number, _, _ in failures], pa.int64()))
    count = len(failures)
    columns: dict[str, Any] = {
        name: taken[name] for name in ("survey", "source_id", "ra", "dec", "source_uri", "source_version")
    } | {
        "stage": [stage for _, stage, _ in failures],
        "reason": [error.reason for _, _, error in failures],
        "message": [str(error)[:_LONGEST_MESSAGE] for _, _, error in failures],
        "attempts": [1] * count,
        "time": pa.array([datetime.now(UTC)] * count, FAILURES.field("time").type),
        "partition": [partition] * count,
    }
    return _table(columns, FAILURES)


def _checked(outcome: Cutout | GalembedError, kind: str, size: int) -> Cutout | GalembedError:
    if isinstance(outcome, GalembedError):
        return outcome
    dtype = np.dtype(np.float32 if kind == "flux" else np.uint8)
    if outcome.pixels.shape != (3, size, size) or outcome.pixels.dtype != dtype:
        return UnexpectedError(
            f"the reader gave {outcome.pixels.dtype} {outcome.pixels.shape}, not {dtype} {(3, size, size)}"
        )
    return outcome


def _unexpected(error: Exception) -> GalembedError:
    if isinstance(error, GalembedError):
        return error
    if isinstance(error, FileNotFoundError):
        return UnreadableInput(f"{error.filename} is missing; bring it back, then use --retry-failed")
    return UnexpectedError(f"{type(error).__name__}: {error}")


def _infer(batch: list[tuple[int, Cutout]], runtime: Runtime, kind: str, collected: _Collected) -> None:
    result = runtime.embed(np.stack([cutout.pixels for _, cutout in batch]), kind)
    finite = (
        np.isfinite(result.vectors).all(axis=1)
        & np.isfinite(result.norms)
        & np.isfinite(result.predictions).all(axis=1)
    )
    # The unit vector of a zero norm has no direction, whatever the division gave.
    good = finite & (result.norms > 0) & (result.vectors != 0).any(axis=1)
    for at in np.flatnonzero(~good):
        error = (
            _ZeroNormError("the vector has length zero: the image is featureless to this backbone")
            if finite[at]
            else _NonFiniteError("the network returned NaN or infinity for this image")
        )
        collected.failures.append((batch[at][0], "infer", error))
    collected.vectors.append(Embedded(result.vectors[good], result.norms[good], result.predictions[good]))
    for at in np.flatnonzero(good):
        number, cutout = batch[at]
        collected.rows.append(number)
        collected.cutouts.append(replace(cutout, pixels=_NO_PIXELS))


def _embeddings(
    rows: pa.Table, collected: _Collected, schema: pa.Schema, kind: str, engine: str, partition: str
) -> pa.Table:
    count = len(collected.rows)
    if not count:
        return schema.empty_table()
    taken = rows.take(pa.array(collected.rows, pa.int64()))
    vectors = np.concatenate([result.vectors for result in collected.vectors]).astype(np.float32)
    predictions = np.concatenate([result.predictions for result in collected.vectors]).astype(np.float32)
    ra, dec, healpix = _positions(taken, collected)
    names = schema.names[len(schema.names) - predictions.shape[1] :]
    columns: dict[str, Any] = {name: taken[name] for name in taken.column_names if name in schema.names}
    for name in {name for cutout in collected.cutouts for name in cutout.carried}:
        values = np.array([cutout.carried.get(name, np.nan) for cutout in collected.cutouts], np.float32)
        columns[name] = pa.array(values, mask=~np.isfinite(values))
    columns |= {
        "ra": ra,
        "dec": dec,
        "_healpix_29": healpix,
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1]),
        "norm": np.concatenate([result.norms for result in collected.vectors]),
        "coverage": np.array([cutout.coverage for cutout in collected.cutouts], np.float32),
        "fov": pa.array([cutout.fov_arcsec for cutout in collected.cutouts], pa.float32()),
        "flags": [cutout.flags for cutout in collected.cutouts],
        "neighbours": pa.array([list(cutout.neighbours) or None for cutout in collected.cutouts], _STRINGS),
        "input_kind": [kind] * count,
        "engine": [engine] * count,
        "partition": [partition] * count,
    }
    if collected.thumbnails:
        columns[THUMBNAIL.name] = pa.array([collected.thumbnails[row] for row in collected.rows], THUMBNAIL.type)
    columns |= {name: predictions[:, at] for at, name in enumerate(names)}
    return _table(columns, schema)


def _positions(taken: pa.Table, collected: _Collected) -> tuple[pa.Array, pa.Array, pa.Array]:
    """Return ra, dec and HEALPix index: the source list's, else the cutout's, else null."""
    listed = zip(taken["ra"].to_pylist(), taken["dec"].to_pylist(), strict=True)
    pairs = [
        (ra, dec) if ra is not None and dec is not None else (cutout.ra, cutout.dec)
        for (ra, dec), cutout in zip(listed, collected.cutouts, strict=True)
    ]
    ra, dec = (np.array([pair[at] for pair in pairs], np.float64) for at in (0, 1))
    known = np.isfinite(ra) & np.isfinite(dec)
    healpix: NDArray[np.int64] = np.zeros(len(ra), np.int64)
    healpix[known] = healpix_index(ra[known], dec[known])
    return pa.array(ra % 360, mask=~known), pa.array(dec, mask=~known), pa.array(healpix, mask=~known)


def _table(columns: dict[str, Any], schema: pa.Schema) -> pa.Table:
    return conform(pa.table({name: columns[name] for name in schema.names if name in columns}), schema)
