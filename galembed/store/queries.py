"""What is asked about: ids, rows, positions, pictures or vectors, as keys of sources and directions to search in."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
from astropy.coordinates import SkyCoord
from astropy.table import Row, Table
from numpy.typing import NDArray

from galembed.errors import BadRequest
from galembed.search import any_of, cone_filter, unit_vector
from galembed.sky import separation_arcsec
from galembed.store.nearest import matrix

if TYPE_CHECKING:
    from galembed.store import Store

POSITION_TOLERANCE_ARCSEC: Final = 5.0
"""How far the source may lie from a position that is asked about."""

_CHUNK = 500  # ids per SQL filter
_CONES = 50  # cones per SQL filter


def query(store: Store, to: Any) -> tuple[NDArray[np.float32], list[tuple[str, str]]]:
    """Return the query vector and the keys of the sources it stands for."""
    if isinstance(to, Path):
        from galembed.store.images import embed_image

        return embed_image(store, to), []
    if not isinstance(to, SkyCoord | Row | Table | str | bytes | numbers.Integral):
        values = np.asarray(to)
        if values.dtype.kind == "f":
            return unit_vector(values, store.dim), []
    return _mean_direction(store, keys_of(store, to))


def queries(store: Store, to: Any) -> tuple[NDArray[np.float32], list[tuple[str, str]]]:
    """Return the vectors of many queries, shape (n, dim), and the keys they stand for, if any."""
    if not isinstance(to, Table):
        values = np.asarray(to)
        if values.dtype.kind == "f":
            if values.ndim != 2 or not len(values):
                raise BadRequest(f"many queries are vectors of shape (n, {store.dim}), n >= 1; got {values.shape}")
            return np.stack([unit_vector(vector, store.dim) for vector in values]), []
        if values.ndim != 1:
            raise BadRequest(f"many queries are ids, rows of a table or vectors; got {type(to).__name__}")
    keys = keys_of(store, to)
    return np.stack([unit_vector(vector, store.dim) for vector in _vectors_of(store, keys)]), keys


def keys_of(store: Store, of: Any) -> list[tuple[str, str]]:
    """Return the keys of sources: ids, rows, or a position."""
    if isinstance(of, SkyCoord):
        return [_at(store, of)]
    if isinstance(of, Row | Table):
        return _of_rows(of)
    if isinstance(of, str | bytes | numbers.Integral):
        return _resolve(store, [_id_text(of)])
    values = np.asarray(of)
    if values.ndim == 1 and values.size and all(isinstance(item, str | bytes | numbers.Integral) for item in values):
        return _resolve(store, [_id_text(item) for item in values])
    raise BadRequest(
        f"a search is for an id, a list of ids, a SkyCoord or a vector of {store.dim} numbers; got {type(of).__name__}"
    )


def around(store: Store, keys: Sequence[tuple[str, str]], radius: float) -> set[tuple[str, str]]:
    """Return the sources within `radius` arcsec of the positions of others."""
    if not keys:
        raise BadRequest("exclude_within needs sources to keep away from; a vector has no position")
    places = store.rows(keys, ["ra", "dec"])
    cones = [
        cone_filter((ra, dec, radius))
        for ra, dec in zip(places.column("ra").to_pylist(), places.column("dec").to_pylist(), strict=True)
        if ra is not None
    ]
    found: set[tuple[str, str]] = set()
    for start in range(0, len(cones), _CONES):
        condition = " OR ".join(cones[start : start + _CONES])
        for batch in store.table.search().where(condition).select(["survey", "source_id"]).to_batches():
            found.update(key_pairs(batch))
    return found


def by_id(store: Store, ids: list[str], columns: list[str]) -> pa.Table:
    """Return columns of the rows that have one of `ids`, in no particular order."""
    unique = list(dict.fromkeys(ids))
    batches = [
        batch
        for start in range(0, len(unique), _CHUNK)
        for batch in store.batches(columns, any_of("source_id", unique[start : start + _CHUNK]))
    ]
    return pa.Table.from_batches(batches, schema=pa.schema([store.schema.field(name) for name in columns]))


def contrast(vector: NDArray[np.float32], away: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the direction from `away` to `vector`, both of length 1."""
    difference = np.asarray(vector, np.float64) - away
    if np.linalg.norm(difference) < 1e-6:
        raise BadRequest("what the hits should be like and unlike have the same direction; give other sources")
    return unit_vector(difference, len(vector))


def key_pairs(table: pa.Table | pa.RecordBatch) -> list[tuple[str, str]]:
    """Return (survey, source_id) of each row."""
    return list(zip(table.column("survey").to_pylist(), table.column("source_id").to_pylist(), strict=True))


def _mean_direction(store: Store, keys: list[tuple[str, str]]) -> tuple[NDArray[np.float32], list[tuple[str, str]]]:
    keys = list(dict.fromkeys(keys))
    vectors = _vectors_of(store, keys)
    return unit_vector(vectors.mean(axis=0), store.dim), keys


def _vectors_of(store: Store, keys: Sequence[tuple[str, str]]) -> NDArray[np.float32]:
    vectors = matrix(store.rows(keys, ["vector"]).column("vector"))
    if len(vectors) < len(keys):
        raise BadRequest(f"{len(keys) - len(vectors)} of the sources asked about are not in the store {store.path}")
    return vectors


def _of_rows(rows: Row | Table) -> list[tuple[str, str]]:
    lacking = [name for name in ("survey", "source_id") if name not in rows.colnames]
    if lacking:
        raise BadRequest(f"rows to search for need the columns survey and source_id; {lacking} missing")
    pairs = [(rows["survey"], rows["source_id"])] if isinstance(rows, Row) else rows.iterrows("survey", "source_id")
    keys = [(str(survey), str(source_id)) for survey, source_id in pairs]
    if not keys:
        raise BadRequest("the table of sources to search for is empty")
    return keys


def _id_text(value: Any) -> str:
    text = value.decode() if isinstance(value, bytes) else str(value)
    return text.strip()


def _resolve(store: Store, ids: list[str]) -> list[tuple[str, str]]:
    """Return the key of each id, given as ``id`` or ``survey:id``."""
    candidates = {part for text in ids for part in (text, text.partition(":")[2]) if part}
    found: dict[str, list[str]] = {}
    for survey, source_id in key_pairs(by_id(store, sorted(candidates), ["survey", "source_id"])):
        found.setdefault(source_id, []).append(survey)
    return [_key(store, text, found) for text in ids]


def _key(store: Store, text: str, found: Mapping[str, list[str]]) -> tuple[str, str]:
    surveys = sorted(found.get(text, []))
    if len(surveys) == 1:
        return surveys[0], text
    if surveys:
        choices = " or ".join(repr(f"{survey}:{text}") for survey in surveys)
        raise BadRequest(f"{text!r} is a source of {len(surveys)} surveys; ask for {choices}")
    survey, _, source_id = text.partition(":")
    if survey in found.get(source_id, []):
        return survey, source_id
    raise BadRequest(
        f"no source {text!r} in the store {store.path}{_similar_ids(store, text)}; "
        "see Store.failures() (`galembed status`) for sources without a vector"
    )


def _similar_ids(store: Store, text: str) -> str:
    sample = store.table.search().select(["source_id"]).limit(5000).to_arrow().column("source_id").to_pylist()
    near = difflib.get_close_matches(text, sample, n=3, cutoff=0.6) or sample[:1]
    return f"; its ids look like {', '.join(map(repr, near))}" if near else ", which is empty"


def _at(store: Store, position: SkyCoord) -> tuple[str, str]:
    """Return the key of the source nearest to a position, within the tolerance."""
    if not position.isscalar:
        raise BadRequest(f"give one position, got a SkyCoord of {len(position)}")
    ra, dec = float(position.icrs.ra.deg), float(position.icrs.dec.deg)
    if not math.isfinite(ra) or not math.isfinite(dec):
        raise BadRequest(f"the position is not finite: ra {ra}, dec {dec}")
    nearest = math.inf
    for radius in (POSITION_TOLERANCE_ARCSEC, 60.0, 3600.0):
        found = store.table.search().where(cone_filter((ra, dec, radius)))
        near = found.select(["survey", "source_id", "ra", "dec"]).to_arrow()
        if near.num_rows:
            distances = separation_arcsec(ra, dec, near.column("ra").to_numpy(), near.column("dec").to_numpy())
            best = int(np.argmin(distances))
            nearest = float(distances[best])
            if nearest <= POSITION_TOLERANCE_ARCSEC:
                return key_pairs(near)[best]
            break
    where = f"the nearest is {nearest:.1f} arcsec away" if nearest < math.inf else "none lies within a degree"
    raise BadRequest(f"no source within {POSITION_TOLERANCE_ARCSEC:g} arcsec of ra {ra:.6f}, dec {dec:.6f}: {where}")
