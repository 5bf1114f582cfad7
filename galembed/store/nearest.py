"""The nearest rows: by LanceDB's index, as it is tuned, or by comparing with every row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

MEASURED: Final = 11
"""Hits that searches are tuned for: ten, and the stored vector itself that is asked about."""

_BATCH: Final = 4096
_FEW: Final = 256  # rows named one by one in a filter
_QUERIES: Final = 256  # in one call of Lance's batch search
_CANDIDATES: Final = 65_536  # of one such call


@dataclass(frozen=True)
class IndexSearch:
    """How a vector index is searched, and what that was measured to find.

    Attributes
    ----------
    index : str
        LanceDB's kind of index.
    nprobes : int
        Partitions looked into.
    ef : int
        Candidates that an HNSW graph keeps.
    refine : int
        Times as many candidates as hits are compared exactly.
    target : float
        The recall that was asked for; 0 if nothing was measured.
    recall : float
        Share of the true 10 nearest that were found.
    recall_filtered : float, optional
        The same with a filter.
    passing : float
        Share of the rows that passed that filter.
    queries : int
        Stored vectors that were asked about, themselves left out.
    rows : int
        Rows of the store then.
    """

    index: str
    nprobes: int
    ef: int
    refine: int
    target: float = 0.0
    recall: float = 0.0
    recall_filtered: float | None = None
    passing: float = 0.0
    queries: int = 0
    rows: int = 0

    def probes(self, count: int, share: float = 1.0) -> int:
        """Return the partitions to look into for so many hits among a share of the rows.

        As many for each `MEASURED` as were found to do for so many; the nearest among a tenth of the rows are spread
        as ten times as many among all.
        """
        return math.ceil(self.nprobes * max(1.0, count / (MEASURED * max(share, 1e-6))))

    def candidates(self, count: int) -> int:
        """Return how many rows to compare exactly for so many hits; no fewer than for `MEASURED`."""
        return self.refine * max(count, MEASURED)

    @property
    def met(self) -> bool:
        """Whether what was measured reaches the target, with the filter too."""
        return min(self.recall, self.recall if self.recall_filtered is None else self.recall_filtered) >= self.target

    def __str__(self) -> str:
        how = f"nprobes {self.nprobes}, ef {self.ef}, refine {self.refine}"
        if not self.queries:
            return how
        text = f"recall@10 {self.recall:.3f}"
        if self.recall_filtered is not None:
            text += f", {self.recall_filtered:.3f} among {self.passing:.0%} of the rows"
        text += f" ({self.queries} queries, {self.rows:,} rows; {how})"
        return text if self.met else f"{text}, short of {self.target:g}"


def matrix(column: pa.ChunkedArray | pa.Array) -> NDArray[np.float32]:
    """Return a fixed-size list column as an array, shape (n, dim), float32."""
    values = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    flat = values.flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat.reshape(-1, column.type.list_size), dtype=np.float32)


def scan_is_faster(passing: int, rows: int, queries: int, count: int, settings: IndexSearch) -> bool:
    """Tell whether comparing with every row that passes a filter is faster than searching by the index.

    Parameters
    ----------
    passing, rows : int
        Rows that pass, and all rows.
    queries, count : int
    settings : IndexSearch

    Notes
    -----
    In microseconds, as measured on two cores with vectors of 640 numbers: a row takes 5 to read in passing, 10 by a
    filter, 13 as a candidate, and 0.15 to compare; the index takes 1,500 a query, and applies the filter anew for
    each.
    """
    filtered = passing < rows
    scan = passing * ((10 if filtered else 5) + 0.15 * queries)
    index = 1500 + 13 * settings.candidates(count) + (3000 + 0.04 * rows if filtered else 0)
    return scan < queries * index


def indexed_rows(
    dataset: Any,
    vectors: NDArray[np.float32],
    count: int,
    condition: str | None,
    settings: IndexSearch,
    share: float = 1.0,
) -> tuple[NDArray[np.uint64], NDArray[np.float32]]:
    """Return the nearest rows to each of many vectors that the index finds; see `nearest_rows`.

    `share` is that of the rows that pass `condition`.

    The index gives candidates, which are compared exactly here: Lance could do that too, and takes longer. All rows
    are compared for queries that the index finds less than `count` for.
    """
    rows = np.zeros((len(vectors), count), np.uint64)
    distance = np.full((len(vectors), count), np.inf, np.float32)
    step = max(1, min(_QUERIES, _CANDIDATES // settings.candidates(count)))
    for start in range(0, len(vectors), step):
        part = vectors[start : start + step]
        query, numbers, there = _candidates(dataset, part, count, condition, settings, share)
        for here, vector in enumerate(part):
            mine = np.flatnonzero(query == here)
            away = 1 - there[mine] @ vector / np.linalg.norm(there[mine], axis=1)
            order = np.argsort(away, kind="stable")[:count]
            rows[start + here, : len(order)] = numbers[mine[order]]
            distance[start + here, : len(order)] = away[order]
    short = np.isinf(distance[:, -1])
    if short.any():
        rows[short], distance[short] = nearest_rows(dataset, vectors[short], count, condition)
    return rows, distance


def _candidates(
    dataset: Any, vectors: NDArray[np.float32], count: int, condition: str | None, settings: IndexSearch, share: float
) -> tuple[NDArray[np.int64], NDArray[np.uint64], NDArray[np.float32]]:
    """Return rows that the index thinks near: the query that each is for, Lance's number of it, and its vector."""
    wanted = settings.candidates(count)
    nearest = {"column": "vector", "q": vectors if len(vectors) > 1 else vectors[0], "k": wanted, "metric": "cosine"}
    nearest |= {"nprobes": settings.probes(count, share), "ef": max(settings.ef, wanted)}
    found = dataset.to_table(["_distance", "vector"], condition, nearest=nearest, prefilter=True, with_row_id=True)
    rows = found.column("_rowid").to_numpy()
    # Lance does not number the queries where there is one.
    query = found.column("query_index").to_numpy() if len(vectors) > 1 else np.zeros(len(rows))
    return np.asarray(query, np.int64), np.asarray(rows, np.uint64), matrix(found.column("vector"))


def nearest_rows(
    dataset: Any, vectors: NDArray[np.float32], count: int, condition: str | None = None
) -> tuple[NDArray[np.uint64], NDArray[np.float32]]:
    """Return the nearest rows to each of many vectors by comparing with every row, in one pass.

    Parameters
    ----------
    dataset : lance.LanceDataset
    vectors : ndarray, shape (n, dim), float32
        Unit norm.
    count : int
    condition : str, optional
        SQL filter.

    Returns
    -------
    rows : ndarray, shape (n, count), uint64
        Lance's row numbers, nearest first.
    distance : ndarray, shape (n, count), float32
        1 - cosine; inf where fewer than `count` rows pass.
    """
    rows = np.zeros((len(vectors), count), np.uint64)
    distance = np.full((len(vectors), count), np.inf, np.float32)
    scanner = dataset.scanner(["vector"], condition, with_row_id=True, batch_size=_BATCH)
    for batch in scanner.to_batches():
        block = matrix(batch.column("vector"))
        lengths = np.sqrt(np.einsum("ij,ij->i", block, block))
        numbers_here = np.asarray(batch.column("_rowid").to_numpy(), np.uint64)
        for start in range(0, len(vectors), 1024):
            part = slice(start, start + 1024)
            here = 1 - vectors[part] @ block.T / lengths
            if here.shape[1] > count:
                best = np.argpartition(here, count - 1, axis=1)[:, :count]
            else:
                best = np.broadcast_to(np.arange(here.shape[1]), here.shape)
            both = np.concatenate([distance[part], np.take_along_axis(here, best, axis=1)], axis=1)
            order = np.argsort(both, axis=1, kind="stable")[:, :count]
            distance[part] = np.take_along_axis(both, order, axis=1)
            rows[part] = np.take_along_axis(np.concatenate([rows[part], numbers_here[best]], axis=1), order, axis=1)
    return rows, distance


def take_rows(
    dataset: Any, table: Any, schema: pa.Schema, rows: NDArray[np.uint64], columns: Sequence[str]
) -> pa.Table:
    """Return columns of rows by Lance's numbers, in the order of `rows`, which may repeat.

    Parameters
    ----------
    dataset : lance.LanceDataset
    table : lancedb.table.Table
        The same.
    schema : pa.Schema
        With the units that the columns are to have.
    rows : ndarray, shape (n,), uint64
    columns : sequence of str
    """
    wanted_schema = pa.schema([schema.field(name) for name in columns])
    if not len(rows):
        return wanted_schema.empty_table()
    unique, places = np.unique(rows, return_inverse=True)
    if len(unique) <= _FEW:  # LanceDB takes a millisecond more for this, and Lance longer for more
        condition = f"_rowid IN ({', '.join(map(str, unique.tolist()))})"
        found = dataset.to_table(list(columns), condition, with_row_id=True)
    else:
        found = table.take_row_ids(unique.tolist()).select(list(columns)).with_row_id().to_arrow()
    order = np.argsort(found.column("_rowid").to_numpy())
    return found.select(list(columns)).take(pa.array(order[places])).cast(wanted_schema)
