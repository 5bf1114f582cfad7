"""The purity of neighbours that benchmarks/real_labels.py reports."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

_PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "real_neighbours.py"
_SPEC = importlib.util.spec_from_file_location("real_neighbours", _PATH)
assert _SPEC is not None
assert _SPEC.loader is not None
real_neighbours = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(real_neighbours)


def test_classes_that_lie_apart_are_pure_and_noise_is_chance() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [600, 200, 40])
    apart = np.eye(3)[labels] + rng.normal(0, 0.05, (840, 3))
    noise = rng.normal(size=(840, 8))
    shares = real_neighbours.own_class(apart, labels, np.arange(840))
    assert shares.min() == 1
    found = real_neighbours.purity(real_neighbours.own_class(noise, labels, np.arange(840)), labels)
    parts = np.bincount(labels) / 840
    assert found["overall"][0] == pytest.approx((parts**2).sum(), abs=0.03)
    assert found["macro"][0] == pytest.approx(1 / 3, abs=0.03)
    for (mean, low, high), part in zip(found["classes"], parts, strict=True):
        assert low <= mean <= high
        assert mean == pytest.approx(part, abs=0.06)


def test_what_is_left_out_does_not_shorten_the_list() -> None:
    """A galaxy that is there three times: the nine others of its class and one of the other are its neighbours."""
    labels = np.array([0] * 12 + [1] * 10)
    angle = np.concatenate([np.zeros(3), np.linspace(0.1, 0.2, 9), np.linspace(1, 1.1, 10)])
    vectors = np.column_stack([np.cos(angle), np.sin(angle)])
    galaxies = np.array([0, 0, 0, *range(1, 20)])
    assert real_neighbours.own_class(vectors, labels, galaxies)[0] == pytest.approx(0.9)
    assert real_neighbours.own_class(vectors, labels, np.arange(22))[0] == 1


def test_equal_pictures_and_equal_names_are_one_galaxy() -> None:
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 3, 4, 4), np.uint8)
    images[3] = images[0]
    galaxies = real_neighbours.same_galaxies(images, ["a", "b", "c", "b", "d"])
    assert len(set(galaxies[[0, 1, 3]])) == 1
    assert len(set(galaxies)) == 3
