"""One partition: each row ends in one of two tables, whatever the reader or the network does to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from catalogue_jobs.partition import Outcome, embed_partition
from galembed.backbones import FieldOfView, InputContract
from galembed.cutouts import Cutout
from galembed.mappings import LEGACY_DR2
from galembed.schemas import StoreContract, embeddings_schema
from galembed.sky import healpix_index
from galembed.thumbnails import thumbnail
from tests.catalogue_jobs.fakes import DIM, FakeReader, FakeRuntime

CONTRACT = InputContract(8, FieldOfView(9.0, 8.0, 90.0), LEGACY_DR2)
SCHEMA = embeddings_schema(DIM, carried=[pa.field("mag_r", pa.float32())])


def run(reader: Any, runtime: FakeRuntime | None = None, rows: pa.Table | None = None, batch: int = 4) -> Outcome:
    rows = reader.sources().table if rows is None else rows
    return embed_partition(rows, reader, runtime or FakeRuntime(), CONTRACT, SCHEMA, partition="cell-hash", batch=batch)


def ids(table: pa.Table) -> list[str]:
    return table["source_id"].to_pylist()


def test_rows_carry_position_columns_and_provenance() -> None:
    rows = FakeReader(10).sources().table
    outcome = run(FakeReader(10))
    table = outcome.embeddings
    assert table.schema.equals(SCHEMA)
    assert ids(table) == ids(rows)
    assert table["mag_r"].equals(rows["mag_r"])
    np.testing.assert_array_equal(table["_healpix_29"], healpix_index(rows["ra"], rows["dec"]))
    vectors = np.stack(table["vector"].to_numpy())
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    assert table["partition"].unique().to_pylist() == ["cell-hash"]
    assert table["engine"].unique().to_pylist() == ["fake-fp32:0"]
    assert len(outcome.failures) == 0
    assert outcome.timings.cut > 0
    assert outcome.timings.infer > 0


def test_an_engine_gets_as_many_images_as_it_is_best_given() -> None:
    runtime = FakeRuntime(batch=5)
    reader = FakeReader(12)
    embed_partition(reader.sources().table, reader, runtime, CONTRACT, SCHEMA, partition="p")
    assert runtime.seen == [5, 5, 2]


@pytest.mark.parametrize("batch", [1, 3, 4, 100])
def test_vectors_belong_to_their_rows_whatever_the_batch(batch: int) -> None:
    reader = FakeReader(10, empty=("g2", "g3"))
    runtime = FakeRuntime()
    table = run(reader, runtime, batch=batch).embeddings
    assert max(runtime.seen) <= batch
    for name, vector in zip(ids(table), table["vector"].to_pylist(), strict=True):
        pixels = np.random.default_rng(int(name[1:])).normal(0, 50, (3, 8, 8)).astype(np.float32).ravel()[:DIM]
        np.testing.assert_allclose(vector, pixels / np.linalg.norm(pixels), rtol=1e-5)


def test_an_exception_in_the_reader_fails_its_source_alone() -> None:
    outcome = run(FakeReader(10, raising=("g0", "g4", "g9"), empty=("g5",)))
    assert sorted(ids(outcome.embeddings)) == ["g1", "g2", "g3", "g6", "g7", "g8"]
    reasons = {row["source_id"]: (row["stage"], row["reason"]) for row in outcome.failures.to_pylist()}
    assert reasons == {
        "g0": ("read", "unexpected"),
        "g4": ("read", "unexpected"),
        "g9": ("read", "unexpected"),
        "g5": ("cut", "no_data"),
    }
    assert "ZeroDivisionError: g4 broke the reader" in outcome.failures["message"].to_pylist()


def test_vectors_that_are_not_finite_or_zero_become_failures() -> None:
    outcome = run(FakeReader(10), FakeRuntime(bad=(1, 6), zero=(3,)))
    reasons = {row["source_id"]: (row["stage"], row["reason"]) for row in outcome.failures.to_pylist()}
    assert reasons == {
        "g1": ("infer", "non_finite"),
        "g6": ("infer", "non_finite"),
        "g3": ("infer", "zero_norm"),
    }
    assert np.isfinite(np.stack(outcome.embeddings["vector"].to_numpy())).all()
    assert len(outcome.embeddings) == 7


def test_nothing_but_failures() -> None:
    outcome = run(FakeReader(3, empty=("g0", "g1", "g2")))
    assert len(outcome.embeddings) == 0
    assert outcome.embeddings.schema.equals(SCHEMA)
    assert len(outcome.failures) == 3


def test_what_the_runtime_raises_is_no_fault_of_a_source() -> None:
    class Broken(FakeRuntime):
        def embed(self, images: Any, kind: str) -> Any:
            raise MemoryError("no room")

    with pytest.raises(MemoryError):
        run(FakeReader(3), Broken())


@dataclass(frozen=True)
class OddReader(FakeReader):
    """Yields row 1 twice, leaves row 2 out and gives row 3 the wrong shape."""

    def cutouts(self, rows: pa.Table, contract: InputContract) -> Iterator[tuple[int, Any]]:
        for number, item in super().cutouts(rows, contract):
            if number == 2:
                continue
            if number == 3:
                item = Cutout(np.zeros((3, 5, 5), np.float32), 1.0, None)
            yield number, item
            if number == 1:
                yield number, item


def test_each_row_counts_once_though_the_reader_miscounts() -> None:
    outcome = run(OddReader(5))
    assert ids(outcome.embeddings) == ["g0", "g1", "g4"]
    assert sorted(ids(outcome.failures)) == ["g2", "g3"]
    assert outcome.failures["reason"].unique().to_pylist() == ["unexpected"]


@dataclass(frozen=True)
class PlacedReader(FakeReader):
    """Knows the position of even rows only from the pixels."""

    def cutouts(self, rows: pa.Table, contract: InputContract) -> Iterator[tuple[int, Any]]:
        for number, item in super().cutouts(rows, contract):
            assert isinstance(item, Cutout)
            ra, dec = (-10.0, 5.0) if number % 2 == 0 else (None, None)
            yield number, Cutout(item.pixels, 0.5, None, ra, dec)


def test_positions_come_from_the_pixels_where_the_list_has_none() -> None:
    table = run(PlacedReader(4, positions=False)).embeddings
    assert table["ra"].to_pylist() == [350.0, None, 350.0, None]
    assert table["_healpix_29"].to_pylist() == [int(healpix_index([350.0], [5.0])[0]), None] * 2
    assert table["fov"].null_count == 4


def test_fractions_go_under_their_answers() -> None:
    schema = embeddings_schema(DIM, carried=[pa.field("mag_r", pa.float32())], answers=("bar_yes", "bar_no"))

    class Answering(FakeRuntime):
        def embed(self, images: Any, kind: str) -> Any:
            result = super().embed(images, kind)
            fractions = np.tile(np.array([0.25, 0.75], np.float32), (len(images), 1))
            return type(result)(result.vectors, result.norms, fractions)

    reader = FakeReader(3)
    outcome = embed_partition(reader.sources().table, reader, Answering(), CONTRACT, schema, partition="p", batch=2)
    assert outcome.embeddings["bar_yes_fraction"].to_pylist() == [0.25] * 3
    assert outcome.embeddings["bar_no_fraction"].to_pylist() == [0.75] * 3


def test_what_a_tile_says_of_a_source_fills_its_carried_column() -> None:
    @dataclass(frozen=True)
    class Saying(FakeReader):
        def cutouts(self, rows: pa.Table, contract: InputContract) -> Iterator[Any]:
            for number, cutout in super().cutouts(rows, contract):
                said = {"psfsize_g": np.nan if number == 1 else 1.25 + number}
                yield number, replace(cutout, carried=said, flags="blank", neighbours=("/t2",), tiles_opened=2)

    rows = FakeReader(3).sources().table
    rows = rows.append_column(pa.field("psfsize_g", pa.float32()), pa.nulls(3, pa.float32()))
    schema = embeddings_schema(DIM, carried=[pa.field("psfsize_g", pa.float32())])
    outcome = embed_partition(rows, Saying(3), FakeRuntime(), CONTRACT, schema, partition="p")
    assert outcome.embeddings["psfsize_g"].to_pylist() == [1.25, None, 3.25]
    assert outcome.embeddings["flags"].to_pylist() == ["blank"] * 3
    assert outcome.embeddings["neighbours"].to_pylist() == [["/t2"]] * 3
    assert outcome.tiles_opened == 6


def test_each_row_gets_its_thumbnail_where_the_store_keeps_them() -> None:
    contract = StoreContract("e", "/b", "flux", "fp32", thumbnails=64)
    schema = embeddings_schema(DIM, carried=[pa.field("mag_r", pa.float32())], contract=contract)
    reader = FakeReader(10, empty=("g2",))
    table = embed_partition(
        reader.sources().table, reader, FakeRuntime(bad=(3,)), CONTRACT, schema, partition="p", batch=4
    ).embeddings
    assert len(table) == 8
    for name, data in zip(ids(table), table["thumbnail"].to_pylist(), strict=True):
        pixels = np.random.default_rng([int(name[1:]), 0]).normal(0, 50, (3, 8, 8)).astype(np.float32)
        assert data == thumbnail(pixels, LEGACY_DR2)


def test_without_them_there_is_no_column() -> None:
    assert "thumbnail" not in run(FakeReader(3)).embeddings.column_names
