"""The process that one method runs in: reads a request a line, does it, answers a line. JSON both ways.

It starts with nothing loaded, so that the memory, the threads and the settings of one library are not another's.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from galembed.backbones import Backbone, load_backbone
from galembed.engines import read_engine
from galembed.errors import GalembedError
from galembed.runtimes.batches import best_batch, example_images
from galembed.runtimes.machine import peak_memory
from galembed.runtimes.protocol import Runtime

KIND = "flux"
"""The door that is measured, whose images are four times as many bytes as the other's."""


class Worker:
    """What can be asked of the process; each method's arguments are a request, its result the answer."""

    backbone: Backbone
    runtime: Runtime
    name: str
    threads: int

    def open(self, backbone: str, runtime: str, engine: str, threads: int) -> dict[str, Any]:
        """Load a backbone's engine; see `galembed.bench.methods.Method`."""
        start = time.perf_counter()
        self.backbone, self.name, self.threads = load_backbone(backbone), runtime, threads
        self.runtime = open_method(self.backbone, runtime, engine, threads)
        return {"engine": self.runtime.engine, "seconds": time.perf_counter() - start}

    def warm(self, batch: int) -> dict[str, Any]:
        """Embed a batch twice, uncounted; return how long the first took and the most memory held until now."""
        images = example_images(self.backbone, KIND, batch)
        start = time.perf_counter()
        self.runtime.embed(images, KIND)
        first = time.perf_counter() - start
        self.runtime.embed(images, KIND)
        device = 0
        if self.name.startswith("torch") and self.name.endswith("cuda"):
            from galembed.runtimes.floor import device_peak

            device = device_peak()
        return {"seconds": first, "memory": peak_memory(), "device_memory": device}

    def measure(self, batch: int, seconds: float) -> dict[str, Any]:
        """Embed a batch again and again for some seconds, at least twice; return how many images in what time."""
        images = example_images(self.backbone, KIND, batch)
        calls = 0
        start = time.perf_counter()
        while calls < 2 or time.perf_counter() - start < seconds:
            self.runtime.embed(images, KIND)
            calls += 1
        return {"images": calls * batch, "seconds": time.perf_counter() - start}

    def best(self) -> dict[str, Any]:
        """Return the batch that `galembed embed --batch auto` would take."""
        return {"batch": best_batch(self.runtime, self.backbone, KIND, threads=self.threads)}

    def cost(self, backbone: str, threads: int) -> dict[str, Any]:
        """Return what an image costs whatever runs it, and torch's devices; no engine is loaded for it."""
        from galembed.runtimes.floor import devices, network_cost

        return {"devices": devices(threads), "cost": network_cost(load_backbone(backbone))}

    def rates(self, device: str, seconds: float) -> dict[str, Any]:
        """Measure what a device can do at best."""
        from galembed.runtimes.floor import device_rates

        return device_rates(device, seconds)


def open_method(backbone: Backbone, runtime: str, engine: str, threads: int) -> Runtime:
    """Load a backbone's engine as `galembed.bench.methods.Method` names it; only its own library is imported."""
    library, _, device = runtime.rpartition("-")
    record = read_engine(backbone.engines / f"{engine}.json") if engine else None
    if library == "torch-compile":
        from galembed.runtimes.floor import CompiledRuntime

        return CompiledRuntime(backbone, device=device, threads=threads)
    if library == "torch":
        from galembed.runtimes.torch import TorchRuntime

        return TorchRuntime(backbone, device=device, record=record, threads=threads)
    assert record is not None
    if library == "onnxruntime":
        from galembed.runtimes.onnx import OnnxRuntime

        return OnnxRuntime(backbone, record, device=device, threads=threads)
    from galembed.runtimes.tensorrt import TensorRTRuntime

    return TensorRTRuntime(backbone, record)


def answer(worker: Worker, request: dict[str, Any]) -> dict[str, Any]:
    """Do what is asked, or say in ``fault`` why it cannot be done."""
    try:
        done: dict[str, Any] = getattr(worker, request.pop("do"))(**request)
    except GalembedError as error:
        return {"fault": str(error)}
    except Exception as error:  # whatever a library thinks of this machine is a row of the report
        return {"fault": f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), 'no message')}"}
    return done


def main() -> None:
    """Answer until there are no more requests."""
    # What a library prints must not be taken for an answer.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    worker = Worker()
    for line in sys.stdin:
        answers.write(json.dumps(answer(worker, json.loads(line))) + "\n")


if __name__ == "__main__":
    main()
