"""The engine alone, on arrays in memory: what no tool that uses it can be faster than. Run by end_to_end.py.

One process for each core, of one thread, as `galembed embed` has them. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import numpy as np


def embed(options: argparse.Namespace, ready: Any, results: Any) -> None:
    """Embed the same batch for some seconds, from when all processes have done it once; tell when each was done."""
    from galembed.backbones import load_backbone
    from galembed.runtimes import open_runtime

    backbone = load_backbone(options.work / "backbone")
    engine = open_runtime(backbone, "onnxruntime-cpu", precision=options.precision, threads=1)
    side = backbone.contract.size
    batch = np.random.default_rng(0).normal(0, 100, (engine.batch, 3, side, side)).astype(np.float32)
    engine.embed(batch, "flux")
    ready.wait()
    ends = []
    until = time.time() + options.seconds
    while time.time() < until:
        engine.embed(batch, "flux")
        ends.append((len(batch), time.time()))
    results.put(ends)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--seconds", type=float, default=8)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    count = os.cpu_count() or 1
    ready, results = context.Barrier(count), context.Queue()
    processes = [context.Process(target=embed, args=(options, ready, results)) for _ in range(count)]
    for process in processes:
        process.start()
    ends = sorted((end for _ in processes for end in results.get()), key=lambda end: end[1])
    for process in processes:
        process.join()
    print(json.dumps({"images": sum(images for images, _ in ends), "ends": ends, "first": count}))


if __name__ == "__main__":
    main()
