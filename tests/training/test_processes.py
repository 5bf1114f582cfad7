"""Pools of processes that end with their caller."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from galembed.errors import BadRequest
from training.processes import process_pool

KILLED = """
import os, signal
from training.processes import process_pool

if __name__ == "__main__":
    with process_pool(1, "nothing") as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_process_ends_when_its_caller_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "caller.py"
    script.write_text(KILLED)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    said = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert said.returncode == -signal.SIGKILL, said.stderr
    process = int(said.stdout)
    for _ in range(300):
        if not _runs(process):
            return
        time.sleep(0.1)
    raise AssertionError(f"process {process} runs on")


def test_a_killed_process_is_told_with_what_is_kept() -> None:
    with (
        pytest.raises(BadRequest, match=r"a process was killed.*fewer --workers: all that was made is kept"),
        process_pool(1, "all that was made is kept") as pool,
    ):
        pool.submit(os._exit, 1).result()
