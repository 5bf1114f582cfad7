"""Stores of as many vectors as wanted, spread as those of embedded galaxies are.

    python benchmarks/resampled.py 120000 --dim 640 --work /tmp/search --out /tmp/search/120k.lance

Simulated galaxies are embedded once with the built-in backbone. Each vector drawn is that of one of them plus three
differences between pairs of its ten nearest, each times a normal number of standard deviation `SPREAD`: so they fill
the space between the galaxies along the directions in which these differ, and keep their spectrum and clusters. More
than 320 numbers come from a rotation into as many dimensions. Positions are even over 60 by 40 degrees; `mag_r` is the
galaxy's own but for a tenth of a magnitude, so that a cut in it picks some kinds more than others.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from processes import galembed as command

from galembed.schemas import FAILURES, StoreContract, conform, embeddings_schema
from galembed.sky import healpix_index
from galembed.store import open_store
from galembed.store.commit import Finished, commit, prepare, write_fragments
from galembed.store.lease import Lease

GALAXIES, NEAREST, PAIRS, SPREAD = 5_000, 10, 3, 0.45
PART = 20_000
RA, DEC = (0.0, 60.0), (-20.0, 20.0)
CONTRACT = StoreContract(embedding_id="0" * 64, backbone="/nowhere", input_kind="flux", numeric_class="fp32")


@dataclass(frozen=True)
class Rows:
    """Drawn rows.

    Attributes
    ----------
    vectors : ndarray, shape (n, dim), float32
        Unit norm.
    ra, dec : ndarray, shape (n,), float64
        ICRS, deg.
    mag_r : ndarray, shape (n,), float32
    """

    vectors: NDArray[np.float32]
    ra: NDArray[np.float64]
    dec: NDArray[np.float64]
    mag_r: NDArray[np.float32]


@dataclass(frozen=True)
class Drawing:
    """Embedded galaxies to draw from, their ten nearest, and the rotation into `dim` dimensions."""

    galaxies: NDArray[np.float32]
    mag_r: NDArray[np.float32]
    near: NDArray[np.intp]
    rotation: NDArray[np.float32]

    def rows(self, count: int, seed: int) -> Rows:
        """Draw rows; the same seed draws the same."""
        rng = np.random.default_rng(seed)
        chosen = rng.integers(0, len(self.galaxies), count)
        vectors = self.galaxies[chosen]
        for _ in range(PAIRS):
            one, other = self.near[chosen, rng.integers(0, NEAREST, (2, count))]
            step = rng.normal(scale=SPREAD, size=(count, 1)).astype(np.float32)
            vectors = vectors + step * (self.galaxies[one] - self.galaxies[other])
        vectors = vectors @ self.rotation
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        mag_r = self.mag_r[chosen] + rng.normal(scale=0.1, size=count).astype(np.float32)
        dec = np.degrees(np.arcsin(rng.uniform(*np.sin(np.radians(DEC)), count)))
        return Rows(vectors, rng.uniform(*RA, count), dec, mag_r)


def drawing(work: Path, dim: int) -> Drawing:
    """Return what to draw from; the galaxies are simulated and embedded in `work` unless that was done."""
    survey, store = work / "survey", work / "galaxies.lance"
    if not (store / "job.json").exists():
        if not (survey / "cutouts.fits").exists():
            command("simulate", survey, "--bricks", 0, "--cutouts", GALAXIES, "--seed", 1)
        command("embed", survey / "cutouts", "--catalogue", survey / "cutouts.fits", "--store", store, "--quiet")
    keys, galaxies = open_store(store).vectors()
    order = np.argsort(keys["source_id"])
    galaxies = galaxies[order]
    named = list(zip(keys["survey"][order], keys["source_id"][order], strict=True))
    mag_r = open_store(store).rows(named, ["mag_r"]).column("mag_r").to_numpy().astype(np.float32)
    near = np.argpartition(-(galaxies @ galaxies.T), NEAREST, axis=1)[:, :NEAREST]
    if dim < galaxies.shape[1]:
        raise SystemExit(f"vectors of {dim} numbers cannot be drawn from embeddings of {galaxies.shape[1]}")
    square = np.random.default_rng(0).normal(size=(dim, galaxies.shape[1]))
    return Drawing(galaxies, mag_r, near, np.linalg.qr(square)[0].T.astype(np.float32))


def parts(drawn: Drawing, rows: int, start: int = 0) -> Iterator[tuple[int, Rows]]:
    """Yield rows in parts of `PART`, with the number of the first; the same numbers are always the same rows."""
    for first in range(start, start + rows, PART):
        yield first, drawn.rows(min(PART, start + rows - first), seed=1_000 + first // PART)


def write_store(store: Path, drawn: Drawing, rows: int, *, half: bool = False, start: int = 0) -> None:
    """Write rows as jobs do: data files, then commits of five parts; their ids are numbers, from `start`."""
    dim = drawn.rotation.shape[1]
    schema = embeddings_schema(dim, carried=[pa.field("mag_r", pa.float32(), metadata={"unit": "mag"})])
    if half:
        place = schema.get_field_index("vector")
        schema = schema.set(place, schema.field(place).with_type(pa.list_(pa.float16(), dim)))
    schema = schema.with_metadata(embeddings_schema(dim, contract=CONTRACT).metadata)
    with Lease(store) as lease:
        prepare(store, schema, lease)
        waiting: list[Finished] = []
        for first, part in parts(drawn, rows, start):
            name = f"p{first}"
            files = write_fragments(store, _table(part, first, name, schema))
            waiting.append(Finished(name, tuple(files), FAILURES.empty_table()))
            if len(waiting) == 5 or first + PART >= start + rows:
                commit(store, waiting, lease, there=())
                waiting = []


def _table(part: Rows, first: int, name: str, schema: pa.Schema) -> pa.Table:
    count, dim = part.vectors.shape
    numbers = np.arange(first, first + count).astype(str)
    vectors = part.vectors.astype(schema.field("vector").type.value_type.to_pandas_dtype())
    same = {"survey": "drawn", "flags": "", "input_kind": "flux", "source_version": "1", "engine": "none"}
    columns = {name: pa.repeat(text, count) for name, text in (same | {"partition": name}).items()}
    columns |= {name: pa.repeat(number, count) for name, number in (("norm", 1.0), ("coverage", 1.0), ("fov", 20.0))}
    columns |= {"source_id": pa.array(numbers), "source_uri": pa.array(numbers), "mag_r": pa.array(part.mag_r)}
    columns |= {"ra": pa.array(part.ra), "dec": pa.array(part.dec)}
    columns |= {"_healpix_29": pa.array(healpix_index(part.ra, part.dec))}
    columns |= {"vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), dim)}
    columns |= {"neighbours": pa.nulls(count, schema.field("neighbours").type)}
    return conform(pa.table(columns), schema)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=int)
    parser.add_argument("--start", type=int, default=0, help="number of the first row, to add to a store")
    parser.add_argument("--dim", type=int, default=320)
    parser.add_argument("--half", action="store_true", help="vectors in float16")
    parser.add_argument("--work", type=Path, required=True, help="folder of the embedded galaxies; kept")
    parser.add_argument("--out", type=Path, required=True, help="store to make, or to add to")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    write_store(asked.out, drawing(asked.work, asked.dim), asked.rows, half=asked.half, start=asked.start)


if __name__ == "__main__":
    main()
