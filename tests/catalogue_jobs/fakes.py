"""A source that makes its pixels up and breaks on demand; a module of its own, for workers to import."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from galembed.backbones import InputContract
from galembed.cutouts import Cutout
from galembed.errors import GalembedError, NoData
from galembed.runtimes import Embedded
from galembed.schemas import SOURCES
from galembed.sources import SourceList

DIM = 8


@dataclass(frozen=True)
class FakeReader:
    """`count` sources named g0, g1...; those named in a tuple misbehave as it says; `changed` ones have new files.

    `log` is a file that gets a line for each cutout made.
    """

    count: int
    empty: tuple[str, ...] = ()
    raising: tuple[str, ...] = ()
    deadly: tuple[str, ...] = ()
    rejected: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    positions: bool = True
    tiles: int = 0
    delay: float = 0.0
    log: str = ""
    kind: str = "flux"
    root: str = "/fake"
    crop: float = 0.5
    survey: str = "fake"
    fov: str = ""
    bands: Mapping[str, str] = field(default_factory=lambda: {"blue": "g", "green": "r", "red": "z"})

    def sources(self) -> SourceList:
        table = source_table(self.count, self.positions, self.tiles)
        versions = ["v2" if name in self.changed else "v1" for name in table["source_id"].to_pylist()]
        at = table.column_names.index("source_version")
        column = pa.array(versions, pa.string())
        return SourceList(table.set_column(at, table.schema.field(at), column), _rejected(self.rejected))

    def cutouts(self, rows: pa.Table, contract: InputContract) -> Iterator[tuple[int, Cutout | GalembedError]]:
        for number, name in enumerate(rows["source_id"].to_pylist()):
            time.sleep(self.delay)
            if name in self.deadly:
                os.kill(os.getpid(), signal.SIGKILL)
            if name in self.raising:
                raise ZeroDivisionError(f"{name} broke the reader")
            if name in self.empty:
                yield number, NoData(f"{name} has no data")
                continue
            if self.log:
                with Path(self.log).open("a") as stream:
                    stream.write(f"{name}\n")
            pixels = np.random.default_rng([int(name[1:]), name in self.changed]).normal(
                0, 50, (3, contract.size, contract.size)
            )
            yield number, Cutout(pixels.astype(np.float32), 1.0, 20.0)


@dataclass
class FakeRuntime:
    """Returns the first pixels as vectors; `bad` rows (counted over calls) come out NaN."""

    bad: tuple[int, ...] = ()
    zero: tuple[int, ...] = ()
    engine: str = "fake-fp32:0"
    numeric_class: str = "fp32"
    batch: int = 16
    seen: list[int] = field(default_factory=list)

    def embed(self, images: NDArray[np.float32], kind: str) -> Embedded:
        start = sum(self.seen)
        self.seen.append(len(images))
        vectors = images.reshape(len(images), -1)[:, :DIM].astype(np.float32).copy()
        norms = np.linalg.norm(vectors, axis=1).astype(np.float32)
        vectors /= norms[:, None]
        for row in range(len(images)):
            if start + row in self.bad:
                vectors[row] = np.nan
            if start + row in self.zero:
                vectors[row], norms[row] = 0, 0
        return Embedded(vectors, norms, np.zeros((len(images), 0), np.float32))


def source_table(count: int, positions: bool = True, tiles: int = 0, first: int = 0) -> pa.Table:
    """Return sources over half a degree of sky, in `tiles` tiles or a file each, with one carried column."""
    numbers = np.arange(first, first + count)
    ra, dec = (150 + (numbers * 0.6180339887) % 0.5, 2 + (numbers * 0.7548776662) % 0.5)
    table = pa.table(
        {
            "survey": ["fake"] * count,
            "source_id": [f"g{number}" for number in numbers],
            "ra": pa.array(ra if positions else [None] * count, pa.float64()),
            "dec": pa.array(dec if positions else [None] * count, pa.float64()),
            "size": pa.nulls(count, pa.float64()),
            "fov": pa.nulls(count, pa.float64()),
            "source_uri": [f"/fake/{f'tile{n % tiles}' if tiles else f'g{n}.fits'}" for n in numbers],
            "source_version": ["v1"] * count,
            "neighbours": pa.nulls(count, pa.list_(pa.string())),
        },
        schema=SOURCES,
    )
    magnitude = pa.field("mag_r", pa.float32(), metadata={"unit": "mag"})
    return table.append_column(magnitude, pa.array(18 + numbers / max(count, 1), pa.float32()))


def _rejected(names: tuple[str, ...]) -> pa.Table:
    rows = pa.table(
        {
            name: ["fake"] * len(names) if name == "survey" else pa.nulls(len(names), SOURCES.field(name).type)
            for name in SOURCES.names
        }
    ).set_column(1, "source_id", pa.array(names, pa.string()))
    for name, value in (("stage", "list"), ("reason", "duplicate_key"), ("message", "occurs twice")):
        rows = rows.append_column(name, pa.array([value] * len(names), pa.string()))
    return rows
