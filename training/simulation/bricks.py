"""Whole bricks in the layout of Legacy Surveys DR9 and DR10: images, inverse variances and mask bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import galsim
import numpy as np
from astropy.io import fits
from numpy.typing import NDArray

from training.simulation.catalogue import (
    BRIGHT,
    FIELD,
    NOISE,
    POPULATION,
    SKY,
    VOTES,
    SimulatedObject,
    describe,
    stream,
)
from training.simulation.files import write_atomic
from training.simulation.layout import OVERLAP_PIXELS, Brick
from training.simulation.population import draw_catalogued
from training.simulation.render import (
    BANDS,
    CORRUPT,
    NO_DATA,
    PIXEL_SCALE,
    SATURATED,
    Conditions,
    FaintSource,
    Flags,
    Image,
    add_artefact,
    add_bright_star,
    add_field,
    add_noise,
    add_source,
    draw_conditions,
    draw_field,
)
from training.simulation.votes import Visibility

NPRIMARY, BRIGHT_BIT, SATUR, ALLMASK = 0, 1, (2, 3, 4), (5, 6, 7)
"""Bits of maskbits, Legacy Surveys DR9 ``bitmasks`` page."""
_TILE = (100, 100)
_BRIGHT_PER_SQUARE_ARCMIN = 0.012
_MARGIN_PIXELS = 450
_NOT_SEEN = Visibility()
_NO_VOTES = np.zeros(0, np.int32)


def brick_files(out: Path, brick: Brick) -> dict[str, Path]:
    """Return the paths of a brick's files by type and band, such as ``image-g`` and ``maskbits``."""
    folder = out / "coadd" / brick.name[:3] / brick.name
    kinds = [f"{kind}-{band}" for kind in ("image", "invvar") for band in BANDS]
    return {kind: folder / f"legacysurvey-{brick.name}-{kind}.fits.fz" for kind in [*kinds, "maskbits"]}


def simulate_brick(
    out: Path, bricks: list[Brick], which: int, *, sources: int, seed: int, noise_seed: int
) -> list[SimulatedObject]:
    """Draw and write one brick of a layout unless its files are there; return the rows of its own sources."""
    rows = brick_objects(bricks[which], which, sources=sources, seed=seed)
    files = brick_files(out, bricks[which])
    if not all(path.exists() for path in files.values()):
        image, invvar, maskbits = brick_images(bricks, which, sources=sources, seed=seed, noise_seed=noise_seed)
        for b, band in enumerate(BANDS):
            _write_image(files[f"image-{band}"], image[b], bricks[which], band)
            _write_invvar(files[f"invvar-{band}"], invvar[b], bricks[which], band)
        _write_maskbits(files["maskbits"], maskbits, bricks[which])
    seen_rows = []
    for row in rows:
        seen, votes, _ = describe(row.galaxy, row.conditions, stream(seed, VOTES, 1, which, row.object_id))
        seen_rows.append(replace(row, seen=seen, votes=votes))
    return seen_rows


def brick_objects(brick: Brick, which: int, *, sources: int, seed: int) -> list[SimulatedObject]:
    """Return a brick's own sources; visibility and votes are still empty."""
    conditions = draw_conditions(stream(seed, SKY, 1, which))
    rows = []
    for index in range(sources):
        rng = stream(seed, POPULATION, 1, which, index)
        ra, dec = float(rng.uniform(brick.ra1, brick.ra2)), float(rng.uniform(brick.dec1, brick.dec2))
        rows.append(
            SimulatedObject(
                brick.brick_id,
                brick.name,
                index,
                ra,
                dec,
                draw_catalogued(rng),
                conditions,
                _NOT_SEEN,
                _NO_VOTES,
            )
        )
    return rows


def brick_images(
    bricks: list[Brick], which: int, *, sources: int, seed: int, noise_seed: int
) -> tuple[Image, Image, NDArray[np.int16]]:
    """Draw one brick, with what reaches into it from its neighbours in the layout.

    A source has the seeing of its own brick on every image, so that an overlap shows it alike on both.

    Returns
    -------
    image : ndarray, shape (3, n, n), float32, nanomaggies
        0 where there is no data.
    invvar : ndarray, shape (3, n, n), float32, nanomaggies**-2
        Of the sky alone, as Legacy's; 0 where there is no data or a star saturates.
    maskbits : ndarray, shape (n, n), int16
    """
    brick = bricks[which]
    n = brick.size
    image, flags = np.zeros((3, n, n), np.float32), np.zeros((3, n, n), np.uint8)
    bright = np.zeros((n, n), bool)
    sky = galsim.TanWCS(
        galsim.AffineTransform(PIXEL_SCALE, 0, 0, PIXEL_SCALE, origin=galsim.PositionD((n - 1) / 2, (n - 1) / 2)),
        galsim.CelestialCoord(brick.ra * galsim.degrees, brick.dec * galsim.degrees),
    )
    for other in _neighbours(bricks, which):
        conditions = draw_conditions(stream(seed, SKY, 1, other))
        rows = brick_objects(bricks[other], other, sources=sources, seed=seed)
        for row, x, y in _inside(brick, rows):
            if row.galaxy.kind == "artefact":
                add_artefact(image, flags, row.galaxy, conditions, x, y)
            else:
                local = sky.local(image_pos=galsim.PositionD(x, y))
                add_source(image, row.galaxy, conditions, x, y, wcs=local)
        add_field(image, _field(bricks, other, brick, seed), conditions)
        _add_bright_stars(image, flags, bright, bricks, other, brick, conditions, seed)
    own = draw_conditions(stream(seed, SKY, 1, which))
    add_noise(image, own, stream(noise_seed, NOISE, 1, which))
    _lose_strip(flags, which, seed)
    invvar = np.empty_like(image)
    invvar[:] = (1 / own.sigma**2)[:, None, None]
    invvar[(flags & (NO_DATA | SATURATED)) > 0] = 0
    image[(flags & NO_DATA) > 0] = 0
    return image, invvar, _maskbits(flags, bright, brick)


def _neighbours(bricks: list[Brick], which: int) -> list[int]:
    """Return the indices of the bricks whose sources may reach into one, itself among them."""
    brick = bricks[which]
    reach_ra, reach_dec = 1.6 * (brick.ra2 - brick.ra1), 1.6 * (brick.dec2 - brick.dec1)
    return [i for i, b in enumerate(bricks) if abs(b.ra - brick.ra) < reach_ra and abs(b.dec - brick.dec) < reach_dec]


def _inside(brick: Brick, rows: list[SimulatedObject]) -> Iterator[tuple[SimulatedObject, float, float]]:
    if not rows:
        return
    xs, ys = brick.wcs.all_world2pix([r.ra for r in rows], [r.dec for r in rows], 0)
    for row, x, y in zip(rows, xs, ys, strict=True):
        if -_MARGIN_PIXELS < x < brick.size + _MARGIN_PIXELS and -_MARGIN_PIXELS < y < brick.size + _MARGIN_PIXELS:
            yield row, float(x), float(y)


def _to_sky(x: NDArray[np.float64], y: NDArray[np.float64], home: Brick) -> tuple[NDArray[np.float64], ...]:
    """Take pixels of a brick's own area, 0 to `_own_pixels`, to RA and Dec."""
    side = _own_pixels(home)
    return home.ra2 - x / side * (home.ra2 - home.ra1), home.dec1 + y / side * (home.dec2 - home.dec1)


def _own_pixels(brick: Brick) -> float:
    return brick.size - OVERLAP_PIXELS


def _field(bricks: list[Brick], home: int, brick: Brick, seed: int) -> list[FaintSource]:
    """Return the field sources of one brick's own area, at their pixels on another's image."""
    side = _own_pixels(bricks[home])
    found = draw_field(stream(seed, FIELD, 1, home), side, side, bright=19.0)
    if not found:
        return []
    ra, dec = _to_sky(np.array([f.x for f in found]), np.array([f.y for f in found]), bricks[home])
    xs, ys = brick.wcs.all_world2pix(ra, dec, 0)
    return [replace(f, x=float(x), y=float(y)) for f, x, y in zip(found, xs, ys, strict=True)]


def _add_bright_stars(
    image: Image,
    flags: Flags,
    bright: NDArray[np.bool_],
    bricks: list[Brick],
    home: int,
    brick: Brick,
    conditions: Conditions,
    seed: int,
) -> None:
    rng = stream(seed, BRIGHT, home)
    side = _own_pixels(bricks[home])
    count = max(home % 2, int(rng.poisson(_BRIGHT_PER_SQUARE_ARCMIN * (side * PIXEL_SCALE / 60) ** 2)))
    magnitudes, places = rng.uniform(9.5, 13.0, count), rng.uniform(0, side, (2, count))
    for i, (mag, ra, dec) in enumerate(zip(magnitudes, *_to_sky(places[0], places[1], bricks[home]), strict=True)):
        x, y = (float(v) for v in brick.wcs.all_world2pix(ra, dec, 0))
        add_bright_star(image, flags, conditions, x, y, float(mag), stream(seed, BRIGHT, home, i))
        radius = 40 * 10 ** (0.15 * (13 - mag))
        rows, columns = np.ogrid[: brick.size, : brick.size]
        bright |= (columns - x) ** 2 + (rows - y) ** 2 < radius**2


def _lose_strip(flags: Flags, which: int, seed: int) -> None:
    """Leave a strip of one band without data in three bricks of ten: the gap between exposures."""
    rng = stream(seed, BRIGHT, which, 1_000_000)
    if rng.random() < 0.3:
        n = flags.shape[-1]
        width = max(12, n // 25)
        start = int(rng.integers(0, n - width))
        flags[int(rng.integers(3)), :, start : start + width] |= NO_DATA


def _maskbits(flags: Flags, bright: NDArray[np.bool_], brick: Brick) -> NDArray[np.int16]:
    bits = np.where(bright, np.int16(1 << BRIGHT_BIT), np.int16(0))
    for b in range(3):
        bits |= np.where(flags[b] & SATURATED, np.int16(1 << SATUR[b]), np.int16(0))
        bits |= np.where(flags[b] & (CORRUPT | NO_DATA), np.int16(1 << ALLMASK[b]), np.int16(0))
    edge = round(OVERLAP_PIXELS / 2)
    outside = np.ones((brick.size, brick.size), bool)
    outside[edge:-edge, edge:-edge] = False
    return np.asarray(bits | np.where(outside, np.int16(1 << NPRIMARY), np.int16(0)), dtype=np.int16)


def _header(brick: Brick, kind: str, band: str) -> fits.Header:
    header = brick.wcs.to_header()
    for key in list(header):
        if key.startswith(("PC", "CDELT")):
            del header[key]
    scale = PIXEL_SCALE / 3600
    header["CD1_1"], header["CD1_2"], header["CD2_1"], header["CD2_2"] = -scale, 0.0, 0.0, scale
    header["SURVEY"] = "galembed simulation"
    header["BRICK"], header["BRICKNAM"], header["BRICKID"] = brick.name, brick.name, brick.brick_id
    header["IMTYPE"], header["PRODTYPE"] = kind, kind
    if band:
        header["BAND"], header["FILTER"] = band, band
        header["MAGZERO"] = (22.5, "Magnitude zeropoint")
        header["BUNIT"] = "nanomaggy" if kind == "image" else "1/nanomaggy^2"
    return header


def _write(path: Path, hdu: fits.CompImageHDU, brick: Brick) -> None:
    primary = fits.PrimaryHDU()
    primary.header["SURVEY"], primary.header["BRICKNAM"] = "galembed simulation", brick.name
    write_atomic(path, lambda temporary: fits.HDUList([primary, hdu]).writeto(temporary))


def _write_image(path: Path, image: Image, brick: Brick, band: str) -> None:
    hdu = fits.CompImageHDU(
        image,
        _header(brick, "image", band),
        name=f"IMAGE_{band}",
        compression_type="RICE_1",
        tile_shape=_TILE,
        quantize_level=-1e-4,
        quantize_method=2,
        dither_seed=-1,
    )
    _write(path, hdu, brick)


def _write_invvar(path: Path, invvar: Image, brick: Brick, band: str) -> None:
    hdu = fits.CompImageHDU(
        invvar,
        _header(brick, "invvar", band),
        name=f"INVVAR_{band}",
        compression_type="RICE_1",
        tile_shape=_TILE,
        quantize_level=16,
        quantize_method=-1,
    )
    _write(path, hdu, brick)


def _write_maskbits(path: Path, maskbits: NDArray[np.int16], brick: Brick) -> None:
    hdu = fits.CompImageHDU(
        maskbits,
        _header(brick, "maskbits", ""),
        name="MASKBITS",
        compression_type="HCOMPRESS_1",
        tile_shape=_TILE,
        hcomp_scale=0,
        hcomp_smooth=0,
    )
    _write(path, hdu, brick)
