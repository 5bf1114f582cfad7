"""The likelihood of volunteers' votes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from galembed.network import GalaxyNetwork

_BINET: Final = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188)
"""Coefficients of x^-1, x^-3, ... in ln Gamma(x) = (x - 1/2) ln x - x + ln(2 pi)/2 + ...; DLMF 5.11.1."""
_SHIFT: Final = 8
"""Where the series begins; what it leaves out is then below 1e-11 of the answer."""


def targets_nll(network: GalaxyNetwork, features: Tensor, targets: Tensor) -> Tensor:
    """Return what targets cost a network, per galaxy and question.

    Parameters
    ----------
    network : GalaxyNetwork
        With a question head.
    features : Tensor, shape (n, dim)
        As `GalaxyNetwork.features` returns them.
    targets : Tensor, shape (n, answer), float32
        Votes, 0 = not asked, for a question of votes; the number, NaN = no label, for one of a value.

    Returns
    -------
    Tensor, shape (n, question), at least float32
        `dirichlet_multinomial_nll` of votes; half the squared error of a value, which is its negative log-likelihood
        under a Gaussian of unit width up to a constant. 0, with zero gradient, where there is no vote or label.
    """
    predicted = network.concentrations(features)
    if "value" not in network.kinds:
        return dirichlet_multinomial_nll(targets, predicted, network.answers)
    losses = []
    answers = list(network.answers)
    pairs = zip(torch.split(targets, answers, 1), torch.split(predicted, answers, 1), strict=True)  # type: ignore[no-untyped-call]
    for kind, (target, prediction) in zip(network.kinds, pairs, strict=True):
        if kind == "votes":
            losses.append(dirichlet_multinomial_nll(target, prediction, [target.shape[1]]))
        else:
            losses.append(0.5 * torch.where(target.isnan(), 0.0, prediction - target.nan_to_num()).square())
    return torch.cat(losses, dim=1)


def dirichlet_multinomial_nll(counts: Tensor, concentrations: Tensor, answers: Sequence[int]) -> Tensor:
    r"""Return the negative log-likelihood of vote counts, per galaxy and question.

    .. math:: -\ln P = -\ln\frac{\Gamma(N+1)\,\Gamma(A)}{\Gamma(N+A)}
        - \sum_i \ln\frac{\Gamma(k_i+a_i)}{\Gamma(k_i+1)\,\Gamma(a_i)},\quad N=\sum_i k_i,\ A=\sum_i a_i

    Differences of log-gammas lose all digits where a is large, in single precision from a few hundred on. So this is
    computed as :math:`\ln f(N;A) - \sum_i \ln f(k_i;a_i)` of negative binomials f with one success probability
    :math:`p = A/(A+N)`, each in the saddle-point form of Loader, in which no large terms cancel. Where one answer has
    all votes, -ln P may be arbitrarily small; it is then a positive series.

    Parameters
    ----------
    counts : Tensor, shape (n, answer)
        Votes k, >= 0; need not be whole. A question that nobody was asked has zeros.
    concentrations : Tensor, shape (n, answer)
        a > 0.
    answers : sequence of int
        Number of answers of each question, in the order of the columns.

    Returns
    -------
    Tensor, shape (n, question), at least float32
        Exactly 0, with zero gradient, where a question has no votes. Relative error below 1e-4 in float32 and 1e-10
        in float64 for 1e-6 <= a <= 1e6 and k <= 1e4.

    References
    ----------
    Walmsley et al. 2022, MNRAS 509, 3966 (Galaxy Zoo DECaLS), section 4; the multinomial coefficient is included.
    C. Loader 2000, "Fast and accurate computation of binomial probabilities".
    """
    dtype = torch.promote_types(concentrations.dtype, torch.float32)
    k, a = counts.to(dtype), concentrations.to(dtype)
    columns, owner = _layout(tuple(answers), a.device)
    votes = _grouped(k, columns)
    total, most = votes.sum(dim=2), votes.amax(dim=2)
    leads = k == most[:, owner]
    own = _grouped(torch.where(leads, a, 0.0), columns).sum(dim=2)
    rest = _grouped(torch.where(leads, 0.0, a), columns).sum(dim=2)
    strength = own + rest
    p, q = (share.detach() / (strength + total).detach() for share in (strength, total))  # of which -ln P is free
    terms = _log_negative_binomial(
        torch.cat([k, total], dim=1),
        torch.cat([a, strength], dim=1),
        torch.cat([p[:, owner], p], dim=1),
        torch.cat([q[:, owner], q], dim=1),
    )
    spread = terms[:, len(owner) :] - _grouped(terms[:, : len(owner)], columns).sum(dim=2)
    return torch.where(most == total, _log_gamma_ratio(own, total, rest), spread)


@cache
def _layout(answers: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the columns of each question (question, widest), filled up with the number of columns, and its inverse."""
    # What is kept from a validation in inference mode could not serve the training that follows.
    with torch.inference_mode(False):
        counts = torch.tensor(answers, device=device)
        ends = counts.cumsum(0)
        columns = (ends - counts)[:, None] + torch.arange(max(answers), device=device)
        owner = torch.repeat_interleave(torch.arange(len(answers), device=device), counts)
        return torch.where(columns < ends[:, None], columns, sum(answers)), owner


def _grouped(values: Tensor, columns: Tensor) -> Tensor:
    """Return (n, question, widest) of (n, answer), zero where a question has fewer answers."""
    grouped: Tensor = F.pad(values, (0, 1))[:, columns]
    return grouped


def _log_negative_binomial(k: Tensor, a: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """Return ln of Gamma(k+a) / (Gamma(a) k!) p^a q^k, for p + q = 1."""
    n = k + a
    excess = q * a - p * k
    over, below, missed = torch.unbind(_binet(torch.stack([n, a, k]) + 1))
    return (
        k * _log(torch.where(k > 0, (n + 1) * q / (k + 1), 1.0), (excess - p) / (k + 1))
        + a * _log((n + 1) * p / (a + 1), (-excess - q) / (a + 1))
        - torch.log1p(k / a)
        + 0.5 * torch.log((n + 1) / ((a + 1) * (k + 1)))
        + (1 - 0.5 * math.log(2 * math.pi))
        + over
        - below
        - missed
    )


def _log(ratio: Tensor, above_one: Tensor) -> Tensor:
    """Return the logarithm of a ratio whose distance from 1 is known better than the ratio itself."""
    near = above_one.abs() < 0.5
    return torch.where(near, torch.log1p(torch.where(near, above_one, 0.0)), torch.log(ratio))


def _binet(x: Tensor) -> Tensor:
    """Return ln Gamma(x) - (x - 1/2) ln x + x - ln(2 pi)/2 for x >= 1."""
    small = x.clamp(max=_SHIFT + 1)
    exact = torch.lgamma(small) - (small - 0.5) * torch.log(small) + small - 0.5 * math.log(2 * math.pi)
    return torch.where(x < _SHIFT + 1, exact, _series(x.clamp(min=_SHIFT)))


def _series(x: Tensor, skip: int = 0) -> Tensor:
    """Return the sum of the series' terms after the first `skip`."""
    square = x**-2
    total = torch.zeros_like(x)
    for coefficient in reversed(_BINET[skip:]):
        total = total * square + coefficient
    return total * x ** -(2 * skip + 1)


def _log_gamma_ratio(x: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Return ln of Gamma(x+u+v) Gamma(x) / (Gamma(x+u) Gamma(x+v)), to full relative precision however small."""
    product = u * v
    recurrence = torch.zeros_like(x)
    for _ in range(_SHIFT):
        recurrence = recurrence + torch.log1p(product / (x * (x + u + v)))
        x = x + 1
    end, left, right = x + u + v, x + u, x + v
    return (
        recurrence
        + u * torch.log1p(v / left)
        + v * torch.log1p(u / right)
        - (x - 0.5) * torch.log1p(product / (x * end))
        + _BINET[0] * product * (x + end) / (x * end * left * right)  # of 1/x + 1/end - 1/left - 1/right
        + (_series(x, 1) + _series(end, 1) - _series(left, 1) - _series(right, 1))
    )
