"""The ways to run a backbone: each engine on each runtime that takes its format, and torch as it is and compiled."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from galembed.backbones import Backbone
from galembed.engines import GPU, EngineRecord, read_engines
from galembed.errors import BadRequest
from galembed.runtimes.machine import cpu_name, gpu_name

COMPILED: Final = "torch-compile"

_RUNTIMES: Final = {
    "onnx": ("onnxruntime-cpu", "onnxruntime-cuda"),
    "torch": ("torch-cpu", "torch-cuda"),
    "tensorrt": ("tensorrt",),
}


@dataclass(frozen=True)
class Method:
    """One way to run a backbone.

    Attributes
    ----------
    runtime : str
        ``torch-cpu``, ``torch-compile-cuda``, ``onnxruntime-cpu``, ``tensorrt`` and so on.
    numeric_class : str
        One of `galembed.engines.NUMERIC_CLASSES`.
    engine : str
        Name of the engine's report; empty for the backbone's own weights.
    status : str
        Of the engine; empty for the backbone's own weights.
    fidelity : mapping
        From the engine's report.
    fault : str
        Why it is not to be run: a report that cannot be read, or an engine that was found to differ from torch.
    """

    runtime: str
    numeric_class: str
    engine: str = ""
    status: str = ""
    fidelity: Mapping[str, Any] = field(default_factory=dict)
    fault: str = ""

    @property
    def name(self) -> str:
        """The runtime, and what tells the engine from others that it runs."""
        return f"{self.runtime} {self.engine.partition('-')[2] or self.numeric_class}"

    @property
    def device(self) -> str:
        """``cpu`` or ``cuda``."""
        return "cpu" if self.runtime.endswith("-cpu") else "cuda"

    @property
    def reference(self) -> str:
        """Name of torch as it is, in float32 on the same device."""
        return f"torch-{self.device} fp32"


def methods(backbone: Backbone, only: Collection[str] = ()) -> list[Method]:
    """Return every method of a backbone, whether it can run here or not.

    Parameters
    ----------
    backbone : Backbone
    only : collection of str
        Beginnings of names; without any, all methods are meant.

    Raises
    ------
    BadRequest
        If no method's name begins so.
    """
    listed = [Method(runtime, "fp32") for runtime in ("torch-cpu", f"{COMPILED}-cpu", "torch-cuda", f"{COMPILED}-cuda")]
    for name, record in read_engines(backbone).items():
        listed += [
            _engine_method(name, runtime, record) for runtime in _RUNTIMES.get(name.partition("-")[0], ("unknown",))
        ]
    chosen = [method for method in listed if not only or method.name.startswith(tuple(only))]
    if not chosen:
        raise BadRequest(
            f"no method begins with {' or '.join(map(repr, only))}; there are {', '.join(m.name for m in listed)}"
        )
    return chosen


def _engine_method(name: str, runtime: str, record: EngineRecord | Exception) -> Method:
    if isinstance(record, Exception):
        return Method(runtime, "".join(name.split("-")[1:2]), name, fault=str(record))
    device = cpu_name() if runtime.endswith("-cpu") else GPU + gpu_name()
    status = record.status_on(device)
    found = record.elsewhere[device]["fidelity"] if device in record.elsewhere else record.fidelity
    fault = "it was found to differ from torch; run `galembed export` again" if status == "refused" else ""
    return Method(runtime, record.numeric_class, name, status, found, fault)
