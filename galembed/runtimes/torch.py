"""The torch runtime: slower than an engine, needs nothing exported."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from galembed.backbones import Backbone
from galembed.network import GalaxyNetwork
from galembed.runtimes import Embedded, check_images


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
    """Embeds with torch in float32, on a GPU where there is one."""

    numeric_class = "fp32"

    def __init__(self, backbone: Backbone, *, threads: int = 0) -> None:
        if threads:
            torch.set_num_threads(threads)
        self._backbone = backbone
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._network = load_network(backbone).to(self._device)
        self.engine = f"torch-{self._device.type}-fp32:{backbone.embedding_id[:12]}"

    def embed(self, images: NDArray[Any], kind: str) -> Embedded:
        """Embed a batch; see `galembed.runtimes.Runtime`."""
        check_images(images, kind, self._backbone)
        size = self._backbone.contract.size
        empty = {
            "flux": np.empty((0, 3, size, size), np.float32),
            "display": np.empty((0, 3, size, size), np.uint8),
        }
        doors = [torch.from_numpy((empty | {kind: images})[name]).to(self._device) for name in ("flux", "display")]
        with torch.inference_mode():
            vectors, norms, predictions = self._network(*doors)
        return Embedded(vectors.cpu().numpy(), norms.cpu().numpy(), predictions.cpu().numpy())
