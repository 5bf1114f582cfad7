"""Rows that describe a simulated object, and the tables they become."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import pyarrow as pa
from astropy import units as u
from astropy.table import Table
from numpy.random import Generator, SeedSequence
from numpy.typing import NDArray

from galembed.questions import QuestionTree, question_tree
from training.simulation.population import Galaxy
from training.simulation.render import Conditions, painting
from training.simulation.templates import Template
from training.simulation.votes import Visibility, answer_probabilities, draw_votes, visibility

RELEASE = 9999
"""No release of the Legacy Surveys has this number: an id tells that it is simulated."""

POPULATION, SKY, NOISE, VOTES, FIELD, BRIGHT = range(6)
"""First spawn key of each stream of random numbers; the object's own keys follow."""


def stream(seed: int, *keys: int) -> Generator:
    """Return the generator of one object and purpose; it depends on nothing that was drawn before."""
    return np.random.default_rng(SeedSequence(seed, spawn_key=keys))


@dataclass(frozen=True)
class SimulatedObject:
    """One row of the catalogue, with what is true of it and what volunteers said.

    Attributes
    ----------
    brick_id, object_id : int
    brick_name : str
    ra, dec : float
        ICRS, deg.
    galaxy : Galaxy
    conditions : Conditions
    seen : Visibility
    votes : ndarray, shape (answer,), int32
    file : str or None
        Relative to the survey's folder; None for sources that lie on bricks.
    """

    brick_id: int
    brick_name: str
    object_id: int
    ra: float
    dec: float
    galaxy: Galaxy
    conditions: Conditions
    seen: Visibility
    votes: NDArray[np.int32]
    file: str | None = None

    @property
    def id(self) -> str:
        """``release-brickid-objid``, the key that galembed uses for Legacy sources."""
        return f"{RELEASE}-{self.brick_id}-{self.object_id}"


@cache
def vote_questions() -> QuestionTree:
    """Return the questions that are answered: those of GZ DECaLS 5."""
    return question_tree("decals_dr5")


def describe(
    galaxy: Galaxy, conditions: Conditions, rng: Generator
) -> tuple[Visibility, NDArray[np.int32], Template | None]:
    """Return how visible a galaxy's features are, its votes, and the template on which that was measured."""
    painted = painting(galaxy)
    seen = visibility(galaxy, painted, conditions)
    return seen, draw_votes(vote_questions(), answer_probabilities(galaxy, seen), rng), painted


def source_table(objects: list[SimulatedObject]) -> Table:
    """Return the catalogue in the columns of a Legacy Surveys sweep file, with what an analysis would join to
    it.

    Fluxes are nanomaggies and say so in a comment, not in TUNIT: the FITS standard has no such unit.
    """
    galaxies = [o.galaxy for o in objects]
    flux = np.array([g.fluxes() if g.kind != "artefact" else _bogus(g) for g in galaxies]).reshape(-1, 3)
    table = Table(
        {
            "RELEASE": np.full(len(objects), RELEASE, np.int16),
            "BRICKID": np.array([o.brick_id for o in objects], np.int32),
            "BRICKNAME": np.array([o.brick_name for o in objects], "U8"),
            "OBJID": np.array([o.object_id for o in objects], np.int32),
            "RA": np.array([o.ra for o in objects], np.float64) * u.deg,
            "DEC": np.array([o.dec for o in objects], np.float64) * u.deg,
            "SHAPE_R": np.array([g.half_light_arcsec for g in galaxies], np.float32) * u.arcsec,
        }
    )
    table.meta["comments"] = [
        "FLUX_G, FLUX_R, FLUX_Z in nanomaggies (AB magnitude 22.5); as observed, EBV not corrected"
    ]
    for b, band in enumerate("GRZ"):
        table[f"FLUX_{band}"] = flux[:, b].astype(np.float32)
        table[f"MAG_{band}"] = (22.5 - 2.5 * np.log10(flux[:, b])).astype(np.float32) * u.mag
    table["REDSHIFT"] = np.array([g.redshift for g in galaxies], np.float32)
    table["EBV"] = np.array([o.conditions.ebv for o in objects], np.float32) * u.mag
    table["PSFSIZE_R"] = np.array([o.conditions.fwhm_arcsec[1] for o in objects], np.float32) * u.arcsec
    table["GALDEPTH_R"] = np.array([o.conditions.depth_mag[1] for o in objects], np.float32) * u.mag
    return table


def _bogus(galaxy: Galaxy) -> NDArray[np.float64]:
    """Return the fluxes that a catalogue would quote for an artefact."""
    return np.asarray(10 ** (0.4 * (22.5 - galaxy.mag_r)) * galaxy.bulge_colour.ratios)


def vote_table(objects: list[SimulatedObject]) -> pa.Table:
    """Return votes in Galaxy Zoo's column convention: id_str, ra, dec, file_loc, then int32 counts."""
    tree = vote_questions()
    votes = np.array([o.votes for o in objects], np.int32).reshape(-1, len(tree.columns))
    columns = {
        "id_str": pa.array([o.id for o in objects], pa.string()),
        "ra": pa.array([o.ra for o in objects], pa.float64()),
        "dec": pa.array([o.dec for o in objects], pa.float64()),
        "file_loc": pa.array([o.file for o in objects], pa.string()),
    }
    return pa.table(columns | {name: pa.array(votes[:, i]) for i, name in enumerate(tree.columns)})


def truth_table(objects: list[SimulatedObject]) -> pa.Table:
    """Return what is true of each object: the parameters that shaped it, and how visible each feature is."""
    numbers = (
        "mag_r",
        "redshift",
        "half_light_arcsec",
        "axis_ratio",
        "inclination_deg",
        "position_angle_deg",
        "bulge_fraction",
        "bulge_n",
        "pitch_deg",
        "arm_strength",
        "flocculence",
        "bar_fraction",
        "bar_length",
        "ring_fraction",
        "ring_radius",
        "dust",
        "disturbance",
        "tail_fraction",
    )
    columns = {
        "id_str": pa.array([o.id for o in objects], pa.string()),
        "kind": pa.array([o.galaxy.kind for o in objects], pa.string()),
        "edge_bulge": pa.array([o.galaxy.edge_bulge for o in objects], pa.string()),
        "artefact": pa.array([o.galaxy.artefact for o in objects], pa.string()),
        "arms": pa.array([o.galaxy.arms for o in objects], pa.int32()),
        "knots": pa.array([o.galaxy.knots for o in objects], pa.int32()),
    }
    for name in numbers:
        columns[name] = pa.array([float(getattr(o.galaxy, name)) for o in objects], pa.float64())
    for name in Visibility.names():
        label = name if name in ("snr_r", "apparent_axis_ratio", "apparent_bulge") else f"visible_{name}"
        columns[label] = pa.array([float(getattr(o.seen, name)) for o in objects], pa.float64())
    return pa.table(columns)
