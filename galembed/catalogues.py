"""Source catalogues: any usual table file or HATS folder, as an Arrow table with our names and the user's columns."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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

GUESSES: Final = {
    "id": (
        "source_id",
        "id_str",
        "plateifu",
        "id",
        "object_id",
        "objectid",
        "objid",
        "dr7objid",
        "dr7_objid",
        "dr8objid",
        "coadd_object_id",
        "targetid",
        "name",
        "iauname",
        "nsaid",
        "galaxyid",
        "galaxy_id",
        "ident",
        "asset_id",
    ),
    "ra": (
        "ra",
        "right_ascension",
        "coord_ra",
        "ramean",
        "_raj2000",
        "raj2000",
        "ra_icrs",
        "alpha_j2000",
        "ira",
    ),
    "dec": (
        "dec",
        "declination",
        "coord_dec",
        "decmean",
        "_dej2000",
        "dej2000",
        "de_icrs",
        "delta_j2000",
        "idec",
    ),
    "size": ("shape_r", "half_light_radius", "r50", "petro_th50", "petroth50", "petror50_r"),
    "r90": ("r90", "petro_th90", "petroth90", "petror90_r"),
}
"""Column names tried for each part, in order, whatever their case and a leading `#`.

`RELEASE`, `BRICKID` and `OBJID` together make the Legacy Surveys' id and come before the rest; the columns that a HATS
folder's properties name come before the rest for a position. `ra` and `dec` are tried as pairs, first with first. Only
columns with one value per row are guessed, and radii only where their unit, if there is one, is an angle.

Where the names come from: `shape_r` Legacy Surveys tractor and sweep; `objid`, `petror50_r`, `petror90_r` SDSS;
`dr7objid`, `dr8objid`, `asset_id`, `galaxyid` Galaxy Zoo; `plateifu` MaNGA (its objid is SDSS's, and repeats);
`iauname`, `nsaid`, `petro_th50`, `petro_th90` NASA-Sloan Atlas; `objid`, `ramean`, `decmean` Pan-STARRS MeanObject;
`object_id` HSC, and Euclid MER with `right_ascension`, `declination` (its radii are in pixels, so none is guessed);
`ira`, `idec` HSC shape catalogue; `objectid`, `coord_ra`, `coord_dec` Rubin; `coadd_object_id` DES; `targetid` DESI;
`_raj2000`, `raj2000`, `ra_icrs` VizieR; `alpha_j2000` SExtractor; `ident` GalSim's COSMOS catalogue; `id_str`
Zoobot."""

CARRIED: Final = re.compile(r"mag_\w+|redshift|z_?spec|z_?phot\w*|psfsize_\w+|galdepth_\w+|ebv|e_b_v", re.IGNORECASE)
"""Catalogue columns that travel into the store unasked: what people filter by, and what explains a neighbour away."""

_UNITS: Final = {"ra": "deg", "dec": "deg", "size": "arcsec", "r90": "arcsec"}
_LEGACY_ID: Final = ("release", "brickid", "objid")
_NO_NUMBER: Final = ("", "-", "--", "null", "none", "na", "n/a", "<na>")
_SEXAGESIMAL: Final = re.compile(r"[+-]?\d+\s*[:hd°\s]\s*\d+")


@dataclass(frozen=True)
class _Columns:
    """The columns of a table file before any is read.

    `units` has every column with one value per row, in the file's order ("" without a unit); `arrays` names the others.
    `positions` are the columns that the format itself names for `ra` and `dec`. `read` reads some columns.
    """

    units: Mapping[str, str]
    read: Callable[[Sequence[str]], pa.Table]
    arrays: Sequence[str] = ()
    positions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Chosen:
    """Which columns of a table file are read, and what for.

    Attributes
    ----------
    parts : mapping of str to tuple of str
        Columns of ``id``, ``ra``, ``dec``, ``size`` and ``r90``, as far as they are there.
    carried : mapping of str to str
        Our name of each column to carry.
    units : mapping of str to str
        Unit of each column with one value per row; "" without.
    """

    parts: Mapping[str, tuple[str, ...]]
    carried: Mapping[str, str]
    units: Mapping[str, str]

    @property
    def names(self) -> list[str]:
        """Columns to read."""
        return list(dict.fromkeys([*(name for names in self.parts.values() for name in names), *self.carried]))

    def convert(self, table: pa.Table) -> pa.Table:
        """Return what `read_catalogue` does, of rows that have the columns `names`."""
        arrays: list[Any] = []
        fields: list[pa.Field] = []
        for part, names in self.parts.items():
            if part == "id":
                arrays.append(_join_ids([table[name] for name in names], names))
            else:
                arrays.append(_numbers(table[names[0]], names[0], self.units[names[0]], _UNITS[part]))
            fields.append(_field("source_id" if part == "id" else part, arrays[-1], _UNITS.get(part, "")))
        for name, our_name in self.carried.items():
            arrays.append(_tidy(table[name], name))
            fields.append(_field(our_name, arrays[-1], self.units[name]))
        return pa.table(arrays, schema=pa.schema(fields))


def choose_columns(
    file: str | Path,
    units: Mapping[str, str],
    *,
    columns: Mapping[str, str],
    carry: Sequence[str],
    parts: Iterable[str] = ("id", "ra", "dec"),
) -> Chosen:
    """Return which columns of a table are read; see `read_catalogue`, whose errors these are.

    Parameters
    ----------
    file : str or Path
        For messages.
    units : mapping of str to str
        Unit of each column with one value per row, in the table's order.
    columns, carry
        As in `read_catalogue`; nothing is carried unasked.
    parts : iterable of str
        Parts to look for; the id must be there.
    """
    source = _Columns(units, lambda names: pa.table({}))
    wanted = set(parts)
    found = {part: names for part, names in _choose_parts(source, columns, Path(file)).items() if part in wanted}
    if "id" not in found:
        raise BadRequest(_how_to_name("id", source, Path(file)))
    used = {name for part in ("ra", "dec") for name in found.get(part, ())}
    chosen = _choose_carried(source, carry, used, Path(file), unasked=False)
    return Chosen(found, chosen, units)


def table_units(file: str | Path) -> dict[str, str]:
    """Return the unit of each column of a Parquet file that has one value per row ("" without), in its order.

    Raises
    ------
    ArtifactNotFound
        If there is no such file.
    UnreadableInput
        If it is no Parquet file.
    """
    with _reading(Path(file)):
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
    with _reading(path):
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


def read_catalogue(
    path: str | Path, *, columns: Mapping[str, str], carry: Sequence[str] = (), need: Iterable[str] = ("id",)
) -> pa.Table:
    """Read the columns of a catalogue that are needed, into our names.

    Parameters
    ----------
    path : str or Path
        FITS (the first table), VOTable, ECSV, CSV or Parquet file, or a HATS folder.
    columns : mapping of str to str
        Column for ``id``, ``ra``, ``dec``, ``size`` (half-light radius) or ``r90`` (radius of 90% of the light) where
        the guess (`GUESSES`) is not wanted.
    carry : sequence of str
        Columns to carry beyond `CARRIED`.
    need : iterable of str
        Parts that must be there.

    Returns
    -------
    pa.Table
        ``source_id`` (string, stripped, "" where empty or masked), ``ra``, ``dec`` (float64, deg), ``size``, ``r90``
        (float64, arcsec), each where found and null where masked or not finite, then the carried columns in lower
        case, with units in their fields' metadata. One row per catalogue row, in its order.

    Raises
    ------
    ArtifactNotFound
        If there is no such file.
    UnreadableInput
        If it cannot be read, or a HATS folder has another number of rows than its properties say.
    BadRequest
        If a part or a column to carry is not there, is not one number or text per row, has a unit that is not an angle,
        holds positions in hours or degrees, minutes and seconds, or ids in floating point.
    """
    path = Path(path)
    unknown = sorted(set(columns) - set(GUESSES))
    if unknown:
        raise BadRequest(f"--column takes {', '.join(GUESSES)}, got {unknown}")
    with _reading(path):
        source = _open(path)
        parts = _choose_parts(source, columns, path)
        lacking = [part for part in need if part not in parts]
        if lacking:
            raise BadRequest(_how_to_name(lacking[0], source, path))
        carried = _choose_carried(source, carry, {name for part in _UNITS for name in parts.get(part, ())}, path)
        chosen = Chosen(parts, carried, source.units)
        return chosen.convert(source.read(chosen.names))


def source_ids(table: Table, column: str | None = None) -> pa.Array | None:
    """Return each row's id as stripped text, "" where it is empty or masked.

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
        If the ids are floating point, or neither text nor integers.
    """
    plain = [name for name in table.colnames if len(table[name].shape) == 1]
    names = (column,) if column else _id_columns(plain)
    return _join_ids([_to_arrow(table[name]) for name in names], names) if names else None


def duplicate_rows(keys: pa.ChunkedArray) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return a mask of the rows whose key occurred in an earlier row."""
    rows = pa.table({"key": keys, "row": np.arange(len(keys))})
    first = rows.group_by("key").aggregate([("row", "min")])["row_min"].to_numpy()
    mask = np.ones(len(keys), bool)
    mask[first] = False
    return mask


@contextmanager
def _reading(path: Path) -> Iterator[None]:
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


# Opening: which columns there are, and how to read some.


def _open(path: Path) -> _Columns:
    if arrow := _arrow_columns(path):
        return arrow
    return _fits_columns(path) if _is_fits(path) else _table_columns(_astropy_table(path))


def _arrow_columns(path: Path) -> _Columns | None:
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


def _table_columns(table: Table) -> _Columns:
    plain = {name: str(getattr(table[name], "unit", "") or "") for name in table.colnames if table[name].ndim == 1}
    return _Columns(
        plain,
        lambda names: pa.table({name: _to_arrow(table[name]) for name in names}),
        [name for name in table.colnames if name not in plain],
    )


def _fits_columns(path: Path) -> _Columns:
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

    return _Columns(plain, read, arrays)


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


def _parquet_columns(files: Sequence[str], schema: pa.Schema | None = None) -> _Columns:
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

    return _Columns(found, lambda wanted: dataset.to_table(columns={name: expression(name) for name in wanted}), nested)


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


def _hats_columns(root: Path) -> _Columns:
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
    return _Columns(plain, read, parquet.arrays, catalogue.positions)


def _csv_columns(path: Path) -> _Columns:
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

    return _Columns(dict.fromkeys(names, ""), read)


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
    missing = pc.is_in(pc.utf8_lower(text), value_set=pa.array(_NO_NUMBER))
    present = text.filter(pc.invert(missing))
    if len(present) and pc.all(pc.match_substring_regex(present, r"^[+-]?\d+$")).as_py():
        try:
            if pc.all(pc.equal(present.cast(pa.int64()).cast(pa.string()), present)).as_py():
                return _null_where(missing, text).cast(pa.int64())
        except pa.ArrowInvalid:
            pass  # more digits than an integer has room for
    elif len(present):
        try:
            return _null_where(missing, text).cast(pa.float64())
        except pa.ArrowInvalid:
            pass
    return _null_where(pc.equal(text, ""), text)


def _null_where(mask: Any, values: Any) -> Any:
    return pc.if_else(mask, pa.scalar(None, values.type), values)


def _refuse_repeated(names: Sequence[str]) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"column {repeated[0]!r} occurs {names.count(repeated[0])} times")


# Choosing: which column is which.


def _match(names: Iterable[str], name: str) -> str | None:
    """Return the table's own spelling of a column: exact, else whatever its case and a `#` before it."""
    names = list(names)
    return name if name in names else next(iter(_alike(names, name)), None)


def _alike(names: Iterable[str], name: str) -> list[str]:
    return [column for column in names if column.lstrip("# ").lower() == name.lstrip("# ").lower()]


def _named(source: _Columns, name: str, purpose: str, path: Path) -> str:
    """Return the column that the user named, or raise BadRequest."""
    every = [*source.units, *source.arrays]
    alike = _alike(every, name)
    if name not in every and len(alike) > 1:
        raise BadRequest(f"{path}: {name!r} {purpose} may be {' or '.join(alike)}; spell it as the table does")
    found = _match(every, name)
    if found is None:
        raise BadRequest(f"{path}: no column {name!r} {purpose}; {_what_there_is(source, name)}")
    if found in source.arrays:
        raise BadRequest(f"{path}: column {found!r} {purpose} holds arrays; name one with a single value per row")
    return found


def _what_there_is(source: _Columns, name: str) -> str:
    lower = {column.lower(): column for column in source.units}
    near = [lower[match] for match in difflib.get_close_matches(name.lower(), lower, n=3)]
    there = f"the table has {', '.join(list(source.units)[:30])}{', ...' if len(source.units) > 30 else ''}"
    return f"did you mean {' or '.join(near)}? {there}" if near else there


def _choose_parts(source: _Columns, columns: Mapping[str, str], path: Path) -> dict[str, tuple[str, ...]]:
    """Return the columns of each part that was named or guessed, in the order of `GUESSES`."""
    parts: dict[str, tuple[str, ...]] = {
        part: (_named(source, name, f"for {part}", path),) for part, name in columns.items()
    }
    for part, target in _UNITS.items():
        if part in parts and _factor(source.units[parts[part][0]], target) is None:
            name = parts[part][0]
            raise BadRequest(
                f"{path}: column {name!r} for {part} has unit {source.units[name]}, which is not an angle; "
                f"give {target}, or another unit of angle"
            )
    if "id" not in parts and (ids := _id_columns(source.units)):
        parts["id"] = ids
    for part, name in _guess_position(source, columns).items():
        parts.setdefault(part, (name,))
    for part in ("size", "r90"):
        if part not in parts and (usable := [name for name in _guesses(source, part) if _is_angle(source, name)]):
            parts[part] = (usable[0],)
    return {part: parts[part] for part in GUESSES if part in parts}


def _guesses(source: _Columns, part: str) -> list[str]:
    return [match for guess in GUESSES[part] if (match := _match(source.units, guess))]


def _is_angle(source: _Columns, name: str) -> bool:
    return _factor(source.units[name], "arcsec") is not None


def _guess_position(source: _Columns, named: Mapping[str, str]) -> Mapping[str, str]:
    """Return the columns of `ra` and `dec`: the first pair, or the first of each where the other was named."""
    if len(source.positions) == 2:
        return source.positions
    if "ra" in named or "dec" in named:
        return {part: names[0] for part in ("ra", "dec") if (names := _guesses(source, part))}
    for pair in zip(GUESSES["ra"], GUESSES["dec"], strict=True):
        ra, dec = (_match(source.units, guess) for guess in pair)
        if ra and dec:
            return {"ra": ra, "dec": dec}
    return {}


def _id_columns(names: Iterable[str]) -> tuple[str, ...]:
    names = list(names)
    legacy = tuple(match for part in _LEGACY_ID if (match := _match(names, part)))
    if len(legacy) == len(_LEGACY_ID):
        return legacy
    return next(((match,) for guess in GUESSES["id"] if (match := _match(names, guess))), ())


def _how_to_name(part: str, source: _Columns, path: Path) -> str:
    left_out = [f"{name} is in {source.units[name]}" for name in _guesses(source, part)]
    why = f", but {left_out[0]}" if part in ("size", "r90") and left_out else ""
    return (
        f"{path}: no column found for {part} (tried {', '.join(GUESSES[part])}{why}); "
        f"name it with --column {part}=COLUMN; {_what_there_is(source, part)}"
    )


def _choose_carried(
    source: _Columns, carry: Sequence[str], used: set[str], path: Path, *, unasked: bool = True
) -> dict[str, str]:
    """Return the columns to carry, in the table's order, and our name of each."""
    asked = {_named(source, name, "to carry", path) for name in carry}
    reserved = {"source_id", *_UNITS}
    chosen: dict[str, str] = {}
    for name in source.units:
        if name in used or not (name in asked or (unasked and CARRIED.fullmatch(name))):
            continue
        ours = name.lstrip("# ").lower().replace(".", "_")  # LanceDB reads a dot as a path into a struct
        rival = next((other for other, theirs in chosen.items() if theirs == ours), None)
        if rival and not {rival, name} <= asked:
            # Of two spellings, the one that was asked for; else the first.
            if name not in asked:
                continue
            del chosen[rival]
        elif rival or ours in reserved:
            why = f"and so would {rival!r}" if rival else "which means something else there"
            raise BadRequest(f"{path}: column {name!r} would be stored as {ours!r}, {why}; rename it, or leave it out")
        chosen[name] = ours
    return chosen


# Converting: Arrow columns to ids, numbers and carried columns.


def _field(name: str, values: Any, unit: str) -> pa.Field:
    return pa.field(name, values.type, metadata={"unit": unit} if unit else None)


def _plain(column: Any, name: str) -> Any:
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


def _join_ids(parts: Sequence[Any], names: Sequence[str]) -> Any:
    """Return ids as stripped strings, "" where any part is missing."""
    texts = [_as_text(part, name) for part, name in zip(parts, names, strict=True)]
    joined = pc.binary_join_element_wise(*texts, "-") if len(texts) > 1 else texts[0]
    return pc.fill_null(joined, "")


def _as_text(column: Any, name: str) -> Any:
    """Return an id column as stripped text, null where it is empty."""
    column = _plain(column, name)
    kind = column.type
    if pa.types.is_floating(kind):
        # An id that went through a float has lost digits.
        raise BadRequest(f"id column {name!r} is floating point, which cannot hold ids exactly; use another")
    known = pa.types.is_string(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)
    if not known and not (pa.types.is_decimal(kind) and kind.scale == 0):
        raise BadRequest(f"id column {name!r} holds {kind}, which is neither text nor integers; use another")
    text = pc.utf8_trim_whitespace(pc.utf8_rtrim(column.cast(pa.string()), characters="\0"))
    return _null_where(pc.equal(text, ""), text)


def _numbers(column: Any, name: str, unit: str, target: str) -> Any:
    """Return float64 values in the unit `target`, null where missing or not finite."""
    column = _plain(column, name)
    factor = _factor(unit, target)
    if pa.types.is_string(column.type):
        column = _parse(column, name)
    kind = column.type
    number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    if not number and not pa.types.is_null(kind):
        raise BadRequest(f"column {name!r} holds {kind}, where numbers in {target} are needed")
    if factor is None:
        raise BadRequest(f"column {name!r} has unit {unit}, which is not an angle")
    values = column.cast(pa.float64(), safe=False)
    if factor != 1:
        values = pc.multiply(values, factor)
    return _null_where(pc.invert(pc.is_finite(values)), values)


def _parse(text: Any, name: str) -> Any:
    """Return the numbers that a text column spells."""
    text = pc.utf8_trim_whitespace(text)
    text = _null_where(pc.is_in(pc.utf8_lower(text), value_set=pa.array(_NO_NUMBER)), text)
    try:
        return text.cast(pa.float64())
    except pa.ArrowInvalid as error:
        row, value = next(
            (row, value) for row, value in enumerate(text.to_pylist()) if value is not None and not _is_number(value)
        )
        where = f"column {name!r} holds {value!r} in row {row + 1}"
        if _SEXAGESIMAL.match(value):
            raise BadRequest(f"{where}: give decimal degrees, not hours or degrees, minutes and seconds") from error
        raise BadRequest(f"{where}, which is no number; mend it or name another column") from error


def _is_number(text: str) -> bool:
    try:
        pa.scalar(text).cast(pa.float64())
    except pa.ArrowInvalid:
        return False
    return True


def _factor(unit: str, target: str) -> float | None:
    """Return what turns values in `unit` ("" means `target` already) into `target`; None if it is no angle."""
    if not unit:
        return 1.0
    for spelling in (unit, unit.lower().rstrip("s")):  # FITS headers say "degrees" and "DEG" too
        try:
            return float(units.Unit(spelling, parse_strict="silent").to(target))
        except ValueError:  # unknown to astropy, or no angle
            continue
    return None


def _tidy(column: Any, name: str) -> Any:
    """Return a carried column: text stripped, null where masked or not finite."""
    column = _plain(column, name)
    if pa.types.is_string(column.type):
        return pc.utf8_trim_whitespace(column)
    return _null_where(pc.invert(pc.is_finite(column)), column) if pa.types.is_floating(column.type) else column


# Between astropy and Arrow.


def _to_arrow(column: Any) -> pa.Array:
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


def _decoded(value: object) -> str | None:
    if value is None:
        return None
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def _from_arrow(column: pa.ChunkedArray, name: str) -> Any:
    """Return an astropy column; nulls become masked. Bytes stay bytes: they may be pictures."""
    if not pa.types.is_binary(column.type) and not pa.types.is_large_binary(column.type):
        column = _plain(column, name)
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
