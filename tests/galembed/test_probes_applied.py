"""Predictions for a whole store, and what to label next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy.table import Table

from galembed.errors import ArtifactNotFound, BadRequest
from galembed.labels import source_hashes
from galembed.probes import Probe, apply_probe, fit_probe, stored_predictions, suggest
from galembed.probes.applying import Prior
from galembed.probes.suggesting import Measure, spread_of, spread_out
from galembed.store import Store, open_store
from galembed.store.places import storage_options
from tests.galembed.stores import DIM, arrow, make_store, rows

COUNT = 600


def probe_of(data: dict[str, Any], labelled: int, **changes: object) -> Probe:
    """A probe of two classes by the first number of a vector, taught by the first rows."""
    weights = np.zeros((2, DIM))
    weights[1, 0] = 8.0
    keys = pa.table({name: pa.array(data[name][:labelled], pa.string()) for name in ("survey", "source_id")})
    facts: dict[str, Any] = {
        "name": "first",
        "column": "kind",
        "embedding_id": "e" * 64,
        "classes": ("low", "high"),
        "weights": weights,
        "intercept": np.zeros(2),
        "trained_on": np.sort(source_hashes(keys)),
        "frequencies": (0.9, 0.1),
    }
    return Probe(**(facts | changes))


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    return rows(COUNT, seed=2)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, data: dict[str, Any]) -> Store:
    return make_store(tmp_path_factory.mktemp("applied") / "s", data)


def test_predictions_in_a_store_are_found_again_by_name_and_identity(tmp_path: Path) -> None:
    data = rows(50)
    store = make_store(tmp_path / "s", data)
    probe = probe_of(data, 0)
    count, place = apply_probe(store, probe)
    assert count == 50
    assert place.endswith(f"s/probes/first-{probe.probe_id[:12]}.parquet")
    table = stored_predictions(store, "first")
    assert table.schema.metadata[b"galembed.probe_id"].decode() == probe.probe_id
    np.testing.assert_allclose(
        table.sort_by("source_id").column("probability_high").to_numpy(),
        1 / (1 + np.exp(-8 * data["vector"][np.argsort(data["source_id"]), 0])),
        rtol=1e-5,
    )
    other = probe_of(data, 0, intercept=np.array([0.0, 5.0]))
    assert apply_probe(store, other)[1] != place
    assert Path(place).exists()
    newest = stored_predictions(store, "first").schema.metadata
    assert newest[b"galembed.probe_id"].decode() == other.probe_id
    assert len(store) == 50
    with pytest.raises(ArtifactNotFound, match=r"holds no predictions of probe 'fir'; .*probe apply"):
        stored_predictions(store, "fir")


def test_predictions_are_kept_in_a_store_on_object_storage(bucket: str) -> None:
    lance.write_dataset(arrow(rows(30)), f"{bucket}/s/embeddings.lance", storage_options=storage_options(bucket))
    store = open_store(f"{bucket}/s")
    probe = probe_of(rows(30), 0)
    assert apply_probe(store, probe) == (30, f"{bucket}/s/probes/first-{probe.probe_id[:12]}.parquet")
    assert stored_predictions(store, "first").num_rows == 30


def test_a_prior_makes_the_rare_class_rarer(store: Store, data: dict[str, Any], tmp_path: Path) -> None:
    tables = []
    priors: tuple[Prior, ...] = ("equal", "labels")
    for prior in priors:
        apply_probe(store, probe_of(data, 0), tmp_path / "x.parquet", prior=prior)
        tables.append(pq.read_table(tmp_path / "x.parquet"))
    equal, labels = (table.column("probability_high").to_numpy().astype(float) for table in tables)
    odds = (labels / (1 - labels)) / (equal / (1 - equal))
    np.testing.assert_allclose(odds, 1 / 9, rtol=1e-3)
    assert tables[1].schema.metadata[b"galembed.prior"] == b"labels"
    with pytest.raises(BadRequest, match="does not know how common classes were among its labels; fit it again"):
        apply_probe(store, probe_of(data, 0, frequencies=()), tmp_path / "x.parquet", prior="labels")


def test_a_filter_leaves_rows_out_and_a_failure_leaves_no_file(
    store: Store, data: dict[str, Any], tmp_path: Path
) -> None:
    bright = sum(np.array(data["mag_r"]) < 17)
    assert apply_probe(store, probe_of(data, 0), tmp_path / "x.parquet", where="mag_r < 17")[0] == bright
    with pytest.raises(BadRequest, match="no column 'mag_q'"):
        apply_probe(store, probe_of(data, 0), tmp_path / "y.parquet", where="mag_q < 17")
    assert [file.name for file in tmp_path.iterdir()] == ["x.parquet"]


# ---------------------------------------------------------------------------------------------------- suggestions


@pytest.mark.parametrize("by", ["entropy", "margin"])
def test_suggestions_are_uncertain_and_not_labelled(store: Store, data: dict[str, Any], by: Measure) -> None:
    table = suggest(store, probe_of(data, 200), 20, by=by, where="mag_r > 15")
    assert len(table) == 20
    assert not set(table["source_id"]) & set(data["source_id"][:200])
    place = {key: row for row, key in enumerate(data["source_id"])}
    chosen = np.array([place[key] for key in table["source_id"]])
    assert (np.array(data["mag_r"])[chosen] > 15).all()
    distance = np.abs(data["vector"][:, 0])
    assert np.median(distance[chosen]) < 0.8 * np.median(distance)
    assert (np.diff(table["uncertainty"]) <= 0).all()
    assert set(table["kind"]) == {""}
    assert table.colnames[:4] == ["survey", "source_id", "ra", "dec"]
    assert (table["predicted"] != table["second"]).all()


def test_copies_are_suggested_once(tmp_path: Path) -> None:
    data = rows(60)
    data["vector"][:20] = data["vector"][0]
    data["vector"][:20, 0] = 0.0
    table = suggest(make_store(tmp_path / "s", data), probe_of(data, 0), 10)
    assert len(table) == 10
    assert sum(key in data["source_id"][:20] for key in table["source_id"]) == 1


def test_what_is_drawn_lies_further_apart_than_the_most_uncertain() -> None:
    rng = np.random.default_rng(0)
    vectors = np.concatenate([rng.normal(0, 0.01, (90, 4)), rng.normal([1, 0, 0, 0], 0.01, (10, 4))])
    chosen = spread_out(vectors.astype(np.float32), np.linspace(1, 0.8, 100), 4, seed=0)
    assert chosen[0] == 0
    assert len(set(chosen)) == 4
    assert (chosen >= 90).any()
    assert len(spread_out(vectors.astype(np.float32), np.zeros(100), 4, seed=0)) == 4
    assert len(spread_out(np.zeros((5, 4), np.float32), np.ones(5), 4, seed=0)) == 1


def test_numbers_are_uncertain_where_no_label_was(tmp_path: Path) -> None:
    data = rows(300, seed=3)
    data["vector"][:, 0] = np.where(np.arange(300) < 150, 0.01 * data["vector"][:, 0], data["vector"][:, 0])
    store = make_store(tmp_path / "s", data)
    labels = Table({"id": data["source_id"][:150], "x": data["vector"][:150, 1] + 0.01})
    probe, _ = fit_probe(store, labels, "x", curve=False)
    table = suggest(store, probe, 10)
    assert "predicted" in table.colnames
    place = {key: row for row, key in enumerate(data["source_id"])}
    chosen = [place[key] for key in table["source_id"]]
    assert min(chosen) >= 150
    wide = np.abs(data["vector"][:, 0])
    assert np.mean(wide[chosen]) > np.mean(wide[150:])


def test_the_variance_is_a_ridge_regressions() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(7, 3)).astype(np.float32)
    inverse = np.linalg.inv(np.diag([4.0, 2.0, 1.0]))
    np.testing.assert_allclose(spread_of(vectors, (np.zeros(3), inverse)), (vectors**2 @ [0.25, 0.5, 1.0]), rtol=1e-5)


def test_nothing_left_to_label(store: Store, data: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match=r"no source of .* is left to label"):
        suggest(store, probe_of(data, COUNT), 5)
    with pytest.raises(BadRequest, match="--by is entropy or margin and -n at least 1, got 'luck'"):
        suggest(store, probe_of(data, 0), 5, by="luck")  # type: ignore[arg-type]
