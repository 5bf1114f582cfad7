"""`galembed study data|size|downstream|labels`."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import click

_Command = TypeVar("_Command", bound=Callable[..., Any])
_RECIPE = ("size", "epochs", "batch", "learning_rate", "patience", "precision")
_COUNT = click.IntRange(1)
_GOES_ON = "The same command goes on where it was stopped or killed, and does only what is missing."


def _with(*options: Callable[[Any], Any]) -> Callable[[_Command], _Command]:
    return lambda command: reduce(lambda inner, option: option(inner), reversed(options), command)


def _recipe_options(epochs: int, epochs_help: str, batch: int, rate: float, patience: int) -> Callable[[Any], Any]:
    return _with(
        click.option("--size", type=int, help="Pixels on the network's side [default: the weights' own, else 96]."),
        click.option("--epochs", default=epochs, show_default=True, help=epochs_help),
        click.option("--batch", default=batch, show_default=True, help="Images to a step."),
        click.option("--learning-rate", default=rate, show_default=True),
        click.option(
            "--patience", default=patience, show_default=True, help="End after N epochs without a better validation."
        ),
        click.option("--precision", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32", show_default=True),
        click.option(
            "--workers", default=1, show_default=True, type=click.IntRange(0), help="Processes that read images."
        ),
    )


_OUT = click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the study.")

_scaling = _with(
    click.argument("source"),
    _OUT,
    click.option(
        "--arch",
        "architectures",
        required=True,
        help="timm model names, by commas; timm:NAME or hf-hub:OWNER/NAME starts from published weights.",
    ),
    click.option("--seeds", default=3, show_default=True, type=_COUNT, help="Trainings of each kind."),
    click.option("--votes", help="Vote table; SOURCE/votes.parquet unless given."),
    click.option("--catalogue", help="Sizes and positions of the images, by id."),
    click.option("--crop", type=float, help="Centre fraction of images whose size is unknown [default: 0.5]."),
    click.option("--split-column", help="Column of the vote table that says train, validation or test."),
    click.option("--questions", default="decals_dr5", show_default=True, help="Question tree, or a YAML file."),
    _recipe_options(10, "Passes over the largest part; all have the same steps.", 64, 1e-3, 3),
)

_transfer = _with(
    _OUT,
    click.option("--task", "task_options", multiple=True, metavar="NAME=PATH:COLUMN", help="Labelled pictures."),
    click.option("--tasks", "task_file", type=click.Path(path_type=Path), help="The same, more of it, as TOML."),
    click.option(
        "--init",
        "inits",
        multiple=True,
        required=True,
        metavar="[NAME=]SPEC",
        help="scratch, builtin, a backbone, timm:NAME or hf-hub:OWNER/NAME; others are compared with the first.",
    ),
    click.option("--mode", "modes", multiple=True, type=click.Choice(["linear", "end-to-end"]), help="[default: both]"),
    click.option(
        "--folds",
        default=5,
        show_default=True,
        type=click.IntRange(2),
        help="Parts, each predicted by what the others taught.",
    ),
    click.option("--seeds", default=1, show_default=True, type=_COUNT, help="Each with folds of its own."),
    click.option("--arch", "architecture", help="Of scratch [default: that of the first other start]."),
    _recipe_options(30, "Of end-to-end training, at most.", 32, 1e-4, 6),
)


@click.group()
def study() -> None:
    """Train on a grid, with seeds and error bars: loss against data or size, downstream tasks, few labels."""


@study.command(epilog=_GOES_ON)
@_scaling
@click.option("--sizes", required=True, help="Numbers of labelled galaxies, by commas, such as 250,500,1000.")
def data(source: str, out: Path, architectures: str, seeds: int, sizes: str, **settings: Any) -> None:
    """Measure how test loss falls with labelled galaxies, and fit power laws."""
    from training.study.data import study_data

    galaxies, recipe = _galaxies(source, out, settings)
    text = study_data(
        galaxies,
        recipe,
        out,
        architectures=architectures.split(","),
        sizes=parse_counts(sizes, "--sizes"),
        seeds=seeds,
        tell=_tell,
    )
    click.echo(f"\n{text}\n{out}: table.md, table.parquet, fits.json, plot.png, questions.png")


@study.command(epilog=_GOES_ON)
@_scaling
@click.option("--galaxies", "used", type=_COUNT, help="How many count as all [default: those there are].")
def size(source: str, out: Path, architectures: str, seeds: int, used: int | None, **settings: Any) -> None:
    """Measure how test loss falls with parameters, with all the galaxies and with a quarter of them."""
    from training.study.size import study_size

    galaxies, recipe = _galaxies(source, out, settings)
    text = study_size(
        galaxies, recipe, out, architectures=architectures.split(","), seeds=seeds, galaxies_used=used, tell=_tell
    )
    click.echo(f"\n{text}\n{out}: table.md, table.parquet, fits.json, plot.png, questions.png")


@study.command(epilog=_GOES_ON)
@_transfer
def downstream(out: Path, modes: tuple[str, ...], folds: int, seeds: int, **settings: Any) -> None:
    """Measure errors on tasks of your own by the weights that learning starts from."""
    from training.study.downstream import study_downstream
    from training.study.transfer import MODES

    tasks, starts, missing, workers = _transfers(settings)
    text = study_downstream(
        tasks,
        starts,
        missing,
        out,
        modes=modes or MODES,
        folds=folds,
        seeds=seeds,
        workers=workers,
        tell=_tell,
    )
    click.echo(f"\n{text}\n{out}: table.md, table.parquet, fits.json, plot.png")


@study.command(epilog=_GOES_ON)
@_transfer
@click.option("--divisors", default="1,2,4,8,16,32,64", show_default=True, help="One in so many labels is kept.")
def labels(out: Path, modes: tuple[str, ...], folds: int, seeds: int, divisors: str, **settings: Any) -> None:
    """Measure errors on tasks of your own as labels are taken away."""
    from training.study.labels import study_labels
    from training.study.transfer import MODES

    tasks, starts, missing, workers = _transfers(settings)
    text = study_labels(
        tasks,
        starts,
        missing,
        out,
        modes=modes or MODES,
        divisors=parse_counts(divisors, "--divisors"),
        folds=folds,
        seeds=seeds,
        workers=workers,
        tell=_tell,
    )
    click.echo(f"\n{text}\n{out}: table.md, table.parquet, fits.json, plot.png")


def parse_counts(text: str, name: str) -> list[int]:
    """Return whole numbers written with commas between them.

    Raises
    ------
    click.BadParameter
        If one is none, or below 1.
    """
    try:
        counts = [int(word) for word in text.split(",")]
    except ValueError as error:
        raise click.BadParameter(f"{text}: write whole numbers with commas between them", param_hint=name) from error
    if min(counts) < 1:
        raise click.BadParameter(f"{text}: numbers must be 1 or more", param_hint=name)
    return counts


def _tell(line: str) -> None:
    click.echo(line)


def _galaxies(source: str, out: Path, settings: dict[str, Any]) -> tuple[Any, Any]:
    from training.recipe import Recipe
    from training.study.scaling import open_galaxies

    recipe = Recipe(questions=settings.pop("questions"), **{name: settings.pop(name) for name in _RECIPE})
    return open_galaxies(source, recipe, out / "data", **settings), recipe


def _transfers(settings: dict[str, Any]) -> tuple[Any, Any, dict[str, str], int]:
    from dataclasses import replace

    from training.finetune import RECIPE
    from training.study.transfer import open_starts, open_task, parse_tasks

    recipe = replace(RECIPE, architecture=settings["architecture"], **{name: settings[name] for name in _RECIPE})
    tasks = [open_task(source) for source in parse_tasks(settings["task_options"], settings["task_file"])]
    starts, missing = open_starts(settings["inits"], recipe)
    for name, reason in missing.items():
        click.echo(f"{name} is left out: {reason}", err=True)
    return tasks, starts, missing, settings["workers"]
