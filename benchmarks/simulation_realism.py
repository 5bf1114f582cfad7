"""How close simulated galaxies come to real ones: pictures, histograms and numbers for docs/simulation.md.

Run as ``python benchmarks/simulation_realism.py --data ../shared/data --out docs/images``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pyarrow.parquet as pq
from astropy.io import fits
from astropy.table import Table
from numpy.typing import NDArray
from photutils.segmentation import SourceCatalog, detect_sources
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.stats import ks_2samp

from galembed.mappings import LEGACY_DR2
from galembed.photometry import NJY_PER_NANOMAGGY
from training.simulation import SurveyFiles, simulate_survey

mpl.use("Agg")
import matplotlib.pyplot as plt

TILE = 80
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


def viewer_rgb(cube: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return the viewer's dr2_rgb picture of a grz cube in nanomaggies, north up."""
    channels = LEGACY_DR2.channels(cube * NJY_PER_NANOMAGGY)
    return (channels.transpose(1, 2, 0) * 255).astype(np.uint8)[::-1]


def tile(cube: NDArray[np.float32], arcsec_per_pixel: float, field_arcsec: float) -> Image.Image:
    """Cut the central field out of a cube and draw it at the mosaic's tile size."""
    half = int(min(field_arcsec / arcsec_per_pixel, cube.shape[-1]) / 2)
    centre = cube.shape[-1] // 2
    cut = cube[:, centre - half : centre + half, centre - half : centre + half]
    return Image.fromarray(viewer_rgb(cut)).resize((TILE, TILE), Image.Resampling.LANCZOS)


def real_cubes(data: Path) -> Iterator[tuple[str, NDArray[np.float32], float]]:
    """Yield name, cube and pixel scale in arcsec of the real grz cutouts that are whole and not repeated."""
    for name in ("example_a", "example_b", "example_d", "variable_size_162px"):
        with fits.open(data / "fits" / "decals_grz_cubes" / f"{name}.fits") as hdus:
            yield name, np.asarray(hdus[0].data, np.float32), abs(hdus[0].header["CD1_1"]) * 3600


def gallery(files: SurveyFiles, truth: list[dict[str, Any]], out: Path, columns: int = 7) -> None:
    """Draw one row of simulated cutouts per kind, taken in catalogue order."""
    votes = {row["id_str"]: row["file_loc"] for row in pq.read_table(files.votes).to_pylist()}
    sheet = Image.new("RGB", (columns * TILE, len(KINDS) * TILE))
    for j, kind in enumerate(KINDS):
        rows = [row for row in truth if row["kind"] == kind and row["mag_r"] < 18][:columns]
        for i, row in enumerate(rows):
            cube = fits.getdata(files.root / votes[row["id_str"]])
            sheet.paste(tile(cube, 0.262, 84), (i * TILE, j * TILE))
    _save(sheet, out)


def side_by_side(files: SurveyFiles, truth: list[dict[str, Any]], data: Path, out: Path) -> None:
    """Draw real cutouts (left column) beside simulated ones of the nearest magnitude and size."""
    votes = {row["id_str"]: row["file_loc"] for row in pq.read_table(files.votes).to_pylist()}
    # Only the MIT-licensed ones may be shown; the small cutout's repository is under the GPL.
    cubes = [entry for entry in real_cubes(data) if entry[0].startswith("example")]
    sheet = Image.new("RGB", (8 * TILE, len(cubes) * TILE), (255, 255, 255))
    spirals = [r for r in truth if r["kind"] in ("spiral", "barred_spiral", "disk", "disk_edge_on", "ring")]
    for j, (_, cube, scale) in enumerate(cubes):
        field = cube.shape[-1] * scale
        mag, radius = real_photometry(cube, scale)[0], real_photometry(cube, scale)[3]
        nearest = sorted(
            spirals, key=lambda r: abs(r["mag_r"] - mag) + 4 * abs(np.log10(r["half_light_arcsec"] / radius))
        )
        sheet.paste(tile(cube, scale, field), (0, j * TILE))
        for i, row in enumerate(nearest[:7]):
            simulated = fits.getdata(files.root / votes[row["id_str"]])
            sheet.paste(tile(simulated, 0.262, field), ((i + 1) * TILE, j * TILE))
    for j in range(sheet.height):
        for i in range(TILE - 2, TILE + 1):
            sheet.putpixel((i, j), (255, 255, 255))
    _save(sheet, out)


def _save(sheet: Image.Image, out: Path) -> None:
    sheet.quantize(256, method=Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE).save(out, optimize=True)


def real_photometry(cube: NDArray[np.float32], scale: float) -> tuple[float, float, float, float]:
    """Return r, g-r, r-z and half-light radius (arcsec) of the central object by a curve of growth to 40% of
    the side.

    Fluxes of resampled cutouts are per original pixel, so they are scaled by the area of a pixel.
    """
    n = cube.shape[-1]
    rows, columns = np.indices((n, n)) - (n - 1) / 2
    r = np.hypot(rows, columns) * scale
    sky = np.array([np.median(b[r > 0.48 * n * scale]) for b in cube])
    flux = (cube - sky[:, None, None]) * (scale / 0.262) ** 2
    inside = r < 0.30 * n * scale
    g, red, z = flux[:, inside].sum(axis=1)
    order = np.argsort(r[inside])
    growth = np.cumsum(flux[1][inside][order])
    half = float(np.interp(0.5 * red, np.maximum.accumulate(growth), r[inside][order]))
    return 22.5 - 2.5 * np.log10(red), 2.5 * np.log10(red / g), 2.5 * np.log10(z / red), half


def noise(cube: NDArray[np.float32]) -> list[tuple[float, float]]:
    """Return per band the noise of the corners and the correlation of neighbouring pixels there."""
    n = cube.shape[-1] // 7
    found = []
    for band in cube:
        corners = [band[a, b] for a in (slice(0, n), slice(-n, None)) for b in (slice(0, n), slice(-n, None))]
        sigmas = [1.4826 * np.median(np.abs(c - np.median(c))) for c in corners]
        quiet = corners[int(np.argmin(sigmas))]
        clipped = np.clip(quiet - np.median(quiet), -4 * min(sigmas), 4 * min(sigmas))
        correlation = float((clipped[:, 1:] * clipped[:, :-1]).mean() / clipped.var())
        found.append((float(np.median(sigmas)), correlation))
    return found


def compare(real: NDArray[np.float64], simulated: NDArray[np.float64]) -> dict[str, Any]:
    """Return 16, 50, 84 percentiles of both samples and the Kolmogorov-Smirnov distance."""
    real, simulated = real[np.isfinite(real)], simulated[np.isfinite(simulated)]
    return {
        "real": [round(float(v), 3) for v in np.percentile(real, [16, 50, 84])],
        "simulated": [round(float(v), 3) for v in np.percentile(simulated, [16, 50, 84])],
        "ks": round(float(ks_2samp(real, simulated).statistic), 3),
        "n": [len(real), len(simulated)],
    }


def size_samples(data: Path, truth: list[dict[str, Any]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return half-light radii of NSA galaxies and of simulated ones, circularised, at 0.017 < z < 0.07."""
    nsa = Table.read(data / "fits" / "catalogues" / "gordon_nsa_joint.fits", 1)
    real = np.asarray(nsa["petroth50"], float)
    simulated = np.array(
        [
            r["half_light_arcsec"] * np.sqrt(r["axis_ratio"])
            for r in truth
            if 0.017 < r["redshift"] < 0.07 and r["mag_r"] < 17.77
        ]
    )
    return real, simulated


def vote_fractions(
    files: SurveyFiles, data: Path, truth: list[dict[str, Any]]
) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Return vote fractions in GZ2 Stripe 82 and in the simulation at r < 17.8, where ten were asked."""
    gz2 = pq.read_table(data / "votes" / "gz2_stripe82_coadd_votes_open.parquet")
    ours = pq.read_table(files.votes).to_pylist()
    kept = [v for v, t in zip(ours, truth, strict=True) if t["mag_r"] < 17.8]
    pairs = {
        "smooth": (
            [
                "t01_smooth_or_features_a01_smooth",
                "t01_smooth_or_features_a02_features_or_disk",
                "t01_smooth_or_features_a03_star_or_artifact",
            ],
            [
                "smooth-or-featured-dr5_smooth",
                "smooth-or-featured-dr5_featured-or-disk",
                "smooth-or-featured-dr5_artifact",
            ],
        ),
        "edge-on": (
            ["t02_edgeon_a04_yes", "t02_edgeon_a05_no"],
            ["disk-edge-on-dr5_yes", "disk-edge-on-dr5_no"],
        ),
        "bar": (["t03_bar_a07_no_bar", "t03_bar_a06_bar"], ["bar-dr5_no", "bar-dr5_strong", "bar-dr5_weak"]),
        "spiral arms": (
            ["t04_spiral_a08_spiral", "t04_spiral_a09_no_spiral"],
            ["has-spiral-arms-dr5_yes", "has-spiral-arms-dr5_no"],
        ),
    }
    found = {}
    for name, (theirs, mine) in pairs.items():
        counts = np.stack([gz2[f"{c}_count"].to_numpy().astype(float) for c in theirs], axis=1)
        own = np.array([[v[c] for c in mine] for v in kept], float)
        real, simulated = (c[c.sum(axis=1) >= 10, 0] / c[c.sum(axis=1) >= 10].sum(axis=1) for c in (counts, own))
        found[name] = (1 - real, 1 - simulated) if name == "bar" else (real, simulated)
    return found


def tractor_colours(data: Path) -> NDArray[np.float64]:
    """Return r, g-r, r-z of the extended sources among the Tractor and sweep rows, r < 21; shape (n, 3)."""
    rows = []
    for path in sorted((data / "fits" / "catalogues").glob("*.fits")):
        if not path.name.startswith(("tractor", "sweep")):
            continue
        with fits.open(path) as hdus:
            table = hdus[1].data
            extended = [str(t).strip() != "PSF" for t in table["TYPE"]]
            rows.extend(np.stack([table[f"FLUX_{b}"][extended] for b in "GRZ"], axis=1))
    g, r, z = np.array(rows, float).T
    colours = np.stack([22.5 - 2.5 * np.log10(r), 2.5 * np.log10(r / g), 2.5 * np.log10(z / r)], axis=1)
    return colours[colours[:, 0] < 21]


def detections(image: NDArray[np.float32], weight: NDArray[np.float32]) -> NDArray[np.float64]:
    """Detect sources on a g brick; return magnitude, area's radius (arcsec) and mean surface brightness, one row each.

    At least 12 connected pixels above 3 sigma after a 2 px Gaussian; isophotal fluxes, stars included.
    """
    has_data = weight > 0
    sigma = np.where(has_data, 1 / np.sqrt(np.where(has_data, weight, 1)), np.inf)
    smooth = gaussian_filter(np.where(has_data, image, 0), 2)
    found = detect_sources(smooth, 3 * sigma * 0.4, n_pixels=12)  # 0.4: what smoothing leaves of correlated noise
    catalogue = SourceCatalog(image, found)
    area = np.asarray(catalogue.area.value) * 0.262**2
    magnitude = 22.5 - 2.5 * np.log10(np.maximum(np.asarray(catalogue.segment_flux), 1e-3))
    rows = np.stack([magnitude, np.sqrt(area / np.pi), magnitude + 2.5 * np.log10(area)], axis=1)
    return rows[magnitude < 22]


def detected(files: SurveyFiles, data: Path) -> tuple[NDArray[np.float64], NDArray[np.float64], dict[str, float]]:
    """Return `detections` on the real DR6 brick and on the simulated one, and their numbers per square arcmin."""
    folder, brick = data / "fits" / "legacysurvey_dr6_brick", files.brick_names[0]
    real, simulated = folder / "legacysurvey-0959p805", files.coadd / brick[:3] / brick / f"legacysurvey-{brick}"
    tables, density = [], {}
    for name, stem in (("real", real), ("simulated", simulated)):
        image, weight = (fits.getdata(f"{stem}-{plane}-g.fits.fz") for plane in ("image", "invvar"))
        tables.append(detections(image, weight))
        density[name] = round(len(tables[-1]) / (np.count_nonzero(weight > 0) * 0.262**2 / 3600), 2)
    return tables[0], tables[1], density


def histograms(panels: list[tuple[str, Any, Any]], out: Path) -> None:
    """Draw one panel per quantity, real as filled steps and simulated as a line."""
    figure, axes = plt.subplots(2, (len(panels) + 1) // 2, figsize=(13, 6), layout="constrained")
    for axis, (label, real, simulated) in zip(axes.flat, panels, strict=False):
        both = np.concatenate([real, simulated])
        bins = np.linspace(*np.nanpercentile(both, [0.5, 99.5]), 25)
        axis.hist(real, bins, density=True, color="0.75", label=f"real ({len(real)})")
        axis.hist(
            simulated,
            bins,
            density=True,
            histtype="step",
            color="C3",
            lw=1.6,
            label=f"simulated ({len(simulated)})",
        )
        axis.set_xlabel(label)
        axis.set_yticks([])
        axis.legend(fontsize=7)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    figure.savefig(out, dpi=80)
    plt.close(figure)


def main() -> None:
    """Simulate, draw the pictures, and print the numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--objects", type=int, default=3000)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        files = simulate_survey(
            Path(folder) / "s",
            bricks=1,
            brick_size=2000,
            sources_per_brick=150,
            cutouts=arguments.objects,
            seed=11,
            workers=arguments.workers,
        )
        print(json.dumps(report(files, arguments.data, arguments.out), indent=1))


def report(files: SurveyFiles, data: Path, out: Path) -> dict[str, Any]:
    """Draw all pictures and return all numbers."""
    everything = pq.read_table(files.truth).to_pylist()
    truth = everything[files.n_sources :]
    galaxies = [r for r in truth if r["kind"] not in ("star", "artefact")]
    gallery(files, truth, out / "simulation_gallery.png")
    side_by_side(files, truth, data, out / "simulation_beside_real.png")
    table = Table.read(files.cutout_catalogue)
    is_galaxy = np.array([r["kind"] not in ("star", "artefact") for r in truth])
    g_r = np.asarray(table["MAG_G"] - table["MAG_R"], float)[is_galaxy]
    r_z = np.asarray(table["MAG_R"] - table["MAG_Z"], float)[is_galaxy]
    mag = np.asarray(table["MAG_R"], float)[is_galaxy]
    sizes = size_samples(data, galaxies)
    votes = vote_fractions(files, data, everything)
    tractor = tractor_colours(data)
    faint = mag > 17
    panels = [("R50, z < 0.07 [arcsec]", *sizes)]
    panels += [(f"fraction: {name}", *pair) for name, pair in votes.items()]
    panels += [("g - r", tractor[:, 1], g_r[faint]), ("r - z", tractor[:, 2], r_z[faint])]
    real, simulated, density = detected(files, data)
    for column, label in enumerate(("g [mag]", "radius [arcsec]", "mean SB in g")):
        panels.append((f"brick: {label}", real[:, column], simulated[:, column]))
    histograms(panels, out / "simulation_histograms.png")
    numbers: dict[str, Any] = {label: compare(np.asarray(a), np.asarray(b)) for label, a, b in panels}
    numbers["surface brightness in r, simulated [mag/arcsec^2]"] = [
        round(float(v), 2)
        for v in np.percentile(
            [r["mag_r"] + 2.5 * np.log10(2 * np.pi * r["half_light_arcsec"] ** 2 * r["axis_ratio"]) for r in galaxies],
            [16, 50, 84],
        )
    ]
    numbers["detected on a brick with g < 22, per square arcmin"] = density
    numbers["real cutouts: r, g-r, r-z, R50"] = {
        name: [round(float(v), 2) for v in real_photometry(cube, scale)] for name, cube, scale in real_cubes(data)
    }
    numbers["noise per pixel and neighbour correlation, g r z"] = _noise_numbers(files, data)
    return numbers


def _noise_numbers(files: SurveyFiles, data: Path) -> dict[str, Any]:
    numbers: dict[str, Any] = {}
    for name in ("small_225px", "variable_size_162px"):
        cube = np.asarray(fits.getdata(data / "fits" / "decals_grz_cubes" / f"{name}.fits"), np.float32)
        numbers[name] = [[round(v, 4) for v in pair] for pair in noise(cube)]
    ours = [noise(fits.getdata(path)) for path in sorted(files.cutouts.iterdir())[:300]]
    numbers["simulated, median"] = [[round(float(v), 4) for v in pair] for pair in np.median(ours, axis=0)]
    return numbers


if __name__ == "__main__":
    main()
