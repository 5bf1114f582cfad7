from dataclasses import replace

import numpy as np
import pytest
import torch
from astropy.cosmology import FlatLambdaCDM
from scipy.stats import kstest

from galembed.errors import BadRequest
from training.augment import Augmentation, moved_away

STILL = Augmentation(
    rotation=0,
    flip=0,
    zoom=1,
    shear=0,
    shift=0,
    gain=0,
    redshift=0,
    blur=0,
    noise=0,
    colour=0,
    black=0,
    erase=0,
)
SIZE, FIELD = 48, 72


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blobs(*positions: tuple[float, float], n: int = 64, sigma: float = 2.0) -> torch.Tensor:
    """Images (n, 3, 72, 72) with a Gaussian at an (x, y) from the centre, one for each channel."""
    y, x = torch.meshgrid(*[torch.arange(FIELD) - (FIELD - 1) / 2] * 2, indexing="ij")
    channels = [torch.exp(-((x - at[0]) ** 2 + (y - at[1]) ** 2) / (2 * sigma**2)) for at in positions]
    return torch.stack((channels * 3)[:3]).expand(n, 3, FIELD, FIELD).clone()


def moments(images: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Centroid (n, channel, 2) as x and y from the centre, and variance (n, channel) per axis."""
    places = torch.arange(images.shape[-1]) - (images.shape[-1] - 1) / 2
    total = images.sum(dim=(2, 3))
    x, y = ((images.sum(dim=axis) * places).sum(dim=2) / total for axis in (2, 3))
    squares = ((images.sum(dim=axis) * places**2).sum(dim=2) / total for axis in (2, 3))
    return torch.stack([x, y], dim=2).numpy(), ((sum(squares) - x**2 - y**2) / 2).numpy()


def test_everything_off_gives_the_centre() -> None:
    images = torch.randn((4, 3, FIELD, FIELD), generator=generator())
    centre = images[:, :, 12:60, 12:60]
    assert torch.equal(STILL.flux(images, SIZE, generator()), centre)
    pictures = (images * 50).abs().to(torch.uint8)
    assert torch.equal(STILL.display(pictures, SIZE, generator()), pictures[:, :, 12:60, 12:60] / 255)
    channels = torch.rand((8, 3, 16, 16), generator=generator())
    torch.testing.assert_close(STILL.channels(channels, generator()), channels.clamp(1e-4, 1))


@pytest.mark.parametrize("kind", ["flux", "display"])
def test_the_generator_alone_decides(kind: str) -> None:
    augment, images = Augmentation(), 200 * blobs((3, 0), n=4)
    images = images if kind == "flux" else images.to(torch.uint8)

    def augmented(seed: int) -> torch.Tensor:
        source = generator(seed)
        return augment.channels(getattr(augment, kind)(images, SIZE, source), source)

    torch.manual_seed(1)
    first = augmented(1)
    torch.manual_seed(2)
    assert torch.equal(first, augmented(1))
    assert not torch.equal(first, augmented(2))
    assert first.shape == (4, 3, SIZE, SIZE)


def test_the_images_given_are_left_alone() -> None:
    images = blobs((3, 0), n=4)
    for augment in (Augmentation(), replace(STILL, noise=10, gain=1)):
        augment.flux(images, SIZE, generator())
        assert torch.equal(images, blobs((3, 0), n=4))


def test_a_point_is_turned_about_the_centre_by_any_angle() -> None:
    found, _ = moments(replace(STILL, rotation=180).flux(blobs((12, 0), n=512), SIZE, generator()))
    np.testing.assert_allclose(np.hypot(*found[:, 0].T), 12, atol=0.05)
    angles = np.arctan2(found[:, 0, 1], found[:, 0, 0])
    assert kstest(angles, "uniform", args=(-np.pi, 2 * np.pi)).pvalue > 0.01


def test_a_small_rotation_stays_within_its_limit_and_mirrors_nothing() -> None:
    found, _ = moments(replace(STILL, rotation=20).flux(blobs((12, 0), (0, 9)), SIZE, generator()))
    (right, up), angles = (found[:, 0], found[:, 1]), np.degrees(np.arctan2(found[:, 0, 1], found[:, 0, 0]))
    assert 15 < np.abs(angles).max() < 20.1
    np.testing.assert_allclose(right[:, 0] * up[:, 1] - right[:, 1] * up[:, 0], 12 * 9, rtol=0.01)


def test_a_flip_is_a_mirror_image() -> None:
    images = torch.randn((4, 3, FIELD, FIELD), generator=generator())
    mirrored = images[:, :, 12:60, 12:60].flip(-1)
    torch.testing.assert_close(replace(STILL, flip=1).flux(images, SIZE, generator()), mirrored, atol=1e-4, rtol=0)
    found, _ = moments(replace(STILL, flip=0.25).flux(blobs((8, 0), n=400), SIZE, generator()))
    assert np.mean(found[:, 0, 0] < 0) == pytest.approx(0.25, abs=0.06)


def test_a_turned_and_mirrored_image_keeps_its_handedness_half_of_the_time() -> None:
    found, _ = moments(replace(STILL, rotation=180, flip=0.5).flux(blobs((12, 0), (0, 9), n=400), SIZE, generator()))
    cross = found[:, 0, 0] * found[:, 1, 1] - found[:, 0, 1] * found[:, 1, 0]
    np.testing.assert_allclose(np.abs(cross), 12 * 9, rtol=0.01)
    assert np.mean(cross > 0) == pytest.approx(0.5, abs=0.08)


def test_zoom_is_log_uniform_within_its_limits() -> None:
    found, _ = moments(replace(STILL, zoom=1.4).flux(blobs((10, 0), n=512), SIZE, generator()))
    zooms = np.log(found[:, 0, 0] / 10) / np.log(1.4)
    assert np.abs(zooms).max() < 1.01
    assert kstest(zooms, "uniform", args=(-1, 2)).pvalue > 0.01


def test_shear_keeps_areas_and_is_no_rotation() -> None:
    found, _ = moments(replace(STILL, shear=0.2).flux(blobs((10, 0), (0, 10), n=256), SIZE, generator()))
    matrices = found[:, :2].transpose(0, 2, 1) / 10
    np.testing.assert_allclose(np.linalg.det(matrices), 1, atol=0.01)
    np.testing.assert_allclose(matrices[:, 0, 1], matrices[:, 1, 0], atol=0.01)
    widths = np.linalg.svd(matrices, compute_uv=False)
    shears = (widths[:, 0] - widths[:, 1]) / (widths[:, 0] + widths[:, 1])
    assert 0.18 < shears.max() < 0.205
    assert shears.mean() == pytest.approx(0.1, abs=0.01)


def test_shift_is_a_fraction_of_the_field() -> None:
    found, _ = moments(replace(STILL, shift=0.1).flux(blobs((0, 0), n=256), SIZE, generator()))
    assert 0.97 * 0.1 * SIZE < np.abs(found).max() < 1.01 * 0.1 * SIZE
    assert abs(found[:, 0].mean()) < 0.5


def test_no_image_has_dark_corners() -> None:
    flat = torch.full((64, 3, FIELD, FIELD), 7.0)
    wild = replace(STILL, rotation=180, flip=0.5, zoom=2.0, shear=0.3, shift=0.1)
    torch.testing.assert_close(wild.flux(flat, SIZE, generator()), flat[:, :, :SIZE, :SIZE])


def test_blur_keeps_flux_and_widens_each_image_by_its_own_amount() -> None:
    images = blobs((0, 0), n=128)
    blurred = replace(STILL, blur=2.0).flux(images, SIZE, generator())
    torch.testing.assert_close(blurred.sum(dim=(2, 3)), images.sum(dim=(2, 3)), rtol=1e-4, atol=0)
    added = np.sqrt(np.maximum(moments(blurred)[1] - 4, 0))
    np.testing.assert_allclose(added, added[:, :1].repeat(3, axis=1), atol=0.02)
    assert kstest(added[:, 0], "uniform", args=(0, 2.0)).pvalue > 0.01


def test_gain_multiplies_all_bands_alike() -> None:
    images = 1 + blobs((0, 0), n=512)
    ratios = (replace(STILL, gain=0.3).flux(images, SIZE, generator()) / images[:, :, 12:60, 12:60]).numpy()
    np.testing.assert_allclose(ratios, ratios[:, :1, :1, :1] + 0 * ratios, rtol=1e-5)
    assert kstest(np.log(ratios[:, 0, 0, 0]), "norm", args=(0, 0.3)).pvalue > 0.01


def test_noise_has_the_drawn_variance() -> None:
    noisy = replace(STILL, noise=30).flux(torch.zeros(512, 3, FIELD, FIELD), SIZE, generator())
    sigma = noisy.std(dim=(1, 2, 3)).numpy()
    assert kstest(np.sqrt(sigma / 30), "uniform").pvalue > 0.01
    assert abs(noisy.mean()) < 0.05


def test_distance_shrinks_and_dims_as_in_a_flat_universe() -> None:
    z = np.linspace(0.1, 0.5, 9)
    distances = FlatLambdaCDM(H0=70, Om0=0.3).angular_diameter_distance([0.1, *z]).value
    shrink, dimming = (factor.numpy() for factor in moved_away(torch.tensor(z)))
    np.testing.assert_allclose(shrink, distances[0] / distances[1:], rtol=0.02)
    np.testing.assert_allclose(dimming, (1.1 / (1 + z)) ** 4)
    assert (shrink[0], dimming[0]) == (1, 1)


def test_half_of_the_galaxies_are_moved_away_and_their_size_fits_their_brightness() -> None:
    y, x = torch.meshgrid(*[torch.arange(FIELD) - (FIELD - 1) / 2] * 2, indexing="ij")
    disks = (100.0 * (x**2 + y**2 < 10**2)).expand(256, 3, FIELD, FIELD)
    seen = replace(STILL, redshift=0.1).flux(disks, 40, generator()).double()
    dimming = seen[:, 0, 19:21, 19:21].mean(dim=(1, 2)) / 100
    away = dimming < 0.9999
    assert float(away.double().mean()) == pytest.approx(0.5, abs=0.1)
    assert float(dimming.min()) == pytest.approx((1.1 / 1.2) ** 4, rel=0.01)
    redshift = 1.1 / dimming**0.25 - 1
    shrink, _ = moved_away(redshift)
    total = seen[:, 0].sum(dim=(1, 2)) / disks[0, 0].sum()
    torch.testing.assert_close(total, dimming * shrink**2, rtol=0.04, atol=0)


def test_a_galaxy_moved_away_is_seen_no_deeper_than_before() -> None:
    images = 1000 + 10 * torch.randn((200, 3, FIELD, FIELD), generator=generator(1))
    seen = replace(STILL, rotation=180, redshift=0.3, blur=1.0).flux(images, SIZE, generator())
    sigma, moved = seen.std(dim=(2, 3)).square().mean(dim=1).sqrt(), seen.mean(dim=(1, 2, 3)) < 998
    assert float(sigma[moved].mean()) == pytest.approx(10, rel=0.02)
    # The noise is known to a few per cent, from the pixels at the edge.
    assert 9 < sigma[moved].min() < sigma[moved].max() < 11
    assert float(sigma[~moved].mean()) < 6


@pytest.mark.parametrize("missing", ["part", "an image", "all"])
def test_no_data_becomes_empty_sky(missing: str) -> None:
    images = blobs((0, 0), n=8)
    images[:, :, :20] = float("nan")
    images[0 if missing == "an image" else slice(8 if missing == "part" else 0, None)] = float("nan")
    assert torch.isfinite(Augmentation(redshift=0.4).flux(images, SIZE, generator())).all()
    plain = STILL.flux(images, SIZE, generator())
    assert torch.equal(plain, torch.nan_to_num(images)[:, :, 12:60, 12:60])


def test_erasing_blackens_the_share_it_says_and_leaves_the_rest() -> None:
    grey = torch.full((256, 3, 64, 64), 0.5)
    erased = replace(STILL, erase=0.02).channels(grey, generator())
    black = erased[:, 0] == 0
    assert ((erased == 0.5) | black[:, None]).all()
    shares = black.float().mean(dim=(1, 2))
    # Five rectangles of 1% on average, which overlap a little.
    assert float(shares.mean()) == pytest.approx(0.05, rel=0.06)
    assert float(shares.max()) < 0.1


def test_channels_stay_in_range() -> None:
    channels = torch.rand((8, 3, 16, 16), generator=generator())
    jittered = Augmentation(colour=1.0, black=0.5).channels(channels, generator())
    assert jittered.min() >= 0
    assert jittered.max() <= 1
    assert torch.isfinite(jittered).all()


@pytest.mark.parametrize(
    ("name", "value"),
    [("zoom", 0.9), ("flip", 1.5), ("blur", -1.0), ("noise", float("nan")), ("shear", 1.0), ("redshift", 1.0)],
)
def test_a_strength_out_of_range_is_refused(name: str, value: float) -> None:
    with pytest.raises(BadRequest, match=f"augmentation {name} must be from .* got {value}"):
        replace(STILL, **{name: value})
