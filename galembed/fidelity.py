"""How equal an engine is to torch, as numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from galembed.errors import EmbeddingDrift
from galembed.runtimes.protocol import Embedded, Runtime


@dataclass(frozen=True)
class Fidelity:
    """Agreement of an engine with torch float32 over a set of inputs.

    Attributes
    ----------
    images : int
    cosine_min, cosine_median : float
        Of centred vectors: raw cosines of a network crowd near 1 and hide damage.
    norm_error : float
        Largest relative difference of the norms.
    prediction_error : float
        Largest difference of a predicted vote fraction; of a predicted number, in units of the largest that torch
        gives. 0 without a head.
    """

    images: int
    cosine_min: float
    cosine_median: float
    norm_error: float
    prediction_error: float

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready form."""
        return asdict(self)


@dataclass(frozen=True)
class Tolerance:
    """What an engine may differ by."""

    cosine_min: float = 0.99999
    norm_error: float = 1e-3
    prediction_error: float = 1e-3

    def require(self, fidelity: Fidelity) -> None:
        """Check an engine.

        Raises
        ------
        EmbeddingDrift
            Naming every number that is out of bounds. NaN is.
        """
        faults = []
        if not fidelity.cosine_min >= self.cosine_min:
            faults.append(f"smallest cosine {fidelity.cosine_min:.6f} < {self.cosine_min}")
        if not fidelity.norm_error <= self.norm_error:
            faults.append(f"norm differs by {fidelity.norm_error:.2g} > {self.norm_error:g}")
        if not fidelity.prediction_error <= self.prediction_error:
            faults.append(f"a prediction differs by {fidelity.prediction_error:.2g} > {self.prediction_error:g}")
        if faults:
            raise EmbeddingDrift(
                f"the engine differs from torch over {fidelity.images} images: {'; '.join(faults)}. "
                "It was not installed; torch still runs this backbone (--runtime torch)"
            )


def measure(
    engine: Runtime,
    reference: Runtime,
    inputs: Mapping[str, NDArray[Any]],
    batch: int = 32,
    *,
    numbers: Sequence[bool] = (),
) -> Fidelity:
    """Compare an engine with torch.

    Parameters
    ----------
    engine, reference : Runtime
    inputs : mapping of str to ndarray
        Images by door, ``flux`` and ``display``.
    batch : int
    numbers : sequence of bool
        Which predicted columns are numbers rather than fractions; none unless given.

    Returns
    -------
    Fidelity
    """
    pairs = [
        (engine.embed(images[i : i + batch], kind), reference.embed(images[i : i + batch], kind))
        for kind, images in inputs.items()
        for i in range(0, len(images), batch)
    ]
    ours, theirs = (_join([pair[side] for pair in pairs]) for side in (0, 1))
    cosine = np.sum(ours.vectors.astype(np.float64) * theirs.vectors, axis=1)
    differences = np.abs(ours.predictions - theirs.predictions)
    if any(numbers):
        largest = np.abs(theirs.predictions).max(axis=0)
        differences /= np.where(np.asarray(numbers) & (largest > 0), largest, 1)
    return Fidelity(
        images=len(cosine),
        cosine_min=float(cosine.min()),
        cosine_median=float(np.median(cosine)),
        norm_error=float(np.max(np.abs(ours.norms - theirs.norms) / np.maximum(theirs.norms, 1e-12))),
        prediction_error=float(differences.max()) if differences.size else 0.0,
    )


def _join(parts: list[Embedded]) -> Embedded:
    return Embedded(
        np.concatenate([part.vectors for part in parts]),
        np.concatenate([part.norms for part in parts]),
        np.concatenate([part.predictions for part in parts]),
    )
