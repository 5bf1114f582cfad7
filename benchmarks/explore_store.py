"""A store of made-up vectors to measure `galembed novel`, `duplicates` and `map` on.

    python benchmarks/explore_store.py 1000000 --kind random --out /tmp/random.lance

Vectors of 320 numbers at positions drawn evenly over 60 by 40 degrees. `random`: directions drawn at random, all nearly
equally far from one another. `clusters`: 300 kinds in 24 dimensions, the commonest some 400 times as frequent as the
rarest, and noise in all dimensions.
"""

from __future__ import annotations

import argparse

import lancedb
import numpy as np
import pyarrow as pa

from galembed.schemas import StoreContract, embeddings_schema
from galembed.sky import healpix_index
from galembed.store import EMBEDDINGS_TABLE

DIM, KINDS, DIMENSIONS, PART = 320, 300, 24, 50_000
CONTRACT = StoreContract(embedding_id="0" * 64, backbone="/nowhere", input_kind="flux", numeric_class="fp32")
CARRIED = (pa.field("mag_r", pa.float32(), metadata={"unit": "mag"}), pa.field("kind", pa.string()))


def main() -> None:
    """Write the store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=int)
    parser.add_argument("--kind", choices=["random", "clusters"], default="random")
    parser.add_argument("--out", required=True)
    asked = parser.parse_args()
    rng = np.random.default_rng(0)
    centres, mixing = rng.normal(size=(KINDS, DIMENSIONS)), rng.normal(size=(DIMENSIONS, DIM))
    schema = embeddings_schema(DIM, carried=CARRIED, contract=CONTRACT)

    def part(start: int) -> pa.RecordBatch:
        count = min(PART, asked.rows - start)
        kinds = np.minimum(rng.geometric(0.02, count) - 1, KINDS - 1)
        vectors = rng.normal(size=(count, DIM))
        if asked.kind == "clusters":
            vectors = (centres[kinds] + 0.4 * rng.normal(size=(count, DIMENSIONS))) @ mixing + 0.5 * vectors
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        ra, dec = rng.uniform(0, 60, count), rng.uniform(-20, 20, count)
        names = [f"g-{number}" for number in range(start, start + count)]
        columns = {
            "survey": ["made-up"] * count,
            "source_id": names,
            "ra": ra,
            "dec": dec,
            "_healpix_29": healpix_index(ra, dec),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.astype(np.float32).ravel()), DIM),
            "norm": np.ones(count),
            "coverage": np.ones(count),
            "fov": np.full(count, 20.0),
            "flags": [""] * count,
            "neighbours": pa.nulls(count, pa.list_(pa.string())),
            "input_kind": ["flux"] * count,
            "source_uri": names,
            "source_version": ["1"] * count,
            "engine": ["none"] * count,
            "partition": ["p"] * count,
            "mag_r": rng.uniform(14, 22, count),
            "kind": [f"k{kind % 12}" for kind in kinds],
        }
        arrays = [pa.array(columns[field.name]).cast(field.type) for field in schema]
        return pa.RecordBatch.from_arrays(arrays, schema=schema)

    reader = pa.RecordBatchReader.from_batches(schema, map(part, range(0, asked.rows, PART)))
    lancedb.connect(asked.out).create_table(EMBEDDINGS_TABLE, reader)


if __name__ == "__main__":
    main()
