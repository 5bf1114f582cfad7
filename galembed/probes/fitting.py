"""Fitting probes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from astropy.table import Table

from galembed.errors import BadRequest
from galembed.labels import CLASSIFICATION, REGRESSION, Labelled, known_labels, match_labels
from galembed.linear import Folds, apart, make_folds
from galembed.probes.model import Probe, check_name, plain_name
from galembed.probes.reports import CurvePoint, ProbeReport, Report, summary
from galembed.probes.scores import outputs
from galembed.probes.scoring import FOLDS, report_of
from galembed.probes.tasks import MIN_MEMBERS, Floats, Task, choose_strength, drawn, task_of
from galembed.store import Store

_CURVE_POINTS: Final = 5
_CURVE_ROWS: Final = 20_000
_CURVE_CHOICE_ROWS: Final = 2_000


def fit_probe(
    store: Store,
    labels: Table | str | Path,
    column: str | Sequence[str],
    *,
    kind: str | None = None,
    id_column: str | None = None,
    radius: float | None = None,
    seed: int = 0,
    name: str | None = None,
    curve: bool = True,
) -> tuple[Probe, Report]:
    """Fit a linear model to labelled sources.

    Classes: logistic regression, classes weighted equally, probabilities made true by a temperature. Numbers: ridge
    regression. Votes: logistic regression on fractions. All on standardised vectors.

    It is scored by cross-validation in which all sources of a sky cell stay in one fold (neighbours on the sky share
    seeing, depth and calibration, which a random split would reward); the regularisation is chosen inside each
    training part, by the likelihood or squared error of what is left out there, so the score does not profit from it.

    Parameters
    ----------
    store : Store
    labels : Table, str or Path
        Labelled sources, or a file of them (FITS, VOTable, ECSV, CSV, Parquet).
    column : str or sequence of str
        Label column: text, integers, booleans or floats. Several: vote fractions that sum to one, or counts. Rows
        where it is missing are passed over.
    kind : str, optional
        ``classification``, ``regression`` or ``votes``; told from the column unless given, see
        `galembed.labels.match_labels`.
    id_column : str, optional
        Column that holds the store's `source_id`; guessed if not given.
    radius : float, optional
        Match by position instead of by id, within so many arcsec; see `galembed.label_positions`.
    seed : int
        Of the folds.
    name : str, optional
        Name of the probe: letters, digits and ``_.+-``; the column's if not given.
    curve : bool
        Measure the learning curve, which takes most of the time where labels are few.

    Raises
    ------
    UnreadableInput, ArtifactNotFound
        If the file cannot be read, or is absent.
    BadRequest
        If the columns are not there, the labels do not fit their kind or contradict each other, no source is in the
        store, fewer than two classes have five members, or fewer than ten sources have a number or votes.
    """
    names = [column] if isinstance(column, str) else list(column)
    name = plain_name(names[0]) if name is None else check_name(name)
    labelled = match_labels(store, labels, names, id_column, radius, kind)
    return _fit(store, labelled, name, seed, curve=curve)


def refit_probe(store: Store, probe: Probe) -> tuple[Probe, Report]:
    """Fit a probe again, from the labels it keeps, on a store that may be of another backbone.

    Raises
    ------
    BadRequest
        If it keeps none, or too few of its sources are in the store.
    """
    labelled = known_labels(store, probe.require_labels(), probe.kind, probe.columns, probe.unit)
    return _fit(store, labelled, probe.name, int(probe.provenance.get("seed", 0)), curve=False)


def _fit(store: Store, labelled: Labelled, name: str, seed: int, *, curve: bool) -> tuple[Probe, Report]:
    labelled, left_out = _large_enough(labelled)
    task, classes = task_of(labelled)
    groups, how = apart(task.cells, task.together, FOLDS, seed, task.classes)
    folds = make_folds(groups, FOLDS, seed, task.classes)
    found = np.empty((len(task.truth), len(classes)))
    for train, test in folds:
        part = task.take(train)
        found[test] = outputs(part.fit(choose_strength(part, seed)), task.vectors[test])
    method = f"{len(folds)}-fold cross-validation, folds {how}"
    report = report_of(labelled, task, classes, found, groups, method=method, folds=folds, left_out=left_out, seed=seed)
    if curve:
        report = replace(report, curve=_learning_curve(task, folds, found, seed))
    strength = choose_strength(task, seed)
    weights, intercept = task.fit(strength)
    provenance: dict[str, Any] = {"strength": strength, "seed": seed, "sources": len(labelled)}
    if isinstance(report, ProbeReport) and report.calibration is not None:
        provenance["temperature"] = report.calibration.temperature
        weights, intercept = (part / report.calibration.temperature for part in (weights, intercept))
    probe = Probe(
        name=name,
        column=", ".join(labelled.columns),
        embedding_id=store.contract.embedding_id,
        classes=classes,
        weights=np.ascontiguousarray(weights, np.float64),
        intercept=np.ascontiguousarray(intercept, np.float64),
        trained_on=np.sort(labelled.hashes),
        provenance=provenance | {"cross_validation": summary(report)},
        kind=labelled.kind,
        unit=labelled.unit,
        frequencies=tuple((np.bincount(task.truth) / len(task.truth)).tolist()) if task.kind == CLASSIFICATION else (),
        labels=labelled.table(),
    )
    return probe, report


def _large_enough(labelled: Labelled) -> tuple[Labelled, dict[str, int]]:
    """Return the labels without those of small classes, and these by class."""
    if labelled.kind != CLASSIFICATION:
        if len(labelled) < 2 * FOLDS:
            raise BadRequest(f"a probe needs {2 * FOLDS} labelled sources in the store, found {len(labelled)}")
        if labelled.kind == REGRESSION and not np.ptp(labelled.labels):
            raise BadRequest(f"all labels in {labelled.columns[0]!r} are {labelled.labels[0, 0]:g}; nothing to learn")
        return labelled, {}
    counts = Counter(labelled.labels.tolist())
    small = {label: count for label, count in sorted(counts.items()) if count < MIN_MEMBERS}
    if len(counts) - len(small) < 2:
        raise BadRequest(
            f"a probe needs two classes of at least {MIN_MEMBERS} labelled sources in the store; "
            f"column {labelled.columns[0]!r} gives {dict(sorted(counts.items()))}, "
            f"{labelled.unmatched} label(s) not in the store"
        )
    return labelled.keep(~np.isin(labelled.labels, list(small))), small


def _learning_curve(task: Task, folds: Folds, found: Floats, seed: int) -> tuple[CurvePoint, ...]:
    """Return scores of probes fitted to a part of each training part, and of those fitted to all of it."""
    whole = min(len(train) for train, _ in folds)
    least = max(4 * FOLDS, MIN_MEMBERS * (0 if task.classes is None else len(np.unique(task.classes))))
    sizes = np.unique(np.geomspace(least, max(least, whole), _CURVE_POINTS).astype(int))[:-1]
    points = []
    for size in sizes.tolist():
        scores = []
        for number, (train, test) in enumerate(folds):
            part = task.take(train)
            part = part.take(np.sort(drawn(part, seed + number)[:size]))
            some = test[:: -(-len(test) // _CURVE_ROWS)]
            layer = part.fit(choose_strength(part, seed, _CURVE_CHOICE_ROWS))
            scores.append(task.take(some).score(outputs(layer, task.vectors[some])))
        points.append(_point(size, scores))
    return (*points, _point(whole, [task.take(test).score(found[test]) for _, test in folds]))


def _point(size: int, scores: Sequence[float]) -> CurvePoint:
    known = [score for score in scores if np.isfinite(score)]
    spread = float(np.std(known, ddof=1)) if len(known) > 1 else np.nan
    return CurvePoint(size, float(np.mean(known)) if known else np.nan, spread, len(known))
