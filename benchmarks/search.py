"""How well, how fast and in how much memory are the nearest of many vectors found, beside what else there is?

    python benchmarks/search.py --work /tmp/search --rows 100000 --dim 640 --rounds 3 --out search.md

All engines get the same vectors, those of `resampled.py`, with a position and a magnitude each, and 200 queries from
the same source that are not among them, for the 10 nearest: among all rows, among those brighter than some magnitude
(10%, 1% and 0.1% of the rows; brightness goes with looks), and in a cone that holds about 1%.

- galembed: a store, `galembed index --recall 0.95`, `Store.similar` and `Store.similar_to_each`, which return tables
  with id, position and magnitude; its kind of index by size, or one that is named, or none;
- numpy: all vectors in memory, one product of matrices; rows that pass a filter are looked up in arrays;
- faiss: its flat index, and its HNSW graph (16 links, 80 candidates in building), which know of no filters: it is told
  a bitmap of the rows that pass, found as by numpy;
- chromadb, qdrant-client: as local databases on disk, with their defaults. Neither is asked for a cone, but for 20 in
  the box around it, of which those in the cone are kept.

An engine with a knob for thoroughness (faiss's HNSW, chromadb) is turned up for each condition until it finds 95%, or
can go no further. Rivals are installed into environments of their own under --work with pip. Building and searching are
processes of their own, and a round is a search process of each engine in turn. Memory is the most that such a process
has: anonymous, which nothing else can use, and mapped from files, which the page cache can take back. The 0.95 quantile
is over the queries of a round: all, or the first twenty or more where those take 10 s. One that takes more time or
memory than it may is stopped, and that is its result. --only runs some engines and keeps what was measured of the
others before.

--ours-only leaves the rivals out and their vectors unwritten; --half stores float16. Truth is found by the way, a part
of the rows after the other.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import resampled
from numpy.typing import NDArray
from processes import family, spread, table

ENGINE = Path(__file__).resolve().with_name("rivals") / "search_engine.py"
OURS = ("galembed", "galembed-hnsw", "galembed-rq", "galembed-exact")
PACKAGES = {"faiss-flat": "faiss-cpu", "faiss-hnsw": "faiss-cpu", "chromadb": "chromadb", "qdrant": "qdrant-client"}
DEFAULT = ("galembed", "numpy", *PACKAGES)
K, QUERIES = 10, 200
CONE = (30.0, 0.0)
SHARES = {"10%": 0.1, "1%": 0.01, "0.1%": 0.001}
TOLD = {"all": "all rows", **{name: f"{name} of the rows" for name in SHARES}, "cone": "a cone"}


# --- what is searched ---


def make_material(options: argparse.Namespace) -> Path:
    """Write vectors, columns, store, questions and the truth, unless they are there; return their folder."""
    folder: Path = options.work / f"{options.rows}x{options.dim}{'-half' if options.half else ''}"
    if (folder / "questions.npz").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    drawn = resampled.drawing(options.work, options.dim)
    queries = drawn.rows(QUERIES, seed=7).vectors
    kept = [(part.ra, part.dec, part.mag_r) for _, part in resampled.parts(drawn, options.rows)]
    ra, dec, mag_r = (np.concatenate(each) for each in zip(*kept, strict=True))
    conditions = the_conditions(mag_r)
    passing = {name: mask_of(condition, ra, dec, mag_r) for name, condition in conditions.items()}
    best = {name: (np.full((QUERIES, K), -1), np.full((QUERIES, K), -np.inf, np.float32)) for name in conditions}
    vectors = None
    if not options.ours_only:
        shape = (options.rows, options.dim)
        vectors = np.lib.format.open_memmap(folder / "vectors.npy", "w+", dtype=np.float32, shape=shape)
    for first, part in resampled.parts(drawn, options.rows):
        if vectors is not None:
            vectors[first : first + len(part.vectors)] = part.vectors
        stored = part.vectors.astype(np.float16).astype(np.float32) if options.half else part.vectors
        stored = stored / np.linalg.norm(stored, axis=1, keepdims=True)
        alike = queries @ stored.T
        for name, mask in passing.items():
            best[name] = better(best[name], alike, np.flatnonzero(mask[first : first + len(stored)]), first)
    resampled.write_store(folder / "store", drawn, options.rows, half=options.half)
    np.savez(folder / "columns.npz", ra=ra, dec=dec, mag_r=mag_r)
    (folder / "conditions.json").write_text(json.dumps(conditions))
    shares = {name: float(mask.mean()) for name, mask in passing.items()}
    (folder / "shares.json").write_text(json.dumps(shares))
    np.savez(folder / "questions.npz", queries=queries, **{name: rows for name, (rows, _) in best.items()})
    return folder


def the_conditions(mag_r: NDArray[np.float32]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {"all": {}}
    found |= {name: {"mag_r": float(np.quantile(mag_r, share))} for name, share in SHARES.items()}
    ra, dec = CONE
    height = np.diff(np.sin(np.radians(resampled.DEC)))[0]
    area = math.radians(resampled.RA[1] - resampled.RA[0]) * height
    radius = math.degrees(math.acos(1 - 0.01 * area / (2 * math.pi)))
    wide = math.degrees(math.asin(math.sin(math.radians(radius)) / math.cos(math.radians(dec))))
    box = (ra - wide, ra + wide, dec - radius, dec + radius)
    return found | {"cone": {"cone": (ra, dec, radius), "box": box}}


def mask_of(
    condition: dict[str, Any], ra: NDArray[np.float64], dec: NDArray[np.float64], mag_r: NDArray[np.float32]
) -> NDArray[np.bool_]:
    if "mag_r" in condition:
        return np.asarray(mag_r < condition["mag_r"])
    if not condition:
        return np.ones(len(ra), bool)
    from galembed.sky import separation_arcsec

    at_ra, at_dec, radius = condition["cone"]
    return np.asarray(separation_arcsec(at_ra, at_dec, ra, dec) <= radius * 3600)


def better(
    best: tuple[NDArray[np.intp], NDArray[np.float32]],
    alike: NDArray[np.float32],
    some: NDArray[np.intp],
    first: int,
) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Return the best `K` of each query among those known and `some` of a part of the rows."""
    here = alike[:, some]
    near = np.argsort(-here, axis=1)[:, :K] if here.shape[1] <= K else np.argpartition(-here, K, axis=1)[:, :K]
    rows = np.concatenate([best[0], some[near] + first], axis=1)
    values = np.concatenate([best[1], np.take_along_axis(here, near, 1)], axis=1)
    order = np.argsort(-values, axis=1, kind="stable")[:, :K]
    return np.take_along_axis(rows, order, 1), np.take_along_axis(values, order, 1)


# --- processes that may take only so much ---


def memory(pid: int) -> tuple[float, float]:
    """Return MiB of a process and its children: anonymous, and mapped from files."""
    kinds = {"RssAnon:": 0.0, "RssFile:": 0.0}
    for member in family(pid):
        try:
            lines = Path(f"/proc/{member}/status").read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            word, *rest = line.split()
            if word in kinds:
                kinds[word] += int(rest[0]) / 1024
    return kinds["RssAnon:"], kinds["RssFile:"]


def limited(command: Sequence[Any], seconds: float, gib: float) -> dict[str, Any]:
    """Run an engine; return what it says, and its peak memory, or why it was stopped as `failed`."""
    start, anonymous, mapped = time.perf_counter(), 0.0, 0.0
    failed = ""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen([str(word) for word in command], stdout=out, stderr=errors, text=True)
        while process.poll() is None:
            now = memory(process.pid)
            anonymous, mapped = max(anonymous, now[0]), max(mapped, now[1])
            if time.perf_counter() - start > seconds:
                failed = f"more than {seconds:,.0f} s"
            if now[0] > gib * 1024:
                failed = f"more than {gib:g} GiB"
            if failed:
                process.kill()
                process.wait()
            time.sleep(0.05)
        for stream in (out, errors):
            stream.seek(0)
        said, wrong = out.read(), errors.read()
    found: dict[str, Any] = {"anonymous": anonymous, "mapped": mapped, "wall": time.perf_counter() - start}
    print(wrong[-3000:], file=sys.stderr, flush=True)
    if failed:
        return found | {"failed": failed}
    if process.returncode:
        return found | {"failed": f"ended with {process.returncode}"}
    return found | json.loads(said.splitlines()[-1])


def python_of(engine: str, work: Path) -> Path:
    """Return the Python of an engine, its environment made if absent."""
    if engine not in PACKAGES:
        return Path(sys.executable)
    place = work / "environments" / PACKAGES[engine]
    python = place / "bin" / "python"
    if not (place / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
        words = ("pip", "--python", str(python), "install", "--quiet", PACKAGES[engine])
        subprocess.run([sys.executable, "-m", *words], check=True)
        (place / "ready").touch()
    return python


# --- measuring ---


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Build what is not built, and search in rounds; what was measured before is kept in `results.json`."""
    file = folder / "results.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for number in range(options.rounds):
        order = options.only if number % 2 == 0 else options.only[::-1]
        for engine in order:
            known = results.setdefault(engine, {"searches": []})
            command = (python_of(engine, options.work), ENGINE, engine)
            if "build" not in known:
                known["build"] = build(engine, command, folder, options)
            if "failed" not in known["build"]:
                known["searches"].append(limited((*command, "search", folder), options.limit, options.memory))
            file.write_text(json.dumps(results, indent=2))
            print(engine, json.dumps(known["searches"][-1:]), file=sys.stderr, flush=True)
    return results


def build(engine: str, command: Sequence[Any], folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    place = folder / engine
    shutil.rmtree(place, ignore_errors=True)
    if engine in OURS:  # a store's files are never changed, so that links do
        shutil.copytree(folder / "store", place, copy_function=os.link)
    found = limited((*command, "build", folder), options.limit, options.memory)
    files = [file for file in place.rglob("*") if file.is_file()] if place.exists() else []
    return found | {"mib": sum(file.stat().st_size for file in files) / 2**20}


def report(options: argparse.Namespace, folder: Path, results: dict[str, Any]) -> str:
    from galembed.runtimes.machine import cpu_name

    shares = json.loads((folder / "shares.json").read_text())
    good = {name: [run for run in known["searches"] if "failed" not in run] for name, known in results.items()}
    costs = [
        (
            name,
            *costs_of(known["build"]),
            spread([run["opened"] for run in good[name]]) if good[name] else "",
            spread([run["anonymous"] for run in good[name]], 0) if good[name] else why(known),
            spread([run["mapped"] for run in good[name]], 0) if good[name] else "",
        )
        for name, known in results.items()
    ]
    found = [
        (f"{TOLD[condition]} ({shares[condition]:.2%})" if condition != "all" else TOLD[condition], name, *numbers)
        for condition in TOLD
        for name, runs in good.items()
        if runs
        for numbers in [numbers_of([run["conditions"][condition] for run in runs])]
    ]
    versions = {run["version"]: name for name, runs in good.items() for run in runs[-1:]}
    own = [f"{name} {version(name)}" for name in ("lancedb", "pylance", "numpy")]
    theirs = [f"{PACKAGES[name]} {number}" for number, name in versions.items() if name in PACKAGES]
    rounds = max((len(runs) for runs in good.values()), default=0)
    what = f"{options.rows:,} vectors of {options.dim} numbers{' in float16' if options.half else ''}"
    cost = ("engine", "build, s", "build, anonymous MiB", "disk, MiB", "open, s", "search, anonymous MiB")
    head = ("among", "engine", "knob", "recall@10", "p50, ms", "p95, ms", "queries/s", "in one batch, queries/s")
    return "\n\n".join(
        [
            f"`python {' '.join(sys.argv)}`",
            f"{what}, {QUERIES} queries, {rounds} round(s): median [least-most].",
            table((*cost, "search, mapped MiB"), costs),
            table(head, found),
            f"{os.cpu_count()} cores ({cpu_name()}), Python {platform.python_version()}; {', '.join(own + theirs)}.",
        ]
    )


def costs_of(built: dict[str, Any]) -> tuple[str, str, str]:
    seconds = built.get("failed") or f"{built['seconds']:,.1f}"
    return seconds, f"{built['anonymous']:,.0f}", f"{built['mib']:,.0f}"


def why(known: dict[str, Any]) -> str:
    return str(known["searches"][-1]["failed"]) if known["searches"] else ""


def numbers_of(runs: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    recall = f"{min(run['recall'] for run in runs):.3f}"
    times = [spread([1000 * run[name] for run in runs]) for name in ("p50", "p95")]
    rates = [spread([run["qps"] for run in runs], 0), spread([1 / run["batched"] for run in runs], 0)]
    return str(runs[-1]["knob"] or ""), recall, *times, *rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder; what is made in it is used again")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=",".join(DEFAULT), help=f"of {', '.join((*OURS, 'numpy', *PACKAGES))}")
    parser.add_argument("--ours-only", action="store_true", help="no rivals, and no files for them")
    parser.add_argument("--half", action="store_true", help="float16 in the store")
    parser.add_argument("--limit", type=float, default=1800, help="seconds a process may take")
    parser.add_argument("--memory", type=float, default=16, help="GiB a process may take")
    parser.add_argument("--out", type=Path, help="file to write the Markdown to")
    options = parser.parse_args()
    options.work = options.work.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    options.only = [name for name in options.only.split(",") if name in OURS or not options.ours_only]
    folder = make_material(options)
    text = report(options, folder, measure(options, folder))
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
