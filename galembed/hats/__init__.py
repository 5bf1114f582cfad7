"""HATS directories: a sky catalogue as Parquet files, one per HEALPix cell, read without Dask.

The layout is that of the HATS note (https://www.ivoa.net/documents/Notes/HATS/): a file of `key=value` lines beside
`dataset/Norder=K/Dir=D/Npix=N.parquet`; older catalogues lack the `dataset` level, some cells are folders of files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pyarrow as pa

from galembed.errors import UnreadableInput

PARTITION_COLUMNS: Final = frozenset({"Norder", "Dir", "Npix", "_healpix_29", "_hipscat_index"})
"""Columns that say where a row is filed, not what it is; they are left out."""

_PROPERTIES: Final = ("hats.properties", "properties")
_COLLECTION: Final = "collection.properties"


@dataclass(frozen=True)
class HatsCatalogue:
    """One HATS catalogue: `files` by order, then cell; `positions` are the columns of `ra` and `dec` (deg).

    `rows` is the number of rows that the properties promise, None where they promise none.
    """

    files: tuple[str, ...]
    schema: pa.Schema
    rows: int | None
    positions: Mapping[str, str]


def open_hats(root: str | Path) -> HatsCatalogue:
    """Find the files and properties of a HATS catalogue, or of the main catalogue of a HATS collection.

    Raises
    ------
    UnreadableInput
        If the folder is no HATS catalogue, or its properties contradict its files.
    """
    import pyarrow.parquet as pq

    root = Path(root)
    if (root / _COLLECTION).is_file():
        main = read_properties(root / _COLLECTION).get("hats_primary_table_url", "")
        if not main or not (root / main).is_dir():
            raise UnreadableInput(
                f"{root / _COLLECTION} names no catalogue in hats_primary_table_url (got {main!r}); "
                "name the catalogue's own folder"
            )
        root = root / main
    properties_file = next((root / name for name in _PROPERTIES if (root / name).is_file()), None)
    if properties_file is None:
        raise UnreadableInput(f"{root} is a folder without hats.properties, so no HATS catalogue; name a table file")
    properties = read_properties(properties_file)
    files = sorted(root.glob("**/Norder=*/**/*.parquet"), key=lambda path: _cell(path.relative_to(root)))
    if not files:
        raise UnreadableInput(f"{root} holds no Norder=K/Dir=D/Npix=N.parquet files; it may be a half-finished copy")
    shared = next((path for path in (root / "dataset", root) if (path / "_common_metadata").is_file()), None)
    schema = pq.read_schema(shared / "_common_metadata" if shared else files[0])
    positions = {part: name for part in ("ra", "dec") if (name := properties.get(f"hats_col_{part}"))}
    absent = [name for name in positions.values() if name not in schema.names]
    if absent:
        raise UnreadableInput(
            f"{properties_file} names position column(s) {absent}; the files have {schema.names[:30]}"
        )
    rows = properties.get("hats_nrows", "")
    return HatsCatalogue(tuple(map(str, files)), schema, int(rows) if rows.isdigit() else None, positions)


def read_properties(path: Path) -> dict[str, str]:
    """Return the `key=value` lines of a properties file; a comment's key starts with its `#`."""
    pairs = (line.partition("=") for line in path.read_text(encoding="utf-8").splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _cell(path: Path) -> tuple[int, int, str]:
    """Return order, cell and name of a partition file, by which rows keep one order."""
    order, cell = (re.search(rf"{level}=(\d+)", path.as_posix()) for level in ("Norder", "Npix"))
    return int(order[1]) if order else -1, int(cell[1]) if cell else -1, path.name
