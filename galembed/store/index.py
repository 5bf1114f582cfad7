"""Building a store's indexes."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any, Final

from galembed.errors import BadRequest
from galembed.store import Store

EXACT_BELOW: Final = 100_000
"""Rows below which a store is searched exactly: a scan takes a fraction of a second and misses nothing."""


@dataclass(frozen=True)
class IndexReport:
    """What `build_index` did.

    Attributes
    ----------
    rows : int
    kind : str
        ``exact``, ``hnsw`` or ``rq``.
    scalar : tuple of str
        Columns that got a BTREE index, for filters and cones.
    seconds : float
    """

    rows: int
    kind: str
    scalar: tuple[str, ...]
    seconds: float

    def __str__(self) -> str:
        how = {
            "exact": f"search is exact, with no vector index (worth one from {EXACT_BELOW:,} rows)",
            "hnsw": "vector index IVF_HNSW_SQ built",
            "rq": "vector index IVF_RQ built",
        }[self.kind]
        filters = f"filters use {' and '.join(self.scalar)}" if self.scalar else "no filter index on an empty store"
        return f"{self.rows:,} rows: {how}; {filters}; {self.seconds:.1f} s"


INDEX_KINDS: Final = ("auto", "exact", "hnsw", "rq")


def build_index(store: Store, kind: str = "auto") -> IndexReport:
    """Build the indexes of a store.

    Parameters
    ----------
    store : Store
    kind : str
        ``exact``: none on the vectors, and an existing one is dropped. ``hnsw``: IVF_HNSW_SQ, the best
        recall. ``rq``: IVF_RQ, built some ten times faster. ``auto``: exact below 100,000 rows, else hnsw.

    Raises
    ------
    BadRequest
        If the kind is unknown, or LanceDB cannot build it on these rows.
    """
    from lancedb.index import BTree

    if kind not in INDEX_KINDS:
        raise BadRequest(f"index kind {kind!r} is unknown; choose one of {', '.join(INDEX_KINDS)}")
    started = time.monotonic()
    rows = len(store)
    if kind == "auto":
        kind = "exact" if rows < EXACT_BELOW else "hnsw"
    scalar = ("_healpix_29", "source_id") if rows else ()
    for column in scalar:
        store.table.create_index(column, config=BTree(), replace=True)
    if kind == "exact":
        for index in store.vector_indexes():
            store.table.drop_index(index)
    else:
        _build_vector_index(store, kind, rows)
    return IndexReport(rows, kind, scalar, time.monotonic() - started)


def _build_vector_index(store: Store, kind: str, rows: int) -> None:
    from lancedb.index import HnswSq, IvfRq

    config: Any
    if kind == "hnsw":
        config = HnswSq(distance_type="cosine", num_partitions=max(1, math.ceil(rows / 500_000)))
    else:
        config = IvfRq(distance_type="cosine", num_partitions=max(1, rows // 4096), max_iterations=10)
    try:
        store.table.create_index("vector", config=config, replace=True)
    except (ValueError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise BadRequest(f"LanceDB built no {kind} index on {rows} rows: {reason}; use the kind exact") from error
