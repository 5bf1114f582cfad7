"""The worked example, run as it stands on a small simulated survey, and shown in the docs as it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

import galembed
from galembed.backbones import Backbone
from galembed.cli import main

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "examples" / "lookalikes.py"


@pytest.mark.slow
def test_the_worked_example_runs(tiny_backbone: Backbone, tmp_path: Path) -> None:
    survey, place, out = tmp_path / "survey", tmp_path / "galaxies.lance", tmp_path / "hits.png"
    for arguments in (
        ["simulate", survey, "--brick-size", "900", "--sources", "120", "--cutouts", "0", "--workers", "1"],
        [
            *("embed", survey, "--catalogue", survey / "sources.fits", "--store", place),
            *("--workers", "1", "--backbone", tiny_backbone.path, "--quiet"),
        ],
    ):
        result = CliRunner().invoke(main, list(map(str, arguments)))
        assert result.exit_code == 0, result.output
    store = galembed.open(place)
    brightest = min((row for batch in store.batches(["ra", "dec", "mag_r"]) for row in batch.to_pylist()), key=by_light)
    arguments = [place, survey / "truth.parquet", brightest["ra"], brightest["dec"], out]
    ran = subprocess.run(
        [sys.executable, "-W", "error", SCRIPT, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT
    )
    assert ran.returncode == 0, ran.stderr
    assert "balanced accuracy 0." in ran.stdout
    assert "of the hits" in ran.stdout
    with Image.open(out) as picture:
        assert picture.size == (600, 400)


def by_light(row: dict[str, float]) -> float:
    return row["mag_r"]


def test_the_docs_show_the_worked_example_as_it_is() -> None:
    page = (ROOT / "docs" / "worked-example.md").read_text(encoding="utf-8")
    assert f"```python\n{SCRIPT.read_text(encoding='utf-8')}```" in page
