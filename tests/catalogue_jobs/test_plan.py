"""Plans: the same rows give the same partitions, and a new source disturbs only its own."""

from __future__ import annotations

import pickle

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from catalogue_jobs import plan
from catalogue_jobs.plan import halves, in_order, outstanding, partitions, rows_of
from galembed.errors import SchemaMismatch
from galembed.schemas import SOURCES
from galembed.sources import SourceList
from galembed.store.commit import StoreKeys
from tests.catalogue_jobs.fakes import FakeReader, source_table

LISTS = {
    "sky": source_table(3000),
    "tiles": source_table(3000, tiles=5),
    "nowhere": source_table(3000, positions=False),
}


def names(table: pa.Table, limit: int = 256) -> set[str]:
    return {part.name for part in partitions(table, limit)}


def stored(embedded: pa.Table, failed: pa.Table, stage: str = "cut") -> StoreKeys:
    columns = ["survey", "source_id", "source_version"]
    failed = failed.select(columns).append_column("stage", pa.array([stage] * len(failed), pa.string()))
    return StoreKeys(embedded.select(columns), failed)


def listed(table: pa.Table) -> SourceList:
    return SourceList(table, FakeReader(0).sources().rejected)


@pytest.mark.parametrize("kind", LISTS)
@pytest.mark.parametrize("limit", [1, 40, 256])
def test_every_row_is_in_one_partition_of_bounded_size(kind: str, limit: int) -> None:
    parts = partitions(LISTS[kind], limit)
    rows = np.concatenate([part.rows for part in parts])
    assert sorted(rows) == list(range(3000))
    assert max(len(part.rows) for part in parts) <= limit
    assert len({part.name for part in parts}) == len(parts)


@pytest.mark.parametrize("kind", LISTS)
def test_names_do_not_depend_on_the_order_of_the_list(kind: str) -> None:
    table = LISTS[kind]
    shuffled = table.take(pa.array(np.random.default_rng(0).permutation(len(table))))
    assert names(table) == names(shuffled)


@pytest.mark.parametrize("tiles", [0, 5])
@pytest.mark.parametrize("positions", [True, False])
def test_adding_a_source_leaves_all_other_partitions(positions: bool, tiles: int) -> None:
    before, after = (names(source_table(count, positions, tiles)) for count in (3000, 3001))
    assert len(before - after) <= 1
    assert len(after - before) <= 4  # its cell, or the four that it is cut into


def test_a_new_version_of_a_file_renames_its_partition_only() -> None:
    table = LISTS["sky"]
    versions = ["v2", *table["source_version"].to_pylist()[1:]]
    changed = table.set_column(
        table.column_names.index("source_version"), SOURCES.field("source_version"), pa.array(versions)
    )
    assert len(names(table) - names(changed)) == 1


def test_sources_of_a_tile_stay_together() -> None:
    table = LISTS["tiles"]
    for part in partitions(table):
        assert len(set(table["source_uri"].take(pa.array(part.rows)).to_pylist())) == 1
        assert part.name.startswith("tile")


def test_sources_at_one_place_are_cut_by_their_keys() -> None:
    table = source_table(500)
    for name in ("ra", "dec"):
        at = table.column_names.index(name)
        table = table.set_column(at, SOURCES.field(name), pa.array([10.0] * 500))
    parts = partitions(table, 100)
    assert max(len(part.rows) for part in parts) <= 100
    assert sum(len(part.rows) for part in parts) == 500
    assert {part.name for part in parts} == names(table.take(pa.array(np.arange(500)[::-1])), 100)


@pytest.mark.parametrize("kind", LISTS)
def test_a_table_in_order_holds_the_same_partitions(kind: str) -> None:
    table = LISTS[kind]
    parts = partitions(table)
    moved, places = in_order(table, parts)
    for part, place in zip(parts, places, strict=True):
        assert part.name == place.name
        assert rows_of(moved, place).equals(table.take(pa.array(part.rows)))


def test_halves_hold_the_rows_of_their_partition() -> None:
    table = LISTS["sky"]
    part = partitions(table)[3]
    found = halves(table, part)
    assert sorted(np.concatenate([half.rows for half in found])) == sorted(part.rows)
    assert max(len(half.rows) for half in found) < len(part.rows)
    assert {half.name for half in found}.isdisjoint({part.name})


def test_rows_that_travel_leave_the_table_behind() -> None:
    table = LISTS["sky"]
    part = in_order(table, partitions(table))[1][0]
    assert len(pickle.dumps(rows_of(table, part))) < len(pickle.dumps(table)) / 10


def test_no_sources_no_partitions() -> None:
    assert partitions(source_table(0)) == []


def test_the_anti_join_leaves_what_is_in_neither_table() -> None:
    table = source_table(10)
    done = stored(table.slice(0, 4), table.slice(4, 3))
    todo = outstanding(listed(table), done)
    assert todo.table["source_id"].to_pylist() == ["g7", "g8", "g9"]
    assert (todo.listed, todo.embedded, todo.failed, len(todo.changed)) == (10, 4, 3, 0)
    again = outstanding(listed(table), done, retry_failed=True)
    assert again.table["source_id"].to_pylist() == [f"g{number}" for number in range(4, 10)]
    assert outstanding(listed(table), None).table.equals(table)


def older(table: pa.Table) -> pa.Table:
    versions = pa.array(["v0", "v1", None, "v1"])
    return table.set_column(table.column_names.index("source_version"), SOURCES.field("source_version"), versions)


@pytest.mark.parametrize("hashed", [1, 2, 3, 100])
def test_keys_are_found_first_where_they_are_first(monkeypatch: pytest.MonkeyPatch, hashed: int) -> None:
    monkeypatch.setattr(plan, "_HASHED", hashed)
    values, among = pa.array(["a", "b", "c", "d", "e"]), pa.array(["c", "a", "c", "x", "e", "a", "y"])
    assert plan._index_in(values, among).to_pylist() == [1, None, 0, None, 4]
    assert plan._index_in(values, among.slice(0, 0)).null_count == 5


def test_a_source_with_a_new_file_is_planned_again() -> None:
    table = source_table(4)
    todo = outstanding(listed(table), stored(older(table), table.slice(0, 0)))
    assert todo.table["source_id"].to_pylist() == todo.changed["source_id"].to_pylist() == ["g0"]
    assert (todo.embedded, todo.outdated) == (3, 0)
    kept = outstanding(listed(table), stored(older(table), table.slice(0, 0)), keep_changed=True)
    assert (len(kept.table), len(kept.changed), kept.embedded, kept.outdated) == (0, 0, 4, 1)


def test_a_failure_with_a_new_file_is_tried_again() -> None:
    table = source_table(4)
    todo = outstanding(listed(table), stored(table.slice(0, 0), older(table)))
    assert todo.table["source_id"].to_pylist() == ["g0"]
    assert (todo.failed, len(todo.changed)) == (3, 0)


def test_what_the_list_no_longer_has_is_withdrawn_from_its_own_survey() -> None:
    table = source_table(6)
    other = table.slice(0, 2).set_column(0, SOURCES.field("survey"), pa.array(["other", "other"]))
    done = stored(pa.concat_tables([table.slice(0, 4), other]), table.slice(4, 2))
    todo = outstanding(listed(table.take([0, 1, 4])), done)
    assert sorted(todo.withdrawn["source_id"].to_pylist()) == ["g2", "g3", "g5"]
    assert set(todo.withdrawn["survey"].to_pylist()) == {"fake"}


def test_what_the_list_rejected_once_and_accepts_now_is_planned() -> None:
    table = source_table(3)
    todo = outstanding(listed(table), stored(table.slice(0, 1), table.slice(1, 1), stage="list"))
    assert todo.table["source_id"].to_pylist() == ["g1", "g2"]


def test_rejected_rows_become_failures_once() -> None:
    sources = FakeReader(3, rejected=("g0#row7", "g1")).sources()
    todo = outstanding(sources, None)
    assert todo.rejected["source_id"].to_pylist() == ["g0#row7"]  # g1 is in the list itself
    assert pc.unique(todo.rejected["stage"]).to_pylist() == ["list"]
    assert todo.rejected["partition"][0].as_py().startswith("list-")
    done = stored(source_table(3), todo.rejected, stage="list")
    assert len(outstanding(sources, done).rejected) == 0


def test_a_list_that_names_a_source_twice_is_refused() -> None:
    table = pa.concat_tables([source_table(3), source_table(1)])
    with pytest.raises(SchemaMismatch, match="1 source"):
        outstanding(listed(table), None)


def test_rows_of_a_table_are_partitioned_by_file_in_its_order_wherever_they_lie_on_the_sky() -> None:
    table = source_table(900)
    uris = pa.array([f"/data/train-{n % 3}.parquet#{n // 3}" for n in range(900)], pa.string())
    table = table.set_column(table.column_names.index("source_uri"), SOURCES.field("source_uri"), uris)
    parts = partitions(table, 100)
    assert sorted(np.concatenate([part.rows for part in parts]).tolist()) == list(range(900))
    for part in parts:
        files, rows = zip(
            *(uri.split("#") for uri in table["source_uri"].take(pa.array(part.rows)).to_pylist()), strict=True
        )
        numbers = sorted(map(int, rows))
        assert len(set(files)) == 1
        assert numbers == list(range(numbers[0], numbers[-1] + 1))
        assert part.name.startswith("train-")
