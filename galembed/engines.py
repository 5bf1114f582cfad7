"""Engines on record: what was exported from a backbone, in which numbers, and how equal to torch it is."""

from __future__ import annotations

import json
import uuid
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from galembed.backbones import Backbone, file_digest
from galembed.errors import ArtifactMismatch

NUMERIC_CLASSES: Final = ("fp32", "fp16", "bf16", "int8")
"""What an engine computes in. Vectors of different classes are not mixed in a store."""

GPU: Final = "GPU "
"""What the names of devices begin with that are no processors."""

STATUSES: Final = ("verified", "unverified", "refused")

FAMILIES: Final = ("stem", "norm", "depthwise", "conv", "attention", "linear")
"""Kinds of layer that can be left in float32 where fewer bits change the vectors too much."""

BETWEEN: Final = "between"
"""What layers hand on to each other, the sums of residual networks and the norms; can be left in float32 together."""

ENGINE_FORMAT: Final = 2
"""Of an engine's report."""


@dataclass(frozen=True)
class EngineRecord:
    """The report beside an engine: ``engines/NAME.json``.

    Attributes
    ----------
    name : str
        ``FORMAT-CLASS``, and for a plan the GPU's compute capability: ``onnx-int8``, ``tensorrt-fp16-sm86``.
    format : str
        ``onnx``, ``tensorrt``, or ``torch``: the backbone's own weights, run in fewer bits.
    numeric_class : str
        One of `NUMERIC_CLASSES`.
    file, sha256 : str
        The engine beside the report, and its digest (hex); empty for ``torch``.
    embedding_id, head_id : str
        Of the backbone that it was made from.
    status : str
        ``verified``; ``unverified`` where it could not be run on the machine that made it; ``refused`` where it was run
        later and differed from torch.
    kept : tuple of str
        Left in float32: layer families (`FAMILIES`), and of int8 single layers by their path.
    fidelity, tolerance : mapping
        How it compares with torch in float32 (`galembed.fidelity`), and what it may differ by.
    settings : mapping
        What decides how it computes: opset, calibration, compute capability.
    input : mapping
        The backbone's input contract, which is inside the engine.
    versions : mapping
        Of the tools that made it.
    device : str
        Where it was verified: the processor's name, or ``GPU`` and the GPU's.
    elsewhere : mapping of str to mapping
        What was found on other devices, at its first run there: ``status``, ``fidelity``, and ``fault`` if refused.
    """

    name: str
    format: str
    numeric_class: str
    file: str
    sha256: str
    embedding_id: str
    head_id: str
    status: str
    kept: tuple[str, ...] = ()
    fidelity: Mapping[str, Any] = field(default_factory=dict)
    tolerance: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    input: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    device: str = ""
    elsewhere: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def status_on(self, device: str) -> str:
        """Return the status on a device. Float32 counts as proved on every processor once it is on one.

        Fewer bits do not: processors without the instructions for them saturate, or compute in float32 instead.
        """
        if not self.device or device == self.device or (self.numeric_class == "fp32" and not device.startswith(GPU)):
            return self.status
        return str(self.elsewhere.get(device, {}).get("status", "unverified"))

    def checked(self, backbone: Backbone, folder: Path | None = None) -> Path:
        """Return the engine's file, checked to be the one on record, made from this backbone.

        Parameters
        ----------
        backbone : Backbone
        folder : Path, optional
            Where the engine is; the backbone's engines unless given.

        Raises
        ------
        ArtifactMismatch
            If it was made from another backbone, head or input contract, or its file is missing or changed.
        """
        file = (folder or backbone.engines) / (self.file or f"{self.name}.json")
        if self.embedding_id != backbone.embedding_id or self.head_id != backbone.head_id:
            other, this = (
                ("embedding_id " + self.embedding_id[:12], backbone.embedding_id[:12])
                if self.embedding_id != backbone.embedding_id
                else ("head_id " + self.head_id[:12], backbone.head_id[:12])
            )
            raise ArtifactMismatch(
                f"{file} was exported from another backbone ({other}, this one is {this}); run `galembed export` again"
            )
        if self.input and json.dumps(dict(self.input), sort_keys=True) != json.dumps(
            backbone.contract.to_dict(), sort_keys=True
        ):
            raise ArtifactMismatch(
                f"{file} has another input contract inside than {backbone.path / 'backbone.json'} says; restore the "
                "directory, or run `galembed export` again"
            )
        if self.file and (not file.exists() or file_digest(file) != self.sha256):
            raise ArtifactMismatch(
                f"{file} is missing or not the engine that was verified; run `galembed export` again"
            )
        return file


def told(kept: Collection[str]) -> str:
    """Return what was left in float32 in words: families by name, and the number of single layers."""
    names = [name for name in kept if name in (*FAMILIES, BETWEEN)]
    single = len(kept) - len(names)
    names += [f"{single} layer{'s' * (single > 1)}"] * (single > 0)
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def read_engine(report: Path) -> EngineRecord:
    """Read an engine's report.

    Raises
    ------
    ArtifactMismatch
        If it is damaged, or of another format.
    """
    try:
        data = json.loads(report.read_text(encoding="utf-8"))
        version = data.pop("report_format", 1)
        if version != ENGINE_FORMAT:
            raise ArtifactMismatch(
                f"{report} is of format {version}, and this galembed reads {ENGINE_FORMAT}; run `galembed export` again"
            )
        record = EngineRecord(**data | {"kept": tuple(data["kept"])})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ArtifactMismatch):
            raise
        raise ArtifactMismatch(f"{report} is damaged: {error}; run `galembed export` again") from error
    if record.status not in STATUSES:
        raise ArtifactMismatch(f"{report} has status {record.status!r}; run `galembed export` again")
    if record.name != report.stem or Path(record.file).name != record.file:
        raise ArtifactMismatch(f"{report} is the report of {record.name!r}; run `galembed export` again")
    return record


def read_engines(backbone: Backbone) -> dict[str, EngineRecord | ArtifactMismatch]:
    """Return the reports of a backbone's engines by name, or why one cannot be read; sorted, none checked."""
    found: dict[str, EngineRecord | ArtifactMismatch] = {}
    for report in sorted(backbone.engines.glob("[!.]*.json")):
        try:
            found[report.stem] = read_engine(report)
        except ArtifactMismatch as fault:
            found[report.stem] = fault
    return found


def write_report(record: EngineRecord, folder: Path) -> None:
    """Write an engine's report, whole or not at all."""
    text = json.dumps({"report_format": ENGINE_FORMAT} | asdict(record), indent=2) + "\n"
    partial = folder / f".{record.name}.json.{uuid.uuid4().hex}"
    partial.write_text(text, encoding="utf-8")
    partial.replace(folder / f"{record.name}.json")


def install(record: EngineRecord, made: Path | None, backbone: Backbone) -> Path:
    """Move an engine and its report to a backbone's, in place of the earlier one; return the report's path.

    Parameters
    ----------
    record : EngineRecord
    made : Path, optional
        The engine's file, on the same disk; it is moved. None for one that has no file.
    backbone : Backbone
    """
    folder = backbone.engines
    folder.mkdir(parents=True, exist_ok=True)
    report = folder / f"{record.name}.json"
    report.unlink(missing_ok=True)  # an engine without a report is not used
    if made is not None:
        made.replace(folder / record.file)
    write_report(record, folder)
    return report
