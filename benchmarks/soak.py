"""Does anything grow while `galembed embed` works for a long time?

    python benchmarks/soak.py --minutes 30 --work /tmp/soak --out soak.md

Half of the time one long job runs, with workers of its own, over a list that is longer than it can do; it is then
interrupted as by Ctrl-C, and must commit and say so. In the other half one job after the other runs against the same
scheduler and workers, each over a part of the list into a store of its own, and one store that all of them reach again.
The memory (PSS) and the open files, sockets and pipes of each process are noted 180 times in each half.

Each process's curve after its first quarter is cut into ten pieces; a straight line through their medians gives the
growth an hour with its 95% interval. Something grows where the whole interval lies above zero and the growth over the
time watched is more than --most percent of the level, or one handle. Then the exit status is 1. The bricks and the
backbone are those of scale.py.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import lance
import numpy as np
from numpy.typing import NDArray
from processes import GALEMBED, Cluster, Watch, table, workers_of
from scale import ALONE, FOV, make_catalogue, make_material
from scipy import stats

LOOKS = 180
PIECES = 10
SETTLING = 0.25


@dataclass(frozen=True)
class Growth:
    """How a quantity of one process went: its level at the end, and growth an hour with its 95% interval."""

    level: float
    slope: float
    low: float
    high: float
    hours: float

    def grows(self, least: float) -> bool:
        return self.low > 0 and self.slope * self.hours > least

    def __str__(self) -> str:
        return f"{self.level:,.0f}, {self.slope:+.1f} [{self.low:+.1f} to {self.high:+.1f}] an hour"


def growth(seconds: NDArray[np.float64], values: NDArray[np.float64]) -> Growth:
    """Fit a line through the medians of pieces of a curve, after it has settled."""
    settled = seconds >= seconds[0] + SETTLING * (seconds[-1] - seconds[0])
    pieces = [at for at in np.array_split(np.flatnonzero(settled), PIECES) if len(at)]
    at = np.array([np.median(seconds[piece]) for piece in pieces]) / 3600
    level = np.array([np.median(values[piece]) for piece in pieces])
    line = stats.linregress(at, level)
    half = float(stats.t.ppf(0.975, len(pieces) - 2) * line.stderr)
    return Growth(float(level[-1]), float(line.slope), line.slope - half, line.slope + half, float(at[-1] - at[0]))


def growths(watch: Watch) -> dict[tuple[str, int], tuple[Growth, Growth]]:
    """Return memory and handles of each process that was seen for more than half of the time."""
    found = {}
    for name in sorted({name for _, looks in watch.samples for name in looks}):
        seen = [(at, *looks[name]) for at, looks in watch.samples if name in looks]
        if len(seen) > max(2 * PIECES, len(watch.samples) / 2):
            at, memory, open_files = (np.array(column, np.float64) for column in zip(*seen, strict=True))
            found[name] = growth(at, memory), growth(at, open_files)
    return found


def every(seconds: float) -> float:
    """Return how often to look."""
    return seconds / LOOKS


def words(work: Path, catalogue: Path, store: Path) -> list[str]:
    found = ["embed", work / "survey", "--catalogue", catalogue, "--store", store, "--backbone", work / "backbone"]
    return [*GALEMBED, *map(str, found), "--fov", f"{FOV}", "--runtime", "onnxruntime-cpu", "--quiet"]


def long_job(work: Path, seconds: float, rows: int) -> tuple[Watch, str]:
    """Run one job for so long, then interrupt it; return what was seen and said."""
    store = work / "store-long"
    shutil.rmtree(store, ignore_errors=True)
    process = subprocess.Popen(
        [*words(work, make_catalogue(work, rows), store), "--workers", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **ALONE},
    )
    with Watch(lambda: {"client": [process.pid], "worker": workers_of(process.pid)}, every(seconds)) as watch:
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=300)
    done = lance.dataset(str(store / "embeddings.lance")).count_rows()
    shutil.rmtree(store)
    if process.returncode != 130 or "the same command goes on" not in errors:
        raise SystemExit(f"the long job did {done:,} rows and ended with {process.returncode}: {errors[-2000:]}")
    return watch, f"one job, interrupted after {done:,} sources: {errors.strip().splitlines()[-1]}"


def many_jobs(work: Path, seconds: float, rows: int) -> tuple[Watch, str]:
    """Run one job after the other on the same cluster for so long; every other one goes to a store that exists."""
    common = work / "store-common"
    shutil.rmtree(common, ignore_errors=True)
    jobs = sources = 0
    with Cluster(work / "dask", environment=ALONE) as cluster:

        def roles() -> dict[str, Sequence[int]]:
            nannies = [nanny.pid for nanny in cluster.nannies]
            return {"scheduler": [cluster.scheduler.pid], "nanny": nannies, "worker": cluster.worker_pids()}

        over = time.monotonic() + seconds
        with Watch(roles, every(seconds)) as watch:
            while time.monotonic() < over:
                again = jobs % 2
                store = common if again else work / "store-once"
                catalogue = make_catalogue(work, rows * (1 + jobs // 2) if again else rows)
                done = subprocess.run(
                    [*words(work, catalogue, store), "--scheduler", cluster.address],
                    capture_output=True,
                    text=True,
                    env={**os.environ, **ALONE},
                )
                if done.returncode or f"embedded {rows:,} of {rows:,}" not in done.stdout:
                    raise SystemExit(f"job {jobs} ended with {done.returncode}: {done.stdout}{done.stderr[-2000:]}")
                jobs, sources = jobs + 1, sources + rows
                if not again:
                    shutil.rmtree(store)
                else:
                    catalogue.unlink()
    in_all = lance.dataset(str(common / "embeddings.lance")).count_rows() if jobs > 1 else 0
    shutil.rmtree(common, ignore_errors=True)
    return watch, f"{jobs} jobs, {sources:,} sources; the store that they had in common held {in_all:,}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder; what is made in it is used again")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--rows", type=int, default=3_000_000, help="of the long job's list")
    parser.add_argument("--job-rows", type=int, default=5_000, help="of each of the many jobs")
    parser.add_argument("--most", type=float, default=2.0, metavar="PERCENT", help="growth that is let pass")
    parser.add_argument("--out", type=Path, help="file to write the Markdown to")
    options = parser.parse_args()
    options.work = options.work.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    # As at a terminal: a shell's background jobs are born with it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    make_material(options.work)
    lines, growing = [f"`python {' '.join(sys.argv)}`"], []
    for what, (run, rows) in {
        "one long job": (long_job, options.rows),
        "many jobs on one cluster": (many_jobs, options.job_rows),
    }.items():
        watch, said = run(options.work, options.minutes * 30, rows)
        judged = growths(watch)
        if not judged:
            raise SystemExit(f"{what}: no process was seen for long enough; give more --minutes")
        cells = []
        for (role, pid), (memory, open_files) in judged.items():
            cells.append((role, memory, open_files))
            for name, found, least in (
                ("memory", memory, options.most / 100 * memory.level),
                ("handles", open_files, 1.0),
            ):
                if found.grows(least):
                    growing.append(f"{name} of the {role} {pid} in {what}: {found}")
        lines += [f"{what}: {said}.", table((what, "memory, MiB", "open files, sockets, pipes"), cells)]
    lines.append("\n".join(f"- GROWS: {text}" for text in growing) or "Nothing grows.")
    where = f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}"
    lines.append(f"{options.minutes:g} minutes, {where}, pylance {lance.__version__}.")
    text = "\n\n".join(lines)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    raise SystemExit(bool(growing))


if __name__ == "__main__":
    main()
