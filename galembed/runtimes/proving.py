"""The first run of an engine on a device that it was not proved on: it is proved there, or refused for good."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

from galembed.backbones import Backbone
from galembed.engines import EngineRecord, read_engine, write_report
from galembed.errors import BadRequest, EmbeddingDrift, GalembedError
from galembed.fidelity import Tolerance, measure
from galembed.runtimes.protocol import Runtime

logger = logging.getLogger(__name__)


class DeviceRuntime(Runtime, Protocol):
    """A runtime that names its device, as reports do."""

    device: str


def open_proved(
    backbone: Backbone, record: EngineRecord, open_engine: Callable[[Backbone, EngineRecord], DeviceRuntime]
) -> Runtime:
    """Load an engine; what nothing has proved on this device yet is proved first, and its report rewritten.

    Parameters
    ----------
    backbone : Backbone
    record : EngineRecord
    open_engine : callable
        Loads the engine, whatever its status.

    Raises
    ------
    EmbeddingDrift
        If it differs from torch by more than its tolerance, now or when it was first run here.
    BadRequest
        If the engine fails on the backbone's samples, or there are none.
    """
    if record.status == "refused":
        raise EmbeddingDrift(refusal(record, record.device))
    engine = open_engine(backbone, record)
    status = record.status_on(engine.device)
    if status == "unverified":
        record = judged(engine, record, backbone)
        status = record.status_on(engine.device)
        _rewrite(record, engine.device, backbone)
    if status == "refused":
        raise EmbeddingDrift(refusal(record, engine.device))
    return engine


def judged(engine: DeviceRuntime, record: EngineRecord, backbone: Backbone) -> EngineRecord:
    """Compare an engine with torch in float32 over the backbone's samples; return its report with what was found.

    Returns
    -------
    EngineRecord
        Of status ``verified`` on the engine's device, or ``refused`` with the reason as ``fault`` in its fidelity.

    Raises
    ------
    BadRequest
        If the engine fails on the backbone's samples, or there are none.
    """
    from galembed.runtimes.torch import TorchRuntime

    samples = {kind: images for kind, images in backbone.samples().items() if len(images)}
    if not samples:
        raise BadRequest(f"{backbone.path} has no samples to prove {record.name} on; make the backbone with some")
    numbers = [answer in backbone.values for answer in backbone.answers]
    try:
        fidelity = measure(engine, TorchRuntime(backbone, device="cpu"), samples, numbers=numbers)
    except GalembedError:
        raise
    except Exception as error:  # those of ONNX Runtime and CUDA have no common class
        raise BadRequest(f"{record.name} fails on {engine.device}: {error}; use --runtime torch") from error
    faults = Tolerance(**record.tolerance).faults(fidelity)
    status = "refused" if faults else "verified"
    found = fidelity.to_dict() | ({"fault": "; ".join(faults)} if faults else {})
    if not record.device:
        return replace(record, status=status, fidelity=found, device=engine.device)
    here = {engine.device: {"status": status, "fidelity": found}}
    return replace(record, elsewhere=dict(record.elsewhere) | here)


def refusal(record: EngineRecord, device: str) -> str:
    """Return why an engine was refused on a device, in a sentence."""
    fidelity: Mapping[str, Any] = record.fidelity
    if device != record.device:
        fidelity = record.elsewhere[device]["fidelity"]
    return (
        f"{record.name} differs from torch on {device} and is not used: {fidelity.get('fault')}; "
        "export another precision"
    )


def _rewrite(found: EngineRecord, device: str, backbone: Backbone) -> None:
    """Add what was found to a report, unless the engine was exported anew meanwhile or the folder is read-only."""
    try:
        known = read_engine(backbone.engines / f"{found.name}.json")
        if (known.sha256, known.kept, known.versions) == (found.sha256, found.kept, found.versions):
            if known.device and device in found.elsewhere:  # another process may have added its own device
                found = replace(known, elsewhere=dict(known.elsewhere) | {device: found.elsewhere[device]})
            write_report(found, backbone.engines)
            logger.info("%s was run on %s for the first time and is %s", found.name, device, found.status_on(device))
    except (GalembedError, OSError) as error:
        logger.warning("what %s was found to be on %s cannot be kept: %s", found.name, device, error)
