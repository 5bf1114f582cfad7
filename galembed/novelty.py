"""The sources of a store that look like few others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from astropy.table import Column
from numpy.typing import NDArray

from galembed.errors import BadRequest
from galembed.progress import Show
from galembed.scans import BATCH, Sample, draw_sample, row_filter, row_numbers, scan, silent, take
from galembed.search import HIT_COLUMNS, Pictured, arrow_columns, asked
from galembed.store import Store, matrix, open_store
from galembed.store.nearest import nearest_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHODS: Final = ("knn", "forest")

SAMPLE: Final = 8192
"""Sources that every other is compared with at first, and that a forest is grown on."""

_CANDIDATES: Final = 4096  # compared with the whole store at first
_PRUNED: Final = 16_384  # and later, when they may fall early
_WORK: Final = 4  # pairs compared in rounds, in units of those with the sample
_TYPICAL: Final = 512
_TREES: Final = 200

Vectors = NDArray[np.float32]
Rows = NDArray[np.uint64]
_Score = Callable[[Vectors, Rows], NDArray[np.float32]]


class Novel(Pictured):
    """What looks like little else in a store, oddest first: an astropy table.

    Columns: `score`, `survey`, `source_id`, `ra` and `dec` (deg), `fov` (arcsec), `flags` (words of
    `galembed.quality.FLAGS`: what is likely an artefact), then the store's carried columns; missing values are masked.
    With neighbours asked for, `neighbour_1` ... hold ids that `Store.similar` takes.

    `meta` holds `store`, `method`, `k`, `where`, `cone`, `box` and `region` as asked, `rows` (sources compared),
    `typical` (the median score of random sources, for comparison) and `at_most` (see `novel`).
    """

    def _drawn(self, columns: Sequence[str]) -> Figure:
        """Draw the sources with their ids, scores and flags."""
        from galembed.pictures import mosaic, pictures_of, shortened, titles

        keys = [(str(survey), str(source_id)) for survey, source_id in self.iterrows("survey", "source_id")]
        heads = [
            "\n".join(filter(None, (shortened(name), f"{row['score']:.3f}", str(row["flags"]))))
            for (_, name), row in zip(keys, self, strict=True)
        ]
        return mosaic(pictures_of(open_store(self.meta["store"]), keys), titles(self, heads, columns))

    def summary(self) -> str:
        """Return what the scores mean, what is usual, and whether these are the highest of all."""
        flagged = sum(bool(words) for words in self["flags"])
        lines = [
            f"score: {self['score'].description}; the median of sources at random is {self.meta['typical']:.3g}",
            f"{self.meta['rows']:,} sources compared; {flagged} of these {len(self)} are flagged",
        ]
        if self.meta["at_most"] is not None:
            lines.append(
                f"these may not be the highest scores of all: of sources left out none scores above "
                f"{self.meta['at_most']:.3g}"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class _Ranking:
    rows: Rows  # oddest first
    scores: NDArray[np.float32]
    typical: float
    at_most: float | None


def novel(
    store: Store,
    n: int = 100,
    *,
    method: str = "knn",
    k: int = 10,
    where: str | None = None,
    cone: Sequence[float] | None = None,
    box: Sequence[float] | None = None,
    region: Any = None,
    unflagged: bool = False,
    neighbours: int = 0,
    columns: Sequence[str] | None = None,
    seed: int = 0,
    show: Show | None = None,
) -> Novel:
    """Return the sources that look like few others, oddest first.

    Parameters
    ----------
    store : Store
    n : int
        How many; fewer come back where fewer pass the filters.
    method : str
        ``knn``: the score is the cosine distance to the `k`-th nearest neighbour, 0 for a source with `k` twins.
        A group of up to `k` odd sources that resemble one another is found too; a larger one is not.
        ``forest``: the score of an isolation forest, 0 to 1, about 0.4 to 0.5 for ordinary sources.
    k : int
        Of ``knn``.
    where, cone, box, region
        As in `Store.similar`. Sources outside are neither scored nor compared with.
    unflagged : bool
        Leave out sources with flags. They are shown otherwise: an artefact looks like little else.
    neighbours : int
        Add the ids of so many nearest neighbours.
    columns : sequence of str, optional
        Store columns to return instead of the carried ones.
    seed : int
        Of the sample and of the forest.
    show : callable, optional
        Called with a stage, how many are done and of how many.

    Returns
    -------
    Novel
        An astropy table. The scores of ``knn`` are exact. `meta["at_most"]` is None if these are the `n` highest of
        all; else no source that is left out scores higher than that number.

    Raises
    ------
    BadRequest
        If an argument does not fit the store, or too few sources pass the filters.

    Notes
    -----
    Up to `SAMPLE` sources are compared with one another. In a larger store each source is compared with a sample of
    them first: its distance to the `k`-th neighbour in there bounds its score from above. The 4,096 sources of the
    highest bounds are then compared with every other. The `n`-th of their scores is a cutoff: sources with higher
    bounds are compared with the others in turn, 16,384 at a time, each until k neighbours nearer than that are seen.
    This ends when no bound that is left is above the cutoff, or when it has taken four times the work of the first
    comparison. Vectors are read in a stream; 12 bytes a source are held.

    References
    ----------
    Ramaswamy, Rastogi & Shim 2000, SIGMOD, 427 (distance to the k-th neighbour); Bay & Schwabacher 2003, KDD, 29
    (the cutoff); Liu, Ting & Zhou 2008, ICDM, 413 (isolation forest).
    """
    for name, value in (("n", n), ("k", k)):
        if value < 1:
            raise BadRequest(f"{name} must be at least 1, got {value}")
    if method not in METHODS:
        raise BadRequest(f"method {method!r} is unknown; choose one of {', '.join(METHODS)}")
    extra = store.carried if columns is None else store.known(columns)
    names = list(dict.fromkeys([*HIT_COLUMNS, "flags", *extra]))
    tell = show or silent
    condition = row_filter(store, where, cone, box, region, unflagged=unflagged)
    sample = draw_sample(store, SAMPLE, seed=seed, condition=condition)
    least = max(k if method == "knn" else 1, neighbours)
    if sample.total <= least:
        raise BadRequest(
            f"{sample.total} source(s) of {store.path} pass the filters, too few to compare each with {least} others; "
            "widen them, or ask for a smaller k"
        )
    if method == "knn":
        ranking = _by_neighbours(store, sample, n, k, condition, tell)
    else:
        ranking = _by_forest(store, sample, n, seed, condition, tell)
    meta = {
        "store": store.path,
        "method": method,
        "k": k if method == "knn" else 0,
        **asked(where, cone, box, region),
        "rows": sample.total,
        "typical": ranking.typical,
        "at_most": ranking.at_most,
    }
    found = Novel(arrow_columns(take(store, ranking.rows, names)), copy=False, meta=meta)
    if "score" in found.colnames:
        found.rename_column("score", "catalogue_score")
    meaning = f"cosine distance to neighbour {k}" if method == "knn" else "isolation forest: 0 to 1, high is odd"
    found.add_column(Column(ranking.scores, name="score", description=meaning), index=0)
    if neighbours:
        _add_neighbours(found, store, ranking.rows, neighbours, condition)
    return found


# ------------------------------------------------------------------------------------------- distance to neighbours


def _by_neighbours(store: Store, sample: Sample, n: int, k: int, condition: str | None, tell: Show) -> _Ranking:
    rows, bounds = _scored(
        store, condition, sample.total, tell, lambda vectors, mine: _bounds(vectors, mine, sample, k), "sample"
    )
    if sample.total <= len(sample.rows):
        order = np.argsort(-bounds, kind="stable")[:n]
        return _Ranking(rows[order], bounds[order], float(np.median(bounds)), None)
    order = np.argsort(-bounds, kind="stable")
    found, scores = np.empty(0, np.intp), np.empty(0, np.float32)
    typical, cutoff, compared, rounds, work = np.nan, -np.inf, 0, 0, 0
    while compared < len(order) and bounds[order[compared]] > cutoff:
        if len(scores) >= n and work > _WORK * len(sample.rows) * sample.total:
            break
        chosen = order[compared : compared + (_PRUNED if rounds else _CANDIDATES)]
        compared += len(chosen)
        rounds += 1
        chosen = chosen[bounds[chosen] > cutoff]
        asked = rows[chosen] if rounds > 1 else np.concatenate([rows[chosen], sample.rows[:_TYPICAL]])
        left, exact, comparisons = _scores(store, asked, k, condition, cutoff, sample.total, tell, f"round {rounds}")
        work += comparisons
        if rounds == 1:
            typical = float(np.median(exact[len(chosen) :]))
            left, exact = left[: len(chosen)], exact[: len(chosen)]
        found, scores = np.concatenate([found, chosen[left]]), np.concatenate([scores, exact])
        if len(scores) >= n:
            cutoff = float(np.partition(scores, len(scores) - n)[len(scores) - n])
    best = np.argsort(-scores, kind="stable")[:n]
    rest = float(bounds[order[compared]]) if compared < len(order) else -np.inf
    return _Ranking(rows[found[best]], scores[best], typical, rest if rest > cutoff else None)


def _scored(
    store: Store, condition: str | None, total: int, tell: Show, score: _Score, stage: str
) -> tuple[Rows, NDArray[np.float32]]:
    """Return the row number and the score of every source."""
    rows, scores = np.empty(total, np.uint64), np.empty(total, np.float32)
    done = 0
    for batch in scan(store, ["vector"], condition):
        here = slice(done, done + batch.num_rows)
        rows[here] = row_numbers(batch)
        scores[here] = score(matrix(batch.column("vector")), rows[here])
        done += batch.num_rows
        tell(stage, done, total)
    return rows, scores


def _bounds(vectors: Vectors, rows: Rows, sample: Sample, k: int) -> NDArray[np.float32]:
    """Return the distance of each source to its k-th neighbour in the sample."""
    best = np.full((len(vectors), k), -np.inf, np.float32)
    for at in range(0, len(sample.rows), BATCH):
        best = _merged(best, vectors, rows, sample.vectors[at : at + BATCH], sample.rows[at : at + BATCH])
    return _distances(best)


def _scores(
    store: Store, rows: Rows, k: int, condition: str | None, cutoff: float, total: int, tell: Show, stage: str
) -> tuple[NDArray[np.intp], NDArray[np.float32], int]:
    """Return the places and scores of the sources that score above `cutoff`, and how many pairs were compared.

    A score is the distance to the k-th neighbour of all. A source falls when k neighbours within `cutoff` are seen.
    """
    vectors = matrix(take(store, rows, ["vector"]).column("vector"))
    best = np.full((len(rows), k), -np.inf, np.float32)
    places = np.arange(len(rows))
    done, comparisons = 0, 0
    for batch in scan(store, ["vector"], condition):
        best = _merged(best, vectors, rows[places], matrix(batch.column("vector")), row_numbers(batch))
        comparisons += len(places) * batch.num_rows
        above = _distances(best) > cutoff
        if not above.all():
            best, vectors, places = best[above], vectors[above], places[above]
        done += batch.num_rows
        tell(stage, done, total)
        if not len(places):
            break
    return places, _distances(best), comparisons


def _merged(best: Vectors, vectors: Vectors, rows: Rows, others: Vectors, other_rows: Rows) -> Vectors:
    """Return the k highest similarities of each source, shape (source, k), the lowest first, with `others` seen."""
    merged = best.copy()
    k = best.shape[1]
    for start in range(0, len(best), BATCH):
        here = slice(start, start + BATCH)
        similarity = _similarities(vectors[here], rows[here], others, other_rows)
        nearer = np.flatnonzero(similarity.max(axis=1) > best[here, 0])
        both = np.concatenate([best[here][nearer], similarity[nearer]], axis=1)
        both.partition(both.shape[1] - k, axis=1)
        merged[start + nearer] = both[:, -k:]
    return merged


def _similarities(vectors: Vectors, rows: Rows, others: Vectors, other_rows: Rows) -> Vectors:
    """Return cosines, shape (source, other); -inf for a source and itself."""
    similarity = vectors @ others.T
    similarity[rows[:, None] == other_rows] = -np.inf
    return similarity


def _distances(best: Vectors) -> NDArray[np.float32]:
    # Rounding takes the cosine of twins beyond 1.
    distance: NDArray[np.float32] = np.maximum(1 - best[:, 0], 0)
    return distance


def _add_neighbours(found: Novel, store: Store, rows: Rows, count: int, condition: str | None) -> None:
    which = np.concatenate(
        [_neighbours(store, rows[at : at + BATCH], count, condition) for at in range(0, len(rows), BATCH)]
    )
    keys = take(store, which.ravel(), ["survey", "source_id"])
    ids = np.array([":".join(key.values()) for key in keys.to_pylist()]).reshape(which.shape)
    for number in range(count):
        found.add_column(Column(ids[:, number], name=f"neighbour_{number + 1}"))


def _neighbours(store: Store, rows: Rows, count: int, condition: str | None) -> Rows:
    """Return the row numbers of the nearest neighbours, nearest first, shape (source, count)."""
    vectors = matrix(take(store, rows, ["vector"]).column("vector"))
    near, _ = nearest_rows(store.dataset, vectors, count + 1, condition)
    # A source comes first among its twins, or not at all where there are more of them than asked for.
    own = near == rows[:, None]
    own[~own.any(axis=1), -1] = True
    return np.asarray(near[~own].reshape(len(rows), count))


# ------------------------------------------------------------------------------------------------ isolation forest


def _by_forest(store: Store, sample: Sample, n: int, seed: int, condition: str | None, tell: Show) -> _Ranking:
    from sklearn.ensemble import IsolationForest

    forest = IsolationForest(n_estimators=_TREES, random_state=seed).fit(sample.vectors)
    rows, scores = _scored(
        store, condition, sample.total, tell, lambda vectors, _: -forest.score_samples(vectors), "forest"
    )
    order = np.argsort(-scores, kind="stable")[:n]
    return _Ranking(rows[order], scores[order], float(np.median(scores)), None)
