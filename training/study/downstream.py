"""Errors on downstream tasks by the weights that learning starts from, and by what part better weights lower them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa

from galembed.pictures import save_figure
from training.study.fits import Estimate, Floats, estimate, to_json
from training.study.grid import Outcome, run_grid
from training.study.plots import Panel, Series, dots_figure
from training.study.tables import Column, interval_cells, interval_columns, markdown, not_run, write_json, write_parquet
from training.study.transfer import Errors, Learner, Start, Task, cell_name, errors_of, reduction, task_cell

COLUMNS: Final = [
    Column("task", pa.string(), "name of the task"),
    Column("init", pa.string(), "weights that learning starts from"),
    Column("mode", pa.string(), "linear: only a head on features; end-to-end: everything"),
    Column("galaxies", pa.int64(), "tested on, over all folds"),
    Column("labels", pa.float64(), "learnt from, mean over folds and seeds"),
    Column("seeds", pa.int64(), "each with folds of its own"),
    Column("folds", pa.int64(), "parts of the cross-validation"),
    *interval_columns("error", "1 - balanced accuracy, mean over seeds"),
    *interval_columns("plain_error", "1 - accuracy, mean over seeds"),
    *interval_columns("reduction", "1 - error / error of the first init"),
    Column("reason", pa.string(), "why it was not run; null where it was"),
]

_NO_INTERVAL: Final = Estimate(float("nan"), float("nan"), float("nan"))


def study_downstream(
    tasks: Sequence[Task],
    starts: Sequence[Start],
    missing: Mapping[str, str],
    out: Path,
    *,
    modes: Sequence[str],
    folds: int,
    seeds: int,
    workers: int,
    tell: Callable[[str], None],
) -> str:
    """Learn every task from every start in every mode.

    Parameters
    ----------
    tasks : sequence of Task
    starts : sequence of Start
        Errors are compared with those of the first.
    missing : mapping of str to str
        Starts that cannot be had, and why: they become rows of the table.
    out : Path
        Folder for ``cells/``, ``table.parquet``, ``table.md``, ``fits.json`` and ``plot.png``.
    modes : sequence of str
        Of `training.study.transfer.MODES`.
    folds, seeds : int
        Every galaxy is tested once per seed.
    workers : int
        Processes that read images.
    tell : callable
        Given a line as each cell ends.

    Returns
    -------
    str
        The tables, Markdown.
    """
    cells = [
        task_cell(task, start, mode, seed, fold, folds)
        for task in tasks
        for start in starts
        for mode in modes
        for seed in range(seeds)
        for fold in range(folds)
    ]
    outcomes = run_grid(cells, Learner(tasks, starts, out, workers).run, out, tell=tell, about=cell_name)
    found: dict[tuple[str, str, str], Errors | None] = {}
    for number, task in enumerate(tasks):
        for start in starts:
            for mode in modes:
                found[task.name, start.name, mode] = errors_of(task, _of(outcomes, task, start, mode), number)
    names, inits = [task.name for task in tasks], [start.name for start in starts]
    means = {(init, mode): mean_reduction(found, names, init, inits[0], mode) for init in inits[1:] for mode in modes}
    write_parquet(table_rows(found, inits[0], missing, names, modes, folds, seeds), COLUMNS, out / "table.parquet")
    numbers = [
        {"init": init, "mode": mode, "against": inits[0], "tasks": len(names), "mean reduction": to_json(value)}
        for (init, mode), value in means.items()
    ]
    write_json({"relative error reduction": numbers, "not run": dict(missing)}, out / "fits.json")
    text = report(found, means, missing, names, inits, modes, f"{folds} folds, {seeds} seed(s)")
    text += "\n" + not_run(outcomes, [cell_name(outcome.cell) for outcome in outcomes])
    (out / "table.md").write_text(text, encoding="utf-8")
    nowhere = np.zeros(len(names))
    panels = [
        Panel(mode, [Series(init, nowhere, [_error(found[name, init, mode]) for name in names]) for init in inits])
        for mode in modes
    ]
    save_figure(dots_figure(panels, names, "error, 1 - balanced accuracy"), out / "plot.png")
    return text


def _of(outcomes: Sequence[Outcome], task: Task, start: Start, mode: str) -> list[Outcome]:
    wanted = (task.name, start.name, mode)
    return [
        outcome
        for outcome in outcomes
        for what in [outcome.cell.parameters]
        if (what["task"][0], what["start"][0], what["mode"]) == wanted
    ]


def _error(errors: Errors | None) -> Estimate:
    return errors.balanced_error if errors else _NO_INTERVAL


def _reduced(errors: Errors | None, first: Errors | None) -> tuple[float, Floats]:
    return reduction(errors, first) if errors and first else (float("nan"), np.full(1, np.nan))


def mean_reduction(
    found: Mapping[tuple[str, str, str], Errors | None], tasks: Sequence[str], init: str, first: str, mode: str
) -> Estimate:
    """Return the mean over tasks of the relative error reduction of an init against the first.

    Tasks weigh the same, as in the paper's 31% (Walmsley et al. 2024, arXiv:2404.02973: over five tasks, against
    ImageNet-12k weights). The interval is over galaxies and seeds, with the tasks as they are; NaN where one is
    missing.
    """
    pairs = [_reduced(found[task, init, mode], found[task, first, mode]) for task in tasks]
    if not np.isfinite([value for value, _ in pairs]).all():
        return _NO_INTERVAL
    return estimate(float(np.mean([value for value, _ in pairs])), np.mean([draws for _, draws in pairs], axis=0))


def table_rows(
    found: Mapping[tuple[str, str, str], Errors | None],
    first: str,
    missing: Mapping[str, str],
    tasks: Sequence[str],
    modes: Sequence[str],
    folds: int,
    seeds: int,
) -> list[dict[str, Any]]:
    """Return the rows of `COLUMNS`."""
    rows: list[dict[str, Any]] = []
    for (task, init, mode), errors in found.items():
        row = {"task": task, "init": init, "mode": mode, "folds": folds, "seeds": seeds}
        if errors is None:
            rows.append(row | {"reason": "a cell failed; see table.md"})
            continue
        reduced = estimate(*_reduced(errors, found[task, first, mode]))
        rows.append(
            row
            | {"galaxies": errors.galaxies, "labels": errors.labels}
            | interval_cells("error", errors.balanced_error)
            | interval_cells("plain_error", errors.plain_error)
            | (interval_cells("reduction", reduced) if init != first else {})
        )
    return rows + [
        {"task": task, "init": init, "mode": mode, "folds": folds, "seeds": seeds, "reason": reason}
        for init, reason in missing.items()
        for task in tasks
        for mode in modes
    ]


def report(
    found: Mapping[tuple[str, str, str], Errors | None],
    means: Mapping[tuple[str, str], Estimate],
    missing: Mapping[str, str],
    tasks: Sequence[str],
    inits: Sequence[str],
    modes: Sequence[str],
    how: str,
) -> str:
    """Return errors, and their reductions, as Markdown."""
    head = ["task", "mode", *inits, *missing]
    errors = [
        [
            task,
            mode,
            *(f"{_error(found[task, init, mode]):.3f}" if found[task, init, mode] else "failed" for init in inits),
            *("not run" for _ in missing),
        ]
        for task in tasks
        for mode in modes
    ]
    reductions = [[init, mode, f"{value:.1%}"] for (init, mode), value in means.items()]
    return "\n".join(
        [
            f"1 - balanced accuracy over {how}; intervals hold 68%, over galaxies and seeds.",
            "",
            markdown(head, errors),
            "",
            *(
                [
                    f"Relative error reduction against `{inits[0]}`, mean over {len(tasks)} task(s):",
                    "",
                    markdown(["init", "mode", "1 - error / error of the first"], reductions),
                    "",
                ]
                if reductions
                else []
            ),
            *(f"`{init}` was not run: {reason}. The same command then adds it.\n" for init, reason in missing.items()),
        ]
    )
