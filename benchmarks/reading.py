"""What does reading a cutout cost, and how much of it is glibc's?

    python benchmarks/reading.py --work W --images 300 --rounds 7

One process on one thread reads cubes of 256 px in three bands (those of `end_to_end.py`, made in W if absent),
calibrates them and brings them to 224 px, as a worker of `galembed embed` does before the engine: CPU time an image, of
a second pass over all of them. In each round a fresh process has each of glibc's settings in turn:

- none: as glibc begins, which raises its limits by what is given back; local runs of `galembed embed` have this;
- Dask's nanny's, which workers started by `dask worker` have unless told otherwise;
- those of our recipes for clusters.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from end_to_end import ARCHITECTURE, SIZE, make_material
from processes import KEEPING_MEMORY, spread, table

SETTINGS = {
    "none": {},
    "Dask's nanny's": {"MALLOC_TRIM_THRESHOLD_": "65536"},
    "our recipes'": KEEPING_MEMORY,
}


def read(work: Path) -> float:
    """Return milliseconds of CPU time an image, in this process."""
    from catalogue_jobs.partition import cut_all
    from galembed.backbones import load_backbone
    from galembed.sources import open_source

    contract = load_backbone(work / "backbone").contract
    reader = open_source(work / "cubes", crop=1.0)
    rows = reader.sources().table
    for _ in range(2):
        start = time.process_time()
        failed = [outcome for _, outcome in cut_all(rows, reader, contract) if isinstance(outcome, Exception)]
        seconds = time.process_time() - start
    if failed:
        raise failed[0]
    return 1000 * seconds / len(rows)


def measured(work: Path, settings: dict[str, str]) -> float:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environ |= {"OMP_NUM_THREADS": "1", **settings}
    command = (sys.executable, __file__, "--work", str(work), "--here")
    return float(subprocess.run(command, env=environ, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder; what is made in it is used again")
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(read(options.work))
        return
    options.work.mkdir(parents=True, exist_ok=True)
    make_material(options.work, options.images, ARCHITECTURE, SIZE)
    rounds: list[dict[str, float]] = []
    for number in range(options.rounds):
        order = list(SETTINGS) if number % 2 == 0 else list(SETTINGS)[::-1]
        rounds.append({name: measured(options.work, SETTINGS[name]) for name in order})
        print(rounds[-1], file=sys.stderr, flush=True)
    rows = [
        (name, spread([one[name] for one in rounds], 2), spread([one[name] / one["none"] for one in rounds], 2))
        for name in SETTINGS
    ]
    print(table(("glibc's settings", "CPU ms an image", "over none"), rows))


if __name__ == "__main__":
    main()
