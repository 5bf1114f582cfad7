"""Tables of sources to and from Arrow and files, with units, missing values, text and `meta` as they were.

`read` and `write` are astropy's own, put right where a format alone would lose something:

=========  ==============================================================================================
format     what is done for it
=========  ==============================================================================================
ECSV       nothing: it holds all of it
Parquet    null for what is missing and units in the fields' metadata, where astropy writes a second column
FITS       `meta` in one card, text in UTF-8, missing booleans as integers
VOTable    `meta` in one PARAM
CSV        no units and no `meta`; ids are read as text
=========  ==============================================================================================

Bytes (the pictures in a store's `thumbnail`) are written to Parquet alone; the others are refused by name.

FITS and VOTable have one form for empty and missing text, and one for NaN and a missing number: which columns have
something missing is kept beside `meta`.
"""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any, Final, TypeVar

import astropy.units as u
import numpy as np
import pyarrow as pa
from astropy.table import Column, MaskedColumn, Table
from astropy.table.connect import TableRead, TableWrite

from galembed.errors import BadRequest

FORMATS: Final = {
    ".vot": "votable",
    ".votable": "votable",
    ".xml": "votable",
    ".csv": "ascii.csv",
    ".ecsv": "ascii.ecsv",
    ".fits": "fits",
    ".fit": "fits",
    ".parquet": "parquet",
    ".pq": "parquet",
}
"""Astropy's format for the ending of a name; it tells some from the content alone."""

_NOTE: Final = "GALEMBED"
"""Card, PARAM and metadata key of what a format has no place for."""

_KEYS: Final = ("survey", "source_id")

T = TypeVar("T", bound=Table)


def arrow_columns(table: pa.Table) -> list[Column]:
    """Return an Arrow table's columns as astropy columns: units and descriptions kept, nulls masked."""
    return [_column(field, table.column(position).combine_chunks()) for position, field in enumerate(table.schema)]


def _column(field: pa.Field, values: pa.Array) -> Column:
    metadata = {key.decode(): text.decode() for key, text in (field.metadata or {}).items()}
    unit = u.Unit(metadata["unit"], parse_strict="silent") if metadata.get("unit") else None
    common = {"name": field.name, "unit": unit, "description": metadata.get("doc") or None}
    if pa.types.is_fixed_size_list(field.type):
        return Column(values.flatten().to_numpy(zero_copy_only=False).reshape(len(values), -1), **common)
    if pa.types.is_binary(field.type):
        data = values.fill_null(b"").to_numpy(zero_copy_only=False)
        missing = values.is_null().to_numpy(zero_copy_only=False)
        return MaskedColumn(data, mask=missing, **common) if values.null_count else Column(data, **common)
    text = pa.types.is_string(field.type) or pa.types.is_large_string(field.type)
    if not values.null_count:
        data = values.to_numpy(zero_copy_only=False)
        return Column(data.astype(str) if text else data, **common)
    missing = values.is_null().to_numpy(zero_copy_only=False)
    filled = values.fill_null("" if text else pa.scalar(0).cast(field.type)).to_numpy(zero_copy_only=False)
    return MaskedColumn(filled.astype(str) if text else filled, mask=missing, **common)


def arrow_table(table: Table) -> pa.Table:
    """Return an astropy table as Arrow's: null where masked, text as strings, vectors as fixed-size lists.

    Units and descriptions are in the fields' metadata (`unit`, `doc`), as in a store's schema; `meta` is in the
    schema's, as JSON.
    """
    fields, arrays = [], []
    for name, column in Table(table).columns.items():
        values = _arrow_array(column)
        metadata = {"unit": str(column.unit or ""), "doc": column.description or ""}
        metadata = {key: text for key, text in metadata.items() if text}
        fields.append(pa.field(name, values.type, metadata=metadata))
        arrays.append(values)
    return pa.table(arrays, schema=pa.schema(fields, metadata={_NOTE: _json({"meta": dict(table.meta)})}))


def _arrow_array(column: Column) -> pa.Array:
    missing = _missing(column)
    data = np.asarray(column)
    if data.ndim == 1 and data.dtype.kind in "USO":
        texts = np.char.decode(data, "utf-8") if data.dtype.kind == "S" else data
        return pa.array(texts.tolist(), None if data.dtype.kind == "O" else pa.string(), mask=missing)
    data = np.ascontiguousarray(data, data.dtype.newbyteorder("="))
    if data.ndim == 1:
        return pa.array(data, mask=missing)
    return pa.FixedSizeListArray.from_arrays(pa.array(data.ravel()), int(np.prod(data.shape[1:])))


def byte_columns(table: Table) -> list[str]:
    """Return the names of columns that hold bytes of any length, such as pictures."""
    objects = {name: np.asarray(column) for name, column in table.columns.items() if column.dtype.kind == "O"}
    return [name for name, values in objects.items() if any(isinstance(value, bytes) for value in values.flat)]


def _missing(column: Column) -> Any:
    """Return which values are masked, shape (row,); None where none is."""
    mask = getattr(column, "mask", None)
    return np.asarray(mask) if mask is not None and np.ndim(mask) == 1 and np.any(mask) else None


class WriteTable(TableWrite):  # type: ignore[misc]  # astropy has no types
    """Write a table, in the format that the ending of the name says unless `format` does.

    As `astropy.table.Table.write`, with VOTable known by its ending too. What FITS, VOTable and Parquet do not hold by
    themselves is kept for `read`; CSV keeps neither units nor `meta`.
    """

    def __call__(self, *args: Any, format: str | None = None, **kwargs: Any) -> None:
        """Write the table; see the class."""
        if not args or not isinstance(args[0], str | Path):
            super().__call__(*args, format=format, **kwargs)
            return
        file = Path(args[0])
        chosen = format or FORMATS.get(file.suffix.lower())
        if chosen == "parquet":
            _write_parquet(self._instance, file, **kwargs)
            return
        if pictures := byte_columns(self._instance):
            raise BadRequest(
                f"column {pictures[0]!r} holds bytes, which {chosen or file.suffix} does not take; "
                f"write {file.stem}.parquet, or remove the column first"
            )
        if chosen == "votable":
            _write_votable(self._instance, file, **kwargs)
        elif chosen == "fits":
            _for_fits(self._instance).write(*args, format=chosen, **kwargs)
        else:
            super().__call__(*args, format=chosen, **kwargs)


def _require_free(file: Path, overwrite: bool) -> None:
    if file.exists() and not overwrite:
        raise OSError(f"{file} exists already; give overwrite=True to replace it")


def _write_parquet(table: Table, file: Path, *, overwrite: bool = False) -> None:
    import pyarrow.parquet as pq
    from astropy.table.meta import get_yaml_from_table

    _require_free(file, overwrite)
    written = arrow_table(table)
    # Astropy's own header, so that Table.read finds units, descriptions and the length of text too.
    metadata = dict(written.schema.metadata) | {"table_meta_yaml": "\n".join(get_yaml_from_table(Table(table)))}
    metadata |= {f"table::len::{name}": str(_characters(column)) for name, column in Table(table).columns.items()}
    pq.write_table(written.replace_schema_metadata(metadata), file, compression="zstd")


def _characters(column: Column) -> int:
    return int(column.dtype.itemsize // 4) if column.dtype.kind == "U" else 1


def _write_votable(table: Table, file: Path, *, overwrite: bool = False, **kwargs: Any) -> None:
    from astropy.io.votable import from_table
    from astropy.io.votable.tree import Param

    _require_free(file, overwrite)
    votable = from_table(Table(table, meta={}), table_id=kwargs.pop("table_id", None))
    # Astropy escapes the value of a PARAM twice; JSON may spell these characters out.
    text = _note(table).translate({ord(sign): f"\\u{ord(sign):04x}" for sign in "&<>"})
    note = Param(votable, name=_NOTE, datatype="char", arraysize="*", value=text)
    votable.get_first_table().params.append(note)
    votable.to_xml(str(file), **kwargs)


def _for_fits(table: Table) -> Table:
    """Return a table that FITS can hold, and `read` turns back."""
    found = Table(table, meta={_NOTE: _note(table)})
    for name, column in found.columns.items():
        kept = {"name": name, "unit": column.unit, "description": column.description}
        missing = _missing(column)
        if column.dtype.kind == "U":
            texts = np.asarray(column) if missing is None else np.where(missing, "", np.asarray(column))
            found.replace_column(name, Column(np.char.encode(texts, "utf-8"), **kept))
        elif column.dtype.kind == "b" and missing is not None:
            values = np.asarray(column, np.int16)
            found.replace_column(name, MaskedColumn(values, mask=missing, fill_value=-1, **kept))
        elif column.dtype.kind in "iu" and missing is not None:
            column.fill_value = _unused(np.asarray(column)[~missing])
    return found


def _unused(values: Any) -> Any:
    """Return an integer to stand for what is missing that is none of `values`."""
    limits = np.iinfo(values.dtype)
    return next(number for number in chain((limits.min, limits.max), range(limits.max)) if number not in values)


def _note(table: Table) -> str:
    """Return as JSON what FITS and VOTable have no place for: `meta`, and what a column looked like."""
    masked = {name: column for name, column in table.columns.items() if np.any(getattr(column, "mask", False))}
    return _json(
        {
            "meta": dict(table.meta),
            "missing": list(masked),
            "booleans": [name for name, column in masked.items() if column.dtype.kind == "b"],
        }
    )


def _json(data: dict[str, Any]) -> str:
    return json.dumps(data, default=lambda value: value.item() if isinstance(value, np.generic) else str(value))


class ReadTable(TableRead):  # type: ignore[misc]
    """Read a table that `write` wrote, units, missing values, text and `meta` as they were.

    As `astropy.table.Table.read` in the format that the ending of the name says, or `format`. A file that another
    program wrote is read as astropy reads it, text as `str`.
    """

    def __call__(self, *args: Any, format: str | None = None, **kwargs: Any) -> Any:
        """Read a table; see the class."""
        if not args or not isinstance(args[0], str | Path):
            return super().__call__(*args, format=format, **kwargs)
        file = Path(args[0])
        chosen = format or FORMATS.get(file.suffix.lower())
        if chosen == "parquet" and (found := _read_parquet(self._cls, file)) is not None:
            return found
        if chosen == "ascii.csv":
            kwargs = {"converters": dict.fromkeys(_KEYS, str), "guess": False, "fast_reader": False} | kwargs
        found = super().__call__(*args, format=chosen, **kwargs)
        if chosen == "fits":
            return _restored(self._cls, found, found.meta.pop(_NOTE, None))
        if chosen == "votable":
            return _restored(self._cls, found, _votable_note(file, kwargs.get("table_id")))
        return found


def _read_parquet(kind: type[T], file: Path) -> T | None:
    """Return a table that `_write_parquet` wrote; None for any other."""
    import pyarrow.parquet as pq

    note = (pq.read_schema(file).metadata or {}).get(_NOTE.encode())
    if note is None:
        return None
    found: T = kind(arrow_columns(pq.read_table(file)), copy=False, meta=json.loads(note)["meta"])
    return found


def _votable_note(file: Path, table_id: Any) -> str | None:
    from astropy.io.votable import parse

    votable = parse(str(file))
    table = votable.get_first_table() if table_id is None else votable.get_table_by_id(table_id)
    return next((str(param.value) for param in table.params if param.name == _NOTE), None)


def _restored(kind: type[T], table: Table, note: str | None) -> T:
    if note is None:
        table.convert_bytestring_to_unicode()
        plain: T = kind(table, copy=False)
        return plain
    kept = json.loads(note)
    columns = [
        _as_it_was(column, missing=name in kept["missing"], boolean=name in kept["booleans"])
        for name, column in Table(table).columns.items()
    ]
    found: T = kind(columns, copy=False, meta=kept["meta"])
    return found


def _as_it_was(column: Column, *, missing: bool, boolean: bool) -> Column:
    data = np.ma.getdata(column.data)
    if data.dtype.kind == "S":
        data = np.char.decode(data, "utf-8")
    data = data.astype(bool if boolean else data.dtype.newbyteorder("="))
    kept = {"name": column.name, "unit": column.unit, "description": column.description}
    if not missing:
        return Column(data, **kept)
    mask = data == "" if data.dtype.kind == "U" else np.ma.getmaskarray(column.data)
    return MaskedColumn(data, mask=mask, **kept)
