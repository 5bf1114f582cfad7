"""Engines made, proved on cutouts, and installed; where fewer bits hurt, with what hurts most left in float32."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Final

from export.int8 import Quantiser
from export.onnx import write_graph
from export.trials import Evidence
from galembed.backbones import Backbone, file_digest
from galembed.engines import EngineRecord, install
from galembed.errors import BadRequest, EmbeddingDrift
from galembed.fidelity import TOLERANCES, Fidelity, Tolerance, Trial, compare
from galembed.precision import BETWEEN, family_costs
from galembed.progress import progress
from galembed.runtimes.onnx import OnnxRuntime
from galembed.runtimes.proving import DeviceRuntime
from galembed.runtimes.torch import TorchRuntime, load_network

logger = logging.getLogger(__name__)

FORMATS: Final = {"fp32": ("onnx",), "fp16": ("onnx", "torch"), "bf16": ("torch",), "int8": ("onnx",)}
"""What is made of each numeric class, beside TensorRT plans. ONNX Runtime has no bfloat16 convolutions on a CPU."""

_TOOLS: Final = ("torch", "timm", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu")
_FEW_IMAGES: Final = 250
_FEW_SEARCHED: Final = 1000
_SLOW_IN_INT8: Final = ("depthwise",)
"""Layers that ONNX Runtime takes longer for in int8 than in float32; they are sensitive besides."""


@dataclass(frozen=True)
class ExportReport:
    """An installed engine.

    Attributes
    ----------
    record : EngineRecord
    fidelity : Fidelity
    megabytes : float
        0 for torch in fewer bits, which has no file of its own.
    tried : mapping of str to Fidelity
        All that was tried, by the layer families left in float32.
    """

    record: EngineRecord
    fidelity: Fidelity
    megabytes: float
    tried: dict[str, Fidelity] = field(default_factory=dict)

    def __str__(self) -> str:
        size = f" ({self.megabytes:.1f} MB)" if self.megabytes else ""
        kept = f", with {' and '.join(self.record.kept)} layers in float32" if self.record.kept else ""
        return f"{self.record.name}{size}{kept}: equal to torch {self.fidelity}"


@dataclass(frozen=True)
class _Candidate:
    """An engine that is not installed yet."""

    record: EngineRecord
    file: Path | None
    runtime: DeviceRuntime


def export_engines(
    backbone: Backbone,
    precision: str,
    evidence: Evidence,
    *,
    tolerance: Tolerance | None = None,
    quiet: bool = False,
) -> list[ExportReport]:
    """Make, prove and install a backbone's engines of one numeric class.

    One that differs too much is made again with more and more layer families in float32, those first that have the
    smallest share of the multiplications, before it is given up.

    Parameters
    ----------
    backbone : Backbone
    precision : str
        ``fp32``, ``fp16``, ``bf16`` or ``int8``.
    evidence : Evidence
        See `export.trials.gather`.
    tolerance : Tolerance, optional
        The class's own unless given.

    Raises
    ------
    EmbeddingDrift
        If an engine differs from torch by more than the tolerance whatever is left in float32. It is not installed; an
        earlier one stays.
    BadRequest
        If there is no such class, or nothing to calibrate int8 with.
    """
    if precision not in FORMATS:
        raise BadRequest(f"numeric class {precision!r} is unknown; choose one of {', '.join(FORMATS)}")
    tolerance = tolerance or TOLERANCES[precision]
    if precision == "int8" and not evidence.calibration:
        raise BadRequest("int8 needs cutouts to find its ranges with; give some with --calibrate SOURCE")
    reports = []
    faults = []
    backbone.engines.mkdir(parents=True, exist_ok=True)
    for engine_format in FORMATS[precision]:
        with tempfile.TemporaryDirectory(dir=backbone.engines, prefix=".export-") as scratch:
            workshop = _Workshop(backbone, engine_format, precision, evidence, tolerance, Path(scratch), quiet)
            try:
                reports.append(workshop.export())
            except EmbeddingDrift as fault:
                faults.append(fault)
    if faults:
        made = f"\n{' and '.join(report.record.name for report in reports)} passed and is installed" if reports else ""
        raise EmbeddingDrift("\n".join(map(str, faults)) + made)
    return reports


class _Workshop:
    """Makes the engines of one format and numeric class until one is good enough."""

    def __init__(
        self,
        backbone: Backbone,
        engine_format: str,
        precision: str,
        evidence: Evidence,
        tolerance: Tolerance,
        folder: Path,
        quiet: bool,
    ) -> None:
        self.backbone, self.format, self.precision = backbone, engine_format, precision
        self.evidence, self.tolerance, self.folder, self.quiet = evidence, tolerance, folder, quiet
        self.name = f"{engine_format}-{precision}"
        self.settings: dict[str, object] = {"proved_on": evidence.sources}
        self.few = evidence.trial.part(_FEW_IMAGES, _FEW_SEARCHED)
        self.tried: dict[str, Fidelity] = {}
        self._make: Callable[[tuple[str, ...]], Path | None] = self._graph if engine_format == "onnx" else self._nothing
        if precision == "int8":
            self._make = self._int8()

    def export(self) -> ExportReport:
        """Install the first engine that is good enough, with more and more layers in float32, the cheapest first."""
        always, families = self._families()
        for count in range(max(1, len(families))):
            kept = (*always, *families[:count])
            candidate = self.build(kept)
            if self._hopeless(candidate, kept):
                continue
            fidelity = self.tried[_words(kept)] = self.compared(candidate, self.evidence.trial, kept)
            if not self.tolerance.faults(fidelity):
                return self.installed(candidate, fidelity)
            logger.info("%s: %s", self.name, "; ".join(self.tolerance.faults(fidelity)))
        raise EmbeddingDrift(self._refusal(always, families))

    def _hopeless(self, candidate: _Candidate, kept: tuple[str, ...]) -> bool:
        """Return whether an engine fails on a part of the images by what a part can tell: among fewer it is easier."""
        if len(self.few.truth.norms) == len(self.evidence.trial.truth.norms):
            return False
        found = self.tried[_words(kept)] = self.compared(candidate, self.few, kept)
        return found.overlap < self.tolerance.overlap or not found.closeness >= self.tolerance.cosine_p1

    def _families(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return what is left in float32 in any case, and what can be, the smallest share of the products first."""
        if self.precision == "fp32":
            return (), ()
        costs = family_costs(load_network(self.backbone), self.backbone.contract.size)
        if self.precision == "int8":
            costs.pop("norm", None)  # is in float32 in any case
        else:
            costs = {BETWEEN: costs.pop("norm", 0.0)} | costs  # norms alone gain nothing: what they give is rounded
        always = tuple(family for family in _SLOW_IN_INT8 if self.precision == "int8" and family in costs)
        return always, tuple(sorted(costs.keys() - set(always), key=lambda family: costs[family]))

    def compared(self, candidate: _Candidate, trial: Trial, kept: Sequence[str]) -> Fidelity:
        """Compare an engine with torch."""
        total = len(trial.truth.norms) + (len(trial.gallery_truth.norms) if trial.gallery_truth else 0)
        what = f"{self.name} with {', '.join(kept)} in float32" if kept else self.name
        with progress(what, total, quiet=self.quiet) as advance:
            return compare(candidate.runtime, trial, advance)

    def build(self, kept: tuple[str, ...]) -> _Candidate:
        """Make an engine with these layer families in float32."""
        file = self._make(kept)
        record = EngineRecord(
            name=self.name,
            format=self.format,
            numeric_class=self.precision,
            file=f"{self.name}.onnx" if file else "",
            sha256=file_digest(file) if file else "",
            embedding_id=self.backbone.embedding_id,
            head_id=self.backbone.head_id,
            status="verified",
            kept=kept,
            tolerance=asdict(self.tolerance),
            settings=self.settings,
            input=self.backbone.contract.to_dict(),
            versions=_versions(),
        )
        runtime = self._runtime(record)
        return _Candidate(replace(record, device=runtime.device), file, runtime)

    def _runtime(self, record: EngineRecord) -> DeviceRuntime:
        if self.format == "onnx":
            return OnnxRuntime(self.backbone, record, engines=self.folder)
        return TorchRuntime(self.backbone, record=record, device="auto")

    def installed(self, candidate: _Candidate, fidelity: Fidelity) -> ExportReport:
        """Move an engine and its report to the backbone's."""
        record = replace(candidate.record, fidelity=fidelity.to_dict())
        report = install(record, candidate.file, self.backbone)
        file = report.with_name(record.file) if record.file else None
        return ExportReport(record, fidelity, file.stat().st_size / 1e6 if file else 0.0, self.tried)

    def _nothing(self, kept: tuple[str, ...]) -> None:
        return None

    def _graph(self, kept: tuple[str, ...]) -> Path:
        file = self.folder / f"{self.name}.onnx"
        self.settings["opset"] = write_graph(self.backbone, file, precision=self.precision, kept=kept)
        return file

    def _int8(self) -> Callable[[tuple[str, ...]], Path]:
        """Find the ranges, and return what quantises."""
        graph, file = self.folder / "rows.onnx", self.folder / f"{self.name}.onnx"
        opset = write_graph(self.backbone, graph, rows=True)
        (kind, images), *_ = self.evidence.calibration.items()
        self.settings |= {"opset": opset, "calibration_images": len(images)}
        quantiser = Quantiser(graph, self.backbone, images, kind)

        def make(kept: tuple[str, ...]) -> Path:
            quantiser.write(file, kept)
            return file

        return make

    def _refusal(self, always: Sequence[str], families: Sequence[str]) -> str:
        """Return why nothing is installed, with what each family alone in float32 gives where that is of use."""
        text = self.tolerance.refusal(next(iter(self.tried.values())), self.name)
        if len(families) < 2:
            return text
        found = dict(self.tried)
        for family in families[1:]:
            kept = (*always, family)
            found[_words(kept)] = self.compared(self.build(kept), self.few, kept)
        rows = "\n".join(
            f"  {f'{name}, {one.images:,} images':<52} {one.cosine_p1:>9.6f} {one.overlap:>8.4f}"
            for name, one in found.items()
        )
        return (
            f"{text}. What was left in float32, and what that gave:\n  {'':<52} {'cosine p1':>9} {'overlap':>8}\n{rows}"
        )


def _words(kept: Sequence[str]) -> str:
    return " + ".join(kept) or "nothing"


def _versions() -> dict[str, str]:
    found = {}
    for name in _TOOLS:
        try:
            found[name] = version(name)
        except ModuleNotFoundError:  # one of the two onnxruntime wheels is not there
            continue
    return found
