"""Hyrax's side of end_to_end.py; run by it under a Python that has `hyrax timm onnxruntime onnx onnxscript`.

From FITS files, one a band, to its Lance table of results. `prepare` exports the network to ONNX; Hyrax wants the
folder of a training for that, so that of an `infer` is made to look like one. Then `infer` (torch) or `engine` (ONNX),
with Hyrax's defaults but for: the crop, arcsinh, and no cache, as it advises for inference; batch and workers where
given. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ENDS: list[tuple[int, float]] = []


def configured(options: argparse.Namespace, results: Path) -> Any:
    import hyrax

    found = hyrax.Hyrax()
    config = found.config
    config["data_request"] = {
        "infer": {
            "data": {
                "dataset_class": "FitsImageDataset",
                "data_location": str(options.work / "bands"),
                "fields": ["image", "object_id"],
                "primary_id_field": "object_id",
            }
        }
    }
    config["data_set"]["filter_catalog"] = str(options.work / "bands.csv")
    config["data_set"]["crop_to"] = [options.size, options.size]
    config["data_set"]["transform"] = "arcsinh"
    config["data_set"]["use_cache"] = False
    if options.batch:
        config["data_loader"]["batch_size"] = options.batch
    if options.workers:
        config["data_loader"]["num_workers"] = options.workers
    config["model"]["name"] = "hyrax_model.Encoder"
    config["infer"]["model_weights_file"] = str(options.work / "hyrax.pth")
    config["general"]["results_dir"] = str(results)
    config["general"]["log_level"] = "warning"
    return found


def prepare(options: argparse.Namespace, results: Path) -> None:
    import torch
    from safetensors.torch import load_file

    weights = load_file(options.work / "backbone.safetensors")
    torch.save({f"network.{name}": value for name, value in weights.items()}, options.work / "hyrax.pth")
    configured(options, results).infer()
    inferred = sorted(results.glob("*-infer-*"))[-1]
    trained = results / "20260101-000000-train-like"
    trained.mkdir()
    for name in ("runtime_config.toml", "prepare_inputs.py"):
        shutil.copy(inferred / name, trained)
    shutil.copy(inferred / "inference_weights.pth", trained / "example_model.pth")
    configured(options, results).to_onnx(input_model_directory=trained)


def watch_engine() -> None:
    """Note when each call of ONNX Runtime ends."""
    import onnxruntime

    class Session(onnxruntime.InferenceSession):  # type: ignore[misc]
        def run(self, *arguments: Any, **options: Any) -> Any:
            result = super().run(*arguments, **options)
            ENDS.append((len(result[0]), time.time()))
            return result

    onnxruntime.InferenceSession = Session


def watch_network() -> None:
    """Note when each forward pass ends."""
    import hyrax_model

    forward = hyrax_model.Encoder.forward

    def timed(self: Any, batch: Any) -> Any:
        result = forward(self, batch)
        ENDS.append((len(result), time.time()))
        return result

    hyrax_model.Encoder.forward = timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("verb", choices=("prepare", "infer", "engine"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--architecture", required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--workers", type=int)
    options = parser.parse_args()
    os.environ["RIVAL_ARCHITECTURE"] = options.architecture
    sys.path.insert(0, str(HERE))
    results = options.work / "hyrax-results"
    if options.verb == "prepare":
        prepare(options, results)
        return
    before = set(results.iterdir())
    if options.verb == "engine":
        watch_engine()
        configured(options, results).engine()
    else:
        watch_network()
        configured(options, results).infer()
    import lance

    new = [folder for folder in results.iterdir() if folder not in before]
    rows = sum(lance.dataset(str(file)).count_rows() for folder in new for file in folder.rglob("results.lance"))
    for folder in new:
        shutil.rmtree(folder)
    versions = {package: version(package) for package in ("hyrax", "torch", "timm", "onnxruntime")}
    print(json.dumps({"images": rows, "ends": ENDS, "versions": versions}))


if __name__ == "__main__":
    main()
