"""Making a store of published embeddings, exactly once, however often it is stopped. `docs/published.md`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from galembed.errors import BadRequest
from galembed.progress import progress
from galembed.published.tables import Published, Rows, file_digest, open_published, row_count
from galembed.schemas import FAILURES, THUMBNAIL_BYTES, StoreContract, conform
from galembed.store.commit import Finished, commit, prepare, tidy, write_fragments
from galembed.store.keys import joined_key, key_hashes, open_table, repeated_values, rows_with
from galembed.store.lease import Lease
from galembed.store.places import EMBEDDINGS_TABLE, FAILURES_TABLE, JOB_FILE, join, write_json

UNIT_TOLERANCE: Final = 1e-3
"""How far from 1 the length of a vector may be in files that galembed wrote; those vectors stay as they are."""

_PART_BYTES: Final = 64 * 2**20
_PART_ROWS: Final = 50_000
_COMMIT_ROWS: Final = 500_000


@dataclass(frozen=True)
class ImportReport:
    """What `import_published` did; `str` gives it for reading.

    Attributes
    ----------
    store : str
    rows : int
        Rows of the files.
    imported : int
        Rows that were added now.
    already : int
        Rows whose source the store had, or had as a failure, before.
    failures : mapping of str to int
        Rows that became failures now, by reason.
    seconds : float
    """

    store: str
    rows: int
    imported: int
    already: int
    failures: dict[str, int]
    seconds: float

    def __str__(self) -> str:
        failed = ", ".join(f"{count:,} {reason}" for reason, count in self.failures.items()) or "none"
        return (
            f"{self.imported:,} of {self.rows:,} rows imported into {self.store}, {self.already:,} were there; "
            f"failures: {failed}; {self.seconds:.0f} s"
        )


@dataclass(frozen=True)
class _Part:
    name: str
    file: Path
    number: int
    start: int
    stop: int


@dataclass
class _Tally:
    imported: int = 0
    already: int = 0
    failures: dict[str, int] = field(default_factory=dict)


def import_published(
    store: str | Path,
    files: Sequence[str | Path],
    *,
    vector: str | None = None,
    columns: dict[str, str] | None = None,
    carry: Sequence[str] | None = None,
    survey: str = "published",
    name: str = "",
    source: str = "",
    quiet: bool = True,
) -> ImportReport:
    """Add published embeddings to a store, which is made if absent.

    Vectors are brought to length 1, and their length kept in `norm`. Rows without an id or with an impossible
    position, ids that occur again, and vectors that are absent, of another length, not finite or zero become
    failures. Stopped or killed, the same call goes on; sources that are there are not added again. Rows are read in
    parts; beside those, 16 bytes are held for each row of the files and 8 for each of the store.

    Parameters
    ----------
    store : str or Path
    files : sequence of str or Path
        Parquet files, folders of them, or other tables that astropy reads, which are held whole. Of those that
        `export_published` wrote, nothing else need be said: columns, contract and vectors come back as they were.
    vector : str, optional
        Column of lists of numbers, or a pattern such as ``feat_*`` for columns of one number each, which are taken
        in the order of the numbers that they end in. May be left out where one column holds lists of floats.
    columns : mapping of str to str, optional
        Columns for ``id``, ``ra``, ``dec`` where those of `galembed.catalogues.GUESSES` are not wanted. Positions in
        deg where no unit is given.
    carry : sequence of str, optional
        Columns to keep; all that hold one number or text a row without it.
    survey : str
        Half of each source's key, beside its id.
    name, source : str
        Of the model and of the files, free text. The store's `embedding_id` is a digest of both and of the vectors'
        length, so that vectors of another model are kept out.

    Raises
    ------
    ArtifactNotFound, UnreadableInput
        If a file is not there, or is no table.
    BadRequest
        If a column is not there or cannot be what it is named for.
    ArtifactMismatch, SchemaMismatch
        If the files, or they and the store, do not agree in columns or embedding.
    StoreBusy, StorageError
        If another process writes the store, or it cannot be written.
    """
    began = time.monotonic()
    published = open_published(
        files, vector=vector, columns=columns, carry=carry, survey=survey, name=name, source=source
    )
    counts = [row_count(file) for file in published.files]
    parts = _parts(published, counts)
    tally = _Tally()
    with Lease(store) as lease:
        prepare(store, published.schema, lease)
        settled = _settled_rows(store)
        todo = [part for part in parts if not _is_done(part, settled)]
        tally.already = sum(part.stop - part.start for part in parts) - sum(part.stop - part.start for part in todo)
        if todo:
            repeated = _repeated(published)
            there = np.sort(np.concatenate([np.empty(0, np.int64), *map(key_hashes, _store_keys(store))]))
            waiting: list[Finished] = []
            rows = 0
            with progress("importing", sum(counts), quiet=quiet) as advance:
                advance(tally.already)
                for part, table in _tables(published, todo):
                    result, good = _finished(store, published, part, table, repeated, there, tally)
                    waiting.append(result)
                    rows += good
                    advance(part.stop - part.start)
                    if rows >= _COMMIT_ROWS:
                        commit(store, waiting, lease, there=())
                        waiting, rows = [], 0
                if waiting:
                    commit(store, waiting, lease, there=())
            tidy(store, lease)
            _account(store, sum(counts), tally, time.monotonic() - began)
    seconds = time.monotonic() - began
    return ImportReport(str(store), sum(counts), tally.imported, tally.already, tally.failures, seconds)


def _parts(published: Published, counts: Sequence[int]) -> list[_Part]:
    """Return the parts of all files, named by what the file is, so that they are the same when it is read again."""
    pictures = THUMBNAIL_BYTES * bool(StoreContract.from_schema(published.schema).thumbnails)
    rows = max(1, min(_PART_ROWS, _PART_BYTES // (4 * published.dim + pictures)))
    parts = []
    seen: dict[str, Path] = {}
    for number, (file, count) in enumerate(zip(published.files, counts, strict=True)):
        digest = file_digest(file)
        if digest in seen:
            raise BadRequest(f"{file} and {seen[digest]} are the same file twice; give one of them")
        seen[digest] = file
        # Other sources come of the same file with another survey.
        name = f"import-{file.stem}-{digest}-{published.survey}-{rows}"
        parts += [
            _Part(f"{name}-{start}", file, number, start, min(start + rows, count)) for start in range(0, count, rows)
        ]
    return parts


def _settled_rows(store: str | Path) -> dict[str, tuple[bool, int]]:
    """Return for each partition whether it has rows, and how many failures."""
    embedded: set[str] = set()
    for batch in open_table(store, EMBEDDINGS_TABLE).to_batches(columns=["partition"]):
        embedded.update(pc.unique(batch.column("partition")).to_pylist())
    failed = open_table(store, FAILURES_TABLE).to_table(columns=["partition"])["partition"]
    counts = {item["values"]: item["counts"] for item in pc.value_counts(failed).to_pylist()}
    return {name: (name in embedded, counts.get(name, 0)) for name in embedded | set(counts)}


def _is_done(part: _Part, settled: dict[str, tuple[bool, int]]) -> bool:
    # All rows of a part come in one commit, so that those there are all.
    embedded, failed = settled.get(part.name, (False, 0))
    return embedded or failed == part.stop - part.start


def _store_keys(store: str | Path) -> Iterator[pa.Array]:
    for batch in open_table(store, EMBEDDINGS_TABLE).to_batches(columns=["survey", "source_id"]):
        yield joined_key(batch)


def _repeated(published: Published) -> dict[str, tuple[int, int]]:
    """Return the keys that occur more than once in the files, and file and row of the first."""
    hashes = [key_hashes(_plain_key(table)) for file in published.files for table in published.ids(file)]
    suspects = repeated_values(np.concatenate([np.empty(0, np.int64), *hashes]))
    if not len(suspects):
        return {}
    first: dict[str, tuple[int, int]] = {}
    count: dict[str, int] = {}
    for number, file in enumerate(published.files):
        row = 0
        for table in published.ids(file):
            key = _plain_key(table)
            for at in np.flatnonzero(np.isin(key_hashes(key), suspects)).tolist():
                text = key[at].as_py()
                first.setdefault(text, (number, row + at))
                count[text] = count.get(text, 0) + 1
            row += len(table)
    return {text: place for text, place in first.items() if count[text] > 1}


def _plain_key(table: pa.Table) -> pa.Array:
    return pc.fill_null(joined_key(table), "")


def _tables(published: Published, todo: Sequence[_Part]) -> Iterator[tuple[_Part, list[Rows]]]:
    """Yield the rows of each part; a file is read once, from the first part that is wanted of it."""
    for file in published.files:
        wanted = [part for part in todo if part.file == file]
        held: list[Rows] = []
        batches = published.rows(file, wanted[0].start) if wanted else iter(())
        rows = next(batches, None)
        for part in wanted:
            while rows is not None and rows.start < part.stop:
                end = rows.start + len(rows.table)
                if end > part.start:
                    held.append(_cut(rows, max(part.start, rows.start), min(part.stop, end)))
                if end > part.stop:
                    break
                rows = next(batches, None)
            yield part, held
            held = []


def _cut(rows: Rows, start: int, stop: int) -> Rows:
    at, count = start - rows.start, stop - start
    norms = None if rows.norms is None else rows.norms[at : at + count]
    return Rows(start, rows.table.slice(at, count), rows.vectors.slice(at, count), norms)


def _finished(
    store: str | Path,
    published: Published,
    part: _Part,
    batches: Sequence[Rows],
    repeated: dict[str, tuple[int, int]],
    there: NDArray[np.int64],
    tally: _Tally,
) -> tuple[Finished, int]:
    """Write the good rows of a part; return what is to be committed, and how many they are."""
    good, failures = [], []
    for rows in batches:
        vectors, norms, reasons = _unit(rows, published.dim)
        _judge_keys(rows, part, repeated, reasons)
        bad = np.flatnonzero([reason is not None for reason in reasons])
        failures.append(_failures(rows, bad, reasons, part))
        keep = np.ones(len(reasons), bool)
        keep[bad] = False
        known = _known(store, rows.table, keep, there)
        tally.already += int(known.sum())
        keep &= ~known
        table = rows.table.filter(pa.array(keep))
        columns = {name: table[name] for name in table.column_names}
        columns |= {
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors[keep].ravel()), published.dim),
            "norm": norms[keep],
            "partition": pa.repeat(part.name, len(table)),
        }
        good.append(conform(pa.table(columns), published.schema))
    table = pa.concat_tables([published.schema.empty_table(), *good])
    failed = pa.concat_tables([FAILURES.empty_table(), *failures])
    tally.imported += len(table)
    for item in pc.value_counts(failed["reason"]).to_pylist():
        tally.failures[item["values"]] = tally.failures.get(item["values"], 0) + item["counts"]
    return Finished(part.name, tuple(write_fragments(store, table)), failed), len(table)


def _unit(rows: Rows, dim: int) -> tuple[NDArray[np.float32], NDArray[np.float32], list[tuple[str, str] | None]]:
    """Return vectors at length 1, their lengths, and what is wrong with each row, if anything: reason and message."""
    count = len(rows.table)
    vectors = np.zeros((count, dim), np.float32)
    reasons: list[tuple[str, str] | None] = [None] * count
    if pa.types.is_fixed_size_list(rows.vectors.type):
        lengths = np.full(count, rows.vectors.type.list_size)
        lengths[rows.vectors.is_null().to_numpy(zero_copy_only=False)] = -1
    else:
        lengths = pc.fill_null(pc.list_value_length(rows.vectors), -1).to_numpy()
    fits = lengths == dim
    whole = rows.vectors.filter(pa.array(fits)) if not fits.all() else rows.vectors
    with np.errstate(all="ignore"):
        numbers = whole.flatten().to_numpy(zero_copy_only=False)
        vectors[fits] = np.asarray(numbers, np.float32).reshape(-1, dim)
        norms = np.sqrt(np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64))
    own = rows.norms is not None and np.abs(norms - 1) <= UNIT_TOLERANCE
    for at in np.flatnonzero(~(np.isfinite(norms) & (norms > 0))).tolist():
        if lengths[at] < 0:
            reasons[at] = ("no_vector", "the row has no vector")
        elif not fits[at]:
            reasons[at] = ("vector_length", f"the vector has {lengths[at]} numbers, those of the store have {dim}")
        elif norms[at] == 0:
            reasons[at] = ("zero_norm", "the vector has length zero, and so no direction")
        else:
            reasons[at] = ("non_finite", "the vector holds NaN or infinity, or a number beyond float32")
    divisor = np.where(own | ~(norms > 0) | ~np.isfinite(norms), 1.0, norms)
    np.divide(vectors, divisor[:, None], out=vectors, casting="same_kind")
    kept = norms if rows.norms is None else np.where(own, rows.norms, norms)
    return vectors, kept.astype(np.float32), reasons


def _judge_keys(
    rows: Rows, part: _Part, repeated: dict[str, tuple[int, int]], reasons: list[tuple[str, str] | None]
) -> None:
    """Find fault with ids and positions, whatever the vector is like."""
    ids = rows.table["source_id"]
    for at in np.flatnonzero(pc.equal(ids, "").to_numpy()).tolist():
        reasons[at] = ("bad_id", "the row has no id")
    dec, ra = (np.nan_to_num(rows.table[name].to_numpy()) for name in ("dec", "ra"))
    for at in np.flatnonzero((np.abs(dec) > 90) | (np.abs(ra) > 360)).tolist():
        reasons[at] = ("bad_position", f"ra {ra[at]}, dec {dec[at]} deg is not on the sky")
    if not repeated:
        return
    key = joined_key(rows.table)
    again = pc.is_in(key, value_set=pa.array(list(repeated), key.type)).to_numpy(zero_copy_only=False)
    for at in np.flatnonzero(again).tolist():
        if ids[at].as_py() and repeated[key[at].as_py()] != (part.number, rows.start + at):
            text = f"id {ids[at].as_py()} occurs more than once; this row is not imported, the first one is"
            reasons[at] = ("duplicate_key", text)


def _known(store: str | Path, table: pa.Table, keep: NDArray[np.bool_], there: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which rows' sources the store has already, from other files."""
    known = np.zeros(len(table), bool)
    if not len(there):
        return known
    key = joined_key(table)
    hashes = key_hashes(key)
    at = np.minimum(np.searchsorted(there, hashes), len(there) - 1)
    likely = keep & (there[at] == hashes)
    if likely.any():
        found = rows_with(open_table(store, EMBEDDINGS_TABLE), key.filter(pa.array(likely)))[1]
        known = keep & pc.is_in(key, value_set=found).to_numpy(zero_copy_only=False)
    return known


def _failures(rows: Rows, bad: NDArray[np.int64], reasons: Sequence[tuple[str, str] | None], part: _Part) -> pa.Table:
    if not len(bad):
        return FAILURES.empty_table()
    taken = rows.table.take(pa.array(bad))
    why = [reason for at in bad.tolist() if (reason := reasons[at])]
    ids = [
        # A row without a key of its own gets one, as in `galembed embed`.
        f"{name}#{part.file.name}:row{rows.start + at + 1}" if reason in ("bad_id", "duplicate_key") else name
        for name, at, (reason, _) in zip(taken["source_id"].to_pylist(), bad.tolist(), why, strict=True)
    ]
    count = len(bad)
    columns: dict[str, Any] = {name: taken[name] for name in ("survey", "ra", "dec", "source_version")} | {
        "source_id": ids,
        "source_uri": pa.repeat(str(part.file), count),
        "stage": pa.repeat("list", count),
        "reason": [reason for reason, _ in why],
        "message": [
            f"{part.file.name} row {rows.start + at + 1}: {text}"
            for at, (_, text) in zip(bad.tolist(), why, strict=True)
        ],
        "attempts": pa.repeat(pa.scalar(1, pa.int32()), count),
        "time": pa.repeat(pa.scalar(datetime.now(UTC), FAILURES.field("time").type), count),
        "partition": pa.repeat(part.name, count),
    }
    return conform(pa.table(columns), FAILURES)


def _account(store: str | Path, rows: int, tally: _Tally, seconds: float) -> None:
    facts = {
        "state": "done",
        "planned": rows - tally.already,
        "embedded": tally.imported,
        "failed": sum(tally.failures.values()),
        "already_done": tally.already,
        "seconds": round(seconds, 1),
    }
    write_json(join(store, JOB_FILE), facts)
