"""Label efficiency: errors on downstream tasks as labels are taken away."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa

from galembed.pictures import save_figure
from training.study.fits import RESAMPLES, Estimate, power_law
from training.study.grid import run_grid
from training.study.plots import Panel, Series, curves_figure
from training.study.tables import Column, interval_cells, interval_columns, markdown, not_run, write_json, write_parquet
from training.study.transfer import Errors, Learner, Start, Task, cell_name, errors_of, task_cell

COLUMNS: Final = [
    Column("task", pa.string(), "name of the task"),
    Column("init", pa.string(), "weights that learning starts from"),
    Column("mode", pa.string(), "linear: only a head on features; end-to-end: everything"),
    Column("divisor", pa.int64(), "one in so many of the labels is kept, of every class alike, two at least"),
    Column("labels", pa.float64(), "learnt from, mean over folds and seeds"),
    Column("galaxies", pa.int64(), "tested on, over all folds"),
    Column("seeds", pa.int64(), "each with folds and labels of its own"),
    *interval_columns("error", "1 - balanced accuracy, mean over seeds"),
    *interval_columns("plain_error", "1 - accuracy, mean over seeds"),
    Column("reason", pa.string(), "why it was not run; null where it was"),
]

DIVISORS: Final = (1, 2, 4, 8, 16, 32, 64)

Found = dict[tuple[str, str, str], dict[int, Errors]]


def study_labels(
    tasks: Sequence[Task],
    starts: Sequence[Start],
    missing: Mapping[str, str],
    out: Path,
    *,
    modes: Sequence[str],
    divisors: Sequence[int] = DIVISORS,
    folds: int,
    seeds: int,
    workers: int,
    tell: Callable[[str], None],
) -> str:
    """Learn every task from every start with fewer and fewer labels.

    Parameters
    ----------
    tasks, starts, missing, modes, folds, seeds, workers, tell
        See `training.study.downstream.study_downstream`.
    out : Path
        Folder for ``cells/``, ``table.parquet``, ``table.md``, ``fits.json`` and ``plot.png``.
    divisors : sequence of int
        One in so many labels of each training part is kept, nested.

    Returns
    -------
    str
        The table, Markdown.
    """
    cells = [
        task_cell(task, start, mode, seed, fold, folds, 1 / divisor)
        for task in tasks
        for start in starts
        for mode in modes
        for divisor in sorted(divisors)
        for seed in range(seeds)
        for fold in range(folds)
    ]
    outcomes = run_grid(cells, Learner(tasks, starts, out, workers).run, out, tell=tell, about=cell_name)
    found: Found = {}
    for number, task in enumerate(tasks):
        for start in starts:
            for mode in modes:
                by_divisor = {}
                for divisor in sorted(divisors):
                    wanted = (task.name, start.name, mode, 1 / divisor)
                    mine = [
                        outcome
                        for outcome in outcomes
                        for what in [outcome.cell.parameters]
                        if (what["task"][0], what["start"][0], what["mode"], what["share"]) == wanted
                    ]
                    errors = errors_of(task, mine, number)
                    if errors is not None:
                        by_divisor[divisor] = errors
                found[task.name, start.name, mode] = by_divisor
    write_parquet(table_rows(found, missing, seeds), COLUMNS, out / "table.parquet")
    write_json({"error = scale * labels ** -exponent": slopes(found), "not run": dict(missing)}, out / "fits.json")
    text = report(found, missing, sorted(divisors), f"{folds} folds, {seeds} seed(s)")
    text += "\n" + not_run(outcomes, [cell_name(outcome.cell) for outcome in outcomes])
    (out / "table.md").write_text(text, encoding="utf-8")
    panels = [
        Panel(
            f"{task.name}, {mode}",
            [_series(start.name, found[task.name, start.name, mode]) for start in starts],
        )
        for mode in modes
        for task in tasks
    ]
    figure = curves_figure(panels, "labels learnt from", "error, 1 - balanced accuracy", joined=True)
    save_figure(figure, out / "plot.png")
    return text


def _series(name: str, by_divisor: Mapping[int, Errors]) -> Series:
    """Return a curve with a band, from the fewest labels up; no error is drawn as half a galaxy's, axes being log."""
    errors = sorted(by_divisor.values(), key=lambda found: found.labels)
    x = np.array([found.labels for found in errors])
    points = [
        Estimate(*(max(end, 0.5 / found.galaxies) for end in (point.value, point.low, point.high)))
        for found in errors
        for point in [found.balanced_error]
    ]
    values, low, high = (np.array([getattr(point, end) for point in points]) for end in ("value", "low", "high"))
    return Series(name, x, points, (x, values, low, high))


def slopes(found: Found) -> list[dict[str, Any]]:
    """Return how fast each error falls with the number of labels, as a power law without a floor."""
    numbers = []
    for (task, init, mode), by_divisor in found.items():
        errors = sorted(by_divisor.values(), key=lambda one: one.labels)
        draws = np.stack([one.balanced_draws for one in errors], axis=1) if errors else np.empty((RESAMPLES, 0))
        labels, means = np.array([one.labels for one in errors]), np.array([one.balanced.mean() for one in errors])
        law = power_law(labels, means, draws, floored=False)
        numbers.append({"task": task, "init": init, "mode": mode, "law": law.to_dict() if law else None})
    return numbers


def table_rows(found: Found, missing: Mapping[str, str], seeds: int) -> list[dict[str, Any]]:
    """Return the rows of `COLUMNS`."""
    rows: list[dict[str, Any]] = [
        {
            "task": task,
            "init": init,
            "mode": mode,
            "divisor": divisor,
            "labels": errors.labels,
            "galaxies": errors.galaxies,
            "seeds": seeds,
            **interval_cells("error", errors.balanced_error),
            **interval_cells("plain_error", errors.plain_error),
        }
        for (task, init, mode), by_divisor in found.items()
        for divisor, errors in by_divisor.items()
    ]
    places = dict.fromkeys((task, mode) for task, _, mode in found)
    return rows + [
        {"task": task, "init": init, "mode": mode, "seeds": seeds, "reason": reason}
        for init, reason in missing.items()
        for task, mode in places
    ]


def report(found: Found, missing: Mapping[str, str], divisors: Sequence[int], how: str) -> str:
    """Return the errors as Markdown."""
    rows = [
        [task, mode, init, *(f"{errors[d].balanced_error:.2f}" if d in errors else "-" for d in divisors)]
        for (task, init, mode), errors in found.items()
    ] + [
        [task, mode, init, *("not run" for _ in divisors)]
        for init in missing
        for task, mode in dict.fromkeys((task, mode) for task, _, mode in found)
    ]
    counts = [
        f"{task}: {', '.join(f'{errors[d].labels:.0f}' for d in divisors if d in errors)}"
        for task, errors in {task: errors for (task, _, _), errors in found.items() if errors}.items()
    ]
    return "\n".join(
        [
            f"1 - balanced accuracy over {how}, learnt from one in so many labels of the training part; intervals "
            "hold 68%, over galaxies and seeds.",
            "",
            markdown(["task", "mode", "init", *(f"1/{d}" if d > 1 else "all" for d in divisors)], rows),
            "",
            f"Labels: {'; '.join(counts)}.",
            "",
            *(f"`{init}` was not run: {reason}. The same command then adds it.\n" for init, reason in missing.items()),
        ]
    )
