"""The `galembed probe` commands. Heavy imports are inside."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from galembed.options import where_option

if TYPE_CHECKING:
    from galembed.probes import Report
    from galembed.store import Store

_FILE = click.Path(path_type=Path)


@click.group()
def probe() -> None:
    """Learn classes, numbers or votes from a few labels, for a whole store."""


_LABELS = click.option("--labels", type=_FILE, required=True, help="Table of labelled sources: FITS, VOTable, CSV ...")
_ID_COLUMN = click.option("--id-column", help="Its id column, where it is not guessed right.")
_RADIUS = click.option("--radius", type=float, help="Match labels by position instead, within so many arcsec.")
_REPORT = click.option("--report", type=_FILE, help="Write the scores here, in Markdown.")
_PLOT = click.option("--plot", type=_FILE, help="Draw the confusion matrix, or the numbers: .png or .pdf.")
_DETAILS = click.option(
    "--details", type=_FILE, help="Folder for scores and all pictures: calibration, learning curve, worst mistakes."
)
_PROBE = click.argument("probe_path", metavar="PROBE", type=_FILE)


@probe.command("fit")
@click.argument("store")
@_LABELS
@click.option(
    "--column", "columns", multiple=True, required=True, help="Label column; repeat it for the answers of one question."
)
@click.option(
    "--kind",
    type=click.Choice(["classification", "regression", "votes"]),
    help="What the labels are.  [default: told from the columns]",
)
@click.option("--out", type=_FILE, required=True, help="Folder for the probe.")
@_ID_COLUMN
@_RADIUS
@click.option("--seed", type=int, default=0, show_default=True, help="Of the cross-validation's folds.")
@_REPORT
@_PLOT
@_DETAILS
def fit(
    store: str,
    labels: Path,
    columns: tuple[str, ...],
    kind: str | None,
    out: Path,
    id_column: str | None,
    radius: float | None,
    seed: int,
    report: Path | None,
    plot: Path | None,
    details: Path | None,
) -> None:
    """Fit a linear model on STORE and score it by cross-validation.

    Text, booleans and whole numbers of few values are classes, other numbers are predicted as such; several columns
    are the vote fractions of one question, which sum to one, or its counts.
    """
    from galembed.probes import fit_probe, save_probe
    from galembed.probes.model import plain_name
    from galembed.store import open_store

    name = plain_name(out.resolve().name)
    opened = open_store(store)
    fitted, scores = fit_probe(
        opened, labels, columns, kind=kind, id_column=id_column, radius=radius, seed=seed, name=name
    )
    save_probe(fitted, out)
    _tell(scores, opened, report, plot, details)
    click.echo(f"probe written to {out}")


@probe.command("evaluate")
@click.argument("store")
@_PROBE
@_LABELS
@click.option("--column", "columns", multiple=True, help="Label column, where it is not that of the fit; repeatable.")
@_ID_COLUMN
@_RADIUS
@_REPORT
@_PLOT
@_DETAILS
def evaluate(
    store: str,
    probe_path: Path,
    labels: Path,
    columns: tuple[str, ...],
    id_column: str | None,
    radius: float | None,
    report: Path | None,
    plot: Path | None,
    details: Path | None,
) -> None:
    """Score PROBE on labels that it was not fitted to."""
    from galembed.probes import evaluate_probe, load_probe
    from galembed.store import open_store

    opened, loaded = open_store(store), load_probe(probe_path)
    scores = evaluate_probe(opened, loaded, labels, columns or None, id_column=id_column, radius=radius)
    _tell(scores, opened, report, plot, details)


@probe.command("apply")
@click.argument("store")
@_PROBE
@click.option("--out", type=_FILE, help="Parquet file for the predictions.  [default: kept in the store]")
@click.option(
    "--prior",
    type=click.Choice(["equal", "labels"]),
    default="equal",
    show_default=True,
    help="How common classes are: equally, or as among the labels.",
)
@where_option
def apply(store: str, probe_path: Path, out: Path | None, prior: Any, where: str | None) -> None:
    """Classify every source of STORE with PROBE, or predict its numbers or votes."""
    from galembed.probes import apply_probe, load_probe
    from galembed.store import open_store

    loaded = load_probe(probe_path)
    rows, place = apply_probe(open_store(store), loaded, out, prior=prior, where=where)
    click.echo(f"{rows:,} sources {'classified' if loaded.kind == 'classification' else 'predicted'} in {place}")


@probe.command("suggest")
@click.argument("store")
@_PROBE
@click.option("-n", "count", type=click.IntRange(min=1), default=50, show_default=True, help="How many.")
@click.option(
    "--by",
    type=click.Choice(["entropy", "margin"]),
    default="entropy",
    show_default=True,
    help="Which classes are uncertain: all of them, or the two likeliest.",
)
@click.option("--out", type=_FILE, required=True, help="Write the table: .csv, .fits, .ecsv, .vot or .parquet.")
@click.option("--plot", type=_FILE, help="Draw the sources: .png or .pdf.")
@where_option
@click.option("--seed", type=int, default=0, show_default=True, help="Of the choice among uncertain sources.")
def suggest(
    store: str, probe_path: Path, count: int, by: Any, out: Path, plot: Path | None, where: str | None, seed: int
) -> None:
    """List the sources of STORE whose labels would teach PROBE most: uncertain, and unlike one another."""
    from galembed.probes import load_probe
    from galembed.probes import suggest as choose
    from galembed.store import open_store
    from galembed.tables import write_table

    opened = open_store(store)
    table = choose(opened, load_probe(probe_path), count, by=by, where=where, seed=seed)
    write_table(table, out)
    click.echo(f"{len(table)} sources to label in {out}")
    if plot is not None:
        from galembed.pictures import save_figure
        from galembed.probes.figures import suggestions_figure

        save_figure(suggestions_figure(opened, table), plot)
        click.echo(f"pictures written to {plot}")


@probe.command("nuisance")
@click.argument("store")
@click.option("--columns", multiple=True, metavar="COLUMN", help="Column to look at, or `tile`; repeatable.")
@where_option
@click.option("--seed", type=int, default=0, show_default=True, help="Of sample, folds and shuffles.")
@_REPORT
def nuisance(store: str, columns: tuple[str, ...], where: str | None, seed: int, report: Path | None) -> None:
    """Measure what the vectors of STORE tell of survey, tile, seeing, depth, extinction and signal to noise."""
    from galembed.probes import nuisance_report
    from galembed.store import open_store

    _tell_text(str(nuisance_report(open_store(store), columns, where=where, seed=seed)), report)


def _tell(scores: Report, store: Store, report: Path | None, plot: Path | None, details: Path | None) -> None:
    _tell_text(str(scores), report)
    if plot is not None:
        from galembed.pictures import save_figure
        from galembed.probes.figures import main_figure

        save_figure(main_figure(scores), plot)
    if details is not None:
        from galembed.probes.figures import save_details

        click.echo("written: " + ", ".join(map(str, save_details(scores, details, store))))


def _tell_text(text: str, file: Path | None) -> None:
    from galembed.tables import write_text

    click.echo(text)
    write_text(text, file)
