"""How fast do FITS cutouts become stored vectors, in how much memory, beside what else there is?

    python benchmarks/end_to_end.py --work /tmp/end-to-end --hyrax-python HYRAX_VENV/bin/python \\
        --zoobot-python ZOOBOT_VENV/bin/python --out end-to-end.md

Everybody puts 1,000 simulated galaxies of 256 px in three bands through timm's `convnext_nano` at 224 px in float32,
with the same random weights (seed 0), on the processor:

- galembed: `galembed embed` with its defaults, from FITS cubes to a store, by its ONNX engine; with --int8 also by an
  int8 one, whose fidelity is not judged, since random weights have none to lose;
- Hyrax: `engine` (ONNX) and `infer` (torch), from FITS files of a band each to its Lance table, with its own batch of
  512 and with a small one, and two workers where it has any;
- Zoobot: `predict_on_catalog.predict` with two lines of repair, from JPEG to CSV, with its defaults and with a batch of
  32 and two workers;
- the script: a torch DataLoader with two workers over the same cubes, batches of 64, to a .npy file;
- the engine alone, on arrays in memory, in as many processes as cores and in ours' batches: the ceiling.

Each run is a fresh process; the methods take turns, and ratios are taken within a round. Whole: images over the time
from the start of the process to its end. Steady: between the first and the last result, without the images of the
first; a result is a batch, of galembed a data file of its store. Its workers have two of these in hand, which end at
about the same time, so that the first are twice the workers. The ceiling has no whole. Memory is the most that the
process and all its children had at once, seen four times a second: shared pages counted in part (PSS), and in full
(RSS). Files are read from the page cache. Preprocessing is each tool's own: galembed calibrates, resizes and checks,
the script stretches and resizes, Hyrax stretches and crops, Zoobot resizes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lance
import numpy as np
from processes import GALEMBED, Watched, random_backbone, spread, table, watched
from processes import galembed as command

ARCHITECTURE = "convnext_nano"
SIZE = 224
SIDE = 256
RIVALS = Path(__file__).resolve().with_name("rivals")
OURS = "galembed embed, float32"
CEILING = "the engine alone, {}"


@dataclass(frozen=True)
class Method:
    """How to run one method, into a folder of its own."""

    name: str
    words: tuple[Any, ...]
    ours: bool = False


# --- what is read ---


def make_material(work: Path, count: int, architecture: str, size: int) -> None:
    """Simulate galaxies, write them in everybody's form, and make the backbone."""
    survey = work / "simulated"
    if not (survey / "cutouts.fits").exists():
        command("simulate", survey, "--bricks", 0, "--cutouts", count, "--seed", 0)
    if not (work / "pictures.csv").exists():
        write_forms(work, survey)
    random_backbone(work / "backbone", architecture, size, "9:8:120", survey)


def write_forms(work: Path, survey: Path) -> None:
    """Write each galaxy as a cube of `SIDE` pixels, as a file a band with a number for a name, and as a JPEG."""
    import csv

    from astropy.io import fits
    from PIL import Image

    from galembed.mappings import LEGACY_DR2

    for name in ("cubes", "bands", "pictures"):
        (work / name).mkdir(exist_ok=True)
    bands, pictures = [("object_id", "filter", "filename", "ra", "dec")], [("id_str", "file_loc")]
    for number, file in enumerate(sorted((survey / "cutouts").glob("*.fits"))):
        with fits.open(file) as opened:
            header, pixels = opened[0].header, of_side(opened[0].data.astype(np.float32))
        header["CRPIX1"] = header["CRPIX2"] = (SIDE + 1) / 2
        header["IMAGEW"] = header["IMAGEH"] = float(SIDE)
        fits.writeto(work / "cubes" / file.name, pixels, header, overwrite=True)
        single = header.copy()
        for card in ("NAXIS3", "BANDS", "BAND0", "BAND1", "BAND2"):
            single.remove(card, ignore_missing=True)
        for plane, band in zip(pixels, "grz", strict=True):
            name = f"{1_000_000 + number}_{band}.fits"
            fits.writeto(work / "bands" / name, plane, single, overwrite=True)
            bands.append((1_000_000 + number, band, name, header["CRVAL1"], header["CRVAL2"]))  # type: ignore[arg-type]
        nanojansky = pixels * 3631.0
        channels = np.moveaxis(LEGACY_DR2.channels(nanojansky)[:, ::-1], 0, -1)
        picture = work / "pictures" / f"{number}.jpg"
        Image.fromarray(np.round(channels * 255).astype(np.uint8)).save(picture, quality=90)
        pictures.append((str(number), str(picture)))
    for name, rows in (("bands.csv", bands), ("pictures.csv", pictures)):
        with (work / name).open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows(rows)


def of_side(pixels: np.ndarray) -> np.ndarray:
    """Return (band, y, x) pixels cropped, or filled up by reflection, to `SIDE` about their centre."""
    lacking = max(0, SIDE - pixels.shape[-1])
    before = lacking // 2
    filled = np.pad(pixels, ((0, 0), *2 * [(before, lacking - before)]), mode="symmetric")
    start = (filled.shape[-1] - SIDE) // 2
    return np.ascontiguousarray(filled[:, start : start + SIDE, start : start + SIDE])


def make_int8(work: Path) -> None:
    """Make an int8 engine of the random network, whatever it does to the vectors."""
    from export.engines import export_engines
    from export.trials import gather
    from galembed.backbones import load_backbone
    from galembed.fidelity import Tolerance
    from galembed.sources import open_source

    backbone = load_backbone(work / "backbone")
    if any(file.name.startswith("onnx-int8") for file in backbone.engines.iterdir()):
        return
    reader = open_source(work / "cubes", crop=1.0)
    with gather(backbone, reader, images=64, gallery=128, calibration=128, quiet=True) as evidence:
        anything = Tolerance(-1.0, 0.0, 1e9, 1e9, 1.0)
        export_engines(backbone, "int8", evidence, tolerance=anything, quiet=True)


# --- the methods ---


def methods(options: argparse.Namespace) -> list[Method]:
    precisions = ("fp32", "int8") if options.int8 else ("fp32",)
    spoken = {"fp32": "float32", "int8": "int8"}
    found = []
    for precision in precisions:
        embed = ("embed", options.work / "cubes", "--backbone", options.work / "backbone", "--crop", "1")
        words = (*GALEMBED, *embed, "--precision", precision, "--quiet", "--store", "OUT/store")
        found.append(Method(f"galembed embed, {spoken[precision]}", words, ours=True))
    common = ("--work", options.work, "--out", "OUT", "--architecture", options.architecture, "--size", options.size)
    if options.hyrax_python:
        hyrax = (options.hyrax_python, RIVALS / "hyrax_verbs.py")
        found += [
            Method("Hyrax engine, batch 32", (*hyrax, "engine", *common, "--batch", 32)),
            Method("Hyrax engine, its defaults", (*hyrax, "engine", *common)),
            Method("Hyrax infer, batch 64, 2 workers", (*hyrax, "infer", *common, "--batch", 64, "--workers", 2)),
            Method("Hyrax infer, its defaults", (*hyrax, "infer", *common)),
        ]
    if options.zoobot_python:
        zoobot = (options.zoobot_python, RIVALS / "zoobot_predict.py", *common)
        found += [
            Method("Zoobot, repaired, batch 32, 2 workers", (*zoobot, "--batch", 32, "--workers", 2)),
            Method("Zoobot, repaired, its defaults", zoobot),
        ]
    found.append(Method("the script", (options.script_python, RIVALS / "loader_script.py", *common)))
    for precision in precisions:
        words = ("--work", options.work, "--precision", precision)
        found.append(Method(CEILING.format(spoken[precision]), (sys.executable, RIVALS / "engine_alone.py", *words)))
    return found


def run(method: Method, out: Path, images: int) -> dict[str, Any]:
    """Run a method once; return its rates (images/s), seconds to the first result, and memory (MiB)."""
    out.mkdir(parents=True)
    done = watched([str(word).replace("OUT", str(out), 1) if "OUT" in str(word) else word for word in method.words])
    if done.code:
        raise SystemExit(f"{method.name} ended with {done.code}:\n{done.errors[-3000:]}")
    said = of_store(out / "store", done) if method.ours else json.loads(done.out.splitlines()[-1])
    alone = method.name.startswith("the engine alone")
    if not alone and said["images"] != images:
        raise SystemExit(f"{method.name} stored {said['images']} of {images} images")
    ends, first = said["ends"], said.get("first", 1)
    span = ends[-1][1] - ends[first - 1][1] if len(ends) > first else float("nan")
    found = {
        "whole": float("nan") if alone else images / done.seconds,
        "steady": sum(count for count, _ in ends[first:]) / span,
        "start": ends[0][1] - done.began,
        "first": ends[0][0],
        **done.peaks,
    }
    shutil.rmtree(out)
    return found | {"versions": said.get("versions", {})}


def of_store(store: Path, done: Watched) -> dict[str, Any]:
    """Return when each data file of a store was written, and its rows."""
    import galembed

    folder = store / "embeddings.lance" / "data"
    fragments = lance.dataset(str(store / "embeddings.lance")).get_fragments()
    ends = sorted(
        ((part.count_rows(), (folder / file.path).stat().st_mtime) for part in fragments for file in part.data_files()),
        key=lambda end: end[1],
    )
    workers = int(next(word for word in done.out.split(" images/s, ")[1].split()))
    return {"images": len(galembed.open(store)), "ends": ends, "first": 2 * workers}


# --- the driver ---


def measure(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    results: dict[str, list[dict[str, Any]]] = {}
    images = len(list((options.work / "cubes").glob("*.fits")))
    for number in range(options.rounds):
        for place, method in enumerate(methods(options)):
            out = options.work / f"out-{os.getpid()}-{number}-{place}"
            results.setdefault(method.name, []).append(run(method, out, images))
            print(f"{number} {method.name}: {json.dumps(results[method.name][-1])}", file=sys.stderr, flush=True)
    return results


def row(results: dict[str, list[dict[str, Any]]], name: str) -> list[str]:
    def column(what: str, digits: int = 1) -> str:
        values = [run[what] for run in results[name]]
        return "" if np.isnan(values).any() else spread(values, digits)

    def ours_over(what: str) -> str:
        ratios = [ours[what] / run[what] for ours, run in zip(results[OURS], results[name], strict=True)]
        return "" if name == OURS or np.isnan(ratios).any() else spread(ratios, 2)

    started = f"{column('start')} ({results[name][0]['first']})"
    return [
        name, column("whole"), ours_over("whole"), column("steady"), ours_over("steady"), started, column("pss", 0),
        column("rss", 0),
    ]  # fmt: skip


def report(options: argparse.Namespace, results: dict[str, list[dict[str, Any]]]) -> str:
    from galembed.runtimes.machine import cpu_name

    head = (
        "method", "whole, images/s", "ours is faster by", "steady, images/s", "ours is faster by",
        "first result after, s (images in it)", "peak PSS, MiB", "peak RSS, MiB",
    )  # fmt: skip
    versions = {package: version(package) for package in ("torch", "timm", "onnxruntime-gpu", "pylance", "distributed")}
    theirs = {name: number for runs in results.values() for name, number in runs[0]["versions"].items()}
    where = [f"{os.cpu_count()} cores ({cpu_name()}), Python {platform.python_version()}"]
    where += [" ".join(pair) for pair in versions.items()]
    where += ["theirs: " + ", ".join(" ".join(pair) for pair in theirs.items())] if theirs else []
    return "\n\n".join(
        [
            f"`python {' '.join(sys.argv)}`",
            f"{options.architecture} at {options.size} px, random weights, {options.images} galaxies of {SIDE} px, "
            f"{options.rounds} round(s): median [least-most].",
            table(head, [row(results, name) for name in results]),
            "; ".join(where) + ".",
        ]
    )


def check_rivals(options: argparse.Namespace) -> None:
    """Export Hyrax's engine once."""
    if options.hyrax_python and not list((options.work / "hyrax-results").glob("*-onnx-*/model.onnx")):
        shutil.rmtree(options.work / "hyrax-results", ignore_errors=True)
        (options.work / "hyrax-results").mkdir()
        words: Sequence[Any] = (
            options.hyrax_python, RIVALS / "hyrax_verbs.py", "prepare", "--work", options.work, "--out", options.work,
            "--architecture", options.architecture, "--size", options.size, "--batch", 32,
        )  # fmt: skip
        subprocess.run([str(word) for word in words], check=True, stdout=sys.stderr, cwd=options.work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder; what is made in it is used again")
    parser.add_argument("--hyrax-python", type=Path)
    parser.add_argument("--zoobot-python", type=Path)
    parser.add_argument("--script-python", type=Path, default=sys.executable, help="of the script  [this one]")
    parser.add_argument("--int8", action="store_true", help="also by an int8 engine, which is made for it")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--architecture", default=ARCHITECTURE)
    parser.add_argument("--size", type=int, default=SIZE)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="file to write the Markdown to")
    options = parser.parse_args()
    options.work = options.work.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    make_material(options.work, options.images, options.architecture, options.size)
    if options.int8:
        make_int8(options.work)
    check_rivals(options)
    text = report(options, measure(options))
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
