"""Augmentation, batched on the device: what the sky and a telescope could have done differently."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """How strongly to vary images.

    Attributes
    ----------
    zoom : float
        Largest factor of scale up or down, log-uniform.
    shift : float
        Largest offset, as a fraction of the field.
    gain : float
        Sigma of ln(flux scale).
    noise : float
        Largest added noise, nJy per (0.262 arcsec)^2; uniform.
    blur : float
        Largest sigma of the added Gaussian seeing, output pixels; uniform per batch.
    colour : float
        Strength of the jitter of display channels: sigma of ln(gain) per channel and of ln(gamma); saturation goes
        from 1 - 4 to 1 + 2 times this (at 0.25, from grey to half as colourful again).
    black : float
        Largest level subtracted as sky; uniform.
    """

    zoom: float = 1.3
    shift: float = 0.04
    gain: float = 0.25
    noise: float = 30.0
    blur: float = 1.2
    colour: float = 0.25
    black: float = 0.12

    def flux(self, images: Tensor, size: int, generator: torch.Generator) -> Tensor:
        """Return flux (n, 3, size, size) turned, flipped, zoomed, dimmed, blurred and noisier.

        Parameters
        ----------
        images : Tensor, shape (n, 3, y, x), float32
            nJy per (0.262 arcsec)^2, of the same pixel scale as the output and a larger field; NaN = no data.
        size : int
        generator : torch.Generator
            On the images' device.
        """
        n = images.shape[0]
        images = self._geometry(torch.nan_to_num(images), size, generator)
        gain = torch.exp(self.gain * _normal((n, 1, 1, 1), images, generator))
        images = _blur(images * gain, self.blur * float(_uniform((1,), images, generator)))
        sigma = self.noise * _uniform((n, 1, 1, 1), images, generator) ** 2
        return images + sigma * _normal(images.shape, images, generator)

    def display(self, images: Tensor, size: int, generator: torch.Generator) -> Tensor:
        """Return channels (n, 3, size, size) of uint8 pictures (n, 3, y, x), turned, flipped, zoomed and blurred."""
        images = self._geometry(images.float() / 255, size, generator)
        return _blur(images, self.blur * float(_uniform((1,), images, generator)))

    def channels(self, channels: Tensor, generator: torch.Generator) -> Tensor:
        """Return display channels (n, 3, y, x) in [0, 1] as another survey's stretch might have made them."""
        n = channels.shape[0]
        grey = channels.mean(dim=1, keepdim=True)
        saturation = 1 + self.colour * (6 * _uniform((n, 1, 1, 1), channels, generator) - 4)
        black = self.black * _uniform((n, 1, 1, 1), channels, generator)
        channels = grey + saturation * (channels - grey) - black
        gain = torch.exp(self.colour * _normal((n, 3, 1, 1), channels, generator))
        gamma = torch.exp(self.colour * _normal((n, 1, 1, 1), channels, generator))
        return (channels * gain).clamp(1e-4, 1.0) ** gamma

    def _geometry(self, images: Tensor, size: int, generator: torch.Generator) -> Tensor:
        n = images.shape[0]
        angle = 2 * torch.pi * _uniform((n,), images, generator)
        zoom = self.zoom ** (2 * _uniform((n,), images, generator) - 1)
        flip = torch.sign(_uniform((n,), images, generator) - 0.5)
        reach = zoom * size / images.shape[-1]  # affine_grid counts in half-widths of its input
        rows = torch.stack(
            [
                torch.stack([reach * flip * angle.cos(), -reach * angle.sin()], dim=1),
                torch.stack([reach * flip * angle.sin(), reach * angle.cos()], dim=1),
            ],
            dim=1,
        )  # (n, 2, 2)
        offset = self.shift * (2 * _uniform((n, 2, 1), images, generator) - 1)
        grid = F.affine_grid(torch.cat([rows, offset], dim=2), [n, 3, size, size], align_corners=False)
        return F.grid_sample(images, grid, align_corners=False)


def _blur(images: Tensor, sigma: float) -> Tensor:
    """Convolve with a Gaussian of `sigma` pixels, edges repeated."""
    if sigma < 0.2:
        return images
    reach = int(3 * sigma) + 1
    offsets = torch.arange(-reach, reach + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum()).repeat(images.shape[1], 1)
    images = F.conv2d(F.pad(images, (reach, reach, 0, 0), mode="replicate"), kernel[:, None, None, :], groups=3)
    return F.conv2d(F.pad(images, (0, 0, reach, reach), mode="replicate"), kernel[:, None, :, None], groups=3)


def _uniform(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, device=like.device, dtype=like.dtype, generator=generator)


def _normal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, device=like.device, dtype=like.dtype, generator=generator)
