"""Proof that a store is what it promises to be: each source once, files, vectors and indexes sound."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from galembed.backbones import load_backbone
from galembed.errors import ArtifactMismatch, ArtifactNotFound
from galembed.schemas import FAILURES, THUMBNAIL, StoreContract
from galembed.sky import healpix_index
from galembed.store import open_store
from galembed.store.keys import KEY, UNIT_SEPARATOR, joined, joined_key, key_hashes, open_table, repeated_values
from galembed.store.nearest import matrix
from galembed.store.places import (
    EMBEDDINGS_TABLE,
    FAILURES_TABLE,
    at_storage,
    file_system,
    first_line,
    is_folder,
    require_store,
)

UNIT_TOLERANCE: Final = 1e-3
"""How far the length of a vector may be from one; rounded to float16, it is off by 5e-4 at most."""

_BATCH_ROWS: Final = 8192
_READ: Final = [*KEY, "partition", "vector", "ra", "dec", "_healpix_29", "input_kind"]
_ASKED: Final = 200
_FOUND: Final = 0.5
"""Share of its own vectors that an index finds even if it is searched fast; one of other rows finds almost none."""

_EXAMPLES: Final = 5


@dataclass(frozen=True)
class StoreCheck:
    """What `verify` found; `str` gives it for reading.

    Attributes
    ----------
    path : str
    rows : int
        Rows of `embeddings` that could be read.
    failures : int
        Rows of `failures` that are not hidden.
    repeated : int
        Sources with more than one row in `embeddings`; the next `galembed embed` keeps one of each.
    hidden : int
        Failures of sources that have a row: tried again with success, or failed in another version than the
        row's by a job that was killed. Readers hide them, and the next `galembed embed` removes them.
    contradictory : int
        Sources that one and the same partition put into both tables, which no job does.
    missing, damaged : tuple of str
        Files that the tables name and that are not there, or cannot be read; their rows are not counted.
    bad_vectors : int
        Rows whose vector holds something that is not finite, or is not of length one within 0.001.
    misplaced : int
        Rows whose `_healpix_29`, by which a cone is searched, is not that of their position.
    strangers : int
        Rows that came through another door (`input_kind`) than the store's contract says.
    bad_thumbnails : int
        Rows whose thumbnail is no whole JPEG, by its first and last bytes.
    indexes : tuple of str
        Indexes that do not find rows of the store, or hold more than there are, and how.
    backbone : str
        Why the backbone on record, where it is on this machine, is not the one that made the vectors.
    examples : tuple of str
        Some of the sources meant, ``survey:id``.
    """

    path: str
    rows: int = 0
    failures: int = 0
    repeated: int = 0
    hidden: int = 0
    contradictory: int = 0
    missing: tuple[str, ...] = ()
    damaged: tuple[str, ...] = ()
    bad_vectors: int = 0
    misplaced: int = 0
    strangers: int = 0
    bad_thumbnails: int = 0
    indexes: tuple[str, ...] = ()
    backbone: str = ""
    examples: tuple[str, ...] = field(default=(), repr=False)

    @property
    def ok(self) -> bool:
        """Whether nothing was found that must not be."""
        return not any(
            (
                *(self.repeated, self.contradictory, self.missing, self.damaged, self.bad_vectors),
                *(self.misplaced, self.strangers, self.bad_thumbnails, self.indexes, self.backbone),
            )
        )

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.rows:,} rows and {self.failures:,} failures were read"]
        lines += [f"{self.hidden:,} failure(s) of sources that have a row, hidden"] * bool(self.hidden)
        lines += [
            f"{count:,} {what}"
            for count, what in (
                (self.repeated, "source(s) with more than one row; `galembed embed` keeps one of each"),
                (self.contradictory, "source(s) that one partition both embedded and failed"),
                (len(self.missing), f"file(s) are gone: {', '.join(self.missing[:_EXAMPLES])}"),
                (len(self.damaged), f"file(s) cannot be read: {'; '.join(self.damaged[:_EXAMPLES])}"),
                (self.bad_vectors, "vector(s) are not finite, or not of length one"),
                (self.misplaced, "row(s) have a _healpix_29 that is not that of their position"),
                (self.strangers, "row(s) came through another door (input_kind) than the store's"),
                (self.bad_thumbnails, "thumbnail(s) are no whole JPEG"),
            )
            if count
        ]
        lines += [f"index {text}; make it again with `galembed index {self.path}`" for text in self.indexes]
        lines += [self.backbone] * bool(self.backbone)
        lines += [f"among them {', '.join(self.examples)}"] * bool(self.examples)
        lines += [
            "each source is there once, every file is there, every vector has length one, every index finds its rows"
        ] * self.ok
        return "\n".join(lines)


@at_storage
def verify(store: str | Path) -> StoreCheck:
    """Read a whole store and check what it promises; nothing is changed.

    Vectors are read in batches; some twenty bytes a row are held, for the keys.

    Raises
    ------
    ArtifactNotFound
        If there is no store.
    StorageError
        If it cannot be read.
    """
    require_store(store)
    failed, lost, broken = _failures(store)
    dataset = open_table(store, EMBEDDINGS_TABLE)
    whole, missing = _whole_fragments(store, EMBEDDINGS_TABLE, dataset)
    contract = StoreContract.from_schema(dataset.schema)
    found, damaged = _Findings(failed, contract.input_kind), list(broken)
    columns = [*_READ, THUMBNAIL.name] if contract.thumbnails else _READ
    for fragment in whole:
        try:
            for batch in fragment.to_batches(columns=columns, batch_size=_BATCH_ROWS):
                found.take(batch)
        except (OSError, ValueError, RuntimeError) as error:
            damaged.append(_damage(fragment, error))
    repeated = found.repeated(whole)
    hidden = int(found.hidden.sum())
    examples = [*repeated, *found.contradictory, *found.bad][:_EXAMPLES]
    return StoreCheck(
        path=str(store),
        rows=found.rows,
        failures=len(failed) - hidden,
        repeated=len(repeated),
        hidden=hidden - len(found.contradictory),
        contradictory=len(found.contradictory),
        missing=(*missing, *lost),
        damaged=tuple(damaged),
        bad_vectors=found.bad_vectors,
        misplaced=found.misplaced,
        strangers=found.strangers,
        bad_thumbnails=found.bad_thumbnails,
        indexes=() if missing or damaged else _bad_indexes(store, dataset),
        backbone=_other_backbone(contract),
        examples=tuple(key.replace(UNIT_SEPARATOR, ":") for key in examples),
    )


class _Findings:
    """What is known of the rows that were read so far."""

    def __init__(self, failed: pa.Table, input_kind: str) -> None:
        self._input_kind = input_kind
        self._failed = joined_key(failed)
        self._failed_by = joined(self._failed, failed["partition"].combine_chunks())
        self._hashes: list[NDArray[np.int64]] = []
        self.hidden = np.zeros(len(failed), bool)
        self.rows = self.bad_vectors = self.misplaced = self.strangers = self.bad_thumbnails = 0
        self.contradictory: list[str] = []
        self.bad: list[str] = []

    def take(self, batch: pa.RecordBatch) -> None:
        """Take note of rows."""
        key = joined_key(batch)
        self.rows += len(key)
        self._hashes.append(key_hashes(key))
        if len(self._failed):
            self.hidden |= pc.is_in(self._failed, value_set=key).to_numpy(zero_copy_only=False)
            both = pc.is_in(joined(key, batch.column("partition")), value_set=self._failed_by)
            self.contradictory += key.filter(both).to_pylist()
        vectors = matrix(batch.column("vector")).astype(np.float64)
        with np.errstate(all="ignore"):
            good = np.abs(np.linalg.norm(vectors, axis=1) - 1) <= UNIT_TOLERANCE
        self.bad_vectors += int((~good).sum())
        here = ~_misplaced(batch)
        ours = pc.equal(batch.column("input_kind"), self._input_kind).to_numpy(zero_copy_only=False)
        self.misplaced += int((~here).sum())
        self.strangers += int((~ours).sum())
        pictured = _pictured(batch)
        self.bad_thumbnails += int((~pictured).sum())
        self.bad = [*self.bad, *key.filter(pa.array(~(good & here & ours & pictured))).to_pylist()][:_EXAMPLES]

    def repeated(self, fragments: Sequence[Any]) -> list[str]:
        """Return the keys of several rows, after a second look at those whose hashes are the same."""
        suspects = repeated_values(np.concatenate([np.empty(0, np.int64), *self._hashes]))
        if not len(suspects):
            return []
        counts: Counter[str] = Counter()
        for fragment in fragments:
            with contextlib.suppress(OSError, ValueError, RuntimeError):  # it is on the list of damage already
                for batch in fragment.to_batches(columns=list(KEY)):
                    key = joined_key(batch)
                    counts.update(key.filter(pa.array(np.isin(key_hashes(key), suspects))).to_pylist())
        return [key for key, count in counts.items() if count > 1]


def _misplaced(batch: pa.RecordBatch) -> NDArray[np.bool_]:
    """Return which rows have another cell than that of their position, or only one of the two."""
    ra, dec = (batch.column(name).to_numpy(zero_copy_only=False) for name in ("ra", "dec"))
    cells = batch.column("_healpix_29")
    known = np.isfinite(ra) & np.isfinite(dec)
    wrong = known != cells.is_valid().to_numpy(zero_copy_only=False)
    both = known & ~wrong
    wrong[both] = healpix_index(ra[both], dec[both]) != cells.fill_null(-1).to_numpy()[both]
    return np.asarray(wrong, bool)


def _pictured(batch: pa.RecordBatch) -> NDArray[np.bool_]:
    """Return which rows have no thumbnail, or a JPEG from its first to its last marker."""
    if THUMBNAIL.name not in batch.schema.names:
        return np.ones(len(batch), bool)
    data = batch.column(THUMBNAIL.name)
    whole = pc.and_(pc.starts_with(data, b"\xff\xd8"), pc.ends_with(data, b"\xff\xd9"))
    return np.asarray(pc.fill_null(whole, True).to_numpy(zero_copy_only=False), bool)


def _bad_indexes(store: str | Path, dataset: Any) -> tuple[str, ...]:
    """Return what is wrong with indexes: a sample of the rows that are there is looked for by each."""
    rows = dataset.count_rows()
    bad = []
    for index in dataset.describe_indices():
        column = index.field_names[0]
        if index.num_rows_indexed > rows:
            bad.append(f"{index.name} holds {index.num_rows_indexed:,} rows, of {rows:,}")
            continue
        chosen = np.sort(np.random.default_rng(0).choice(rows, min(rows, _ASKED), replace=False))
        sample = dataset.take(chosen.tolist(), columns=[column, *KEY]).column(column).drop_null()
        found = _found_by_vector(store, sample) if column == "vector" else _found_by_value(dataset, column, sample)
        if found < (_FOUND if column == "vector" else 1.0) * len(sample):
            bad.append(f"{index.name} finds {found:,} of {len(sample):,} rows that are there")
    return tuple(bad)


def _found_by_value(dataset: Any, column: str, sample: pa.ChunkedArray) -> int:
    texts = [
        f"'{value.replace(chr(39), chr(39) * 2)}'" if isinstance(value, str) else value for value in sample.to_pylist()
    ]
    if not texts:
        return 0
    condition = f"{column} IN ({', '.join(map(str, texts))})"
    there = pc.unique(dataset.to_table(columns=[column], filter=condition).column(column))
    return int(pc.sum(pc.is_in(sample, value_set=there)).as_py())


def _found_by_vector(store: str | Path, sample: pa.ChunkedArray) -> int:
    opened = open_store(store)
    way = opened.index_search(next(iter(opened.vector_indexes().values())))
    vectors = matrix(sample)
    nearest = {"column": "vector", "q": vectors if len(vectors) > 1 else vectors[0], "k": 1, "metric": "cosine"}
    nearest |= {"nprobes": way.nprobes, "ef": way.ef, "refine_factor": way.refine}
    near = opened.dataset.to_table(["_distance"], nearest=nearest)
    return int((near.column("_distance").to_numpy() <= UNIT_TOLERANCE).sum())


def _other_backbone(contract: StoreContract) -> str:
    """Return why the backbone on record is not the one that made the vectors; empty if it is, or is not here."""
    try:
        backbone = load_backbone(contract.backbone)
        backbone.weights()
    except ArtifactNotFound:
        return ""
    except ArtifactMismatch as error:
        return f"the backbone cannot be trusted: {error}"
    if backbone.embedding_id == contract.embedding_id:
        return ""
    return (
        f"{contract.backbone} is another backbone now ({backbone.embedding_id[:12]}) than made the vectors "
        f"({contract.embedding_id[:12]}): queries by image would be wrong; restore it"
    )


def _failures(store: str | Path) -> tuple[pa.Table, list[str], list[str]]:
    """Return the rows of `failures` that can be read, the files that are gone, and those that cannot be read."""
    columns = [*KEY, "partition"]
    tables, damaged = [FAILURES.empty_table().select(columns)], []
    if not is_folder(store, f"{FAILURES_TABLE}.lance"):
        return tables[0], [], []
    whole, missing = _whole_fragments(store, FAILURES_TABLE, open_table(store, FAILURES_TABLE))
    for fragment in whole:
        try:
            tables.append(fragment.to_table(columns=columns))
        except (OSError, ValueError, RuntimeError) as error:
            damaged.append(_damage(fragment, error))
    return pa.concat_tables(tables), missing, damaged


def _whole_fragments(store: str | Path, table: str, dataset: Any) -> tuple[list[Any], list[str]]:
    """Return the fragments of a table whose files are there, and the files that are not."""
    system, root = file_system(store)
    folder = f"{root}/{table}.lance"
    there = {path.removeprefix(folder).lstrip("/") for path in system.find(folder)}
    whole, missing = [], []
    for fragment in dataset.get_fragments():
        files = [f"data/{file.path}" for file in fragment.data_files()] + [fragment.deletion_file()]
        gone = [file for file in files if file and file not in there]
        missing += [f"{table}.lance/{file}" for file in gone]
        if not gone:
            whole.append(fragment)
    return whole, missing


def _damage(fragment: Any, error: Exception) -> str:
    return f"{', '.join(file.path for file in fragment.data_files())} ({first_line(error)})"
