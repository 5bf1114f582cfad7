"""The network of end_to_end.py as a model of Hyrax; only Hyrax imports it."""

from __future__ import annotations

import os
from typing import Any

import timm
import torch
from hyrax.models.model_registry import hyrax_model
from torch import nn


@hyrax_model
class Encoder(nn.Module):
    def __init__(self, config: dict[str, Any], data_sample: Any = None) -> None:
        super().__init__()
        self.config = config
        self.network = timm.create_model(os.environ["RIVAL_ARCHITECTURE"], pretrained=False, num_classes=0)

    def forward(self, batch: Any) -> torch.Tensor:
        return self.network(batch[0] if isinstance(batch, tuple | list) else batch)

    def infer_batch(self, batch: Any) -> torch.Tensor:
        return self.forward(batch)

    def train_batch(self, batch: Any) -> Any:
        raise NotImplementedError

    @staticmethod
    def prepare_inputs(data):  # Hyrax copies this text alone into a file: it has to do without this module's imports
        import numpy as np

        return np.asarray(data["data"]["image"], dtype=np.float32)
