"""Runtimes: a backbone made ready to embed, behind one small protocol."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from galembed.backbones import Backbone
from galembed.errors import ArtifactNotFound, BadRequest


@dataclass(frozen=True)
class Embedded:
    """What a runtime returns for a batch of n images.

    Attributes
    ----------
    vectors : ndarray, shape (n, dim), float32
        Centred, unit norm.
    norms : ndarray, shape (n,), float32
        Length of the centred vector before that.
    predictions : ndarray, shape (n, answer), float32
        What the head predicts: expected vote fractions, or numbers in their unit; no columns without a head.
    """

    vectors: NDArray[np.float32]
    norms: NDArray[np.float32]
    predictions: NDArray[np.float32]


class Runtime(Protocol):
    """A loaded engine.

    Attributes
    ----------
    engine : str
        Runtime and digest, as written into each row.
    numeric_class : str
        ``fp32``, ``fp16`` or ``int8``.
    """

    engine: str
    numeric_class: str

    def embed(self, images: NDArray[Any], kind: str) -> Embedded:
        """Embed a batch.

        Parameters
        ----------
        images : ndarray, shape (n, 3, size, size)
            ``flux``: float32, nJy per (0.262 arcsec)^2, bands blue, green, red, NaN = no data.
            ``display``: uint8, R, G, B. Row 0 is the bottom of the picture. n may be 0.
        kind : str
            ``flux`` or ``display``.
        """
        ...


def open_runtime(backbone: Backbone, runtime: str = "auto", *, threads: int = 0) -> Runtime:
    """Load a backbone's engine.

    Parameters
    ----------
    backbone : Backbone
    runtime : str
        ``onnxruntime``, ``torch``, or ``auto``: onnxruntime where the backbone has a verified engine, else torch.
    threads : int
        Threads of the engine; 0 leaves it to the library.

    Raises
    ------
    ArtifactNotFound
        If onnxruntime is asked for and the backbone has no engine.
    ArtifactMismatch
        If an engine or the weights are not the ones on record.
    """
    if runtime not in ("auto", "onnxruntime", "torch"):
        raise BadRequest(f"runtime {runtime!r} is unknown; choose auto, onnxruntime or torch")
    report = backbone.engines / "onnx-fp32.json"
    if runtime == "onnxruntime" and not report.exists():
        raise ArtifactNotFound(f"{backbone.engines} holds no ONNX engine; make one with `galembed export`")
    if runtime != "torch" and report.exists():
        from galembed.runtimes.onnx import OnnxRuntime

        return OnnxRuntime(backbone, threads=threads)
    from galembed.runtimes.torch import TorchRuntime

    return TorchRuntime(backbone, threads=threads)


def check_images(images: NDArray[Any], kind: str, backbone: Backbone) -> None:
    """Check a batch against the backbone's input contract.

    Raises
    ------
    BadRequest
        If kind, dtype or shape is not the contract's.
    """
    if kind not in ("flux", "display"):
        raise BadRequest(f"input kind {kind!r} is unknown; choose flux or display")
    dtype = np.dtype(np.float32 if kind == "flux" else np.uint8)
    shape = (3, backbone.contract.size, backbone.contract.size)
    if images.dtype != dtype or images.ndim != 4 or images.shape[1:] != shape:
        raise BadRequest(f"{kind} input must be {dtype} of shape (n, {shape}), got {images.dtype} {images.shape}")
