"""The engine alone, on arrays in memory: what no tool that uses it can be faster than. Run by end_to_end.py.

Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np

from galembed.backbones import load_backbone
from galembed.runtimes import open_runtime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--images", type=int, required=True)
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()
    backbone = load_backbone(options.work / "backbone")
    engine = open_runtime(backbone, "onnxruntime-cpu", precision=options.precision, threads=os.cpu_count() or 1)
    side = backbone.contract.size
    batch = np.random.default_rng(0).normal(0, 100, (options.batch, 3, side, side)).astype(np.float32)
    ends = []
    for _ in range(max(3, options.images // options.batch)):
        engine.embed(batch, "flux")
        ends.append((len(batch), time.time()))
    print(json.dumps({"images": sum(count for count, _ in ends), "ends": ends}))


if __name__ == "__main__":
    main()
