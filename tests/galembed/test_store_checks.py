"""Proof that a store keeps its promise: what must not be is planted, and found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pytest

from galembed.errors import ArtifactNotFound
from galembed.store import checks
from galembed.store.checks import verify
from galembed.store.commit import commit, prepare, tidy, upsert_failures
from galembed.store.keys import open_table
from galembed.store.lease import Lease
from galembed.store.places import file_system
from tests.galembed.commits import DIM, SCHEMA, Place, embeddings, failures, finished


@pytest.fixture(params=["directory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "s3":
        return f"{request.getfixturevalue('bucket')}/galaxies.lance"
    return tmp_path / "galaxies.lance"


@pytest.fixture
def lease(store: Place) -> Iterator[Lease]:
    """Lease of a store with three rows in two files, and a failure."""
    with Lease(store) as lease:
        prepare(store, SCHEMA, lease)
        commit(store, [finished(store, "p", ["a", "b"], ["f"]), finished(store, "q", ["c"])], lease)
        yield lease


def data_files(store: Place) -> list[str]:
    root = file_system(store)[1]
    return [
        f"{root}/embeddings.lance/data/{file.path}"
        for fragment in open_table(store, "embeddings").get_fragments()
        for file in fragment.data_files()
    ]


def test_a_store_as_a_job_leaves_it_is_sound(store: Place, lease: Lease) -> None:
    found = verify(store)
    assert found.ok
    assert (found.rows, found.failures) == (3, 1)
    assert "each source is there once" in str(found)


def test_sources_with_several_rows_are_counted_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Lease(tmp_path) as lease:
        prepare(tmp_path, SCHEMA, lease)
        for part, names in {"p": ["a", "b"], "q": ["b", "c"], "r": ["b", "d"], "s": ["d"]}.items():
            lance.write_dataset(embeddings(names, part), tmp_path / "embeddings.lance", mode="append")
        # Keys that share a hash are told apart.
        monkeypatch.setattr(checks, "key_hashes", lambda key: np.zeros(len(key), np.int64))
        found = verify(tmp_path)
        assert (found.repeated, found.rows, found.ok) == (2, 7, False)
        assert found.examples == ("x:b", "x:d")
        assert "2 source(s) with more than one row" in str(found)
        tidy(tmp_path, lease)
        assert verify(tmp_path).ok


def test_a_hidden_failure_is_no_contradiction(store: Place, lease: Lease) -> None:
    upsert_failures(store, failures(["a"], "an earlier one"), lease)
    found = verify(store)
    assert (found.ok, found.hidden, found.failures) == (True, 1, 1)
    assert "1 failure(s) of sources that have a row, hidden" in str(found)


def test_a_partition_that_embedded_and_failed_a_source_is_a_contradiction(store: Place, lease: Lease) -> None:
    upsert_failures(store, failures(["a", "b"], "p"), lease)
    found = verify(store)
    assert (found.ok, found.contradictory, found.hidden) == (False, 2, 0)
    assert "2 source(s) that one partition both embedded and failed" in str(found)


def test_a_file_that_is_gone_is_named_and_the_rest_is_read(store: Place, lease: Lease) -> None:
    system = file_system(store)[0]
    gone = data_files(store)[0]
    system.rm(gone)
    found = verify(store)
    assert found.missing == (f"embeddings.lance/data/{gone.rpartition('/')[2]}",)
    assert (found.ok, found.rows) == (False, 1)
    assert "1 file(s) are gone" in str(found)


def test_a_damaged_file_is_named_and_the_rest_is_read(store: Place, lease: Lease) -> None:
    system = file_system(store)[0]
    file = data_files(store)[0]
    system.pipe_file(file, system.cat_file(file)[:-100])
    found = verify(store)
    assert len(found.damaged) == 1
    assert found.damaged[0].startswith(file.rpartition("/")[2])
    assert (found.ok, found.rows) == (False, 1)
    assert "1 file(s) cannot be read" in str(found)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, 0.51])
def test_a_vector_that_is_not_of_length_one_is_found(tmp_path: Path, value: float) -> None:
    table = embeddings(["a", "b", "c"], "p")
    vectors = np.full((3, DIM), 0.5, np.float32)
    vectors[1, 2] = value
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), DIM)
    table = table.set_column(table.column_names.index("vector"), SCHEMA.field("vector"), column)
    with Lease(tmp_path) as lease:
        prepare(tmp_path, SCHEMA, lease)
    lance.write_dataset(table, tmp_path / "embeddings.lance", mode="append")
    found = verify(tmp_path)
    assert (found.bad_vectors, found.ok, found.examples) == (1, False, ("x:b",))
    assert "1 vector(s) are not finite, or not of length one" in str(found)


def test_where_there_is_no_store_nothing_is_verified(tmp_path: Path) -> None:
    with pytest.raises(ArtifactNotFound, match=r"no store at .*make one with"):
        verify(tmp_path)
