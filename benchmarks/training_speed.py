"""How fast does `galembed train` train, and in how much memory, beside Zoobot?

    python benchmarks/training_speed.py --work /tmp/training-speed --zoobot-python ZOOBOT_VENV/bin/python

Simulates galaxies with votes, draws them as JPEGs of 424 px, and trains one architecture with random weights on them:

- ours: `training.data.images.open_prepared` and `training.fit.fit`, what `galembed train` runs, with its default
  recipe, and with the settings given by --ours;
- Zoobot: `FinetuneableZoobotTree`, `CatalogDataModule` and `get_trainer` with their defaults (zoobot_training.py), and
  the same with bf16.

Both read the same files and votes with as many worker processes, answer the same questions, and take the same batches.
A step is what follows from a batch in memory: for ours augmentation, forward, loss, backward, clipping, AdamW and the
average of the weights; Zoobot's augmentation is done by its workers and is not in its step. The first epoch begins with
nothing read and holds the reading of all files; an epoch ends with its validation and checkpoint. Imports are not
timed. Each run is a fresh process; the methods take turns, and ratios are taken within a round. Memory is the peak of
the process and its workers, shared pages counted once (PSS), seen every half second; on a GPU, torch's own peak.

Without --zoobot-python only ours is measured, on a GPU where there is one. --most-wait makes it a check.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from processes import family, pss

HERE = Path(__file__).resolve()
ZOOBOT = HERE.with_name("zoobot_training.py")
PIXELS = 424
RADII = 13.5  # a picture's field; the networks see 9 or so
CROP = 9.0 / RADII
VALIDATION = 1 / 9


# --- the pictures ---


def make_pictures(work: Path, count: int, seed: int) -> Path:
    """Write JPEGs and a table with columns id_str, file_loc, split and votes; return the table's path."""
    table = work / "votes.parquet"
    if table.exists():
        return table
    from PIL import Image

    from galembed.backbones import FieldOfView, InputContract
    from galembed.cutouts import Cutout
    from galembed.mappings import LEGACY_DR2
    from galembed.sources import open_source

    simulated = work / "simulated"
    if not (simulated / "votes.parquet").exists():
        few = ("--bricks", "1", "--brick-size", "600", "--sources", "5")
        arguments = ("simulate", simulated, *few, "--cutouts", count, "--seed", seed)
        subprocess.run([sys.executable, "-m", "galembed", *map(str, arguments)], check=True, stdout=sys.stderr)
    (work / "pictures").mkdir(exist_ok=True)
    reader = open_source(simulated / "cutouts", catalogue=simulated / "cutouts.fits")
    rows = reader.sources().table
    paths = {}
    for number, cutout in reader.cutouts(rows, InputContract(PIXELS, FieldOfView(RADII, 8.0, 180.0), LEGACY_DR2)):
        if not isinstance(cutout, Cutout):
            raise cutout
        name = str(rows["source_id"][number])
        channels = np.moveaxis(LEGACY_DR2.channels(cutout.pixels)[:, ::-1], 0, -1)
        paths[name] = work / "pictures" / f"{name}.jpg"
        Image.fromarray(np.round(channels * 255).astype(np.uint8)).save(paths[name], quality=90)
    votes = pq.read_table(simulated / "votes.parquet")
    votes = votes.filter(pa.array([name in paths for name in votes["id_str"].to_pylist()]))
    names = votes["id_str"].to_pylist()
    held_out = round(len(names) * VALIDATION)
    votes = votes.set_column(
        votes.column_names.index("file_loc"), "file_loc", pa.array([str(paths[name].resolve()) for name in names])
    ).append_column("split", pa.array(["validation"] * held_out + ["train"] * (len(names) - held_out)))
    pq.write_table(votes, table)
    return table


# --- ours, in a process of its own ---


def recipe_of(options: argparse.Namespace, settings: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return the recipe and machine of settings such as {"precision": "bf16", "compile": True}."""
    from training.recipe import Machine, Recipe

    of_machine = {field.name for field in fields(Machine)}
    machine = Machine(**{key: value for key, value in settings.items() if key in of_machine})
    recipe = Recipe(
        architecture=options.architecture,
        size=options.size,
        batch=options.batch,
        epochs=options.epochs,
        **{key: value for key, value in settings.items() if key not in of_machine},
    )
    return recipe, machine


def prepared_data(options: argparse.Namespace, recipe: Any, folder: Path) -> tuple[Any, Any, Any]:
    """Return the settled recipe, a network with random weights, and the images read."""
    from galembed.questions import question_tree
    from training.data.images import open_prepared
    from training.fit import new_network

    recipe, contract = recipe.settled()
    tree = question_tree(recipe.questions)
    prepared = open_prepared(
        options.work / "pictures",
        contract,
        tree,
        folder,
        votes=options.work / "votes.parquet",
        crop=CROP,
        workers=options.workers,
    )
    return recipe, new_network(recipe, contract, tree), prepared


def time_steps(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from training.data.batches import Position, TrainingBatches
    from training.fit import door
    from training.trainer import VoteTrainer

    recipe, machine = recipe_of(options, options.settings)
    recipe, network, prepared = prepared_data(options, recipe, options.out)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = VoteTrainer(network, recipe, door(prepared), 1000, options.out).to(device)
    if machine.compile:
        network.encoder.compile()
    optimizer = module.configure_optimizers()["optimizer"]
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16")
    dtype = torch.float16 if recipe.precision == "fp16" else torch.bfloat16
    position = Position(0, 0, 0)
    batches = TrainingBatches(
        prepared.part("train"), recipe.batch, seed=0, position=lambda: position, parts=recipe.accumulate
    )
    kept = [batch for batch, _ in zip(batches, range((options.steps + 2) * recipe.accumulate), strict=False)]
    generator = torch.Generator(device).manual_seed(0)
    seconds = []
    for step in range(options.steps + 2):
        begun = time.perf_counter()
        for part in range(recipe.accumulate):
            batch = kept[(step * recipe.accumulate + part) % len(kept)]
            batch = type(batch)(*(tensor.to(device, non_blocking=True) for tensor in batch))
            with torch.autocast(device.type, dtype, enabled=recipe.precision != "fp32"):
                loss = module.loss(network, batch, generator).mean()
            scaler.scale(loss / recipe.accumulate).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(network.parameters(), recipe.clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if module.ema is not None:
            module.ema.update(network, step=step + 1)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return {"steps": seconds[2:], "train_nll": float(loss.detach())} | gpu_memory()


def time_epochs(options: argparse.Namespace) -> dict[str, Any]:
    from training.fit import fit

    recipe, machine = recipe_of(options, options.settings)
    begun = time.time()
    recipe, network, prepared = prepared_data(options, recipe, options.out)
    training, validation = prepared.part("train"), prepared.part("validation")
    with watched_epochs(options.out / "metrics.csv") as (ends, losses):
        fitted = fit(network, training, validation, recipe, options.out, machine=machine)
    ends[-1] = time.time()  # with the last checkpoint
    return {
        "images": len(training) // recipe.batch * recipe.batch,
        "epochs": [end - start for start, end in zip([begun, *ends], ends, strict=False)],
        "loop_seconds": fitted.seconds,
        "data_wait": fitted.data_wait,
        "validation_nll": losses,
    } | gpu_memory()


@contextmanager
def watched_epochs(curve: Path) -> Iterator[tuple[list[float], list[float]]]:
    """Yield lists that fill with the time of each epoch's validation, and its loss, as the curve file tells them."""
    import csv

    ends: list[float] = []
    losses: list[float] = []
    over = threading.Event()

    def look() -> None:
        if not curve.exists():
            return
        with curve.open(newline="", encoding="utf-8") as stream:
            found = [float(row["val_nll"]) for row in csv.DictReader(stream) if row["val_nll"]]
        ends.extend([time.time()] * (len(found) - len(losses)))
        losses.extend(found[len(losses) :])

    def watch() -> None:
        while not over.wait(0.1):
            look()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield ends, losses
    finally:
        over.set()
        watcher.join()
        look()


def gpu_memory() -> dict[str, float]:
    import torch

    return {"gpu_mib": torch.cuda.max_memory_allocated() / 2**20} if torch.cuda.is_available() else {}


# --- the driver ---


def run(command: Sequence[str | Path]) -> dict[str, Any]:
    """Run a worker; return what it prints, with the peak memory (MiB) of it and its children."""
    words = [str(word) for word in command]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    peak = 0.0
    said: list[tuple[str, str]] = []
    reader = threading.Thread(target=lambda: said.append(process.communicate()))
    reader.start()
    while reader.is_alive():
        peak = max(peak, sum(map(pss, family(process.pid))))
        reader.join(0.5)
    out, errors = said[0]
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{errors[-3000:]}")
    return dict(json.loads(out.splitlines()[-1])) | {"peak_mib": peak}


def commands(options: argparse.Namespace, what: str, out: Path) -> dict[str, list[str | Path]]:
    """Return the command of each method, by its name."""
    common = ["--out", out, "--architecture", options.architecture, "--batch", str(options.batch)]
    common += ["--workers", str(options.workers), "--epochs", str(options.epochs), "--steps", str(options.steps)]
    found: dict[str, list[str | Path]] = {}
    if options.zoobot_python:
        for precision in ("fp32", "bf16"):
            found[f"Zoobot, {precision}"] = [
                options.zoobot_python, ZOOBOT, what, "--table", options.work / "votes.parquet",
                "--precision", precision, *common,
            ]  # fmt: skip
    for words in options.ours:
        found[f"ours, {words or 'the default recipe'}"] = [
            sys.executable, HERE, "--worker", what, "--work", options.work, "--size", str(options.size),
            "--ours", words, *common,
        ]  # fmt: skip
    return found


def measure(options: argparse.Namespace, what: str) -> dict[str, list[dict[str, Any]]]:
    results: dict[str, list[dict[str, Any]]] = {}
    for number in range(options.rounds):
        out = options.work / f"{what}-{os.getpid()}-{number}"
        for place, (name, command) in enumerate(commands(options, what, out).items()):
            folder = out.with_name(f"{out.name}-{place}")
            folder.mkdir()
            command[command.index(out)] = folder
            results.setdefault(name, []).append(run(command))
            print(f"{what} {number} {name}: {json.dumps(results[name][-1])}", file=sys.stderr, flush=True)
            shutil.rmtree(folder)
    return results


def spread(values: Sequence[float], digits: int = 1) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:,.{digits}f} [{low:,.{digits}f}-{high:,.{digits}f}]"


def memory(runs: Sequence[Mapping[str, Any]]) -> str:
    return spread([float(run.get("gpu_mib", run["peak_mib"])) for run in runs], 0)


def ratios(results: Mapping[str, list[float]], name: str) -> str:
    """Return rates over those of Zoobot's fp32 in the same round."""
    base = results.get("Zoobot, fp32")
    if base is None or name == "Zoobot, fp32":
        return ""
    return spread([rate / other for rate, other in zip(results[name], base, strict=True)], 2)


def step_table(results: Mapping[str, list[dict[str, Any]]], batch: int) -> str:
    rates = {name: [batch / statistics.median(run["steps"]) for run in runs] for name, runs in results.items()}
    rows = [
        f"| {name} | {spread(rates[name])} | {ratios(rates, name)} | {memory(runs)} |" for name, runs in results.items()
    ]
    return "\n".join(
        ["| the step alone | images/s | over Zoobot, fp32 | peak memory, MiB |", "| --- | --- | --- | --- |", *rows]
    )


def epoch_table(results: Mapping[str, list[dict[str, Any]]]) -> str:
    def rates(of: int) -> dict[str, list[float]]:
        return {name: [run["images"] / run["epochs"][of] for run in runs] for name, runs in results.items()}

    first, last = rates(0), rates(-1)
    rows = []
    for name, runs in results.items():
        losses = [statistics.median(run["validation_nll"][at] for run in runs) for at in (0, -1)]
        wait = spread([100 * run["data_wait"] for run in runs])
        rows.append(
            f"| {name} | {spread(first[name])} | {spread(last[name])} | {ratios(first, name)} | {ratios(last, name)} "
            f"| {wait} | {memory(runs)} | {losses[0]:.2f}, {losses[1]:.2f} |"
        )
    head = (
        "| whole epochs | first, images/s | last, images/s | first over Zoobot, fp32 | last over Zoobot, fp32 "
        "| waiting for data, % | peak memory, MiB | validation NLL, first and last |"
    )
    return "\n".join([head, "| --- " * 8 + "|", *rows])


def report(options: argparse.Namespace, results: Mapping[str, Mapping[str, list[dict[str, Any]]]]) -> str:
    rival = next((runs[0]["versions"] for runs in results["epochs"].values() if "versions" in runs[0]), None)
    images = next(iter(results["epochs"].values()))[0]["images"]
    ours = {package: version(package) for package in ("torch", "timm", "lightning")}
    where = [f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}"]
    if rival is None:
        import torch

        where += [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    where += [" ".join(pair) for pair in ours.items()]
    if rival is not None:
        where.append("Zoobot's: " + ", ".join(" ".join(pair) for pair in rival.items()))
    return "\n\n".join(
        [
            f"`python {' '.join(sys.argv)}`",
            f"{options.architecture} at {options.size} px, batches of {options.batch}, {images} training images of "
            f"{PIXELS} px (JPEG), {options.workers} reading processes, {options.rounds} round(s): median [least-most]. "
            "Peak memory is that of the process and its workers, on a GPU torch's own.",
            step_table(results["step"], options.batch),
            epoch_table(results["epochs"]),
            "; ".join(where) + ".",
        ]
    )


def parsed_settings(words: str) -> dict[str, Any]:
    """Return the settings of ``precision=bf16,accumulate=4,compile=true``."""
    pairs = [word.partition("=") for word in words.split(",") if word]
    values = {"true": True, "false": False}
    return {
        key: values[value] if value in values else int(value) if value.isdigit() else value for key, _, value in pairs
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for pictures and runs; used again if there")
    parser.add_argument("--zoobot-python", type=Path)
    parser.add_argument("--ours", action="append", help="settings of ours: precision=bf16,accumulate=4; may repeat")
    parser.add_argument("--architecture", default="convnext_nano")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--images", type=int, default=576, help="a ninth of them is for validation")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--most-wait", type=float, help="fail if ours waits for data for a larger share of its time")
    parser.add_argument("--out", type=Path, help="file to write the Markdown to")
    parser.add_argument("--worker", choices=("step", "epochs"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.ours = options.ours or ["", "precision=bf16,channels_last=true", "precision=bf16,accumulate=4"]
    if options.worker:
        options.settings = parsed_settings(options.ours[0])
        print(json.dumps((time_steps if options.worker == "step" else time_epochs)(options)))
        return
    make_pictures(options.work, options.images, options.seed)
    results = {what: measure(options, what) for what in ("step", "epochs")}
    text = report(options, results)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    waits = [run["data_wait"] for name, runs in results["epochs"].items() if name.startswith("ours") for run in runs]
    if options.most_wait is not None and max(waits) > options.most_wait:
        raise SystemExit(f"waited for data for {max(waits):.1%} of the time, more than {options.most_wait:.1%}")


if __name__ == "__main__":
    main()
