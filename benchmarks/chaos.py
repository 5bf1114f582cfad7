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
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import lance
import numpy as np
from job_runs import ALONE, PHASES, Job, Tally, count, end_of, leave_alone, phase, settled
from mishaps import SCENARIOS
from processes import Cluster, alive, cpu_seconds, family, is_worker, kill, random_backbone, spread, table, wait_for
from processes import galembed as command

MOST_TRIES = 9


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
    parser.add_argument("--scenarios", nargs="*", choices=SCENARIOS, default=list(SCENARIOS))
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
        rng = np.random.default_rng(options.seed)
        for name in options.scenarios:
            for line in SCENARIOS[name](jobs, work, tally, rng):
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
