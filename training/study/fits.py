"""Power laws with error bars: how a loss falls with the number of labelled galaxies.

Intervals hold 68% and come from draws of the whole curve that vary what could have been otherwise:

- the galaxies of the test set, by the Poisson bootstrap (`resampled_means`), the same draws for every cell, so that
  differences between cells keep what they share;
- the seeds, which decide subset, first weights and order, by a multivariate t of as many degrees of freedom as there
  are seeds less one (`curve_draws`). A plain bootstrap of three seeds gives intervals that are too short by a half.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

LEVEL: Final = 0.68
RESAMPLES: Final = 200
EXPONENTS: Final = (0.01, 4.0)
"""Where exponents are looked for. Below, a law is a constant within a few per cent over two decades; above, a step."""

_SURE: Final = 0.975
_GRID: Final = np.geomspace(*EXPONENTS, 300)

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A number and the ends of its 68% interval; NaN ends where nothing says how far it could vary."""

    value: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        spec = spec or ".3g"
        ends = f" ({self.low:{spec}} to {self.high:{spec}})" if np.isfinite([self.low, self.high]).all() else ""
        return f"{self.value:{spec}}{ends}"

    def __str__(self) -> str:
        return format(self)


@dataclass(frozen=True)
class PowerLaw:
    """L(N) = floor + scale * N**-exponent.

    Attributes
    ----------
    floor : Estimate or None
        Loss at any amount of data, in the loss's unit; None in a law without one.
    scale : Estimate
        In the loss's unit, at N = 1.
    exponent : Estimate
    per_doubling : Estimate
        Part of the loss above the floor that twice the data takes away, ``1 - 2**-exponent``.
    misfit : float
        Root mean square of the points' residuals, as part of the loss.
    constrained : bool
        False where the data do not tell the exponent: in fewer than 39 of 40 draws does the loss fall, or (with a
        floor) the interval ends at an end of `EXPONENTS`.
    """

    floor: Estimate | None
    scale: Estimate
    exponent: Estimate
    per_doubling: Estimate
    misfit: float
    constrained: bool

    def __call__(self, sizes: Floats) -> Floats:
        """Return the loss at some sizes."""
        return (self.floor.value if self.floor else 0.0) + self.scale.value * sizes**-self.exponent.value

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as JSON holds them, NaN as None."""
        numbers = {"floor": self.floor, "scale": self.scale, "exponent": self.exponent}
        numbers["per_doubling"] = self.per_doubling
        found: dict[str, Any] = {name: to_json(value) for name, value in numbers.items() if value}
        return found | {"misfit": self.misfit, "constrained": self.constrained}


def to_json(estimate: Estimate) -> dict[str, float | None]:
    """Return an estimate as JSON holds it, NaN as None."""
    ends = {"value": estimate.value, "low": estimate.low, "high": estimate.high}
    return {name: float(number) if np.isfinite(number) else None for name, number in ends.items()}


def estimate(value: float, draws: Floats) -> Estimate:
    """Return a value with the central 68% of its draws, NaN ends where no draw is finite."""
    found = draws[np.isfinite(draws)]
    if not len(found):
        return Estimate(float(value), float("nan"), float("nan"))
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(value), float(low), float(high))


def resampled_means(values: Floats, where: NDArray[np.bool_], seed: int = 0) -> Floats:
    """Return means over galaxies under the Poisson bootstrap.

    Parameters
    ----------
    values : ndarray, shape (n, k)
    where : ndarray, shape (n, k), bool
        Which values count.
    seed : int

    Returns
    -------
    ndarray, shape (RESAMPLES, k)
        Draw i gives galaxy j the same weight in every call with the same `seed` and n. NaN where none counts.

    References
    ----------
    Each weight is a Poisson number of mean 1: Hanley & MacGibbon 2006, Comput. Methods Programs Biomed. 83, 57.
    """
    weights = poisson_weights(len(values), seed)
    total = weights @ where.astype(np.float32)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (weights @ np.where(where, values, 0.0).astype(np.float32) / total).astype(np.float64)


def poisson_weights(count: int, seed: int = 0) -> NDArray[np.float32]:
    """Return the weights of the Poisson bootstrap, shape (RESAMPLES, count); see `resampled_means`."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.poisson(1.0, count).astype(np.float32) for _ in range(RESAMPLES)])


def curve_draws(values: Floats, resampled: Floats, seed: int = 0) -> Floats:
    r"""Return draws of the mean over seeds of a curve.

    With residuals :math:`r_s` of S seeds about their mean m, a draw is

    .. math:: m_k + \sqrt{\frac{\nu}{\chi^2_\nu}} \sum_s \frac{g_s r_s}{\sqrt{S (S - 1)}},\quad \nu = S - 1

    with standard normal g and the mean :math:`m_k` of resample k: a multivariate t about the mean with the seeds' own
    covariance, which keeps that one seed's subsets are nested. For any linear function of the curve and normal seeds
    it has exact coverage, since such a mean over its standard error is Student's t.

    Parameters
    ----------
    values : ndarray, shape (seed, ...)
    resampled : ndarray, shape (seed, RESAMPLES, ...)
        The same under the bootstrap over galaxies.
    seed : int

    Returns
    -------
    ndarray, shape (RESAMPLES, ...)
        With one seed, its resamples alone.
    """
    count = len(values)
    draws: Floats = resampled.mean(axis=0)
    if count < 2:
        return draws
    rng = np.random.default_rng(seed)
    residuals = values - values.mean(axis=0)
    stretch = np.sqrt((count - 1) / rng.chisquare(count - 1, RESAMPLES))
    factors = rng.normal(size=(RESAMPLES, count)) * stretch[:, None] / np.sqrt(count * (count - 1))
    return np.asarray(draws + np.tensordot(factors, residuals, axes=1))


def fit_pure(sizes: Floats, losses: Floats) -> tuple[Floats, Floats]:
    """Fit L = scale * N**-exponent by least squares of ln L.

    Parameters
    ----------
    sizes : ndarray, shape (size,)
    losses : ndarray, shape (..., size)
        Positive.

    Returns
    -------
    scale, exponent : ndarray, shape (...)
    """
    x = np.log(sizes)
    y = np.log(losses)
    slope = ((x - x.mean()) * y).sum(axis=-1) / ((x - x.mean()) ** 2).sum()
    return np.exp(y.mean(axis=-1) - slope * x.mean()), -slope


def fit_floored(sizes: Floats, losses: Floats) -> tuple[Floats, Floats, Floats]:
    """Fit L = floor + scale * N**-exponent by least squares of the relative residual, scale >= 0.

    The floor may come out below 0, where a loss cannot be: bound there, the intervals of a law without a floor would
    miss its exponent most of the time. An interval that reaches 0 says that no floor is needed.

    For a given exponent the other two are linear and solved for; the exponent is looked for on a grid over `EXPONENTS`
    and refined by a parabola through the three best points.

    Parameters
    ----------
    sizes : ndarray, shape (size,)
        Four different ones at least.
    losses : ndarray, shape (..., size)
        Positive.

    Returns
    -------
    floor, scale, exponent : ndarray, shape (...)
    """
    middle = np.exp(np.log(sizes).mean())
    shapes = (sizes / middle) ** -_GRID[:, None]  # (exponent, size)
    _, _, misfit = _linear(shapes, losses[..., None, :])  # (..., exponent)
    best = misfit.argmin(axis=-1)
    inner = best.clip(1, len(_GRID) - 2)
    left, here, right = (np.take_along_axis(misfit, (inner + i)[..., None], -1)[..., 0] for i in (-1, 0, 1))
    with np.errstate(invalid="ignore", divide="ignore"):
        shift = np.nan_to_num(0.5 * (left - right) / (left - 2 * here + right)).clip(-0.5, 0.5)
    step = np.log(_GRID[1] / _GRID[0])
    exponent = np.where(best == inner, _GRID[inner] * np.exp(shift * step), _GRID[best])
    floor, scale, _ = _linear((sizes / middle) ** -exponent[..., None], losses)
    return floor, scale * middle**exponent, exponent


def _linear(shapes: Floats, losses: Floats) -> tuple[Floats, Floats, Floats]:
    """Return floor, and scale >= 0, of losses = floor + scale * shapes, and the squared relative residuals."""
    u, v = np.broadcast_arrays(1 / losses, shapes / losses)
    uu, uv, vv, u1, v1 = (a.sum(axis=-1) for a in (u * u, u * v, v * v, u, v))
    with np.errstate(invalid="ignore", divide="ignore"):
        determinant = uu * vv - uv**2
        floor, scale = (u1 * vv - v1 * uv) / determinant, (v1 * uu - u1 * uv) / determinant
    falls = np.isfinite(scale) & (scale >= 0)
    floor, scale = np.where(falls, floor, u1 / uu), np.where(falls, scale, 0.0)
    misfit = ((1 - floor[..., None] * u - scale[..., None] * v) ** 2).sum(axis=-1)
    return floor, scale, misfit


def power_law(sizes: Floats, losses: Floats, draws: Floats, *, floored: bool) -> PowerLaw | None:
    """Return the power law of a curve with intervals.

    Parameters
    ----------
    sizes : ndarray, shape (size,)
        Numbers of labelled galaxies.
    losses : ndarray, shape (size,)
    draws : ndarray, shape (draw, size)
        See `curve_draws`.
    floored : bool
        With a floor, or a straight line in the log-log plot.

    Returns
    -------
    PowerLaw or None
        None where there are too few sizes (two, or with a floor four), or a loss is not positive.
    """
    usable = draws[(np.isfinite(draws) & (draws > 0)).all(axis=1)]
    positive = (np.isfinite(losses) & (losses > 0)).all() and len(usable)
    if len(np.unique(sizes)) < (4 if floored else 2) or not positive:
        return None
    if floored:
        (floor, scale, exponent), (floors, scales, exponents) = fit_floored(sizes, losses), fit_floored(sizes, usable)
    else:
        (scale, exponent), (scales, exponents) = fit_pure(sizes, losses), fit_pure(sizes, usable)
    fitted = (floor if floored else 0.0) + scale * sizes**-exponent
    found, falls = estimate(float(exponent), exponents), np.mean((scales > 0) & (exponents > 0))
    inside = not floored or EXPONENTS[0] * 1.05 < found.low <= found.high < EXPONENTS[1] / 1.05
    return PowerLaw(
        estimate(float(floor), floors) if floored else None,
        estimate(float(scale), scales),
        found,
        estimate(1 - 2 ** -float(exponent), 1 - 2**-exponents),
        float(np.sqrt(np.mean((losses / fitted - 1) ** 2))),
        bool(inside and falls >= _SURE),
    )


def band(sizes: Floats, draws: Floats, at: Floats, *, floored: bool) -> tuple[Floats, Floats]:
    """Return the ends of a law's 68% band at the sizes `at`; arguments are those of `power_law`."""
    usable = draws[(np.isfinite(draws) & (draws > 0)).all(axis=1)]
    if floored:
        floors, scales, exponents = fit_floored(sizes, usable)
    else:
        scales, exponents = fit_pure(sizes, usable)
        floors = np.zeros_like(scales)
    curves = floors[:, None] + scales[:, None] * at ** -exponents[:, None]
    low, high = np.quantile(curves, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return low, high


def describe(law: PowerLaw | None, sizes: int) -> str:
    """Return a law's exponent as a table's cell; says why where there is none or the data do not tell it."""
    if law is None:
        return f"not fitted ({sizes} sizes)" if sizes < 4 else "not fitted (losses not positive)"
    if law.floor is None or law.constrained:
        return str(law.exponent)
    return f"not constrained ({law.exponent.low:.2g} to {law.exponent.high:.2g})"
