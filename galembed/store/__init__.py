"""The store, read side: one LanceDB directory of vectors, positions and catalogue columns.

Writing is `galembed.store.commit`'s. LanceDB is loaded when a store is opened.
"""

from __future__ import annotations

import difflib
import functools
import numbers
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from astropy.table import Table
from numpy.typing import NDArray

from galembed.errors import ArtifactNotFound, BadRequest
from galembed.files import is_url
from galembed.regions import region_filter
from galembed.schemas import FAILURES, THUMBNAIL, StoreContract, answers_of, embeddings_schema
from galembed.search import (
    HIT_COLUMNS,
    Hits,
    arrow_columns,
    asked,
    box_filter,
    check_where,
    cone_filter,
)
from galembed.store.keys import joined_key
from galembed.store.lease import writer
from galembed.store.nearest import IndexSearch, indexed_rows, nearest_rows, scan_is_faster, take_rows
from galembed.store.nearest import matrix as matrix
from galembed.store.places import EMBEDDINGS_TABLE as EMBEDDINGS_TABLE
from galembed.store.places import FAILURES_TABLE as FAILURES_TABLE
from galembed.store.places import JOB_FILE, SEARCH_FILE, first_line, join, read_json, resolve, storage_options
from galembed.store.queries import around, by_id, contrast, key_pairs, keys_of, queries, query
from galembed.store.status import Status

_OWN_COLUMNS = frozenset(embeddings_schema(1).names)


def open_store(path: str | Path) -> Store:
    """Open a store for reading.

    Parameters
    ----------
    path : str or Path
        A local directory, or the address of one on object storage (``s3://...``).

    Raises
    ------
    ArtifactNotFound
        If nothing has been embedded there, or the object storage cannot be reached.
    ArtifactMismatch
        If it is a LanceDB directory that galembed did not make.
    BadRequest
        If no store can be kept at such an address.
    """
    advice = "make a store with `galembed embed SOURCES --store PATH`"
    uri = resolve(path) if is_url(path) else str(Path(path).expanduser())
    if not is_url(uri):
        if not Path(uri).is_dir():
            what = "is a file" if Path(uri).exists() else "does not exist"
            raise ArtifactNotFound(f"no store at {uri}: it {what}; {advice}")
        if not (Path(uri) / f"{EMBEDDINGS_TABLE}.lance").is_dir():
            raise ArtifactNotFound(f"no store at {uri}: it holds no {EMBEDDINGS_TABLE} table; {advice}")
    try:
        table = _connect(uri).open_table(EMBEDDINGS_TABLE)
    except (ValueError, OSError, RuntimeError) as error:
        raise ArtifactNotFound(f"no store can be opened at {uri}: {first_line(error)}; {advice}") from error
    return Store(uri, StoreContract.from_schema(table.schema), table.schema, table)


@dataclass(frozen=True)
class Store:
    """An opened store. It shows the rows that were there when it was opened.

    Attributes
    ----------
    path : str
    contract : StoreContract
        What all rows have in common.
    schema : pa.Schema
        Columns, with units in the fields' metadata.
    table : lancedb.table.Table
        The `embeddings` table itself.
    """

    path: str
    contract: StoreContract
    schema: pa.Schema = field(repr=False)
    table: Any = field(repr=False)

    def __len__(self) -> int:
        return int(self.table.count_rows())

    @property
    def dim(self) -> int:
        """Length of the vectors."""
        return int(self.schema.field("vector").type.list_size)

    @functools.cached_property
    def dataset(self) -> Any:
        """The table as a `lance.LanceDataset`, of the same version."""
        return self.table.to_lance()

    @property
    def columns(self) -> dict[str, str]:
        """Unit of each column; "" where it has none."""
        return {item.name: (item.metadata or {}).get(b"unit", b"").decode() for item in self.schema}

    @property
    def carried(self) -> tuple[str, ...]:
        """Catalogue columns: neither galembed's own nor predictions."""
        own = _OWN_COLUMNS | set(answers_of(self.schema))
        own |= {THUMBNAIL.name} if self.contract.thumbnails else set()
        return tuple(name for name in self.schema.names if name not in own)

    @property
    def predictions(self) -> dict[str, str]:
        """Columns of predicted vote fractions and numbers, with the answer that each is for."""
        return answers_of(self.schema)

    def known(self, columns: Sequence[str]) -> list[str]:
        """Return `columns`, all of which the store has.

        Raises
        ------
        BadRequest
            If it lacks one; the nearest names are given.
        """
        for name in columns:
            if name not in self.schema.names:
                near = difflib.get_close_matches(name, self.schema.names, n=3, cutoff=0.5)
                hint = f"did you mean {', '.join(near)}?" if near else f"it has {', '.join(self.schema.names)}"
                raise BadRequest(f"the store has no column {name!r}; {hint}")
        return list(columns)

    def condition(
        self,
        where: str | None = None,
        cone: Sequence[float] | None = None,
        box: Sequence[float] | None = None,
        region: Any = None,
    ) -> str | None:
        """Return one SQL filter for what `similar` takes as four; None for all rows.

        Raises
        ------
        BadRequest
            If one of them does not fit the store.
        ArtifactNotFound, UnreadableInput
            If a region is a path at which there is no MOC.
        """
        parts = [f"({check_where(where, self.schema.names)})"] if where is not None else []
        parts += [cone_filter(cone)] if cone is not None else []
        parts += [box_filter(box)] if box is not None else []
        parts += [region_filter(region)] if region is not None else []
        return " AND ".join(parts) or None

    def batches(
        self, columns: Sequence[str], where: str | None = None, *, batch_size: int = 8192
    ) -> Iterator[pa.RecordBatch]:
        """Yield the rows in batches, in no particular order, without holding them all.

        Parameters
        ----------
        columns : sequence of str
        where : str, optional
            As in `similar`.

        Raises
        ------
        BadRequest
            If a column is not in the store, or `where` cannot be carried out.
        """
        query = self.table.search().select(self.known(columns))
        if where is not None:
            query = query.where(self.condition(where))
        try:
            yield from query.to_batches(batch_size=batch_size)
        except (ValueError, RuntimeError) as error:
            raise _refused(where, error) from error

    def vectors(self, where: str | None = None) -> tuple[Table, NDArray[np.float32]]:
        """Return keys and vectors, in the same order.

        Parameters
        ----------
        where : str, optional
            As in `similar`.

        Returns
        -------
        keys : Table
            Columns `survey` and `source_id`.
        vectors : ndarray, shape (n, dim), float32
            Unit norm.
        """
        columns = ["survey", "source_id", "vector"]
        schema = pa.schema([self.schema.field(name) for name in columns])
        table = pa.Table.from_batches(list(self.batches(columns, where)), schema=schema)
        return Table(arrow_columns(table.select(columns[:2])), copy=False), matrix(table.column("vector"))

    def rows(self, keys: Iterable[tuple[str, str]], columns: Sequence[str]) -> pa.Table:
        """Return the rows of some sources, in the order of `keys`; keys that are not here are left out.

        Parameters
        ----------
        keys : iterable of (survey, source_id)
        columns : sequence of str
        """
        wanted = list(keys)
        names = list(dict.fromkeys(["survey", "source_id", *columns]))
        found = by_id(self, [source_id for _, source_id in wanted], names)
        place = {
            key: row
            for row, key in enumerate(
                zip(found.column("survey").to_pylist(), found.column("source_id").to_pylist(), strict=True)
            )
        }
        return found.take(pa.array([place[key] for key in wanted if key in place], pa.int64())).select(list(columns))

    def failures(self) -> Table:
        """Return the sources that have no vector, and why (columns of `galembed.schemas.FAILURES`).

        A source that failed once and was embedded later is not among them.
        """
        table = self._raw_failures()
        if table.num_rows:
            keys = joined_key(table)
            embedded = [
                pc.filter(batch_keys, pc.is_in(batch_keys, value_set=keys))
                for batch_keys in map(joined_key, self.batches(["survey", "source_id"]))
            ]
            done = pa.chunked_array(embedded, keys.type).combine_chunks()
            table = table.filter(pc.invert(pc.is_in(keys, value_set=done)))
        return Table(arrow_columns(table), copy=False)

    def _raw_failures(self) -> pa.Table:
        try:
            return _connect(self.path).open_table(FAILURES_TABLE).to_arrow()
        except (ValueError, FileNotFoundError):
            return FAILURES.empty_table()

    def vector_indexes(self) -> dict[str, str]:
        """Return the vector indexes: name and kind."""
        return {index.name: str(index.index_type) for index in self.table.list_indices() if index.columns == ["vector"]}

    @functools.cached_property
    def _measured(self) -> Mapping[str, Any]:
        return read_json(join(self.path, SEARCH_FILE))

    @functools.cached_property
    def _index_kind(self) -> str:
        return next(iter(self.vector_indexes().values()), "")

    def index_search(self, kind: str) -> IndexSearch:
        """Return how an index of LanceDB's `kind` is searched: as `galembed index` found best, else amply."""
        if self._measured.get("index") == kind:
            return IndexSearch(**self._measured)
        # Bits tell distances less well than bytes do: more candidates are compared exactly.
        return IndexSearch(kind, nprobes=64, ef=128, refine=10 if kind == "IvfRq" else 3)

    def status(self) -> Status:
        """Return how many sources are embedded, how many failed and why, and how they are searched."""
        engines: Counter[str] = Counter()
        flags: Counter[str] = Counter()
        partitions: set[str] = set()
        for batch in self.batches(["engine", "flags", "partition"], batch_size=65536):
            for item in pc.value_counts(batch.column("engine")).to_pylist():
                engines[item["values"]] += item["counts"]
            for item in pc.value_counts(batch.column("flags")).to_pylist():
                flags.update(dict.fromkeys(item["values"].split(), item["counts"]))
            partitions.update(pc.unique(batch.column("partition")).to_pylist())
        name, kind = next(iter(self.vector_indexes().items()), ("", "exact"))
        statistics = self.table.index_stats(name) if name else None
        return Status(
            path=self.path,
            rows=len(self),
            carried=self.carried,
            predictions=tuple(self.predictions),
            dim=self.dim,
            failures=dict(Counter(map(str, self.failures()["reason"])).most_common()),
            contract=self.contract,
            engines=dict(engines.most_common()),
            partitions=len(partitions),
            index=kind,
            unindexed=statistics.num_unindexed_rows if statistics else 0,
            job=read_json(join(self.path, JOB_FILE)),
            writer=writer(self.path),
            flags=dict(flags.most_common()),
            index_search=self.index_search(kind) if name else None,
        )

    def similar(
        self,
        to: Any,
        k: int = 10,
        *,
        unlike: Any = None,
        where: str | None = None,
        cone: Sequence[float] | None = None,
        box: Sequence[float] | None = None,
        region: Any = None,
        exclude_self: bool = True,
        exclude: Any = None,
        exclude_within: float | None = None,
        columns: Sequence[str] | None = None,
        exact: bool = False,
    ) -> Hits:
        """Return the sources that look most like something, nearest first.

        With `unlike`, the search is along the mean direction of `to` minus that of `unlike`, each of length 1:
        relevance feedback after Rocchio (1971, in Salton, The SMART Retrieval System, ch. 14), with equal
        weights. A hit's `similarity` is then the cosine with that difference, far below 1 for the best too.

        Parameters
        ----------
        to : str, sequence of str, Hits, Row, SkyCoord, Path or array_like of shape (dim,)
            A source's id (``survey:id`` where two surveys share it), several of them or rows of a table with
            `survey` and `source_id` (their mean direction), a position (the nearest source within 5 arcsec),
            a picture or FITS cutout of the kind that the store was made from (a `Path`: text is an id), or a
            vector.
        k : int
            How many; fewer come back where fewer pass the filters.
        unlike : optional
            As `to`: what the hits should not look like.
        where : str, optional
            SQL expression over the columns, applied before the search: ``mag_r < 19 AND survey = 'legacy'``.
            A null passes no comparison.
        cone : (ra, dec, radius), optional
            ICRS deg, deg, arcsec: only sources within. Sources without a position are left out.
        box : (ra_min, ra_max, dec_min, dec_max), optional
            ICRS deg: only sources within, eastward from ra_min, so (350, 10, ...) crosses RA 0. Sources
            without a position are left out.
        region : array_like of shape (n, 2), SkyCoord, mocpy.MOC, str or Path, optional
            Only sources within a polygon, given by its corners (ICRS deg; great-circle edges, convex or not;
            the smaller side), or within a MOC, given as such or by the path of its file (FITS, JSON, ASCII).
            Sources without a position are left out.
        exclude_self : bool
            Leave out the sources that were asked about, in `to` and `unlike`.
        exclude : optional
            Sources to leave out: ids or rows, as `to`.
        exclude_within : float, optional
            Arcsec: leave out what lies so near to a source in `to`, such as the same object in another tile or
            survey. A source without a position has nothing near it.
        columns : sequence of str, optional
            Store columns to return instead of the carried ones; predictions are there when asked for.
        exact : bool
            Compare with every vector although there is an index.

        Returns
        -------
        Hits
            An astropy QTable.

        Raises
        ------
        BadRequest
            If the id, position, vector, filter, cone, box, region or a column does not fit the store.
        ArtifactNotFound, ArtifactMismatch, UnreadableInput
            If an image or a MOC cannot be read, or the image not embedded as the store's were.
        """
        names = self._hit_names(k, columns)
        condition = self.condition(where, cone, box, region)
        vector, keys = query(self, to)
        others: list[tuple[str, str]] = []
        if unlike is not None:
            away, others = query(self, unlike)
            vector = contrast(vector, away)
        skip = {*keys, *others} if exclude_self else set()
        if exclude is not None:
            skip.update(keys_of(self, exclude))
        if exclude_within is not None:
            skip.update(around(self, keys, exclude_within))
        found = self._nearest(vector[None], int(k) + len(skip), names, condition, where, exact=exact)
        if skip:
            found = found.filter(pa.array([key not in skip for key in key_pairs(found)], pa.bool_()))
        meta = {"query": [":".join(key) for key in keys], "unlike": [":".join(key) for key in others]}
        return self._hits(found.slice(0, int(k)), names, meta | asked(where, cone, box, region))

    def similar_to_each(
        self,
        to: Any,
        k: int = 10,
        *,
        where: str | None = None,
        cone: Sequence[float] | None = None,
        box: Sequence[float] | None = None,
        region: Any = None,
        exclude_self: bool = True,
        columns: Sequence[str] | None = None,
        exact: bool = False,
    ) -> Hits:
        """Return the sources most like each of many: what as many calls of `similar` find, in one.

        Without an index, or with `exact`, the store is read once for all of them.

        Parameters
        ----------
        to : sequence of str, Table or array_like of shape (n, dim)
            One query each: ids, rows of a table with `survey` and `source_id`, or vectors.
        k : int
            How many for each; fewer come back where fewer pass the filters.
        where, cone, box, region, columns, exact
            As in `similar`.
        exclude_self : bool
            Leave out of each query's hits the source that it is.

        Returns
        -------
        Hits
            With the column `query` first: the number of the query in `to`, from 0. Sorted by it, then nearest
            first. `meta["query"]` holds the keys in the order of `to`, empty for vectors.

        Raises
        ------
        BadRequest
            If an id, vector, filter, cone, box, region or a column does not fit the store.
        ArtifactNotFound, UnreadableInput
            If a region is a path at which there is no MOC.
        """
        names = self._hit_names(k, columns)
        condition = self.condition(where, cone, box, region)
        vectors, keys = queries(self, to)
        own = np.array([":".join(key) for key in keys], object) if exclude_self and keys else None
        count = int(k) + (own is not None)
        found = self._nearest(vectors, count, names, condition, where, exact=exact)
        found = _best_of_each(found, int(k), own)
        meta = {"query": [":".join(key) for key in keys], "unlike": []}
        hits = self._hits(found, names, meta | asked(where, cone, box, region))
        if "query" in hits.colnames:
            hits.rename_column("query", "catalogue_query")
        hits.add_column(found.column("query_index").to_numpy(), index=0, name="query")
        return hits

    def _hit_names(self, k: int, columns: Sequence[str] | None) -> list[str]:
        if not isinstance(k, numbers.Integral) or k < 1:
            raise BadRequest(f"k is how many sources to return, at least 1; got {k!r}")
        extra = self.carried if columns is None else self.known(columns)
        return list(dict.fromkeys([*HIT_COLUMNS, *extra]))

    def _hits(self, found: pa.Table, names: list[str], meta: Mapping[str, Any]) -> Hits:
        distance = found.column("_distance").to_numpy().astype(np.float32)
        # The index returns columns without their metadata.
        fields = pa.schema([self.schema.field(name) for name in names])
        hits = Hits(arrow_columns(found.select(names).cast(fields)), copy=False, meta={"store": self.path, **meta})
        for name in {"similarity", "distance"} & set(names):
            hits.rename_column(name, f"catalogue_{name}")
        hits.add_columns([1 - distance, distance], indexes=[0, 0], names=["similarity", "distance"])
        return hits

    def _passing(self, condition: str) -> int:
        """Return how many rows pass a filter, looked up once: it takes as long as a search."""
        if condition not in self._passed:
            self._passed[condition] = self.dataset.count_rows(condition)
        return self._passed[condition]

    @functools.cached_property
    def _passed(self) -> dict[str, int]:
        return {}

    def _nearest(
        self,
        vectors: NDArray[np.float32],
        count: int,
        names: list[str],
        condition: str | None,
        where: str | None,
        *,
        exact: bool,
    ) -> pa.Table:
        """Return the nearest rows to each of many vectors, with `_distance` and `query_index`, by which they come."""
        settings = self.index_search(self._index_kind) if self._index_kind and not exact else None
        try:
            total = self.dataset.count_rows()
            passing = self._passing(condition) if settings and condition else total
            if settings is None or scan_is_faster(passing, total, len(vectors), count, settings):
                rows, distance = nearest_rows(self.dataset, vectors, count, condition)
            else:
                share = passing / total
                rows, distance = indexed_rows(self.dataset, vectors, count, condition, settings, share)
        except (ValueError, RuntimeError, OSError) as error:
            raise _refused(where, error) from error
        query, place = np.nonzero(np.isfinite(distance))
        found = take_rows(self.dataset, self.table, self.schema, rows[query, place], names)
        found = found.append_column("_distance", pa.array(distance[query, place], pa.float32()))
        return found.append_column("query_index", pa.array(query, pa.int64()))


def _best_of_each(found: pa.Table, k: int, own: NDArray[np.object_] | None) -> pa.Table:
    """Return the k nearest of each query, sorted, without the query itself (`own`: its key, by query)."""
    found = found.sort_by([("query_index", "ascending"), ("_distance", "ascending")])
    query = found.column("query_index").to_numpy()
    if own is not None:
        keys = np.array([":".join(key) for key in key_pairs(found)], object)
        found = found.filter(pa.array(keys != own[query], pa.bool_()))
        query = found.column("query_index").to_numpy()
    place = np.arange(len(query)) - np.searchsorted(query, query)
    return found.filter(pa.array(place < k, pa.bool_()))


def _refused(where: str | None, error: Exception) -> BadRequest:
    what = f"the filter {where!r} cannot be carried out" if where else "the search cannot be carried out"
    return BadRequest(f"{what}: {first_line(error)}")


def _connect(path: str) -> Any:
    import lancedb

    return lancedb.connect(path, storage_options=storage_options(path) or None)
