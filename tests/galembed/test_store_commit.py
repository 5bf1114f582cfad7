"""The write side of the store: what is committed once stays once, whoever dies or wakes late."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pytest

from galembed.errors import ArtifactMismatch, ArtifactNotFound, SchemaMismatch, StoreBusy
from galembed.schemas import FAILURES, StoreContract, conform, embeddings_schema
from galembed.store import commit as committing
from galembed.store.commit import (
    Finished,
    Lease,
    append_fragments,
    commit,
    keys,
    prepare,
    tidy,
    write_fragments,
)

DIM = 4
CONTRACT = StoreContract("id1", "/backbone", "flux", "fp32", bands={"blue": "g"})
SCHEMA = embeddings_schema(DIM, carried=[pa.field("mag_r", pa.float32())], contract=CONTRACT)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "galaxies.lance"


@pytest.fixture
def lease(store: Path) -> Iterator[Lease]:
    with Lease(store) as lease:
        prepare(store, SCHEMA, lease)
        yield lease


def embeddings(names: list[str], partition: str) -> pa.Table:
    columns = {item.name: pa.nulls(len(names), item.type) for item in SCHEMA}
    columns |= {name: ["x"] * len(names) for name in ("survey", "flags", "input_kind", "engine")}
    columns |= {"source_id": names, "partition": [partition] * len(names)}
    columns |= {name: np.ones(len(names), np.float32) for name in ("norm", "coverage")}
    flat = pa.array(np.ones(DIM * len(names), np.float32))
    columns["vector"] = pa.FixedSizeListArray.from_arrays(flat, DIM)
    return conform(pa.table(columns), SCHEMA)


def failures(names: list[str], partition: str) -> pa.Table:
    columns = {item.name: pa.nulls(len(names), item.type) for item in FAILURES}
    columns |= {name: ["x"] * len(names) for name in ("survey", "stage", "reason", "message")}
    columns |= {"source_id": names, "partition": [partition] * len(names)}
    columns |= {"attempts": [1] * len(names), "time": [0] * len(names)}
    return conform(pa.table(columns), FAILURES)


def finished(store: Path, partition: str, good: list[str], bad: list[str] = []) -> Finished:  # noqa: B006
    fragments = write_fragments(store, embeddings(good, partition))
    return Finished(partition, tuple(fragments), failures(bad, partition))


def ids(table: pa.Table) -> list[str]:
    return sorted(table["source_id"].to_pylist())


def attempts(store: Path) -> dict[str, int]:
    rows = lance.dataset(str(store / "failures.lance")).to_table().to_pylist()
    return {row["source_id"]: row["attempts"] for row in rows}


def test_fragments_are_seen_only_once_committed(store: Path, lease: Lease) -> None:
    result = finished(store, "p", ["a", "b"], ["c"])
    assert not len(keys(store).embedded)
    assert commit(store, [result], lease) == ["p"]
    assert ids(keys(store).embedded) == ["a", "b"]
    assert ids(keys(store).failed) == ["c"]


def test_one_result_committed_twice_is_there_once(store: Path, lease: Lease) -> None:
    result = finished(store, "p", ["a", "b"], ["c"])
    commit(store, [result, result], lease)
    assert commit(store, [result], lease) == []
    assert append_fragments(store, {"p": result.fragments}, lease) == []
    assert ids(keys(store).embedded) == ["a", "b"]
    assert attempts(store) == {"c": 1}


def test_of_two_results_of_one_partition_the_first_wins(store: Path, lease: Lease) -> None:
    commit(store, [finished(store, "p", ["a"]), finished(store, "p", ["a"])], lease)
    assert ids(keys(store).embedded) == ["a"]


def test_killed_between_the_two_tables_and_run_again(
    store: Path, lease: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(committing, "_append", killed)
        with pytest.raises(KeyboardInterrupt):
            commit(store, [finished(store, "p", ["a"], ["b"])], lease)
    assert (ids(keys(store).embedded), ids(keys(store).failed)) == ([], ["b"])
    commit(store, [finished(store, "p2", ["a"])], lease)
    assert (ids(keys(store).embedded), ids(keys(store).failed)) == (["a"], ["b"])


def test_the_second_committer_is_told_who_holds_the_store(store: Path, lease: Lease) -> None:
    with pytest.raises(StoreBusy, match=rf"process {os.getpid()} on .* wait for it"), Lease(store):
        pass


def test_a_holder_that_wakes_late_cannot_commit(store: Path) -> None:
    with Lease(store, seconds=0.3) as late:
        prepare(store, SCHEMA, late)
        result = finished(store, "p", ["a"], ["b"])
        late._stop.set()  # its thread sleeps with it
        time.sleep(0.4)
        with Lease(store) as other:
            with pytest.raises(StoreBusy, match="lost its lease"):
                commit(store, [result], late)
            assert (len(keys(store).embedded), len(keys(store).failed)) == (0, 0)
            commit(store, [finished(store, "q", ["a"])], other)
        with pytest.raises(StoreBusy, match="lease file was removed"):
            commit(store, [result], late)
    assert ids(keys(store).embedded) == ["a"]


def test_leaving_late_leaves_the_new_holder_its_lease(store: Path) -> None:
    late = Lease(store, seconds=0.2)
    with late:
        late._stop.set()
        time.sleep(0.3)
        other = Lease(store).__enter__()
    with other.fence():
        pass
    other.__exit__(None, None, None)
    assert not other.path.exists()


def test_a_lease_is_renewed_while_it_is_held(store: Path) -> None:
    with Lease(store, seconds=0.6) as lease:
        time.sleep(1.0)
        with pytest.raises(StoreBusy, match="is being written"), Lease(store, seconds=0.6):
            pass
        with lease.fence():
            pass


def test_a_lease_of_a_dead_process_of_this_host_is_taken_over_at_once(store: Path) -> None:
    code = (
        "import os, sys, pathlib; from galembed.store.commit import Lease; "
        "Lease(pathlib.Path(sys.argv[1])).__enter__(); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(store)], check=False)
    assert (store / "lease.json").exists()
    with Lease(store) as lease, lease.fence():
        pass


@pytest.mark.parametrize(("age", "free"), [(10, False), (100, True)])
def test_a_lease_of_another_host_is_free_once_its_heart_stopped(store: Path, age: float, free: bool) -> None:
    store.mkdir()
    file = store / "lease.json"
    file.write_text(json.dumps({"token": "t", "host": "elsewhere", "pid": 1, "since": "noon"}))
    os.utime(file, (time.time() - age, time.time() - age))
    if free:
        with Lease(store) as lease, lease.fence():
            pass
    else:
        with pytest.raises(StoreBusy, match="process 1 on elsewhere since noon"), Lease(store):
            pass


def test_a_lease_that_is_still_empty_belongs_to_somebody(store: Path) -> None:
    store.mkdir()
    (store / "lease.json").touch()
    with pytest.raises(StoreBusy, match="a job that is starting"), Lease(store):
        pass


def test_attempts_count_up_and_the_last_of_a_key_counts(store: Path, lease: Lease) -> None:
    committing.upsert_failures(store, failures(["a", "b", "a"], "p"), lease)
    committing.upsert_failures(store, failures(["b", "c"], "q"), lease)
    assert attempts(store) == {"a": 1, "b": 2, "c": 1}


def test_a_failure_is_hidden_once_embedded_and_dropped_by_tidy(store: Path, lease: Lease) -> None:
    commit(store, [finished(store, "p", ["a"], ["b", "c"])], lease)
    commit(store, [finished(store, "q", ["b"])], lease)
    assert ids(keys(store).failed) == ["c"]
    assert set(attempts(store)) == {"b", "c"}
    tidy(store, lease)
    assert set(attempts(store)) == {"c"}


def test_tidy_removes_orphans_and_nothing_else(store: Path, lease: Lease) -> None:
    commit(store, [finished(store, "p", ["a"])], lease)
    finished(store, "never", ["z"])
    assert tidy(store, lease) == 1
    assert tidy(store, lease) == 0
    assert ids(keys(store).embedded) == ["a"]


def test_many_small_fragments_become_one(store: Path, lease: Lease, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(committing, "SMALL_FRAGMENTS", 5)
    commit(store, [finished(store, f"p{number}", [f"a{number}"]) for number in range(6)], lease)
    tidy(store, lease)
    dataset = lance.dataset(str(store / "embeddings.lance"))
    assert len(dataset.get_fragments()) == 1
    assert dataset.count_rows() == 6
    assert StoreContract.from_schema(dataset.schema) == CONTRACT


def test_a_fragment_without_its_file_is_not_committed(store: Path, lease: Lease) -> None:
    result = finished(store, "p", ["a"])
    tidy(store, lease)
    with pytest.raises(ArtifactNotFound, match="are gone"):
        commit(store, [result], lease)
    assert len(keys(store).embedded) == 0


def test_a_store_of_another_backbone_is_refused(store: Path, lease: Lease) -> None:
    other = embeddings_schema(DIM, contract=StoreContract("id2", "/b", "flux", "fp32", bands={"blue": "g"}))
    with pytest.raises(ArtifactMismatch, match=r"embedding_id 'id1', this run has 'id2'.*another --store"):
        prepare(store, other, lease)


def test_other_carried_columns_are_refused(store: Path, lease: Lease) -> None:
    other = embeddings_schema(DIM, carried=[pa.field("redshift", pa.float32())], contract=CONTRACT)
    with pytest.raises(SchemaMismatch, match=r"mag_r \(float\) is only in the store; redshift .*--carry"):
        prepare(store, other, lease)


def test_a_folder_of_other_things_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ArtifactMismatch, match=r"thesis\.tex"):
        committing.store_schema(tmp_path)
    with pytest.raises(ArtifactMismatch, match="is a file"):
        committing.store_schema(tmp_path / "thesis.tex")
    assert committing.store_schema(tmp_path / "new") is None


def test_tables_can_be_opened_by_lancedb(store: Path, lease: Lease) -> None:
    import lancedb

    commit(store, [finished(store, "p", ["a"], ["b"])], lease)
    connection = lancedb.connect(store)
    assert [connection.open_table(name).count_rows() for name in ("embeddings", "failures")] == [1, 1]
