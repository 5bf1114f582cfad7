"""The `galembed embed` command."""

from __future__ import annotations

import click

from galembed.engines import NUMERIC_CLASSES
from galembed.options import COLUMNS, parse_bands, parse_batch, parse_pairs, recognised, source_options
from galembed.runtimes import RUNTIMES


@click.command()
@source_options
@click.option("--store", required=True, type=click.Path(), help="Directory of the store; made if absent.")
@click.option("--runtime", default="auto", type=click.Choice(RUNTIMES), show_default=True, help="What runs the engine.")
@click.option(
    "--precision", type=click.Choice(NUMERIC_CLASSES), help="Numbers to compute in.  [default: the store's, or fp32]"
)
@click.option("--scheduler", help="Address of a Dask scheduler (tcp://...); local processes without it.")
@click.option("--workers", type=click.IntRange(min=1), help="Local processes.  [default: one per core]")
@click.option(
    "--batch",
    default="32",
    metavar="N|auto",
    show_default=True,
    help="Images per call of the engine; auto measures which is fastest, once.",
)
@click.option("--carry", multiple=True, metavar="COLUMN", help="Catalogue column to keep in the store; repeatable.")
@click.option("--retry-failed", is_flag=True, help="Try sources again that failed before.")
@click.option("--max-failures", type=float, help="Stop when more than this fraction of the sources has failed.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
def embed(
    source: str,
    store: str,
    catalogue: str | None,
    backbone: str,
    runtime: str,
    precision: str | None,
    scheduler: str | None,
    workers: int | None,
    batch: str,
    crop: float | None,
    survey: str | None,
    bands: tuple[str, ...],
    fov: str | None,
    min_coverage: float,
    carry: tuple[str, ...],
    column: tuple[str, ...],
    retry_failed: bool,
    max_failures: float | None,
    quiet: bool,
) -> None:
    """Embed every source of SOURCE into a store.

    SOURCE is a folder (or fsspec URL) of FITS cutouts, of JPEG or PNG pictures, a tree of survey tiles, which
    needs a --catalogue, or a local folder of Parquet files with an image column. Sources that the store has already
    are left alone: run the same command again to go on after a stop.
    """
    from catalogue_jobs import run
    from galembed.backbones import BUILTIN, load_backbone
    from galembed.sources import open_source

    chosen = load_backbone(backbone)
    reader = open_source(
        source,
        catalogue=catalogue,
        crop=crop,
        survey=survey,
        bands=parse_bands(bands),
        fov=fov,
        min_coverage=min_coverage,
        carry=carry,
        columns=parse_pairs(column, "--column", COLUMNS),
    )
    click.echo(recognised(reader), err=True)
    if backbone == BUILTIN:
        click.echo(f"built-in backbone {chosen.name} (embedding_id {chosen.embedding_id[:12]})", err=True)
    try:
        report = run.embed(
            reader,
            store,
            backbone=chosen,
            runtime=runtime,
            precision=precision,
            scheduler=scheduler,
            workers=workers,
            batch=parse_batch(batch, "--batch"),
            retry_failed=retry_failed,
            max_failures=max_failures,
            progress=not quiet,
        )
    except KeyboardInterrupt as interrupt:
        click.echo(str(interrupt) or "interrupted; the same command goes on", err=True)
        raise SystemExit(130) from None
    click.echo(str(report))
    if report.planned and not report.embedded:
        raise SystemExit(1)
