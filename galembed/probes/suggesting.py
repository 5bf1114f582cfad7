"""What to label next: sources that a probe is unsure of, and that differ from one another."""

from __future__ import annotations

from typing import Final, Literal

import numpy as np
import pyarrow as pa
from astropy.table import Table
from numpy.typing import NDArray

from galembed.errors import BadRequest
from galembed.labels import CLASSIFICATION, REGRESSION, known_labels, source_hashes
from galembed.probes.applying import predictions
from galembed.probes.model import Probe
from galembed.search import arrow_columns
from galembed.store import Store, matrix

MEASURES: Final = ("entropy", "margin")

_CANDIDATES: Final = (5, 20)
"""Unsure sources kept for each that is asked for, of which the most different are taken: a tenth of the store, but at
least and at most so many."""

Floats = NDArray[np.float64]
Measure = Literal["entropy", "margin"]


def suggest(
    store: Store, probe: Probe, count: int = 50, *, by: Measure = "entropy", where: str | None = None, seed: int = 0
) -> Table:
    """Return the sources whose labels would teach a probe most.

    The least certain sources that are not labelled yet are kept: a tenth of the store, but 5 to 20 for each that is
    asked for. Of these the first is the least certain, and every further one is drawn with a probability that grows
    with its uncertainty and with the squared distance from those taken already, as k-means++ draws its centres. Like
    uncertain sources teach the same.

    Parameters
    ----------
    count : int
    by : str
        Uncertainty of a class: ``entropy`` of the probabilities, or ``margin``, 1 less the distance of the two largest.
        That of numbers and votes is how much of the vector no label has shown yet (the variance of a ridge
        regression's prediction, in units of the noise), whatever is said here.
    where : str, optional
        Only of these rows; as in `galembed.store.Store.similar`.
    seed : int
        Of the draw.

    Returns
    -------
    Table
        `survey`, `source_id`, `ra`, `dec`, `uncertainty`, what `apply_probe` predicts (for classes: `predicted`,
        `probability`, and `second`, the next likely), and for classes an empty column of the probe's name of labels to
        fill in. The least certain first.

    Raises
    ------
    ArtifactMismatch
        If the store's vectors are of another backbone.
    BadRequest
        If there is nothing left to label, `by` is unknown, or the probe keeps no labels where they are needed.
    """
    probe.require_store(store)
    if by not in MEASURES or count < 1:
        raise BadRequest(f"--by is {' or '.join(MEASURES)} and -n at least 1, got {by!r} and {count}")
    spread = None if probe.kind == CLASSIFICATION else _unseen(store, probe)
    least, most = (each * count for each in _CANDIDATES)
    keep = max(least, min(most, len(store) // 10))
    best: pa.Table | None = None
    for batch, found in predictions(store, probe, where=where):
        fresh = ~np.isin(source_hashes(batch), probe.trained_on)
        vectors = matrix(batch.column("vector"))
        unsure = _class_uncertainty(found, by) if spread is None else spread_of(vectors, spread)
        rows = np.flatnonzero(fresh)
        rows = rows[np.argsort(-unsure[rows], kind="stable")[:keep]]
        table = pa.Table.from_batches([batch]).take(pa.array(rows))
        table = table.append_column("uncertainty", pa.array(unsure[rows]))
        best = table if best is None else pa.concat_tables([best, table])
        best = best.sort_by([("uncertainty", "descending"), ("source_id", "ascending")]).slice(0, keep)
    if best is None or not best.num_rows:
        raise BadRequest(f"no source of {store.path} is left to label" + (f" where {where}" if where else ""))
    vectors = matrix(best.column("vector"))
    chosen = np.sort(spread_out(vectors, best.column("uncertainty").to_numpy(), count, seed))
    return _table(probe, best.take(pa.array(chosen)), vectors[chosen])


def spread_out(vectors: NDArray[np.float32], weights: Floats, count: int, seed: int) -> NDArray[np.intp]:
    """Return rows that lie apart: the first, then drawn by weight and squared distance from those drawn before.

    Parameters
    ----------
    vectors : ndarray, shape (row, dim), float32
    weights : ndarray, shape (row,), float64
        Not negative.
    count : int
        Fewer come back where rows are fewer, or the same.
    """
    rng = np.random.default_rng(seed)
    weights = np.maximum(weights, 1e-6 * weights.max() or 1.0)  # certain sources too, where there are no others
    chosen = [0]
    distance = np.full(len(vectors), np.inf)
    while len(chosen) < count:
        distance = np.minimum(distance, ((vectors - vectors[chosen[-1]]) ** 2).sum(axis=1, dtype=np.float64))
        chances = np.where(distance > 1e-12, weights * distance, 0)
        if not chances.sum():
            break
        chosen.append(int(rng.choice(len(vectors), p=chances / chances.sum())))
    return np.array(chosen, np.intp)


def _class_uncertainty(chances: Floats, by: Measure) -> Floats:
    if by == "margin":
        top = np.partition(chances, -2, axis=1)[:, -2:]
        return np.asarray(1 - (top[:, 1] - top[:, 0]))
    return -np.asarray((chances * np.log(np.maximum(chances, 1e-300))).sum(axis=1))


def _unseen(store: Store, probe: Probe) -> tuple[Floats, Floats]:
    """Return mean of the labelled vectors, and the inverse of their sum of squares held back as in the fit."""
    labelled = known_labels(store, probe.require_labels(), probe.kind, probe.columns)
    centre = labelled.vectors.mean(axis=0, dtype=np.float64)
    scale = labelled.vectors.std(axis=0, dtype=np.float64)
    x = (labelled.vectors - centre) / np.where(scale > 0, scale, 1.0)
    held = float(probe.provenance.get("strength", 1.0))
    penalty = held if probe.kind == REGRESSION else 1 / held
    inverse = np.linalg.inv(x.T @ x + penalty * np.eye(x.shape[1]))
    scale = np.where(scale > 0, scale, np.inf)
    return centre, inverse / np.outer(scale, scale)


def spread_of(vectors: NDArray[np.float32], spread: tuple[Floats, Floats]) -> Floats:
    """Return the variance of a ridge regression's prediction, in units of the noise."""
    centre, inverse = spread
    off = vectors - centre
    return np.asarray(np.einsum("ij,ij->i", off @ inverse, off))


def _table(probe: Probe, rows: pa.Table, vectors: NDArray[np.float32]) -> Table:
    found = probe.predict(vectors)
    table = Table(arrow_columns(rows.drop_columns(["vector"])), copy=False)
    if probe.kind != CLASSIFICATION:
        for name, column in zip(probe.classes, found.T, strict=True):
            table["predicted" if len(probe.classes) == 1 else f"fraction_{name}"] = column.astype(np.float32)
        return table
    classes = np.array(probe.classes)
    order = np.argsort(-found, axis=1)
    table["predicted"] = classes[order[:, 0]]
    table["probability"] = np.take_along_axis(found, order[:, :1], axis=1)[:, 0].astype(np.float32)
    table["second"] = classes[order[:, 1]]
    table[probe.column if probe.column not in table.colnames else "label"] = np.full(len(table), "", "U32")
    return table
