"""What `galembed bench` holds engines against: torch.compile, and the work and speed that no engine can get around."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from galembed.backbones import Backbone
from galembed.precision import layer_families
from galembed.runtimes.machine import cache_bytes
from galembed.runtimes.torch import TorchRuntime, load_network

_SIDES: Final = (256, 512, 1024, 2048, 4096, 8192)
_COPIED: Final = 2**28
_DTYPES: Final = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}


class CompiledRuntime(TorchRuntime):
    """Embeds with torch in float32 through ``torch.compile``; each size of batch is compiled by itself.

    Parameters
    ----------
    backbone : Backbone
    device : str
        ``cpu`` or ``cuda``.
    threads : int
        0 leaves it to torch.
    """

    def __init__(self, backbone: Backbone, *, device: str = "cpu", threads: int = 0) -> None:
        super().__init__(backbone, device=device, threads=threads)
        torch._dynamo.config.recompile_limit = 64  # beyond it, torch runs uncompiled and says nothing
        self._network.compile(dynamic=False)
        self.engine = self.engine.replace("torch-", "torch-compile-", 1)


def network_cost(backbone: Backbone) -> dict[str, Any]:
    """Return what embedding one flux image takes, whatever runs it; JSON-ready.

    ``flops``: of matrix products, convolutions and attention (`torch.utils.flop_counter`), a multiply and an add being
    two; element-wise work is not counted. ``weights``: how many there are. ``activations``: how many numbers each
    layer with weights gives, normalisations aside, which can be fused into it. ``input_bytes``, ``output_bytes``:
    of an image, and of its vector, norm and predictions.
    """
    network = load_network(backbone)
    given: list[int] = []
    for path, family in layer_families(network.encoder).items():
        if family != "norm":
            network.encoder.get_submodule(path).register_forward_hook(_counter(given))
    side = backbone.contract.size
    flux, display = torch.zeros(1, 3, side, side), torch.zeros(0, 3, side, side, dtype=torch.uint8)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        outputs = network(flux, display)
    return {
        "flops": counter.get_total_flops(),
        "weights": sum(parameter.numel() for parameter in network.parameters()),
        "activations": given,
        "input_bytes": flux.nbytes,
        "output_bytes": sum(output.nbytes for output in outputs),
    }


def _counter(given: list[int]) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
    return lambda _, inputs, output: given.append(output.numel())


def devices(threads: int) -> dict[str, str]:
    """Return the devices that torch sees, ``cpu`` and ``cuda``, with the GPU's name; have it use so many threads."""
    torch.set_num_threads(threads)
    return {"cpu": ""} | ({"cuda": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def device_rates(device: str, seconds: float) -> dict[str, Any]:
    """Measure what a device can do at best; JSON-ready.

    ``matrix``: operations/s of a large square matrix product by numeric class, without those that torch has not; in
    float32 a GPU may round the factors to TF32, as it does in convolutions. ``copy``: bytes/s of copying 256 MiB, read
    and written both counted. ``cache``: bytes of the largest cache, 0 where unknown.

    Parameters
    ----------
    device : str
        ``cpu`` or ``cuda``.
    seconds : float
        For each of the numbers, about.
    """
    torch.set_float32_matmul_precision("high" if device == "cuda" else "highest")
    matrix = {name: _matrix_rate(device, dtype, seconds) for name, dtype in _DTYPES.items()}
    cache = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else cache_bytes()
    return {
        "matrix": {name: rate for name, rate in matrix.items() if rate},
        "copy": _copy_rate(device, seconds),
        "cache": cache,
    }


def _matrix_rate(device: str, dtype: torch.dtype, seconds: float) -> float:
    """Return the best rate over growing matrices, as far as the time goes; 0 if torch cannot."""
    multiply = torch._int_mm if dtype == torch.int8 else torch.mm
    ends = time.perf_counter() + seconds
    best = 0.0
    for side in _SIDES:
        left, right = (torch.ones(side, side, device=device).to(dtype) for _ in range(2))
        try:
            taken = _least_seconds(lambda a=left, b=right: multiply(a, b), device)  # type: ignore[misc]
        except (RuntimeError, NotImplementedError):
            break
        best = max(best, 2 * side**3 / taken)
        if time.perf_counter() + 3 * 8 * taken > ends:
            break
    return best


def _copy_rate(device: str, seconds: float) -> float:
    source = torch.ones(_COPIED // 4, device=device)
    target = torch.empty_like(source)
    ends = time.perf_counter() + seconds
    taken = _least_seconds(lambda: target.copy_(source), device)
    while time.perf_counter() < ends:
        taken = min(taken, _least_seconds(lambda: target.copy_(source), device))
    return 2 * _COPIED / taken


def _least_seconds(call: Callable[[], object], device: str) -> float:
    """Return the least time of two calls after one."""
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


def device_peak() -> int:
    """Return the most bytes of a GPU's memory that torch has held in this process; 0 without a GPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
