"""Small pictures with labels that can be seen in them, as one Parquet table."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

KINDS = ("blue", "green", "red")


def pictures(folder: Path, count: int = 60, *, side: int = 64, seed: int = 0, **columns: Any) -> Path:
    """Write round galaxies of a colour and a radius; `kind` and `radius` say which. `columns` are added."""
    rng = np.random.default_rng(seed)
    kind, radius = rng.integers(0, len(KINDS), count), rng.uniform(3, 9, count)
    kind[: 2 * len(KINDS)] = np.tile(np.arange(len(KINDS)), 2)
    table = {
        "image": [_png(k, r, side, rng) for k, r in zip(kind, radius, strict=True)],
        "id_str": [f"J{number:03d}" for number in range(count)],
        "kind": [KINDS[k] for k in kind],
        "radius": radius,
    }
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table | columns), folder / "pictures.parquet")
    return folder


def _png(kind: int, radius: float, side: int, rng: np.random.Generator) -> bytes:
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    light = np.exp(-np.hypot(x, y) / radius)[..., None] * np.where(np.arange(3) == 2 - kind, 220.0, 90.0)
    pixels: NDArray[np.uint8] = np.clip(light + rng.normal(15, 5, light.shape), 0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()
