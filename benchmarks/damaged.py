"""Damaged survey files: each ends as a cutout or as an error of the library, in bounded time and memory.

    python benchmarks/damaged.py [--files 5000] [--seed 0] [--out docs/benchmarks.md]

Writes small files as the surveys do (random shape, scale, rotation and place; with and without DATASUM), damages one,
and reads it as a job does: `open_source`, `sources`, `cutouts` on a folder that holds it, and `cutouts` alone, for a
file damaged after the listing. Each file is read in a process of its own kind, with a time limit. A reading ends as:

- refused: an error of `galembed.errors`;
- equal: the cutout of the undamaged file, to the bit;
- changed: another cutout. Allowed only where nothing in the file can tell: pixels or Rice streams without DATASUM,
  and values in headers (no reader here checks CHECKSUM: tools that edit a header often leave an old one);
- finding: anything else. A crash, a hang, another exception, a warning that escapes, a cutout that breaks its
  contract, more memory than `MEMORY`, or a changed cutout although DATASUM, compression or structure could tell.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import re
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import astropy
import numpy as np
import pyarrow as pa
from damage import Damage, damaged
from survey_files import FORMS, TILES

from galembed.backbones import FieldOfView, InputContract
from galembed.cutouts import Cutout
from galembed.errors import GalembedError
from galembed.mappings import LEGACY_DR2
from galembed.sources import SourceReader, open_source

SECONDS = 20.0
"""Allowed for one file; a hundred times what an undamaged one takes."""
MEMORY = 256 << 20
"""bytes that the process may grow by while it reads one file; undamaged ones take about 5 MiB."""
ADDRESS_SPACE = 8 << 30
VARIANTS = 4
SIZE = 32


# --- reading, in workers ---


@dataclass(frozen=True)
class Base:
    """An undamaged source."""

    folder: Path
    reader: SourceReader
    rows: pa.Table
    contract: InputContract
    cutout: Cutout
    victims: tuple[Path, ...]


@dataclass(frozen=True)
class Result:
    """What became of one damaged file: the worst of its two readings."""

    number: int
    form: str
    summed: bool
    damage: Damage
    outcome: str
    detail: str
    seconds: float = 0.0
    memory: int = 0


ORDER = ("equal", "refused", "changed", "finding")


def make_base(folder: Path, form: str, sums: bool, variant: int, seed: int) -> Base:
    folder.mkdir(parents=True)
    rng = np.random.default_rng([seed, list(FORMS).index(form), int(sums), variant])
    FORMS[form](folder, "a", rng, sums)
    before = set(folder.iterdir())
    if form not in TILES:
        FORMS[form](folder, "b", rng, sums)
    fixed = form in TILES or variant % 2
    contract = InputContract(SIZE, FieldOfView(0.0 if fixed else 9.0, 8.0, 8.0 if fixed else 90.0), LEGACY_DR2)
    reader = open_source(folder, catalogue=folder / "sources.csv" if form in TILES else None)
    rows = reader.sources().table
    rows = rows.slice(len(rows) - 1)
    ((_, cutout),) = reader.cutouts(rows, contract)
    if isinstance(cutout, GalembedError):
        raise cutout
    victims = sorted(path for path in (before if form in TILES else set(folder.iterdir()) - before))
    return Base(folder, reader, rows, contract, cutout, tuple(path for path in victims if path.suffix != ".csv"))


def same(one: Cutout, other: Cutout) -> bool:
    places = ((one.ra, other.ra), (one.dec, other.dec), (one.fov_arcsec, other.fov_arcsec))
    return np.array_equal(one.pixels, other.pixels, equal_nan=True) and all(
        a == b or (a is not None and b is not None and abs(a - b) < 1e-9) for a, b in places
    )


def broken(cutout: Cutout) -> str:
    """Return how a cutout breaks its contract, or an empty string."""
    pixels = cutout.pixels
    if pixels.dtype != np.float32 or pixels.shape != (3, SIZE, SIZE):
        return f"pixels are {pixels.dtype} {pixels.shape}"
    if np.isinf(pixels).any():
        return "infinite pixels"
    if not 0 < cutout.coverage <= 1 or not np.isfinite(pixels).any(axis=(1, 2)).all():
        return f"coverage {cutout.coverage}"
    for name, value, low, high in (
        ("ra", cutout.ra, -360, 360),
        ("dec", cutout.dec, -90, 90),
        ("fov", cutout.fov_arcsec, 0, 1e9),
    ):
        if value is not None and not low <= value <= high:
            return f"{name} is {value}"
    return ""


def judge(base: Base, damage: Damage, read: Callable[[], Cutout | GalembedError]) -> tuple[str, str]:
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", ResourceWarning)  # the last few tiles stay open
        try:
            result = read()
        except GalembedError as error:
            result = error
        except BaseException as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(last.filename).name}:{last.lineno}"
            return "finding", f"{type(error).__name__} at {where}: {error}"
    if heard:
        return "finding", f"warning: {heard[0].category.__name__}: {heard[0].message}"
    if isinstance(result, GalembedError):
        told = f"{type(result).__name__}: {result}"
        return ("finding", f"memory: {told}") if "Unable to allocate" in told else ("refused", told)
    if why := broken(result):
        return "finding", f"contract: {why}"
    if same(base.cutout, result):
        return "equal", ""
    return ("changed", damage.excuse) if damage.excuse else ("finding", "changed in silence")


def read_case(base: Base, number: int, form: str, sums: bool, seed: int, folder: Path) -> Result:
    rng = np.random.default_rng([seed, 1, number])
    victim = base.victims[int(rng.integers(len(base.victims)))]
    content, damage = damaged(victim.read_bytes(), rng)
    shutil.copytree(base.folder, folder)
    (folder / victim.name).write_bytes(content)
    damage = replace(damage, note=f"{victim.name}: {damage.note}")

    def moved(path: str) -> str:
        return path.replace(str(base.folder), str(folder))

    def as_a_tree() -> Cutout | GalembedError:
        reader = open_source(folder, catalogue=folder / "sources.csv" if form in TILES else None)
        listing = reader.sources().table
        at = listing["source_id"].to_pylist().index(base.rows["source_id"][0].as_py())
        return next(reader.cutouts(listing.slice(at, 1), base.contract))[1]

    def after_listing() -> Cutout | GalembedError:
        reader = replace(base.reader, root=moved(base.reader.root))  # type: ignore[type-var]
        row = base.rows.to_pylist()[0]
        rows = pa.Table.from_pylist([row | {"source_uri": moved(row["source_uri"])}], base.rows.schema)
        return next(reader.cutouts(rows, base.contract))[1]

    start, rest = time.perf_counter(), reset_peak()
    verdicts = [judge(base, damage, as_a_tree), judge(base, damage, after_listing)]
    seconds, memory = time.perf_counter() - start, peak() - rest
    outcome, detail = max(verdicts, key=lambda verdict: ORDER.index(verdict[0]))
    if memory > MEMORY and outcome != "finding":
        outcome, detail = "finding", f"memory: {memory >> 20} MiB"
    shutil.rmtree(folder)
    return Result(number, form, sums, damage, outcome, detail, seconds, memory)


def reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def work(pipe: Connection, seed: int, scratch: Path) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    warnings.simplefilter("ignore", ResourceWarning)  # tiles that stay open until the end
    bases: dict[tuple[str, bool, int], Base] = {}
    scratch.mkdir(parents=True)
    while (number := pipe.recv()) is not None:
        form, sums, variant = case(number)
        key = (form, sums, variant)
        if key not in bases:
            bases[key] = make_base(scratch / f"base{len(bases)}", form, sums, variant, seed)
            pipe.send("ready")
        pipe.send(read_case(bases[key], number, form, sums, seed, scratch / f"case{number}"))


def case(number: int) -> tuple[str, bool, int]:
    form = list(FORMS)[number % len(FORMS)]
    number //= len(FORMS)
    return form, bool(number % 2), number // 2 % VARIANTS


class Worker:
    """A process that reads damaged files, one at a time."""

    def __init__(self, context: Any, seed: int, scratch: Path) -> None:
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=work, args=(other, seed, scratch), daemon=True)
        self.process.start()
        other.close()
        self.number = -1
        self.since = 0.0

    def give(self, number: int) -> None:
        self.number, self.since = number, time.monotonic()
        self.pipe.send(number)

    def stop(self) -> None:
        self.process.kill()
        self.process.join()


def run(files: int, seed: int, workers: int, scratch: Path) -> Iterator[Result]:
    context = multiprocessing.get_context("spawn")
    waiting, started = iter(range(files)), 0
    crew: list[Worker] = []

    def hire() -> None:
        nonlocal started
        number = next(waiting, None)
        if number is not None:
            worker = Worker(context, seed, scratch / f"worker{started}")
            started += 1
            crew.append(worker)
            worker.give(number)

    for _ in range(workers):
        hire()
    while crew:
        ready = wait([worker.pipe for worker in crew], timeout=1.0)
        for worker in list(crew):
            lost = ""
            if worker.pipe in ready:
                try:
                    result = worker.pipe.recv()
                except EOFError:
                    worker.process.join()
                    lost = f"the process died (exit code {worker.process.exitcode})"
                else:
                    if result == "ready":  # a base was made; the clock starts now, after its import too
                        worker.since = time.monotonic()
                        continue
                    yield result
                    number = next(waiting, None)
                    if number is None:
                        crew.remove(worker)
                        worker.pipe.send(None)
                        worker.process.join()
                    else:
                        worker.give(number)
                    continue
            elif time.monotonic() - worker.since > SECONDS + 40 * (worker.number < workers):
                lost = f"more than {SECONDS:.0f} s"
            if lost:
                worker.stop()
                crew.remove(worker)
                form, sums, _ = case(worker.number)
                yield Result(worker.number, form, sums, Damage("?", "", ""), "finding", lost)
                hire()


# --- the report ---


def table(results: list[Result], key: Callable[[Result], str], title: str) -> list[str]:
    rows: dict[str, Counter[str]] = {}
    for result in results:
        rows.setdefault(key(result), Counter())[result.outcome] += 1
    rows = dict(sorted(rows.items())) | {"all": Counter(result.outcome for result in results)}
    lines = [f"| {title} | files | refused | equal | changed | findings |", "| --- |" + " ---: |" * 5]
    for name, counts in rows.items():
        cells = [sum(counts.values()), *(counts[outcome] for outcome in ("refused", "equal", "changed", "finding"))]
        lines.append(f"| {name} | " + " | ".join(f"{cell:,}" for cell in cells) + " |")
    return lines


def report(results: list[Result], seed: int, minutes: float) -> str:
    changed = Counter(result.detail for result in results if result.outcome == "changed")
    slowest = max(result.seconds for result in results)
    most = max(result.memory for result in results)
    lines = [
        "## Damaged files",
        "",
        f"`python benchmarks/damaged.py --files {len(results)} --seed {seed}`",
        "",
        "Small files in seven of the surveys' forms, each damaged once and read as a job reads it, from the tree and",
        "after the listing. Refused: an error of `galembed.errors`. Equal: the undamaged file's cutout to the bit.",
        "Changed: another cutout, from damage that nothing in the file can tell. Findings: crashes, hangs, other",
        "exceptions, escaped warnings, broken cutouts, and changes that DATASUM, compression or structure could tell.",
        "",
        *table(results, lambda result: f"{result.form}{', DATASUM' if result.summed else ''}", "form"),
        "",
        *table(results, lambda result: result.damage.kind.replace("_", " "), "damage"),
        "",
        "| why nothing can tell | files |",
        "| --- | ---: |",
        *(f"| {reason} | {count:,} |" for reason, count in changed.most_common()),
        "",
        "CHECKSUM covers headers too, and is not checked: a tool that edits a header often leaves the old one.",
        "",
        f"Slowest file {slowest:.1f} s; most memory beyond the process's own {most >> 20} MiB; {minutes:.0f} min,",
        f"two shared cores ({platform.machine()}), Python {platform.python_version()}, astropy {astropy.__version__},",
        f"numpy {np.__version__}.",
    ]
    return "\n".join(lines) + "\n"


def write_section(page: Path, section: str) -> None:
    """Put a section into a Markdown page, in the place of the one with its heading."""
    heading = section.splitlines()[0]
    before, found, rest = page.read_text(encoding="utf-8").partition(f"{heading}\n")
    after = re.search(r"^## ", rest, flags=re.MULTILINE) if found else None
    tail = rest[after.start() :] if after else ""
    page.write_text(f"{before.rstrip()}\n\n{section}" + (f"\n{tail}" if tail else ""), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--out", type=Path, help="Markdown page whose section is replaced.")
    parser.add_argument("--details", type=Path, help="Write each file's outcome here.")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    start, results = time.monotonic(), []
    with tempfile.TemporaryDirectory() as scratch:
        for result in run(arguments.files, arguments.seed, arguments.workers, Path(scratch)):
            results.append(result)
            if result.outcome == "finding":
                print(
                    f"finding {result.number}: {result.form}, {result.damage.kind}, {result.damage.note}: "
                    f"{result.detail}",
                    file=sys.stderr,
                    flush=True,
                )
    section = report(results, arguments.seed, (time.monotonic() - start) / 60)
    print(section)
    if arguments.details is not None:
        lines = (
            "\t".join(map(str, (r.number, r.form, r.summed, r.damage.kind, r.damage.note, r.outcome, r.detail)))
            for r in results
        )
        arguments.details.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if arguments.out is not None:
        write_section(arguments.out, section)
    if any(result.outcome == "finding" for result in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
