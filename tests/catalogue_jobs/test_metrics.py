"""What a worker tells Prometheus."""

from __future__ import annotations

import urllib.request

import pytest
from distributed import Client, LocalCluster

from catalogue_jobs.metrics import count
from catalogue_jobs.partition import Timings, failure_rows
from galembed.errors import NoData
from tests.catalogue_jobs.fakes import source_table

pytest.importorskip("prometheus_client")


def test_a_worker_serves_its_counts_beside_dasks_own() -> None:
    failures = failure_rows(source_table(3), [(1, "cut", NoData("g1 has no data"))], "p")
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        client.submit(count, 2, failures, Timings(read=1.5, infer=3.0), pure=False).result()
        port = next(iter(cluster.workers.values())).http_server.port
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            text = answer.read().decode()
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("galembed_"))
    assert float(lines['galembed_sources_total{outcome="embedded"}']) >= 2
    assert float(lines['galembed_sources_total{outcome="no_data"}']) >= 1
    assert float(lines['galembed_seconds_total{stage="infer"}']) >= 3
    assert "dask_worker_" in text
