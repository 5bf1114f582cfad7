import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates

from galembed.cutouts import coverage, require_coverage, resample, resample_at
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


def grid(center: tuple[float, float], step: float, size: int, degrees: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Positions of a square grid in the input's pixels, turned counter-clockwise."""
    across, up = np.meshgrid(*(2 * [(np.arange(size) - (size - 1) / 2) * step]))
    turn = np.radians(degrees)
    x = center[0] + np.cos(turn) * across - np.sin(turn) * up
    return x, center[1] + np.sin(turn) * across + np.cos(turn) * up


@settings(max_examples=30)
@given(x=st.floats(-30, 90), y=st.floats(-30, 90), side=st.sampled_from([10.0, 12.0, 20.0, 31.7, 60.0]))
def test_the_kernel_is_a_triangle(x: float, y: float, side: float) -> None:
    """Against the definition, written out pixel by pixel."""
    plane = np.random.default_rng(3).normal(size=(60, 50))
    plane[20:28, 15:30] = np.nan
    size = 12
    expected, doubtful = np.full((size, size), np.nan), np.zeros((size, size), bool)
    reach = max(side / size, 1)
    pixels = np.arange(-200, 300)
    for row, at_y in enumerate(y + (np.arange(size) - (size - 1) / 2) * side / size):
        for column, at_x in enumerate(x + (np.arange(size) - (size - 1) / 2) * side / size):
            rows, columns = (np.clip(1 - np.abs(pixels - at) / reach, 0, None) for at in (at_y, at_x))
            weights = np.outer(rows / rows.sum(), columns / columns.sum())[200:260, 200:250]
            share = weights[np.isfinite(plane)].sum()
            doubtful[row, column] = abs(share - 0.5) < 1e-6  # rounding decides
            if share > 0.5:
                expected[row, column] = np.nansum(weights * plane) / share
    cutout = resample(plane, center=(x, y), side=side, size=size)
    np.testing.assert_allclose(cutout[~doubtful], expected[~doubtful], atol=1e-5)


@pytest.mark.parametrize("side", [8.0, 12.0, 27.0])
def test_planes_given_together_are_those_given_alone(side: float) -> None:
    planes = np.random.default_rng(4).normal(size=(2, 3, 40, 30))
    planes[0, 1, 10:20, 10:20] = np.nan
    planes[1, 2] = np.nan
    together = resample(planes, center=(14.2, 18.9), side=side, size=12)
    assert together.shape == (2, 3, 12, 12)
    assert together.dtype == np.float32
    for plane in np.ndindex(2, 3):
        np.testing.assert_array_equal(together[plane], resample(planes[plane], center=(14.2, 18.9), side=side, size=12))


@pytest.mark.parametrize("side", [12.0, 30.0])
def test_a_cutout_is_a_copy(side: float) -> None:
    planes = np.ones((3, 40, 40), np.float32)
    resample(planes, center=(20.5, 20.5), side=side, size=12)[...] = 7
    assert (planes == 1).all()


@pytest.mark.parametrize("center", [(1e6, 20.0), (20.0, -1e6), (-100.0, -100.0)])
@pytest.mark.parametrize("side", [12.0, 30.0, 200.0])
def test_a_square_off_the_frame_holds_no_data(center: tuple[float, float], side: float) -> None:
    assert np.isnan(resample(np.ones((3, 40, 40)), center=center, side=side, size=12)).all()
    x, y = grid(center, side / 12, 12)
    assert np.isnan(resample_at(np.ones((3, 40, 40)), x, y, step=side / 12)).all()


@given(x=st.floats(0, 90), y=st.floats(0, 90), step=st.floats(0.3, 8))
def test_any_positions_along_the_axes_give_the_same_as_a_square(x: float, y: float, step: float) -> None:
    planes = np.random.default_rng(5).normal(size=(2, 90, 80)).astype(np.float32)
    planes[0, 30:40, 20:50] = np.nan
    size = 10
    expected = resample(planes, center=(x, y), side=step * size, size=size)
    got = resample_at(planes, *grid((x, y), step, size), step=step)
    both = np.isfinite(got) & np.isfinite(expected)
    np.testing.assert_allclose(got[both], expected[both], atol=1e-4)
    assert (np.isfinite(got) != np.isfinite(expected)).sum() <= 2  # where the share is one half, rounding decides


@pytest.mark.parametrize("step", [9.0, 13.3, 24.0])
def test_long_steps_in_two_agree_with_one(step: float) -> None:
    side = 24 * step
    y, x = np.mgrid[: int(side) + 60, : int(side) + 60]
    center = (side / 2 + 30.3, side / 2 + 29.1)
    for wave, worst in ((3, 0.012), (8, 0.0025)):
        plane = np.sin(2 * np.pi * (x + 0.4 * y) / np.hypot(1, 0.4) / (wave * step))
        plane[:5] = np.nan
        expected = resample(plane, center=center, side=side, size=24)
        got = resample_at(plane, *grid(center, step, 24), step=step)
        np.testing.assert_allclose(got, expected, atol=worst)


@pytest.mark.parametrize("degrees", [30.0, 90.0, 200.0])
def test_a_turned_grid_at_the_native_scale_is_linear_interpolation(degrees: float) -> None:
    plane = np.random.default_rng(6).normal(size=(80, 70))
    x, y = grid((34.2, 41.7), 1.0, 24, degrees)
    expected = map_coordinates(plane, [y, x], order=1)
    np.testing.assert_allclose(resample_at(plane, x, y, step=1.0), expected, atol=1e-5)


@pytest.mark.parametrize("step", [1.0, 2.5, 7.0, 20.0])
def test_a_turned_galaxy_keeps_flux_place_and_angle(step: float) -> None:
    """An elliptical Gaussian blurred by the kernel: the triangle adds reach^2 / 6 to each second moment."""
    size, degrees = 40, 35.0
    long, short = 5 * step, 3 * step
    half = int(size * step * 0.8) + 5
    y, x = np.mgrid[-half : half + 1, -half : half + 1]
    plane = np.exp(-(x**2) / (2 * long**2) - y**2 / (2 * short**2))
    across, up = grid((half + 0.3, half - 0.2), step, size, degrees)
    cutout = resample_at(plane, across, up, step=step)
    assert cutout.sum() * step**2 == pytest.approx(2 * np.pi * long * short, rel=2e-3)
    dx, dy = across - half, up - half
    mean_x, mean_y, xx, yy, xy = ((cutout * m).sum() / cutout.sum() for m in (dx, dy, dx**2, dy**2, dx * dy))
    assert np.hypot(mean_x, mean_y) < 0.01 * step
    assert xx == pytest.approx(long**2 + step**2 / 6, rel=0.01)
    assert yy == pytest.approx(short**2 + step**2 / 6, rel=0.01)
    assert abs(xy) < 0.002 * long * short


def test_unknown_positions_are_no_data_and_spread_to_nothing() -> None:
    x, y = grid((20, 20), 1.5, 10, 20)
    known = resample_at(np.ones((40, 40)), x, y, step=1.5)
    x[3, 4] = np.nan
    y[5, 6] = np.inf
    known[3, 4] = known[5, 6] = np.nan
    np.testing.assert_allclose(resample_at(np.ones((40, 40)), x, y, step=1.5), known, rtol=1e-6)


@pytest.mark.parametrize("step", [1.0, 3.0, 12.0])
def test_nan_pixels_do_not_spread_on_a_turned_grid(step: float) -> None:
    half = int(20 * step)
    plane = np.ones((2 * half + 1, 2 * half + 1))
    plane[:, :half] = np.nan
    x, y = grid((half, half), step, 16, 25)
    cutout = resample_at(plane, x, y, step=step)
    np.testing.assert_allclose(cutout[x > half + step], 1, atol=1e-5)
    assert np.isnan(cutout[x < half - step]).all()


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
