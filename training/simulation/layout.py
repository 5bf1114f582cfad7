"""Where the bricks of the Legacy Surveys lie, and what they are called."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from astropy.wcs import WCS

from training.simulation.render import PIXEL_SCALE

BRICK_DEG = 0.25
BRICK_PIXELS = 3600
OVERLAP_PIXELS = BRICK_PIXELS - BRICK_DEG * 3600 / PIXEL_SCALE
"""About 165: what a brick's image reaches beyond its own area, both sides together."""
_FIRST_RA, _FIRST_DEC = 42.1, 2.25


@dataclass(frozen=True)
class Brick:
    """One brick.

    Attributes
    ----------
    name : str
        Such as ``0421p022``: RA and Dec of the centre in tenths of a degree, cut off.
    brick_id : int
        Counts bricks from the south pole, as BRICKID of the Legacy Surveys does.
    ra, dec : float
        Centre of the image, deg.
    ra1, ra2, dec1, dec2 : float
        The area whose sources are this brick's own, deg.
    size : int
        Side of the image in pixels.
    """

    name: str
    brick_id: int
    ra: float
    dec: float
    ra1: float
    ra2: float
    dec1: float
    dec2: float
    size: int = BRICK_PIXELS

    @property
    def wcs(self) -> WCS:
        """TAN projection about the centre, north up, RA decreasing with x."""
        wcs = WCS(naxis=2)
        wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
        wcs.wcs.crval = [self.ra, self.dec]
        wcs.wcs.crpix = [(self.size + 1) / 2] * 2
        wcs.wcs.cd = np.diag([-PIXEL_SCALE / 3600, PIXEL_SCALE / 3600])
        wcs.wcs.set()
        return wcs


@cache
def _columns() -> tuple[int, ...]:
    """Return the number of bricks in each row of declination: even, and no brick wider than 0.25 deg."""
    rows = []
    for i in range(int(180 / BRICK_DEG) + 1):
        dec = abs(-90 + i * BRICK_DEG)
        wide = 360 / BRICK_DEG * np.cos(np.radians(dec - BRICK_DEG / 2))
        rows.append(1 if dec == 90 else int(np.ceil(wide / 2) * 2))
    return tuple(rows)


def brick_at(ra: float, dec: float) -> Brick:
    """Return the brick of the real grid that owns a position in degrees."""
    row = int((dec + 90 + BRICK_DEG / 2) // BRICK_DEG)
    columns = _columns()[row]
    column = int((ra % 360) * columns // 360)
    return _brick(row, column)


def _brick(row: int, column: int) -> Brick:
    columns = _columns()[row]
    column %= columns
    dec, width = -90 + row * BRICK_DEG, 360 / columns
    ra = (column + 0.5) * width
    name = f"{int(ra * 10 + 1e-6):04d}{'p' if dec >= 0 else 'm'}{int(abs(dec) * 10 + 1e-6):03d}"
    return Brick(
        name,
        sum(_columns()[:row]) + column + 1,
        ra,
        dec,
        column * width,
        (column + 1) * width,
        dec - BRICK_DEG / 2,
        dec + BRICK_DEG / 2,
    )


def brick_grid(count: int, size: int = BRICK_PIXELS) -> list[Brick]:
    """Return neighbouring bricks, in a block as square as the count allows.

    With 3600 pixels they are bricks of the real grid. Smaller ones keep those names and ids, and the overlap
    of about 165 pixels, but are drawn together about the first, so that neighbours stay neighbours.
    """
    first = brick_at(_FIRST_RA, _FIRST_DEC)
    row = round((first.dec + 90) / BRICK_DEG)
    across = int(np.ceil(np.sqrt(count)))
    shrink = (size - OVERLAP_PIXELS) / (BRICK_PIXELS - OVERLAP_PIXELS)
    bricks = []
    for i in range(count):
        here = _columns()[row + i // across]
        brick = _brick(row + i // across, int(first.ra * here // 360) + i % across)
        if size != BRICK_PIXELS:
            brick = _shrunk(brick, first, shrink, size)
        bricks.append(brick)
    return bricks


def _shrunk(brick: Brick, about: Brick, by: float, size: int) -> Brick:
    def ra(value: float) -> float:
        return about.ra + by * (value - about.ra)

    def dec(value: float) -> float:
        return about.dec + by * (value - about.dec)

    return Brick(
        brick.name,
        brick.brick_id,
        ra(brick.ra),
        dec(brick.dec),
        ra(brick.ra1),
        ra(brick.ra2),
        dec(brick.dec1),
        dec(brick.dec2),
        size,
    )
