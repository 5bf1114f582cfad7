import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import gammaln
from scipy.stats import dirichlet_multinomial

from training.loss import dirichlet_multinomial_nll

ANSWERS = (3, 2, 6)


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


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_whole_counts_agree_with_scipy(dtype: torch.dtype, tolerance: float) -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 40, (50, 11)).astype(float)
    concentrations = rng.gamma(2.0, 4.0, (50, 11)) + 0.05
    np.testing.assert_allclose(
        nll(counts, concentrations, dtype),
        scipy_nll(counts.astype(int), concentrations),
        rtol=tolerance,
        atol=tolerance,
    )


@settings(max_examples=50)
@given(st.lists(st.floats(0, 60), min_size=11, max_size=11))
def test_fractional_counts_follow_the_formula(counts: list[float]) -> None:
    k, a = np.array([counts]), np.full((1, 11), 1.7)
    expected = []
    for start, stop in ((0, 3), (3, 5), (5, 11)):
        kq, aq = k[0, start:stop], a[0, start:stop]
        expected.append(
            gammaln(kq.sum() + aq.sum())
            - gammaln(kq.sum() + 1)
            - gammaln(aq.sum())
            + (gammaln(kq + 1) + gammaln(aq) - gammaln(kq + aq)).sum()
        )
    np.testing.assert_allclose(nll(k, a)[0], expected, atol=1e-8)


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


def test_the_likelihood_is_highest_near_the_counted_fractions() -> None:
    counts = np.array([[8.0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0]])
    right = np.array([[8.0, 2, 0.1] + [1.0] * 8])
    wrong = np.array([[2.0, 8, 0.1] + [1.0] * 8])
    assert nll(counts, right)[0, 0] < nll(counts, wrong)[0, 0]


def test_half_precision_concentrations_are_computed_in_float32() -> None:
    counts = torch.full((1, 11), 30.0)
    losses = dirichlet_multinomial_nll(counts, torch.full((1, 11), 50.0, dtype=torch.bfloat16), ANSWERS)
    assert losses.dtype == torch.float32
    assert torch.isfinite(losses).all()
