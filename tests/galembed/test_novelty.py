import numpy as np
import pytest
from astropy.table import Table
from click.testing import CliRunner
from scipy.spatial.distance import cdist
from sklearn.ensemble import IsolationForest

from galembed import novelty, sources
from galembed.cli import main
from galembed.cutouts import Cutout
from galembed.errors import BadRequest, UnreadableInput
from galembed.novelty import novel
from galembed.scans import draw_sample, row_filter, scan, take
from galembed.store.index import build_index
from tests.galembed.stores import DIM, make_store, rows

ODD = (7, 77, 177)


def with_outliers(count=300, **columns):
    """Three clusters and three sources that lie away from them and from one another; the second one is flagged."""
    data = rows(count, seed=5)
    centres = np.random.default_rng(99).normal(size=(3, DIM))
    away = np.linalg.svd(centres)[2][3:6]  # at right angles to the three clusters' centres
    data["vector"] = data["vector"].copy()
    data["vector"][list(ODD)] = away
    data["flags"] = ["blank" if number == ODD[1] else "" for number in range(count)]
    return data | columns


@pytest.fixture(scope="module")
def data():
    return with_outliers()


@pytest.fixture(scope="module")
def store(tmp_path_factory, data):
    return make_store(tmp_path_factory.mktemp("novel") / "s", data)


@pytest.fixture
def tiny_sample(monkeypatch):
    """Sizes that make a store of hundreds a large one."""
    monkeypatch.setattr(novelty, "SAMPLE", 64)
    monkeypatch.setattr(novelty, "_CANDIDATES", 40)
    monkeypatch.setattr(novelty, "_PRUNED", 70)
    monkeypatch.setattr(novelty, "_TYPICAL", 30)
    monkeypatch.setattr("galembed.scans.BATCH", 50)


def exact_scores(vectors, k):
    distance = cdist(vectors.astype(float), vectors.astype(float), "cosine")
    np.fill_diagonal(distance, np.inf)
    return np.sort(distance, axis=1)[:, k - 1]


@pytest.mark.parametrize("method", ["knn", "forest"])
def test_planted_outliers_come_first(store, method):
    found = novel(store, 3, method=method, k=5)
    assert set(found["source_id"]) == {f"legacy-{number}" for number in ODD}
    assert found["score"][2] > 1.1 * found.meta["typical"]
    assert found.meta["rows"] == 300


@pytest.mark.parametrize("k", [1, 10])
def test_scores_are_distances_to_the_kth_neighbour(store, data, k):
    found = novel(store, 300, k=k)
    expected = exact_scores(data["vector"], k)
    order = np.argsort(-expected)
    np.testing.assert_allclose(found["score"], expected[order], atol=2e-6)
    assert found.meta["typical"] == pytest.approx(np.median(expected), abs=2e-6)
    assert found.meta["at_most"] is None


@pytest.mark.usefixtures("tiny_sample")
@pytest.mark.parametrize("n", [3, 60])
def test_a_large_store_gives_the_same_scores_from_a_sample_and_rounds(store, data, n):
    found = novel(store, n, k=4)
    expected = np.sort(exact_scores(data["vector"], 4))[::-1]
    np.testing.assert_allclose(found["score"], expected[:n], atol=2e-6)
    assert found.meta["at_most"] is None
    assert set(found["source_id"][:3]) == {f"legacy-{number}" for number in ODD}


@pytest.mark.usefixtures("tiny_sample")
def test_a_rare_kind_that_the_sample_misses_is_not_taken_for_odd(tmp_path, data):
    vectors = data["vector"].copy()
    rare = np.arange(200, 212)
    vectors[rare] = vectors[ODD[0]]
    store = make_store(tmp_path / "s", data | {"vector": vectors})
    found = novel(store, 5, k=10)
    expected = np.sort(exact_scores(vectors, 10))[::-1][:5]
    np.testing.assert_allclose(found["score"], expected, atol=2e-6)
    assert not set(found["source_id"]) & {f"legacy-{number}" for number in rare}


@pytest.mark.usefixtures("tiny_sample")
def test_it_says_when_a_higher_score_may_be_left_out(store, data, monkeypatch):
    monkeypatch.setattr(novelty, "_WORK", 0)
    found = novel(store, 40, k=4)
    assert found.meta["at_most"] > found["score"][-1]
    assert "may not be the highest scores of all" in found.summary()
    expected = dict(zip(data["source_id"], exact_scores(data["vector"], 4), strict=True))
    np.testing.assert_allclose(found["score"], [expected[name] for name in found["source_id"]], atol=2e-6)
    left_out = [score for name, score in expected.items() if name not in set(found["source_id"])]
    assert max(left_out) <= found.meta["at_most"] + 2e-6


@pytest.mark.usefixtures("tiny_sample")
def test_a_source_falls_when_k_nearer_ones_are_seen(store, data):
    numbers = np.arange(300, dtype=np.uint64)
    expected = exact_scores(data["vector"], 4)
    cutoff = float(np.median(expected))
    places, scores, work = novelty._scores(store, numbers, 4, None, cutoff, 300, lambda *stage: None, "round 2")
    np.testing.assert_array_equal(places, np.flatnonzero(expected > cutoff))
    np.testing.assert_allclose(scores, expected[places], atol=2e-6)
    assert 150 * 300 < work < 0.9 * 300 * 300


@pytest.mark.usefixtures("tiny_sample")
def test_every_source_of_a_large_store_can_be_asked_for(store, data):
    found = novel(store, 1000, k=2)
    np.testing.assert_allclose(found["score"], np.sort(exact_scores(data["vector"], 2))[::-1], atol=2e-6)
    assert found.meta["at_most"] is None


def test_a_pair_of_twins_is_found_by_the_second_neighbour_only(tmp_path, data):
    vectors = data["vector"].copy()
    vectors[ODD[0]] = vectors[ODD[1]]
    store = make_store(tmp_path / "s", data | {"vector": vectors})
    twins = {f"legacy-{number}" for number in ODD[:2]}
    assert not twins & set(novel(store, 10, k=1)["source_id"])
    assert twins < set(novel(store, 3, k=2)["source_id"])


def test_flagged_sources_are_shown_unless_left_out(store):
    found = novel(store, 3)
    assert sorted(found["flags"]) == ["", "", "blank"]
    assert "1 of these 3 are flagged" in found.summary()
    unflagged = novel(store, 3, unflagged=True)
    assert f"legacy-{ODD[1]}" not in unflagged["source_id"]
    assert unflagged.meta["rows"] == 299


def test_filters_hold_for_the_sources_and_for_what_they_are_compared_with(store, data):
    faint = np.array(data["mag_r"]) > 20
    expected = np.sort(exact_scores(data["vector"][faint], 3))[::-1]
    found = novel(store, 1000, k=3, where="mag_r > 20")
    np.testing.assert_allclose(found["score"], expected, atol=2e-6)
    assert min(found["mag_r"].value) > 20
    cone = novel(store, 1000, k=1, cone=(10.0, 0.0, 200000.0))
    assert 0 < len(cone) < 300
    assert cone.meta["cone"] == "10.0 0.0 200000.0"


def test_neighbours_are_named_nearest_first(store):
    found = novel(store, 4, neighbours=3)
    for row in found:
        near = store.similar(f"{row['survey']}:{row['source_id']}", k=3, exact=True)
        assert [row[f"neighbour_{n}"] for n in (1, 2, 3)] == [f"legacy:{name}" for name in near["source_id"]]


def test_forest_scores_are_scikit_learns(store, data):
    found = novel(store, 300, method="forest", seed=3)
    sample = draw_sample(store, 300, seed=3)
    forest = IsolationForest(n_estimators=200, random_state=3).fit(sample.vectors)
    np.testing.assert_allclose(found["score"], np.sort(-forest.score_samples(data["vector"]))[::-1], atol=1e-6)


def test_twins_of_all_score_nothing(tmp_path):
    vectors = np.tile(rows(1)["vector"], (30, 1))
    found = novel(make_store(tmp_path / "s", rows(30, vector=vectors)), 5, k=3)
    assert np.all(found["score"] < 1e-6)
    assert np.all(found["score"] >= 0)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"method": "lof"}, "method 'lof' is unknown; choose one of knn, forest"),
        ({"n": 0}, "n must be at least 1, got 0"),
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"k": 300}, "300 source.* too few to compare each with 300 others"),
        ({"where": "mag_r < 0"}, "0 source.* pass the filters"),
        ({"where": "mag < 0"}, "no column 'mag'"),
        ({"where": "mag_r = 'x'"}, "cannot be carried out"),
        ({"cone": (0, 91, 1)}, "a cone needs"),
        ({"columns": ["mass"]}, "no column 'mass'"),
    ],
)
def test_what_does_not_fit_is_refused(store, asked, message):
    with pytest.raises(BadRequest, match=message):
        novel(store, **asked)


def test_a_sample_does_not_depend_on_the_order_of_rows(tmp_path, data):
    parts = make_store(tmp_path / "a", rows(100, seed=1), rows(50, seed=2, survey="hsc"))
    other = make_store(tmp_path / "b", rows(50, seed=2, survey="hsc"), rows(100, seed=1))
    drawn = [
        take(store, draw_sample(store, 20, seed=4).rows, ["survey", "source_id"]).to_pylist()
        for store in (parts, other)
    ]
    assert drawn[0] == drawn[1]
    assert len({tuple(key.values()) for key in drawn[0]}) == 20
    another = take(parts, draw_sample(parts, 20, seed=5).rows, ["survey", "source_id"]).to_pylist()
    assert another != drawn[0]


def test_a_sample_is_spread_over_all_batches(store, monkeypatch):
    monkeypatch.setattr("galembed.scans.BATCH", 30)
    drawn = draw_sample(store, 60, seed=0)
    assert (len(drawn.rows), drawn.total) == (60, 300)
    assert 10 < np.sum(drawn.rows < 100) < 30
    vectors = take(store, drawn.rows, ["vector"]).column("vector").to_pylist()
    np.testing.assert_array_equal(np.array(vectors, np.float32), drawn.vectors)


def test_rows_are_taken_in_the_order_asked(store):
    table = take(store, np.array([5, 3, 299, 3], np.uint64), ["source_id", "mag_r"])
    assert table.column("source_id").to_pylist() == ["legacy-5", "legacy-3", "legacy-299", "legacy-3"]
    assert table.schema.field("mag_r").metadata[b"unit"] == b"mag"
    assert take(store, np.empty(0, np.uint64), ["mag_r"]).num_rows == 0


def test_filters_are_checked_before_they_are_joined(store):
    with pytest.raises(BadRequest, match="brackets that do not match"):
        row_filter(store, "mag_r < 19) OR (mag_r > 3", unflagged=True)
    condition = row_filter(store, "mag_r < 19 OR mag_r > 19", unflagged=True)
    assert sum(batch.num_rows for batch in scan(store, ["ra"], condition)) == 299


def test_the_command_lists_writes_and_draws(store, tmp_path, monkeypatch):
    def recut(table, contract, size):
        return [
            UnreadableInput("gone") if uri == "7.fits" else Cutout(np.zeros((3, size, size), np.float32), 1.0, 20.0)
            for uri in table.column("source_uri").to_pylist()
        ]

    monkeypatch.setattr(sources, "recut", recut)
    out, plot = tmp_path / "novel.ecsv", tmp_path / "novel.png"
    arguments = ["novel", store.path, "-n", "4", "--neighbours", "1", "--out", str(out), "--plot", str(plot)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "cosine distance to neighbour 10" in result.output
    written = Table.read(out)
    assert {f"legacy-{number}" for number in ODD} < set(written["source_id"])
    assert str(written["mag_r"].unit) == "mag"
    assert "neighbour_1" in written.colnames
    assert plot.stat().st_size > 1000
    titles = [axis.get_title() for axis in novel(store, 4).show(columns=["mag_r"]).axes]
    assert any("\nblank\n" in title for title in titles)
    assert all(title.startswith("legacy-") for title in titles), "ids, to look closer at one"
    with pytest.raises(BadRequest, match="the table has no column 'mass'"):
        novel(store, 4).show(columns=["mass"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hnsw", "exact"])
def test_an_index_changes_nothing(tmp_path, data, kind):
    store = make_store(tmp_path / "s", data)
    before = novel(store, 20)
    build_index(store, kind)
    assert list(novel(store, 20)["source_id"]) == list(before["source_id"])
