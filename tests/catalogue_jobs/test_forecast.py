"""What a plan says a job will cost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from catalogue_jobs.forecast import disk_needed, opened, seconds_per_source
from catalogue_jobs.partition import Timings
from catalogue_jobs.plan import in_order, partitions
from catalogue_jobs.report import bound_by
from galembed.backbones import Backbone
from galembed.schemas import SOURCES, embeddings_schema
from tests.catalogue_jobs.fakes import FakeReader, FakeRuntime, source_table


def with_sizes(table: pa.Table, size: str) -> pa.Table:
    column = table.column_names.index("source_version")
    versions = pa.array([f"{size}-2026-01-01T00:00:00"] * len(table), pa.string())
    return table.set_column(column, SOURCES.field("source_version"), versions)


def test_a_tile_in_several_partitions_is_read_as_often() -> None:
    rows = with_sizes(source_table(300, tiles=2), "1000")
    table, parts = in_order(rows, partitions(rows, 100))
    tiles, reads, size = opened(table, parts)
    assert len(parts) > 2
    assert (tiles, reads * tiles) == (2, len(parts))
    assert size == 1000 * len(parts)


def test_a_file_of_unknown_size_leaves_the_sum_unknown() -> None:
    rows = source_table(10)
    table, parts = in_order(rows, partitions(rows))
    assert opened(table, parts) == (10, 1.0, None)
    assert opened(rows.slice(0, 0), []) == (0, 0.0, 0)


def test_the_disk_needed_is_that_of_vectors_and_columns_twice() -> None:
    rows = source_table(1000)
    few, many = (disk_needed(rows, embeddings_schema(dim)) for dim in (8, 1008))
    assert many - few == pytest.approx(2 * 4 * 1000 * 1000, abs=2)
    assert few > 2 * 1000 * (8 * 4 + 3 * 8)


def test_the_store_becomes_about_as_large_as_was_said(tmp_path: Path) -> None:
    import lance

    rows = source_table(5000)
    schema = embeddings_schema(64)
    columns = {name: rows[name] for name in rows.column_names if name in schema.names}
    vectors = np.random.default_rng(0).normal(size=5000 * 64).astype(np.float32)
    columns["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(vectors), 64)
    columns["partition"] = pa.array(["hp9.123-0123456789abcdef"] * 5000)
    columns["engine"] = pa.array(["torch-cpu-fp32:0123456789ab"] * 5000)
    columns["input_kind"] = pa.array(["flux"] * 5000)
    table = pa.table({name: columns.get(name, pa.nulls(5000, schema.field(name).type)) for name in schema.names})
    lance.write_dataset(table, str(tmp_path / "table.lance"))
    real = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    assert real < disk_needed(rows, schema) < 4 * real


def test_a_calibration_counts_what_was_embedded_and_nothing_that_failed(tiny_backbone: Backbone) -> None:
    reader = FakeReader(60, empty=tuple(f"g{number}" for number in range(0, 60, 2)))
    rows = reader.sources().table
    table, parts = in_order(rows, partitions(rows, 20))
    schema = embeddings_schema(8)
    runtime = FakeRuntime()
    seconds, count = seconds_per_source(table, parts, reader, tiny_backbone, runtime, schema, 32)
    assert count == 30
    assert seconds is not None
    assert seconds > 0
    none = FakeReader(60, empty=tuple(f"g{number}" for number in range(60)))
    assert seconds_per_source(table, parts, none, tiny_backbone, runtime, schema, 32) == (None, 0)


@pytest.mark.parametrize(
    ("seconds", "busy", "words"),
    [
        (Timings(read=9, cut=1, infer=2), 0.1, "bound by reading; the engine is at work 10% of the time"),
        (Timings(read=1, cut=9, infer=2), 0.1, "bound by cutting; the engine is at work 10% of the time"),
        (Timings(read=1, cut=1, infer=2, write=9), 0.1, "bound by writing; the engine is at work 10% of the time"),
        (Timings(read=1, cut=1, infer=9, write=1), 0.5, "bound by the engine, at work 50% of the time"),
        (Timings(read=9, cut=1, infer=9), 0.95, "bound by the engine, at work 95% of the time"),
        (Timings(read=1, infer=9), 0.1, "bound by starting and waiting; the engine is at work 10% of the time"),
        (Timings(), 0.0, "nothing measured yet"),
    ],
)
def test_what_bounds_a_job_is_said_in_words(seconds: Timings, busy: float, words: str) -> None:
    assert bound_by(seconds, busy) == words
