"""Test loss against the number of parameters, with all of the data and with a quarter of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from galembed.errors import BadRequest
from galembed.pictures import save_figure
from training.recipe import Recipe
from training.study.fits import power_law
from training.study.plots import Panel, Series, curves_figure
from training.study.scaling import ALL, Curve, Galaxies, cell_name, curves, run_scaling
from training.study.tables import Column, interval_cells, interval_columns, markdown, not_run, write_json, write_parquet

COLUMNS: Final = [
    Column("galaxies", pa.int64(), "trained on"),
    Column("architecture", pa.string(), "timm model name, or what names the weights that training starts from"),
    Column("parameters", pa.int64(), "of encoder and head"),
    Column("question", pa.string(), f"of the tree, or '{ALL}': the sum"),
    Column("seeds", pa.int64(), "trainings that the mean is over"),
    *interval_columns("loss", "mean negative log-likelihood of a test galaxy's votes, mean over seeds", "nat"),
]

_SHARE: Final = 4


def study_size(
    galaxies: Galaxies,
    recipe: Recipe,
    out: Path,
    *,
    architectures: Sequence[str],
    seeds: int,
    galaxies_used: int | None = None,
    tell: Callable[[str], None],
) -> str:
    """Train architectures of several sizes on all galaxies and on a quarter of them.

    Parameters
    ----------
    galaxies : Galaxies
    recipe : Recipe
        Its epochs count passes over all galaxies; its architecture and seed are not looked at.
    out : Path
        Folder for ``cells/``, ``table.parquet``, ``table.md``, ``fits.json``, ``plot.png`` and ``questions.png``.
    architectures : sequence of str
        Two at least; see `training.study.data.study_data`.
    seeds : int
    galaxies_used : int, optional
        What counts as all; those that are there unless given.
    tell : callable
        Given a line as each cell ends.

    Returns
    -------
    str
        The table and the slopes, Markdown.

    Raises
    ------
    BadRequest
        If there are fewer than two architectures or too few galaxies, or another study is running in `out`.
    """
    if len(set(architectures)) < 2:
        raise BadRequest(f"a study of size needs two architectures or more, got {', '.join(architectures) or 'none'}")
    most = galaxies_used or len(galaxies.training)
    outcomes = run_scaling(galaxies, recipe, architectures, [most // _SHARE, most], seeds, out, tell)
    found = curves(outcomes, lambda what: str(what["size"]), lambda outcome: (outcome.result or {})["parameters"])
    laws = [power_law(curve.x, curve.values.mean(axis=0), curve.draws, floored=False) for curve in found]
    write_parquet(table_rows(found), COLUMNS, out / "table.parquet")
    slopes = [
        {"galaxies": int(curve.label), "question": curve.question, "law": law.to_dict() if law else None}
        for curve, law in zip(found, laws, strict=True)
    ]
    write_json({"loss = scale * parameters ** -exponent": slopes}, out / "fits.json")
    fits = [[curve.label, curve.question, law.exponent] for curve, law in zip(found, laws, strict=True) if law]
    text = "\n".join(
        [
            f"Test loss against parameters: negative log-likelihood of votes on {galaxies.tree.name}, summed "
            f"over questions, mean over {len(galaxies.test)} test galaxies and {seeds} seed(s); intervals hold "
            "68%, over seeds.",
            "",
            markdown(["galaxies", "architecture", "parameters", "loss"], _losses(found)),
            "",
            "Slope c of loss = a P^-c for P parameters, below 0 where larger ones do worse; the interval is over seeds "
            "and test galaxies.",
            "",
            markdown(["galaxies", "question", "c"], fits),
            "",
            not_run(outcomes, [cell_name(outcome.cell) for outcome in outcomes]),
        ]
    )
    (out / "table.md").write_text(text, encoding="utf-8")
    draw(found, out)
    return text


def _losses(found: Sequence[Curve]) -> list[list[object]]:
    return [
        [curve.label, architecture, f"{int(parameters):,}", f"{point:.2f}"]
        for curve in found
        if curve.question == ALL
        for architecture, parameters, point in zip(curve.architectures, curve.x, curve.points, strict=True)
    ]


def table_rows(found: Sequence[Curve]) -> list[dict[str, Any]]:
    """Return the rows of `COLUMNS`."""
    return [
        {
            "galaxies": int(curve.label),
            "architecture": architecture,
            "parameters": int(parameters),
            "question": curve.question,
            "seeds": len(curve.values),
            **interval_cells("loss", point),
        }
        for curve in found
        for architecture, parameters, point in zip(curve.architectures, curve.x, curve.points, strict=True)
    ]


def draw(found: Sequence[Curve], out: Path) -> None:
    """Draw a line for each number of galaxies, for all questions together and for each."""
    names = list(dict.fromkeys(curve.question for curve in found))
    panels = [
        Panel(
            "" if name == ALL else name,
            [Series(f"{curve.label} galaxies", curve.x, curve.points) for curve in found if curve.question == name],
        )
        for name in names
    ]
    if not panels:
        return
    figure = curves_figure(panels[:1], "parameters", "test loss [nat, summed over questions]", joined=True)
    save_figure(figure, out / "plot.png")
    if panels[1:]:
        save_figure(curves_figure(panels[1:], "parameters", "test loss [nat]", joined=True), out / "questions.png")
