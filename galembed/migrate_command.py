"""The `galembed migrate` command."""

from __future__ import annotations

from pathlib import Path

import click

_FILE = click.Path(path_type=Path)


@click.command()
@click.argument("old")
@click.argument("new")
@click.option("--probe", "probes", multiple=True, type=_FILE, help="Probe of OLD to fit again on NEW; repeatable.")
@click.option("--out", "outs", multiple=True, type=_FILE, help="Folder for the new probe; one for each --probe.")
@click.option("--report", type=_FILE, help="Write the comparison here, in Markdown.")
@click.option("--switch", is_flag=True, help="Then put NEW in OLD's place, and keep OLD beside it.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sources whose neighbours are compared.")
def migrate(
    old: str, new: str, probes: tuple[Path, ...], outs: tuple[Path, ...], report: Path | None, switch: bool, seed: int
) -> None:
    """Move from store OLD to store NEW, which holds the same sources by another backbone.

    NEW is made beside OLD by `galembed embed` of the same sources. Every source of OLD must be settled in NEW. The
    nearest neighbours are compared, and probes fitted again from the labels they keep. Stopped while it switches, the
    same command finishes.
    """
    from galembed.migration import compare_stores, finish_switch, switch_stores
    from galembed.tables import write_text

    if len(probes) != len(outs):
        raise click.UsageError(f"give one --out for each --probe; got {len(probes)} and {len(outs)}")
    if switch and (done := finish_switch(old, new)) is not None:
        click.echo(done)
        return
    text = str(compare_stores(old, new, list(zip(probes, outs, strict=True)), seed=seed))
    click.echo(text)
    write_text(text, report)
    if switch:
        click.echo(switch_stores(old, new))
