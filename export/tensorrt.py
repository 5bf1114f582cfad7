"""Export to TensorRT: a plan for each kind of GPU, proved here where there is such a GPU, else on its first run."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np

from export.onnx import write_graph
from galembed.backbones import Backbone, cache_folder, file_digest
from galembed.engines import EngineRecord, install
from galembed.errors import BadRequest, EmbeddingDrift
from galembed.fidelity import TOLERANCES, Tolerance
from galembed.runtimes.plans import Library, PlanHeader, dotted, find_library, messages, plan_name, write_plan
from galembed.runtimes.proving import judged, refusal
from galembed.runtimes.tensorrt import TensorRTRuntime, present_sm, write_cache

PRECISIONS: Final = ("fp16", "bf16", "fp32")

_USUAL_BATCH: Final = 64
_LARGEST_BATCH: Final = 128
_LARGEST_BYTES: Final = 2**27


@dataclass(frozen=True)
class PlanReport:
    """An installed plan.

    Attributes
    ----------
    record : EngineRecord
    plan : Path
    megabytes : float
    """

    record: EngineRecord
    plan: Path
    megabytes: float

    def __str__(self) -> str:
        proved = (
            f"equal to torch on {self.record.device}"
            if self.record.status == "verified"
            else "not proved yet: its first run on such a GPU compares it with torch"
        )
        sm = dotted(self.record.settings["sm"])
        return f"{self.plan} ({self.megabytes:.1f} MB) for compute capability {sm}, {proved}"


def export_tensorrt(
    backbone: Backbone,
    *,
    precision: str = "fp16",
    sm: Sequence[int] = (),
    kept: Collection[str] = (),
    tolerance: Tolerance | None = None,
) -> list[PlanReport]:
    """Build and install a backbone's TensorRT plans, one for each kind of GPU.

    TensorRT for RTX can build one plan for several; here each has its own, because each is proved on its own GPU.

    Parameters
    ----------
    backbone : Backbone
    precision : str
        One of `PRECISIONS`.
    sm : sequence of int
        Compute capabilities without the point, such as 86 for 8.6; this machine's GPU unless given.
    kept : collection of str
        Layer families (`galembed.engines.FAMILIES`) that stay in float32.
    tolerance : Tolerance, optional
        That of the precision unless given.

    Returns
    -------
    list of PlanReport
        ``verified`` for this machine's GPU, ``unverified`` for others.

    Raises
    ------
    BadRequest
        If TensorRT is not installed, cannot build for a GPU that is named, or cannot build this network.
    EmbeddingDrift
        If the plan for this machine's GPU differs from torch by more than the tolerance; it is not installed then.
    """
    if precision not in PRECISIONS:
        raise BadRequest(f"no plan is built in {precision!r}; choose one of {', '.join(PRECISIONS)}")
    library = find_library()
    targets = _targets(library, sm)
    backbone.engines.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=backbone.engines, prefix=".export-") as scratch:
        graph = Path(scratch) / "graph.onnx"
        opset = write_graph(backbone, graph, precision=precision, kept=kept)
        reports = []
        for target in targets:
            plan = Path(scratch) / f"{plan_name(precision, target)}.plan"
            header = build_plan(library, graph, plan, backbone, precision, target)
            record = _record(plan, header, backbone, opset, tuple(kept), tolerance or TOLERANCES[precision])
            record = _proved_here(record, backbone, plan.parent)
            installed = install(record, plan, backbone).with_name(record.file)
            reports.append(PlanReport(record, installed, installed.stat().st_size / 1e6))
    return reports


def supported(library: Library) -> tuple[int, ...]:
    """Return the compute capabilities that a TensorRT builds for on this machine.

    TensorRT for RTX needs no GPU and has a list; the other builds on the GPU that is to run the plan.
    """
    if library.flavour == "tensorrt-rtx":
        names = library.api.ComputeCapability.__members__
        return tuple(sorted(int(name[2:]) for name in names if name.startswith("SM")))
    present = _present()
    return () if present is None else (present,)


def build_plan(library: Library, graph: Path, plan: Path, backbone: Backbone, precision: str, sm: int) -> PlanHeader:
    """Build a plan from an ONNX graph and write it; return its header.

    Parameters
    ----------
    library : Library
    graph : Path
        As `export.onnx.write_graph` writes it; the types of its tensors are the plan's.
    plan : Path
    backbone : Backbone
        Whose graph it is.
    precision : str
    sm : int

    Raises
    ------
    BadRequest
        If TensorRT cannot build it.
    """
    api, log = library.api, messages(library)
    builder = api.Builder(log)
    network = builder.create_network(1 << int(api.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = api.OnnxParser(network, log)
    fault = f"{library.flavour} {library.version} cannot build a {precision} plan for compute capability {dotted(sm)}"
    if not parser.parse_from_file(str(graph)):
        raise BadRequest(f"{fault}: {log.last}; use `galembed export` without --trt")
    config = builder.create_builder_config()
    config.clear_flag(api.BuilderFlag.TF32)  # float32 is to be float32
    profile = _profile(builder, network, backbone.contract.size)
    config.add_optimization_profile(profile)
    timings = _aim(library, config, sm)
    serialised = builder.build_serialized_network(network, config)
    if serialised is None:
        raise BadRequest(f"{fault}: {log.last}; choose another precision or GPU")
    if timings is not None:
        write_cache(timings, config.get_timing_cache().serialize())
    header = PlanHeader(
        embedding_id=backbone.embedding_id,
        head_id=backbone.head_id,
        flavour=library.flavour,
        version=library.version,
        sm=sm,
        precision=precision,
        refittable=config.get_flag(api.BuilderFlag.REFIT),
        tensors=_tensors(library, network, profile),
    )
    return write_plan(plan, header, memoryview(serialised))


def batch_profile(size: int) -> tuple[int, int, int]:
    """Return the smallest, usual and largest batch through one door, for images of `size` pixels on a side.

    Either door may be empty. The largest is a power of two, and less where images are large, because a runtime keeps
    room for two such batches on both sides of the bus.
    """
    largest = min(_LARGEST_BATCH, 1 << max((_LARGEST_BYTES // (12 * size**2)).bit_length() - 1, 0))
    return 0, min(_USUAL_BATCH, largest), largest


def _present() -> int | None:
    try:
        return present_sm()
    except BadRequest:
        return None


def _targets(library: Library, sm: Sequence[int]) -> tuple[int, ...]:
    possible = supported(library)
    names = ", ".join(map(str, possible)) or "none, for want of an NVIDIA GPU on this machine"
    if not sm and _present() is None:
        raise BadRequest(f"this machine has no NVIDIA GPU to build for; name compute capabilities, of: {names}")
    targets = tuple(dict.fromkeys(sm)) or (present_sm(),)
    wrong = [target for target in targets if target not in possible]
    if wrong:
        raise BadRequest(
            f"{library.flavour} {library.version} builds no plan for compute capability {wrong[0]} here; it does for: "
            f"{names}"
        )
    return targets


def _profile(builder: Any, network: Any, size: int) -> Any:
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        profile.set_shape(tensor.name, *((batch, *tuple(tensor.shape)[1:]) for batch in batch_profile(size)))
    return profile


def _aim(library: Library, config: Any, sm: int) -> Path | None:
    """Have a plan built for a compute capability; return where the timings of this GPU are kept, if they are."""
    if library.flavour == "tensorrt-rtx":
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(library.api.ComputeCapability, f"SM{sm}"), 0)
        return None  # it times nothing when it builds, and deprecates the cache
    file = cache_folder() / "tensorrt" / f"timings-{library.version}-sm{sm}"
    known = config.create_timing_cache(file.read_bytes() if file.exists() else b"")
    if known is None or not config.set_timing_cache(known, False):
        config.set_timing_cache(config.create_timing_cache(b""), False)
    return file


def _tensors(library: Library, network: Any, profile: Any) -> dict[str, dict[str, Any]]:
    """Describe a network's inputs and outputs, as TensorRT understood them, for a header."""
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    described = {
        tensor.name: {
            "mode": mode,
            "dtype": np.dtype(library.api.nptype(tensor.dtype)).name,
            "shape": list(tensor.shape),
        }
        for mode, tensors in (("input", inputs), ("output", outputs))
        for tensor in tensors
    }
    for tensor in inputs:
        described[tensor.name]["profile"] = [list(shape) for shape in profile.get_shape(tensor.name)]
    return described


def _record(
    plan: Path, header: PlanHeader, backbone: Backbone, opset: int, kept: tuple[str, ...], tolerance: Tolerance
) -> EngineRecord:
    """Return the report of a plan that nothing has run yet."""
    return EngineRecord(
        name=plan.stem,
        format="tensorrt",
        numeric_class=header.precision,
        file=plan.name,
        sha256=file_digest(plan),
        embedding_id=backbone.embedding_id,
        head_id=backbone.head_id,
        status="unverified",
        kept=kept,
        tolerance=asdict(tolerance),
        settings={"sm": header.sm, "opset": opset, "largest_batch": header.largest},
        input=backbone.contract.to_dict(),
        versions={
            header.flavour: header.version,
            **{name: version(name) for name in ("torch", "onnx", "onnxscript")},
        },
    )


def _proved_here(record: EngineRecord, backbone: Backbone, folder: Path) -> EngineRecord:
    """Return a plan's report, with its proof if this machine has such a GPU."""
    if record.settings["sm"] != _present():
        return record
    found = judged(TensorRTRuntime(backbone, record, engines=folder), record, backbone)
    if found.status == "refused":
        raise EmbeddingDrift(f"{refusal(found, found.device)}; it was not installed")
    return found
