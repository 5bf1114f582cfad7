"""What happens to jobs besides kills: scenarios for chaos.py. Each yields what it has to say of what it saw."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from job_runs import Job, Tally, count, differences, end_of, leave_alone, phase, run_once, settled
from processes import Cluster, cpu_seconds, family, kill


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


SCENARIOS = {
    "disk": full_disk,
    "scheduler": lost_scheduler,
    "replaced": replaced_files,
    "two": two_jobs,
    "asleep": asleep,
}
