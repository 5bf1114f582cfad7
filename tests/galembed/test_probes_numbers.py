"""Probes of numbers and votes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from astropy.table import MaskedColumn, Table

from galembed.errors import BadRequest
from galembed.probes import (
    NumberReport,
    Probe,
    apply_probe,
    evaluate_probe,
    fit_probe,
    load_probe,
    refit_probe,
    save_probe,
)
from galembed.store import Store
from tests.galembed.stores import DIM, make_store, rows

COUNT = 400
ANSWERS = ("smooth", "featured", "artifact")


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    return rows(COUNT, seed=1)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, data: dict[str, Any]) -> Store:
    return make_store(tmp_path_factory.mktemp("numbers") / "s", data)


def fit(store: Store, labels: Table, column: str | Sequence[str], **options: Any) -> tuple[Probe, NumberReport]:
    probe, report = fit_probe(store, labels, column, curve=False, **options)
    assert isinstance(report, NumberReport)
    return probe, report


def evaluated(store: Store, probe: Probe, labels: Table) -> NumberReport:
    report = evaluate_probe(store, probe, labels)
    assert isinstance(report, NumberReport)
    return report


def numbers(data: dict[str, Any], noise: float = 0.1) -> np.ndarray:
    """A linear function of the vectors, and noise that they do not tell."""
    rng = np.random.default_rng(5)
    return np.asarray(3 + data["vector"] @ rng.normal(size=DIM) + rng.normal(0, noise, COUNT))


def fractions(data: dict[str, Any]) -> np.ndarray:
    logits = data["vector"] @ np.random.default_rng(6).normal(0, 2, size=(DIM, len(ANSWERS)))
    powers = np.exp(logits)
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def answers(values: np.ndarray, data: dict[str, Any]) -> Table:
    return Table({"id": data["source_id"]} | dict(zip(ANSWERS, values.T, strict=True)))


def test_floats_are_regressed(store: Store, data: dict[str, Any]) -> None:
    truth = numbers(data)
    labels = Table({"id": data["source_id"], "mass": truth * 1.0})
    labels["mass"].unit = "dex"
    probe, report = fit(store, labels, "mass")
    (score,) = report.scores
    assert (probe.kind, probe.unit, probe.classes, report.why) == (
        "regression",
        "dex",
        ("mass",),
        "numbers with fractions",
    )
    assert 0.09 < score.rmse < 0.13  # the noise is 0.1, and 17 coefficients are fitted to 320 labels
    assert score.r2 == pytest.approx(1 - (score.rmse / np.std(truth)) ** 2, abs=1e-6)
    assert score.rmse_interval[0] < score.rmse < score.rmse_interval[1]
    assert score.spread == pytest.approx(np.std(truth))
    assert abs(score.bias) < 0.02
    assert "R²" in str(report)
    assert "numbers in dex" in str(report)


def test_noise_is_not_predicted(store: Store, data: dict[str, Any]) -> None:
    noise = np.random.default_rng(3).normal(1e4, 1, COUNT)
    (score,) = fit(store, Table({"id": data["source_id"], "x": noise}), "x")[1].scores
    assert score.r2 < 0.05
    assert score.rmse == pytest.approx(1, abs=0.15)


def test_many_whole_numbers_are_regressed_and_few_are_classes(store: Store, data: dict[str, Any]) -> None:
    whole = np.round(10 * numbers(data)).astype(int)
    probe, report = fit(store, Table({"id": data["source_id"], "x": whole}), "x")
    assert probe.kind == "regression"
    assert "more than 20" in report.why
    few = Table({"id": data["source_id"], "x": (whole > np.median(whole)).astype(int)})
    assert fit_probe(store, few, "x", curve=False)[0].kind == "classification"
    assert fit(store, few, "x", kind="regression")[0].kind == "regression"


def test_fractions_are_predicted_as_fractions(store: Store, data: dict[str, Any], tmp_path: Path) -> None:
    truth = fractions(data)
    probe, report = fit(store, answers(np.round(truth, 2), data), ANSWERS)
    assert (probe.kind, probe.classes, probe.column) == ("votes", ANSWERS, "smooth, featured, artifact")
    assert report.rmse < 0.02
    assert all(score.r2 > 0.97 for score in report.scores)
    apply_probe(store, probe, tmp_path / "votes.parquet")
    table = pq.read_table(tmp_path / "votes.parquet")
    assert table.column_names == ["survey", "source_id", "ra", "dec", *(f"fraction_{name}" for name in ANSWERS)]
    found = np.column_stack([table.column(f"fraction_{name}").to_numpy() for name in ANSWERS])
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-6)
    place = {key: row for row, key in enumerate(data["source_id"])}
    wanted = truth[[place[key] for key in table.column("source_id").to_pylist()]]
    assert np.sqrt(((found - wanted) ** 2).mean()) < 0.02


def test_counts_are_votes_and_rows_without_any_are_unlabelled(store: Store, data: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    truth = fractions(data)
    counts = np.array(
        [rng.multinomial(total, row) for total, row in zip(rng.integers(0, 60, COUNT), truth, strict=True)]
    )
    _, report = fit(store, answers(counts, data), ANSWERS)
    assert report.unlabelled == (counts.sum(axis=1) == 0).sum() > 0
    assert report.count == COUNT - report.unlabelled
    known = counts.sum(axis=1) > 0
    seen = counts[known] / counts[known].sum(axis=1, keepdims=True)
    # No prediction is nearer to counted fractions than the truth; this one is nearly as near.
    assert report.rmse < 1.05 * np.sqrt(((seen - truth[known]) ** 2).mean(axis=0)).mean()


def test_numbers_and_votes_survive_the_disk_and_are_fitted_again(
    store: Store, data: dict[str, Any], tmp_path: Path
) -> None:
    for name, labels, column in (
        ("mass", Table({"id": data["source_id"], "mass": numbers(data)}), "mass"),
        ("votes", answers(fractions(data), data), ANSWERS),
    ):
        probe, report = fit(store, labels, column, name=name)
        back = load_probe(save_probe(probe, tmp_path / name))
        assert (back.kind, back.classes, back.columns) == (probe.kind, probe.classes, probe.columns)
        again, repeated = refit_probe(store, back)
        np.testing.assert_allclose(again.weights, probe.weights, rtol=1e-6, atol=1e-9)
        assert repeated.score == report.score


def test_numbers_of_other_sources_are_scored(store: Store, data: dict[str, Any]) -> None:
    labels = Table({"id": data["source_id"], "mass": numbers(data)})
    probe, _ = fit(store, labels[:300], "mass")
    report = evaluated(store, probe, labels)
    assert report.count == 100
    assert 0.08 < report.scores[0].rmse < 0.13
    assert "300 source(s) that the probe was fitted to left out" in report.method


def test_a_probe_of_votes_is_scored_by_its_own_columns(store: Store, data: dict[str, Any]) -> None:
    labels = answers(fractions(data), data)
    probe, _ = fit(store, labels[:300], ANSWERS)
    assert evaluated(store, probe, labels).rmse < 0.02
    with pytest.raises(BadRequest, match="the labels have no column 'smooth'"):
        evaluate_probe(store, probe, labels["id", "featured"])


def test_missing_numbers_are_unlabelled(store: Store, data: dict[str, Any]) -> None:
    truth = numbers(data)
    truth[:3] = np.nan, np.inf, -np.inf
    column = MaskedColumn(truth, mask=np.arange(COUNT) == 7)
    _, report = fit(store, Table({"id": data["source_id"], "mass": column}), "mass")
    assert (report.unlabelled, report.count) == (4, COUNT - 4)


@pytest.mark.parametrize(
    ("change", "columns", "kind", "message"),
    [
        ({}, ("smooth", "featured"), None, r"smooth, featured sum to 0\.\d+ in row 1, not to 1"),
        ({}, ("smooth", "smooth"), None, "a column is named twice: smooth, smooth"),
        ({}, ("smooth",), "votes", "votes are in several columns, one for each answer; got only 'smooth'"),
        ({}, ANSWERS, "regression", "regression reads one label column, got smooth, featured, artifact"),
        ({}, ("smooth",), "ranking", "--kind 'ranking' is unknown; choose classification, regression, votes"),
        ({}, ("smooth",), "classification", "holds fractions; classes are text or whole numbers"),
        ({"smooth": np.full(COUNT, -2.0)}, ANSWERS, None, "hold negative numbers, which are no votes"),
        ({"smooth": ["a"] * COUNT}, ANSWERS, None, "column 'smooth' holds text; regression and votes need numbers"),
        ({"smooth": np.full(COUNT, 0.5)}, ("smooth",), None, "all labels in 'smooth' are 0.5; nothing to learn"),
        ({"smooth": np.full(COUNT, np.nan)}, ("smooth",), "regression", "'smooth' is empty"),
    ],
)
def test_labels_that_are_no_numbers_or_votes(
    store: Store, data: dict[str, Any], change: dict[str, Any], columns: tuple[str, ...], kind: str | None, message: str
) -> None:
    table = answers(np.clip(fractions(data), 0.01, 1), data)
    for name, values in change.items():
        table[name] = values
    with pytest.raises(BadRequest, match=message):
        fit(store, table, columns, kind=kind)


def test_too_few_numbers(store: Store, data: dict[str, Any]) -> None:
    table = Table({"id": data["source_id"][:9], "mass": numbers(data)[:9]})
    with pytest.raises(BadRequest, match="needs 10 labelled sources in the store, found 9"):
        fit_probe(store, table, "mass")
