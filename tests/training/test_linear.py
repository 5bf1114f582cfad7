from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import digamma
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from galembed.backbones import FieldOfView, InputContract
from galembed.linear import fit_logistic
from galembed.mappings import LEGACY_DR2
from galembed.network import GalaxyNetwork
from galembed.questions import Question, QuestionTree
from training.linear import (
    CLASS_STRENGTHS,
    LinearHead,
    class_weights,
    fit_classes,
    fit_head,
    fit_number,
    target_scale,
)

CONTRACT = InputContract(32, FieldOfView(9.0, 8.0, 90.0), LEGACY_DR2)


def network_of(*questions: Question) -> GalaxyNetwork:
    return GalaxyNetwork.for_contract("test_convnext", {}, CONTRACT, QuestionTree("t", "", questions)).eval()


def features(count: int, dim: int, seed: int = 0) -> np.ndarray:
    """Features of unlike scales and offsets, as an encoder's are."""
    rng = np.random.default_rng(seed)
    scale = 10 ** rng.uniform(-2, 2, dim)
    return (scale * (rng.normal(size=(count, dim)) + rng.normal(0, 3, dim))).astype(np.float32)


def loaded(network: GalaxyNetwork, head: LinearHead) -> GalaxyNetwork:
    network.load_state_dict({key: torch.from_numpy(value) for key, value in head.state().items()}, strict=False)
    return network


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("balance", [True, False])
def test_a_head_of_classes_predicts_what_scikit_learn_predicts(classes: int, balance: bool) -> None:
    network = network_of(Question("kind", tuple("abcd"[:classes])))
    x = features(200, network.dim)
    truth = (x[:, :classes] / x[:, :classes].std(axis=0)).argmax(axis=1)
    truth[: 3 * classes] = np.tile(np.arange(classes), 3)
    head = fit_classes(x, truth, groups=np.arange(200), balance=balance, seed=0)
    with torch.inference_mode():
        predicted = loaded(network, head).predictions(torch.from_numpy(x)).numpy()
        one = network.predictions(torch.from_numpy(x[:1])).numpy()
        concentrations = network.concentrations(torch.from_numpy(x)).numpy()
    expected = fit_logistic(x, truth, head.strength, balance=balance).predict_proba(x.astype(np.float64))
    np.testing.assert_allclose(predicted, expected, atol=1e-5)
    np.testing.assert_allclose(one, expected[:1], atol=1e-5)
    np.testing.assert_allclose(concentrations, predicted, rtol=1e-6)


def test_a_head_of_a_number_predicts_what_a_ridge_does_in_the_labels_unit() -> None:
    network = network_of(Question("mass", ("value",), kind="value", unit="solMass"))
    x = features(150, network.dim)
    numbers = (1e10 * (3 + x[:, 0] / x[:, 0].std())).astype(np.float32)
    head = fit_number(x, numbers, groups=np.arange(150), seed=0)
    scaler = StandardScaler().fit(x.astype(np.float64))
    ridge = Ridge(head.strength).fit(scaler.transform(x), numbers.astype(np.float64))
    with torch.inference_mode():
        predicted = loaded(network, head).predictions(torch.from_numpy(x)).numpy()[:, 0]
        one = network.predictions(torch.from_numpy(x[:1])).numpy()
    np.testing.assert_allclose(predicted, ridge.predict(scaler.transform(x)), rtol=1e-4)
    np.testing.assert_allclose(one, predicted[:1, None], rtol=1e-6)


def test_votes_without_a_clue_get_the_likeliest_dirichlet() -> None:
    network = network_of(Question("ring", ("yes", "no", "maybe")))
    x = np.tile(features(1, network.dim), (400, 1))
    rng = np.random.default_rng(0)
    votes = np.array([rng.multinomial(30, p) for p in rng.dirichlet([4.0, 2.0, 1.0], 400)], np.float32)
    head = fit_head(network, x, votes, "votes", groups=np.arange(400))
    with torch.inference_mode():
        a = loaded(network, head).concentrations(torch.from_numpy(x[:1])).double().numpy()[0]
    gradient = digamma(votes + a) - digamma(a) - (digamma(30 + a.sum()) - digamma(a.sum()))
    np.testing.assert_allclose(gradient.mean(axis=0) * a, 0, atol=2e-4)
    np.testing.assert_allclose(a, [4, 2, 1], rtol=0.25)


def test_votes_and_a_number_are_fitted_together() -> None:
    network = network_of(Question("ring", ("yes", "no")), Question("size", ("value",), kind="value"))
    x = features(150, network.dim)
    signal = (x[:, 0] - x[:, 0].mean()) / x[:, 0].std()
    yes = np.random.default_rng(0).binomial(40, 1 / (1 + np.exp(-signal)))
    size = 100 + 5 * signal
    size[::3] = np.nan
    targets = np.stack([yes, 40 - yes, size], axis=1).astype(np.float32)
    head = fit_head(network, x, targets, "votes", groups=np.arange(150))
    with torch.inference_mode():
        predicted = loaded(network, head).predictions(torch.from_numpy(x)).numpy()
    assert np.corrcoef(predicted[:, 0], signal)[0, 1] > 0.95
    assert np.sqrt(np.mean((predicted[:, 2] - 100 - 5 * signal) ** 2)) < 0.3 * 5  # a constant answer is off by 5


def test_a_scaled_head_gives_other_units() -> None:
    head = LinearHead(np.ones((2, 3)), np.array([1.0, 2.0]), np.zeros((0, 3)), np.zeros(0), 1.0)
    x = np.array([1.0, 2.0, 3.0])
    mean, std = np.array([0.0, 10.0]), np.array([1.0, 4.0])
    scaled = head.scaled(mean, std)
    np.testing.assert_allclose(scaled.weight @ x + scaled.bias, mean + std * (head.weight @ x + head.bias))
    back = scaled.scaled(-mean / std, 1 / std)
    np.testing.assert_allclose(back.weight @ x + back.bias, head.weight @ x + head.bias)


def test_only_columns_of_numbers_have_a_scale() -> None:
    targets = np.array([[1, 10, 7], [3, 30, 7], [5, np.nan, 7]], np.float32)
    mean, std = target_scale(targets, np.array([False, True, True]))
    np.testing.assert_allclose(mean, [0, 20, 7])
    np.testing.assert_allclose(std, [1, 10, 1])


def test_balanced_weights_give_every_class_the_same_sum() -> None:
    classes = np.array([0] * 6 + [1] * 3 + [2])
    weights = class_weights(classes)
    np.testing.assert_allclose(np.bincount(classes, weights=weights), 10 / 3)
    assert weights.mean() == pytest.approx(1)


def test_a_class_with_one_member_is_learnt() -> None:
    x = features(40, 4)
    truth = np.array([0] * 20 + [1] * 19 + [2])
    head = fit_classes(x, truth, groups=np.arange(40), balance=True, seed=0)
    assert head.bias.shape == (3,)
    assert head.strength in CLASS_STRENGTHS


def test_two_numbers_are_enough_for_a_head() -> None:
    head = fit_number(features(2, 4), np.array([1.0, 3.0], np.float32), groups=np.zeros(2, np.int64), seed=0)
    assert np.isfinite(head.weight).all()


def test_noise_is_held_back_more_than_signal() -> None:
    x = features(120, 40)
    noise = np.random.default_rng(5).integers(0, 2, 120)
    clear = (x[:, 0] > np.median(x[:, 0])).astype(np.intp)
    strengths = [fit_classes(x, y, groups=np.arange(120), balance=True, seed=0).strength for y in (noise, clear)]
    assert strengths[0] < strengths[1]
