"""`galembed train`."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import click

_MACHINE = ("accelerator", "devices", "compile", "checkpoint_minutes", "quiet")


@click.command()
@click.argument("source")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Backbone directory to make.")
@click.option("--votes", help="Vote table; SOURCE/votes.parquet unless given.")
@click.option("--catalogue", help="Sizes and positions of the images, by id.")
@click.option("--crop", type=float, help="Centre fraction of images whose size is unknown [default: 0.5].")
@click.option(
    "--questions", default="decals_dr5", show_default=True, help="Question tree (`galembed questions`), or a YAML file."
)
@click.option("--arch", "architecture", help="A timm model name [default: convnext_atto, or that of --init].")
@click.option(
    "--init",
    default="",
    help="Weights to start from: a backbone, `builtin`, timm:NAME, hf-hub:OWNER/NAME, a file or a folder.",
)
@click.option("--size", type=int, help="Pixels on the network's side [default: 96, or that of --init].")
@click.option("--radii", type=float, help="Field of view in half-light radii [default: 9, or that of --init].")
@click.option("--mapping", help="Flux mapping [default: legacy_dr2_rgb, or that of --init].")
@click.option("--epochs", default=10, show_default=True)
@click.option("--batch", default=64, show_default=True, help="Images to a step, over all devices and parts.")
@click.option("--accumulate", default=1, show_default=True, help="Parts that a batch is worked through in.")
@click.option("--learning-rate", default=1e-3, show_default=True)
@click.option("--weight-decay", default=0.05, show_default=True)
@click.option("--warmup", default=0.05, show_default=True, help="Share of the run in which the rate rises.")
@click.option(
    "--layer-decay", default=1.0, show_default=True, help="Factor on the rate from each layer to the one before."
)
@click.option("--trained-blocks", type=int, help="Train only the encoder's last N blocks; 0: only the head.")
@click.option("--drop-path", default=0.0, show_default=True, help="Rate of stochastic depth.")
@click.option("--head-dropout", default=0.0, show_default=True)
@click.option("--clip", default=1.0, show_default=True, help="Largest norm of the gradient.")
@click.option("--ema", default=0.999, show_default=True, help="Decay of the average of the weights; 0: none.")
@click.option("--precision", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32", show_default=True)
@click.option("--channels-last", is_flag=True, help="Lay images out channel by channel within a pixel.")
@click.option(
    "--patience", default=0, show_default=True, help="End after N epochs without a lower validation loss; 0: run all."
)
@click.option("--coarse", default=0.0, show_default=True, help="Share of the epochs, from the first, at half size.")
@click.option("--max-minutes", default=0.0, help="End the training loop after this long; 0 = no limit.")
@click.option("--seed", default=0, show_default=True)
@click.option("--split-column", help="Column of the vote table that says train, validation or test.")
@click.option("--validation", default=0.1, show_default=True, help="Share kept for validation, where none is given.")
@click.option("--max-unreadable", default=0.2, show_default=True, help="Share of the images that may be unreadable.")
@click.option("--workers", default=1, show_default=True, help="Processes that read images.")
@click.option("--accelerator", default="auto", show_default=True, help="auto, cpu or gpu.")
@click.option("--devices", default=1, show_default=True, help="Processes that share each batch.")
@click.option("--compile", is_flag=True, help="Compile the encoder: minutes at the start, faster steps.")
@click.option("--checkpoint-minutes", default=5.0, show_default=True, help="A killed run loses at most this much.")
@click.option("--quiet", is_flag=True, help="Show no progress of the epochs.")
@click.option("--half", is_flag=True, help="Store the weights as float16.")
@click.option("--name", help="Name written into backbone.json.")
@click.option("--resume", is_flag=True, help="Insist that there is a checkpoint to go on from.")
@click.option("--restart", is_flag=True, help="Discard the checkpoint of an earlier run.")
def train(
    source: str,
    out: Path,
    votes: str | None,
    catalogue: str | None,
    crop: float | None,
    split_column: str | None,
    validation: float,
    max_unreadable: float,
    workers: int,
    half: bool,
    name: str | None,
    resume: bool,
    restart: bool,
    **settings: Any,
) -> None:
    """Train a backbone on the votes of the images in SOURCE, a folder or what `galembed simulate` made.

    The same command goes on where an earlier one was killed, with the same outcome. Ctrl-C writes the backbone as it
    stands, ends with exit code 130, and the same command goes on from there too.
    """
    from training.data.splits import Shares
    from training.fit import train as run
    from training.recipe import Machine, Recipe

    machine = Machine(**{key: settings.pop(key) for key in _MACHINE})
    report = run(
        source,
        out,
        Recipe(**settings),
        votes=votes,
        catalogue=catalogue,
        crop=crop,
        split_column=split_column,
        shares=Shares(validation=validation),
        max_unreadable=max_unreadable,
        workers=workers,
        half=half,
        name=name,
        machine=machine,
        resume=resume,
        restart=restart,
    )
    click.echo(str(report))
    if report.fitted.interrupted:
        raise SystemExit(128 + signal.SIGINT)
