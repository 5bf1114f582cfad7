"""The README's script, run as it stands on a small simulated survey, and its commands held to those that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from galembed.backbones import Backbone
from galembed.cli import COMMANDS, main
from training.simulation.layout import brick_grid

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")


def test_every_command_is_in_the_readme_and_the_readme_has_no_other() -> None:
    written = set(re.findall(r"^    galembed ([\w-]+)", README, flags=re.MULTILINE))
    assert written == set(COMMANDS)


def test_the_sources_that_the_readme_names_are_of_the_simulated_brick() -> None:
    ids = set(re.findall(r"9999-\d+-\d+", README))
    assert {name.split("-")[1] for name in ids} == {str(brick_grid(1)[0].brick_id)}


@pytest.mark.slow
def test_the_script_in_the_readme_runs(
    tiny_backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in (
        ["simulate", "survey", "--brick-size", "700", "--sources", "40", "--cutouts", "0", "--workers", "1"],
        [
            *("embed", "survey", "--catalogue", "survey/sources.fits", "--store", "galaxies.lance"),
            *("--workers", "1", "--backbone", str(tiny_backbone.path), "--quiet"),
        ],
    ):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
    script = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)[0]
    exec(compile(script, "README.md", "exec"), {})
    assert (tmp_path / "like_this_one.fits").exists()
    assert (tmp_path / "like_this_one.png").stat().st_size > 1000
    assert "similarity" in capsys.readouterr().out
