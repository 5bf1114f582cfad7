"""Test loss against the number of labelled galaxies, and the power law that it follows.

What makes sizes comparable: every size gets the same number of optimiser steps, with the same schedule, and the weights
(averaged over steps) of the lowest loss on one validation set that all share. With the same number of epochs instead, a
set of twice the size would be trained twice as long, and part of the law would be that of training time. Small parts,
which overfit before the steps are over, end when validation has not improved for some time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa

from galembed.pictures import save_figure
from training.recipe import Recipe
from training.study.fits import PowerLaw, band, describe, estimate, power_law
from training.study.grid import Outcome
from training.study.plots import Panel, Series, curves_figure
from training.study.scaling import ALL, Curve, Galaxies, cell_name, curves, run_scaling
from training.study.tables import Column, interval_cells, interval_columns, markdown, not_run, write_json, write_parquet

COLUMNS: Final = [
    Column("architecture", pa.string(), "timm model name, or what names the weights that training starts from"),
    Column("parameters", pa.int64(), "of encoder and head"),
    Column("question", pa.string(), f"of the tree, or '{ALL}': the sum"),
    Column("galaxies", pa.int64(), "trained on"),
    Column("seeds", pa.int64(), "trainings that the mean is over"),
    *interval_columns("loss", "mean negative log-likelihood of a test galaxy's votes, mean over seeds", "nat"),
    Column("seed_sd", pa.float64(), "standard deviation over seeds; null with one", "nat"),
    Column("test_sd", pa.float64(), "standard error from the choice of test galaxies, common to all sizes", "nat"),
    Column("epochs", pa.float64(), "validations in a training, mean over seeds"),
    Column("best_epoch", pa.float64(), "of them the one whose weights were kept, mean over seeds"),
]

Laws = dict[tuple[str, str], tuple[PowerLaw | None, PowerLaw | None]]


def study_data(
    galaxies: Galaxies,
    recipe: Recipe,
    out: Path,
    *,
    architectures: Sequence[str],
    sizes: Sequence[int],
    seeds: int,
    tell: Callable[[str], None],
) -> str:
    """Train on nested parts of the galaxies and fit power laws.

    Parameters
    ----------
    galaxies : Galaxies
    recipe : Recipe
        Its epochs count passes over the largest part; its architecture and seed are not looked at.
    out : Path
        Folder for ``cells/``, ``table.parquet``, ``table.md``, ``fits.json``, ``plot.png`` and ``questions.png``.
    architectures : sequence of str
        timm model names; with a colon, weights to start from, for `training.weights.initial.initial_weights`.
    sizes : sequence of int
    seeds : int
    tell : callable
        Given a line as each cell ends.

    Returns
    -------
    str
        The table and the laws, Markdown.

    Raises
    ------
    BadRequest
        If there are too few galaxies for the sizes, or another study is running in `out`.
    """
    outcomes = run_scaling(galaxies, recipe, architectures, sizes, seeds, out, tell)
    found = curves(outcomes, lambda what: what["architecture"], lambda outcome: outcome.cell.parameters["size"])
    laws = {
        (curve.label, curve.question): (
            power_law(curve.x, curve.values.mean(axis=0), curve.draws, floored=True),
            power_law(curve.x, curve.values.mean(axis=0), curve.draws, floored=False),
        )
        for curve in found
    }
    write_parquet(table_rows(found, outcomes), COLUMNS, out / "table.parquet")
    write_json({"laws": laws_json(found, laws)}, out / "fits.json")
    text = report(found, laws, galaxies, outcomes, seeds)
    (out / "table.md").write_text(text, encoding="utf-8")
    draw(found, laws, out)
    return text


def table_rows(found: Sequence[Curve], outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Return the rows of `COLUMNS`."""
    rows = []
    for curve in found:
        for i, (size, point) in enumerate(zip(curve.x, curve.points, strict=True)):
            cells = [
                outcome.result
                for outcome in outcomes
                if outcome.result
                and outcome.cell.parameters["architecture"] == curve.label
                and outcome.cell.parameters["size"] == size
            ]
            rows.append(
                {
                    "architecture": curve.label,
                    "parameters": cells[0]["parameters"],
                    "question": curve.question,
                    "galaxies": int(size),
                    "seeds": len(curve.values),
                    **interval_cells("loss", point),
                    "seed_sd": float(curve.values[:, i].std(ddof=1)) if len(curve.values) > 1 else None,
                    "test_sd": float(np.mean([np.std(cell["resampled"][curve.question]) for cell in cells])),
                    "epochs": float(np.mean([cell["epochs"] for cell in cells])),
                    "best_epoch": float(np.mean([cell["best_epoch"] for cell in cells])),
                }
            )
    return rows


def laws_json(found: Sequence[Curve], laws: Laws) -> list[dict[str, Any]]:
    """Return every law as JSON holds it."""
    return [
        {
            "architecture": curve.label,
            "question": curve.question,
            "sizes": curve.x.tolist(),
            "with_floor": floored.to_dict() if floored else None,
            "without_floor": pure.to_dict() if pure else None,
        }
        for curve in found
        for floored, pure in [laws[curve.label, curve.question]]
    ]


def report(found: Sequence[Curve], laws: Laws, galaxies: Galaxies, outcomes: Sequence[Outcome], seeds: int) -> str:
    """Return losses and laws as Markdown."""
    sizes = sorted({int(size) for curve in found for size in curve.x})
    losses = [
        [curve.label, *(f"{by_size[size]:.2f}" if size in by_size else "-" for size in sizes)]
        for curve in found
        if curve.question == ALL
        for by_size in [dict(zip(curve.x.astype(int), curve.points, strict=True))]
    ]
    fits = []
    for curve in found:
        floored, pure = laws[curve.label, curve.question]
        fits.append(
            [
                curve.label,
                curve.question,
                describe(floored, len(curve.x)),
                floored.floor if floored and floored.constrained else "-",
                describe(pure, len(curve.x)),
                f"{pure.per_doubling:.2%}" if pure else "-",
                " / ".join(f"{law.misfit:.2%}" for law in (floored, pure) if law),
                "-" if len(curve.x) < 2 else last_doubling(curve),
            ]
        )
    laws_head = ["b of L = L0 + a N^-b", "L0", "b of L = a N^-b", "per doubling", "misfits", "last doubling"]
    return "\n".join(
        [
            f"Test loss against labelled galaxies: negative log-likelihood of votes on {galaxies.tree.name}, summed "
            f"over questions, mean over {len(galaxies.test)} test galaxies and {seeds} seed(s); intervals hold "
            "68%, over seeds. Every size had the same steps.",
            "",
            markdown(["architecture", *map(str, sizes)], losses),
            "",
            "Power laws; these intervals are over seeds and test galaxies. Per doubling: what the law without a "
            "floor takes off the loss. Misfits: the root mean square of the points' relative residuals, of each law. "
            "Last doubling: what was measured, from half the largest size.",
            "",
            markdown(["architecture", "question", *laws_head], fits),
            "",
            not_run(outcomes, [cell_name(outcome.cell) for outcome in outcomes]),
        ]
    )


def last_doubling(curve: Curve) -> str:
    """Return the part of the loss that the last two sizes differ by, per doubling, with its interval."""
    doublings = np.log2(curve.x[-1] / curve.x[-2])
    means = curve.values.mean(axis=0)
    gain = estimate(
        1 - (means[-1] / means[-2]) ** (1 / doublings), 1 - (curve.draws[:, -1] / curve.draws[:, -2]) ** (1 / doublings)
    )
    return f"{gain:.2%}"


def draw(found: Sequence[Curve], laws: Laws, out: Path) -> None:
    """Draw the curves of all questions together, and of each."""
    names = list(dict.fromkeys(curve.question for curve in found))
    panels = [
        Panel("" if name == ALL else name, [_series(curve, laws) for curve in found if curve.question == name])
        for name in names
    ]
    if not panels:
        return
    x = "labelled galaxies"
    figure = curves_figure(panels[:1], x, "test loss [nat, summed over questions]", joined=False)
    save_figure(figure, out / "plot.png")
    if panels[1:]:
        save_figure(curves_figure(panels[1:], x, "test loss [nat]", joined=False), out / "questions.png")


def _series(curve: Curve, laws: Laws) -> Series:
    """Return points and the law drawn through them: with a floor where that is constrained, else without."""
    floored, pure = laws[curve.label, curve.question]
    law, with_floor = (floored, True) if floored and floored.constrained else (pure, False)
    drawn = None
    if law is not None:
        at = np.geomspace(curve.x[0] / 1.15, curve.x[-1] * 1.15, 60)
        drawn = (at, law(at), *band(curve.x, curve.seed_draws, at, floored=with_floor))
    return Series(curve.label, curve.x, curve.points, drawn)
