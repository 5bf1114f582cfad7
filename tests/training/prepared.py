"""Prepared images made of noise, for tests of the training loop."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from galembed.questions import QuestionTree, question_tree
from training.data.images import Prepared

SIZE = 32


def noise_images(count: int, seed: int = 0, tree: QuestionTree | None = None) -> Prepared:
    """Return flux images of 1.5 x `SIZE` px, brighter where more votes say smooth."""
    rng = np.random.default_rng(seed)
    columns = (tree or question_tree()).columns
    targets = rng.integers(0, 30, (count, len(columns))).astype(np.float32)
    side = SIZE * 3 // 2
    pixels = rng.normal(5 * targets[:, :1, None, None], 100.0, (count, 3, side, side)).astype(np.float16)
    table = pa.table({name: [f"{name}{i}" for i in range(count)] for name in ("survey", "source_id", "source_version")})
    weights, split = np.ones(count, np.float32), np.full(count, "train")
    return Prepared(pixels, targets, np.arange(count), table, weights, split)
