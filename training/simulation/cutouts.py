"""Cutouts of single objects, in the layout of the Legacy Surveys' cutout service."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from astropy.io import fits

from training.simulation.catalogue import (
    FIELD,
    NOISE,
    POPULATION,
    RELEASE,
    SKY,
    VOTES,
    SimulatedObject,
    describe,
    stream,
)
from training.simulation.files import write_atomic
from training.simulation.layout import brick_at
from training.simulation.population import draw_classified
from training.simulation.render import (
    NO_DATA,
    PIXEL_SCALE,
    Conditions,
    Image,
    add_artefact,
    add_field,
    add_noise,
    add_source,
    draw_conditions,
    draw_field,
)
from training.simulation.templates import Template

FIELD_IN_HALF_LIGHTS = 14.0
FIELD_LIMITS_ARCSEC = (20.0, 84.0)
_FIRST_OBJECT_ID = 100_000


def simulate_cutouts(
    out: Path, start: int, stop: int, *, seed: int, noise_seed: int, image_folder: str = "cutouts"
) -> list[SimulatedObject]:
    """Draw and write objects `start` to `stop` - 1, keeping files that are there; return their rows.

    Object i depends on the seeds and i alone. Its cutout is 14 half-light radii wide, within 20 and 84
    arcsec.
    """
    objects = []
    for index in range(start, stop):
        row, painted = cutout_object(index, seed=seed, image_folder=image_folder)
        path = out / str(row.file)
        if not path.exists():
            image = cutout_image(row, painted, index, seed=seed, noise_seed=noise_seed)
            write_atomic(path, _hdu(image, row).writeto)
        objects.append(row)
    return objects


def cutout_object(index: int, *, seed: int, image_folder: str = "cutouts") -> tuple[SimulatedObject, Template | None]:
    """Return the row of one object, and its template."""
    rng = stream(seed, POPULATION, 0, index)
    galaxy, conditions = draw_classified(rng), draw_conditions(stream(seed, SKY, 0, index))
    # Uniform on the sphere, in about the declinations that DECaLS covers.
    ra = float(rng.uniform(0, 360))
    dec = float(np.degrees(np.arcsin(rng.uniform(np.sin(np.radians(-15)), np.sin(np.radians(32))))))
    brick = brick_at(ra, dec)
    seen, votes, painted = describe(galaxy, conditions, stream(seed, VOTES, 0, index))
    object_id = _FIRST_OBJECT_ID + index
    file = f"{image_folder}/{RELEASE}-{brick.brick_id}-{object_id}.fits"
    row = SimulatedObject(brick.brick_id, brick.name, object_id, ra, dec, galaxy, conditions, seen, votes, file)
    return row, painted


def cutout_size(half_light_arcsec: float) -> int:
    """Return the side of a cutout in pixels."""
    return int(np.ceil(np.clip(FIELD_IN_HALF_LIGHTS * half_light_arcsec, *FIELD_LIMITS_ARCSEC) / PIXEL_SCALE))


def cutout_image(row: SimulatedObject, painted: Template | None, index: int, *, seed: int, noise_seed: int) -> Image:
    """Draw one object with its neighbours and noise, shape (3, n, n), nanomaggies."""
    size = cutout_size(row.galaxy.half_light_arcsec)
    centre = (size - 1) / 2
    image = np.zeros((3, size, size), np.float32)
    flags = np.zeros(image.shape, np.uint8)
    conditions: Conditions = row.conditions
    add_source(image, row.galaxy, conditions, centre, centre, painted=painted)
    add_field(image, draw_field(stream(seed, FIELD, 0, index), size, size), conditions)
    if row.galaxy.kind == "artefact":
        add_artefact(image, flags, row.galaxy, conditions, centre, centre)
    add_noise(image, conditions, stream(noise_seed, NOISE, 0, index))
    image[(flags & NO_DATA) > 0] = 0
    return image


def _hdu(image: Image, row: SimulatedObject) -> fits.PrimaryHDU:
    size = image.shape[-1]
    scale = PIXEL_SCALE / 3600
    header = fits.Header()
    header["SURVEY"], header["VERSION"], header["IMAGETYP"] = "galembed simulation", "1", "IMAGE"
    header["BANDS"], header["BAND0"], header["BAND1"], header["BAND2"] = "grz", "g", "r", "z"
    header["BUNIT"], header["MAGZERO"] = "nanomaggy", 22.5
    header["CTYPE1"], header["CTYPE2"] = "RA---TAN", "DEC--TAN"
    header["CRVAL1"], header["CRVAL2"] = row.ra, row.dec
    header["CRPIX1"] = header["CRPIX2"] = (size + 1) / 2
    header["CD1_1"], header["CD1_2"], header["CD2_1"], header["CD2_2"] = -scale, 0.0, 0.0, scale
    header["IMAGEW"] = header["IMAGEH"] = float(size)
    return fits.PrimaryHDU(image, header)
