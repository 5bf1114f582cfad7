"""What filters by polygons and MOCs cost on a table of positions over the whole sky, without an index and with one.

python benchmarks/regions.py 1000000
"""

from __future__ import annotations

import argparse
import tempfile
import time
from typing import Any

import astropy.units as u
import lancedb
import lancedb.index
import numpy as np
import pyarrow as pa
from mocpy import MOC
from numpy.typing import NDArray

from galembed.regions import Polygon, region_filter
from galembed.sky import healpix_index


def star(corners: int, radius: float) -> NDArray[np.float64]:
    """Return the corners of a star around ra 30, dec 20, its points `radius` deg away and the rest half as far."""
    angle = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    far = radius * np.where(np.arange(corners) % 2, 1, 0.5)
    return np.stack([30 + far * np.cos(angle) / np.cos(np.radians(20)), 20 + far * np.sin(angle)], axis=1)


def main() -> None:
    """Filter by each region, compare with what lies inside, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=1_000_000)
    count = parser.parse_args().count
    rng = np.random.default_rng(0)
    ra, dec = rng.uniform(0, 360, count), np.degrees(np.arcsin(rng.uniform(-1, 1, count)))
    columns = {"ra": ra, "dec": dec, "_healpix_29": healpix_index(ra, dec), "number": np.arange(count)}
    regions: dict[str, tuple[Any, NDArray[np.bool_]]] = {}
    for corners, radius in ((4, 10), (20, 10), (100, 10), (100, 60), (1000, 1), (1000, 10)):
        outline = star(corners, radius)
        regions[f"star of {corners} corners, {radius} deg"] = (outline, Polygon.of(outline).contains(ra, dec))
    for order in (6, 9, 12):
        moc = MOC.from_cone(lon=30 * u.deg, lat=20 * u.deg, radius=10 * u.deg, max_depth=order)
        name = f"MOC of {len(moc.uniq_hpx):,} cells, 10 deg"
        regions[name] = (moc, np.asarray(moc.contains_lonlat(ra * u.deg, dec * u.deg)))
    with tempfile.TemporaryDirectory() as folder:
        table = lancedb.connect(folder).create_table("positions", pa.table(columns))
        taken: dict[str, list[str]] = {name: [] for name in regions}
        for indexed in (False, True):
            if indexed:
                table.create_index("_healpix_29", config=lancedb.index.BTree())
            for name, (region, inside) in regions.items():
                began = time.monotonic()
                found = table.search().where(region_filter(region)).select(["number"]).to_arrow()["number"].to_numpy()
                taken[name].append(f"{time.monotonic() - began:.2f}")
                if not np.array_equal(np.sort(found), np.flatnonzero(inside)):
                    raise SystemExit(f"{name}: {len(found)} rows found, {inside.sum()} are inside")
    print("| region | rows inside | seconds, no index | seconds, indexed |\n| --- | ---: | ---: | ---: |")
    for name, (_, inside) in regions.items():
        print(f"| {name} | {inside.sum():,} | {' | '.join(taken[name])} |")


if __name__ == "__main__":
    main()
