"""Named mappings from flux to display channels.

One formula serves training, the exported engines (given torch) and pictures (given numpy): the array namespace is an
argument, so there is a single implementation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np

from galembed.errors import ArtifactNotFound
from galembed.photometry import NJY_PER_NANOMAGGY

ROLES: Final = ("blue", "green", "red")
"""Order of the band axis wherever flux is handed to a network."""

REFERENCE_PIXEL_ARCSEC: Final = 0.262
"""Cutouts hold nJy per pixel of this size, whatever their own sampling, so a value is a surface brightness and a
mapping means the same in every survey. It is the Legacy Surveys' pixel, for which the constants below were made."""


@dataclass(frozen=True)
class LuptonMapping:
    r"""The Legacy Surveys' colour stretch (after Lupton et al. 2004, PASP 116, 133).

    .. math:: x_b = s_b f_b + m,\quad I = \langle\max(0, x_b)\rangle_b,\quad
        c_b = \frac{x_b}{I} \frac{\operatorname{asinh}(Q I)}{\sqrt{Q}}

    clipped to [0, 1]: the `sdss_rgb` of legacysurvey/imagine, map/views.py.

    Attributes
    ----------
    name : str
    scales : tuple of 3 floats
        s for the roles blue, green, red, per nanomaggy per (0.262 arcsec)^2 pixel.
    m, q : float
        Offset and softening.
    """

    name: str
    scales: tuple[float, float, float]
    m: float
    q: float

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
            Channels R, G, B in [0, 1].
        """
        flux = xp.nan_to_num(flux, nan=0.0)
        planes = [
            flux[..., band, :, :] * (scale / NJY_PER_NANOMAGGY) + self.m for band, scale in enumerate(self.scales)
        ]
        intensity = sum(xp.clip(plane, 0.0, None) for plane in planes) / len(planes)
        # Where every band is far below the sky the intensity is 0 and so is the numerator's clipped value.
        gain = xp.arcsinh(self.q * intensity) / self.q**0.5 / xp.clip(intensity, 1e-6, None)
        return xp.stack([xp.clip(plane * gain, 0.0, 1.0) for plane in reversed(planes)], -3)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready form, constants included."""
        return asdict(self) | {"formula": "lupton"}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LuptonMapping:
        """Read what `to_dict` writes.

        Raises
        ------
        ArtifactNotFound
            If the formula is not one that this version knows.
        """
        if data.get("formula") != "lupton":
            raise ArtifactNotFound(f"flux mapping formula {data.get('formula')!r} is unknown; known: ['lupton']")
        blue, green, red = map(float, data["scales"])
        return cls(str(data["name"]), (blue, green, red), float(data["m"]), float(data["q"]))


LEGACY_DR2: Final = LuptonMapping("legacy_dr2_rgb", scales=(6.0, 3.4, 2.2), m=0.03, q=20.0)
"""`dr2_rgb` of the Legacy Surveys viewer (DECaLS DR2 to DR9): legacysurvey/imagine 8402fc3, map/views.py."""

MAPPINGS: Final = {mapping.name: mapping for mapping in (LEGACY_DR2,)}
