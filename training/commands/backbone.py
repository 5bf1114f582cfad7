"""`galembed backbone`: import, info, push."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from galembed.options import parse_bands, recognised

if TYPE_CHECKING:
    from galembed.backbones import FieldOfView


@click.group()
def backbone() -> None:
    """Import published weights, look at a backbone, or prepare one for publishing."""


@backbone.command("import")
@click.argument("spec")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Backbone directory to make.")
@click.option("--arch", default="", help="timm's name of the architecture, where a file does not say it.")
@click.option("--size", type=click.IntRange(min=8), help="Pixels on the network's side [default: the weights' own].")
@click.option(
    "--normalisation",
    type=click.Choice(["auto", "config", "none"]),
    default="auto",
    show_default=True,
    help="Of the [0, 1] channels; auto: none for Zoobot's weights, else as their configuration says.",
)
@click.option(
    "--fov", metavar="ARCSEC|RADII:MIN:MAX", help="Side of a cutout [default: as the built-in's, 9 radii, 8 to 120]."
)
@click.option("--mapping", help="Colour mapping for flux [default: legacy_dr2_rgb].")
@click.option("--images", type=click.Path(), help="Images to centre on, as `embed` reads them; simulated ones without.")
@click.option("--catalogue", type=click.Path(), help="Table of the sources in --images.")
@click.option("--crop", type=float, help="Centre fraction kept of an image whose source has no size.")
@click.option("--survey", help="Survey of --images, where it is not recognised.")
@click.option("--bands", multiple=True, metavar="BAND|ROLE=BAND", help="Bands of --images, as in `embed`.")
@click.option("--half", is_flag=True, help="Store the weights as float16.")
@click.option("--name", help="Name written into backbone.json.")
def import_(
    spec: str,
    out: Path,
    arch: str,
    size: int | None,
    normalisation: str,
    fov: str | None,
    mapping: str | None,
    images: str | None,
    catalogue: str | None,
    crop: float | None,
    survey: str | None,
    bands: tuple[str, ...],
    half: bool,
    name: str | None,
) -> None:
    """Make a backbone of SPEC, published weights without a head.

    SPEC is timm:NAME (such as timm:convnext_nano.in12k), hf-hub:OWNER/NAME (such as Zoobot's encoders), a folder in the
    hub's layout, a .safetensors file, a checkpoint of torch, Lightning or Zoobot (.ckpt, .pt, .pth), or a backbone,
    which is copied.
    """
    if images is None and any((catalogue, crop, survey, bands)):
        raise click.UsageError("--catalogue, --crop, --survey and --bands describe --images; give that too")
    from galembed.mappings import named_mapping
    from galembed.progress import stages
    from galembed.sources import open_source
    from training.weights.imports import import_backbone

    reader = None
    if images is not None:
        reader = open_source(images, catalogue=catalogue, crop=crop, survey=survey, bands=parse_bands(bands))
        click.echo(recognised(reader))
    with stages() as show:
        made = import_backbone(
            spec,
            out,
            architecture=arch,
            size=size,
            normalisation=normalisation,
            field_of_view=parse_field(fov) if fov else None,
            mapping=named_mapping(mapping) if mapping else None,
            images=reader,
            name=name,
            half=half,
            workers=None,
            progress=show,
        )
    click.echo(str(made))


@backbone.command("info")
@click.argument("path", metavar="BACKBONE", default="builtin")
@click.option("--json", "as_json", is_flag=True, help="Print all of it as JSON.")
def info(path: str, as_json: bool) -> None:
    """Say what BACKBONE is, a directory or `builtin`: its input, identity, head, engines, and how it was made."""
    from galembed.backbone_pages import backbone_facts, backbone_text
    from galembed.backbones import load_backbone

    opened = load_backbone(path)
    click.echo(json.dumps(backbone_facts(opened), indent=2) if as_json else backbone_text(opened))


@backbone.command("push")
@click.argument("path", metavar="BACKBONE")
@click.option("--to", "folder", required=True, type=click.Path(path_type=Path), help="Folder to write; new or empty.")
@click.option("--licence", default="", help="As the hub spells it (bsd-3-clause, cc-by-nc-sa-4.0); else as on record.")
@click.option("--metrics", type=click.Path(path_type=Path), help="Folder of `galembed evaluate`: tables for the card.")
@click.option("--repo", default="OWNER/NAME", show_default=True, help="Where you will upload it, for the model card.")
def push(path: str, folder: Path, licence: str, metrics: Path | None, repo: str) -> None:
    """Write BACKBONE as a folder for the Hugging Face hub, with a model card. Nothing is uploaded."""
    from galembed.backbones import load_backbone
    from training.weights.hub import push_folder

    push_folder(load_backbone(path), folder, licence_name=licence, metrics=metrics, repository=repo)
    click.echo(
        f"{folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}\n"
        f"read {folder / 'README.md'} through, then: hf upload {repo} {folder}"
    )


def parse_field(text: str) -> FieldOfView:
    """Return a field of view from ``ARCSEC``, a fixed side, or ``RADII:MIN:MAX``, half-light radii within arcsec.

    Raises
    ------
    click.BadParameter
        If it is neither, or not positive and in order.
    """
    from galembed.backbones import FieldOfView

    try:
        values = [float(word) for word in text.split(":")]
    except ValueError:
        values = []
    if len(values) == 1 and 0 < values[0] < math.inf:
        return FieldOfView(0.0, values[0], values[0])
    if len(values) == 3 and values[0] > 0 and 0 < values[1] < values[2] < math.inf:
        return FieldOfView(*values)
    raise click.BadParameter(
        f"{text!r} is neither a side in arcsec nor RADII:MIN:MAX such as 9:8:120", param_hint="--fov"
    )
