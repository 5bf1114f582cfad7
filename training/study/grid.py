"""Cells of a grid, each run once and kept as one file, whatever interrupts the study."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from galembed.errors import BadRequest, GalembedError


@dataclass(frozen=True)
class Cell:
    """One training of a study.

    Attributes
    ----------
    parameters : mapping
        Everything that decides its result, as JSON has it; `key` is their digest.
    """

    parameters: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Return the first 16 hexadecimal digits of the parameters' SHA-256."""
        text = json.dumps(self.parameters, sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Outcome:
    """What became of a cell.

    Attributes
    ----------
    cell : Cell
    result : mapping or None
        What it gave.
    reason : str
        Why there is no result; empty where there is one.
    seconds : float
        NaN without a result.
    """

    cell: Cell
    result: Mapping[str, Any] | None
    reason: str = ""
    seconds: float = float("nan")


def run_grid(
    cells: Sequence[Cell],
    run: Callable[[Cell, Path], Mapping[str, Any]],
    out: Path,
    *,
    tell: Callable[[str], None],
    about: Callable[[Cell], str],
) -> list[Outcome]:
    """Run the cells that have no result yet; return what became of each.

    A result is written as ``out/cells/KEY.json`` in one atomic step, so a file that is there is whole. A cell that is
    killed keeps its folder and is handed it again.

    Parameters
    ----------
    cells : sequence of Cell
    run : callable
        Given a cell and a folder of its own for checkpoints, gives a result that JSON can hold.
    out : Path
    tell : callable
        Given a line as each cell ends.
    about : callable
        Gives a cell's name for people.

    Returns
    -------
    list of Outcome
        In the order of `cells`. One that raised a `GalembedError` has a reason and is tried again by the next run.

    Raises
    ------
    BadRequest
        If another process is running a study in `out`.
    KeyboardInterrupt
        If a cell was interrupted, after a line that says so.
    """
    folder = out / "cells"
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(out):
        outcomes = {cell.key: outcome for cell in cells if (outcome := _read(cell, folder)) is not None}
        if outcomes:
            tell(f"{len(outcomes)} of {len(cells)} cells are there already")
        for key in outcomes:
            shutil.rmtree(out / "work" / key, ignore_errors=True)  # of a run killed once the result was written
        for number, cell in enumerate(cells, 1):
            if cell.key in outcomes:
                continue
            try:
                outcomes[cell.key] = outcome = _run(cell, run, folder, out / "work" / cell.key)
            except KeyboardInterrupt:
                tell(f"stopped in {about(cell)}; the same command goes on")
                raise
            waiting = [later for later in cells[number:] if later.key not in outcomes]
            took = outcome.reason or f"{outcome.seconds:.0f} s"
            left = _left(waiting, outcomes.values())
            tell(f"[{len(cells) - len(waiting)}/{len(cells)}] {about(cell)}: {took}{left}")
    return [outcomes[cell.key] for cell in cells]


def _run(cell: Cell, run: Callable[[Cell, Path], Mapping[str, Any]], folder: Path, work: Path) -> Outcome:
    work.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    try:
        result = run(cell, work)
    except GalembedError as error:
        return Outcome(cell, None, str(error))
    seconds = time.monotonic() - begun
    write_atomically(
        folder / f"{cell.key}.json",
        json.dumps({"parameters": cell.parameters, "result": result, "seconds": round(seconds, 1)}, indent=1),
    )
    shutil.rmtree(work)
    return Outcome(cell, result, seconds=seconds)


def _read(cell: Cell, folder: Path) -> Outcome | None:
    file = folder / f"{cell.key}.json"
    if not file.exists():
        return None
    found = json.loads(file.read_text(encoding="utf-8"))
    return Outcome(cell, found["result"], seconds=found["seconds"])


def _left(waiting: Sequence[Cell], outcomes: Iterator[Outcome] | Any) -> str:
    """Return the time left in words: each waiting cell takes as long as those done that are most like it."""
    done = [outcome for outcome in outcomes if outcome.result is not None]
    if not waiting or not done:
        return ""

    def expected(cell: Cell) -> float:
        alike = [sum(o.cell.parameters.get(k) == v for k, v in cell.parameters.items()) for o in done]
        nearest = [o.seconds for o, count in zip(done, alike, strict=True) if count == max(alike)]
        return sum(nearest) / len(nearest)

    minutes = sum(map(expected, waiting)) / 60
    return f"; about {minutes:.0f} min left" if minutes >= 1 else "; less than a minute left"


def write_atomically(file: Path, text: str) -> None:
    """Write a text file that is there whole or not at all."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    with (out / ".lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BadRequest(f"another study is running in {out}; wait for it, or choose another --out") from error
        yield
