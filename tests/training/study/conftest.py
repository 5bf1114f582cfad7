"""Galaxies in memory that a tiny network learns in a second."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from galembed.questions import Question, QuestionTree
from galembed.schemas import SOURCES
from training.data.images import Prepared
from training.data.splits import SPLITS
from training.recipe import Recipe
from training.study.scaling import Galaxies

RECIPE = Recipe(architecture="test_convnext", size=32, epochs=2, batch=8, learning_rate=2e-3)
TREE = QuestionTree("two", "", (Question("bright", ("yes", "no")), Question("rare", ("yes", "no"))))


def sources(count: int) -> pa.Table:
    """Return a list of sources without positions."""
    nothing = {name: [None] * count for name in SOURCES.names}
    names = {"survey": ["s"] * count, "source_id": [f"g{i}" for i in range(count)]}
    return pa.table(nothing | names | {"source_uri": ["x"] * count, "source_version": ["v"] * count}, schema=SOURCES)


@pytest.fixture(scope="session")
def galaxies() -> Galaxies:
    """120 pictures for training, 30 for validation, 50 for the test; volunteers vote on their brightness."""
    rng = np.random.default_rng(0)
    count = 200
    level = rng.uniform(40, 200, count)
    pixels = np.clip(level[:, None, None, None] + rng.normal(0, 20, (count, 3, 48, 48)), 0, 255).astype(np.uint8)
    bright = rng.binomial(20, np.clip((level - 40) / 160, 0, 1))
    rare = np.where(np.arange(count) % 10 == 0, 5, 0)
    targets = np.stack([bright, 20 - bright, rare, rare], axis=1).astype(np.float32)
    split = np.repeat(SPLITS, (120, 30, 50))
    prepared = Prepared(pixels, targets, np.arange(count), sources(count), np.ones(count, np.float32), split)
    return Galaxies(*(prepared.part(side) for side in SPLITS), TREE, 32, "digest")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Parquet file of 60 pictures of three classes, told apart by colour."""
    rng = np.random.default_rng(1)
    folder = tmp_path_factory.mktemp("task")
    images, labels = [], []
    for i in range(60):
        pixels = rng.normal(90, 25, (40, 40, 3))
        pixels[8:32, 8:32, i % 3] += 70
        file = folder / "one.png"
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file)
        images.append(file.read_bytes())
        labels.append(("red", "green", "blue")[i % 3])
    file.unlink()
    table = {"id_str": [f"p{i:02}" for i in range(60)], "image": images, "colour": labels}
    pq.write_table(pa.table(table), folder / "pictures.parquet")
    return folder / "pictures.parquet"
