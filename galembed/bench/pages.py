"""A benchmark as text, as a page, as JSON and as a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from galembed.bench.methods import Method
from galembed.bench.report import BenchReport, Row
from galembed.pictures import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FILES: Final = ("bench.md", "bench.json", "bench.png")
"""What `write_report` writes."""

_EXPLAINED: Final = """\
Images per second: median [least-most] of the rounds. Faster: than torch as it is, in float32 on the same device with
the same batch; the median of the ratios within a round. Of floor: the part reached of the images/s that nothing can
beat, given the network's operations and bytes and the machine's measured speed. Cosine and overlap: of the engine's
vectors and neighbours with those of torch in float32, from its report; p1: 99% of the images are above, min: all are.
Memory: the most that the method's process held, with this batch and smaller ones. Ready: seconds to load and embed the
first batch, compiling included."""


def report_text(report: BenchReport) -> str:
    """Return a benchmark for a terminal: what was measured, the floor, the table, and what did not run and why."""
    return "\n".join(
        [*_heading(report), "", *_table(report), *(["", "not run here:"] if report.unmeasured else []), *_idle(report)]
    )


def report_page(report: BenchReport) -> str:
    """Return a benchmark as a page in Markdown."""
    versions = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    parts = [
        f"# Speed of {report.backbone['name']}",
        "\n".join(f"- {line}" for line in (*_heading(report), f"{versions}; {report.made}")),
        _EXPLAINED,
        "\n".join(_table(report)),
        f"![images per second by method]({FILES[2]})",
    ]
    if report.unmeasured:
        parts += ["Not run here:", "\n".join(f"- {line.strip()}" for line in _idle(report))]
    return "\n\n".join(parts) + "\n"


def write_report(report: BenchReport, folder: Path) -> list[Path]:
    """Write a benchmark's page, numbers and plot (`FILES`) into a folder, made if absent; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    page, numbers, plot = (folder / name for name in FILES)
    save_figure(report_figure(report), plot)
    numbers.write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
    page.write_text(report_page(report), encoding="utf-8")
    return [page, numbers, plot]


def report_figure(report: BenchReport) -> Figure:
    """Return a plot of images/s by method: a dot for the median of each batch, a line for the rounds' range.

    An upright stroke of the same colour is the floor. The fastest method is on top.
    """
    names = _by_speed(report.measured)
    batches = sorted({row.batch for row in report.measured})
    figure = Figure(figsize=(8.5, 1.6 + max(1, len(names)) * (0.32 + 0.13 * len(batches))), layout="compressed")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    shades = colormaps["viridis"](np.linspace(0, 0.85, max(1, len(batches))))
    for number, batch in enumerate(batches):
        offset = (number - (len(batches) - 1) / 2) * 0.7 / max(1, len(batches))
        rows = [row for row in report.measured if row.batch == batch]
        _draw(axis, rows, [names.index(row.method.name) - offset for row in rows], shades[number])
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(-0.6, len(names) - 0.4)
    for edge in range(len(names) - 1):
        axis.axhline(edge + 0.5, color="0.9", linewidth=0.8)
    _label(axis, report)
    return figure


def _draw(axis: Axes, rows: Sequence[Row], heights: Sequence[float], shade: Any) -> None:
    """Draw the rows of one batch."""
    axis.hlines(heights, [min(row.rates) for row in rows], [max(row.rates) for row in rows], color=shade, linewidth=2)
    axis.plot([row.rate for row in rows], heights, "o", color=shade, markersize=5, label=f"batch {rows[0].batch}")
    bounded = [(row.floor, height) for row, height in zip(rows, heights, strict=True) if row.floor]
    if bounded:
        axis.plot(*zip(*bounded, strict=True), "|", color=shade, markersize=9, markeredgewidth=1.5)


def _label(axis: Axes, report: BenchReport) -> None:
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
    low, high = axis.get_xlim()
    axis.xaxis.set_minor_formatter(
        FuncFormatter(lambda value, _: f"{value:,.4g}" if f"{value:.0e}"[0] in "25" else "")
        if high < 300 * low
        else NullFormatter()
    )
    axis.tick_params(axis="x", which="both", labelsize=8)
    axis.grid(axis="x", which="major", color="0.9")
    axis.set_axisbelow(True)
    axis.set_xlabel(f"images per second, {report.rounds} rounds; stroke: the floor")
    where = " and ".join(name for name in (report.machine["cpu"], report.machine["gpu"]) if name)
    axis.set_title(
        f"{report.backbone['name']} ({report.backbone['architecture']}, {report.backbone['pixels']} px)\n"
        f"{where}, {report.threads} thread(s)",
        fontsize=9,
    )
    if report.measured:
        axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)


def _by_speed(rows: Sequence[Row]) -> list[str]:
    """Return the names of methods, the fastest at any batch last."""
    best: dict[str, float] = {}
    for row in rows:
        best[row.method.name] = max(row.rate, best.get(row.method.name, 0.0))
    return sorted(best, key=lambda name: best[name])


def _heading(report: BenchReport) -> list[str]:
    """Return the lines on backbone, machine and floor."""
    own, machine, cost = report.backbone, report.machine, report.cost
    return [
        f"{own['name']} ({own['architecture']}, {own['pixels']} px, embedding_id {own['embedding_id'][:12]}): "
        f"{cost.flops / 1e9:.3g} GFLOP an image, {cost.weights / 1e6:.3g} million weights",
        f"{machine['cpu']}, {report.threads} of {machine['cores']} core(s)"
        + (f"; {machine['gpu']}" if machine["gpu"] else ""),
        *(
            f"floor on {device}: matrix products at "
            + ", ".join(f"{rate / 1e9:,.3g} GFLOP/s in {name}" for name, rate in rates.matrix.items())
            + f"; copying at {rates.copy / 1e9:,.3g} GB/s; cache {rates.cache / 2**20:.3g} MiB"
            for device, rates in report.speed.items()
        ),
        f"{report.rounds} round(s) of {report.seconds:g} s, the methods in turn, a process each",
    ]


def _table(report: BenchReport) -> list[str]:
    """Return the lines of a table of what ran, in Markdown with its columns aligned."""
    columns = ["method", "batch", "images/s", "ms/batch", "faster", "of floor", "cosine", "overlap", "memory, MiB"]
    on_gpu = any(row.device_memory for row in report.measured)
    columns += [*(["GPU, MiB"] if on_gpu else []), "ready, s"]
    cells = [columns, *(_cells(row, on_gpu) for row in report.measured)]
    widths = [max(len(line[number]) for line in cells) for number in range(len(columns))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return [
        "| " + " | ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) + " |"
        for line in (cells[0], rule, *cells[1:])
    ]


def _cells(row: Row, on_gpu: bool) -> list[str]:
    cosine, overlap = _fidelity(row.method)
    return [
        row.method.name,
        f"{row.batch}{' (auto)' if row.auto else ''}",
        f"{_short(row.rate)} [{_short(min(row.rates))}-{_short(max(row.rates))}]",
        _short(row.milliseconds),
        f"{row.faster:.2f}" if row.faster else "",
        f"{row.rate / row.floor:.0%}" if row.floor else "",
        cosine,
        overlap,
        _mebibytes(row.memory),
        *([_mebibytes(row.device_memory)] if on_gpu else []),
        f"{row.ready_seconds:.1f}",
    ]


def _fidelity(method: Method) -> tuple[str, str]:
    """Return a method's cosine and overlap with torch in float32, as its engine's report has them."""
    if not method.engine:
        return ("is torch" if method.name == method.reference else "not compared"), ""
    found: Mapping[str, Any] = method.fidelity
    name = "p1" if found.get("cosine_p1") is not None else "min"
    if found.get(f"cosine_{name}") is None:
        return method.status, ""
    overlap = found.get("overlap")
    return f"{found[f'cosine_{name}']:.6f} ({name})", "" if overlap is None else f"{overlap:.4f}"


def _idle(report: BenchReport) -> list[str]:
    return [
        f"  {row.method.name}{f', batch {row.batch}' if row.batch else ''}: {row.reason}" for row in report.unmeasured
    ]


def _short(value: float) -> str:
    """Return three significant figures, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.0f}" if count else ""
