"""A small survey on disk: bricks, cutouts, catalogues, votes and the truth."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, as_completed
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from astropy.table import Table

from galembed.errors import BadRequest
from training.processes import process_pool
from training.simulation.bricks import simulate_brick
from training.simulation.catalogue import SimulatedObject, source_table, truth_table, vote_table
from training.simulation.cutouts import simulate_cutouts
from training.simulation.files import write_atomic
from training.simulation.layout import Brick, brick_grid

RECIPE = 1
"""Counts changes that alter what a seed produces."""
_MINIMUM_BRICK = 256
_CHUNK = 40

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class SurveyFiles:
    """What `simulate_survey` wrote.

    Attributes
    ----------
    root : Path
    sources, cutout_catalogue, votes, truth, bricks : Path
        FITS catalogue of brick sources, FITS catalogue of cutouts, votes and truth of both (Parquet), brick
        table.
    cutouts : Path
        Folder of cutouts.
    coadd : Path
        Folder of bricks.
    brick_names : tuple of str
    n_sources, n_cutouts : int
    """

    root: Path
    sources: Path
    cutout_catalogue: Path
    votes: Path
    truth: Path
    bricks: Path
    cutouts: Path
    coadd: Path
    brick_names: tuple[str, ...]
    n_sources: int
    n_cutouts: int

    def __str__(self) -> str:
        lines = [f"{self.n_sources:,} sources in {len(self.brick_names)} brick(s) of {self.coadd}"] * bool(
            self.n_sources
        )
        lines += [f"{self.n_cutouts:,} cutouts in {self.cutouts}, listed in {self.cutout_catalogue}"] * bool(
            self.n_cutouts
        )
        return "\n".join([*lines, f"votes in {self.votes}, what is true in {self.truth}"])


def simulate_survey(
    out: Path,
    *,
    bricks: int = 1,
    brick_size: int = 3600,
    sources_per_brick: int = 500,
    cutouts: int = 300,
    seed: int = 0,
    noise_seed: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> SurveyFiles:
    """Simulate a survey in the Legacy Surveys' layout, with Galaxy Zoo votes for all its sources.

    The same arguments give the same pixels and tables, on any number of processes. Files that are there
    already are kept, so an interrupted run can be repeated.

    Parameters
    ----------
    out : Path
        Folder; new, empty, or begun with the same parameters.
    bricks : int
        How many neighbouring bricks, with overlaps.
    brick_size : int
        Side in pixels of 0.262 arcsec; 3600 is the survey's own, 256 the least.
    sources_per_brick : int
        Catalogued sources in each brick's own area.
    cutouts : int
        Further objects, one file each.
    seed, noise_seed : int
        `noise_seed` decides the noise alone; by default it is `seed`.
    workers : int, optional
        Processes; default is the number of cores. With 1, nothing is spawned. With more, a script must guard
        its entry by ``if __name__ == "__main__"``, as `multiprocessing` asks.
    progress : callable, optional
        Called with ("bricks" or "cutouts", done, total).

    Raises
    ------
    BadRequest
        If a number is out of range, or the folder holds another simulation or anything else.
    """
    parameters = {
        "recipe": RECIPE,
        "bricks": bricks,
        "brick_size": brick_size,
        "sources_per_brick": sources_per_brick,
        "cutouts": cutouts,
        "seed": seed,
        "noise_seed": seed if noise_seed is None else noise_seed,
    }
    _check(parameters)
    out = Path(out)
    _claim(out, parameters)
    grid = brick_grid(bricks, brick_size) if bricks else []
    noise = int(parameters["noise_seed"])
    tasks: list[tuple[str, int, Callable[..., list[SimulatedObject]], tuple[Any, ...], dict[str, Any]]] = [
        (
            "bricks",
            1,
            simulate_brick,
            (out, grid, i),
            {"sources": sources_per_brick, "seed": seed, "noise_seed": noise},
        )
        for i in range(bricks)
    ]
    tasks += [
        (
            "cutouts",
            min(start + _CHUNK, cutouts) - start,
            simulate_cutouts,
            (out, start, min(start + _CHUNK, cutouts)),
            {"seed": seed, "noise_seed": noise},
        )
        for start in range(0, cutouts, _CHUNK)
    ]
    totals = {"bricks": bricks, "cutouts": cutouts}
    rows = _run(tasks, totals, min(workers or os.cpu_count() or 1, max(len(tasks), 1)), progress)
    files = SurveyFiles(
        out,
        out / "sources.fits",
        out / "cutouts.fits",
        out / "votes.parquet",
        out / "truth.parquet",
        out / "survey-bricks.fits",
        out / "cutouts",
        out / "coadd",
        tuple(b.name for b in grid),
        len(rows["bricks"]),
        len(rows["cutouts"]),
    )
    _write_tables(files, grid, rows)
    return files


def _check(parameters: dict[str, int]) -> None:
    for name in ("bricks", "sources_per_brick", "cutouts", "seed", "noise_seed"):
        if parameters[name] < 0:
            raise BadRequest(f"{name} must not be negative, got {parameters[name]}")
    if parameters["brick_size"] < _MINIMUM_BRICK:
        raise BadRequest(
            f"brick_size must be at least {_MINIMUM_BRICK} pixels, as bricks overlap by 165; got "
            f"{parameters['brick_size']}"
        )


def _claim(out: Path, parameters: dict[str, int]) -> None:
    """Write `simulation.json`, or make sure that the one there asks for the same."""
    record = out / "simulation.json"
    if record.exists():
        try:
            there = json.loads(record.read_text(encoding="utf-8"))["parameters"]
        except (ValueError, KeyError, TypeError) as error:
            raise BadRequest(
                f"{record} is not readable as a simulation's record ({error}); use another folder"
            ) from error
        if there != parameters:
            differ = sorted(k for k in there.keys() | parameters.keys() if there.get(k) != parameters.get(k))
            theirs, asked = ({k: p.get(k) for k in differ} for p in (there, parameters))
            raise BadRequest(
                f"{out} holds a simulation with other parameters ({', '.join(differ)} differ): "
                f"{theirs} there, {asked} asked. Use another folder, or delete this one"
            )
        return
    if out.exists() and any(out.iterdir()):
        raise BadRequest(f"{out} is not empty and holds no simulation; name a new folder")
    versions = {name: version(name) for name in ("galsim", "numpy", "astropy")}
    text = json.dumps({"parameters": parameters, "versions": versions}, indent=2) + "\n"
    write_atomic(record, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _run(
    tasks: list[tuple[str, int, Callable[..., list[SimulatedObject]], tuple[Any, ...], dict[str, Any]]],
    totals: dict[str, int],
    workers: int,
    progress: Progress | None,
) -> dict[str, list[SimulatedObject]]:
    """Run all tasks and return their rows, in the order of the tasks whatever the order of execution."""
    results: list[list[SimulatedObject]] = [[] for _ in tasks]
    done = dict.fromkeys(totals, 0)

    def finished(index: int, rows: list[SimulatedObject]) -> None:
        results[index] = rows
        stage, amount = tasks[index][:2]
        done[stage] += amount
        if progress is not None:
            progress(stage, done[stage], totals[stage])

    if workers == 1:
        for index, (_, _, function, args, kwargs) in enumerate(tasks):
            finished(index, function(*args, **kwargs))
    else:
        with process_pool(workers, again="whole bricks and cutouts are kept") as pool:
            futures: dict[Future[list[SimulatedObject]], int] = {
                pool.submit(function, *args, **kwargs): i for i, (_, _, function, args, kwargs) in enumerate(tasks)
            }
            for future in as_completed(futures):
                finished(futures[future], future.result())
    rows: dict[str, list[SimulatedObject]] = {stage: [] for stage in totals}
    for (stage, *_), found in zip(tasks, results, strict=True):
        rows[stage].extend(found)
    return rows


def _write_tables(files: SurveyFiles, grid: Iterable[Brick], rows: dict[str, list[SimulatedObject]]) -> None:
    bricks = Table(
        rows=[(b.name, b.brick_id, b.ra, b.dec, b.ra1, b.ra2, b.dec1, b.dec2) for b in grid] or None,
        names=["BRICKNAME", "BRICKID", "RA", "DEC", "RA1", "RA2", "DEC1", "DEC2"],
    )
    for path, table in (
        (files.sources, source_table(rows["bricks"])),
        (files.cutout_catalogue, source_table(rows["cutouts"])),
        (files.bricks, bricks),
    ):
        write_atomic(path, partial(table.write, format="fits"))
    everything = rows["bricks"] + rows["cutouts"]
    write_atomic(files.votes, lambda temporary: pq.write_table(vote_table(everything), temporary))
    write_atomic(files.truth, lambda temporary: pq.write_table(truth_table(everything), temporary))
