"""What readers have in common when they list: ids, catalogue columns, and rows that cannot be sources."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from galembed.catalogues import duplicate_rows, read_catalogue
from galembed.errors import BadRequest
from galembed.files import file_version, relative
from galembed.schemas import SOURCES
from galembed.sources import SourceList

GZ_DECALS_FOV: Final = "gz_decals"
"""Name of the radius rule of Galaxy Zoo DECaLS: 424 px of max(min(0.04 R50, 0.02 R90), 0.1) arcsec, with the Petrosian
radii in arcsec (Walmsley et al. 2022, MNRAS 509, 3966, section 2.2; zooniverse/decals)."""

_LARGEST_FOV_ARCSEC: Final = 3600.0


def list_places(
    places: Mapping[str, Sequence[str]],
    root: str,
    endings: tuple[str, ...],
    *,
    survey: str,
    catalogue: str | None,
    carry: tuple[str, ...],
    columns: Mapping[str, str],
    fov: str = "",
) -> SourceList:
    """Return one source for each place; its id is the relative path without the ending.

    Parameters
    ----------
    places : mapping of str to sequence of str
        The files of each source, by uri.
    root : str
    endings : tuple of str
        That ids lose.
    fov : str
        The user's field of view; see `fields_of_view`.

    Raises
    ------
    BadRequest
        If there is a catalogue and none of its ids is here, or `fov` needs columns that are not there.
    """
    count = len(places)
    table = pa.table(
        {
            "survey": pa.repeat(survey, count),
            "source_id": pa.array([_strip(relative(uri, root), endings) for uri in places], pa.string()),
            **{name: pa.nulls(count, pa.float64()) for name in ("ra", "dec", "size", "fov")},
            "source_uri": pa.array(list(places), pa.string()),
            "source_version": pa.array([file_version(*files) for files in places.values()], pa.string()),
            "neighbours": pa.nulls(count, pa.list_(pa.string())),
        },
        schema=SOURCES,
    )
    table, rejected = split_duplicates(table)
    if catalogue is not None:
        rows = read_catalogue(catalogue, columns=columns, carry=carry)
        rejected = pa.concat_tables([rejected, _rows_twice(rows, table, str(catalogue))])
        table = _with_catalogue(table, rows, str(catalogue))
    if fov:
        table = table.set_column(table.column_names.index("fov"), SOURCES.field("fov"), fields_of_view(fov, table))
    if "r90" in table.column_names:
        table = table.drop_columns("r90")
    table, unusable = split_unusable(table, fixed=bool(fov), placed=False)
    return SourceList(table, pa.concat_tables([rejected, unusable]))


def fields_of_view(rule: str, table: pa.Table) -> pa.Array:
    """Return the side of each source's cutout in arcsec, null where the backbone's own rule holds.

    Parameters
    ----------
    rule : str
        Arcsec as text, `GZ_DECALS_FOV`, or empty for none.
    table : pa.Table
        With `size` (R50) and `r90` for the radius rule.

    Raises
    ------
    BadRequest
        If the rule is neither, or lacks its columns.
    """
    if not rule:
        return pa.nulls(len(table), pa.float64())
    if re.fullmatch(r"\d+(\.\d*)?", rule):
        if not 0 < float(rule) <= _LARGEST_FOV_ARCSEC:
            raise BadRequest(f"--fov {rule}: the side of a cutout lies between 0 and {_LARGEST_FOV_ARCSEC:.0f} arcsec")
        return pa.repeat(float(rule), len(table))
    if rule != GZ_DECALS_FOV:
        raise BadRequest(f"--fov takes arcsec or {GZ_DECALS_FOV}, got {rule!r}")
    lacking = [name for name in ("size", "r90") if name not in table.column_names]
    if lacking:
        raise BadRequest(
            f"--fov {rule} needs the 50% and 90% light radii of a --catalogue; name the columns with "
            + " ".join(f"--column {name}=COLUMN" for name in lacking)
        )
    r50, r90 = (table[name].to_numpy(zero_copy_only=False).astype(float) for name in ("size", "r90"))
    side = 424 * np.maximum(np.minimum(0.04 * r50, 0.02 * r90), 0.1)
    return pa.array(side, pa.float64(), mask=~((r50 >= 0) & (r90 >= 0) & np.isfinite(side)))


def split_duplicates(table: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Return the rows with unique keys, and those whose key an earlier row has, each under a key of its own."""
    mask = duplicate_rows(table["source_id"])
    numbers = np.flatnonzero(mask)
    twice = table.filter(mask).select(SOURCES.names)
    ids = twice["source_id"].to_pylist()
    renamed = [f"{name}#row{number + 1}" for name, number in zip(ids, numbers, strict=True)]
    messages = [
        f"id {name} occurs more than once; row {number + 1} is not embedded, the first one is"
        for name, number in zip(ids, numbers, strict=True)
    ]
    twice = twice.set_column(1, SOURCES.field("source_id"), pa.array(renamed, pa.string()))
    return table.filter(~mask), reject(twice, "duplicate_key", messages)


def reject(rows: pa.Table, reason: str, messages: list[str]) -> pa.Table:
    """Return rows with the columns that make them failures of the listing."""
    rows = rows.select(SOURCES.names)
    for name, values in (
        ("stage", ["list"] * len(rows)),
        ("reason", [reason] * len(rows)),
        ("message", messages),
    ):
        rows = rows.append_column(pa.field(name, pa.string()), pa.array(values, pa.string()))
    return rows


def split_unusable(table: pa.Table, *, fixed: bool = False, placed: bool = True) -> tuple[pa.Table, pa.Table]:
    """Part the rows without an id, a possible position or a possible size from the rest.

    Parameters
    ----------
    table : pa.Table
    fixed : bool
        The user fixes the field of view, so that `fov` counts and not `size`.
    placed : bool
        A source without position or size is none. False for files: theirs may be in the header, or nowhere.
    """
    ra, dec, size, fov = (
        table[name].to_numpy(zero_copy_only=False).astype(float) for name in ("ra", "dec", "size", "fov")
    )
    # A size of 0 is a point source; a catalogue without any size leaves the field to the backbone.
    unsized = np.isnan(size) & (placed and np.isfinite(size).any())
    impossible = ~np.isfinite(fov) if fixed else (size < 0) | unsized
    nameless = pc.equal(pc.fill_null(table["source_id"], ""), "").to_numpy(zero_copy_only=False)
    unplaced = ~np.isfinite(ra) | ~np.isfinite(dec)
    nowhere = ~nameless & ((unplaced & placed) | (np.abs(np.nan_to_num(dec)) > 90) | (np.abs(np.nan_to_num(ra)) > 360))
    sizeless = ~nameless & ~nowhere & impossible
    parts = []
    for mask, reason, text in (
        (nameless, "bad_id", "a catalogue row has no id (ra {ra}, dec {dec})"),
        (nowhere, "bad_position", "source {source_id} has no finite position (ra {ra}, dec {dec})"),
        (sizeless, "bad_size", "source {source_id} has half-light radius {size} arcsec, which is no size"),
    ):
        rows = table.filter(mask).select(SOURCES.names)
        parts.append(reject(rows, reason, [text.format(**row) for row in rows.to_pylist()]))
    return table.filter(~(nameless | nowhere | sizeless)), pa.concat_tables(parts)


def _strip(name: str, endings: tuple[str, ...]) -> str:
    lower = name.lower()
    ending = max((ending for ending in endings if lower.endswith(ending)), key=len, default="")
    return name.removesuffix(name[len(name) - len(ending) :]) if ending else name


def _rows_twice(catalogue: pa.Table, table: pa.Table, path: str) -> pa.Table:
    """Return the catalogue rows of a source that an earlier row describes, each under a key of its own."""
    ids = catalogue["source_id"]
    here = pc.is_in(ids, value_set=table["source_id"].combine_chunks()).to_numpy(zero_copy_only=False)
    numbers = np.flatnonzero(duplicate_rows(ids) & here)
    names = ids.take(pa.array(numbers)).to_pylist()
    nothing = dict.fromkeys(SOURCES.names) | {"survey": table["survey"][0].as_py()}
    rows = [nothing | {"source_id": f"{name}#row{n + 1}"} for name, n in zip(names, numbers, strict=True)]
    messages = [
        f"{path}: id {name} occurs more than once; row {n + 1} is not used, the first one is"
        for name, n in zip(names, numbers, strict=True)
    ]
    return reject(pa.Table.from_pylist(rows, SOURCES), "duplicate_key", messages)


def _with_catalogue(table: pa.Table, catalogue: pa.Table, path: str) -> pa.Table:
    """Fill position, size and carried columns from the catalogue rows of the same id; nulls where it has none."""
    at = pc.index_in(table["source_id"], value_set=catalogue["source_id"].combine_chunks())
    if at.null_count == len(at):
        raise BadRequest(
            f"{path}: none of its ids ({catalogue['source_id'][0]}, ...) is a file in the folder "
            f"({table['source_id'][0]}, ...); choose the id column with --column id=COLUMN"
        )
    matched = catalogue.take(at.combine_chunks() if isinstance(at, pa.ChunkedArray) else at)
    for name in ("ra", "dec", "size"):
        if name in matched.column_names:
            table = table.set_column(table.column_names.index(name), SOURCES.field(name), matched[name])
    for field in matched.schema:
        if field.name not in ("source_id", "ra", "dec", "size"):
            table = table.append_column(field, matched[field.name])
    return table
