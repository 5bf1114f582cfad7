"""Is OpenVINO's int8 ahead of ONNX Runtime's, at equal fidelity, on this processor?

    galembed export BACKBONE --precision fp32 --precision int8 --verify SOURCE --calibrate OTHER
    python benchmarks/openvino_int8.py BACKBONE SOURCE     # pip install openvino nncf

Both run the two engines that `galembed export` installed in the backbone, the same files. Beside them is what NNCF,
OpenVINO's own tool, makes of the float32 one: as it comes, and with the layers in float32 that the int8 engine has so,
its ranges found on 128 other cutouts. One thread; the engines take turns, batch by batch; ratios are within a round.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Collection
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import onnx
import onnxruntime
import openvino
from numpy.typing import NDArray

from export.int8 import graph_layers
from export.trials import Evidence, gather
from galembed.backbones import load_backbone
from galembed.engines import EngineRecord, read_engines
from galembed.fidelity import compare
from galembed.runtimes import Runtime
from galembed.runtimes.machine import cpu_name
from galembed.runtimes.onnx import OnnxRuntime
from galembed.runtimes.protocol import Embedded, doors
from galembed.sources import open_source

BATCH = 32


class OpenVino:
    """A compiled model on one thread."""

    engine = "openvino"

    def __init__(self, model: Any, numeric_class: str) -> None:
        self.numeric_class = numeric_class
        # Float32 where it is not int8: by itself OpenVINO takes bfloat16 on processors that have it.
        hints = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        self._model = openvino.Core().compile_model(model, "CPU", hints)

    def embed(self, images: NDArray[Any], kind: str) -> Embedded:
        outputs = self._model(dict(zip(("flux", "display"), doors(images, kind), strict=True)))
        return Embedded(*(np.array(outputs[place]) for place in range(3)))


def by_nncf(graph: Path, evidence: Evidence, kept: Collection[str]) -> OpenVino:
    (kind, images), *_ = evidence.calibration.items()
    batches = [np.ascontiguousarray(images[start : start + 8]) for start in range(0, len(images), 8)]
    dataset = nncf.Dataset(batches, lambda batch: dict(zip(("flux", "display"), doors(batch, kind), strict=True)))
    model = openvino.Core().read_model(graph)
    scope = nncf.IgnoredScope(names=[*before_the_encoder(model), *kept_names(model, kept)])
    return OpenVino(nncf.quantize(model, dataset, subset_size=len(batches), ignored_scope=scope), "int8")


def before_the_encoder(model: Any) -> list[str]:
    """Return the operations that the colour mapping is made of, which stay in float32 in both."""
    names = []
    for operation in model.get_ordered_ops():
        if operation.get_type_name() == "Convolution":
            return names
        if operation.get_type_name() not in ("Constant", "Parameter"):
            names.append(operation.get_friendly_name())
    return []


def kept_names(model: Any, nodes: Collection[str]) -> list[str]:
    """Return OpenVINO's names of the nodes: it calls a convolution after its bias' addition."""
    return [
        operation.get_friendly_name()
        for operation in model.get_ordered_ops()
        if operation.get_type_name() in ("Convolution", "GroupConvolution", "MatMul")
        and operation.get_friendly_name().removesuffix("/WithoutBiases") in nodes
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backbone")
    parser.add_argument("source")
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--gallery", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    backbone = load_backbone(options.backbone)
    records = read_engines(backbone)
    files = {}
    for name in ("onnx-fp32", "onnx-int8"):
        record = records.get(name)
        if not isinstance(record, EngineRecord):
            parser.error(f"{backbone.name} has no engine {name} ({record}); make both: see the head of this file")
        files[name] = record.checked(backbone)
    kept = records["onnx-int8"].kept
    nodes = {layer.node for layer in graph_layers(onnx.load(files["onnx-fp32"]), backbone) if layer.family in kept}
    reader = open_source(options.source)
    with gather(backbone, reader, images=options.images, gallery=options.gallery, calibration=128) as evidence:
        read = openvino.Core().read_model
        engines: dict[str, Runtime] = {
            "ONNX Runtime fp32": OnnxRuntime(backbone, records["onnx-fp32"], threads=1),
            "ONNX Runtime int8": OnnxRuntime(backbone, records["onnx-int8"], threads=1),
            "OpenVINO fp32, same file": OpenVino(read(files["onnx-fp32"]), "fp32"),
            "OpenVINO int8, same file": OpenVino(read(files["onnx-int8"]), "int8"),
            "OpenVINO int8 by NNCF": by_nncf(files["onnx-fp32"], evidence, ()),
        }
        if kept:
            engines[f"OpenVINO int8 by NNCF, {', '.join(kept)} in float32"] = by_nncf(
                files["onnx-fp32"], evidence, nodes
            )
        fidelity = {name: compare(engine, evidence.trial) for name, engine in engines.items()}
        (kind, gallery), *_ = evidence.trial.gallery.items()
        batch = np.ascontiguousarray(gallery[:BATCH])
        rates: dict[str, list[float]] = {name: [] for name in engines}
        for _ in range(options.rounds + 1):
            for name, engine in engines.items():
                begun = time.perf_counter()
                engine.embed(batch, kind)
                rates[name].append(BATCH / (time.perf_counter() - begun))
    base = "ONNX Runtime int8"
    print(f"{backbone.name}, one thread, {cpu_name()}; {options.rounds} rounds: median [least-most];")
    runtime = onnxruntime.__version__
    print(f"openvino {version('openvino')}, nncf {version('nncf')}, ONNX Runtime {runtime}.\n")
    print("| engine | images/s | over ONNX Runtime int8 | cosine, 1st percentile | 10 nearest in common |")
    print("| --- | --- | --- | --- | --- |")
    for name, found in rates.items():
        ratios = [one / other for one, other in zip(found[1:], rates[base][1:], strict=True)]
        print(
            f"| {name} | {statistics.median(found[1:]):.0f} [{min(found[1:]):.0f}-{max(found[1:]):.0f}] "
            f"| {statistics.median(ratios):.2f} [{min(ratios):.2f}-{max(ratios):.2f}] "
            f"| {fidelity[name].cosine_p1:.4f} | {fidelity[name].overlap:.3f} |"
        )


if __name__ == "__main__":
    main()
