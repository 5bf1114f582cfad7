"""The `galembed export-hats` command."""

from __future__ import annotations

from pathlib import Path

import click

from galembed.options import quiet_option, where_option


@click.command("export-hats")
@click.argument("store")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--columns",
    metavar="NAME,NAME,...",
    help="Columns besides keys, position and vector, by commas.  [default: all but thumbnail]",
)
@where_option
@click.option(
    "--rows-per-pixel",
    type=click.IntRange(min=1),
    default=1_000_000,
    show_default=True,
    help="Most rows of a cell; a fuller one is cut in four.",
)
@click.option("--no-vectors", is_flag=True, help="Leave the vectors out.")
@click.option("--overwrite", is_flag=True, help="Replace OUT where it is a HATS catalogue.")
@quiet_option
def export_hats(
    store: str,
    out: Path,
    columns: str | None,
    where: str | None,
    rows_per_pixel: int,
    no_vectors: bool,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Write STORE as a HATS catalogue OUT, which lsdb opens and cross-matches.

    Rows without a position are left out, and counted.
    """
    from galembed.hats.write import export_hats as export
    from galembed.store import open_store

    report = export(
        open_store(store),
        out,
        columns=None if columns is None else [name.strip() for name in columns.split(",") if name.strip()],
        where=where,
        rows_per_pixel=rows_per_pixel,
        vectors=not no_vectors,
        overwrite=overwrite,
        quiet=quiet,
    )
    click.echo(str(report))
