"""The store, read side: one LanceDB directory of vectors, positions and catalogue columns.

Writing is `galembed.store.commit`'s. LanceDB is loaded when a store is opened.
"""

from __future__ import annotations

import difflib
import math
import numbers
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from astropy.coordinates import SkyCoord
from astropy.table import Row, Table
from numpy.typing import NDArray

from galembed.errors import ArtifactNotFound, BadRequest
from galembed.files import is_url
from galembed.schemas import FAILURES, StoreContract, answers_of, embeddings_schema
from galembed.search import (
    HIT_COLUMNS,
    Hits,
    any_of,
    arrow_columns,
    check_cone,
    check_where,
    cone_filter,
    unit_vector,
)
from galembed.sky import separation_arcsec
from galembed.store.jobs import job_text, worker_lines
from galembed.store.lease import writer
from galembed.store.places import first_line, join, read_json, resolve, storage_options

EMBEDDINGS_TABLE: Final = "embeddings"
FAILURES_TABLE: Final = "failures"
JOB_FILE: Final = "job.json"
"""Account of the last embedding job, beside the tables."""

POSITION_TOLERANCE_ARCSEC: Final = 5.0
"""How far the source may lie from a position that is asked about."""

_OWN_COLUMNS = frozenset(embeddings_schema(1).names)
_CHUNK = 500  # ids per SQL filter


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
class Status:
    """The state of a store; `str` gives it for reading.

    Attributes
    ----------
    path : str
    rows : int
        Embedded sources.
    dim : int
        Length of the vectors.
    failures : mapping of str to int
        Sources without a vector, by reason.
    contract : StoreContract
    engines : mapping of str to int
        Rows made by each engine.
    partitions : int
        Units of work among the rows.
    index : str
        Kind of vector index, or ``exact``.
    unindexed : int
        Rows that the vector index does not hold; they are searched exactly, which costs time.
    job : mapping
        Account of the last embedding job; empty if there is none.
    writer : str, optional
        The job that is writing it now.
    carried : tuple of str
        Catalogue columns.
    predictions : tuple of str
        Columns of predicted vote fractions and numbers.
    flags : mapping of str to int
        Rows with each warning about the picture (`galembed.quality.FLAGS`).
    """

    path: str
    rows: int
    dim: int
    failures: Mapping[str, int]
    contract: StoreContract
    engines: Mapping[str, int]
    partitions: int
    index: str
    unindexed: int
    job: Mapping[str, Any] = field(default_factory=dict)
    writer: str | None = None
    carried: tuple[str, ...] = ()
    predictions: tuple[str, ...] = ()
    flags: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        contract = self.contract
        bands = ", ".join(f"{role} = {band}" for role, band in contract.bands.items())
        failed = ", ".join(f"{count:,} {reason}" for reason, count in self.failures.items())
        index = self.index if self.index == "exact" else f"{self.index} ({self.unindexed:,} rows not in it)"
        head = f"{len(self.predictions)} predictions, from {self.predictions[0]}" if self.predictions else "none"
        lines = {
            "store": self.path,
            "sources": f"{self.rows:,} in {self.partitions:,} partitions",
            "failures": failed or "none",
            "flagged": ", ".join(f"{count:,} {word}" for word, count in self.flags.items()) or "none",
            "backbone": f"{contract.backbone} ({contract.embedding_id[:12]})",
            "vectors": f"{self.dim} numbers, {contract.numeric_class}",
            "input": ", ".join(
                filter(
                    None,
                    (
                        contract.input_kind,
                        contract.survey.partition("#")[0],
                        bands,
                        contract.fov and f"field {contract.fov}",
                    ),
                )
            ),
            "columns": ", ".join(self.carried) or "none carried from a catalogue",
            "head": head,
            "engines": ", ".join(f"{name} ({count:,})" for name, count in self.engines.items()) or "none",
            "search": index,
            "last job": job_text(self.job, self.writer),
        }
        shown = [f"{name:<9} {text}" for name, text in lines.items()]
        shown += [f"{'':<9} {line}" for line in (worker_lines(self.job) if self.writer else ())]
        return "\n".join(shown)


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

    @property
    def columns(self) -> dict[str, str]:
        """Unit of each column; "" where it has none."""
        return {item.name: (item.metadata or {}).get(b"unit", b"").decode() for item in self.schema}

    @property
    def carried(self) -> tuple[str, ...]:
        """Catalogue columns: neither galembed's own nor predictions."""
        own = _OWN_COLUMNS | set(answers_of(self.schema))
        return tuple(name for name in self.schema.names if name not in own)

    @property
    def predictions(self) -> dict[str, str]:
        """Columns of predicted vote fractions and numbers, with the answer that each is for."""
        return answers_of(self.schema)

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
        query = self.table.search().select(self._known(columns))
        if where is not None:
            query = query.where(check_where(where, self.schema.names))
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
        found = self._by_id([source_id for _, source_id in wanted], names)
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
            keys = _joined_keys(table)
            embedded = [
                pc.filter(batch_keys, pc.is_in(batch_keys, value_set=keys))
                for batch_keys in map(_joined_keys, self.batches(["survey", "source_id"]))
            ]
            done = pa.chunked_array(embedded, pa.string()).combine_chunks()
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
        )

    def similar(
        self,
        to: Any,
        k: int = 10,
        *,
        where: str | None = None,
        cone: Sequence[float] | None = None,
        exclude_self: bool = True,
        columns: Sequence[str] | None = None,
        exact: bool = False,
    ) -> Hits:
        """Return the sources that look most like something, nearest first.

        Parameters
        ----------
        to : str, sequence of str, Hits, Row, SkyCoord or array_like of shape (dim,)
            A source's id (``survey:id`` where two surveys share it), several of them or rows of a table with
            `survey` and `source_id` (their mean direction), a position (the nearest source within 5 arcsec),
            or a vector.
        k : int
            How many; fewer come back where fewer pass the filters.
        where : str, optional
            SQL expression over the columns, applied before the search: ``mag_r < 19 AND survey = 'legacy'``.
            A null passes no comparison.
        cone : (ra, dec, radius), optional
            ICRS deg, deg, arcsec: only sources within. Sources without a position are left out.
        exclude_self : bool
            Leave out the sources that were asked about.
        columns : sequence of str, optional
            Store columns to return instead of the carried ones; predictions are there when asked for.
        exact : bool
            Compare with every vector although there is an index.

        Returns
        -------
        Hits
            An astropy table.

        Raises
        ------
        BadRequest
            If the id, position, vector, filter, cone or a column does not fit the store.
        """
        if not isinstance(k, numbers.Integral) or k < 1:
            raise BadRequest(f"k is how many sources to return, at least 1; got {k!r}")
        extra = self.carried if columns is None else self._known(columns)
        names = list(dict.fromkeys([*HIT_COLUMNS, *extra]))
        vector, keys = self._query(to)
        skip = keys if exclude_self else []
        found = self._nearest(vector, int(k) + len(skip), names, where, cone, exact=exact)
        own = [key in set(skip) for key in _key_pairs(found)]
        found = found.filter(pa.array([not mine for mine in own], pa.bool_())).slice(0, int(k))
        return self._hits(found, names, keys, where, cone)

    def _hits(
        self,
        found: pa.Table,
        names: list[str],
        keys: list[tuple[str, str]],
        where: str | None,
        cone: Sequence[float] | None,
    ) -> Hits:
        distance = found.column("_distance").to_numpy().astype(np.float32)
        meta = {
            "store": self.path,
            "query": [":".join(key) for key in keys],
            "where": where or "",
            "cone": " ".join(map(str, check_cone(cone))) if cone is not None else "",
        }
        # The index returns columns without their metadata.
        fields = pa.schema([self.schema.field(name) for name in names])
        hits = Hits(arrow_columns(found.select(names).cast(fields)), copy=False, meta=meta)
        for name in {"similarity", "distance"} & set(names):
            hits.rename_column(name, f"catalogue_{name}")
        hits.add_columns([1 - distance, distance], indexes=[0, 0], names=["similarity", "distance"])
        return hits

    def _filter(self, where: str | None, cone: Sequence[float] | None) -> str | None:
        parts = [f"({check_where(where, self.schema.names)})"] if where is not None else []
        parts += [cone_filter(cone)] if cone is not None else []
        return " AND ".join(parts) or None

    def _nearest(
        self,
        vector: NDArray[np.float32],
        count: int,
        names: list[str],
        where: str | None,
        cone: Sequence[float] | None,
        *,
        exact: bool,
    ) -> pa.Table:
        query = self.table.search(vector, vector_column_name="vector").distance_type("cosine")
        query = query.select([*names, "_distance"]).limit(count)
        condition = self._filter(where, cone)
        if condition is not None:
            query = query.where(condition, prefilter=True)
        if exact:
            query = query.bypass_vector_index()
        elif kinds := list(self.vector_indexes().values()):
            # Recall first. Bits tell distances less well than bytes do: more candidates are compared exactly.
            refine = 10 if kinds[0] == "IvfRq" else 3
            query = query.nprobes(64).ef(max(128, refine * count)).refine_factor(refine)
        try:
            return query.to_arrow()
        except (ValueError, RuntimeError) as error:
            raise _refused(where, error) from error

    def _query(self, to: Any) -> tuple[NDArray[np.float32], list[tuple[str, str]]]:
        """Return the query vector and the keys of the sources it stands for."""
        if isinstance(to, SkyCoord):
            return self._mean_direction([self._at(to)])
        if isinstance(to, Row | Table):
            return self._mean_direction(_keys_of(to))
        if isinstance(to, str | bytes | numbers.Integral):
            return self._mean_direction(self._resolve([_id_text(to)]))
        values = np.asarray(to)
        if values.dtype.kind == "f":
            return unit_vector(values, self.dim), []
        if (
            values.ndim == 1
            and values.size
            and all(isinstance(item, str | bytes | numbers.Integral) for item in values)
        ):
            return self._mean_direction(self._resolve([_id_text(item) for item in values]))
        raise BadRequest(
            f"a search is for an id, a list of ids, a SkyCoord or a vector of {self.dim} numbers; "
            f"got {type(to).__name__}"
        )

    def _mean_direction(self, keys: list[tuple[str, str]]) -> tuple[NDArray[np.float32], list[tuple[str, str]]]:
        vectors = matrix(self.rows(keys, ["vector"]).column("vector"))
        if len(vectors) < len(keys):
            raise BadRequest(f"{len(keys) - len(vectors)} of the sources asked about are not in the store {self.path}")
        return unit_vector(vectors.mean(axis=0), self.dim), keys

    def _resolve(self, ids: list[str]) -> list[tuple[str, str]]:
        """Return the key of each id, given as ``id`` or ``survey:id``."""
        candidates = {part for text in ids for part in (text, text.partition(":")[2]) if part}
        found: dict[str, list[str]] = {}
        for survey, source_id in _key_pairs(self._by_id(sorted(candidates), ["survey", "source_id"])):
            found.setdefault(source_id, []).append(survey)
        return list(dict.fromkeys(self._key(text, found) for text in ids))

    def _key(self, text: str, found: Mapping[str, list[str]]) -> tuple[str, str]:
        surveys = sorted(found.get(text, []))
        if len(surveys) == 1:
            return surveys[0], text
        if surveys:
            choices = " or ".join(repr(f"{survey}:{text}") for survey in surveys)
            raise BadRequest(f"{text!r} is a source of {len(surveys)} surveys; ask for {choices}")
        survey, _, source_id = text.partition(":")
        if survey in found.get(source_id, []):
            return survey, source_id
        raise BadRequest(
            f"no source {text!r} in the store {self.path}{self._similar_ids(text)}; "
            "see Store.failures() (`galembed status`) for sources without a vector"
        )

    def _similar_ids(self, text: str) -> str:
        sample = self.table.search().select(["source_id"]).limit(5000).to_arrow().column("source_id").to_pylist()
        near = difflib.get_close_matches(text, sample, n=3, cutoff=0.6) or sample[:1]
        return f"; its ids look like {', '.join(map(repr, near))}" if near else ", which is empty"

    def _by_id(self, ids: list[str], columns: list[str]) -> pa.Table:
        unique = list(dict.fromkeys(ids))
        batches = [
            batch
            for start in range(0, len(unique), _CHUNK)
            for batch in self.batches(columns, any_of("source_id", unique[start : start + _CHUNK]))
        ]
        return pa.Table.from_batches(batches, schema=pa.schema([self.schema.field(name) for name in columns]))

    def _at(self, position: SkyCoord) -> tuple[str, str]:
        """Return the key of the source nearest to a position, within the tolerance."""
        if not position.isscalar:
            raise BadRequest(f"give one position, got a SkyCoord of {len(position)}")
        ra, dec = float(position.icrs.ra.deg), float(position.icrs.dec.deg)
        if not math.isfinite(ra) or not math.isfinite(dec):
            raise BadRequest(f"the position is not finite: ra {ra}, dec {dec}")
        nearest = math.inf
        for radius in (POSITION_TOLERANCE_ARCSEC, 60.0, 3600.0):
            found = self.table.search().where(cone_filter((ra, dec, radius)))
            near = found.select(["survey", "source_id", "ra", "dec"]).to_arrow()
            if near.num_rows:
                distances = separation_arcsec(ra, dec, near.column("ra").to_numpy(), near.column("dec").to_numpy())
                best = int(np.argmin(distances))
                nearest = float(distances[best])
                if nearest <= POSITION_TOLERANCE_ARCSEC:
                    return _key_pairs(near)[best]
                break
        where = f"the nearest is {nearest:.1f} arcsec away" if nearest < math.inf else "none lies within a degree"
        raise BadRequest(
            f"no source within {POSITION_TOLERANCE_ARCSEC:g} arcsec of ra {ra:.6f}, dec {dec:.6f}: {where}"
        )

    def _known(self, columns: Sequence[str]) -> list[str]:
        for name in columns:
            if name not in self.schema.names:
                near = difflib.get_close_matches(name, self.schema.names, n=3, cutoff=0.5)
                hint = f"did you mean {', '.join(near)}?" if near else f"it has {', '.join(self.schema.names)}"
                raise BadRequest(f"the store has no column {name!r}; {hint}")
        return list(columns)


def matrix(column: pa.ChunkedArray | pa.Array) -> NDArray[np.float32]:
    """Return a fixed-size list column as an array, shape (n, dim), float32."""
    values = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    flat = values.flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat.reshape(-1, column.type.list_size), dtype=np.float32)


def _joined_keys(table: pa.Table | pa.RecordBatch) -> pa.Array:
    """Return survey and id as one string each; no name holds the separator."""
    keys = pc.binary_join_element_wise(table.column("survey"), table.column("source_id"), "\x1f")
    return keys.combine_chunks() if isinstance(keys, pa.ChunkedArray) else keys


def _key_pairs(table: pa.Table) -> list[tuple[str, str]]:
    return list(zip(table.column("survey").to_pylist(), table.column("source_id").to_pylist(), strict=True))


def _keys_of(rows: Row | Table) -> list[tuple[str, str]]:
    lacking = [name for name in ("survey", "source_id") if name not in rows.colnames]
    if lacking:
        raise BadRequest(f"rows to search for need the columns survey and source_id; {lacking} missing")
    pairs = [(rows["survey"], rows["source_id"])] if isinstance(rows, Row) else rows.iterrows("survey", "source_id")
    keys = [(str(survey), str(source_id)) for survey, source_id in pairs]
    if not keys:
        raise BadRequest("the table of sources to search for is empty")
    return keys


def _id_text(value: Any) -> str:
    text = value.decode() if isinstance(value, bytes) else str(value)
    return text.strip()


def _refused(where: str | None, error: Exception) -> BadRequest:
    what = f"the filter {where!r} cannot be carried out" if where else "the search cannot be carried out"
    return BadRequest(f"{what}: {first_line(error)}")


def _connect(path: str) -> Any:
    import lancedb

    return lancedb.connect(path, storage_options=storage_options(path) or None)
