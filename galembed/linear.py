"""Linear models of classes, numbers and votes, and folds that divide neither neighbours on the sky nor copies."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from galembed.errors import BadRequest
from galembed.sky import HEALPIX_ORDER, healpix_index

CHOICE_FOLDS: Final = 3
"""Of the cross-validation that chooses how strongly coefficients are held back."""

_CELL_ORDERS: Final = range(3, 13)  # 7.3 deg to 52 arcsec
_GROUPS_PER_FOLD: Final = 10
_FEW_ROWS: Final = 20_000
_BLOCK: Final = 16_384
_ITERATIONS: Final = 1000

Rows = NDArray[np.intp]
Folds = list[tuple[Rows, Rows]]
Floats = NDArray[np.float64]
Layer = tuple[Floats, Floats]
"""Weights (output, dim) and intercepts (output,) for features as they are."""


def sky_cells(ra: ArrayLike, dec: ArrayLike) -> NDArray[np.int64]:
    """Return HEALPix indices of order 29 (nested), negative and unique where there is no position.

    Parameters
    ----------
    ra, dec : array_like, shape (row,)
        ICRS, deg; NaN = no position.
    """
    ra, dec = np.asarray(ra, np.float64), np.asarray(dec, np.float64)
    cells = -1 - np.arange(len(ra), dtype=np.int64)
    known = np.isfinite(ra) & np.isfinite(dec)
    if known.any():
        cells[known] = healpix_index(ra[known], dec[known])
    return cells


def equal_rows(features: NDArray[Any]) -> NDArray[np.int64]:
    """Return the number of the first row that is the same, shape (row,): copies of one image have equal features."""
    first: dict[int, int] = {}  # by hash: 100,000 rows themselves would be a second copy of the features
    return np.array([first.setdefault(hash(row.tobytes()), number) for number, row in enumerate(features)], np.int64)


def apart(
    cells: NDArray[np.int64],
    together: NDArray[np.int64],
    count: int,
    seed: int = 0,
    classes: NDArray[np.intp] | None = None,
) -> tuple[NDArray[np.int64], str]:
    """Return the group of each row that folds must not divide, shape (row,), and how rows are grouped.

    Neighbours on the sky share seeing, depth and calibration, which a random division would reward. The groups are the
    coarsest cells of which there are ten to a fold, and that can be divided so that every training part has every
    class. Where there are none, or fewer than half of the rows have a position, only `together` counts.

    Parameters
    ----------
    cells : ndarray, shape (row,), int64
        See `sky_cells`.
    together : ndarray, shape (row,), int64
        Rows of one number are one image, or one place, and always in one group.
    count, seed, classes
        See `make_folds`.
    """
    for order in _CELL_ORDERS if (cells >= 0).mean() > 0.5 else ():
        groups = _joined(np.where(cells >= 0, cells >> 2 * (HEALPIX_ORDER - order), cells), together)
        if len(np.unique(groups)) < _GROUPS_PER_FOLD * count:
            continue
        try:
            make_folds(groups, count, seed, classes)
        except BadRequest:
            continue
        return groups, f"grouped by sky cells of {58.6 / 2**order:.2g} deg"
    return together, "at random (too few positions or sky cells to group by)"


def _joined(cells: NDArray[np.int64], together: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return groups of rows linked by a cell or by `together`, through any number of rows."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    _, cell = np.unique(cells, return_inverse=True)
    _, other = np.unique(together, return_inverse=True)
    size = int(cell.max()) + int(other.max()) + 2
    links = coo_array((np.ones(len(cell), bool), (cell, cell.max() + 1 + other)), shape=(size, size))
    return np.asarray(connected_components(links, directed=False)[1][cell], np.int64)


def make_folds(groups: NDArray[np.int64], count: int, seed: int, classes: NDArray[np.intp] | None = None) -> Folds:
    """Return (train, test) rows for cross-validation; a group is never on both sides.

    Parameters
    ----------
    groups : ndarray, shape (row,), int
    count : int
        Folds; fewer where there are fewer groups, or a class has fewer members.
    seed : int
    classes : ndarray, shape (row,), int, optional
        Spread evenly over the folds.

    Raises
    ------
    BadRequest
        If the rows cannot be split so that each training part has every class.
    """
    from sklearn.model_selection import GroupKFold, KFold, StratifiedGroupKFold, StratifiedKFold

    single = len(np.unique(groups)) == len(groups)
    count = min(count, len(np.unique(groups)))
    if classes is not None:
        count = min([count, *np.unique(classes, return_counts=True)[1].tolist()])
    if count < 2:
        raise BadRequest(
            f"{len(groups)} labelled sources cannot be split in two parts that are apart and have every class; "
            "label more"
        )
    kind = (GroupKFold, KFold, StratifiedGroupKFold, StratifiedKFold)[2 * (classes is not None) + single]
    splitter = kind(count, shuffle=True, random_state=seed)
    folds: Folds = list(splitter.split(np.zeros(len(groups)), classes, None if single else groups))
    if not all(len(test) and (classes is None or _has_every(classes, train)) for train, test in folds):
        raise BadRequest(
            "all labelled sources of one class are in one place or copies of one image, and cannot be both learnt from "
            "and tested on; label others"
        )
    return folds


def _has_every(classes: NDArray[np.intp], rows: Rows) -> bool:
    return len(np.unique(classes[rows])) == len(np.unique(classes))


def choice_folds(groups: NDArray[np.int64], seed: int, classes: NDArray[np.intp] | None = None) -> Folds:
    """Return `CHOICE_FOLDS` folds for a choice among fits, where few labels are no reason to fail.

    A class that lies in one group is learnt from in every fold and tested in none.

    Parameters
    ----------
    groups, seed, classes
        See `make_folds`.

    Returns
    -------
    list
        As of `make_folds`; empty where nothing can be left out.
    """
    divided = np.ones(len(groups), bool)
    if classes is not None:
        divided = np.isin(classes, [one for one in np.unique(classes) if len(np.unique(groups[classes == one])) > 1])
    inside, outside = np.flatnonzero(divided), np.flatnonzero(~divided)
    try:
        folds = make_folds(groups[inside], CHOICE_FOLDS, seed, None if classes is None else classes[inside])
    except BadRequest:
        return []
    return [(np.sort(np.concatenate([inside[train], outside])), inside[test]) for train, test in folds]


def fit_logistic(features: NDArray[Any], classes: NDArray[np.intp], strength: float, *, balance: bool = True) -> Any:
    """Fit scikit-learn's logistic regression to standardised features.

    Parameters
    ----------
    features : ndarray, shape (row, dim)
    classes : ndarray, shape (row,), int
    strength : float
        scikit-learn's C: the smaller, the more are coefficients held back.
    balance : bool
        Weigh classes equally, whatever their numbers.

    Returns
    -------
    sklearn.pipeline.Pipeline
        Of a `StandardScaler` and a `LogisticRegression`.
    """
    with threads_for(len(features)):
        return _logistic(strength, balance=balance).fit(_precise(features), classes)


def _logistic(strength: float, *, balance: bool = True, warm_start: bool = False) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    weights = "balanced" if balance else None
    model = LogisticRegression(C=strength, class_weight=weights, max_iter=5000, warm_start=warm_start)
    return make_pipeline(StandardScaler(), model)


def _precise(features: NDArray[Any]) -> NDArray[Any]:
    return features.astype(_precision(len(features)))


def _precision(rows: int) -> Any:
    """Return float64; for many rows float32, which takes half the memory and time."""
    return np.float64 if rows < _FEW_ROWS else np.float32


def class_path(
    features: NDArray[Any], classes: NDArray[np.intp], strengths: Sequence[float]
) -> Iterator[tuple[float, Layer]]:
    """Yield strengths and the `softmax_layer` of a balanced `fit_logistic` at each, begun where the one before ended.

    Parameters
    ----------
    strengths : sequence of float
        From strong to weak, that is rising.
    """
    model = _logistic(1.0, warm_start=True)
    scaler, classifier = (step for _, step in model.steps)
    scaled = scaler.fit_transform(_precise(features))
    for strength in strengths:
        with threads_for(len(features)):
            classifier.set_params(C=strength).fit(scaled, classes)
        yield strength, softmax_layer(model)


def ridge_path(
    features: NDArray[Any], targets: NDArray[Any], strengths: Sequence[float]
) -> Iterator[tuple[float, Layer]]:
    """Yield strengths and the ridge regression at each, on standardised features: one decomposition serves all.

    Parameters
    ----------
    features : ndarray, shape (row, dim)
    targets : ndarray, shape (row, output)
        Finite.
    strengths : sequence of float
        scikit-learn's alpha: the larger, the more are coefficients held back.
    """
    centre, scale = _centre_and_scale(features)
    mean = targets.mean(axis=0, dtype=np.float64)
    gram, cross = np.zeros((features.shape[1],) * 2), np.zeros((features.shape[1], targets.shape[1]))
    with threads_for(len(features)):
        for at in range(0, len(features), _BLOCK):
            block = (features[at : at + _BLOCK] - centre) / scale
            gram += block.T @ block
            cross += block.T @ (targets[at : at + _BLOCK] - mean)
        values, vectors = np.linalg.eigh(gram)
    values, cross = np.maximum(values, 0), vectors.T @ cross
    for strength in strengths:
        weights = (vectors @ (cross / (values + strength)[:, None])).T / scale
        yield strength, (weights, mean - weights @ centre)


def vote_path(
    features: NDArray[Any], fractions: NDArray[Any], weights: NDArray[Any], strengths: Sequence[float]
) -> Iterator[tuple[float, Layer]]:
    """Yield strengths and the softmax regression at each, on standardised features, begun where the one before ended.

    It is logistic regression with fractions for classes, which scikit-learn does not have.

    Parameters
    ----------
    features : ndarray, shape (row, dim)
    fractions : ndarray, shape (row, answer)
        Rows sum to 1.
    weights : ndarray, shape (row,)
        Of each row in the likelihood.
    strengths : sequence of float
        As scikit-learn's C, from strong to weak, that is rising.
    """
    from scipy.optimize import minimize

    centre, scale = _centre_and_scale(features)
    x = np.ones((len(features), len(centre) + 1), _precision(len(features)))
    for at in range(0, len(features), _BLOCK):
        x[at : at + _BLOCK, :-1] = (features[at : at + _BLOCK] - centre) / scale
    share = (weights / weights.sum())[:, None]
    shape = (fractions.shape[1], x.shape[1])

    def loss(flat: Floats, penalty: float) -> tuple[float, Floats]:
        layer = flat.reshape(shape)
        held = np.append(layer[:, :-1], np.zeros((shape[0], 1)), axis=1)
        logs = log_softmax(x @ layer.T)
        value = -float((share * fractions * logs).sum()) + penalty / 2 * float((held**2).sum())
        return value, ((share * (np.exp(logs) - fractions)).T @ x + penalty * held).ravel()

    start = np.zeros(shape).ravel()
    limits = {"maxiter": _ITERATIONS, "gtol": 1e-5}
    for strength in strengths:
        penalty = 1 / (strength * weights.sum())
        with threads_for(len(features)):
            start = minimize(loss, start, (penalty,), method="L-BFGS-B", jac=True, options=limits).x
        layer = start.reshape(shape)[:, :-1] / scale
        yield strength, (layer, start.reshape(shape)[:, -1] - layer @ centre)


def log_softmax(logits: NDArray[Any]) -> Floats:
    """Return the logarithms of the softmax over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)), np.float64)


def _centre_and_scale(features: NDArray[Any]) -> tuple[Floats, Floats]:
    scale = features.std(axis=0, dtype=np.float64)
    return features.mean(axis=0, dtype=np.float64), np.where(scale > 0, scale, 1.0)


def threads_for(rows: int) -> Any:
    """Return a context that keeps BLAS to one thread where a fit has few rows: waiting would cost more than the fit."""
    return _controller().limit(limits=1 if rows < _FEW_ROWS else None)


@functools.cache
def _controller() -> Any:
    # Made once, since it reads the process's list of libraries; scikit-learn brings those that it is to see.
    import sklearn.linear_model  # noqa: F401
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


def softmax_layer(model: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return weights (class, dim) and intercepts (class,) of what `fit_logistic` gives, the scaling folded in."""
    scaler, classifier = (step for _, step in model.steps)
    weights = classifier.coef_ / scaler.scale_
    intercepts = classifier.intercept_ - weights @ scaler.mean_
    if len(weights) == 1:  # Two classes have one logistic function; a softmax against 0 is the same.
        weights, intercepts = np.vstack([0 * weights, weights]), np.append(0.0, intercepts)
    return np.ascontiguousarray(weights), np.ascontiguousarray(intercepts)
