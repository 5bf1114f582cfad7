"""Probes applied to a whole store, in batches: the store may be larger than memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from galembed.errors import ArtifactNotFound, BadRequest
from galembed.files import is_url
from galembed.labels import CLASSIFICATION, REGRESSION, VOTES
from galembed.probes.model import Probe, check_name
from galembed.store import Store, matrix
from galembed.store.places import file_system, join

FOLDER: Final = "probes"
"""Folder of a store that holds predictions: ``NAME-PROBEID.parquet``."""

PRIORS: Final = ("equal", "labels")

_BATCH: Final = 32_768
_ID_LETTERS: Final = 12
_READ: Final = ("survey", "source_id", "ra", "dec")

Prior = Literal["equal", "labels"]


def apply_probe(
    store: Store, probe: Probe, out: str | Path | None = None, *, prior: Prior = "equal", where: str | None = None
) -> tuple[int, str]:
    """Predict for every row of a store into a Parquet file, whole or not at all.

    Columns: `survey`, `source_id`, `ra`, `dec`, then `predicted` and `probability_<class>` (float32, summing to 1);
    `predicted` alone for numbers; or `fraction_<answer>` for votes. The schema's metadata names the probe by
    `galembed.probe_id`.

    Parameters
    ----------
    out : str or Path, optional
        File to write; unless given it lies in the store, named for the probe and its identity, where
        `stored_predictions` finds it. A probe fitted again does not overwrite what the one before gave.
    prior : str
        ``equal``: probabilities hold for classes that are equally common. ``labels``: for classes as common as among
        the labels, which is right where these were drawn at random from the store.
    where : str, optional
        Only these rows; as in `galembed.store.Store.similar`.

    Returns
    -------
    rows : int
    place : str

    Raises
    ------
    ArtifactMismatch
        If the store's vectors are of another backbone.
    BadRequest
        If the probe does not know how common its classes were, or `where` cannot be carried out.
    """
    probe.require_store(store)
    share = _prior(probe, prior)
    schema = _schema(store, probe, prior)
    place = str(out) if out is not None else join(store.path, FOLDER, _file_name(probe))
    if out is not None or not is_url(place):
        target = Path(place)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + ".partial")
        try:
            rows = _write(partial, store, probe, schema, share, where)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
        return rows, place
    with tempfile.TemporaryDirectory() as folder:
        partial = Path(folder) / "predictions.parquet"
        rows = _write(partial, store, probe, schema, share, where)
        system, path = file_system(place)
        system.put_file(str(partial), path)
    return rows, place


def predictions(
    store: Store, probe: Probe, share: NDArray[np.float64] | None = None, where: str | None = None
) -> Iterator[tuple[pa.RecordBatch, NDArray[np.float64]]]:
    """Yield the rows of a store, with their vectors, and what a probe predicts for them (`Probe.predict`)."""
    for batch in store.batches([*_READ, "vector"], where, batch_size=_BATCH):
        yield batch, probe.predict(matrix(batch.column("vector")), share)


def stored_predictions(store: Store, name: str) -> pa.Table:
    """Return what `apply_probe` left in a store: of several versions of a probe, the one written last.

    Sources that were embedded after it are not in it.

    Raises
    ------
    ArtifactNotFound
        If the probe was not applied there.
    """
    system, root = file_system(join(store.path, FOLDER))
    pattern = f"{root}/{check_name(name)}-{'[0-9a-f]' * _ID_LETTERS}.parquet"
    found = sorted(system.glob(pattern), key=system.modified)
    if not found:
        raise ArtifactNotFound(
            f"the store {store.path} holds no predictions of probe {name!r}; make them with `galembed probe apply`"
        )
    with system.open(found[-1], "rb") as stream:
        return pq.read_table(stream)


def _file_name(probe: Probe) -> str:
    return f"{check_name(probe.name)}-{probe.probe_id[:_ID_LETTERS]}.parquet"


def _prior(probe: Probe, prior: Prior) -> NDArray[np.float64] | None:
    if prior == "equal":
        return None
    if not probe.frequencies:
        raise BadRequest(
            f"probe {probe.name!r} does not know how common classes were among its labels"
            + ("; fit it again" if probe.kind == CLASSIFICATION else f": it predicts {probe.kind}")
        )
    return np.array(probe.frequencies)


def _write(
    file: Path, store: Store, probe: Probe, schema: pa.Schema, share: NDArray[np.float64] | None, where: str | None
) -> int:
    rows = 0
    classes = pa.array(probe.classes, pa.string())
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for batch, found in predictions(store, probe, share, where):
            arrays = [batch.column(name) for name in _READ]
            if probe.kind == CLASSIFICATION:
                arrays.append(classes.take(pa.array(found.argmax(axis=1))))
            arrays += [pa.array(column.astype(np.float32)) for column in found.T]
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
            rows += batch.num_rows
    return rows


def _schema(store: Store, probe: Probe, prior: Prior) -> pa.Schema:
    fields = [store.schema.field(name) for name in _READ]
    number = pa.float32()
    if probe.kind == REGRESSION:
        fields.append(pa.field("predicted", number, metadata={"unit": probe.unit} if probe.unit else None))
    elif probe.kind == VOTES:
        fields += [pa.field(f"fraction_{name}", number) for name in probe.classes]
    else:
        fields.append(pa.field("predicted", pa.string(), metadata={"doc": f"most probable class of {probe.column}"}))
        fields += [pa.field(f"probability_{name}", number) for name in probe.classes]
    facts = {"probe": probe.name, "probe_id": probe.probe_id, "embedding_id": probe.embedding_id, "prior": prior}
    return pa.schema(fields, metadata={f"galembed.{key}": value for key, value in facts.items()})
