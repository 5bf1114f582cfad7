"""From parameters to pixels, with GalSim: profiles, the atmosphere, sky and photon noise, artefacts.

All fluxes are nanomaggies and all images float32 per band g, r, z. Profiles are drawn in GalSim's (u, v) with
u to the west and v to the north, so that a plain pixel scale gives RA decreasing with x.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import galsim
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from training.simulation.population import Colour, Galaxy, draw_magnitude
from training.simulation.templates import Template, template

BANDS = ("g", "r", "z")
PIXEL_SCALE = 0.262
SKY_MAG = (22.0, 20.9, 18.9)
"""Dark-sky brightness, AB mag per square arcsec; only sets how many photons a nanomaggy is worth."""
DUST_RATIO = (1.25, 1.0, 0.6)
"""Optical depth relative to r, about the Milky Way's (Schlafly & Finkbeiner 2011, ApJ 737, 103)."""
_GRADIENT = (1.06, 1.0, 0.94)
_NOISE_KERNEL = 0.25
_GSPARAMS = galsim.GSParams(
    folding_threshold=1e-2,
    maxk_threshold=3e-3,
    kvalue_accuracy=1e-4,
    maximum_fft_size=4096,
    minimum_fft_size=64,
)

Image = NDArray[np.float32]
Flags = NDArray[np.uint8]


@dataclass(frozen=True)
class Conditions:
    """What the atmosphere and the exposure time did to one coadd.

    Attributes
    ----------
    fwhm_arcsec : tuple of float
        Seeing in g, r, z.
    depth_mag : tuple of float
        5-sigma AB magnitude of a round exponential galaxy of half-light radius 0.45 arcsec, Legacy's
        "galdepth".
    ebv : float
        Galactic reddening; images and catalogue fluxes are left as observed.
    """

    fwhm_arcsec: tuple[float, float, float]
    depth_mag: tuple[float, float, float]
    ebv: float

    @property
    def sigma(self) -> NDArray[np.float64]:
        """Sky noise per pixel in nanomaggies, shape (3,).

        ``sigma = 10**(0.4 (22.5 - depth)) / 5 / sqrt(1.82 * 4 pi s^2)`` with s the seeing's standard
        deviation in pixels: 4 pi s^2 is a Gaussian's noise-equivalent area, and 1.82 the median ratio of
        PSFDEPTH_R to GALDEPTH_R in Legacy sweep files.
        """
        s = np.array(self.fwhm_arcsec) / 2.355 / PIXEL_SCALE
        flux = 10 ** (0.4 * (22.5 - np.array(self.depth_mag)))
        return np.asarray(flux / 5 / np.sqrt(1.82 * 4 * np.pi * s**2))

    @property
    def photons_per_nanomaggy(self) -> NDArray[np.float64]:
        """Effective gain, shape (3,): the sky's photons are what `sigma` is made of."""
        sky = 10 ** (0.4 * (22.5 - np.array(SKY_MAG))) * PIXEL_SCALE**2
        return np.asarray(sky / self.sigma**2)


def draw_conditions(rng: Generator) -> Conditions:
    """Draw seeing (medians 1.30, 1.18, 1.08 arcsec) and depth (24.6, 24.2, 23.2), in part common."""
    seeing = np.array([1.30, 1.18, 1.08]) * np.exp(0.08 * rng.normal() + 0.05 * rng.normal(size=3))
    depth = np.array([24.6, 24.2, 23.2]) + np.clip(0.2 * rng.normal() + 0.10 * rng.normal(size=3), -0.6, 0.6)
    g, r, z = (float(v) for v in np.clip(seeing, 0.8, 2.2))
    dg, dr, dz = (float(v) for v in depth)
    return Conditions((g, r, z), (dg, dr, dz), float(np.exp(rng.normal(np.log(0.04), 0.5))))


def psf(fwhm_arcsec: float) -> galsim.GSObject:
    """Return the atmosphere as a Moffat profile of beta 3.5 and flux 1."""
    return galsim.Moffat(beta=3.5, fwhm=fwhm_arcsec, gsparams=_GSPARAMS)


def bright_psf(fwhm_arcsec: float) -> galsim.GSObject:
    """Return the atmosphere with the aureole that only shows around bright stars; flux 1."""
    return (
        psf(fwhm_arcsec) * 0.97
        + galsim.Moffat(beta=1.6, fwhm=3.5 * fwhm_arcsec, trunc=120.0, gsparams=_GSPARAMS) * 0.03
    )


def profiles(galaxy: Galaxy, painted: Template | None) -> list[galsim.GSObject]:
    """Return a source in g, r, z above the atmosphere, in nanomaggies.

    Parameters
    ----------
    galaxy : Galaxy
    painted : Template or None
        Its `template`; None for smooth galaxies and point sources.
    """
    shares = galaxy.populations()
    angle = (90.0 + galaxy.position_angle_deg) * galsim.degrees
    bands = []
    for b in range(3):
        parts = []
        bulge = shares[0][0] * galaxy.flux_r * float(shares[0][1].ratios[b])
        if bulge > 0:
            parts.append(_bulge(galaxy, b, bulge))
        if painted is not None:
            image, flux = _band_image(galaxy, painted, b)
            parts.append(
                galsim.InterpolatedImage(
                    galsim.Image(image, scale=painted.scale_arcsec),
                    flux=flux,
                    x_interpolant="quintic",
                    pad_factor=2.0,
                    calculate_stepk=False,
                    calculate_maxk=False,
                    gsparams=_GSPARAMS,
                )
            )
        bands.append((galsim.Add(parts) if len(parts) > 1 else parts[0]).rotate(angle))
    if galaxy.companion is not None:
        other = profiles(galaxy.companion, painting(galaxy.companion))
        east, north = galaxy.companion_offset_arcsec
        bands = [main + extra.shift(-east, north) for main, extra in zip(bands, other, strict=True)]
    return bands


def painting(galaxy: Galaxy) -> Template | None:
    """Return the template of a galaxy that has a disk."""
    return None if galaxy.smooth or galaxy.kind in ("star", "artefact") else template(galaxy)


def _bulge(galaxy: Galaxy, band: int, flux: float) -> galsim.GSObject:
    if galaxy.smooth:
        radius = galaxy.half_light_arcsec * _GRADIENT[band]
    else:
        radius = galaxy.bulge_radius * galaxy.scale_length_arcsec
    q = float(np.clip(galaxy.bulge_axis_ratio, 0.1, 1))
    n = round(float(np.clip(galaxy.bulge_n, 0.5, 6)), 1)  # GalSim tabulates each index once: keep them few
    circular = radius * np.sqrt(q)  # GalSim's shear keeps the area
    return galsim.Sersic(n, half_light_radius=circular, flux=flux, trunc=8 * circular, gsparams=_GSPARAMS).shear(
        q=q, beta=0 * galsim.degrees
    )


def _band_image(galaxy: Galaxy, painted: Template, band: int) -> tuple[Image, float]:
    """Return the disk's image in one band and its flux, which dust leaves as the catalogue has it."""
    names = ("", "bar", "old", "young", "ring", "tail")
    image = np.zeros_like(painted.dust)
    total = 0.0
    for name, (share, colour) in zip(names, galaxy.populations(), strict=True):
        if name and share > 0:
            flux = share * galaxy.flux_r * float(colour.ratios[band])
            image += np.float32(flux) * painted.layers[name]
            total += flux
    if painted.dust.any():
        image *= np.exp(-np.float32(DUST_RATIO[band]) * painted.dust)
    return image, total


def add_source(
    image: Image,
    galaxy: Galaxy,
    conditions: Conditions,
    x: float,
    y: float,
    *,
    painted: Template | None = None,
    wcs: galsim.BaseWCS | None = None,
) -> None:
    """Add one source, without noise, to an image in g, r, z.

    Parameters
    ----------
    image : ndarray, shape (3, h, w), float32, nanomaggies
        Changed in place. The source may lie partly or wholly outside.
    galaxy : Galaxy
        Artefacts are left out: they are not light from the sky.
    x, y : float
        Position in pixels, 0-based, the centre of the first pixel being 0.
    painted : Template, optional
        The galaxy's `painting`, where the caller has it already.
    wcs : galsim.BaseWCS, optional
        Local linear WCS; default is north up at `PIXEL_SCALE`.
    """
    if galaxy.kind == "artefact":
        return
    half = _half_size(galaxy)
    box = _overlap(image.shape, x, y, half)
    if box is None:
        return
    if galaxy.kind == "star":
        bands = [galsim.DeltaFunction(flux=float(f)) for f in galaxy.fluxes()]
    else:
        bands = profiles(galaxy, painted or painting(galaxy))
    for plane, profile, fwhm in zip(image, bands, conditions.fwhm_arcsec, strict=True):
        if galaxy.kind == "star":
            seen = (bright_psf if galaxy.mag_r < 17 else psf)(fwhm).withFlux(profile.flux)
            _draw(plane, seen, x, y, box, wcs, method="no_pixel")
        else:
            _draw(
                plane,
                galsim.Convolve([profile, psf(fwhm)], gsparams=_GSPARAMS),
                x,
                y,
                box,
                wcs,
                method="auto",
            )


def _half_size(galaxy: Galaxy) -> int:
    """Half the side of the stamp that holds a source, in pixels."""
    if galaxy.kind == "star":
        return int(np.clip(16 * 10 ** (0.2 * (20 - galaxy.mag_r)), 16, 420))
    reach = 7.5 * galaxy.half_light_arcsec if galaxy.smooth else 5.6 * galaxy.scale_length_arcsec
    if galaxy.tail_fraction:
        reach = 8.0 * galaxy.scale_length_arcsec
    if galaxy.companion is not None:
        reach = max(reach, float(np.hypot(*galaxy.companion_offset_arcsec)) + 4 * galaxy.companion.half_light_arcsec)
    return int(np.clip(np.ceil((reach + 5) / PIXEL_SCALE), 24, 420))


def _overlap(shape: tuple[int, ...], x: float, y: float, half: int) -> tuple[slice, slice] | None:
    x0, y0 = round(x) - half, round(y) - half
    rows = slice(max(y0, 0), min(y0 + 2 * half + 1, shape[-2]))
    columns = slice(max(x0, 0), min(x0 + 2 * half + 1, shape[-1]))
    return None if rows.start >= rows.stop or columns.start >= columns.stop else (rows, columns)


def _draw(
    plane: Image,
    profile: galsim.GSObject,
    x: float,
    y: float,
    box: tuple[slice, slice],
    wcs: galsim.BaseWCS | None,
    method: str,
) -> None:
    rows, columns = box
    stamp = galsim.ImageF(columns.stop - columns.start, rows.stop - rows.start, xmin=columns.start, ymin=rows.start)
    where = {"wcs": wcs} if wcs is not None else {"scale": PIXEL_SCALE}
    profile.drawImage(stamp, center=galsim.PositionD(x, y), method=method, **where)
    plane[rows, columns] += stamp.array


@dataclass(frozen=True)
class FaintSource:
    """A field source too faint to be classified: an elliptical Moffat profile of about its blurred size."""

    x: float
    y: float
    mag_r: float
    colour: Colour
    half_light_arcsec: float
    axis_ratio: float
    angle_deg: float


def draw_field(rng: Generator, width: float, height: float, *, bright: float = 18.0) -> list[FaintSource]:
    """Draw the galaxies and stars that happen to lie in a field, positions in pixels.

    Densities per square arcmin: 22 galaxies to r = 23.6, counts rising by 0.38 dex per magnitude; 2.5 stars
    to r = 23.6, by 0.13 dex.
    """
    area = width * height * (PIXEL_SCALE / 60) ** 2
    sources = []
    for is_star, density, slope in ((False, 22.0, 0.38), (True, 2.5, 0.13)):
        for _ in range(int(rng.poisson(density * area))):
            x, y = rng.uniform(-0.5, width - 0.5), rng.uniform(-0.5, height - 0.5)
            mag = draw_magnitude(rng, bright - (2.0 if is_star else 0.0), 23.6, slope)
            if is_star:
                t = rng.beta(1.5, 1.0)
                colour, size, q = (
                    Colour(0.2 + 1.25 * min(t / 0.75, 1), 0.05 + 0.65 * t + 3.0 * max(0.0, t - 0.7)),
                    0.0,
                    1.0,
                )
            else:
                red = rng.random() < 0.35
                colour = (
                    Colour(rng.normal(1.45, 0.22), rng.normal(1.1, 0.25))
                    if red
                    else Colour(rng.normal(0.55, 0.25), rng.normal(0.45, 0.25))
                )
                size = 0.5 * 10 ** (-0.10 * (mag - 21) + 0.15 * rng.normal()) * (0.8 if red else 1.1)
                q = rng.uniform(0.35, 1.0)
            sources.append(FaintSource(x, y, mag, colour, float(size), float(q), float(rng.uniform(0, 180))))
    return sources


def add_field(image: Image, sources: Iterable[FaintSource], conditions: Conditions) -> None:
    """Add field sources, without noise, to an image of shape (3, h, w), in place."""
    for source in sources:
        half = int(np.clip((6 + 5 * source.half_light_arcsec) * 10 ** (0.1 * (21 - source.mag_r)) / PIXEL_SCALE, 8, 60))
        box = _overlap(image.shape, source.x, source.y, half)
        if box is None:
            continue
        fluxes = 10 ** (0.4 * (22.5 - source.mag_r)) * source.colour.ratios
        for plane, fwhm, flux in zip(image, conditions.fwhm_arcsec, fluxes, strict=True):
            major = float(np.hypot(fwhm, 1.7 * source.half_light_arcsec))
            minor = float(np.hypot(fwhm, 1.7 * source.half_light_arcsec * source.axis_ratio))
            profile = galsim.Moffat(
                beta=3.5, fwhm=float(np.sqrt(major * minor)), flux=float(flux), gsparams=_GSPARAMS
            ).shear(q=minor / major, beta=source.angle_deg * galsim.degrees)
            _draw(plane, profile, source.x, source.y, box, None, method="no_pixel")


def add_noise(image: Image, conditions: Conditions, rng: Generator) -> None:
    """Add sky and photon noise to an image of shape (3, h, w), in place.

    The noise is white noise smoothed by [a, 1, a] along both axes, a = 0.25, and brought back to its
    variance: Lanczos resampling leaves neighbouring pixels of a Legacy coadd correlated by about a half.
    """
    for plane, sigma, gain in zip(image, conditions.sigma, conditions.photons_per_nanomaggy, strict=True):
        height, width = plane.shape
        white = rng.standard_normal((height + 2, width + 2), dtype=np.float32)
        a = np.float32(_NOISE_KERNEL)
        rows = white[1:-1] + a * (white[:-2] + white[2:])
        smooth = (rows[:, 1:-1] + a * (rows[:, :-2] + rows[:, 2:])) / (1 + 2 * a * a)
        plane += smooth * np.sqrt(np.float32(sigma**2) + np.maximum(plane, 0) / np.float32(gain))


SATURATED, CORRUPT, NO_DATA = 1, 2, 4
"""Bits of the flags that artefacts leave."""


def add_artefact(image: Image, flags: Flags, galaxy: Galaxy, conditions: Conditions, x: float, y: float) -> None:
    """Add what a catalogue mistook for a source at a position.

    Parameters
    ----------
    image : ndarray, shape (3, h, w), float32, nanomaggies
        Changed in place, within 320 pixels of the position. A gap is only flagged: noise is still to come.
    flags : ndarray, shape (3, h, w), uint8
        `SATURATED`, `CORRUPT` and `NO_DATA` are set in place.
    """
    rng = np.random.default_rng(galaxy.structure_seed)
    box = _overlap(image.shape, x, y, 320)
    if box is None or galaxy.artefact == "blank":
        return
    window = (slice(None), *box)
    x, y = x - box[1].start, y - box[0].start
    if galaxy.artefact == "trail":
        _trail(image[window], flags[window], galaxy, conditions, rng, x, y)
    elif galaxy.artefact == "halo":
        angle, distance = rng.uniform(0, 2 * np.pi), rng.uniform(15, 60)
        star = (x + distance * np.cos(angle), y + distance * np.sin(angle))
        add_bright_star(image[window], flags[window], conditions, *star, float(rng.uniform(9.5, 12.0)), rng)
    else:
        band, across = int(rng.integers(3)), int(rng.integers(4, 14))
        rows = slice(max(round(y) - across, 0), max(round(y) + across, 0))
        flags[window][band, rows, max(round(x) - 60, 0) : max(round(x) + 60, 0)] |= NO_DATA


def _trail(
    image: Image, flags: Flags, galaxy: Galaxy, conditions: Conditions, rng: Generator, x: float, y: float
) -> None:
    """Draw a satellite's trail: it crosses one exposure, so one band."""
    angle = np.radians(galaxy.position_angle_deg)
    band = int(rng.integers(3))
    peak = float(np.exp(rng.uniform(np.log(3), np.log(40))) * conditions.sigma[band])
    rows, columns = np.ogrid[: image.shape[1], : image.shape[2]]
    across = (columns - x) * np.sin(angle) - (rows - y) * np.cos(angle)
    along = (columns - x) * np.cos(angle) + (rows - y) * np.sin(angle)
    inside = np.abs(along) < rng.uniform(60, 300)
    light = peak * np.exp(-0.5 * (across / rng.uniform(2.0, 3.5)) ** 2) * inside
    image[band] += light.astype(np.float32)
    flags[band][light > 0.05 * peak] |= CORRUPT


def add_bright_star(
    image: Image, flags: Flags, conditions: Conditions, x: float, y: float, mag_r: float, rng: Generator
) -> None:
    """Add a star that saturates: aureole, four diffraction spikes, a flat core and a bleed along x."""
    box = _overlap(image.shape, x, y, 700)
    if box is None:
        return
    rows, columns = np.ogrid[box[0], box[1]]
    dx, dy = columns - x, rows - y
    colour = Colour(float(rng.uniform(0.3, 1.2)), float(rng.uniform(0.1, 0.7)))
    fluxes = 10 ** (0.4 * (22.5 - mag_r)) * colour.ratios
    for b, (flux, fwhm) in enumerate(zip(fluxes, conditions.fwhm_arcsec, strict=True)):
        plane = image[b][box]
        stamp = np.zeros(image.shape[1:], np.float32) if plane.shape == image.shape[1:] else np.zeros_like(plane)
        _draw(
            stamp,
            bright_psf(fwhm).withFlux(float(flux)),
            x - columns[0, 0],
            y - rows[0, 0],
            (slice(0, plane.shape[0]), slice(0, plane.shape[1])),
            None,
            method="no_pixel",
        )
        spike = np.exp(-0.5 * (dx / 1.3) ** 2) / (1 + np.abs(dy) / 8) ** 2
        spike = spike + np.exp(-0.5 * (dy / 1.3) ** 2) / (1 + np.abs(dx) / 8) ** 2
        stamp += (2e-4 * flux * spike).astype(np.float32)
        full = 60.0
        bleed = (np.abs(dy) < 1.6) & (np.abs(dx) < 25 * np.sqrt(max(flux / 1e4, 0.05)))
        core = (stamp > full) | bleed
        plane += np.where(bleed, np.float32(full), np.minimum(stamp, np.float32(full)))
        flags[b][box][core] |= SATURATED
