"""`galembed study`, as people run it, and killed in the middle."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from galembed.cli import main
from training.simulation import simulate_survey

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*LeafSpec.*")

DATA = [
    *("--arch", "test_convnext", "--sizes", "8,16", "--seeds", "2", "--size", "32"),
    *("--epochs", "2", "--batch", "8"),
]


@pytest.fixture(scope="module")
def survey(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("survey")
    simulate_survey(root, bricks=0, cutouts=70, seed=5, workers=1)
    return root


def results(study: Path) -> dict[str, object]:
    return {file.name: json.loads(file.read_text())["result"] for file in (study / "cells").glob("*.json")}


@pytest.mark.slow
def test_a_killed_study_of_data_ends_as_an_unbroken_one(survey: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "galembed", "study", "data", str(survey), *DATA, "--out"]
    process = subprocess.Popen(
        [*command, str(tmp_path / "broken")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    cells, work = tmp_path / "broken" / "cells", tmp_path / "broken" / "work"
    while len(list(cells.glob("*.json"))) < 2 or not any(work.glob("*/last.ckpt")):
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    finished = {file: file.stat().st_mtime_ns for file in cells.glob("*.json")}
    assert len(finished) < 4
    for study in ("broken", "whole"):
        subprocess.run([*command, str(tmp_path / study)], check=True, capture_output=True)
    assert all(file.stat().st_mtime_ns == written for file, written in finished.items())
    assert len(results(tmp_path / "broken")) == 4
    assert results(tmp_path / "broken") == results(tmp_path / "whole")


def test_a_study_of_size_on_a_simulated_survey(survey: Path, tmp_path: Path) -> None:
    options = ["--arch", "test_convnext,test_resnet", "--seeds", "1", "--size", "32", "--epochs", "1", "--batch", "8"]
    command = ["study", "size", str(survey), "--out", str(tmp_path), *options]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert "test_resnet" in (tmp_path / "table.md").read_text()
    again = CliRunner().invoke(main, command)
    assert "4 of 4 cells are there already" in again.output


def test_a_study_of_tasks_with_the_built_in_backbone(pictures: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        main,
        [
            *("study", "downstream", "--out", str(tmp_path), "--task", f"colours={pictures}:colour"),
            *("--init", "scratch", "--init", "simulated=builtin", "--init", f"gone={tmp_path}/x.safetensors"),
            *("--mode", "linear", "--folds", "2", "--workers", "0", "--size", "32"),
        ],
    )
    assert result.exit_code == 0, result.output
    rows = pq.read_table(tmp_path / "table.parquet").to_pylist()
    assert [(row["init"], row["reason"] is None) for row in rows] == [
        ("scratch", True),
        ("simulated", True),
        ("gone", False),
    ]
    assert "no file or folder" in result.output


@pytest.mark.parametrize("text", ["100,a", "0,5", ""])
def test_sizes_that_are_no_numbers_are_said(text: str, tmp_path: Path) -> None:
    command = ["study", "data", "x", "--out", str(tmp_path), "--arch", "test_convnext", "--sizes", text]
    result = CliRunner().invoke(main, command)
    assert result.exit_code != 0


def test_the_command_says_which_sizes_there_could_be(survey: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        main, ["study", "data", str(survey), *DATA[:2], "--sizes", "64,9999", "--out", str(tmp_path), "--size", "32"]
    )
    assert result.exit_code == 1
    assert "sizes must lie between the batch of 64 and the" in result.output


@pytest.mark.parametrize("option", [("--seeds", "0"), ("--folds", "1"), ("--workers", "-1")])
def test_counts_that_make_no_study_are_refused_before_anything_is_read(option: tuple[str, str], tmp_path: Path) -> None:
    command = ["study", "labels", "--out", str(tmp_path), "--task", "a=b:c", "--init", "scratch", *option]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2
    assert f"Invalid value for '{option[0]}'" in result.output
