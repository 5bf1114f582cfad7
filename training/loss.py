"""The likelihood of volunteers' votes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def dirichlet_multinomial_nll(counts: Tensor, concentrations: Tensor, answers: Sequence[int]) -> Tensor:
    r"""Return the negative log-likelihood of vote counts, per galaxy and question.

    .. math:: -\ln P = -\ln\frac{\Gamma(N+1)\,\Gamma(A)}{\Gamma(N+A)}
        - \sum_i \ln\frac{\Gamma(k_i+a_i)}{\Gamma(k_i+1)\,\Gamma(a_i)},\quad N=\sum_i k_i,\ A=\sum_i a_i

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
        Exactly 0, with zero gradient, where a question has no votes.

    References
    ----------
    Walmsley et al. 2022, MNRAS 509, 3966 (Galaxy Zoo DECaLS), section 4; the multinomial coefficient is included.
    """
    dtype = torch.promote_types(concentrations.dtype, torch.float32)
    losses = []
    pairs = zip(
        torch.split(counts.to(dtype), list(answers), dim=1),  # type: ignore[no-untyped-call]
        torch.split(concentrations.to(dtype), list(answers), dim=1),  # type: ignore[no-untyped-call]
        strict=True,
    )
    for k, a in pairs:
        total, strength = k.sum(dim=1), a.sum(dim=1)
        normal = torch.lgamma(total + 1) + torch.lgamma(strength) - torch.lgamma(total + strength)
        terms = torch.lgamma(k + a) - torch.lgamma(k + 1) - torch.lgamma(a)
        nll = -normal - terms.sum(dim=1)
        losses.append(torch.where(total > 0, nll, nll * 0))
    return torch.stack(losses, dim=1)
