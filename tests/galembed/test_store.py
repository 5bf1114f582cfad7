import json
import os
import subprocess
import sys

import lancedb
import numpy as np
import pyarrow as pa
import pytest
from astropy import units as u
from astropy.coordinates import SkyCoord
from astropy.table import Table
from click.testing import CliRunner
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import galembed
from galembed.commands import search
from galembed.commands import status as status_command
from galembed.errors import ArtifactMismatch, ArtifactNotFound, BadRequest
from galembed.search import Hits
from galembed.sky import separation_arcsec
from galembed.store import images, open_store
from galembed.store.index import build_index
from galembed.store.lease import Lease
from tests.galembed.stores import CONTRACT, DIM, failed, make_store, rows


@pytest.fixture(scope="module")
def data():
    return rows(400, seed=1)


@pytest.fixture(scope="module")
def store(tmp_path_factory, data):
    other = rows(30, seed=2, survey="hsc", source_id=[f"legacy-{n}" if n < 2 else f"hsc-{n}" for n in range(30)])
    failures = failed([("legacy", "legacy-3"), ("legacy", "gone-1"), ("legacy", "gone-2")])
    path = tmp_path_factory.mktemp("stores") / "galaxies.lance"
    return make_store(path, data, other, failures=failures)


def nearest(data, vector, k, mask):
    """Brute force: ids of the k nearest by cosine among the rows of `mask`."""
    distance = 1 - np.asarray(data["vector"], float) @ np.asarray(vector, float)
    order = [row for row in np.argsort(distance) if mask[row]][:k]
    return [data["source_id"][row] for row in order]


def test_absent_store_says_how_to_make_one(tmp_path):
    with pytest.raises(ArtifactNotFound, match=r"does not exist; make a store with `galembed embed"):
        galembed.open(tmp_path / "none.lance")
    assert not (tmp_path / "none.lance").exists()


def test_empty_folder_is_no_store(tmp_path):
    with pytest.raises(ArtifactNotFound, match=r"holds no embeddings table; make a store"):
        open_store(tmp_path)


def test_file_is_no_store(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactNotFound, match="is a file"):
        open_store(tmp_path / "file")


def test_foreign_lancedb_is_refused(tmp_path):
    lancedb.connect(tmp_path).create_table("embeddings", pa.table({"id": [1]}))
    with pytest.raises(ArtifactMismatch, match="not a galembed store"):
        open_store(tmp_path)


def test_opened_store_describes_itself(store):
    assert (len(store), store.dim, store.contract) == (430, DIM, CONTRACT)
    assert store.columns["ra"] == "deg"
    assert store.columns["mag_r"] == "mag"
    assert store.carried == ("mag_r", "redshift", "kind")


def test_import_loads_no_lancedb():
    code = "import galembed.commands, sys; assert not {'lancedb', 'torch', 'sklearn'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_failures_hide_what_was_embedded_later(store):
    assert sorted(store.failures()["source_id"]) == ["gone-1", "gone-2"]


def test_failures_without_a_table_are_none(tmp_path):
    assert len(make_store(tmp_path / "s", rows(3)).failures()) == 0


def test_status_counts(store):
    status = store.status()
    assert (status.rows, status.failures, status.engines) == (430, {"unreadable": 2}, {"torch:abc": 430})
    assert (status.partitions, status.index, status.unindexed) == (4, "exact", 0)
    assert "430 in 4 partitions" in str(status)
    assert "blue = g" in str(status)


@pytest.mark.parametrize("ending", ["csv", "ecsv", "fits", "vot", "parquet"])
def test_failures_are_written_as_a_table_with_file_and_reason(store, tmp_path, ending):
    file = tmp_path / f"failed.{ending}"
    result = CliRunner().invoke(status_command, [str(store.path), "--failures", str(file)])
    assert f"2 failure(s) written to {file}" in result.output
    table = Table.read(file)
    assert sorted(table["source_id"]) == ["gone-1", "gone-2"]
    assert set(table["reason"]) == {"unreadable"}
    assert {"source_uri", "message", "time"} <= set(table.colnames)


def test_status_counts_each_warning(tmp_path):
    status = make_store(tmp_path / "s", rows(4, flags=["", "partial", "partial blank", ""])).status()
    assert status.flags == {"partial": 2, "blank": 1}
    assert "flagged   2 partial, 1 blank" in str(status)
    assert "flagged   none" in str(make_store(tmp_path / "t", rows(2)).status())


def test_status_tells_the_last_job(tmp_path):
    store = make_store(tmp_path / "s", rows(3))
    assert "last job  unknown" in str(store.status())
    facts = {"state": "running", "planned": 5, "embedded": 3, "failed": 1, "seconds": 300.0, "bound_by": "bound by x"}
    (tmp_path / "s" / "job.json").write_text(json.dumps(facts))
    account = "3 of 5 sources embedded, 1 failed, in 5 minutes, bound by x"
    assert f"last job  killed; the same command goes on, {account}" in str(store.status())
    with Lease(tmp_path / "s"):
        live = str(store.status())
    assert "last job  running, 3 of 5 sources embedded, 1 failed, " in live
    assert f"by process {os.getpid()} on " in live


def test_vectors_come_with_their_keys(store, data):
    keys, vectors = store.vectors("survey = 'legacy' AND mag_r < 16")
    assert vectors.dtype == np.float32
    wanted = {i: v for i, v, m in zip(data["source_id"], data["vector"], data["mag_r"], strict=True) if m < 16}
    assert set(keys["source_id"]) == set(wanted)
    for key, vector in zip(keys["source_id"], vectors, strict=True):
        np.testing.assert_array_equal(vector, wanted[key])


def test_vectors_of_no_row_keep_their_shape(store):
    keys, vectors = store.vectors("mag_r < 0")
    assert (len(keys), vectors.shape) == (0, (0, DIM))


def test_rows_follow_the_keys(store):
    keys = [("legacy", "legacy-9"), ("hsc", "legacy-1"), ("legacy", "absent"), ("legacy", "legacy-2")]
    assert store.rows(keys, ["survey", "source_id"]).to_pylist() == [
        {"survey": survey, "source_id": key} for survey, key in keys if key != "absent"
    ]


def test_similar_by_id_agrees_with_brute_force(store, data):
    hits = store.similar("legacy-7", k=20, where="survey = 'legacy'")
    mask = np.arange(400) != 7
    assert list(hits["source_id"]) == nearest(data, data["vector"][7], 20, mask)


def test_similar_with_filter_and_cone_agrees_with_brute_force(store, data):
    hits = store.similar("legacy-7", k=10, where="mag_r < 19 AND redshift > 0.1", cone=(120, 10, 60 * 3600))
    z = np.array([np.nan if value is None else value for value in data["redshift"]])
    mask = (data["mag_r"] < 19) & (z > 0.1) & (separation_arcsec(120, 10, data["ra"], data["dec"]) < 60 * 3600)
    mask[7] = False
    ours = [key for survey, key in zip(hits["survey"], hits["source_id"], strict=True) if survey == "legacy"]
    assert ours == nearest(data, data["vector"][7], 10, mask)[: len(ours)]


def test_or_in_a_filter_does_not_loosen_the_cone(store, data):
    hits = store.similar("legacy-7", k=400, where="mag_r < 19 OR mag_r >= 19", cone=(120, 10, 20 * 3600))
    assert (separation_arcsec(120, 10, hits["ra"], hits["dec"]) <= 20 * 3600).all()


def test_the_source_itself_comes_first_when_wanted(store):
    hits = store.similar("legacy-7", k=3, exclude_self=False)
    assert hits["source_id"][0] == "legacy-7"
    assert hits["similarity"][0] == pytest.approx(1, abs=1e-6)


def test_fewer_rows_than_asked(store):
    assert len(store.similar("hsc-5", k=1000, where="survey = 'hsc'")) == 29


def test_several_ids_mean_their_direction(store, data):
    hits = store.similar(["legacy-7", "legacy-8"], k=5, where="survey = 'legacy'")
    mean = (data["vector"][7] + data["vector"][8]) / 2
    mask = ~np.isin(np.arange(400), [7, 8])
    assert list(hits["source_id"]) == nearest(data, mean, 5, mask)
    assert hits.meta["query"] == ["legacy:legacy-7", "legacy:legacy-8"]


def test_hits_can_be_asked_about_again(store):
    hits = store.similar("legacy-7", k=5)
    again = store.similar(hits[:2], k=5)
    assert again.meta["query"] == [f"{row['survey']}:{row['source_id']}" for row in hits[:2]]
    assert store.similar(hits[0], k=1).meta["query"] == again.meta["query"][:1]


def test_vector_of_any_length_is_a_direction(store, data):
    hits = store.similar(3 * data["vector"][7], k=1)
    assert (hits["source_id"][0], hits.meta["query"]) == ("legacy-7", [])


def test_id_of_two_surveys_must_be_told_apart(store):
    with pytest.raises(BadRequest, match=r"2 surveys; ask for 'hsc:legacy-1' or 'legacy:legacy-1'"):
        store.similar("legacy-1")
    assert store.similar("hsc:legacy-1").meta["query"] == ["hsc:legacy-1"]


def test_quote_in_an_id_is_no_sql(tmp_path):
    store = make_store(tmp_path / "s", rows(3, source_id=["it's", "b:c", "d"]))
    assert store.similar("it's").meta["query"] == ["legacy:it's"]
    assert store.similar("b:c").meta["query"] == ["legacy:b:c"]
    with pytest.raises(BadRequest, match="no source"):
        store.similar("x' OR 'a' = 'a")


def test_integer_ids_are_taken(tmp_path):
    store = make_store(tmp_path / "s", rows(3, source_id=["588017703996096547", "2", "3"]))
    assert store.similar(588017703996096547).meta["query"] == ["legacy:588017703996096547"]


@pytest.mark.parametrize(
    ("to", "message"),
    [
        ("legacy-7777", r"no source 'legacy-7777'.*its ids look like 'legacy-"),
        ("hsc:legacy-9", "no source 'hsc:legacy-9'"),
        (np.ones(DIM + 1), r"vectors have 16 numbers, the query has shape \(17,\)"),
        (np.zeros(DIM), "no direction"),
        (np.full(DIM, np.nan), "no direction"),
        ([], "vectors have 16 numbers"),
        ({"a": 1}, "got dict"),
        (None, "got NoneType"),
        (SkyCoord([1, 2] * u.deg, [1, 2] * u.deg), "give one position"),
    ],
)
def test_unknown_query_is_refused(store, to, message):
    with pytest.raises(BadRequest, match=message):
        store.similar(to)


@pytest.mark.parametrize("k", [0, -1, 2.5, "3"])
def test_k_is_a_positive_integer(store, k):
    with pytest.raises(BadRequest, match="at least 1"):
        store.similar("legacy-7", k=k)


def test_position_finds_its_source(store, data):
    position = SkyCoord(data["ra"][9] * u.deg, (data["dec"][9] + 3 / 3600) * u.deg)
    assert store.similar(position.galactic).meta["query"] == ["legacy:legacy-9"]


def test_position_beside_a_source_tells_how_far(store, data):
    with pytest.raises(BadRequest, match=r"no source within 5 arcsec .* nearest is 40\.0 arcsec away"):
        store.similar(SkyCoord(data["ra"][9] * u.deg, (data["dec"][9] + 40 / 3600) * u.deg))


def test_hits_are_an_astropy_table_with_units(store):
    hits = store.similar("legacy-7", k=50)
    assert isinstance(hits, Hits)
    assert hits.colnames[:7] == ["similarity", "distance", "survey", "source_id", "ra", "dec", "fov"]
    assert hits.colnames[7:] == ["mag_r", "redshift", "kind"]
    assert (hits["ra"].unit, hits["fov"].unit, hits["mag_r"].unit) == (u.deg, u.arcsec, u.mag)
    assert hits["redshift"].mask.any()
    np.testing.assert_allclose(hits["similarity"], 1 - hits["distance"], atol=1e-7)
    assert (np.diff(hits["distance"]) >= 0).all()


def test_columns_choose_what_comes_back(store):
    hits = store.similar("legacy-7", k=2, columns=["engine", "vector"])
    assert hits.colnames[7:] == ["engine", "vector"]
    assert hits["vector"].shape == (2, DIM)
    with pytest.raises(BadRequest, match=r"no column 'mag_z'; did you mean mag_r"):
        store.similar("legacy-7", columns=["mag_z"])


@pytest.mark.parametrize("suffix", ["fits", "ecsv", "csv", "vot", "parquet"])
def test_hits_are_written_by_astropy(store, tmp_path, suffix):
    from galembed.catalogue_files import read_table
    from galembed.tables import write_table

    hits = store.similar("legacy-7", k=8, where="mag_r < 20", cone=(1, 2, 600000))
    write_table(hits, tmp_path / f"hits.{suffix}")
    back = read_table(tmp_path / f"hits.{suffix}")
    assert [str(key) for key in back["source_id"]] == list(hits["source_id"])
    np.testing.assert_array_equal(back["ra"], hits["ra"].value)
    np.testing.assert_array_equal(np.asarray(back["similarity"], np.float32), hits["similarity"])


def test_nothing_found_is_an_empty_table(store):
    hits = store.similar("legacy-7", where="mag_r < 0")
    assert (len(hits), hits["ra"].unit) == (0, u.deg)


@pytest.fixture(scope="module")
def sky(tmp_path_factory):
    """Sources crowded at the poles and across RA 0, and a few without a position."""
    rng = np.random.default_rng(5)
    ra = np.concatenate([rng.uniform(0, 360, 200), rng.uniform(-1, 1, 100) % 360, [np.nan] * 5])
    dec = np.concatenate([90 - rng.exponential(1, 100), rng.exponential(1, 100) - 90, rng.uniform(-1, 1, 100)])
    data = rows(305, seed=6, ra=ra, dec=np.concatenate([dec, [np.nan] * 5]))
    return data, make_store(tmp_path_factory.mktemp("sky") / "s", data)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ra=st.one_of(st.floats(-2, 2), st.floats(0, 360)),
    dec=st.one_of(st.floats(-90, -88), st.floats(88, 90), st.floats(-1.5, 1.5)),
    log_radius=st.floats(0, 5.81),
    k=st.integers(1, 40),
)
@example(ra=0.0, dec=90.0, log_radius=3.5, k=40)
@example(ra=360.0, dec=-90.0, log_radius=3.5, k=40)
@example(ra=0.0, dec=0.0, log_radius=3.5, k=40)
def test_cone_finds_what_brute_force_finds(sky, ra, dec, log_radius, k):
    data, store = sky
    inside = separation_arcsec(ra, dec, data["ra"], data["dec"]) <= 10**log_radius
    hits = store.similar(data["vector"][0], k=k, cone=(ra, dec, 10**log_radius))
    assert list(hits["source_id"]) == nearest(data, data["vector"][0], k, inside)


def test_cone_of_no_radius_holds_its_source(sky):
    data, store = sky
    hits = store.similar(data["vector"][1], cone=(data["ra"][9], data["dec"][9], 0))
    assert list(hits["source_id"]) == ["legacy-9"]


def test_whole_sky_cone_leaves_out_sources_without_position(sky):
    data, store = sky
    assert len(store.similar(data["vector"][1], k=400, cone=(0, 0, 648000))) == 300
    assert len(store.similar(data["vector"][1], k=400)) == 305


@pytest.mark.parametrize("cone", [(1, 2), (1, 91, 5), (1, 2, -3), (np.nan, 2, 3), ("a", 2, 3), 7])
def test_impossible_cone_is_refused(store, cone):
    with pytest.raises(BadRequest, match="a cone"):
        store.similar("legacy-7", cone=cone)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ra=st.one_of(st.floats(-2, 2), st.floats(0, 360)),
    width=st.one_of(st.floats(0, 3), st.floats(0, 360)),
    dec=st.one_of(st.floats(-90, -88), st.floats(88, 90), st.floats(-1.5, 1.5)),
    height=st.one_of(st.floats(0, 1), st.floats(0, 180)),
)
@example(ra=0.0, width=360.0, dec=-90.0, height=180.0)
@example(ra=359.5, width=1.0, dec=-1.0, height=2.0)
@example(ra=10.0, width=355.0, dec=89.0, height=1.0)
def test_box_finds_what_brute_force_finds(sky, ra, width, dec, height):
    data, store = sky
    top = min(dec + height, 90.0)
    first, last = ra % 360, (ra + width) % 360
    east = (data["ra"] >= first) & (data["ra"] <= last)
    if first > last:
        east = (data["ra"] >= first) | (data["ra"] <= last)
    inside = (east if width < 360 else np.isfinite(data["ra"])) & (data["dec"] >= dec) & (data["dec"] <= top)
    hits = store.similar(data["vector"][0], k=305, box=(ra, ra + width, dec, top))
    assert list(hits["source_id"]) == nearest(data, data["vector"][0], 305, inside)


def test_box_across_ra_0_may_be_written_either_way(sky):
    data, store = sky
    one, other = (store.similar(data["vector"][0], k=305, box=box) for box in ((359, 1, -2, 2), (-1, 1, -2, 2)))
    assert len(one) == 100
    assert list(one["source_id"]) == list(other["source_id"])


def test_box_takes_right_ascensions_beyond_0_and_360(tmp_path):
    store = make_store(tmp_path / "s", rows(4, ra=[-1.0, 359.0, 2.0, 360.0], dec=[0.0] * 4))
    found = store.similar("legacy-2", box=(358, 1, -1, 1))
    assert sorted(found["source_id"]) == ["legacy-0", "legacy-1", "legacy-3"]


@pytest.mark.parametrize("box", [(1, 2, 3), (1, 2, 4, 3), (1, 2, -91, 3), (np.inf, 2, 3, 4), ("a", 2, 3, 4), 7])
def test_impossible_box_is_refused(store, box):
    with pytest.raises(BadRequest, match="a box"):
        store.similar("legacy-7", box=box)


def test_unlike_searches_along_the_difference(store, data):
    hits = store.similar("legacy-7", k=20, unlike=["legacy-8", "legacy-9"], where="survey = 'legacy'")
    away = data["vector"][8] + data["vector"][9]
    wanted = data["vector"][7] - away / np.linalg.norm(away)
    mask = ~np.isin(np.arange(400), [7, 8, 9])
    assert list(hits["source_id"]) == nearest(data, wanted, 20, mask)
    assert hits.meta["unlike"] == ["legacy:legacy-8", "legacy:legacy-9"]
    assert hits["similarity"][0] == pytest.approx(
        data["vector"][data["source_id"].index(hits["source_id"][0])] @ wanted / np.linalg.norm(wanted), abs=1e-6
    )


def test_unlike_itself_is_refused(store):
    with pytest.raises(BadRequest, match="same direction"):
        store.similar("legacy-7", unlike="legacy-7")


def test_excluded_sources_make_room_for_others(store):
    hits = store.similar("legacy-7", k=6)
    again = store.similar("legacy-7", k=4, exclude=hits[:2])
    assert list(again["source_id"]) == list(hits["source_id"][2:])


@pytest.fixture(scope="module")
def twice(tmp_path_factory):
    """The same sky in two surveys, 0.5 arcsec apart; the last source has no position."""
    ours = rows(40, seed=8)
    ours["ra"][-1] = ours["dec"][-1] = np.nan
    theirs = rows(40, seed=8, survey="hsc") | {"ra": ours["ra"], "dec": ours["dec"] - 0.5 / 3600}
    return make_store(tmp_path_factory.mktemp("twice") / "s", ours, theirs)


def test_sources_at_the_same_place_are_left_out(twice):
    ids = [f"legacy-{n}" for n in range(3)]
    assert "hsc-0" in twice.similar(ids, k=80)["source_id"]
    hits = twice.similar(ids, k=80, exclude_within=1)
    assert not {"hsc-0", "hsc-1", "hsc-2"} & set(hits["source_id"])
    assert len(hits) == 74
    assert len(twice.similar(ids, k=80, exclude_within=0.1)) == 77


def test_source_without_position_has_nothing_near_it(twice):
    assert len(twice.similar("legacy-39", k=80, exclude_within=1)) == 79


def test_vector_has_no_place_to_keep_away_from(twice):
    with pytest.raises(BadRequest, match="exclude_within needs sources"):
        twice.similar(np.ones(DIM), exclude_within=1)


def test_command_takes_what_similar_takes(twice):
    words = ["--id", "legacy-0", "--unlike", "legacy-5", "--box", "0", "360", "-90", "90", "--exclude-within", "1"]
    result = CliRunner().invoke(search, [twice.path, *words, "-k", "80"])
    assert result.exit_code == 0, result.output
    assert "hsc-5" in result.output
    assert "hsc-0 " not in result.output
    rows_shown = len(result.output.splitlines()) - 3
    assert rows_shown == 80 - 5  # the query, the same place in hsc, legacy-5, and two without a position


def test_path_is_an_image_and_text_is_an_id(store, data, tmp_path, monkeypatch):
    with pytest.raises(ArtifactNotFound, match="/nowhere/backbone"):
        store.similar(tmp_path / "x.png")
    with pytest.raises(BadRequest, match="no source"):
        store.similar(str(tmp_path / "x.png"))
    monkeypatch.setattr(images, "embed_image", lambda asked, file: data["vector"][7])
    assert store.similar(tmp_path / "x.png", k=1)["source_id"][0] == "legacy-7"


def test_many_queries_find_what_single_ones_find(store):
    ids = [f"legacy-{n}" for n in (5, 9, 5, 300)]
    asked = {"k": 7, "where": "mag_r < 20", "box": (0, 300, -80, 80)}
    hits = store.similar_to_each(ids, **asked)
    assert hits.colnames[:3] == ["query", "similarity", "distance"]
    assert hits.meta["query"] == [f"legacy:{name}" for name in ids]
    for number, name in enumerate(ids):
        mine = hits[hits["query"] == number]
        single = store.similar(name, **asked)
        assert list(mine["source_id"]) == list(single["source_id"])
        np.testing.assert_allclose(mine["distance"], single["distance"], atol=1e-6)
        np.testing.assert_array_equal(mine["mag_r"], single["mag_r"])


def test_many_vectors_and_rows_find_what_single_ones_find(store, data):
    vectors = 3 * data["vector"][:300]
    hits = store.similar_to_each(vectors, k=3)
    assert list(hits["query"]) == list(np.repeat(np.arange(300), 3))
    assert [hits["source_id"][3 * n] for n in range(300)] == data["source_id"][:300]
    again = store.similar_to_each(hits[:2], k=3)
    assert list(again["source_id"][:3]) == list(store.similar(hits[0], k=3)["source_id"])


def test_many_queries_use_the_index(tmp_path):
    store = make_store(tmp_path / "s", rows(700))
    build_index(store, "hnsw")
    ids = [f"legacy-{n}" for n in range(257)]  # LanceDB is asked in batches of 256, and answers one otherwise
    hits = store.similar_to_each(ids, k=4, where="mag_r < 19")
    assert len(hits) == 4 * 257
    for number in (0, 255, 256):
        mine = hits["source_id"][hits["query"] == number]
        assert list(mine) == list(store.similar(ids[number], k=4, where="mag_r < 19")["source_id"])


def test_many_queries_with_fewer_rows_than_asked(store):
    assert len(store.similar_to_each(["hsc-5", "hsc-6"], k=1000, where="survey = 'hsc'")) == 58
    assert len(store.similar_to_each(["hsc-5", "hsc-6"], where="mag_r < 0")) == 0


@pytest.mark.parametrize(
    ("to", "message"),
    [
        (np.ones(DIM), r"shape \(n, 16\)"),
        (np.ones((2, DIM + 1)), "vectors have 16 numbers"),
        (np.zeros((0, DIM)), "n >= 1"),
        (["legacy-7777"], "no source 'legacy-7777'"),
        ("legacy-7", "got str"),
    ],
)
def test_unfit_queries_are_refused(store, to, message):
    with pytest.raises(BadRequest, match=message):
        store.similar_to_each(to)


def test_an_index_gives_as_many_hits_as_are_asked_for(tmp_path):
    store = make_store(tmp_path / "s", rows(600))
    build_index(store, "hnsw")
    assert len(open_store(tmp_path / "s").similar("legacy-0", k=500)) == 500
