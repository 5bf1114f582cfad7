import json

import lance
import lancedb
import numpy as np
import pytest
import s3fs
from click.testing import CliRunner

from galembed.commands import index
from galembed.errors import BadRequest
from galembed.store import EMBEDDINGS_TABLE, open_store
from galembed.store import index as index_module
from galembed.store.checks import verify
from galembed.store.index import build_index
from galembed.store.nearest import IndexSearch, indexed_rows, nearest_rows, scan_is_faster
from tests.galembed.stores import DIM, arrow, make_store, rows


def append(path, data):
    lancedb.connect(path).open_table(EMBEDDINGS_TABLE).add(arrow(data))


def recall_at_10(store, ids, **asked):
    """Share of the exact 10 nearest that an indexed search finds, by ids."""
    found, exact = (
        [set(store.similar(name, **asked, exact=way)["source_id"]) for name in ids] for way in (False, True)
    )
    return np.mean([len(a & b) / len(b) for a, b in zip(found, exact, strict=True)])


@pytest.mark.parametrize("kind", ["hnsw", "rq"])
def test_what_was_measured_is_what_searches_find(tmp_path, kind):
    make_store(tmp_path / "s", rows(3000))
    report = build_index(open_store(tmp_path / "s"), kind, recall=0.9)
    assert report.search.met
    assert report.search.recall >= 0.9
    assert report.search.recall_filtered >= 0.9
    assert report.search.passing == pytest.approx(0.1, abs=0.06)
    store = open_store(tmp_path / "s")
    ids = [f"legacy-{n}" for n in range(0, 3000, 60)]
    assert recall_at_10(store, ids) == pytest.approx(report.search.recall, abs=0.08)


@pytest.mark.parametrize("late", [2, 4])
def test_an_index_that_a_merge_came_before_is_built_again(tmp_path, monkeypatch, late):
    """LanceDB refuses it at its commit; the third and the fifth look at the newest rows are the second tries."""
    make_store(tmp_path / "s", rows(600))
    append(tmp_path / "s", rows(600, survey="galaxy"))
    store = open_store(tmp_path / "s")
    newest, looks = store.table.checkout_latest, []

    def newest_then_merged():
        newest()
        looks.append(None)
        if len(looks) == late:
            lance.dataset(f"{tmp_path}/s/{EMBEDDINGS_TABLE}.lance").optimize.compact_files()

    monkeypatch.setattr(store.table, "checkout_latest", newest_then_merged)
    report = build_index(store, "rq")
    assert (report.rows, report.kind) == (1200, "rq")
    assert verify(tmp_path / "s").indexes == ()
    assert len(looks) == 7


def test_higher_recall_is_searched_for_more_thoroughly(tmp_path):
    store = make_store(tmp_path / "s", rows(3000))
    low, high = (build_index(store, "hnsw", recall=recall).search for recall in (0.3, 1.0))
    assert low.refine < high.refine
    assert low.recall < high.recall


def test_recall_out_of_reach_is_said(tmp_path, monkeypatch):
    store = make_store(tmp_path / "s", rows(3000))
    ways = list(index_module._ways("rq", 3000))
    monkeypatch.setattr(index_module, "_ways", lambda kind, rows: [index_module.replace(ways[0], refine=1)])
    report = build_index(store, "rq", recall=1.0)
    assert not report.search.met
    assert "short of 1; `galembed search --exact` misses nothing" in str(report)


def test_settings_are_kept_beside_the_tables_and_used(tmp_path):
    store = make_store(tmp_path / "s", rows(600))
    report = build_index(store, "hnsw", recall=0.9)
    kept = json.loads((tmp_path / "s" / "search.json").read_text())
    assert kept["index"] == "IvfHnswSq"
    assert open_store(tmp_path / "s").index_search("IvfHnswSq") == report.search == store.status().index_search
    assert f"recall@10 {report.search.recall:.3f}" in str(store.status())
    assert open_store(tmp_path / "s").index_search("IvfRq").queries == 0  # measured on another kind of index


def test_few_new_rows_are_folded_in(tmp_path):
    build_index(make_store(tmp_path / "s", rows(2000)), "hnsw")
    append(tmp_path / "s", rows(200, seed=4, survey="hsc"))
    store = open_store(tmp_path / "s")
    assert store.status().unindexed == 200
    assert "200 rows not in it" in str(store.status())
    report = build_index(store, "hnsw")
    assert (report.folded, report.rows, store.status().unindexed) == (200, 2200, 0)
    assert "kept, 200 new rows folded in" in str(report)
    assert report.search.rows == 2200
    fresh = open_store(tmp_path / "s")
    assert recall_at_10(fresh, [f"hsc-{n}" for n in range(50)]) > 0.9
    assert fresh.similar("hsc-3", k=1, exclude_self=False, where="source_id = 'hsc-3'")["source_id"][0] == "hsc-3"


def test_many_new_rows_build_it_anew(tmp_path):
    build_index(make_store(tmp_path / "s", rows(600)), "hnsw")
    append(tmp_path / "s", rows(600, seed=4, survey="hsc"))
    store = open_store(tmp_path / "s")
    report = build_index(store, "hnsw")
    assert (report.folded, store.status().unindexed) == (None, 0)
    assert "IVF_HNSW_SQ built" in str(report)


def test_another_kind_is_built_anew(tmp_path):
    store = make_store(tmp_path / "s", rows(600))
    build_index(store, "hnsw")
    assert build_index(store, "rq").folded is None
    assert store.status().index == "IvfRq"


def test_kind_follows_from_the_size(tmp_path, monkeypatch):
    store = make_store(tmp_path / "s", rows(600))
    assert build_index(store).kind == "exact"
    monkeypatch.setattr(index_module, "EXACT_BELOW", 600 * DIM)
    assert build_index(store).kind == "rq"


def test_named_columns_are_indexed_and_stay_so(tmp_path):
    store = make_store(tmp_path / "s", rows(600))
    assert build_index(store, columns=["mag_r", "kind"]).scalar == ("_healpix_29", "source_id", "mag_r", "kind")
    where = "mag_r < 16 AND kind = 'spiral'"
    count = store.table.count_rows(where)
    assert count == len(store.vectors(where)[1]) > 0
    assert "ScalarIndexQuery" in store.dataset.scanner(["mag_r"], filter="mag_r < 16").explain_plan()
    assert set(build_index(store, "rq").scalar) == {"_healpix_29", "source_id", "mag_r", "kind"}


def test_column_without_order_is_not_indexed(tmp_path):
    store = make_store(tmp_path / "s", rows(600))
    with pytest.raises(BadRequest, match="no column 'mag_g'"):
        build_index(store, columns=["mag_g"])
    with pytest.raises(BadRequest, match=r"column vector cannot be indexed: .*; name columns of numbers or text"):
        build_index(store, columns=["vector"])


def test_fewer_hits_are_looked_for_as_thoroughly_as_was_measured():
    way = IndexSearch("IvfRq", nprobes=4, ef=128, refine=3)
    assert way.candidates(1) == way.candidates(11) == 33
    assert way.candidates(100) == 300


def test_sources_without_position_are_measured_without_a_filter(tmp_path):
    nowhere = np.full(600, np.nan)
    search = build_index(make_store(tmp_path / "s", rows(600, ra=nowhere, dec=nowhere)), "hnsw").search
    assert search.recall_filtered is None
    assert "among" not in str(search)


@pytest.mark.parametrize("recall", [0, -1, 1.1, np.nan])
def test_recall_is_a_share(tmp_path, recall):
    with pytest.raises(BadRequest, match="recall is the share"):
        build_index(make_store(tmp_path / "s", rows(3)), recall=recall)


def test_command_says_what_was_measured(tmp_path):
    make_store(tmp_path / "s", rows(600))
    result = CliRunner().invoke(index, [str(tmp_path / "s"), "--kind", "hnsw", "--recall", "0.8"])
    assert result.exit_code == 0, result.output
    assert "recall@10" in result.output


def test_empty_store_is_searched_exactly(tmp_path):
    assert build_index(make_store(tmp_path / "s", rows(0))).kind == "exact"
    with pytest.raises(BadRequest, match="use the kind exact"):
        build_index(open_store(tmp_path / "s"), "hnsw")


def test_store_on_object_storage_keeps_what_was_measured(bucket):
    place = f"{bucket}/s"
    report = build_index(make_store(place, rows(300)), "hnsw", recall=0.5)
    assert report.search.met
    assert s3fs.S3FileSystem().exists(f"{place}/search.json")
    store = open_store(place)
    assert store.index_search("IvfHnswSq") == report.search
    assert list(store.similar("legacy-1", k=1, exclude_self=False)["source_id"]) == ["legacy-1"]


@pytest.mark.parametrize("kind", ["hnsw", "rq"])
def test_many_hits_are_as_many_as_asked_for(tmp_path, kind):
    store = make_store(tmp_path / "s", rows(4000))
    build_index(store, kind, recall=0.5)
    for k in (200, 2000):
        found, exact = (store.similar("legacy-5", k, exact=way)["source_id"] for way in (False, True))
        assert len(found) == k
        assert len(set(found) & set(exact)) > 0.9 * k


def test_rows_far_from_what_the_index_looks_into_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "_partitions", lambda kind, rows: 8)
    store = make_store(tmp_path / "s", rows(3000))
    build_index(store, "rq", recall=0.1)
    way = IndexSearch("IvfRq", nprobes=1, ef=128, refine=10)
    smooth = store.vectors("kind = 'smooth'")[1][:5]
    asked = (store.dataset, smooth, 10, "kind = 'spiral'", way)
    found, distance = indexed_rows(*asked)
    exact, true = nearest_rows(store.dataset, smooth, 10, "kind = 'spiral'")
    assert np.array_equal(found, exact)
    assert np.allclose(distance, true, atol=1e-6)


def test_few_rows_are_scanned_and_many_are_not():
    way = IndexSearch("IvfHnswSq", nprobes=1, ef=32, refine=1)
    assert scan_is_faster(100, 1_000_000, 1, 10, way)
    assert scan_is_faster(10_000, 1_000_000, 200, 10, way)
    assert scan_is_faster(120_000, 120_000, 1, 100_000, way)
    assert not scan_is_faster(100_000, 1_000_000, 1, 10, way)
    assert not scan_is_faster(1_000_000, 1_000_000, 200, 10, way)
    assert not scan_is_faster(1_000_000, 1_000_000, 1, 10_000, way)


def test_hits_are_found_wherever_as_many_pass(tmp_path):
    store = make_store(tmp_path / "s", rows(4000))
    build_index(store, "rq", recall=0.5)
    where = "mag_r < 14.05"
    passing = store.table.count_rows(where)
    assert 10 < passing < 100
    for k, hits in ((10, 10), (passing - 1, passing - 1), (150, passing)):
        assert len(store.similar(store.vectors()[1][0], k, where=where, exclude_self=False)) == hits
