"""Does `galembed embed` cost the same per source whether there are ten thousand or a million?

    python benchmarks/scale.py --sizes 10000,100000,1000000 --work /tmp/scale --out scale.md

Two simulated bricks hold positions drawn evenly over them, each a source of its own name: a long catalogue over few
tiles, so that nothing but the numbers of rows changes. Squares of 64 px at the native scale go through timm's
`test_convnext` with random weights (ONNX, float32, 64 numbers a vector), which costs next to nothing: what is measured
is reading, cutting, passing around, writing and committing. Scheduler, nannies and two workers are processes of their
own (`dask scheduler`, `dask worker`), started anew for each size and warmed up with a small job, so that each role's
CPU time and memory can be told apart; memory is shared pages counted in part (PSS), seen twice a second.

CPU time is user and system time of all the roles. The cost of one more thousand sources is what a size took more than
the one before, over the difference of their numbers. The job is then run again with nothing left to do. Last, a list of
--plan sources is planned without reading any file, in a fresh process each for a new store and for one that has all.
--flat PERCENT makes it a check: from the last but one size to the last, CPU time a thousand and the memory of each role
but the client's, which holds the list, may not grow by more.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from processes import GALEMBED, KEEPING_MEMORY, Cluster, Watch, cpu_seconds, random_backbone, table
from processes import galembed as command

HERE = Path(__file__).resolve()
SIDE = 64
FOV = SIDE * 0.262
BRICK = 1200
MARGIN_DEG = 0.003
WARM = 2_000
ROLES = ("client", "scheduler", "nanny", "worker")
ALONE = {
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    # As docs/clusters.md has it for schedulers and workers that are started by hand.
    "DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED": "False",
    "DASK_DISTRIBUTED__ADMIN__LOW_LEVEL_LOG_LENGTH": "20",
    **KEEPING_MEMORY,
}


def make_material(work: Path) -> None:
    """Simulate the bricks and make the backbone."""
    survey = work / "survey"
    if not (survey / "sources.fits").exists():
        few = ("--bricks", 2, "--brick-size", BRICK, "--sources", 400, "--cutouts", 64)
        command("simulate", survey, *few, "--seed", 0, "--workers", 2)
    random_backbone(work / "backbone", "test_convnext", SIDE, f"{FOV}", survey)


def make_catalogue(work: Path, size: int) -> Path:
    """Write positions over the bricks' own areas, each with a name of its own."""
    from astropy.table import Table

    file = work / f"sources-{size}.parquet"
    if file.exists():
        return file
    bricks = Table.read(work / "survey" / "survey-bricks.fits")
    bricks = {name.lower(): np.asarray(bricks[name], np.float64) for name in ("RA1", "RA2", "DEC1", "DEC2")}
    rng = np.random.default_rng(0)
    of = np.arange(size) % len(bricks["ra1"])
    across, up = rng.random((size, 2)).T
    places = {}
    for name, share in (("ra", across), ("dec", up)):
        low, high = bricks[f"{name}1"][of] + MARGIN_DEG, bricks[f"{name}2"][of] - MARGIN_DEG
        places[name] = low + share * (high - low)
    names = pa.array(np.char.add("s", np.arange(size).astype(str)))
    magnitudes = pa.array(rng.uniform(16, 22, size), pa.float32())
    pq.write_table(pa.table({"source_id": names, **places, "mag_r": magnitudes}), file)
    return file


def run_client(words: Sequence[Any], cluster: Cluster) -> dict[str, Any]:
    """Run the command; return seconds, CPU seconds of each role, and each role's peak memory."""

    def pids() -> dict[str, list[int]]:
        nannies = [nanny.pid for nanny in cluster.nannies]
        return {"scheduler": [cluster.scheduler.pid], "nanny": nannies, "worker": cluster.worker_pids()}

    before = {role: sum(map(cpu_seconds, found)) for role, found in pids().items()}
    start = time.perf_counter()
    process = subprocess.Popen(
        [*GALEMBED, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment()
    )
    with Watch(lambda: pids() | {"client": [process.pid]}) as watch:
        said = process.stdout.read() if process.stdout else ""
        _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{words} ended with {process.returncode}: {said}")
    cpu = {role: sum(map(cpu_seconds, found)) - before[role] for role, found in pids().items()}
    cpu["client"] = used.ru_utime + used.ru_stime
    return {"seconds": seconds, "cpu": cpu, "pss": {role: watch.peak(role) for role in ROLES}, "said": said}


def environment() -> dict[str, str]:
    return {**os.environ, **ALONE}


def measure(work: Path, size: int) -> dict[str, Any]:
    """Embed so many sources into a new store; look at the store, and run the finished job again."""

    def words(count: int, store: Path) -> list[Any]:
        catalogue = ("--catalogue", make_catalogue(work, count), "--backbone", work / "backbone", "--fov", f"{FOV}")
        how = ("--runtime", "onnxruntime-cpu", "--scheduler", cluster.address, "--quiet")
        return ["embed", work / "survey", *catalogue, "--store", store, *how]

    stores = [work / f"store-{name}" for name in ("warm", size)]
    for store in stores:
        shutil.rmtree(store, ignore_errors=True)
    with Cluster(work / "dask", environment=ALONE) as cluster:
        run_client(words(WARM, stores[0]), cluster)
        found = run_client(words(size, stores[1]), cluster)
        again = run_client(words(size, stores[1]), cluster)
    if "nothing to do" not in again["said"]:
        raise SystemExit(f"the finished job had something left to do: {again['said']}")
    dataset = lance.dataset(str(stores[1] / "embeddings.lance"))
    found |= {
        "size": size,
        "rows": dataset.count_rows(),
        "versions": len(dataset.versions()),
        "fragments": len(dataset.get_fragments()),
        "mib": sum(file.stat().st_size for file in stores[1].rglob("*") if file.is_file()) / 2**20,
        "again": again,
    }
    shutil.rmtree(stores[1])
    print(json.dumps(found), file=sys.stderr, flush=True)
    return found


def plan(size: int, *, done: bool) -> dict[str, Any]:
    """Plan so many sources over 4,000 tiles, in this process: for a new store, then for one that has them all."""
    from catalogue_jobs.plan import in_order, outstanding, partitions
    from galembed.schemas import FAILURES, SOURCES
    from galembed.sources import SourceList
    from galembed.store.keys import StoreKeys

    numbers = np.arange(size)
    rng = np.random.default_rng(0)
    tiles = 4000
    tile = rng.integers(0, tiles, size)
    uris = pa.array([f"/survey/coadd/{name:04d}/legacysurvey-{name:04d}-image-r.fits.fz" for name in range(tiles)])
    constant = pa.array(["2880-1790000000"])

    def repeated(values: pa.Array, at: Any) -> pa.Array:
        return pa.DictionaryArray.from_arrays(pa.array(at), values).dictionary_decode()

    zeros = np.zeros(size, np.int32)
    columns = {
        "survey": repeated(pa.array(["legacy"]), zeros),
        "source_id": pa.array(np.char.add("9999-", numbers.astype(str))),
        "ra": 100 + (tile % 80 + rng.random(size)) * 0.25,
        "dec": (tile // 80 + rng.random(size)) * 0.25,
        "source_uri": repeated(uris, tile.astype(np.int32)),
        "source_version": repeated(constant, zeros),
    }
    listed = pa.table(
        {name: columns.get(name, pa.nulls(size, SOURCES.field(name).type)) for name in SOURCES.names}, schema=SOURCES
    )
    rejected = pa.table({name: pa.array([], SOURCES.field(name).type) for name in SOURCES.names})
    for name in ("stage", "reason", "message"):
        rejected = rejected.append_column(name, pa.array([], pa.string()))
    stored = None
    if done:  # in another order, as rows come from a store
        keys = listed.select(["survey", "source_id", "source_version"]).take(pa.array(rng.permutation(size)))
        failed = FAILURES.empty_table().select(["survey", "source_id", "source_version", "stage"])
        stored = StoreKeys(keys, failed)
    del columns, numbers, tile
    before, start, used = resident(), time.perf_counter(), time.process_time()
    todo = outstanding(SourceList(listed, rejected), stored)
    parts = partitions(todo.table)
    in_order(todo.table, parts)
    if done and parts:
        raise SystemExit(f"{len(todo.table)} sources that are done are planned again")
    return {
        "sources": size,
        "partitions": len(parts),
        "before_mib": before,
        "seconds": time.perf_counter() - start,
        "cpu": time.process_time() - used,
        "mib": resident(),
    }


def resident() -> float:
    """Return the most memory that this process has had, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def cpu_total(run: dict[str, Any]) -> float:
    return float(sum(run["cpu"].values()))


def marginal(runs: Sequence[dict[str, Any]]) -> list[float | None]:
    """Return CPU seconds of one more thousand sources, from the second size on."""
    return [
        None,
        *(
            1000 * (cpu_total(run) - cpu_total(last)) / (run["size"] - last["size"])
            for last, run in itertools.pairwise(runs)
        ),
    ]


def growths(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return by what share the largest size costs more than the one before it."""
    before, last = runs[-2:]
    found = {"CPU time a thousand": cpu_total(last) / last["size"] / (cpu_total(before) / before["size"]) - 1}
    return found | {f"memory of the {role}": last["pss"][role] / before["pss"][role] - 1 for role in ROLES}


def report(runs: Sequence[dict[str, Any]], planned: Sequence[dict[str, Any]]) -> str:
    more = marginal(runs)
    cost = [
        (
            f"{run['size']:,}",
            f"{run['seconds']:,.0f}",
            f"{run['size'] / run['seconds']:,.0f}",
            *(f"{1000 * run['cpu'][role] / run['size']:.3f}" for role in ROLES),
            f"**{1000 * cpu_total(run) / run['size']:.3f}**",
            "" if extra is None else f"{extra:.3f}",
            *(f"{run['pss'][role]:,.0f}" for role in ROLES),
        )
        for run, extra in zip(runs, more, strict=True)
    ]
    head = ("sources", "seconds", "sources/s", *(f"CPU s/1,000: {role}" for role in ROLES), "all")
    head += ("one more 1,000", *(f"MiB: {role}" for role in ROLES))
    after = [
        (
            f"{run['size']:,}",
            f"{run['rows']:,}",
            run["versions"],
            run["fragments"],
            f"{run['mib']:,.0f}",
            f"{run['again']['seconds']:.1f}",
            f"{run['again']['cpu']['client']:.1f}",
            f"{run['again']['pss']['client']:,.0f}",
        )
        for run in runs
    ]
    grown = "; ".join(f"{what} {share:+.1%}" for what, share in growths(runs).items())
    lines = [
        f"`python {' '.join(sys.argv)}`",
        table(head, cost),
        "CPU seconds of a thousand sources by role, the fixed cost of starting included; memory is the peak (PSS) of "
        "the largest process of each role.",
        f"From {runs[-2]['size']:,} to {runs[-1]['size']:,} sources: {grown}.",
        table(
            (
                "sources", "rows", "Lance versions", "fragments", "store, MiB", "run again, s", "CPU s", "client, MiB",
            ),
            after,
        ),
    ]  # fmt: skip
    if planned:
        new, again = planned
        lines.append(
            f"Planning {new['sources']:,} sources, {new['partitions']:,} partitions: {new['seconds']:.1f} s for a new "
            f"store ({new['cpu']:.1f} s of CPU time), {again['seconds']:.1f} s ({again['cpu']:.1f}) to find that one "
            f"has all of them. The list took up to {new['before_mib']:,.0f} MiB to make, with its plan "
            f"{new['mib']:,.0f} MiB; with the keys of the store {again['before_mib']:,.0f} and {again['mib']:,.0f} MiB."
        )
    where = f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}"
    lines.append(f"{where}, pylance {lance.__version__}.")
    return "\n\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder; what is made in it is used again")
    parser.add_argument("--sizes", default="10000,100000,1000000", help="two or more, ascending")
    parser.add_argument("--plan", type=int, default=10_000_000, help="sources to plan; 0 for none")
    parser.add_argument("--flat", type=float, metavar="PERCENT", help="fail if costs grow by more")
    parser.add_argument("--out", type=Path, help="file to write the Markdown to")
    parser.add_argument("--worker", choices=("new", "done"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(plan(options.plan, done=options.worker == "done")))
        return
    options.work = options.work.resolve()
    planned = []
    for worker in ("new", "done") if options.plan else ():
        words = [sys.executable, HERE, "--worker", worker, "--plan", options.plan, "--work", options.work]
        done = subprocess.run([*map(str, words)], stdout=subprocess.PIPE, text=True, check=True, env=environment())
        planned.append(json.loads(done.stdout.splitlines()[-1]))
        print(done.stdout, file=sys.stderr, flush=True)
    options.work.mkdir(parents=True, exist_ok=True)
    make_material(options.work)
    runs = [measure(options.work, int(size)) for size in options.sizes.split(",")]
    text = report(runs, planned)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    if options.flat is not None:
        grown = {what: share for what, share in growths(runs).items() if what != "memory of the client"}
        worst = max(grown, key=lambda what: grown[what])
        if grown[worst] > options.flat / 100:
            raise SystemExit(f"{worst} grew by {grown[worst]:.1%}, more than {options.flat:g}%")


if __name__ == "__main__":
    main()
