"""Catalogues to write and read in tests."""

import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from astropy.table import Table

FORMATS = ["c.fits", "c.fits.gz", "c.csv", "c.csv.gz", "c.ecsv", "c.vot", "c.votable", "c.parquet", "astropy.parquet"]
BIG = 2**60 + 1  # a float would round it


def catalogue(**columns: object) -> Table:
    table = Table({"RELEASE": [9010, 9010], "BRICKID": [1, 1], "OBJID": [5, 6], "RA": [10.0, 11.0], "DEC": [1.0, 2.0]})
    table["SHAPE_R"] = [2.0, 3.0]
    for name, values in columns.items():
        table[name] = values
    return table


def write(table: Table, path: Path) -> Path:
    """Write a table in the format of the path's name; `c.parquet` without astropy's header."""
    if path.name == "c.parquet":
        columns = {name: pa.array(column.tolist()) for name, column in table.items()}
        pq.write_table(pa.table(columns), path)
    elif path.name.endswith(".csv.gz"):
        with gzip.open(path, "wt", encoding="utf-8") as lines:
            table.write(lines, format="ascii.csv")
    elif path.name.endswith(".csv"):
        table.write(path, format="ascii.csv")
    else:
        table.write(path, format="votable" if ".vot" in path.name else None)
    return path
