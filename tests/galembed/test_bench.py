"""The benchmark: what is measured, in which order, against which floor, and how it is told."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from torch import nn

from galembed.backbones import Backbone, load_backbone
from galembed.bench import run
from galembed.bench.floors import Cost, Rates, best_rates, floor_seconds, moved_bytes
from galembed.bench.methods import Method, methods
from galembed.bench.pages import report_figure, report_page, report_text, write_report
from galembed.bench.process import CannotRun, started
from galembed.bench.report import BenchReport, Row
from galembed.bench.worker import Worker, answer
from galembed.cli import main
from galembed.engines import EngineRecord
from galembed.engines import write_report as write_engine_report
from galembed.errors import BadRequest
from galembed.precision import layer_families
from galembed.runtimes.floor import network_cost
from galembed.runtimes.machine import cache_bytes, cores, cpu_name, free_memory, peak_memory, resident_memory
from galembed.runtimes.torch import load_network

COST = Cost(flops=1000, weights=50, activations=(10, 400), input_bytes=48, output_bytes=12)


def record(backbone: Backbone, name: str, **facts: Any) -> EngineRecord:
    engine_format, numeric_class = name.split("-")[:2]
    return replace(
        EngineRecord(
            name=name,
            format=engine_format,
            numeric_class=numeric_class,
            file="" if engine_format == "torch" else f"{name}.{engine_format}",
            sha256="0" * 64,
            embedding_id=backbone.embedding_id,
            head_id=backbone.head_id,
            status="verified",
        ),
        **facts,
    )


@pytest.fixture
def with_reports(tiny_backbone: Backbone, tmp_path: Path) -> Backbone:
    """A backbone with an engine's report for each kind of engine, and no engine."""
    backbone = load_backbone(shutil.copytree(tiny_backbone.path, tmp_path / "tiny"))
    backbone.engines.mkdir()
    for name in ("onnx-int8", "tensorrt-fp16-sm86", "tensorrt-fp16-sm90", "torch-bf16"):
        write_engine_report(record(backbone, name), backbone.engines)
    write_engine_report(record(backbone, "onnx-fp16", status="refused"), backbone.engines)
    (backbone.engines / "onnx-fp32.json").write_text("{")
    return backbone


def test_every_engine_is_listed_with_every_runtime_that_takes_it(with_reports: Backbone) -> None:
    found = {method.name: method for method in methods(with_reports)}
    assert sorted(found) == [
        *("onnxruntime-cpu fp16", "onnxruntime-cpu fp32", "onnxruntime-cpu int8"),
        *("onnxruntime-cuda fp16", "onnxruntime-cuda fp32", "onnxruntime-cuda int8"),
        *("tensorrt fp16-sm86", "tensorrt fp16-sm90"),
        *("torch-compile-cpu fp32", "torch-compile-cuda fp32"),
        *("torch-cpu bf16", "torch-cpu fp32", "torch-cuda bf16", "torch-cuda fp32"),
    ]
    assert "onnx-fp32.json is damaged" in found["onnxruntime-cpu fp32"].fault
    assert "found to differ from torch" in found["onnxruntime-cpu fp16"].fault
    assert not found["onnxruntime-cpu int8"].fault
    assert {method.device for name, method in found.items() if "cpu" not in name} == {"cuda"}


def test_methods_are_chosen_by_how_their_names_begin(with_reports: Backbone) -> None:
    assert [m.name for m in methods(with_reports, ["torch-cpu", "tensorrt fp16-sm9"])] == [
        *("torch-cpu fp32", "tensorrt fp16-sm90", "torch-cpu bf16")
    ]
    with pytest.raises(BadRequest, match="no method begins with 'jax'; there are torch-cpu fp32"):
        methods(with_reports, ["jax"])


def test_the_floor_is_the_longer_of_computing_and_moving() -> None:
    rates = Rates(matrix={"fp32": 1e4, "int8": 4e4, "fp16": 1e3}, copy=1e6)
    assert floor_seconds(COST, rates, 8, "fp32") == pytest.approx(8 * 1000 / 1e4)
    assert floor_seconds(COST, rates, 8, "int8") == pytest.approx(8 * 1000 / 4e4)
    assert floor_seconds(COST, rates, 8, "fp16") == pytest.approx(8 * 1000 / 1e4)  # float32 is faster here
    assert floor_seconds(COST, replace(rates, copy=100), 8, "fp32") == pytest.approx((50 * 4 + 8 * 60) / 100)


@pytest.mark.parametrize(
    ("batch", "numeric_class", "cache", "spilt"),
    [
        (1, "fp32", 0, 0),
        (1, "fp32", 1600, 0),
        (1, "fp32", 1000, 600),
        (2, "fp32", 70, 10 + 3130),
        (2, "int8", 70, 730),
    ],
)
def test_only_what_the_cache_cannot_hold_is_written_and_read(
    batch: int, numeric_class: str, cache: int, spilt: int
) -> None:
    weights = 50 * (4 if numeric_class == "fp32" else 1)
    assert moved_bytes(COST, batch, numeric_class, cache) == weights + batch * 60 + 2 * spilt


def test_the_floor_takes_the_best_that_the_machine_has_shown() -> None:
    rounds = [
        {"matrix": {"fp32": 5.0, "bf16": 9.0}, "copy": 2.0, "cache": 7},
        {"matrix": {"fp32": 6.0}, "copy": 1.0, "cache": 7},
    ]
    assert best_rates(rounds) == Rates({"fp32": 6.0, "bf16": 9.0}, 2.0, 7)


def test_flops_and_activations_are_those_counted_by_hand(tiny_backbone: Backbone) -> None:
    """A layer takes two operations for each number that it gives and each weight that makes the number."""
    cost = Cost(**network_cost(tiny_backbone))
    network = load_network(tiny_backbone)
    layers = [network.encoder.get_submodule(path) for path, f in layer_families(network.encoder).items() if f != "norm"]
    per_number = [layer.weight[0].numel() for layer in layers]  # type: ignore[operator,index]
    assert isinstance(network.head, nn.Linear)
    assert isinstance(network.precision, nn.Linear)
    heads = network.head.weight.numel() + network.precision.weight.numel()
    made = 2 * sum(numbers * each for numbers, each in zip(cost.activations, per_number, strict=True))
    assert made < cost.flops <= made + 2 * heads
    weights = tiny_backbone.weights()
    assert cost.weights == sum(array.size for name, array in weights.items() if name != "centring_mean")
    assert cost.input_bytes == 3 * 32 * 32 * 4
    assert cost.output_bytes == 4 * (tiny_backbone.dim + 1 + len(tiny_backbone.answers))


class FakeProcess:
    """Answers as a worker would, at 50 images/s, compiled 100; `log` gets what it was asked."""

    def __init__(self, log: list[tuple[str, str, int]], faults: dict[tuple[str, str, int], str]) -> None:
        self.log, self.faults = log, faults
        self.runtime = "speed"

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        self.runtime = request.get("runtime", self.runtime)
        asked = (self.runtime, do, request.get("batch", 0))
        self.log.append(asked)
        if asked in self.faults:
            raise CannotRun(self.faults[asked])
        return {
            "cost": lambda: {
                "devices": {"cpu": ""},
                "cost": {"flops": 100, "weights": 10, "activations": [1], "input_bytes": 4, "output_bytes": 4},
            },
            "rates": lambda: {"matrix": {"fp32": 1e5}, "copy": 1e9, "cache": 0},
            "open": lambda: {"engine": "e", "seconds": 1.0},
            "warm": lambda: {"seconds": 0.5, "memory": 2**20 * request["batch"], "device_memory": 0},
            "best": lambda: {"batch": 16},
            "measure": lambda: {"images": 100, "seconds": 1.0 if "compile" in self.runtime else 2.0},
        }[do]()


@pytest.fixture
def faults() -> dict[tuple[str, str, int], str]:
    return {}


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch, faults: dict[tuple[str, str, int], str]) -> list[tuple[str, str, int]]:
    entries: list[tuple[str, str, int]] = []

    @contextlib.contextmanager
    def fake(threads: int) -> Iterator[FakeProcess]:
        yield FakeProcess(entries, faults)

    monkeypatch.setattr(run, "started", fake)
    monkeypatch.setattr(run, "gpu_name", lambda: "")
    return entries


def test_in_each_round_every_method_and_the_machine_are_measured_in_turn(
    tiny_backbone: Backbone, log: list[tuple[str, str, int]]
) -> None:
    report = run.bench(tiny_backbone, batches=[1, 4], rounds=2)
    torch, compiled = (f"torch{kind}-cpu" for kind in ("", "-compile"))
    assert [(name, batch) for name, do, batch in log if do in ("measure", "rates")] == [
        *(("speed", 0), (torch, 1), (compiled, 1), (torch, 4), (compiled, 4)),
        *(("speed", 0), (compiled, 1), (torch, 1), (compiled, 4), (torch, 4)),
    ]
    assert [(row.method.name, row.batch, row.rates, row.faster) for row in report.measured] == [
        ("torch-cpu fp32", 1, (50.0, 50.0), 1.0),
        ("torch-cpu fp32", 4, (50.0, 50.0), 1.0),
        ("torch-compile-cpu fp32", 1, (100.0, 100.0), 2.0),
        ("torch-compile-cpu fp32", 4, (100.0, 100.0), 2.0),
    ]
    assert {row.floor for row in report.measured} == {1000.0}
    assert [row.memory for row in report.measured][:2] == [2**20, 2**22]
    assert report.measured[0].ready_seconds == 1.5
    assert {row.reason for row in report.unmeasured} == {"this machine has no NVIDIA GPU"}


def test_auto_is_the_methods_own_batch_found_without_compiling(
    tiny_backbone: Backbone, log: list[tuple[str, str, int]]
) -> None:
    report = run.bench(tiny_backbone, batches=[1, "auto"], rounds=1)
    assert [(row.method.runtime, row.batch, row.auto) for row in report.measured] == [
        *(("torch-cpu", 1, False), ("torch-cpu", 16, True)),
        *(("torch-compile-cpu", 1, False), ("torch-compile-cpu", 16, True)),
    ]
    assert [name for name, do, _ in log if do == "best"] == ["torch-cpu", "torch-cpu"]


def test_what_fails_on_the_way_is_a_row_with_the_reason(
    tiny_backbone: Backbone, log: list[tuple[str, str, int]], faults: dict[tuple[str, str, int], str]
) -> None:
    faults |= {
        ("torch-compile-cpu", "open", 0): "no compiler",
        ("torch-cpu", "warm", 8): "no memory",
        ("torch-cpu", "measure", 4): "killed",
    }
    report = run.bench(tiny_backbone, batches=[1, 4, 8], rounds=2, only=["torch-cpu", "torch-compile-cpu"])
    assert [(row.batch, row.reason) for row in report.rows] == [
        *((1, ""), (4, "killed"), (8, "no memory"), (0, "no compiler"))
    ]
    assert "torch-cpu fp32, batch 8: no memory" in report_text(report)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": [0]}, "at least 1, or auto; got 0"),
        ({"batches": ["all"]}, "got 'all'"),
        ({"batches": []}, "no batch"),
        ({"rounds": 0}, "rounds at least 1"),
        ({"seconds": 0.0}, "seconds above 0"),
    ],
)
def test_numbers_without_sense_are_refused(tiny_backbone: Backbone, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        run.bench(tiny_backbone, **options)


@pytest.fixture
def report() -> BenchReport:
    engine = Method("onnxruntime-cpu", "int8", "onnx-int8", "verified", {"cosine_p1": 0.99871234, "overlap": 0.93})
    plan = Method("tensorrt", "fp16", "tensorrt-fp16-sm86", "unverified")
    return BenchReport(
        backbone={"name": "tiny", "architecture": "resnet", "embedding_id": "ab" * 32, "pixels": "32"},
        machine={"cpu": "A CPU", "cores": "8", "gpu": "", "system": "Linux"},
        versions={"torch": "2.11"},
        threads=4,
        seconds=1.0,
        rounds=3,
        cost=COST,
        speed={"cpu": Rates({"fp32": 1e11}, 2e10, 2**25)},
        rows=(
            Row(Method("torch-cpu", "fp32"), 8, False, (10.0, 9.0, 12.0), 1.0, 100.0, 3.0, 2**29),
            Row(engine, 8, True, (4000.0, 5000.0, 4500.0), 450.0, 9000.0, 0.5, 2**27),
            Row(plan, 0, reason="no GPU"),
        ),
        made="2026-01-01T00:00:00+00:00",
    )


def test_the_table_has_medians_ranges_fidelity_and_what_did_not_run(report: BenchReport) -> None:
    lines = report_text(report).splitlines()
    torch, engine = (" ".join(line.split()) for line in lines if line.startswith(("| torch", "| onnx")))
    assert torch == "| torch-cpu fp32 | 8 | 10.0 [9.00-12.0] | 800 | 1.00 | 10% | is torch | | 512 | 3.0 |"
    assert engine == (
        "| onnxruntime-cpu int8 | 8 (auto) | 4,500 [4,000-5,000] | 1.78 | 450.00 | 50% | 0.998712 (p1) | 0.9300 "
        "| 128 | 0.5 |"
    )
    assert lines[-1] == "  tensorrt fp16-sm86: no GPU"
    assert len({len(line) for line in lines if line.startswith("|")}) == 1


@pytest.mark.parametrize(
    ("fidelity", "cells"),
    [
        ({"cosine_min": 0.5}, "0.500000 (min) | |"),
        ({"cosine_p1": None, "cosine_min": 0.5, "overlap": None}, "0.500000 (min) | |"),
        ({}, "verified | |"),
    ],
)
def test_fidelity_is_told_as_far_as_the_report_has_it(
    report: BenchReport, fidelity: dict[str, Any], cells: str
) -> None:
    row = report.rows[1]
    rows = (replace(row, method=replace(row.method, fidelity=fidelity)),)
    assert cells in " ".join(report_text(replace(report, rows=rows)).split())


def test_the_folder_has_a_page_all_numbers_and_a_plot(report: BenchReport, tmp_path: Path) -> None:
    page, numbers, plot = write_report(report, tmp_path / "new" / "folder")
    assert page.read_text() == report_page(report)
    assert "- tensorrt fp16-sm86: no GPU" in page.read_text()
    data = json.loads(numbers.read_text())
    assert data["rows"][1]["rates"] == [4000.0, 5000.0, 4500.0]
    assert (data["rows"][1]["rate"], data["rows"][1]["name"]) == (4500.0, "onnxruntime-cpu int8")
    assert (data["versions"], data["machine"]["cpu"]) == ({"torch": "2.11"}, "A CPU")
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_fastest_is_on_top_of_the_plot_and_nothing_is_a_plot_too(report: BenchReport) -> None:
    labels = [label.get_text() for label in report_figure(report).axes[0].get_yticklabels()]
    assert labels == ["torch-cpu fp32", "onnxruntime-cpu int8"]
    assert report_figure(replace(report, rows=report.rows[2:])).axes


def test_a_worker_answers_a_fault_instead_of_ending(with_reports: Backbone) -> None:
    ask = {"backbone": str(with_reports.path), "runtime": "onnxruntime-cpu", "threads": 1}
    assert "not the engine that was verified" in answer(Worker(), {"do": "open", "engine": "onnx-int8"} | ask)["fault"]
    assert answer(Worker(), {"do": "warm", "batch": 1})["fault"].startswith("AttributeError: ")


def test_a_process_that_dies_says_how() -> None:
    with started(1) as process:
        process._process.kill()
        with pytest.raises(CannotRun, match="its process ended with exit code -9"):
            process.ask("best")


def test_the_machine_is_known_on_linux() -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("not Linux")
    assert cores() >= 1
    assert "unknown" not in cpu_name()
    assert 2**20 < resident_memory() <= peak_memory()
    assert free_memory() > 0
    assert cache_bytes() >= 0


def test_the_command_measures_a_backbone(with_reports: Backbone, tmp_path: Path) -> None:
    names = [item for name in ("torch-cpu fp32", "onnxruntime-cpu int8") for item in ("--only", name)]
    arguments = ["bench", str(with_reports.path), "--batch", "1,2", "--threads", "1", "--seconds", "0.01", *names]
    result = CliRunner().invoke(main, [*arguments, "--rounds", "2", "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "onnxruntime-cpu int8: " in result.output
    rows = json.loads((tmp_path / "out" / "bench.json").read_text())["rows"]
    assert [(row["name"], row["batch"], len(row["rates"])) for row in rows] == [
        *(("torch-cpu fp32", 1, 2), ("torch-cpu fp32", 2, 2), ("onnxruntime-cpu int8", 0, 0))
    ]
    assert all(row["rate"] > 0 for row in rows[:2])
    assert rows[0]["memory"] > 2**26


@pytest.mark.slow
def test_compiled_torch_gives_the_same_vectors(tiny_backbone: Backbone) -> None:
    from galembed.runtimes.floor import CompiledRuntime
    from galembed.runtimes.torch import TorchRuntime

    images = tiny_backbone.samples()["flux"]
    compiled, plain = CompiledRuntime(tiny_backbone, device="cpu"), TorchRuntime(tiny_backbone, device="cpu")
    assert compiled.engine.startswith("torch-compile-cpu-fp32:")
    cosine = (compiled.embed(images, "flux").vectors * plain.embed(images, "flux").vectors).sum(axis=1)
    assert cosine.min() > 0.99999


@pytest.mark.parametrize("batch", ["0", "many", "1,,2", "-1"])
def test_a_batch_that_is_no_number_is_a_usage_error(batch: str) -> None:
    result = CliRunner().invoke(main, ["bench", "--batch", batch])
    assert result.exit_code == 2
    assert "write one of at least 1, or auto" in result.output
