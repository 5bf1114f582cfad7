"""What import and export of published embeddings cost: rows a second and peak memory, each in a process of its own.

python benchmarks/published.py 500000 320 --out published/
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

MEASURED = """
import resource, sys
from galembed.cli import main
main(sys.argv[1:], standalone_mode=False)
usage = resource.getrusage(resource.RUSAGE_SELF)
# ru_maxrss would be that of the process which started this one, where that was larger.
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(f"cpu {usage.ru_utime + usage.ru_stime:.1f} peak {peak / 2**20:.2f}")
"""


def write(folder: Path, count: int, dim: int, *, seed: int = 0) -> None:
    """Write clustered random vectors as float16 lists with ids, positions and two columns, 100,000 rows a file."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(300, dim))
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, count, 100_000):
        n = min(100_000, count - first)
        vectors = centres[rng.integers(0, 300, n)] + rng.normal(scale=0.5, size=(n, dim))
        offsets = pa.array(np.arange(n + 1) * dim, pa.int32())
        table = pa.table(
            {
                "object_id": np.arange(first, first + n),
                "ra": rng.uniform(0, 360, n),
                "dec": np.degrees(np.arcsin(rng.uniform(-1, 1, n))),
                "embedding": pa.ListArray.from_arrays(offsets, pa.array(vectors.astype(np.float16).ravel())),
                "mag_r": rng.uniform(14, 22, n).astype(np.float32),
                "z_phot": rng.uniform(0, 1, n),
            }
        )
        pq.write_table(table, folder / f"part-{first // 100_000:03d}.parquet", row_group_size=20_000)


def measured(what: str, count: int, *arguments: str) -> None:
    """Run a command and print what it cost."""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", MEASURED, *arguments], capture_output=True, text=True, check=True)
    seconds = time.monotonic() - began
    _, cpu, _, peak = done.stdout.split()[-4:]
    print(f"| {what} | {seconds:.1f} | {cpu} | {count / seconds:,.0f} | {peak} |", flush=True)


def main() -> None:
    """Write, import, import again, export, and import what was exported."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=500_000)
    parser.add_argument("dim", type=int, nargs="?", default=320)
    parser.add_argument("--out", type=Path, default=Path("published"))
    options = parser.parse_args()
    out, count = options.out, options.count
    write(out / "files", count, options.dim)
    store, again = out / "store.lance", out / "again.lance"
    print(
        "| command | seconds | processor seconds | rows a second | peak memory, GiB |\n| --- | --- | --- | --- | --- |"
    )
    measured("import", count, "import", str(store), str(out / "files"), "--quiet")
    measured("import again: nothing to do", count, "import", str(store), str(out / "files"), "--quiet")
    measured("export-parquet", count, "export-parquet", str(store), str(out / "exported"), "--quiet")
    measured("import of what was exported", count, "import", str(again), str(out / "exported"), "--quiet")


if __name__ == "__main__":
    main()
