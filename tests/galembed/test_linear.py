from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

from galembed import linear
from galembed.errors import BadRequest
from galembed.linear import (
    apart,
    choice_folds,
    class_path,
    equal_rows,
    fit_logistic,
    log_softmax,
    make_folds,
    ridge_path,
    sky_cells,
    softmax_layer,
    vote_path,
)


@pytest.mark.parametrize("classes", [None, np.arange(60) % 3])
def test_a_group_is_never_on_both_sides(classes: np.ndarray | None) -> None:
    groups = np.arange(60) // 4
    folds = make_folds(groups, 3, 0, classes)
    assert sorted(np.concatenate([test for _, test in folds])) == list(range(60))
    for train, test in folds:
        assert not set(groups[train]) & set(groups[test])


def test_folds_are_no_more_than_the_smallest_class_has_members() -> None:
    assert len(make_folds(np.arange(30), 5, 0, np.array([0] * 28 + [1] * 2))) == 2


def test_the_seed_decides_who_is_in_a_fold() -> None:
    tests = [make_folds(np.arange(40), 4, seed, np.arange(40) % 2)[0][1].tolist() for seed in (0, 0, 1)]
    assert tests[0] == tests[1] != tests[2]


def test_a_class_that_lies_in_one_place_is_refused() -> None:
    classes = np.array([0] * 20 + [1] * 4)
    groups = np.concatenate([np.arange(20), np.full(4, 99)])
    with pytest.raises(BadRequest, match="all labelled sources of one class are in one place or copies of one image"):
        make_folds(groups, 3, 0, classes)


@pytest.mark.parametrize("classes", [None, np.array([0, 0, 0, 1])])
def test_what_cannot_be_split_is_refused(classes: np.ndarray | None) -> None:
    with pytest.raises(BadRequest, match="4 labelled sources cannot be split in two parts"):
        make_folds(np.arange(4) if classes is not None else np.zeros(4, np.int64), 3, 0, classes)


def test_a_class_of_one_group_is_always_learnt_from_where_a_choice_is_made() -> None:
    classes = np.array([0] * 10 + [1] * 10 + [2] * 3)
    groups = np.concatenate([np.arange(20), np.full(3, 99)])
    folds = choice_folds(groups, 0, classes)
    assert len(folds) == 3
    assert sorted(np.concatenate([test for _, test in folds])) == list(range(20))
    assert all({20, 21, 22} <= set(train) and not set(train) & set(test) for train, test in folds)


@pytest.mark.parametrize("classes", [None, np.array([0, 1])])
def test_there_are_no_folds_to_choose_by_where_nothing_can_be_left_out(classes: np.ndarray | None) -> None:
    assert choice_folds(np.zeros(2, np.int64) if classes is None else np.arange(2), 0, classes) == []


def test_neighbours_and_copies_stay_in_one_fold() -> None:
    """Sixty places 6 deg apart on the equator, two sources 3.6 arcsec apart at each: 3.7 deg cells divide them."""
    ra = np.repeat(np.arange(1.3, 360, 6.0), 2) + np.tile([0.0, 0.001], 60)
    together = np.arange(120)
    together[80] = together[3]
    groups, how = apart(sky_cells(ra, np.zeros(120)), together, 5)
    assert how == "grouped by sky cells of 3.7 deg"
    assert (groups[::2] == groups[1::2]).all()
    assert groups[80] == groups[3]
    assert len(np.unique(groups)) == 59


def test_cells_that_would_keep_a_class_in_one_part_are_not_used() -> None:
    ra = np.arange(100) * 3.6
    ra[-4:] = 200.0 + np.arange(4) / 60  # all of the rare class within 3 arcmin
    classes = np.array([0] * 96 + [1] * 4)
    groups, how = apart(sky_cells(ra, np.full(100, 1.0)), np.arange(100), 2, 0, classes)
    assert len(np.unique(groups[-4:])) > 1
    assert "deg" in how
    width = float(how.split()[-2])
    assert width < 0.1


def test_without_positions_only_copies_are_kept_together() -> None:
    features = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    features[7] = features[3]
    together = equal_rows(features)
    groups, how = apart(sky_cells(np.full(20, np.nan), np.zeros(20)), together, 5)
    assert how.startswith("at random")
    assert groups[3] == groups[7]
    assert len(np.unique(groups)) == 19


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("balance", [True, False])
def test_the_softmax_layer_is_scikit_learns_classifier_on_features_as_they_are(classes: int, balance: bool) -> None:
    rng = np.random.default_rng(0)
    truth = rng.choice(classes, 90, p=[0.7, *[0.3 / (classes - 1)] * (classes - 1)])
    x = 10 ** rng.uniform(-2, 2, 6) * (rng.normal(size=(90, 6)) + truth[:, None])
    weights, intercepts = softmax_layer(fit_logistic(x, truth, 0.5, balance=balance))
    scaled = StandardScaler().fit_transform(x)
    plain = LogisticRegression(C=0.5, class_weight="balanced" if balance else None, max_iter=5000).fit(scaled, truth)
    powers = np.exp(x @ weights.T + intercepts)
    np.testing.assert_allclose(powers / powers.sum(axis=1, keepdims=True), plain.predict_proba(scaled), atol=1e-6)


def features_and_classes(classes: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    truth = np.arange(120) % classes
    return (10 ** rng.uniform(-1, 1, 5) * (rng.normal(size=(120, 5)) + 0.7 * truth[:, None])), truth


@pytest.mark.parametrize("classes", [2, 4])
def test_a_path_of_strengths_ends_where_single_fits_do(classes: int) -> None:
    x, truth = features_and_classes(classes)
    strengths = (0.01, 0.1, 1.0)
    path = list(class_path(x, truth, strengths))
    assert [strength for strength, _ in path] == list(strengths)
    for strength, layer in path:
        single = softmax_layer(fit_logistic(x, truth, strength))
        found, expected = (np.exp(log_softmax(x @ weights.T + intercepts)) for weights, intercepts in (layer, single))
        np.testing.assert_allclose(found, expected, atol=2e-3)


def test_ridge_is_scikit_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_BLOCK", 50)
    x, _ = features_and_classes(3)
    targets = np.random.default_rng(2).normal(1e4, 1, (120, 2)) + x[:, :2]
    for strength, (weights, intercepts) in ridge_path(x.astype(np.float32), targets, (100.0, 1.0, 0.01)):
        scaler = StandardScaler().fit(x.astype(np.float32).astype(float))
        model = Ridge(alpha=strength).fit(scaler.transform(x.astype(np.float32).astype(float)), targets)
        expected = model.predict(scaler.transform(x))
        np.testing.assert_allclose(x @ weights.T + intercepts, expected, rtol=1e-6)


@pytest.mark.parametrize("few", [20_000, 10])
def test_votes_of_one_answer_each_are_logistic_regression(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in float32, as where rows are many, and with counts for weights, which repeat rows."""
    monkeypatch.setattr(linear, "_FEW_ROWS", few)
    x, truth = features_and_classes(3)
    weights = np.random.default_rng(3).integers(1, 4, 120)
    scaled = StandardScaler().fit_transform(x)
    for strength, (layer, intercepts) in vote_path(x, np.eye(3)[truth], weights.astype(float), (0.01, 1.0)):
        plain = LogisticRegression(C=strength, max_iter=5000, tol=1e-8).fit(
            np.repeat(scaled, weights, axis=0), np.repeat(truth, weights)
        )
        found = np.exp(log_softmax(x @ layer.T + intercepts))
        np.testing.assert_allclose(found, plain.predict_proba(scaled), atol=2e-3)


def test_vote_fractions_are_found_again() -> None:
    rng = np.random.default_rng(4)
    x = rng.normal(size=(400, 5))
    truth = np.exp(log_softmax(x @ rng.normal(size=(5, 3))))
    _, (layer, intercepts) = next(vote_path(x, truth, np.ones(400), [1e4]))
    np.testing.assert_allclose(np.exp(log_softmax(x @ layer.T + intercepts)), truth, atol=1e-3)


def test_many_rows_are_fitted_in_single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    x, truth = features_and_classes(3)
    double = softmax_layer(fit_logistic(x, truth, 0.1))
    monkeypatch.setattr(linear, "_FEW_ROWS", 10)
    single = softmax_layer(fit_logistic(x, truth, 0.1))
    found, expected = (np.exp(log_softmax(x @ weights.T + intercepts)) for weights, intercepts in (single, double))
    assert not np.array_equal(found, expected)
    np.testing.assert_allclose(found, expected, atol=5e-3)
