"""What is to be told from vectors: classes, numbers or votes, and how strongly a fit is held back for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from galembed.labels import CLASSIFICATION, REGRESSION, Labelled, are_counts
from galembed.linear import (
    CHOICE_FOLDS,
    Layer,
    apart,
    choice_folds,
    class_path,
    equal_rows,
    log_softmax,
    ridge_path,
    vote_path,
)
from galembed.probes.scores import balanced_accuracy, errors, log_loss, outputs

MIN_MEMBERS: Final = 5
"""Classes with fewer labelled sources are left out: each of five folds must be able to hold one."""

CHOICE_ROWS: Final = 10_000
"""The regularisation is chosen on at most so many labelled sources, drawn at random."""

VOTE_NOISE: Final = 10.0
"""Counts of N volunteers weigh N / (N + 10): they scatter by 1/N, and what a vector does not tell by about 1/10."""

_CLASS_STRENGTHS: Final = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
_RIDGE_STRENGTHS: Final = tuple(10.0**power for power in np.arange(6, -1.5, -0.5))
_VOTE_STRENGTHS: Final = (1e-3, 1e-2, 1e-1, 1.0, 10.0)

Indices = NDArray[np.intp]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Task:
    """Vectors, shape (row, dim), and what is to be told from them.

    Attributes
    ----------
    kind : str
        One of `galembed.labels.KINDS`.
    truth : ndarray
        Numbers of classes, shape (row,); numbers, or fractions that sum to 1, shape (row, output).
    weights : ndarray, shape (row,)
        Of votes in the likelihood.
    cells, together : ndarray, shape (row,), int64
        As for `galembed.linear.apart`.
    """

    kind: str
    vectors: NDArray[np.float32]
    truth: NDArray[Any]
    weights: Floats
    cells: NDArray[np.int64]
    together: NDArray[np.int64]

    @property
    def classes(self) -> Indices | None:
        """Numbers of classes; None for other kinds."""
        return self.truth if self.kind == CLASSIFICATION else None

    @property
    def strengths(self) -> Sequence[float]:
        """What is tried, from strong to weak."""
        return {CLASSIFICATION: _CLASS_STRENGTHS, REGRESSION: _RIDGE_STRENGTHS}.get(self.kind, _VOTE_STRENGTHS)

    def take(self, rows: Indices) -> Task:
        """Return the task of some rows."""
        return replace(
            self,
            vectors=self.vectors[rows],
            truth=self.truth[rows],
            weights=self.weights[rows],
            cells=self.cells[rows],
            together=self.together[rows],
        )

    def path(self, strengths: Sequence[float]) -> Iterator[tuple[float, Layer]]:
        """Yield fits at rising weakness."""
        if self.kind == CLASSIFICATION:
            return class_path(self.vectors, self.truth, strengths)
        if self.kind == REGRESSION:
            return ridge_path(self.vectors, self.truth, strengths)
        return vote_path(self.vectors, self.truth, self.weights, strengths)

    def fit(self, strength: float) -> Layer:
        """Return the fit at one strength."""
        return next(self.path([strength]))[1]

    def loss(self, found: Floats) -> float:
        """Return what the choice of a strength makes small."""
        if self.kind == CLASSIFICATION:
            return log_loss(found, self.truth)
        if self.kind == REGRESSION:
            return float(((found - self.truth) ** 2).mean())
        return -float((self.weights[:, None] * self.truth * log_softmax(found)).sum() / self.weights.sum())

    def score(self, found: Floats) -> float:
        """Return what the learning curve shows."""
        if self.kind == CLASSIFICATION:
            return balanced_accuracy(self.truth, found.argmax(axis=1))
        scores = errors(self.truth, predicted(self.kind, found))
        return float(scores.r2[0] if self.kind == REGRESSION else scores.rmse.mean())


def predicted(kind: str, found: Floats) -> Floats:
    """Return numbers or fractions, given what a linear layer gives."""
    return found if kind == REGRESSION else np.exp(log_softmax(found))


def task_of(labelled: Labelled, classes: tuple[str, ...] | None = None) -> tuple[Task, tuple[str, ...]]:
    """Return labels as numbers, and the names of the outputs: `classes`, or those that the labels have."""
    weights = np.ones(len(labelled))
    truth: NDArray[Any]
    if labelled.kind == CLASSIFICATION:
        names = np.unique(labelled.labels) if classes is None else np.array(classes)
        classes, truth = tuple(map(str, names)), np.searchsorted(names, labelled.labels)
    else:
        classes, truth = labelled.columns, labelled.labels.astype(np.float64)
        if labelled.kind != REGRESSION:
            if are_counts(truth):
                weights = truth.sum(axis=1) / (truth.sum(axis=1) + VOTE_NOISE)
            truth = truth / truth.sum(axis=1, keepdims=True)
    together = equal_rows(labelled.vectors)
    return Task(labelled.kind, labelled.vectors, truth, weights, labelled.cells, together), classes


def choose_strength(task: Task, seed: int, rows: int = CHOICE_ROWS) -> float:
    """Return the regularisation with the smallest loss over three folds, from strong to weak until it rises.

    Parameters
    ----------
    rows : int
        At most so many are looked at, drawn at random.
    """
    if len(task.truth) > rows:
        task = task.take(np.sort(drawn(task, seed)[:rows]))
    groups, _ = apart(task.cells, task.together, CHOICE_FOLDS, seed, task.classes)
    folds = choice_folds(groups, seed, task.classes)
    if not folds:
        return task.strengths[len(task.strengths) // 2]
    paths = [task.take(train).path(task.strengths) for train, _ in folds]
    best, least = task.strengths[0], np.inf
    for fits in zip(*paths, strict=True):
        losses = [
            task.take(test).loss(outputs(layer, task.vectors[test]))
            for (_, layer), (_, test) in zip(fits, folds, strict=True)
        ]
        if np.mean(losses) > least:
            break
        best, least = fits[0][0], float(np.mean(losses))
    return best


def drawn(task: Task, seed: int) -> Indices:
    """Return all rows in a random order that begins with a few of each class."""
    order = np.random.default_rng(seed).permutation(len(task.truth))
    if task.classes is None:
        return order
    rank = np.empty(len(order), np.intp)
    for label in np.unique(task.classes):
        members = np.flatnonzero(task.classes[order] == label)
        rank[members] = np.arange(len(members))
    return order[np.argsort(np.where(rank < MIN_MEMBERS, 0, 1), kind="stable")]
