"""Probes: classify a whole store from a few labels, with a linear classifier on its vectors.

::

    probe/
        probe.json           embedding_id, classes, how it was fitted and how well it did
        probe.safetensors    coefficients, and hashes of the sources it was trained on
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from astropy.table import Table
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from galembed.errors import ArtifactMismatch, ArtifactNotFound, BadRequest
from galembed.labels import Labelled, Labels, Matrix, match_labels
from galembed.linear import CHOICE_FOLDS, apart, choice_folds, equal_rows, fit_logistic, make_folds, softmax_layer
from galembed.store import Store, matrix

MIN_MEMBERS: Final = 5
"""Classes with fewer labelled sources are left out: each of five folds must be able to hold one."""

_STRENGTHS: Final = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
_FOLDS: Final = 5
_PROBE_FORMAT: Final = 1


@dataclass(frozen=True)
class ClassScore:
    """How one class fares.

    Attributes
    ----------
    name : str
    precision : float
        Fraction of the sources called so that are so; NaN if none was.
    recall : float
        Fraction of the sources that are so that were called so.
    support : int
        Labelled sources.
    """

    name: str
    precision: float
    recall: float
    support: int


@dataclass(frozen=True)
class ProbeReport:
    """How well a probe does on sources it was not fitted to; `str` gives Markdown.

    Attributes
    ----------
    column : str
        Label column.
    method : str
        What the numbers were measured on.
    balanced_accuracy : float
        Mean recall over the classes, mean over the folds.
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

    @property
    def count(self) -> int:
        """Labelled sources that were scored."""
        return sum(score.support for score in self.scores)

    def __str__(self) -> str:
        spread = f" ± {self.spread:.3f}" if np.isfinite(self.spread) else ""
        lines = [
            f"# Probe for `{self.column}`",
            "",
            f"**Balanced accuracy {self.balanced_accuracy:.3f}{spread}** (guessing: {self.chance:.3f}), "
            f"{self.count} sources, {len(self.scores)} classes; {self.method}.",
            "",
            *_notes(self),
            "| class | precision | recall | sources |",
            "| --- | --- | --- | --- |",
            *(f"| {s.name} | {s.precision:.3f} | {s.recall:.3f} | {s.support} |" for s in self.scores),
            "",
            "| label \\ predicted | " + " | ".join(score.name for score in self.scores) + " |",
            "| --- |" + " --- |" * len(self.scores),
            *(
                f"| {score.name} | " + " | ".join(map(str, row)) + " |"
                for score, row in zip(self.scores, self.confusion, strict=True)
            ),
        ]
        return "\n".join(lines)


def _notes(report: ProbeReport) -> list[str]:
    notes = []
    if report.unmatched:
        notes.append(f"- {report.unmatched} label(s) name sources that are not in the store")
    if report.ambiguous:
        notes.append(f"- {report.ambiguous} label(s) are near several sources, or labels that differ, and left out")
    if report.unlabelled:
        notes.append(f"- {report.unlabelled} row(s) of the table have no label")
    if report.left_out:
        counts = ", ".join(f"{name} ({count})" for name, count in report.left_out.items())
        notes.append(f"- left out: {counts}")
    return [*notes, ""] if notes else []


@dataclass(frozen=True)
class Probe:
    """A fitted linear classifier over the vectors of one backbone.

    Attributes
    ----------
    name, column : str
        Its name, and the label column that it was fitted to.
    embedding_id : str
        Identity of the backbone whose vectors it reads.
    classes : tuple of str
    weights : ndarray, shape (class, dim), float64
    intercept : ndarray, shape (class,), float64
    trained_on : ndarray of uint64
        Hashes of the keys it was fitted to, so that `evaluate_probe` can leave them out.
    provenance : mapping
        Regularisation, seed, score in cross-validation.
    """

    name: str
    column: str
    embedding_id: str
    classes: tuple[str, ...]
    weights: NDArray[np.float64] = field(repr=False)
    intercept: NDArray[np.float64] = field(repr=False)
    trained_on: NDArray[np.uint64] = field(repr=False)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def probabilities(self, vectors: NDArray[Any]) -> NDArray[np.float64]:
        """Return the probability of each class.

        Classes are weighted equally in the fit, so these are not corrected for how common a class is.

        Parameters
        ----------
        vectors : ndarray, shape (n, dim)

        Returns
        -------
        ndarray, shape (n, class), float64
            Rows sum to 1.
        """
        logits = np.asarray(vectors, np.float64) @ self.weights.T + self.intercept
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return np.asarray(powers / powers.sum(axis=1, keepdims=True))

    def require_store(self, store: Store) -> None:
        """Check that a store's vectors are of the backbone that the probe was fitted on.

        Raises
        ------
        ArtifactMismatch
        """
        if store.contract.embedding_id != self.embedding_id:
            raise ArtifactMismatch(
                f"probe {self.name!r} was fitted on vectors of backbone {self.embedding_id[:12]}, the store "
                f"{store.path} holds those of {store.contract.embedding_id[:12]}; fit a probe on this store"
            )


# ---------------------------------------------------------------------------------------------------- fitting


def fit_probe(
    store: Store,
    labels: Table | str | Path,
    column: str,
    *,
    id_column: str | None = None,
    radius: float | None = None,
    seed: int = 0,
    name: str | None = None,
) -> tuple[Probe, ProbeReport]:
    """Fit a classifier to labelled sources.

    Logistic regression on standardised vectors, classes weighted equally. It is scored by cross-validation in
    which all sources of a sky cell stay in one fold (neighbours on the sky share seeing, depth and
    calibration, which a random split would reward); the regularisation is chosen inside each training part,
    so the score does not profit from it.

    Parameters
    ----------
    store : Store
    labels : Table, str or Path
        Labelled sources, or a file of them (FITS, VOTable, ECSV, CSV, Parquet).
    column : str
        Label column: text, integers or booleans. Rows where it is missing are passed over.
    id_column : str, optional
        Column that holds the store's `source_id`; guessed if not given.
    radius : float, optional
        Match by position instead of by id, within so many arcsec; see `galembed.label_positions`.
    seed : int
        Of the folds.
    name : str, optional
        Name of the probe; the column's if not given.

    Raises
    ------
    UnreadableInput, ArtifactNotFound
        If the file cannot be read, or is absent.
    BadRequest
        If the columns are not there, the labels are not classes or contradict each other, no source is in the
        store, or fewer than two classes have five members.
    """
    matched = match_labels(store, labels, column, id_column, radius)
    counts = Counter(matched.labels.tolist())
    small = {label: count for label, count in sorted(counts.items()) if count < MIN_MEMBERS}
    matched = matched.keep(~np.isin(matched.labels, list(small)))
    classes = np.unique(matched.labels)
    if len(classes) < 2:
        raise BadRequest(
            f"a probe needs two classes of at least {MIN_MEMBERS} labelled sources in the store; "
            f"column {column!r} gives {dict(sorted(counts.items()))}, "
            f"{matched.unmatched} label(s) not in the store"
        )
    truth = np.searchsorted(classes, matched.labels)
    groups, how = apart(matched.cells, equal_rows(matched.vectors), _FOLDS, seed, truth)
    outer = make_folds(groups, _FOLDS, seed, truth)
    method = f"{len(outer)}-fold cross-validation, folds {how}"
    predicted = np.empty_like(truth)
    for train, test in outer:
        strength = _choose_strength(matched.vectors[train], truth[train], matched.cells[train], seed)
        predicted[test] = fit_logistic(matched.vectors[train], truth[train], strength).predict(matched.vectors[test])
    folds = [_balanced_accuracy(truth[test], predicted[test]) for _, test in outer]
    report = _report(column, method, folds, classes, truth, predicted, matched, small)
    strength = _choose_strength(matched.vectors, truth, matched.cells, seed)
    weights, intercept = softmax_layer(fit_logistic(matched.vectors, truth, strength))
    probe = Probe(
        name=name or column,
        column=column,
        embedding_id=store.contract.embedding_id,
        classes=tuple(map(str, classes)),
        weights=weights,
        intercept=intercept,
        trained_on=np.sort(matched.hashes),
        provenance={"C": strength, "seed": seed, "sources": len(truth), "cross_validation": _summary(report)},
    )
    return probe, report


def _choose_strength(vectors: Matrix, truth: NDArray[np.intp], cells: NDArray[np.int64], seed: int) -> float:
    """Return the regularisation (sklearn's C) with the best balanced accuracy over three folds."""
    groups, _ = apart(cells, equal_rows(vectors), CHOICE_FOLDS, seed, truth)
    folds = choice_folds(groups, seed, truth)
    if not folds:
        return _STRENGTHS[len(_STRENGTHS) // 2]

    def score(strength: float) -> float:
        models = (fit_logistic(vectors[train], truth[train], strength) for train, _ in folds)
        pairs = zip(models, folds, strict=True)
        return float(np.mean([_balanced_accuracy(truth[test], m.predict(vectors[test])) for m, (_, test) in pairs]))

    return max(_STRENGTHS, key=score)


def _balanced_accuracy(truth: NDArray[np.intp], predicted: NDArray[np.intp]) -> float:
    """Return the mean recall over the classes that occur in `truth`."""
    return float(np.mean([(predicted[truth == label] == label).mean() for label in np.unique(truth)]))


def _report(
    column: str,
    method: str,
    folds: Sequence[float],
    classes: Labels,
    truth: NDArray[np.intp],
    predicted: NDArray[np.intp],
    matched: Labelled,
    left_out: Mapping[str, int],
) -> ProbeReport:
    confusion = np.zeros((len(classes), len(classes)), int)
    np.add.at(confusion, (truth, predicted), 1)
    called, support, right = confusion.sum(axis=0), confusion.sum(axis=1), np.diag(confusion)
    scores = tuple(
        ClassScore(
            str(label),
            precision=float(right[row] / called[row]) if called[row] else float("nan"),
            recall=float(right[row] / support[row]) if support[row] else float("nan"),
            support=int(support[row]),
        )
        for row, label in enumerate(classes)
    )
    return ProbeReport(
        column=column,
        method=method,
        balanced_accuracy=float(np.mean(folds)),
        spread=float(np.std(folds, ddof=1)) if len(folds) > 1 else float("nan"),
        chance=1 / len(classes),
        scores=scores,
        confusion=tuple(tuple(map(int, row)) for row in confusion),
        unmatched=matched.unmatched,
        unlabelled=matched.unlabelled,
        ambiguous=matched.ambiguous,
        left_out=dict(left_out),
    )


def _summary(report: ProbeReport) -> dict[str, Any]:
    return {
        "balanced_accuracy": report.balanced_accuracy,
        "spread": report.spread,
        "method": report.method,
        # JSON has no NaN.
        "classes": [
            {key: None if value != value else value for key, value in asdict(score).items()} for score in report.scores
        ],
    }


# ------------------------------------------------------------------------------------ evaluating and applying


def evaluate_probe(
    store: Store,
    probe: Probe,
    labels: Table | str | Path,
    column: str | None = None,
    *,
    id_column: str | None = None,
    radius: float | None = None,
) -> ProbeReport:
    """Score a probe on labelled sources that it was not fitted to; those that it was are left out.

    Parameters
    ----------
    column : str, optional
        Label column; the probe's own if not given.
    id_column, radius
        See `fit_probe`.

    Raises
    ------
    ArtifactMismatch
        If the store's vectors are of another backbone.
    BadRequest
        If no labelled source is left.
    """
    probe.require_store(store)
    column = column or probe.column
    matched = match_labels(store, labels, column, id_column, radius)
    unseen = ~np.isin(matched.hashes, probe.trained_on)
    known = np.isin(matched.labels, probe.classes)
    left_out = dict(sorted(Counter(matched.labels[unseen & ~known].tolist()).items()))
    seen = int((~unseen).sum())
    matched = matched.keep(unseen & known)
    if not len(matched.labels):
        raise BadRequest(
            f"no labelled source to score on: {seen} were used in the fit, {sum(left_out.values())} have "
            f"a label it does not know ({', '.join(left_out) or 'none'})"
        )
    classes = np.array(probe.classes)
    truth = np.searchsorted(classes, matched.labels)
    predicted = np.argmax(probe.probabilities(matched.vectors), axis=1)
    method = f"a held-out table ({seen} source(s) that the probe was fitted to left out)"
    return _report(column, method, [_balanced_accuracy(truth, predicted)], classes, truth, predicted, matched, left_out)


def apply_probe(store: Store, probe: Probe, out: str | Path) -> int:
    """Classify every row of a store into a Parquet file; return the number of rows.

    Columns: `survey`, `source_id`, `ra`, `dec`, `predicted` and `probability_<class>` (float32, summing to
    1). Rows pass through in batches: the store may be larger than memory.

    Raises
    ------
    ArtifactMismatch
        If the store's vectors are of another backbone.
    """
    probe.require_store(store)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    schema = _predictions_schema(store, probe)
    rows = 0
    with pq.ParquetWriter(partial, schema, compression="zstd") as writer:
        for batch in _predictions(store, probe, schema):
            writer.write_batch(batch)
            rows += batch.num_rows
    partial.replace(out)
    return rows


def _predictions_schema(store: Store, probe: Probe) -> pa.Schema:
    fields = [store.schema.field(name) for name in ("survey", "source_id", "ra", "dec")]
    fields.append(pa.field("predicted", pa.string(), metadata={"doc": f"most probable class of {probe.column}"}))
    fields += [pa.field(f"probability_{name}", pa.float32()) for name in probe.classes]
    return pa.schema(fields, metadata={"galembed.probe": probe.name, "galembed.embedding_id": probe.embedding_id})


def _predictions(store: Store, probe: Probe, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    classes = np.array(probe.classes)
    for batch in store.batches(["survey", "source_id", "ra", "dec", "vector"]):
        chances = probe.probabilities(matrix(batch.column("vector")))
        arrays = [batch.column(name) for name in ("survey", "source_id", "ra", "dec")]
        arrays.append(pa.array(classes[np.argmax(chances, axis=1)], pa.string()))
        arrays += [pa.array(column.astype(np.float32)) for column in chances.T]
        yield pa.RecordBatch.from_arrays(arrays, schema=schema)


# ---------------------------------------------------------------------------------------------------- on disk


def save_probe(probe: Probe, path: str | Path) -> Path:
    """Write a probe as a directory; an older probe there is replaced.

    Raises
    ------
    BadRequest
        If `path` is a file, or a directory that holds something else.
    """
    directory = Path(path)
    if directory.is_file() or (
        directory.is_dir() and any(directory.iterdir()) and not (directory / "probe.json").exists()
    ):
        raise BadRequest(f"{directory} exists and is not a probe; choose another --out")
    directory.mkdir(parents=True, exist_ok=True)
    arrays = {"weights": probe.weights, "intercept": probe.intercept, "trained_on": probe.trained_on}
    save_file({key: np.ascontiguousarray(value) for key, value in arrays.items()}, directory / "probe.safetensors")
    description = {
        "format": _PROBE_FORMAT,
        "name": probe.name,
        "column": probe.column,
        "embedding_id": probe.embedding_id,
        "classes": list(probe.classes),
        "provenance": dict(probe.provenance),
    }
    partial = directory / "probe.json.partial"
    partial.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    partial.replace(directory / "probe.json")
    return directory


def load_probe(path: str | Path) -> Probe:
    """Read what `save_probe` wrote.

    Raises
    ------
    ArtifactNotFound
        If there is no probe.
    ArtifactMismatch
        If it is damaged, or of another format.
    """
    directory = Path(path)
    files = (directory / "probe.json", directory / "probe.safetensors")
    if not all(file.is_file() for file in files):
        raise ArtifactNotFound(f"no probe in {directory}; make one with `galembed probe fit`")
    try:
        data = json.loads(files[0].read_text(encoding="utf-8"))
        arrays = load_file(files[1])
        if data["format"] != _PROBE_FORMAT:
            raise ArtifactMismatch(f"{directory}: probe format {data['format']}, this galembed reads {_PROBE_FORMAT}")
        probe = Probe(
            name=data["name"],
            column=data["column"],
            embedding_id=data["embedding_id"],
            classes=tuple(data["classes"]),
            weights=arrays["weights"],
            intercept=arrays["intercept"],
            trained_on=arrays["trained_on"],
            provenance=data["provenance"],
        )
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        if isinstance(error, ArtifactMismatch):
            raise
        raise ArtifactMismatch(f"{directory} is a damaged probe ({error!r}); fit it again") from error
    if len(probe.classes) != len(probe.weights):
        raise ArtifactMismatch(f"{directory}: {len(probe.classes)} classes but {len(probe.weights)} rows of weights")
    return probe
