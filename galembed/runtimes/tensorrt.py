"""The TensorRT runtime: embeds on an NVIDIA GPU with a plan that `galembed export` built."""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from galembed.backbones import Backbone, cache_folder
from galembed.engines import GPU, EngineRecord
from galembed.errors import ArtifactMismatch, BadRequest
from galembed.runtimes.plans import Library, PlanHeader, dotted, installed_for, messages, read_plan
from galembed.runtimes.protocol import Embedded, check_images

logger = logging.getLogger(__name__)

_IN_FLIGHT: Final = 2
_WORTH_HALVING: Final = 64


def present_sm() -> int:
    """Return the compute capability of this machine's GPU, without the point: 86 is 8.6.

    Raises
    ------
    BadRequest
        If torch sees none.
    """
    if not torch.cuda.is_available():
        raise BadRequest("torch sees no NVIDIA GPU on this machine")
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def part_sizes(images: int, largest: int) -> list[int]:
    """Return the sizes of the parts that a batch is run in, in order.

    They are powers of two, so that TensorRT for RTX, which compiles for each size that it meets, meets few; and from 64
    images on there are two or more, so that one is copied while another is computed.

    Parameters
    ----------
    images : int
        In the batch; may be 0.
    largest : int
        What the plan takes at once; a power of two.
    """
    wanted = images // 2 if images >= _WORTH_HALVING else images
    most = min(largest, 1 << max(wanted.bit_length() - 1, 0))
    rest = images % most
    return [most] * (images // most) + [1 << bit for bit in reversed(range(rest.bit_length())) if rest >> bit & 1]


class Lane(Protocol):
    """Where one part of a batch runs, while other parts run in other lanes."""

    def start(self, images: NDArray[Any], kind: str) -> None:
        """Send images through a door; returns before they are computed."""
        ...

    def finish(self) -> Embedded:
        """Wait for the images that were sent; return what became of them."""
        ...


def run_parts(lanes: Sequence[Lane], images: NDArray[Any], kind: str, sizes: Sequence[int]) -> Iterator[Embedded]:
    """Run a batch part by part, as many at once as there are lanes; yield the results in order."""
    running: deque[Lane] = deque()
    start = 0
    for part, size in enumerate(sizes):
        if len(running) == len(lanes):
            yield running.popleft().finish()
        running.append(lanes[part % len(lanes)])
        running[-1].start(images[start : start + size], kind)
        start += size
    yield from (lane.finish() for lane in running)


class TensorRTRuntime:
    """Embeds with a TensorRT plan.

    Parameters
    ----------
    backbone : Backbone
    record : EngineRecord
        Of format ``tensorrt``, of any status: `galembed.runtimes.proving.open_proved` is who looks at that.
    engines : Path, optional
        Folder of the plan; the backbone's own unless given.

    Attributes
    ----------
    device : str
        Name of the GPU.

    Raises
    ------
    ArtifactMismatch
        If the plan is not the one on record, or another TensorRT is installed than the one that built it.
    BadRequest
        If TensorRT is not installed, there is no GPU, the plan is for another one, or it does not fit.
    """

    def __init__(self, backbone: Backbone, record: EngineRecord, *, engines: Path | None = None) -> None:
        present, built_for = present_sm(), int(record.settings.get("sm", 0))
        if present != built_for:
            raise BadRequest(
                f"{record.name} is for GPUs of compute capability {dotted(built_for)}, and this one is of "
                f"{dotted(present)}; run `galembed export --trt` on this machine"
            )
        file = record.checked(backbone, engines)
        plan = read_plan(file)
        plan.header.require(record, file)
        library = installed_for(plan.header, file)
        self._backbone, self._header = backbone, plan.header
        self._lock = threading.Lock()
        self._log = messages(library)
        self._gpu = torch.cuda.current_device()
        self.device = GPU + torch.cuda.get_device_name(self._gpu)
        self.numeric_class = record.numeric_class
        self.engine = f"tensorrt-{self.numeric_class}:{record.sha256[:12]}"
        try:
            self._engine = self._read(library, plan.serialised, file)
            self._kernels = _Kernels(library, self._engine, record) if library.flavour == "tensorrt-rtx" else None
            self._lanes = [_GpuLane(self._context(), plan.header, self._log) for _ in range(_IN_FLIGHT)]
        except RuntimeError as error:  # torch has several for what CUDA says
            raise BadRequest(
                f"this GPU cannot take {file}: {error}; free its memory, or use --runtime torch"
            ) from error

    def _read(self, library: Library, serialised: memoryview, file: Path) -> Any:
        torch.cuda.synchronize()  # TensorRT joins the CUDA context that torch's first call makes
        self._runtime = library.api.Runtime(self._log)
        engine = self._runtime.deserialize_cuda_engine(serialised)
        if engine is None:
            raise ArtifactMismatch(f"TensorRT cannot read {file}: {self._log.last}; run `galembed export` again")
        found = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
        if found != set(self._header.tensors):
            raise ArtifactMismatch(
                f"{file} takes and gives {sorted(found)}, not what its header says; run `galembed export` again"
            )
        return engine

    def _context(self) -> Any:
        if self._kernels is None:
            return self._engine.create_execution_context()
        return self._engine.create_execution_context(runtime_config=self._kernels.config)

    def embed(self, images: NDArray[Any], kind: str) -> Embedded:
        """Embed a batch; see `galembed.runtimes.Runtime`. Threads take turns: a batch fills the GPU."""
        check_images(images, kind, self._backbone)
        sizes = part_sizes(len(images), self._header.largest)
        with self._lock, torch.cuda.device(self._gpu):
            done = [_nothing(self._header), *run_parts(self._lanes, images, kind, sizes)]
            if self._kernels is not None:
                self._kernels.keep(sizes)
        return Embedded(
            np.concatenate([part.vectors for part in done]),
            np.concatenate([part.norms for part in done]),
            np.concatenate([part.predictions for part in done]),
        )


class _GpuLane:
    """Where one part of a batch runs: its own stream, execution context, and buffers on both sides."""

    def __init__(self, context: Any, header: PlanHeader, log: Any) -> None:
        self._context, self._header, self._log = context, header, log
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._images = 0
        self._host: dict[str, torch.Tensor] = {}
        self._device: dict[str, torch.Tensor] = {}
        with torch.cuda.stream(self._stream):
            for name, tensor in header.tensors.items():
                # TensorRT wants an address for what is empty too, such as the predictions of no head.
                shape = (header.largest, *(max(length, 1) for length in tensor["shape"][1:]))
                dtype = getattr(torch, tensor["dtype"])
                self._host[name] = torch.empty(shape, dtype=dtype, pin_memory=True)
                self._device[name] = torch.empty(shape, dtype=dtype, device="cuda")
                self._ask(context.set_tensor_address(name, self._device[name].data_ptr()))

    def start(self, images: NDArray[Any], kind: str) -> None:
        """Send images through a door, the other left empty; see `Lane`."""
        self._stream.synchronize()  # of what an earlier failure left unfinished
        self._images = len(images)
        np.copyto(self._host[kind][: self._images].numpy(), images)
        with torch.cuda.stream(self._stream):
            self._device[kind][: self._images].copy_(self._host[kind][: self._images], non_blocking=True)
            for name in self._header.inputs:
                rows = self._images if name == kind else 0
                self._ask(self._context.set_input_shape(name, (rows, *self._header.tensors[name]["shape"][1:])))
            self._ask(self._context.execute_async_v3(self._stream.cuda_stream))
            for name in self._header.outputs:
                self._host[name][: self._images].copy_(self._device[name][: self._images], non_blocking=True)

    def finish(self) -> Embedded:
        """Wait for the images that were sent; see `Lane`."""
        self._stream.synchronize()
        vectors, norms, predictions = (
            self._host[name][: self._images].numpy().copy() for name in ("vector", "norm", "predictions")
        )
        return Embedded(vectors, norms, predictions[:, : self._header.tensors["predictions"]["shape"][1]])

    def _ask(self, done: bool) -> None:
        if not done:
            raise BadRequest(f"TensorRT cannot run {self._images} images: {self._log.last}; use --runtime torch")


class _Kernels:
    """What TensorRT for RTX compiled on this GPU, kept in the user's cache for the next process.

    Each size of batch is compiled for before it is run: by default other kernels would run meanwhile, and one engine
    would give two answers.
    """

    def __init__(self, library: Library, engine: Any, record: EngineRecord) -> None:
        self._file = cache_folder() / "tensorrt" / f"{record.sha256[:16]}.kernels"
        self._sizes: set[int] = set()
        self.config = engine.create_runtime_config()
        self.config.dynamic_shapes_kernel_specialization_strategy = (
            library.api.DynamicShapesKernelSpecializationStrategy.EAGER
        )
        self._cache = self.config.create_runtime_cache()
        if self._file.exists():
            self._cache.deserialize(self._file.read_bytes())  # takes nothing of another GPU, driver or version
        self.config.set_runtime_cache(self._cache)

    def keep(self, sizes: Collection[int]) -> None:
        """Write the cache if there was a size that was not met before."""
        if self._sizes.issuperset(sizes):
            return
        self._sizes.update(sizes)
        write_cache(self._file, self._cache.serialize())


def write_cache(file: Path, content: Any) -> None:
    """Write a file of the user's cache, whole or not at all."""
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(memoryview(content))
        partial.replace(file)
    except OSError as error:
        logger.warning("%s is not kept, and will be made again: %s", file.name, error)


def _nothing(header: PlanHeader) -> Embedded:
    """Return what becomes of no images."""
    dim, answers = (header.tensors[name]["shape"][1] for name in ("vector", "predictions"))
    return Embedded(np.empty((0, dim), np.float32), np.empty(0, np.float32), np.empty((0, answers), np.float32))
