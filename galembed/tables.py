"""Tables and texts that commands print and write."""

from __future__ import annotations

from pathlib import Path

from astropy.table import Table

from galembed.errors import BadRequest
from galembed.table_files import FORMATS


def printed(table: Table) -> str:
    """Return a table for a terminal: all rows and columns, positions to a microdegree, other floats to five digits."""
    shown = Table(table)  # a copy; astropy's text writers would round by these formats too
    for name in shown.colnames:
        if shown[name].dtype.kind == "f":
            shown[name].info.format = ".6f" if name in ("ra", "dec") else ".5g"
    return "\n".join(shown.pformat(max_lines=-1, max_width=-1, show_unit=True))


def write_table(table: Table, file: Path) -> None:
    """Write a table in the format that the ending of `file` names, in the place of what is there.

    Raises
    ------
    BadRequest
        If it cannot be written.
    """
    try:
        table.write(file, format=FORMATS.get(file.suffix.lower()), overwrite=True)
    except Exception as error:  # astropy's writers raise whatever their libraries do
        raise BadRequest(f"the table cannot be written to {file}: {str(error).strip().splitlines()[0]}") from error


def write_text(text: str, file: Path | None) -> None:
    """Write a report, with the folders that it needs; nothing without a file."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n", encoding="utf-8")
