"""Keys of a store's rows: what is settled, where rows lie, and which are there twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from galembed.schemas import FAILURES
from galembed.store.places import EMBEDDINGS_TABLE, FAILURES_TABLE, at_storage, is_folder, storage_options, table_uri

KEY: Final = ("survey", "source_id")

_BATCH_ROWS: Final = 65_536
UNIT_SEPARATOR: Final = "\x1f"


@dataclass(frozen=True)
class StoreKeys:
    """Which sources a store has settled.

    Attributes
    ----------
    embedded : pa.Table
        `survey`, `source_id`, `source_version`.
    failed : pa.Table
        The same and `stage`; failures of sources that are embedded are left out.
    """

    embedded: pa.Table
    failed: pa.Table

    @property
    def repeated(self) -> bool:
        """Whether any source has several rows."""
        return bool(pc.count_distinct(joined_key(self.embedded)).as_py() < len(self.embedded))


def open_table(store: str | Path, table: str) -> Any:
    """Return a table of a store as a Lance dataset of its newest version."""
    import lance

    return lance.dataset(table_uri(store, table), storage_options=storage_options(store))


@at_storage
def keys(store: str | Path) -> StoreKeys:
    """Return the keys of all settled sources; only those columns are read."""
    columns = [*KEY, "source_version"]
    embedded = open_table(store, EMBEDDINGS_TABLE).to_table(columns=columns)
    if not is_folder(store, f"{FAILURES_TABLE}.lance"):
        return StoreKeys(embedded, FAILURES.empty_table().select([*columns, "stage"]))
    failed = open_table(store, FAILURES_TABLE).to_table(columns=[*columns, "stage"])
    if failed.num_rows:
        failed = failed.filter(pc.invert(pc.is_in(joined_key(failed), value_set=joined_key(embedded))))
    return StoreKeys(embedded, failed)


@at_storage
def present(store: str | Path, partitions: Sequence[str]) -> set[str]:
    """Return those of `partitions` that have rows in `embeddings`."""
    return present_in(open_table(store, EMBEDDINGS_TABLE), partitions)


def present_in(dataset: Any, partitions: Sequence[str]) -> set[str]:
    """Return those of `partitions` that have rows in a version of `embeddings`."""
    if not partitions or not dataset.count_rows():
        return set()
    wanted = pa.array(partitions, pa.string())
    found: set[str] = set()
    for batch in dataset.to_batches(columns=["partition"]):
        names = batch.column("partition")
        found.update(pc.unique(names.filter(pc.is_in(names, value_set=wanted))).to_pylist())
    return found


def rows_with(dataset: Any, wanted: pa.Array) -> tuple[NDArray[np.uint64], pa.Array]:
    """Return the row addresses of the sources whose joined keys are `wanted`, and the key of each."""
    addresses, found = [np.empty(0, np.uint64)], [pa.array([], pa.large_string())]
    if len(wanted):
        for key, address in _keys_and_addresses(dataset):
            hit = pc.is_in(key, value_set=wanted)
            addresses.append(address[hit.to_numpy(zero_copy_only=False)])
            found.append(key.filter(hit))
    return np.concatenate(addresses), pa.concat_arrays(found)


def repeated_rows(dataset: Any) -> tuple[NDArray[np.uint64], pa.Array]:
    """Return the addresses of all rows but the first of each key, and the key of each: empty, as it should be.

    The first is the one with the lowest address, which was committed first. Eight bytes a row are held.
    """
    hashes = [key_hashes(key) for key, _ in _keys_and_addresses(dataset)]
    suspects = repeated_values(np.concatenate([np.empty(0, np.int64), *hashes]))
    if not len(suspects):
        return rows_with(dataset, pa.array([], pa.large_string()))
    sharing = [key.filter(pa.array(np.isin(key_hashes(key), suspects))) for key, _ in _keys_and_addresses(dataset)]
    addresses, found = rows_with(dataset, pc.unique(pa.concat_arrays(sharing)))
    order = np.argsort(addresses)
    codes = found.take(pa.array(order)).dictionary_encode().indices.to_numpy()
    again = np.ones(len(order), bool)
    again[np.unique(codes, return_index=True)[1]] = False
    return addresses[order][again], found.take(pa.array(order[again]))


def key_hashes(key: pa.Array) -> NDArray[np.int64]:
    """Return a number for each joined key that is the same within this process; keys may share one."""
    return np.fromiter(map(hash, key.to_pylist()), np.int64, len(key))


def repeated_values(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the values that occur more than once; `values` is sorted in place."""
    values.sort()
    return np.unique(values[1:][values[1:] == values[:-1]])


def joined_key(table: pa.Table | pa.RecordBatch) -> pa.Array:
    """Return survey and source id of each row as one text."""
    return joined(*(table.column(name) for name in KEY))


def joined(*columns: pa.ChunkedArray | pa.Array) -> pa.Array:
    """Return text columns joined row by row, as one large_string array; null where any is null."""
    columns = tuple(pc.cast(column, pa.large_string()) for column in columns)
    texts = pc.binary_join_element_wise(*columns, pa.scalar(UNIT_SEPARATOR, pa.large_string()))
    return texts.combine_chunks() if isinstance(texts, pa.ChunkedArray) else texts


def _keys_and_addresses(dataset: Any) -> Iterator[tuple[pa.Array, NDArray[np.uint64]]]:
    scanner = dataset.scanner(columns=list(KEY), with_row_address=True, batch_size=_BATCH_ROWS)
    for batch in scanner.to_batches():
        yield joined_key(batch), batch.column("_rowaddr").to_numpy()
