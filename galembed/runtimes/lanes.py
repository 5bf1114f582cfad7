"""What runtimes on a GPU share: a batch in parts, one copied while another is computed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from galembed.runtimes.protocol import Embedded

IN_FLIGHT: Final = 2
"""Parts of a batch that are on the GPU at once."""

_WORTH_HALVING: Final = 64


def part_sizes(images: int, largest: int) -> list[int]:
    """Return the sizes of the parts that a batch is run in, in order.

    They are powers of two, so that what looks for kernels for each size that it meets, meets few; and from 64 images on
    there are two or more, so that one is copied while another is computed.

    Parameters
    ----------
    images : int
        In the batch; may be 0.
    largest : int
        What is taken at once; a power of two.
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


@dataclass(frozen=True)
class Tensor:
    """An input or output of an engine: type, and shape of one image's part of it."""

    dtype: str
    shape: tuple[int, ...]
    taken: bool

    def of(self, images: int) -> tuple[int, ...]:
        """Return the shape of so many images' part."""
        return images, *self.shape


class GpuLane(ABC):
    """A lane with a stream and buffers of its own on both sides, pinned here so that copies need not wait.

    Parameters
    ----------
    tensors : mapping of str to Tensor
        Inputs ``flux`` and ``display``, outputs ``vector``, ``norm`` and ``predictions``.
    largest : int
        Images that it takes at once.
    """

    def __init__(self, tensors: Mapping[str, Tensor], largest: int) -> None:
        self.tensors = tensors
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.images = 0
        self._host: dict[str, torch.Tensor] = {}
        self.device: dict[str, torch.Tensor] = {}
        with torch.cuda.stream(self.stream):
            for name, tensor in tensors.items():
                # An address is wanted for what is empty too, such as the predictions of no head.
                shape = (largest, *(max(length, 1) for length in tensor.shape))
                dtype = getattr(torch, tensor.dtype)
                self._host[name] = torch.empty(shape, dtype=dtype, pin_memory=True)
                self.device[name] = torch.empty(shape, dtype=dtype, device="cuda")

    def start(self, images: NDArray[Any], kind: str) -> None:
        """Send images through a door, the other left empty; see `Lane`."""
        self.stream.synchronize()  # of what an earlier failure left unfinished
        self.images = len(images)
        np.copyto(self._host[kind][: self.images].numpy(), images)
        with torch.cuda.stream(self.stream):
            self.device[kind][: self.images].copy_(self._host[kind][: self.images], non_blocking=True)
            doors = {name: tensor for name, tensor in self.tensors.items() if tensor.taken}
            self.run({name: tensor.of(self.images if name == kind else 0) for name, tensor in doors.items()})
            for name, tensor in self.tensors.items():
                if not tensor.taken:
                    self._host[name][: self.images].copy_(self.device[name][: self.images], non_blocking=True)

    @abstractmethod
    def run(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Have the engine compute on `device`, in the order of `stream`, with inputs of these shapes."""

    def finish(self) -> Embedded:
        """Wait for the images that were sent; see `Lane`."""
        self.stream.synchronize()
        vectors, norms, predictions = (
            self._host[name][: self.images].numpy().copy() for name in ("vector", "norm", "predictions")
        )
        return Embedded(vectors, norms, predictions[:, : self.tensors["predictions"].shape[0]])


def embed_in_parts(
    lanes: Sequence[Lane], images: NDArray[Any], kind: str, sizes: Sequence[int], nothing: Embedded
) -> Embedded:
    """Run a batch part by part, as many at once as there are lanes.

    Parameters
    ----------
    lanes : sequence of Lane
    images : ndarray, shape (n, 3, size, size)
    kind : str
    sizes : sequence of int
        Of `part_sizes`.
    nothing : Embedded
        What becomes of no images.
    """
    done = [nothing, *_run(lanes, images, kind, sizes)]
    return Embedded(
        np.concatenate([part.vectors for part in done]),
        np.concatenate([part.norms for part in done]),
        np.concatenate([part.predictions for part in done]),
    )


def _run(lanes: Sequence[Lane], images: NDArray[Any], kind: str, sizes: Sequence[int]) -> Iterator[Embedded]:
    running: deque[Lane] = deque()
    start = 0
    for part, size in enumerate(sizes):
        if len(running) == len(lanes):
            yield running.popleft().finish()
        running.append(lanes[part % len(lanes)])
        running[-1].start(images[start : start + size], kind)
        start += size
    yield from (lane.finish() for lane in running)


def nothing(dim: int, answers: int) -> Embedded:
    """Return what becomes of no images."""
    return Embedded(np.empty((0, dim), np.float32), np.empty(0, np.float32), np.empty((0, answers), np.float32))
