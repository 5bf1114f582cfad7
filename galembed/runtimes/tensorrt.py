"""The TensorRT runtime: embeds on an NVIDIA GPU with a plan that `galembed export` built."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from galembed.backbones import Backbone, cache_folder
from galembed.engines import GPU, EngineRecord
from galembed.errors import ArtifactMismatch, BadRequest
from galembed.runtimes.lanes import IN_FLIGHT, GpuLane, Tensor, embed_in_parts, nothing, part_sizes
from galembed.runtimes.plans import Library, dotted, installed_for, messages, read_plan
from galembed.runtimes.protocol import Embedded, check_images

logger = logging.getLogger(__name__)


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
        self.batch = 64  # in two parts, one copied while the other is computed
        self.engine = f"tensorrt-{self.numeric_class}:{record.sha256[:12]}"
        try:
            self._engine = self._read(library, plan.serialised, file)
            self._kernels = _Kernels(library, self._engine, record) if library.flavour == "tensorrt-rtx" else None
            tensors = {
                name: Tensor(tensor["dtype"], tuple(tensor["shape"][1:]), tensor["mode"] == "input")
                for name, tensor in plan.header.tensors.items()
            }
            self._nothing = nothing(tensors["vector"].shape[0], tensors["predictions"].shape[0])
            self._lanes = [
                _PlanLane(self._context(), tensors, plan.header.largest, self._log) for _ in range(IN_FLIGHT)
            ]
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
            done = embed_in_parts(self._lanes, images, kind, sizes, self._nothing)
            if self._kernels is not None:
                self._kernels.keep(sizes)
        return done


class _PlanLane(GpuLane):
    """A lane with an execution context of its own."""

    def __init__(self, context: Any, tensors: Mapping[str, Tensor], largest: int, log: Any) -> None:
        super().__init__(tensors, largest)
        self._context, self._log = context, log
        for name, buffer in self.device.items():
            self._ask(context.set_tensor_address(name, buffer.data_ptr()))

    def run(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """See `GpuLane`."""
        for name, shape in shapes.items():
            self._ask(self._context.set_input_shape(name, shape))
        self._ask(self._context.execute_async_v3(self.stream.cuda_stream))

    def _ask(self, done: bool) -> None:
        if not done:
            raise BadRequest(f"TensorRT cannot run {self.images} images: {self._log.last}; use --runtime torch")


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
        # A size's kernels are launched as one: https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/
        # inference-library/work-with-cuda-graphs.html. A lane's buffers stay where they are, so that nothing is
        # captured twice.
        self.config.cuda_graph_strategy = library.api.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
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
