"""What a study writes: a table as Parquet and Markdown, and the fitted numbers as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from training.study.fits import Estimate
from training.study.grid import Outcome, write_atomically


@dataclass(frozen=True)
class Column:
    """A column of a study's table: its name, Arrow type, meaning and unit."""

    name: str
    type: pa.DataType
    doc: str
    unit: str = ""


def interval_columns(name: str, doc: str, unit: str = "") -> list[Column]:
    """Return the columns of an estimate: the value and the ends of its 68% interval."""
    return [
        Column(name, pa.float64(), doc, unit),
        Column(f"{name}_low", pa.float64(), f"lower end of the 68% interval of {name}", unit),
        Column(f"{name}_high", pa.float64(), f"upper end of the 68% interval of {name}", unit),
    ]


def interval_cells(name: str, found: Estimate) -> dict[str, float | None]:
    """Return an estimate's cells for `interval_columns`, NaN as null."""
    numbers = {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
    return {key: float(number) if np.isfinite(number) else None for key, number in numbers.items()}


def write_parquet(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column], file: Path) -> None:
    """Write rows; a cell that a row lacks is null. Units and meanings go into the fields' metadata."""
    fields = [pa.field(c.name, c.type, metadata={"doc": c.doc, "unit": c.unit}) for c in columns]
    values = {c.name: [row.get(c.name) for row in rows] for c in columns}
    pq.write_table(pa.table(values, schema=pa.schema(fields)), file)


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |" for line in lines)


def not_run(outcomes: Sequence[Outcome], names: Sequence[str]) -> str:
    """Return the cells without a result as a Markdown list with their reasons, one line for equal reasons."""
    reasons: dict[str, list[str]] = {}
    for outcome, name in zip(outcomes, names, strict=True):
        if outcome.result is None:
            reasons.setdefault(outcome.reason, []).append(name)
    lines = [
        f"- {cells[0]}{f' and {len(cells) - 1} more' if len(cells) > 1 else ''}: {reason}"
        for reason, cells in reasons.items()
    ]
    return "Not run; the same command tries again:\n\n" + "\n".join(lines) + "\n" if lines else ""


def write_json(content: Mapping[str, Any], file: Path) -> None:
    """Write the fitted numbers."""
    write_atomically(file, json.dumps(content, indent=1, allow_nan=False) + "\n")
