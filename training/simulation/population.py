"""What is simulated: the parameters of galaxies, stars and artefacts, drawn from plausible distributions.

Every draw takes a `numpy.random.Generator` of its own, spawned per object, so that an object does not depend
on which process draws it or on how many others there are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

KINDS = (
    "smooth_round",
    "smooth_elongated",
    "disk",
    "disk_edge_on",
    "spiral",
    "barred_spiral",
    "ring",
    "merger",
    "star",
    "artefact",
)
GALAXY_KINDS = KINDS[:8]
ARTEFACT_KINDS = ("trail", "halo", "blank", "gap")

_KIND_SHARES = (0.15, 0.15, 0.11, 0.12, 0.24, 0.13, 0.04, 0.06)
"""Shares of `GALAXY_KINDS`: more spirals, rings and mergers than the sky has, for training."""

_LEAST_HALF_LIGHT_ARCSEC = 1.8


@dataclass(frozen=True)
class Colour:
    """Two colours of one stellar population, AB magnitudes as observed (not rest frame)."""

    g_r: float
    r_z: float

    @property
    def ratios(self) -> NDArray[np.float64]:
        """Flux in g, r, z relative to r, shape (3,)."""
        return np.array([10 ** (-0.4 * self.g_r), 1.0, 10 ** (0.4 * self.r_z)])


@dataclass(frozen=True)
class Galaxy:
    """Everything that decides how one source looks before the atmosphere; lengths in disk scale lengths
    unless named.

    Attributes
    ----------
    kind : str
        One of `KINDS`.
    mag_r : float
        Total AB magnitude, the companion not included.
    redshift : float
        NaN for stars and artefacts.
    half_light_arcsec : float
        Half-light radius along the major axis; 0 for point sources.
    axis_ratio : float
        Projected minor over major axis, 0 to 1.
    position_angle_deg : float
        Of the major axis, east of north.
    bulge_fraction, bulge_n, bulge_radius, bulge_axis_ratio : float
        Share of the r flux, Sersic index, half-light radius and projected axis ratio of the bulge. For the
        smooth kinds the "bulge" is the galaxy: fraction 1, and the radius is `half_light_arcsec`.
    arms : int
        0 for none; 1 to 6.
    pitch_deg, arm_strength, flocculence : float
        Pitch angle (small is tight), share of the disk's r flux in young stars, 0 to 1 from grand design to
        flocculent.
    bar_fraction, bar_length, bar_angle_deg : float
        Share of the r flux, half-length, angle to the major axis in the disk's plane. An edge-on disk's boxy
        bulge is kept here too: it is a bar seen from the side.
    ring_fraction, ring_radius : float
    knots : int
        Star-forming regions.
    dust : float
        Optical depth scale of arm dust, or of the dust lane of an edge-on disk.
    disturbance, tail_fraction : float
        0 to 1: lopsidedness and twist of the disk; share of the r flux in tidal tails.
    edge_bulge : str
        ``boxy``, ``none`` or ``rounded``; empty unless edge-on.
    bulge_colour, old_colour, young_colour : Colour
    structure_seed : int
        Decides arm irregularities, knots and tails.
    companion : Galaxy or None
        The second galaxy of a merger.
    companion_offset_arcsec : tuple of float
        (east, north).
    artefact : str
        One of `ARTEFACT_KINDS`; empty otherwise.
    """

    kind: str
    mag_r: float
    redshift: float
    half_light_arcsec: float
    axis_ratio: float
    position_angle_deg: float
    bulge_fraction: float = 0.0
    bulge_n: float = 1.0
    bulge_radius: float = 0.3
    bulge_axis_ratio: float = 1.0
    arms: int = 0
    pitch_deg: float = float("nan")
    arm_strength: float = 0.0
    flocculence: float = 0.0
    bar_fraction: float = 0.0
    bar_length: float = 0.0
    bar_angle_deg: float = 0.0
    ring_fraction: float = 0.0
    ring_radius: float = 0.0
    knots: int = 0
    dust: float = 0.0
    disturbance: float = 0.0
    tail_fraction: float = 0.0
    edge_bulge: str = ""
    bulge_colour: Colour = Colour(0.8, 0.6)
    old_colour: Colour = Colour(0.7, 0.5)
    young_colour: Colour = Colour(0.2, 0.2)
    structure_seed: int = 0
    companion: Galaxy | None = None
    companion_offset_arcsec: tuple[float, float] = (0.0, 0.0)
    artefact: str = ""

    @property
    def smooth(self) -> bool:
        """Whether it is a single Sersic profile."""
        return self.kind in ("smooth_round", "smooth_elongated")

    @property
    def inclination_deg(self) -> float:
        """Inclination that `axis_ratio` means for a disk of thickness 0.15; NaN where there is no disk."""
        if self.smooth or self.kind in ("star", "artefact"):
            return float("nan")
        cos2 = (self.axis_ratio**2 - 0.15**2) / (1 - 0.15**2)
        return float(np.degrees(np.arccos(np.sqrt(np.clip(cos2, 0, 1)))))

    @property
    def scale_length_arcsec(self) -> float:
        """Exponential scale length of the disk that, with the bulge, has `half_light_arcsec`."""
        return self.half_light_arcsec / _half_light_in_scale_lengths(self.bulge_fraction, self.bulge_radius)

    @property
    def flux_r(self) -> float:
        """Total r flux in nanomaggies, the companion not included; 0 for artefacts."""
        return 0.0 if self.kind == "artefact" else float(10 ** (0.4 * (22.5 - self.mag_r)))

    def fluxes(self) -> NDArray[np.float64]:
        """Return total flux in g, r, z, nanomaggies, shape (3,), the companion not included."""
        ratios = np.sum([share * colour.ratios for share, colour in self.populations()], axis=0)
        return np.asarray(self.flux_r * ratios, dtype=np.float64)

    def populations(self) -> list[tuple[float, Colour]]:
        """Return (share of r flux, colour) of bulge, bar, old and young disk, ring, tails, in order."""
        bulge = 1.0 if self.smooth or self.kind in ("star", "artefact") else self.bulge_fraction
        rest = 1 - bulge
        bar = min(self.bar_fraction, rest)
        ring = min(self.ring_fraction, rest - bar)
        tail = min(self.tail_fraction, rest - bar - ring)
        disk = rest - bar - ring - tail
        young = disk * self.arm_strength
        return [
            (bulge, self.bulge_colour),
            (bar, self.bulge_colour),
            (disk - young, self.old_colour),
            (young, self.young_colour),
            (ring, _blend(self.old_colour, self.young_colour)),
            (tail, _blend(self.old_colour, self.young_colour)),
        ]


def _blend(a: Colour, b: Colour) -> Colour:
    return Colour((a.g_r + b.g_r) / 2, (a.r_z + b.r_z) / 2)


def _half_light_in_scale_lengths(bulge_fraction: float, bulge_radius: float) -> float:
    radius = np.geomspace(0.02, 10, 200)
    disk = 1 - (1 + radius) * np.exp(-radius)
    bulge = 1 - 0.5 ** ((radius / max(bulge_radius, 1e-3)) ** 1.2)
    growth = bulge_fraction * bulge + (1 - bulge_fraction) * disk
    return float(np.interp(0.5, growth, radius))


def draw_magnitude(rng: Generator, bright: float, faint: float, slope: float) -> float:
    """Return a magnitude from counts that rise as ``10**(slope * m)`` between two limits."""
    low, high = 10 ** (slope * bright), 10 ** (slope * faint)
    return float(np.log10(low + rng.random() * (high - low)) / slope)


def draw_classified(rng: Generator) -> Galaxy:
    """Draw one object as Galaxy Zoo's selection would: bright and resolved mostly, one in nine fainter.

    GZ DECaLS took r < 17.77 and Petrosian radius > 3 arcsec (Walmsley et al. 2022, MNRAS 509, 3966); here the
    nine have r < 17.8 and a half-light radius above 1.8 arcsec, with somewhat more bright ones than the sky
    has.
    """
    u = rng.random()
    if u < 0.02:
        return draw_star(rng, draw_magnitude(rng, 12.5, 18.5, 0.25))
    if u < 0.04:
        return draw_artefact(rng)
    if rng.random() < 0.1:
        return draw_galaxy(rng, draw_magnitude(rng, 18.0, 20.0, 0.3))
    kind = GALAXY_KINDS[rng.choice(len(GALAXY_KINDS), p=_KIND_SHARES)]
    while True:
        galaxy = draw_galaxy(rng, draw_magnitude(rng, 13.5, 17.8, 0.32), kind)
        if galaxy.half_light_arcsec > _LEAST_HALF_LIGHT_ARCSEC:
            return galaxy


def draw_catalogued(rng: Generator) -> Galaxy:
    """Draw one row of a brick's catalogue: r 14.5 to 20.5, galaxies rising by 0.45 dex per magnitude."""
    u = rng.random()
    if u < 0.09:
        return draw_star(rng, draw_magnitude(rng, 14.0, 20.5, 0.2))
    if u < 0.115:
        return draw_artefact(rng)
    return draw_galaxy(rng, draw_magnitude(rng, 14.5, 20.5, 0.45))


def draw_star(rng: Generator, mag_r: float) -> Galaxy:
    """Draw a point source with the colours of the stellar locus."""
    t = rng.beta(1.2, 1.2)
    colour = Colour(0.2 + 1.25 * min(t / 0.75, 1.0), 0.05 + 0.65 * t + 3.0 * max(0.0, t - 0.7))
    return Galaxy("star", mag_r, float("nan"), 0.0, 1.0, 0.0, bulge_fraction=1.0, bulge_colour=colour)


def draw_artefact(rng: Generator) -> Galaxy:
    """Draw what is no source: a satellite trail, a bright star's halo, blank sky, a gap in the data."""
    which = ARTEFACT_KINDS[rng.choice(4, p=(0.35, 0.35, 0.15, 0.15))]
    return Galaxy(
        "artefact",
        draw_magnitude(rng, 16.5, 20.0, 0.3),
        float("nan"),
        float(rng.uniform(1.5, 4.0)),
        1.0,
        float(rng.uniform(0, 180)),
        bulge_fraction=1.0,
        artefact=which,
        structure_seed=_seed(rng),
        bulge_colour=Colour(float(rng.normal(0.6, 0.2)), float(rng.normal(0.5, 0.2))),
    )


def draw_galaxy(rng: Generator, mag_r: float, kind: str | None = None) -> Galaxy:
    """Draw a galaxy of a magnitude, and of a kind where one is asked for.

    Sizes are log-normal about ``log10 R = a - b (r - 17) - 0.4 log10(z / z_r)`` with (a, b, scatter) = (0.53,
    0.17, 0.15) for disks and (0.38, 0.19, 0.14) for smooth galaxies: early types are smaller at fixed
    magnitude, as in Shen et al. 2003 (MNRAS 343, 978), the zero points set to SDSS sizes at r = 17; of one
    magnitude, the nearer is the larger. Redshift is log-normal, 0.17 dex, about ``z_r = 0.085 * 10**(0.15 (r
    - 17.3))``.
    """
    kind = kind or GALAXY_KINDS[rng.choice(len(GALAXY_KINDS), p=_KIND_SHARES)]
    redshift = float(np.clip(_typical_redshift(mag_r) * 10 ** (0.17 * rng.normal()), 0.004, 0.6))
    angle = float(rng.uniform(0, 180))
    if kind in ("smooth_round", "smooth_elongated"):
        return _smooth(rng, kind, mag_r, redshift, angle)
    if kind == "disk_edge_on":
        return _edge_on(rng, mag_r, redshift, angle)
    if kind == "merger":
        return _merger(rng, mag_r, redshift, angle)
    return _disk(rng, kind, mag_r, redshift, angle)


def _seed(rng: Generator) -> int:
    return int(rng.integers(2**31))


def _typical_redshift(mag_r: float) -> float:
    return float(0.085 * 10 ** (0.15 * (mag_r - 17.3)))


def _size(rng: Generator, mag_r: float, redshift: float, *, early: bool) -> float:
    a, b, scatter = (0.38, 0.19, 0.14) if early else (0.53, 0.17, 0.15)
    near = -0.4 * np.log10(redshift / _typical_redshift(mag_r))
    return float(np.clip(10 ** (a - b * (mag_r - 17) + near + scatter * rng.normal()), 0.35, 40))


def _red(rng: Generator, redshift: float) -> Colour:
    """Red sequence: g-r = 0.70 + 2.1 z and r-z = 0.58 + 0.9 z, roughly the observed locus to z = 0.35."""
    z = min(redshift, 0.38)
    shift = rng.normal()
    return Colour(0.70 + 2.1 * z + 0.035 * shift, 0.58 + 0.9 * z + 0.035 * shift)


def _blue(rng: Generator, redshift: float) -> Colour:
    """Young stars with some dust; bluer than the blue cloud, which is a mixture with the old disk."""
    z = min(redshift, 0.5)
    shift = rng.normal()
    return Colour(0.23 + 0.9 * z + 0.08 * shift, 0.20 + 0.6 * z + 0.09 * shift)


def _shift(colour: Colour, by: float) -> Colour:
    return Colour(colour.g_r + by, colour.r_z + 0.7 * by)


def _smooth(rng: Generator, kind: str, mag_r: float, redshift: float, angle: float) -> Galaxy:
    round_ = kind == "smooth_round"
    q = float(rng.uniform(0.82, 1.0) if round_ else rng.beta(3, 2.2) * 0.55 + 0.27)
    red = _red(rng, redshift)
    if rng.random() < 0.15:  # blue compact and faded disks that volunteers call smooth
        red = _shift(red, -float(rng.uniform(0.15, 0.45)))
        n = float(rng.uniform(0.9, 2.0))
    else:
        n = float(np.clip(rng.normal(4.0 if round_ else 3.2, 1.1), 1.2, 6.0))
    size = _size(rng, mag_r, redshift, early=n > 1.8)
    return Galaxy(
        kind,
        mag_r,
        redshift,
        size,
        q,
        angle,
        bulge_fraction=1.0,
        bulge_n=n,
        bulge_axis_ratio=q,
        bulge_colour=red,
        structure_seed=_seed(rng),
    )


def _edge_on(rng: Generator, mag_r: float, redshift: float, angle: float) -> Galaxy:
    bulge = ("rounded", "none", "boxy")[rng.choice(3, p=(0.55, 0.35, 0.10))]
    fraction = 0.0 if bulge == "none" else float(rng.uniform(0.08, 0.4))
    boxy = bulge == "boxy"
    red = _red(rng, redshift)
    blueness = rng.beta(2, 2) * (0.75 if bulge == "none" else 0.5)
    return Galaxy(
        "disk_edge_on",
        mag_r,
        redshift,
        min(1.35 * _size(rng, mag_r, redshift, early=False), 40.0),
        float(rng.uniform(0.08, 0.20)),
        angle,
        bulge_fraction=fraction * (0.3 if boxy else 1.0),
        bar_fraction=0.7 * fraction if boxy else 0.0,
        bulge_n=float(rng.uniform(1.0, 2.5)),
        bulge_radius=float(rng.uniform(0.3, 0.6)),
        bulge_axis_ratio=float(rng.uniform(0.55, 0.85)),
        edge_bulge=bulge,
        arm_strength=float(blueness),
        knots=int(rng.integers(0, 25)),
        dust=float(rng.choice([0.0, rng.uniform(0.8, 3.0)], p=(0.4, 0.6))),
        disturbance=float(rng.beta(1.2, 8)),
        bulge_colour=red,
        old_colour=_shift(red, -0.1),
        young_colour=_blue(rng, redshift),
        structure_seed=_seed(rng),
    )


def _disk(rng: Generator, kind: str, mag_r: float, redshift: float, angle: float) -> Galaxy:
    cos_i = rng.uniform(0.28, 1.0)
    q = float(np.sqrt(cos_i**2 + 0.15**2 * (1 - cos_i**2)))
    lateness = rng.beta(1.6, 1.6)  # 0 is Sa, 1 is Sd
    red = _red(rng, redshift)
    fraction = float(np.clip(0.36 * (1 - lateness) ** 1.6 * np.exp(0.3 * rng.normal()), 0.005, 0.6))
    galaxy = Galaxy(
        kind,
        mag_r,
        redshift,
        _size(rng, mag_r, redshift, early=False),
        q,
        angle,
        bulge_fraction=fraction,
        bulge_n=float(1.2 + 2.4 * (1 - lateness) * rng.random()),
        bulge_radius=float(rng.uniform(0.15, 0.35) + 0.15 * (1 - lateness)),
        bulge_axis_ratio=float(min(1.0, 0.35 + 0.65 * q)),
        bulge_colour=red,
        old_colour=_shift(red, -float(rng.uniform(0.08, 0.22))),
        young_colour=_blue(rng, redshift),
        disturbance=float(rng.beta(1.2, 7)),
        structure_seed=_seed(rng),
    )
    if kind == "disk":
        return _featureless(rng, galaxy, lateness)
    if kind == "ring":
        return _ringed(rng, galaxy)
    galaxy = _with_arms(rng, galaxy, lateness)
    return _with_bar(rng, galaxy) if kind == "barred_spiral" else galaxy


def _featureless(rng: Generator, galaxy: Galaxy, lateness: float) -> Galaxy:
    if rng.random() < 0.3:  # blue and irregular
        return replace(
            galaxy,
            bulge_fraction=0.01,
            arm_strength=float(rng.uniform(0.5, 0.9)),
            knots=int(rng.integers(6, 40)),
            disturbance=float(rng.uniform(0.2, 0.6)),
            half_light_arcsec=1.1 * galaxy.half_light_arcsec,
        )
    galaxy = replace(galaxy, arm_strength=float(0.35 * lateness * rng.random()))
    return _with_bar(rng, galaxy) if rng.random() < 0.2 else galaxy


def _ringed(rng: Generator, galaxy: Galaxy) -> Galaxy:
    ring = replace(
        galaxy,
        ring_fraction=float(rng.uniform(0.15, 0.4)),
        ring_radius=float(rng.uniform(1.5, 2.8)),
        arm_strength=float(rng.uniform(0.05, 0.25)),
        knots=int(rng.integers(0, 30)),
        bulge_fraction=float(np.clip(galaxy.bulge_fraction + 0.12, 0.05, 0.5)),
    )
    if rng.random() < 0.35:
        ring = replace(ring, arms=2, pitch_deg=float(rng.uniform(7, 13)), flocculence=0.5, arm_strength=0.25)
    return _with_bar(rng, ring) if rng.random() < 0.4 else ring


def _with_arms(rng: Generator, galaxy: Galaxy, lateness: float) -> Galaxy:
    flocculence = float(rng.beta(1.2, 1.8))
    arms = int(1 + rng.choice(6, p=(0.06, 0.54, 0.16, 0.12, 0.07, 0.05)))
    pitch = float(np.clip(np.exp(rng.normal(np.log(12 + 9 * lateness), 0.32)), 6, 42))
    return replace(
        galaxy,
        arms=arms,
        pitch_deg=pitch,
        flocculence=flocculence,
        arm_strength=float(np.clip(0.36 + 0.34 * lateness + 0.1 * rng.normal(), 0.2, 0.85)),
        knots=int(rng.integers(5, 30 + int(50 * lateness))),
        dust=float(rng.uniform(0, 0.9)),
    )


def _with_bar(rng: Generator, galaxy: Galaxy) -> Galaxy:
    strong = rng.random() < 0.55
    fraction, length = (
        (rng.uniform(0.10, 0.24), rng.uniform(0.8, 1.5)) if strong else (rng.uniform(0.03, 0.09), rng.uniform(0.5, 0.9))
    )
    inner_ring = strong and galaxy.arms > 0 and rng.random() < 0.3
    return replace(
        galaxy,
        bar_fraction=float(fraction),
        bar_length=float(length),
        bar_angle_deg=float(rng.uniform(0, 180)),
        bulge_fraction=min(galaxy.bulge_fraction, 0.3),
        ring_fraction=float(rng.uniform(0.05, 0.12)) if inner_ring else galaxy.ring_fraction,
        ring_radius=float(1.05 * length) if inner_ring else galaxy.ring_radius,
    )


def _merger(rng: Generator, mag_r: float, redshift: float, angle: float) -> Galaxy:
    dry = rng.random() < 0.25
    base_kind = "smooth_elongated" if dry else ("spiral" if rng.random() < 0.7 else "disk")
    main = draw_galaxy(rng, mag_r, base_kind)
    other = draw_galaxy(rng, mag_r + float(rng.uniform(0.0, 2.0)), "smooth_round" if rng.random() < 0.5 else "disk")
    # A pair shares its redshift and the reach of its sizes; the draw of the second galaxy knew neither.
    other = replace(other, redshift=redshift, half_light_arcsec=min(other.half_light_arcsec, main.half_light_arcsec))
    separation, direction = main.half_light_arcsec * rng.uniform(0.7, 2.6), rng.uniform(0, 2 * np.pi)
    return replace(
        main,
        kind="merger",
        redshift=redshift,
        position_angle_deg=angle,
        disturbance=float(rng.uniform(0.45, 1.0)),
        bulge_fraction=min(main.bulge_fraction, 0.6) if not dry else 0.75,
        bulge_radius=0.8 if dry else main.bulge_radius,
        old_colour=_shift(main.bulge_colour, -0.08) if dry else main.old_colour,
        tail_fraction=float(rng.uniform(0.06, 0.2)),
        companion=other,
        companion_offset_arcsec=(
            float(separation * np.cos(direction)),
            float(separation * np.sin(direction)),
        ),
    )
