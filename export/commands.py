"""`galembed export`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("backbone", default="builtin")
@click.option("--verify", type=click.Path(path_type=Path), help="Compare on this folder's or survey's cutouts too.")
@click.option("--catalogue", type=click.Path(path_type=Path), help="Sources of a survey given to --verify.")
def export(backbone: str, verify: Path | None, catalogue: Path | None) -> None:
    """Compile BACKBONE to ONNX, compare it with torch, and install it if they agree."""
    from export.onnx import export_onnx
    from galembed.backbones import load_backbone
    from galembed.sources import open_source

    reader = open_source(verify, catalogue=catalogue) if verify else None
    click.echo(str(export_onnx(load_backbone(backbone), verify=reader)))
