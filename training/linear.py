"""Linear heads on features that are computed once: logistic regression, ridge regression, and votes.

Features are standardised for the fit and the scaling is then folded into the weights, so a head needs no other state.
How strongly it is held back is chosen by cross-validation among the rows given, by the likelihood of those left out; of
too few rows for that, it is the middle of what is tried.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from galembed.linear import Folds, choice_folds, fit_logistic, softmax_layer, threads_for
from galembed.network import GalaxyNetwork
from training.loss import targets_nll

CLASS_STRENGTHS: Final = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""scikit-learn's C, from strong to weak."""

RIDGE_STRENGTHS: Final = tuple(10.0**power for power in np.arange(-1, 5.5, 0.5))
"""scikit-learn's alpha."""

VOTE_STRENGTHS: Final = (1e-1, 1e-2, 1e-3, 1e-4)
"""Weight of half the squared coefficients beside the mean loss of a galaxy."""

_ITERATIONS: Final = 150

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class LinearHead:
    """A head of a `GalaxyNetwork`.

    Attributes
    ----------
    weight : ndarray, shape (answer, dim), float64
    bias : ndarray, shape (answer,), float64
    precision_weight : ndarray, shape (question of votes, dim), float64
    precision_bias : ndarray, shape (question of votes,), float64
        Natural logarithm of the Dirichlet precision; 0 for classes, which have one vote each.
    strength : float
        What was chosen of `CLASS_STRENGTHS`, `RIDGE_STRENGTHS` or `VOTE_STRENGTHS`.
    """

    weight: Floats
    bias: Floats
    precision_weight: Floats
    precision_bias: Floats
    strength: float

    def state(self) -> dict[str, NDArray[np.float32]]:
        """Return the weights under the names of a `GalaxyNetwork`'s state, float32."""
        state = {"head.weight": self.weight, "head.bias": self.bias}
        if len(self.precision_bias):
            state |= {"precision.weight": self.precision_weight, "precision.bias": self.precision_bias}
        return {name: np.ascontiguousarray(values, np.float32) for name, values in state.items()}

    def scaled(self, mean: Floats, std: Floats) -> LinearHead:
        """Return the head for answers in other units: `std` times what this one gives, plus `mean`.

        Parameters
        ----------
        mean, std : ndarray, shape (answer,)
            0 and 1 for answers that are voted on.
        """
        weight, bias = self.weight * std[:, None], self.bias * std + mean
        return LinearHead(weight, bias, self.precision_weight, self.precision_bias, self.strength)


# -------------------------------------------------------------------------------------------------------------- fits


def fit_head(
    network: GalaxyNetwork,
    features: NDArray[np.float32],
    targets: NDArray[np.float32],
    task: str,
    *,
    groups: NDArray[np.int64],
    balance: bool = True,
    seed: int = 0,
) -> LinearHead:
    """Fit a head.

    Parameters
    ----------
    network : GalaxyNetwork
        With the head that is wanted; its weights are not looked at, and not kept.
    features : ndarray, shape (row, dim), float32
        As `GalaxyNetwork.features` returns them, encoder in eval mode.
    targets : ndarray, shape (row, answer), float32
        As in `training.data.targets.LabelledImages`.
    task : str
        ``classification``, ``regression`` or ``votes``.
    groups : ndarray, shape (row,), int
        Rows that stay together when the strength is chosen.
    balance : bool
        Weigh classes equally, whatever their numbers.
    seed : int
        Of the folds.

    Returns
    -------
    LinearHead
    """
    with threads_for(len(features)):
        if task == "classification":
            return fit_classes(features, targets.argmax(axis=1), groups=groups, balance=balance, seed=seed)
        if task == "regression":
            return fit_number(features, targets[:, 0], groups=groups, seed=seed)
        return fit_votes(network, features, targets, groups=groups, seed=seed)


def fit_classes(
    features: NDArray[np.float32], classes: NDArray[np.intp], *, groups: NDArray[np.int64], balance: bool, seed: int
) -> LinearHead:
    """Fit a logistic regression (scikit-learn's) to standardised features; see `fit_head`."""
    weights = class_weights(classes) if balance else np.ones(len(classes))

    def loss(strength: float, train: NDArray[np.intp], test: NDArray[np.intp]) -> float:
        model = fit_logistic(features[train], classes[train], strength, balance=balance)
        chances = model.predict_proba(features[test].astype(np.float64))[np.arange(len(test)), classes[test]]
        return float(np.average(-np.log(np.maximum(chances, 1e-12)), weights=weights[test]))

    strength = _best(CLASS_STRENGTHS, choice_folds(groups, seed, classes), loss)
    weight, bias = softmax_layer(fit_logistic(features, classes, strength, balance=balance))
    return LinearHead(weight, bias, np.zeros((1, features.shape[1])), np.zeros(1), strength)


def class_weights(classes: NDArray[np.intp]) -> Floats:
    """Return a weight for each row, shape (row,), with which every class weighs the same; their mean is 1."""
    counts = np.bincount(classes)
    return np.asarray(len(classes) / (np.count_nonzero(counts) * counts[classes]))


def fit_number(
    features: NDArray[np.float32], numbers: NDArray[np.float32], *, groups: NDArray[np.int64], seed: int
) -> LinearHead:
    """Fit a ridge regression (scikit-learn's) to standardised features and numbers; see `fit_head`."""
    from sklearn.linear_model import RidgeCV
    from sklearn.preprocessing import StandardScaler

    mean, std = target_scale(numbers[:, None], np.array([True]))
    scaler = StandardScaler().fit(features.astype(np.float64))
    model = RidgeCV(RIDGE_STRENGTHS, cv=choice_folds(groups, seed) or None)
    model.fit(scaler.transform(features.astype(np.float64)), (numbers - mean) / std)
    none = np.zeros((0, features.shape[1]))
    weight, bias = np.atleast_2d(model.coef_), np.atleast_1d(model.intercept_)
    head = _folded(weight, bias, none, np.zeros(0), scaler.mean_, scaler.scale_, float(model.alpha_))
    return head.scaled(mean, std)


def value_answers(network: GalaxyNetwork) -> NDArray[np.bool_]:
    """Return which answers of a network are numbers, shape (answer,)."""
    return np.repeat([kind == "value" for kind in network.kinds], network.answers)


def target_scale(targets: NDArray[np.float32], numbers: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Return mean and standard deviation of each column that holds numbers, 0 and 1 of the others.

    Parameters
    ----------
    targets : ndarray, shape (row, answer)
        NaN = no label.
    numbers : ndarray, shape (answer,), bool

    Returns
    -------
    mean, std : ndarray, shape (answer,), float64
        A deviation of 0 counts as 1.
    """
    mean, std = np.zeros(len(numbers)), np.ones(len(numbers))
    for column in np.flatnonzero(numbers):
        known = targets[np.isfinite(targets[:, column]), column].astype(np.float64)
        if len(known):
            mean[column], std[column] = known.mean(), known.std() or 1.0
    return mean, std


def fit_votes(
    network: GalaxyNetwork,
    features: NDArray[np.float32],
    targets: NDArray[np.float32],
    *,
    groups: NDArray[np.int64],
    seed: int,
) -> LinearHead:
    """Fit the likelihood of votes (`training.loss.targets_nll`) by L-BFGS in double precision; see `fit_head`.

    The network's own head is used for it, and left with weights that mean nothing.
    """
    mean, std = target_scale(targets, value_answers(network))
    centre, scale = features.mean(axis=0, dtype=np.float64), features.std(axis=0, dtype=np.float64)
    scale = np.where(scale > 0, scale, 1.0)
    x = torch.from_numpy((features - centre) / scale)
    y = torch.from_numpy((targets - mean) / std)
    parts = [layer.double() for layer in (network.head, network.precision) if layer is not None]
    starts: dict[int, list[torch.Tensor]] = {}

    def loss(strength: float, train: NDArray[np.intp], test: NDArray[np.intp]) -> float:
        _to_zero(parts)
        fold = int(test[0])
        with torch.no_grad():  # each strength begins where the stronger one ended
            for tensor, start in zip(_tensors(parts), starts.get(fold, []), strict=False):
                tensor.copy_(start)
        _descend(network, parts, x[train], y[train], strength)
        starts[fold] = [tensor.detach().clone() for tensor in _tensors(parts)]
        return float(_mean_loss(network, x[test], y[test]).detach())

    strength = _best(VOTE_STRENGTHS, choice_folds(groups, seed), loss)
    _to_zero(parts)
    _descend(network, parts, x, y, strength)
    arrays = [tensor.detach().numpy().copy() for tensor in _tensors(parts)]
    for part in parts:
        part.float()
    weight, bias, *precision = arrays
    precision_weight, precision_bias = precision or (np.zeros((0, x.shape[1])), np.zeros(0))
    return _folded(weight, bias, precision_weight, precision_bias, centre, scale, strength).scaled(mean, std)


def _tensors(parts: Sequence[torch.nn.Linear]) -> list[torch.Tensor]:
    return [tensor for part in parts for tensor in (part.weight, part.bias)]


def _to_zero(parts: Sequence[torch.nn.Linear]) -> None:
    for tensor in _tensors(parts):
        torch.nn.init.zeros_(tensor)


def _mean_loss(network: GalaxyNetwork, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the mean over galaxies of the loss, summed over questions."""
    return targets_nll(network, x, y).sum(dim=1).mean()


def _descend(
    network: GalaxyNetwork, parts: Sequence[torch.nn.Linear], x: torch.Tensor, y: torch.Tensor, strength: float
) -> None:
    """Minimise the loss and half the squared weights times `strength`; biases are not held back."""
    optimizer = torch.optim.LBFGS(
        _tensors(parts),
        max_iter=_ITERATIONS,
        tolerance_change=1e-7,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        optimizer.zero_grad()
        squares = torch.stack([part.weight.square().sum() for part in parts]).sum()
        total = _mean_loss(network, x, y) + strength / 2 * squares
        total.backward()  # type: ignore[no-untyped-call]
        return float(total.detach())

    optimizer.step(closure)  # type: ignore[no-untyped-call]


def _best(
    strengths: Sequence[float],
    folds: Folds,
    loss: Callable[[float, NDArray[np.intp], NDArray[np.intp]], float],
) -> float:
    """Return the strength with the smallest mean loss over the folds, tried from strong to weak until it rises."""
    if not folds:
        return strengths[len(strengths) // 2]
    best, least = strengths[0], np.inf
    for strength in strengths:
        found = float(np.mean([loss(strength, *fold) for fold in folds]))
        if found > least:
            break
        best, least = strength, found
    return best


def _folded(
    weight: Floats,
    bias: Floats,
    precision_weight: Floats,
    precision_bias: Floats,
    centre: Floats,
    scale: Floats,
    strength: float,
) -> LinearHead:
    """Return the head for features as they are, given that for ``(features - centre) / scale``."""
    weight, precision_weight = weight / scale, precision_weight / scale
    return LinearHead(
        weight, bias - weight @ centre, precision_weight, precision_bias - precision_weight @ centre, strength
    )
