"""Labels: any table that names classes, joined to the rows of a store."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from astropy.table import Table
from numpy.typing import NDArray

from galembed.catalogues import GUESSES, read_table, source_ids
from galembed.errors import BadRequest
from galembed.label_positions import label_positions, matches, sky_pairs
from galembed.linear import sky_cells
from galembed.search import any_of
from galembed.store import Store, matrix

MAX_CLASSES: Final = 200

_READ: Final = ["survey", "source_id", "ra", "dec", "vector"]
_ORDER: Final = [("survey", "ascending"), ("source_id", "ascending")]
"""Folds follow row order, and a scan's order is not fixed."""

Matrix = NDArray[np.float32]
Labels = NDArray[np.str_]


@dataclass(frozen=True)
class Labelled:
    """Labelled sources. `cells` are those of `galembed.linear.sky_cells`, the counts those of a `ProbeReport`."""

    vectors: Matrix
    labels: Labels
    cells: NDArray[np.int64]
    hashes: NDArray[np.uint64]
    unmatched: int
    unlabelled: int
    ambiguous: int = 0

    def keep(self, mask: NDArray[np.bool_]) -> Labelled:
        parts = (self.vectors[mask], self.labels[mask], self.cells[mask], self.hashes[mask])
        return Labelled(*parts, self.unmatched, self.unlabelled, self.ambiguous)


def match_labels(
    store: Store, labels: Table | str | Path, column: str, id_column: str | None, radius: float | None = None
) -> Labelled:
    """Join labels to a store's rows by id, or by position where there is a radius, in arcsec.

    Raises
    ------
    BadRequest
        If a column is absent, holds no classes, or no labelled source is in the store.
    """
    table = labels if isinstance(labels, Table) else read_table(labels)
    if column not in table.colnames:
        raise BadRequest(f"the labels have no column {column!r}; they have {', '.join(table.colnames[:30])}")
    texts = _class_names(table[column])
    labelled = np.array([bool(text) for text in texts], bool)
    if not labelled.any():
        raise BadRequest(f"label column {column!r} is empty")
    chosen, kept = table[labelled], [text for text in texts if text]
    if radius is None:
        found, names, unmatched = _by_id(store, chosen, kept, column, id_column)
        ambiguous = 0
    else:
        if id_column is not None:
            raise BadRequest("labels are matched by --id-column or by --radius, not by both")
        found, names, unmatched, ambiguous = _by_position(store, chosen, kept, radius)
    if len(set(names)) > MAX_CLASSES:
        raise BadRequest(f"column {column!r} holds {len(set(names))} different labels; that is no class column")
    return Labelled(
        vectors=matrix(found.column("vector")),
        labels=np.array(names),
        cells=sky_cells(*(found.column(name).to_numpy() for name in ("ra", "dec"))),
        hashes=source_hashes(found),
        unmatched=unmatched,
        unlabelled=int((~labelled).sum()),
        ambiguous=ambiguous,
    )


def _by_id(
    store: Store, table: Table, texts: list[str], column: str, id_column: str | None
) -> tuple[pa.Table, list[str], int]:
    """Return the store's labelled rows, their labels, and how many labels have no row."""
    wanted = _agreed(list(zip(_ids(table, id_column), texts, strict=True)), column)
    found = _labelled_rows(store, list(wanted))
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


def _by_position(store: Store, table: Table, texts: list[str], radius: float) -> tuple[pa.Table, list[str], int, int]:
    """Return the store's labelled rows, their labels, and how many labels have no row, or no certain one."""
    ra, dec = label_positions(table)
    kept, pairs, count = [], [], 0
    for batch in store.batches(_READ):
        here = (batch.column(name).to_numpy(zero_copy_only=False) for name in ("ra", "dec"))
        near = sky_pairs(tuple(here), (ra, dec), radius)
        rows, places = np.unique(near[:, 1], return_inverse=True)
        kept.append(batch.take(pa.array(rows)))
        pairs.append(np.stack([near[:, 0], count + places.ravel()], axis=1))
        count += len(rows)
    if not count:
        raise BadRequest(
            f"none of the {len(texts)} labels lies within {radius:g} arcsec of a source in the store {store.path}; "
            "check that their positions are ICRS degrees, or give a larger --radius"
        )
    matched = matches(np.concatenate(pairs), texts)
    found = pa.Table.from_batches(kept).take(pa.array(matched.sources))
    found = found.append_column("label", pa.array([texts[at] for at in matched.labels], pa.string())).sort_by(_ORDER)
    return found, found.column("label").to_pylist(), matched.unmatched, matched.ambiguous


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


def _class_names(column: Any) -> list[str]:
    """Return labels as stripped text, "" where missing."""
    values = np.asarray(column)
    missing = np.broadcast_to(np.asarray(getattr(column, "mask", False)), values.shape).copy()
    if values.ndim != 1:
        raise BadRequest(f"label column {column.name!r} holds arrays; a probe needs one class per row")
    if values.dtype.kind == "f":
        missing |= ~np.isfinite(values)
        if np.any(values[~missing] % 1):
            raise BadRequest(f"label column {column.name!r} holds fractions; a probe needs classes, not measurements")
        values = np.where(missing, 0, values).astype(np.int64)
    if values.dtype.kind == "S":
        values = np.char.decode(values, "utf-8")
    return ["" if gone else str(value).strip() for gone, value in zip(missing, values.tolist(), strict=True)]


def _agreed(labelled: list[tuple[str, str]], column: str) -> dict[str, str]:
    agreed: dict[str, str] = {}
    for key, text in labelled:
        if agreed.setdefault(key, text) != text:
            raise BadRequest(
                f"source {key!r} is labelled {agreed[key]!r} and {text!r} in column {column!r}; settle on one"
            )
    return agreed


def _labelled_rows(store: Store, ids: list[str]) -> pa.Table:
    # A filter on a few ids reads little; a long one costs more than reading every row once.
    filters = (
        [any_of("source_id", ids[at : at + 500]) for at in range(0, len(ids), 500)] if len(ids) <= 5000 else [None]
    )
    wanted = pa.array(ids, pa.string())
    batches = [
        batch.filter(pc.is_in(batch.column("source_id"), value_set=wanted))
        for where in filters
        for batch in store.batches(_READ, where)
    ]
    table = pa.Table.from_batches(batches, schema=pa.schema([store.schema.field(name) for name in _READ]))
    return table.sort_by(_ORDER)


def source_hashes(rows: pa.Table) -> NDArray[np.uint64]:
    """Return 64 bits of the SHA-256 of each row's key."""
    pairs = zip(rows.column("survey").to_pylist(), rows.column("source_id").to_pylist(), strict=True)
    digests = (hashlib.sha256(f"{survey}\x1f{source_id}".encode()).digest()[:8] for survey, source_id in pairs)
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)
