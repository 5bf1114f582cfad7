"""TensorRT plans on disk, and the library that reads them.

::

    galembed plan 1\\n     16 bytes
    length of the header   8 bytes, little-endian
    header                 JSON: `PlanHeader`
    plan                   as TensorRT serialised it

A plan holds code for a GPU: run none from a backbone that you do not trust.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from galembed.engines import EngineRecord
from galembed.errors import ArtifactMismatch, BadRequest

logger = logging.getLogger(__name__)

FLAVOURS: Final = ("tensorrt", "tensorrt-rtx")
"""TensorRT's two libraries, the preferred first. Neither reads the other's plans."""

INSTALL: Final = "pip install 'galembed[trt]'"
"""Brings ``tensorrt-rtx-cu13`` from PyPI; ``tensorrt`` is whole only on NVIDIA's own index."""

_MAGIC: Final = b"galembed plan 1\n"


@dataclass(frozen=True)
class Library:
    """An installed TensorRT.

    Attributes
    ----------
    flavour : str
        One of `FLAVOURS`.
    version : str
    api : module
    """

    flavour: str
    version: str
    api: Any


@dataclass(frozen=True)
class PlanHeader:
    """What a plan is, readable without TensorRT.

    Attributes
    ----------
    embedding_id, head_id : str
        Of the backbone that it was made from.
    flavour, version : str
        Of the TensorRT that built it, the only one that runs it.
    sm : int
        Compute capability of the GPU that it is for, without the point: 86 is 8.6.
    precision : str
        One of `galembed.engines.NUMERIC_CLASSES`.
    refittable : bool
        Whether its weights could be replaced.
    tensors : mapping
        Inputs and outputs by name: ``mode``, ``dtype``, ``shape`` and, of an input, ``profile``: its smallest, usual
        and largest shape.
    bytes : int
        Length of the plan.
    sha256 : str
        Digest of the plan (hex).
    """

    embedding_id: str
    head_id: str
    flavour: str
    version: str
    sm: int
    precision: str
    refittable: bool
    tensors: Mapping[str, Mapping[str, Any]]
    bytes: int = 0
    sha256: str = ""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs."""
        return tuple(name for name, tensor in self.tensors.items() if tensor["mode"] == "input")

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs."""
        return tuple(name for name, tensor in self.tensors.items() if tensor["mode"] == "output")

    @property
    def largest(self) -> int:
        """Images in the largest batch that it takes through one door."""
        return int(self.tensors["flux"]["profile"][-1][0])

    def require(self, record: EngineRecord, file: Path) -> None:
        """Check that this is the plan that a report describes.

        Raises
        ------
        ArtifactMismatch
            If it was made from another backbone, for another GPU or in other numbers than the report says.
        """
        said = (record.embedding_id, record.head_id, record.numeric_class, record.settings.get("sm"))
        if (self.embedding_id, self.head_id, self.precision, self.sm) != said:
            raise ArtifactMismatch(
                f"{file} holds a plan in {self.precision} for compute capability {dotted(self.sm)} of the backbone "
                f"{self.embedding_id[:12]}, which is not what its report says; run `galembed export` again"
            )


@dataclass(frozen=True)
class Plan:
    """A plan's header, and the plan."""

    header: PlanHeader
    serialised: memoryview


def dotted(sm: int) -> str:
    """Return a compute capability as NVIDIA writes it: 86 is 8.6."""
    return f"{sm // 10}.{sm % 10}"


def find_library(flavour: str = "") -> Library:
    """Return the installed TensorRT, or the one of a flavour.

    Parameters
    ----------
    flavour : str
        One of `FLAVOURS`; the first that is installed unless given.

    Raises
    ------
    BadRequest
        If it is not installed.
    """
    for name in FLAVOURS:
        if flavour not in ("", name):
            continue
        try:
            api = _module(name)
        except (ImportError, OSError):
            continue
        return Library(name, str(api.__version__), api)
    raise BadRequest(f"{flavour or 'TensorRT'} is not installed, or its libraries cannot be loaded; `{INSTALL}`")


def _module(flavour: str) -> Any:
    if flavour == "tensorrt":
        import tensorrt

        return tensorrt
    import tensorrt_rtx

    return tensorrt_rtx


def messages(library: Library) -> Any:
    """Return a logger for TensorRT, which would print otherwise; it has the newest error as ``last``."""

    class Messages(library.api.ILogger):  # type: ignore[misc,name-defined]
        last = "no reason given"

        def __init__(self) -> None:
            library.api.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            logger.debug("%s: %s", library.flavour, message)
            if severity in (self.ERROR, self.INTERNAL_ERROR):
                self.last = message.strip()

    return Messages()


def write_plan(path: Path, header: PlanHeader, serialised: memoryview) -> PlanHeader:
    """Write a plan; return its header with the plan's length and digest."""
    whole = replace(header, bytes=serialised.nbytes, sha256=hashlib.sha256(serialised).hexdigest())
    text = json.dumps(asdict(whole)).encode()
    with path.open("wb") as stream:
        stream.write(_MAGIC + len(text).to_bytes(8, "little") + text)
        stream.write(serialised)
    return whole


def read_plan(path: Path) -> Plan:
    """Read a plan and check that it is whole.

    Raises
    ------
    ArtifactMismatch
        If the file is missing, cut short, changed, or not a plan of this format.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactMismatch(f"{path} cannot be read: {error.strerror}; run `galembed export` again") from error
    if not data.startswith(_MAGIC):
        raise ArtifactMismatch(f"{path} is not a plan that this galembed reads; run `galembed export` again")
    start = len(_MAGIC) + 8
    end = start + int.from_bytes(data[len(_MAGIC) : start], "little")
    try:
        header = PlanHeader(**json.loads(data[start:end]))
        serialised = memoryview(data)[end:]
        whole = serialised.nbytes == header.bytes and hashlib.sha256(serialised).hexdigest() == header.sha256
    except (ValueError, TypeError) as error:
        raise ArtifactMismatch(f"the header of {path} is damaged: {error}; run `galembed export` again") from error
    if not whole:
        raise ArtifactMismatch(
            f"{path} was cut short or changed: {serialised.nbytes} bytes of plan, and {header.bytes} with digest "
            f"{header.sha256[:12]} were written; run `galembed export` again"
        )
    return Plan(header, serialised)


def installed_for(header: PlanHeader, file: Path) -> Library:
    """Return the TensorRT that runs a plan.

    Raises
    ------
    BadRequest
        If no TensorRT is installed.
    ArtifactMismatch
        If another TensorRT, or another version, is installed than the one that built the plan.
    """
    built = f"{file} was built with {header.flavour} {header.version}"
    try:
        library = find_library(header.flavour)
    except BadRequest as error:
        other = find_library()
        raise ArtifactMismatch(
            f"{built}, and {other.flavour} {other.version} is installed; run `galembed export` again"
        ) from error
    if library.version != header.version:
        raise ArtifactMismatch(f"{built}, and version {library.version} is installed; run `galembed export` again")
    return library


def plan_name(precision: str, sm: int) -> str:
    """Return the name of a plan's report."""
    return f"tensorrt-{precision}-sm{sm}"
