"""Encoders with seeded weights, as timm uploads them to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import timm
import torch
from torch import nn

FAMILIES: Final = ("test_convnext", "test_vit", "test_resnet", "test_efficientnet")


def model(architecture: str, **arguments: Any) -> nn.Module:
    torch.manual_seed(3)
    made: nn.Module = timm.create_model(architecture, **arguments).eval()
    return made


def hub_folder(folder: Path, network: nn.Module, card: str = "") -> Path:
    timm.models.save_for_hf(network, folder, safe_serialization=True)
    if card:
        (folder / "README.md").write_text(card, encoding="utf-8")
    return folder
