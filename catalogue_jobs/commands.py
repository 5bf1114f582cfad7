"""The `galembed embed` command."""

from __future__ import annotations

import click


@click.command()
@click.argument("source", type=click.Path())
@click.option("--store", required=True, type=click.Path(), help="Directory of the store; made if absent.")
@click.option(
    "--catalogue",
    type=click.Path(),
    help="Table of the sources: needed for bricks, adds columns to a folder.",
)
@click.option(
    "--backbone",
    default="builtin",
    type=click.Path(),
    help="Directory of a backbone.  [default: the built-in]",
)
@click.option("--runtime", default="auto", type=click.Choice(["auto", "onnxruntime", "torch"]), show_default=True)
@click.option("--scheduler", help="Address of a Dask scheduler (tcp://...); local processes without it.")
@click.option("--workers", type=click.IntRange(min=1), help="Local processes.  [default: one per core]")
@click.option(
    "--batch",
    default=32,
    type=click.IntRange(min=1),
    show_default=True,
    help="Images per call of the engine.",
)
@click.option("--crop", type=float, help="Centre fraction kept of an image whose source has no size.")
@click.option("--bands", multiple=True, metavar="ROLE=BAND", help="Band for a role, as in blue=g; repeatable.")
@click.option(
    "--min-coverage",
    default=0.0,
    type=float,
    show_default=True,
    help="A source with less data in any band is a failure.",
)
@click.option("--carry", multiple=True, metavar="COLUMN", help="Catalogue column to keep in the store; repeatable.")
@click.option(
    "--column",
    multiple=True,
    metavar="NAME=COLUMN",
    help="Catalogue column for id, ra, dec or size; repeatable.",
)
@click.option("--retry-failed", is_flag=True, help="Try sources again that failed before.")
@click.option("--max-failures", type=float, help="Stop when more than this fraction of the sources has failed.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
def embed(
    source: str,
    store: str,
    catalogue: str | None,
    backbone: str,
    runtime: str,
    scheduler: str | None,
    workers: int | None,
    batch: int,
    crop: float | None,
    bands: tuple[str, ...],
    min_coverage: float,
    carry: tuple[str, ...],
    column: tuple[str, ...],
    retry_failed: bool,
    max_failures: float | None,
    quiet: bool,
) -> None:
    """Embed every source of SOURCE into a store.

    SOURCE is a folder of FITS cutouts, a folder of JPEG or PNG pictures, or a tree of Legacy Surveys
    bricks, which needs a --catalogue. Sources that the store has already are left alone: run the same
    command again to go on after a stop.
    """
    from catalogue_jobs import run
    from galembed.backbones import BUILTIN, load_backbone
    from galembed.sources import open_source

    chosen = load_backbone(backbone)
    reader = open_source(
        source,
        catalogue=catalogue,
        crop=crop,
        bands=_pairs(bands, "--bands", ("blue", "green", "red")) or None,
        min_coverage=min_coverage,
        carry=carry,
        columns=_pairs(column, "--column", ("id", "ra", "dec", "size")),
    )
    if backbone == BUILTIN:
        click.echo(f"built-in backbone {chosen.name} (embedding_id {chosen.embedding_id[:12]})", err=True)
    try:
        report = run.embed(
            reader,
            store,
            backbone=chosen,
            runtime=runtime,
            scheduler=scheduler,
            workers=workers,
            batch=batch,
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


def _pairs(options: tuple[str, ...], name: str, allowed: tuple[str, ...]) -> dict[str, str]:
    """Return ``KEY=VALUE`` options as a mapping."""
    pairs = dict(option.partition("=")[::2] for option in options)
    for key, value in pairs.items():
        if key not in allowed or not value:
            raise click.BadParameter(
                f"{key}={value}: write one of {', '.join(allowed)}, an = sign and a name", param_hint=name
            )
    return pairs
