"""How well a probe does, in words: `str` of a report is Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from galembed.labels import REGRESSION
from galembed.probes.scores import NO_INTERVAL, Calibration, Interval

MISTAKES = 24
"""How many a report keeps."""


@dataclass(frozen=True)
class ClassScore:
    """How one class fares; intervals are 95%.

    Attributes
    ----------
    name : str
    precision : float
        Fraction of the sources called so that are so; NaN if none was.
    recall : float
        Fraction of the sources that are so that were called so.
    support : int
        Labelled sources.
    auc : float
        Area under the ROC curve of this class against the rest.
    precision_interval, recall_interval, auc_interval : pair of float
    """

    name: str
    precision: float
    recall: float
    support: int
    auc: float = np.nan
    precision_interval: Interval = NO_INTERVAL
    recall_interval: Interval = NO_INTERVAL
    auc_interval: Interval = NO_INTERVAL


@dataclass(frozen=True)
class NumberScore:
    """How well one number, or the fraction of one answer, is predicted; intervals are 95%.

    Attributes
    ----------
    name : str
    rmse, mae, bias : float
        Root mean square, mean absolute, and mean of predicted minus label.
    r2 : float
        Share of the labels' variance that is predicted; NaN where they do not vary.
    spread : float
        Standard deviation of the labels: the RMSE of their mean as the answer for all.
    rmse_interval, mae_interval, r2_interval : pair of float
    """

    name: str
    rmse: float
    mae: float
    bias: float
    r2: float
    spread: float
    rmse_interval: Interval = NO_INTERVAL
    mae_interval: Interval = NO_INTERVAL
    r2_interval: Interval = NO_INTERVAL


@dataclass(frozen=True)
class CurvePoint:
    """Score of probes fitted to fewer labels.

    Attributes
    ----------
    labels : int
    score : float
        Mean of `fits` probes: balanced accuracy, R2, or mean RMSE of the answers.
    spread : float
        Standard deviation over them; NaN for one.
    fits : int
    """

    labels: int
    score: float
    spread: float
    fits: int


@dataclass(frozen=True)
class Mistake:
    """A source of which the probe is surely wrong, or most wrong.

    Attributes
    ----------
    survey, source_id : str
    label, predicted : str
        Classes; or numbers, as text.
    size : float
        Probability of the predicted class; distance of numbers; half the summed distance of fractions.
    """

    survey: str
    source_id: str
    label: str
    predicted: str
    size: float


@dataclass(frozen=True)
class ProbeReport:
    """How well a probe tells classes of sources it was not fitted to; `str` gives Markdown.

    Attributes
    ----------
    column : str
        Label column.
    method : str
        What the numbers were measured on.
    balanced_accuracy : float
        Mean recall over the classes, over all folds together.
    spread : float
        Standard deviation over the folds; NaN for a single held-out table.
    chance : float
        Balanced accuracy of guessing: 1 / number of classes.
    scores : tuple of ClassScore
        Over all folds together.
    confusion : tuple of tuples of int
        Rows: label; columns: prediction; in the order of `scores`.
    unmatched, unlabelled, ambiguous : int
        Labels whose source is not in the store; rows without a label; labels left out since several sources are within
        the radius, or labels that say different things.
    left_out : mapping of str to int
        Labels left out, by class: fewer than five members, or a class that the probe does not know.
    why : str
        What the labels were told to be classes from.
    interval : pair of float
        Of the balanced accuracy, 95%, by bootstrap over the groups that folds do not divide.
    auc : float
        Mean area under the ROC curve, each class against the rest.
    auc_interval : pair of float
    calibration : Calibration, optional
    curve : tuple of CurvePoint
        Balanced accuracy against the number of labels; empty where nothing was fitted.
    mistakes : tuple of Mistake
        The most confident ones first.
    """

    column: str
    method: str
    balanced_accuracy: float
    spread: float
    chance: float
    scores: tuple[ClassScore, ...]
    confusion: tuple[tuple[int, ...], ...]
    unmatched: int = 0
    unlabelled: int = 0
    ambiguous: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)
    why: str = ""
    interval: Interval = NO_INTERVAL
    auc: float = np.nan
    auc_interval: Interval = NO_INTERVAL
    calibration: Calibration | None = None
    curve: tuple[CurvePoint, ...] = ()
    mistakes: tuple[Mistake, ...] = ()

    @property
    def count(self) -> int:
        """Labelled sources that were scored."""
        return sum(score.support for score in self.scores)

    @property
    def score_name(self) -> str:
        """Name of the one number that says most."""
        return "balanced accuracy"

    @property
    def score(self) -> str:
        """That number, with its interval."""
        return _with(self.balanced_accuracy, self.interval)

    def __str__(self) -> str:
        names = [score.name for score in self.scores]
        spread = f"; over the folds ± {self.spread:.3f}" if np.isfinite(self.spread) else ""
        lines = [
            f"# Probe for `{self.column}`",
            "",
            f"**{_capital(self.score_name)} {self.score}** (guessing: {self.chance:.3f}{spread}), ROC AUC "
            f"{_with(self.auc, self.auc_interval)}; {self.count} sources, {len(names)} classes{_because(self.why)}; "
            f"{self.method}.",
            "",
            *_notes(self),
            *markdown_table(
                ("class", "precision", "recall", "ROC AUC", "sources"),
                (
                    (
                        score.name,
                        _with(score.precision, score.precision_interval),
                        _with(score.recall, score.recall_interval),
                        _with(score.auc, score.auc_interval),
                        score.support,
                    )
                    for score in self.scores
                ),
            ),
            *markdown_table(
                ("label \\ predicted", *names),
                ((name, *row) for name, row in zip(names, self.confusion, strict=True)),
            ),
            *_calibration(self.calibration),
            *_curve(self.curve, self.score_name),
            *_mistakes(self.mistakes, "probability", "Most confident mistakes"),
            _BRACKETS,
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class NumberReport:
    """How well a probe predicts numbers or vote fractions of sources it was not fitted to; `str` gives Markdown.

    Attributes
    ----------
    column, method, unmatched, unlabelled, ambiguous, why
        As in `ProbeReport`.
    kind : str
        ``regression`` or ``votes``.
    unit : str
        Of numbers.
    count : int
        Labelled sources that were scored.
    scores : tuple of NumberScore
        One for numbers, one for each answer of votes.
    curve : tuple of CurvePoint
        R2 of numbers, or mean RMSE of the answers, against the number of labels.
    mistakes : tuple of Mistake
        The largest first.
    truth, predicted : ndarray, shape (source, number)
        For pictures.
    """

    column: str
    method: str
    kind: str
    count: int
    scores: tuple[NumberScore, ...]
    unit: str = ""
    unmatched: int = 0
    unlabelled: int = 0
    ambiguous: int = 0
    why: str = ""
    curve: tuple[CurvePoint, ...] = ()
    mistakes: tuple[Mistake, ...] = ()
    truth: NDArray[np.float64] = field(default_factory=lambda: np.empty((0, 0)), repr=False, compare=False)
    predicted: NDArray[np.float64] = field(default_factory=lambda: np.empty((0, 0)), repr=False, compare=False)

    @property
    def rmse(self) -> float:
        """Mean RMSE over the numbers."""
        return float(np.mean([score.rmse for score in self.scores]))

    @property
    def score_name(self) -> str:
        """Name of the one number that says most."""
        return "R²" if self.kind == REGRESSION else "mean RMSE"

    @property
    def score(self) -> str:
        """That number, of one number with its interval."""
        if self.kind == REGRESSION:
            return _with(self.scores[0].r2, self.scores[0].r2_interval)
        return f"{self.rmse:.3g}"

    def __str__(self) -> str:
        what = (
            f"{len(self.scores)} answers" if len(self.scores) > 1 else f"numbers{f' in {self.unit}' * bool(self.unit)}"
        )
        lines = [
            f"# Probe for `{self.column}`",
            "",
            f"**{_capital(self.score_name)} {self.score}**; {self.count} sources, {what}{_because(self.why)}; "
            f"{self.method}.",
            "",
            *_notes(self),
            *markdown_table(
                ("", "RMSE", "MAE", "bias", "R²", "RMSE of the mean"),
                (
                    (
                        one.name,
                        _with(one.rmse, one.rmse_interval, ".3g"),
                        _with(one.mae, one.mae_interval, ".3g"),
                        f"{one.bias:+.2g}",
                        _with(one.r2, one.r2_interval),
                        f"{one.spread:.3g}",
                    )
                    for one in self.scores
                ),
            ),
            *_curve(self.curve, self.score_name),
            *_mistakes(self.mistakes, "error", "Largest errors"),
            _BRACKETS,
        ]
        return "\n".join(lines)


Report = ProbeReport | NumberReport

_BRACKETS = "In brackets: 95% intervals by bootstrap over the groups of sources that folds do not divide."


def _notes(report: Report) -> list[str]:
    notes = []
    if report.unmatched:
        notes.append(f"- {report.unmatched} label(s) name sources that are not in the store")
    if report.ambiguous:
        notes.append(f"- {report.ambiguous} label(s) are near several sources, or labels that differ, and left out")
    if report.unlabelled:
        notes.append(f"- {report.unlabelled} row(s) of the table have no label")
    if isinstance(report, ProbeReport) and report.left_out:
        notes.append("- left out: " + ", ".join(f"{name} ({count})" for name, count in report.left_out.items()))
    return [*notes, ""] if notes else []


def _because(why: str) -> str:
    return f" ({why})" if why else ""


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _with(value: float, interval: Interval, form: str = ".3f") -> str:
    value_text, low, high = ("-" if np.isnan(one) else format(one, form) for one in (value, *interval))
    return value_text if np.isnan(interval[0]) else f"{value_text} [{low}, {high}]"


def markdown_table(heads: Sequence[object], rows: Iterable[Sequence[object]]) -> list[str]:
    """Return the lines of a table in Markdown, and an empty one."""
    lines = [heads, ["---"] * len(heads), *rows]
    return [*("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines), ""]


def _calibration(found: Calibration | None) -> list[str]:
    if found is None:
        return []
    before = f" (before: {found.ece_before:.3f}, temperature {found.temperature:.2f})"
    return [
        f"Expected calibration error {found.ece:.3f}{before if np.isfinite(found.temperature) else ''}, "
        "classes counted as equally common.",
        "",
    ]


def _curve(points: Sequence[CurvePoint], name: str) -> list[str]:
    if not points:
        return []
    rows = [
        (f"{one.labels:,}", f"{one.score:.3f}" + (f" ± {one.spread:.3f}" if np.isfinite(one.spread) else ""), one.fits)
        for one in points
    ]
    return markdown_table(("labels", name, "fits"), rows)


def _mistakes(mistakes: Sequence[Mistake], size: str, title: str) -> list[str]:
    if not mistakes:
        return []
    rows = [(one.source_id, one.label, one.predicted, f"{one.size:.3f}") for one in mistakes]
    return [f"## {title}", "", *markdown_table(("source", "label", "predicted", size), rows)]


def summary(report: Report) -> dict[str, Any]:
    """Return the scores of a report for JSON, which has no NaN."""
    facts: dict[str, Any] = {"method": report.method, "sources": report.count}
    if isinstance(report, ProbeReport):
        facts |= {
            "balanced_accuracy": report.balanced_accuracy,
            "interval": report.interval,
            "spread": report.spread,
            "auc": report.auc,
        }
        if report.calibration is not None:
            facts |= {"ece": report.calibration.ece, "ece_before": report.calibration.ece_before}
    facts["scores"] = [vars(score) for score in report.scores]
    return dict(_plain(facts))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
