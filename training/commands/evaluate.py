"""`galembed evaluate`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("backbone")
@click.argument("source")
@click.option(
    "--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder for the tables and plots."
)
@click.option("--votes", type=click.Path(path_type=Path), help="Vote table; SOURCE/votes.parquet unless given.")
@click.option("--column", help="Column of labels, for a head of `galembed finetune`; of --votes unless SOURCE has it.")
@click.option("--catalogue", type=click.Path(path_type=Path), help="Sizes and positions of the images, by id.")
@click.option("--crop", type=float, help="Centre fraction of images whose size is unknown [default: 0.5].")
@click.option(
    "--split",
    type=click.Choice(["validation", "test", "all"]),
    help="What `galembed train` keeps from training, or all if it never saw SOURCE [default: validation; labels: all].",
)
@click.option("--split-column", help="Column of the votes that says train, validation or test [default: as trained].")
@click.option("--validation", type=float, help="Share that training kept for validation [default: as trained].")
@click.option(
    "--least-votes",
    type=click.IntRange(min=1),
    default=20,
    show_default=True,
    help="Votes that a galaxy needs to be compared.",
)
@click.option("--workers", type=click.IntRange(min=0), default=1, show_default=True, help="Processes that read images.")
def evaluate(
    backbone: str,
    source: str,
    out: Path,
    votes: Path | None,
    column: str | None,
    catalogue: Path | None,
    crop: float | None,
    split: str | None,
    split_column: str | None,
    validation: float | None,
    least_votes: int,
    workers: int,
) -> None:
    """Score BACKBONE, a folder or `builtin`, on the votes of the images in SOURCE, question by question."""
    from training.scores.evaluation import evaluate as run

    result = run(
        backbone,
        source,
        votes=votes,
        column=column,
        catalogue=catalogue,
        crop=crop,
        split=split,
        split_column=split_column,
        validation=validation,
        least=least_votes,
        workers=workers,
    )
    files = result.save(out)
    click.echo(result.to_markdown())
    click.echo(f"{out}: {', '.join(file.name for file in files)}")
