"""The `galembed bench` command."""

from __future__ import annotations

from pathlib import Path

import click

from galembed.options import parse_batch


@click.command()
@click.argument("backbone", default="builtin")
@click.option(
    "--batch",
    default="1,8,32",
    metavar="N,N,...",
    show_default=True,
    help="Images per call, by commas; auto is each method's best.",
)
@click.option("--threads", type=click.IntRange(min=1), help="Of every method.  [default: all cores]")
@click.option("--seconds", default=1.0, show_default=True, help="Of each measurement.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Turns that all methods take.")
@click.option("--only", multiple=True, metavar="NAME", help="Methods whose name begins so; repeatable.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for a page, all numbers as JSON, and a plot.")
def bench(
    backbone: str,
    batch: str,
    threads: int | None,
    seconds: float,
    rounds: int,
    only: tuple[str, ...],
    out: Path | None,
) -> None:
    """Measure how fast BACKBONE's engines are on this machine, beside torch and what the hardware allows.

    Every engine runs on every runtime that takes it, each in a process of its own and all in turn. What cannot run
    here is listed with the reason.
    """
    from galembed.backbones import load_backbone
    from galembed.bench.pages import report_text, write_report
    from galembed.bench.run import bench as measure

    report = measure(
        load_backbone(backbone),
        batches=[parse_batch(item, "--batch") for item in batch.split(",")],
        threads=threads or 0,
        seconds=seconds,
        rounds=rounds,
        only=only,
        tell=lambda line: click.echo(line, err=True),
    )
    click.echo(report_text(report))
    if out is not None:
        click.echo("written    " + ", ".join(map(str, write_report(report, out))))
