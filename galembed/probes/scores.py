"""What predictions are worth: scores, calibration, and intervals by bootstrap over places on the sky."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from galembed.linear import Folds, Layer, log_softmax

RESAMPLES: Final = 500
BINS: Final = 10

_TEMPERATURES: Final = (0.02, 50.0)
_QUANTILES: Final = (0.025, 0.975)

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]
Interval = tuple[float, float]
"""95%; of NaN where there is nothing to resample."""

NO_INTERVAL: Final[Interval] = (np.nan, np.nan)


@dataclass(frozen=True)
class Bin:
    """Sources whose most probable class has a probability in one range.

    Attributes
    ----------
    confidence, accuracy : float
        Mean probability, and how often that class is the label, classes weighted equally.
    share : float
        Of all weight.
    """

    confidence: float
    accuracy: float
    share: float


@dataclass(frozen=True)
class Calibration:
    """Whether probabilities are what they say, each class weighing the same.

    Attributes
    ----------
    ece : float
        Expected calibration error: mean distance of confidence from accuracy over `BINS` bins.
    bins : tuple of Bin
    ece_before : float
        Of the fit's own probabilities, before the temperature; NaN where there is no other.
    bins_before : tuple of Bin
    temperature : float
        What logits are divided by; NaN where they were taken as they are.
    """

    ece: float
    bins: tuple[Bin, ...]
    ece_before: float = np.nan
    bins_before: tuple[Bin, ...] = ()
    temperature: float = np.nan


def equal_weights(truth: Indices) -> Floats:
    """Return a weight for each row, shape (row,), with which classes weigh the same; they sum to 1."""
    counts = np.bincount(truth)
    return np.asarray(1 / (np.count_nonzero(counts) * counts[truth]), np.float64)


def log_loss(logits: Floats, truth: Indices) -> float:
    """Return the mean negative log-likelihood of the labels, classes weighted equally."""
    chances = log_softmax(logits)[np.arange(len(truth)), truth]
    return -float(equal_weights(truth) @ chances)


def balanced_accuracy(truth: Indices, predicted: Indices) -> float:
    """Return the mean recall over the classes that occur in `truth`."""
    return float(equal_weights(truth) @ (predicted == truth))


# ---------------------------------------------------------------------------------------------------- calibration


def temperature(logits: Floats, truth: Indices) -> float:
    """Return what logits are to be divided by for the labels to be likeliest (Guo et al. 2017, arXiv:1706.04599).

    Beforehand its logarithm is taken to be normal around 0, with a deviation of 1: few labels that are all predicted
    rightly would want it to be 0, and probabilities certain.
    """
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(
        lambda log: len(truth) * log_loss(logits / np.exp(log), truth) + log**2 / 2,
        bounds=np.log(_TEMPERATURES),
        method="bounded",
    )
    return float(np.exp(found.x))


def scaled_by_others(logits: Floats, truth: Indices, folds: Folds) -> Floats:
    """Return logits of which each fold was divided by the temperature of all other folds."""
    scaled = np.empty_like(logits)
    for _, test in folds:
        others = np.setdiff1d(np.arange(len(truth)), test)
        scaled[test] = logits[test] / temperature(logits[others], truth[others])
    return scaled


def calibration(logits: Floats, truth: Indices) -> tuple[float, tuple[Bin, ...]]:
    """Return the expected calibration error and its bins."""
    chances = np.exp(log_softmax(logits))
    confidence, right = chances.max(axis=1), chances.argmax(axis=1) == truth
    weights = equal_weights(truth)
    least = 1 / logits.shape[1]
    place = np.clip(((confidence - least) / (1 - least) * BINS).astype(int), 0, BINS - 1)
    total = np.bincount(place, weights, BINS)
    sums = (np.bincount(place, weights * values, BINS) for values in (confidence, right))
    means = [np.divide(each, total, out=np.zeros(BINS), where=total > 0) for each in sums]
    bins = tuple(Bin(*map(float, values)) for values in zip(*means, total, strict=True) if values[-1] > 0)
    return float(sum(one.share * abs(one.confidence - one.accuracy) for one in bins)), bins


# ------------------------------------------------------------------------------------------------------ intervals


def resamples(groups: NDArray[np.int64], seed: int, count: int = RESAMPLES) -> Iterator[Floats]:
    """Yield how often each group is drawn, shape (group,), groups numbered in rising order, drawn with replacement."""
    rng = np.random.default_rng(seed)
    size = len(np.unique(groups))
    for _ in range(count):
        yield np.bincount(rng.integers(0, size, size), minlength=size).astype(np.float64)


def interval(values: Floats) -> Interval:
    """Return the 95% interval of resampled values, shape (resample,); NaN are passed over."""
    known = values[~np.isnan(values)]
    if not len(known):
        return NO_INTERVAL
    low, high = np.quantile(known, _QUANTILES)
    return float(low), float(high)


def _intervals(values: Floats) -> Floats:
    """Return the interval of each column, shape (column, 2)."""
    return np.array([interval(column) for column in values.T])


def mean_known(values: Floats) -> Floats:
    """Return the mean over the last axis of what is not NaN; NaN where nothing is."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(known, values, 0).sum(axis=-1) / known.sum(axis=-1))


@dataclass(frozen=True)
class ClassIntervals:
    """Intervals of what `confusion` and `areas` give.

    Attributes
    ----------
    balanced, area : pair of float
        Of the balanced accuracy and the mean area.
    precision, recall, areas : ndarray, shape (class, 2)
    """

    balanced: Interval
    area: Interval
    precision: Floats
    recall: Floats
    areas: Floats


def confusion(truth: Indices, predicted: Indices, classes: int) -> NDArray[np.int64]:
    """Return counts, shape (class, class): rows are labels, columns predictions."""
    return np.bincount(truth * classes + predicted, minlength=classes**2).reshape(classes, classes)


def precision_and_recall(counts: NDArray[Any]) -> tuple[Floats, Floats]:
    """Return both for each class of (weighted) counts, NaN where none was called so, or none is."""
    right = np.diagonal(counts, axis1=-2, axis2=-1).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return right / counts.sum(axis=-2), right / counts.sum(axis=-1)


def class_intervals(logits: Floats, truth: Indices, groups: NDArray[np.int64], seed: int) -> ClassIntervals:
    """Return intervals by bootstrap over groups; predictions are taken as they are."""
    count = logits.shape[1]
    _, group = np.unique(groups, return_inverse=True)
    cell = truth * count + logits.argmax(axis=1)
    ranks = [_ranks(margins) for margins in one_against_rest(logits).T]
    found = []
    for drawn in resamples(group, seed):
        weights = drawn[group]
        counts = np.bincount(cell, weights, count**2).reshape(count, count)
        precision, recall = precision_and_recall(counts)
        areas = [_area(rank, truth == label, weights) for label, rank in enumerate(ranks)]
        found.append((precision, recall, np.array(areas)))
    drawings = [np.stack(each) for each in zip(*found, strict=True)]
    balanced, area = (interval(mean_known(each)) for each in drawings[1:])
    return ClassIntervals(balanced, area, *map(_intervals, drawings))


def one_against_rest(logits: Floats) -> Floats:
    """Return the logit of each class against all others together, shape (row, class)."""
    logs = log_softmax(logits)
    margins = np.empty_like(logs)
    for label in range(logs.shape[1]):
        others = np.delete(logs, label, axis=1)
        top = others.max(axis=1)
        margins[:, label] = logs[:, label] - top - np.log(np.exp(others - top[:, None]).sum(axis=1))
    return margins


def areas(logits: Floats, truth: Indices) -> Floats:
    """Return the area under the ROC curve of each class against the rest, shape (class,); NaN without both sides."""
    margins = one_against_rest(logits)
    ones = np.ones(len(truth))
    return np.array([_area(_ranks(column), truth == label, ones) for label, column in enumerate(margins.T)])


def _ranks(values: Floats) -> Indices:
    return np.unique(values, return_inverse=True)[1]


def _area(ranks: Indices, members: NDArray[np.bool_], weights: Floats) -> float:
    inside = np.bincount(ranks, weights * members)
    outside = np.bincount(ranks, weights * ~members)
    pairs = inside.sum() * outside.sum()
    return float(inside @ (outside.cumsum() - outside / 2) / pairs) if pairs else np.nan


@dataclass(frozen=True)
class Errors:
    """Scores of predicted numbers, shape (..., number) each; `spread` is the standard deviation of the truth."""

    rmse: Floats
    mae: Floats
    bias: Floats
    r2: Floats
    spread: Floats


def errors(truth: Floats, predicted: Floats) -> Errors:
    """Return the errors of numbers, shape (row, number)."""
    return _errors(_moments(truth, predicted).sum(axis=0))


def error_intervals(truth: Floats, predicted: Floats, groups: NDArray[np.int64], seed: int) -> Errors:
    """Return intervals, shape (number, 2) each, by bootstrap over groups."""
    _, group = np.unique(groups, return_inverse=True)
    moments = _moments(truth, predicted)
    flat = moments.reshape(len(moments), -1)
    sums = np.stack([np.bincount(group, column) for column in flat.T], axis=1)
    drawn = np.stack([one @ sums for one in resamples(group, seed)]).reshape(-1, *moments.shape[1:])
    found = _errors(np.moveaxis(drawn, 1, 0))
    return Errors(*(_intervals(getattr(found, name)) for name in Errors.__dataclass_fields__))


def _moments(truth: Floats, predicted: Floats) -> Floats:
    """Return what errors are made of, shape (row, moment, number)."""
    off = predicted - truth
    truth = truth - truth.mean(axis=0)  # or the variance would be a small difference of large numbers
    return np.stack([np.ones_like(truth), off, np.abs(off), off**2, truth, truth**2], axis=1)


def _errors(sums: Floats) -> Errors:
    count, off, size, square, total, squares = sums
    variance = np.maximum(squares / count - (total / count) ** 2, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        r2 = np.where(variance > 0, 1 - square / count / variance, np.nan)
    return Errors(np.sqrt(square / count), size / count, off / count, r2, np.sqrt(variance))


def outputs(layer: Layer, vectors: NDArray[Any]) -> Floats:
    """Return what a linear layer gives, shape (row, output)."""
    weights, intercept = layer
    return np.asarray(vectors.astype(weights.dtype, copy=False) @ weights.T + intercept, np.float64)
