"""The `galembed embed` command."""

from __future__ import annotations

import click

from galembed.engines import NUMERIC_CLASSES
from galembed.options import (
    COLUMNS,
    parse_bands,
    parse_batch,
    parse_pairs,
    parse_share,
    quiet_option,
    recognised,
    source_options,
)
from galembed.runtimes import RUNTIMES


@click.command()
@source_options
@click.option("--store", required=True, type=click.Path(), help="Directory of the store; made if absent.")
@click.option("--runtime", default="auto", type=click.Choice(RUNTIMES), show_default=True, help="What runs the engine.")
@click.option(
    "--precision", type=click.Choice(NUMERIC_CLASSES), help="Numbers to compute in.  [default: the store's, or fp32]"
)
@click.option("--scheduler", help="Address of a Dask scheduler (tcp://..., tls://...); local processes without it.")
@click.option("--workers", type=click.IntRange(min=1), help="Local processes.  [default: one per core]")
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="Threads of each worker's engine.  [default: the cores, shared; 1 with --scheduler]",
)
@click.option(
    "--batch",
    metavar="N|auto",
    help="Images per call of the engine; auto measures which is fastest, once.  [default: the engine's]",
)
@click.option("--carry", multiple=True, metavar="COLUMN", help="Catalogue column to keep in the store; repeatable.")
@click.option("--thumbnails", is_flag=True, help="Have a new store keep a small picture of each source.")
@click.option("--retry-failed", is_flag=True, help="Try sources again that failed before.")
@click.option("--keep-changed", is_flag=True, help="Leave vectors as they are whose files have changed.")
@click.option("--prune", is_flag=True, help="Remove sources of this survey that the list no longer has.")
@click.option(
    "--max-failures",
    metavar="SHARE",
    help="Stop when more than this share of the sources tried has failed (5% or 0.05), once 1,000 are tried.",
)
@click.option("--plan-only", is_flag=True, help="Say what there is to do and what it will cost, and stop.")
@quiet_option
def embed(
    source: str,
    store: str,
    catalogue: str | None,
    backbone: str,
    runtime: str,
    precision: str | None,
    scheduler: str | None,
    workers: int | None,
    threads: int | None,
    batch: str | None,
    crop: float | None,
    survey: str | None,
    bands: tuple[str, ...],
    fov: str | None,
    min_coverage: float,
    carry: tuple[str, ...],
    column: tuple[str, ...],
    thumbnails: bool,
    retry_failed: bool,
    keep_changed: bool,
    prune: bool,
    max_failures: str | None,
    plan_only: bool,
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
    common = {
        "backbone": chosen,
        "runtime": runtime,
        "precision": precision,
        "workers": workers,
        "threads": threads,
        "batch": None if batch is None else parse_batch(batch, "--batch"),
        "retry_failed": retry_failed,
        "keep_changed": keep_changed,
        "thumbnails": thumbnails,
    }
    share = None if max_failures is None else parse_share(max_failures, "--max-failures")
    if plan_only:
        click.echo(str(run.forecast(reader, store, **common)))  # type: ignore[arg-type]
        return
    try:
        report = run.embed(
            reader,
            store,
            **common,  # type: ignore[arg-type]
            scheduler=scheduler,
            prune_withdrawn=prune,
            max_failures=share,
            progress=not quiet,
        )
    except KeyboardInterrupt as interrupt:
        click.echo(str(interrupt) or "interrupted; the same command goes on", err=True)
        raise SystemExit(130) from None
    click.echo(str(report))
    if report.planned and not report.embedded:
        raise SystemExit(1)
