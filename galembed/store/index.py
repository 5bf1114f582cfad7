"""Building a store's indexes, and finding how to search them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from galembed.errors import BadRequest
from galembed.store import Store
from galembed.store.keys import open_table
from galembed.store.nearest import MEASURED, IndexSearch, indexed_rows, matrix, nearest_rows
from galembed.store.places import EMBEDDINGS_TABLE, SEARCH_FILE, join, unless_preempted, write_json

EXACT_BELOW: Final = 64_000_000
"""Numbers (rows x length of the vectors) below which a store is searched exactly: 100,000 rows of 640, a scan of
which takes a fraction of a second and misses nothing."""

FOLD_BELOW: Final = 0.2
"""Share of the rows up to which new ones are folded into the index that is there; with more it is built anew."""

INDEX_KINDS: Final = ("auto", "exact", "hnsw", "rq")

_LANCE_KINDS: Final = {"hnsw": "IvfHnswSq", "rq": "IvfRq"}
_RQ_ROWS = 4096  # of a partition, at least
_RQ_PARTITIONS = 256  # building takes rows times partitions, and reading larger ones costs little
_K = MEASURED - 1
_QUERIES = 200
_TIE = 1e-6  # of a cosine distance in float32


@dataclass(frozen=True)
class IndexReport:
    """What `build_index` did.

    Attributes
    ----------
    rows : int
    kind : str
        ``exact``, ``hnsw`` or ``rq``.
    scalar : tuple of str
        Columns that have a BTREE index, for filters and cones.
    seconds : float
    folded : int, optional
        Rows that an index that was there did not hold before; None if it was built.
    search : IndexSearch, optional
        How it is searched from now on, and what that finds.
    """

    rows: int
    kind: str
    scalar: tuple[str, ...]
    seconds: float
    folded: int | None = None
    search: IndexSearch | None = None

    def __str__(self) -> str:
        if self.kind == "exact":
            how = f"search is exact, with no vector index (worth one from {EXACT_BELOW:,} numbers)"
        else:
            name = {"hnsw": "IVF_HNSW_SQ", "rq": "IVF_RQ"}[self.kind]
            done = "built" if self.folded is None else f"kept, {self.folded:,} new rows folded in"
            how = f"vector index {name} {done}"
        filters = f"filters use {', '.join(self.scalar)}" if self.scalar else "no filter index on an empty store"
        text = f"{self.rows:,} rows: {how}; {filters}; {self.seconds:.1f} s"
        if self.search is not None:
            text += f"\n{self.search}"
            text += "" if self.search.met else "; `galembed search --exact` misses nothing"
        return text


def build_index(store: Store, kind: str = "auto", *, recall: float = 0.95, columns: Sequence[str] = ()) -> IndexReport:
    """Build the indexes of a store, and find how to search its vectors.

    An index of that kind that lacks at most a fifth of the rows is kept, and they are folded in. Then stored
    vectors are searched for, more and more thoroughly, until the share of the true 10 nearest that is found
    reaches `recall`, both among all rows and with a filter that passes about a tenth of them (a part of the
    sky). `Store.similar` searches so from then on.

    Parameters
    ----------
    store : Store
    kind : str
        ``exact``: none on the vectors, and an existing one is dropped. ``rq``: IVF_RQ. ``hnsw``: IVF_HNSW_SQ, a
        graph, which takes many times as long to build, and more memory. ``auto``: exact below 64 million numbers
        (100,000 rows of 640), then rq.
    recall : float
        In (0, 1].
    columns : sequence of str
        Columns that `where` often names, of numbers or text: they get a BTREE index as positions and ids always do,
        and keep it.

    Raises
    ------
    BadRequest
        If the kind is unknown, `recall` is out of range, the store lacks a column, or LanceDB cannot build an index on
        these rows.
    """
    if kind not in INDEX_KINDS:
        raise BadRequest(f"index kind {kind!r} is unknown; choose one of {', '.join(INDEX_KINDS)}")
    if not 0 < recall <= 1:
        raise BadRequest(f"recall is the share of the nearest to find, above 0 and up to 1; got {recall!r}")
    columns = store.known(columns)
    started = time.monotonic()
    _renew(store)
    rows = len(store)
    if kind == "auto":
        kind = _kind_for(rows * store.dim)
    if kind != "exact" and not rows:
        raise BadRequest(f"the store {store.path} holds no rows to build an index {kind} on; use the kind exact")
    lacking = _lacking(store, kind)
    folded = lacking if lacking is not None and lacking <= FOLD_BELOW * rows else None
    indexed = [name for index in store.table.list_indices() for name in index.columns if name != "vector"]
    scalar = tuple(dict.fromkeys(("_healpix_29", "source_id", *indexed, *columns))) if rows else ()
    for column in scalar:
        if folded is None or column not in indexed:
            _build_scalar_index(store, column)
    if folded is not None:
        _fold(store)
    elif kind == "exact":
        for index in store.vector_indexes():
            store.table.drop_index(index)
    else:
        _build_vector_index(store, kind, rows)
    _renew(store)
    settings = None
    if kind != "exact":
        settings = _tuned(store, kind, recall)
        write_json(join(store.path, SEARCH_FILE), asdict(settings))
        _renew(store)
    return IndexReport(rows, kind, scalar, time.monotonic() - started, folded, settings)


def _renew(store: Store) -> None:
    """Have the store show its newest rows and indexes."""
    store.table.checkout_latest()
    for name in ("dataset", "_index_kind", "_measured", "_passed"):
        vars(store).pop(name, None)


def _kind_for(numbers: int) -> str:
    return "exact" if numbers < EXACT_BELOW else "rq"


def _lacking(store: Store, kind: str) -> int | None:
    """Return how many rows an index of this kind lacks; None if there is none."""
    for name, lance_kind in store.vector_indexes().items():
        if lance_kind == _LANCE_KINDS.get(kind):
            return int(store.table.index_stats(name).num_unindexed_rows)
    return None


def _fold(store: Store) -> None:
    # LanceDB's own `optimize` would also merge files and remove old versions, which readers may have open.
    unless_preempted(lambda: open_table(store.path, EMBEDDINGS_TABLE).optimize.optimize_indices())


def _build_scalar_index(store: Store, column: str) -> None:
    from lancedb.index import BTree

    try:
        _create_index(store, column, BTree())
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise BadRequest(f"column {column} cannot be indexed: {reason}; name columns of numbers or text") from error


def _build_vector_index(store: Store, kind: str, rows: int) -> None:
    from lancedb.index import HnswSq, IvfRq

    config: Any
    if kind == "hnsw":
        config = HnswSq(distance_type="cosine", num_partitions=_partitions(kind, rows))
    else:
        config = IvfRq(distance_type="cosine", num_partitions=_partitions(kind, rows), max_iterations=10)
    try:
        _create_index(store, "vector", config)
    except (ValueError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise BadRequest(f"LanceDB built no {kind} index on {rows} rows: {reason}; use the kind exact") from error


def _create_index(store: Store, column: str, config: Any) -> None:
    def create() -> None:
        store.table.checkout_latest()
        store.table.create_index(column, config=config, replace=True)

    unless_preempted(create)


def _partitions(kind: str, rows: int) -> int:
    if kind == "hnsw":
        return max(1, math.ceil(rows / 500_000))
    return max(1, min(rows // _RQ_ROWS, _RQ_PARTITIONS))


def _ways(kind: str, rows: int) -> Iterator[IndexSearch]:
    """Yield ways to search an index, from the fastest to the most thorough."""
    # An index that rows were folded into may have fewer partitions: asking for more than there are does no harm.
    partitions, name = _partitions(kind, rows), _LANCE_KINDS[kind]
    if kind == "hnsw":
        for ef, refine in ((32, 1), (64, 2), (128, 3), (256, 5), (512, 10), (1024, 20), (2048, 50)):
            yield IndexSearch(name, nprobes=partitions, ef=ef, refine=refine)
        return
    probed = [2**power for power in range(partitions.bit_length()) if 2**power < partitions]
    tried = [(nprobes, refine) for nprobes in (*probed, partitions) for refine in (3, 10)]
    for nprobes, refine in (*tried, (partitions, 30), (partitions, 100)):
        yield IndexSearch(name, nprobes=nprobes, ef=128, refine=refine)


@dataclass(frozen=True)
class _Questions:
    """Stored vectors, and how far their 10th nearest row truly is, among those that pass a filter, a share of all."""

    rows: NDArray[np.uint64]
    vectors: NDArray[np.float32]
    condition: str | None
    share: float
    reach: NDArray[np.float32]
    there: NDArray[np.intp]


def _tuned(store: Store, kind: str, recall: float) -> IndexSearch:
    """Return the fastest way that reaches `recall`; the last one where none does."""
    rows = len(store)
    chosen = np.sort(np.random.default_rng(0).choice(rows, min(rows, _QUERIES), replace=False))
    taken = store.table.take_offsets(chosen.tolist()).select(["vector", "_healpix_29"]).with_row_id().to_arrow()
    vectors = matrix(taken.column("vector"))
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    numbers = np.asarray(taken.column("_rowid").to_numpy(), np.uint64)
    everything = _questions(store, numbers, vectors, None)
    cells = taken.column("_healpix_29").drop_null().to_numpy()
    part = None
    if len(cells):
        part = _questions(store, numbers, vectors, f"_healpix_29 <= {int(np.quantile(cells, 0.1))}")
    for way in _ways(kind, rows):
        settings = replace(
            way,
            target=recall,
            recall=_found(store, everything, way),
            recall_filtered=_found(store, part, way) if part is not None else None,
            passing=part.share if part is not None else 0.0,
            queries=len(chosen),
            rows=rows,
        )
        if settings.met:
            break
    return settings


def _questions(
    store: Store, rows: NDArray[np.uint64], vectors: NDArray[np.float32], condition: str | None
) -> _Questions:
    found, distance = nearest_rows(store.dataset, vectors, MEASURED, condition)
    others = np.sort(np.where(found == rows[:, None], np.inf, distance), axis=1)[:, :_K]
    there = np.isfinite(others).sum(axis=1)
    reach = np.where(there, others[np.arange(len(others)), np.maximum(there, 1) - 1], -np.inf)
    share = store.dataset.count_rows(condition) / len(store)
    return _Questions(rows, vectors, condition, share, reach.astype(np.float32), there)


def _found(store: Store, questions: _Questions, way: IndexSearch) -> float:
    """Return the share of the true nearest that a way finds; rows as near as the last of them count."""
    if not questions.there.any():
        return 1.0
    condition, share = questions.condition, questions.share
    rows, distance = indexed_rows(store.dataset, questions.vectors, MEASURED, condition, way, share)
    near = (distance <= questions.reach[:, None] + _TIE) & (rows != questions.rows[:, None])
    counts = np.minimum(near.sum(axis=1), questions.there)
    return float(counts.sum() / questions.there.sum())
