"""Plots of evaluations: matplotlib without pyplot, so nothing global and no display needed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE: Final = "#0072B2"
ORANGE: Final = "#D55E00"
GREY: Final = "0.55"
"""Blue and vermilion of Okabe & Ito's palette (jfly.uni-koeln.de/color), told apart with any colour vision."""

_PANEL: Final = 2.1
_COLUMNS: Final = 5
_FEWEST = 5
"""Entries that a bin of the reliability plot needs to be drawn."""


def volunteers_figure(questions: pa.Table) -> Figure | None:
    """Draw the expected error of k volunteers for each question, and where the backbone's lies among them.

    Parameters
    ----------
    questions : pa.Table
        `training.scores.votes.QUESTIONS`.

    Returns
    -------
    Figure or None
        None where no question was compared.
    """
    rows = [row for row in questions.to_pylist() if row["compared"] and row["volunteers"] > 0]
    if not rows:
        return None
    figure, axes = _panels(len(rows), sharey=True)
    counts = np.geomspace(1, 100, 50)
    highest = np.nanmax([[row[name] for name in ("error_one", "error_high", "error_constant")] for row in rows])
    for axis, row in zip(axes, rows, strict=True):
        axis.plot(counts, row["error_one"] / np.sqrt(counts), color="0.3", lw=1.5, label="volunteers")
        if not math.isnan(row["error_low"]):
            axis.axhspan(row["error_low"], row["error_high"], color=BLUE, alpha=0.25, lw=0)
        axis.axhline(row["error"], color=BLUE, lw=1.5, label="the backbone, with its 95% interval")
        axis.axhline(row["error_constant"], color=GREY, lw=1.2, ls=":", label="a constant answer")
        number = row["volunteers"]
        if counts[0] <= number <= counts[-1]:
            axis.plot(number, row["error"], "o", color=ORANGE, ms=6, zorder=3, label="as good as so many volunteers")
        text = "over 100" if number > counts[-1] else f"{number:.1f}" if number < 10 else f"{number:.0f}"
        axis.text(0.97, 0.97, text, transform=axis.transAxes, ha="right", va="top", color=ORANGE, fontsize=11)
        axis.set(xscale="log", xlim=(1, 100), ylim=(0, 1.3 * highest))
        axis.set_xticks([1, 10, 100], ["1", "10", "100"])
        _title(axis, row["question"], f"{row['compared']} galaxies")
    _legend(figure, axes)
    figure.supxlabel("number of volunteers", fontsize=9)
    figure.supylabel("RMS error of vote fractions", fontsize=9)
    return figure


def reliability_figure(reliability: pa.Table) -> Figure | None:
    """Draw counted against predicted vote fractions for each question, with the number of each below.

    Parameters
    ----------
    reliability : pa.Table
        `training.scores.votes.RELIABILITY`. Bins of fewer than 5 are not drawn.

    Returns
    -------
    Figure or None
        None where no question was compared.
    """
    groups = _by_question(reliability)
    if not groups:
        return None
    figure, axes = _panels(len(groups))
    for axis, (question, rows) in zip(axes, groups.items(), strict=True):
        count = np.array([row["count"] for row in rows])
        middle, width = np.array([row["low"] for row in rows]), rows[0]["high"] - rows[0]["low"]
        axis.bar(middle, 0.22 * count / count.max(), width, align="edge", color="0.85", lw=0, label="how many")
        axis.plot([0, 1], [0, 1], color=GREY, lw=1, label="right")
        shown = [row for row in rows if row["count"] >= _FEWEST]
        predicted, counted, error = (np.array([row[key] for row in shown]) for key in ("predicted", "counted", "error"))
        axis.errorbar(
            predicted, counted, 1.96 * error, fmt="o", ms=3.5, color=BLUE, lw=1.2, label="mean, with its 95% interval"
        )
        axis.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
        _title(axis, question, f"{count.sum()} fractions")
    _legend(figure, axes)
    figure.supxlabel("predicted vote fraction", fontsize=9)
    figure.supylabel("counted vote fraction", fontsize=9)
    return figure


def pit_figure(pit: pa.Table) -> Figure | None:
    """Draw for each question where the counted votes lie in their predicted distributions; flat is right.

    Parameters
    ----------
    pit : pa.Table
        `training.scores.votes.PIT`.

    Returns
    -------
    Figure or None
        None where no question was compared.
    """
    groups = _by_question(pit)
    if not groups:
        return None
    figure, axes = _panels(len(groups), sharey=True)
    highest = 1.3 * max(len(rows) * row["share"] for rows in groups.values() for row in rows)
    for axis, (question, rows) in zip(axes, groups.items(), strict=True):
        edges = [*(row["low"] for row in rows), rows[-1]["high"]]
        density = np.array([row["share"] * len(rows) for row in rows])
        error = np.nan_to_num([1.96 * row["error"] * len(rows) for row in rows])
        axis.axhline(1, color=GREY, lw=1, label="right")
        axis.stairs(density, edges, baseline=None, color=BLUE, lw=1.5, label="the backbone, with its 95% interval")
        axis.stairs(density + error, edges, baseline=density - error, color=BLUE, alpha=0.25, lw=0, fill=True)
        axis.set(xlim=(0, 1), ylim=(0, max(2.0, highest)), xticks=[0, 0.5, 1])
        _title(axis, question, f"{rows[0]['compared']} galaxies")
    _legend(figure, axes)
    figure.supxlabel("place of the counted votes in their predicted distribution", fontsize=9)
    figure.supylabel("density", fontsize=9)
    return figure


def save_png(figure: Figure, file: Path) -> None:
    """Write a figure as PNG."""
    figure.savefig(file, dpi=120, format="png", pil_kwargs={"optimize": True})


def _by_question(table: pa.Table) -> Mapping[str, Sequence[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        groups.setdefault(row["question"], []).append(row)
    return groups


def _panels(count: int, *, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    """Return a figure of `count` panels; the last row holds what is left, without empty ones."""
    columns = min(_COLUMNS, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(_PANEL * columns + 0.4, (_PANEL + 0.25) * rows + 0.7), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=sharey)
    axes = list(grid.flat)
    for axis in axes[count:]:
        axis.remove()
    for axis in axes[:count]:
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[:count]


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """Explain above all panels what any of them shows."""
    known = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(known.values(), known.keys(), loc="outside upper center", ncols=4, fontsize=8, frameon=False)


def _title(axis: Axes, question: str, below: str) -> None:
    axis.set_title(f"{question}\n{below}" if below else question, fontsize=8)
