"""Source catalogues: any table that astropy reads, as an Arrow table with our names and the user's columns."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from astropy.table import MaskedColumn, Table

from galembed.errors import ArtifactNotFound, BadRequest, UnreadableInput

GUESSES: Final = {
    "id": ("source_id", "id_str", "id", "object_id", "objid", "targetid", "name", "iauname"),
    "ra": ("ra", "raj2000", "ra_icrs", "right_ascension", "alpha_j2000"),
    "dec": ("dec", "dej2000", "decj2000", "de_icrs", "declination", "delta_j2000"),
    "size": ("shape_r", "half_light_radius", "r50", "petro_th50", "petroth50", "petror50_r"),
}
"""Column names tried for each part, in order, whatever their case. `RELEASE`, `BRICKID` and `OBJID` together make the
Legacy Surveys' id and come before the rest."""

CARRIED: Final = re.compile(r"mag_\w+|redshift|z_?spec|z_?phot\w*|psfsize_\w+|galdepth_\w+|ebv|e_b_v", re.IGNORECASE)
"""Catalogue columns that travel into the store unasked: what people filter by, and what explains a neighbour away."""


def read_table(path: str | Path) -> Table:
    """Read a table file.

    Raises
    ------
    ArtifactNotFound
        If there is no such file.
    UnreadableInput
        If astropy cannot read it as FITS, VOTable, ECSV, CSV or Parquet.
    """
    path = Path(path)
    if not path.exists():
        raise ArtifactNotFound(f"no table at {path}")
    name = path.name.lower()
    try:
        if name.endswith((".parquet", ".pq")):
            import pyarrow.parquet as pq

            return Table({key: _from_arrow(column) for key, column in _columns(pq.read_table(path))})
        if name.endswith((".csv", ".csv.gz")):
            return Table.read(path, format="ascii.csv")
        if name.endswith((".fits", ".fit", ".fits.gz")):
            # NaN stays NaN: whether it is missing or an error is for the caller to say.
            return Table.read(path, format="fits", hdu=_first_table(path), mask_invalid=False)
        return Table.read(path)
    except Exception as error:
        raise UnreadableInput(
            f"{path} cannot be read as a table ({type(error).__name__}: {error}); "
            "give FITS, VOTable, ECSV, CSV or Parquet"
        ) from error


def read_catalogue(
    path: str | Path, *, columns: Mapping[str, str], carry: Sequence[str] = (), need: Iterable[str] = ("id",)
) -> pa.Table:
    """Read a catalogue into our names.

    Parameters
    ----------
    path : str or Path
    columns : mapping of str to str
        Column for ``id``, ``ra``, ``dec`` or ``size`` where the guess (`GUESSES`) is not wanted.
    carry : sequence of str
        Columns to carry beyond `CARRIED`.
    need : iterable of str
        Parts that must be there.

    Returns
    -------
    pa.Table
        ``source_id`` (string, stripped), ``ra``, ``dec`` (deg), ``size`` (arcsec) where found, then the carried columns
        in lower case, with units in their fields' metadata. One row per catalogue row, in its order.

    Raises
    ------
    BadRequest
        If a part or a column to carry is not there.
    """
    table = read_table(path)
    unknown = sorted(set(columns) - set(GUESSES))
    if unknown:
        raise BadRequest(f"--column takes {', '.join(GUESSES)}, got {unknown}")
    arrays: dict[str, Any] = {}
    fields: list[pa.Field] = []
    used: set[str] = set()

    def add(name: str, values: pa.Array, unit: str) -> None:
        arrays[name] = values
        fields.append(pa.field(name, values.type, metadata={"unit": unit} if unit else None))

    ids = source_ids(table, _find(table, "id", columns, path) if "id" in columns else None)
    if ids is not None:
        add("source_id", ids, "")
    for part in ("ra", "dec", "size"):
        if found := _find(table, part, columns, path):
            used.add(found)
            unit = "arcsec" if part == "size" else "deg"
            add(part, _numbers(table[found], unit), unit)
    lacking = [part for part in need if ("source_id" if part == "id" else part) not in arrays]
    if lacking:
        raise BadRequest(
            f"{path}: no column found for {', '.join(lacking)} (tried {', '.join(GUESSES[lacking[0]])}); "
            f"name it with --column {lacking[0]}=COLUMN. The table has {', '.join(table.colnames[:30])}"
        )
    absent = [name for name in carry if not _match(table, name)]
    if absent:
        raise BadRequest(f"{path}: no column {absent} to carry; the table has {', '.join(table.colnames)}")
    asked = {_match(table, name) for name in carry}
    for name in table.colnames:
        wanted = (name in asked or CARRIED.fullmatch(name)) and name not in used
        ours = name.lower().replace(".", "_")  # LanceDB reads a dot as a path into a struct
        if wanted and table[name].ndim == 1 and ours not in arrays:
            add(ours, _to_arrow(table[name]), str(table[name].unit or ""))
    return pa.table(arrays, schema=pa.schema(fields))


def source_ids(table: Table, column: str | None = None) -> pa.Array | None:
    """Return each row's id as stripped text.

    Parameters
    ----------
    table : Table
    column : str, optional
        The id column; else `release`, `brickid` and `objid` joined by hyphens, else the first of `GUESSES`.

    Returns
    -------
    pa.Array of strings, or None if the table has none of these columns

    Raises
    ------
    BadRequest
        If the ids are floating point.
    """
    legacy = [_match(table, name) for name in ("release", "brickid", "objid")]
    if column is None and all(legacy):
        return pc.binary_join_element_wise(*[_as_ids(table[name]) for name in legacy], "-")
    column = column or next((match for guess in GUESSES["id"] if (match := _match(table, guess))), None)
    return _as_ids(table[column]) if column else None


def duplicate_rows(keys: pa.ChunkedArray) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return a mask of the rows whose key occurred in an earlier row."""
    indices = pc.dictionary_encode(keys).combine_chunks().indices.to_numpy(zero_copy_only=False)
    _, first = np.unique(indices, return_index=True)
    mask = np.ones(len(keys), bool)
    mask[first] = False
    return mask


def _columns(table: pa.Table) -> Iterable[tuple[str, pa.ChunkedArray]]:
    return zip(table.column_names, table.columns, strict=True)


def _from_arrow(column: pa.ChunkedArray) -> Any:
    """Return an astropy column; nulls become masked."""
    mask = column.is_null().to_numpy()
    if not mask.any():
        values = column.to_numpy()
        return values.astype(str) if values.dtype == object and pa.types.is_string(column.type) else values
    fill: Any = "" if pa.types.is_string(column.type) or pa.types.is_large_string(column.type) else 0
    values = np.asarray(column.fill_null(fill).to_numpy())
    return MaskedColumn(values.astype(str) if values.dtype == object else values, mask=mask)


def _first_table(path: Path) -> int:
    from astropy.io import fits

    with fits.open(path) as hdus:
        for number, hdu in enumerate(hdus):
            if isinstance(hdu, fits.BinTableHDU | fits.TableHDU) and not isinstance(hdu, fits.CompImageHDU):
                return number
    raise ValueError("it holds no table extension")


def _match(table: Table, name: str) -> str | None:
    """Return the table's own spelling of a column, whatever its case."""
    if name in table.colnames:
        return name
    return next((column for column in table.colnames if column.lower() == name.lower()), None)


def _find(table: Table, part: str, columns: Mapping[str, str], path: str | Path) -> str | None:
    if part in columns:
        name = _match(table, columns[part])
        if name is None:
            raise BadRequest(
                f"{path}: no column {columns[part]!r} for {part}; the table has {', '.join(table.colnames)}"
            )
        return name
    return next((match for guess in GUESSES[part] if (match := _match(table, guess))), None)


def _as_ids(column: Any) -> pa.Array:
    """Return ids as stripped strings; a float column is refused, since an id through a float loses digits."""
    values = np.ma.filled(column, "") if column.dtype.kind in "SUO" else np.asarray(column)
    if values.dtype.kind == "f":
        raise BadRequest(f"id column {column.name!r} is floating point, which cannot hold ids exactly; use another")
    if values.dtype.kind == "S":
        values = np.char.decode(values, "utf-8")
    return pa.array(np.char.strip(values.astype(str)).tolist(), pa.string())


def _numbers(column: Any, unit: str) -> pa.Array:
    """Return float64 values in `unit`, null where masked or not finite."""
    if column.unit is not None and str(column.unit) != unit:
        try:
            column = column.quantity.to(unit)
        except Exception as error:
            raise BadRequest(f"column {column.name!r} has unit {column.unit}, which is not an angle") from error
    values = np.ma.filled(np.ma.asarray(np.asarray(column), dtype=np.float64), np.nan)
    mask = np.asarray(getattr(column, "mask", False)) | ~np.isfinite(values)
    return pa.array(values, pa.float64(), mask=np.broadcast_to(mask, values.shape))


def _to_arrow(column: Any) -> pa.Array:
    """Return a column in native byte order; masked and NaN values become null."""
    values = np.asarray(column)
    mask = np.broadcast_to(np.asarray(getattr(column, "mask", False)), values.shape)
    if values.dtype.kind == "S":
        values = np.char.decode(values, "utf-8")
    if values.dtype.kind in "US":
        return pa.array(np.char.strip(values.astype(str)).tolist(), pa.string(), mask=mask)
    if values.dtype.kind == "f":
        mask = mask | ~np.isfinite(values)
    return pa.array(values.astype(values.dtype.newbyteorder("=")), mask=mask)
