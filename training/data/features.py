"""Features of a backbone's encoder, in eval mode and without augmentation, as `embed` computes them; kept on disk."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from galembed.backbones import Backbone, InputContract, cache_folder
from galembed.errors import GalembedError, UnreadableInput
from galembed.network import GalaxyNetwork
from galembed.progress import progress
from galembed.runtimes.torch import load_network
from galembed.schemas import SOURCES
from galembed.sources import SourceReader

_BATCH = 64
_KEY_BYTES = 16


@dataclass(frozen=True)
class Encoded:
    """What an encoder makes of images.

    Attributes
    ----------
    features : ndarray, shape (row, dim), float32
        As `GalaxyNetwork.features` returns them; NaN where an image cannot be read.
    places : ndarray, shape (row, 2), float64
        ICRS right ascension and declination, deg: the source's, or what the file says; NaN without either.
    unreadable : tuple of str
        Why images cannot be read.
    """

    features: NDArray[np.float32]
    places: NDArray[np.float64]
    unreadable: tuple[str, ...] = ()


class CutoutBatches(Dataset[tuple[Tensor, list[int], list[tuple[float, float]], list[str]]]):
    """Pixels of consecutive rows, those rows' numbers and places, and why others have none; for worker processes."""

    def __init__(self, reader: SourceReader, rows: pa.Table, contract: InputContract) -> None:
        self._reader, self._rows, self._contract = reader, rows, contract

    def __len__(self) -> int:
        return -(-len(self._rows) // _BATCH)

    def __getitem__(self, number: int) -> tuple[Tensor, list[int], list[tuple[float, float]], list[str]]:
        pixels, numbers, places, reasons = [], [], [], []
        for row, cutout in self._reader.cutouts(self._rows.slice(number * _BATCH, _BATCH), self._contract):
            if isinstance(cutout, GalembedError):
                reasons.append(str(cutout))
            else:
                numbers.append(number * _BATCH + row)
                pixels.append(torch.from_numpy(cutout.pixels))
                ra, dec = cutout.ra, cutout.dec
                places.append((math.nan, math.nan) if ra is None or dec is None else (ra, dec))
        return (torch.stack(pixels) if pixels else torch.empty(0)), numbers, places, reasons


def kept_features(backbone: Backbone, reader: SourceReader, rows: pa.Table, *, workers: int = 0) -> Encoded:
    """Return features, those of an earlier call from disk.

    They are kept in `galembed.backbones.cache_folder`, one file for a backbone and a way of reading, and in it by each
    source's own row: id, position, size, file and its version. An image that cannot be read is tried again next time.

    Parameters
    ----------
    backbone : Backbone
    reader : SourceReader
    rows : pa.Table
        Sources, one per row; see `galembed.schemas.SOURCES`.
    workers : int
        Processes that read images; 0 reads in this one.

    Raises
    ------
    UnreadableInput
        If no image can be read.
    """
    keys = _keys(rows)
    file = cache_folder() / "features" / f"{backbone.embedding_id[:16]}-{_reading(reader)}.safetensors"
    known = _read(file, backbone.dim)
    missing = np.array([key not in known for key in keys], bool)
    unreadable: tuple[str, ...] = ()
    if missing.any():
        network = load_network(backbone)
        new = encoder_features(network, reader, rows.filter(pa.array(missing)), backbone.contract, workers=workers)
        absent = (key for key, gone in zip(keys, missing, strict=True) if gone)
        found = zip(absent, new.features, new.places, strict=True)
        known |= {key: (row, place) for key, row, place in found if np.isfinite(row[0])}
        unreadable = new.unreadable
        _write(file, known)
    nothing = (np.full(backbone.dim, np.nan, np.float32), np.full(2, np.nan))
    features, places = zip(*(known.get(key, nothing) for key in keys), strict=True)
    if np.isnan([row[0] for row in features]).all():
        raise UnreadableInput(f"none of {len(rows)} images can be read; the first: {unreadable[0]}")
    return Encoded(np.stack(features), np.stack(places), unreadable)


@torch.inference_mode()
def encoder_features(
    network: GalaxyNetwork, reader: SourceReader, rows: pa.Table, contract: InputContract, *, workers: int = 0
) -> Encoded:
    """Return features of images as `embed` reads them; see `kept_features`.

    The network runs in eval mode, on a GPU where there is one, and is left on the CPU.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network.eval().to(device)
    order = pc.sort_indices(rows["source_uri"]).to_numpy()  # rows of one file are read together
    features = np.full((len(rows), network.dim), np.nan, np.float32)
    places = np.full((len(rows), 2), np.nan)
    unreadable: list[str] = []
    batches = CutoutBatches(reader, rows.take(pa.array(order)), contract)
    loader: DataLoader[Any] = DataLoader(batches, batch_size=None, num_workers=workers)
    with progress("features", len(order)) as advance:
        for pixels, numbers, found, reasons in loader:
            advance(len(numbers) + len(reasons))
            unreadable += reasons
            if numbers:
                encoded = network.features(network.channels(pixels.to(device), reader.kind))
                features[order[numbers]] = encoded.float().cpu().numpy()
                places[order[numbers]] = found
    network.cpu()
    return Encoded(features, places, tuple(unreadable))


def _keys(rows: pa.Table) -> list[bytes]:
    texts = (json.dumps(row, sort_keys=True, default=str) for row in rows.select(SOURCES.names).to_pylist())
    return [hashlib.sha256(text.encode()).digest()[:_KEY_BYTES] for text in texts]


def _reading(reader: SourceReader) -> str:
    """Return a digest of how sources are read."""
    facts = [reader.kind, reader.root, reader.crop, sorted(reader.bands.items()), reader.survey, reader.fov]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


_Known = dict[bytes, tuple[NDArray[np.float32], NDArray[np.float64]]]


def _read(file: Path, dim: int) -> _Known:
    """Return features and places by key; none where the file is absent or damaged, since all can be computed again."""
    try:
        arrays = load_file(file)
        keys, features, places = (arrays[name] for name in ("keys", "features", "places"))
    except (OSError, KeyError, SafetensorError):
        return {}
    if features.shape != (len(keys), dim) or places.shape != (len(keys), 2):
        return {}
    return {key.tobytes(): (row, place) for key, row, place in zip(keys, features, places, strict=True)}


def _write(file: Path, known: _Known) -> None:
    if not known:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    features, places = zip(*known.values(), strict=True)
    keys = np.frombuffer(b"".join(known), np.uint8).reshape(-1, _KEY_BYTES)
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    save_file({"keys": keys.copy(), "features": np.stack(features), "places": np.stack(places)}, partial)
    partial.replace(file)
