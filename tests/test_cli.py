"""The command as a whole."""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from galembed.backbones import Backbone, save_backbone
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
        (["train", "nowhere", "--out", "b"], "does not exist"),
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


def write_pictures(folder: Path, count: int = 3) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(folder / f"J{i}.png")
    return folder


def embed(folder: Path, store: Path, backbone: Path, *more: str) -> Result:
    arguments = ["embed", folder, "--store", store, "--backbone", backbone, "--workers", "1", "--quiet", *more]
    return CliRunner().invoke(main, list(map(str, arguments)))


def one_error(result: Result) -> str:
    assert result.exit_code == 1, result.output
    errors = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, result.output
    return errors[0]


@pytest.mark.slow
def test_what_can_go_wrong_with_a_store_is_one_sentence_each(tiny_backbone: Backbone, tmp_path: Path) -> None:
    folder, store = write_pictures(tmp_path / "pictures"), tmp_path / "s.lance"
    result = embed(folder, store, tiny_backbone.path)
    assert result.exit_code == 0, result.output
    assert "embedded 3 of 3 sources" in result.output
    assert "nothing to do: 3 of 3" in embed(folder, store, tiny_backbone.path).output

    other = save_backbone(
        tmp_path / "other",
        name="other",
        architecture=tiny_backbone.architecture,
        architecture_args={},
        contract=tiny_backbone.contract,
        questions=tiny_backbone.questions,
        weights=tiny_backbone.weights() | {"centring_mean": np.ones(tiny_backbone.dim, np.float32)},
        samples=tiny_backbone.samples(),
        provenance={},
    )
    assert "made with embedding_id" in one_error(embed(folder, store, other.path))
    assert "made with crop 0.5, this run has 0.8" in one_error(
        embed(folder, store, tiny_backbone.path, "--crop", "0.8")
    )
    search = CliRunner().invoke(main, ["search", str(store), "--id", "J1", "--where", "magr < 19"])
    assert "the store has no column 'magr'" in one_error(search)
    assert "J9" in one_error(CliRunner().invoke(main, ["search", str(store), "--id", "J9"]))


@pytest.mark.slow
def test_a_job_goes_on_after_a_compaction_and_after_a_rollback(tiny_backbone: Backbone, tmp_path: Path) -> None:
    folder, store = write_pictures(tmp_path / "pictures", 2), tmp_path / "s.lance"
    embed(folder, store, tiny_backbone.path)
    (folder / "J1.png").rename(folder / "J2.png")
    assert "embedded 1 of 1 sources" in embed(folder, store, tiny_backbone.path).output
    assert CliRunner().invoke(main, ["compact", str(store)]).exit_code == 0
    assert "nothing to do: 2 of 2" in embed(folder, store, tiny_backbone.path).output
    back = CliRunner().invoke(main, ["rollback", str(store), "2"])
    assert "taken away: 1 row(s), among them" in back.output
    assert "embedded 1 of 1 sources" in embed(folder, store, tiny_backbone.path).output
    assert "nothing to do: 2 of 2" in embed(folder, store, tiny_backbone.path).output
    checked = CliRunner().invoke(main, ["status", str(store), "--verify"])
    assert checked.exit_code == 0, checked.output


def test_an_empty_folder_and_an_unreadable_catalogue_are_one_sentence_each(
    tiny_backbone: Backbone, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    result = embed(tmp_path / "empty", tmp_path / "s.lance", tiny_backbone.path)
    assert "nothing to embed" in one_error(result)
    folder = write_pictures(tmp_path / "pictures")
    (tmp_path / "c.fits").write_text("not a table")
    result = embed(folder, tmp_path / "s.lance", tiny_backbone.path, "--catalogue", str(tmp_path / "c.fits"))
    assert "cannot be read as a table" in one_error(result)
    assert not (tmp_path / "s.lance").exists()
