"""As much of CUDA as the runtimes touch, with the CPU's memory."""

from __future__ import annotations

import contextlib
from typing import Any

import torch


class Stream:
    cuda_stream = 7

    def synchronize(self) -> None:
        pass

    def wait_stream(self, other: Stream) -> None:
        pass


class Cuda:
    Stream = Stream
    stream = device = staticmethod(contextlib.nullcontext)

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def get_device_capability() -> tuple[int, int]:
        return 8, 6

    @staticmethod
    def get_device_name(device: int) -> str:
        return "a fake GPU"

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def synchronize() -> None:
        pass


class Torch:
    """Torch with a GPU whose memory is the CPU's."""

    cuda = Cuda

    @staticmethod
    def empty(shape: tuple[int, ...], *, dtype: torch.dtype, device: str = "", pin_memory: bool = False) -> Any:
        return torch.empty(shape, dtype=dtype)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)
