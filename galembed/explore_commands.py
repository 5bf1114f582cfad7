"""Commands that look over a whole store: novel, duplicates, map. Heavy imports are inside."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from galembed.options import sky_options, where_option

if TYPE_CHECKING:
    from astropy.table import Table

_SHOWN = 40  # rows of groups

_FILE = click.Path(path_type=Path)
_SEED = click.option("--seed", type=int, default=0, show_default=True, help="Of what is drawn at random.")


@click.command()
@click.argument("store")
@click.option("-n", "count", type=click.IntRange(min=1), default=100, show_default=True, help="How many to list.")
@click.option(
    "--method",
    type=click.Choice(["knn", "forest"]),
    default="knn",
    show_default=True,
    help="knn: distance to the k-th nearest neighbour; forest: isolation forest, coarser and quicker.",
)
@click.option("--k", "k", type=click.IntRange(min=1), default=10, show_default=True, help="Of knn.")
@where_option
@sky_options
@click.option("--unflagged", is_flag=True, help="Leave out sources with flags, which are often artefacts.")
@click.option("--neighbours", type=click.IntRange(min=0), default=0, help="Add the ids of so many nearest neighbours.")
@_SEED
@click.option("--out", type=_FILE, help="Write the table: .fits, .ecsv, .csv, .vot or .parquet.")
@click.option("--plot", type=_FILE, help="Draw the sources: .png or .pdf.")
def novel(
    store: str,
    count: int,
    method: str,
    k: int,
    where: str | None,
    cone: tuple[float, float, float] | None,
    box: tuple[float, float, float, float] | None,
    region: str | list[list[float]] | None,
    unflagged: bool,
    neighbours: int,
    seed: int,
    out: Path | None,
    plot: Path | None,
) -> None:
    """List the sources of STORE that look like few others, oddest first.

    An artefact looks like little else too: mind the column flags, or leave such sources out with --unflagged.
    """
    from galembed.novelty import novel as find_novel
    from galembed.progress import stages
    from galembed.store import open_store
    from galembed.tables import printed

    opened = open_store(store)
    with stages() as show:
        found = find_novel(
            opened,
            count,
            method=method,
            k=k,
            where=where,
            cone=cone,
            box=box,
            region=region,
            unflagged=unflagged,
            neighbours=neighbours,
            seed=seed,
            show=show,
        )
    click.echo(printed(found))
    click.echo(found.summary())
    if out is not None:
        _write(found, out)
    if plot is not None:
        found.show(plot)
        click.echo(f"pictures written to {plot}")


@click.command()
@click.argument("store")
@click.option("--radius", type=float, default=1.0, show_default=True, help="Largest separation of a pair, arcsec.")
@click.option("--similarity", type=float, default=0.98, show_default=True, help="Least cosine of a pair, -1 to 1.")
@click.option("--similarity-only", is_flag=True, help="Whatever the position, and without one: near-identical vectors.")
@where_option
@sky_options
@click.option("--prefer", multiple=True, metavar="SURVEY", help="Keep this survey's source; repeatable, in order.")
@_SEED
@click.option("--out", type=_FILE, help="Write the sources in groups: .fits, .ecsv, .csv, .vot or .parquet.")
@click.option("--pairs", type=_FILE, help="Write the pairs.")
@click.pass_context
def duplicates(
    ctx: click.Context,
    store: str,
    radius: float,
    similarity: float,
    similarity_only: bool,
    where: str | None,
    cone: tuple[float, float, float] | None,
    box: tuple[float, float, float, float] | None,
    region: str | list[list[float]] | None,
    prefer: tuple[str, ...],
    seed: int,
    out: Path | None,
    pairs: Path | None,
) -> None:
    """Find objects that are in STORE more than once, in two tiles or surveys, and say which one to keep.

    Nothing is removed.
    """
    from galembed.duplicates import duplicates as find_duplicates
    from galembed.progress import stages
    from galembed.store import open_store
    from galembed.tables import printed

    asked = ctx.get_parameter_source("radius") is not click.core.ParameterSource.DEFAULT
    if similarity_only and asked:
        raise click.UsageError("give --radius or --similarity-only: duplicates are sought by position or without it")
    opened = open_store(store)
    with stages() as show:
        found = find_duplicates(
            opened,
            radius=None if similarity_only else radius,
            similarity=similarity,
            where=where,
            cone=cone,
            box=box,
            region=region,
            prefer=prefer,
            seed=seed,
            show=show,
        )
    if len(found.members):
        click.echo(printed(found.members[:_SHOWN]))
    click.echo(str(found))
    if out is not None:
        _write(found.members, out)
    if pairs is not None:
        _write(found.pairs, pairs)


@click.command()
@click.argument("store")
@click.option("--out", type=_FILE, required=True, help="Write the picture: .png or .pdf.")
@click.option(
    "--method",
    type=click.Choice(["pca", "umap"]),
    default="pca",
    show_default=True,
    help="pca: projection on the two widest directions; umap: neighbours together (pip install 'galembed[umap]').",
)
@click.option("--colour", metavar="COLUMN", help="Colour by a column of the store; else by the number of sources.")
@click.option("--thumbnails", is_flag=True, help="Draw the sources themselves, one in each cell of a grid.")
@click.option("--sample", type=click.IntRange(min=4), default=50_000, show_default=True, help="Sources to fit it on.")
@where_option
@sky_options
@_SEED
@click.option("--table", type=_FILE, help="Write survey, source_id, x and y of every source: .parquet.")
def map(
    store: str,
    out: Path,
    method: str,
    colour: str | None,
    thumbnails: bool,
    sample: int,
    where: str | None,
    cone: tuple[float, float, float] | None,
    box: tuple[float, float, float, float] | None,
    region: str | list[list[float]] | None,
    seed: int,
    table: Path | None,
) -> None:
    """Draw a map of STORE on which like lies beside like."""
    if thumbnails and colour is not None:
        raise click.UsageError("give --colour or --thumbnails: pictures have their own colours")
    from galembed.maps import make_map, map_figure, thumbnails_figure
    from galembed.pictures import save_figure
    from galembed.progress import stages
    from galembed.store import open_store

    opened = open_store(store)
    with stages() as show:
        placed = make_map(
            opened,
            method=method,
            colour=colour,
            sample=sample,
            where=where,
            cone=cone,
            box=box,
            region=region,
            seed=seed,
            table=table,
            show=show,
        )
    click.echo(str(placed))
    if table is not None:
        click.echo(f"{len(placed.rows):,} rows written to {table}")
    figure, missing = thumbnails_figure(placed, opened) if thumbnails else (map_figure(placed), 0)
    save_figure(figure, out)
    left_out = f"; {missing} cells stay empty: their source cannot be read" if missing else ""
    click.echo(f"map drawn in {out}{left_out}")


def _write(table: Table, out: Path) -> None:
    from galembed.tables import write_table

    write_table(table, out)
    click.echo(f"{len(table):,} rows written to {out}")
