"""A probe and its folder.

::

    probe/
        probe.json           embedding_id, kind, classes, how it was fitted and how well it did
        probe.safetensors    coefficients, and hashes of the sources it was fitted to
        labels.parquet       survey, source_id and label of those sources, to fit it again
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from galembed.errors import ArtifactMismatch, ArtifactNotFound, BadRequest
from galembed.labels import CLASSIFICATION, KINDS, REGRESSION, VOTES
from galembed.linear import log_softmax
from galembed.store import Store

PROBE_FORMAT: Final = 2
"""Format 1 kept no labels and knew classes alone; it is read still."""

_JSON: Final = "probe.json"
_PARTIAL: Final = "probe.json.partial"
_TENSORS: Final = "probe.safetensors"
_LABELS: Final = "labels.parquet"


@dataclass(frozen=True)
class Probe:
    """A fitted linear model over the vectors of one backbone.

    Attributes
    ----------
    name, column : str
        Its name, and the label column that it was fitted to; several for votes, separated by commas.
    embedding_id : str
        Identity of the backbone whose vectors it reads.
    classes : tuple of str
        Classes; or label columns, one for numbers, several for votes.
    weights : ndarray, shape (class, dim), float64
    intercept : ndarray, shape (class,), float64
    trained_on : ndarray of uint64
        Hashes of the keys it was fitted to, so that `evaluate_probe` can leave them out.
    provenance : mapping
        Regularisation, temperature, seed, score in cross-validation.
    kind : str
        ``classification``, ``regression`` or ``votes``.
    unit : str
        Of predicted numbers.
    frequencies : tuple of float
        Share of each class among the labels; empty for other kinds.
    labels : pa.Table, optional
        `survey`, `source_id` and `label` of what it was fitted to; None in a probe of format 1.
    """

    name: str
    column: str
    embedding_id: str
    classes: tuple[str, ...]
    weights: NDArray[np.float64] = field(repr=False)
    intercept: NDArray[np.float64] = field(repr=False)
    trained_on: NDArray[np.uint64] = field(repr=False)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    kind: str = CLASSIFICATION
    unit: str = ""
    frequencies: tuple[float, ...] = ()
    labels: pa.Table | None = field(default=None, repr=False, compare=False)

    @property
    def columns(self) -> tuple[str, ...]:
        """Label columns."""
        return self.classes if self.kind == VOTES else (self.column,)

    @property
    def probe_id(self) -> str:
        """SHA-256 over what its predictions follow from."""
        facts = [self.embedding_id, self.kind, *self.classes, self.unit, *map(repr, self.frequencies)]
        digest = hashlib.sha256("\x1f".join(facts).encode())
        for array in (self.weights, self.intercept):
            digest.update(np.ascontiguousarray(array, "<f8").tobytes())
        return digest.hexdigest()

    def outputs(self, vectors: NDArray[Any]) -> NDArray[np.float64]:
        """Return what the linear layer gives, shape (n, class): logits, or numbers."""
        return np.asarray(np.asarray(vectors, np.float64) @ self.weights.T + self.intercept)

    def predict(self, vectors: NDArray[Any], prior: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
        """Return probabilities of classes, fractions of votes, or numbers.

        Parameters
        ----------
        vectors : ndarray, shape (n, dim)
        prior : ndarray, shape (class,), optional
            Share of each class among the sources; classes count as equally common unless it is given.

        Returns
        -------
        ndarray, shape (n, class), float64
            Rows sum to 1 but for numbers.
        """
        outputs = self.outputs(vectors)
        if self.kind == REGRESSION:
            return outputs
        return np.exp(log_softmax(outputs if prior is None else outputs + np.log(prior)))

    def require_store(self, store: Store) -> None:
        """Check that a store's vectors are of the backbone that the probe was fitted on.

        Raises
        ------
        ArtifactMismatch
        """
        if store.contract.embedding_id != self.embedding_id:
            raise ArtifactMismatch(
                f"probe {self.name!r} was fitted on vectors of backbone {self.embedding_id[:12]}, the store "
                f"{store.path} holds those of {store.contract.embedding_id[:12]}; fit a probe on this store, or move "
                "this one to it with `galembed migrate`"
            )

    def require_labels(self) -> pa.Table:
        """Return the labels.

        Raises
        ------
        BadRequest
            If it keeps none, as probes of format 1 did.
        """
        if self.labels is None:
            raise BadRequest(
                f"probe {self.name!r} keeps no labels: it was fitted by an older galembed; fit it again from its table "
                "of labels with `galembed probe fit`"
            )
        return self.labels


def check_name(name: str) -> str:
    """Return the name of a probe, which is a part of file names.

    Raises
    ------
    BadRequest
        If it has other characters than letters, digits and ``_.+-``.
    """
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise BadRequest(f"{name!r} is no name for a probe: use letters, digits, and _ . + - after the first")
    return name


def plain_name(text: str) -> str:
    """Return a text as a name for a probe: what cannot be in one becomes ``_``."""
    return re.sub(r"[^\w.+-]|^\W", "_", text) or "probe"


def save_probe(probe: Probe, path: str | Path) -> Path:
    """Write a probe as a directory; an older probe there is replaced.

    Raises
    ------
    BadRequest
        If `path` is a file, or a directory that holds something else.
    """
    directory = Path(path)
    there = {file.name for file in directory.iterdir()} if directory.is_dir() else set()
    # One without its description is what a save that was stopped leaves.
    if directory.is_file() or (_JSON not in there and there - {_TENSORS, _LABELS, _PARTIAL}):
        raise BadRequest(f"{directory} exists and is not a probe; choose another --out")
    directory.mkdir(parents=True, exist_ok=True)
    description = {
        "format": PROBE_FORMAT,
        "name": probe.name,
        "kind": probe.kind,
        "column": probe.column,
        "unit": probe.unit,
        "embedding_id": probe.embedding_id,
        "probe_id": probe.probe_id,
        "classes": list(probe.classes),
        "frequencies": list(probe.frequencies),
        "provenance": dict(probe.provenance),
    }
    # The description goes last: it says by probe_id which coefficients belong to it.
    (directory / _JSON).unlink(missing_ok=True)
    (directory / _LABELS).unlink(missing_ok=True)
    if probe.labels is not None:
        pq.write_table(probe.labels, directory / _LABELS, compression="zstd")
    arrays = {"weights": probe.weights, "intercept": probe.intercept, "trained_on": probe.trained_on}
    save_file({key: np.ascontiguousarray(value) for key, value in arrays.items()}, directory / _TENSORS)
    partial = directory / _PARTIAL
    partial.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    partial.replace(directory / _JSON)
    return directory


def load_probe(path: str | Path) -> Probe:
    """Read what `save_probe` wrote.

    Raises
    ------
    ArtifactNotFound
        If there is no probe.
    ArtifactMismatch
        If it is damaged, or of another format.
    """
    directory = Path(path)
    if not all((directory / name).is_file() for name in (_JSON, _TENSORS)):
        raise ArtifactNotFound(f"no probe in {directory}; make one with `galembed probe fit`")
    try:
        data = json.loads((directory / _JSON).read_text(encoding="utf-8"))
        if data["format"] not in (1, PROBE_FORMAT):
            raise ArtifactMismatch(f"{directory}: probe format {data['format']}, this galembed reads {PROBE_FORMAT}")
        arrays = load_file(directory / _TENSORS)
        labels = directory / _LABELS
        probe = Probe(
            name=data["name"],
            column=data["column"],
            embedding_id=data["embedding_id"],
            classes=tuple(data["classes"]),
            weights=arrays["weights"],
            intercept=arrays["intercept"],
            trained_on=arrays["trained_on"],
            provenance=data["provenance"],
            kind=data.get("kind", CLASSIFICATION),
            unit=data.get("unit", ""),
            frequencies=tuple(data.get("frequencies", ())),
            labels=pq.read_table(labels) if data["format"] > 1 and labels.is_file() else None,
        )
    except (ValueError, KeyError, TypeError, OSError, SafetensorError, pa.ArrowException) as error:
        if isinstance(error, ArtifactMismatch):
            raise
        raise ArtifactMismatch(f"{directory} is a damaged probe ({error!r}); fit it again") from error
    if len(probe.classes) != len(probe.weights) or probe.kind not in KINDS:
        raise ArtifactMismatch(
            f"{directory} is a damaged probe: {len(probe.classes)} classes, {len(probe.weights)} rows of weights, "
            f"kind {probe.kind!r}; fit it again"
        )
    if data.get("probe_id", probe.probe_id) != probe.probe_id:
        raise ArtifactMismatch(f"{directory} is a damaged probe: its files are not of one fit; fit it again")
    return probe
