import pytest
import torch

from training.augment import Augmentation

QUIET = Augmentation(zoom=1.0, shift=0.0, gain=0.0, noise=0.0, blur=0.0, colour=0.0, black=0.0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def disk(size: int = 72, radius: float = 8.0) -> torch.Tensor:
    y, x = torch.meshgrid(*[torch.arange(size) - (size - 1) / 2] * 2, indexing="ij")
    return torch.exp(-(x**2 + y**2) / (2 * radius**2)).expand(4, 3, size, size).clone()


def test_turning_a_round_galaxy_changes_nothing_and_keeps_the_scale() -> None:
    turned = QUIET.flux(disk(), 48, generator())
    assert turned.shape == (4, 3, 48, 48)
    torch.testing.assert_close(turned, disk()[:, :, 12:60, 12:60], atol=0.01, rtol=0)


def test_the_seed_decides_everything() -> None:
    augment = Augmentation()
    first, again, other = (augment.flux(disk(), 48, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_zoom_stays_within_its_limits() -> None:
    wide = Augmentation(zoom=1.5, shift=0, gain=0, noise=0, blur=0, colour=0, black=0)
    images = disk().repeat(16, 1, 1, 1)
    zoomed = wide.flux(images, 48, generator())
    flux = zoomed.sum(dim=(1, 2, 3)) / QUIET.flux(images, 48, generator()).sum(dim=(1, 2, 3))
    assert flux.min() > 1 / 1.5**2 * 0.95
    assert flux.max() < 1.5**2 * 1.05
    assert flux.std() > 0.2


def test_channels_stay_in_range_and_quiet_jitter_is_none() -> None:
    channels = torch.rand((8, 3, 16, 16), generator=generator())
    jittered = Augmentation().channels(channels, generator())
    assert jittered.min() >= 0
    assert jittered.max() <= 1
    torch.testing.assert_close(QUIET.channels(channels, generator()), channels.clamp(1e-4, 1), atol=1e-6, rtol=0)


def test_no_data_becomes_empty_sky() -> None:
    images = disk()
    images[:, :, :20] = float("nan")
    assert torch.isfinite(Augmentation().flux(images, 48, generator())).all()


@pytest.mark.parametrize("kind", ["flux", "display"])
def test_both_doors_give_the_contracts_size(kind: str) -> None:
    images = disk() if kind == "flux" else (disk() * 255).to(torch.uint8)
    assert getattr(Augmentation(), kind)(images, 48, generator()).shape == (4, 3, 48, 48)
