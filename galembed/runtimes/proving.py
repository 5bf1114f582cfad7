"""The first run of an engine that the machine that made it could not run: it is proved, or refused for good."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from galembed.backbones import Backbone
from galembed.engines import EngineRecord, read_engine, write_report
from galembed.errors import BadRequest, EmbeddingDrift, GalembedError
from galembed.fidelity import Tolerance, measure
from galembed.runtimes.protocol import Runtime
from galembed.runtimes.torch import TorchRuntime

logger = logging.getLogger(__name__)


class DeviceRuntime(Runtime, Protocol):
    """A runtime that names its device, for the report."""

    device: str


def open_proved(
    backbone: Backbone, record: EngineRecord, open_engine: Callable[[Backbone, EngineRecord], DeviceRuntime]
) -> Runtime:
    """Load an engine; one that nothing has proved yet is proved first, and its report rewritten.

    Parameters
    ----------
    backbone : Backbone
    record : EngineRecord
    open_engine : callable
        Loads the engine, whatever its status.

    Raises
    ------
    EmbeddingDrift
        If it differs from torch by more than its tolerance, now or when it was first run.
    BadRequest
        If the engine fails on the backbone's samples, or there are none.
    """
    if record.status == "refused":
        raise EmbeddingDrift(refusal(record))
    engine = open_engine(backbone, record)
    if record.status != "verified":
        found = judged(engine, record, backbone)
        _rewrite(record, found, backbone)
        if found.status == "refused":
            raise EmbeddingDrift(refusal(found))
    return engine


def judged(engine: DeviceRuntime, record: EngineRecord, backbone: Backbone) -> EngineRecord:
    """Compare an engine with torch in float32 over the backbone's samples; return its report with what was found.

    Returns
    -------
    EngineRecord
        Of status ``verified``, or ``refused`` with the reason as ``fault`` in its fidelity.

    Raises
    ------
    BadRequest
        If the engine fails on the backbone's samples, or there are none.
    """
    samples = {kind: images for kind, images in backbone.samples().items() if len(images)}
    if not samples:
        raise BadRequest(f"{backbone.path} has no samples to prove {record.name} on; make the backbone with some")
    numbers = [answer in backbone.values for answer in backbone.answers]
    try:
        fidelity = measure(engine, TorchRuntime(backbone, device="cpu"), samples, numbers=numbers)
    except RuntimeError as error:  # what torch makes of CUDA's errors
        raise BadRequest(f"{record.name} fails on {engine.device}: {error}; use --runtime torch") from error
    faults = Tolerance(**record.tolerance).faults(fidelity)
    return replace(
        record,
        status="refused" if faults else "verified",
        fidelity=fidelity.to_dict() | ({"fault": "; ".join(faults)} if faults else {}),
        device=engine.device,
    )


def refusal(record: EngineRecord) -> str:
    """Return why an engine was refused, in a sentence."""
    return (
        f"{record.name} differs from torch on {record.device} and is not used: {record.fidelity.get('fault')}; "
        "export another precision"
    )


def _rewrite(record: EngineRecord, found: EngineRecord, backbone: Backbone) -> None:
    """Replace a report, unless the engine was exported anew meanwhile or the folder cannot be written to."""
    try:
        if read_engine(backbone.engines / f"{record.name}.json").sha256 == record.sha256:
            write_report(found, backbone.engines)
            logger.info("%s was run on %s for the first time and is %s", found.name, found.device, found.status)
    except (GalembedError, OSError) as error:
        logger.warning("the report of %s stays %s: %s", record.name, record.status, error)
