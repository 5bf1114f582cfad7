"""Counters on each worker's own `/metrics`, which Dask serves where `prometheus_client` is installed.

`galembed_sources_total{outcome="embedded"}`, `...{outcome="<reason>"}`, and
`galembed_seconds_total{stage="read"|"cut"|"wait"|"infer"|"write"}`; without that package nothing is counted.
"""

from __future__ import annotations

import functools
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from catalogue_jobs.partition import Timings


def count(embedded: int, failures: pa.Table, timings: Timings) -> None:
    """Add what became of a partition's sources to this process's counters."""
    counters = _counters()
    if counters is None:
        return
    sources, seconds = counters
    sources.labels("embedded").inc(embedded)
    for reason in failures["reason"].to_pylist():
        sources.labels(reason).inc()
    for stage, spent in asdict(timings).items():
        seconds.labels(stage).inc(spent)


@functools.cache
def _counters() -> tuple[Any, Any] | None:
    try:
        from prometheus_client import Counter
    except ModuleNotFoundError:
        return None
    return (
        Counter("galembed_sources", "Sources that this worker has settled.", ["outcome"]),
        Counter("galembed_seconds", "Seconds that this worker has spent.", ["stage"]),
    )
