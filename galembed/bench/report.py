"""What a benchmark found, as numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from galembed.bench.floors import Cost, Rates, floor_seconds
from galembed.bench.methods import Method


@dataclass(frozen=True)
class Row:
    """A method with one size of batch, or why it did not run.

    Attributes
    ----------
    method : Method
    batch : int
        0 if the method could not be opened at all.
    auto : bool
        If this is the batch that `galembed.runtimes.batches.best_batch` chose.
    rates : tuple of float
        Images/s, one a round.
    faster : float
        Than torch as it is, in float32 on the same device with the same batch: the median of the rounds' ratios. 0
        where that was not measured.
    floor : float
        Images/s that nothing can beat (`galembed.bench.floors`); 0 if unknown.
    ready_seconds : float
        To load it and embed the first batch of this size, compiling included.
    memory, device_memory : int
        Most bytes held by its process, with this batch and smaller ones; of the GPU, by torch. 0 if unknown.
    reason : str
        Why it did not run; empty if it did.
    """

    method: Method
    batch: int
    auto: bool = False
    rates: tuple[float, ...] = ()
    faster: float = 0.0
    floor: float = 0.0
    ready_seconds: float = 0.0
    memory: int = 0
    device_memory: int = 0
    reason: str = ""

    @property
    def rate(self) -> float:
        """Median images/s."""
        return median(self.rates)

    @property
    def milliseconds(self) -> float:
        """Of a batch."""
        return 1000 * self.batch / self.rate

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready form, derived numbers with it."""
        derived = {"rate": self.rate, "milliseconds": self.milliseconds} if self.rates else {}
        return asdict(self) | {"name": self.method.name, "device": self.method.device} | derived


@dataclass(frozen=True)
class BenchReport:
    """A benchmark of a backbone on a machine.

    Attributes
    ----------
    backbone : mapping of str to str
        Its name, architecture, embedding_id and side in pixels.
    machine, versions : mapping of str to str
    threads : int
    seconds : float
        Of each measurement, about.
    rounds : int
    cost : Cost
        Of one image.
    speed : mapping of str to Rates
        By device.
    rows : tuple of Row
        Those that ran, then those that did not.
    made : str
        Date and time, UTC.
    """

    backbone: Mapping[str, str]
    machine: Mapping[str, str]
    versions: Mapping[str, str]
    threads: int
    seconds: float
    rounds: int
    cost: Cost
    speed: Mapping[str, Rates] = field(default_factory=dict)
    rows: tuple[Row, ...] = ()
    made: str = ""

    @property
    def measured(self) -> list[Row]:
        """The rows that ran."""
        return [row for row in self.rows if row.rates]

    @property
    def unmeasured(self) -> list[Row]:
        """The rows that did not."""
        return [row for row in self.rows if not row.rates]

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready form."""
        return asdict(self) | {"rows": [row.to_dict() for row in self.rows]}


def floor_rate(cost: Cost, speed: Mapping[str, Rates], method: Method, batch: int) -> float:
    """Return the images/s that no engine of a method's numeric class can beat on its device; 0 if unknown."""
    rates = speed.get(method.device)
    return batch / floor_seconds(cost, rates, batch, method.numeric_class) if rates else 0.0
