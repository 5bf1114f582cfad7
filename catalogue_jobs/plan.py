"""What is left to do, cut into partitions named by their own rows alone. Pure: no files, no Dask."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from galembed.errors import SchemaMismatch
from galembed.schemas import FAILURES, SOURCES, conform
from galembed.sky import HEALPIX_ORDER, healpix_index
from galembed.sources import SourceList
from galembed.store.keys import KEY, StoreKeys, joined, joined_key

ROWS_PER_PARTITION: Final = 256

_SHARE_OF_A_PARTITION: Final = 4
"""A tile with less than a quarter of a partition is planned together with its neighbours on the sky."""

_TREE_BITS: Final = 62
"""Both trees have 31 levels of four branches: HEALPix order 29 nested needs 58 bits and 12 base cells."""

_SHARED_CELL: Final = -1

_HASHED: Final = 2_500_000
"""Keys in a table of hashes at once; it takes some 70 bytes each."""

_ROW_OF_A_TABLE: Final = r"#(?P<row>\d+)$"
_ROW_SHIFT: Final = 30
"""Row numbers fill the upper bits of the tree, since it is cut from the top."""


@dataclass(frozen=True)
class Partition:
    """A unit of work.

    Attributes
    ----------
    name : str
        ``<tile, cell or both>-<hash of the rows' keys and versions>``.
    rows : ndarray, int64
        Row numbers in the table that was partitioned.
    """

    name: str
    rows: NDArray[np.int64]


@dataclass(frozen=True)
class Outstanding:
    """The anti-join of a source list and a store.

    Attributes
    ----------
    table : pa.Table
        Sources to embed.
    listed : int
        Sources in the list, without the rejected ones.
    embedded, failed : int
        Listed sources that the store has as rows, or as failures, and that are not tried again.
    changed : pa.Table
        `survey`, `source_id` of those sources to embed that the store has, from another version of their file.
    outdated : int
        Such sources that are left as they are.
    withdrawn : pa.Table
        `survey`, `source_id` of sources that the store has, of a survey of this list, and that are not in the list.
    rejected : pa.Table
        Failures of the list itself that the store does not have (`galembed.schemas.FAILURES`).
    """

    table: pa.Table
    listed: int
    embedded: int
    failed: int
    changed: pa.Table
    outdated: int
    withdrawn: pa.Table
    rejected: pa.Table


def outstanding(
    sources: SourceList, stored: StoreKeys | None, *, retry_failed: bool = False, keep_changed: bool = False
) -> Outstanding:
    """Return what a store still lacks of a source list.

    A source whose file is another version than when it was embedded, or failed, is to be done again. Versions are
    compared where both are known.

    Parameters
    ----------
    sources : SourceList
    stored : StoreKeys or None
        None for a store that does not exist yet.
    retry_failed : bool
        Try sources again that have failed.
    keep_changed : bool
        Leave vectors as they are although their source's file is another version now.

    Raises
    ------
    SchemaMismatch
        If the list breaks its schema or names a source twice.
    """
    table = sources.table
    conform(table, SOURCES)
    key = joined_key(table)
    if again := int(np.count_nonzero(_index_in(key, key).to_numpy() != np.arange(len(key)))):
        raise SchemaMismatch(f"the source list names {again} source(s) twice")
    rejected = _failures_of_list(sources.rejected)
    rejected = rejected.filter(_index_in(joined_key(rejected), key).is_null())
    none = table.select(list(KEY)).slice(0, 0)
    if stored is None:
        return Outstanding(table, len(table), 0, 0, none, 0, none, rejected)
    embedded_key, failed_key = joined_key(stored.embedded), joined_key(stored.failed)
    # What the list rejected once and accepts now was never tried.
    never = pc.equal(stored.failed["stage"], "list").combine_chunks()
    at, tried = _index_in(key, embedded_key), _index_in(key, failed_key)
    tried = pc.if_else(pc.fill_null(never.take(tried), False), pa.scalar(None, tried.type), tried)
    embedded = at.is_valid()
    failed = pc.and_not(tried.is_valid(), embedded)
    changed = _other_version(table, stored.embedded, at)
    retried = pc.and_(failed, pc.or_(_other_version(table, stored.failed, tried), pa.scalar(retry_failed)))
    outdated = _count(changed) if keep_changed else 0
    if keep_changed:
        changed = pc.and_(changed, pa.scalar(False))
    embedded = pc.and_not(embedded, changed)
    failed = pc.and_not(failed, retried)
    rejected_key = joined_key(rejected)
    known = [_index_in(rejected_key, each).is_valid() for each in (embedded_key, failed_key)]
    return Outstanding(
        table=table.filter(pc.invert(pc.or_(embedded, failed))),
        listed=len(table),
        embedded=_count(embedded),
        failed=_count(failed),
        changed=table.select(list(KEY)).filter(changed),
        outdated=outdated,
        withdrawn=pa.concat_tables(
            _withdrawn(each, each_key, key, table, sources.rejected)
            for each, each_key in ((stored.embedded, embedded_key), (stored.failed, failed_key))
        ),
        rejected=rejected.filter(pc.invert(pc.or_(*known))),
    )


def partitions(table: pa.Table, rows_per_partition: int = ROWS_PER_PARTITION) -> list[Partition]:
    """Cut sources into partitions; adding a source changes only the partition that it falls into.

    Sources of a tile that holds many are kept together, since its planes are then decompressed once; others
    go by their HEALPix cell, and those without a position by a hash of their key. A cell with more than
    `rows_per_partition` sources is cut into its four sub-cells, and so on.

    Parameters
    ----------
    table : pa.Table
        `galembed.schemas.SOURCES`; keys are unique.
    rows_per_partition : int
        At most so many rows in each; at least 1.
    """
    if rows_per_partition < 1:
        raise ValueError(f"rows_per_partition must be at least 1, got {rows_per_partition}")
    if not table.num_rows:
        return []
    key = joined_key(table)
    tile = _tiles(table["source_uri"], max(2, rows_per_partition // _SHARE_OF_A_PARTITION))
    positioned, index = _tree_index(table, key)
    order = np.lexsort((index, positioned, tile))
    edges = np.flatnonzero(np.diff(tile[order]) | np.diff(positioned[order])) + 1
    lines = joined(key, pc.fill_null(table["source_version"], "").combine_chunks())
    found = []
    for group in np.split(order, edges):
        label = (
            ""
            if tile[group[0]] == _SHARED_CELL
            else _tile_label(files_of(table["source_uri"].slice(int(group[0]), 1))[0].as_py())
        )
        kind = "hp" if positioned[group[0]] else "h"
        for cell, rows in _leaves(group, index[group], key, rows_per_partition, kind):
            place = "-".join(part for part in (label, cell) if part)
            found.append(Partition(f"{place or 'sky'}-{_digest(lines.take(pa.array(rows)))}", rows))
    return found


def in_order(table: pa.Table, parts: list[Partition]) -> tuple[pa.Table, list[Partition]]:
    """Return the table sorted by partition, and the partitions as rows of that.

    Taking each partition's rows from all over a table of 10 million took 0.1 s a time; this takes them once.
    """
    if not parts:
        return table, parts
    edges = np.cumsum([len(part.rows) for part in parts])[:-1]
    places = np.split(np.arange(len(table)), edges)
    moved = table.take(pa.array(np.concatenate([part.rows for part in parts])))
    return moved, [Partition(part.name, rows) for part, rows in zip(parts, places, strict=True)]


def rows_of(table: pa.Table, part: Partition) -> pa.Table:
    """Return a copy of a partition's rows without the rest of the table's buffers, for it travels."""
    low, high = int(part.rows.min()), int(part.rows.max())
    return table.slice(low, high - low + 1).take(pa.array(part.rows - low))


def halves(table: pa.Table, part: Partition) -> list[Partition]:
    """Return a partition of several rows as two or more, named like any other."""
    middle = len(part.rows) // 2
    return [
        Partition(inner.name, rows[inner.rows])
        for rows in (part.rows[:middle], part.rows[middle:])
        for inner in partitions(rows_of(table, Partition("", rows)), len(rows))
    ]


def _tiles(uris: pa.ChunkedArray, many: int) -> NDArray[np.int64]:
    """Return a code for each tile or table of at least `many` sources, and `_SHARED_CELL` for the other rows."""
    codes = pc.fill_null(files_of(uris).dictionary_encode().indices, -1).to_numpy(zero_copy_only=False)
    codes = codes.astype(np.int64)
    known = codes >= 0
    counts = np.bincount(codes[known], minlength=1)
    return np.where(known & (counts[codes] >= many), codes, _SHARED_CELL)


def files_of(uris: pa.ChunkedArray) -> pa.Array:
    """Return uris without the row number of a table's (``shard.parquet#12``)."""
    whole = joined(uris)
    if not pc.any(pc.match_substring(whole, "#")).as_py():
        return whole
    return pc.replace_substring_regex(whole, _ROW_OF_A_TABLE, "")


def _tree_index(table: pa.Table, key: pa.Array) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Return which rows have a position, and each row's place in its tree: HEALPix, or a hash of its key."""
    ra, dec = (pc.fill_null(table[name], np.nan).to_numpy().astype(np.float64) for name in ("ra", "dec"))
    positioned = np.isfinite(ra) & (np.abs(dec) <= 90)
    index = np.empty(len(table), np.int64)
    index[positioned] = healpix_index(ra[positioned], dec[positioned], HEALPIX_ORDER)
    index[~positioned] = _hashes(key.filter(pa.array(~positioned)))
    uris = joined(table["source_uri"])
    if pc.any(pc.match_substring(uris, "#")).as_py():
        # Rows of a table are read by row group, so they stay in its order whatever their place on the sky.
        rows = pc.extract_regex(uris, _ROW_OF_A_TABLE)
        of_table = pc.is_valid(rows).to_numpy(zero_copy_only=False)
        numbers = pc.struct_field(rows.filter(pa.array(of_table)), "row").cast(pa.int64()).to_numpy()
        index[of_table] = numbers << _ROW_SHIFT
        positioned[of_table] = False
    return positioned, index


def _leaves(
    rows: NDArray[np.int64], index: NDArray[np.int64], key: pa.Array, limit: int, kind: str
) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """Yield (cell, rows) of the leaves of a tree, each with at most `limit` rows; `index` is sorted."""
    stack = [(0, len(rows), _TREE_BITS)]
    while stack:
        low, high, shift = stack.pop()
        if high - low <= limit:
            yield _cell(kind, int(index[low]), shift), rows[low:high]
        elif shift == 0:
            here = rows[low:high]
            hashes = _hashes(key.take(pa.array(here)))
            order = np.argsort(hashes, kind="stable")
            for cell, leaf in _leaves(here[order], hashes[order], key, limit, "h"):
                yield f"{_cell(kind, int(index[low]), 0)}.{cell}", leaf
        else:
            shift -= 2
            first = int(index[low]) >> shift & ~3
            bounds = (np.arange(first + 1, first + 4, dtype=np.int64)) << shift
            inner = low + np.searchsorted(index[low:high], bounds)
            cuts = [low, *(int(cut) for cut in inner), high]
            stack.extend((a, b, shift) for a, b in reversed(list(itertools.pairwise(cuts))) if b > a)


def _cell(kind: str, index: int, shift: int) -> str:
    """Return a node's name, ``hp<order>.<HEALPix cell>`` or ``h<bits>.<hex prefix>``; the root has none."""
    if kind == "h":
        return f"h{_TREE_BITS - shift}.{index >> shift:x}"
    order = HEALPIX_ORDER - shift // 2
    return f"hp{order}.{index >> shift}" if order >= 0 else ""


def _hashes(key: pa.Array) -> NDArray[np.int64]:
    digests = (hashlib.blake2b(text.encode(), digest_size=8).digest() for text in key.to_pylist())
    raw = np.frombuffer(b"".join(digests), dtype=">u8")
    return (raw >> np.uint64(64 - _TREE_BITS)).astype(np.int64)


def _digest(lines: pa.Array) -> str:
    """Return a hash of rows that does not depend on their order."""
    return hashlib.sha256("\n".join(sorted(lines.to_pylist())).encode()).hexdigest()[:16]


def _tile_label(uri: str) -> str:
    return re.sub(r"[^\w.+-]", "_", PurePosixPath(uri).name)


def _failures_of_list(rejected: pa.Table) -> pa.Table:
    """Return rejected rows of a source list as failures of one partition."""
    count = len(rejected)
    lines = joined(*(rejected[name] for name in ("survey", "source_id", "reason")))
    extra = {
        "attempts": pa.repeat(pa.scalar(1, pa.int32()), count),
        "time": pa.repeat(pa.scalar(datetime.now(UTC), FAILURES.field("time").type), count),
        "partition": pa.repeat(f"list-{_digest(lines)}", count),
    }
    for name, values in extra.items():
        rejected = rejected.append_column(FAILURES.field(name), values)
    return conform(rejected, FAILURES)


def _index_in(values: pa.Array, among: pa.Array) -> pa.Array:
    """Return where each value is first found, null where it is not: a part after the other, whose hashes are held."""
    if not len(values):  # as rejected and failed sources often are; the hashes would be made all the same
        return pa.nulls(0, pa.int32())
    found = pc.index_in(values, value_set=among.slice(0, _HASHED))
    for start in range(_HASHED, len(among), _HASHED):
        part = pc.index_in(values, value_set=among.slice(start, _HASHED))
        found = pc.coalesce(found, pc.add(part, pa.scalar(start, part.type)))
    return found


def _other_version(table: pa.Table, stored: pa.Table, at: pa.Array) -> pa.Array:
    """Return which rows have another version in the store, where `at` finds them; false where either is unknown."""
    then = stored["source_version"].combine_chunks().take(at)
    return pc.fill_null(pc.not_equal(table["source_version"].combine_chunks(), then), False)


def _withdrawn(stored: pa.Table, stored_key: pa.Array, key: pa.Array, table: pa.Table, rejected: pa.Table) -> pa.Table:
    """Return the keys of the store that are of one of the list's surveys, and not in the list."""
    ours = pc.is_in(stored["survey"], value_set=pc.unique(table["survey"])).combine_chunks()
    listed = pc.or_(*(_index_in(stored_key, each).is_valid() for each in (key, joined_key(rejected))))
    return stored.select(list(KEY)).filter(pc.and_not(ours, listed))


def _count(mask: Any) -> int:
    return int(pc.sum(pc.cast(mask, pa.int64())).as_py() or 0)
