"""Formats of a store: what older ones lack, and how it is added."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from galembed.schemas import CONTRACT_KEY, STORE_FORMAT, StoreContract, embeddings_schema, format_of
from galembed.store.keys import open_table
from galembed.store.lease import Lease
from galembed.store.places import EMBEDDINGS_TABLE, at_storage


@at_storage
def upgrade(store: str | Path, lease: Lease) -> int | None:
    """Bring a store of an older format to this one; no vector changes.

    Each step adds the columns that are missing, then writes the new format: killed in between, it is made again.

    Returns
    -------
    int or None
        The format that it had, if that was an older one.

    Raises
    ------
    ArtifactMismatch
        If it is no store, or one of a newer galembed.
    StoreBusy
        If the lease was lost.
    """
    found = format_of(open_table(store, EMBEDDINGS_TABLE).schema)
    if found == STORE_FORMAT:
        return None
    for number in range(found, STORE_FORMAT):
        _STEPS[number](store, lease)
        with lease.fence():
            dataset = open_table(store, EMBEDDINGS_TABLE)
            contract = json.loads(dataset.schema.metadata[CONTRACT_KEY]) | {"format": number + 1}
            dataset.update_schema_metadata({CONTRACT_KEY.decode(): json.dumps(contract, sort_keys=True)})
    StoreContract.from_schema(open_table(store, EMBEDDINGS_TABLE).schema)
    return found


def _with_flags(store: str | Path, lease: Lease) -> None:
    """From 1 to 2: rows have a field of view, warnings, and the neighbouring tiles; not known of rows made before."""
    wanted = embeddings_schema(1)
    _add(store, lease, wanted, {"fov": None, "flags": "", "neighbours": None})


def _add(store: str | Path, lease: Lease, wanted: pa.Schema, values: dict[str, Any]) -> None:
    dataset = open_table(store, EMBEDDINGS_TABLE)
    fields = [wanted.field(name) for name in values if name not in dataset.schema.names]
    if not fields:
        return
    schema = pa.schema(fields)

    def batches() -> Any:
        # From a handle of its own: Lance reads from no dataset that it is changing.
        for batch in open_table(store, EMBEDDINGS_TABLE).to_batches(columns=["source_id"]):
            columns = [pa.array([values[item.name]] * len(batch), item.type) for item in fields]
            yield pa.RecordBatch.from_arrays(columns, schema=schema)

    with lease.fence():
        dataset.add_columns(pa.RecordBatchReader.from_batches(schema, batches()))


_STEPS: Final[dict[int, Callable[[str | Path, Lease], None]]] = {1: _with_flags}
