"""Labels: any table that names classes, numbers or votes, joined to the rows of a store."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from astropy.table import Table
from numpy.typing import NDArray

from galembed.catalogue_files import read_table
from galembed.catalogues import GUESSES, source_ids
from galembed.errors import BadRequest
from galembed.label_positions import label_positions, matches, sky_pairs
from galembed.linear import sky_cells
from galembed.search import any_of
from galembed.store import Store, matrix

CLASSIFICATION: Final = "classification"
REGRESSION: Final = "regression"
VOTES: Final = "votes"
KINDS: Final = (CLASSIFICATION, REGRESSION, VOTES)

MAX_CLASSES: Final = 200
INTEGER_CLASSES: Final = 20
"""Whole numbers of at most so many different values are taken for classes."""

SUM_TOLERANCE: Final = 0.02
"""How far the fractions of one question may be from summing to 1: tables round them."""

_READ: Final = ["survey", "source_id", "ra", "dec", "vector"]
_ORDER: Final = [("survey", "ascending"), ("source_id", "ascending")]
"""Folds follow row order, and a scan's order is not fixed."""

_BATCH: Final = 65_536

Matrix = NDArray[np.float32]


@dataclass(frozen=True)
class Labelled:
    """Labelled sources of a store, in the order of their keys.

    Attributes
    ----------
    kind : str
        One of `KINDS`.
    columns : tuple of str
        Label columns; several for votes.
    why : str
        What the kind was told from, in words.
    keys : pa.Table
        `survey`, `source_id`.
    vectors : ndarray, shape (source, dim), float32
    labels : ndarray
        Class names, shape (source,); or numbers or votes, float64, shape (source, column): votes as the table has
        them, fractions or counts.
    cells : ndarray, shape (source,), int64
        See `galembed.linear.sky_cells`.
    unit : str
        Of numbers; "" where the table has none.
    unmatched, unlabelled, ambiguous : int
        As in `galembed.probes.ProbeReport`.
    """

    kind: str
    columns: tuple[str, ...]
    why: str
    keys: pa.Table
    vectors: Matrix
    labels: NDArray[Any]
    cells: NDArray[np.int64]
    unit: str = ""
    unmatched: int = 0
    unlabelled: int = 0
    ambiguous: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def hashes(self) -> NDArray[np.uint64]:
        """64 bits for each key; see `source_hashes`."""
        return source_hashes(self.keys)

    def keep(self, mask: NDArray[np.bool_]) -> Labelled:
        """Return the sources where `mask` is true."""
        return replace(
            self,
            keys=self.keys.filter(pa.array(mask)),
            vectors=self.vectors[mask],
            labels=self.labels[mask],
            cells=self.cells[mask],
        )

    def table(self) -> pa.Table:
        """Return `survey`, `source_id` and `label`: text, a number, or a list of votes."""
        if self.kind == VOTES:
            label = pa.FixedSizeListArray.from_arrays(pa.array(self.labels.ravel()), self.labels.shape[1])
        else:
            label = pa.array(self.labels.ravel().tolist())
        return self.keys.append_column("label", label)


def match_labels(
    store: Store,
    labels: Table | str | Path,
    columns: str | Sequence[str],
    id_column: str | None = None,
    radius: float | None = None,
    kind: str | None = None,
) -> Labelled:
    """Join labels to a store's rows by id, or by position where there is a radius, in arcsec.

    Parameters
    ----------
    kind : str, optional
        One of `KINDS`. Unless given: votes for several columns; classes for text, booleans, and whole numbers of at
        most `INTEGER_CLASSES` different values; else numbers.

    Raises
    ------
    BadRequest
        If a column is absent or does not hold such labels, or no labelled source is in the store.
    """
    table = labels if isinstance(labels, Table) else read_table(labels)
    names = (columns,) if isinstance(columns, str) else tuple(columns)
    for name in names:
        if name not in table.colnames:
            raise BadRequest(f"the labels have no column {name!r}; they have {', '.join(table.colnames[:30])}")
    kind, why, values = _values(table, names, kind)
    known = np.array([value is not None for value in values], bool)
    if not known.any():
        raise BadRequest(f"label column {names[0]!r} is empty")
    chosen, kept = table[known], [value for value in values if value is not None]
    if radius is None:
        found, of_rows, unmatched = _by_id(store, chosen, kept, names[0], id_column)
        ambiguous = 0
    else:
        if id_column is not None:
            raise BadRequest("labels are matched by --id-column or by --radius, not by both")
        found, of_rows, unmatched, ambiguous = _by_position(store, chosen, kept, radius)
    unit = str(getattr(table[names[0]], "unit", "") or "") if kind == REGRESSION else ""
    return replace(
        labelled_rows(found, of_rows, kind, names),
        why=why,
        unit=unit,
        unmatched=unmatched,
        unlabelled=int((~known).sum()),
        ambiguous=ambiguous,
    )


def known_labels(store: Store, table: pa.Table, kind: str, columns: Sequence[str], unit: str = "") -> Labelled:
    """Join labels that were kept (`Labelled.table`) to a store's rows.

    Raises
    ------
    BadRequest
        If no labelled source is in the store.
    """
    kept = dict(zip(_pairs(table), table["label"].to_pylist(), strict=True))
    found = _rows_of(store, table["source_id"].to_pylist())
    pairs = _pairs(found)
    here = [pair in kept for pair in pairs]
    if not any(here):
        raise BadRequest(f"none of the {len(kept)} labelled sources is in the store {store.path}")
    values = [kept[pair] for pair in pairs if pair in kept]
    labelled = labelled_rows(found.filter(pa.array(here)), values, kind, columns)
    return replace(labelled, why="labels kept with the probe", unit=unit, unmatched=len(kept) - len(values))


def labelled_rows(found: pa.Table, values: Sequence[Any], kind: str, columns: Sequence[str]) -> Labelled:
    """Return rows of a store with the label of each, in the order of their keys."""
    labels = np.array(values) if kind == CLASSIFICATION else np.array(values, np.float64).reshape(len(values), -1)
    return Labelled(
        kind=kind,
        columns=tuple(columns),
        why="",
        keys=found.select(["survey", "source_id"]),
        vectors=matrix(found.column("vector")),
        labels=labels,
        cells=sky_cells(*(found.column(name).to_numpy() for name in ("ra", "dec"))),
    )


# ------------------------------------------------------------------------------------------------ what labels say


def _values(table: Table, names: tuple[str, ...], kind: str | None) -> tuple[str, str, list[Hashable | None]]:
    """Return kind, the reason for it, and the label of each row: text, a number, a tuple of votes, or None."""
    if kind is not None and kind not in KINDS:
        raise BadRequest(f"--kind {kind!r} is unknown; choose {', '.join(KINDS)}")
    if len(names) > 1 and kind not in (None, VOTES):
        raise BadRequest(f"{kind} reads one label column, got {', '.join(names)}")
    if kind == VOTES and len(names) == 1:
        raise BadRequest(f"votes are in several columns, one for each answer; got only {names[0]!r}")
    if len(names) > 1:
        return VOTES, "--kind" if kind else "several columns", _votes(table, names)
    sense, why = _sense(table[names[0]])
    values: list[Hashable | None] = []
    if (kind or sense) == CLASSIFICATION:
        values += [text or None for text in _class_names(table[names[0]])]
        if len(set(values) - {None}) > MAX_CLASSES:
            count = len(set(values) - {None})
            raise BadRequest(f"column {names[0]!r} holds {count} different labels; that is no class column")
    else:
        values += [float(number) if np.isfinite(number) else None for number in _numbers(table[names[0]])]
    return kind or sense, "--kind" if kind else why, values


def _sense(column: Any) -> tuple[str, str]:
    """Return what a column's labels are for, and the reason."""
    values = np.ma.asarray(column)
    if values.dtype.kind not in "iuf":
        return CLASSIFICATION, "booleans" if values.dtype.kind == "b" else "text"
    known = np.ma.compressed(values)
    known = np.unique(known[np.isfinite(known)])
    if np.any(known % 1):
        return REGRESSION, "numbers with fractions"
    if len(known) <= INTEGER_CLASSES:
        return CLASSIFICATION, f"whole numbers of {len(known)} different values"
    return REGRESSION, f"whole numbers of {len(known)} different values, more than {INTEGER_CLASSES}"


def _class_names(column: Any) -> list[str]:
    """Return labels as stripped text, "" where missing."""
    values, missing = _plain(column)
    if values.dtype.kind == "f":
        missing |= ~np.isfinite(values)
        if np.any(values[~missing] % 1):
            raise BadRequest(f"label column {column.name!r} holds fractions; classes are text or whole numbers")
        values = np.where(missing, 0, values).astype(np.int64)
    if values.dtype.kind == "S":
        values = np.char.decode(values, "utf-8")
    return ["" if gone else str(value).strip() for gone, value in zip(missing, values.tolist(), strict=True)]


def _numbers(column: Any) -> NDArray[np.float64]:
    """Return labels as numbers, NaN where missing."""
    values, missing = _plain(column)
    if values.dtype.kind not in "iufb":
        raise BadRequest(f"label column {column.name!r} holds text; regression and votes need numbers")
    return np.where(missing, np.nan, values).astype(np.float64)


def _plain(column: Any) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    values = np.asarray(column)
    if values.ndim != 1:
        raise BadRequest(f"label column {column.name!r} holds arrays; a probe needs one label per row")
    return values, np.broadcast_to(np.asarray(getattr(column, "mask", False)), values.shape).copy()


def _votes(table: Table, names: tuple[str, ...]) -> list[Hashable | None]:
    """Return the votes of each row, None where there is none or one is missing."""
    if len(set(names)) < len(names):
        raise BadRequest(f"a column is named twice: {', '.join(names)}")
    votes = np.column_stack([_numbers(table[name]) for name in names])
    known = np.isfinite(votes).all(axis=1)
    if np.any(votes[known] < 0):
        raise BadRequest(f"the columns {', '.join(names)} hold negative numbers, which are no votes")
    totals = np.where(known, votes.sum(axis=1), 0)
    known &= totals > 0
    if not are_counts(votes[known]):
        wrong = np.flatnonzero(known & (np.abs(totals - 1) > SUM_TOLERANCE))
        if len(wrong):
            raise BadRequest(
                f"the fractions in {', '.join(names)} sum to {totals[wrong[0]]:.4g} in row {wrong[0] + 1}, not to 1; "
                "name all answers of one question, as fractions of those who were asked it, or as counts"
            )
    return [tuple(row) if there else None for row, there in zip(votes.tolist(), known, strict=True)]


def are_counts(votes: NDArray[np.float64]) -> bool:
    """Tell whether votes, shape (row, answer), are counts rather than fractions: whole, and more than one in a row."""
    return not np.any(votes % 1) and bool(np.any(votes.sum(axis=1) > 1))


# ------------------------------------------------------------------------------------------------------- matching


def _by_id(
    store: Store, table: Table, values: list[Any], column: str, id_column: str | None
) -> tuple[pa.Table, list[Any], int]:
    """Return the store's labelled rows, their labels, and how many labels have no row."""
    wanted = _agreed(list(zip(_ids(table, id_column), values, strict=True)), column)
    found = _rows_of(store, list(wanted))
    if not found.num_rows:
        sample = next(store.batches(["source_id"], batch_size=1), None)
        theirs = repr(sample.column("source_id")[0].as_py()) if sample is not None and sample.num_rows else "none"
        raise BadRequest(
            f"none of the {len(wanted)} labelled sources is in the store {store.path}: the labels' ids "
            f"look like {next(iter(wanted))!r}, the store's like {theirs}; name the column with --id-column, or match "
            "by position with --radius"
        )
    found_ids = found.column("source_id").to_pylist()
    return found, [wanted[source_id] for source_id in found_ids], len(set(wanted) - set(found_ids))


def _by_position(store: Store, table: Table, values: list[Any], radius: float) -> tuple[pa.Table, list[Any], int, int]:
    """Return the store's labelled rows, their labels, and how many labels have no row, or no certain one."""
    ra, dec = label_positions(table)
    kept, pairs, count = [], [], 0
    for batch in store.batches(_READ, batch_size=_BATCH):
        here = (batch.column(name).to_numpy(zero_copy_only=False) for name in ("ra", "dec"))
        near = sky_pairs(tuple(here), (ra, dec), radius)
        rows, places = np.unique(near[:, 1], return_inverse=True)
        kept.append(batch.take(pa.array(rows)))
        pairs.append(np.stack([near[:, 0], count + places.ravel()], axis=1))
        count += len(rows)
    if not count:
        raise BadRequest(
            f"none of the {len(values)} labels lies within {radius:g} arcsec of a source in the store {store.path}; "
            "check that their positions are ICRS degrees, or give a larger --radius"
        )
    matched = matches(np.concatenate(pairs), values)
    found = pa.Table.from_batches(kept).take(pa.array(matched.sources))
    found = found.append_column("label", pa.array(matched.labels)).sort_by(_ORDER)
    return found, [values[at] for at in found.column("label").to_pylist()], matched.unmatched, matched.ambiguous


def _ids(table: Table, id_column: str | None) -> list[str]:
    if id_column is not None and id_column not in table.colnames:
        raise BadRequest(f"the labels have no column {id_column!r}; they have {', '.join(table.colnames[:30])}")
    ids = source_ids(table, id_column)
    if ids is None:
        raise BadRequest(
            f"the labels have no id column (tried {', '.join(GUESSES['id'])}, and release, brickid, objid); "
            f"they have {', '.join(table.colnames[:30])}; name it with --id-column"
        )
    return list(map(str, ids.to_pylist()))


def _agreed(labelled: list[tuple[str, Any]], column: str) -> dict[str, Any]:
    agreed: dict[str, Any] = {}
    for key, value in labelled:
        if agreed.setdefault(key, value) != value:
            raise BadRequest(
                f"source {key!r} is labelled {agreed[key]!r} and {value!r} in column {column!r}; settle on one"
            )
    return agreed


def _rows_of(store: Store, ids: list[str]) -> pa.Table:
    """Return the rows with these ids, of any survey, in the order of their keys."""
    # A filter on a few ids reads little; a long one costs more than reading every row once.
    filters = (
        [any_of("source_id", ids[at : at + 500]) for at in range(0, len(ids), 500)] if len(ids) <= 5000 else [None]
    )
    wanted = pa.array(ids, pa.string())
    batches = [
        batch.filter(pc.is_in(batch.column("source_id"), value_set=wanted))
        for where in filters
        for batch in store.batches(_READ, where, batch_size=_BATCH)
    ]
    table = pa.Table.from_batches(batches, schema=pa.schema([store.schema.field(name) for name in _READ]))
    return table.sort_by(_ORDER)


def _pairs(rows: pa.Table) -> list[tuple[str, str]]:
    return list(zip(rows.column("survey").to_pylist(), rows.column("source_id").to_pylist(), strict=True))


def source_hashes(rows: pa.Table | pa.RecordBatch) -> NDArray[np.uint64]:
    """Return 64 bits of the SHA-256 of each row's key."""
    pairs = zip(rows.column("survey").to_pylist(), rows.column("source_id").to_pylist(), strict=True)
    digests = (hashlib.sha256(f"{survey}\x1f{source_id}".encode()).digest()[:8] for survey, source_id in pairs)
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)
