"""How equal an engine is to torch, as numbers: over sources to search for, among a gallery to find them in."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from galembed.errors import EmbeddingDrift
from galembed.runtimes.protocol import Embedded, Runtime

NEIGHBOURS: Final = 10
"""Nearest neighbours whose overlap is measured."""

_FEWEST_TO_SEARCH: Final = 100
_CLASSES: Final = 8
_STRENGTH: Final = 0.1


@dataclass(frozen=True)
class Fidelity:
    """Agreement of an engine with torch float32. NaN is what could not be measured; 99% is over images.

    Attributes
    ----------
    images, gallery : int
        Compared, and searched among.
    cosine_p1, cosine_median, cosine_min : float
        1st percentile, median and smallest cosine of an image's two vectors, after the mean of torch's is subtracted
        from both: what images have in common hides damage.
    norm_error : float
        99% of the norms differ by no more than this fraction.
    prediction_error : float
        99% of the images differ by no more than this in any predicted vote fraction; in a predicted number, in units of
        the largest that torch gives. 0 without a head.
    overlap : float
        Share of the 10 nearest neighbours in the gallery that both agree on; NaN without a gallery.
    probe_accuracy, probe_drop : float
        Accuracy on the images of a linear classifier fitted to torch's vectors of the gallery, and how much lower it is
        with the engine's. The classes are 8 clusters of torch's vectors.
    """

    images: int
    gallery: int = 0
    cosine_p1: float = math.nan
    cosine_median: float = math.nan
    cosine_min: float = math.nan
    norm_error: float = math.nan
    prediction_error: float = math.nan
    overlap: float = math.nan
    probe_accuracy: float = math.nan
    probe_drop: float = math.nan

    @property
    def closeness(self) -> float:
        """The median cosine, by which few images compare engines well; -1 for one that gives NaN."""
        return -1.0 if math.isnan(self.cosine_p1) else self.cosine_median

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready form, in which None is what could not be measured."""
        return {
            key: None if isinstance(value, float) and math.isnan(value) else value
            for key, value in asdict(self).items()
        }

    def __str__(self) -> str:
        parts = [f"cosine {self.cosine_p1:.6f} (1st percentile), {self.cosine_median:.6f} (median)"]
        if not math.isnan(self.overlap):
            parts.append(f"{self.overlap:.1%} of the {NEIGHBOURS} nearest of {self.gallery:,} in common")
        parts.append(f"norms within {self.norm_error:.2g}, predictions within {self.prediction_error:.2g}")
        if not math.isnan(self.probe_drop):
            parts.append(
                f"probe accuracy {self.probe_accuracy - self.probe_drop:.3f} (torch {self.probe_accuracy:.3f})"
            )
        return f"over {self.images:,} images: {'; '.join(parts)}"


@dataclass(frozen=True)
class Tolerance:
    """What an engine may differ by; the meaning of each number is that of `Fidelity`."""

    cosine_p1: float = 0.99999
    overlap: float = 0.99
    norm_error: float = 1e-3
    prediction_error: float = 1e-3
    probe_drop: float = 0.005

    def faults(self, fidelity: Fidelity) -> list[str]:
        """Return every number that is out of bounds; what could not be measured is not, NaN in the vectors is."""
        found = []
        if not fidelity.cosine_p1 >= self.cosine_p1:
            found.append(f"cosine {fidelity.cosine_p1:.6f} < {self.cosine_p1:g} (1st percentile)")
        if fidelity.overlap < self.overlap:
            found.append(f"overlap of neighbours {fidelity.overlap:.4f} < {self.overlap:g}")
        if not fidelity.norm_error <= self.norm_error:
            found.append(f"norms differ by {fidelity.norm_error:.2g} > {self.norm_error:g}")
        if not fidelity.prediction_error <= self.prediction_error:
            found.append(f"predictions differ by {fidelity.prediction_error:.2g} > {self.prediction_error:g}")
        if fidelity.probe_drop > self.probe_drop:
            found.append(f"probe accuracy drops by {fidelity.probe_drop:.3f} > {self.probe_drop:g}")
        return found

    def require(self, fidelity: Fidelity) -> None:
        """Check an engine.

        Raises
        ------
        EmbeddingDrift
            Naming every number that is out of bounds.
        """
        if self.faults(fidelity):
            raise EmbeddingDrift(self.refusal(fidelity))

    def refusal(self, fidelity: Fidelity, name: str = "the engine") -> str:
        """Return why an engine is not installed, in words, with every number that is out of bounds."""
        return (
            f"{name} differs from torch over {fidelity.images:,} images: {'; '.join(self.faults(fidelity))}. "
            "It was not installed; torch still runs this backbone (--runtime torch)"
        )


TOLERANCES: Final = {
    "fp32": Tolerance(),
    "fp16": Tolerance(0.999, 0.98, 0.02, 0.02, 0.01),
    "bf16": Tolerance(0.999, 0.98, 0.02, 0.02, 0.01),
    "int8": Tolerance(0.99, 0.93, 0.1, 0.1, 0.02),
}
"""By numeric class."""


@dataclass(frozen=True)
class Trial:
    """Images to compare on, and what torch in float32 makes of them.

    Attributes
    ----------
    images, gallery : mapping of str to ndarray
        By door, as `galembed.runtimes.protocol.Runtime.embed` takes them; the gallery may be empty.
    truth, gallery_truth : Embedded
        Torch's answers, doors in the mappings' order.
    numbers : tuple of bool
        Which predicted columns are numbers rather than fractions.
    """

    images: Mapping[str, NDArray[Any]]
    truth: Embedded
    gallery: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    gallery_truth: Embedded | None = None
    numbers: tuple[bool, ...] = ()

    def part(self, images: int, gallery: int) -> Trial:
        """Return a smaller trial: the first images of each door and the first of the gallery."""
        rows = _first(self.images, images)
        gallery_rows = _first(self.gallery, gallery)
        return Trial(
            {kind: array[:images] for kind, array in self.images.items()},
            _taken(self.truth, rows),
            {kind: array[:gallery] for kind, array in self.gallery.items()},
            None if self.gallery_truth is None else _taken(self.gallery_truth, gallery_rows),
            self.numbers,
        )


def make_trial(
    reference: Runtime,
    images: Mapping[str, NDArray[Any]],
    gallery: Mapping[str, NDArray[Any]] | None = None,
    *,
    numbers: Sequence[bool] = (),
    advance: Callable[[int], object] = lambda count: None,
) -> Trial:
    """Have torch embed what engines are to be compared on; see `Trial`.

    Parameters
    ----------
    reference : Runtime
        Torch, in float32 on the CPU.
    advance : callable
        Told the number of images that were embedded, batch by batch.
    """
    truth = embed_all(reference, images, advance)
    gallery_truth = embed_all(reference, gallery, advance) if gallery else None
    return Trial(images, truth, gallery or {}, gallery_truth, tuple(numbers))


def compare(engine: Runtime, trial: Trial, advance: Callable[[int], object] = lambda count: None) -> Fidelity:
    """Compare an engine with torch over a trial."""
    ours, theirs = embed_all(engine, trial.images, advance), trial.truth
    cosine = centred_cosine(ours, theirs)
    differences = np.abs(ours.predictions - theirs.predictions)
    if any(trial.numbers):
        largest = np.abs(theirs.predictions).max(axis=0)
        differences /= np.where(np.asarray(trial.numbers) & (largest > 0), largest, 1)
    norms = np.abs(ours.norms - theirs.norms) / np.maximum(theirs.norms, 1e-12)
    found = Fidelity(
        images=len(cosine),
        cosine_p1=float(np.percentile(cosine, 1)),
        cosine_median=float(np.median(cosine)),
        cosine_min=float(cosine.min()),
        norm_error=float(np.percentile(norms, 99)),
        prediction_error=float(np.percentile(differences.max(axis=1), 99)) if differences.size else 0.0,
    )
    if trial.gallery_truth is None or len(trial.gallery_truth.vectors) < _FEWEST_TO_SEARCH or math.isnan(cosine.min()):
        return found
    gallery = embed_all(engine, trial.gallery, advance)
    if not (np.isfinite(gallery.vectors).all() and np.isfinite(gallery.norms).all()):
        return replace(found, gallery=len(gallery.vectors), cosine_p1=math.nan, overlap=0.0)
    accuracy, drop = _probed(ours, gallery, trial)
    return replace(
        found,
        gallery=len(gallery.vectors),
        overlap=_overlap(ours.vectors, gallery.vectors, theirs.vectors, trial.gallery_truth.vectors),
        probe_accuracy=accuracy,
        probe_drop=drop,
    )


def measure(
    engine: Runtime, reference: Runtime, inputs: Mapping[str, NDArray[Any]], *, numbers: Sequence[bool] = ()
) -> Fidelity:
    """Compare an engine with torch over images by door, without a gallery."""
    return compare(engine, make_trial(reference, inputs, numbers=numbers))


def embed_all(
    runtime: Runtime,
    images: Mapping[str, NDArray[Any]],
    advance: Callable[[int], object] = lambda count: None,
    batch: int = 32,
) -> Embedded:
    """Embed the images of each door, one door after another."""
    parts = []
    for kind, array in images.items():
        for start in range(0, len(array), batch):
            parts.append(runtime.embed(np.ascontiguousarray(array[start : start + batch]), kind))
            advance(len(parts[-1].norms))
    return Embedded(
        np.concatenate([part.vectors for part in parts]),
        np.concatenate([part.norms for part in parts]),
        np.concatenate([part.predictions for part in parts]),
    )


def centred_cosine(ours: Embedded, theirs: Embedded) -> NDArray[np.float64]:
    """Return the cosine of each pair of vectors about the mean of `theirs`, shape (n,).

    A backbone's vectors are centred on its training set; what is compared may lie far from there, all to one side.
    A single image, which is its own mean, is compared as it is.
    """
    full, true = (one.vectors.astype(np.float64) * one.norms[:, None] for one in (ours, theirs))
    centre = true.mean(axis=0) if len(true) > 1 else 0.0
    full, true = full - centre, true - centre
    lengths = np.linalg.norm(full, axis=1) * np.linalg.norm(true, axis=1)
    return np.asarray(np.sum(full * true, axis=1) / np.maximum(lengths, 1e-30))


def _overlap(
    ours: NDArray[np.float32],
    our_gallery: NDArray[np.float32],
    theirs: NDArray[np.float32],
    their_gallery: NDArray[np.float32],
) -> float:
    k = min(NEIGHBOURS, len(our_gallery) - 1)
    mine, true = (
        np.argpartition(-(queries @ gallery.T), k, axis=1)[:, :k]
        for queries, gallery in ((ours, our_gallery), (theirs, their_gallery))
    )
    return float(np.mean([len(np.intersect1d(*pair)) for pair in zip(mine, true, strict=True)]) / k)


def _probed(ours: Embedded, gallery: Embedded, trial: Trial) -> tuple[float, float]:
    """Return the accuracy of a probe on torch's vectors, and how much lower it is on the engine's."""
    from galembed.linear import fit_logistic

    assert trial.gallery_truth is not None
    learnt, asked = _clusters(trial.gallery_truth.vectors, trial.truth.vectors)
    if len(np.unique(learnt)) < 2:
        return math.nan, math.nan
    true, mine = (
        float((fit_logistic(taught.vectors, learnt, _STRENGTH).predict(one.vectors) == asked).mean())
        for taught, one in ((trial.gallery_truth, trial.truth), (gallery, ours))
    )
    return true, true - mine


def _clusters(gallery: NDArray[np.float32], images: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[Any]]:
    from sklearn.cluster import KMeans

    model = KMeans(_CLASSES, n_init=3, random_state=0).fit(gallery)
    return model.labels_, model.predict(images)


def _first(images: Mapping[str, NDArray[Any]], count: int) -> NDArray[np.intp]:
    """Return the rows, in the order of `embed_all`, of the first images of each door."""
    starts = np.cumsum([0, *(len(array) for array in images.values())])
    rows = [start + np.arange(min(count, len(array))) for start, array in zip(starts, images.values(), strict=False)]
    return np.concatenate([np.empty(0, np.intp), *rows]).astype(np.intp)


def _taken(embedded: Embedded, rows: NDArray[np.intp]) -> Embedded:
    return Embedded(embedded.vectors[rows], embedded.norms[rows], embedded.predictions[rows])
