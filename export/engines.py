"""Engines made, proved on cutouts, and installed; where fewer bits hurt, with what hurts most left in float32."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Final

from export.int8 import Quantiser
from export.onnx import write_graph
from export.trials import Evidence
from galembed.backbones import Backbone, file_digest
from galembed.engines import BETWEEN, EngineRecord, install, told
from galembed.errors import BadRequest, EmbeddingDrift
from galembed.fidelity import TOLERANCES, Fidelity, Tolerance, Trial, compare
from galembed.precision import family_costs
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

_LEFT: Final = ((0.1, 0.9), (0.2, 0.99), (0.4, 0.999), (0.8, 1.0))
"""What layers left in float32 may cost, of all multiplications, and the share of the error that is enough: in turn."""


@dataclass(frozen=True)
class ExportReport:
    """An installed engine.

    Attributes
    ----------
    record : EngineRecord
    fidelity : Fidelity
    megabytes : float
        0 for torch in fewer bits, which has no file of its own.
    tried : mapping of tuple of str to Fidelity
        All that was tried, by what was left in float32, as `EngineRecord.kept`.
    """

    record: EngineRecord
    fidelity: Fidelity
    megabytes: float
    tried: dict[tuple[str, ...], Fidelity] = field(default_factory=dict)

    def __str__(self) -> str:
        size = f" ({self.megabytes:.1f} MB)" if self.megabytes else ""
        kept = f", with {told(self.record.kept)} in float32" if self.record.kept else ""
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

    One that differs too much is made again with more and more layers in float32 before it is given up: in 16 bits
    families of layers, those first that have the smallest share of the multiplications; in int8 single layers, those
    first that add the most error for what they cost. int8 begins with a tenth of the multiplications, or less where
    that takes 90% of the error away.

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
        self.tried: dict[tuple[str, ...], Fidelity] = {}
        self._quantiser = self._calibrated() if precision == "int8" else None

    def export(self) -> ExportReport:
        """Install the first engine that is good enough, with more and more layers in float32."""
        always, families = self._families()
        for kept in self._layers(always) or [(*always, *families[:count]) for count in range(max(1, len(families)))]:
            candidate = self.build(kept)
            if self._hopeless(candidate, kept):
                continue
            fidelity = self.tried[kept] = self.compared(candidate, self.evidence.trial, kept)
            if not self.tolerance.faults(fidelity):
                return self.installed(candidate, fidelity)
            logger.info("%s: %s", self.name, "; ".join(self.tolerance.faults(fidelity)))
        raise EmbeddingDrift(self._refusal(always, families))

    def _hopeless(self, candidate: _Candidate, kept: tuple[str, ...]) -> bool:
        """Return whether an engine fails on a part of the images by what a part can tell: among fewer it is easier."""
        if len(self.few.truth.norms) == len(self.evidence.trial.truth.norms):
            return False
        found = self.tried[kept] = self.compared(candidate, self.few, kept)
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

    def _layers(self, always: tuple[str, ...]) -> list[tuple[str, ...]]:
        """Return what to leave of an int8 engine in float32, more and more of it; nothing for other engines."""
        if self._quantiser is None:
            return []
        families = {layer.path: layer.family for layer in self._quantiser.layers if layer.family not in always}
        with progress(f"{self.name}: the error of each layer", len(families), quiet=self.quiet) as advance:
            errors = self._quantiser.errors(always, advance)
        costs = self._quantiser.costs(always)
        chosen = (most_for_least(errors, costs, most, enough) for most, enough in _LEFT)
        some = [paths for paths in chosen if len(paths) < len(errors)]  # or nothing would be in int8
        return list(dict.fromkeys((*always, *_gathered(paths, families)) for paths in some))

    def compared(self, candidate: _Candidate, trial: Trial, kept: Sequence[str]) -> Fidelity:
        """Compare an engine with torch."""
        total = len(trial.truth.norms) + (len(trial.gallery_truth.norms) if trial.gallery_truth else 0)
        what = f"{self.name} with {told(kept)} in float32" if kept else self.name
        with progress(what, total, quiet=self.quiet) as advance:
            return compare(candidate.runtime, trial, advance)

    def build(self, kept: tuple[str, ...]) -> _Candidate:
        """Make an engine with these layers in float32."""
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

    def _make(self, kept: tuple[str, ...]) -> Path | None:
        if self.format == "torch":
            return None
        file = self.folder / f"{self.name}.onnx"
        if self._quantiser is not None:
            self._quantiser.write(file, kept)
        else:
            self.settings["opset"] = write_graph(self.backbone, file, precision=self.precision, kept=kept)
        return file

    def _calibrated(self) -> Quantiser:
        graph = self.folder / "rows.onnx"
        (kind, images), *_ = self.evidence.calibration.items()
        self.settings |= {"opset": write_graph(self.backbone, graph, rows=True), "calibration_images": len(images)}
        return Quantiser(graph, self.backbone, images, kind)

    def _refusal(self, always: Sequence[str], families: Sequence[str]) -> str:
        """Return why nothing is installed, with what each family alone in float32 gives where that is of use."""
        text = self.tolerance.refusal(next(iter(self.tried.values())), self.name)
        if len(families) < 2:
            return text
        found = dict(self.tried)
        for kept in [(*always, family) for family in families]:
            if kept not in found:
                found[kept] = self.compared(self.build(kept), self.few, kept)
        named = [(f"{told(kept) or 'nothing'}, {one.images:,} images", one) for kept, one in found.items()]
        rows = "\n".join(f"  {name:<52} {one.cosine_p1:>9.6f} {one.overlap:>8.4f}" for name, one in named)
        return (
            f"{text}. What was left in float32, and what that gave:\n  {'':<52} {'cosine p1':>9} {'overlap':>8}\n{rows}"
        )


def most_for_least(
    errors: Mapping[str, float], costs: Mapping[str, float], most: float, enough: float
) -> tuple[str, ...]:
    """Return layers that much of the error is from, those first that add the most for what they cost.

    Parameters
    ----------
    errors, costs : mapping of str to float
        Of each layer.
    most : float
        That they may cost together.
    enough : float
        Share of the error; no more layers are taken once they have it.

    Returns
    -------
    tuple of str
        In the order chosen; empty where nothing adds error, or all cost too much.
    """
    chosen: list[str] = []
    left, spent = sum(errors.values()), 0.0
    remains = (1 - enough) * left
    for path in sorted(errors, key=lambda path: errors[path] / costs[path], reverse=True):
        if left <= remains:
            break
        if spent + costs[path] <= most:
            chosen.append(path)
            left -= errors[path]
            spent += costs[path]
    return tuple(chosen)


def _gathered(paths: Collection[str], families: Mapping[str, str]) -> tuple[str, ...]:
    """Return layers, those of a family by its name where all are there."""
    whole = set(families.values()) - {families[path] for path in families.keys() - set(paths)}
    return (*sorted(whole), *(path for path in paths if families[path] not in whole))


def _versions() -> dict[str, str]:
    found = {}
    for name in _TOOLS:
        try:
            found[name] = version(name)
        except ModuleNotFoundError:  # one of the two onnxruntime wheels is not there
            continue
    return found
