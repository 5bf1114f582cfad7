"""Pictures of what a probe is worth; `galembed.pictures.confusion_figure` draws the confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from astropy.table import Table
from matplotlib.figure import Figure

from galembed.pictures import confusion_figure, mosaic, new_figure, pictures_of, save_figure, shortened
from galembed.probes.reports import Mistake, NumberReport, ProbeReport, Report
from galembed.probes.scores import Bin, Calibration
from galembed.store import Store

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DRAWN: Final = 5_000
_ACROSS: Final = 4


def main_figure(report: Report) -> Figure:
    """Return a report's first picture: the confusion matrix, or predicted against given numbers."""
    return confusion_figure(report) if isinstance(report, ProbeReport) else scatter_figure(report)


def save_details(report: Report, folder: str | Path, store: Store | None = None) -> list[Path]:
    """Write a report and all its pictures into a folder, made if absent.

    Parameters
    ----------
    store : Store, optional
        To draw the mistakes from, where their sources can be read.

    Returns
    -------
    list of Path
        ``report.md``; ``confusion.png`` and ``reliability.png``, or ``scatter.png``; ``curve.png``; ``mistakes.png``;
        those that there is something to draw for.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"confusion.png" if isinstance(report, ProbeReport) else "scatter.png": main_figure(report)}
    if isinstance(report, ProbeReport) and report.calibration is not None:
        figures["reliability.png"] = reliability_figure(report.calibration)
    if report.curve:
        figures["curve.png"] = curve_figure(report)
    if report.mistakes and store is not None:
        figures["mistakes.png"] = mistakes_figure(store, report.mistakes)
    (folder / "report.md").write_text(f"{report}\n", encoding="utf-8")
    for name, figure in figures.items():
        save_figure(figure, folder / name)
    return [folder / "report.md", *(folder / name for name in figures)]


def reliability_figure(found: Calibration) -> Figure:
    """Return how often the most probable class is the label, against its probability; discs by the share of sources."""
    figure, axis = _panel()
    axis.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--")
    if found.bins_before:
        _bins(axis, found.bins_before, "tab:orange", f"as fitted: ECE {found.ece_before:.3f}")
        _bins(axis, found.bins, "tab:blue", f"temperature {found.temperature:.2f}: ECE {found.ece:.3f}")
    else:
        _bins(axis, found.bins, "tab:blue", f"ECE {found.ece:.3f}")
    axis.set(
        xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel="probability of the predicted class", ylabel="how often right"
    )
    axis.legend(loc="upper left", fontsize=7, frameon=False)
    return figure


def _bins(axis: Axes, bins: Sequence[Bin], colour: str, label: str) -> None:
    places = [one.confidence for one in bins], [one.accuracy for one in bins]
    axis.plot(*places, color=colour, linewidth=1)
    axis.scatter(*places, s=[10 + 250 * one.share for one in bins], color=colour, alpha=0.7, label=label, linewidths=0)


def scatter_figure(report: NumberReport) -> Figure:
    """Return predicted against given numbers, a panel for each; at most 5,000 sources are drawn."""
    count = len(report.scores)
    across = min(count, _ACROSS)
    figure = new_figure(3.2 * across, 3.3 * -(-count // across))
    axes = figure.subplots(-(-count // across), across, squeeze=False).ravel()
    step = -(-len(report.truth) // _DRAWN)
    for at, (axis, score) in enumerate(zip(axes, report.scores, strict=False)):
        truth, predicted = report.truth[::step, at], report.predicted[::step, at]
        ends = (min(truth.min(), predicted.min()), max(truth.max(), predicted.max()))
        axis.plot(ends, ends, color="0.6", linewidth=1, linestyle="--")
        axis.scatter(truth, predicted, s=6, alpha=0.4, color="tab:blue", linewidths=0)
        unit = f" ({report.unit})" if report.unit else ""
        axis.set(xlabel=f"label{unit}", ylabel=f"predicted{unit}")
        axis.set_title(f"{score.name[:40]}\nRMSE {score.rmse:.3g}, R² {score.r2:.3f}", fontsize=8)
    for axis in axes[count:]:
        axis.remove()
    return figure


def curve_figure(report: Report) -> Figure:
    """Return the learning curve: the score of probes fitted to fewer labels, with the deviation over fits."""
    figure, axis = _panel()
    sizes = [point.labels for point in report.curve]
    spread = np.nan_to_num([point.spread for point in report.curve])
    axis.errorbar(sizes, [point.score for point in report.curve], spread, marker="o", markersize=4, capsize=3)
    if isinstance(report, ProbeReport):
        axis.axhline(report.chance, color="0.6", linewidth=1, linestyle="--")
    axis.set(xscale="log", xlabel="labels to learn from", ylabel=report.score_name)
    axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axis.minorticks_off()
    axis.set_title(report.column[:60], fontsize=9)
    return figure


def mistakes_figure(store: Store, mistakes: Sequence[Mistake]) -> Figure:
    """Return pictures of mistakes; a frame says why where a source cannot be read any more."""
    keys = [(one.survey, one.source_id) for one in mistakes]
    titles = [f"{shortened(one.label)}\ncalled {shortened(one.predicted)}\n{one.size:.3f}" for one in mistakes]
    return mosaic(pictures_of(store, keys), titles)


def suggestions_figure(store: Store, table: Table) -> Figure:
    """Return pictures of the sources that `galembed.probes.suggest` gave."""
    keys = [(str(row["survey"]), str(row["source_id"])) for row in table]
    guesses = table["predicted"] if "predicted" in table.colnames else [""] * len(table)
    titles = [f"{guess}\n{value:.3f}" for guess, value in zip(guesses, table["uncertainty"], strict=True)]
    return mosaic(pictures_of(store, keys), titles)


def _panel() -> tuple[Figure, Axes]:
    figure = new_figure(4.2, 3.6)
    return figure, figure.subplots()
