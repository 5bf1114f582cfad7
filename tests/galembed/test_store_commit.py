"""The write side of the store: what is committed once stays once, whoever dies or wakes late."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

from galembed.errors import ArtifactMismatch, ArtifactNotFound, SchemaMismatch, StoreBusy
from galembed.schemas import StoreContract, embeddings_schema
from galembed.store import commit as committing
from galembed.store import open_store
from galembed.store.checks import verify
from galembed.store.commit import Finished, commit, keys, prepare, prune, store_schema, tidy, write_fragments
from galembed.store.keys import joined_key, open_table, rows_with
from galembed.store.lease import Lease
from tests.galembed import stores
from tests.galembed.commits import (
    CONTRACT,
    SCHEMA,
    Place,
    failures,
    finished,
    ids,
    sources,
    versions,
)


@pytest.fixture(params=["directory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Place of a store, none there yet."""
    if request.param == "s3":
        return f"{request.getfixturevalue('bucket')}/galaxies.lance"
    return tmp_path / "galaxies.lance"


@pytest.fixture
def lease(store: Place) -> Iterator[Lease]:
    with Lease(store) as lease:
        prepare(store, SCHEMA, lease)
        yield lease


def attempts(store: Place) -> dict[str, int]:
    rows = open_table(store, "failures").to_table().to_pylist()
    return {row["source_id"]: row["attempts"] for row in rows}


def killed(*_: object, **options: object) -> None:
    raise KeyboardInterrupt


def commit_twice_over(store: Place, result: Finished) -> None:
    """Append a result as a holder does that slept past its lease: without a look at what is there."""
    metadata = [lance.fragment.FragmentMetadata.from_json(text) for text in result.fragments]
    dataset = open_table(store, "embeddings")
    lance.LanceDataset.commit(dataset, lance.LanceOperation.Append(metadata), read_version=dataset.version)


def test_fragments_are_seen_only_once_committed(store: Place, lease: Lease) -> None:
    result = finished(store, "p", ["a", "b"], ["c"])
    assert not len(keys(store).embedded)
    assert commit(store, [result], lease) == ["p"]
    assert ids(keys(store).embedded) == ["a", "b"]
    assert ids(keys(store).failed) == ["c"]


def test_one_result_committed_twice_is_there_once(store: Place, lease: Lease) -> None:
    result = finished(store, "p", ["a", "b"], ["c"])
    commit(store, [result, result], lease)
    assert commit(store, [result], lease) == []
    assert ids(keys(store).embedded) == ["a", "b"]
    assert attempts(store) == {"c": 1}


def test_of_two_results_of_one_partition_the_first_wins(store: Place, lease: Lease) -> None:
    commit(store, [finished(store, "p", ["a"]), finished(store, "p", ["a"])], lease)
    assert ids(keys(store).embedded) == ["a"]


def test_killed_between_the_two_tables_and_run_again(
    store: Place, lease: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(committing, "_append", killed)
        with pytest.raises(KeyboardInterrupt):
            commit(store, [finished(store, "p", ["a"], ["b"])], lease)
    assert (ids(keys(store).embedded), ids(keys(store).failed)) == ([], ["b"])
    commit(store, [finished(store, "p2", ["a"])], lease)
    assert (ids(keys(store).embedded), ids(keys(store).failed)) == (["a"], ["b"])


@pytest.mark.parametrize("landed", [True, False])
def test_a_commit_whose_answer_was_lost_is_there_once(
    store: Place, lease: Lease, monkeypatch: pytest.MonkeyPatch, landed: bool
) -> None:
    commit(store, [finished(store, "p", ["a", "b"])], lease)
    real = lance.LanceDataset.commit
    calls: list[Any] = []

    def unanswered(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if landed or len(calls) > 1:
            real(*args, **options)
        if len(calls) == 1:
            raise OSError("connection reset")

    monkeypatch.setattr(lance.LanceDataset, "commit", staticmethod(unanswered))
    commit(store, [finished(store, "q", ["a", "c"], version="2", replaced=["a"])], lease)
    assert versions(store) == [("a", "2"), ("b", "1"), ("c", "2")]
    assert len(calls) == (1 if landed else 2)


def test_two_commits_that_replace_the_same_row_exclude_each_other(
    store: Place, lease: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(store, [finished(store, "p", ["a", "b"])], lease)
    other = finished(store, "other", ["a"], version="2", replaced=["a"])
    real = lance.LanceDataset.commit
    outcomes: list[str] = []

    def overtaken(dataset: Any, operation: Any, **options: Any) -> None:
        if not outcomes:
            stale = rows_with(dataset, joined_key(other.replaced))[0]
            first = committing._operation(store, dataset, other.fragments, stale)
            real(open_table(store, "embeddings"), first, read_version=dataset.version)
        try:
            real(dataset, operation, **options)
            outcomes.append("landed")
        except OSError as error:
            outcomes.append(type(error).__name__)
            raise

    monkeypatch.setattr(lance.LanceDataset, "commit", staticmethod(overtaken))
    commit(store, [finished(store, "q", ["a"], version="3", replaced=["a"])], lease)
    assert outcomes == ["CommitConflictError", "landed"]
    assert versions(store) == [("a", "3"), ("b", "1")]


def test_a_replaced_source_has_its_new_row_alone(store: Place, lease: Lease) -> None:
    commit(store, [finished(store, "p", ["a", "b"]), finished(store, "q", ["c"])], lease)
    before = open_table(store, "embeddings").version
    result = finished(store, "r", ["a", "c", "d"], version="2", replaced=["a", "c"])
    assert commit(store, [result], lease) == ["r"]
    assert open_table(store, "embeddings").version == before + 1
    assert versions(store) == [("a", "2"), ("b", "1"), ("c", "2"), ("d", "2")]
    assert commit(store, [result], lease) == []
    assert versions(store) == [("a", "2"), ("b", "1"), ("c", "2"), ("d", "2")]
    tidy(store, lease)
    assert verify(store).ok


def test_a_replaced_source_that_fails_is_a_failure_alone(store: Place, lease: Lease) -> None:
    commit(store, [finished(store, "p", ["a", "b"])], lease)
    result = finished(store, "q", [], ["a"], version="2", replaced=["a"])
    commit(store, [result], lease)
    commit(store, [result], lease)
    assert versions(store) == [("b", "1")]
    assert ids(keys(store).failed) == ["a"]


def test_killed_between_the_tables_a_replaced_source_keeps_its_old_row(
    store: Place, lease: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(store, [finished(store, "p", ["a", "b"])], lease)
    with monkeypatch.context() as patch:
        patch.setattr(committing, "_append", killed)
        with pytest.raises(KeyboardInterrupt):
            commit(store, [finished(store, "q", ["b"], ["a"], version="2", replaced=["a", "b"])], lease)
    assert versions(store) == [("a", "1"), ("b", "1")]
    assert len(keys(store).failed) == 0
    assert verify(store).hidden == 1
    assert verify(store).ok
    commit(store, [finished(store, "q2", ["b"], ["a"], version="2", replaced=["a", "b"])], lease)
    assert versions(store) == [("b", "2")]
    assert ids(keys(store).failed) == ["a"]


def test_killed_in_the_commit_itself_leaves_the_version_before(
    store: Place, lease: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(store, [finished(store, "p", ["a", "b"])], lease)
    result = finished(store, "q", ["a"], version="2", replaced=["a"])
    with monkeypatch.context() as patch:
        patch.setattr(lance.LanceDataset, "commit", staticmethod(killed))
        with pytest.raises(KeyboardInterrupt):
            commit(store, [result], lease)
    assert versions(store) == [("a", "1"), ("b", "1")]
    commit(store, [result], lease)
    assert versions(store) == [("a", "2"), ("b", "1")]


def test_thousands_of_sources_are_replaced_at_once(store: Place, lease: Lease) -> None:
    names = [f"galaxy-{number:05d}" for number in range(12_000)]
    commit(store, [finished(store, f"p{part}", names[part::4]) for part in range(4)], lease)
    changed = names[::2]
    commit(store, [finished(store, "q", changed, version="2", replaced=changed)], lease)
    assert versions(store) == [(name, "12"[1 - number % 2]) for number, name in enumerate(names)]


@pytest.mark.parametrize("index_later", [True, False], ids=["index after", "index before"])
def test_indexes_survive_a_replacement_and_return_no_row_that_is_gone(tmp_path: Path, index_later: bool) -> None:
    place = tmp_path / "indexed.lance"
    data = stores.rows(2_000)
    opened = stores.make_store(place, data, failures=stores.failed([]))
    create = [lambda: opened.table.create_index("source_id", config=btree()), lambda: hnsw(opened.table)]
    before = open_table(place, "embeddings")
    if not index_later:
        for each in create:
            each()
    gone = {f"legacy-{number}" for number in range(0, 2_000, 2)}
    flipped = data | {"vector": -np.asarray(data["vector"]), "partition": ["new"] * 2_000}
    table = stores.arrow(flipped).filter(pa.array([name in gone for name in data["source_id"]]))
    old = stores.arrow(data).filter(pa.array([name in gone for name in data["source_id"]]))
    replaced = table.select(["survey", "source_id"])
    with Lease(place) as lease:
        fragments = tuple(write_fragments(place, table))
        commit(place, [Finished("new", fragments, failures([], "new"), replaced)], lease)
    if index_later:
        for each in create:  # from a table opened before
            each()
    store = open_store(place)
    assert sorted(index.name for index in store.table.list_indices()) == ["source_id_idx", "vector_idx"]
    assert open_table(place, "embeddings").version > before.version
    assert len(store) == 2_000
    for row in range(5):
        hits = store.similar(np.asarray(old["vector"][row].as_py(), np.float32), k=50)
        assert not {str(name) for name in hits["source_id"]} & gone
        (mirrored,) = store.similar(np.asarray(table["vector"][row].as_py(), np.float32), k=1)["source_id"]
        assert mirrored == table["source_id"][row].as_py()
    assert store.rows([("legacy", "legacy-0")], ["partition"])["partition"].to_pylist() == ["new"]


def btree() -> Any:
    from lancedb.index import BTree

    return BTree()


def hnsw(table: Any) -> None:
    from lancedb.index import HnswSq

    table.create_index("vector", config=HnswSq(distance_type="cosine", num_partitions=1))


def test_attempts_count_up_and_the_last_of_a_key_counts(store: Place, lease: Lease) -> None:
    committing.upsert_failures(store, failures(["a", "b", "a"], "p"), lease)
    committing.upsert_failures(store, failures(["b", "c"], "q"), lease)
    assert attempts(store) == {"a": 1, "b": 2, "c": 1}


def test_a_failure_is_hidden_once_embedded_and_dropped_by_tidy(store: Place, lease: Lease) -> None:
    commit(store, [finished(store, "p", ["a"], ["b", "c"])], lease)
    commit(store, [finished(store, "q", ["b"])], lease)
    assert ids(keys(store).failed) == ["c"]
    assert set(attempts(store)) == {"b", "c"}
    tidy(store, lease)
    assert set(attempts(store)) == {"c"}


def test_tidy_removes_orphans_and_nothing_else(store: Place, lease: Lease) -> None:
    commit(store, [finished(store, "p", ["a"], ["b"])], lease)
    finished(store, "never", ["z"])
    failures = open_table(store, "failures")
    lance.fragment.write_fragments(failures.to_table(), failures)
    assert tidy(store, lease) == 2
    assert tidy(store, lease) == 0
    assert (ids(keys(store).embedded), ids(keys(store).failed)) == (["a"], ["b"])


def test_tidy_keeps_the_first_row_of_each_source(store: Place, lease: Lease) -> None:
    commit(store, [finished(store, "p", ["a", "b"])], lease)
    commit_twice_over(store, finished(store, "p", ["a", "b"], version="late"))
    commit_twice_over(store, finished(store, "q", ["b", "c"], version="later"))
    assert verify(store).repeated == 2
    tidy(store, lease)
    assert versions(store) == [("a", "1"), ("b", "1"), ("c", "later")]
    version = open_table(store, "embeddings").version
    tidy(store, lease)
    assert open_table(store, "embeddings").version == version


def test_pruned_sources_are_in_neither_table(store: Place, lease: Lease) -> None:
    commit(store, [finished(store, "p", ["a", "b"], ["c", "d"]), finished(store, "q", ["c", "e"])], lease)
    assert prune(store, sources(["a", "c", "d", "nowhere"]), lease) == 3
    assert (ids(keys(store).embedded), attempts(store)) == (["b", "e"], {})
    assert prune(store, sources(["a", "c", "d"]), lease) == 0
    assert prune(store, sources([]), lease) == 0
    assert prune(store, sources(["b", "e"]), lease) == 2
    assert open_table(store, "embeddings").count_rows() == 0


def test_a_prune_that_was_killed_is_made_again(store: Place, lease: Lease, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(store, [finished(store, "p", ["a", "b"], ["c"])], lease)
    with monkeypatch.context() as patch:
        patch.setattr(committing, "_commit", killed)
        with pytest.raises(KeyboardInterrupt):
            prune(store, sources(["a", "c"]), lease)
    assert prune(store, sources(["a", "c"]), lease) == 1
    assert (ids(keys(store).embedded), attempts(store)) == (["b"], {})


@pytest.mark.parametrize(
    "change",
    [
        lambda store, lease: commit(store, [Finished("q", (), failures(["b"], "q"), sources(["a"]))], lease),
        lambda store, lease: prune(store, sources(["a"]), lease),
        lambda store, lease: tidy(store, lease),
    ],
    ids=["commit", "prune", "tidy"],
)
def test_without_the_lease_nothing_changes(
    store: Place, lease: Lease, change: Callable[[Place, Lease], object]
) -> None:
    commit(store, [finished(store, "p", ["a"])], lease)
    late = Lease(store)
    with pytest.raises(StoreBusy, match="lost its lease"):
        change(store, late)
    assert (versions(store), attempts(store)) == ([("a", "1")], {})


def test_many_small_fragments_become_one(store: Place, lease: Lease, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(committing, "SMALL_FRAGMENTS", 5)
    commit(store, [finished(store, f"p{number}", [f"a{number}"]) for number in range(6)], lease)
    tidy(store, lease)
    dataset = open_table(store, "embeddings")
    assert len(dataset.get_fragments()) == 1
    assert dataset.count_rows() == 6
    assert StoreContract.from_schema(dataset.schema) == CONTRACT


def test_a_fragment_without_its_file_is_not_committed(store: Place, lease: Lease) -> None:
    result = finished(store, "p", ["a"])
    tidy(store, lease)
    with pytest.raises(ArtifactNotFound, match="are gone"):
        commit(store, [result], lease)
    assert len(keys(store).embedded) == 0


def test_a_store_of_another_backbone_is_refused(store: Place, lease: Lease) -> None:
    other = embeddings_schema(4, contract=StoreContract("id2", "/b", "flux", "fp32", bands={"blue": "g"}))
    with pytest.raises(ArtifactMismatch, match=r"embedding_id 'id1', this run has 'id2'.*another --store"):
        prepare(store, other, lease)


def test_other_carried_columns_are_refused(store: Place, lease: Lease) -> None:
    other = embeddings_schema(4, carried=[pa.field("redshift", pa.float32())], contract=CONTRACT)
    with pytest.raises(SchemaMismatch, match=r"mag_r \(float\) is only in the store; redshift .*--carry"):
        prepare(store, other, lease)


def test_a_folder_of_other_things_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ArtifactMismatch, match=r"thesis\.tex"):
        store_schema(tmp_path)
    with pytest.raises(ArtifactMismatch, match="is a file"):
        store_schema(tmp_path / "thesis.tex")
    assert store_schema(tmp_path / "new") is None


def test_tables_can_be_opened_for_reading(store: Place, lease: Lease) -> None:
    commit(store, [finished(store, "p", ["a"], ["b"])], lease)
    opened = open_store(store)
    assert len(opened) == 1
    assert list(opened.failures()["source_id"]) == ["b"]


def test_rows_are_found_by_their_whole_key(store: Place, lease: Lease) -> None:
    commit(store, [finished(store, "p", ["a", "b"])], lease)
    other = pa.table({"survey": ["y", "x"], "source_id": ["a", "b"]})
    assert rows_with(open_table(store, "embeddings"), joined_key(other))[1].to_pylist() == ["x\x1fb"]


FULL = """
import resource, sys
from galembed.store.commit import Lease, commit, prepare, write_fragments
from tests.galembed.commits import SCHEMA, embeddings, finished
store, what = sys.argv[1:]
with Lease(store) as lease:
    prepare(store, SCHEMA, lease)
    commit(store, [finished(store, "p", ["a"])], lease)
    result = finished(store, "q", ["b"], ["c"])
    limit = 20_000 if what == "write" else 0
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        if what == "write":
            write_fragments(store, embeddings([f"galaxy-{n}" for n in range(20_000)], "r"))
        else:
            commit(store, [result], lease)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""


@pytest.mark.parametrize("what", ["write", "commit"])
def test_a_full_disk_is_said_and_leaves_the_store_as_it_was(tmp_path: Path, what: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "s"), what], capture_output=True, text=True, check=False
    )
    assert "galembed.errors.StorageError" in ended.stderr, ended.stderr
    assert "free some space, and the same command goes on" in ended.stderr
    assert versions(tmp_path / "s") == [("a", "1")]
    with Lease(tmp_path / "s") as lease:
        commit(tmp_path / "s", [finished(tmp_path / "s", "q2", ["b"], ["c"])], lease)
        tidy(tmp_path / "s", lease)
    assert verify(tmp_path / "s").ok
