import io

import numpy as np
import pytest
from PIL import Image

from galembed.mappings import LEGACY_DR2, MAPPINGS
from galembed.thumbnails import image_of, jpeg, thumbnail


def square(side=128, *, top=0.0):
    """A red half below, and `top` (nJy) in all bands above."""
    flux = np.zeros((3, side, side), np.float32)
    flux[2, : side // 2] = 1000
    flux[:, side // 2 :] = top
    return flux


@pytest.mark.parametrize(("side", "expected"), [(128, 64), (64, 64), (32, 32)])
def test_picture_is_small_and_never_larger_than_the_cutout(side, expected):
    assert image_of(thumbnail(square(side), LEGACY_DR2)).shape == (expected, expected, 3)


def test_red_below_stays_red_below():
    image = image_of(thumbnail(square(), LEGACY_DR2))
    assert image[10, 32, 0] > 200
    assert image[10, 32, 2] < 60
    assert image[54, 32].max() < 60
    top_first = np.asarray(Image.open(io.BytesIO(thumbnail(square(), LEGACY_DR2))))
    assert top_first[54, 32, 0] > 200


def test_even_sky_has_the_mappings_own_colour():
    flux = np.full((3, 100, 100), 20, np.float32)
    expected = LEGACY_DR2.channels(flux)[:, 0, 0]
    np.testing.assert_allclose(image_of(thumbnail(flux, LEGACY_DR2))[32, 32] / 255, expected, atol=0.03)


@pytest.mark.parametrize("side", [32, 64, 96])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_missing_data_is_empty_sky(value, side):
    flux = np.full((3, side, side), value, np.float32)
    empty = np.zeros((3, side, side), np.float32)
    assert thumbnail(flux, LEGACY_DR2) == thumbnail(empty, LEGACY_DR2)
    empty[:, :, side // 2 :] = flux[:, :, side // 2 :]
    assert np.ptp(image_of(thumbnail(empty, LEGACY_DR2))) == 0


@pytest.mark.parametrize("mapping", MAPPINGS.values(), ids=MAPPINGS)
def test_no_flux_is_too_bright_or_too_negative(mapping):
    flux = np.random.default_rng(0).choice([-1e30, -1.0, 0.0, 1.0, 1e30], (3, 96, 96)).astype(np.float32)
    assert image_of(thumbnail(flux, mapping)).shape == (64, 64, 3)


def test_display_images_are_averaged():
    pixels = np.zeros((3, 128, 128), np.uint8)
    pixels[:, ::2] = 200
    np.testing.assert_allclose(image_of(thumbnail(pixels, LEGACY_DR2)), 100, atol=2)


def test_floats_and_bytes_make_the_same_picture():
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    assert jpeg(image) == jpeg(image / 255)
