"""Does a galaxy find itself again under new noise?

    python benchmarks/resimulation.py --work /tmp/resimulation --out docs/resimulation.md

Simulates bricks twice, the same galaxies with other noise, embeds both with `galembed embed` by a backbone and by the
same network with random weights, and ranks each source of the second among the 2,000 of the first that are nearest to
it in magnitude and size (itself included). Median ranks in bins of signal to noise: 1 is perfect, 1,000 is chance.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from real_labels import untrained_backbone

import galembed
from galembed.backbones import load_backbone
from galembed.catalogues import read_catalogue

EDGES = (0, 20, 40, 80, 160, 320, np.inf)
AMONG = 2000


def command(*arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "galembed", *map(str, arguments)], check=True, stdout=sys.stderr)


def simulate(folder: Path, bricks: int, sources: int, seed: int, noise_seed: int) -> None:
    command("simulate", folder, "--bricks", str(bricks), "--sources", str(sources), "--cutouts", "0",
            "--seed", str(seed), "--noise-seed", str(noise_seed))  # fmt: skip


def vectors(survey: Path, store: Path, backbone: Path | str) -> dict[str, np.ndarray]:
    if not store.exists():
        command(
            "embed", survey, "--catalogue", survey / "sources.fits", "--store", store, "--backbone", backbone, "--quiet"
        )
    keys, matrix = galembed.open(store).vectors()
    return dict(zip(keys["source_id"], matrix, strict=True))


def ranks(first: np.ndarray, second: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Rank (1 = nearest) of each source of the second among those of the first that are nearest in `place` (n, 2)."""
    out = []
    for i, vector in enumerate(second):
        distance = np.square(place - place[i]).sum(axis=1)
        rivals = np.argsort(distance, kind="stable")[:AMONG]
        similarity = first[rivals] @ vector
        out.append(1 + np.count_nonzero(similarity > first[i] @ vector))
    return np.array(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="Folder for surveys and stores; used again if there")
    parser.add_argument("--backbone", default="builtin")
    parser.add_argument("--bricks", type=int, default=4)
    parser.add_argument("--sources", type=int, default=900, help="a brick")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    backbone = load_backbone(options.backbone)
    surveys = [options.work / name for name in ("first", "second")]
    for noise, survey in enumerate(surveys):
        if not (survey / "votes.parquet").exists():
            simulate(survey, options.bricks, options.sources, options.seed, options.seed + noise)
    random_path = options.work / "untrained"
    if not random_path.exists():
        untrained_backbone(backbone, 0, random_path)
    catalogue = read_catalogue(surveys[0] / "sources.fits", columns={})
    magnitude = dict(zip(catalogue["source_id"].to_pylist(), catalogue["mag_r"].to_pylist(), strict=True))
    size = dict(zip(catalogue["source_id"].to_pylist(), catalogue["size"].to_pylist(), strict=True))
    truth = pq.read_table(surveys[0] / "truth.parquet", columns=["id_str", "kind", "snr_r"]).to_pylist()
    results, names = {}, []
    for label, path in (("trained", options.backbone), ("untrained", random_path)):
        stores = [
            vectors(survey, options.work / f"{survey.name}-{label}-{load_backbone(path).embedding_id[:8]}.lance", path)
            for survey in surveys
        ]
        names = [
            row["id_str"]
            for row in truth
            if row["id_str"] in stores[0] and row["id_str"] in stores[1] and row["kind"] not in ("star", "artefact")
        ]
        place = np.array([[magnitude[name], 2.5 * np.log10(size[name])] for name in names])
        place /= place.std(axis=0)
        results[label] = ranks(*(np.stack([store[name] for name in names]) for store in stores), place)
    snr = np.array([{row["id_str"]: row["snr_r"] for row in truth}[name] for name in names])
    rows = []
    for low, high in itertools.pairwise(EDGES):
        inside = (snr >= low) & (snr < high)
        if inside.any():
            cells = " | ".join(
                f"{np.median(results[label][inside]):.0f} | {np.mean(results[label][inside] == 1):.0%}"
                for label in ("trained", "untrained")
            )
            rows.append(f"| {low:g} to {high:g} | {inside.sum()} | {cells} |")
    cells = " | ".join(
        f"{np.median(results[label]):.0f} | {np.mean(results[label] == 1):.0%}" for label in ("trained", "untrained")
    )
    text = (
        f"Rank of the true galaxy among {min(AMONG, len(names)):,} of matched size and magnitude after new noise, "
        f"{len(names):,} galaxies on {options.bricks} bricks, backbone `{backbone.name}` "
        f"(`{backbone.embedding_id[:12]}`); made by `python {' '.join(sys.argv)}`.\n\n"
        "| signal to noise (r) | galaxies | median rank, trained | first, trained "
        "| median rank, untrained | first, untrained |\n"
        "| --- | --- | --- | --- | --- | --- |\n" + "\n".join(rows) + f"\n| all | {len(names)} | {cells} |\n"
    )
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
