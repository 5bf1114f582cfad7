"""Kill `galembed train` at random moments and see whether its outcome is that of a run left alone.

    python benchmarks/interruptions.py [FOLDER] [--kills 10] [--seed 0]

One run of the command is left alone. Another is killed (SIGKILL to the process and its children) after a random time,
started again with the same command, and so on, until it has been killed so many times; then it is let through. The
weights of both are compared bit by bit, and so are the curves, without their two columns of timings. Times are drawn
evenly between the start of Python and a few seconds of training, so that reading, steps, checkpoints and validations
are hit. A run that ends before its kills are over is begun anew, and so is the count.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from galembed.backbones import file_digest, load_backbone
from training.simulation import simulate_survey

TIMINGS = ("images_per_second", "data_wait")


def command(survey: Path, out: Path) -> list[str]:
    """Return a small run, of a minute or so, with a checkpoint about every second."""
    settings = "--arch test_convnext --size 32 --epochs 30 --batch 16 --drop-path 0.1 --head-dropout 0.1 --patience 30"
    how = "--accelerator cpu --checkpoint-minutes 0.01"
    return [sys.executable, "-m", "galembed", "train", str(survey), "--out", str(out), *f"{settings} {how}".split()]


def run(arguments: list[str], seconds: float = math.inf, sign: Path | None = None) -> tuple[int, float]:
    """Run a command, killed after so many seconds.

    Returns
    -------
    code : int
        Negative where it was killed.
    seen : float
        Seconds after which the file `sign` was there.
    """
    seen, begun = math.inf, time.monotonic()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(arguments, stdout=log, stderr=log, start_new_session=True)
        while process.poll() is None:
            passed = time.monotonic() - begun
            if sign and sign.exists():
                seen = min(seen, passed)
            if passed > seconds:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            time.sleep(0.02)
        if process.returncode > 0:
            log.seek(0)
            raise SystemExit(log.read().decode(errors="replace")[-3000:])
    return process.returncode, seen


def stand(logs: Path) -> str:
    """Return how far a run has come: the last row of its curve."""
    rows = curve(logs)
    return f"step {rows[-1]['step']} of its curve" if rows else "before its first step"


def curve(logs: Path) -> list[dict[str, str]]:
    """Return the rows of a run's curve, without timings."""
    file = logs / "metrics.csv"
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]


def main() -> None:
    """Simulate a survey, train once in peace and once under fire, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="kept; a temporary one unless given")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="interruptions-"))
    folder.mkdir(parents=True, exist_ok=True)
    survey = folder / "survey"
    if not (survey / "votes.parquet").exists():
        simulate_survey(survey, bricks=0, cutouts=300, seed=options.seed, workers=1)
    begun = time.monotonic()
    _, start = run(command(survey, folder / "left-alone"), sign=folder / "left-alone.training" / "last.ckpt")
    whole = time.monotonic() - begun
    print(f"left alone: {whole:.0f} s, the first {start:.0f} s of them before the first checkpoint")

    rng = np.random.default_rng(options.seed)
    out, logs = folder / "killed", folder / "killed.training"
    kills = 0
    while kills < options.kills:
        after = rng.uniform(0, start + 2 * (whole - start) / options.kills)
        code, _ = run(command(survey, out), after)
        if code < 0:
            kills += 1
            print(f"kill {kills:2} after {after:5.1f} s, {stand(logs)}")
        else:
            kills = 0
            print(f"came to its end within {after:.1f} s; begun anew")
            shutil.rmtree(out)
            shutil.rmtree(logs)
    run(command(survey, out))

    same = {
        "weights": file_digest(folder / "left-alone" / "weights.safetensors")
        == file_digest(out / "weights.safetensors"),
        "embedding_id": load_backbone(folder / "left-alone").embedding_id == load_backbone(out).embedding_id,
        "curve": curve(folder / "left-alone.training") == curve(logs),
    }
    print("; ".join(f"{what} {'the same' if is_so else 'DIFFER'}" for what, is_so in same.items()))
    if not options.folder:
        shutil.rmtree(folder)
    raise SystemExit(not all(same.values()))


if __name__ == "__main__":
    main()
