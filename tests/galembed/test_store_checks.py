"""Proof that a store keeps its promise: what must not be is planted, and found."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pytest

from galembed.backbones import Backbone
from galembed.errors import ArtifactNotFound
from galembed.store import checks
from galembed.store.checks import StoreCheck, verify
from galembed.store.commit import commit, prepare, tidy, upsert_failures
from galembed.store.index import build_index
from galembed.store.keys import open_table
from galembed.store.lease import Lease
from galembed.store.places import file_system
from galembed.thumbnails import jpeg
from tests.galembed import stores
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


def planted(place: Path, **columns: object) -> StoreCheck:
    """Check a store of 300 rows in which columns are not what they should be."""
    contract = replace(stores.CONTRACT, backbone=str(place / "nowhere"))
    table = stores.arrow(stores.rows(300), contract)
    for name, values in columns.items():
        column = pa.array(values, table.schema.field(name).type)
        table = table.set_column(table.column_names.index(name), table.schema.field(name), column)
    lance.write_dataset(table, place / "embeddings.lance")
    return verify(place)


def test_a_cell_that_is_not_that_of_the_position_is_found(tmp_path: Path) -> None:
    cells = stores.arrow(stores.rows(300)).column("_healpix_29").to_pylist()
    found = planted(tmp_path, _healpix_29=[cells[0] + 1, None, *cells[2:]])
    assert (found.misplaced, found.ok, found.examples) == (2, False, ("legacy:legacy-0", "legacy:legacy-1"))
    assert "2 row(s) have a _healpix_29" in str(found)


def test_a_row_of_another_door_is_found(tmp_path: Path) -> None:
    found = planted(tmp_path, input_kind=["flux"] * 299 + ["display"])
    assert (found.strangers, found.ok, found.examples) == (1, False, ("legacy:legacy-299",))
    assert "another door" in str(found)


def test_a_thumbnail_that_is_cut_off_is_found(tmp_path: Path) -> None:
    whole = jpeg(np.zeros((8, 8, 3), np.uint8))
    contract = replace(stores.CONTRACT, backbone=str(tmp_path / "nowhere"), thumbnails=8)
    data = stores.rows(300, thumbnail=[whole[:-1], None, b"", *[whole] * 297])
    lance.write_dataset(stores.arrow(data, contract), tmp_path / "embeddings.lance")
    found = verify(tmp_path)
    assert (found.bad_thumbnails, found.ok, found.examples) == (2, False, ("legacy:legacy-0", "legacy:legacy-2"))
    assert "2 thumbnail(s) are no whole JPEG" in str(found)


@pytest.mark.parametrize("column", ["source_id", "_healpix_29", "vector"])
def test_an_index_of_other_rows_is_found(tmp_path: Path, column: str) -> None:
    opened = stores.make_store(tmp_path / "s.lance", stores.rows(300), failures=stores.failed([]))
    build_index(opened, "hnsw")
    assert verify(tmp_path / "s.lance").ok
    exchange_rows_under_the_indexes(tmp_path / "s.lance")
    found = verify(tmp_path / "s.lance")
    assert not found.ok
    assert any(text.startswith(f"{column}_idx finds") for text in found.indexes)
    assert "make it again with `galembed index" in str(found)


def exchange_rows_under_the_indexes(place: Path) -> None:
    """Put other rows into the one data file, as no commit does: the indexes know nothing of it."""
    other = stores.rows(300, survey="galaxy")  # as long as the name of the rows that are there
    other |= {"vector": -np.asarray(other["vector"]), "ra": (np.asarray(other["ra"]) + 180) % 360}
    lance.write_dataset(stores.arrow(other), place / "other.lance")
    (mine,) = (place / "embeddings.lance" / "data").glob("*.lance")
    (theirs,) = (place / "other.lance" / "data").glob("*.lance")
    mine.write_bytes(theirs.read_bytes())


def test_a_backbone_that_is_another_now_is_named(tiny_backbone: Backbone, tmp_path: Path) -> None:
    contract = replace(stores.CONTRACT, backbone=str(tiny_backbone.path))
    stores.make_store(tmp_path / "other.lance", stores.rows(20), contract=contract)
    found = verify(tmp_path / "other.lance")
    assert not found.ok
    assert "is another backbone now" in str(found)
    same = replace(contract, embedding_id=tiny_backbone.embedding_id)
    stores.make_store(tmp_path / "same.lance", stores.rows(20), contract=same)
    assert verify(tmp_path / "same.lance").ok
    copy = shutil.copytree(tiny_backbone.path, tmp_path / "copy")
    text = (copy / "backbone.json").read_text().replace(tiny_backbone.embedding_id, "0" * 64)
    (copy / "backbone.json").write_text(text)
    stores.make_store(tmp_path / "c.lance", stores.rows(20), contract=replace(contract, backbone=str(copy)))
    assert "cannot be trusted" in str(verify(tmp_path / "c.lance"))


def test_where_there_is_no_store_nothing_is_verified(tmp_path: Path) -> None:
    with pytest.raises(ArtifactNotFound, match=r"no store at .*make one with"):
        verify(tmp_path)
