"""What the numbers of an evaluation say where the truth is known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import betabinom, binom, binomtest, dirichlet_multinomial, hypergeom

from training.loss import dirichlet_multinomial_nll
from training.scores.metrics import (
    agreement,
    constant_concentrations,
    count_cdf,
    counted_fractions,
    coverage,
    fraction_errors,
    fraction_rmse,
    mean_fractions,
    pit_mass,
    predicted_fractions,
    reliability,
    value_errors,
    volunteers,
    vote_nll,
    vote_variance,
    wilson_interval,
)


def drawn_votes(
    rng: np.random.Generator, galaxies: int, low: int = 20, high: int = 45
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return concentrations, the true fractions drawn from them, and votes drawn from those."""
    concentrations = rng.gamma(1.5, 2.0, (galaxies, 3)) + 0.05
    fractions = np.array([rng.dirichlet(a) for a in concentrations])
    votes = rng.multinomial(rng.integers(low, high, galaxies), fractions)
    return concentrations, fractions, votes


def test_the_likelihood_is_that_of_the_loss_and_of_scipy() -> None:
    rng = np.random.default_rng(0)
    concentrations, _, votes = drawn_votes(rng, 40, low=0)
    ours = vote_nll(votes, concentrations)
    scipy = [-dirichlet_multinomial.logpmf(k, a, k.sum()) for k, a in zip(votes, concentrations, strict=True)]
    np.testing.assert_allclose(ours, scipy, rtol=1e-9, atol=1e-9)
    loss = dirichlet_multinomial_nll(torch.tensor(votes), torch.tensor(concentrations), [3])
    np.testing.assert_allclose(ours, loss[:, 0].numpy(), rtol=1e-9, atol=1e-9)


def test_the_constant_answer_finds_the_dirichlet_that_drew_the_votes() -> None:
    rng = np.random.default_rng(1)
    truth = np.array([4.0, 1.5, 0.3])
    votes = rng.multinomial(40, rng.dirichlet(truth, 20_000))
    votes[:100] = 0
    found = constant_concentrations(votes)
    np.testing.assert_allclose(found, truth, rtol=0.05)
    best = vote_nll(votes, found).sum()
    for other in (truth, found * 1.05, found * [1.05, 1, 1], found * [1, 1, 0.95]):
        assert vote_nll(votes, other).sum() > best


def test_errors_of_fractions_by_hand() -> None:
    votes = np.array([[15.0, 5.0], [10.0, 30.0], [3.0, 1.0]])
    predicted = np.array([[0.65, 0.35], [0.55, 0.45], [0.0, 1.0]])  # off by -0.1 and 0.3; the third has too few votes
    errors = fraction_errors(predicted, votes)
    assert errors.galaxies == 2
    np.testing.assert_allclose(errors.mse, [0.05, 0.05])
    np.testing.assert_allclose(errors.mae, [0.2, 0.2])
    np.testing.assert_allclose(errors.bias, [0.1, -0.1])
    assert fraction_rmse(predicted, votes) == pytest.approx(np.sqrt(0.05))
    np.testing.assert_allclose(mean_fractions(votes), [0.5, 0.5])


def test_no_galaxy_with_enough_votes_is_nan() -> None:
    votes = np.array([[3.0, 1.0], [0.0, 0.0]])
    assert np.isnan(fraction_rmse(np.full((2, 2), 0.5), votes))
    assert np.isnan(mean_fractions(votes)).all()
    assert np.isnan(agreement(votes, votes).accuracy)
    assert np.isnan(volunteers(votes, votes).as_good_as).all()


def test_expected_counts_that_rounding_left_a_little_short_are_enough() -> None:
    assert fraction_errors([[0.5, 0.5]], [[19.98 * 0.25, 19.98 * 0.75]]).galaxies == 1
    assert fraction_errors([[0.5, 0.5]], [[19.0 * 0.25, 19.0 * 0.75]]).galaxies == 0


def test_the_count_distribution_is_scipys() -> None:
    rng = np.random.default_rng(2)
    concentrations, _, votes = drawn_votes(rng, 30, low=1)
    below, upto = count_cdf(votes, concentrations)
    total, rest = votes.sum(axis=1, keepdims=True), concentrations.sum(axis=1, keepdims=True) - concentrations
    np.testing.assert_allclose(upto, betabinom.cdf(votes, total, concentrations, rest), atol=1e-10)
    np.testing.assert_allclose(below, betabinom.cdf(votes - 1, total, concentrations, rest), atol=1e-10)


def test_the_count_distribution_is_finite_at_the_precision_limits() -> None:
    below, upto = count_cdf([[0, 300], [300, 0], [150, 150]], [[1e-3, 1e3], [1e3, 1e-3], [1e3, 1e3]])
    assert np.isfinite(below).all()
    np.testing.assert_allclose(upto[2] + below[2], [1, 1], atol=1e-9)  # symmetric
    assert ((below <= upto) & (upto <= 1)).all()


@pytest.mark.parametrize("level", [0.5, 0.9])
def test_coverage_is_nominal_where_the_prediction_is_the_truth(level: float) -> None:
    concentrations, _, votes = drawn_votes(np.random.default_rng(3), 20_000)
    found = coverage(*count_cdf(votes, concentrations), level)
    np.testing.assert_allclose(found.mean(axis=0), level, atol=0.012)
    assert (found >= 0).all()
    assert (found <= 1).all()


def test_coverage_tells_overconfidence_from_modesty() -> None:
    concentrations, _, votes = drawn_votes(np.random.default_rng(4), 4000)
    sure, shy = (coverage(*count_cdf(votes, concentrations * factor), 0.9).mean(axis=0) for factor in (20.0, 0.2))
    assert (sure < 0.85).all()
    assert (shy > 0.92).all()


def test_the_pit_is_flat_where_the_prediction_is_the_truth_and_high_at_the_ends_where_it_is_too_sure() -> None:
    concentrations, _, votes = drawn_votes(np.random.default_rng(5), 20_000)

    def histogram(factor: float) -> np.ndarray:
        below, upto = count_cdf(votes, concentrations * factor)
        return np.array([pit_mass(below, upto, i / 10, (i + 1) / 10).mean(axis=0) for i in range(10)])

    np.testing.assert_allclose(histogram(1).sum(axis=0), 1)
    np.testing.assert_allclose(histogram(1), 0.1, atol=0.01)
    assert (histogram(20)[[0, -1]] > 0.12).all()


def test_a_count_that_was_sure_to_come_is_spread_evenly() -> None:
    below, upto = count_cdf([[30, 0]], [[1e3, 0.0]])
    np.testing.assert_allclose(pit_mass(below, upto, 0.2, 0.5), 0.3, rtol=1e-6)
    assert vote_nll([[30, 0]], [[1e3, 0.0]])[0] == pytest.approx(0, abs=1e-6)


def test_reliability_lies_on_the_diagonal_within_its_errors_where_the_prediction_is_the_truth() -> None:
    concentrations, _, votes = drawn_votes(np.random.default_rng(6), 20_000)
    result = reliability(predicted_fractions(concentrations), votes)
    assert result.count.sum() == 60_000
    pull = (result.observed - result.predicted) / result.error
    assert np.abs(pull).max() < 4
    assert result.error.max() < 0.02


def test_reliability_shows_a_bias_and_leaves_empty_bins_empty() -> None:
    result = reliability(np.tile([0.85, 0.15], (50, 1)), np.tile([12, 8], (50, 1)))
    assert result.observed[8] == pytest.approx(0.6)
    assert result.predicted[8] == pytest.approx(0.85)
    assert result.count.tolist() == [0, 50, 0, 0, 0, 0, 0, 0, 50, 0]
    assert np.isnan(result.observed[0])


def test_accuracy_counts_only_galaxies_on_which_volunteers_agree() -> None:
    votes = np.array([[32, 8], [8, 32], [8, 32], [25, 15], [4, 1], [8, 32], [8, 32]])
    predicted = np.array([[0.6, 0.4], [0.1, 0.9], [0.7, 0.3], [0.1, 0.9], [0.1, 0.9], [0.2, 0.8], [0.2, 0.8]])
    result = agreement(predicted, votes)
    assert result.galaxies == 5
    assert result.accuracy == pytest.approx(4 / 5)
    assert result.balanced == pytest.approx((1 + 3 / 4) / 2)
    assert result.commonest == pytest.approx(4 / 5)


@pytest.mark.parametrize(("successes", "count"), [(0, 5), (3, 7), (99, 100), (12, 12)])
def test_the_wilson_interval_is_scipys(successes: int, count: int) -> None:
    expected = binomtest(successes, count).proportion_ci(0.95, method="wilson")
    assert wilson_interval(successes, count) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_the_variance_of_a_vote_gives_the_error_of_a_subsample_against_the_others_exactly() -> None:
    total, yes = 12, 7
    variance = float(vote_variance([[yes, total - yes]])[0, 0])
    for k in range(1, total):
        drawn = np.arange(max(0, k + yes - total), min(k, yes) + 1)
        chance = hypergeom.pmf(drawn, total, yes, k)
        squared = (drawn / k - (yes - drawn) / (total - k)) ** 2
        assert float(chance @ squared) == pytest.approx(variance * (1 / k + 1 / (total - k)))


def test_the_variance_of_a_vote_is_unbiased() -> None:
    p, total = 0.3, 6
    yes = np.arange(total + 1)
    expected = binom.pmf(yes, total, p) @ vote_variance(np.stack([yes, total - yes], axis=1))
    np.testing.assert_allclose(expected, p * (1 - p))


@pytest.mark.parametrize(("known", "galaxies"), [(3, 4000), (12, 4000), (40, 8000)])
def test_the_number_of_volunteers_found_is_the_number_put_in(known: int, galaxies: int) -> None:
    rng = np.random.default_rng(known)
    _, fractions, votes = drawn_votes(rng, galaxies)
    found, low, high = volunteers(rng.multinomial(known, fractions) / known, votes).as_good_as
    assert low < known < high
    assert found == pytest.approx(known, rel=0.1)
    assert high - low < 0.4 * known


def test_the_number_of_volunteers_does_not_depend_on_how_many_gave_the_reference() -> None:
    rng = np.random.default_rng(8)
    _, fractions, _ = drawn_votes(rng, 8000)
    predicted = rng.multinomial(10, fractions) / 10
    for reference in (20, 80):
        found, _, _ = volunteers(predicted, rng.multinomial(reference, fractions)).as_good_as
        assert found == pytest.approx(10, rel=0.08)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(9)
    inside = 0
    for _ in range(100):
        _, fractions, votes = drawn_votes(rng, 200)
        _, low, high = volunteers(rng.multinomial(8, fractions) / 8, votes).as_good_as
        inside += low <= 8 <= high
    assert 88 <= inside <= 99


def test_perfect_predictions_are_worth_more_volunteers_than_can_be_told() -> None:
    _, fractions, votes = drawn_votes(np.random.default_rng(10), 3000)
    result = volunteers(fractions, votes)
    _, low, high = result.as_good_as
    assert low > 300
    assert high == np.inf
    assert fraction_rmse(fractions, votes) ** 2 == pytest.approx(result.noise, rel=0.05)


def test_the_error_of_volunteers_falls_with_their_root() -> None:
    _, fractions, votes = drawn_votes(np.random.default_rng(11), 500)
    result = volunteers(fractions, votes)
    assert result.error_of(1) == pytest.approx(3 * result.error_of(9))
    at = (fractions * (1 - fractions)).mean()
    assert result.error_of(1) ** 2 == pytest.approx(at, rel=0.05)


def test_a_handful_of_galaxies_gives_a_number_without_an_interval() -> None:
    _, fractions, votes = drawn_votes(np.random.default_rng(13), 9)
    found, low, high = volunteers(fractions[::-1], votes).as_good_as
    assert found > 0
    assert np.isnan([low, high]).all()


def test_votes_that_never_differ_say_nothing_of_volunteers() -> None:
    assert np.isnan(volunteers(np.full((9, 2), 0.5), np.tile([30, 0], (9, 1))).as_good_as).all()


def test_counted_fractions_are_nan_where_nobody_was_asked() -> None:
    np.testing.assert_array_equal(counted_fractions([[0, 0], [1, 3]]), [[np.nan, np.nan], [0.25, 0.75]])


def test_values_by_hand_and_without_labels() -> None:
    given = np.array([1.0, 2.0, 3.0, np.nan])
    errors = value_errors(np.array([2.0, 2.0, 2.0, 7.0]), given)
    assert (errors.galaxies, errors.bias, errors.r2) == (3, 0, pytest.approx(0))
    assert errors.mae == pytest.approx(2 / 3)
    assert errors.rmse == pytest.approx(np.sqrt(2 / 3)) == errors.rmse_constant
    assert value_errors(given[:3], given[:3]).r2 == pytest.approx(1)
    assert np.isnan(value_errors(given[3:], given[3:]).rmse)
    assert np.isnan(value_errors(np.array([2.0, 3.0]), np.array([1.0, 1.0])).r2)


def test_every_function_of_a_question_ignores_galaxies_that_were_not_asked() -> None:
    concentrations, _, votes = drawn_votes(np.random.default_rng(12), 60)
    with_silent = np.concatenate([votes, np.zeros((30, 3))])
    more = np.concatenate([concentrations, np.ones((30, 3))])
    guess, more_guess = predicted_fractions(concentrations), predicted_fractions(more)
    assert fraction_rmse(guess, votes) == fraction_rmse(more_guess, with_silent)
    assert agreement(guess, votes) == agreement(more_guess, with_silent)
    assert volunteers(guess, votes) == volunteers(more_guess, with_silent)
    assert vote_nll(votes, concentrations).sum() == pytest.approx(vote_nll(with_silent, more).sum())
    np.testing.assert_allclose(constant_concentrations(votes), constant_concentrations(with_silent))
    for ours, theirs in itertools.zip_longest(
        vars(reliability(guess, votes)).values(), vars(reliability(more_guess, with_silent)).values()
    ):
        np.testing.assert_array_equal(ours, theirs)
