"""What vectors tell of the observation: planted, and absent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa
import pytest

from galembed.errors import BadRequest
from galembed.probes import nuisance_report
from galembed.probes.nuisances import NUISANCE, NuisanceReport
from galembed.store import Store, open_store
from tests.galembed.stores import arrow, rows

COUNT = 1500


def make(path: Path, seeing_in_vectors: float, **columns: Any) -> Store:
    """A store of two surveys in which one direction of the vectors follows the seeing."""
    rng = np.random.default_rng(3)
    seeing = rng.uniform(0.8, 1.6, COUNT)
    data = rows(COUNT, seed=3)
    data["survey"] = np.where(np.arange(COUNT) % 3 == 0, "hsc", "legacy").tolist()
    vectors = rng.normal(size=data["vector"].shape)
    vectors[:, 0] += seeing_in_vectors * (seeing - seeing.mean()) / seeing.std()
    data["vector"] = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    data["source_uri"] = [f"brick-{number % 4}.fits" for number in range(COUNT)]
    table = arrow(data)
    carried = {"psfsize_r": seeing, "ebv": rng.exponential(0.05, COUNT)} | columns
    for name, values in carried.items():
        table = table.append_column(name, pa.array(values))
    lancedb.connect(path).create_table("embeddings", table)
    return open_store(path)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, NuisanceReport]:
    folder = tmp_path_factory.mktemp("nuisance")
    return {str(size): nuisance_report(make(folder / f"s{size}", size)) for size in (0.0, 2.0)}


def by_name(report: NuisanceReport) -> dict[str, Any]:
    return {one.name: one for one in report.nuisances}


def test_seeing_that_is_in_the_vectors_is_found(reports: dict[str, NuisanceReport]) -> None:
    found = by_name(reports["2.0"])
    assert set(found) == {"survey", "tile", "psfsize_r", "ebv"}
    seeing = found["psfsize_r"]
    assert seeing.score > 0.6
    assert abs(seeing.chance) < 0.05
    assert seeing.nearness < 0.85
    assert "sky cells" in seeing.method
    # Of 16 directions of variance 1, one has 5 instead: before normalising, 4 / 20 of the variance is seeing's.
    assert 0.12 < reports["2.0"].variance < 0.25
    assert abs(reports["2.0"].variance_chance) < 0.02


def test_what_is_not_in_the_vectors_is_chance(reports: dict[str, NuisanceReport]) -> None:
    for report, names in ((reports["0.0"], ("psfsize_r", "ebv")), (reports["2.0"], ("ebv",))):
        for name in names:
            one = by_name(report)[name]
            assert one.score < 0.03
            assert one.nearness == pytest.approx(1, abs=0.06)
    assert abs(reports["0.0"].variance) < 0.02
    for name, classes in (("survey", 2), ("tile", 4)):
        one = by_name(reports["2.0"])[name]
        assert one.kind == "classification"
        assert one.score == pytest.approx(1 / classes, abs=0.07)
        assert one.nearness == pytest.approx(1, abs=0.1)


def test_how_often_neighbours_share_a_class_is_beside_its_shares_and_no_draw(tmp_path: Path) -> None:
    """A rare class: a draw of random sources would scatter. As all sources are asked about, seeds change nothing."""
    store = make(tmp_path / "s", 0.0, field=np.where(np.arange(COUNT) % 50 == 0, "a", "b"))
    first, second = (nuisance_report(store, ["field"], seed=seed).nuisances[0].nearness for seed in (0, 1))
    assert first == second
    assert first == pytest.approx(1, abs=0.02)


def test_the_report_is_markdown(reports: dict[str, NuisanceReport]) -> None:
    text = str(reports["2.0"])
    assert text.startswith("# What the vectors of ")
    assert "| psfsize_r | R² | 0." in text
    assert "| survey | balanced accuracy | 0." in text


def test_a_number_of_each_tile_is_not_learnt_from_the_same_tile(tmp_path: Path) -> None:
    """Depths of thirty tiles, whose vectors have a direction each: those of another tile tell nothing of its depth."""
    rng = np.random.default_rng(0)
    tile = np.arange(COUNT) % 30
    store = make(tmp_path / "s", 0.0, galdepth_r=rng.normal(24, 1, 30)[tile])
    table = store.table.to_arrow()
    vectors = rng.normal(size=(30, 16))[tile] + rng.normal(0, 0.3, (COUNT, 16))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    order = [int(key.partition("-")[2]) for key in table.column("source_id").to_pylist()]
    for name, values in (
        ("vector", pa.FixedSizeListArray.from_arrays(pa.array(vectors[order].ravel()), 16)),
        ("source_uri", pa.array([f"tile-{tile[number]}" for number in order])),
    ):
        at = table.column_names.index(name)
        table = table.set_column(at, table.schema.field(at), values)
    lancedb.connect(tmp_path / "t").create_table("embeddings", table)
    lancedb.connect(tmp_path / "u").create_table(
        "embeddings",
        table.set_column(
            table.column_names.index("source_uri"),
            table.schema.field("source_uri"),
            pa.array([f"{number}.fits" for number in range(COUNT)]),
        ),
    )
    divided, whole = (
        nuisance_report(open_store(tmp_path / name), ["galdepth_r"]).nuisances[0].score for name in ("u", "t")
    )
    assert divided > 0.5
    assert whole < 0.2


def test_columns_are_chosen_and_those_that_tell_nothing_left_out(tmp_path: Path) -> None:
    store = make(tmp_path / "s", 1.0, airmass=np.full(COUNT, np.nan), run=pa.nulls(COUNT, pa.string()))
    report = nuisance_report(store, ["psfsize_r", "airmass", "run"])
    assert [one.name for one in report.nuisances] == ["psfsize_r"]
    assert report.skipped == {"airmass": "no values", "run": "fewer than two values of at least 20 sources"}
    assert "- airmass left out: no values" in str(report)
    with pytest.raises(BadRequest, match="the store has no column 'psfsize_g'; did you mean psfsize_r"):
        nuisance_report(store, ["psfsize_g"])
    with pytest.raises(BadRequest, match="tells of the observation: airmass: no values; embed with --carry"):
        nuisance_report(store, ["airmass"])


def test_a_filter_takes_away_what_is_told_by_way_of_the_class(tmp_path: Path) -> None:
    """Airmass that differs between two kinds, which vectors tell apart, and not within one."""
    rng = np.random.default_rng(5)
    spiral = np.arange(COUNT) % 2 == 0
    store = make(tmp_path / "s", 0.0, shape=np.where(spiral, "spiral", "smooth"), airmass=spiral + rng.random(COUNT))
    table = store.table.to_arrow()
    marked = np.stack(table.column("vector").to_pylist()).astype(np.float32)
    marked[:, 1] += np.where(np.array(table.column("shape").to_pylist()) == "spiral", 1, -1)
    column = pa.FixedSizeListArray.from_arrays(pa.array(marked.ravel()), marked.shape[1])
    at = table.column_names.index("vector")
    lancedb.connect(tmp_path / "t").create_table(
        "embeddings", table.set_column(at, table.schema.field("vector"), column)
    )
    marked_store = open_store(tmp_path / "t")
    everything = nuisance_report(marked_store, ["airmass"])
    spirals = nuisance_report(marked_store, ["airmass"], where="shape = 'spiral'")
    assert (everything.count, spirals.count) == (COUNT, COUNT // 2)
    assert everything.nuisances[0].score > 0.5
    assert spirals.nuisances[0].score < 0.05
    with pytest.raises(BadRequest, match=r"no source of .* passes shape = 'ring'"):
        nuisance_report(marked_store, ["airmass"], where="shape = 'ring'")
    with pytest.raises(BadRequest, match="the store has no column 'shap'; did you mean shape"):
        nuisance_report(marked_store, ["airmass"], where="shap = 'ring'")


def test_a_survey_that_is_seen_in_vectors(tmp_path: Path) -> None:
    store = make(tmp_path / "s", 0.0, field=np.where(np.arange(COUNT) % 2, "a", "b"))
    keys, vectors = store.vectors()
    numbers = np.array([int(key.partition("-")[2]) for key in keys["source_id"]])
    marked = vectors + 0.5 * np.where(numbers % 3 == 0, 1, -1)[:, None] / 4
    table = store.table.to_arrow()
    assert table.column("source_id").to_pylist() == list(keys["source_id"])
    column = pa.FixedSizeListArray.from_arrays(pa.array(marked.astype(np.float32).ravel()), vectors.shape[1])
    at = table.column_names.index("vector")
    lancedb.connect(tmp_path / "t").create_table(
        "embeddings", table.set_column(at, table.schema.field("vector"), column)
    )
    report = nuisance_report(open_store(tmp_path / "t"), ["survey", "field"])
    survey, field = report.nuisances
    assert survey.score > 0.8 > 0.6 > field.score
    assert survey.nearness > 1.2
    assert report.variance > 0.05


@pytest.mark.parametrize(
    ("name", "looked_at"),
    [("psfsize_g", True), ("GALDEPTH_R", True), ("ebv", True), ("brickname", True), ("snr_r", True), ("mag_r", False)],
)
def test_columns_of_the_observation_are_known_by_name(name: str, looked_at: bool) -> None:
    assert bool(NUISANCE.fullmatch(name)) == looked_at
