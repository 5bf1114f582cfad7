"""The real downstream tasks of benchmarks/paper.sh: label tables, and for `galembed study` NAME.toml and tasks.toml.

    python benchmarks/paper_tasks.py ../shared/data tasks/

Four sets of real labelled galaxies, as their README describes them. The two directions of spirals are one class, since
pictures are flipped in training; cigars (25 and 9 pictures) are left out, being too few. `gz2_votes_1000` is
no task: its votes are what one of the starts was trained on.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq

CIGARS = "smooth_cigar_shaped"


def own_labels(id_column: str, merged: dict[str, str] | None = None) -> Callable[[Path, Path], dict[str, str]]:
    """Return what reads labels from the picture table itself, some of them renamed."""

    def read(file: Path, _: Path) -> dict[str, str]:
        table = pq.read_table(file, columns=[id_column, "label_name"])
        names = [(merged or {}).get(name, name) for name in table["label_name"].to_pylist()]
        return {str(key): name for key, name in zip(table[id_column].to_pylist(), names, strict=True)}

    return read


def five_classes(file: Path, data: Path) -> dict[str, str]:
    """Return the five-class labels of the pictures of gz2_spiral_odd; its own label is a mixture of things."""
    ids = set(map(str, pq.read_table(file, columns=["galaxy_id"])["galaxy_id"].to_pylist()))
    table = pq.read_table(data / "votes" / "gz2_kaggle_5class_labels_open.parquet")
    labels = zip(map(str, table["galaxy_id"].to_pylist()), table["class5_name"].to_pylist(), strict=True)
    return {key: name for key, name in labels if key in ids}


SPIRALS = {"spiral_clockwise": "spiral", "spiral_anticlockwise": "spiral"}
TASKS: dict[str, tuple[str, float, Callable[[Path, Path], dict[str, str]]]] = {
    "gz2_kaggle_5class": ("gz2_kaggle_5class", 0.5, own_labels("galaxy_id")),
    "gz1_small": ("gz1_small", 1.0, own_labels("name", SPIRALS)),
    "gz_decals_rings": ("gz_decals_rings", 0.5, own_labels("name")),
    "gz2_spiral_odd": ("gz2_spiral_odd", 0.5, five_classes),
}


def main(data: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    entries = []
    for name, (folder, crop, labels_of) in TASKS.items():
        file = data.resolve() / "images" / folder / f"{folder}_open.parquet"
        labels = {key: label for key, label in labels_of(file, data).items() if label != CIGARS}
        with (out / f"{name}.csv").open("w", encoding="utf-8", newline="") as stream:
            csv.writer(stream).writerows([("source_id", "label"), *sorted(labels.items())])
        entries.append(f'[{name}]\nsource = "{file}"\nlabels = "{name}.csv"\ncolumn = "label"\ncrop = {crop}\n')
        (out / f"{name}.toml").write_text(entries[-1], encoding="utf-8")
    (out / "tasks.toml").write_text("\n".join(entries), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
