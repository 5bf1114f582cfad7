"""The store, write side: how partitions become visible exactly once. `docs/exactly-once.md` has the protocol.

Lance enforces no keys and knows no transaction over two tables, so all of it rests on three things: one
committer at a time (`Lease`), an order (`commit`: failures by key, then one commit of rows), and dropping what is
already there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from lance.fragment import FragmentMetadata
from lance.fragment import write_fragments as lance_write_fragments
from numpy.typing import NDArray

from galembed.errors import ArtifactMismatch, ArtifactNotFound, SchemaMismatch
from galembed.schemas import FAILURES, StoreContract, conform
from galembed.store.keys import KEY as KEY
from galembed.store.keys import StoreKeys as StoreKeys
from galembed.store.keys import joined as joined
from galembed.store.keys import joined_key, open_table, present_in, repeated_rows, rows_with
from galembed.store.keys import keys as keys
from galembed.store.keys import present as present
from galembed.store.lease import LEASE_FILE, LOCK_FILE, Lease
from galembed.store.places import (
    EMBEDDINGS_TABLE,
    FAILURES_TABLE,
    JOB_FILE,
    at_storage,
    file_system,
    is_folder,
    storage_options,
    table_uri,
    unless_preempted,
)
from galembed.store.places import write_json as write_json

SMALL_FRAGMENTS: Final = 64
"""From this many small fragments on, `tidy` merges them: each one costs every search a file to open."""

FRAGMENT_ROWS: Final = 1_000_000
"""Rows of a fragment that others were merged into."""

_SMALL_ROWS: Final = 100_000
_COMMIT_TRIES: Final = 5
_REQUESTS: Final = 16

_NOTHING: Final = pa.schema([FAILURES.field(name) for name in KEY]).empty_table()


@dataclass(frozen=True)
class Finished:
    """What a worker hands back for one partition: no vectors, those lie in the fragments' files.

    Attributes
    ----------
    partition : str
        Name of the partition.
    fragments : tuple of str
        Lance's fragment metadata as JSON; none where no source could be embedded.
    failures : pa.Table
        `galembed.schemas.FAILURES`.
    replaced : pa.Table
        `survey`, `source_id` of the sources whose rows of another version are to go, embedded or failed now.
    """

    partition: str
    fragments: tuple[str, ...]
    failures: pa.Table
    replaced: pa.Table = field(default_factory=lambda: _NOTHING)


@at_storage
def store_schema(store: str | Path) -> pa.Schema | None:
    """Return the schema of a store's `embeddings`, or None where there is no store yet.

    Parameters
    ----------
    store : str or Path
        Directory, or address on object storage; as in all functions here.

    Raises
    ------
    ArtifactMismatch
        If `store` is a file, or a directory that holds other things.
    StorageError
        If it cannot be read. All functions here raise it, also for a full disk.
    """
    if is_folder(store, f"{EMBEDDINGS_TABLE}.lance"):
        schema: pa.Schema = open_table(store, EMBEDDINGS_TABLE).schema
        return schema
    system, root = file_system(store)
    if system.isfile(root):
        raise ArtifactMismatch(f"{store} is a file; a store is a directory, choose another --store")
    ours = {LEASE_FILE, LOCK_FILE, JOB_FILE, f"{FAILURES_TABLE}.lance", ""}
    there = system.ls(root, detail=False) if system.isdir(root) else []
    strangers = sorted({name.rstrip("/").removeprefix(root).strip("/") for name in there} - ours)
    if strangers:
        raise ArtifactMismatch(
            f"{store} holds other things ({', '.join(strangers[:3])}) and no galembed store; "
            "choose a new directory for --store"
        )
    return None


@at_storage
def prepare(store: str | Path, schema: pa.Schema, lease: Lease) -> None:
    """Make a store's two tables, or check that rows of `schema` may join those that are there.

    Parameters
    ----------
    schema : pa.Schema
        `galembed.schemas.embeddings_schema` with a contract.

    Raises
    ------
    ArtifactMismatch
        If the store was made under another contract.
    SchemaMismatch
        If it carries other columns.
    """
    existing = store_schema(store)
    if existing is not None:
        require_same_columns(existing, schema)
    for name, wanted in ((EMBEDDINGS_TABLE, schema), (FAILURES_TABLE, FAILURES)):
        if not is_folder(store, f"{name}.lance"):
            with lease.fence():
                lance.write_dataset(
                    wanted.empty_table(),
                    table_uri(store, name),
                    mode="create",
                    storage_options=storage_options(store),
                )


def require_same_columns(existing: pa.Schema, schema: pa.Schema) -> None:
    """Check contract and columns of a store against those of new rows; see `prepare`."""
    StoreContract.from_schema(existing).require_same(StoreContract.from_schema(schema))
    have, want = ({item.name: item.type for item in each} for each in (existing, schema))
    if have == want:
        return
    differences = [f"{name} ({have[name]}) is only in the store" for name in have if name not in want]
    differences += [f"{name} ({want[name]}) is not in the store" for name in want if name not in have]
    differences += [
        f"{name} is {have[name]} in the store, here {want[name]}"
        for name in have
        if name in want and have[name] != want[name]
    ]
    raise SchemaMismatch(
        f"the columns differ from those the store was made with: {'; '.join(differences)}. "
        "Give the same catalogue and --carry, or another --store"
    )


@at_storage
def write_fragments(store: str | Path, table: pa.Table, opened: Any = None) -> list[str]:
    """Write rows of `embeddings` as data files that no reader sees yet; any process may do so at any time.

    Parameters
    ----------
    store : str or Path
    table : pa.Table
    opened : lance.LanceDataset, optional
        The store's `embeddings` in any version. Without it the newest is opened, which takes the longer the more
        fragments it has.

    Returns
    -------
    list of str
        JSON for `Finished.fragments`; empty for a table without rows.
    """
    if not table.num_rows:
        return []
    place = table_uri(store, EMBEDDINGS_TABLE) if opened is None else opened
    fragments = lance_write_fragments(table, place, mode="append", storage_options=storage_options(store))
    return [json.dumps(fragment.to_json()) for fragment in fragments]


@at_storage
def commit(
    store: str | Path, finished: Sequence[Finished], lease: Lease, *, there: Container[str] | None = None
) -> list[str]:
    """Make partitions visible: failures first, then one commit. Partitions already there are dropped.

    The commit appends the rows of these partitions, and removes those that they replace. A process killed before
    it leaves failures whose partition is not done: of new sources, which the next plan counts as settled; of
    changed ones, whose old row hides the failure, so that they are planned again like all others.

    Parameters
    ----------
    store : str or Path
    finished : sequence of Finished
        Of one name, the first counts.
    lease : Lease
    there : container of str, optional
        Partitions that have rows already, where the holder of the lease knows; they are looked for without it, which
        reads the names of all rows.

    Returns
    -------
    list of str
        The partitions that were not there before.

    Raises
    ------
    StoreBusy
        If the lease was lost; nothing is written then.
    ArtifactNotFound
        If a file that a worker wrote is gone.
    """
    first: dict[str, Finished] = {}
    for result in finished:
        first.setdefault(result.partition, result)
    if there is None:
        there = present(store, list(first)) if first else set()
    new = [result for name, result in first.items() if name not in there]
    failures = [result.failures for result in new if result.failures.num_rows]
    if failures:
        upsert_failures(store, pa.concat_tables(failures), lease)
    _append(store, new, lease)
    return [result.partition for result in new]


@at_storage
def upsert_failures(store: str | Path, table: pa.Table, lease: Lease) -> None:
    """Write failures by key, each with one attempt more than the store has for it.

    Parameters
    ----------
    table : pa.Table
        `galembed.schemas.FAILURES`; of rows with the same key the last one counts.

    Raises
    ------
    StoreBusy
        If the lease was lost.
    """
    table = _last_of_each(conform(table, FAILURES))
    if not table.num_rows:
        return
    with lease.fence():
        dataset = open_table(store, FAILURES_TABLE)
        known = dataset.to_table(columns=[*KEY, "attempts"])
        at = pc.index_in(joined_key(table), value_set=joined_key(known))
        before = pc.fill_null(known["attempts"].take(at), 0)
        attempts = pc.cast(pc.add(before, 1), pa.int32())
        column = table.column_names.index("attempts")
        table = table.set_column(column, FAILURES.field("attempts"), attempts)
        dataset.merge_insert(list(KEY)).when_matched_update_all().when_not_matched_insert_all().execute(table)


@at_storage
def prune(store: str | Path, withdrawn: pa.Table, lease: Lease) -> int:
    """Remove sources from both tables; those that are not there are none.

    Parameters
    ----------
    withdrawn : pa.Table
        `survey`, `source_id`.

    Returns
    -------
    int
        Sources removed.

    Raises
    ------
    StoreBusy
        If the lease was lost.
    """
    wanted = joined_key(withdrawn)
    failed = open_table(store, FAILURES_TABLE).to_table(columns=list(KEY))
    failed = failed.filter(pc.is_in(joined_key(failed), value_set=wanted))
    removed = rows_with(open_table(store, EMBEDDINGS_TABLE), wanted)[1]
    _delete_failures(store, failed, lease)
    if len(removed):
        _commit(store, lease, lambda dataset: _operation(store, dataset, (), rows_with(dataset, wanted)[0]))
    return len(pc.unique(pa.concat_arrays([joined_key(failed), removed])))


@at_storage
def tidy(store: str | Path, lease: Lease) -> int:
    """Settle and clean a store after a job, and repair what must not be.

    Of a source with several rows the first is kept; failures of sources that are embedded are dropped; small
    fragments are merged once there are many; orphan files are removed. Nothing that waits for its commit may be
    left when this is called: orphans are data files that no version of either table knows, those of workers and
    committers that died, and of tasks that Dask ran twice. Whoever holds the lease may remove them, since nobody else
    can ever commit them.

    Returns
    -------
    int
        Orphan files removed.
    """
    _commit(store, lease, lambda dataset: _operation(store, dataset, (), repeated_rows(dataset)[0]))
    _drop_embedded_failures(store, lease)
    with lease.fence():
        unless_preempted(lambda: _merge(store))
    return sweep(store, lease)


def _merge(store: str | Path) -> None:
    dataset = open_table(store, EMBEDDINGS_TABLE)
    small = sum(fragment.count_rows() < _SMALL_ROWS for fragment in dataset.get_fragments())
    if small >= SMALL_FRAGMENTS:
        dataset.optimize.compact_files(target_rows_per_fragment=FRAGMENT_ROWS)


@at_storage
def sweep(store: str | Path, lease: Lease) -> int:
    """Remove orphan files; see `tidy`, also for when it may be called.

    Returns
    -------
    int
        Orphan files removed.
    """
    with lease.fence():
        return sum(_sweep(store, table) for table in (EMBEDDINGS_TABLE, FAILURES_TABLE))


def _sweep(store: str | Path, table: str) -> int:
    plan = open_table(store, table).explain_cleanup_old_versions(
        delete_unverified=True, include_files=True, max_files=1_000_000
    )
    # Index files of a `galembed index` under way are unverified too: only data files are touched.
    orphans = [Path(item.path).name for item in plan.candidate_files if item.kind == "data" and item.unverified]
    system, root = file_system(store)
    there = [path for path in (f"{root}/{table}.lance/data/{name}" for name in orphans) if system.exists(path)]
    if there:
        system.rm(there)
    return len(orphans)


def _append(store: str | Path, results: Sequence[Finished], lease: Lease) -> None:
    """Bring the rows of partitions in, and those that they replace out, in one commit."""
    names = [result.partition for result in results]
    tried = False

    def plan(dataset: Any) -> Any:
        nonlocal tried
        there = present_in(dataset, names) if tried else set()
        tried = True
        new = [result for result in results if result.partition not in there]
        fragments = [text for result in new for text in result.fragments]
        replaced = [joined_key(result.replaced) for result in new if len(result.replaced)]
        stale = rows_with(dataset, pa.concat_arrays(replaced))[0] if replaced else np.empty(0, np.uint64)
        return _operation(store, dataset, fragments, stale)

    _commit(store, lease, plan)


def _commit(store: str | Path, lease: Lease, plan: Callable[[Any], Any]) -> None:
    """Make the commit that `plan` finds for the newest version of `embeddings`, or none.

    Lance does not try again by itself: where the answer to a write was lost, its second try would append the same
    rows once more. `plan` looks at the rows.
    """
    for left in reversed(range(_COMMIT_TRIES)):
        with lease.fence():
            dataset = open_table(store, EMBEDDINGS_TABLE)
            operation = plan(dataset)
            if operation is None:
                return
            try:
                lance.LanceDataset.commit(dataset, operation, read_version=dataset.version, max_retries=0)
                return
            except OSError:
                if not left:
                    raise


def _operation(store: str | Path, dataset: Any, fragments: Sequence[str], stale: NDArray[np.uint64]) -> Any:
    """Return the operation that appends fragments and removes the rows at addresses; None if there is neither."""
    metadata = [FragmentMetadata.from_json(text) for text in fragments]
    _require_files(store, metadata)
    if not len(stale):
        return lance.LanceOperation.Append(metadata) if metadata else None
    numbers, offsets = (stale >> np.uint64(32)).astype(np.int64), (stale & np.uint64(0xFFFFFFFF)).astype(np.int64)
    updated, removed = [], []
    for number in np.unique(numbers).tolist():
        left = dataset.get_fragment(number).delete_rows(offsets[numbers == number].tolist())
        if left is None:
            removed.append(number)
        else:
            updated.append(left)
    return lance.LanceOperation.Update(removed_fragment_ids=removed, updated_fragments=updated, new_fragments=metadata)


def _require_files(store: str | Path, fragments: Sequence[FragmentMetadata]) -> None:
    """Check that data files are there: Lance would commit a fragment without its file, and no read would work."""
    system, root = file_system(store)
    files = [f"{root}/{EMBEDDINGS_TABLE}.lance/data/{file.path}" for fragment in fragments for file in fragment.files]
    with ThreadPoolExecutor(_REQUESTS) as pool:
        there = list(pool.map(system.exists, files))
    missing = [file for file, found in zip(files, there, strict=True) if not found]
    if missing:
        raise ArtifactNotFound(f"{missing[0]} and {len(missing) - 1} more files that workers wrote are gone; run again")


def _drop_embedded_failures(store: str | Path, lease: Lease) -> None:
    failed = open_table(store, FAILURES_TABLE).to_table(columns=list(KEY))
    if failed.num_rows:
        embedded = rows_with(open_table(store, EMBEDDINGS_TABLE), joined_key(failed))[1]
        _delete_failures(store, failed.filter(pc.is_in(joined_key(failed), value_set=embedded)), lease)


def _delete_failures(store: str | Path, gone: pa.Table, lease: Lease) -> None:
    if gone.num_rows:
        with lease.fence():
            open_table(store, FAILURES_TABLE).merge_insert(list(KEY)).when_matched_delete().execute(gone)


def _last_of_each(table: pa.Table) -> pa.Table:
    """Keep the last row of each key, since merge_insert would insert all."""
    codes = joined_key(table).dictionary_encode().indices.to_numpy()
    _, from_end = np.unique(codes[::-1], return_index=True)
    return table.take(np.sort(len(table) - 1 - from_end))
