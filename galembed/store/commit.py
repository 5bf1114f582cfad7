"""The store, write side: how partitions become visible exactly once. `docs/exactly-once.md` has the protocol.

Lance enforces no keys and knows no transaction over two tables, so all of it rests on three things: one
committer at a time (`Lease`), an order (`commit`: failures by key, then one append), and dropping what is
already there.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from lance.fragment import FragmentMetadata
from lance.fragment import write_fragments as lance_write_fragments

from galembed.errors import ArtifactMismatch, ArtifactNotFound, SchemaMismatch, StoreBusy
from galembed.schemas import FAILURES, StoreContract, conform
from galembed.store import EMBEDDINGS_TABLE, FAILURES_TABLE, JOB_FILE

KEY: Final = ("survey", "source_id")

LEASE_FILE: Final = "lease.json"
LOCK_FILE: Final = ".lease.lock"

LEASE_SECONDS: Final = 60.0
"""A lease that its holder has not renewed for so long can be taken over."""

SMALL_FRAGMENTS: Final = 64
"""From this many small fragments on, `tidy` merges them: each one costs every search a file to open."""

_SMALL_ROWS: Final = 100_000
_FRAGMENT_ROWS: Final = 1_000_000
_UNIT_SEPARATOR: Final = "\x1f"


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
    """

    partition: str
    fragments: tuple[str, ...]
    failures: pa.Table


@dataclass(frozen=True)
class StoreKeys:
    """Which sources a store has settled.

    Attributes
    ----------
    embedded : pa.Table
        `survey`, `source_id`, `source_version`, `partition`.
    failed : pa.Table
        The same and `stage`; failures that were embedded later are left out.
    """

    embedded: pa.Table
    failed: pa.Table


def store_schema(store: Path) -> pa.Schema | None:
    """Return the schema of a store's `embeddings`, or None where there is no store yet.

    Raises
    ------
    ArtifactMismatch
        If `store` is a file, or a directory that holds other things.
    """
    if _uri(store, EMBEDDINGS_TABLE).is_dir():
        schema: pa.Schema = _open(store, EMBEDDINGS_TABLE).schema
        return schema
    if store.is_file():
        raise ArtifactMismatch(f"{store} is a file; a store is a directory, choose another --store")
    ours = {LEASE_FILE, LOCK_FILE, JOB_FILE, f"{FAILURES_TABLE}.lance"}
    strangers = sorted(path.name for path in store.iterdir() if path.name not in ours) if store.is_dir() else []
    if strangers:
        raise ArtifactMismatch(
            f"{store} holds other things ({', '.join(strangers[:3])}) and no galembed store; "
            "choose a new directory for --store"
        )
    return None


def prepare(store: Path, schema: pa.Schema, lease: Lease) -> None:
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
        if not _uri(store, name).is_dir():
            with lease.fence():
                lance.write_dataset(wanted.empty_table(), str(_uri(store, name)), mode="create")


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


def write_fragments(store: Path, table: pa.Table) -> list[str]:
    """Write rows of `embeddings` as data files that no reader sees yet; any process may do so at any time.

    Returns
    -------
    list of str
        JSON for `append_fragments`; empty for a table without rows.
    """
    if not table.num_rows:
        return []
    fragments = lance_write_fragments(table, str(_uri(store, EMBEDDINGS_TABLE)), mode="append")
    return [json.dumps(fragment.to_json()) for fragment in fragments]


def commit(store: Path, finished: Sequence[Finished], lease: Lease) -> list[str]:
    """Make partitions visible: failures first, then one append. Partitions already there are dropped.

    A process killed between the two leaves failures whose partition is not done; the next plan counts those
    sources as settled and plans the others again.

    Returns
    -------
    list of str
        The partitions that were not there before.

    Raises
    ------
    StoreBusy
        If the lease was lost; nothing is written then.
    """
    first = {result.partition: result for result in reversed(finished)}
    there = present(store, list(first)) if first else set()
    new = [result for name, result in first.items() if name not in there]
    failures = [result.failures for result in new if result.failures.num_rows]
    if failures:
        upsert_failures(store, pa.concat_tables(failures), lease)
    with lease.fence():
        _append(store, [text for result in new for text in result.fragments])
    return [result.partition for result in new]


def upsert_failures(store: Path, table: pa.Table, lease: Lease) -> None:
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
        dataset = _open(store, FAILURES_TABLE)
        known = dataset.to_table(columns=[*KEY, "attempts"])
        at = pc.index_in(joined_key(table), value_set=joined_key(known))
        before = pc.fill_null(known["attempts"].take(at), 0)
        attempts = pc.cast(pc.add(before, 1), pa.int32())
        column = table.column_names.index("attempts")
        table = table.set_column(column, FAILURES.field("attempts"), attempts)
        dataset.merge_insert(list(KEY)).when_matched_update_all().when_not_matched_insert_all().execute(table)


def append_fragments(store: Path, fragments: Mapping[str, Sequence[str]], lease: Lease) -> list[str]:
    """Make fragments visible in one append.

    Parameters
    ----------
    fragments : mapping of str to sequence of str
        What `write_fragments` returned, by partition. A partition with rows in the store is dropped.

    Returns
    -------
    list of str
        The partitions that were appended.

    Raises
    ------
    StoreBusy
        If the lease was lost; nothing is appended then.
    """
    offered = {name: metadata for name, metadata in fragments.items() if metadata}
    if not offered:
        return []
    with lease.fence():
        there = present(store, list(offered))
        new = [name for name in offered if name not in there]
        _append(store, [text for name in new for text in offered[name]])
    return new


def _append(store: Path, fragments: Sequence[str]) -> None:
    if not fragments:
        return
    metadata = [FragmentMetadata.from_json(text) for text in fragments]
    # Lance would commit a fragment without its file, and every later read of the table would fail.
    files = [_data(store) / file.path for fragment in metadata for file in fragment.files]
    missing = [file for file in files if not file.exists()]
    if missing:
        raise ArtifactNotFound(f"{missing[0]} and {len(missing) - 1} more files that workers wrote are gone; run again")
    dataset = _open(store, EMBEDDINGS_TABLE)
    lance.LanceDataset.commit(dataset, lance.LanceOperation.Append(metadata), read_version=dataset.version)


def present(store: Path, partitions: Sequence[str]) -> set[str]:
    """Return those of `partitions` that have rows in `embeddings`."""
    dataset = _open(store, EMBEDDINGS_TABLE)
    if not dataset.count_rows():
        return set()
    wanted = pa.array(partitions, pa.string())
    found: set[str] = set()
    for batch in dataset.to_batches(columns=["partition"]):
        names = batch.column("partition")
        found.update(pc.unique(names.filter(pc.is_in(names, value_set=wanted))).to_pylist())
    return found


def keys(store: Path) -> StoreKeys:
    """Return the keys of all settled sources; only those columns are read."""
    columns = [*KEY, "source_version", "partition"]
    embedded = _open(store, EMBEDDINGS_TABLE).to_table(columns=columns)
    if not _uri(store, FAILURES_TABLE).is_dir():
        return StoreKeys(embedded, FAILURES.empty_table().select([*columns, "stage"]))
    failed = _open(store, FAILURES_TABLE).to_table(columns=[*columns, "stage"])
    if failed.num_rows:
        failed = failed.filter(pc.invert(pc.is_in(joined_key(failed), value_set=joined_key(embedded))))
    return StoreKeys(embedded, failed)


def tidy(store: Path, lease: Lease) -> int:
    """Settle and clean a store after a job: failures embedded since are dropped, orphan files removed.

    Nothing that waits for its commit may be left when this is called. Small fragments are merged once there
    are many. Orphans are data files that no version of the table knows: those of workers that died, and of
    tasks that Dask ran twice. Whoever holds the lease may remove them, since nobody else can ever commit
    them.

    Returns
    -------
    int
        Orphan files removed.
    """
    _drop_embedded_failures(store, lease)
    with lease.fence():
        dataset = _open(store, EMBEDDINGS_TABLE)
        small = sum(fragment.count_rows() < _SMALL_ROWS for fragment in dataset.get_fragments())
        if small >= SMALL_FRAGMENTS:
            dataset.optimize.compact_files(target_rows_per_fragment=_FRAGMENT_ROWS)
    with lease.fence():
        dataset = _open(store, EMBEDDINGS_TABLE)
        plan = dataset.explain_cleanup_old_versions(delete_unverified=True, include_files=True, max_files=1_000_000)
        # Index files of a `galembed index` under way are unverified too: only data files are touched.
        orphans = [Path(item.path).name for item in plan.candidate_files if item.kind == "data" and item.unverified]
        for name in orphans:
            (_data(store) / name).unlink(missing_ok=True)
    return len(orphans)


def joined_key(table: pa.Table) -> pa.Array:
    """Return survey and source id of each row as one text."""
    return joined(*(table[name] for name in KEY))


def joined(*columns: pa.ChunkedArray | pa.Array) -> pa.Array:
    """Return text columns joined row by row, as one large_string array; null where any is null."""
    columns = tuple(pc.cast(column, pa.large_string()) for column in columns)
    texts = pc.binary_join_element_wise(*columns, pa.scalar(_UNIT_SEPARATOR, pa.large_string()))
    return texts.combine_chunks() if isinstance(texts, pa.ChunkedArray) else texts


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    partial.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def _drop_embedded_failures(store: Path, lease: Lease) -> None:
    failures = _open(store, FAILURES_TABLE)
    failed = failures.to_table(columns=list(KEY))
    if not failed.num_rows:
        return
    embedded = joined_key(_open(store, EMBEDDINGS_TABLE).to_table(columns=list(KEY)))
    settled = failed.filter(pc.is_in(joined_key(failed), value_set=embedded))
    if settled.num_rows:
        with lease.fence():
            _open(store, FAILURES_TABLE).merge_insert(list(KEY)).when_matched_delete().execute(settled)


def _last_of_each(table: pa.Table) -> pa.Table:
    """Keep the last row of each key, since merge_insert would insert all."""
    codes = joined_key(table).dictionary_encode().indices.to_numpy()
    _, from_end = np.unique(codes[::-1], return_index=True)
    return table.take(np.sort(len(table) - 1 - from_end))


def _uri(store: Path, table: str) -> Path:
    return store / f"{table}.lance"


def _data(store: Path) -> Path:
    return _uri(store, EMBEDDINGS_TABLE) / "data"


def _open(store: Path, table: str) -> Any:
    return lance.dataset(str(_uri(store, table)))


@dataclass
class Lease:
    """The right to commit to one store, held by one process at a time. A context manager.

    The lease is a file with a token, made with O_EXCL; its modification time is the heartbeat, which a
    thread renews. The token is read again before each commit, so that a holder that slept too long finds
    itself fenced off. Between that look and the end of the commit an flock keeps others from taking over.

    Attributes
    ----------
    store : Path
    seconds : float
        Age of the heartbeat from which others may take over.
    token : str
        Names this holding.

    Raises
    ------
    StoreBusy
        On entering, if a live process holds it: the message says which.
    """

    store: Path
    seconds: float = LEASE_SECONDS
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def path(self) -> Path:
        """The lease file."""
        return self.store / LEASE_FILE

    def __enter__(self) -> Self:
        self.store.mkdir(parents=True, exist_ok=True)
        with self._lock():
            holder = _read_lease(self.path)
            if holder is not None:
                self._refuse_if_alive(holder)
                self.path.unlink(missing_ok=True)
            self._create()
        self._thread = threading.Thread(target=self._renew, name="galembed-lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        with contextlib.suppress(StoreBusy), self._lock():
            if self._mine():
                self.path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def fence(self) -> Iterator[None]:
        """Let the body commit, if the lease is still ours.

        Raises
        ------
        StoreBusy
            If another process has taken it over, or it was removed.
        """
        with self._lock():
            if not self._mine():
                holder = _read_lease(self.path)
                taker = _describe(holder) if holder else "nobody; the lease file was removed"
                raise StoreBusy(
                    f"{self.store}: this job lost its lease (now held by {taker}) and commits nothing more. "
                    "What it committed stays; run the same command again when the other job has ended"
                )
            yield

    def _create(self) -> None:
        facts = {
            "token": self.token,
            "seconds": self.seconds,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "pid_namespace": _pid_namespace(),
            "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        try:
            handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError as error:
            raise StoreBusy(f"{self.store}: another job took the lease just now; try again later") from error
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(facts, stream)

    def _refuse_if_alive(self, holder: Mapping[str, Any]) -> None:
        if _died_here(holder):
            return
        age, limit = self._age(), float(holder.get("seconds", self.seconds))
        if age is not None and age < limit:
            raise StoreBusy(
                f"{self.store} is being written by {_describe(holder)}, heard of {max(age, 0):.0f} s ago; "
                f"wait for it, stop it, or use another --store (the lease of a dead job lasts {limit:.0f} s)"
            )

    def _age(self) -> float | None:
        """Return seconds since the heartbeat, by the file system's clock: those of hosts differ."""
        clock = self.store / LOCK_FILE
        os.utime(clock)
        try:
            return clock.stat().st_mtime - self.path.stat().st_mtime
        except FileNotFoundError:
            return None

    def _mine(self) -> bool:
        holder = _read_lease(self.path)
        return holder is not None and holder.get("token") == self.token

    def _renew(self) -> None:
        while not self._stop.wait(self.seconds / 6):
            with contextlib.suppress(OSError):
                if not self._mine():
                    return
                os.utime(self.path)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Hold the flock of the store; where the file system has none, the token alone protects."""
        with (self.store / LOCK_FILE).open("a") as stream:
            deadline = time.monotonic() + self.seconds
            while True:
                try:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as error:
                    if time.monotonic() > deadline:
                        raise StoreBusy(f"{self.store}: another job is committing; try again later") from error
                    time.sleep(0.05)
                except OSError:
                    break
            yield


def _read_lease(path: Path) -> dict[str, Any] | None:
    """Return a lease's content; empty while it is being written, None without one."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def _describe(holder: Mapping[str, Any]) -> str:
    if not holder:
        return "a job that is starting"
    return f"process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}"


def _died_here(holder: Mapping[str, Any]) -> bool:
    """Tell whether the holder was a process of this host that is gone; unknown counts as no."""
    if holder.get("host") != socket.gethostname() or holder.get("pid_namespace") != _pid_namespace():
        return False
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, KeyError):
        return False
    return False


def _pid_namespace() -> str:
    """Return what tells containers with the same host name apart; a process id means nothing across them."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
