"""The best batch: found by measuring, and measured once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from galembed.backbones import Backbone
from galembed.runtimes import Embedded, batches
from galembed.runtimes.batches import best_batch, example_images, fastest, sweep


class TimedRuntime:
    """Takes as long as it is told for a batch, on a clock of its own; refuses batches above `most`."""

    numeric_class, batch = "fp32", 16

    def __init__(self, seconds: Callable[[int], float], most: int = 10**6, engine: str = "torch-cpu-fp32:0") -> None:
        self.seconds, self.most, self.engine = seconds, most, engine
        self.now = 0.0
        self.seen: list[int] = []

    def embed(self, images: NDArray[Any], kind: str) -> Embedded:
        if len(images) > self.most:
            raise MemoryError(f"no room for {len(images)}")
        self.seen.append(len(images))
        self.now += self.seconds(len(images))
        nothing = np.zeros((len(images), 1), np.float32)
        return Embedded(nothing, nothing[:, 0], nothing)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GALEMBED_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "batches.json"


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., TimedRuntime]:
    def make(seconds: Callable[[int], float], **options: Any) -> TimedRuntime:
        runtime = TimedRuntime(seconds, **options)
        monkeypatch.setattr(batches, "time", SimpleNamespace(perf_counter=lambda: runtime.now))
        return runtime

    return make


def amortised(images: int) -> float:
    """A fixed cost beside that of each image: the rate rises by more than 3% up to 256."""
    return 0.01 + 0.001 * images


def test_a_rate_that_goes_on_rising_takes_the_largest_batch(timed: Any, tiny_backbone: Backbone) -> None:
    assert best_batch(timed(amortised), tiny_backbone, "flux") == 256
    assert best_batch(timed(amortised), tiny_backbone, "flux", limit=100) == 64


def test_a_level_rate_takes_single_images_and_tries_two_more_sizes(timed: Any, tiny_backbone: Backbone) -> None:
    runtime = timed(lambda images: 0.05 * images)
    assert best_batch(runtime, tiny_backbone, "flux") == 1
    assert sorted(set(runtime.seen)) == [1, 2, 4]


def test_one_size_that_is_slow_does_not_end_it(timed: Any, tiny_backbone: Backbone) -> None:
    runtime = timed(lambda images: 0.01 * images if images in (1, 2) else 0.002 * images)
    assert best_batch(runtime, tiny_backbone, "flux") == 4


def test_a_busy_moment_does_not_end_it(timed: Any, tiny_backbone: Backbone) -> None:
    runtime = timed(lambda images: amortised(images) * (5 if 0.21 < runtime.now < 1.0 else 1))
    rates = sweep(runtime, tiny_backbone, "flux")
    assert list(rates)[-1] == 256
    assert rates[2] == pytest.approx(2 / amortised(2))


def test_a_gain_of_less_than_three_percent_is_not_worth_the_memory() -> None:
    assert fastest({1: 100.0, 2: 198.0, 4: 203.0, 8: 202.0}) == 2


def test_it_stays_below_what_the_engine_refuses(timed: Any, tiny_backbone: Backbone) -> None:
    assert best_batch(timed(amortised, most=20), tiny_backbone, "flux") == 16
    with pytest.raises(MemoryError, match="no room for 1"):
        best_batch(timed(amortised, most=0, engine="torch-cpu-fp32:1"), tiny_backbone, "flux")


@pytest.mark.parametrize(("threads", "largest"), [(0, 32), (4, 32), (1, 8)])
def test_it_takes_no_more_than_half_of_the_free_memory_or_its_cores_part_of_it(
    timed: Any, tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch, threads: int, largest: int
) -> None:
    runtime = timed(amortised)
    monkeypatch.setattr(batches, "resident_memory", lambda: 100)
    monkeypatch.setattr(batches, "peak_memory", lambda: 100 + 10 * max(runtime.seen, default=0))
    monkeypatch.setattr(batches, "free_memory", lambda: 640)
    monkeypatch.setattr(batches, "cores", lambda: 4)
    assert max(sweep(runtime, tiny_backbone, "flux", threads=threads)) == largest


def test_a_slow_network_is_measured_for_seconds_not_minutes(timed: Any, tiny_backbone: Backbone) -> None:
    runtime = timed(lambda images: 1.0 + 0.5 * images)
    sweep(runtime, tiny_backbone, "flux")
    assert runtime.seen == [1, 1, 1]


def test_it_is_measured_once(timed: Any, tiny_backbone: Backbone, cache: Path) -> None:
    assert best_batch(timed(amortised), tiny_backbone, "flux") == 256
    again = timed(amortised)
    assert best_batch(again, tiny_backbone, "flux") == 256
    assert again.seen == []
    (record,) = json.loads(cache.read_text()).values()
    assert record["batch"] == 256
    assert record["images_per_second"]["1"] == pytest.approx(1 / 0.011)
    assert [file.name for file in cache.parent.iterdir()] == ["batches.json"]


@pytest.mark.parametrize("other", [{"kind": "display"}, {"threads": 1}, {"limit": 128}, {"engine": "torch-cpu-fp32:1"}])
def test_it_is_measured_again_for_what_it_depends_on(
    timed: Any, tiny_backbone: Backbone, cache: Path, monkeypatch: pytest.MonkeyPatch, other: dict[str, Any]
) -> None:
    monkeypatch.setattr(batches, "cores", lambda: 2)
    best_batch(timed(amortised), tiny_backbone, "flux")
    runtime = timed(amortised, engine=other.pop("engine", "torch-cpu-fp32:0"))
    best_batch(runtime, tiny_backbone, **({"kind": "flux"} | other))
    assert runtime.seen
    assert len(json.loads(cache.read_text())) == 2


@pytest.mark.parametrize(
    "damage", ["", "{", "[1]", '"batch"', "{NAME: 7}", '{NAME: {"batch": 0}}', '{NAME: {"batch": true}}']
)
def test_a_damaged_file_is_measured_again(timed: Any, tiny_backbone: Backbone, cache: Path, damage: str) -> None:
    best_batch(timed(amortised), tiny_backbone, "flux")
    (name,) = json.loads(cache.read_text())
    cache.write_text(damage.replace("NAME", json.dumps(name)))
    runtime = timed(amortised)
    assert best_batch(runtime, tiny_backbone, "flux") == 256
    assert runtime.seen
    assert json.loads(cache.read_text())[name]["batch"] == 256


def test_a_cache_that_cannot_be_written_costs_a_warning(
    timed: Any, tiny_backbone: Backbone, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.parent.write_text("a file, not a folder")
    assert best_batch(timed(amortised), tiny_backbone, "flux") == 256
    assert "will be measured again" in caplog.text


@pytest.mark.parametrize("kind", ["flux", "display"])
def test_the_images_that_are_measured_fit_the_contract(tiny_backbone: Backbone, kind: str) -> None:
    images, samples = example_images(tiny_backbone, kind, 3), tiny_backbone.samples()[kind]
    assert (images.dtype, images.shape[1:], len(images)) == (samples.dtype, samples.shape[1:], 3)
    assert images.flags.c_contiguous
    assert images.flags.writeable
