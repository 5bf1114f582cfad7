"""Measures every method of a backbone in turn, each in a process of its own, one working at a time."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from platform import platform, python_version
from statistics import median
from typing import Any, Final

from galembed import __version__
from galembed.backbones import Backbone
from galembed.bench.floors import Cost, best_rates
from galembed.bench.methods import COMPILED, Method, methods
from galembed.bench.process import CannotRun, Process, started
from galembed.bench.report import BenchReport, Row, floor_rate
from galembed.errors import BadRequest
from galembed.runtimes.batches import AUTO
from galembed.runtimes.machine import cores, cpu_name, gpu_name

logger = logging.getLogger(__name__)

_LIBRARIES: Final = ("torch", "timm", "onnxruntime", "onnxruntime-gpu", "tensorrt", "numpy")


@dataclass
class _Runner:
    """A method's living process and what has been measured of it, by batch."""

    method: Method
    process: Process
    loaded: float = 0.0
    auto: int = 0
    rates: dict[int, list[float]] = field(default_factory=dict)
    warm: dict[int, dict[str, Any]] = field(default_factory=dict)
    faults: dict[int, str] = field(default_factory=dict)


def bench(
    backbone: Backbone,
    *,
    batches: Sequence[int | str] = (1, 8, 32),
    threads: int = 0,
    seconds: float = 1.0,
    rounds: int = 5,
    only: Sequence[str] = (),
    tell: Callable[[str], object] = logger.info,
) -> BenchReport:
    """Measure how fast every engine and runtime of a backbone is here, beside torch and beside the floor.

    Each method has a fresh process that lives over all rounds. In each round every method embeds each size of batch
    in turn, so that what else the machine does falls on all alike; in each round the machine's own speed is measured
    too. Images go in as flux and come out as float32 vectors, as `galembed embed` has them, without reading or
    writing files.

    Parameters
    ----------
    backbone : Backbone
    batches : sequence of int or str
        Images per call; ``auto`` is what `galembed.runtimes.batches.best_batch` chooses for each method.
    threads : int
        Of every method; 0 for all cores.
    seconds : float
        Of each measurement.
    rounds : int
    only : sequence of str
        Beginnings of the names of methods; all methods unless given.
    tell : callable
        Is called with a line on what is being done.

    Raises
    ------
    BadRequest
        If a number makes no sense, no method's name begins as asked, or not even torch runs the backbone here.
    """
    _check(batches, threads, seconds, rounds)
    threads = threads or cores()
    chosen = methods(backbone, only)
    with contextlib.ExitStack() as stack:
        speed = stack.enter_context(started(threads))
        facts = speed.ask("cost", backbone=str(backbone.path), threads=threads)
        gpu = facts["devices"].get("cuda", "") or gpu_name()
        runners: list[_Runner] = []
        idle: list[Row] = []
        for method in chosen:
            try:
                tell(f"loading {method.name}")
                runners.append(stack.enter_context(_running(backbone, method, batches, threads, gpu)))
            except CannotRun as fault:
                idle.append(Row(method, 0, reason=str(fault)))
        measured = _rounds(runners, speed, facts["devices"], seconds, rounds, tell)
    cost = Cost(**facts["cost"] | {"activations": tuple(facts["cost"]["activations"])})
    rates = {device: best_rates(found) for device, found in measured.items()}
    reference = {runner.method.name: runner.rates for runner in runners}
    rows = [row for runner in runners for row in _rows(runner, reference)]
    return BenchReport(
        backbone={
            "name": backbone.name,
            "architecture": backbone.architecture,
            "embedding_id": backbone.embedding_id,
            "pixels": str(backbone.contract.size),
        },
        machine={"cpu": cpu_name(), "cores": str(cores()), "gpu": gpu, "system": platform()},
        versions=_versions(),
        threads=threads,
        seconds=seconds,
        rounds=rounds,
        cost=cost,
        speed=rates,
        rows=(*(replace(row, floor=floor_rate(cost, rates, row.method, row.batch)) for row in rows), *idle),
        made=datetime.now(UTC).isoformat(timespec="seconds"),
    )


@contextlib.contextmanager
def _running(
    backbone: Backbone, method: Method, batches: Sequence[int | str], threads: int, gpu: str
) -> Iterator[_Runner]:
    """Yield a method's process, loaded and warm for each size of batch.

    Raises
    ------
    CannotRun
        If it cannot be opened here.
    """
    if method.fault:
        raise CannotRun(method.fault)
    if method.device == "cuda" and not gpu:
        raise CannotRun("this machine has no NVIDIA GPU")
    auto = _best(backbone, method, threads) if AUTO in batches else 0
    with started(threads) as process:
        runner = _Runner(method, process, _open(process, backbone, method.runtime, method.engine, threads), auto)
        for batch in sorted({int(batch) for batch in batches if batch != AUTO} | ({auto} if auto else set())):
            try:
                runner.warm[batch] = process.ask("warm", batch=batch)
                runner.rates[batch] = []
            except CannotRun as fault:
                runner.faults[batch] = str(fault)
        yield runner


def _open(process: Process, backbone: Backbone, runtime: str, engine: str, threads: int) -> float:
    opened = process.ask("open", backbone=str(backbone.path), runtime=runtime, engine=engine, threads=threads)
    return float(opened["seconds"])


def _best(backbone: Backbone, method: Method, threads: int) -> int:
    """Return a method's best batch, found in another process, whose larger batches are not in the method's memory.

    To compile each size that is tried would take minutes: compiled torch gets the batch of torch as it is.
    """
    with started(threads) as process:
        _open(process, backbone, method.runtime.replace(COMPILED, "torch"), method.engine, threads)
        return int(process.ask("best")["batch"])


def _rounds(
    runners: list[_Runner],
    speed: Process,
    devices: Sequence[str],
    seconds: float,
    rounds: int,
    tell: Callable[[str], object],
) -> dict[str, list[dict[str, Any]]]:
    """Measure all that runs in turn, each round beginning with another; return the devices' speeds by round."""
    found: dict[str, list[dict[str, Any]]] = {device: [] for device in devices}
    sizes = sorted({batch for runner in runners for batch in runner.rates})
    for number in range(rounds):
        tell(f"round {number + 1} of {rounds}")
        for device in devices:
            found[device].append(speed.ask("rates", device=device, seconds=seconds))
        first = number % max(1, len(runners))
        for batch in sizes:
            for runner in (*runners[first:], *runners[:first]):
                _measure(runner, batch, seconds)
    return found


def _measure(runner: _Runner, batch: int, seconds: float) -> None:
    if batch not in runner.rates or batch in runner.faults:
        return
    try:
        done = runner.process.ask("measure", batch=batch, seconds=seconds)
        runner.rates[batch].append(done["images"] / done["seconds"])
    except CannotRun as fault:
        runner.faults[batch] = str(fault)


def _rows(runner: _Runner, reference: dict[str, dict[int, list[float]]]) -> list[Row]:
    """Return a method's rows by batch; `reference` is every method's rates by name and batch."""
    rows = []
    for batch in sorted({*runner.rates, *runner.faults}):
        own, theirs = runner.rates.get(batch, []), reference.get(runner.method.reference, {}).get(batch, [])
        row = Row(runner.method, batch, auto=batch == runner.auto, reason=runner.faults.get(batch, ""))
        if not row.reason:
            warm = runner.warm[batch]
            row = replace(
                row,
                rates=tuple(own),
                faster=median(a / b for a, b in zip(own, theirs, strict=True)) if len(own) == len(theirs) else 0.0,
                ready_seconds=runner.loaded + warm["seconds"],
                memory=warm["memory"],
                device_memory=warm["device_memory"],
            )
        rows.append(row)
    return rows


def _versions() -> dict[str, str]:
    found = {"galembed": __version__, "python": python_version()}
    for name in _LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _check(batches: Sequence[int | str], threads: int, seconds: float, rounds: int) -> None:
    wrong = [batch for batch in batches if batch != AUTO and (not isinstance(batch, int) or batch < 1)]
    if wrong or not batches:
        raise BadRequest(f"a batch is a number of at least 1, or {AUTO}; got {wrong[0]!r}" if wrong else "no batch")
    if threads < 0 or rounds < 1 or not seconds > 0:
        raise BadRequest(
            f"threads must be at least 0, rounds at least 1 and seconds above 0; got {threads}, {rounds}, {seconds:g}"
        )
