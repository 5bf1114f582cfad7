"""The command as a whole."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from galembed.cli import COMMANDS, main
from galembed.errors import StoreBusy


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    result = CliRunner().invoke(main, [name, "--help"])
    assert result.exit_code == 0
    assert len(result.output.splitlines()) > 3


def test_a_library_error_is_one_line_and_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    def broken() -> None:
        raise StoreBusy("the store is in use; wait")

    monkeypatch.setattr(main, "get_command", lambda ctx, name: broken)
    result = CliRunner().invoke(main, ["status"])
    assert result.exit_code == 1
    assert result.output == "Error: the store is in use; wait\n"


def test_a_usage_error_is_exit_code_2() -> None:
    assert CliRunner().invoke(main, ["embed"]).exit_code == 2
    assert CliRunner().invoke(main, ["unheard-of"]).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["status", "nowhere.lance"], "galembed embed"),
        (["export", "nowhere"], "galembed train"),
        (["embed", "nowhere", "--store", "x.lance"], "does not exist"),
        (["train", "nowhere", "--out", "b"], "--votes"),
    ],
)
def test_a_missing_input_is_one_sentence_with_what_to_do(
    arguments: list[str], message: str, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(str(tmp_path))
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert len(result.output.strip().splitlines()) == 1
    assert message in result.output
