"""Is OpenVINO's int8 ahead of ONNX Runtime's, at equal fidelity, on this processor?

    python benchmarks/openvino_int8.py builtin survey/cutouts     # pip install openvino nncf

Both start from the same float32 graph of a backbone and find their ranges on the same cutouts. ONNX Runtime's is
quantised as `galembed export` does, OpenVINO's by NNCF: as it comes, and with the same layers left in float32. One
thread; the engines take turns, batch by batch; ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino
from numpy.typing import NDArray

from export.int8 import calibrate, node_families, quantise
from export.onnx import write_graph
from export.trials import Evidence, gather
from galembed.backbones import Backbone, file_digest, load_backbone
from galembed.engines import EngineRecord
from galembed.fidelity import compare
from galembed.runtimes import Runtime
from galembed.runtimes.machine import cpu_name
from galembed.runtimes.onnx import OnnxRuntime
from galembed.runtimes.protocol import Embedded, doors
from galembed.sources import open_source

METHOD = "entropy"
CHEAP = ("depthwise", "stem", "conv")
BATCH = 32


class OpenVino:
    """A compiled model on one thread."""

    engine, numeric_class = "openvino", "int8"

    def __init__(self, model: Any) -> None:
        # Float32 where it is not int8: by itself OpenVINO takes bfloat16 on processors that have it.
        hints = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        self._model = openvino.Core().compile_model(model, "CPU", hints)

    def embed(self, images: NDArray[Any], kind: str) -> Embedded:
        outputs = self._model(dict(zip(("flux", "display"), doors(images, kind), strict=True)))
        return Embedded(*(np.array(outputs[place]) for place in range(3)))


def onnx_runtime(backbone: Backbone, file: Path, numeric_class: str) -> OnnxRuntime:
    record = EngineRecord(
        name=f"onnx-{numeric_class}",
        format="onnx",
        numeric_class=numeric_class,
        file=file.name,
        sha256=file_digest(file),
        embedding_id=backbone.embedding_id,
        head_id=backbone.head_id,
        status="verified",
    )
    return OnnxRuntime(backbone, record, threads=1, engines=file.parent)


def by_nncf(graph: Path, evidence: Evidence, kept: list[str]) -> OpenVino:
    (kind, images), *_ = evidence.calibration.items()
    batches = [np.ascontiguousarray(images[start : start + 8]) for start in range(0, len(images), 8)]
    dataset = nncf.Dataset(batches, lambda batch: dict(zip(("flux", "display"), doors(batch, kind), strict=True)))
    model = openvino.Core().read_model(graph)
    scope = nncf.IgnoredScope(names=[*before_the_encoder(model), *kept])
    return OpenVino(nncf.quantize(model, dataset, subset_size=len(batches), ignored_scope=scope))


def before_the_encoder(model: Any) -> list[str]:
    """Return the operations that the colour mapping is made of, which stay in float32 in both."""
    names = []
    for operation in model.get_ordered_ops():
        if operation.get_type_name() == "Convolution":
            return names
        if operation.get_type_name() not in ("Constant", "Parameter"):
            names.append(operation.get_friendly_name())
    return []


def convolution_names(model: Any, families: dict[str, str]) -> list[str]:
    """Return OpenVINO's names of the cheap layers: it calls a convolution after its bias' addition."""
    names = []
    for operation in model.get_ordered_ops():
        if operation.get_type_name() in ("Convolution", "GroupConvolution"):
            name = operation.get_friendly_name().removesuffix("/WithoutBiases")
            if families.get(name) in CHEAP:
                names.append(operation.get_friendly_name())
    return names


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
    with (
        tempfile.TemporaryDirectory() as scratch,
        gather(
            backbone, open_source(options.source), images=options.images, gallery=options.gallery, calibration=128
        ) as evidence,
    ):
        graph, int8, ranges = (Path(scratch) / name for name in ("fp32.onnx", "int8.onnx", "ranges.json"))
        write_graph(backbone, graph)
        (kind, images), *_ = evidence.calibration.items()
        families = node_families(graph, backbone)
        calibrate(graph, images, kind, METHOD, ranges)
        quantise(graph, int8, families, METHOD, ranges, CHEAP)
        model = openvino.Core().read_model(graph)
        engines: dict[str, Runtime] = {
            "ONNX Runtime fp32": onnx_runtime(backbone, graph, "fp32"),
            f"ONNX Runtime int8, {', '.join(CHEAP)} in float32": onnx_runtime(backbone, int8, "int8"),
            "OpenVINO fp32": OpenVino(model),
            "OpenVINO int8": by_nncf(graph, evidence, []),
            f"OpenVINO int8, {', '.join(CHEAP)} in float32": by_nncf(
                graph, evidence, convolution_names(model, families)
            ),
        }
        fidelity = {name: compare(engine, evidence.trial) for name, engine in engines.items()}
        batch = np.ascontiguousarray(evidence.trial.gallery[kind][:BATCH])
        rates: dict[str, list[float]] = {name: [] for name in engines}
        for _ in range(options.rounds + 1):
            for name, engine in engines.items():
                begun = time.perf_counter()
                engine.embed(batch, kind)
                rates[name].append(BATCH / (time.perf_counter() - begun))
        base = list(rates)[1]
        print(f"{backbone.name}, one thread, {cpu_name()}; {options.rounds} rounds: median [least-most];")
        print(", ".join(f"{name} {version(name)}" for name in ("openvino", "nncf", "onnxruntime-gpu")) + ".\n")
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
