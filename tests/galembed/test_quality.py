"""Warnings about pictures, on pictures whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from galembed.quality import FLAGS, flags_of

SIZE = 96


def field(*sources: tuple[float, float, float], noise: float = 1.0, seed: int = 0) -> NDArray[np.float32]:
    """Noise and Gaussian sources (x, y, peak) of 3 px sigma, the same in three bands but for the noise."""
    rng = np.random.default_rng(seed)
    yy, xx = np.mgrid[:SIZE, :SIZE]
    light = sum(
        (peak * np.exp(-((xx - x) ** 2 + (yy - y) ** 2) / 18) for x, y, peak in sources), np.zeros((SIZE, SIZE))
    )
    return (light + rng.normal(0, noise, (3, SIZE, SIZE))).astype(np.float32)


MIDDLE = (SIZE / 2, SIZE / 2, 30.0)
CORNER = (10.0, 12.0, 400.0)


@pytest.mark.parametrize("seed", range(5))
def test_a_galaxy_in_the_middle_raises_no_flag(seed: int) -> None:
    assert flags_of(field(MIDDLE, seed=seed)) == ""
    assert flags_of(field(MIDDLE, (20.0, 80.0, 60.0), seed=seed)) == ""


@pytest.mark.parametrize("seed", range(5))
def test_noise_alone_is_blank(seed: int) -> None:
    assert flags_of(field(seed=seed)) == "blank"


def test_a_constant_picture_is_blank() -> None:
    assert flags_of(np.full((3, SIZE, SIZE), 7.0, np.float32)) == "blank"


@pytest.mark.parametrize("middle", [(), ((SIZE / 2, SIZE / 2, 8.0),)])
def test_light_that_is_not_in_the_middle_is_a_neighbours(middle: tuple[tuple[float, float, float], ...]) -> None:
    assert flags_of(field(CORNER, *middle)) == "neighbour"


def test_a_bright_stars_mask_and_the_surveys_edge_are_told() -> None:
    assert flags_of(field(MIDDLE), star_share=0.6) == "star"
    assert flags_of(field(MIDDLE), star_share=0.4) == ""
    assert flags_of(field(CORNER), partial=True) == "partial neighbour"


def test_missing_data_are_neither_light_nor_noise() -> None:
    flux = field(MIDDLE)
    flux[:, :, 60:] = np.nan
    flux[1, :8] = np.nan
    assert flags_of(flux) == ""
    flux[:] = np.nan
    assert flags_of(flux) == "blank"


def test_every_word_is_explained() -> None:
    words = {word for flux in (field(), field(CORNER)) for word in flags_of(flux, partial=True, star_share=0).split()}
    assert words | {"star"} == set(FLAGS)
