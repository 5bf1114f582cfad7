"""The versions of a store, and going back to one: both tables together. `docs/exactly-once.md` says how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from galembed.errors import BadRequest
from galembed.store.keys import KEY, joined, joined_key, open_table
from galembed.store.lease import Lease
from galembed.store.places import EMBEDDINGS_TABLE, FAILURES_TABLE, at_storage, require_store

_OPERATIONS: Final = {
    "Append": "embedded",
    "Update": "embedded",
    "Delete": "removed",
    "Overwrite": "made",
    "Rewrite": "files merged",
    "CreateIndex": "indexed",
    "Restore": "rolled back",
    "Merge": "columns added",
}


@dataclass(frozen=True)
class Version:
    """One state of a store that can be gone back to.

    Attributes
    ----------
    number : int
        Lance's version of `embeddings`.
    time : datetime
        When it was committed, UTC.
    rows, failures : int
        Rows of the two tables then; hidden failures count.
    what : str
        What made it.
    failures_version : int
        The version of `failures` that was the newest then.
    """

    number: int
    time: datetime
    rows: int
    failures: int
    what: str
    failures_version: int

    def __str__(self) -> str:
        return f"{self.number:>7}  {self.time:%Y-%m-%d %H:%M:%S}  {self.rows:>12,}  {self.failures:>10,}  {self.what}"


@dataclass(frozen=True)
class Rollback:
    """What `rollback` did; `str` gives it for reading.

    Attributes
    ----------
    path : str
    to : Version
    undo : int
        The version to go back to for what was there before.
    taken, returned, exchanged : int
        Sources that have no row any more; that have one again; whose row is an earlier one.
    failures_before, failures_after : int
    lost_indexes : tuple of str
        Indexes that were made later.
    examples : tuple of str
        Some of the sources that were taken away, ``survey:id``.
    """

    path: str
    to: Version
    undo: int
    taken: int
    returned: int
    exchanged: int
    failures_before: int
    failures_after: int
    lost_indexes: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.path} is as it was in version {self.to.number}, of {self.to.time:%Y-%m-%d %H:%M:%S} UTC"]
        some = f", among them {', '.join(self.examples)}" if self.examples else ""
        lines += [f"taken away: {self.taken:,} row(s){some}"]
        lines += [f"back again: {self.returned:,} row(s) that had been removed"] * bool(self.returned)
        lines += [f"an earlier row of {self.exchanged:,} source(s)"] * bool(self.exchanged)
        lines += [f"failures: {self.failures_before:,} before, {self.failures_after:,} now"]
        lost = ", ".join(self.lost_indexes)
        lines += [f"made later and gone: index {lost}; make it again with `galembed index {self.path}`"] * bool(lost)
        lines += [
            "the same `galembed embed` embeds again what is not there now; "
            f"`galembed rollback {self.path} {self.undo}` undoes this"
        ]
        return "\n".join(lines)


@at_storage
def history(store: str | Path) -> list[Version]:
    """Return the versions of a store that are still on disk, oldest first.

    Raises
    ------
    ArtifactNotFound
        If there is no store.
    StorageError
        If it cannot be read.
    """
    require_store(store)
    dataset, failed = open_table(store, EMBEDDINGS_TABLE), open_table(store, FAILURES_TABLE)
    found: list[Version] = []
    before, beside = 0, failed.versions()
    versions = dataset.versions()
    for item in versions:
        rows = _rows(item)
        partner = paired(item, versions[-1], beside)
        found.append(
            Version(
                number=item["version"],
                time=committed(item),
                rows=rows,
                failures=_rows(partner),
                what=_what(dataset, item["version"], rows - before if found else None),
                failures_version=partner["version"],
            )
        )
        before = rows
    return found


@at_storage
def rollback(store: str | Path, version: int) -> Rollback:
    """Make both tables what they were in a version, as a new version of each.

    The failures are those that were there when the rows were committed. They go first, as in every commit: a store of
    which only they went back is sound, and the same call goes on.

    Parameters
    ----------
    store : str or Path
    version : int
        `Version.number`.

    Raises
    ------
    ArtifactNotFound
        If there is no store.
    BadRequest
        If there is no such version, or it is the newest.
    StoreBusy
        If a job is writing to the store.
    StorageError
        If it cannot be read or written.
    """
    history(store)  # a lease would make the directory
    with Lease(store) as lease:
        versions = history(store)
        target = _chosen(store, versions, version)
        now, failed = open_table(store, EMBEDDINGS_TABLE), open_table(store, FAILURES_TABLE)
        then = now.checkout_version(version)
        taken, returned, exchanged = _differences(now, then)
        lost = {index.name for index in now.describe_indices()} - {index.name for index in then.describe_indices()}
        if failed.version != target.failures_version:
            with lease.fence():
                failed.checkout_version(target.failures_version).restore()
        with lease.fence():
            then.restore()
    return Rollback(
        path=str(store),
        to=target,
        undo=versions[-1].number,
        taken=len(taken),
        returned=returned,
        exchanged=exchanged,
        failures_before=versions[-1].failures,
        failures_after=target.failures,
        lost_indexes=tuple(sorted(lost)),
        examples=tuple(key.replace("\x1f", ":") for key in taken.slice(0, 3).to_pylist()),
    )


def history_text(versions: Sequence[Version]) -> str:
    """Return versions as a table for reading."""
    head = f"{'version':>7}  {'time (UTC)':<19}  {'rows':>12}  {'failures':>10}  made by"
    return "\n".join([head, *map(str, versions)])


def committed(item: dict[str, Any]) -> datetime:
    """Return when a version of Lance's list was committed, UTC."""
    time: datetime = item["timestamp"]  # local time, without saying so
    return time.astimezone(UTC)


def paired(item: dict[str, Any], newest: dict[str, Any], failures: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the version of `failures` that belongs to one of `embeddings`: failures are committed before rows."""
    if item["version"] == newest["version"]:
        return failures[-1]
    earlier = [other for other in failures if other["timestamp"] <= item["timestamp"]]
    return earlier[-1] if earlier else failures[0]


def _rows(item: dict[str, Any]) -> int:
    return int(item["metadata"]["total_rows"])


def _what(dataset: Any, version: int, more: int | None) -> str:
    try:
        transaction = dataset.read_transaction(version)
    except TypeError:  # pylance 14 cannot show a merge of files that moved an index
        return _OPERATIONS["Rewrite"]
    operation: Any = getattr(transaction, "operation", None)
    kind = type(operation).__name__
    if kind == "Restore":
        return f"rolled back to {operation.version}"
    if kind == "Update":
        added = sum(fragment.physical_rows for fragment in operation.new_fragments)
        if more is None:
            return _OPERATIONS[kind]
        return ", ".join(
            filter(
                None, (f"{added:,} embedded" * bool(added), f"{added - more:,} replaced or removed" * (added > more))
            )
        )
    if kind == "Append":
        return f"{sum(fragment.physical_rows for fragment in operation.fragments):,} embedded"
    return _OPERATIONS.get(kind, "housekeeping")


def _chosen(store: str | Path, versions: Sequence[Version], number: int) -> Version:
    found = next((version for version in versions if version.number == number), None)
    if found is None:
        there = ", ".join(str(version.number) for version in versions[-10:])
        raise BadRequest(
            f"{store} has no version {number}; there are {there}. `galembed rollback {store}` lists them; "
            "`galembed compact` removes old ones"
        )
    if found is versions[-1]:
        raise BadRequest(f"version {number} is the newest of {store}: there is nothing to roll back")
    return found


def _differences(now: Any, then: Any) -> tuple[pa.Array, int, int]:
    """Return the keys that only `now` has, how many only `then` has, and how many both have in another row."""
    (now_keys, now_rows), (then_keys, then_rows) = (_keys(dataset) for dataset in (now, then))
    stays = pc.is_in(now_keys, value_set=then_keys)
    taken = now_keys.filter(pc.invert(stays))
    returned = pc.sum(pc.invert(pc.is_in(then_keys, value_set=now_keys))).as_py() or 0
    other = pc.and_(stays, pc.invert(pc.is_in(now_rows, value_set=then_rows)))
    return taken, returned, pc.sum(other).as_py() or 0


def _keys(dataset: Any) -> tuple[pa.Array, pa.Array]:
    table = dataset.to_table(columns=[*KEY, "partition"])
    key = joined_key(table)
    return key, joined(key, table["partition"].combine_chunks())
