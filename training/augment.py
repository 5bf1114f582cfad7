"""Augmentation, batched on the device: what the sky and a telescope could have done differently."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from galembed.errors import BadRequest

_HERE: Final = 0.1
"""Redshift that a galaxy is taken to be at before it is moved away; in the midst of Galaxy Zoo's samples."""
_PATCHES: Final = 5
_BILINEAR: Final = 4 / 9
"""Variance that white noise keeps, on average over phases, when it is read between pixels: (2/3 along each axis)."""


@dataclass(frozen=True)
class Augmentation:
    """How strongly to vary images. Each strength is off at 0, `zoom` at 1.

    `gain`, `redshift` and `noise` are for flux only; `colour`, `black` and `erase` for the display channels that either
    kind of image becomes.

    Attributes
    ----------
    rotation : float
        Largest angle, deg, to either side; uniform. 180 = any orientation.
    flip : float
        Share of the images that are mirrored.
    zoom : float
        Largest factor of scale up or down, log-uniform.
    shear : float
        Largest shear g, uniform, in any direction: a circle becomes an ellipse of the same area and of axis ratio
        (1 - g) / (1 + g).
    shift : float
        Largest offset along x and y, as a fraction of the field; uniform.
    gain : float
        Sigma of ln(flux scale).
    redshift : float
        Half of the galaxies are put further away by up to this, uniform, as if they were at 0.1: smaller, as far as
        the field that was read allows, and of a lower surface brightness (`moved_away`), in the seeing and at the depth
        that they are seen in: noise is added for what dimming, blur and interpolation take away.
    seeing : float
        Sigma of the images' own PSF, output pixels; what a galaxy moved away is blurred back to.
    blur : float
        Largest sigma of added Gaussian seeing, output pixels; uniform.
    noise : float
        Largest added noise, nJy per (0.262 arcsec)^2; as a uniform number squared, so mostly little.
    colour : float
        Strength of the jitter of display channels: sigma of ln(gain) per channel and of ln(gamma); saturation goes
        from 1 - 4 to 1 + 2 times this (at 0.25, from grey to half as colourful again).
    black : float
        Largest level subtracted as sky; uniform.
    erase : float
        Largest share of the image that each of five rectangles blackens; uniform.

    Raises
    ------
    BadRequest
        If a strength is out of its range.
    """

    rotation: float = 180.0
    flip: float = 0.5
    zoom: float = 1.3
    shear: float = 0.05
    shift: float = 0.03
    gain: float = 0.25
    redshift: float = 0.05
    seeing: float = 1.5
    blur: float = 1.2
    noise: float = 30.0
    colour: float = 0.25
    black: float = 0.12
    erase: float = 0.005

    def __post_init__(self) -> None:
        most = {"rotation": 180.0, "flip": 1.0, "shear": 0.9, "redshift": 0.4, "erase": 0.3}
        for name, value in asdict(self).items():
            least, limit = (1.0 if name == "zoom" else 0.0), most.get(name, math.inf)
            if not least <= value <= limit:
                raise BadRequest(f"augmentation {name} must be from {least:g} to {limit:g}, got {value}")

    def flux(self, images: Tensor, size: int, generator: torch.Generator) -> Tensor:
        """Return flux (n, 3, size, size) as another place, distance, telescope and night might have shown it.

        Parameters
        ----------
        images : Tensor, shape (n, 3, y, y), float32
            nJy per (0.262 arcsec)^2, of the same pixel scale as the output and a larger field; NaN = no data.
        size : int
        generator : torch.Generator
            On the images' device; nothing else is random.

        Returns
        -------
        Tensor, shape (n, 3, size, size), float32
            Same unit, finite: no data is empty sky. The centre of `images` if all is off.
        """
        n = images.shape[0]
        shrink, dimming = self._distance(images, generator)
        gain = torch.exp(self.gain * _normal((n, 1, 1, 1), images, generator))
        kernels = self._kernels(shrink, self.seeing, generator)
        shown = torch.nan_to_num_(self._geometry(images, size, shrink, generator)).mul_(gain * dimming)
        shown = _convolved(shown, kernels)
        variance = (self.noise * _uniform((n, 1, 1, 1), images, generator) ** 2) ** 2
        if self.redshift:
            kept = _BILINEAR * kernels.square().sum(dim=1).square()[:, None, None, None]
            lost = torch.where(dimming < 1, 1 - dimming**2 * kept, 0.0)
            variance = variance + (gain * _sky_noise(images)) ** 2 * lost
        elif not self.noise:
            return shown
        return shown.add_(_normal(shown.shape, shown, generator).mul_(variance.sqrt()))

    def display(self, images: Tensor, size: int, generator: torch.Generator) -> Tensor:
        """Return channels (n, 3, size, size) of uint8 pictures (n, 3, y, y), turned, flipped, zoomed and blurred."""
        here = torch.ones((images.shape[0], 1, 1, 1), device=images.device)
        kernels = self._kernels(here, 0.0, generator)
        return _convolved(self._geometry(images.float(), size, here, generator).div_(255), kernels)

    def channels(self, channels: Tensor, generator: torch.Generator) -> Tensor:
        """Return display channels (n, 3, y, x) in [0, 1] as another survey's stretch might have made them."""
        n = channels.shape[0]
        grey = channels.mean(dim=1, keepdim=True)
        saturation = 1 + self.colour * (6 * _uniform((n, 1, 1, 1), channels, generator) - 4)
        black = self.black * _uniform((n, 1, 1, 1), channels, generator)
        gain = torch.exp(self.colour * _normal((n, 3, 1, 1), channels, generator))
        gamma = torch.exp(self.colour * _normal((n, 1, 1, 1), channels, generator))
        levels = torch.lerp(grey, channels, saturation).sub_(black).mul_(gain).clamp_(1e-4, 1.0)
        levels = levels.pow_(gamma) if self.colour else levels
        return levels * ~_patches(levels, self.erase, generator) if self.erase else levels

    def _distance(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw by what each galaxy shrinks and its surface brightness falls, both (n, 1, 1, 1)."""
        shape = (images.shape[0], 1, 1, 1)
        if not self.redshift:
            return images.new_ones(shape), images.new_ones(shape)
        moved = _uniform(shape, images, generator) < 0.5
        return moved_away(_HERE + self.redshift * moved * _uniform(shape, images, generator))

    def _geometry(self, images: Tensor, size: int, shrink: Tensor, generator: torch.Generator) -> Tensor:
        """Return images (n, 3, size, size) turned, flipped, zoomed, sheared and shifted, read once."""
        n, width = images.shape[0], images.shape[-1]
        if not (self.rotation or self.flip or self.shear or self.shift or self.redshift) and self.zoom == 1:
            edge = (width - size) // 2
            return images[:, :, edge : edge + size, edge : edge + size].clone()
        angle = math.radians(self.rotation) * (2 * _uniform((n,), images, generator) - 1)
        flip = 1 - 2 * (_uniform((n,), images, generator) < self.flip).to(images.dtype)
        scale = self.zoom ** (2 * _uniform((n,), images, generator) - 1) / shrink.flatten()
        # Further out than the field that was read, only its mirror image would be found.
        scale = scale.clamp(max=max(1.0, width / size))
        shear = self.shear * _uniform((n,), images, generator)
        towards = 2 * math.pi * _uniform((n,), images, generator)
        offset = self.shift * (2 * _uniform((n, 2, 1), images, generator) - 1)
        turned = _matrix(angle.cos(), -angle.sin(), angle.sin(), angle.cos())
        g1, g2 = shear * towards.cos(), shear * towards.sin()
        sheared = _matrix(1 + g1, g2, g2, 1 - g1) / torch.sqrt(1 - shear**2)[:, None, None]
        mirrored = _matrix(flip, 0 * flip, 0 * flip, 1 + 0 * flip)
        linear = scale[:, None, None] * (turned @ sheared @ mirrored)
        affine = torch.cat([linear, 2 * offset], dim=2) * (size / width)  # the grid counts half-widths of its input
        grid = F.affine_grid(affine, [n, 3, size, size], align_corners=False)
        return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)

    def _kernels(self, shrink: Tensor, seeing: float, generator: torch.Generator) -> Tensor:
        """Draw a Gaussian (n, offset) for each image, cut at 3 sigma of the widest that may be drawn."""
        n = shrink.shape[0]
        furthest = float(moved_away(torch.tensor(_HERE + self.redshift))[0])
        reach = math.ceil(3 * math.sqrt(self.blur**2 + seeing**2 * (1 - furthest**2)))
        variance = (self.blur * _uniform((n, 1), shrink, generator)) ** 2 + seeing**2 * (1 - shrink.view(n, 1) ** 2)
        offsets = torch.arange(-reach, reach + 1, device=shrink.device, dtype=shrink.dtype)
        kernels = torch.exp(-0.5 * offsets**2 / variance.clamp(min=1e-3))
        return kernels / kernels.sum(dim=1, keepdim=True)


def moved_away(redshift: Tensor) -> tuple[Tensor, Tensor]:
    """Return what distance does to a galaxy that is at redshift 0.1.

    Parameters
    ----------
    redshift : Tensor, any shape
        Where it is put; 0.1 to 0.5.

    Returns
    -------
    shrink : Tensor, same shape
        Factor on its angular size: the ratio of angular diameter distances, in the expansion to second order in z for
        q0 = -0.55 (flat, Omega_m = 0.3; Weinberg 1972, section 14.6), good to 2%.
    dimming : Tensor, same shape
        Factor on its surface brightness: (1.1 / (1 + z))^4 (Tolman 1930, PNAS 16, 511). That is the law for all
        wavelengths together, and in nJy for a spectrum that falls as 1/frequency.
    """
    here = torch.full_like(redshift, _HERE)
    near, far = ((z - 0.225 * z**2) / (1 + z) for z in (here, redshift))
    return near / far, ((1 + here) / (1 + redshift)) ** 4


def _matrix(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    return torch.stack([a, b, c, d], dim=1).reshape(-1, 2, 2)


def _convolved(images: Tensor, kernels: Tensor) -> Tensor:
    """Convolve images (n, c, y, x) with kernels (n, offset) along both axes; edges repeated."""
    n, c, height, width = images.shape
    reach = kernels.shape[1] // 2
    if not reach:
        return images
    planes = F.pad(images, (reach, reach, reach, reach), mode="replicate").reshape(1, n * c, height + 2 * reach, -1)
    weights = kernels.repeat_interleave(c, dim=0)
    planes = F.conv2d(planes, weights[:, None, None, :], groups=n * c)
    planes = F.conv2d(planes, weights[:, None, :, None], groups=n * c)
    return planes.reshape(n, c, height, width)


def _sky_noise(images: Tensor) -> Tensor:
    """Return the noise (n, 3, 1, 1) of images (n, 3, y, x) along their edges; robust, 0 where there is no data."""
    edge = max(1, images.shape[-1] // 16)
    sides = (images[:, :, :edge], images[:, :, -edge:], images[:, :, :, :edge], images[:, :, :, -edge:])
    sky = torch.cat([side.flatten(2) for side in sides], dim=2)
    sky = sky[:, :, :: max(1, sky.shape[2] // 512)]
    deviation = (sky - sky.nanmedian(dim=2, keepdim=True).values).abs().nanmedian(dim=2).values
    return torch.nan_to_num(1.4826 * deviation)[:, :, None, None]


def _patches(images: Tensor, largest: float, generator: torch.Generator) -> Tensor:
    """Draw which pixels (n, 1, y, x) of images (n, c, y, x) lie in one of five rectangles."""
    n, _, height, width = images.shape
    area = largest * _uniform((n, _PATCHES, 1), images, generator)
    stretch = torch.exp(_uniform((n, _PATCHES, 1), images, generator) - 0.5)
    inside = []
    for pixels, side in ((height, area.sqrt() * stretch), (width, area.sqrt() / stretch)):
        middle = side / 2 + (1 - side) * _uniform((n, _PATCHES, 1), images, generator)
        places = (torch.arange(pixels, device=images.device, dtype=images.dtype) + 0.5) / pixels
        inside.append(((places - middle).abs() < side / 2).to(images.dtype))
    rows, columns = inside  # (n, patch, y), (n, patch, x)
    return (rows.transpose(1, 2) @ columns)[:, None] > 0


def _uniform(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, device=like.device, dtype=like.dtype, generator=generator)


def _normal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, device=like.device, dtype=like.dtype, generator=generator)
