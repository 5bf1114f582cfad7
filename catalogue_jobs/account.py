"""The committing side of a run: collects results, commits them in large pieces, keeps account.

While it runs, the account is in the store's `job.json` every few seconds, where `galembed status` finds it.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Final, Self

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from catalogue_jobs.partition import Timings
from catalogue_jobs.plan import Outstanding
from catalogue_jobs.report import JobReport, bound_by
from catalogue_jobs.signals import uninterrupted
from catalogue_jobs.worker import Result
from galembed.errors import BadRequest
from galembed.store.commit import Finished, commit
from galembed.store.keys import KEY, joined_key
from galembed.store.lease import Lease
from galembed.store.places import JOB_FILE, join, write_json

COMMIT_ROWS: Final = 20_000
COMMIT_SECONDS: Final = 20.0
"""Finished partitions are committed together once they have so many rows, or are so old."""

WRITE_SECONDS: Final = 5.0
"""How old `job.json` may get while results come in."""

_TELLING: Final = 1_000
"""Sources tried from which a share of failures says something about the rest."""


@dataclass
class Account:
    """What a run has done so far. A context manager: on leaving, what is finished is committed, whatever ended it.

    Attributes
    ----------
    store : str
    lease : Lease
    todo : Outstanding
    started : float
        By `time.monotonic`.
    max_failures : float or None
    show : bool
        Draw a bar on stderr.
    engine : str
    passed_over : tuple of str
        Engines that would have been faster, each with why it was not taken.
    """

    store: str
    lease: Lease
    todo: Outstanding
    started: float
    max_failures: float | None
    show: bool
    engine: str = ""
    passed_over: tuple[str, ...] = ()
    workers: int = 0
    dashboard: str = ""
    embedded: int = 0
    pruned: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    of_workers: dict[str, Timings] = field(default_factory=lambda: defaultdict(Timings))
    tiles_opened: int = 0

    def __post_init__(self) -> None:
        self._waiting: list[Finished] = []
        self._committed: set[str] = set()
        self._rows = 0
        self._taken = 0
        self._bad = 0
        self._committed_at = self._written_at = self._first = time.monotonic()
        self._changed = joined_key(self.todo.changed)
        self._bar = Progress(
            TextColumn("embedding"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:.1f} images/s, {task.fields[failed]} failed, {task.fields[bound]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not self.show,
        )
        self._line = self._bar.add_task("", total=len(self.todo.table), rate=0.0, failed=0, bound="starting")

    def __enter__(self) -> Self:
        self._write("running")
        if len(self.todo.table):
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._bar.stop()
        self.commit()
        if kind is None:
            self._write("finished")
            return
        interrupted = issubclass(kind, KeyboardInterrupt)
        self._write("interrupted" if interrupted else "failed", error="" if interrupted else str(error))
        if interrupted:
            raise KeyboardInterrupt(
                f"interrupted: {self.embedded:,} of {len(self.todo.table):,} sources are embedded and kept "
                f"in {self.store}; the same command goes on from there"
            ) from error

    def announce(self, parts: int) -> None:
        """Say what is about to be done."""
        self._first = time.monotonic()
        if not self.show:
            return
        before = self.todo.embedded + self.todo.failed
        self._bar.console.print(
            "; ".join((self.engine, *(f"not {reason}" for reason in self.passed_over)))
            + f"; {len(self.todo.table):,} of {self.todo.listed:,} sources to embed"
            + (f" ({before:,} done before)" if before else "")
            + f" in {parts:,} partition(s) on {self.workers} worker(s)"
            + ("" if self.workers else ": waiting for one to join the scheduler")
            + (f"; Dask's dashboard: {self.dashboard}" if self.dashboard else ""),
            highlight=False,
            soft_wrap=True,
        )

    def take(self, result: Result, rows: pa.Table) -> None:
        """Take a finished partition of `rows`; commit when enough have come together.

        Raises
        ------
        BadRequest
            If too many sources have failed.
        """
        finished = result.finished
        if len(self._changed):
            before = pc.is_in(joined_key(rows), value_set=self._changed)
            finished = replace(finished, replaced=rows.select(list(KEY)).filter(before))
        failures = finished.failures
        self._waiting.append(finished)
        self.embedded += result.embedded
        self.count(failures)
        self._bad += len(failures)
        self.of_workers[result.worker] += result.timings
        self.tiles_opened += result.tiles_opened
        self._rows += result.embedded + len(failures)
        self._taken += result.embedded + len(failures)
        self._bar.update(
            self._line,
            completed=self._taken,
            rate=self._rate(),
            failed=sum(self.failed.values()),
            bound=re.split("[;,]", bound_by(self.seconds, self._busy()))[0],
        )
        now = time.monotonic()
        if self._rows >= COMMIT_ROWS or now - self._committed_at >= COMMIT_SECONDS:
            self.commit()
        elif now - self._written_at >= WRITE_SECONDS:
            self._write("running")
        self._stop_at_too_many()

    def count(self, failures: pa.Table) -> None:
        """Add failures to the account."""
        reasons = failures["reason"].to_pylist()
        self.failed.update(reasons)
        self.examples = dict(zip(reasons, failures["message"].to_pylist(), strict=True)) | self.examples

    @property
    def seconds(self) -> Timings:
        """Summed over workers."""
        return sum(self.of_workers.values(), Timings())

    def report(self) -> JobReport:
        """Return the account of this run."""
        return JobReport(
            store=self.store,
            listed=self.todo.listed,
            planned=len(self.todo.table),
            already_embedded=self.todo.embedded,
            already_failed=self.todo.failed,
            embedded=self.embedded,
            failed=dict(self.failed.most_common()),
            examples=self.examples,
            changed=len(self.todo.changed),
            outdated=self.todo.outdated,
            withdrawn=len(self.todo.withdrawn) - self.pruned,
            pruned=self.pruned,
            seconds=self.seconds,
            engine_busy=self._busy(),
            tiles=len(self.todo.table["source_uri"].unique()) if self.tiles_opened else 0,
            tiles_opened=self.tiles_opened,
            wall_seconds=time.monotonic() - self.started,
            engine=self.engine,
            passed_over=self.passed_over,
            workers=self.workers,
        )

    def commit(self) -> None:
        """Make visible what is finished."""
        if self._waiting:
            with uninterrupted():
                # What is planned under the lease has no rows yet: only a result that came twice is there.
                commit(self.store, self._waiting, self.lease, there=self._committed)
                self._committed.update(finished.partition for finished in self._waiting)
                self._waiting = []
        self._rows, self._committed_at = 0, time.monotonic()
        self._write("running")

    def _rate(self) -> float:
        """Images embedded a second since the workers began."""
        return self.embedded / max(time.monotonic() - self._first, 1e-3)

    def _busy(self) -> float:
        """Return the share of the time so far in which the workers' engines were at work, as far as is known."""
        elapsed = time.monotonic() - self._first
        return min(1.0, self.seconds.infer / max(elapsed * max(len(self.of_workers), 1), 1e-3))

    def _stop_at_too_many(self) -> None:
        planned = len(self.todo.table)
        telling = max(self._taken, min(planned, _TELLING))
        if self.max_failures is None or self._bad <= self.max_failures * telling:
            return
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.failed.most_common(3))
        last = f"; one of them: {next(iter(self.examples.values()))}"
        raise BadRequest(
            f"stopped: {self._bad:,} of the {self._taken:,} sources tried so far failed ({reasons}), more than "
            f"--max-failures {self.max_failures:g} allows{last}. What was embedded is kept; the same command goes on"
        )

    def _write(self, state: str, **extra: str) -> None:
        rate, left = self._rate(), len(self.todo.table) - self._taken
        facts: dict[str, Any] = {
            "state": state,
            "planned": len(self.todo.table),
            "embedded": self.embedded,
            "failed": sum(self.failed.values()),
            "already_done": self.todo.embedded + self.todo.failed,
            "seconds": round(time.monotonic() - self.started, 1),
            "images_per_second": round(rate, 2),
            "seconds_left": round(left / rate, 1) if rate and left else 0.0,
            "bound_by": bound_by(self.seconds, self._busy()),
            "workers": self.workers,
            "seconds_of_workers": {
                name: {stage: round(spent, 2) for stage, spent in asdict(timings).items()}
                for name, timings in self.of_workers.items()
            },
            "dashboard": self.dashboard,
            "engine": self.engine,
            "passed_over": list(self.passed_over),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "updated": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        with self.lease.fence():
            write_json(join(self.store, JOB_FILE), facts | extra)
        self._written_at = time.monotonic()
