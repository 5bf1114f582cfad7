"""What an embedding job did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from catalogue_jobs.partition import Timings


@dataclass(frozen=True)
class JobReport:
    """Account of one run; `str` gives it for reading.

    Attributes
    ----------
    store : str
    listed : int
        Sources in the list, without the rejected ones.
    planned : int
        Sources that this run had to do.
    already_embedded, already_failed : int
        Sources that the store had when it began; the failed ones were not tried again.
    embedded : int
        Sources embedded by this run.
    failed : mapping of str to int
        Sources that failed in this run, by reason, most frequent first.
    examples : mapping of str to str
        Message of one failure of each reason.
    changed : int
        Embedded sources whose file had changed since, and that this run had to do again.
    outdated : int
        Embedded sources whose file has changed since, left as they are.
    withdrawn : int
        Sources that the store has, of a survey of the list, and that are not in the list.
    pruned : int
        Withdrawn sources that this run removed from the store.
    seconds : Timings
        Summed over workers.
    engine_busy : float
        Share of the time in which the workers' engines were at work, 0 to 1.
    tiles, tiles_opened : int
        Survey tiles with sources of this run, and how often one was opened; 0 where each source has files of its own.
    wall_seconds : float
    engine : str
        Runtime and digest; empty where there was nothing to do.
    passed_over : tuple of str
        Engines that would have been faster, each with why it was not taken.
    workers : int
    """

    store: str
    listed: int
    planned: int
    already_embedded: int
    already_failed: int
    embedded: int = 0
    failed: Mapping[str, int] = field(default_factory=dict)
    examples: Mapping[str, str] = field(default_factory=dict)
    changed: int = 0
    outdated: int = 0
    withdrawn: int = 0
    pruned: int = 0
    seconds: Timings = field(default_factory=Timings)
    engine_busy: float = 0.0
    tiles: int = 0
    tiles_opened: int = 0
    wall_seconds: float = 0.0
    engine: str = ""
    passed_over: tuple[str, ...] = ()
    workers: int = 0

    @property
    def images_per_second(self) -> float:
        """Embedded images over wall time, starting and committing included."""
        return self.embedded / self.wall_seconds if self.wall_seconds else 0.0

    @property
    def failures(self) -> int:
        """Sources that failed in this run, those that the list itself rejected included."""
        return sum(self.failed.values())

    def __str__(self) -> str:
        lines = [*self._done(), *self._failures()]
        if self.outdated:
            lines.append(f"{self.outdated:,} embedded source(s) have other files now; their vectors are left alone")
        if self.pruned:
            lines.append(f"removed {self.pruned:,} source(s) that the list no longer has")
        if self.withdrawn:
            lines.append(
                f"{self.withdrawn:,} source(s) of the store are of this survey, yet not in this list; "
                "--prune removes them"
            )
        return "\n".join(lines)

    def _done(self) -> list[str]:
        if not self.planned:
            failed = f", {self.already_failed:,} failed before (try them again with --retry-failed)"
            return [
                f"nothing to do: {self.already_embedded:,} of {self.listed:,} sources are in {self.store}"
                + (failed if self.already_failed else "")
            ]
        spent = self.seconds
        before = self.already_embedded + self.already_failed
        tiles = f"{self.tiles:,} tile(s), each opened {self.tiles_opened / max(self.tiles, 1):.2f} times"
        return [
            f"embedded {self.embedded:,} of {self.planned:,} sources into {self.store}"
            + (f" ({before:,} of {self.listed:,} were done before)" if before else "")
            + (f"; the files of {self.changed:,} had changed" if self.changed else ""),
            f"{self.wall_seconds:.1f} s, {self.images_per_second:.1f} images/s, {self.workers} worker(s), "
            f"{self.engine}",
            f"time in workers: read {spent.read:.1f} s, cut {spent.cut:.1f} s, infer {spent.infer:.1f} s, "
            f"write {spent.write:.1f} s; {bound_by(spent, self.engine_busy)}",
            *([tiles] if self.tiles else []),
            *(f"not {reason}" for reason in self.passed_over),
        ]

    def _failures(self) -> list[str]:
        if not self.failed:
            return []
        lines = [
            f"failed: {self.failures:,}, listed by `galembed status {self.store} --failures failed.csv`; "
            "try them again with --retry-failed"
        ]
        for reason, count in self.failed.items():
            lines.append(f"  {count:,} {reason}, as in: {self.examples.get(reason, '')}")
        return lines


_BUSY: Final = 0.8
"""Share of the time in an engine from which nothing else is worth speeding up."""

_IDLE: Final = 0.3
"""Share of the time in an engine below which workers that do little else stand idle, as in a small job."""


def bound_by(seconds: Timings, busy: float) -> str:
    """Return in words what a job's speed hangs on.

    Parameters
    ----------
    seconds : Timings
        Summed over workers.
    busy : float
        Share of the time in which the engines were at work.
    """
    spent = {"reading": seconds.read, "cutting": seconds.cut, "writing": seconds.write}
    if not seconds.infer and not any(spent.values()):
        return "nothing measured yet"
    foremost = seconds.infer >= sum(spent.values())
    if busy >= _BUSY or (foremost and busy >= _IDLE):
        return f"bound by the engine, at work {busy:.0%} of the time"
    most = "starting and waiting" if foremost else max(spent, key=lambda stage: spent[stage])
    return f"bound by {most}; the engine is at work {busy:.0%} of the time"
