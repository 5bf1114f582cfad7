"""Compaction: few files instead of many, no rows that were replaced, no versions that nobody needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from galembed.errors import ArtifactNotFound, BadRequest
from galembed.store.commit import FRAGMENT_ROWS, store_schema, tidy
from galembed.store.formats import upgrade
from galembed.store.history import committed, paired
from galembed.store.keys import open_table
from galembed.store.lease import Lease
from galembed.store.places import EMBEDDINGS_TABLE, FAILURES_TABLE, at_storage, file_system, unless_preempted

KEEP: Final = timedelta(hours=1)
"""For so long a version stays after another took its place, for those who opened it."""


@dataclass(frozen=True)
class Compaction:
    """What `compact` did; `str` gives it for reading.

    Attributes
    ----------
    path : str
    rows : int
        Of `embeddings`; the same before and after.
    fragments_before, fragments_after : int
        Files of rows, of both tables.
    dropped : int
        Rows that had been replaced or removed, and were in the files until now.
    orphans : int
        Files of jobs that died, removed.
    folded : int
        Rows that the indexes did not hold before.
    versions_removed, versions_kept : int
        Of `embeddings`.
    bytes_before, bytes_after : int
        Of the whole store.
    bytes_waiting : int
        What the versions that are kept for readers hold beside the newest.
    upgraded_from : int, optional
        The format that the store had, if it was an older one.
    keep : timedelta
    """

    path: str
    rows: int
    fragments_before: int
    fragments_after: int
    dropped: int
    orphans: int
    folded: int
    versions_removed: int
    versions_kept: int
    bytes_before: int
    bytes_after: int
    bytes_waiting: int
    upgraded_from: int | None
    keep: timedelta

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.rows:,} rows, {self.fragments_before:,} -> {self.fragments_after:,} fragments"]
        lines += [f"upgraded from format {self.upgraded_from}"] * (self.upgraded_from is not None)
        lines += [f"{self.dropped:,} replaced or removed rows left the files"] * bool(self.dropped)
        lines += [f"{self.orphans:,} files of jobs that died are removed"] * bool(self.orphans)
        lines += [f"{self.folded:,} rows folded into the indexes"] * bool(self.folded)
        lines += [f"versions: {self.versions_removed:,} removed, {self.versions_kept:,} kept"]
        lines += [f"bytes: {self.bytes_before:,} -> {self.bytes_after:,}"]
        if self.bytes_waiting:
            lines += [
                f"{self.bytes_waiting:,} of them are kept for readers of versions of the last "
                f"{self.keep / timedelta(hours=1):g} h: a later `galembed compact {self.path}` removes them, "
                "or one with --keep 0 now, if nobody reads"
            ]
        return "\n".join(lines)


@at_storage
def compact(store: str | Path, *, keep: timedelta = KEEP) -> Compaction:
    """Merge small fragments, drop replaced rows, fold new rows into the indexes, remove old versions.

    A store of an older format is brought to this one first. What is done stays done: rows keep their partition, and
    a job that goes on after this skips them. A version stays for `keep` after another took its place, so that a
    `Store` that was opened before goes on answering for that long; open it again then.

    Parameters
    ----------
    store : str or Path
    keep : timedelta
        0 leaves the newest version alone.

    Raises
    ------
    ArtifactNotFound
        If there is no store.
    ArtifactMismatch
        If a newer galembed made it.
    BadRequest
        If `keep` is negative.
    StoreBusy
        If a job is writing to it.
    StorageError
        If it cannot be read or written.
    """
    if keep < timedelta(0):
        raise BadRequest(f"keep is how long old versions stay, at least 0; got {keep}")
    if store_schema(store) is None:
        raise ArtifactNotFound(f"no store at {store}; make one with `galembed embed SOURCES --store PATH`")
    bytes_before = _size(store)
    with Lease(store) as lease:
        before = _fragments(store)
        unindexed = _unindexed(store)
        upgraded_from = upgrade(store, lease)
        orphans = tidy(store, lease)
        dropped = _deleted(store)
        for table in (FAILURES_TABLE, EMBEDDINGS_TABLE):
            with lease.fence():
                unless_preempted(partial(_merge, store, table))
            with lease.fence():
                unless_preempted(partial(_fold, store, table))
        removed = _clean(store, lease, keep)
        dataset = open_table(store, EMBEDDINGS_TABLE)
        return Compaction(
            path=str(store),
            rows=dataset.count_rows(),
            fragments_before=before,
            fragments_after=_fragments(store),
            dropped=dropped,
            orphans=orphans,
            folded=unindexed,
            versions_removed=removed,
            versions_kept=len(dataset.versions()),
            bytes_before=bytes_before,
            bytes_after=_size(store),
            bytes_waiting=sum(_waiting(open_table(store, table)) for table in (EMBEDDINGS_TABLE, FAILURES_TABLE)),
            upgraded_from=upgraded_from,
            keep=keep,
        )


def _merge(store: str | Path, table: str) -> None:
    open_table(store, table).optimize.compact_files(
        target_rows_per_fragment=FRAGMENT_ROWS, materialize_deletions_threshold=0.0
    )


def _fold(store: str | Path, table: str) -> None:
    open_table(store, table).optimize.optimize_indices()


def _clean(store: str | Path, lease: Lease, keep: timedelta) -> int:
    """Remove versions of both tables; return how many of `embeddings`."""
    cutoff = datetime.now(UTC) - keep
    with lease.fence():
        rows, failed = open_table(store, EMBEDDINGS_TABLE), open_table(store, FAILURES_TABLE)
        versions, beside = rows.versions(), failed.versions()
        gone = _superseded(versions, cutoff)
        kept = [item for item in versions if item["version"] not in gone]
        partners = {paired(item, versions[-1], beside)["version"] for item in kept}
        for dataset, numbers in ((rows, gone), (failed, [n for n in _superseded(beside, cutoff) if n not in partners])):
            if numbers:
                dataset.cleanup_old_versions(versions=numbers, error_if_tagged_old_versions=False)
    return len(gone)


def _superseded(versions: Sequence[dict[str, Any]], cutoff: datetime) -> list[int]:
    """Return the versions that were not the newest at any time since."""
    return [item["version"] for item, later in pairwise(versions) if committed(later) <= cutoff]


def _waiting(dataset: Any) -> int:
    older = [item["version"] for item in dataset.versions()][:-1]
    if not older:
        return 0
    plan = dataset.explain_cleanup_old_versions(versions=older, error_if_tagged_old_versions=False)
    return int(plan.stats.bytes_removed)


def _fragments(store: str | Path) -> int:
    return sum(len(open_table(store, table).get_fragments()) for table in (EMBEDDINGS_TABLE, FAILURES_TABLE))


def _deleted(store: str | Path) -> int:
    return sum(fragment.num_deletions for fragment in open_table(store, EMBEDDINGS_TABLE).get_fragments())


def _unindexed(store: str | Path) -> int:
    dataset = open_table(store, EMBEDDINGS_TABLE)
    rows = dataset.count_rows()
    return max((rows - int(index.num_rows_indexed) for index in dataset.describe_indices()), default=0)


def _size(store: str | Path) -> int:
    system, root = file_system(store)
    return sum(int(info["size"] or 0) for info in system.find(root, detail=True).values())
