"""`galembed train`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Backbone directory to make.")
@click.option("--votes", type=click.Path(path_type=Path), help="Vote table; SOURCE/votes.parquet unless given.")
@click.option("--catalogue", type=click.Path(path_type=Path), help="Sizes and positions of the images, by id.")
@click.option("--crop", type=float, help="Centre fraction of images whose size is unknown [default: 0.5].")
@click.option(
    "--questions", default="decals_dr5", show_default=True, help="Question tree (`galembed questions`), or a YAML file."
)
@click.option("--arch", "architecture", default="convnext_atto", show_default=True, help="A timm model name.")
@click.option("--size", default=96, show_default=True, help="Pixels on the network's side.")
@click.option("--epochs", default=10, show_default=True)
@click.option("--batch", default=64, show_default=True)
@click.option("--learning-rate", default=1e-3, show_default=True)
@click.option("--coarse", default=0.0, show_default=True, help="Share of the epochs, from the first, at half size.")
@click.option("--max-minutes", default=0.0, help="End the training loop after this long; 0 = no limit.")
@click.option("--seed", default=0, show_default=True)
@click.option("--workers", default=1, show_default=True, help="Processes that read images.")
@click.option("--half", is_flag=True, help="Store the weights as float16.")
@click.option("--name", help="Name written into backbone.json.")
@click.option("--resume", is_flag=True, help="Go on from the last finished epoch of an interrupted run.")
def train(
    source: Path,
    out: Path,
    votes: Path | None,
    catalogue: Path | None,
    crop: float | None,
    questions: str,
    architecture: str,
    size: int,
    epochs: int,
    batch: int,
    learning_rate: float,
    coarse: float,
    max_minutes: float,
    seed: int,
    workers: int,
    half: bool,
    name: str | None,
    resume: bool,
) -> None:
    """Train a backbone on the votes of the images in SOURCE, a folder or what `galembed simulate` made."""
    from training.fit import Recipe
    from training.fit import train as run

    recipe = Recipe(
        questions=questions,
        architecture=architecture,
        size=size,
        epochs=epochs,
        batch=batch,
        learning_rate=learning_rate,
        coarse=coarse,
        max_minutes=max_minutes,
        seed=seed,
    )
    report = run(
        source,
        out,
        recipe,
        votes=votes,
        catalogue=catalogue,
        crop=crop,
        workers=workers,
        half=half,
        name=name,
        resume=resume,
    )
    click.echo(str(report))
