from __future__ import annotations

import json
import math

import numpy as np
import pytest
from sklearn import metrics

from training.scores.labels import Measured, area_under_curve, calibration_error, measured, score_classes, score_numbers

CLASSES = ("a", "b", "c")


def drawn(count: int = 400) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    truth = rng.choice(3, count, p=[0.6, 0.3, 0.1])
    chances = rng.dirichlet(np.ones(3), count) + 1.5 * np.eye(3)[truth] * rng.random((count, 1))
    return truth, chances / chances.sum(axis=1, keepdims=True)


def test_classes_are_scored_as_scikit_learn_scores_them() -> None:
    truth, chances = drawn()
    scores, predicted = score_classes(CLASSES, truth, chances, np.array([0.6, 0.3, 0.1])), chances.argmax(axis=1)
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(truth, predicted)
    np.testing.assert_allclose((scores.precision, scores.recall, scores.f1), (precision, recall, f1))
    np.testing.assert_array_equal(scores.confusion, metrics.confusion_matrix(truth, predicted))
    assert scores.balanced_accuracy.value == pytest.approx(metrics.balanced_accuracy_score(truth, predicted))
    assert scores.macro_f1 == pytest.approx(metrics.f1_score(truth, predicted, average="macro"))
    assert scores.roc_auc == pytest.approx(metrics.roc_auc_score(truth, chances, multi_class="ovr"))
    assert scores.nll == pytest.approx(metrics.log_loss(truth, chances))
    assert scores.accuracy == pytest.approx(metrics.accuracy_score(truth, predicted))
    assert scores.constant_accuracy == pytest.approx(np.mean(truth == 0))


def test_numbers_are_scored_as_scikit_learn_scores_them() -> None:
    rng = np.random.default_rng(2)
    given = rng.normal(5, 2, 300)
    predicted = given + rng.normal(0.5, 1, 300)
    scores = score_numbers(predicted, given, np.array(5.0), "kpc")
    assert scores.rmse.value == pytest.approx(metrics.root_mean_squared_error(given, predicted))
    assert scores.mae.value == pytest.approx(metrics.mean_absolute_error(given, predicted))
    assert scores.r2.value == pytest.approx(metrics.r2_score(given, predicted))
    assert scores.constant_rmse == pytest.approx(metrics.root_mean_squared_error(given, np.full(300, 5.0)))
    assert scores.rmse.low < scores.rmse.value < scores.rmse.high
    assert "RMSE kpc" in str(scores)


def test_the_area_under_the_curve_counts_ties_half() -> None:
    assert area_under_curve(np.array([True, False, False]), np.array([1.0, 1.0, 0.0])) == 0.75
    assert math.isnan(area_under_curve(np.array([True, True]), np.array([1.0, 0.0])))


def test_chances_that_are_right_as_often_as_they_say_are_calibrated() -> None:
    chances = np.tile([0.75, 0.25], (4, 1))
    assert calibration_error(np.array([0, 0, 0, 1]), chances) == pytest.approx(0)
    assert calibration_error(np.array([1, 1, 1, 1]), chances) == pytest.approx(0.75)
    assert calibration_error(np.array([0, 0, 0, 0]), np.tile([1.0, 0.0], (4, 1))) == 0


def test_an_interval_of_a_mean_is_about_two_standard_errors() -> None:
    values = np.random.default_rng(3).normal(0, 1, 400)
    interval = measured(lambda rows: float(values[rows].mean()), 400)
    assert interval.value == pytest.approx(values.mean())
    assert (interval.high - interval.low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.1)


def test_a_class_that_is_never_predicted_has_no_precision_and_still_makes_json() -> None:
    truth, chances = np.array([0, 1, 0, 1]), np.tile([0.5, 0.3, 0.2], (4, 1))
    scores = score_classes(CLASSES, truth, chances, np.array([0.5, 0.5, 0.0]))
    assert math.isnan(scores.precision[1])
    assert math.isnan(scores.recall[2])
    assert json.loads(json.dumps(scores.to_dict(), allow_nan=False))["precision"] == [0.5, None, None]
    assert scores.balanced_accuracy.value == 0.5
    assert scores.roc_auc == 0.5
    alone = score_classes(CLASSES, np.zeros(4, np.intp), chances, np.array([1.0, 0.0, 0.0]))
    assert math.isnan(alone.roc_auc)
    assert alone.macro_f1 == 1


@pytest.mark.parametrize("scale", [1e-4, 1e10])
def test_errors_keep_their_digits_whatever_the_unit(scale: float) -> None:
    given = scale * np.array([1.0, 2.0, 3.0, 4.0])
    text = str(score_numbers(given + 0.25 * scale, given, given.mean(), "Msun"))
    assert f"**RMSE {0.25 * scale:.3g} [{0.25 * scale:.3g}, {0.25 * scale:.3g}] Msun** on 4 galaxies" in text
    assert f"| bias Msun | {0.25 * scale:+.2g} | |" in text


def test_a_measured_number_is_written_with_its_interval() -> None:
    assert f"{Measured(0.123456, 0.1, 0.2)}" == str(Measured(0.123456, 0.1, 0.2)) == "0.123 [0.100, 0.200]"
    assert f"{Measured(123456.0, 1e5, 2e5):.3g}" == "1.23e+05 [1e+05, 2e+05]"
