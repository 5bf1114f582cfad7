"""What volunteers would say: how visible each feature is in an image, then votes down the tree."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import gaussian_filter

from galembed.questions import QuestionTree
from training.simulation.population import Galaxy
from training.simulation.render import PIXEL_SCALE, Conditions
from training.simulation.templates import Image, Template

_GAUSS = 2.355
CONTRAST_HALF = {"arms": 0.23, "bar": 0.13, "ring": 0.20, "disturbance": 0.25}
"""Contrast at which half of the volunteers see a feature in a picture without noise."""
SIGNAL_HALF = 3.5
"""Signal-to-noise ratio per resolution element at which a feature of full contrast is half lost."""


@dataclass(frozen=True)
class Visibility:
    """Chance, 0 to 1, that a volunteer sees each feature; and what is left of shape after the atmosphere.

    Attributes
    ----------
    arms, bar, ring, disturbance, companion : float
    edge_on : float
        That the disk looks edge-on.
    apparent_axis_ratio : float
        Minor over major axis of the blurred image.
    apparent_bulge : float
        Central concentration that the eye takes for a bulge, as a bulge-to-total ratio.
    snr_r : float
        Flux over noise within about the half-light ellipse's noise-equivalent area, in r.
    """

    arms: float = 0.0
    bar: float = 0.0
    ring: float = 0.0
    disturbance: float = 0.0
    companion: float = 0.0
    edge_on: float = 0.0
    apparent_axis_ratio: float = 1.0
    apparent_bulge: float = 0.0
    snr_r: float = 0.0

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Names of all scores."""
        return tuple(field.name for field in fields(cls))


def visibility(galaxy: Galaxy, painted: Template | None, conditions: Conditions) -> Visibility:
    r"""Measure how visible each feature is.

    Notes
    -----
    A feature's residual image D is what it adds to the azimuthally averaged disk, and T the whole galaxy,
    both in r and blurred by the seeing. With sigma the noise of one resolution element (a circle of the
    seeing's FWHM),

    .. math:: C = \frac{\sum D^2}{\sum |D|\,T}, \quad
              S = \sqrt{\frac{\sum |D|\,D^2}{\sum |D|}}\,\frac{A}{\sigma}, \quad
              v = \frac{C}{C_{1/2}} \frac{S^2}{S^2 + S_{1/2}^2}, \quad p = \frac{v^3}{1 + v^3}.

    C is the contrast where the feature is, S its signal-to-noise ratio per resolution element, A that
    element's area; features small beside the FWHM lose contrast in the blur, so scale needs no term of its
    own. `CONTRAST_HALF` and `SIGNAL_HALF` are choices, set by looking at pictures.
    """
    if galaxy.kind in ("star", "artefact"):
        return Visibility(snr_r=_snr(galaxy, conditions))
    ratio = _apparent_axis_ratio(galaxy, conditions)
    snr = _snr(galaxy, conditions)
    companion = _companion(galaxy, conditions)
    if painted is None:
        return Visibility(
            companion=companion,
            apparent_axis_ratio=ratio,
            apparent_bulge=_bulge_seen(galaxy),
            snr_r=snr,
            edge_on=0.35 * float(_logistic((0.27 - ratio) / 0.05)),
        )
    seen = _features(galaxy, painted, conditions)
    flat = galaxy.kind == "disk_edge_on"
    return Visibility(
        arms=seen.get("arms", 0.0),
        bar=seen.get("bar", 0.0),
        ring=seen.get("ring", 0.0),
        disturbance=seen.get("disturbance", 0.0),
        companion=companion,
        edge_on=float(_logistic((0.33 - ratio) / 0.045)) * (1.0 if flat else 0.8) * min(1.0, snr / 25),
        apparent_axis_ratio=ratio,
        apparent_bulge=_bulge_seen(galaxy),
        snr_r=snr,
    )


def _logistic(x: ArrayLike) -> NDArray[np.float64]:
    return np.asarray(1 / (1 + np.exp(-np.clip(x, -40, 40))), dtype=np.float64)


def _snr(galaxy: Galaxy, conditions: Conditions) -> float:
    s = conditions.fwhm_arcsec[1] / _GAUSS
    area = 4 * np.pi * (galaxy.half_light_arcsec**2 * galaxy.axis_ratio / 1.4 + s**2) / PIXEL_SCALE**2
    flux = 10 ** (0.4 * (22.5 - galaxy.mag_r))
    return float(flux / (conditions.sigma[1] * np.sqrt(area)))


def _apparent_axis_ratio(galaxy: Galaxy, conditions: Conditions) -> float:
    s2 = (conditions.fwhm_arcsec[1] / _GAUSS) ** 2
    r2 = galaxy.half_light_arcsec**2
    q = galaxy.axis_ratio
    if galaxy.kind == "disk_edge_on":
        q = q + 0.45 * galaxy.bulge_fraction
    return float(np.sqrt((q**2 * r2 + s2) / (r2 + s2)))


def _bulge_seen(galaxy: Galaxy) -> float:
    if galaxy.smooth:
        return float(np.clip(0.15 + 0.13 * galaxy.bulge_n, 0, 0.9))
    return galaxy.bulge_fraction + 0.25 * galaxy.bar_fraction


def _companion(galaxy: Galaxy, conditions: Conditions) -> float:
    """Return the chance that a second nucleus is told apart: by its distance in seeing disks and its flux."""
    if galaxy.companion is None:
        return 0.0
    distance = float(np.hypot(*galaxy.companion_offset_arcsec)) / conditions.fwhm_arcsec[1]
    contrast = 2.5 - (galaxy.companion.mag_r - galaxy.mag_r)
    bright = _snr(galaxy.companion, conditions) / 12
    return float(_logistic((distance - 1.6) / 0.4) * _logistic(contrast / 0.5) * min(1.0, bright))


def _features(galaxy: Galaxy, painted: Template, conditions: Conditions) -> dict[str, float]:
    blur = conditions.fwhm_arcsec[1] / _GAUSS / painted.scale_arcsec
    shares = dict(zip(("bulge", "bar", "old", "young", "ring", "tail"), galaxy.populations(), strict=True))
    light = {name: np.float32(shares[name][0]) * image for name, image in painted.layers.items() if shares[name][0] > 0}
    dimming = np.exp(-painted.dust)
    none = np.zeros_like(painted.dust)
    disk = (light.get("old", none) + light.get("young", none)) * dimming
    total = np.sum(list(light.values()), axis=0) * dimming + shares["bulge"][0] * _bulge_image(galaxy, painted)

    def seen(residual: Image, half: float) -> float:
        return _chance(gaussian_filter(residual, blur, truncate=3.0), blurred, half, galaxy, painted, conditions)

    blurred = gaussian_filter(total, blur, truncate=3.0)
    found = {}
    if galaxy.kind == "disk_edge_on":
        return {"disturbance": galaxy.disturbance}
    uneven = disk - _azimuthal_mean(disk, painted)
    if galaxy.arms:
        found["arms"] = seen(uneven, CONTRAST_HALF["arms"])
    elif galaxy.arm_strength > 0.3 or galaxy.disturbance > 0.2:
        found["disturbance"] = 0.8 * seen(uneven, CONTRAST_HALF["disturbance"])
    if galaxy.bar_fraction:
        found["bar"] = seen(light["bar"] - _azimuthal_mean(light["bar"], painted), CONTRAST_HALF["bar"])
    if galaxy.ring_fraction:
        wide = gaussian_filter(light["ring"], 0.5 * galaxy.scale_length_arcsec / painted.scale_arcsec, truncate=2.5)
        found["ring"] = seen(light["ring"] - wide, CONTRAST_HALF["ring"])
    if galaxy.tail_fraction:
        found["disturbance"] = max(found.get("disturbance", 0.0), seen(light["tail"], CONTRAST_HALF["disturbance"]))
    elif galaxy.disturbance > 0.3:
        found["disturbance"] = max(found.get("disturbance", 0.0), galaxy.disturbance * found.get("arms", 0.3))
    return found


def _chance(
    residual: Image,
    total: Image,
    half: float,
    galaxy: Galaxy,
    painted: Template,
    conditions: Conditions,
) -> float:
    weight = np.abs(residual)
    norm = float(weight.sum())
    if norm <= 0:
        return 0.0
    contrast = float((residual**2).sum()) / float((weight * total).sum())
    element = np.pi * (conditions.fwhm_arcsec[1] / 2) ** 2
    typical = np.sqrt(float((weight * residual**2).sum()) / norm) * galaxy.flux_r * element / painted.scale_arcsec**2
    noise = float(conditions.sigma[1]) * np.sqrt(element) / PIXEL_SCALE
    signal = typical / noise
    v = contrast / half * signal**2 / (signal**2 + SIGNAL_HALF**2)
    return float(v**3 / (1 + v**3))


def _azimuthal_mean(image: Image, painted: Template) -> Image:
    bins = np.minimum((painted.radius * 10).astype(np.intp), 99).ravel()
    sums = np.bincount(bins, image.ravel(), 100)
    mean = sums / np.maximum(np.bincount(bins, minlength=100), 1)
    return mean.astype(np.float32)[bins].reshape(image.shape)


def _bulge_image(galaxy: Galaxy, painted: Template) -> Image:
    n = painted.dust.shape[0]
    axis = ((np.arange(n) - (n - 1) / 2) * painted.scale_arcsec).astype(np.float32)
    radius = max(galaxy.bulge_radius * galaxy.scale_length_arcsec, painted.scale_arcsec)
    r = np.hypot(axis[None, :], axis[:, None] / np.float32(galaxy.bulge_axis_ratio)) / np.float32(radius)
    image = np.exp(-np.float32(2 * galaxy.bulge_n - 0.33) * (r + 0.02) ** np.float32(1 / galaxy.bulge_n))
    return np.asarray(image / image.sum(dtype=np.float64), dtype=np.float32)


def answer_probabilities(galaxy: Galaxy, seen: Visibility) -> dict[str, NDArray[np.float64]]:
    """Return, for each question of GZ DECaLS 5, the probability of each answer from a volunteer who is asked.

    Returns
    -------
    dict of str to ndarray, float64
        Keyed by question name; each sums to 1.
    """
    q = seen.apparent_axis_ratio
    if galaxy.kind in ("star", "artefact"):
        root = np.array([0.30, 0.04, 0.66]) if galaxy.kind == "star" else np.array([0.08, 0.10, 0.82])
    else:
        root = _root(galaxy, seen)
    edge = float(np.clip(0.02 + 0.95 * seen.edge_on, 0, 0.97))
    # Who says "featured" has seen something: of an arm's galaxy, most often the arm.
    anything = max(_seen_anything(seen), 0.05)
    arms = min(1.0, seen.arms / anything)
    spiral = 0.97 * arms + (0.15 if not galaxy.arms else 0.35) * (1 - arms)
    answers = {
        "smooth-or-featured": root,
        "how-rounded": _roundness(q),
        "disk-edge-on": np.array([edge, 1 - edge]),
        "edge-on-bulge": _edge_bulge(galaxy, seen),
        "has-spiral-arms": np.array([spiral, 1 - spiral]),
        "bar": _bar(galaxy, seen),
        "bulge-size": _bulge_size(seen),
        "spiral-winding": _winding(galaxy, seen),
        "spiral-arm-count": _arm_count(galaxy, seen),
        "merging": _merging(galaxy, seen),
    }
    return {name: p / p.sum() for name, p in answers.items()}


def _seen_anything(seen: Visibility) -> float:
    weights = {"arms": 0.96, "bar": 0.6, "ring": 0.8, "disturbance": 0.6, "edge_on": 0.93, "companion": 0.3}
    return float(1 - np.prod([1 - weight * getattr(seen, name) for name, weight in weights.items()]))


def _root(galaxy: Galaxy, seen: Visibility) -> NDArray[np.float64]:
    hidden = 1 - _seen_anything(seen)
    disk = 0.0 if galaxy.smooth else 0.16 * min(1.0, seen.snr_r / 40) * (1 - seen.apparent_bulge)
    featured = 0.09 + 0.88 * (1 - hidden * (1 - disk))
    artifact = 0.02 + 0.10 * float(_logistic((8 - seen.snr_r) / 2))
    return np.array([(1 - featured) * (1 - artifact), featured * (1 - artifact), artifact])


def _roundness(q: float) -> NDArray[np.float64]:
    round_ = float(_logistic((q - 0.79) / 0.06))
    cigar = float(_logistic((0.42 - q) / 0.05))
    return np.array([round_, max(0.0, 1 - round_ - cigar), cigar]) + 0.01


def _edge_bulge(galaxy: Galaxy, seen: Visibility) -> NDArray[np.float64]:
    share = galaxy.bulge_fraction + (galaxy.bar_fraction if galaxy.edge_bulge == "boxy" else 0.0)
    bulge = float(_logistic((share - 0.10) / 0.035))
    boxy = 0.55 if galaxy.edge_bulge == "boxy" else 0.06
    return np.array([bulge * boxy, 1 - bulge, bulge * (1 - boxy)]) + 0.02


def _bar(galaxy: Galaxy, seen: Visibility) -> NDArray[np.float64]:
    bar = float(np.clip(0.15 + 0.80 * seen.bar, 0, 0.95))
    strong = (
        float(_logistic((galaxy.bar_fraction * galaxy.bar_length - 0.09) / 0.03)) if galaxy.bar_fraction > 0 else 0.2
    )
    return np.array([bar * strong, bar * (1 - strong), 1 - bar])


def _bulge_size(seen: Visibility) -> NDArray[np.float64]:
    centres = np.sqrt([0.68, 0.40, 0.17, 0.055, 0.004])
    return np.asarray(np.exp(-0.5 * ((np.sqrt(seen.apparent_bulge) - centres) / 0.115) ** 2) + 0.01)


def _winding(galaxy: Galaxy, seen: Visibility) -> NDArray[np.float64]:
    if not galaxy.arms:
        return np.array([0.45, 0.35, 0.2])
    centres = np.log([9.0, 17.0, 30.0])
    width = 0.26 + 0.3 * (1 - seen.arms)
    return np.asarray(np.exp(-0.5 * ((np.log(galaxy.pitch_deg) - centres) / width) ** 2) + 0.03)


def _arm_count(galaxy: Galaxy, seen: Visibility) -> NDArray[np.float64]:
    """Return the probability of 1, 2, 3, 4, more than 4, can't tell."""
    chances = np.array([0.03, 0.25, 0.05, 0.03, 0.04, 0.60])
    if not galaxy.arms:
        return chances
    clear = seen.arms * (1 - 0.6 * galaxy.flocculence) * (0.6 + 0.4 * float(_logistic((galaxy.pitch_deg - 11) / 2)))
    told = np.zeros(6)
    for arms, p in ((galaxy.arms, 0.78), (galaxy.arms - 1, 0.11), (galaxy.arms + 1, 0.11)):
        told[min(max(arms, 1), 5) - 1] += p
    many = np.array([0.02, 0.12, 0.12, 0.12, 0.27, 0.35]) if galaxy.flocculence > 0.4 else chances
    return np.asarray(clear * told + (1 - clear) * many)


def _merging(galaxy: Galaxy, seen: Visibility) -> NDArray[np.float64]:
    """Return the probability of none, minor disturbance, major disturbance, merger."""
    merger = 0.015 + 0.80 * seen.companion
    rest = 1 - merger
    disturbed = rest * float(np.clip(0.05 + 0.75 * seen.disturbance, 0, 0.9))
    major = disturbed * (0.55 if galaxy.tail_fraction > 0 else 0.15)
    return np.array([rest - disturbed, disturbed - major, major, merger])


def draw_votes(tree: QuestionTree, probabilities: dict[str, NDArray[np.float64]], rng: Generator) -> NDArray[np.int32]:
    """Draw vote counts down the tree: each volunteer who gives a parent's answer answers the child.

    Counts are Dirichlet-multinomial: each galaxy and question has its own answer probabilities, drawn about
    the given ones with a concentration that is log-normal about 25, so counts are overdispersed as real votes
    are. The root gets 30 to 45 votes, as GZD-5's did.

    Parameters
    ----------
    tree : QuestionTree
    probabilities : dict of str to ndarray
        By question name, as from `answer_probabilities`.

    Returns
    -------
    ndarray, shape (answer,), int32
        In the order of ``tree.columns``.
    """
    concentration = float(np.exp(rng.normal(np.log(25), 0.4)))
    counts: dict[str, int] = {}
    row: list[int] = []
    for question in tree.questions:
        asked = sum(counts[parent] for parent in question.after) if question.after else int(rng.integers(30, 46))
        shares = rng.dirichlet(np.maximum(concentration * probabilities[question.name], 1e-3))
        votes = rng.multinomial(asked, shares)
        counts |= {f"{question.name}_{a}": int(v) for a, v in zip(question.answers, votes, strict=True)}
        row.extend(votes)
    return np.array(row, dtype=np.int32)
