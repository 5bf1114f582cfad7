"""Kill `galembed embed` at random moments, over and over, and see whether its store is that of a run left alone.

    python benchmarks/chaos.py --runs 100 --work /tmp/chaos

A run embeds a small simulated survey, from tiles or from a folder of cutouts in turn, some of them damaged. In every
second run the workers are the command's own, in the others those of a Dask scheduler of its own. At a random moment
SIGKILL hits the client, which commits; a worker; or a worker's nanny (of local workers the client is that). Half of the
moments are drawn evenly over the job's own CPU time, whatever else the machine does; the others come within 0.1 s of an
event: the lease, the table, a data file, a commit, a failure. The command is repeated until it ends by itself, and hit
again up to twice. Commits, 20 s apart else, follow every partition. Then, beside the run that was left alone:

- every source is in exactly one of the two tables, once, and the same ones failed;
- every vector has a cosine above 1 - 1e-6 with the other run's, by the same engine;
- no file lies about: each data file belongs to a version, and the lease is gone.

The scenarios after that: a disk that fills up or is too small (a tmpfs, if root), a scheduler that is killed, files
that are replaced while the job runs, two jobs on one store, and a job that sleeps while another takes over.
What is not as promised is listed at the end, with the seed that it came from, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import lance
import numpy as np
from numpy.typing import NDArray
from processes import Cluster, alive, cpu_seconds, family, is_worker, kill, random_backbone, spread, table, wait_for
from processes import galembed as command

import galembed

LEAST_COSINE = 1 - 1e-6
MOST_TRIES = 9
PATIENCE = 600.0
"""Seconds after which a command that has not ended hangs."""

EMBED = (
    "from catalogue_jobs import account; from galembed.cli import main; "
    "assert account.COMMIT_SECONDS; account.COMMIT_SECONDS = 0.0; main()"
)
OWN_FILES = {".lease.lock", "job.json", "embeddings.lance", "failures.lance"}
PHASES = ("starting", "planning", "nothing written", "files, none committed", "between commits", "all committed")
SCENARIOS = ("disk", "scheduler", "replaced", "two", "asleep")
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


# --- the store, looked at from outside ---


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


# --- one run ---


def event(store: Path, rng: np.random.Generator) -> tuple[str, Callable[[], bool]]:
    """Return something that will happen to a store, and whether it has."""
    folders = {
        "data file": store / "embeddings.lance" / "data",
        "commit": store / "embeddings.lance" / "_versions",
        "failure": store / "failures.lance" / "_versions",
    }
    what = str(rng.choice(["lease", "table", *folders]))
    if what == "lease":
        return what, (store / "lease.json").exists
    if what == "table":
        return what, folders["commit"].exists
    # The table's first version and its hint are there from the start.
    goal = count(folders[what]) + int(rng.integers(1, 7)) + (2 if what != "data file" else 0)
    return f"{what} {goal}", lambda: count(folders[what]) >= goal


def hit(
    process: subprocess.Popen[bytes], job: Job, store: Path, cluster: Cluster | None, rng: np.random.Generator
) -> tuple[str, str] | None:
    """Kill something at a random moment; return what, and in which phase, or None if the job had ended by then."""
    victim = str(rng.choice(["client", "worker"] if cluster is None else ["client", "worker", "nanny"]))
    assert job.alone is not None
    after = 0.0
    if rng.random() < 0.5:
        members = [process.pid, *(cluster.worker_pids() if cluster else ())]
        before = sum(map(cpu_seconds, members[1:]))
        goal = rng.uniform(0, job.cpu)

        def due() -> bool:
            now = family(process.pid) if cluster is None else members
            return sum(map(cpu_seconds, now)) - before >= goal
    else:
        _, due = event(store, rng)
        after = rng.uniform(0, 0.1)
    while not due():
        if process.poll() is not None:
            return None
        time.sleep(0.003)
    time.sleep(after)
    targets: list[int] = []
    while not targets:
        if process.poll() is not None:
            return None
        if victim == "client":
            targets = [process.pid]
        elif cluster is None:
            targets = [pid for pid in family(process.pid) if is_worker(pid)]
        else:
            targets = cluster.worker_pids() if victim == "worker" else [nanny.pid for nanny in cluster.nannies]
        time.sleep(0.003)
    total = len(job.alone.embedded)
    if victim == "client":
        workers = [pid for pid in family(process.pid) if pid != process.pid]
        kill(process.pid)
        process.wait()
        reached = phase(store, process.pid, total)
        wait_for(lambda: not any(map(alive, workers)), 60, "the workers of a killed client to end")
    else:
        reached = phase(store, process.pid, total)
        kill(targets[int(rng.integers(len(targets)))])
    return victim, reached


def one_run(number: int, job: Job, folder: Path, cluster: Cluster | None, seed: int, tally: Tally) -> bool:
    """Embed into a new store under fire; return whether anything was hit."""
    rng = np.random.default_rng([seed, number])
    name = f"run {number} (seed {seed}, {job.name}, {'a scheduler' if cluster else 'local workers'})"
    store, log = folder / f"store-{number}", folder / "log"
    shutil.rmtree(store, ignore_errors=True)
    extra = ("--scheduler", cluster.address) if cluster else ("--workers", "2")
    hits: list[tuple[str, str]] = []
    most = int(rng.integers(1, 4))
    began = time.monotonic()
    tries = 0
    while tries < MOST_TRIES:
        tries += 1
        process = job.start(store, log, *extra)
        struck = hit(process, job, store, cluster, rng) if len(hits) < most else None
        hits += [struck] if struck else []
        ending = end_of(process, log)
        if cluster is not None:
            cluster.start()
        if ending is None:
            break
        if struck is None or struck[0] != "client":
            tally.endings[ending] += 1
            if "Traceback" in ending or struck is None:
                tally.found(f"{name}: the command ended with {ending!r} after {hits}")
    else:
        tally.found(f"{name}: not done after {tries} tries, hits {hits}")
        return True
    print(f"{name}: {hits}, {tries} tries, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    if not hits:
        tally.spared += 1
        shutil.rmtree(store)
        return False
    found = settled(job, store, folder, tally, *extra)
    for difference in found:
        tally.found(f"{name}: {difference}, after {hits}")
    tally.hits.update(hits)
    tally.tries.append(tries)
    tally.seconds.append(time.monotonic() - began)
    if not found:
        shutil.rmtree(store)
    return True


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


def shoot(jobs: Sequence[Job], work: Path, options: argparse.Namespace, tally: Tally) -> None:
    """Do all runs; those that end before their kill do not count."""
    if not options.runs:
        return
    number = options.first
    with Cluster(work / "dask", environment=ALONE) as cluster:
        while len(tally.tries) < options.runs and number - options.first < 3 * options.runs + 10:
            one_run(number, jobs[number % 2], work, cluster if number // 2 % 2 else None, options.seed, tally)
            number += 1
    if len(tally.tries) < options.runs:
        tally.found(f"only {len(tally.tries)} of {options.runs} runs were hit in {number - options.first} tries")


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


# --- scenarios: each yields what it has to say, and raises nothing that a store may do ---


def full_disk(jobs: Sequence[Job], folder: Path, tally: Tally, rng: np.random.Generator) -> Iterator[str]:
    """A disk that is too small is refused, one that fills up on the way ends the job; the same command goes on."""
    place = folder / "tmpfs"
    place.mkdir(exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", place], capture_output=True, text=True)
    if mounted.returncode:
        yield f"disk full: skipped, no tmpfs can be mounted here ({mounted.stderr.strip()})"
        return
    try:
        for job in jobs:
            assert job.alone is not None
            store, ballast = place / "store", place / "ballast"
            fill(ballast, leave=100_000)
            code, text = run_once(job, store, folder)
            if code == 0 or "need about" not in text:
                tally.found(f"disk, {job.name}: a disk with 100 kB ended with {code}: {text[-300:]}")
            ballast.unlink()
            process = job.start(store, folder / "log", "--workers", "2")
            goal = int(rng.integers(1, 5))
            while process.poll() is None and count(store / "embeddings.lance" / "data") < goal:
                time.sleep(0.003)
            fill(ballast)
            ending = end_of(process, folder / "log")
            filled = count(store / "embeddings.lance" / "data")
            if ending is None:
                tally.found(f"disk, {job.name}: ended well on a full disk")
            elif "Traceback" in ending or not re.search("space|full", ending, re.IGNORECASE):
                tally.found(f"disk, {job.name}: on a full disk it said {ending!r}")
            ballast.unlink()
            code, text = run_once(job, store, folder)
            problems = differences(store, job.alone) if code == 0 else [f"ended with {code}: {text[-300:]}"]
            for problem in problems:
                tally.found(f"disk, {job.name}: after room was made, {problem}")
            yield (
                f"disk full, {job.name}: refused at 100 kB; filled after {filled} data file(s), it said "
                f"{ending!r}; with room again {'the rest was done' if not problems else 'NOT as promised'}"
            )
            shutil.rmtree(store)
    finally:
        subprocess.run(["umount", place], check=True)


def fill(file: Path, leave: int = 0) -> None:
    """Write a file until the disk is full, or has so many bytes left."""
    free = shutil.disk_usage(file.parent).free - leave
    with contextlib.suppress(OSError), file.open("ab", buffering=0) as stream:
        while free > 0 or not leave:
            free -= stream.write(bytes(min(2**16, free) if leave else 4096))


def lost_scheduler(jobs: Sequence[Job], folder: Path, tally: Tally, rng: np.random.Generator) -> Iterator[str]:
    """A job whose scheduler is killed says so; with another scheduler it goes on."""
    for number in range(4):
        job = jobs[number % len(jobs)]
        assert job.alone is not None
        store, log = folder / "store-scheduler", folder / "log"
        shutil.rmtree(store, ignore_errors=True)
        with Cluster(folder / "dask", environment=job.environment) as cluster:
            process = job.start(store, log, "--scheduler", cluster.address)
            goal = int(rng.integers(1, 6))
            while process.poll() is None and count(store / "embeddings.lance" / "data") < goal:
                time.sleep(0.003)
            reached = phase(store, process.pid, len(job.alone.embedded)) if process.poll() is None else "done"
            kill(cluster.scheduler.pid)
            ending = end_of(process, log)
            if ending is not None and ("Traceback" in ending or "scheduler" not in ending):
                tally.found(f"scheduler, {job.name}: without it the job said {ending!r} ({reached})")
            cluster.scheduler.wait()
            cluster.start()
            code, text = run_once(job, store, folder, "--scheduler", cluster.address)
        problems = differences(store, job.alone) if code == 0 else [f"ended with {code}: {text[-300:]}"]
        for problem in problems:
            tally.found(f"scheduler, {job.name}: with another one, {problem}")
        yield (
            f"scheduler killed, {job.name}, {reached}: {ending!r}; with another one "
            f"{'the rest was done' if not problems else 'NOT as promised'}"
        )


def replaced_files(jobs: Sequence[Job], folder: Path, tally: Tally, rng: np.random.Generator) -> Iterator[str]:
    """Files that are replaced while the job runs are embedded as they are now, by that run or the next."""
    from astropy.io import fits

    job = next(job for job in jobs if job.name == "cutouts")
    for number in range(3):
        copy, store = folder / "replaced", folder / "store-replaced"
        for there in (copy, store):
            shutil.rmtree(there, ignore_errors=True)
        shutil.copytree(job.words[0], copy)
        here = Job(job.name, (str(copy), *job.words[1:]), job.environment)
        files = sorted(copy.glob("*.fits"))
        process = here.start(store, folder / "log", "--workers", "2")
        goal = rng.uniform(0.1, 0.5) * job.cpu
        turned = 0
        for at in rng.choice(len(files), 30, replace=False):
            while process.poll() is None and sum(map(cpu_seconds, family(process.pid))) < goal:
                time.sleep(0.01)
            goal += 0.02 * job.cpu
            # Some are damaged.
            with contextlib.suppress(OSError, TypeError, ValueError), fits.open(files[at]) as opened:
                new = files[at].with_name("new")
                fits.writeto(new, opened[0].data[:, ::-1].copy(), opened[0].header, overwrite=True)
                os.replace(new, files[at])
                turned += process.poll() is None
        end_of(process, folder / "log")
        runs = 1
        while runs < 4:
            code, text = run_once(here, store, folder)
            runs += 1
            if code or "nothing to do" in text:
                break
        leave_alone(here, folder)
        assert here.alone is not None
        problems = differences(store, here.alone) if code == 0 else [f"ended with {code}: {text[-300:]}"]
        for problem in problems:
            tally.found(f"replaced {number}: {problem}")
        yield (
            f"{turned} files replaced while the job ran: nothing left to do after {runs - 1} run(s), every vector "
            f"is {'that of the new file' if not problems else 'NOT as promised'}"
        )


def two_jobs(jobs: Sequence[Job], folder: Path, tally: Tally, rng: np.random.Generator) -> Iterator[str]:
    """Of two jobs on one store one works; the other refuses and says why, or finds nothing left to do."""
    seen: Counter[str] = Counter()
    for number in range(6):
        job = jobs[number % len(jobs)]
        assert job.alone is not None
        store = folder / "store-two"
        shutil.rmtree(store, ignore_errors=True)
        logs = [folder / f"log-{place}" for place in range(2)]
        processes = []
        for log in logs:
            processes.append(job.start(store, log, "--workers", "1"))
            time.sleep(rng.uniform(0, 0.5) if number else 0)
        endings = [end_of(process, log) for process, log in zip(processes, logs, strict=True)]
        if all(endings):
            tally.found(f"two jobs, {job.name}: neither worked: {endings}")
        for ending in filter(None, endings):
            seen[re.sub(r"\S*/store-two", "STORE", ending)] += 1
            if "Traceback" in ending or not re.search("written by|took the lease|lost its lease|committing", ending):
                tally.found(f"two jobs, {job.name}: the other said {ending!r}")
        for problem in differences(store, job.alone):
            tally.found(f"two jobs, {job.name}: {problem}")
    yield f"two jobs at once, 6 times: {'; '.join(f'{times} x {ending!r}' for ending, times in seen.items())}"


def asleep(jobs: Sequence[Job], folder: Path, tally: Tally, rng: np.random.Generator) -> Iterator[str]:
    """A job that sleeps longer than its lease, while another takes over, commits nothing when it wakes up."""
    job = jobs[int(rng.integers(len(jobs)))]
    store = folder / "store-asleep"
    shutil.rmtree(store, ignore_errors=True)
    logs = [folder / f"log-{place}" for place in range(2)]
    sleeper = job.start(store, logs[0], "--workers", "2")
    while sleeper.poll() is None and count(store / "embeddings.lance" / "data") < 3:
        time.sleep(0.003)
    kill(sleeper.pid, signal.SIGSTOP)
    early = end_of(job.start(store, logs[1], "--workers", "1"), logs[1])
    for _ in range(10):
        time.sleep(10)
        late = end_of(job.start(store, logs[1], "--workers", "1"), logs[1])
        if late is None:
            break
    kill(sleeper.pid, signal.SIGCONT)
    woken = end_of(sleeper, logs[0])
    if early is None or "written by" not in early:
        tally.found(f"asleep, {job.name}: the store was taken over at once ({early!r})")
    if late is not None:
        tally.found(f"asleep, {job.name}: nobody could take over ({late!r})")
    if woken is None or "Traceback" in woken or "lost its lease" not in woken:
        tally.found(f"asleep, {job.name}: the sleeper woke up and said {woken!r}")
    for problem in settled(job, store, folder, tally):
        tally.found(f"asleep, {job.name}: {problem}")
    yield f"a job asleep, {job.name}: at first {early!r}; then another took over; the sleeper said {woken!r}"


# --- the driver ---


def make_jobs(work: Path, cutouts: int, sources: int) -> list[Job]:
    """Simulate a survey with some damage, and return the jobs over it."""
    survey = work / "survey"
    if not (survey / "damaged").exists():
        few = ("--bricks", "2", "--brick-size", "700", "--sources", sources, "--cutouts", cutouts)
        command("simulate", survey, *few, "--seed", "0", "--workers", "2")
        backbone = random_backbone(work / "backbone", "test_convnext", 32, "9:8:60", survey)
        damage(survey)
    backbone = work / "backbone"
    common = ("--backbone", str(backbone), "--runtime", "onnxruntime-cpu")
    return [
        Job("tiles", (str(survey), "--catalogue", str(survey / "sources.fits"), *common), ALONE),
        Job("cutouts", (str(survey / "cutouts"), "--catalogue", str(survey / "cutouts.fits"), *common), ALONE),
    ]


def damage(survey: Path) -> None:
    """Cut some files off in the middle, and move some catalogued sources off the tiles."""
    from astropy.table import Table

    for file in sorted((survey / "cutouts").glob("*.fits"))[::40]:
        with file.open("r+b") as stream:
            stream.truncate(file.stat().st_size // 2)
    catalogue = Table.read(survey / "sources.fits")
    catalogue["DEC"][::40] += 5.0
    catalogue.write(survey / "sources.fits", overwrite=True)
    (survey / "damaged").touch()


def report(options: argparse.Namespace, jobs: Sequence[Job], tally: Tally, said: Sequence[str]) -> str:
    victims = [name for name in ("client", "worker", "nanny") if any(hit[0] == name for hit in tally.hits)]
    rows = [
        (victim, *(tally.hits[victim, name] for name in PHASES), sum(tally.hits[victim, name] for name in PHASES))
        for victim in victims
    ]
    rows.append(("all", *(sum(tally.hits[victim, name] for victim in victims) for name in PHASES), tally.hits.total()))
    sizes = "; ".join(
        f"{job.name}: {len(job.alone.embedded)} sources embed and {len(job.alone.failed)} fail"
        for job in jobs
        if job.alone
    )
    lines = [
        f"`python {' '.join(sys.argv)}`",
        f"{len(tally.tries)} runs, {tally.hits.total()} kills ({tally.spared} runs ended before their kill and do not "
        f"count). {sizes}.",
        table(("killed", *PHASES, "all"), rows),
    ]
    if tally.tries:
        lines.append(
            f"Commands until done: {spread(tally.tries, 0)}; seconds: {spread(tally.seconds)}. "
            f"Ended by itself without being done: "
            + ("; ".join(f"{times} x {ending!r}" for ending, times in tally.endings.items()) or "never")
            + f". Files that came after the end of the job, for one more run to remove: {tally.late}."
        )
    lines += ["\n".join(f"- {line}" for line in said)] if said else []
    lines.append(
        f"**{len(tally.findings)} finding(s)**"
        + "".join(f"\n- {finding}" for finding in tally.findings)
        + ("" if tally.findings else ": every source in one table, once; vectors equal; nothing left about.")
    )
    where = f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}"
    lines.append(f"{where}, pylance {lance.__version__}.")
    return "\n\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder; the survey in it is used again  [a temporary one]")
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="number of the first run, to go on from another call")
    parser.add_argument("--cutouts", type=int, default=480)
    parser.add_argument("--sources", type=int, default=240, help="in each of two bricks")
    parser.add_argument("--scenarios", nargs="*", choices=SCENARIOS, default=SCENARIOS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file to write the Markdown to")
    options = parser.parse_args()
    work = (options.work or Path(tempfile.mkdtemp(prefix="chaos-"))).resolve()
    work.mkdir(parents=True, exist_ok=True)
    jobs = make_jobs(work, options.cutouts, options.sources)
    for job in jobs:
        leave_alone(job, work)
    tally, said = Tally(), []
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        shoot(jobs, work, options, tally)
        scenarios = dict(zip(SCENARIOS, (full_disk, lost_scheduler, replaced_files, two_jobs, asleep), strict=True))
        rng = np.random.default_rng(options.seed)
        for name in options.scenarios:
            for line in scenarios[name](jobs, work, tally, rng):
                print(line, file=sys.stderr, flush=True)
                said.append(line)
    except KeyboardInterrupt:
        tally.found("interrupted: this is what was seen until then")
    text = report(options, jobs, tally, said)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    if not options.work and not tally.findings:
        shutil.rmtree(work)
    raise SystemExit(bool(tally.findings))


if __name__ == "__main__":
    main()
