"""The nearest rows: by LanceDB's index, as it is tuned, or by comparing with every row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


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


def vector_query(
    table: Any, vectors: NDArray[np.float32], count: int, condition: str | None, settings: IndexSearch | None
) -> Any:
    """Return LanceDB's query for the nearest rows to one vector or many; exact without `settings`."""
    query = table.search(vectors, vector_column_name="vector").distance_type("cosine").limit(count)
    if condition is not None:
        query = query.where(condition, prefilter=True)
    if settings is None:
        return query.bypass_vector_index()
    query = query.nprobes(settings.nprobes).refine_factor(settings.refine)
    return query.ef(max(settings.ef, settings.refine * count))


def query_numbers(found: pa.Table) -> NDArray[np.int64]:
    """Return which of its vectors each row of a batch search is for; LanceDB does not say it for one vector."""
    if "query_index" not in found.column_names:
        return np.zeros(found.num_rows, np.int64)
    return np.asarray(found.column("query_index").to_numpy(), np.int64)


def nearest_rows(
    table: Any, vectors: NDArray[np.float32], count: int, condition: str | None = None
) -> tuple[NDArray[np.uint64], NDArray[np.float32]]:
    """Return the nearest rows to each of many vectors by comparing with every row, in one pass.

    Parameters
    ----------
    table : lancedb.table.Table
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
    query = table.search().select(["vector"]).with_row_id(True)
    if condition is not None:
        query = query.where(condition)
    for batch in query.to_batches(batch_size=4096):
        block = matrix(batch.column("vector"))
        block = block / np.linalg.norm(block, axis=1, keepdims=True)
        numbers_here = np.asarray(batch.column("_rowid").to_numpy(), np.uint64)
        for start in range(0, len(vectors), 1024):
            part = slice(start, start + 1024)
            here = 1 - vectors[part] @ block.T
            if here.shape[1] > count:
                best = np.argpartition(here, count - 1, axis=1)[:, :count]
            else:
                best = np.broadcast_to(np.arange(here.shape[1]), here.shape)
            both = np.concatenate([distance[part], np.take_along_axis(here, best, axis=1)], axis=1)
            order = np.argsort(both, axis=1, kind="stable")[:, :count]
            distance[part] = np.take_along_axis(both, order, axis=1)
            rows[part] = np.take_along_axis(np.concatenate([rows[part], numbers_here[best]], axis=1), order, axis=1)
    return rows, distance


def take_rows(table: Any, schema: pa.Schema, rows: NDArray[np.uint64], columns: Sequence[str]) -> pa.Table:
    """Return columns of rows by Lance's numbers, in the order of `rows`, which may repeat.

    Parameters
    ----------
    table : lancedb.table.Table
    schema : pa.Schema
        With the units that the columns are to have.
    rows : ndarray, shape (n,), uint64
    columns : sequence of str
    """
    wanted_schema = pa.schema([schema.field(name) for name in columns])
    if not len(rows):
        return wanted_schema.empty_table()
    found = table.take_row_ids(np.unique(rows).tolist()).select(list(columns)).with_row_id().to_arrow()
    numbers = found.column("_rowid").to_numpy()
    order = np.argsort(numbers)
    places = order[np.searchsorted(numbers, rows, sorter=order)]
    return found.take(pa.array(places)).select(list(columns)).cast(wanted_schema)
