"""The short form of benchmarks/chaos.py: whole commands killed at random moments."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CHAOS = Path(__file__).resolve().parents[2] / "benchmarks" / "chaos.py"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_commands_killed_at_random_moments_make_the_store_of_one_left_alone(tmp_path: Path) -> None:
    options = ["--work", tmp_path, "--runs", 2, "--cutouts", 100, "--sources", 50, "--scenarios"]
    done = subprocess.run([sys.executable, CHAOS, *map(str, options)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 runs, " in done.stdout
    assert "**0 finding(s)**" in done.stdout
