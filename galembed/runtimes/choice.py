"""Which engine of a backbone runs on this machine, and why that one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from galembed.backbones import Backbone
from galembed.engines import NUMERIC_CLASSES, EngineRecord, read_engines
from galembed.errors import ArtifactMismatch, ArtifactNotFound, BadRequest, GalembedError
from galembed.runtimes.machine import gpu_name
from galembed.runtimes.protocol import Runtime
from galembed.runtimes.proving import open_proved

logger = logging.getLogger(__name__)

_FASTEST_FIRST: Final = ("tensorrt", "onnxruntime-cuda", "torch-cuda", "onnxruntime-cpu", "torch-cpu")

RUNTIMES: Final = ("auto", "torch", "onnxruntime", *_FASTEST_FIRST)
"""What `open_runtime` can be asked for: a runtime on a device, on the best device, or the best of all."""


@dataclass(frozen=True)
class Choice:
    """A runtime, and why it and no other.

    Attributes
    ----------
    runtime : Runtime
    passed_over : tuple of str
        What would have been faster, with the reason why it was not taken.
    """

    runtime: Runtime
    passed_over: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "; ".join((self.runtime.engine, *(f"not {reason}" for reason in self.passed_over)))


def open_runtime(backbone: Backbone, runtime: str = "auto", *, precision: str = "fp32", threads: int = 0) -> Runtime:
    """Load a backbone's engine; see `choose_runtime`, which also says why it is this one."""
    return choose_runtime(backbone, runtime, precision=precision, threads=threads).runtime


def choose_runtime(backbone: Backbone, runtime: str = "auto", *, precision: str = "fp32", threads: int = 0) -> Choice:
    """Load the fastest engine of a numeric class that was verified and that this machine can run.

    Parameters
    ----------
    backbone : Backbone
    runtime : str
        One of `RUNTIMES`. What is named is used or refused; ``auto`` passes over what cannot be used and says why.
    precision : str
        Numeric class; one of `galembed.engines.NUMERIC_CLASSES`.
    threads : int
        Threads of the engine; 0 leaves it to the library.

    Raises
    ------
    BadRequest
        If the runtime or the class is unknown, or the device that is named is not there.
    ArtifactNotFound
        If the backbone has no such engine.
    ArtifactMismatch
        If the engine that is named, or the weights, are not the ones on record.
    EmbeddingDrift
        If the engine that is named was found, now or before, to differ from torch.
    """
    if runtime not in RUNTIMES:
        raise BadRequest(f"runtime {runtime!r} is unknown; choose one of {', '.join(RUNTIMES)}")
    if precision not in NUMERIC_CLASSES:
        raise BadRequest(f"numeric class {precision!r} is unknown; choose one of {', '.join(NUMERIC_CLASSES)}")
    passed_over: list[str] = []
    faults: list[GalembedError] = []
    for name, open_engine in _candidates(backbone, precision, threads):
        if runtime not in ("auto", name, name.partition("-")[0]):
            continue
        try:
            choice = Choice(open_engine(), tuple(passed_over))
        except GalembedError as error:
            faults.append(error)
            if (reason := f"{name}: {error}") not in passed_over:
                passed_over.append(reason)
            if isinstance(error, ArtifactMismatch):
                logger.warning("%s", error)
        else:
            logger.info("%s", choice)
            return choice
    if faults and runtime != "auto":
        raise next((fault for fault in reversed(faults) if not isinstance(fault, BadRequest)), faults[-1])
    raise ArtifactNotFound(
        f"{backbone.engines} holds no {precision} engine that {'this machine' if runtime == 'auto' else runtime} can "
        f"run; make one with `galembed export --precision {precision}`"
        + "".join(f"; not {reason}" for reason in passed_over)
    )


def _candidates(backbone: Backbone, precision: str, threads: int) -> Iterator[tuple[str, Callable[[], Runtime]]]:
    """Yield every engine of a class with the runtimes that may run it, fastest first, none of them loaded yet."""
    records = read_engines(backbone)
    for name in _FASTEST_FIRST:
        library = name.partition("-")[0]
        engine_format = "onnx" if library == "onnxruntime" else library
        for found, record in records.items():
            if found.split("-")[:2] == [engine_format, precision]:
                yield name, _opener(name, backbone, record, threads)
        if library == "torch" and precision == "fp32":
            yield name, _opener(name, backbone, None, threads)


def _opener(
    name: str, backbone: Backbone, record: EngineRecord | ArtifactMismatch | None, threads: int
) -> Callable[[], Runtime]:
    library, _, device = name.partition("-")

    def open_engine() -> Runtime:
        if isinstance(record, ArtifactMismatch):
            raise record
        if device == "cuda" and not gpu_name():  # told without loading a library
            raise BadRequest("nvidia-smi names no NVIDIA GPU that this process may use")
        if library == "torch":
            from galembed.runtimes.torch import TorchRuntime

            if record is None:
                return TorchRuntime(backbone, device=device, threads=threads)
            return open_proved(
                backbone, record, lambda _, found: TorchRuntime(backbone, device=device, record=found, threads=threads)
            )
        assert record is not None
        if library == "onnxruntime":
            from galembed.runtimes.onnx import OnnxRuntime

            return open_proved(
                backbone, record, lambda _, found: OnnxRuntime(backbone, found, device=device, threads=threads)
            )
        from galembed.runtimes.tensorrt import TensorRTRuntime

        return open_proved(backbone, record, TensorRTRuntime)

    return open_engine
