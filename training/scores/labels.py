"""How well a head tells classes, numbers or votes, on galaxies that it was not fitted to, beside a constant answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from training.scores.metrics import value_errors

CONFIDENCE_BINS: Final = 15
"""Of the expected calibration error."""

_DRAWS: Final = 1000
_LEVEL: Final = 0.95

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """A number with the 95% interval of its bootstrap over galaxies (percentiles of 1,000 draws)."""

    value: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        spec = spec or ".3f"
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"

    def __str__(self) -> str:
        return format(self)


@dataclass(frozen=True)
class ClassScores:
    """Classification; `str` gives Markdown.

    Attributes
    ----------
    classes : tuple of str
    confusion : tuple of tuples of int
        Rows: label; columns: likeliest class.
    balanced_accuracy : Measured
        Mean recall over the classes that occur.
    accuracy, macro_f1, roc_auc : float
        `macro_f1` is the unweighted mean over the classes that occur or are predicted; `roc_auc` the mean over the
        classes that occur of one against the rest, NaN where one class is all that does.
    nll : float
        Mean negative logarithm of the probability of the label, in nats.
    ece : float
        Expected calibration error: mean distance of confidence from accuracy, over 15 bins of confidence.
    precision, recall, f1 : tuple of float
        Per class; NaN without a prediction or a label.
    constant_accuracy, constant_nll : float
        Of always giving the classes' shares among the galaxies fitted to.

    References
    ----------
    Guo et al. 2017, "On calibration of modern neural networks" (arXiv:1706.04599), equation 3, for `ece`.
    """

    classes: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]
    balanced_accuracy: Measured
    accuracy: float
    macro_f1: float
    roc_auc: float
    nll: float
    ece: float
    precision: tuple[float, ...]
    recall: tuple[float, ...]
    f1: tuple[float, ...]
    constant_accuracy: float
    constant_nll: float

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready form, None for NaN."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain

    def __str__(self) -> str:
        rows = zip(self.classes, self.precision, self.recall, self.f1, self.confusion, strict=True)
        return "\n".join(
            [
                f"**Balanced accuracy {self.balanced_accuracy}** (guessing: {1 / len(self.classes):.3f})",
                "",
                "| | this head | a constant answer |",
                "| --- | --- | --- |",
                f"| accuracy | {self.accuracy:.3f} | {self.constant_accuracy:.3f} |",
                f"| NLL | {self.nll:.3f} | {self.constant_nll:.3f} |",
                f"| macro F1 | {self.macro_f1:.3f} | |",
                f"| ROC AUC | {self.roc_auc:.3f} | 0.500 |",
                f"| calibration error | {self.ece:.3f} | |",
                "",
                "| class | precision | recall | F1 | galaxies |",
                "| --- | --- | --- | --- | --- |",
                *(f"| {name} | {p:.3f} | {r:.3f} | {f:.3f} | {sum(found)} |" for name, p, r, f, found in rows),
                "",
                "| label \\ predicted | " + " | ".join(self.classes) + " |",
                "| --- |" + " --- |" * len(self.classes),
                *(
                    f"| {name} | " + " | ".join(map(str, row)) + " |"
                    for name, row in zip(self.classes, self.confusion, strict=True)
                ),
            ]
        )


@dataclass(frozen=True)
class NumberScores:
    """Regression; `str` gives Markdown.

    Attributes
    ----------
    unit : str
        Of the errors; empty if unknown.
    galaxies : int
    rmse, mae, r2 : Measured
    bias : float
        Mean of predicted minus given.
    constant_rmse, constant_mae : float
        Of always giving the mean of the galaxies fitted to.
    """

    unit: str
    galaxies: int
    rmse: Measured
    mae: Measured
    r2: Measured
    bias: float
    constant_rmse: float
    constant_mae: float

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready form, None for NaN."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain

    def __str__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        return "\n".join(
            [
                f"**RMSE {self.rmse:.3g}{unit}** on {self.galaxies} galaxies",
                "",
                "| | this head | a constant answer |",
                "| --- | --- | --- |",
                f"| RMSE{unit} | {self.rmse:.3g} | {self.constant_rmse:.3g} |",
                f"| MAE{unit} | {self.mae:.3g} | {self.constant_mae:.3g} |",
                f"| bias{unit} | {self.bias:+.2g} | |",
                f"| R² | {self.r2} | 0 |",
            ]
        )


@dataclass(frozen=True)
class VoteScores:
    """Votes; `str` gives Markdown.

    Attributes
    ----------
    questions, values : pa.Table
        `training.scores.evaluation.QUESTIONS` and `VALUES`.
    """

    questions: pa.Table
    values: pa.Table

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready form, None for NaN."""
        rows = [*self.questions.to_pylist(), *self.values.to_pylist()]
        return {str(row["question"]): _plain(row) for row in rows}

    def __str__(self) -> str:
        lines = ["| question | galaxies | NLL | constant | RMSE | constant |", "| --- |" + " --- |" * 5]
        for row in self.questions.to_pylist():
            numbers = " | ".join(f"{row[name]:.3f}" for name in ("nll", "nll_constant", "rmse", "rmse_constant"))
            lines.append(f"| {row['question']} | {row['galaxies']} | {numbers} |")
        for row in self.values.to_pylist():
            unit = f" [{row['unit']}]" if row["unit"] else ""
            errors = f"{row['rmse']:.3g} | {row['rmse_constant']:.3g}"
            lines.append(f"| {row['question']}{unit} | {row['galaxies']} | | | {errors} |")
        return "\n".join(lines)


def score_classes(
    classes: Sequence[str], truth: NDArray[np.intp], chances: NDArray[Any], shares: NDArray[Any], *, seed: int = 0
) -> ClassScores:
    """Score predicted probabilities.

    Parameters
    ----------
    classes : sequence of str
    truth : ndarray, shape (galaxy,), int
        Place of each label in `classes`.
    chances : ndarray, shape (galaxy, class)
        Predicted probabilities, rows summing to 1.
    shares : ndarray, shape (class,) or (galaxy, class)
        Of the classes among the galaxies that the head was fitted to.
    seed : int
        Of the bootstrap.
    """
    count = len(classes)
    predicted = chances.argmax(axis=1)
    confusion = np.zeros((count, count), int)
    np.add.at(confusion, (truth, predicted), 1)
    right, called, there = np.diag(confusion), confusion.sum(axis=0), confusion.sum(axis=1)
    precision, recall = _ratio(right, called), _ratio(right, there)
    f1 = _ratio(2 * right, called + there)
    shares = np.broadcast_to(shares, chances.shape)

    def balanced(rows: NDArray[np.intp]) -> float:
        found = np.bincount(truth[rows], minlength=count)
        hits = np.bincount(truth[rows], weights=predicted[rows] == truth[rows], minlength=count)
        return float(np.mean(hits[found > 0] / found[found > 0]))

    return ClassScores(
        classes=tuple(classes),
        confusion=tuple(tuple(map(int, row)) for row in confusion),
        balanced_accuracy=measured(balanced, len(truth), seed),
        accuracy=float(right.sum() / len(truth)),
        macro_f1=_mean(f1),
        roc_auc=_mean([area_under_curve(truth == label, chances[:, label]) for label in range(count)]),
        nll=_nll(truth, chances),
        ece=calibration_error(truth, chances),
        precision=tuple(map(float, precision)),
        recall=tuple(map(float, recall)),
        f1=tuple(map(float, f1)),
        constant_accuracy=float(np.mean(shares.argmax(axis=1) == truth)),
        constant_nll=_nll(truth, shares),
    )


def score_numbers(
    predicted: NDArray[Any], given: NDArray[Any], constant: NDArray[Any], unit: str = "", *, seed: int = 0
) -> NumberScores:
    """Score predicted numbers.

    Parameters
    ----------
    predicted, given : ndarray, shape (galaxy,)
    constant : ndarray, shape (galaxy,) or ()
        Mean of the galaxies that the head was fitted to.
    unit : str
    seed : int
        Of the bootstrap.
    """
    p, y = np.asarray(predicted, np.float64), np.asarray(given, np.float64)
    flat = value_errors(np.broadcast_to(constant, y.shape), y)

    def statistic(name: str) -> Measured:
        return measured(lambda rows: float(getattr(value_errors(p[rows], y[rows]), name)), len(y), seed)

    rmse, mae, r2 = map(statistic, ("rmse", "mae", "r2"))
    return NumberScores(unit, len(y), rmse, mae, r2, float(np.mean(p - y)), flat.rmse, flat.mae)


def calibration_error(truth: NDArray[np.intp], chances: NDArray[Any], bins: int = CONFIDENCE_BINS) -> float:
    """Return the expected calibration error of the likeliest class; see `ClassScores`."""
    confidence, right = chances.max(axis=1), chances.argmax(axis=1) == truth
    at = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(at, weights=confidence - right, minlength=bins)
    return float(np.abs(gaps).sum() / len(truth))


def area_under_curve(positive: NDArray[np.bool_], score: NDArray[Any]) -> float:
    """Return the probability that a positive scores above a negative, ties counting half; NaN without either.

    References
    ----------
    Hanley & McNeil 1982, Radiology 143, 29: it is the area under the ROC curve, and Mann and Whitney's U.
    """
    from scipy.stats import rankdata

    ranks, count = rankdata(score), int(positive.sum())
    if not 0 < count < len(positive):
        return float("nan")
    above = ranks[positive].sum() - count * (count + 1) / 2
    return float(above / (count * (len(positive) - count)))


def measured(statistic: Callable[[NDArray[np.intp]], float], count: int, seed: int = 0) -> Measured:
    """Return a statistic of `count` rows, given as row numbers, with its bootstrap interval."""
    rng = np.random.default_rng(seed)
    draws = [statistic(rng.integers(0, count, count)) for _ in range(_DRAWS)]
    low, high = np.nanquantile(draws, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return Measured(statistic(np.arange(count)), float(low), float(high))


def _nll(truth: NDArray[np.intp], chances: NDArray[Any]) -> float:
    given = np.asarray(chances, np.float64)[np.arange(len(truth)), truth]
    return float(np.mean(-np.log(np.maximum(given, np.finfo(np.float32).tiny))))


def _mean(values: Sequence[float] | Floats) -> float:
    """Return the mean of what is not NaN; NaN where all is."""
    known = np.asarray(values, np.float64)
    known = known[np.isfinite(known)]
    return float(known.mean()) if len(known) else float("nan")


def _ratio(above: NDArray[Any], below: NDArray[Any]) -> Floats:
    return np.asarray(np.divide(above, below, out=np.full(len(above), np.nan), where=below > 0))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and np.isnan(value) else value
