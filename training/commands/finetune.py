"""`galembed finetune`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(epilog="Interrupted beyond the head, the same command goes on where it was.")
@click.argument("backbone")
@click.argument("source")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Backbone directory to make.")
@click.option("--column", help="Column of the labels: text, booleans, integers or floats.")
@click.option("--labels", type=click.Path(path_type=Path), help="Table of labels by id; unless SOURCE has the column.")
@click.option("--questions", help="For votes: a question tree (`galembed questions`), or a YAML file.")
@click.option("--task", type=click.Choice(["classification", "regression", "votes"]), help="Unless told by the labels.")
@click.option("--mode", type=click.Choice(["linear", "blocks", "end-to-end"]), default="linear", show_default=True)
@click.option("--blocks", default=1, show_default=True, help="Last blocks of the encoder that --mode blocks trains.")
@click.option("--folds", type=int, help="Cross-validation for the scores; 0 = a fifth held out [linear: 5, else 0].")
@click.option("--balance/--no-balance", default=True, show_default=True, help="Weigh classes equally.")
@click.option("--epochs", type=int, help="At most, beyond the head [default: 30].")
@click.option("--batch", type=int, help="[default: 32]")
@click.option("--learning-rate", type=float, help="Of the head; less for each layer below [default: 1e-4].")
@click.option("--patience", type=int, help="End after so many epochs that are no better [default: 6].")
@click.option(
    "--flip/--no-flip", default=True, show_default=True, help="Mirror images; not where left and right matter."
)
@click.option("--catalogue", type=click.Path(path_type=Path), help="Sizes and positions of the images, by id.")
@click.option("--crop", type=float, help="Centre fraction of images whose size is unknown [default: 0.5].")
@click.option("--id-column", help="Column of --labels that holds the ids.")
@click.option("--radius", type=float, help="Match --labels by position instead, within so many arcsec.")
@click.option("--restart", is_flag=True, help="Discard what an interrupted run left.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of folds and of training.")
@click.option(
    "--workers",
    default=0,
    show_default=True,
    type=click.IntRange(0),
    help="Processes that read images; 0 reads in this one.",
)
@click.option("--name", help="Name written into backbone.json.")
def finetune(
    backbone: str,
    source: str,
    out: Path,
    column: str | None,
    labels: Path | None,
    questions: str | None,
    task: str | None,
    mode: str,
    blocks: int,
    folds: int | None,
    balance: bool,
    epochs: int | None,
    batch: int | None,
    learning_rate: float | None,
    patience: int | None,
    flip: bool,
    catalogue: Path | None,
    crop: float | None,
    id_column: str | None,
    radius: float | None,
    restart: bool,
    seed: int,
    workers: int,
    name: str | None,
) -> None:
    """Teach BACKBONE (a directory, or `builtin`) to answer labels of the images in SOURCE."""
    from training.data.targets import open_labelled_images
    from training.finetune import finetune as run
    from training.finetune import recipe_with

    labelled = open_labelled_images(
        source,
        column=column,
        labels=labels,
        task=task,
        questions=questions,
        catalogue=catalogue,
        crop=crop,
        id_column=id_column,
        radius=radius,
    )
    click.echo(str(labelled))
    report = run(
        backbone,
        labelled,
        out,
        mode=mode,
        blocks=blocks,
        recipe=recipe_with(epochs=epochs, batch=batch, learning_rate=learning_rate, patience=patience, flip=flip),
        folds=folds,
        balance=balance,
        seed=seed,
        workers=workers,
        restart=restart,
        name=name,
    )
    click.echo(f"\n{report}")
