"""Export to ONNX: one graph with both doors, checked against torch before it is installed."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from galembed.backbones import Backbone, file_digest
from galembed.engines import EngineRecord, install
from galembed.errors import BadRequest
from galembed.fidelity import Fidelity, Tolerance, measure
from galembed.precision import lower
from galembed.runtimes.onnx import OnnxRuntime
from galembed.runtimes.torch import TorchRuntime, load_network
from galembed.sources import SourceReader

FILE: Final = "onnx-fp32.onnx"
_MAX_BATCH: Final = 4096


@dataclass(frozen=True)
class ExportReport:
    """An installed engine.

    Attributes
    ----------
    engine : Path
    fidelity : Fidelity
    megabytes : float
    """

    engine: Path
    fidelity: Fidelity
    megabytes: float

    def __str__(self) -> str:
        f = self.fidelity
        return (
            f"{self.engine} ({self.megabytes:.1f} MB), equal to torch over {f.images} images: smallest cosine "
            f"{f.cosine_min:.7f}, norm within {f.norm_error:.1g}, predictions within {f.prediction_error:.1g}"
        )


def export_onnx(
    backbone: Backbone,
    *,
    verify: SourceReader | None = None,
    tolerance: Tolerance | None = None,
) -> ExportReport:
    """Write, check and install a backbone's ONNX engine.

    Parameters
    ----------
    backbone : Backbone
    verify : SourceReader, optional
        Up to 1,000 of its cutouts are compared as well as the backbone's own samples.
    tolerance : Tolerance, optional

    Raises
    ------
    EmbeddingDrift
        If the engine differs from torch by more than the tolerance; nothing is installed then.
    """
    tolerance = tolerance or Tolerance()
    inputs = _inputs(backbone, verify)
    backbone.engines.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=backbone.engines, prefix=".export-") as scratch:
        trial = Path(scratch) / FILE
        opset = write_graph(backbone, trial)
        record = EngineRecord(
            name="onnx-fp32",
            format="onnx",
            numeric_class="fp32",
            file=FILE,
            sha256=file_digest(trial),
            embedding_id=backbone.embedding_id,
            head_id=backbone.head_id,
            status="verified",
            tolerance=asdict(tolerance),
            settings={"opset": opset},
            input=backbone.contract.to_dict(),
            versions={name: version(name) for name in ("torch", "onnx", "onnxscript")},
        )
        engine = OnnxRuntime(backbone, record, engines=Path(scratch))
        numbers = [answer in backbone.values for answer in backbone.answers]
        fidelity = measure(engine, TorchRuntime(backbone, device="cpu"), inputs, numbers=numbers)
        tolerance.require(fidelity)
        install(replace(record, fidelity=fidelity.to_dict()), trial, backbone)
    path = backbone.engines / FILE
    return ExportReport(path, fidelity, path.stat().st_size / 1e6)


def write_graph(backbone: Backbone, path: Path, *, precision: str = "fp32", kept: Collection[str] = ()) -> int:
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
            program = torch.onnx.export(
                lower(load_network(backbone), precision, kept),
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


def _inputs(backbone: Backbone, verify: SourceReader | None) -> dict[str, NDArray[Any]]:
    inputs: dict[str, NDArray[Any]] = {kind: images for kind, images in backbone.samples().items() if len(images)}
    if verify is not None:
        inputs[verify.kind] = _cutouts(backbone, verify)
    if not sum(len(images) for images in inputs.values()):
        raise BadRequest(f"{backbone.path} has no samples to compare on; give some with --verify SOURCE")
    return inputs


def _cutouts(backbone: Backbone, reader: SourceReader) -> NDArray[Any]:
    rows = reader.sources().table.slice(0, 1000)
    results = (cutout for _, cutout in reader.cutouts(rows, backbone.contract))
    pixels = [cutout.pixels for cutout in results if not isinstance(cutout, Exception)]
    if not pixels:
        raise BadRequest(f"none of the first {len(rows)} sources of {reader.root} can be read to verify on")
    return np.stack(pixels)
