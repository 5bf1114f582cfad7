"""ONNX Runtime on an NVIDIA GPU: memory bound to its session, and one part copied while another is computed."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from galembed.backbones import Backbone
from galembed.runtimes.lanes import IN_FLIGHT, GpuLane, Tensor, embed_in_parts, nothing, part_sizes
from galembed.runtimes.protocol import Embedded

_LARGEST: Final = 256


def bound_session(backbone: Backbone) -> BoundSession | None:
    """Return what runs a backbone's session on a GPU's memory; nothing where torch, whose memory it is, sees none."""
    return BoundSession(backbone) if torch.cuda.is_available() else None


class BoundSession:
    """Runs a session on the GPU's memory.

    What is computed goes to one stream, in turn; what is copied, to a stream of each lane.

    Parameters
    ----------
    backbone : Backbone
        That the session's graph is of.
    """

    where = "cuda"

    def __init__(self, backbone: Backbone) -> None:
        size = backbone.contract.size
        self._gpu = torch.cuda.current_device()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._lock = threading.Lock()
        self._nothing = nothing(backbone.dim, len(backbone.answers))
        self._tensors = {
            "flux": Tensor("float32", (3, size, size), taken=True),
            "display": Tensor("uint8", (3, size, size), taken=True),
            "vector": Tensor("float32", (backbone.dim,), taken=False),
            "norm": Tensor("float32", (), taken=False),
            "predictions": Tensor("float32", (len(backbone.answers),), taken=False),
        }
        self._lanes: list[_SessionLane] = []

    @property
    def settings(self) -> dict[str, str]:
        """What the session's provider is to be told."""
        return {"user_compute_stream": str(self._stream.cuda_stream)}

    def bind(self, session: Any) -> None:
        """Take the session that is to be run."""
        self._lanes = [
            _SessionLane(session, self._tensors, self._stream, self._gpu, self.where) for _ in range(IN_FLIGHT)
        ]

    def embed(self, images: NDArray[Any], kind: str) -> Embedded:
        """Embed a batch that was checked. Threads take turns: a batch fills the GPU."""
        sizes = part_sizes(len(images), _LARGEST)
        with self._lock, torch.cuda.device(self._gpu):
            return embed_in_parts(self._lanes, images, kind, sizes, self._nothing)


class _SessionLane(GpuLane):
    """A lane that shares a session, and the stream that it computes in, with others."""

    def __init__(self, session: Any, tensors: Mapping[str, Tensor], compute: Any, gpu: int, where: str) -> None:
        super().__init__(tensors, _LARGEST)
        self._session, self._compute, self._place = session, compute, (where, gpu)
        self._options = onnxruntime.RunOptions()
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def run(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """See `GpuLane`."""
        binding = self._session.io_binding()
        for name, tensor in self.tensors.items():
            shape = shapes[name] if tensor.taken else tensor.of(self.images)
            bind = binding.bind_input if tensor.taken else binding.bind_output
            bind(name, *self._place, np.dtype(tensor.dtype), shape, self.device[name].data_ptr())
        self._compute.wait_stream(self.stream)
        self._session.run_with_iobinding(binding, self._options)
        self.stream.wait_stream(self._compute)
