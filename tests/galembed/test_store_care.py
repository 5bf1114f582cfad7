"""Care of a store: compaction takes nothing away that anybody needs, and a rollback takes both tables back."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import lance
import lancedb
import numpy as np
import pytest
from click.testing import CliRunner

from galembed.cli import main
from galembed.errors import ArtifactMismatch, ArtifactNotFound, BadRequest, StoreBusy
from galembed.schemas import STORE_FORMAT
from galembed.store import EMBEDDINGS_TABLE, compaction, open_store
from galembed.store import history as past
from galembed.store.checks import verify
from galembed.store.commit import Finished, commit, keys, prepare, prune, write_fragments
from galembed.store.compaction import compact
from galembed.store.history import history, history_text, rollback
from galembed.store.index import build_index
from galembed.store.keys import open_table
from galembed.store.lease import Lease
from tests.galembed import stores
from tests.galembed.commits import CONTRACT, SCHEMA, Place, embeddings, failures, finished, ids, sources, versions

NOW = timedelta(0)


@pytest.fixture
def store(tmp_path: Path) -> Place:
    return with_three_commits(tmp_path / "galaxies.lance")


def with_three_commits(place: Place) -> Place:
    """Make a store that had three commits: two of new rows, and one that replaced two of them."""
    with Lease(place) as lease:
        prepare(place, SCHEMA, lease)
        commit(place, [finished(place, "p", ["a", "b"], ["f"])], lease)
        commit(place, [finished(place, "q", ["c", "d"], ["g"])], lease)
        commit(place, [finished(place, "r", ["a", "c"], version="2", replaced=["a", "c"])], lease)
    return place


def numbers(store: Place) -> list[int]:
    return [version.number for version in history(store)]


def test_compaction_leaves_one_version_in_one_file_without_the_replaced_rows(store: Place) -> None:
    before = versions(store)
    report = compact(store, keep=NOW)
    assert versions(store) == before
    dataset = open_table(store, "embeddings")
    assert [fragment.count_rows() for fragment in dataset.get_fragments()] == [4]
    assert [fragment.physical_rows for fragment in dataset.get_fragments()] == [4]
    assert len(dataset.versions()) == 1
    assert (report.fragments_before, report.fragments_after, report.dropped) == (5, 2, 2)
    assert report.versions_kept == 1
    assert report.bytes_waiting == 0
    assert report.bytes_after < report.bytes_before
    assert verify(store).ok


def test_a_second_compaction_changes_nothing(store: Place) -> None:
    compact(store, keep=NOW)
    version = open_table(store, "embeddings").version
    report = compact(store, keep=NOW)
    assert open_table(store, "embeddings").version == version
    assert (report.versions_removed, report.dropped, report.orphans) == (0, 0, 0)


def test_what_was_done_before_a_compaction_is_dropped_after_it(store: Place) -> None:
    with Lease(store) as lease:
        again = finished(store, "r", ["a", "c"], version="2", replaced=["a", "c"])
        unknown = finished(store, "s", ["e"])
    # The orphans that a job would leave: files without a commit.
    report = compact(store, keep=NOW)
    assert report.orphans == 2
    with Lease(store) as lease:
        assert commit(store, [Finished("r", (), again.failures, again.replaced)], lease) == []
        assert commit(store, [finished(store, "s", ["e"])], lease) == ["s"]
    assert unknown.partition == "s"
    assert versions(store) == [("a", "2"), ("b", "1"), ("c", "2"), ("d", "1"), ("e", "1")]
    assert ids(keys(store).failed) == ["f", "g"]


def test_who_opened_a_store_before_reads_on_after_compactions(tmp_path: Path) -> None:
    place = tmp_path / "read.lance"
    data = stores.rows(400)
    opened = stores.make_store(place, data, failures=stores.failed([]))
    build_index(opened, "hnsw")
    reader = open_store(place)
    want = reader.similar(to="legacy-1", k=5, exact=True)["source_id"].tolist()
    changed = stores.rows(400, seed=1) | {"partition": ["new"] * 400}
    with Lease(place) as lease:
        table = stores.arrow(changed)
        result = Finished("new", tuple(write_fragments(place, table)), failures([], "new"), table.select([0, 1]))
        commit(place, [result], lease)
    assert verify(place).ok
    report = compact(place)
    compact(place)
    assert report.bytes_waiting > 0
    assert reader.similar(to="legacy-1", k=5)["source_id"].tolist() == want
    assert reader.similar(to="legacy-1", k=5, exact=True)["source_id"].tolist() == want
    np.testing.assert_allclose(reader.vectors()[1], data["vector"], atol=1e-6)
    assert len(open_store(place)) == 400
    now = open_store(place)
    found = now.similar(to=np.asarray(changed["vector"])[7], k=1)["source_id"].tolist()
    assert found == ["legacy-7"]


def test_a_version_long_out_of_date_goes_and_the_newest_of_that_time_stays(store: Place) -> None:
    # The version before this compaction was the newest until now: readers may have it, however old it is.
    newest = numbers(store)[-1]
    report = compact(store)
    assert newest in numbers(store)
    assert f"{report.bytes_waiting:,} of them are kept for readers" in str(report)


def test_new_rows_are_folded_into_the_indexes(tmp_path: Path) -> None:
    place = tmp_path / "indexed.lance"
    build_index(stores.make_store(place, stores.rows(300), failures=stores.failed([])), "hnsw")
    more = stores.rows(50, seed=3, survey="other") | {"partition": ["more"] * 50}
    with Lease(place) as lease:
        fragments = tuple(write_fragments(place, stores.arrow(more)))
        commit(place, [Finished("more", fragments, failures([], "more"))], lease)
    assert open_store(place).status().unindexed == 50
    assert compact(place, keep=NOW).folded == 50
    store = open_store(place)
    assert store.status().unindexed == 0
    assert store.similar(to="other-7", k=1, exclude_self=False)["source_id"].tolist() == ["other-7"]
    assert verify(place).ok


def test_a_compaction_that_an_index_came_before_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stores.make_store(tmp_path / "s", stores.rows(300), failures=stores.failed([]))
    lancedb.connect(tmp_path / "s").open_table(EMBEDDINGS_TABLE).add(stores.arrow(stores.rows(300, survey="galaxy")))
    merge, opened, tried = compaction._merge, compaction.open_table, []

    def merge_too_late(store: Place, table: str) -> None:
        def opened_then_indexed(store: Place, table: str) -> Any:
            dataset = opened(store, table)
            if table == EMBEDDINGS_TABLE and table not in tried:
                opened(store, table).create_scalar_index("source_id", "BTREE")
            return dataset

        with monkeypatch.context() as patched:
            patched.setattr(compaction, "open_table", opened_then_indexed)
            try:
                merge(store, table)
            finally:
                tried.append(table)

    monkeypatch.setattr(compaction, "_merge", merge_too_late)
    done = compact(tmp_path / "s")
    assert tried.count(EMBEDDINGS_TABLE) == 2
    assert (done.rows, done.fragments_before, done.fragments_after) == (600, 2, 1)
    assert verify(tmp_path / "s").ok


@pytest.mark.parametrize("care", [compact, lambda store: rollback(store, 2)], ids=["compact", "rollback"])
def test_a_store_that_a_job_writes_is_left_alone(store: Place, care: object) -> None:
    before = numbers(store)
    with Lease(store), pytest.raises(StoreBusy, match="is being written by"):
        care(store)  # type: ignore[operator]
    assert numbers(store) == before


@pytest.mark.parametrize("care", [compact, history, lambda store: rollback(store, 2)])
def test_where_there_is_no_store_none_is_made(tmp_path: Path, care: object) -> None:
    with pytest.raises(ArtifactNotFound, match="no store at"):
        care(tmp_path / "nothing.lance")  # type: ignore[operator]
    assert not (tmp_path / "nothing.lance").exists()


def test_versions_are_listed_with_what_made_them(store: Place) -> None:
    found = history(store)
    assert [(version.rows, version.failures, version.what) for version in found] == [
        (0, 0, "made"),
        (2, 1, "2 embedded"),
        (4, 2, "2 embedded"),
        (4, 2, "2 embedded, 2 replaced or removed"),
    ]
    assert sorted(found, key=lambda version: version.time) == found
    assert history_text(found).splitlines()[2].split()[-2:] == ["2", "embedded"]


def test_both_tables_go_back_together_and_forth_again(store: Place) -> None:
    report = rollback(store, 2)
    assert versions(store) == [("a", "1"), ("b", "1")]
    assert versions(store, "failures") == [("f", "1")]
    assert (report.taken, report.returned, report.exchanged) == (2, 0, 1)
    assert (report.failures_before, report.failures_after) == (2, 1)
    assert "taken away: 2 row(s), among them x:" in str(report)
    assert history(store)[-1].what == "rolled back to 2"
    assert verify(store).ok
    back = rollback(store, report.undo)
    assert versions(store) == [("a", "2"), ("b", "1"), ("c", "2"), ("d", "1")]
    assert versions(store, "failures") == [("f", "1"), ("g", "1")]
    assert (back.taken, back.returned, back.exchanged) == (0, 2, 1)


def test_a_store_on_object_storage_is_cared_for_alike(bucket: str) -> None:
    place = with_three_commits(f"{bucket}/galaxies.lance")
    rollback(place, 2)
    assert (versions(place), versions(place, "failures")) == ([("a", "1"), ("b", "1")], [("f", "1")])
    assert compact(place, keep=NOW).versions_kept == 1
    assert numbers(place) == [5]
    assert verify(place).ok


def test_what_was_taken_away_is_embedded_again(store: Place) -> None:
    rollback(store, 2)
    with Lease(store) as lease:
        assert commit(store, [finished(store, "q", ["c", "d"], ["g"])], lease) == ["q"]
    assert versions(store) == [("a", "1"), ("b", "1"), ("c", "1"), ("d", "1")]
    assert ids(keys(store).failed) == ["f", "g"]
    assert verify(store).ok


def test_pruned_sources_come_back(store: Place) -> None:
    with Lease(store) as lease:
        prune(store, sources(["b", "f"]), lease)
    report = rollback(store, 4)
    assert (report.taken, report.returned) == (0, 1)
    assert "back again: 1 row(s)" in str(report)
    assert versions(store, "failures") == [("f", "1"), ("g", "1")]


def test_a_rollback_killed_between_the_tables_leaves_a_sound_store_and_goes_on(
    store: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = lance.LanceDataset.restore

    def once(dataset: lance.LanceDataset) -> None:
        real(dataset)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lance.LanceDataset, "restore", once)
        with pytest.raises(KeyboardInterrupt):
            rollback(store, 2)
    assert (len(versions(store)), len(versions(store, "failures"))) == (4, 1)
    assert verify(store).ok
    rollback(store, 2)
    assert (versions(store), versions(store, "failures")) == ([("a", "1"), ("b", "1")], [("f", "1")])


def test_a_rollback_past_an_index_says_that_it_is_gone(tmp_path: Path) -> None:
    place = tmp_path / "indexed.lance"
    opened = stores.make_store(place, stores.rows(300), failures=stores.failed([]))
    first = numbers(place)[-1]
    build_index(opened, "exact")
    report = rollback(place, first)
    assert "_healpix_29_idx" in report.lost_indexes
    assert "made later and gone: index" in str(report)


def test_a_version_that_is_not_there_or_is_the_newest_is_refused(store: Place) -> None:
    with pytest.raises(BadRequest, match=r"no version 99; there are 1, 2, 3, 4"):
        rollback(store, 99)
    with pytest.raises(BadRequest, match="version 4 is the newest"):
        rollback(store, 4)
    compact(store, keep=NOW)
    with pytest.raises(BadRequest, match="no version 2"):
        rollback(store, 2)


def test_a_negative_time_to_keep_is_refused(store: Place) -> None:
    with pytest.raises(BadRequest, match="at least 0"):
        compact(store, keep=timedelta(hours=-1))


def of_format(place: Path, number: int) -> None:
    """Write a store that says it has a format; below 2, without the columns that came with that."""
    facts = json.loads(CONTRACT.to_json()) | {"format": number}
    table = embeddings(["a", "b"], "p")
    if number < 2:
        table = table.drop_columns(["fov", "flags", "neighbours"])
        facts = {name: value for name, value in facts.items() if name not in ("survey", "fov")}
    table = table.replace_schema_metadata({"galembed": json.dumps(facts)})
    lance.write_dataset(table, place / "embeddings.lance")
    lance.write_dataset(failures(["f"], "p"), place / "failures.lance")


def test_a_store_of_an_older_format_is_upgraded_and_goes_on(tmp_path: Path) -> None:
    of_format(tmp_path, 1)
    with pytest.raises(ArtifactMismatch, match=r"older format 1.*`galembed compact STORE` brings it up to date"):
        open_store(tmp_path)
    report = compact(tmp_path)
    assert report.upgraded_from == 1
    assert "upgraded from format 1" in str(report)
    store = open_store(tmp_path)
    assert store.contract == CONTRACT
    assert store.columns == {item.name: (item.metadata or {}).get(b"unit", b"").decode() for item in SCHEMA}
    assert set(store.schema.names) == set(SCHEMA.names)
    with Lease(tmp_path) as lease:
        prepare(tmp_path, SCHEMA, lease)
        commit(tmp_path, [finished(tmp_path, "q", ["a", "c"], version="2", replaced=["a"])], lease)
    assert versions(tmp_path) == [("a", "2"), ("b", "1"), ("c", "2")]
    assert open_store(tmp_path).status().rows == 3
    assert verify(tmp_path).ok


def test_an_upgrade_killed_after_its_columns_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_format(tmp_path, 1)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lance.LanceDataset, "update_schema_metadata", killed)
        with pytest.raises(KeyboardInterrupt):
            compact(tmp_path)
    with pytest.raises(ArtifactMismatch, match="older format 1"):
        open_store(tmp_path)
    assert compact(tmp_path).upgraded_from == 1
    assert len(open_store(tmp_path)) == 2


def test_a_store_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    of_format(tmp_path, STORE_FORMAT + 1)
    for touch in (open_store, compact):
        with pytest.raises(ArtifactMismatch, match=r"format 3, of a newer galembed.*update galembed"):
            touch(tmp_path)


def test_the_commands_say_what_they_did(tmp_path: Path) -> None:
    with Lease(tmp_path) as lease:
        prepare(tmp_path, SCHEMA, lease)
        commit(tmp_path, [finished(tmp_path, "p", ["a"])], lease)
        commit(tmp_path, [finished(tmp_path, "q", ["b"])], lease)
    run = CliRunner().invoke
    listed = run(main, ["rollback", str(tmp_path)])
    assert listed.exit_code == 0, listed.output
    assert [line.split()[0] for line in listed.output.splitlines()] == ["version", "1", "2", "3"]
    undone = run(main, ["rollback", str(tmp_path), "2"])
    assert "is as it was in version 2" in undone.output
    assert ids(open_table(tmp_path, "embeddings").to_table()) == ["a"]
    merged = run(main, ["compact", str(tmp_path), "--keep", "0"])
    assert merged.exit_code == 0, merged.output
    assert "1 kept" in merged.output
    assert past.history(tmp_path)[-1].rows == 1
