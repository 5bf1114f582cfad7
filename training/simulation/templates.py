"""Images of disk galaxies by stellar population, before the atmosphere: arms, bars, rings, knots, dust,
tails.

Light is painted in the plane of the disk, in polar coordinates (r in scale lengths), but evaluated on a grid
of the sky whose x axis is the projected major axis: no image is sheared, so a thin feature of an inclined
disk stays sharp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from training.simulation.population import Galaxy

Image = NDArray[np.floating[Any]]
"""Float32 where it is stored."""


@dataclass(frozen=True)
class Template:
    """Populations of one disk on one grid.

    Attributes
    ----------
    scale_arcsec : float
        Size of a pixel of the grid.
    layers : dict of str to ndarray, shape (n, n), float32
        ``bar``, ``old``, ``young``, ``ring``, ``tail``: each sums to 1, or is absent where the galaxy has
        none.
    dust : ndarray, shape (n, n), float32
        Optical depth in r.
    radius : ndarray, shape (n, n), float32
        In the plane of the disk, in scale lengths.
    """

    scale_arcsec: float
    layers: dict[str, Image]
    dust: Image
    radius: Image


def template(galaxy: Galaxy) -> Template:
    """Paint the disk of a galaxy.

    Notes
    -----
    Arm k of m follows ``theta = theta_k + ln(r / r0) / tan(pitch)`` with a Gaussian cross-section in angle;
    each has its own strength, width, pitch and reach, so that no spiral is perfect. Flocculent disks add
    sheared noise. Young stars follow arms closely and have knots; the old disk is modulated weakly. An
    edge-on disk is ``(r) K1(r) sech^2(z / h)`` (van der Kruit & Searle 1981, A&A 95, 105).
    """
    rng = np.random.default_rng(galaxy.structure_seed)
    length = galaxy.scale_length_arcsec
    reach = 8.0 if galaxy.tail_fraction > 0 else 5.5
    n = int(np.clip(2 * reach * length / 0.2, 96, 224 if reach < 8 else 288)) // 2 * 2
    scale = 2 * reach * length / n
    axis = ((np.arange(n) - (n - 1) / 2) * (scale / length)).astype(np.float32)
    x, y = np.meshgrid(axis, axis)
    if galaxy.kind == "disk_edge_on":
        layers, dust, radius = _edge_on(galaxy, rng, x, y, scale / length)
    else:
        layers, dust, radius = _inclined(galaxy, rng, x, y, scale / length)
    edge = np.clip((reach - np.hypot(x, y)) / (0.12 * reach), 0, 1)
    taper = edge * edge * (3 - 2 * edge)
    return Template(scale, {name: _unit(layer * taper) for name, layer in layers.items()}, dust, radius)


def _unit(image: Image) -> Image:
    return np.asarray(image / image.sum(dtype=np.float64), dtype=np.float32)


def _wrap(angle: Image) -> Image:
    return angle - np.float32(2 * np.pi) * np.round(angle / np.float32(2 * np.pi))


def _inclined(
    galaxy: Galaxy, rng: Generator, x: Image, y: Image, pixel: float
) -> tuple[dict[str, Image], Image, Image]:
    q = np.float32(max(galaxy.axis_ratio, 0.2))
    x, y = _disturb(galaxy, rng, x, y / q)
    r = np.hypot(x, y) + np.float32(1e-3)
    theta = np.arctan2(y, x)
    log_r = np.log(r)
    break_radius = rng.uniform(2.8, 5.0)
    disk = np.exp(-r) / (1 + np.exp((r - break_radius) / 0.35))
    young_disk = np.exp(-r / rng.uniform(1.05, 1.35)) / (1 + np.exp((r - break_radius) / 0.3))
    if galaxy.bulge_fraction > 0.03:  # old stars own the centre of a disk with a bulge
        young_disk = young_disk * (1 - 0.85 * np.exp(-((r / 0.7) ** 2)))
    arms, dust = _arms(galaxy, rng, r, theta, log_r)
    texture = _texture(galaxy, rng, theta, log_r)
    floor = 0.06 + 0.18 * galaxy.flocculence if galaxy.arms else 1.0
    young = young_disk * (floor + (arms if galaxy.arms else 0.0)) * texture
    old = disk * (1 + 0.9 * arms)
    if galaxy.knots:
        young = young + _knots(galaxy, rng, young, pixel)
    layers = {"old": old, "young": young}
    if galaxy.bar_fraction:
        layers["bar"] = _bar(galaxy, x, y)
    if galaxy.ring_fraction:
        layers["ring"] = _ring(galaxy, rng, r, theta, texture)
    if galaxy.tail_fraction:
        layers["tail"] = _tails(rng, r, theta, log_r)
    dust = galaxy.dust * dust
    if galaxy.axis_ratio < 0.6:  # the near side lies in front of the bulge's light
        near = 1 / (1 + np.exp(-np.clip(y / 0.25, -30, 30)))
        dust = dust + 0.45 * galaxy.dust * (0.6 - galaxy.axis_ratio) / 0.4 * near * np.exp(-r / 1.2)
    return layers, dust.astype(np.float32), r


def _disturb(galaxy: Galaxy, rng: Generator, x: Image, y: Image) -> tuple[Image, Image]:
    """Lopside and twist the plane: displacement grows as the square of the radius, as a tide's does."""
    if galaxy.disturbance < 0.02:
        return x, y
    direction, sense = rng.uniform(0, 2 * np.pi), rng.choice([-1, 1])
    r2 = np.minimum(x * x + y * y, 16)
    push = np.float32(0.11 * galaxy.disturbance)
    x, y = x - push * r2 * np.float32(np.cos(direction)), y - push * r2 * np.float32(np.sin(direction))
    twist = np.float32(sense * 0.05 * galaxy.disturbance) * r2
    cos, sin = np.cos(twist), np.sin(twist)
    return x * cos - y * sin, x * sin + y * cos


def _arms(galaxy: Galaxy, rng: Generator, r: Image, theta: Image, log_r: Image) -> tuple[Image, Image]:
    """Return the arms' profile, 0 to about 1, and their dust lanes on the concave side."""
    if not galaxy.arms:
        return np.zeros_like(r), np.zeros_like(r)
    m, sense = galaxy.arms, int(rng.choice([-1, 1]))
    start = max(galaxy.bar_length, rng.uniform(0.3, 0.7))
    first = np.radians(galaxy.bar_angle_deg) if galaxy.bar_length else rng.uniform(0, 2 * np.pi)
    irregular = 0.25 + 0.6 * galaxy.flocculence
    wobble = np.float32(0.22 * irregular) * np.sin(
        log_r * np.float32(rng.uniform(4, 8)) + np.float32(rng.uniform(0, 6))
    )
    base = theta * sense + wobble
    grow = 1 / (1 + np.exp(-(r - start) / (0.10 * start + 0.03)))
    arms, dust = np.zeros_like(r), np.zeros_like(r)
    for k in range(m):
        pitch = np.radians(galaxy.pitch_deg * np.exp(0.10 * irregular * rng.normal()))
        where = sense * first + 2 * np.pi * k / m + 0.35 * irregular * rng.normal() * (m > 1)
        width = min(rng.uniform(0.13, 0.20) / np.sin(pitch), rng.uniform(0.15, 0.20) * 2 * np.pi / max(m, 2))
        strength = np.clip(1 - 0.5 * irregular * rng.random(), 0.2, 1)
        end = rng.uniform(2.3, 4.5)
        offset = _wrap(base - np.float32(where) - (log_r - np.float32(np.log(start))) / np.float32(np.tan(pitch)))
        reach = strength * grow / (1 + np.exp((r - end) / 0.4))
        arms += reach * np.exp(-0.5 * (offset / width) ** 2)
        dust += reach * np.exp(-0.5 * ((offset + 0.9 * width) / (0.4 * width)) ** 2)
    return arms, dust


def _texture(galaxy: Galaxy, rng: Generator, theta: Image, log_r: Image) -> Image:
    """Return positive noise of mean about 1, drawn out along the arms by shear."""
    if galaxy.arms:
        amplitude = 0.2 + 0.7 * galaxy.flocculence
    else:
        amplitude = 0.4 if galaxy.ring_fraction > 0 or galaxy.arm_strength > 0.4 else 0.03
    pitch = np.radians(galaxy.pitch_deg if galaxy.arms else 20.0)
    field = np.zeros_like(theta)
    for _ in range(5):
        m = int(rng.integers(2, 10))
        shear = np.float32(m / np.tan(pitch * np.exp(0.25 * rng.normal())) * rng.choice([-1, 1], p=(0.15, 0.85)))
        phase = np.float32(rng.uniform(0, 2 * np.pi))
        field += np.cos(m * theta - shear * log_r + phase) * np.cos(np.float32(rng.uniform(2, 7)) * log_r + phase * 3)
    return np.asarray(np.exp(np.float32(amplitude) * field * np.float32(0.65)))


def _knots(galaxy: Galaxy, rng: Generator, young: Image, pixel: float) -> Image:
    """Return star-forming regions, placed where young stars are, with a power law of luminosities."""
    weight = young.ravel().astype(np.float64) ** 1.15
    weight *= weight > 1e-4 * weight.max()
    cells = np.searchsorted(np.cumsum(weight), rng.random(galaxy.knots) * weight.sum())
    light = rng.pareto(1.3, galaxy.knots) + 1
    light = np.minimum(light, 0.2 * light.sum() + 1)
    points = np.bincount(cells, light, young.size).reshape(young.shape)
    spread = np.clip(0.055 / pixel, 0.7, 3.0)
    share = rng.uniform(0.08, 0.24)
    blurred = gaussian_filter(points, spread, truncate=3.5) + gaussian_filter(points, 2.5 * spread, truncate=2.5)
    return np.asarray(blurred * (share * young.sum(dtype=np.float64) / blurred.sum()), dtype=np.float32)


def _bar(galaxy: Galaxy, x: Image, y: Image) -> Image:
    """Return a boxy bar with a flat profile and soft ends, as in Gadotti 2011 (MNRAS 415, 3308) by shape."""
    angle = np.radians(galaxy.bar_angle_deg)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    along, across = x * cos + y * sin, -x * sin + y * cos
    width = np.float32(galaxy.bar_length * (0.26 if galaxy.bar_fraction > 0.09 else 0.36))
    rho = (np.abs(along / np.float32(galaxy.bar_length)) ** 2.6 + np.abs(across / width) ** 2.6) ** np.float32(1 / 2.6)
    return np.asarray(np.exp(-np.float32(1.4) * rho**2.2))


def _ring(galaxy: Galaxy, rng: Generator, r: Image, theta: Image, texture: Image) -> Image:
    width = galaxy.ring_radius * rng.uniform(0.09, 0.2)
    ellipse = 1 + np.float32(rng.uniform(0, 0.06)) * np.cos(2 * theta - np.float32(rng.uniform(0, 6)))
    return np.asarray(np.exp(-0.5 * ((r * ellipse - galaxy.ring_radius) / width) ** 2) * texture)


def _tails(rng: Generator, r: Image, theta: Image, log_r: Image) -> Image:
    """Return one or two tidal tails and a lopsided envelope."""
    first, sense = rng.uniform(0, 2 * np.pi), rng.choice([-1, 1])
    light = np.float32(0.05) * np.exp(-r / 2.2) * (1 + np.float32(0.9) * np.cos(theta - np.float32(rng.uniform(0, 6))))
    for k in range(int(rng.integers(1, 3))):
        pitch = np.radians(rng.uniform(28, 58))
        start, end = rng.uniform(1.2, 2.0), rng.uniform(4.0, 7.0)
        where = np.float32(first + np.pi * k + 0.3 * rng.normal())
        offset = _wrap(sense * theta - where - (log_r - np.float32(np.log(start))) / np.float32(np.tan(pitch)))
        width = np.float32(rng.uniform(0.10, 0.22))
        along = np.exp(-(r - start) / rng.uniform(1.5, 3.0)) / (1 + np.exp(-(r - start) / 0.2))
        light = light + along / (1 + np.exp((r - end) / 0.5)) * np.exp(-0.5 * (offset / width) ** 2)
    return np.asarray(light)


def _edge_on(galaxy: Galaxy, rng: Generator, x: Image, y: Image, pixel: float) -> tuple[dict[str, Image], Image, Image]:
    warp = np.float32(0.12 * galaxy.disturbance * rng.choice([-1, 1])) * x * np.abs(x) / 4
    z = y - warp
    r = np.hypot(x, y)
    h = np.float32(galaxy.axis_ratio)
    radial = (np.abs(x) + 0.35) * np.exp(-np.abs(x) * 1.08) / (1 + np.exp((np.abs(x) - rng.uniform(2.8, 4)) / 0.5))
    old = radial * _sech2(z / (1.15 * h))
    young = (
        radial
        * (0.4 + np.abs(x))
        * _sech2(z / (0.7 * h))
        * np.exp(np.float32(0.3) * np.sin(np.float32(rng.uniform(2, 6)) * x + np.float32(rng.uniform(0, 6))))
    )
    layers = {"old": old, "young": young}
    if galaxy.knots:
        layers["young"] = young + 0.6 * _knots(galaxy, rng, young, pixel)
    lane = np.float32(rng.uniform(-0.25, 0.25)) * h
    dust = galaxy.dust * np.exp(-np.abs(x) / 2.0) * np.exp(-0.5 * ((z - lane) / (0.45 * h)) ** 2)
    if galaxy.bar_fraction:
        rho = (np.abs(x / 0.75) ** 3.5 + np.abs(z / 0.42) ** 3.5) ** np.float32(1 / 3.5)
        layers["bar"] = np.exp(-np.float32(2.0) * rho)
    return layers, dust.astype(np.float32), r


def _sech2(z: Image) -> Image:
    return np.asarray(1 / np.cosh(np.clip(z, -20, 20)) ** 2)
