import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from galembed.cutouts import coverage, require_coverage, resample
from galembed.errors import NoData


def gaussian(shape: tuple[int, int], center: tuple[float, float], sigma: float) -> np.ndarray:
    y, x = np.mgrid[: shape[0], : shape[1]]
    return np.exp(-((x - center[0]) ** 2 + (y - center[1]) ** 2) / (2 * sigma**2))


def test_same_grid_gives_the_same_pixels() -> None:
    plane = np.random.default_rng(0).normal(size=(40, 50)).astype(np.float32)
    np.testing.assert_allclose(resample(plane, center=(20, 18), side=9, size=9), plane[14:23, 16:25], atol=1e-6)


@given(side=st.floats(5, 120), x=st.floats(40, 60), y=st.floats(40, 60))
def test_a_constant_stays_constant_inside(side: float, x: float, y: float) -> None:
    cutout = resample(np.full((100, 100), 3.5), center=(x, y), side=side, size=16)
    assert np.nanmax(np.abs(cutout - 3.5)) < 1e-5


@pytest.mark.parametrize("side", [24.0, 48.0, 96.0])
def test_surface_brightness_is_conserved_and_the_centre_stays(side: float) -> None:
    center = (61.3, 58.8)
    plane = gaussian((120, 120), center, 6.0)
    size = 48
    cutout = resample(plane, center=center, side=side, size=size)
    step = side / size
    if side == 96:
        assert cutout.sum() * step**2 == pytest.approx(plane.sum(), rel=2e-3)
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    assert abs((cutout * x).sum() / cutout.sum()) * step < 0.05
    assert abs((cutout * y).sum() / cutout.sum()) * step < 0.05


def test_shrinking_averages_the_noise_instead_of_aliasing_it() -> None:
    noise = np.random.default_rng(1).normal(size=(400, 400))
    assert resample(noise, center=(199.5, 199.5), side=320, size=40).std() < 0.15


def test_what_lies_outside_the_frame_is_no_data() -> None:
    cutout = resample(np.ones((20, 20)), center=(0, 9.5), side=20, size=20)
    assert np.isnan(cutout[:, :9]).all()
    assert np.isfinite(cutout[:, 10:]).all()


def test_nan_pixels_do_not_spread() -> None:
    plane = np.ones((30, 30))
    plane[:, :15] = np.nan
    cutout = resample(plane, center=(14.5, 14.5), side=20, size=10)
    np.testing.assert_allclose(cutout[:, 6:], 1, atol=1e-6)
    assert np.isnan(cutout[:, :4]).all()


def test_coverage_counts_pixels_with_data() -> None:
    flux = np.ones((3, 2, 2))
    flux[1, 0] = np.nan
    np.testing.assert_array_equal(coverage(flux), [1, 0.5, 1])
    assert require_coverage(flux, ("g", "r", "z"), 0.4) == 0.5
    with pytest.raises(NoData, match="band r has data in 50% of the cutout, at least 60%"):
        require_coverage(flux, ("g", "r", "z"), 0.6)


def test_a_band_without_any_data_is_always_refused() -> None:
    flux = np.ones((3, 2, 2))
    flux[2] = np.nan
    with pytest.raises(NoData, match="band z has no data anywhere"):
        require_coverage(flux, ("g", "r", "z"), 0.0)
