"""What every runtime is: images in, unit vectors out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from galembed.backbones import Backbone
from galembed.errors import BadRequest


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
        Runtime, device, numeric class and digest, as written into each row.
    numeric_class : str
        One of `galembed.engines.NUMERIC_CLASSES`.
    batch : int
        Images to give it at once where nobody chose; `galembed.runtimes.batches` measures which is best.
    """

    engine: str
    numeric_class: str
    batch: int

    def embed(self, images: NDArray[Any], kind: str) -> Embedded:
        """Embed a batch; several threads may call it at once.

        Parameters
        ----------
        images : ndarray, shape (n, 3, size, size)
            ``flux``: float32, nJy per (0.262 arcsec)^2, bands blue, green, red, NaN = no data.
            ``display``: uint8, R, G, B. Row 0 is the bottom of the picture. n may be 0.
        kind : str
            ``flux`` or ``display``.
        """
        ...


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


def doors(images: NDArray[Any], kind: str) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Return a batch as the two inputs of a network, flux and display, one of them without images."""
    shape = (0, *images.shape[1:])
    return (
        images if kind == "flux" else np.empty(shape, np.float32),
        images if kind == "display" else np.empty(shape, np.uint8),
    )
