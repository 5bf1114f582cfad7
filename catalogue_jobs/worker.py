"""The worker's side of a job: one partition in, files and an account out. What it returns holds no vectors.

A worker has two partitions in hand: while one is in the engine, the other is read and cut, or written. The engine
is entered by one at a time, so that its threads and the other workers' are no more than the cores.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import pyarrow as pa

from catalogue_jobs.metrics import count
from catalogue_jobs.partition import Timings, embed_partition
from galembed.backbones import Backbone, load_backbone
from galembed.errors import ArtifactMismatch, BadRequest
from galembed.runtimes import Runtime, choose_runtime, open_runtime
from galembed.runtimes.batches import AUTO, best_batch
from galembed.sources import SourceReader
from galembed.store.commit import Finished, store_schema, write_fragments
from galembed.store.keys import open_table
from galembed.store.places import EMBEDDINGS_TABLE

_JOBS: Final = 4  # whose tables are kept open


@dataclass(frozen=True)
class Work:
    """What every task of a job needs; it travels to the workers.

    Attributes
    ----------
    reader : SourceReader
    store : str
        Absolute path or URL.
    backbone : Path
    embedding_id, head_id, numeric_class : str
        What the worker's backbone and engine must have.
    runtime : str
    engine_threads : int
    batch : int or str, optional
        The engine's own number unless given; ``auto`` has each worker find the best.
    job : str
        Names the job among those that a worker has seen.
    """

    reader: SourceReader
    store: str
    backbone: Path
    embedding_id: str
    head_id: str
    numeric_class: str
    runtime: str
    engine_threads: int
    batch: int | Literal["auto"] | None
    job: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(frozen=True)
class Result:
    """What a task returns: no vectors.

    Attributes
    ----------
    finished : Finished
    embedded : int
    timings : Timings
    tiles_opened : int
    worker : str
        Host and process.
    """

    finished: Finished
    embedded: int
    timings: Timings
    tiles_opened: int = 0
    worker: str = ""


_engines: dict[tuple[Any, ...], tuple[Backbone, Runtime]] = {}
_batches: dict[tuple[Any, ...], int] = {}
_engines_lock = threading.Lock()
_tables: dict[tuple[str, str], Any] = {}
_tables_lock = threading.Lock()
_in_engine = threading.Lock()


def embed_task(work: Work, partition: str, rows: pa.Table) -> Result:
    """Embed one partition in a worker and write its rows as fragments, unseen until they are committed."""
    backbone, engine = _engine(work)
    table = _table(work)
    outcome = embed_partition(
        rows,
        work.reader,
        engine,
        backbone.contract,
        table.schema,
        partition=partition,
        batch=batch_task(work),
        turn=_in_engine,
    )
    start = time.perf_counter()
    fragments = write_fragments(work.store, outcome.embeddings, table)
    timings = outcome.timings + Timings(write=time.perf_counter() - start)
    count(len(outcome.embeddings), outcome.failures, timings)
    finished = Finished(partition, tuple(fragments), outcome.failures)
    return Result(finished, len(outcome.embeddings), timings, outcome.tiles_opened, worker_name())


def worker_name() -> str:
    """Return host and process, by which an account tells workers apart."""
    return f"{socket.gethostname()}:{os.getpid()}"


def batch_task(work: Work) -> int | None:
    """Return how many images this process's engine is given at once, measured once where that is asked for."""
    if work.batch != AUTO:
        return work.batch
    backbone, engine = _engine(work)
    name = (engine.engine, work.reader.kind, work.engine_threads)
    with _engines_lock:
        if name not in _batches:
            _batches[name] = best_batch(engine, backbone, work.reader.kind, threads=work.engine_threads)
        return _batches[name]


def choice_task(backbone: Path, runtime: str, precision: str) -> tuple[str, tuple[str, ...]]:
    """Return the engine that this process would use, and the reasons against faster ones."""
    choice = choose_runtime(load_backbone(backbone), runtime, precision=precision)
    return choice.runtime.engine, choice.passed_over


def _table(work: Work) -> Any:
    """Return the store's `embeddings` as this process first saw it in this job: rows are written beside any version.

    To open the newest for every partition took four times as long as to write, once a million rows were there.
    """
    name = (work.store, work.job)
    with _tables_lock:
        if name not in _tables:
            if store_schema(work.store) is None:
                host = socket.gethostname()
                raise BadRequest(f"worker {host} sees no store at {work.store}; use a path that all share")
            while len(_tables) >= _JOBS:
                _tables.pop(next(iter(_tables)))
            _tables[name] = open_table(work.store, EMBEDDINGS_TABLE)
        return _tables[name]


def _engine(work: Work) -> tuple[Backbone, Runtime]:
    """Return this process's backbone and engine, loaded once.

    Raises
    ------
    ArtifactMismatch
        If this worker's files are another backbone.
    ArtifactNotFound
        If it has no engine of the store's numeric class that this worker can run.
    """
    name = (work.backbone, work.embedding_id, work.head_id, work.runtime, work.numeric_class, work.engine_threads)
    with _engines_lock:
        if name not in _engines:
            backbone = load_backbone(work.backbone)
            if backbone.embedding_id != work.embedding_id:
                raise ArtifactMismatch(
                    f"{work.backbone} on worker {socket.gethostname()} has embedding_id "
                    f"{backbone.embedding_id[:12]}, the job's is {work.embedding_id[:12]}; "
                    "give all workers the same files"
                )
            if backbone.head_id != work.head_id:
                raise ArtifactMismatch(
                    f"{work.backbone} on worker {socket.gethostname()} has another question head (head_id "
                    f"{backbone.head_id[:12]}, the job's is {work.head_id[:12]}); give all workers the same files"
                )
            engine = open_runtime(backbone, work.runtime, precision=work.numeric_class, threads=work.engine_threads)
            _engines[name] = backbone, engine
        return _engines[name]
