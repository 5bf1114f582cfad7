"""Dask schedulers and workers as processes of their own, as on a cluster, and a survey small enough for them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lance
from click.testing import CliRunner

from galembed.backbones import Backbone
from galembed.cli import main

PATIENCE = 240
"""Seconds for anything to come about: several such processes share few cores."""


def simulated_cutouts(folder: Path, copies: int) -> tuple[Path, list[str]]:
    """Return a folder of 12 simulated cutouts, each under `copies` names, and their source ids."""
    result = CliRunner().invoke(
        main, ["simulate", str(folder / "survey"), "--bricks", "0", "--cutouts", "12", "--workers", "1"]
    )
    assert result.exit_code == 0, result.output
    (folder / "cutouts").mkdir()
    ids = []
    for file in sorted((folder / "survey" / "cutouts").iterdir()):
        for copy in range(copies):
            ids.append(f"{file.stem}_{copy}")
            os.link(file, folder / "cutouts" / f"{ids[-1]}.fits")
    return folder / "cutouts", sorted(ids)


def embed_locally(survey: Path, store: Path, backbone: Backbone) -> dict[str, list[float]]:
    """Embed without a cluster; return the vectors."""
    result = CliRunner().invoke(
        main, ["embed", str(survey), "--store", str(store), "--backbone", str(backbone.path), "--workers", "1"]
    )
    assert result.exit_code == 0, result.output
    return vectors(store)


def vectors(store: Path) -> dict[str, list[float]]:
    """Return the vector of each source; a source that is there twice is an error."""
    table = lance.dataset(str(store / "embeddings.lance")).to_table(columns=["source_id", "vector"])
    found = dict(zip(table["source_id"].to_pylist(), table["vector"].to_pylist(), strict=True))
    assert len(found) == len(table)
    return found


def job_file(store: Path) -> dict[str, Any]:
    """Return what the last job says of itself."""
    found: dict[str, Any] = json.loads((store / "job.json").read_text())
    return found


def until(true: Callable[[], object], what: str) -> None:
    """Wait until something is true."""
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, f"{what}: not within {PATIENCE} s"
        time.sleep(0.05)


@dataclass
class Process:
    """A command that runs, in a folder of its own; `text` is what it has printed so far."""

    command: list[str]
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "output").open("ab") as output:
            self.popen = subprocess.Popen(
                self.command,
                cwd=self.folder,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1", **self.environment},
            )

    @property
    def text(self) -> str:
        return (self.folder / "output").read_text(errors="replace")

    def printed(self, pattern: str) -> str:
        """Wait for a line; return its first group."""
        until(lambda: re.search(pattern, self.text) or self.popen.poll() is not None, pattern)
        found = re.search(pattern, self.text)
        assert found is not None, self.text
        return found[1]

    def ended(self) -> int:
        """Wait for the end; return the exit code."""
        try:
            return self.popen.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.command} does not end:\n{self.text}") from None

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.popen.send_signal(signal.SIGKILL)
        self.popen.wait()


@dataclass
class Cluster:
    """A scheduler and workers of one thread each, without nannies: a worker that is killed stays away."""

    folder: Path
    scheduler: Process
    address: str
    workers: list[Process]
    dashboards: list[str]
    clients: list[Process] = field(default_factory=list)

    def embedded(self, worker: int) -> int:
        """Return how many sources a worker says on its `/metrics` that it has embedded."""
        with urllib.request.urlopen(f"{self.dashboards[worker]}/metrics") as answer:
            text = answer.read().decode()
        found = re.search(r'^galembed_sources_total\{outcome="embedded"\} (\S+)$', text, flags=re.MULTILINE)
        return int(float(found[1])) if found else 0


@contextlib.contextmanager
def cluster(folder: Path, workers: int = 2) -> Iterator[Cluster]:
    """Yield a cluster of processes on this machine; they are gone afterwards."""
    dask = [sys.executable, "-m", "dask"]
    processes: list[Process] = []
    clients: list[Process] = []
    try:
        scheduler = Process(
            [*dask, "scheduler", "--host", "127.0.0.1", "--port", "0", "--dashboard-address", "127.0.0.1:0"],
            folder / "scheduler",
        )
        processes.append(scheduler)
        address = scheduler.printed(r"Scheduler at: +(tcp://\S+)")
        for number in range(workers):
            at = folder / f"worker{number}"
            options = ["--no-nanny", "--nthreads", "1", "--memory-limit", "2GiB", "--dashboard-address", "127.0.0.1:0"]
            local = ["--local-directory", str(at / "scratch"), "--host", "127.0.0.1"]
            processes.append(Process([*dask, "worker", address, *options, *local], at))
        dashboards = ["http://" + worker.printed(r"dashboard at: +(\S+)") for worker in processes[1:]]
        for worker in processes[1:]:
            worker.printed(r"(Registered to)")
        yield Cluster(folder, scheduler, address, processes[1:], dashboards, clients)
    finally:
        for process in (*clients, *processes):
            process.kill()


def embed_on(at: Cluster, survey: Path, store: Path, backbone: Backbone) -> Process:
    """Start the command on a cluster."""
    client = Process(
        [
            *(sys.executable, "-m", "galembed", "embed", str(survey), "--store", str(store)),
            *("--backbone", str(backbone.path), "--scheduler", at.address, "--quiet"),
        ],
        at.folder / "client",
    )
    at.clients.append(client)
    return client
