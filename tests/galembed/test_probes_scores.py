"""What predictions are worth: against scikit-learn, against known truth, and in pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from astropy.table import Table
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from galembed import sources
from galembed.cutouts import Cutout
from galembed.linear import log_softmax
from galembed.probes import ProbeReport, fit_probe
from galembed.probes.figures import curve_figure, mistakes_figure, reliability_figure, save_details, scatter_figure
from galembed.probes.reports import CurvePoint, Mistake, NumberReport, NumberScore
from galembed.probes.scores import (
    areas,
    balanced_accuracy,
    calibration,
    class_intervals,
    error_intervals,
    errors,
    one_against_rest,
    scaled_by_others,
    temperature,
)
from galembed.store import Store
from tests.galembed.stores import make_store, rows

COUNT = 4000


@pytest.fixture(scope="module")
def logits() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 1.5, (COUNT, 3))


def drawn(logits: np.ndarray, seed: int = 1) -> np.ndarray:
    """Labels drawn from the probabilities themselves, so that these are calibrated."""
    uniform = np.random.default_rng(seed).random((len(logits), 1))
    return np.asarray((np.exp(log_softmax(logits)).cumsum(axis=1) < uniform).sum(axis=1))


def test_areas_and_balanced_accuracy_are_scikit_learns(logits: np.ndarray) -> None:
    truth = drawn(logits)
    margins = one_against_rest(logits)
    np.testing.assert_allclose(
        areas(logits, truth), [roc_auc_score(truth == label, margins[:, label]) for label in range(3)]
    )
    np.testing.assert_allclose(1 / (1 + np.exp(-margins)), np.exp(log_softmax(logits)))
    predicted = logits.argmax(axis=1)
    assert balanced_accuracy(truth, predicted) == pytest.approx(balanced_accuracy_score(truth, predicted))


def test_equal_scores_count_half() -> None:
    logits = np.array([[0.0, 0.0], [0.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    truth = np.array([0, 1, 1, 0])
    assert areas(logits, truth).tolist() == [0.875, 0.875]


@pytest.mark.parametrize("factor", [0.3, 1.0, 4.0])
def test_the_temperature_is_found_and_mends_calibration(logits: np.ndarray, factor: float) -> None:
    truth = drawn(logits)
    assert temperature(logits * factor, truth) == pytest.approx(factor, rel=0.06)
    order = np.random.default_rng(2).permutation(COUNT)
    folds = [(np.delete(order, slice(at, at + 1000)), order[at : at + 1000]) for at in range(0, COUNT, 1000)]
    after, _ = calibration(scaled_by_others(logits * factor, truth, folds), truth)
    before, bins = calibration(logits * factor, truth)
    assert after < 0.03
    assert before > 0.1 or factor == 1
    assert sum(one.share for one in bins) == pytest.approx(1)


def test_few_labels_that_are_all_predicted_rightly_are_no_proof_of_certainty() -> None:
    found = {}
    for count in (20, 2000):
        truth = np.arange(count) % 2
        found[count] = temperature(np.stack([truth == 0, truth == 1], axis=1).astype(float), truth)
    # Where n log(1 + exp(-1 / T)) + log(T)**2 / 2 is least, on a grid.
    assert found == pytest.approx({20: 0.24747, 2000: 0.11097}, rel=1e-3)


def test_a_fold_has_no_part_in_its_own_temperature(logits: np.ndarray) -> None:
    truth = drawn(logits)
    folds = [(np.arange(2000, COUNT), np.arange(2000)), (np.arange(2000), np.arange(2000, COUNT))]
    changed = truth.copy()
    changed[:2000] = logits[:2000].argmin(axis=1)
    one, other = (scaled_by_others(logits, labels, folds) for labels in (truth, changed))
    np.testing.assert_array_equal(one[:2000], other[:2000])
    assert not np.allclose(one[2000:], other[2000:])


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Sixty places of ten sources each, in which mistakes come together."""
    held, areas_held, count = 0, 0, 40
    expected = 0.8
    for trial in range(count):
        rng = np.random.default_rng(trial)
        groups = np.repeat(np.arange(60), 10)
        right = rng.random(600) < np.repeat(rng.beta(8, 2, 60), 10)
        truth = np.arange(600) % 2
        called = np.where(right, truth, 1 - truth)
        logits = np.stack([1.0 - called, called], axis=1) + rng.normal(0, 1e-3, (600, 2))
        found = class_intervals(logits, truth, groups, trial)
        held += found.balanced[0] <= expected <= found.balanced[1]
        areas_held += found.area[0] <= expected <= found.area[1]
    assert 0.85 * count <= held <= count
    assert 0.85 * count <= areas_held <= count


def test_places_count_instead_of_sources() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 25)
    right = np.repeat(rng.random(40) < 0.7, 25)  # a place is right or wrong as a whole
    truth = np.arange(1000) % 2
    called = np.where(right, truth, 1 - truth)
    logits = np.stack([1.0 - called, called], axis=1)
    widths = [np.ptp(class_intervals(logits, truth, each, 0).balanced) for each in (groups, np.arange(1000))]
    assert 3 < widths[0] / widths[1] < 7  # the square root of 25 sources to a place


def test_errors_and_their_intervals() -> None:
    rng = np.random.default_rng(0)
    truth = np.column_stack([rng.normal(1e6, 2.0, 2000), rng.normal(0, 1, 2000)])
    predicted = truth + rng.normal([0.5, 0], [1.0, 0.3], (2000, 2))
    found, ranges = errors(truth, predicted), error_intervals(truth, predicted, np.arange(2000), 0)
    np.testing.assert_allclose(found.rmse, [np.sqrt(1.25), 0.3], rtol=0.05)
    np.testing.assert_allclose(found.bias, [0.5, 0], atol=0.06)
    np.testing.assert_allclose(found.r2, [1 - 1.25 / 4, 1 - 0.09], atol=0.03)
    np.testing.assert_allclose(found.mae[1], 0.3 * np.sqrt(2 / np.pi), rtol=0.05)
    for name in ("rmse", "mae", "r2", "bias"):
        low, high = getattr(ranges, name).T
        assert (low < getattr(found, name)).all()
        assert (getattr(found, name) < high).all()
    # The interval of an RMSE of n normal errors is about 1.96 / sqrt(2n) of it on either side.
    assert np.ptp(ranges.rmse[1]) == pytest.approx(2 * 1.96 * 0.3 / np.sqrt(4000), rel=0.2)


@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_sources_are_scored_without_a_warning(count: int) -> None:
    logits, truth = np.eye(3)[:count], np.arange(count)
    found = class_intervals(logits, truth, np.arange(count), 0)
    assert found.balanced == (1, 1)
    assert np.isnan(found.areas[2]).all()
    assert calibration(logits, truth)[0] > 0
    numbers = error_intervals(np.ones((count, 1)), np.ones((count, 1)), np.arange(count), 0)
    assert np.isnan(numbers.r2).all()
    assert (numbers.rmse == 0).all()


# ------------------------------------------------------------------------------------------------------- pictures


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Table]:
    data = rows(160, seed=4)
    kinds = np.array(data["kind"])
    kinds[::9] = "spiral"  # labels that the vectors contradict
    store = make_store(tmp_path_factory.mktemp("pictures") / "s", data)
    return store, Table({"id": data["source_id"], "kind": kinds})


@pytest.fixture(scope="module")
def report(labelled: tuple[Store, Table]) -> ProbeReport:
    found = fit_probe(*labelled, "kind", curve=False)[1]
    assert isinstance(found, ProbeReport)
    return found


def test_more_labels_score_better_and_the_last_point_is_the_score(labelled: tuple[Store, Table]) -> None:
    store, _ = labelled
    keys, vectors = store.vectors()
    rng = np.random.default_rng(0)
    table = Table({"id": keys["source_id"], "x": vectors @ rng.normal(size=16) + rng.normal(0, 0.5, len(vectors))})
    _, found = fit_probe(store, table, "x")
    assert isinstance(found, NumberReport)
    sizes = [point.labels for point in found.curve]
    assert sizes[0] == 20
    assert sizes == sorted(sizes)
    assert sizes[-1] in range(118, 136)  # four fifths of 160, in folds of whole cells
    assert found.curve[-1].score == pytest.approx(found.scores[0].r2, abs=0.05)
    assert found.curve[-1].score > found.curve[0].score + 0.1
    assert f"| {sizes[-1]} | " in str(found)


def test_confident_mistakes_are_listed_first(report: ProbeReport) -> None:
    sizes = [mistake.size for mistake in report.mistakes]
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) == min(24, sum(map(sum, report.confusion)) - sum(np.diag(report.confusion)))
    contradicted = {f"legacy-{number}" for number in range(0, 160, 9)}
    assert sum(mistake.source_id in contradicted for mistake in report.mistakes[:5]) == 5
    assert all(mistake.label != mistake.predicted for mistake in report.mistakes)
    assert f"| {report.mistakes[0].source_id} | spiral | " in str(report)


def test_details_are_a_folder_of_report_and_pictures(
    labelled: tuple[Store, Table], report: ProbeReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, table = labelled
    monkeypatch.setattr(
        sources,
        "recut",
        lambda rows, contract, size: [Cutout(np.zeros((3, size, size), np.float32), 1.0, 20.0)] * len(rows),
    )
    files = save_details(report, tmp_path / "details", store)
    assert [file.name for file in files] == ["report.md", "confusion.png", "reliability.png", "mistakes.png"]
    assert all(file.stat().st_size > 500 for file in files)
    table = Table({"id": table["id"], "x": np.arange(160) / 7})
    files = save_details(fit_probe(store, table, "x", curve=False)[1], tmp_path / "numbers", store)
    assert [file.name for file in files] == ["report.md", "scatter.png", "mistakes.png"]


def test_reliability_shows_before_and_after(report: ProbeReport) -> None:
    assert report.calibration is not None
    legend = reliability_figure(report.calibration).axes[0].get_legend()
    assert legend is not None
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts == [
        f"as fitted: ECE {report.calibration.ece_before:.3f}",
        f"temperature {report.calibration.temperature:.2f}: ECE {report.calibration.ece:.3f}",
    ]


def test_a_mistake_without_pixels_is_a_frame_that_says_why(labelled: tuple[Store, Table]) -> None:
    figure = mistakes_figure(labelled[0], [Mistake("legacy", "legacy-3", "spiral", "smooth", 0.98)])
    assert figure.axes[0].get_title() == "spiral\ncalled smooth\n0.980"
    assert "3.fits" in figure.axes[0].texts[0].get_text()


def test_scatter_has_a_panel_for_each_answer() -> None:
    values = np.random.default_rng(0).random((50, 6))
    scores = tuple(NumberScore(f"answer-{n}", 0.1, 0.1, 0.0, 0.5, 0.2) for n in range(6))
    curve = (CurvePoint(20, 0.2, 0.01, 5), CurvePoint(40, 0.1, float("nan"), 1))
    report = NumberReport("all", "5-fold", "votes", 50, scores, curve=curve, truth=values, predicted=values)
    titles = [axis.get_title() for axis in scatter_figure(report).axes]
    assert [title.splitlines()[0] for title in titles] == [f"answer-{n}" for n in range(6)]
    axis = curve_figure(report).axes[0]
    assert axis.get_ylabel() == "mean RMSE"
    assert [text.get_text() for text in axis.get_xticklabels()] == ["20", "40"]
    assert not len(axis.get_xticks(minor=True)), "powers of ten among them run into one another"
