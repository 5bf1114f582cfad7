"""Figures of studies: curves with bands, and dots with error bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from training.study.fits import Estimate, Floats

COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe & Ito's palette, which the colour-blind can tell apart; yellow is left out, being faint on white."""
_MARKERS: Final = "osD^vP*"
_COLUMNS: Final = 4


@dataclass(frozen=True)
class Series:
    """One line of a panel.

    Attributes
    ----------
    label : str
    x : ndarray, shape (point,)
    y : sequence of Estimate
        One for each point.
    curve : tuple of 4 ndarrays, optional
        A fitted law: where, its values, and the ends of its band.
    """

    label: str
    x: Floats
    y: Sequence[Estimate]
    curve: tuple[Floats, Floats, Floats, Floats] | None = None


@dataclass(frozen=True)
class Panel:
    """The lines of one question or task."""

    title: str
    series: Sequence[Series]


def curves_figure(panels: Sequence[Panel], x: str, y: str, *, joined: bool) -> Figure:
    """Draw curves in log-log panels, four to a row.

    Parameters
    ----------
    panels : sequence of Panel
    x, y : str
        Labels of the axes, with unit.
    joined : bool
        Join the points; else only the fitted laws are lines.

    Returns
    -------
    matplotlib.figure.Figure
    """
    columns = min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    single = len(panels) == 1
    figure = Figure(figsize=(6.4, 4.6) if single else (3.1 * columns + 0.6, 2.7 * rows + 0.9), layout="constrained")
    for number, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, number + 1)
        for i, series in enumerate(panel.series):
            _line(axes, series, i, joined)
        _log_axes(axes, panel, ticks=6 if single else 4)
        if panel.title:
            axes.set_title(panel.title, fontsize=10)
    figure.supxlabel(x, fontsize=10)
    figure.supylabel(y, fontsize=10)
    _legend(figure, figure.axes[0], inside=single)
    return figure


def _line(axes: Axes, series: Series, number: int, joined: bool) -> None:
    colour, marker = COLOURS[number % len(COLOURS)], _MARKERS[number % len(_MARKERS)]
    values = np.array([point.value for point in series.y])
    # Points of several lines at one x would hide one another's bars.
    shown = series.x if joined else series.x * 1.03 ** (number - 0.5)
    line = "-" if joined else ""
    style: dict[str, Any] = {"fmt": marker, "ls": line, "lw": 1, "ms": 4.5, "color": colour, "label": series.label}
    axes.errorbar(shown, values, _bars(series.y), **style)
    if series.curve is not None:
        at, law, low, high = series.curve
        axes.plot(at, law, color=colour, lw=1)
        axes.fill_between(at, low, high, color=colour, alpha=0.18, lw=0)


def _bars(points: Sequence[Estimate]) -> Floats:
    """Return lengths of error bars (2, point), none where there is no interval."""
    ends = [(point.value - point.low, point.high - point.value) for point in points]
    return np.asarray(np.clip(np.nan_to_num(np.array(ends, np.float64).reshape(-1, 2).T), 0, None))


def _log_axes(axes: Axes, panel: Panel, ticks: int) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    places = np.unique(np.concatenate([series.x for series in panel.series]))
    axes.xaxis.set_major_locator(FixedLocator(list(places[:: max(1, math.ceil(len(places) / ticks))])))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, lw=0.5)


def short(number: float) -> str:
    """Return a count as people write it: 250, 1.5k, 28M."""
    for unit, letter in ((1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{letter}"
    return f"{number:.0f}" if number >= 10 else f"{number:.3g}"


def dots_figure(panels: Sequence[Panel], rows: Sequence[str], x: str) -> Figure:
    """Draw a dot with an error bar for each row and series, such as the error of each task by each start.

    Parameters
    ----------
    panels : sequence of Panel
        Each series has as many points as there are `rows`, in their order; NaN = none. `Series.x` is not used.
    rows : sequence of str
        Names, from the top.
    x : str
        Label of the axis, with unit.

    Returns
    -------
    matplotlib.figure.Figure
    """
    count = max(len(panel.series) for panel in panels)
    height = len(rows) * (0.25 + 0.16 * count) + 1.4
    figure = Figure(figsize=(4.2 * len(panels) + 1.4, height), layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharey=True, sharex=True, squeeze=False)[0]
    for axes, panel in zip(all_axes, panels, strict=True):
        for i, series in enumerate(panel.series):
            y = np.arange(len(rows)) + (i - (len(panel.series) - 1) / 2) * 0.7 / max(count, 2)
            values = np.array([point.value for point in series.y])
            style: dict[str, Any] = {
                "fmt": _MARKERS[i % len(_MARKERS)],
                "ms": 5,
                "lw": 1.2,
                "color": COLOURS[i % len(COLOURS)],
            }
            axes.errorbar(values, y, xerr=_bars(series.y), label=series.label, **style)
        axes.set_yticks(range(len(rows)), rows)
        axes.set_title(panel.title, fontsize=10)
        axes.grid(axis="x", alpha=0.25, lw=0.5)
        axes.tick_params(labelsize=8)
    all_axes[0].set_ylim(len(rows) - 0.5, -0.5)
    all_axes[0].set_xlim(left=0)  # once all are drawn: it ends the fitting of the right end
    figure.supxlabel(x, fontsize=10)
    _legend(figure, all_axes[0], inside=False)
    return figure


def _legend(figure: Figure, axes: Axes, *, inside: bool) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if inside:
        axes.legend(handles, labels, fontsize=8, frameon=False)
    elif len(labels) > 1:
        figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(labels)), fontsize=8, frameon=False)
