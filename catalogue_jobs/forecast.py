"""What a job is going to cost: sources, bytes, disk, hours."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.filesize import decimal

from catalogue_jobs.partition import embed_partition
from catalogue_jobs.plan import Outstanding, Partition, files_of, rows_of
from galembed.backbones import Backbone
from galembed.runtimes import Runtime
from galembed.schemas import THUMBNAIL_BYTES
from galembed.sources import SourceReader

CALIBRATION_SECONDS: Final = 10.0
"""Whole partitions from all over the plan are embedded, and thrown away, until so much time is spent."""

_CALIBRATION_PARTITIONS: Final = 8
_WARM_UP: Final = 4
_TEXT_BYTES: Final = 32
"""Of a text column that the source list does not have yet, in a row."""

_REWRITTEN: Final = 2
"""Small fragments are merged, and stay beside their merger until old versions are cleaned up."""


@dataclass(frozen=True)
class Forecast:
    """What a job would do; `str` gives it for reading.

    Attributes
    ----------
    store : str
    todo : Outstanding
    partitions : int
    tiles : int
        Files with sources to embed; those of a tile's bands count as one.
    reads_per_tile : float
        Partitions with sources of a tile, on average: how often it is opened.
    bytes_to_read : int or None
        Of those files, as often as they are opened; None where their sizes are not known.
    disk_needed : int
        Bytes of the store's growth, merging of fragments included.
    disk_free : int or None
        Where the store is; None on object storage.
    seconds_per_source : float or None
        Of one worker, measured; None without a calibration.
    calibrated_on : int
        Sources that were embedded to learn that.
    workers : int
    engine : str
    """

    store: str
    todo: Outstanding
    partitions: int
    tiles: int
    reads_per_tile: float
    bytes_to_read: int | None
    disk_needed: int
    disk_free: int | None
    seconds_per_source: float | None = None
    calibrated_on: int = 0
    workers: int = 1
    engine: str = ""

    @property
    def hours(self) -> float | None:
        """Expected hours of the run, if the workers do not slow one another down."""
        if self.seconds_per_source is None:
            return None
        return len(self.todo.table) * self.seconds_per_source / self.workers / 3600

    def __str__(self) -> str:
        todo = self.todo
        most = "up to " if self.reads_per_tile > 1 else ""
        read = "of unknown size" if self.bytes_to_read is None else f"{most}{decimal(self.bytes_to_read)} to read"
        lines = {
            "store": self.store,
            "sources": f"{len(todo.table):,} of {todo.listed:,} to embed; "
            f"{todo.embedded:,} embedded and {todo.failed:,} failed before",
            "work": f"{self.partitions:,} partitions",
            "files": f"{self.tiles:,}, each opened {most}{self.reads_per_tile:.2f} times; {read}",
            "disk": f"{decimal(self.disk_needed)} needed"
            + ("" if self.disk_free is None else f", {decimal(self.disk_free)} free"),
            "time": self._time(),
        }
        lines |= {name: text for name, (count, text) in self._unusual().items() if count}
        return "\n".join(f"{name:<9} {text}" for name, text in lines.items())

    def _unusual(self) -> dict[str, tuple[int, str]]:
        todo = self.todo
        return {
            "changed": (len(todo.changed), f"{len(todo.changed):,} have other files than when they were embedded"),
            "outdated": (todo.outdated, f"{todo.outdated:,} have other files, and are left as they are"),
            "rejected": (len(todo.rejected), f"{len(todo.rejected):,} rows of the list, which go to failures"),
            "withdrawn": (
                len(todo.withdrawn),
                f"{len(todo.withdrawn):,} of the store's sources are of this survey, yet not in this list",
            ),
        }

    def _time(self) -> str:
        if self.hours is None:
            return "not measured: no source could be embedded" if len(self.todo.table) else "none"
        text = f"{self.hours:.1f} hours" if self.hours >= 1 else f"{max(self.hours * 60, 0.1):.1f} minutes"
        return (
            f"about {text} on {self.workers} worker(s), from {self.calibrated_on} sources embedded here by one "
            f"({1 / (self.seconds_per_source or 1):.1f} images/s, {self.engine})"
        )


def opened(table: pa.Table, parts: Sequence[Partition]) -> tuple[int, float, int | None]:
    """Return files, how often one is opened, and the bytes that makes.

    Parameters
    ----------
    table : pa.Table
        `galembed.schemas.SOURCES`, in the order of `parts`.
    """
    if not len(table):
        return 0, 0.0, 0
    codes = files_of(table["source_uri"]).dictionary_encode().indices.to_numpy(zero_copy_only=False)
    part = np.repeat(np.arange(len(parts)), [len(each.rows) for each in parts])
    pairs = np.unique(np.stack([codes.astype(np.int64), part]), axis=1)
    times = np.bincount(pairs[0])
    first = np.unique(codes, return_index=True)[1]
    versions = pc.take(table["source_version"].combine_chunks(), pa.array(first))
    sizes = pc.struct_field(pc.extract_regex(versions, r"^(?P<bytes>\d+)-"), "bytes").cast(pa.int64())
    total = None if sizes.null_count else int(np.dot(times, sizes.to_numpy()))
    return len(times), float(times.mean()), total


def disk_needed(table: pa.Table, schema: pa.Schema) -> int:
    """Return the bytes that rows of a source list become in a store of `schema`."""
    per_row = 0.0
    for item in schema:
        if pa.types.is_fixed_size_list(item.type):
            per_row += item.type.list_size * item.type.value_type.bit_width / 8
        elif pa.types.is_primitive(item.type):
            per_row += item.type.bit_width / 8
        elif pa.types.is_binary(item.type):
            per_row += THUMBNAIL_BYTES
        elif item.name in table.column_names and len(table):
            per_row += table[item.name].nbytes / len(table)
        else:
            per_row += _TEXT_BYTES
    return int(_REWRITTEN * per_row * len(table))


def seconds_per_source(
    table: pa.Table,
    parts: Sequence[Partition],
    reader: SourceReader,
    backbone: Backbone,
    runtime: Runtime,
    schema: pa.Schema,
    batch: int,
) -> tuple[float | None, int]:
    """Embed a few partitions, write nothing, and return the seconds of one source, and how many were embedded.

    Whole ones: what it takes to open a tile is shared by as many sources as in the run.
    """
    chosen = [parts[at] for at in sorted(set(np.linspace(0, len(parts) - 1, _CALIBRATION_PARTITIONS).astype(int)))]

    def embedded_of(rows: pa.Table) -> int:
        outcome = embed_partition(rows, reader, runtime, backbone.contract, schema, partition="", batch=batch)
        return len(outcome.embeddings)

    embedded_of(rows_of(table, chosen[0]).slice(0, _WARM_UP))
    count, start, spent = 0, time.perf_counter(), 0.0
    for part in chosen:
        count += embedded_of(rows_of(table, part))
        spent = time.perf_counter() - start
        if spent >= CALIBRATION_SECONDS:
            break
    return (spent / count, count) if count else (None, 0)
