"""The `galembed` command: a group that loads a command's room when it is called, and one door for errors."""

from __future__ import annotations

import importlib
from typing import Any, Final

import click

from galembed import __version__
from galembed.errors import GalembedError

COMMANDS: Final = {
    "simulate": ("training.commands.simulate", "Simulate a small survey: bricks, cutouts, catalogue and votes."),
    "train": ("training.commands.train", "Train a backbone on volunteers' votes."),
    "evaluate": ("training.commands.evaluate", "Score a backbone on volunteers' votes, with volunteers beside it."),
    "backbone": (
        "training.commands.backbone",
        "Import published weights, look at a backbone, prepare one for publishing.",
    ),
    "finetune": ("training.commands.finetune", "Teach a backbone to answer your own labels."),
    "study": ("training.commands.study", "Measure what data, size, weights and labels are worth, with error bars."),
    "export": ("export.commands", "Compile a backbone to ONNX and prove it equal."),
    "bench": ("galembed.bench.command", "Measure how fast a backbone's engines are on this machine."),
    "questions": ("galembed.commands", "List Galaxy Zoo's questions by campaign, or draw one campaign's."),
    "surveys": ("galembed.commands", "List the surveys that are read, and where each number is from."),
    "look": ("galembed.commands", "Draw a sample of a survey as the backbone will see it."),
    "embed": ("catalogue_jobs.commands", "Embed every source of a survey into a store."),
    "index": ("galembed.commands", "Build a store's search indexes."),
    "search": ("galembed.commands", "Find the galaxies that look alike."),
    "novel": ("galembed.explore_commands", "List the sources that look like few others."),
    "duplicates": ("galembed.explore_commands", "Find objects that are in a store more than once."),
    "map": ("galembed.explore_commands", "Draw a store as a map: like beside like."),
    "probe": ("galembed.probe_commands", "Learn classes, numbers or votes from a few labels, for a whole store."),
    "import": ("galembed.published.commands", "Make a store of published embeddings."),
    "export-parquet": ("galembed.published.commands", "Write a store as Parquet files, to publish."),
    "migrate": ("galembed.migrate_command", "Move a store to another backbone, probes and all."),
    "export-hats": ("galembed.hats.command", "Write a store as a HATS catalogue, for lsdb."),
    "compact": ("galembed.commands", "Merge a store's small files and remove its old versions."),
    "rollback": ("galembed.commands", "List a store's versions, or go back to one."),
    "status": ("galembed.commands", "Say what a store holds."),
}
"""Name of each command, the module that has it, and its line in the help; kept here so that help loads nothing."""


class LazyGroup(click.Group):
    """Loads a command's module when it is called, and turns the library's errors into one line and exit code 1."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order of a survey's work."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command, or None if there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(COMMANDS[cmd_name][0])
        command = getattr(module, cmd_name.replace("-", "_"), None) or getattr(module, f"{cmd_name}_command")
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; see the class."""
        try:
            return super().invoke(ctx)
        except GalembedError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="galembed")
def main() -> None:
    """Galaxy morphology at catalogue scale: train, export, embed, search."""
