"""Small files as the surveys write them, with random shape, scale, rotation and place. For damaged.py."""

from __future__ import annotations

import bz2
import gzip
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits
from astropy.table import Table
from astropy.wcs import WCS
from numpy.typing import NDArray


@dataclass(frozen=True)
class Sky:
    """A random frame on the sky."""

    shape: tuple[int, int]
    wcs: WCS

    @classmethod
    def draw(cls, rng: np.random.Generator, smallest: int, largest: int, pixel: tuple[float, float]) -> Sky:
        shape = (int(rng.integers(smallest, largest)), int(rng.integers(smallest, largest)))
        wcs = WCS(naxis=2)
        projection = rng.choice(["TAN", "SIN", "ZEA"])
        wcs.wcs.ctype = [f"RA---{projection}", f"DEC--{projection}"]
        wcs.wcs.crval = [rng.uniform(0, 360), np.degrees(np.arcsin(rng.uniform(-1, 1)))]
        wcs.wcs.crpix = [(shape[1] + 1) / 2 + rng.uniform(-3, 3), (shape[0] + 1) / 2 + rng.uniform(-3, 3)]
        turn, scale = rng.uniform(0, 2 * np.pi), rng.uniform(*pixel) / 3600
        wcs.wcs.cd = scale * np.array([[-np.cos(turn), np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        wcs.wcs.set()
        return cls(shape, wcs)

    def header(self, **cards: object) -> fits.Header:
        return self.wcs.to_header() + fits.Header(cards)

    def image(self, rng: np.random.Generator, flux: float) -> NDArray[np.float32]:
        rows, columns = np.mgrid[: self.shape[0], : self.shape[1]]
        x, y = (self.shape[1] - 1) / 2, (self.shape[0] - 1) / 2
        blob = np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 50)
        return (flux * blob + rng.normal(0, 0.02, self.shape)).astype(np.float32)


def write_cube(folder: Path, name: str, rng: np.random.Generator, sums: bool) -> None:
    sky = Sky.draw(rng, 48, 90, (0.1, 0.6))
    cube = np.stack([sky.image(rng, flux) for flux in (1, 2, 3)])
    header = sky.header(BANDS="grz", BAND0="g", BAND1="r", BAND2="z", IMAGETYP="image", SURVEY="LegacySurvey")
    fits.PrimaryHDU(cube, header).writeto(folder / f"{name}.fits", checksum=sums)


def write_subimage(folder: Path, name: str, rng: np.random.Generator, sums: bool) -> None:
    sky = Sky.draw(rng, 48, 90, (0.262, 0.262))
    hdus = fits.HDUList([fits.PrimaryHDU()])
    for band, flux in zip("grz", (1, 2, 3), strict=True):
        cards = {"BRICK": "0421p022", "BRICK_X0": 100, "BRICK_Y0": 200, "BAND": band}
        weight = np.full(sky.shape, 400, np.float32)
        weight[:, :5] = 0
        hdus.append(fits.ImageHDU(sky.image(rng, flux), sky.header(IMAGETYP="image", **cards)))
        hdus.append(fits.ImageHDU(weight, sky.header(IMAGETYP="invvar", **cards)))
    hdus.writeto(folder / f"{name}.fits", checksum=sums)


def write_brick(folder: Path, name: str, rng: np.random.Generator, sums: bool, kind: str = "RICE_1") -> None:
    sky = Sky.draw(rng, 125, 175, (0.262, 0.262))  # HCOMPRESS wants at least 4 pixels in the last tile of 60
    ra, dec = sky.wcs.wcs.crval
    brick = f"{int(ra * 10) % 3600:04d}{'p' if dec >= 0 else 'm'}{int(abs(dec) * 10):03d}"
    head = sky.header(BUNIT="nanomaggy")
    level = {"quantize_level": 16.0} if kind == "RICE_1" else {"quantize_level": 0.0}

    def write(data: NDArray[Any], what: str, **options: Any) -> None:
        hdu = fits.CompImageHDU(data, head, tile_shape=(60, 60), **options)
        path = folder / f"legacysurvey-{brick}-{what}.fits.fz"
        fits.HDUList([fits.PrimaryHDU(), hdu]).writeto(path, checksum=sums)

    for band, flux in zip("grz", (1, 2, 3), strict=True):
        weight = np.full(sky.shape, 400, np.float32) + rng.normal(0, 1, sky.shape).astype(np.float32)
        weight[:40] = 0
        write(sky.image(rng, flux), f"image-{band}", compression_type=kind, **level)
        write(weight, f"invvar-{band}", compression_type=kind, **level)
    bits = (rng.random(sky.shape) < 0.02).astype(np.int32) << 6
    write(bits, "maskbits", compression_type="HCOMPRESS_1" if kind == "RICE_1" else kind)
    x, y = (sky.shape[1] - 1) / 2, (sky.shape[0] - 1) / 2
    ((ra, dec),) = sky.wcs.all_pix2world([(x, y)], 0)
    Table({"id": ["s"], "ra": [ra], "dec": [dec], "shape_r": [1.0]}).write(folder / "sources.csv")


def write_gzip_brick(folder: Path, name: str, rng: np.random.Generator, sums: bool) -> None:
    write_brick(folder, name, rng, sums, str(rng.choice(["GZIP_1", "GZIP_2"])))


def write_hsc(folder: Path, name: str, rng: np.random.Generator, sums: bool) -> None:
    sky = Sky.draw(rng, 48, 90, (0.168, 0.168))
    for band in "GRI":
        bits = (rng.random(sky.shape) < 0.02).astype(np.int32) << 8
        planes = fits.Header({"MP_BAD": 0, "MP_SAT": 1, "HIERARCH MP_NO_DATA": 8, "HIERARCH MP_BRIGHT_OBJECT": 9})
        hdus = fits.HDUList(
            [
                fits.PrimaryHDU(header=fits.Header({"FLUXMAG0": 63095734448.0194, "FILTER": f"HSC-{band}"})),
                fits.ImageHDU(sky.image(rng, 5), sky.header(), name="IMAGE"),
                fits.ImageHDU(bits, sky.header() + planes, name="MASK"),
                fits.ImageHDU(np.full(sky.shape, 0.01, np.float32), sky.header(), name="VARIANCE"),
            ]
        )
        hdus.writeto(folder / f"{name}_HSC-{band}.fits", checksum=sums)


def write_sdss(folder: Path, name: str, rng: np.random.Generator, sums: bool) -> None:
    sky = Sky.draw(rng, 48, 90, (0.3, 0.5))
    for band in "gri":
        hdu = fits.PrimaryHDU(sky.image(rng, 1), sky.header(BUNIT="nanomaggy", ORIGIN="SDSS", FILTER=band))
        packed(folder, hdu, f"{name}_{band}.fits.bz2", sums)


def write_gzipped_cube(folder: Path, name: str, rng: np.random.Generator, sums: bool) -> None:
    write_cube(folder, name, rng, sums)
    plain = folder / f"{name}.fits"
    (folder / f"{name}.fits.gz").write_bytes(gzip.compress(plain.read_bytes(), 1))
    plain.unlink()


def packed(folder: Path, hdu: Any, name: str, sums: bool) -> None:
    plain = folder / "plain"
    hdu.writeto(plain, checksum=sums)
    (folder / name).write_bytes(bz2.compress(plain.read_bytes()))
    plain.unlink()


FORMS: dict[str, Callable[[Path, str, np.random.Generator, bool], None]] = {
    "Legacy cube": write_cube,
    "Legacy subimage, invvar": write_subimage,
    "Legacy brick, Rice and HCOMPRESS": write_brick,
    "Legacy brick, GZIP tiles": write_gzip_brick,
    "HSC cutout": write_hsc,
    "SDSS cutout, .bz2": write_sdss,
    "Legacy cube, .gz": write_gzipped_cube,
}
TILES = ("Legacy brick, Rice and HCOMPRESS", "Legacy brick, GZIP tiles")
