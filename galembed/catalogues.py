"""Source catalogues: any usual table file or HATS folder, as an Arrow table with our names and the user's columns."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from astropy import units
from astropy.table import Table

from galembed.catalogue_files import NO_NUMBER, Columns, null_where, open_columns, plain_text, reading, to_arrow
from galembed.errors import BadRequest

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
_SEXAGESIMAL: Final = re.compile(r"[+-]?\d+\s*[:hd°\s]\s*\d+")


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
    source = Columns(units, lambda names: pa.table({}))
    wanted = set(parts)
    found = {part: names for part, names in _choose_parts(source, columns, Path(file)).items() if part in wanted}
    if "id" not in found:
        raise BadRequest(_how_to_name("id", source, Path(file)))
    used = {name for part in ("ra", "dec") for name in found.get(part, ())}
    chosen = _choose_carried(source, carry, used, Path(file), unasked=False)
    return Chosen(found, chosen, units)


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
    with reading(path):
        source = open_columns(path)
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
    return _join_ids([to_arrow(table[name]) for name in names], names) if names else None


def duplicate_rows(keys: pa.ChunkedArray) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return a mask of the rows whose key occurred in an earlier row."""
    rows = pa.table({"key": keys, "row": np.arange(len(keys))})
    first = rows.group_by("key").aggregate([("row", "min")])["row_min"].to_numpy()
    mask = np.ones(len(keys), bool)
    mask[first] = False
    return mask


# Choosing: which column is which.


def _match(names: Iterable[str], name: str) -> str | None:
    """Return the table's own spelling of a column: exact, else whatever its case and a `#` before it."""
    names = list(names)
    return name if name in names else next(iter(_alike(names, name)), None)


def _alike(names: Iterable[str], name: str) -> list[str]:
    return [column for column in names if column.lstrip("# ").lower() == name.lstrip("# ").lower()]


def _named(source: Columns, name: str, purpose: str, path: Path) -> str:
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


def _what_there_is(source: Columns, name: str) -> str:
    lower = {column.lower(): column for column in source.units}
    near = [lower[match] for match in difflib.get_close_matches(name.lower(), lower, n=3)]
    there = f"the table has {', '.join(list(source.units)[:30])}{', ...' if len(source.units) > 30 else ''}"
    return f"did you mean {' or '.join(near)}? {there}" if near else there


def _choose_parts(source: Columns, columns: Mapping[str, str], path: Path) -> dict[str, tuple[str, ...]]:
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


def _guesses(source: Columns, part: str) -> list[str]:
    return [match for guess in GUESSES[part] if (match := _match(source.units, guess))]


def _is_angle(source: Columns, name: str) -> bool:
    return _factor(source.units[name], "arcsec") is not None


def _guess_position(source: Columns, named: Mapping[str, str]) -> Mapping[str, str]:
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


def _how_to_name(part: str, source: Columns, path: Path) -> str:
    left_out = [f"{name} is in {source.units[name]}" for name in _guesses(source, part)]
    why = f", but {left_out[0]}" if part in ("size", "r90") and left_out else ""
    return (
        f"{path}: no column found for {part} (tried {', '.join(GUESSES[part])}{why}); "
        f"name it with --column {part}=COLUMN; {_what_there_is(source, part)}"
    )


def _choose_carried(
    source: Columns, carry: Sequence[str], used: set[str], path: Path, *, unasked: bool = True
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


def _join_ids(parts: Sequence[Any], names: Sequence[str]) -> Any:
    """Return ids as stripped strings, "" where any part is missing."""
    texts = [_as_text(part, name) for part, name in zip(parts, names, strict=True)]
    joined = pc.binary_join_element_wise(*texts, "-") if len(texts) > 1 else texts[0]
    return pc.fill_null(joined, "")


def _as_text(column: Any, name: str) -> Any:
    """Return an id column as stripped text, null where it is empty."""
    column = plain_text(column, name)
    kind = column.type
    if pa.types.is_floating(kind):
        # An id that went through a float has lost digits.
        raise BadRequest(f"id column {name!r} is floating point, which cannot hold ids exactly; use another")
    known = pa.types.is_string(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)
    if not known and not (pa.types.is_decimal(kind) and kind.scale == 0):
        raise BadRequest(f"id column {name!r} holds {kind}, which is neither text nor integers; use another")
    text = pc.utf8_trim_whitespace(pc.utf8_rtrim(column.cast(pa.string()), characters="\0"))
    return null_where(pc.equal(text, ""), text)


def _numbers(column: Any, name: str, unit: str, target: str) -> Any:
    """Return float64 values in the unit `target`, null where missing or not finite."""
    column = plain_text(column, name)
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
    return null_where(pc.invert(pc.is_finite(values)), values)


def _parse(text: Any, name: str) -> Any:
    """Return the numbers that a text column spells."""
    text = pc.utf8_trim_whitespace(text)
    text = null_where(pc.is_in(pc.utf8_lower(text), value_set=pa.array(NO_NUMBER)), text)
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
    column = plain_text(column, name)
    if pa.types.is_string(column.type):
        return pc.utf8_trim_whitespace(column)
    return null_where(pc.invert(pc.is_finite(column)), column) if pa.types.is_floating(column.type) else column
