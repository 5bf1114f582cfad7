"""Stores made directly with LanceDB: seeded clusters of unit vectors on the sky, no job and no backbone."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa

from galembed.schemas import FAILURES, StoreContract, embeddings_schema
from galembed.sky import healpix_index
from galembed.store import EMBEDDINGS_TABLE, FAILURES_TABLE, Store, open_store
from galembed.store.places import storage_options

DIM = 16
CONTRACT = StoreContract(
    embedding_id="e" * 64,
    backbone="/nowhere/backbone",
    input_kind="flux",
    numeric_class="fp32",
    bands={"blue": "g", "green": "r", "red": "z"},
)
CARRIED = (
    pa.field("mag_r", pa.float32(), metadata={"unit": "mag"}),
    pa.field("redshift", pa.float64()),
    pa.field("kind", pa.string()),
)
KINDS = np.array(["smooth", "spiral", "edge-on"])


def rows(count: int = 300, *, seed: int = 0, survey: str = "legacy", **columns: Any) -> dict[str, Any]:
    """Return columns of `count` sources in three clusters, a tenth without redshift. `columns` override."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, len(KINDS), count)
    centres = np.random.default_rng(99).normal(size=(len(KINDS), DIM))
    vectors = centres[kind] + rng.normal(scale=0.5, size=(count, DIM))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    redshift = rng.uniform(0, 0.3, count)
    return {
        "survey": [survey] * count,
        "source_id": [f"{survey}-{number}" for number in range(count)],
        "ra": rng.uniform(0, 360, count),
        "dec": np.degrees(np.arcsin(rng.uniform(-1, 1, count))),
        "vector": vectors,
        "norm": np.ones(count),
        "coverage": np.ones(count),
        "fov": np.full(count, 20.0),
        "flags": [""] * count,
        "neighbours": pa.nulls(count, pa.list_(pa.string())),
        "input_kind": ["flux"] * count,
        "source_uri": [f"{number}.fits" for number in range(count)],
        "source_version": ["1"] * count,
        "engine": ["torch:abc"] * count,
        "partition": [f"p{number // 100}" for number in range(count)],
        "mag_r": rng.uniform(14, 22, count),
        "redshift": [None if value < 0.03 else value for value in redshift],
        "kind": KINDS[kind].tolist(),
    } | columns


def arrow(data: dict[str, Any], contract: StoreContract = CONTRACT) -> pa.Table:
    """Return rows as an `embeddings` table; NaN positions become null."""
    ra, dec = (np.asarray(data[name], float) for name in ("ra", "dec"))
    known = np.isfinite(ra)
    cells = np.zeros(len(ra), np.int64)
    cells[known] = healpix_index(ra[known], dec[known])
    schema = embeddings_schema(DIM, carried=CARRIED, contract=contract)
    data = data | {
        "ra": pa.array(ra, mask=~known),
        "dec": pa.array(dec, mask=~known),
        "_healpix_29": pa.array(cells, mask=~known),
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(np.ravel(data["vector"])), DIM),
    }
    arrays = [pa.chunked_array([pa.array(data[name])]).cast(schema.field(name).type) for name in schema.names]
    return pa.table(arrays, schema=schema)


def failed(keys: Sequence[tuple[str, str]], reason: str = "unreadable") -> pa.Table:
    """Return a `failures` table."""
    base = {
        "ra": None,
        "dec": None,
        "source_uri": "x.fits",
        "source_version": "1",
        "stage": "read",
        "attempts": 1,
    }
    base |= {
        "reason": reason,
        "message": "cannot be read",
        "time": datetime(2026, 1, 1, tzinfo=UTC),
        "partition": "p",
    }
    return pa.Table.from_pylist([base | {"survey": s, "source_id": i} for s, i in keys], schema=FAILURES)


def make_store(
    path: str | Path,
    *data: dict[str, Any],
    contract: StoreContract = CONTRACT,
    failures: pa.Table | None = None,
) -> Store:
    """Write a store of these rows and open it."""
    connection = lancedb.connect(path, storage_options=storage_options(path) or None)
    connection.create_table(EMBEDDINGS_TABLE, pa.concat_tables([arrow(part, contract) for part in data]))
    if failures is not None:
        connection.create_table(FAILURES_TABLE, failures)
    return open_store(path)
