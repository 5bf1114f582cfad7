"""A star of known magnitude at a known place, and what a reader makes of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from astropy.io import fits
from astropy.table import Table
from astropy.wcs import WCS
from numpy.typing import NDArray

from galembed.backbones import FieldOfView, InputContract
from galembed.cutouts import Cutout
from galembed.mappings import LEGACY_DR2, REFERENCE_PIXEL_ARCSEC, ROLES
from galembed.sources import open_source

RA, DEC = 150.1234, 2.2345
MAGNITUDE = {"blue": 19.0, "green": 18.5, "red": 18.0}
"""AB magnitude of the star in the band of each role."""


def njy(magnitude: float) -> float:
    """Flux of an AB magnitude, from the definition: 3631 Jy is magnitude 0."""
    return 3631e9 * 10 ** (-0.4 * magnitude)


def tan_wcs(
    shape: tuple[int, int], pixel: float, offset: tuple[float, float] = (0.0, 0.0), rotation: float = 0.0
) -> WCS:
    """A TAN WCS whose frame has the star `offset` (x, y) pixels from its centre; rotation in degrees."""
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.crval = [RA, DEC]
    wcs.wcs.crpix = [(shape[1] + 1) / 2 + offset[0], (shape[0] + 1) / 2 + offset[1]]
    cosine, sine = np.cos(np.radians(rotation)), np.sin(np.radians(rotation))
    wcs.wcs.cd = np.array([[-cosine, sine], [sine, cosine]]) * pixel / 3600
    wcs.wcs.set()
    return wcs


def star_image(
    shape: tuple[int, int],
    wcs: WCS,
    flux: float,
    fwhm_arcsec: float = 1.2,
    place: tuple[float, float] = (RA, DEC),
    sky: float = 0.0,
) -> NDArray[np.float32]:
    """A Gaussian star of total `flux` (any unit), well sampled, on a constant sky."""
    x, y = wcs.all_world2pix([place], 0)[0]
    pixel = float(np.sqrt(abs(np.linalg.det(wcs.pixel_scale_matrix)))) * 3600
    sigma = fwhm_arcsec / 2.3548 / pixel
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    profile = np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * sigma**2)) / (2 * np.pi * sigma**2)
    return (sky + flux * profile).astype(np.float32)


def celestial_cards(wcs: WCS) -> fits.Header:
    """The WCS as CD cards, which most surveys write."""
    cd = wcs.pixel_scale_matrix
    header = fits.Header()
    for axis in (1, 2):
        header[f"CTYPE{axis}"] = str(wcs.wcs.ctype[axis - 1])
        header[f"CRVAL{axis}"] = float(wcs.wcs.crval[axis - 1])
        header[f"CRPIX{axis}"] = float(wcs.wcs.crpix[axis - 1])
        header[f"CUNIT{axis}"] = "deg"
        for other in (1, 2):
            header[f"CD{axis}_{other}"] = float(cd[axis - 1, other - 1])
    return header


def write_catalogue(path: Path, place: tuple[float, float] = (RA, DEC), **columns: object) -> Path:
    """A catalogue of the one star."""
    Table({"id": ["star"], "ra": [place[0]], "dec": [place[1]]} | {k: [v] for k, v in columns.items()}).write(path)
    return path


def read_star(source: Path, *, side: float = 20.0, size: int = 80, **options: object) -> Cutout:
    """The only source of a folder, at a fixed field of `side` arcsec; a failure is raised."""
    reader = open_source(source, **options)  # type: ignore[arg-type]
    listing = reader.sources()
    assert len(listing.table) == 1, listing
    contract = InputContract(size, FieldOfView(0.0, side, side), LEGACY_DR2)
    ((_, result),) = reader.cutouts(listing.table, contract)
    if isinstance(result, Exception):
        raise result
    return result


def assert_star(
    cutout: Cutout,
    *,
    side: float = 20.0,
    native_pixel: float,
    magnitudes: dict[str, float] | None = None,
    sky: float = 0.0,
    offset: tuple[float, float] = (0.0, 0.0),
) -> None:
    """Position within 0.1 native pixel of the middle (plus `offset` arcsec), flux within 1%, in every band."""
    assert cutout.fov_arcsec is not None
    np.testing.assert_allclose(cutout.fov_arcsec, side, rtol=1e-4)
    size = cutout.pixels.shape[-1]
    step = side / size
    steps = (np.arange(size) - (size - 1) / 2) * step
    for role, plane in zip(ROLES, cutout.pixels, strict=True):
        light = np.nan_to_num(plane.astype(float)) - sky
        total = light.sum() * (step / REFERENCE_PIXEL_ARCSEC) ** 2
        expected = njy((magnitudes or MAGNITUDE)[role])
        np.testing.assert_allclose(total, expected, rtol=0.01, err_msg=role)
        x, y = (light.sum(axis=0) * steps).sum() / light.sum(), (light.sum(axis=1) * steps).sum() / light.sum()
        np.testing.assert_allclose((x, y), offset, atol=0.1 * native_pixel, err_msg=role)
