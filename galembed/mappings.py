"""Named mappings from flux to display channels.

One formula serves training, the exported engines (given torch) and pictures (given numpy): the array namespace is an
argument, so there is a single implementation. Bands meet the channels by role: blue, green and red, which in the
Legacy Surveys are g, r and z.

==================  ========================================  ==================================================
name                formula                                   where it is from
==================  ========================================  ==================================================
``legacy_dr2_rgb``  `LegacyMapping`: colour kept, clipped     the Legacy Surveys' viewer and its JPEG cutouts
``gz_decals_rgb``   `GalaxyZooMapping`: asinh band by band    what Galaxy Zoo DECaLS volunteers were shown
``lupton_rgb``      `LuptonMapping`: colour kept throughout   Lupton et al. 2004, as astropy has it
==================  ========================================  ==================================================
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Final

import numpy as np

from galembed.errors import ArtifactNotFound, BadRequest
from galembed.photometry import NJY_PER_NANOMAGGY

ROLES: Final = ("blue", "green", "red")
"""Order of the band axis wherever flux is handed to a network."""

REFERENCE_PIXEL_ARCSEC: Final = 0.262
"""Cutouts hold nJy per pixel of this size, whatever their own sampling, so a value is a surface brightness and a
mapping means the same in every survey. It is the Legacy Surveys' pixel, for which the constants below were made."""


@dataclass(frozen=True)
class FluxMapping(ABC):
    """A formula with its constants: what a backbone's flux door, and a thumbnail, does to pixels.

    Attributes
    ----------
    name : str
    """

    name: str
    formula: ClassVar[str]
    """Names the class in files; part of a backbone's identity, so it never changes."""

    @abstractmethod
    def channels(self, flux: Any, xp: Any = np) -> Any:
        """Return display channels.

        Parameters
        ----------
        flux : array, shape (..., 3, y, x)
            nJy per (0.262 arcsec)^2; bands in the order blue, green, red. NaN (no data) is shown as empty sky.
        xp : module
            numpy or torch: the namespace `flux` belongs to.

        Returns
        -------
        array, same shape and type
            Channels R, G, B in [0, 1], finite.
        """

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready form, constants included."""
        return asdict(self) | {"formula": self.formula}


def mapping_from_dict(data: Mapping[str, Any]) -> FluxMapping:
    """Read what `FluxMapping.to_dict` writes.

    Raises
    ------
    ArtifactNotFound
        If the formula is not one that this version knows.
    """
    kind = _FORMULAS.get(str(data.get("formula")))
    if kind is None:
        raise ArtifactNotFound(
            f"flux mapping formula {data.get('formula')!r} is unknown; this version knows {sorted(_FORMULAS)}"
        )
    return kind(**{field.name: _constant(data[field.name]) for field in fields(kind)})


def named_mapping(name: str) -> FluxMapping:
    """Return one of `MAPPINGS`.

    Raises
    ------
    BadRequest
        If there is none of that name.
    """
    if name not in MAPPINGS:
        raise BadRequest(f"no colour mapping {name!r}; choose one of {', '.join(MAPPINGS)}")
    return MAPPINGS[name]


@dataclass(frozen=True)
class LegacyMapping(FluxMapping):
    r"""The colour stretch of the Legacy Surveys' viewer, after Lupton et al. 2004.

    .. math:: x_b = s_b f_b + m,\quad I = \langle\max(0, x_b)\rangle_b,\quad
        c_b = \frac{x_b}{I} \frac{\operatorname{asinh}(Q I)}{\sqrt{Q}}

    clipped to [0, 1], so bright pixels go white: the `sdss_rgb` of legacysurvey/imagine, map/views.py.

    Attributes
    ----------
    name : str
    scales : tuple of 3 floats
        s for the roles blue, green, red, per nanomaggy per (0.262 arcsec)^2 pixel.
    m, q : float
        Offset and softening.
    """

    scales: tuple[float, float, float]
    m: float
    q: float
    formula: ClassVar[str] = "lupton"

    def channels(self, flux: Any, xp: Any = np) -> Any:
        """Return display channels; see `FluxMapping.channels`."""
        flux = xp.nan_to_num(flux, nan=0.0)
        planes = [
            flux[..., band, :, :] * (scale / NJY_PER_NANOMAGGY) + self.m for band, scale in enumerate(self.scales)
        ]
        intensity = sum(xp.clip(plane, 0.0, None) for plane in planes) / len(planes)
        # Where every band is far below the sky the intensity is 0 and so is the numerator's clipped value.
        gain = xp.arcsinh(self.q * intensity) / self.q**0.5 / xp.clip(intensity, 1e-6, None)
        return xp.stack([xp.clip(plane * gain, 0.0, 1.0) for plane in reversed(planes)], -3)


@dataclass(frozen=True)
class GalaxyZooMapping(FluxMapping):
    r"""The stretch of Galaxy Zoo DECaLS: asinh of each band, then less colour where one band stands out.

    With the mean :math:`a` over the bands (1 where it is 0),

    .. math:: y_b = \frac{\operatorname{asinh}(k f_b / d_b) - \operatorname{asinh}(k f_0)}
            {\operatorname{asinh}(k f_1) - \operatorname{asinh}(k f_0)},\quad
        w = \sin\left[\frac{\pi}{2} \left(1 - \min\left(1, \max_b \frac{y_b}{2.5 a}\right)\right)\right],\quad
        c_b = w y_b + (1 - w) a + (1 - w)^2 a y_b

    clipped to [0, 1]: the `dr2_style_rgb` of zooniverse/decals 91cb202,
    decals/a_download_decals/get_images/image_utils.py, which grew out of the viewer's stretch for DECaLS DR1 (Walmsley
    et al. 2022, MNRAS 509, 3966, describe the images). The ratio never falls below 1 / 2.5, so grey stays grey and
    gains up to 4%. A pixel's colour depends on its brightness.

    Attributes
    ----------
    name : str
    divisors : tuple of 3 floats
        d for the roles blue, green, red: nanomaggies per (0.262 arcsec)^2 pixel.
    softening : float
        k.
    black, white : float
        f_0 and f_1: the values of f / d that become 0 and 1.
    """

    divisors: tuple[float, float, float]
    softening: float
    black: float
    white: float
    formula: ClassVar[str] = "gz_decals"

    def channels(self, flux: Any, xp: Any = np) -> Any:
        """Return display channels; see `FluxMapping.channels`."""
        flux = xp.nan_to_num(flux, nan=0.0)
        low, high = (float(np.arcsinh(self.softening * value)) for value in (self.black, self.white))
        blue, green, red = (
            (xp.arcsinh(flux[..., band, :, :] * (self.softening / divisor / NJY_PER_NANOMAGGY)) - low) / (high - low)
            for band, divisor in enumerate(self.divisors)
        )
        mean = (red + green + blue) / 3
        mean = xp.where(mean == 0, xp.ones_like(mean), mean)
        # Each band is divided by the mean: below zero the largest ratio belongs to the lowest band.
        largest = xp.maximum(xp.maximum(red / mean, green / mean), blue / mean)
        own = xp.sin((1 - xp.clip(largest / 2.5, None, 1.0)) * (np.pi / 2))
        grey = 1 - own
        planes = [own * plane + grey * mean + grey**2 * mean * plane for plane in (red, green, blue)]
        return xp.stack([xp.clip(plane, 0.0, 1.0) for plane in planes], -3)


@dataclass(frozen=True)
class LuptonMapping(FluxMapping):
    r"""Lupton et al. 2004, PASP 116, 133, as `astropy.visualization.make_lupton_rgb` defines it.

    .. math:: x_b = s_b f_b - m,\quad I = \langle x_b\rangle_b,\quad
        c_b = \max\left(0, \frac{x_b}{I} \frac{0.1 \operatorname{asinh}(Q I / S)}{\operatorname{asinh}(0.1 Q)}\right)

    and black where I <= 0. A pixel with a channel above 1 is divided by its largest channel, so it keeps its colour
    where `LegacyMapping` goes white.

    Attributes
    ----------
    name : str
    scales : tuple of 3 floats
        s for the roles blue, green, red, per nanomaggy per (0.262 arcsec)^2 pixel.
    minimum : float
        m, the scaled flux that becomes black.
    stretch, q : float
        S and Q: the mapping is linear up to a scaled flux of about S / Q, and reaches 0.1 at S / 10.
    """

    scales: tuple[float, float, float]
    minimum: float
    stretch: float
    q: float
    formula: ClassVar[str] = "lupton2004"

    def channels(self, flux: Any, xp: Any = np) -> Any:
        """Return display channels; see `FluxMapping.channels`."""
        flux = xp.nan_to_num(flux, nan=0.0)
        blue, green, red = (
            flux[..., band, :, :] * (scale / NJY_PER_NANOMAGGY) - self.minimum for band, scale in enumerate(self.scales)
        )
        intensity = (red + green + blue) / 3
        # arcsinh(QI/S) / I tends to Q/S: below this floor it is that to 1 part in 10^9, and nothing is divided by 0.
        floor = 1e-5 * self.stretch / self.q
        safe = xp.clip(intensity, floor, None)
        gain = xp.arcsinh(safe * (self.q / self.stretch)) / safe * float(0.1 / np.arcsinh(0.1 * self.q))
        lit = [xp.where(intensity > 0, xp.clip(plane * gain, 0.0, None), 0.0 * gain) for plane in (red, green, blue)]
        largest = xp.clip(xp.maximum(xp.maximum(lit[0], lit[1]), lit[2]), 1.0, None)
        return xp.stack([plane / largest for plane in lit], -3)


def _constant(value: Any) -> Any:
    """Return a constant as the mappings hold it: text, a float, or a tuple of floats."""
    if isinstance(value, str):
        return value
    return tuple(map(float, value)) if isinstance(value, list | tuple) else float(value)


_FORMULAS: Final[Mapping[str, type[FluxMapping]]] = {
    kind.formula: kind for kind in (LegacyMapping, GalaxyZooMapping, LuptonMapping)
}

LEGACY_DR2: Final = LegacyMapping("legacy_dr2_rgb", scales=(6.0, 3.4, 2.2), m=0.03, q=20.0)
"""`dr2_rgb` of the Legacy Surveys viewer (DECaLS DR2 to DR9): legacysurvey/imagine 8402fc3, map/views.py."""

GZ_DECALS: Final = GalaxyZooMapping(
    "gz_decals_rgb", divisors=(0.008, 0.014, 0.019), softening=1.0, black=-0.5, white=300.0
)
"""Galaxy Zoo DECaLS (g, r, z): zooniverse/decals 91cb202, decals/a_download_decals/get_images/
download_images_threaded.py, `make_png_from_fits`. The function's own defaults are other numbers, which were not used.
Their PNG were then resized with a Lanczos kernel, cut off at 8 bits and turned top row first; none of that is here."""

LUPTON: Final = LuptonMapping(
    "lupton_rgb", scales=(1.0, 1.0, 1.0), minimum=0.0, stretch=0.5 * (REFERENCE_PIXEL_ARCSEC / 0.396) ** 2, q=10.0
)
"""Q = 10 and stretch 0.5: what astropy's page on `make_lupton_rgb` (docs/visualization/rgb.rst, 02486da) gives for SDSS
frames i, r, g, to be compared with figure 1 of Lupton et al. 2004. Those frames are in nanomaggies per
(0.396 arcsec)^2 pixel, ours per (0.262 arcsec)^2, hence the factor 0.438. The bands are not weighted, as there."""

MAPPINGS: Final[Mapping[str, FluxMapping]] = {mapping.name: mapping for mapping in (LEGACY_DR2, GZ_DECALS, LUPTON)}
