"""Power laws of curves whose laws are known, and intervals that hold what they say."""

import numpy as np
import pytest
from scipy.optimize import curve_fit

from training.study.fits import (
    RESAMPLES,
    PowerLaw,
    band,
    curve_draws,
    describe,
    estimate,
    fit_floored,
    fit_pure,
    power_law,
    resampled_means,
)

SIZES = 250.0 * 2.0 ** np.arange(6)


def noisy(truth: np.ndarray, seeds: int, sigma: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return curves (seed, size) about the truth, and their draws, the test set having no part in it."""
    values = truth * np.exp(sigma * rng.normal(size=(seeds, len(truth))))
    return values, curve_draws(values, np.repeat(values[:, None], RESAMPLES, axis=1), seed=int(rng.integers(2**31)))


def law_of(truth: np.ndarray, sigma: float, *, floored: bool, seeds: int = 3) -> PowerLaw:
    values, draws = noisy(truth, seeds, sigma, np.random.default_rng(7))
    law = power_law(SIZES[: len(truth)], values.mean(axis=0), draws, floored=floored)
    assert law is not None
    return law


@pytest.mark.parametrize(("floor", "scale", "exponent"), [(10.0, 60.0, 0.5), (27.0, 300.0, 0.9), (0.0, 5.0, 0.08)])
def test_a_law_without_noise_is_found(floor: float, scale: float, exponent: float) -> None:
    found = fit_floored(SIZES, floor + scale * SIZES**-exponent)
    assert found[0] == pytest.approx(floor, abs=0.02)
    assert found[1] == pytest.approx(scale, rel=5e-3)
    assert found[2] == pytest.approx(exponent, rel=1e-3)


def test_a_pure_law_without_noise_is_found() -> None:
    scale, exponent = fit_pure(SIZES, 7 * SIZES**-0.2)
    assert (scale, exponent) == (pytest.approx(7), pytest.approx(0.2))


def test_the_fit_with_a_floor_is_scipys() -> None:
    rng = np.random.default_rng(3)
    losses = (10 + 60 * SIZES**-0.5) * np.exp(0.004 * rng.normal(size=(20, len(SIZES))))
    ours = np.stack(fit_floored(SIZES, losses), axis=1)
    for own, curve in zip(ours, losses, strict=True):
        law, _ = curve_fit(lambda n, c, a, b: c + a * n**-b, SIZES, curve, p0=(9, 50, 0.4), sigma=curve)
        np.testing.assert_allclose(own, law, rtol=5e-3)


@pytest.mark.parametrize(("floor", "floored"), [(10.0, True), (0.0, True), (10.0, False)])
def test_intervals_of_the_exponent_hold_the_truth_in_about_68_of_100(floor: float, floored: bool) -> None:
    truth = floor + (60 if floor else 20) * SIZES ** (-0.5 if floor else -0.1)
    exponent = (fit_floored(SIZES, truth)[2] if floored else fit_pure(SIZES, truth)[1]).item()
    rng = np.random.default_rng(11)
    held = 0
    for _ in range(200):
        values, draws = noisy(truth, 3, 0.004, rng)
        law = power_law(SIZES, values.mean(axis=0), draws, floored=floored)
        assert law is not None
        held += law.exponent.low <= exponent <= law.exponent.high
    assert 0.58 <= held / 200 <= 0.78  # 3 sigma of 200 trials


def test_a_loss_that_does_not_fall_constrains_no_exponent() -> None:
    law = law_of(np.full(6, 12.0), 0.005, floored=True)
    assert not law.constrained
    assert describe(law, 6).startswith("not constrained (")
    assert not law_of(np.full(6, 12.0), 0.005, floored=False).constrained


def test_little_noise_constrains_the_exponent() -> None:
    law = law_of(10 + 60 * SIZES**-0.5, 0.003, floored=True)
    assert law.constrained
    assert law.exponent.low < 0.5 < law.exponent.high
    assert law.floor is not None
    assert law.floor.low < 10 < law.floor.high
    assert law.per_doubling.value == pytest.approx(1 - 2**-law.exponent.value)
    assert law.misfit < 0.003


def test_the_misfit_of_a_straight_line_shows_the_floor() -> None:
    truth = 10 + 60 * SIZES**-0.9
    pure, floored = (law_of(truth, 1e-6, floored=choice).misfit for choice in (False, True))
    assert pure > 100 * floored


def test_three_sizes_are_too_few_for_a_floor() -> None:
    draws = np.ones((RESAMPLES, 3))
    assert power_law(SIZES[:3], np.ones(3), draws, floored=True) is None
    assert describe(None, 3) == "not fitted (3 sizes)"


def test_a_negative_loss_has_no_law() -> None:
    losses = np.array([1.0, 0.5, -0.1, 0.2])
    assert power_law(SIZES[:4], losses, np.tile(losses, (RESAMPLES, 1)), floored=False) is None


def test_the_bootstrap_over_galaxies_has_the_standard_error_of_a_mean() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, (4000, 1))
    where = np.arange(4000)[:, None] % 2 == 0
    means = resampled_means(values, where)
    assert means.shape == (RESAMPLES, 1)
    assert means.mean() == pytest.approx(values[where].mean(), abs=0.02)
    assert means.std() == pytest.approx(2.0 / np.sqrt(2000), rel=0.2)


def test_cells_share_the_draws_of_galaxies() -> None:
    values = np.random.default_rng(0).normal(size=(100, 1))
    where = np.ones((100, 1), bool)
    np.testing.assert_allclose(resampled_means(values + 5, where), resampled_means(values, where) + 5, rtol=1e-5)


def test_a_question_without_votes_has_no_mean() -> None:
    assert np.isnan(resampled_means(np.zeros((5, 1)), np.zeros((5, 1), bool))).all()


def test_the_spread_of_a_curves_draws_is_students() -> None:
    rng = np.random.default_rng(2)
    held = 0
    for trial in range(400):
        values = rng.normal(size=(3, 1))
        draws = curve_draws(values, np.repeat(values[:, None], RESAMPLES, axis=1), seed=trial)
        interval = estimate(float(values.mean()), draws[:, 0])
        held += interval.low <= 0 <= interval.high
    assert 0.61 <= held / 400 <= 0.75


def test_one_seed_leaves_the_galaxies_alone() -> None:
    resampled = np.random.default_rng(0).normal(size=(1, RESAMPLES, 4))
    np.testing.assert_array_equal(curve_draws(np.zeros((1, 4)), resampled), resampled[0])


def test_the_band_holds_the_curve_and_widens_beyond_the_data() -> None:
    values, draws = noisy(10 + 60 * SIZES**-0.5, 3, 0.004, np.random.default_rng(5))
    at = np.array([1000.0, 1e6])
    low, high = band(SIZES, draws, at, floored=True)
    assert low[0] < values.mean(axis=0)[2] < high[0]
    assert high[1] - low[1] > 2 * (high[0] - low[0])
