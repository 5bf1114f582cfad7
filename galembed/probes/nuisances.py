"""What vectors tell of the observation instead of the galaxy: survey, seeing, depth, extinction."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from galembed.errors import BadRequest
from galembed.labels import CLASSIFICATION, REGRESSION
from galembed.linear import Folds, apart, equal_rows, make_folds, ridge_path, sky_cells
from galembed.neighbours import nearest_others
from galembed.probes.reports import markdown_table
from galembed.probes.scores import outputs
from galembed.probes.tasks import Task, choose_strength
from galembed.store import Store, matrix

NUISANCE: Final = re.compile(
    r"psfsize_\w+|psfdepth_\w+|galdepth_\w+|seeing\w*|fwhm\w*|ebv|e_b_v|snr\w*|s_n_\w+|airmass\w*"
    r"|brick(name|id)?|field|run|camcol|tract|patch",
    re.IGNORECASE,
)
"""Columns that are looked at unasked, beside `survey` and the tile of `source_uri`."""

TILE: Final = "tile"
MAX_SOURCES: Final = 20_000
NEIGHBOURS: Final = 10

_FOLDS: Final = 5
_SHUFFLES: Final = 3
_CLASS_SOURCES: Final = 5_000
_QUERIES: Final = 2_000
_LEVELS: Final = 20
_MEMBERS: Final = 20

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Nuisance:
    """How much vectors tell of one property of the observation.

    Attributes
    ----------
    name : str
    kind : str
        ``regression`` or ``classification``.
    count : int
        Sources with it.
    score : float
        R2, or balanced accuracy, by cross-validation.
    chance, chance_spread : float
        The same for shuffled values: mean and standard deviation over shuffles.
    nearness : float
        Numbers: mean distance of a source's value from those of its 10 nearest neighbours, over that from random
        sources; 1 = neighbours are no closer in it. Classes: how often neighbours share it, over how often random
        sources do.
    method : str
    """

    name: str
    kind: str
    count: int
    score: float
    chance: float
    chance_spread: float
    nearness: float
    method: str


@dataclass(frozen=True)
class NuisanceReport:
    """What vectors tell of the observation; `str` gives Markdown.

    Attributes
    ----------
    store : str
    count : int
        Sources looked at.
    nuisances : tuple of Nuisance
    variance, variance_chance : float
        Share of the vectors' variance that a linear regression on all numbers, and on the survey, predicts of sources
        in other folds; and of shuffled ones. NaN where there is neither.
    skipped : mapping of str to str
        Columns that could not be looked at, and why.
    """

    store: str
    count: int
    nuisances: tuple[Nuisance, ...]
    variance: float
    variance_chance: float
    skipped: Mapping[str, str]

    def __str__(self) -> str:
        rows = [
            (
                one.name,
                "R²" if one.kind == REGRESSION else "balanced accuracy",
                f"{one.score:.3f}",
                f"{one.chance:.3f} ± {one.chance_spread:.3f}",
                f"{one.nearness:.2f}",
                f"{one.count:,}",
                one.method,
            )
            for one in self.nuisances
        ]
        variance = (
            f"A linear regression on these numbers and the survey predicts **{self.variance:.1%}** of the vectors' "
            f"variance (shuffled: {self.variance_chance:.1%})."
            if np.isfinite(self.variance)
            else "There is no number among them from which vectors could be predicted."
        )
        return "\n".join(
            [
                f"# What the vectors of {self.store} tell of the observation",
                "",
                f"{self.count:,} sources. {variance}",
                "",
                *markdown_table(("", "score", "from vectors", "shuffled", "neighbours", "sources", "method"), rows),
                "Neighbours: of numbers, how far the 10 nearest are in it, over random sources (1 = no closer);",
                "of classes, how often they share it, over random sources (1 = no more often). Nuisances that go with",
                "galaxies, as signal to noise does, are predicted from what galaxies look like too.",
                *(f"\n- {name} left out: {why}" for name, why in self.skipped.items()),
            ]
        )


def nuisance_report(
    store: Store, columns: Sequence[str] = (), *, where: str | None = None, seed: int = 0
) -> NuisanceReport:
    """Measure what a store's vectors tell of survey, tile, seeing, depth, extinction and signal to noise.

    Each is predicted from the vectors by ridge or logistic regression, in cross-validation by sky cells as in
    `galembed.probes.fit_probe`, beside shuffled values. For numbers no tile is divided, if there are five. At most
    20,000 sources are looked at, drawn at random; 5,000 for classes.

    Parameters
    ----------
    columns : sequence of str, optional
        Columns of the store; unless given, `survey`, the tile, and all that `NUISANCE` matches.
    where : str, optional
        Only these sources, as in `Store.similar`: among galaxies of one class nothing is told by way of the class.
    seed : int
        Of the sample, folds and shuffles.

    Raises
    ------
    BadRequest
        If a column is not in the store, none can be looked at, or no source passes `where`.
    """
    names = list(columns) or ["survey", TILE, *(name for name in store.schema.names if NUISANCE.fullmatch(name))]
    rows = _sample(store, [name for name in names if name != TILE], where, seed)
    if not rows.num_rows:
        raise BadRequest(
            f"no source of {store.path} passes {where}" if where is not None else f"the store {store.path} is empty"
        )
    vectors = matrix(rows.column("vector"))
    cells = sky_cells(*(rows.column(name).to_numpy() for name in ("ra", "dec")))
    # Sources without a tile count as one each.
    codes = pc.fill_null(_values(rows, TILE).dictionary_encode().indices.cast(pa.int64()), -1).to_numpy()
    tiles = np.where(codes < 0, -1 - np.arange(len(codes)), codes)
    neighbours = _neighbours(vectors, seed)
    found: list[Nuisance] = []
    skipped: dict[str, str] = {}
    for name in names:
        try:
            found.append(_measure(name, _values(rows, name), vectors, cells, tiles, neighbours, seed))
        except BadRequest as error:
            skipped[name] = str(error)
    if not found:
        raise BadRequest(
            f"no column of {store.path} tells of the observation: "
            + "; ".join(f"{name}: {why}" for name, why in skipped.items())
            + "; embed with --carry, or name others with --columns"
        )
    variance, chance = _explained(rows, [one.name for one in found], vectors, cells, seed)
    return NuisanceReport(store.path, len(vectors), tuple(found), variance, chance, skipped)


def _sample(store: Store, names: Sequence[str], where: str | None, seed: int) -> pa.Table:
    rng = np.random.default_rng(seed)
    count = len(store) if where is None else sum(one.num_rows for one in store.batches(["source_id"], where))
    share = min(1.0, MAX_SOURCES / max(count, 1))
    columns = list(dict.fromkeys(["survey", "source_id", "ra", "dec", "source_uri", "vector", *names]))
    batches = []
    for batch in store.batches(columns, where, batch_size=32_768):
        batches.append(batch.filter(pa.array(rng.random(batch.num_rows) < share)))
    schema = pa.schema([store.schema.field(name) for name in columns])
    return pa.Table.from_batches(batches, schema=schema).sort_by([("survey", "ascending"), ("source_id", "ascending")])


def _values(rows: pa.Table, name: str) -> pa.Array:
    return rows.column("source_uri" if name == TILE else name).combine_chunks()


def _task(
    values: pa.Array, vectors: NDArray[np.float32], cells: NDArray[np.int64], tiles: NDArray[np.int64]
) -> tuple[Task, NDArray[np.intp]]:
    """Return the task of telling values from vectors, and the rows of it.

    Numbers are often the same all over a tile, which folds therefore do not divide where there are enough.

    Raises
    ------
    BadRequest
        If there is nothing to tell.
    """
    if pa.types.is_floating(values.type):
        numbers = values.to_numpy(zero_copy_only=False).astype(np.float64)
        rows = np.flatnonzero(np.isfinite(numbers))
        if len(rows) < 2 * _FOLDS or not np.ptp(numbers[rows]):
            raise BadRequest("fewer than two values" if len(rows) else "no values")
        kind, truth = REGRESSION, numbers[rows][:, None]
    else:
        codes = values.dictionary_encode().indices.to_numpy(zero_copy_only=False)
        codes = np.where(np.isnan(codes), -1, codes).astype(np.intp)
        counts = np.bincount(codes[codes >= 0])
        common = np.argsort(-counts, kind="stable")[:_LEVELS]
        common = common[counts[common] >= _MEMBERS]
        if len(common) < 2:
            raise BadRequest(f"fewer than two values of at least {_MEMBERS} sources")
        rows = np.flatnonzero(np.isin(codes, common))
        rows = rows[:: -(-len(rows) // _CLASS_SOURCES)]
        kind, truth = CLASSIFICATION, np.unique(codes[rows], return_inverse=True)[1]
    some = vectors[rows]
    together = equal_rows(some) if kind == CLASSIFICATION or len(np.unique(tiles[rows])) < _FOLDS else tiles[rows]
    return Task(kind, some, truth, np.ones(len(rows)), cells[rows], together), rows


def _measure(
    name: str,
    values: pa.Array,
    vectors: NDArray[np.float32],
    cells: NDArray[np.int64],
    tiles: NDArray[np.int64],
    neighbours: tuple[NDArray[np.intp], NDArray[np.intp]],
    seed: int,
) -> Nuisance:
    task, rows = _task(values, vectors, cells, tiles)
    rng = np.random.default_rng(seed)
    shuffled = [replace(task, truth=rng.permutation(task.truth)) for _ in range(_SHUFFLES)]
    groups, how = apart(task.cells, task.together, _FOLDS, seed, task.classes)
    folds = make_folds(groups, _FOLDS, seed, task.classes)
    found = []
    for one in (task, *shuffled):
        predicted = np.empty((len(one.truth), len(np.unique(one.truth)) if one.classes is not None else 1))
        for train, test in folds:
            part = one.take(train)
            predicted[test] = outputs(part.fit(choose_strength(part, seed)), one.vectors[test])
        found.append(one.score(predicted))
    full = np.full(len(vectors), np.nan)
    full[rows] = task.truth.ravel()
    return Nuisance(
        name,
        task.kind,
        len(rows),
        float(found[0]),
        float(np.mean(found[1:])),
        float(np.std(found[1:], ddof=1)),
        _nearness(task.kind, full, *neighbours, rng),
        f"folds {how}",
    )


def _neighbours(vectors: NDArray[np.float32], seed: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return some rows, and the nearest others of each, shape (query, neighbour)."""
    count = min(NEIGHBOURS, len(vectors) - 1)
    queries = np.random.default_rng(seed).permutation(len(vectors))[:_QUERIES]
    return queries, nearest_others(vectors, queries, count)


def _nearness(
    kind: str, values: Floats, queries: NDArray[np.intp], nearest: NDArray[np.intp], rng: np.random.Generator
) -> float:
    """Return how near neighbours are in a property; see `Nuisance`. NaN where it is unknown of them."""
    known = np.flatnonzero(np.isfinite(values))
    mine, theirs = np.repeat(values[queries], nearest.shape[1]), values[nearest].ravel()
    both = np.isfinite(mine) & np.isfinite(theirs)
    if not both.any():
        return float("nan")
    mine, theirs = mine[both], theirs[both]
    if kind == CLASSIFICATION:
        shares = np.bincount(values[known].astype(np.intp)) / len(known)
        return float((mine == theirs).mean() / shares[mine.astype(np.intp)].mean())
    others = values[rng.choice(known, len(mine))]
    return float(np.abs(mine - theirs).mean() / np.abs(mine - others).mean())


def _explained(
    rows: pa.Table, names: Sequence[str], vectors: NDArray[np.float32], cells: NDArray[np.int64], seed: int
) -> tuple[float, float]:
    """Return the share of the vectors' variance that numbers and survey predict, and that they do shuffled."""
    columns = []
    for name in names:
        values = _values(rows, name)
        if pa.types.is_floating(values.type):
            numbers = values.to_numpy(zero_copy_only=False).astype(np.float64)
            columns.append(np.where(np.isfinite(numbers), numbers, np.nanmean(numbers)))
        elif name == "survey":
            codes = values.dictionary_encode().indices.to_numpy()
            columns += [(codes == code).astype(np.float64) for code in range(int(codes.max()))]
    if not columns:
        return float("nan"), float("nan")
    design = np.column_stack(columns)
    groups, _ = apart(cells, equal_rows(vectors), _FOLDS, seed)
    folds = make_folds(groups, _FOLDS, seed)
    mixed = np.random.default_rng(seed).permutation(len(design))
    return tuple(_variance(each, vectors, folds) for each in (design, design[mixed]))  # type: ignore[return-value]


def _variance(design: Floats, vectors: NDArray[np.float32], folds: Folds) -> float:
    left = 0.0
    for train, test in folds:
        _, layer = next(ridge_path(design[train], vectors[train], [1.0]))
        left += float(((vectors[test] - outputs(layer, design[test])) ** 2).sum())
    return 1 - left / float(((vectors - vectors.mean(axis=0)) ** 2).sum())
