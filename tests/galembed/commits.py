"""Small results of workers for tests of the store's write side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from galembed.schemas import FAILURES, StoreContract, conform, embeddings_schema
from galembed.store.commit import Finished, write_fragments
from galembed.store.keys import open_table

DIM = 4
CONTRACT = StoreContract("id1", "/backbone", "flux", "fp32", bands={"blue": "g"})
SCHEMA = embeddings_schema(DIM, carried=[pa.field("mag_r", pa.float32())], contract=CONTRACT)

Place = str | Path


def embeddings(names: Sequence[str], partition: str, version: str = "1") -> pa.Table:
    """Return rows with the same unit vector."""
    columns = {item.name: pa.nulls(len(names), item.type) for item in SCHEMA}
    columns |= {name: ["x"] * len(names) for name in ("survey", "flags", "engine")}
    columns |= {"input_kind": [CONTRACT.input_kind] * len(names)}
    columns |= {"source_id": list(names), "partition": [partition] * len(names)}
    columns |= {"source_version": [version] * len(names)}
    columns |= {name: np.ones(len(names), np.float32) for name in ("norm", "coverage")}
    flat = pa.array(np.full(DIM * len(names), DIM**-0.5, np.float32))
    columns["vector"] = pa.FixedSizeListArray.from_arrays(flat, DIM)
    return conform(pa.table(columns), SCHEMA)


def failures(names: Sequence[str], partition: str, version: str = "1") -> pa.Table:
    """Return rows of failed sources."""
    columns = {item.name: pa.nulls(len(names), item.type) for item in FAILURES}
    columns |= {name: ["x"] * len(names) for name in ("survey", "stage", "reason", "message")}
    columns |= {"source_id": list(names), "partition": [partition] * len(names)}
    columns |= {"source_version": [version] * len(names)}
    columns |= {"attempts": [1] * len(names), "time": [0] * len(names)}
    return conform(pa.table(columns), FAILURES)


def sources(names: Sequence[str]) -> pa.Table:
    """Return keys."""
    return pa.table({"survey": ["x"] * len(names), "source_id": pa.array(names, pa.string())})


def finished(
    store: Place,
    partition: str,
    good: Sequence[str],
    bad: Sequence[str] = (),
    *,
    version: str = "1",
    replaced: Sequence[str] = (),
) -> Finished:
    """Do a worker's part: write the rows, and return the result."""
    fragments = write_fragments(store, embeddings(good, partition, version))
    return Finished(partition, tuple(fragments), failures(bad, partition, version), sources(replaced))


def ids(table: pa.Table) -> list[str]:
    """Return the source ids in order."""
    return sorted(table["source_id"].to_pylist())


def versions(store: Place, table: str = "embeddings") -> list[tuple[str, str]]:
    """Return id and version of each row in order."""
    rows = open_table(store, table).to_table(columns=["source_id", "source_version"])
    return sorted(zip(*rows.to_pydict().values(), strict=True))
