"""Reading a store in one pass: filters, rows by number, and samples that do not depend on the order of the rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from galembed.errors import BadRequest
from galembed.labels import source_hashes
from galembed.store import Store, matrix
from galembed.store.nearest import take_rows
from galembed.store.places import first_line

ROW: Final = "_rowid"
"""Lance's number of a row, uint64: holds for as long as the store stays open."""

BATCH: Final = 4096


@dataclass(frozen=True)
class Sample:
    """Sources drawn at random.

    Attributes
    ----------
    rows : ndarray, shape (n,), uint64
        Row numbers, in random order.
    vectors : ndarray, shape (n, dim), float32
    total : int
        Sources they were drawn from.
    """

    rows: NDArray[np.uint64]
    vectors: NDArray[np.float32]
    total: int


def row_filter(
    store: Store,
    where: str | None = None,
    cone: Sequence[float] | None = None,
    box: Sequence[float] | None = None,
    region: Any = None,
    *,
    unflagged: bool = False,
) -> str | None:
    """Return one SQL filter for the rows asked for; None for all rows.

    Parameters
    ----------
    where, cone, box, region
        As in `Store.similar`.
    unflagged : bool
        Only rows whose `flags` are empty.

    Raises
    ------
    BadRequest
        If one of them does not fit the store.
    """
    parts = [store.condition(where, cone, box, region), "flags = ''" if unflagged else None]
    return " AND ".join(filter(None, parts)) or None


def scan(store: Store, columns: Sequence[str], condition: str | None = None) -> Iterator[pa.RecordBatch]:
    """Yield columns and row numbers (`ROW`) of the rows that pass `row_filter`'s condition, in batches.

    Raises
    ------
    BadRequest
        If the condition cannot be carried out.
    """
    query = store.table.search().select(list(columns)).with_row_id(True)
    if condition is not None:
        query = query.where(condition)
    try:
        yield from query.to_batches(batch_size=BATCH)
    except (ValueError, RuntimeError) as error:
        raise BadRequest(f"the filter {condition!r} cannot be carried out: {first_line(error)}") from error


def row_numbers(batch: pa.RecordBatch) -> NDArray[np.uint64]:
    """Return the row numbers of a batch of `scan`, shape (n,)."""
    return np.array(batch.column(ROW).to_numpy(), np.uint64)


def take(store: Store, rows: NDArray[np.uint64], columns: Sequence[str]) -> pa.Table:
    """Return columns of rows by their numbers, in the order of `rows`, units in the schema.

    Parameters
    ----------
    rows : ndarray, shape (n,), uint64
        As `scan` gave them; may repeat.
    """
    return take_rows(store.dataset, store.table, store.schema, rows, columns)


def draw_sample(store: Store, size: int, *, seed: int = 0, condition: str | None = None) -> Sample:
    """Draw sources at random, each with the same chance.

    A source is drawn by its key and the seed alone, so that neither the order of the rows nor how the store is cut
    into files plays a part.

    Parameters
    ----------
    size : int
        Sources to draw; all of them where there are fewer.
    seed : int
    condition : str, optional
        See `row_filter`.
    """
    word = np.random.default_rng(seed).integers(2**64, dtype=np.uint64)
    chance, rows = np.empty(0, np.uint64), np.empty(0, np.uint64)
    vectors = np.empty((0, store.dim), np.float32)
    total = 0
    for batch in scan(store, ["survey", "source_id", "vector"], condition):
        total += batch.num_rows
        mine = source_hashes(batch) ^ word
        low = np.flatnonzero(mine < chance[-1]) if len(chance) == size else np.arange(len(mine))
        if not len(low):
            continue
        chance = np.concatenate([chance, mine[low]])
        order = np.argsort(chance, kind="stable")[:size]
        chance = chance[order]
        rows = np.concatenate([rows, row_numbers(batch)[low]])[order]
        vectors = np.concatenate([vectors, matrix(batch.column("vector"))[low]])[order]
    return Sample(rows, vectors, total)


def silent(stage: str, done: int, total: int) -> None:
    """Show no progress (a `galembed.progress.Show`)."""
