"""The near end of a worker: starts it, asks, and says how it ended."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import IO, Any, Final

from galembed.errors import BadRequest

_THREADS: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_PATIENCE: Final = 10


class CannotRun(BadRequest):
    """A method cannot do on this machine what it was asked for."""

    reason = "cannot_run"


class Process:
    """A running `galembed.bench.worker`, which works only while it is asked something.

    Parameters
    ----------
    process : Popen
    errors : file
        Where its stderr goes.
    """

    def __init__(self, process: subprocess.Popen[str], errors: IO[bytes]) -> None:
        self._process = process
        self._errors = errors

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Have a method of `galembed.bench.worker.Worker` called, and return its result.

        Raises
        ------
        CannotRun
            If it says so, or ends instead.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do} | request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise CannotRun(f"its process ended with exit code {self._process.wait()}{self._last_words()}")
        result: dict[str, Any] = json.loads(line)
        if "fault" in result:
            raise CannotRun(result["fault"])
        return result

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f": {lines[-1]}" if lines else ""


@contextlib.contextmanager
def started(threads: int) -> Iterator[Process]:
    """Yield a fresh process, and end it.

    Parameters
    ----------
    threads : int
        For every library in it.
    """
    command = [sys.executable, "-m", "galembed.bench.worker"]
    settings = os.environ | dict.fromkeys(_THREADS, str(threads))
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, text=True, env=settings) as process,
    ):
        try:
            yield Process(process, errors)
        finally:
            _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
