"""The state of a store, for reading."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from galembed.schemas import StoreContract
from galembed.store.jobs import job_text, worker_lines
from galembed.store.nearest import IndexSearch


@dataclass(frozen=True)
class Status:
    """The state of a store; `str` gives it for reading.

    Attributes
    ----------
    path : str
    rows : int
        Embedded sources.
    dim : int
        Length of the vectors.
    failures : mapping of str to int
        Sources without a vector, by reason.
    contract : StoreContract
    engines : mapping of str to int
        Rows made by each engine.
    partitions : int
        Units of work among the rows.
    index : str
        Kind of vector index, or ``exact``.
    unindexed : int
        Rows that the vector index does not hold; they are searched exactly, which costs time.
    job : mapping
        Account of the last embedding job; empty if there is none.
    writer : str, optional
        The job that is writing it now.
    carried : tuple of str
        Catalogue columns.
    predictions : tuple of str
        Columns of predicted vote fractions and numbers.
    flags : mapping of str to int
        Rows with each warning about the picture (`galembed.quality.FLAGS`).
    index_search : IndexSearch, optional
        How the vector index is searched; None without one.
    """

    path: str
    rows: int
    dim: int
    failures: Mapping[str, int]
    contract: StoreContract
    engines: Mapping[str, int]
    partitions: int
    index: str
    unindexed: int
    job: Mapping[str, Any] = field(default_factory=dict)
    writer: str | None = None
    carried: tuple[str, ...] = ()
    predictions: tuple[str, ...] = ()
    flags: Mapping[str, int] = field(default_factory=dict)
    index_search: IndexSearch | None = None

    def __str__(self) -> str:
        contract = self.contract
        bands = ", ".join(f"{role} = {band}" for role, band in contract.bands.items())
        failed = ", ".join(f"{count:,} {reason}" for reason, count in self.failures.items())
        index = self.index if self.index == "exact" else f"{self.index} ({self.unindexed:,} rows not in it)"
        index += f"; {self.index_search}" if self.index_search else ""
        head = f"{len(self.predictions)} predictions, from {self.predictions[0]}" if self.predictions else "none"
        lines = {
            "store": self.path,
            "sources": f"{self.rows:,} in {self.partitions:,} partitions",
            "failures": failed or "none",
            "flagged": ", ".join(f"{count:,} {word}" for word, count in self.flags.items()) or "none",
            "backbone": f"{contract.backbone} ({contract.embedding_id[:12]})",
            "vectors": f"{self.dim} numbers, {contract.numeric_class}"
            + (f"; pictures of {contract.thumbnails} pixels" if contract.thumbnails else ""),
            "input": ", ".join(
                filter(
                    None,
                    (
                        contract.input_kind,
                        contract.survey.partition("#")[0],
                        bands,
                        contract.fov and f"field {contract.fov}",
                    ),
                )
            ),
            "columns": ", ".join(self.carried) or "none carried from a catalogue",
            "head": head,
            "engines": ", ".join(f"{name} ({count:,})" for name, count in self.engines.items()) or "none",
            "search": index,
            "last job": job_text(self.job, self.writer),
        }
        shown = [f"{name:<9} {text}" for name, text in lines.items()]
        shown += [f"{'':<9} {line}" for line in (worker_lines(self.job) if self.writer else ())]
        return "\n".join(shown)
