"""One `galembed embed` command, run to its end or not, and what its store holds then. For chaos.py."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import lance
import numpy as np
from numpy.typing import NDArray
from processes import cpu_seconds, family, kill

import galembed

LEAST_COSINE = 1 - 1e-6
PATIENCE = 600.0
"""Seconds after which a command that has not ended hangs."""

EMBED = (
    "from catalogue_jobs import account; from galembed.cli import main; "
    "assert account.COMMIT_SECONDS; account.COMMIT_SECONDS = 0.0; main()"
)
OWN_FILES = {".lease.lock", "job.json", "embeddings.lance", "failures.lance"}
PHASES = ("starting", "planning", "nothing written", "files, none committed", "between commits", "all committed")
ALONE = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

Key = tuple[str, str]


@dataclass
class Content:
    """What a store holds: a vector of each embedded source, in order of keys; rows of a key more than once are kept."""

    embedded: list[Key]
    vectors: NDArray[np.float32]
    failed: list[Key]
    engines: set[str]


@dataclass
class Job:
    """One command over one survey, and what it makes when it is left alone."""

    name: str
    words: tuple[str, ...]
    environment: dict[str, str]
    alone: Content | None = None
    cpu: float = 0.0

    def start(self, store: Path, log: Path, *extra: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", EMBED, "embed", *self.words, "--store", str(store), "--quiet", *extra]
        with log.open("wb") as stream:
            return subprocess.Popen(command, stdout=stream, stderr=stream, env={**os.environ, **self.environment})


@dataclass
class Tally:
    """What has come of all runs."""

    hits: Counter[tuple[str, str]] = field(default_factory=Counter)
    tries: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    endings: Counter[str] = field(default_factory=Counter)
    spared: int = 0
    late: int = 0
    findings: list[str] = field(default_factory=list)

    def found(self, what: str) -> None:
        self.findings.append(what)
        print(f"FINDING: {what}", file=sys.stderr, flush=True)


def content(store: Path) -> Content:
    opened = galembed.open(store)
    keys, vectors = opened.vectors()
    embedded = [(str(survey), str(name)) for survey, name in zip(keys["survey"], keys["source_id"], strict=True)]
    order = sorted(range(len(embedded)), key=embedded.__getitem__)
    failures = lance.dataset(str(store / "failures.lance")).to_table(columns=["survey", "source_id"])
    engines = {name for batch in opened.batches(["engine"]) for name in batch["engine"].to_pylist()}
    return Content(
        [embedded[at] for at in order],
        vectors[order],
        sorted(zip(failures["survey"].to_pylist(), failures["source_id"].to_pylist(), strict=True)),
        engines,
    )


def differences(store: Path, alone: Content) -> list[str]:
    """Return in words how a store differs from that of a run left alone, and what lies about in it."""
    here = content(store)
    found = []
    for what, keys in (("embeddings", here.embedded), ("failures", here.failed)):
        twice = [key for key, count in Counter(keys).items() if count > 1]
        if twice:
            found.append(f"{len(twice)} source(s) more than once in {what}, such as {twice[0]}")
    for what, keys, wanted in (("embedded", here.embedded, alone.embedded), ("failed", here.failed, alone.failed)):
        if set(keys) != set(wanted):
            found.append(f"{what}: {len(set(wanted) - set(keys))} missing, {len(set(keys) - set(wanted))} too many")
    if here.embedded == alone.embedded:
        cosines = np.einsum("nd,nd->n", here.vectors.astype(np.float64), alone.vectors.astype(np.float64))
        unlike = np.flatnonzero(~(cosines > LEAST_COSINE))
        if len(unlike):
            worst = here.embedded[int(np.nanargmin(cosines))]
            found.append(f"{len(unlike)} vector(s) differ, cosine down to {np.nanmin(cosines):.8f} ({worst})")
    if here.engines != alone.engines:
        found.append(f"engines {sorted(here.engines)}, not {sorted(alone.engines)}")
    return found + left_about(store)


def left_about(store: Path) -> list[str]:
    found = [f"{name} lies in the store" for name in sorted(set(os.listdir(store)) - OWN_FILES)]
    for name in ("embeddings", "failures"):
        dataset = lance.dataset(str(store / f"{name}.lance"))
        known = {
            Path(file.path).name
            for version in dataset.versions()
            for fragment in dataset.checkout_version(version["version"]).get_fragments()
            for file in fragment.data_files()
        }
        folder = store / f"{name}.lance" / "data"
        there = set(os.listdir(folder)) if folder.exists() else set()
        if there != known:
            found.append(f"{name}: {len(there - known)} orphan file(s), {len(known - there)} missing")
    return found


def count(folder: Path) -> int:
    """Return how many files a folder holds; none while it is not there."""
    try:
        return len(os.listdir(folder))
    except OSError:
        return 0


def phase(store: Path, pid: int, total: int) -> str:
    """Return how far the job of a process has come, by what its store holds."""
    with contextlib.suppress(OSError, ValueError):
        if json.loads((store / "lease.json").read_text())["pid"] == pid:
            if not count(store / "failures.lance" / "_versions"):
                return "planning"
            done = lance.dataset(str(store / "embeddings.lance")).count_rows()
            if done:
                return "all committed" if done == total else "between commits"
            return "files, none committed" if count(store / "embeddings.lance" / "data") else "nothing written"
    return "starting"


def settled(job: Job, store: Path, folder: Path, tally: Tally, *extra: str) -> list[str]:
    """Return how a store differs from that of the run left alone.

    A worker without its nanny, or one that slept, may end its task after the job has: the same command cleans up then.
    """
    assert job.alone is not None
    found = differences(store, job.alone)
    if any("orphan" in difference for difference in found):
        tally.late += 1
        run_once(job, store, folder, *extra)
        found = differences(store, job.alone)
    return found


def end_of(process: subprocess.Popen[bytes], log: Path) -> str | None:
    """Wait for a command; return None if it did its work, else its last words."""
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        for pid in family(process.pid):
            kill(pid)
        process.wait()
        return f"hung for {PATIENCE:.0f} s"
    if process.returncode == 0:
        return None
    text = log.read_text(errors="replace").strip()
    traceback = "Traceback: " if "Traceback (most recent call last)" in text else ""
    return traceback + re.sub(r"\d+", "N", text.splitlines()[-1] if text else f"status {process.returncode}")


def run_once(job: Job, store: Path, folder: Path, *extra: str) -> tuple[int, str]:
    """Run the command to its end; return its status and all it says."""
    log = folder / "log"
    process = job.start(store, log, *(extra or ("--workers", "2")))
    process.wait(PATIENCE)
    return process.returncode, log.read_text(errors="replace")


def leave_alone(job: Job, folder: Path) -> None:
    """Find out what a job makes when nothing happens to it, and of how much CPU time."""
    store, log = folder / f"alone-{job.name}", folder / "log"
    shutil.rmtree(store, ignore_errors=True)
    process = job.start(store, log, "--workers", "2")
    while process.poll() is None:
        job.cpu = max(job.cpu, sum(map(cpu_seconds, family(process.pid))))
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(log.read_text(errors="replace"))
    job.alone = content(store)
    for difference in left_about(store):
        raise SystemExit(f"{store}, left alone: {difference}")
