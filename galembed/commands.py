"""Commands on questions, sources and stores: questions, surveys, look, index, compact, rollback, search, status.

Heavy imports are inside.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from galembed.options import COLUMNS, parse_bands, parse_pairs, recognised, sky_options, source_options, where_option

_FILE = click.Path(path_type=Path)


@click.command()
@click.argument("name", required=False)
def surveys(name: str | None) -> None:
    """List the surveys that are known; with NAME, every fact of one, and where it was read.

    NAME may also be the path of a description (YAML or TOML).
    """
    from galembed.survey_pages import survey_text, surveys_text

    click.echo(surveys_text() if name is None else survey_text(name))


@click.command()
@click.argument("name", required=False)
def questions(name: str | None) -> None:
    """List the question trees of Galaxy Zoo's campaigns; with NAME, draw one: what is asked after which answer.

    NAME may also be the path of a tree of your own, as YAML.
    """
    from galembed.questions import question_tree, tree_text, trees_text

    click.echo(trees_text() if name is None else tree_text(question_tree(name)))


@click.command()
@source_options
@click.option("-n", "count", type=click.IntRange(1, 200), default=24, show_default=True, help="Sources to draw.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sample.")
@click.option("--mapping", help="Draw flux with another named mapping than the backbone's.")
@click.option("--out", type=_FILE, required=True, help="Write the pictures: .png or .pdf.")
def look(
    source: str,
    catalogue: str | None,
    backbone: str,
    crop: float | None,
    survey: str | None,
    bands: tuple[str, ...],
    fov: str | None,
    min_coverage: float,
    column: tuple[str, ...],
    count: int,
    seed: int,
    mapping: str | None,
    out: Path,
) -> None:
    """Draw a sample of SOURCE as the backbone will see it, and say what was recognised.

    SOURCE and its options are those of `galembed embed`; nothing is embedded. The first thing to run on
    files of a survey.
    """
    from galembed.backbones import load_backbone
    from galembed.looks import look as look_at
    from galembed.looks import look_figure, look_text
    from galembed.mappings import named_mapping
    from galembed.pictures import save_figure
    from galembed.sources import open_source

    contract = load_backbone(backbone).contract
    drawn = named_mapping(mapping) if mapping else contract.mapping
    reader = open_source(
        source,
        catalogue=catalogue,
        crop=crop,
        survey=survey,
        bands=parse_bands(bands),
        fov=fov,
        min_coverage=min_coverage,
        columns=parse_pairs(column, "--column", COLUMNS),
    )
    click.echo(recognised(reader))
    seen = look_at(reader, contract, count=count, seed=seed)
    click.echo(look_text(seen))
    save_figure(look_figure(seen, drawn), out)
    how = f"by {drawn.name}" if reader.kind == "flux" else "as they are"
    click.echo(f"drawn      {contract.size} x {contract.size} pixels each, {how}, in {out}")


@click.command()
@click.argument("store")
@click.option(
    "--kind",
    type=click.Choice(["auto", "exact", "hnsw", "rq"]),
    default="auto",
    show_default=True,
    help="exact: no vector index; rq: built fast; hnsw: a graph; auto: exact on small stores, else rq.",
)
@click.option(
    "--recall",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.95,
    show_default=True,
    help="Share of the true 10 nearest to find.",
)
@click.option("--column", "columns", multiple=True, metavar="NAME", help="Index it too, for --where; repeatable.")
def index(store: str, kind: str, recall: float, columns: tuple[str, ...]) -> None:
    """Build the indexes of STORE, for faster filters and, on large stores, faster search.

    What a search by the vector index finds is measured against exact search, and it is searched thoroughly
    enough to find --recall. Run it again after rows were added: few are folded in.
    """
    from galembed.store import open_store
    from galembed.store.index import build_index

    click.echo(str(build_index(open_store(store), kind, recall=recall, columns=columns)))


@click.command()
@click.argument("store")
@click.option(
    "--keep",
    type=click.FloatRange(min=0),
    default=1.0,
    show_default=True,
    metavar="HOURS",
    help="How long a version stays after another took its place, for those who have it open; 0 if nobody reads.",
)
def compact(store: str, keep: float) -> None:
    """Merge small files of STORE, drop rows that were replaced, fold new rows into the indexes, remove old versions.

    No vector changes, and a job goes on afterwards as before. An older store is brought to the present format.
    """
    from datetime import timedelta

    from galembed.store import compaction

    click.echo(str(compaction.compact(store, keep=timedelta(hours=keep))))


@click.command()
@click.argument("store")
@click.argument("version", type=int, required=False)
def rollback(store: str, version: int | None) -> None:
    """List the versions of STORE; with VERSION, make both of its tables what they were then.

    It can be undone, and the same `galembed embed` embeds again what was taken away. Versions that
    `galembed compact` removed are gone.
    """
    from galembed.store import history

    if version is None:
        click.echo(history.history_text(history.history(store)))
    else:
        click.echo(str(history.rollback(store, version)))


@click.command()
@click.argument("store")
@click.option("--verify", is_flag=True, help="Read all of it: each source once, every file there, all vectors sound.")
@click.option(
    "--failures",
    type=_FILE,
    help="Write what could not be embedded, with file and reason: .csv, .ecsv, .fits, .vot or .parquet.",
)
def status(store: str, verify: bool, failures: Path | None) -> None:
    """Say what STORE holds: sources, failures by reason, backbone, engines, index; and how its job stands."""
    from galembed.store import open_store

    opened = open_store(store)
    click.echo(str(opened.status()))
    if failures:
        from galembed.tables import write_table

        table = opened.failures()
        table["time"] = table["time"].astype(str)  # FITS and VOTable have no type for it
        write_table(table, failures)
        click.echo(f"{len(table):,} failure(s) written to {failures}")
    if verify:
        from galembed.store import checks

        found = checks.verify(store)
        click.echo(str(found))
        if not found.ok:
            raise SystemExit(1)


@click.command()
@click.argument("store")
@click.option("--id", "ids", multiple=True, metavar="ID", help="A source; repeat it to look for what several share.")
@click.option("--position", type=(float, float), metavar="RA DEC", help="The source here (deg), within 5 arcsec.")
@click.option("--image", type=_FILE, help="A picture or FITS cutout of the kind that the store was made from.")
@click.option("--unlike", multiple=True, metavar="ID", help="A source that the hits should not look like; repeatable.")
@click.option("-k", "k", type=click.IntRange(min=1), default=10, show_default=True, help="How many to find.")
@where_option
@sky_options
@click.option(
    "--exclude-within", type=click.FloatRange(min=0), metavar="ARCSEC", help="Leave out what lies so near to the query."
)
@click.option("--out", type=_FILE, help="Write the table: .fits, .ecsv, .csv, .vot or .parquet.")
@click.option("--plot", type=_FILE, help="Draw the hits: .png or .pdf.")
@click.option("--report", type=_FILE, help="Write a page that stands alone: pictures, ids and links to the sky: .html.")
@click.option(
    "--show",
    "shown_columns",
    multiple=True,
    metavar="COLUMN",
    help="Write it under each picture of --plot and --report.",
)
@click.option("--samp", metavar="PROGRAM", help="Send the table to a program that runs, such as topcat; or to all.")
@click.option("--exact", is_flag=True, help="Compare with every vector although there is an index.")
def search(
    store: str,
    ids: tuple[str, ...],
    position: tuple[float, float] | None,
    image: Path | None,
    unlike: tuple[str, ...],
    k: int,
    where: str | None,
    cone: tuple[float, float, float] | None,
    box: tuple[float, float, float, float] | None,
    region: str | list[list[float]] | None,
    exclude_within: float | None,
    out: Path | None,
    plot: Path | None,
    report: Path | None,
    shown_columns: tuple[str, ...],
    samp: str | None,
    exact: bool,
) -> None:
    """Find the sources of STORE that look like a source, a position or an image."""
    if sum((bool(ids), position is not None, image is not None)) != 1:
        raise click.UsageError("give one of --id, --position and --image: what to search for")
    from galembed.store import open_store
    from galembed.tables import printed, write_table

    opened = open_store(store)
    hits = opened.similar(
        _query(ids, position, image),
        k,
        unlike=list(unlike) or None,
        where=where,
        cone=cone,
        box=box,
        region=region,
        exclude_within=exclude_within,
        exact=exact,
    )
    shown = hits.copy(copy_data=False)
    shown.remove_column("distance")
    click.echo(printed(shown) if len(hits) else "nothing found")
    if out is not None:
        write_table(hits, out)
        click.echo(f"{len(hits)} rows written to {out}")
    if plot is not None:
        hits.show(plot, shown_columns)
        click.echo(f"pictures written to {plot}")
    if report is not None:
        hits.report(report, shown_columns)
        click.echo(f"report written to {report}")
    if samp is not None:
        click.echo(f"{len(hits)} rows sent to {', '.join(hits.send(samp))}")


def _query(ids: tuple[str, ...], position: tuple[float, float] | None, image: Path | None) -> Any:
    if image is not None:
        return image
    if position is None:
        return list(ids)
    import astropy.units as u
    from astropy.coordinates import SkyCoord

    from galembed.errors import BadRequest

    try:
        return SkyCoord(position[0] * u.deg, position[1] * u.deg)
    except ValueError as error:
        raise BadRequest(f"--position {position[0]} {position[1]} is not on the sky: {error}") from error
