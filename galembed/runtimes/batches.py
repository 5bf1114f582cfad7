"""How many images to give an engine at once: measured once on each machine, and remembered."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from galembed.backbones import Backbone, cache_folder
from galembed.runtimes.machine import cores, cpu_name, free_memory, gpu_name, peak_memory, resident_memory
from galembed.runtimes.protocol import Runtime

logger = logging.getLogger(__name__)

AUTO: Final = "auto"
"""The word that asks for the measured batch wherever a batch is given."""

LIMIT: Final = 256
"""Largest batch that is tried."""

_GAIN: Final = 1.03
"""A larger batch is worth its memory if images/s rise by more than this."""

_SECONDS: Final = 0.2
_SECONDS_IN_ALL: Final = 6.0


def best_batch(runtime: Runtime, backbone: Backbone, kind: str, *, limit: int = LIMIT, threads: int = 0) -> int:
    """Return the smallest batch with which an engine is about as fast as with any.

    Measured with `sweep` the first time, then read from ``batches.json`` in `galembed.backbones.cache_folder`. A
    damaged or unwritable file costs a new measurement and no more.

    Parameters
    ----------
    runtime : Runtime
    backbone : Backbone
        The runtime's.
    kind : str
        ``flux`` or ``display``.
    limit : int
        Largest batch that is tried.
    threads : int
        Of the engine, as it was opened with: part of what the answer holds for. 0 stands for all cores.

    Returns
    -------
    int
        A power of two; 1 to `limit`.
    """
    file = cache_folder() / "batches.json"
    name = _name(runtime, backbone, kind, limit, threads)
    known = _read(file).get(name)
    if isinstance(known, dict) and type(batch := known.get("batch")) is int and 1 <= batch <= limit:
        return batch
    rates = sweep(runtime, backbone, kind, limit=limit, threads=threads)
    batch = fastest(rates)
    logger.info("%s is fastest with batches of %d", runtime.engine, batch)
    _remember(file, name, {"batch": batch, "images_per_second": {str(size): rate for size, rate in rates.items()}})
    return batch


def sweep(runtime: Runtime, backbone: Backbone, kind: str, *, limit: int = LIMIT, threads: int = 0) -> dict[int, float]:
    """Return images/s of an engine by batch: 1, 2, 4 and so on, each the best of several calls after one to warm up.

    It ends at `limit`, when two sizes in a row have brought less than 3% and do so when all are measured again, when
    the next would be likely to take more than half of the free memory (with fewer threads than cores, of their part of
    it), when an engine refuses a size, and in any case after about 6 s: a size is not begun that could not be measured
    in that time.

    Parameters
    ----------
    runtime, backbone, kind, limit, threads
        As of `best_batch`.
    """
    ends = time.perf_counter() + _SECONDS_IN_ALL
    room = free_memory() // 2 * min(threads or cores(), cores()) // cores()
    before, highest = resident_memory(), peak_memory()
    rates: dict[int, float] = {}
    batch = 1
    while batch <= limit:
        try:
            rates[batch] = _rate(runtime, backbone, kind, batch)
        except Exception as error:  # a library that runs out of memory says so in its own way
            if not rates:
                raise
            logger.info("%s takes no batch of %d: %s", runtime.engine, batch, error)
            break
        seconds = batch / rates[batch]
        if _levelled(rates) and time.perf_counter() + len(rates) * (_SECONDS + seconds) < ends:
            # The machine may have been busy for a moment, or idle for one.
            rates = {size: max(rate, _rate(runtime, backbone, kind, size)) for size, rate in rates.items()}
        grown = 2 * (peak_memory() - before) if peak_memory() > highest else 0
        if _levelled(rates) or (room and grown > room) or time.perf_counter() + 6 * seconds > ends:
            break
        batch *= 2
    return rates


def fastest(rates: Mapping[int, float]) -> int:
    """Return the smallest batch whose rate is within 3% of the best."""
    best = max(rates.values())
    return min(batch for batch, rate in rates.items() if rate * _GAIN >= best)


def example_images(backbone: Backbone, kind: str, count: int) -> NDArray[Any]:
    """Return images of noise to measure on, all the same: the speed does not depend on what they show."""
    rng = np.random.default_rng(0)
    shape = (3, backbone.contract.size, backbone.contract.size)
    image = (
        rng.normal(0, 100, shape).astype(np.float32) if kind == "flux" else rng.integers(0, 256, shape, dtype=np.uint8)
    )
    return np.broadcast_to(image, (count, *shape)).copy()


def _rate(runtime: Runtime, backbone: Backbone, kind: str, batch: int) -> float:
    """Return the images/s of the fastest call: of at least two, for 0.2 s, after one that is not counted."""
    images = example_images(backbone, kind, batch)
    runtime.embed(images, kind)
    taken: list[float] = []
    while len(taken) < 2 or sum(taken) < _SECONDS:
        start = time.perf_counter()
        runtime.embed(images, kind)
        taken.append(time.perf_counter() - start)
    return batch / max(min(taken), 1e-9)


def _levelled(rates: Mapping[int, float]) -> bool:
    """Say whether the last two sizes brought nothing."""
    values = list(rates.values())
    return len(values) > 2 and max(values[-2:]) < _GAIN * max(values[:-2])


def _name(runtime: Runtime, backbone: Backbone, kind: str, limit: int, threads: int) -> str:
    device = cpu_name() if "-cpu-" in runtime.engine else gpu_name() or "unknown GPU"
    count = min(threads or cores(), cores())
    return " | ".join(
        (device, f"{count} of {cores()} cores", backbone.embedding_id[:16], runtime.engine, kind, f"up to {limit}")
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _remember(file: Path, name: str, measured: Mapping[str, Any]) -> None:
    """Add a measurement to the file, whole or not at all; of two writers at once, one may have to measure again."""
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        known = _read(file) | {name: dict(measured)}
        partial.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        partial.replace(file)
    except OSError as error:
        logger.warning("the best batch is not kept, and will be measured again: %s", error)
