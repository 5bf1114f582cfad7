"""The account of the last embedding job, read from another process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def job_text(facts: Mapping[str, Any], writer: str | None) -> str:
    """Return in words how the last job stands.

    Parameters
    ----------
    facts : mapping
        Of `job.json`; empty where there is none.
    writer : str, optional
        The live process that holds the store's lease.
    """
    if not facts:
        return "unknown"
    planned, embedded, failed = (int(facts.get(name) or 0) for name in ("planned", "embedded", "failed"))
    state = str(facts.get("state") or "unknown")
    if state == "running" and writer is None:
        state = "killed; the same command goes on"
    words = [state, f"{embedded:,} of {planned:,} sources embedded, {failed:,} failed"]
    if state == "running":
        words.append(f"{float(facts.get('images_per_second') or 0):.1f} images/s")
        if left := float(facts.get("seconds_left") or 0):
            words.append(f"about {duration(left)} left")
        words.append(f"by {writer}")
    else:
        words.append(f"in {duration(float(facts.get('seconds') or 0))}")
    words += [str(facts[name]) for name in ("bound_by", "error") if facts.get(name)]
    if state == "running" and facts.get("dashboard"):
        words.append(str(facts["dashboard"]))
    return ", ".join(words)


def worker_lines(facts: Mapping[str, Any]) -> list[str]:
    """Return for each worker how its time divides over the stages; nothing where none is known."""
    lines = []
    for name, stages in dict(facts.get("seconds_of_workers") or {}).items():
        total = sum(stages.values())
        if total > 0:
            shares = ", ".join(f"{stage} {spent / total:.0%}" for stage, spent in stages.items())
            lines.append(f"{name}: {shares}")
    return lines


def duration(seconds: float) -> str:
    """Return a time in the unit that suits it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
