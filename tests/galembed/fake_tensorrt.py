"""A TensorRT that computes with torch on the CPU."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import torch

from galembed.backbones import Backbone
from galembed.runtimes.plans import Library
from galembed.runtimes.torch import load_network
from tests.galembed.fake_cuda import Stream
from tests.galembed.plans import VERSION

DTYPES = {"flux": torch.float32, "display": torch.uint8}
OUTPUTS = ("vector", "norm", "predictions")


class Logger:
    ERROR, INTERNAL_ERROR = "error", "internal error"


class Cache:
    """Kernels compiled so far; in a file, the number of them."""

    def __init__(self) -> None:
        self.known = b""

    def deserialize(self, known: bytes) -> bool:
        self.known = known
        return True

    def serialize(self) -> bytes:
        return self.known + b"k"


class Config:
    """Takes what TensorRT for RTX has, and nothing else."""

    __slots__ = ("cache", "cuda_graph_strategy", "dynamic_shapes_kernel_specialization_strategy")

    def create_runtime_cache(self) -> Cache:
        return Cache()

    def set_runtime_cache(self, cache: Cache) -> bool:
        self.cache = cache
        return True


class Context:
    """Reads and writes the addresses that it is given; takes no more images than `largest`."""

    largest = 128

    def __init__(self, network: torch.nn.Module, log: Any) -> None:
        self._network, self._log = network, log
        self._addresses: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return address > 0

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shapes[name] = shape
        if shape[0] > self.largest:
            self._log.log(Logger.ERROR, f"{name} has {shape[0]} rows, and {self.largest} is the most")
        return shape[0] <= self.largest

    def execute_async_v3(self, stream: int) -> bool:
        inputs = [self._tensor(name, self._shapes[name], dtype) for name, dtype in DTYPES.items()]
        with torch.inference_mode():
            for name, output in zip(OUTPUTS, self._network(*inputs), strict=True):
                self._tensor(name, tuple(output.shape), torch.float32).copy_(output)
        return stream == Stream.cuda_stream

    def _tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if 0 in shape:
            return torch.empty(shape, dtype=dtype)
        size = torch.Size(shape).numel() * dtype.itemsize
        memory = (ctypes.c_char * size).from_address(self._addresses[name])
        return torch.frombuffer(memory, dtype=dtype).view(shape)


def fake_tensorrt(backbone: Backbone, flavour: str = "tensorrt-rtx") -> Library:
    """Return a TensorRT whose every plan computes what this backbone does."""

    class Engine:
        names = (*DTYPES, *OUTPUTS)
        num_io_tensors = len(names)

        def __init__(self, log: Any) -> None:
            self._log = log

        def get_tensor_name(self, i: int) -> str:
            return self.names[i]

        def create_runtime_config(self) -> Config:
            return Config()

        def create_execution_context(self, runtime_config: Config | None = None) -> Context:
            return Context(load_network(backbone), self._log)

    class Runtime:
        def __init__(self, log: Any) -> None:
            self._log = log

        def deserialize_cuda_engine(self, serialised: memoryview) -> Engine | None:
            if serialised[:4] == b"vtrt":
                return Engine(self._log)
            self._log.log(Logger.ERROR, "magic tag does not match\n")
            return None

    api = SimpleNamespace(
        ILogger=Logger,
        Runtime=Runtime,
        DynamicShapesKernelSpecializationStrategy=SimpleNamespace(EAGER="eager"),
        CudaGraphStrategy=SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole"),
    )
    return Library(flavour, VERSION, api)
