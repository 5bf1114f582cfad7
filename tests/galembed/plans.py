"""Plans without a GPU: files that no TensorRT built, and runtimes that stand for one."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from galembed.backbones import Backbone, file_digest
from galembed.engines import EngineRecord, install
from galembed.fidelity import TOLERANCES
from galembed.runtimes import Embedded
from galembed.runtimes.plans import Library, PlanHeader, plan_name, write_plan
from galembed.runtimes.torch import TorchRuntime

VERSION = "1.7.1.116"


def header_of(backbone: Backbone, **changes: Any) -> PlanHeader:
    """A header of this backbone's plan in float32 for compute capability 8.6."""
    images = [-1, 3, 32, 32]
    profile = [[batch, 3, 32, 32] for batch in (0, 64, 128)]
    header = PlanHeader(
        embedding_id=backbone.embedding_id,
        head_id=backbone.head_id,
        flavour="tensorrt-rtx",
        version=VERSION,
        sm=86,
        precision="fp32",
        refittable=False,
        tensors={
            "flux": {"mode": "input", "dtype": "float32", "shape": images, "profile": profile},
            "display": {"mode": "input", "dtype": "uint8", "shape": images, "profile": profile},
            "vector": {"mode": "output", "dtype": "float32", "shape": [-1, backbone.dim]},
            "norm": {"mode": "output", "dtype": "float32", "shape": [-1]},
            "predictions": {"mode": "output", "dtype": "float32", "shape": [-1, len(backbone.answers)]},
        },
    )
    return replace(header, **changes)


def install_plan(
    backbone: Backbone, header: PlanHeader | None = None, *, serialised: bytes = b"vtrt", **record: Any
) -> EngineRecord:
    """Install a plan of some bytes with a report that fits it but for `record`; return the report."""
    header = header or header_of(backbone)
    name = plan_name("fp32", 86)
    made = backbone.path / "made"
    write_plan(made, header, memoryview(serialised))
    report = EngineRecord(
        name=name,
        format="tensorrt",
        numeric_class="fp32",
        file=f"{name}.plan",
        sha256=file_digest(made),
        embedding_id=backbone.embedding_id,
        head_id=backbone.head_id,
        status="verified",
        tolerance=asdict(TOLERANCES["fp32"]),
        settings={"sm": 86},
    )
    report = replace(report, **record)
    install(report, made, backbone)
    return report


def library(flavour: str = "") -> Library:
    """Stand for `galembed.runtimes.plans.find_library` where only TensorRT for RTX is installed."""
    from galembed.errors import BadRequest

    if flavour not in ("", "tensorrt-rtx"):
        raise BadRequest(f"{flavour} is not installed")
    return Library("tensorrt-rtx", VERSION, None)


class FakePlanRuntime:
    """Torch in place of a plan, with `error` added to the first number of each vector."""

    device, numeric_class, engine, batch = "a fake GPU", "fp32", "tensorrt-fp32:fake", 64
    error = 0.0

    def __init__(self, backbone: Backbone, record: EngineRecord, *, engines: Path | None = None) -> None:
        record.checked(backbone, engines)
        self._torch = TorchRuntime(backbone, device="cpu")

    def embed(self, images: np.ndarray, kind: str) -> Embedded:
        true = self._torch.embed(images, kind)
        vectors = true.vectors.copy()
        vectors[:, 0] += self.error
        return Embedded(vectors, true.norms, true.predictions)


class DriftingPlanRuntime(FakePlanRuntime):
    error = 0.5
