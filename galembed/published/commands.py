"""The commands `galembed import` and `galembed export-parquet`."""

from __future__ import annotations

from pathlib import Path

import click

from galembed.options import quiet_option, where_option


@click.command("import")
@click.argument("store")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--vector-column",
    "vector",
    metavar="COLUMN|PATTERN",
    help="Column of vectors, or 'feat_*' for one column a number.  [default: the only one of lists]",
)
@click.option("--id", "id_column", metavar="COLUMN", help="Column of ids.  [default: guessed]")
@click.option("--ra", metavar="COLUMN", help="Column of right ascensions, deg.  [default: guessed]")
@click.option("--dec", metavar="COLUMN", help="Column of declinations, deg.  [default: guessed]")
@click.option("--survey", default="published", show_default=True, help="Survey of the sources: half of their keys.")
@click.option("--columns", metavar="NAME,NAME,...", help="Other columns to keep.  [default: all numbers and texts]")
@click.option("--name", default="", help="Of the model that made the vectors.  [default: the column's]")
@click.option("--source", default="", help="Where the files are from: an address, a DOI.")
@quiet_option
def import_command(
    store: str,
    files: tuple[Path, ...],
    vector: str | None,
    id_column: str | None,
    ra: str | None,
    dec: str | None,
    survey: str,
    columns: str | None,
    name: str,
    source: str,
    quiet: bool,
) -> None:
    """Make STORE of published embeddings, or add them to it.

    FILES are Parquet files with a vector, an id and a position in each row, folders of them, or a FITS table. The
    same command again goes on after a stop, and adds nothing twice. Files that `galembed export-parquet` wrote need
    no options.
    """
    from galembed.published.importing import import_published

    named = {part: column for part, column in (("id", id_column), ("ra", ra), ("dec", dec)) if column}
    report = import_published(
        store,
        files,
        vector=vector,
        columns=named,
        carry=None if columns is None else [text.strip() for text in columns.split(",") if text.strip()],
        survey=survey,
        name=name,
        source=source,
        quiet=quiet,
    )
    click.echo(str(report))
    if report.rows and not report.imported and not report.already:
        raise SystemExit(1)


@click.command("export-parquet")
@click.argument("store")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--columns", metavar="NAME,NAME,...", help="Catalogue columns, predictions, thumbnail.  [default: all]")
@where_option
@click.option(
    "--rows-per-file", type=click.IntRange(min=1), default=1_000_000, show_default=True, help="Most rows of a file."
)
@click.option("--overwrite", is_flag=True, help="Replace OUT where it holds such files only.")
@quiet_option
def export_parquet(
    store: str,
    out: Path,
    columns: str | None,
    where: str | None,
    rows_per_file: int,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Write STORE as Parquet files in the folder OUT: vectors, ids, positions, columns and whose vectors they are.

    `galembed import` makes the same store of them.
    """
    from galembed.published.exporting import export_published
    from galembed.store import open_store

    report = export_published(
        open_store(store),
        out,
        columns=None if columns is None else [text.strip() for text in columns.split(",") if text.strip()],
        where=where,
        rows_per_file=rows_per_file,
        overwrite=overwrite,
        quiet=quiet,
    )
    click.echo(str(report))
