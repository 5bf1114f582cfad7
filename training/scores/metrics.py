"""How well predicted votes fit counted ones: likelihood, fractions, calibration, accuracy, and volunteers beside them.

All functions take one question at a time, as arrays ``votes`` (galaxy, answer) of counts >= 0, and ``concentrations``
(galaxy, answer) of the Dirichlet distribution that a network predicts, or ``predicted`` (galaxy, answer) of fractions.
Counts need not be whole; a galaxy whose votes sum to 0 was not asked, and counts nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.special import betaln, digamma, gammaln, ndtri

LEAST_VOTES: Final = 20
"""Galaxies with fewer votes on a question are left out of what compares fractions; Zoobot's rule."""

AGREEMENT: Final = 0.8
"""Share of the votes on one answer from which on volunteers agree."""

BINS: Final = 10
"""Of reliability and PIT histograms."""

_CONCENTRATIONS: Final = (1e-3, 1e4)
_DRAWS: Final = 500
_FEWEST: Final = 10  # galaxies that a bootstrap over them needs to say anything
_LEAST: Final = 1e-9  # what a softmax in single precision may call 0

Floats = NDArray[np.float64]


def predicted_fractions(concentrations: ArrayLike) -> Floats:
    """Return the expected vote fractions (galaxy, answer) of Dirichlet concentrations."""
    a = np.asarray(concentrations, np.float64)
    return np.asarray(a / a.sum(axis=1, keepdims=True))


def counted_fractions(votes: ArrayLike) -> Floats:
    """Return vote fractions (galaxy, answer); NaN where nobody was asked."""
    k = np.asarray(votes, np.float64)
    total = k.sum(axis=1, keepdims=True)
    return np.asarray(np.divide(k, total, out=np.full(k.shape, np.nan), where=total > 0))


def enough_votes(votes: ArrayLike, least: int = LEAST_VOTES) -> NDArray[np.bool_]:
    """Return which galaxies have `least` votes, rounded: expected counts come from fractions that may sum to 0.999."""
    return np.asarray(np.rint(np.asarray(votes, np.float64).sum(axis=1)) >= max(least, 1))


# ------------------------------------------------------------------------------------------------------ likelihood


def vote_nll(votes: ArrayLike, concentrations: ArrayLike) -> Floats:
    """Return the Dirichlet-multinomial negative log-likelihood of each galaxy's votes, in nats.

    Parameters
    ----------
    votes : array_like, shape (galaxy, answer)
    concentrations : array_like, shape (galaxy, answer) or (answer,)
        Below 1e-9 they are taken for that.

    Returns
    -------
    ndarray, shape (galaxy,), float64
        With the multinomial coefficient; 0 where nobody was asked.

    References
    ----------
    `training.loss.dirichlet_multinomial_nll` has the formula.
    """
    k, a = np.broadcast_arrays(np.asarray(votes, np.float64), np.maximum(concentrations, _LEAST))
    total, strength = k.sum(axis=1), a.sum(axis=1)
    normal = gammaln(total + 1) + gammaln(strength) - gammaln(total + strength)
    return np.asarray(-normal - (gammaln(k + a) - gammaln(k + 1) - gammaln(a)).sum(axis=1))


def constant_concentrations(votes: ArrayLike) -> Floats:
    """Return the one Dirichlet distribution under which all votes together are likeliest.

    What a network that sees nothing could best answer, in hindsight: the baseline of `vote_nll`.

    Parameters
    ----------
    votes : array_like, shape (galaxy, answer)

    Returns
    -------
    ndarray, shape (answer,), float64
        Between 0.001 and 10,000, within which the maximum is searched; ones where nobody was asked.
    """
    k = np.asarray(votes, np.float64)
    k = k[k.sum(axis=1) > 0]
    if not len(k):
        return np.ones(k.shape[1])
    # The likelihood is a sum over answers, so it needs how often each count occurs, not who has which.
    tallies = [np.unique(column, return_counts=True) for column in (*k.T, k.sum(axis=1))]

    def loss(log_a: Floats) -> tuple[float, Floats]:
        a = np.exp(log_a)
        strengths = [*a, a.sum()]
        value = np.array(
            [np.sum(n * (gammaln(v + s) - gammaln(s))) for (v, n), s in zip(tallies, strengths, strict=True)]
        )
        slope = np.array(
            [np.sum(n * (digamma(v + s) - digamma(s))) for (v, n), s in zip(tallies, strengths, strict=True)]
        )
        return float(value[-1] - value[:-1].sum()) / len(k), a * (slope[-1] - slope[:-1]) / len(k)

    start = np.log(10 * k.sum(axis=0) / k.sum() + 0.01)
    bounds = [tuple(np.log(_CONCENTRATIONS))] * k.shape[1]
    return np.asarray(np.exp(minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds).x))


# ------------------------------------------------------------------------------------------------------- fractions


@dataclass(frozen=True)
class FractionErrors:
    """Predicted minus counted vote fractions, per answer.

    Attributes
    ----------
    galaxies : int
        With enough votes; where 0, the rest is NaN.
    mse, mae, bias : ndarray, shape (answer,), float64
        Means over galaxies of the squared, absolute and signed difference.
    """

    galaxies: int
    mse: Floats
    mae: Floats
    bias: Floats


def fraction_errors(predicted: ArrayLike, votes: ArrayLike, least: int = LEAST_VOTES) -> FractionErrors:
    """Compare fractions with those of galaxies that have at least `least` votes.

    Parameters
    ----------
    predicted : array_like, shape (galaxy, answer) or (answer,)
    votes : array_like, shape (galaxy, answer)
    least : int

    References
    ----------
    The rule and the mean absolute deviation beside the RMSE are those of gz-evo's baselines
    (github.com/mwalmsley/gz-evo, core/multinomial/metrics.py), which then average over answers without weights.
    """
    k = np.asarray(votes, np.float64)
    enough = enough_votes(k, least)
    if not enough.any():
        nothing = np.full(k.shape[1], np.nan)
        return FractionErrors(0, nothing, nothing, nothing)
    off = np.broadcast_to(np.asarray(predicted, np.float64), k.shape)[enough] - counted_fractions(k[enough])
    return FractionErrors(int(enough.sum()), (off**2).mean(axis=0), np.abs(off).mean(axis=0), off.mean(axis=0))


def fraction_rmse(predicted: ArrayLike, votes: ArrayLike, least: int = LEAST_VOTES) -> float:
    """Return the root of the mean over galaxies and answers of the squared error; see `fraction_errors`.

    NaN where no galaxy has enough votes.
    """
    return float(np.sqrt(fraction_errors(predicted, votes, least).mse.mean()))


def mean_fractions(votes: ArrayLike, least: int = LEAST_VOTES) -> Floats:
    """Return the mean vote fraction (answer,) over galaxies with enough votes: the constant of the least RMSE.

    NaN where there is none.
    """
    k = np.asarray(votes, np.float64)
    enough = enough_votes(k, least)
    return np.asarray(counted_fractions(k[enough]).mean(axis=0)) if enough.any() else np.full(k.shape[1], np.nan)


# ----------------------------------------------------------------------------------------------------- calibration


def count_cdf(votes: ArrayLike, concentrations: ArrayLike) -> tuple[Floats, Floats]:
    r"""Return where each count lies in its predictive distribution, given the galaxy's total.

    The votes of one answer against the rest are Beta-binomial, with a = its concentration and b = the others' sum:

    .. math:: P(k) = \binom{N}{k} \frac{B(k + a, N - k + b)}{B(a, b)}

    Parameters
    ----------
    votes, concentrations : array_like, shape (galaxy, answer)
        Counts are rounded to whole ones. Concentrations below 1e-9 are taken for that.

    Returns
    -------
    below, upto : ndarray, shape (galaxy, answer), float64
        P(fewer votes) and P(as many or fewer).

    References
    ----------
    The Beta-binomial is the Dirichlet-multinomial's marginal (Johnson, Kotz & Balakrishnan 1997, Discrete
    Multivariate Distributions, chapter 35).
    """
    k, a = np.rint(np.asarray(votes, np.float64)), np.maximum(np.asarray(concentrations, np.float64), _LEAST)
    total = np.rint(np.asarray(votes, np.float64).sum(axis=1, keepdims=True))
    total, b = np.broadcast_to(total, k.shape), np.maximum(a.sum(axis=1, keepdims=True) - a, _LEAST)
    log_mass = betaln(a, total + b) - betaln(a, b)
    below, at = np.zeros(k.shape), np.zeros(k.shape)
    for j in range(int(k.max(initial=0)) + 1):
        mass = np.exp(log_mass)
        below += np.where(j < k, mass, 0)
        at = np.where(j == k, mass, at)
        more = j < total
        log_mass = log_mass + np.log(
            np.where(more, (total - j) / (j + 1) * (a + j) / np.where(more, total - j - 1 + b, 1), 1)
        )
    return np.minimum(below, 1), np.minimum(below + at, 1)


def pit_mass(below: ArrayLike, upto: ArrayLike, low: float, high: float) -> Floats:
    """Return how much of each count's place in its predictive distribution lies between `low` and `high`.

    Counts are discrete, so no interval of them has a mass of exactly 50%. A randomised PIT value, uniform between
    P(fewer votes) and P(as many or fewer), is uniform on 0 to 1 if the predictions are true, and lies between `low`
    and `high` with a chance of exactly high - low. This is its expectation, so nothing is drawn.

    Parameters
    ----------
    below, upto : array_like, shape (galaxy, answer)
        Of `count_cdf`.
    low, high : float
        0 to 1.

    Returns
    -------
    ndarray, shape (galaxy, answer), float64
        0 to 1, on average high - low if the predictions are true.

    References
    ----------
    Czado, Gneiting & Held 2009, Biometrics 65, 1254 (doi:10.1111/j.1541-0420.2009.01191.x), section 2.1.
    """
    start, end = (np.asarray(values, np.float64) for values in (below, upto))
    width = np.maximum(end - start, 1e-12)
    return np.asarray(np.clip((high - start) / width, 0, 1) - np.clip((low - start) / width, 0, 1))


def coverage(below: ArrayLike, upto: ArrayLike, level: float) -> Floats:
    """Return how often each galaxy's counts lie in their central interval of probability `level`; see `pit_mass`.

    Returns
    -------
    ndarray, shape (galaxy, answer), float64
        0 to 1. On average more than `level`: the predictions are too wide; less: too narrow, or wrong.
    """
    return pit_mass(below, upto, (1 - level) / 2, (1 + level) / 2)


@dataclass(frozen=True)
class Reliability:
    """Counted against predicted fractions, all answers of a question together, in bins of the predicted one.

    Attributes
    ----------
    edges : ndarray, shape (bin + 1,), float64
    count : ndarray, shape (bin,), int64
        Galaxies times answers.
    predicted, observed : ndarray, shape (bin,), float64
        Mean fractions; NaN in an empty bin.
    error : ndarray, shape (bin,), float64
        Standard error of observed minus predicted; NaN where there are fewer than two.
    """

    edges: Floats
    count: NDArray[np.int64]
    predicted: Floats
    observed: Floats
    error: Floats


def reliability(predicted: ArrayLike, votes: ArrayLike, least: int = LEAST_VOTES, bins: int = BINS) -> Reliability:
    """Compare predicted and counted fractions in `bins` equal bins, over galaxies with at least `least` votes."""
    enough = enough_votes(votes, least)
    guess = np.asarray(predicted, np.float64)[enough].ravel()
    counted = counted_fractions(np.asarray(votes, np.float64)[enough]).ravel()
    at = np.minimum((guess * bins).astype(np.int64), bins - 1)
    count = np.bincount(at, minlength=bins)

    def mean(values: Floats) -> Floats:
        total = np.bincount(at, values, minlength=bins)
        return np.asarray(np.divide(total, count, out=np.full(bins, np.nan), where=count > 0))

    off = counted - guess
    spread = np.maximum(mean(off**2) - mean(off) ** 2, 0)
    error = np.sqrt(np.divide(spread, count - 1.0, out=np.full(bins, np.nan), where=count > 1))
    return Reliability(np.linspace(0, 1, bins + 1), count, mean(guess), mean(counted), error)


# -------------------------------------------------------------------------------------------------------- accuracy


@dataclass(frozen=True)
class Agreement:
    """How often the likeliest answer is the one that volunteers agree on.

    Attributes
    ----------
    galaxies : int
        On which volunteers agree; where 0, the rest is NaN.
    accuracy, low, high : float
        With its 95% Wilson interval.
    balanced : float
        Mean recall over the answers that are agreed on anywhere.
    commonest : float
        Share of the commonest of them: the accuracy of always giving it.
    """

    galaxies: int
    accuracy: float
    low: float
    high: float
    balanced: float
    commonest: float


def agreement(predicted: ArrayLike, votes: ArrayLike, least: int = LEAST_VOTES, share: float = AGREEMENT) -> Agreement:
    """Score galaxies with at least `least` votes, of which at least `share` are for one answer.

    Parameters
    ----------
    predicted, votes : array_like, shape (galaxy, answer)
    least : int
    share : float
        Above 0.5.
    """
    counted = counted_fractions(votes)
    agreed = enough_votes(votes, least) & (np.nan_to_num(counted).max(axis=1) >= share - 1e-6)
    nan = float("nan")
    if not agreed.any():
        return Agreement(0, nan, nan, nan, nan, nan)
    truth, guess = counted[agreed].argmax(axis=1), np.asarray(predicted)[agreed].argmax(axis=1)
    right = truth == guess
    low, high = wilson_interval(int(right.sum()), len(right))
    recalls = [right[truth == answer].mean() for answer in np.unique(truth)]
    commonest = float(np.bincount(truth).max() / len(truth))
    return Agreement(len(right), float(right.mean()), low, high, float(np.mean(recalls)), commonest)


def wilson_interval(successes: int, count: int, level: float = 0.95) -> tuple[float, float]:
    """Return the interval of a proportion that `successes` out of `count` > 0 tell.

    References
    ----------
    Wilson 1927, J. Am. Stat. Assoc. 22, 209 (doi:10.1080/01621459.1927.10502953).
    """
    z = float(ndtri((1 + level) / 2))
    share, more = successes / count, z**2 / count
    centre = (share + more / 2) / (1 + more)
    half = z / (1 + more) * np.sqrt(share * (1 - share) / count + more / (4 * count))
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


# ------------------------------------------------------------------------------------------------------ volunteers


def vote_variance(votes: ArrayLike) -> Floats:
    r"""Return the variance of a single vote, without bias, from the votes of each galaxy.

    With f the counted fraction of N votes and p the fraction that all volunteers there are would give,

    .. math:: s^2 = \frac{N}{N - 1} f (1 - f), \quad E[s^2] = p (1 - p).

    From it follow the expected squared errors of the fraction of k volunteers: :math:`s^2/k` from p; and, when the k
    are drawn from the N without replacement, :math:`s^2 (1/k + 1/(N - k))` from the fraction of the others, exactly
    (the variance of the hypergeometric distribution).

    Parameters
    ----------
    votes : array_like, shape (galaxy, answer)
        More than one vote each.

    Returns
    -------
    ndarray, shape (galaxy, answer), float64
    """
    f, total = counted_fractions(votes), np.asarray(votes, np.float64).sum(axis=1, keepdims=True)
    return np.asarray(f * (1 - f) * total / (total - 1))


@dataclass(frozen=True)
class Volunteers:
    """A prediction's error, freed of the noise of the votes it is compared with, and in volunteers.

    Attributes
    ----------
    galaxies : int
        With enough votes; where 0, the rest is NaN.
    mse, low, high : float
        Mean over galaxies and answers of the squared difference from the fraction that all volunteers there are would
        give, with its 95% interval (NaN for fewer than 10 galaxies). An estimate, which may be below 0.
    vote : float
        Mean variance of a single vote: k volunteers have a mean squared error of ``vote / k``.
    noise : float
        Mean squared error of the counted fractions themselves: what the best prediction there is would be given for
        its raw error.
    """

    galaxies: int
    mse: float
    low: float
    high: float
    vote: float
    noise: float

    @property
    def as_good_as(self) -> tuple[float, float, float]:
        """Number of volunteers whose fraction has the same error, and its interval; infinite where no error is seen."""
        if not self.vote > 0:
            return float("nan"), float("nan"), float("nan")
        number, low, high = (
            self.vote / mse if mse > 0 else mse if np.isnan(mse) else np.inf for mse in (self.mse, self.high, self.low)
        )
        return number, low, high

    def error_of(self, count: float) -> float:
        """Return the expected RMSE of the vote fraction of `count` volunteers."""
        return float(np.sqrt(self.vote / count))


def volunteers(predicted: ArrayLike, votes: ArrayLike, least: int = LEAST_VOTES, *, seed: int = 0) -> Volunteers:
    r"""Say how many volunteers a prediction is worth.

    Counted fractions f are themselves noisy: with N votes their variance is p(1 - p)/N, so even p, the fraction that
    all volunteers there are would give, has an error when compared with them. A prediction q made without these votes
    has, with `vote_variance`'s s^2,

    .. math:: E[(q - f)^2] = (q - p)^2 + p (1 - p) / N
        \quad\Rightarrow\quad (q - p)^2 \approx (q - f)^2 - s^2 / N,

    without bias. The fraction of k other volunteers has an error of s^2/k on the same scale. The prediction is as good
    as the k for which the means over galaxies and answers are equal. A prediction fitted to these very votes has
    learnt some of their noise, and seems better than it is.

    Parameters
    ----------
    predicted : array_like, shape (galaxy, answer) or (answer,)
    votes : array_like, shape (galaxy, answer)
    least : int
        At least 2 votes are asked for.
    seed : int
        Of the bootstrap over galaxies that gives the interval.
    """
    enough = enough_votes(votes, max(least, 2))
    nan = float("nan")
    if not enough.any():
        return Volunteers(0, nan, nan, nan, nan, nan)
    k = np.asarray(votes, np.float64)
    q = np.broadcast_to(np.asarray(predicted, np.float64), k.shape)[enough]
    k = k[enough]
    variance = vote_variance(k)
    noise = variance / k.sum(axis=1, keepdims=True)
    squared = ((q - counted_fractions(k)) ** 2 - noise).mean(axis=1)
    one = variance.mean(axis=1)
    low, high = _ratio_interval(squared, one, seed)
    vote = float(one.mean())
    return Volunteers(len(k), float(squared.mean()), low * vote, high * vote, vote, float(noise.mean()))


def _ratio_interval(above: Floats, below: Floats, seed: int) -> tuple[float, float]:
    """Return the 95% interval of mean(above) / mean(below) over bootstrap samples.

    NaN where `below` is all zero, or there are too few.
    """
    if not below.any() or len(below) < _FEWEST:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    ratios = []
    for _ in range(_DRAWS):
        chosen = rng.integers(len(above), size=len(above))
        ratios.append(above[chosen].sum() / max(below[chosen].sum(), 1e-12))
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(low), float(high)


# ---------------------------------------------------------------------------------------------------------- values


@dataclass(frozen=True)
class ValueErrors:
    """Predicted minus given numbers, in the numbers' own unit.

    Attributes
    ----------
    galaxies : int
        With a number; where 0, the rest is NaN.
    rmse, mae, bias : float
    rmse_constant : float
        RMSE of the mean: the standard deviation of the given numbers.
    r2 : float
        1 - (rmse / rmse_constant)^2, the share of the variance that is explained; NaN where all numbers are equal.
    """

    galaxies: int
    rmse: float
    mae: float
    bias: float
    rmse_constant: float
    r2: float


def value_errors(predicted: ArrayLike, values: ArrayLike) -> ValueErrors:
    """Compare predicted numbers (galaxy,) with given ones (galaxy,), where NaN means that none is given."""
    given: NDArray[Any] = np.asarray(values, np.float64)
    there = np.isfinite(given)
    if not there.any():
        return ValueErrors(0, *(float("nan"),) * 5)
    off = np.asarray(predicted, np.float64)[there] - given[there]
    rmse, spread = float(np.sqrt(np.mean(off**2))), float(given[there].std())
    r2 = 1 - (rmse / spread) ** 2 if spread > 0 else float("nan")
    return ValueErrors(int(there.sum()), rmse, float(np.abs(off).mean()), float(off.mean()), spread, r2)
