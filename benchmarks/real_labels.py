"""Linear probes and neighbours of the built-in backbone on real labelled galaxies, beside three baselines.

    python benchmarks/real_labels.py --data ../shared/data --out docs/real-labels.md [--work DIR] [--backbone builtin]

Every set is a Parquet file of JPEGs (`jpeg`, `label`). Baselines: the same architecture with random weights (three
seeds), the first 64 principal components of the 32 px pixels, and hand-made features (concentration, asymmetry, Gini,
ellipticity, size, colours; photutils). All methods get the same crop.

Probes: the same folds and classifier for all, logistic regression on standardised features, classes weighted, strength
chosen inside each training part; the figure is balanced accuracy over five stratified folds, mean and standard
deviation.

Neighbours: how many of the 10 nearest by cosine are of a galaxy's own class, of vectors as a store keeps them and of
the baselines' standardised features. Left out are the galaxy itself, the same picture and the same id or name.

What the vectors tell of the observation is measured by `real_nuisances.py`, and stands on the same page.

With --work, what was measured is kept there, set by set, so that a stopped run goes on; give a new folder after a
change of this script.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from photutils.aperture import CircularAperture
from photutils.morphology import data_properties, gini
from PIL import Image
from real_neighbours import METHODS, NEIGHBOURS, kept, own_class, purity, purity_tables, same_galaxies, table_of
from real_nuisances import nuisance_page
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from galembed.backbones import Backbone, load_backbone, save_backbone
from galembed.runtimes import Runtime, open_runtime
from galembed.sources.images import read_picture


@dataclass(frozen=True)
class LabelledSet:
    """One set: pictures, labels and what they are called, and the centre fraction that holds the galaxy."""

    name: str
    file: str
    crop: float
    select: Callable[[pa.Table, Path], tuple[np.ndarray, np.ndarray]]
    classes: dict[int, str]


def by_label(*left_out: int, merge: dict[int, int] | None = None) -> Callable[[pa.Table, Path], tuple]:
    def select(table: pa.Table, _: Path) -> tuple[np.ndarray, np.ndarray]:
        labels = table["label"].to_numpy()
        labels = np.array([(merge or {}).get(int(label), int(label)) for label in labels])
        return ~np.isin(labels, left_out), labels

    return select


def by_vote_winners(table: pa.Table, data: Path) -> tuple[np.ndarray, np.ndarray]:
    """Winner of GZ2's first three questions: smooth, edge-on disk, barred, other featured; artifacts left out."""
    votes = pq.read_table(data / "votes" / "gz2_votes_1000_open.parquet")
    by_id = {row["asset_id"]: row for row in votes.to_pylist()}
    questions = {
        1: [
            "t01_smooth_or_features_a01_smooth",
            "t01_smooth_or_features_a02_features_or_disk",
            "t01_smooth_or_features_a03_star_or_artifact",
        ],
        2: ["t02_edgeon_a04_yes", "t02_edgeon_a05_no"],
        3: ["t03_bar_a06_bar", "t03_bar_a07_no_bar"],
    }

    def winner(row: dict, question: int) -> int:
        shares = []
        for answer in questions[question]:
            value = row.get(f"{answer}_weighted_fraction", row.get(f"{answer}_fraction"))
            shares.append(-1.0 if value is None else value)
        return int(np.argmax(shares))

    labels = []
    for asset in table["asset_id"].to_pylist():
        row = by_id[asset]
        first = winner(row, 1)
        if first != 1:
            labels.append(0 if first == 0 else -1)
        elif winner(row, 2) == 0:
            labels.append(1)
        else:
            labels.append(2 if winner(row, 3) == 0 else 3)
    found = np.array(labels)
    return found >= 0, found


KAGGLE = {0: "round smooth", 1: "in-between smooth", 2: "cigar", 3: "edge-on disk", 4: "spiral"}
WINNERS = {0: "smooth", 1: "edge-on disk", 2: "barred", 3: "other featured"}
GZ1 = {0: "elliptical", 1: "spiral", 3: "edge-on or unclear", 4: "star or artefact", 5: "merger"}

SETS = (
    LabelledSet("gz2_kaggle_5class", "gz2_kaggle_5class/gz2_kaggle_5class_open.parquet", 0.5, by_label(), KAGGLE),
    LabelledSet(
        "gz2_kaggle_5class without cigars",
        "gz2_kaggle_5class/gz2_kaggle_5class_open.parquet",
        0.5,
        by_label(2),
        KAGGLE,
    ),
    LabelledSet(
        "gz2_votes_1000, vote winners", "gz2_votes_1000/gz2_votes_1000_open.parquet", 0.5, by_vote_winners, WINNERS
    ),
    LabelledSet("gz1_small, chiralities merged", "gz1_small/gz1_small_open.parquet", 1.0, by_label(merge={2: 1}), GZ1),
    LabelledSet(
        "gz_decals_rings",
        "gz_decals_rings/gz_decals_rings_open.parquet",
        0.5,
        by_label(),
        {0: "no ring", 1: "ring"},
    ),
)


def pictures(table: pa.Table, crop: float, size: int) -> np.ndarray:
    """Return (n, 3, size, size) uint8, bottom row first, as `galembed embed` reads them."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "picture.jpg"
        out = []
        for jpeg in table["jpeg"].to_pylist():
            file.write_bytes(jpeg)
            try:
                out.append(read_picture(file, crop=crop, size=size))
            except ValueError:
                # A blank picture would be a failure in a job; here it keeps its place so that labels line up.
                with Image.open(io.BytesIO(jpeg)) as picture:
                    out.append(np.zeros((3, size, size), np.uint8) + np.asarray(picture).min().astype(np.uint8))
        return np.stack(out)


def embed(runtime: Runtime, images: np.ndarray) -> np.ndarray:
    return np.concatenate([runtime.embed(images[i : i + 64], "display").vectors for i in range(0, len(images), 64)])


def untrained_backbone(backbone: Backbone, seed: int, path: Path) -> Backbone:
    """A backbone directory of the same architecture and contract with random weights."""
    import torch

    from galembed.network import GalaxyNetwork

    torch.manual_seed(seed)
    contract = backbone.contract
    network = GalaxyNetwork.for_contract(backbone.architecture, backbone.architecture_args, contract).eval()
    samples = backbone.samples()
    with torch.inference_mode():
        features = network.features(network.channels_from_flux(torch.from_numpy(samples["flux"])))
        network.centring_mean.copy_(features.mean(dim=0))
    return save_backbone(
        path,
        name=f"untrained-{seed}",
        architecture=backbone.architecture,
        architecture_args=backbone.architecture_args,
        contract=contract,
        questions=None,
        weights={key: value.numpy() for key, value in network.state_dict().items()},
        samples=samples,
        provenance={"seed": seed},
    )


def pixels(images: np.ndarray) -> np.ndarray:
    """Return 32 px pictures as rows."""
    small = images.reshape(len(images), 3, 32, images.shape[-1] // 32, 32, images.shape[-1] // 32).mean(axis=(3, 5))
    return small.reshape(len(images), -1)


def hand_made(images: np.ndarray) -> np.ndarray:
    """Concentration, asymmetry, Gini, ellipticity, size, central surface brightness and colours of each picture."""
    return np.stack([_hand_made(image.astype(float)) for image in images])


def _hand_made(image: np.ndarray) -> list[float]:
    size = image.shape[-1]
    edge = np.concatenate([image[:, :4].reshape(3, -1), image[:, -4:].reshape(3, -1)], axis=1)
    image = image - np.median(edge, axis=1)[:, None, None]
    grey = image.mean(axis=0)
    noise = 1.48 * np.median(np.abs(grey[:4] - np.median(grey[:4]))) + 0.5
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    inside = np.hypot(x, y) < size * 0.45
    bright = np.where((grey > 2 * noise) & inside, grey, 0)
    total = bright.sum()
    if total <= 0 or np.count_nonzero(bright) < 10:
        return [0.0] * 11
    shape = data_properties(bright)
    center = tuple(np.nan_to_num(shape.centroid, nan=size / 2))
    radii = np.arange(1, size * 0.45)
    growth = np.array([CircularAperture(center, radius).do_photometry(bright)[0][0] for radius in radii]) / total
    r20, r50, r80 = (float(np.interp(share, growth, radii)) for share in (0.2, 0.5, 0.8))
    turned = np.rot90(grey, 2)
    asymmetry = float(np.abs(grey - turned)[inside].sum() / max(np.abs(grey[inside]).sum(), 1e-9))
    core = np.hypot(x, y) < r50
    colours = [float(image[a][core].sum() / max(image[1][core].sum(), 1e-9)) for a in (0, 2)]
    outer = ~core & (bright > 0)
    gradient = float(image[2][outer].sum() / max(image[0][outer].sum(), 1e-9)) - colours[1] / max(colours[0], 1e-3)
    return list(
        np.nan_to_num(
            [
                5 * np.log10(max(r80, 1e-3) / max(r20, 1e-3)),
                asymmetry,
                float(gini(bright[inside])),
                float(shape.elongation.value),
                float(shape.ellipticity.value),
                r50 / size,
                r80 / size,
                float(grey.max()),
                *colours,
                gradient,
            ],
            posinf=0,
            neginf=0,
        )
    )


def score(features: np.ndarray, labels: np.ndarray, components: int = 0) -> tuple[float, float]:
    """Return mean and standard deviation of balanced accuracy over five folds."""
    steps = [StandardScaler(), *([PCA(components, random_state=0)] if components else [])]
    model = make_pipeline(*steps, LogisticRegression(class_weight="balanced", max_iter=3000))
    grid = {"logisticregression__C": [1e-3, 1e-2, 1e-1, 1.0]}
    scores = []
    for train, test in StratifiedKFold(5, shuffle=True, random_state=0).split(features, labels):
        inner = GridSearchCV(
            model, grid, scoring="balanced_accuracy", cv=StratifiedKFold(3, shuffle=True, random_state=1)
        )
        inner.fit(features[train], labels[train])
        scores.append(balanced_accuracy_score(labels[test], inner.predict(features[test])))
    return float(np.mean(scores)), float(np.std(scores))


def features(table: pa.Table, crop: float, runtime: Runtime, untrained: list[Runtime], size: int) -> dict[str, Any]:
    """Return the features of all methods, and a number for each galaxy (see `same_galaxies`)."""
    images = pictures(table, crop, size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hand = hand_made(images)
    return {
        "galaxies": same_galaxies(images, table["name"].to_pylist()),
        "backbone": embed(runtime, images),
        **{f"untrained_{number}": embed(network, images) for number, network in enumerate(untrained)},
        "pixels": pixels(images),
        "hand": hand,
    }


def measure(item: LabelledSet, labels: np.ndarray, found: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the scores and purities of one set, by method."""
    galaxies = np.unique(found["galaxies"], return_inverse=True)[1]
    random = [name for name in found if name.startswith("untrained")]

    def probed(name: str) -> tuple[float, float]:
        components = 64 if name == "pixels" else 0
        return tuple(kept(folder / f"{name}.json", lambda: score(found[name], labels, components)))

    def neighbourly(values: np.ndarray) -> np.ndarray:
        return own_class(values, labels, galaxies)

    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore")
        scores = {name: probed(name) for name in ("backbone", *random, "pixels", "hand")}
        components = make_pipeline(StandardScaler(), PCA(64, random_state=0)).fit_transform(found["pixels"])
    shares = [
        neighbourly(found["backbone"]),
        np.mean([neighbourly(found[name]) for name in random], axis=0),
        neighbourly(components),
        neighbourly(StandardScaler().fit_transform(found["hand"])),
    ]
    classes, counts = np.unique(labels, return_counts=True)
    return {
        "name": item.name,
        "classes": [item.classes[int(one)] for one in classes],
        "counts": counts.tolist(),
        "left_out": len(labels) - len(np.unique(galaxies)),
        "probes": [
            scores["backbone"],
            tuple(np.mean([scores[name] for name in random], axis=0)),
            scores["pixels"],
            scores["hand"],
        ],
        "purity": [purity(each, labels) for each in shares],
    }


def probe_table(sets: list[dict[str, Any]]) -> str:
    rows = [
        [
            one["name"],
            str(sum(one["counts"])),
            str(len(one["counts"])),
            f"{1 / len(one['counts']):.2f}",
            *(f"{mean:.3f} ± {spread:.3f}" for mean, spread in one["probes"]),
        ]
        for one in sets
    ]
    return table_of(["set", "n", "classes", "chance", *METHODS], rows)


def page(backbone: Backbone, sets: list[dict[str, Any]], nuisances: str) -> str:
    left_out = ", ".join(f"{one['name']} {one['left_out']}" for one in sets if one["left_out"]) or "none in any set"
    return f"""# The built-in backbone on real galaxies

Backbone `{backbone.name}` (`{backbone.embedding_id[:12]}`), {backbone.contract.size} px; made by
`python benchmarks/real_labels.py --data ../shared/data --out docs/real-labels.md`.

## Linear probes

Balanced accuracy, five folds.

{probe_table(sets)}

## Neighbours

Purity@{NEIGHBOURS}: the share of a galaxy's {NEIGHBOURS} nearest neighbours (cosine) that are of its own class, with
95% intervals by bootstrap over galaxies. Vectors as a store keeps them; the baselines' features standardised. The
galaxy itself, equal pictures and equal ids are left out (galaxies that are there again: {left_out}); of the rings
positions are known too, and no two lie within 300 arcsec.

Chance is what random neighbours give: for a class its share of the set. The mean over galaxies is ruled by common
classes; the mean over classes counts each the same, and its chance is the mean share. Lift: this backbone over chance.

{purity_tables(sets)}

{nuisances}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--backbone", default="builtin")
    parser.add_argument("--work", type=Path, help="Folder for what was measured and for stores; else a temporary one")
    parser.add_argument("--out", type=Path, help="Markdown file; printed as well")
    options = parser.parse_args()
    backbone = load_backbone(options.backbone)
    scratch = tempfile.TemporaryDirectory()
    work = options.work or Path(scratch.name)
    work.mkdir(parents=True, exist_ok=True)
    seeds = (0, 1, 2)
    for seed in seeds:
        if not (work / f"untrained-{seed}").exists():
            untrained_backbone(backbone, seed, work / f"untrained-{seed}")
    networks = [load_backbone(work / f"untrained-{seed}") for seed in seeds]
    runtimes = [open_runtime(one, "torch") for one in (backbone, *networks)]
    sets = []
    for number, item in enumerate(SETS):
        table = pq.read_table(options.data / "images" / item.file)
        keep, labels = item.select(table, options.data)
        file = work / f"{Path(item.file).stem}-{backbone.embedding_id[:12]}.npz"
        if not file.exists():
            np.savez(file, **features(table, item.crop, runtimes[0], runtimes[1:], backbone.contract.size))
        folder = work / f"set-{number}-{backbone.embedding_id[:12]}"
        folder.mkdir(exist_ok=True)
        with np.load(file) as found:
            sets.append(measure(item, labels[keep], {name: values[keep] for name, values in found.items()}, folder))
        print(f"{item.name}: {sets[-1]['probes']}", file=sys.stderr, flush=True)
    nuisances = nuisance_page(options.data, options.backbone, work / "untrained-0", work)
    text = page(backbone, sets, nuisances)
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
