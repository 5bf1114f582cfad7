"""The torch runtime: slower than an engine, needs nothing exported."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from galembed.backbones import Backbone
from galembed.engines import GPU, EngineRecord
from galembed.errors import BadRequest
from galembed.network import GalaxyNetwork
from galembed.precision import lower
from galembed.runtimes.machine import cpu_name
from galembed.runtimes.protocol import Embedded, check_images, doors

_BATCH: Final = {"cpu": 16, "cuda": 64}


def load_network(backbone: Backbone) -> GalaxyNetwork:
    """Return a backbone's network with its weights, in eval mode, on the CPU.

    Raises
    ------
    ArtifactMismatch
        If the weights are not the ones on record.
    """
    network = GalaxyNetwork.for_contract(
        backbone.architecture, backbone.architecture_args, backbone.contract, backbone.questions
    )
    network.load_state_dict({key: torch.from_numpy(value) for key, value in backbone.weights().items()})
    return network.eval()


class TorchRuntime:
    """Embeds with torch: in float32, or in fewer bits as an engine's report says.

    Parameters
    ----------
    backbone : Backbone
    device : str
        ``cpu``, ``cuda``, or ``auto``: the GPU where there is one.
    record : EngineRecord, optional
        Of format ``torch``: the numeric class, and what stays in float32.
    threads : int
        0 leaves it to torch.

    Raises
    ------
    BadRequest
        If CUDA is asked for and torch sees no GPU.
    ArtifactMismatch
        If the weights are not the ones on record, or the report is another backbone's.
    """

    def __init__(
        self, backbone: Backbone, *, device: str = "auto", record: EngineRecord | None = None, threads: int = 0
    ) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise BadRequest("torch sees no NVIDIA GPU on this machine")
        if threads:
            torch.set_num_threads(threads)
        if record is not None:
            record.checked(backbone)
        self.numeric_class = record.numeric_class if record else "fp32"
        self._backbone = backbone
        self._device = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
        kept = set(record.kept) if record else set()
        if self._device.type == "cpu":
            kept |= {"depthwise"}  # no more exact than it need be, and several times as fast: oneDNN has no such kernel
        network = lower(load_network(backbone), self.numeric_class, kept)
        if self._device.type == "cuda":
            # Convolutions and products with ten bits of mantissa are no float32.
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
            try:
                network.to(self._device).encoder.to(memory_format=torch.channels_last)
            except RuntimeError as error:
                raise BadRequest(f"the GPU cannot hold {backbone.name}: {error}") from error
        self._network = network
        self.device = GPU + torch.cuda.get_device_name() if self._device.type == "cuda" else cpu_name()
        mixed = f"+{'+'.join(record.kept)}" if record and record.kept else ""
        self.batch = _BATCH[self._device.type]
        self.engine = f"torch-{self._device.type}-{self.numeric_class}{mixed}:{backbone.embedding_id[:12]}"

    def embed(self, images: NDArray[Any], kind: str) -> Embedded:
        """Embed a batch; see `galembed.runtimes.Runtime`."""
        check_images(images, kind, self._backbone)
        cuda = self._device.type == "cuda"
        inputs = [torch.from_numpy(part) for part in doors(images, kind)]
        if cuda:
            inputs = [part.pin_memory().to(self._device, non_blocking=True) for part in inputs]
        with torch.inference_mode():
            vectors, norms, predictions = self._network(*inputs)
        return Embedded(*(np.ascontiguousarray(part.cpu().numpy()) for part in (vectors, norms, predictions)))
