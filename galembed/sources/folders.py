"""What the two kinds of folder have in common: one file per source, found by its ending, matched to a catalogue."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from galembed.catalogues import duplicate_rows, read_catalogue
from galembed.errors import BadRequest
from galembed.schemas import SOURCES
from galembed.sources import SourceList


def find_files(root: Path, endings: tuple[str, ...]) -> list[Path]:
    """Return the files under `root` with one of `endings`, in the order of their names; hidden ones are left out."""
    return sorted(
        path
        for path in root.rglob("*")
        if path.name.lower().endswith(endings) and not path.name.startswith(".") and path.is_file()
    )


def file_version(*paths: Path) -> str:
    """Return size and modification time of files, as kept in `source_version`."""
    stats = [path.stat() for path in paths]
    newest = max(stat.st_mtime for stat in stats)
    stamp = datetime.datetime.fromtimestamp(newest, datetime.UTC).strftime("%Y%m%dT%H%M%S.%f")
    return f"{sum(stat.st_size for stat in stats)}-{stamp}"


def list_folder(
    root: Path,
    endings: tuple[str, ...],
    *,
    survey: str,
    catalogue: str | None,
    carry: tuple[str, ...],
    columns: Mapping[str, str],
) -> SourceList:
    """Return one source per file; its id is the relative path without the ending.

    Raises
    ------
    BadRequest
        If there is a catalogue and none of its ids is a file here.
    """
    files = find_files(root, endings)
    ids = [_strip(path.relative_to(root).as_posix(), endings) for path in files]
    table = pa.table(
        {
            "survey": pa.array([survey] * len(files), pa.string()),
            "source_id": pa.array(ids, pa.string()),
            "ra": pa.nulls(len(files), pa.float64()),
            "dec": pa.nulls(len(files), pa.float64()),
            "size": pa.nulls(len(files), pa.float64()),
            "source_uri": pa.array([str(path) for path in files], pa.string()),
            "source_version": pa.array([file_version(path) for path in files], pa.string()),
        },
        schema=SOURCES,
    )
    table, rejected = split_duplicates(table)
    if catalogue is not None:
        table = _with_catalogue(table, read_catalogue(catalogue, columns=columns, carry=carry), str(catalogue))
    return SourceList(table, rejected)


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


def _strip(name: str, endings: tuple[str, ...]) -> str:
    lower = name.lower()
    ending = max((ending for ending in endings if lower.endswith(ending)), key=len)
    return name[: -len(ending)]


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
