"""Table files: which columns one has, and how to read some of them into Arrow, whatever the format."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from astropy import units
from astropy.io.fits.verify import VerifyWarning
from astropy.table import MaskedColumn, Table

from galembed.errors import ArtifactNotFound, BadRequest, GalembedError, UnreadableInput
from galembed.hats import PARTITION_COLUMNS, open_hats

NO_NUMBER: Final = ("", "-", "--", "null", "none", "na", "n/a", "<na>")
"""Texts that stand for a missing number."""


@dataclass(frozen=True)
class Columns:
    """The columns of a table file before any is read.

    `units` has every column with one value per row, in the file's order ("" without a unit); `arrays` names the others.
    `positions` are the columns that the format itself names for `ra` and `dec`. `read` reads some columns.
    """

    units: Mapping[str, str]
    read: Callable[[Sequence[str]], pa.Table]
    arrays: Sequence[str] = ()
    positions: Mapping[str, str] = field(default_factory=dict)


def table_units(file: str | Path) -> dict[str, str]:
    """Return the unit of each column of a Parquet file that has one value per row ("" without), in its order.

    Raises
    ------
    ArtifactNotFound
        If there is no such file.
    UnreadableInput
        If it is no Parquet file.
    """
    with reading(Path(file)):
        return dict(_parquet_columns([str(file)]).units)


def read_table(path: str | Path) -> Table:
    """Read a whole table file, or a HATS folder.

    Masked and null values are masked; NaN stays NaN: whether it is missing or an error is for the caller to say. A CSV
    column is a number where all its text is; digits that a number would not give back (`007`) stay text.

    Raises
    ------
    ArtifactNotFound
        If there is no such file.
    UnreadableInput
        If it cannot be read as FITS, VOTable, ECSV, CSV, Parquet or HATS.
    """
    path = Path(path)
    with reading(path):
        if arrow := _arrow_columns(path):
            table = arrow.read([*arrow.units, *arrow.arrays])
            read = Table({name: _from_arrow(table[name], name) for name in table.column_names})
            for name, unit in arrow.units.items():
                if unit:
                    read[name].unit = units.Unit(unit, parse_strict="silent")
            return read
        if _is_fits(path):
            return Table.read(path, format="fits", hdu=_first_table(path), mask_invalid=False)
        return _astropy_table(path)


def open_columns(path: Path) -> Columns:
    """Return which columns a table file or HATS folder has; errors are the libraries' own (see `reading`)."""
    if arrow := _arrow_columns(path):
        return arrow
    return _fits_columns(path) if _is_fits(path) else _table_columns(_astropy_table(path))


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Have whatever goes wrong in reading `path` raise what `read_table` raises, and advice for writers unsaid."""
    if not path.exists():
        raise ArtifactNotFound(f"no table at {path}")
    try:
        with warnings.catch_warnings():
            # Advice for writers, on column names such as "# object_id" and on unknown units.
            warnings.simplefilter("ignore", VerifyWarning)
            warnings.simplefilter("ignore", units.UnitsWarning)
            yield
    except GalembedError:
        raise
    except Exception as error:
        raise UnreadableInput(
            f"{path} cannot be read as a table ({type(error).__name__}: {error}); "
            "give FITS, VOTable, ECSV, CSV, Parquet or a HATS folder"
        ) from error


def to_arrow(column: Any) -> pa.Array:
    """Return an astropy column of one value per row in native byte order; masked values become null."""
    values = np.asarray(column)
    if values.ndim != 1:
        raise BadRequest(f"column {column.name!r} holds arrays; name one with a single value per row")
    mask = np.broadcast_to(np.asarray(getattr(column, "mask", False)), values.shape)
    if values.dtype.kind == "O":
        texts = [None if gone else _decoded(value) for gone, value in zip(mask, values, strict=True)]
        return pa.array(texts, pa.string())
    if values.dtype.kind == "S":
        return pa.array(np.ascontiguousarray(values), mask=mask)
    return pa.array(values.astype(values.dtype.newbyteorder("=")), mask=mask)


def plain_text(column: Any, name: str) -> Any:
    """Return categories, bytes and other kinds of text as strings, the rest as it is."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_fixed_size_binary(column.type):
        column = column.cast(pa.binary())
    texts = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_large_string, pa.types.is_string_view)
    if not any(test(column.type) for test in texts):
        return column
    try:
        return column.cast(pa.string())
    except pa.ArrowInvalid as error:
        raise BadRequest(f"column {name!r} holds bytes that are no UTF-8 text ({error}); use another") from error


def null_where(mask: Any, values: Any) -> Any:
    return pc.if_else(mask, pa.scalar(None, values.type), values)


def _arrow_columns(path: Path) -> Columns | None:
    """Return the columns of a file that Arrow reads, None for other formats."""
    name = path.name.lower()
    if path.is_dir():
        return _hats_columns(path)
    if name.endswith((".parquet", ".pq")):
        return _parquet_columns([str(path)])
    if name.endswith((".csv", ".csv.gz")) and not _first_line(path).startswith("# %ECSV"):
        return _csv_columns(path)
    return None


def _is_fits(path: Path) -> bool:
    return path.name.lower().endswith((".fits", ".fit", ".fits.gz", ".fit.gz"))


def _astropy_table(path: Path) -> Table:
    name = path.name.lower().removesuffix(".gz")
    if name.endswith((".vot", ".votable", ".xml")):
        # A FIELD's ID is its name mangled into an XML identifier; the name is what the survey calls it.
        return Table.read(path, format="votable", table_id=0, use_names_over_ids=True)
    if name.endswith((".ecsv", ".csv")):
        return Table.read(path, format="ascii.ecsv")
    return Table.read(path)


def _table_columns(table: Table) -> Columns:
    plain = {name: str(getattr(table[name], "unit", "") or "") for name in table.colnames if table[name].ndim == 1}
    return Columns(
        plain,
        lambda names: pa.table({name: to_arrow(table[name]) for name in names}),
        [name for name in table.colnames if name not in plain],
    )


def _fits_columns(path: Path) -> Columns:
    """Return the columns of the first table; reading maps the file and touches only the columns asked for."""
    from astropy.io import fits

    number = _first_table(path)
    with fits.open(path) as hdus:
        # An empty shape is one value per row: vectors, bit fields and variable-length arrays have another.
        columns = hdus[number].columns
        plain = {column.name: column.unit or "" for column in columns if columns.dtype[column.name].shape == ()}
        arrays = [name for name in columns.names if name not in plain]

    def read(names: Sequence[str]) -> pa.Table:
        with fits.open(path, memmap=not path.name.lower().endswith(".gz")) as hdus:
            return pa.table({name: _fits_column(hdus[number], name) for name in names})

    return Columns(plain, read, arrays)


def _fits_column(hdu: Any, name: str) -> pa.Array:
    column = hdu.columns[name]
    raw = hdu.data.view(np.ndarray)[name]
    if raw.dtype.kind == "S" and "A" in column.format:
        return pa.array(np.ascontiguousarray(raw))
    values = np.asarray(hdu.data.field(name))
    mask = None
    if column.null is not None and values.dtype.kind in "iu":
        mask = values == int(column.null) * int(column.bscale or 1) + int(column.bzero or 0)
    return pa.array(values.astype(values.dtype.newbyteorder("=")), mask=mask)


def _first_table(path: Path) -> int:
    from astropy.io import fits

    with fits.open(path) as hdus:
        for number, hdu in enumerate(hdus):
            if isinstance(hdu, fits.BinTableHDU | fits.TableHDU) and not isinstance(hdu, fits.CompImageHDU):
                return number
    raise ValueError("it holds no table extension")


def _parquet_columns(files: Sequence[str], schema: pa.Schema | None = None) -> Columns:
    import pyarrow.dataset as ds

    dataset = ds.dataset(list(files), schema=schema, format="parquet")
    schema = dataset.schema
    _refuse_repeated(schema.names)
    header = _astropy_header(schema)
    # astropy writes a masked column as two, and says so in its header.
    masks = {name: f"{name}.mask" for name in schema.names if header and f"{name}.mask" in schema.names}
    names = [name for name in schema.names if name not in masks.values()]
    nested = [name for name in names if pa.types.is_nested(schema.field(name).type)]
    found = {name: header.get(name) or _unit_of(schema.field(name)) for name in names if name not in nested}

    def expression(name: str) -> Any:
        if name not in masks:
            return pc.field(name)
        return pc.if_else(pc.field(masks[name]), pa.scalar(None, schema.field(name).type), pc.field(name))

    return Columns(found, lambda wanted: dataset.to_table(columns={name: expression(name) for name in wanted}), nested)


def _unit_of(column: pa.Field) -> str:
    return str((column.metadata or {}).get(b"unit", b"").decode())


def _astropy_header(schema: pa.Schema) -> dict[str, str]:
    """Return the unit of each column that astropy's own header in a Parquet file lists; empty without one."""
    text = (schema.metadata or {}).get(b"table_meta_yaml")
    if not text:
        return {}
    from astropy.table.meta import get_header_from_yaml

    header = get_header_from_yaml(text.decode().split("\n"))
    return {column["name"]: str(column.get("unit", "")) for column in header["datatype"]}


def _hats_columns(root: Path) -> Columns:
    catalogue = open_hats(root)
    parquet = _parquet_columns(catalogue.files, catalogue.schema)

    def read(names: Sequence[str]) -> pa.Table:
        table = parquet.read(names)
        if catalogue.rows is not None and catalogue.rows != len(table):
            raise UnreadableInput(
                f"{root}: its properties say hats_nrows={catalogue.rows}, its files hold {len(table)} rows; "
                "copy it again, or mend the properties"
            )
        return table

    plain = {name: unit for name, unit in parquet.units.items() if name not in PARTITION_COLUMNS}
    return Columns(plain, read, parquet.arrays, catalogue.positions)


def _csv_columns(path: Path) -> Columns:
    """Return the columns of a CSV file, read as text first, so that digits are lost to no guess about their type."""
    from pyarrow import csv

    options = {
        "read_options": csv.ReadOptions(skip_rows=_lines_before_header(path)),
        "parse_options": csv.ParseOptions(newlines_in_values=True),
    }
    with csv.open_csv(path, **options) as reader:
        raw = reader.schema.names
    names = [name.strip() or f"col{number}" for number, name in enumerate(raw)]
    _refuse_repeated(names)
    raw_names = dict(zip(names, raw, strict=True))

    def read(wanted: Sequence[str]) -> pa.Table:
        if not wanted:
            return pa.table({})  # pyarrow takes an empty list to mean every column
        spelt = [raw_names[name] for name in wanted]
        convert = csv.ConvertOptions(column_types=dict.fromkeys(spelt, pa.string()), include_columns=spelt)
        table = csv.read_csv(path, convert_options=convert, **options)
        return pa.table({name: _typed(column) for name, column in zip(wanted, table.columns, strict=True)})

    return Columns(dict.fromkeys(names, ""), read)


def _first_line(path: Path) -> str:
    with pa.input_stream(str(path)) as stream:
        return bytes(stream.read(4096)).decode("utf-8", "replace").split("\n")[0]


def _lines_before_header(path: Path) -> int:
    """Return how many lines such as SkyServer's `#Table1` come before the header."""
    with pa.input_stream(str(path)) as stream:
        lines = bytes(stream.read(4096)).split(b"\n")
    header = next((number for number, line in enumerate(lines) if not line.startswith(b"#") or b"," in line), 0)
    return header if b"," in lines[header] else 0  # in a table of one column, "# id" is the header


def _typed(column: Any) -> Any:
    """Return text as integers or floats where all of it is, and integers only where they give the same text back."""
    text = pc.utf8_trim_whitespace(column)
    missing = pc.is_in(pc.utf8_lower(text), value_set=pa.array(NO_NUMBER))
    present = text.filter(pc.invert(missing))
    if len(present) and pc.all(pc.match_substring_regex(present, r"^[+-]?\d+$")).as_py():
        try:
            if pc.all(pc.equal(present.cast(pa.int64()).cast(pa.string()), present)).as_py():
                return null_where(missing, text).cast(pa.int64())
        except pa.ArrowInvalid:
            pass  # more digits than an integer has room for
    elif len(present):
        try:
            return null_where(missing, text).cast(pa.float64())
        except pa.ArrowInvalid:
            pass
    return null_where(pc.equal(text, ""), text)


def _refuse_repeated(names: Sequence[str]) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"column {repeated[0]!r} occurs {names.count(repeated[0])} times")


def _decoded(value: object) -> str | None:
    if value is None:
        return None
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def _from_arrow(column: pa.ChunkedArray, name: str) -> Any:
    """Return an astropy column; nulls become masked. Bytes stay bytes: they may be pictures."""
    if not pa.types.is_binary(column.type) and not pa.types.is_large_binary(column.type):
        column = plain_text(column, name)
    if pa.types.is_null(column.type):
        column = column.cast(pa.string())
    mask = column.is_null().to_numpy()
    if pa.types.is_string(column.type):
        values = pc.fill_null(column, "").to_numpy().astype(str)
    elif pa.types.is_integer(column.type) or pa.types.is_boolean(column.type):
        values = pc.fill_null(column, pa.scalar(0).cast(column.type)).to_numpy()  # else a float, or an object
    else:
        values = column.to_numpy()
    return MaskedColumn(values, mask=mask) if mask.any() else values
