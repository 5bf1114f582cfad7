"""Fidelity by hand-made engines, whose distance from torch is known."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from galembed.errors import EmbeddingDrift
from galembed.fidelity import Tolerance, centred_cosine, compare, make_trial, measure
from galembed.runtimes import Embedded


class Numbers:
    """Takes its vectors from the pixels themselves, turned by an angle in the plane of the first two numbers."""

    engine, numeric_class = "numbers", "fp32"

    def __init__(self, angle: float = 0.0, noise: float = 0.0) -> None:
        self._angle, self._noise = angle, noise

    def embed(self, images: NDArray[np.float32], kind: str) -> Embedded:
        full = images.reshape(len(images), -1).astype(np.float64)
        turned = full.copy()
        c, s = np.cos(self._angle), np.sin(self._angle)
        turned[:, 0], turned[:, 1] = c * full[:, 0] - s * full[:, 1], s * full[:, 0] + c * full[:, 1]
        if self._noise:
            turned += np.random.default_rng(len(images)).normal(0, self._noise, turned.shape)
        norms = np.linalg.norm(turned, axis=1)
        vectors = turned / norms[:, None]
        return Embedded(vectors.astype(np.float32), norms.astype(np.float32), vectors[:, :2].astype(np.float32))


def images(count: int, seed: int, offset: float = 0.0) -> dict[str, NDArray[np.float32]]:
    drawn = np.random.default_rng(seed).normal(0, 1, (count, 3, 2, 2)) + offset
    return {"flux": drawn.astype(np.float32)}


def test_torch_agrees_with_itself() -> None:
    found = compare(Numbers(), make_trial(Numbers(), images(200, 0), images(300, 1)))
    assert (found.images, found.gallery) == (200, 300)
    assert found.cosine_min == pytest.approx(1, abs=1e-6)
    assert found.norm_error == found.prediction_error == found.probe_drop == 0
    assert found.overlap == 1
    Tolerance().require(found)


def test_a_plane_turned_gives_the_cosine_of_the_angle() -> None:
    flat = images(50, 2)["flux"]
    flat[:, 0, 1:], flat[:, 1:] = 0, 0
    flat -= flat.mean(axis=0)
    found = measure(Numbers(0.3), Numbers(), {"flux": flat})
    assert found.cosine_p1 == pytest.approx(np.cos(0.3), abs=1e-6)
    assert found.cosine_median == pytest.approx(np.cos(0.3), abs=1e-6)
    assert np.isnan(found.overlap)


def test_what_images_have_in_common_does_not_hide_damage() -> None:
    far = images(400, 3, offset=30.0)
    ours, theirs = Numbers(noise=1.0).embed(far["flux"], "flux"), Numbers().embed(far["flux"], "flux")
    raw = (ours.vectors * theirs.vectors).sum(axis=1)
    assert raw.min() > 0.998
    assert np.median(centred_cosine(ours, theirs)) < 0.85  # signal and noise of equal size: 1 / sqrt(2)


def test_neighbours_shared_by_chance_are_few() -> None:
    found = compare(Numbers(noise=50.0), make_trial(Numbers(), images(200, 4), images(1000, 5)))
    assert found.overlap < 0.05
    assert found.probe_drop > 0.3


def test_doors_are_compared_together_and_cut_alike() -> None:
    both = images(30, 6) | {"display": images(20, 7)["flux"]}
    trial = make_trial(Numbers(), both, images(40, 8))
    part = trial.part(5, 10)
    assert compare(Numbers(), trial).images == 50
    assert compare(Numbers(), part).cosine_min == pytest.approx(1, abs=1e-6)
    assert len(part.truth.norms) == 10
    assert part.gallery_truth is not None
    assert len(part.gallery_truth.norms) == 10


@pytest.mark.parametrize("numbers", [(), (True, True)])
def test_a_number_is_compared_in_units_of_the_largest(numbers: tuple[bool, ...]) -> None:
    few = images(10, 9)
    raw = measure(Numbers(0.1), Numbers(), few).prediction_error
    found = measure(Numbers(0.1), Numbers(), few, numbers=numbers).prediction_error
    assert found == pytest.approx(raw) if not numbers else found > raw


def test_nan_is_no_agreement() -> None:
    class Broken(Numbers):
        def embed(self, images: NDArray[np.float32], kind: str) -> Embedded:
            true = super().embed(images, kind)
            return Embedded(true.vectors * np.nan, true.norms, true.predictions)

    found = compare(Broken(), make_trial(Numbers(), images(150, 10), images(150, 11)))
    with pytest.raises(EmbeddingDrift, match=r"cosine nan < 0\.99999"):
        Tolerance().require(found)
    assert found.to_dict()["overlap"] is None
