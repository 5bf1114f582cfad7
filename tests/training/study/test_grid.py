"""Cells run once, whatever happens to the study that runs them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from galembed.errors import ArtifactNotFound
from training.study.grid import Cell, run_grid

CELLS = [Cell({"number": number}) for number in range(4)]

SLOW = """
import sys, time
from pathlib import Path
from training.study.grid import Cell, run_grid

def run(cell, work):
    with open(sys.argv[2], "a") as log:
        log.write(f"{cell.parameters['number']} {(work / 'half').exists()}\\n")
    (work / "half").touch()
    time.sleep(float(sys.argv[3]))
    return {"square": cell.parameters["number"] ** 2}

run_grid([Cell({"number": n}) for n in range(4)], run, Path(sys.argv[1]), tell=print, about=str)
"""


def squares(cell: Cell, work: Path) -> Mapping[str, Any]:
    assert work.is_dir()
    return {"square": cell.parameters["number"] ** 2}


def name(cell: Cell) -> str:
    return f"number {cell.parameters['number']}"


def test_results_come_in_the_order_of_the_cells(tmp_path: Path) -> None:
    lines: list[str] = []
    found = run_grid(CELLS, squares, tmp_path, tell=lines.append, about=name)
    assert [outcome.result for outcome in found] == [{"square": n * n} for n in range(4)]
    assert lines[0] == "[1/4] number 0: 0 s; less than a minute left"
    assert lines[-1] == "[4/4] number 3: 0 s"
    assert not list((tmp_path / "work").iterdir())


def test_a_second_run_does_only_what_is_missing(tmp_path: Path) -> None:
    run_grid(CELLS[:2], squares, tmp_path, tell=len, about=name)
    ran: list[int] = []

    def counted(cell: Cell, work: Path) -> Mapping[str, Any]:
        ran.append(cell.parameters["number"])
        return squares(cell, work)

    again = run_grid(CELLS, counted, tmp_path, tell=len, about=name)
    assert ran == [2, 3]
    assert len(again) == 4


def test_the_key_follows_from_the_parameters_not_from_their_order() -> None:
    assert Cell({"a": 1, "b": [2.0]}).key == Cell({"b": [2.0], "a": 1}).key != Cell({"a": 1, "b": [2.5]}).key


def test_a_cell_that_cannot_be_run_leaves_a_reason_and_is_tried_again(tmp_path: Path) -> None:
    def missing(cell: Cell, work: Path) -> Mapping[str, Any]:
        if cell.parameters["number"] == 1:
            raise ArtifactNotFound("no such weights")
        return squares(cell, work)

    found = run_grid(CELLS, missing, tmp_path, tell=len, about=name)
    assert [outcome.reason for outcome in found] == ["", "no such weights", "", ""]
    assert all(outcome.result for outcome in run_grid(CELLS, squares, tmp_path, tell=len, about=name))


def test_a_killed_study_goes_on_and_ends_where_an_unbroken_one_does(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def command(seconds: float) -> list[str]:
        return [sys.executable, "-c", SLOW, str(tmp_path / "broken"), str(log), str(seconds)]

    process = subprocess.Popen(command(0.3), stdout=subprocess.DEVNULL)
    while not log.exists() or len(log.read_text().splitlines()) < 3:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run(command(0.0), check=True, stdout=subprocess.DEVNULL)
    # Number 2 was killed in the middle and found its folder again; 0 and 1 were not run a second time.
    assert log.read_text().splitlines() == ["0 False", "1 False", "2 False", "2 True", "3 False"]
    run_grid(CELLS, squares, tmp_path / "whole", tell=len, about=name)

    def results(study: str) -> dict[str, Any]:
        return {file.name: json.loads(file.read_text())["result"] for file in (tmp_path / study / "cells").iterdir()}

    assert results("broken") == results("whole")


def test_two_studies_do_not_share_a_folder(tmp_path: Path) -> None:
    def nested(cell: Cell, work: Path) -> Mapping[str, Any]:
        return {"inner": len(run_grid(CELLS, squares, tmp_path, tell=len, about=name))}

    outer = run_grid(CELLS[:1], nested, tmp_path, tell=len, about=name)
    assert "another study is running in" in outer[0].reason
    assert all(outcome.result for outcome in run_grid(CELLS, squares, tmp_path, tell=len, about=name))


def test_an_error_that_is_a_bug_is_not_hidden(tmp_path: Path) -> None:
    def broken(cell: Cell, work: Path) -> Mapping[str, Any]:
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError, match="a bug"):
        run_grid(CELLS, broken, tmp_path, tell=len, about=name)


def test_an_interrupted_study_says_that_it_goes_on(tmp_path: Path) -> None:
    lines: list[str] = []

    def interrupted(cell: Cell, work: Path) -> Mapping[str, Any]:
        if cell.parameters["number"] == 2:
            raise KeyboardInterrupt
        return squares(cell, work)

    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        run_grid(CELLS, interrupted, tmp_path, tell=lines.append, about=name)
    assert lines[-1] == "stopped in number 2; the same command goes on"
    assert len(list((tmp_path / "cells").iterdir())) == 2
