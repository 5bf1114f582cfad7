import itertools
from collections.abc import Sequence

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import dirichlet_multinomial

from galembed.mappings import LEGACY_DR2
from galembed.network import GalaxyNetwork
from training.loss import dirichlet_multinomial_nll, targets_nll

ANSWERS = (3, 2, 6)
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}

counts_met = st.one_of(st.just(0.0), st.integers(1, 10_000).map(float), st.floats(0.01, 1e4))
wild_concentrations = st.floats(-6, 6).map(lambda power: 10.0**power)


def nll(counts: np.ndarray, concentrations: np.ndarray, dtype: torch.dtype = torch.float64) -> np.ndarray:
    counts_, concentrations_ = (torch.tensor(values, dtype=dtype) for values in (counts, concentrations))
    return dirichlet_multinomial_nll(counts_, concentrations_, ANSWERS).numpy()


def scipy_nll(counts: np.ndarray, concentrations: np.ndarray) -> np.ndarray:
    edges = np.cumsum([0, *ANSWERS])
    return np.array(
        [
            [-dirichlet_multinomial.logpmf(k[a:b], alpha[a:b], int(k[a:b].sum())) for a, b in itertools.pairwise(edges)]
            for k, alpha in zip(counts, concentrations, strict=True)
        ]
    )


def exact(counts: Sequence[float], concentrations: Sequence[float]) -> tuple[float, np.ndarray]:
    """One question's negative log-likelihood and its gradient in the concentrations, from 50 digits."""
    with mpmath.workdps(50):
        k, a = list(map(mpmath.mpf, counts)), list(map(mpmath.mpf, concentrations))
        total, strength = sum(k), sum(a)
        value = mpmath.loggamma(total + strength) - mpmath.loggamma(total + 1) - mpmath.loggamma(strength)
        for votes, alpha in zip(k, a, strict=True):
            value += mpmath.loggamma(votes + 1) + mpmath.loggamma(alpha) - mpmath.loggamma(votes + alpha)
        common = mpmath.digamma(total + strength) - mpmath.digamma(strength)
        slopes = [common - mpmath.digamma(v + alpha) + mpmath.digamma(alpha) for v, alpha in zip(k, a, strict=True)]
        return float(value), np.array([float(slope) for slope in slopes])


def question(
    counts: Sequence[float], concentrations: Sequence[float], dtype: torch.dtype
) -> tuple[list[float], list[float], float, np.ndarray]:
    """Counts and concentrations as `dtype` has them, the loss and its gradient."""
    k = torch.tensor(np.array([counts]), dtype=dtype)
    a = torch.tensor(np.array([concentrations]), dtype=dtype, requires_grad=True)
    loss = dirichlet_multinomial_nll(k, a, [len(counts)])
    loss.sum().backward()
    assert a.grad is not None
    return k[0].tolist(), a.detach()[0].tolist(), float(loss.detach()), a.grad[0].numpy()


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCE.items())
def test_whole_counts_agree_with_scipy(dtype: torch.dtype, tolerance: float) -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 40, (50, 11)).astype(float)
    concentrations = (rng.gamma(2.0, 4.0, (50, 11)) + 0.05).astype(np.float32).astype(float)
    np.testing.assert_allclose(
        nll(counts, concentrations, dtype), scipy_nll(counts.astype(int), concentrations), rtol=tolerance
    )


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCE.items())
@settings(max_examples=200)
@given(data=st.data())
def test_any_counts_and_concentrations_agree_with_fifty_digits(
    dtype: torch.dtype, tolerance: float, data: st.DataObject
) -> None:
    answers = data.draw(st.integers(2, 6))
    counts, concentrations = (
        data.draw(st.lists(kind, min_size=answers, max_size=answers)) for kind in (counts_met, wild_concentrations)
    )
    k, a, loss, gradient = question(counts, concentrations, dtype)
    expected, _ = exact(k, a)
    if sum(k) == 0:
        assert loss == 0
        assert (gradient == 0).all()
    else:
        assert loss == pytest.approx(expected, rel=tolerance, abs=0)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCE.items())
@pytest.mark.parametrize("precision", [1e-3, 0.3, 10.0, 300.0, 1100.0])
def test_loss_and_gradient_of_what_training_meets(dtype: torch.dtype, tolerance: float, precision: float) -> None:
    rng = np.random.default_rng(1)
    for fractions in ([0.3, 0.7], [0.001, 0.999], [0.05, 0.25, 0.7], [0.4, 0.001, 0.3, 0.1, 0.1, 0.099]):
        for votes in (1, 5, 40):
            counts = rng.multinomial(votes, fractions).astype(float)
            k, a, loss, gradient = question(counts, precision * np.array(fractions), dtype)
            expected, slopes = exact(k, a)
            assert loss == pytest.approx(expected, rel=tolerance, abs=0)
            np.testing.assert_allclose(gradient * a, slopes * a, atol=tolerance * np.abs(slopes * a).max())


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_certainty_that_was_right_costs_exactly_little(dtype: torch.dtype) -> None:
    # One vote: P is the answer's share, so -ln P = ln(1 + 1e-6 / 1000).
    assert question([1, 0], [1000.0, 1e-6], dtype)[2] == pytest.approx(1e-9, rel=1e-6)


def test_the_gradient_is_that_of_the_loss() -> None:
    rng = np.random.default_rng(2)
    counts = torch.tensor(rng.integers(0, 12, (4, 11)).astype(float))
    counts[0, :3] = torch.tensor([7.0, 0.0, 0.0])
    counts[1, 3:5] = 0
    concentrations = torch.tensor(rng.gamma(1.0, 10.0, (4, 11)) + 0.1, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: dirichlet_multinomial_nll(counts, a, ANSWERS), concentrations)


def test_probabilities_of_all_outcomes_sum_to_one() -> None:
    outcomes = [k for k in itertools.product(range(8), repeat=3) if sum(k) == 7]
    losses = dirichlet_multinomial_nll(
        torch.tensor(outcomes), torch.tensor([0.2, 900.0, 31.0]).double().expand(len(outcomes), 3), [3]
    )
    assert float(torch.exp(-losses).sum()) == pytest.approx(1, rel=1e-12)


def test_a_question_without_votes_costs_nothing_and_teaches_nothing() -> None:
    counts = torch.zeros((2, 11), dtype=torch.float64)
    counts[:, :3] = 5
    concentrations = torch.full((2, 11), 2.0, dtype=torch.float64, requires_grad=True)
    losses = dirichlet_multinomial_nll(counts, concentrations, ANSWERS)
    assert (losses[:, 1:] == 0).all()
    losses.sum().backward()
    assert concentrations.grad is not None
    assert (concentrations.grad[:, 3:] == 0).all()
    assert (concentrations.grad[:, :3] != 0).any()


def test_half_precision_concentrations_are_computed_in_float32() -> None:
    counts = torch.full((1, 11), 30.0)
    losses = dirichlet_multinomial_nll(counts, torch.full((1, 11), 50.0, dtype=torch.bfloat16), ANSWERS)
    assert losses.dtype == torch.float32
    np.testing.assert_allclose(losses.numpy(), nll(counts.numpy(), np.full((1, 11), 50.0)), rtol=1e-4)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast_leaves_the_loss_alone(half: torch.dtype) -> None:
    rng = np.random.default_rng(3)
    counts = torch.tensor(rng.integers(0, 40, (20, 11)), dtype=torch.float32)
    concentrations = torch.tensor(rng.gamma(2.0, 40.0, (20, 11)), dtype=torch.float32)
    with torch.autocast("cpu", half):
        cast = dirichlet_multinomial_nll(counts, concentrations, ANSWERS)
    assert cast.dtype == torch.float32
    assert torch.equal(cast, dirichlet_multinomial_nll(counts, concentrations, ANSWERS))


def test_a_loss_first_taken_in_inference_mode_can_still_be_trained_on() -> None:
    counts, answers = torch.ones(2, 9), (4, 5)  # answers that no other test has
    with torch.inference_mode():
        first = dirichlet_multinomial_nll(counts, torch.ones(2, 9), answers)
    concentrations = torch.ones(2, 9, requires_grad=True)
    again = dirichlet_multinomial_nll(counts, concentrations, answers)
    again.sum().backward()
    assert torch.equal(first, again.detach())
    assert concentrations.grad is not None


def network(answers: tuple[int, ...], kinds: tuple[str, ...]) -> GalaxyNetwork:
    torch.manual_seed(0)
    return GalaxyNetwork(
        "test_convnext", {}, mapping=LEGACY_DR2, mean=(0, 0, 0), std=(1, 1, 1), answers=answers, kinds=kinds
    )


def test_targets_of_votes_cost_their_likelihood() -> None:
    net = network(ANSWERS, ("votes",) * 3)
    features, votes = torch.randn(5, net.dim), torch.randint(0, 20, (5, 11)).float()
    expected = dirichlet_multinomial_nll(votes, net.concentrations(features), ANSWERS)
    torch.testing.assert_close(targets_nll(net, features, votes), expected)


def test_targets_of_values_cost_half_the_squared_error_and_unlabelled_ones_nothing() -> None:
    net = network((3, 1, 2), ("votes", "value", "votes"))
    features = torch.randn(2, net.dim)
    targets = torch.tensor([[3.0, 1, 0, 2.5, 4, 4], [0, 0, 0, float("nan"), 0, 0]])
    losses = targets_nll(net, features, targets)
    predicted = net.predictions(features).detach()[0, 3]
    assert losses.shape == (2, 3)
    assert float(losses.detach()[0, 1]) == pytest.approx(0.5 * (float(predicted) - 2.5) ** 2)
    concentrations = net.concentrations(features)[:, [0, 1, 2, 4, 5]]
    votes = dirichlet_multinomial_nll(targets[:, [0, 1, 2, 4, 5]], concentrations, (3, 2))
    torch.testing.assert_close(losses[:, [0, 2]], votes)
    assert (losses[1] == 0).all()
    losses[1].sum().backward()
    assert net.head is not None
    assert (net.head.weight.grad == 0).all()
