"""A backbone as an ONNX graph with both doors."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Final

import numpy as np
import torch

from export.rows import with_rows
from galembed.backbones import Backbone
from galembed.precision import lower
from galembed.runtimes.torch import load_network

_MAX_BATCH: Final = 4096


def write_graph(
    backbone: Backbone, path: Path, *, precision: str = "fp32", kept: Collection[str] = (), rows: bool = False
) -> int:
    """Write a backbone's ONNX graph; return its opset.

    Inputs ``flux`` and ``display``, outputs ``vector``, ``norm`` and ``predictions``, as
    `galembed.network.GalaxyNetwork.forward` has them; either input may have no rows.

    Parameters
    ----------
    backbone : Backbone
    path : Path
    precision : str
        ``fp32``, ``fp16`` or ``bf16``; see `galembed.precision.lower`.
    kept : collection of str
        Layer families that stay in float32.
    rows : bool
        Whether linear layers are to be ``Gemm``; see `export.rows.with_rows`.
    """
    size = backbone.contract.size
    rng = np.random.default_rng(0)
    flux = torch.from_numpy(rng.normal(0, 100, (2, 3, size, size)).astype(np.float32))
    display = torch.from_numpy(rng.integers(0, 256, (3, 3, size, size), dtype=np.uint8))
    shapes = tuple({0: torch.export.Dim(name, min=0, max=_MAX_BATCH)} for name in ("n_flux", "n_display"))
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            network = load_network(backbone)
            program = torch.onnx.export(
                lower(with_rows(network) if rows else network, precision, kept),
                (flux, display),
                dynamo=True,
                dynamic_shapes=shapes,
                input_names=["flux", "display"],
                output_names=["vector", "norm", "predictions"],
                verbose=False,
            )
            assert program is not None
            program.save(path, external_data=False)
            return int(program.model.opset_imports[""])
    finally:
        quiet.setLevel(level)
