"""How fast are cutouts cut from Legacy-like bricks?

    python benchmarks/cutouts.py --cache /tmp/galembed-cutouts

Makes two bricks of 3600 x 3600 pixels as the Legacy Surveys write them (image and inverse variance in g, r, z) with
catalogues of 500 and 5,000 sources a brick, and cuts 160 px squares in three bands at the native scale, from the page
cache, each time in a fresh process on one thread:

- ours: `open_source`, `sources`, `cutouts`; positions to a fraction of a pixel, pixels without weight masked;
- astrocut: `FITSCutout`, one call a source, to the nearest pixel, images only;
- Cutana: its orchestrator with one worker, Zarr, no stretch, images only;
- the floor: every plane decompressed once by astropy, and a linear shift of each square in plain numpy; with the
  inverse variance, which ours needs for its mask, and without, which is what the other two read.

The methods take turns, and ratios are taken within a round. Imports and the making of files are not timed. Then: from
how many sources a brick on is it cheaper to decompress a plane whole than to read sections of it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import venv
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.table import Table, vstack
from astropy.wcs import WCS

SIDE = 160
PIXEL_ARCSEC = 0.262
NPIX = 3600
BANDS = ("g", "r", "z")
BRICKS = {"1501p020": 150.125, "1503p020": 150.375}
DEC = 2.0
NOISE = {"g": 0.004, "r": 0.008, "z": 0.02}  # nanomaggy a pixel: DR9's 5-sigma depths of about 24.7, 23.9, 23.0
COLOUR = {"g": 0.5, "r": 1.0, "z": 1.8}
ASTROCUT_SOURCES = 60  # a brick; it starts anew for each, so its rate does not depend on their number
ALONE = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


# --- the survey ---


def brick_header(brick: str) -> fits.Header:
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = "RA---TAN", "DEC--TAN"
    wcs.wcs.crval = BRICKS[brick], DEC
    wcs.wcs.crpix = (NPIX + 1) / 2, (NPIX + 1) / 2
    wcs.wcs.cd = np.diag([-1, 1]) * PIXEL_ARCSEC / 3600
    header = wcs.to_header()
    for axis in (1, 2):  # the surveys write CD, astropy PC
        del header[f"CDELT{axis}"]
        header[f"CD{axis}_{axis}"] = wcs.wcs.cd[axis - 1, axis - 1]
    for name in ("PC1_1", "PC2_2"):
        header.remove(name, ignore_missing=True)
    header["BRICK"], header["MAGZERO"] = brick, 22.5
    return header


def galaxies(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Exponential disks with faint ones the commonest, in r-band nanomaggy."""
    plane = np.zeros((NPIX, NPIX), np.float32)
    across = np.arange(-30, 31)
    for at_x, at_y in zip(x, y, strict=True):
        scale, axis, turn = np.exp(rng.normal(1.0, 0.4)), rng.uniform(0.3, 1), rng.uniform(0, np.pi)
        total = 10 ** rng.uniform(-0.2, 1.6)
        x0, y0 = int(at_x), int(at_y)
        box = slice(max(y0 - 30, 0), y0 + 31), slice(max(x0 - 30, 0), x0 + 31)
        dy, dx = np.meshgrid(across + y0 - at_y, across + x0 - at_x, indexing="ij")
        along, aside = dx * np.cos(turn) + dy * np.sin(turn), (dy * np.cos(turn) - dx * np.sin(turn)) / axis
        disk = np.exp(-np.sqrt(along**2 + aside**2 + 2) / scale)
        disk *= total / disk.sum()
        plane[box] += disk[
            max(30 - y0, 0) : max(30 - y0, 0) + plane[box].shape[0],
            max(30 - x0, 0) : max(30 - x0, 0) + plane[box].shape[1],
        ]
    return plane


def inverse_variance(rng: np.random.Generator, sky: np.ndarray, noise: float) -> np.ndarray:
    """Four exposures with gaps, bad columns, cosmic rays and flat-field noise; sources add their photons."""
    total = np.zeros((NPIX, NPIX), np.float32)
    for _ in range(4):
        weight = rng.normal(1, 0.03, (NPIX, NPIX)).astype(np.float32) * rng.uniform(0.7, 1.3)
        edge = rng.integers(0, NPIX)
        weight[:, edge : edge + 60] = 0
        weight[:, rng.integers(0, NPIX, 5)] = 0
        weight[rng.random((NPIX, NPIX), dtype=np.float32) < 5e-4] = 0
        total += weight
    total[sky > 2.5] = 0  # saturated: a quarter of the squares hold some
    return np.where(total > 0, 1 / (4 * noise**2 / np.maximum(total, 1e-6) + sky * noise / 30), 0)


def write_plane(path: Path, plane: np.ndarray, header: fits.Header, unit: str, **quantise: float) -> None:
    hdu = fits.CompImageHDU(
        plane.astype(np.float32), header, compression_type="RICE_1", tile_shape=(100, 100), **quantise
    )
    hdu.header["BUNIT"] = unit
    fits.HDUList([fits.PrimaryHDU(), hdu]).writeto(path)


def make_survey(root: Path) -> None:
    """Write bricks and catalogues; seeded, so that every machine has the same."""
    tables: dict[int, list[Table]] = {500: [], 5000: []}
    for number, brick in enumerate(BRICKS):
        rng = np.random.default_rng(number)
        header = brick_header(brick)
        x, y = rng.uniform(83, NPIX - 84, (2, 5000))  # what a brick owns of the sky
        ra, dec = WCS(header).all_pix2world(x, y, 0)
        for count, parts in tables.items():
            ids = [f"{brick}-{i}" for i in range(count)]
            parts.append(Table({"source_id": ids, "ra": ra[:count], "dec": dec[:count], "shape_r": np.ones(count)}))
        disks = galaxies(rng, x, y)
        folder = root / "south" / "coadd" / brick[:3] / brick
        folder.mkdir(parents=True)
        for band in BANDS:
            sky = disks * COLOUR[band]
            invvar = inverse_variance(rng, sky, NOISE[band])
            image = np.where(invvar > 0, sky + rng.normal(size=sky.shape) / np.sqrt(np.where(invvar > 0, invvar, 1)), 0)
            name = f"legacysurvey-{brick}-{{}}-{band}.fits.fz"
            write_plane(
                folder / name.format("image"),
                image,
                header,
                "nanomaggy",
                quantize_level=-1e-4,
                quantize_method=2,
                dither_seed=-1,
            )
            write_plane(
                folder / name.format("invvar"),
                invvar,
                header,
                "1/nanomaggy^2",
                quantize_level=16,
                quantize_method=-1,
            )
    for count, parts in tables.items():
        vstack(parts).write(root / f"sources-{count}.fits")


def planes(root: Path, brick: str, kind: str) -> list[Path]:
    folder = root / "south" / "coadd" / brick[:3] / brick
    return [folder / f"legacysurvey-{brick}-{kind}-{band}.fits.fz" for band in BANDS]


def sources(root: Path, count: int) -> dict[str, np.ndarray]:
    """Positions (2, n) in deg, by brick."""
    table = Table.read(root / f"sources-{count}.fits")
    names = np.char.partition(np.asarray(table["source_id"], str), "-")[:, 0]
    return {brick: np.array([table["ra"], table["dec"]])[:, names == brick] for brick in BRICKS}


# --- the methods: each returns how many squares it cut ---


def cut_ours(root: Path, count: int, _: Path) -> Callable[[], int]:
    from galembed.backbones import FieldOfView, InputContract
    from galembed.errors import GalembedError
    from galembed.mappings import LEGACY_DR2
    from galembed.sources import open_source

    side = SIDE * PIXEL_ARCSEC
    contract = InputContract(SIDE, FieldOfView(0.0, side, side), LEGACY_DR2)

    open_source(root, catalogue=root / "sources-500.fits").sources()  # what is imported on first use

    def run() -> int:
        reader = open_source(root, catalogue=root / f"sources-{count}.fits")
        done = 0
        for _, cutout in reader.cutouts(reader.sources().table, contract):
            if isinstance(cutout, GalembedError):
                raise cutout
            assert cutout.pixels.shape == (3, SIDE, SIDE)
            done += 1
        return done

    return run


def cut_floor(root: Path, count: int, _: Path, kinds: tuple[str, ...] = ("image", "invvar")) -> Callable[[], int]:
    sources(root, 500)

    def run() -> int:
        done = 0
        for brick, positions in sources(root, count).items():
            paths = planes(root, brick, "image")
            x, y = WCS(fits.getheader(paths[0], 1)).all_world2pix(*positions, 0)
            for kind in kinds[1:]:
                for path in planes(root, brick, kind):
                    fits.getdata(path)
            images = [fits.getdata(path) for path in paths]
            for left, bottom in zip(x - (SIDE - 1) / 2, y - (SIDE - 1) / 2, strict=True):
                x0, y0 = int(left), int(bottom)
                right, up = np.float32(left - x0), np.float32(bottom - y0)
                square = np.empty((3, SIDE, SIDE), np.float32)
                for out, image in zip(square, images, strict=True):
                    box = image[y0 : y0 + SIDE + 1, x0 : x0 + SIDE + 1]
                    rows = box[:-1] * (1 - up) + box[1:] * up
                    out[...] = rows[:, :-1] * (1 - right) + rows[:, 1:] * right
                done += 1
        return done

    return run


def cut_floor_images(root: Path, count: int, cache: Path) -> Callable[[], int]:
    return cut_floor(root, count, cache, ("image",))


def cut_astrocut(root: Path, _count: int, _cache: Path) -> Callable[[], int]:
    from astrocut import FITSCutout

    def run() -> int:
        done = 0
        for brick, positions in sources(root, 500).items():
            files = [str(path) for path in planes(root, brick, "image")]
            for ra, dec in positions.T[:ASTROCUT_SOURCES]:
                cutout = FITSCutout(files, SkyCoord(ra, dec, unit="deg"), (SIDE, SIDE), single_outfile=True)
                square = np.stack([hdu.data for hdu in cutout.fits_cutouts[0][1:]])
                assert square.shape == (3, SIDE, SIDE)
                done += 1
        return done

    return run


def cut_cutana(root: Path, count: int, cache: Path) -> Callable[[], int]:
    from cutana import Orchestrator, get_default_config

    columns: dict[str, list[object]] = {
        name: [] for name in ("SourceID", "RA", "Dec", "diameter_pixel", "fits_file_paths")
    }
    for brick, positions in sources(root, count).items():
        files = str([str(path) for path in planes(root, brick, "image")])
        for number, (ra, dec) in enumerate(positions.T):
            for column, value in zip(columns.values(), (f"{brick}-{number}", ra, dec, SIDE, files), strict=True):
                column.append(value)
    catalogue = cache / "cutana.csv"
    Table(columns).write(catalogue, format="ascii.csv", overwrite=True)
    config = get_default_config()
    config.source_catalogue, config.output_dir = str(catalogue), str(cache / "cutana")
    shutil.rmtree(config.output_dir, ignore_errors=True)
    config.output_format, config.data_type, config.target_resolution = "zarr", "float32", SIDE
    config.max_workers, config.apply_flux_conversion, config.normalisation_method = 1, False, "none"
    config.fits_extensions = ["COMPRESSED_IMAGE"]
    config.selected_extensions = [{"name": band, "ext": "CompImageHDU"} for band in BANDS]
    config.channel_weights = {band: [float(band == other) for other in BANDS] for band in BANDS}
    config.console_log_level = "ERROR"

    def run() -> int:
        import zarr

        result = Orchestrator(config).run()
        if result.get("status") != "completed":
            raise RuntimeError(f"Cutana ended with {result}")
        return sum(zarr.open(path, mode="r")["images"].shape[0] for path in Path(config.output_dir).rglob("*.zarr"))

    return run


METHODS = {
    "ours": cut_ours,
    "floor": cut_floor,
    "floor, images only": cut_floor_images,
    "astrocut": cut_astrocut,
    "Cutana": cut_cutana,
}
RIVALS = ("astrocut", "Cutana")


# --- measuring ---


def resident_mib(pid: int) -> float:
    """Resident memory of a process and all below it."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        below = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except (OSError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20 + sum(map(resident_mib, below))


def run_here(method: str, root: Path, count: int, cache: Path) -> dict[str, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = METHODS[method](root, count, cache)
        before = resident_mib(os.getpid())
        started = time.perf_counter()
        done = run()
        return {"seconds": time.perf_counter() - started, "cutouts": done, "before_mib": before}


def run_alone(python: str, method: str, root: Path, count: int, cache: Path) -> dict[str, float]:
    """Run a method in a fresh process; its peak memory is sampled every 20 ms, children included."""
    command = [python, __file__, "--cache", str(cache), "--run", method, "--sources", str(count)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ | ALONE
    ) as child:
        peak = 0.0
        while child.poll() is None:
            peak = max(peak, resident_mib(child.pid))
            time.sleep(0.02)
        output = child.stdout.read() if child.stdout else ""
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)} failed")
    return json.loads(output.splitlines()[-1]) | {"peak_mib": peak}


def rivals_python(cache: Path) -> str:
    home = cache / "rivals"
    python = home / "bin" / "python"
    if not python.exists():
        venv.create(home, with_pip=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", "astrocut", "cutana"], check=True)
    return str(python)


def versions(python: str, names: tuple[str, ...]) -> str:
    code = f"from importlib.metadata import version; print(*[f'{{n}} {{version(n)}}' for n in {names!r}], sep=', ')"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def spread(values: list[float], digits: int = 0) -> str:
    return f"{np.median(values):,.{digits}f} [{min(values):,.{digits}f}-{max(values):,.{digits}f}]"


def take_turns(
    root: Path, cache: Path, rounds: int, counts: tuple[int, ...]
) -> dict[tuple[int, str], list[dict[str, float]]]:
    """Return what each method took in each round, by sources a brick."""
    rivals = rivals_python(cache)
    taken: dict[tuple[int, str], list[dict[str, float]]] = {}
    for number in range(rounds):
        for count in counts:
            for method in METHODS:
                python = rivals if method in RIVALS else sys.executable
                result = run_alone(python, method, root, count, cache)
                taken.setdefault((count, method), []).append(result)
                rate = result["cutouts"] / result["seconds"]
                print(f"round {number + 1}, {count} a brick, {method}: {rate:.0f}/s", file=sys.stderr, flush=True)
    return taken


def table(taken: dict[tuple[int, str], list[dict[str, float]]]) -> str:
    lines = [
        "| sources a brick | method | cutouts/s | seconds | peak RSS, MiB (of which imports) | ours is faster by |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for (count, method), results in taken.items():
        rates = [result["cutouts"] / result["seconds"] for result in results]
        ours = [result["cutouts"] / result["seconds"] for result in taken[count, "ours"]]
        peak, before = (np.median([result[name] for result in results]) for name in ("peak_mib", "before_mib"))
        ratio = "" if method == "ours" else spread([a / b for a, b in zip(ours, rates, strict=True)], 2)
        seconds = spread([result["seconds"] for result in results], 2)
        lines.append(f"| {count:,} | {method} | {spread(rates)} | {seconds} | {peak:,.0f} ({before:,.0f}) | {ratio} |")
    return "\n".join(lines)


def marginal(taken: dict[tuple[int, str], list[dict[str, float]]], method: str) -> str:
    """Rate between the smaller and the larger catalogue: what is left once fixed costs are paid."""
    few, many = sorted({count for count, _ in taken})
    rates = [
        (b["cutouts"] - a["cutouts"]) / (b["seconds"] - a["seconds"])
        for a, b in zip(taken[few, method], taken[many, method], strict=True)
    ]
    return f"{method}: {spread(rates)} cutouts/s beyond the first {few:,} a brick"


def break_even(root: Path) -> str:
    """Seconds to decompress a plane whole and by section, and the number of sources at which they are equal."""
    rng = np.random.default_rng(0)
    lines = []
    for side in (SIDE + 2, 300):
        whole, section = 0.0, 0.0
        for kind in ("image", "invvar"):
            path = planes(root, next(iter(BRICKS)), kind)[0]
            full, parts = [], []
            for _ in range(5):
                with fits.open(path) as file:
                    started = time.perf_counter()
                    _ = file[1].data
                    full.append(time.perf_counter() - started)
                with fits.open(path) as file:
                    corners = rng.integers(0, NPIX - side, (50, 2))
                    started = time.perf_counter()
                    for x, y in corners:
                        _ = file[1].section[y : y + side, x : x + side]
                    parts.append((time.perf_counter() - started) / len(corners))
            whole, section = whole + np.median(full), section + np.median(parts)
        lines.append(
            f"image + invvar of a band: whole {whole * 1e3:.0f} ms, a section of {side} px {section * 1e3:.2f} ms: "
            f"whole is cheaper from {whole / section:.0f} sources on"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "galembed-benchmarks" / "cutouts")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--run", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--sources", type=int, default=500, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    cache, root = arguments.cache.resolve(), arguments.cache.resolve() / "survey"
    if arguments.run:
        print(json.dumps(run_here(arguments.run, root, arguments.sources, cache)))
        return
    if not (root / "complete").exists():
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        make_survey(root)
        (root / "complete").touch()
    size = sum(len(path.read_bytes()) for path in root.rglob("*.fz"))  # and so into the page cache
    print(f"{len(BRICKS)} bricks, {size / len(BRICKS) / 2**20:.0f} MiB each; {os.cpu_count()} cores")
    taken = take_turns(root, cache, arguments.rounds, (500, 5000))
    print(
        versions(sys.executable, ("astropy", "numpy"))
        + "; "
        + versions(rivals_python(cache), ("astrocut", "cutana", "astropy"))
    )
    print(table(taken))
    print(marginal(taken, "Cutana"))
    print(break_even(root))


if __name__ == "__main__":
    main()
