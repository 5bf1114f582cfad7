"""Neighbour purity: how many of a galaxy's nearest neighbours are of its own class, beside chance.

For `real_labels.py`, with what it shares with `real_nuisances.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from galembed.linear import equal_rows
from galembed.neighbours import nearest_others

METHODS = ("this backbone", "untrained network", "PCA of pixels", "hand-made features")
NEIGHBOURS = 10
RESAMPLES = 2000


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """Return what `make` gives, as JSON keeps it; what an earlier run kept at `path` if there is such."""
    if not path.exists():
        path.write_text(json.dumps(make()), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def same_galaxies(images: np.ndarray, names: list[str]) -> np.ndarray:
    """Return a number for each picture, the same for equal pictures and for equal names, through any number of them."""
    pairs = [equal_rows(images), np.unique(names, return_inverse=True)[1] + len(images)]
    count = len(images)
    places = (np.tile(np.arange(count), 2), np.concatenate(pairs))
    links = coo_array((np.ones(2 * count, bool), places), shape=(2 * count, 2 * count))
    return connected_components(links, directed=False)[1][:count]


def own_class(features: np.ndarray, labels: np.ndarray, galaxies: np.ndarray) -> np.ndarray:
    """Return which share of each row's nearest neighbours by cosine is of its class, itself left out; shape (row,)."""
    vectors = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    most = min(NEIGHBOURS + int(np.bincount(galaxies).max()) - 1, len(labels) - 1)
    near = nearest_others(vectors.astype(np.float32), np.arange(len(labels)), most)
    others = galaxies[near] != galaxies[:, None]
    counted = others & (np.cumsum(others, axis=1) <= NEIGHBOURS)
    return (counted & (labels[near] == labels[:, None])).sum(axis=1) / counted.sum(axis=1)


def purity(shares: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Return the mean over galaxies, over classes, and of each class: each with its 95% bootstrap interval."""
    rng = np.random.default_rng(0)
    codes = np.unique(labels, return_inverse=True)[1]
    drawn = []
    for _ in range(RESAMPLES):
        rows = rng.integers(len(labels), size=len(labels))
        counts = np.bincount(codes[rows], minlength=codes.max() + 1)
        of_class = np.bincount(codes[rows], shares[rows], len(counts)) / np.where(counts, counts, np.nan)
        drawn.append([shares[rows].mean(), np.nanmean(of_class), *of_class])
    of_class = np.bincount(codes, shares) / np.bincount(codes)
    low, high = np.nanpercentile(drawn, [2.5, 97.5], axis=0)
    found = np.column_stack([[shares.mean(), of_class.mean(), *of_class], low, high]).tolist()
    return {"overall": found[0], "macro": found[1], "classes": found[2:]}


def table_of(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])


def interval(found: list[float]) -> str:
    return f"{found[0]:.3f} [{found[1]:.3f}, {found[2]:.3f}]"


def purity_tables(sets: list[dict[str, Any]]) -> str:
    overall, classes = [], []
    for one in sets:
        shares = np.array(one["counts"]) / sum(one["counts"])
        for what, chance in (("galaxies", float((shares**2).sum())), ("classes", float(shares.mean()))):
            found = [each["overall" if what == "galaxies" else "macro"] for each in one["purity"]]
            overall.append([one["name"], what, f"{chance:.3f}", *map(interval, found), f"{found[0][0] / chance:.2f}"])
        for number, (name, count) in enumerate(zip(one["classes"], one["counts"], strict=True)):
            found = [each["classes"][number] for each in one["purity"]]
            lift = found[0][0] / shares[number]
            classes.append(
                [one["name"], name, str(count), f"{shares[number]:.3f}", *map(interval, found), f"{lift:.2f}"]
            )
    return (
        table_of(["set", "mean over", "chance", *METHODS, "lift"], overall)
        + "\n\nOf each class:\n\n"
        + table_of(["set", "class", "n", "chance", *METHODS, "lift"], classes)
    )
