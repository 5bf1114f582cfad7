import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from galembed.errors import ArtifactNotFound
from galembed.mappings import LEGACY_DR2, LuptonMapping
from galembed.photometry import NJY_PER_NANOMAGGY


def imagine_sdss_rgb(g: float, r: float, z: float) -> list[float]:
    """legacysurvey/imagine's formula for one pixel in nanomaggies, written out for dr2_rgb."""
    m, q = 0.03, 20
    red, green, blue = z * 2.2 + m, r * 3.4 + m, g * 6.0 + m
    intensity = (max(0, red) + max(0, green) + max(0, blue)) / 3
    factor = np.arcsinh(q * intensity) / np.sqrt(q) / (intensity if intensity > 0 else 1e-6)
    return [float(np.clip(channel * factor, 0, 1)) for channel in (red, green, blue)]


@given(st.tuples(*[st.floats(-0.1, 50) for _ in range(3)]))
def test_legacy_dr2_is_the_viewers_formula(nanomaggies: tuple[float, float, float]) -> None:
    flux = np.array(nanomaggies)[:, None, None] * NJY_PER_NANOMAGGY
    channels = LEGACY_DR2.channels(flux)[:, 0, 0]
    np.testing.assert_allclose(channels, imagine_sdss_rgb(*nanomaggies), atol=1e-6)


def test_numpy_and_torch_give_the_same() -> None:
    flux = np.random.default_rng(0).normal(0, 500, (2, 3, 8, 8)).astype(np.float32)
    np.testing.assert_allclose(
        LEGACY_DR2.channels(torch.from_numpy(flux), torch).numpy(), LEGACY_DR2.channels(flux), atol=1e-6
    )


def test_no_data_is_shown_as_empty_sky() -> None:
    flux = np.zeros((3, 1, 2))
    flux[:, 0, 0] = np.nan
    channels = LEGACY_DR2.channels(flux)
    np.testing.assert_array_equal(channels[..., 0], channels[..., 1])


def test_a_mapping_survives_its_dictionary() -> None:
    assert LuptonMapping.from_dict(LEGACY_DR2.to_dict()) == LEGACY_DR2


def test_an_unknown_formula_is_refused() -> None:
    with pytest.raises(ArtifactNotFound, match="'sinh' is unknown"):
        LuptonMapping.from_dict({"formula": "sinh"})
