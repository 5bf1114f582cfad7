"""The floor: the time that a network takes on a machine whatever runs it, from its work and the machine's speed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

_BYTES: Final = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}


@dataclass(frozen=True)
class Cost:
    """What embedding one image takes, as `galembed.runtimes.floor.network_cost` counts it.

    Attributes
    ----------
    flops : int
        Of matrix products, convolutions and attention.
    weights : int
        Numbers in the network.
    activations : tuple of int
        Numbers that each layer with weights gives.
    input_bytes, output_bytes : int
    """

    flops: int
    weights: int
    activations: tuple[int, ...]
    input_bytes: int
    output_bytes: int


@dataclass(frozen=True)
class Rates:
    """What a device does at best, as `galembed.runtimes.floor.device_rates` measures it.

    Attributes
    ----------
    matrix : mapping of str to float
        Operations/s of matrix products by numeric class.
    copy : float
        Bytes/s, read and written both counted.
    cache : int
        Bytes of the largest cache; 0 where unknown.
    """

    matrix: Mapping[str, float] = field(default_factory=dict)
    copy: float = 0.0
    cache: int = 0


def best_rates(measured: Iterable[Mapping[str, Any]]) -> Rates:
    """Return the best of several measurements of a device: what slows one down is no part of the floor."""
    rounds = [Rates(**one) for one in measured]
    classes = {name for one in rounds for name in one.matrix}
    return Rates(
        matrix={name: max(one.matrix.get(name, 0.0) for one in rounds) for name in _BYTES if name in classes},
        copy=max(one.copy for one in rounds),
        cache=rounds[0].cache,
    )


def floor_seconds(cost: Cost, rates: Rates, batch: int, numeric_class: str) -> float:
    """Return the least time of a batch, with computing and moving going on at the same time: the longer of the two.

    Computing: the batch's operations over the rate of matrix products in the numeric class, or in float32 where that
    is faster. Moving: `moved_bytes` over the rate of copying.
    """
    rate = max(rates.matrix.get(numeric_class, 0.0), rates.matrix["fp32"])
    return max(batch * cost.flops / rate, moved_bytes(cost, batch, numeric_class, rates.cache) / rates.copy)


def moved_bytes(cost: Cost, batch: int, numeric_class: str, cache: int) -> int:
    """Return the least bytes that pass between memory and processor for a batch.

    Counted: all weights, once, in the numeric class; the flux images in and the float32 results out, once; and of what
    each layer with weights gives (in the numeric class), the part that the cache cannot hold, written once and read
    once. Not counted: anything element-wise, taken for fused into the layer before it; the pixels' way from the disk;
    on a GPU, the way from the machine's memory to the GPU's. Where the cache's size is unknown, it is taken to hold
    everything.
    """
    size = _BYTES[numeric_class]
    spilt = sum(max(0, batch * numbers * size - cache) for numbers in cost.activations) if cache else 0
    return cost.weights * size + batch * (cost.input_bytes + cost.output_bytes) + 2 * spilt
