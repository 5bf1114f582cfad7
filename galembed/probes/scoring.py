"""Reports: what predictions of sources that a probe was not fitted to are worth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
from astropy.table import Table
from numpy.typing import NDArray

from galembed.errors import BadRequest
from galembed.labels import CLASSIFICATION, REGRESSION, Labelled, match_labels
from galembed.linear import Folds, apart, log_softmax
from galembed.probes.model import Probe
from galembed.probes.reports import MISTAKES, ClassScore, Mistake, NumberReport, NumberScore, ProbeReport, Report
from galembed.probes.scores import (
    Calibration,
    Interval,
    areas,
    balanced_accuracy,
    calibration,
    class_intervals,
    confusion,
    error_intervals,
    errors,
    mean_known,
    precision_and_recall,
    scaled_by_others,
    temperature,
)
from galembed.probes.tasks import Floats, Indices, Task, predicted, task_of
from galembed.store import Store

FOLDS: Final = 5


def evaluate_probe(
    store: Store,
    probe: Probe,
    labels: Table | str | Path,
    column: str | Sequence[str] | None = None,
    *,
    id_column: str | None = None,
    radius: float | None = None,
    seed: int = 0,
) -> Report:
    """Score a probe on labelled sources that it was not fitted to; those that it was are left out.

    Parameters
    ----------
    column : str or sequence of str, optional
        Label column; the probe's own if not given. For votes in the order of the probe's answers.
    id_column, radius
        See `fit_probe`.
    seed : int
        Of the bootstrap.

    Raises
    ------
    ArtifactMismatch
        If the store's vectors are of another backbone.
    BadRequest
        If no labelled source is left.
    """
    probe.require_store(store)
    labelled = match_labels(store, labels, column or probe.columns, id_column, radius, probe.kind)
    unseen = ~np.isin(labelled.hashes, probe.trained_on)
    known = np.isin(labelled.labels, probe.classes) if probe.kind == CLASSIFICATION else np.ones(len(labelled), bool)
    left_out = dict(sorted(Counter(labelled.labels[unseen & ~known].tolist()).items()))
    seen = int((~unseen).sum())
    labelled = labelled.keep(unseen & known)
    if not len(labelled):
        raise BadRequest(
            f"no labelled source to score on: {seen} were used in the fit, {sum(left_out.values())} have "
            f"a label it does not know ({', '.join(left_out) or 'none'})"
        )
    task, classes = task_of(labelled, probe.classes)
    groups, how = apart(task.cells, task.together, FOLDS, seed, task.classes)
    method = f"a held-out table ({seen} source(s) that the probe was fitted to left out; bootstrap over groups {how})"
    found = probe.outputs(task.vectors)
    return report_of(labelled, task, classes, found, groups, method=method, folds=[], left_out=left_out, seed=seed)


def report_of(
    labelled: Labelled,
    task: Task,
    classes: tuple[str, ...],
    found: Floats,
    groups: NDArray[np.int64],
    *,
    method: str,
    folds: Folds,
    left_out: Mapping[str, int],
    seed: int,
) -> Report:
    """Return the report on what linear layers gave for rows that they were not fitted to.

    Parameters
    ----------
    labelled, task, classes
        Labels, the same as numbers, and the names of the outputs.
    found : ndarray, shape (row, class)
        Logits, or numbers.
    groups : ndarray, shape (row,), int64
        That the bootstrap draws.
    method : str
        In words.
    folds : Folds
        Of the cross-validation; empty for a held-out table.
    left_out, seed
        As in `ProbeReport`; of the bootstrap.
    """
    if task.kind == CLASSIFICATION:
        return _class_report(labelled, task.truth, classes, found, groups, method, folds, left_out, seed)
    numbers = predicted(task.kind, found)
    point, ranges = errors(task.truth, numbers), error_intervals(task.truth, numbers, groups, seed)
    scores = tuple(
        NumberScore(
            name,
            rmse=float(point.rmse[at]),
            mae=float(point.mae[at]),
            bias=float(point.bias[at]),
            r2=float(point.r2[at]),
            spread=float(point.spread[at]),
            rmse_interval=_pair(ranges.rmse[at]),
            mae_interval=_pair(ranges.mae[at]),
            r2_interval=_pair(ranges.r2[at]),
        )
        for at, name in enumerate(classes)
    )
    return NumberReport(
        column=", ".join(labelled.columns),
        method=method,
        kind=task.kind,
        count=len(labelled),
        scores=scores,
        unit=labelled.unit,
        unmatched=labelled.unmatched,
        unlabelled=labelled.unlabelled,
        ambiguous=labelled.ambiguous,
        why=labelled.why,
        mistakes=_number_mistakes(labelled, task, numbers),
        truth=task.truth,
        predicted=numbers,
    )


def _class_report(
    labelled: Labelled,
    truth: Indices,
    classes: tuple[str, ...],
    logits: Floats,
    groups: NDArray[np.int64],
    method: str,
    folds: Folds,
    left_out: Mapping[str, int],
    seed: int,
) -> ProbeReport:
    called = logits.argmax(axis=1)
    counts = confusion(truth, called, len(classes))
    precision, recall = precision_and_recall(counts)
    area, ranges = areas(logits, truth), class_intervals(logits, truth, groups, seed)
    scores = tuple(
        ClassScore(
            name,
            precision=float(precision[at]),
            recall=float(recall[at]),
            support=int(counts[at].sum()),
            auc=float(area[at]),
            precision_interval=_pair(ranges.precision[at]),
            recall_interval=_pair(ranges.recall[at]),
            auc_interval=_pair(ranges.areas[at]),
        )
        for at, name in enumerate(classes)
    )
    calibrated = Calibration(*calibration(logits, truth))
    if folds:
        before, logits = logits, scaled_by_others(logits, truth, folds)
        after = calibration(logits, truth)
        calibrated = Calibration(*after, calibrated.ece, calibrated.bins, temperature(before, truth))
    by_fold = [balanced_accuracy(truth[test], called[test]) for _, test in folds]
    return ProbeReport(
        column=", ".join(labelled.columns),
        method=method,
        balanced_accuracy=float(mean_known(recall)),
        spread=float(np.std(by_fold, ddof=1)) if folds else float("nan"),
        chance=1 / len(classes),
        scores=scores,
        confusion=tuple(tuple(map(int, row)) for row in counts),
        unmatched=labelled.unmatched,
        unlabelled=labelled.unlabelled,
        ambiguous=labelled.ambiguous,
        left_out=dict(left_out),
        why=labelled.why,
        interval=ranges.balanced,
        auc=float(mean_known(area)),
        auc_interval=ranges.area,
        calibration=calibrated,
        mistakes=_class_mistakes(labelled, truth, logits, classes),
    )


def _pair(values: Floats) -> Interval:
    return float(values[0]), float(values[1])


def _class_mistakes(
    labelled: Labelled, truth: Indices, logits: Floats, classes: tuple[str, ...]
) -> tuple[Mistake, ...]:
    chances = np.exp(log_softmax(logits))
    called, sure = chances.argmax(axis=1), chances.max(axis=1)
    wrong = np.flatnonzero(called != truth)
    order = wrong[np.argsort(-sure[wrong], kind="stable")][:MISTAKES]
    label, call = ([classes[numbers[row]] for row in order] for numbers in (truth, called))
    return _listed(labelled, order, label, call, sure)


def _number_mistakes(labelled: Labelled, task: Task, numbers: Floats) -> tuple[Mistake, ...]:
    off = np.abs(numbers - task.truth).sum(axis=1) / (1 if task.kind == REGRESSION else 2)
    order = np.argsort(-off, kind="stable")[:MISTAKES]
    label, call = ([_text(values[row]) for row in order] for values in (task.truth, numbers))
    return _listed(labelled, order, label, call, off)


def _text(values: Floats) -> str:
    return " ".join(f"{value:.3g}" for value in values)


def _listed(
    labelled: Labelled, rows: Indices, label: Sequence[str], called: Sequence[str], sizes: Floats
) -> tuple[Mistake, ...]:
    chosen = labelled.keys.take(pa.array(rows))
    keys = (chosen[name].to_pylist() for name in ("survey", "source_id"))
    return tuple(Mistake(*one) for one in zip(*keys, label, called, sizes[rows].tolist(), strict=True))
